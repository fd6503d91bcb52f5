"""Retention of history, resyncs of older clients, and repeated requests after expiry."""

import secrets
import time
from pathlib import Path

import filelock
import msgspec
import pytest
from harness import Copy, Running, make_data, serving, tree_of, until
from lattice.core.config import default_config, serialize_config
from lattice.storage.fs import atomic_write, ensure_lattice_dirs
from worker_process import ANA, WorkerProcess, answer_of, execute, make_project

from lattice_remote.errors import Misuse
from lattice_remote.protocol.messages import Refused, Reply, Run
from lattice_remote.server.datadir import DataDir
from lattice_remote.server.ipc import Edit, NewEpoch, Ready
from lattice_remote.server.journal.ids import Answered, RequestIds, token_digest
from lattice_remote.server.journal.segment import Outline
from lattice_remote.server.project.worker_process import WORKER_COMMAND

MAX_BYTES, SEGMENT_BYTES = 64 * 1024, 8 * 1024


def make_server_data(path: Path, journal: str) -> tuple[DataDir, str]:
    data, token = make_data(path)
    (path / "config.json").write_text(f'{{"journal": {journal}}}\n')
    ensure_lattice_dirs(data.project("web").root)
    config = {**default_config(), "project_code": "LAT"}
    atomic_write(data.project("web").lattice / "config.json", serialize_config(config))
    return data, token


def journal_bytes(running: Running) -> int:
    total = 0
    for path in running.data.project("web").journal.glob("*.log"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # it expired since it was listed
            continue
    return total


def resyncs(copy: Copy) -> int:
    return sum(getattr(frame, "resync", False) for frame in copy.frames)


async def comment(copy: Copy, text: str) -> None:
    reply = await copy.run("comment", "LAT-1", text, *ANA)
    assert isinstance(reply, Reply) and reply.exit_code == 0, reply


async def catch_up(running: Running, copy: Copy) -> None:
    async with running.connected() as socket:
        await copy.greet(socket)
        await copy.sync()


async def test_the_journal_stays_within_its_bound_and_a_client_older_than_it_resyncs(tmp_path: Path) -> None:
    """I3, I7."""
    journal = f'{{"max_bytes": {MAX_BYTES}, "segment_bytes": {SEGMENT_BYTES}}}'
    data, token = make_server_data(tmp_path / "data", journal)
    away, writer, most = Copy(), Copy(), 0
    async with serving(data, token, worker=WORKER_COMMAND) as running:
        await catch_up(running, away)
        async with running.connected() as socket:
            await writer.greet(socket)
            await writer.run("create", "One", *ANA)
            for _ in range(40):
                await comment(writer, "x" * 4000)
                most = max(most, journal_bytes(running))
            written = writer.replica.head
            assert running.registry.project("web").history.oldest > 2
        away.replica.disconnected()
        await catch_up(running, away)
        assert resyncs(away) == 2, "at first, and now"
        assert away.tree == tree_of(running.tree) and away.replica.position.seq == written
    print(f"journal: at most {most} bytes, bound {MAX_BYTES} + {SEGMENT_BYTES} for a segment")
    assert MAX_BYTES / 2 < most <= MAX_BYTES + SEGMENT_BYTES


async def test_age_expires_while_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I7: a periodic scan of the tree is enough; the server then refuses to replay."""
    monkeypatch.setattr("lattice_remote.server.registry.RESCAN_S", 0.1)
    data, token = make_server_data(tmp_path / "data", f'{{"max_age_days": {0.4 / 86400}}}')
    away, writer = Copy(), Copy()
    async with serving(data, token, worker=WORKER_COMMAND) as running:
        await catch_up(running, away)
        async with running.connected() as socket:
            await writer.greet(socket)
            await writer.run("create", "One", *ANA)
        history = running.registry.project("web").history
        await until(lambda: history.oldest == history.head + 1)
        assert history.head == 1 and journal_bytes(running) < 400, "nothing is left but a header"
        away.replica.disconnected()
        async with running.connected() as socket:
            await away.greet(socket)
            await away.sync()
            assert resyncs(away) == 2
            assert away.tree == tree_of(running.tree)
            await comment(away, "and it goes on")
            assert away.replica.position.seq == 2


async def test_settings_out_of_bounds_are_refused(tmp_path: Path) -> None:
    for wrong in ('{"max_bytes": 1}', '{"max_age_days": 0}', '{"max_bytes": 65536}', '{"maxbytes": 5}'):
        data, _ = make_data(tmp_path / secrets.token_hex(4))
        (data.path / "config.json").write_text(f'{{"journal": {wrong}}}')
        with pytest.raises(Misuse, match="journal"):
            data.config()


# --- repeated requests ---


class Again:
    """A worker that soon forgets its answers, and repeated requests."""

    def __init__(self, worker: WorkerProcess) -> None:
        self.worker = worker

    def ask(self, id_: str, first_sent_at: float | None) -> Reply | Refused:
        message = execute("create", f"Task {id_}", *ANA, id=id_)
        self.worker.send(msgspec.structs.replace(message, first_sent_at=first_sent_at))
        answer = answer_of(self.worker.done())
        assert isinstance(answer, Reply | Refused)
        return answer


def titles(project: Path) -> list[str]:
    return [msgspec.json.decode(path.read_bytes())["title"] for path in (project / ".lattice/tasks").glob("*.json")]


def test_a_request_sent_again_after_its_answer_expired_is_refused_not_run_twice(tmp_path: Path) -> None:
    """I6 has no end: a forgotten request is not run again."""
    project = make_project(tmp_path / "web")
    with WorkerProcess(project, settings=f'{{"max_age_days": {0.2 / 86400}}}') as worker:
        again, first, sent = Again(worker), secrets.token_hex(16), time.time()
        answered = again.ask(first, None)
        assert isinstance(answered, Reply)
        deadline = time.monotonic() + 20
        while isinstance(answer := again.ask(first, sent), Reply) and time.monotonic() < deadline:
            assert answer == answered
            worker.reconcile()
        assert isinstance(answer, Refused) and answer.code == "REMOTE_UNKNOWN_OUTCOME"
        assert "look before you repeat it" in answer.message
        assert titles(project) == [f"Task {first}"]
        plan = f"plans/{next((project / '.lattice/plans').iterdir()).name}"
        worker.send(Edit(secrets.token_hex(16), plan, None, b"x", "tok_1", "human:ana", first_sent_at=sent))
        refused = answer_of(worker.done())
        assert isinstance(refused, Refused) and refused.code == "REMOTE_UNKNOWN_OUTCOME"
        assert isinstance(again.ask(secrets.token_hex(16), None), Reply), "a new request runs"


@pytest.mark.parametrize("lose", ["journal", "epoch"])
def test_a_request_sent_again_into_a_new_history_runs_once(tmp_path: Path, lose: str) -> None:
    """I6: answers are carried into a new epoch; if the journal was lost, no repeated request runs."""
    project = make_project(tmp_path / "web")
    known, lost_on_its_way = secrets.token_hex(16), secrets.token_hex(16)
    with WorkerProcess(project) as worker:
        sent = time.time()
        answered = Again(worker).ask(known, None)
        if lose == "epoch":
            worker.send(NewEpoch("a test"))
            worker.receive()
            answer = Again(worker).ask(known, sent)
            assert isinstance(answer, Reply) and answer.stdout == answered.stdout  # type: ignore[union-attr]
            assert isinstance(Again(worker).ask(lost_on_its_way, sent), Reply), "it can't have run"
    if lose == "journal":
        for path in (project / "journal").glob("*.log"):
            path.unlink()
        with WorkerProcess(project) as worker:
            assert isinstance(answer := Again(worker).ask(known, sent), Refused)
            assert answer.code == "REMOTE_UNKNOWN_OUTCOME"
            assert isinstance(Again(worker).ask(secrets.token_hex(16), None), Reply)
    assert titles(project).count(f"Task {known}") == 1


def test_a_key_is_of_one_request_in_a_new_epoch_and_after_a_kill_too(tmp_path: Path) -> None:
    """I6: the digest of the request is kept beside its answer."""
    project = make_project(tmp_path / "web")
    first = msgspec.structs.replace(execute("create", "one", *ANA), fingerprint=b"1" * 16)
    other = msgspec.structs.replace(first, argv=["create", "two", *ANA], fingerprint=b"2" * 16)
    with WorkerProcess(project) as worker:
        for beginning in ("a worker", "a new epoch"):
            worker.send(first)
            assert isinstance(answer_of(worker.done()), Reply), beginning
            worker.send(other)
            refused = answer_of(worker.done())
            assert isinstance(refused, Refused) and refused.code == "REMOTE_INVALID", beginning
            worker.send(NewEpoch("a test"))
            assert isinstance(worker.receive(), Ready)
        worker.kill()
    with WorkerProcess(project) as worker:
        worker.send(other)
        assert isinstance(answer_of(worker.done()), Refused)
        worker.send(first)
        assert isinstance(answer_of(worker.done()), Reply)
    assert titles(project) == ["one"]


SMALL = f'{{"max_bytes": {MAX_BYTES}, "segment_bytes": {SEGMENT_BYTES}}}'


@pytest.mark.parametrize("then", ["trimmed", "a new epoch", "trimmed, a new epoch, a kill"])
def test_an_id_is_remembered_though_its_answer_was_trimmed(tmp_path: Path, then: str) -> None:
    """I6: a key has no age, so it must be known for the promised time, however much is written."""
    project = make_project(tmp_path / "web")
    keyed = msgspec.structs.replace(execute("create", "one", *ANA), fingerprint=b"1" * 16)
    plain = execute("create", "two", *ANA)
    with WorkerProcess(project, settings=SMALL) as worker:
        for request in (keyed, plain):
            worker.send(request)
            assert isinstance(answer_of(worker.done()), Reply)
        (segment,) = (project / "journal").glob("*.log")
        assert segment.read_bytes().count(b"is_keyed") == 1, "the common case is short"
        if "trimmed" in then:
            for _ in range(30):
                worker.ok("comment", "LAT-1", "x" * 8000, *ANA)
            oldest = min((project / "journal").glob("*.log"))
            assert int(oldest.stem) > 2, "the answers were to be trimmed"
        if "epoch" in then:
            for _ in range(3):  # only the answers of the last minutes go along
                worker.send(NewEpoch("a test"))
                assert isinstance(worker.receive(), Ready)
        if "kill" in then:
            worker.kill()
    for number in (1, 2):
        index = RequestIds(project / "journal", 1000.0, keys_per_token=number)
        assert (index.objection(keyed.token_id) is None) == (number == 2), "one of both is a key"
    with WorkerProcess(project, settings=SMALL) as worker:
        for request in (keyed, plain):
            worker.send(request)
            answer = answer_of(worker.done())
            if "trimmed" in then:
                assert isinstance(answer, Refused) and answer.code == "REMOTE_UNKNOWN_OUTCOME", answer
                assert "look before you repeat it" in answer.message
            else:
                assert isinstance(answer, Reply)
            for wrong in ({"argv": ["create", "three", *ANA], "fingerprint": b""}, {"token_id": "tok_other"}):
                worker.send(msgspec.structs.replace(request, **wrong))
                refused = answer_of(worker.done())
                assert isinstance(refused, Refused)
                assert refused.code == ("REMOTE_FORBIDDEN" if "token_id" in wrong else "REMOTE_INVALID")
    assert sorted(titles(project)) == ["one", "two"]


def test_an_id_with_another_command_line_is_refused(tmp_path: Path) -> None:
    """I6: on every surface, and over restarts; the reported age is no part of the request."""
    project, id_ = make_project(tmp_path / "web"), secrets.token_hex(16)
    first = execute("create", "one", *ANA, id=id_)
    for restart in range(3):
        with WorkerProcess(project) as worker:
            if restart:
                assert worker.refused("create", "two", *ANA, id=id_).code == "REMOTE_INVALID"
            worker.send(msgspec.structs.replace(first, first_sent_at=time.time() - 5 if restart else None))
            assert isinstance(answer_of(worker.done()), Reply)
            worker.kill()
    assert titles(project) == ["one"]


def test_a_refusal_for_a_held_lock_is_not_remembered(tmp_path: Path) -> None:
    """I6: a request that was not completed may be tried again."""
    project, id_ = make_project(tmp_path / "web"), secrets.token_hex(16)
    with WorkerProcess(project) as worker:
        worker.ok("create", "one", *ANA)
        task = next((project / ".lattice/tasks").iterdir()).stem
        lock = filelock.FileLock(project / ".lattice/locks" / f"events_{task}.lock")
        with lock:
            assert worker.refused("comment", "LAT-1", "said", *ANA, id=id_, may_wait=False).code == "REMOTE_BUSY"
        worker.ok("comment", "LAT-1", "said", *ANA, id=id_)
        worker.ok("comment", "LAT-1", "said", *ANA, id=id_)
    log = (project / f".lattice/events/{task}.jsonl").read_text()
    assert log.count("comment_added") == 1


def test_the_index_of_ids_is_bounded_by_age_and_for_each_token(tmp_path: Path) -> None:
    index = RequestIds(tmp_path, 1000.0, per_token=10)
    index.add([outline(number, "busy", time=100.0 + number) for number in range(100)], 200.0)
    index.add([outline(1000, "other", time=150.0), outline(1001, "old", time=-900.0)], 200.0)
    assert index.find(f"{1000:032x}") and not index.find(f"{1001:032x}")
    assert len(ids_of_index(tmp_path)) == 101 * 48
    index.add([outline(2000, "other", time=1250.0)], 1250.0)  # an eighth over the age: the file is rewritten
    for found in (index, RequestIds(tmp_path, 1000.0)):
        assert found.find(f"{2000:032x}")
        assert not found.find(f"{100:032x}")
        assert not found.find(f"{1000:032x}"), "older than the age"
    index = RequestIds(tmp_path, 1000.0, per_token=10)
    keyed = [outline(2500 + number, "busy", time=1251.0, is_keyed=True) for number in range(20)]
    index.add([*keyed, *(outline(3000 + n, "busy", time=1251.0 + n) for n in range(66_000))], 1300.0)
    assert len(ids_of_index(tmp_path)) == 31 * 48, "ten of the greedy token and its keys, and the other's"
    assert index.find(f"{2000:032x}") and index.find(f"{68_999:032x}") and not index.find(f"{68_000:032x}")
    assert all(index.find(record.id) for record in keyed), "no key is forgotten before its age"


def test_a_token_with_too_many_keys_may_use_no_new_one(tmp_path: Path) -> None:
    """I6: a forgotten key would run twice."""
    index = RequestIds(tmp_path, 1000.0, keys_per_token=10)
    index.add([outline(number, "busy", time=100.0 + number, is_keyed=True) for number in range(10)], 200.0)
    index.add([outline(1000 + number, "other", time=100.0) for number in range(20)], 200.0)
    for found in (index, RequestIds(tmp_path, 1000.0, keys_per_token=10)):
        why = found.objection("busy")
        assert why is not None and why.startswith("this token has used 10 idempotency keys in 0.0115741 days")
        assert found.objection("other") is None and found.objection("new") is None
    index.add([outline(5000, "other", time=1300.0)], 1300.0)  # the file is rewritten
    assert index.objection("busy") is None, "its keys are older than the age"


def test_too_many_keys_are_refused_and_known_ones_answered(tmp_path: Path) -> None:
    project = make_project(tmp_path / "web")
    (project / "journal").mkdir()
    now = time.time()
    RequestIds(project / "journal", 1000.0).add(
        [outline(number, "tok_1", time=now, is_keyed=True) for number in range(1_000_000)], now
    )
    with WorkerProcess(project) as worker:
        keyed = msgspec.structs.replace(execute("create", "keyed", *ANA), fingerprint=b"1" * 16)
        for request, code in ((keyed, "REMOTE_BUSY"), (msgspec.structs.replace(keyed, id=f"{1:032x}"), None)):
            worker.send(request)
            answer = answer_of(worker.done())
            assert isinstance(answer, Refused) and answer.code == (code or "REMOTE_UNKNOWN_OUTCOME")
        worker.ok("create", "without a key", *ANA)
        worker.send(msgspec.structs.replace(keyed, token_id="tok_2"))
        assert isinstance(answer_of(worker.done()), Reply)
    assert sorted(titles(project)) == ["keyed", "without a key"]


def test_a_torn_entry_of_the_index_is_ignored(tmp_path: Path) -> None:
    index = RequestIds(tmp_path, 1000.0)
    index.add([outline(1, "tok", time=100.0)], 100.0)
    with (tmp_path / "request-ids").open("ab") as file:
        file.write(b"half")
    index = RequestIds(tmp_path, 1000.0)
    index.add([outline(2, "tok", time=100.0)], 100.0)
    for found in (index, RequestIds(tmp_path, 1000.0)):
        assert found.find(f"{1:032x}") == Answered(bytes(16), token_digest("tok")) == found.find(f"{2:032x}")


def outline(number: int, token: str, *, time: float, is_keyed: bool = False) -> Outline:
    return Outline(number, b"", time, f"{number:032x}", token, is_keyed=is_keyed)


def ids_of_index(directory: Path) -> bytes:
    return (directory / "request-ids").read_bytes()


@pytest.mark.parametrize("at", ["the stop", "the kill"])
def test_a_request_whose_answer_was_damaged_is_not_run_twice(tmp_path: Path, at: str) -> None:
    """I6, I7: intact records after an unreadable one were acknowledged; their answers are lost."""
    project = make_project(tmp_path / "web")
    ids = [secrets.token_hex(16) for _ in range(4)]
    with WorkerProcess(project) as worker:
        sent = time.time()
        first = [Again(worker).ask(id_, None) for id_ in ids]
        worker.stop() if at == "the stop" else worker.kill()
    rot_record_of(project, ids[1])
    epoch = worker.ready.epoch
    for _ in range(2):
        with WorkerProcess(project) as worker:
            assert worker.ready.epoch != epoch
            assert Again(worker).ask(ids[0], sent).stdout == first[0].stdout  # type: ignore[union-attr]
            for id_ in ids[1:]:
                assert isinstance(answer := Again(worker).ask(id_, sent), Refused)
                assert answer.code == "REMOTE_UNKNOWN_OUTCOME"
            worker.kill()
    assert sorted(titles(project)) == sorted(f"Task {id_}" for id_ in ids)


def test_a_request_whose_answer_is_damaged_under_a_running_worker_is_not_run_twice(tmp_path: Path) -> None:
    project = make_project(tmp_path / "web")
    ids = [secrets.token_hex(16) for _ in range(2)]
    with WorkerProcess(project) as worker:
        sent = time.time()
        for id_ in ids:
            Again(worker).ask(id_, None)
        rot_record_of(project, ids[0])
        with pytest.raises(EOFError):
            Again(worker).ask(ids[0], sent)
    with WorkerProcess(project) as worker:
        assert isinstance(answer := Again(worker).ask(ids[0], sent), Refused)
        assert answer.code == "REMOTE_UNKNOWN_OUTCOME"
    assert len(titles(project)) == 2


def rot_record_of(project: Path, request: str) -> None:
    (segment,) = (project / "journal").glob("*.log")
    content = bytearray(segment.read_bytes())
    content[content.index(request.encode())] ^= 1
    with segment.open("r+b") as file:
        file.write(content)


async def test_a_client_that_slept_through_the_retention_gets_a_reset(tmp_path: Path) -> None:
    """I6, over the wire: the age that the client reports decides."""
    data, token = make_server_data(tmp_path / "data", "{}")
    async with serving(data, token, worker=WORKER_COMMAND) as running, running.connected() as socket:
        copy, id_ = Copy(), secrets.token_hex(16)
        await copy.greet(socket)
        await copy.sync()
        await copy.send(Run(id_, ["create", "One", *ANA], age_s=3600.0))
        answer = await copy.answer(id_)
        assert isinstance(answer, Refused) and answer.code == "REMOTE_UNKNOWN_OUTCOME"
        await copy.send(Run(id_, ["create", "One", *ANA]))
        del copy.answers[id_]
        assert isinstance(await copy.answer(id_), Reply), "without an age it is new"
