"""Worker process as seen by the server: numbers, answers and crashes."""

import json
import os
import random
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from random_commands import command_lines
from worker_process import ANA, Copy, WorkerProcess, answer_of, change_of, execute, make_project, tree_of

from lattice_remote.protocol.messages import (
    MAX_FRAME_BYTES,
    Attachment,
    Change,
    Refused,
    Reply,
    Stored,
    decode_server_frame,
)
from lattice_remote.protocol.operations import canonical_json
from lattice_remote.server.ipc import AbandonRequest, NewEpoch, Ready
from lattice_remote.server.journal.segment import JournalReader


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "web")


@pytest.fixture
def worker(project: Path) -> Iterator[WorkerProcess]:
    with WorkerProcess(project) as started:
        yield started


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """A worker for the tests that neither stop it nor break its project."""
    with WorkerProcess(make_project(tmp_path_factory.mktemp("shared") / "web")) as started:
        yield started


def new_task(worker: WorkerProcess) -> tuple[str, str]:
    """Return a new task's short id and its id."""
    data = json.loads(worker.ok("create", "x", *ANA, "--json"))["data"]
    return data["short_id"], data["id"]


def catch_up(copy: Copy, project: Path, head: int) -> None:
    """Follow what the journal holds, as a client does that comes back."""
    changes = JournalReader(project / "journal").read(copy.seq, head, 1 << 30)
    assert changes is not None
    for _, data in changes:
        change = decode_server_frame(data)
        assert isinstance(change, Change)
        copy.follow(change)


def test_a_copy_that_follows_every_change_has_the_same_bytes(worker: WorkerProcess) -> None:
    lattice = worker.project / ".lattice"
    copy = Copy(lattice, tree_of(lattice))
    codes = []
    for argv, files in command_lines(random.Random(7), 150, lattice):
        done = worker.run(*argv, files=files)
        change = change_of(done)
        if change is not None:
            copy.follow(change)
        answer = answer_of(done)
        codes.append(answer.exit_code if isinstance(answer, Reply) else -1)
        assert copy.files == tree_of(lattice), argv
    assert codes.count(0) > 50
    assert worker.reconcile().change is None


def test_a_repeated_request_runs_once_and_is_answered_again(worker: WorkerProcess) -> None:
    request_id = secrets.token_hex(16)
    first = worker.run("create", "x", *ANA, id=request_id)
    again = worker.run("create", "x", *ANA, id=request_id)
    assert (again.reply, again.change, again.seq) == (first.reply, None, 1)
    failed = worker.run("status", "LAT-9", "done", *ANA, id="1" * 32)
    assert worker.run("status", "LAT-9", "done", *ANA, id="1" * 32).reply == failed.reply
    assert worker.refused("create", "x", *ANA, id=request_id, token_id="tok_2").code == "REMOTE_FORBIDDEN"
    worker.stop()
    with WorkerProcess(worker.project) as restarted:
        assert restarted.run("create", "x", *ANA, id=request_id).reply == first.reply
        restarted.send(AbandonRequest(request_id, "tok_1", "REMOTE_FAILED", "given up"))
        assert restarted.done().reply == first.reply
        restarted.send(AbandonRequest("2" * 32, "tok_1", "REMOTE_FAILED", "given up"))
        assert answer_of(restarted.done()) == Refused("2" * 32, "REMOTE_FAILED", "given up")


def test_a_refusal_has_no_effect_and_may_be_asked_again(shared: WorkerProcess) -> None:
    request_id = secrets.token_hex(16)
    refused = shared.refused("create", "x", "--actor", "human:bob", id=request_id)
    assert refused.code == "REMOTE_FORBIDDEN"
    assert shared.reply("create", "x", "--actor", "human:bob", id=request_id, act_as=["human:*"]).exit_code == 0


def test_changes_name_their_actor_and_reason(shared: WorkerProcess) -> None:
    change = change_of(shared.run("create", "x" * 300, "--actor", "agent:a", id="3" * 32))
    assert change is not None
    assert (change.actor, change.token_id, change.cause) == ("agent:a", "tok_1", "3" * 32)
    assert change.command.startswith("create xxx")
    assert len(change.command) == 200
    assert change.time.endswith("Z")


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_any_moment_nothing_is_lost_doubled_or_different(project: Path, seed: int) -> None:
    rng = random.Random(seed)
    lattice = project / ".lattice"
    copy = Copy(lattice, tree_of(lattice))
    words = {secrets.token_hex(16): f"word-{number}-" for number in range(60)}
    waiting = {id_: execute("comment", "LAT-1", word, *ANA, id=id_) for id_, word in words.items()}
    waiting = {"f" * 32: execute("create", "x", *ANA, id="f" * 32), **waiting}
    requests = dict(waiting)
    answered: dict[str, bytes] = {}
    while waiting:
        with WorkerProcess(project) as worker:
            assert worker.ready.head >= copy.seq
            catch_up(copy, project, worker.ready.head)
            assert copy.files == tree_of(lattice)
            for request in waiting.values():
                worker.send(request)
            try:
                for _ in range(rng.randint(5, 25) if len(waiting) > 20 else len(waiting)):
                    done = worker.done()
                    change = change_of(done)
                    if change is not None:
                        copy.follow(change)
                    assert done.reply is not None
                    answered[done.id] = done.reply
                    del waiting[done.id]
            finally:
                worker.kill()
    with WorkerProcess(project) as worker:
        catch_up(copy, project, worker.ready.head)
        assert copy.files == tree_of(lattice)
        log = next(content for path, content in copy.files.items() if path.startswith("events/task_")).decode()
        assert all(log.count(word) == 1 for word in words.values())
        for id_, reply in answered.items():
            worker.send(requests[id_])
            assert worker.done().reply == reply
        assert "No issues found" in worker.ok("doctor")


def test_a_local_edit_is_numbered(shared: WorkerProcess) -> None:
    _, task = new_task(shared)
    head = shared.run("doctor").seq
    plan = shared.project / f".lattice/plans/{task}.md"
    plan.write_text("# By hand\n")
    done = shared.reconcile([f"plans/{plan.name}"])
    change = change_of(done)
    assert change is not None
    assert (change.seq, change.cause, change.actor, change.token_id, done.id) == (head + 1, "edit", "server", "", "")
    assert shared.reconcile().change is None


def test_an_edit_between_commands_is_numbered_before_the_next_command_on_that_file(worker: WorkerProcess) -> None:
    lattice = worker.project / ".lattice"
    copy = Copy(lattice, tree_of(lattice))
    for number in range(5):
        done = worker.run("create", f"x {number}", *ANA)
        changes = [change_of(each) for each in (*worker.found, done)]
        worker.found.clear()
        assert [(change.cause, len(change.ops)) for change in changes[:-1] if change] == [("edit", 1)] * 2 * (
            number > 0
        )
        for change in changes:
            assert change is not None
            copy.follow(change)
        for name in ("events/_lifecycle.jsonl", "ids.json"):
            with (lattice / name).open("ab") as file:
                file.write(b"\n")
    change = change_of(worker.reconcile())
    assert change is not None
    copy.follow(change)
    assert copy.files == tree_of(lattice)


def test_local_changes_without_a_worker_become_a_change(project: Path) -> None:
    with WorkerProcess(project) as worker:
        worker.ok("create", "x", *ANA)
        worker.stop()
    plan = next((project / ".lattice/plans").iterdir())
    plan.write_text("# By hand\n")
    with WorkerProcess(project) as worker:
        assert worker.ready.head == 2
        assert plan.name in worker.ready.notes[0]
        copy = Copy(project / ".lattice", {})
        changes = JournalReader(project / "journal").read(1, 2, 1000)
        assert changes is not None
        change = decode_server_frame(changes[0][1])
        assert isinstance(change, Change)
        assert (change.cause, change.actor) == ("recovery", "server")
        copy.seq = 1
        copy.follow(change)
        assert copy.files == {f"plans/{plan.name}": b"# By hand\n"}
        worker.stop()
    with WorkerProcess(project) as worker:
        assert (worker.ready.head, worker.ready.notes) == (2, [])


def test_a_restored_copy_of_the_directory_is_another_history(project: Path, tmp_path: Path) -> None:
    """I7: the original may have continued after the copy was taken."""
    with WorkerProcess(project) as worker:
        worker.ok("create", "x", *ANA)
        epoch = worker.ready.epoch
    os.system(f"cp -r {project} {tmp_path / 'restored'}")  # noqa: S605 - times and inodes are new
    with WorkerProcess(tmp_path / "restored") as worker:
        assert worker.ready.epoch != epoch and worker.ready.head == 0
        assert worker.ready.notes == ["this is a copy of the project's directory: started a new epoch"]
        renewed = worker.ready.epoch
        worker.kill()
    with WorkerProcess(tmp_path / "restored") as worker:
        assert (worker.ready.epoch, worker.ready.head, worker.ready.notes) == (renewed, 0, [])


def test_the_journal_is_for_the_servers_user_alone(project: Path) -> None:
    with WorkerProcess(project):
        assert (project / "journal").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("lost", ["*.log", "manifest"])
def test_without_its_journal_a_project_begins_a_new_epoch(project: Path, lost: str) -> None:
    with WorkerProcess(project) as worker:
        worker.ok("create", "x", *ANA)
        epoch = worker.ready.epoch
        worker.stop()
    for path in (project / "journal").glob(lost):
        if path.is_file():
            path.unlink()
    with WorkerProcess(project) as worker:
        assert worker.ready.epoch != epoch
        assert worker.ready.head == 0
        assert {after.path for after in worker.ready.files} == tree_of(project / ".lattice").keys()
        worker.ok("comment", "LAT-1", "goes on", *ANA)


def test_a_journal_older_than_the_list_of_files_begins_a_new_epoch(project: Path) -> None:
    with WorkerProcess(project) as worker:
        worker.ok("create", "x", *ANA)
        segment = next((project / "journal").glob("*.log"))
        old = segment.read_bytes()
        worker.ok("create", "y", *ANA)
        worker.stop()
    segment.write_bytes(old)
    with WorkerProcess(project) as restarted:
        assert restarted.ready.epoch != worker.ready.epoch


def test_a_new_epoch_keeps_the_files_and_restarts_the_numbers(worker: WorkerProcess) -> None:
    worker.ok("create", "x", *ANA)
    worker.send(NewEpoch("a client is ahead"))
    ready = worker.receive()
    assert isinstance(ready, Ready)
    assert (ready.head, ready.oldest, ready.mark) == (0, 1, b"")
    assert ready.epoch != worker.ready.epoch
    assert "a client is ahead" in ready.notes[0]
    assert worker.run("create", "y", *ANA).seq == 1
    worker.kill()
    with WorkerProcess(worker.project) as restarted:
        assert (restarted.ready.epoch, restarted.ready.head) == (ready.epoch, 1)


def test_edits_are_stored_merged_or_left_to_their_author(shared: WorkerProcess) -> None:
    _, task = new_task(shared)
    head = shared.run("doctor").seq
    plan = shared.project / f".lattice/plans/{task}.md"
    path, base = f"plans/{plan.name}", plan.read_bytes()
    text = base + b"one\ntwo\nthree\n"
    done, answer = shared.edit(path, base, text)
    assert isinstance(answer, Stored)
    assert (answer.outcome, answer.seq, plan.read_bytes()) == ("stored", head + 1, text)
    change = change_of(done)
    assert change is not None
    assert change.command == f"edit {path}"
    shared.edit(path, text, text.replace(b"one", b"1"))
    _, answer = shared.edit(path, text, text.replace(b"three", b"3"))
    assert isinstance(answer, Stored)
    assert answer.outcome == "merged"
    assert plan.read_bytes() == base + b"1\ntwo\n3\n"
    _, answer = shared.edit(path, text, text.replace(b"one", b"uno"))
    assert isinstance(answer, Stored)
    assert (answer.outcome, plan.read_bytes()) == ("conflict", base + b"1\ntwo\n3\n")
    _, answer = shared.edit(path, text, base + b"1\ntwo\n3\n")
    assert isinstance(answer, Stored)
    assert answer.outcome == "unchanged"


def test_an_edit_is_answered_once(shared: WorkerProcess) -> None:
    _, task = new_task(shared)
    notes = f"notes/{task}.md"
    first, answer = shared.edit(notes, None, b"# Notes\n", id="5" * 32)
    assert isinstance(answer, Stored)
    assert answer.outcome == "stored"
    assert shared.edit(notes, None, b"# Notes\n", id="5" * 32)[0].reply == first.reply


def test_edits_of_tasks_that_are_gone_and_of_other_files_change_nothing(shared: WorkerProcess) -> None:
    short_id, task = new_task(shared)
    shared.ok("archive", short_id, *ANA)
    before = tree_of(shared.project / ".lattice")
    for path in (f"plans/{task}.md", f"notes/{task}.md", "notes/task_01M8173J64RGGH4YR2NPR23QWA.md"):
        _, answer = shared.edit(path, None, b"text\n")
        assert isinstance(answer, Stored)
        assert answer.outcome == "conflict"
    for path in ("config.json", "plans/x.md", "../x", f"plans/../plans/{task}.md"):
        _, answer = shared.edit(path, None, b"text\n")
        assert isinstance(answer, Refused)
    _, answer = shared.edit(f"notes/{task}.md", None, b"caf\xe9\n")
    assert isinstance(answer, Refused)
    assert answer.message == f"notes/{task}.md is not UTF-8 text: save it as UTF-8"
    assert tree_of(shared.project / ".lattice") == before


def test_hostile_command_lines_leave_the_project_whole(shared: WorkerProcess) -> None:
    short_id, _ = new_task(shared)
    before = tree_of(shared.project / ".lattice")
    for line in (
        "session end ../config",
        "session end index",
        "comment LAT-1 x --name ../x",
        "rebuild ../../x",
        "resource create ../x --actor human:ana",
        "attach LAT-1 /etc/passwd --actor human:ana",
        "comment LAT-1 --file /etc/passwd --actor human:ana",
    ):
        assert shared.refused(*line.split()).code == "REMOTE_UNSUPPORTED"
    assert tree_of(shared.project / ".lattice") == before
    shared.ok("comment", short_id, "goes on", *ANA)


def test_a_text_over_the_frame_limit_is_shortened(shared: WorkerProcess) -> None:
    long = "human:" + "x" * 10_000
    assert len(shared.refused("create", "x", "--actor", "human:bob", act_as=[long]).message) <= 4096
    assert "at most 256" in shared.refused("create", "x", "--actor", long, act_as=["human:*"]).message
    change = change_of(shared.run("create", "x", "--actor", long[:256], act_as=["human:*"]))
    assert change is not None
    assert len(change.actor) == 256


def test_a_worker_ends_when_its_server_is_gone(worker: WorkerProcess) -> None:
    worker.ok("create", "x", *ANA)
    worker.__exit__()
    with WorkerProcess(worker.project) as restarted:
        assert (restarted.ready.head, restarted.ready.notes) == (1, [])


def test_an_answer_outlives_its_epoch(worker: WorkerProcess) -> None:
    first = worker.reply("create", "x", *ANA, id="6" * 32)
    assert first.seq == 1
    worker.send(NewEpoch("a client is ahead"))
    assert isinstance(worker.receive(), Ready)
    again = worker.run("create", "x", *ANA, id="6" * 32)
    assert (again.seq, again.change) == (0, None)
    assert answer_of(again) == Reply(first.id, 0, first.exit_code, first.stdout, first.stderr)
    assert worker.refused("create", "x", *ANA, id="6" * 32, token_id="tok_2").code == "REMOTE_FORBIDDEN"
    worker.stop()
    (worker.project / "journal/manifest").unlink()
    with WorkerProcess(worker.project) as restarted:
        assert answer_of(restarted.run("create", "x", *ANA, id="6" * 32)) == answer_of(again)
        assert len(list((worker.project / ".lattice/tasks").iterdir())) == 1


def test_an_undone_request_has_one_outcome_beside_other_requests(worker: WorkerProcess) -> None:
    worker.ok("create", "x", *ANA)
    events = worker.project / ".lattice/events"
    (events / "_lifecycle.jsonl").unlink()
    (events / "_lifecycle.jsonl").mkdir()  # archive fails here, after it has appended to the task's log
    worker.reconcile()
    log = next(events.glob("task_*"))
    edited = log.read_bytes().replace(b'"x"', b'"y"')
    log.write_bytes(edited)
    done = worker.run("archive", "LAT-1", *ANA)
    assert isinstance(answer := answer_of(done), Reply)
    assert (answer.exit_code, done.change) == (1, None)
    assert log.read_bytes() == edited
    assert change_of(worker.reconcile()) is not None


def test_an_edit_that_can_not_be_stored_is_refused_and_the_project_goes_on(worker: WorkerProcess) -> None:
    worker.ok("create", "x", *ANA)
    lattice = worker.project / ".lattice"
    task = next((lattice / "tasks").iterdir()).stem
    (lattice / "plans").rename(worker.project / "plans")
    (lattice / "plans").symlink_to(worker.project / "plans")
    (worker.project / f"plans/{task}.md").unlink()
    (lattice / "notes").rmdir()
    (lattice / "notes").write_bytes(b"")
    worker.reconcile()
    for path in (f"plans/{task}.md", f"notes/{task}.md"):
        _, answer = worker.edit(path, None, b"text\n")
        assert isinstance(answer, Refused)
        assert answer.code == "REMOTE_STORAGE"
    assert not list((worker.project / "plans").iterdir())
    worker.ok("comment", "LAT-1", "goes on", *ANA)


def test_an_attachment_for_which_there_is_no_room_is_refused(project: Path) -> None:
    with WorkerProcess(project, max_file_bytes=1_000_000) as worker:
        worker.ok("create", "x", *ANA)
        large = [Attachment(2, "x.bin", bytes(1_000_001))]
        refused = worker.refused("attach", "LAT-1", "x.bin", *ANA, files=large)
        assert refused.code == "REMOTE_STORAGE"
        assert not list((project / "tmp").iterdir())
        worker.ok("comment", "LAT-1", "goes on", *ANA)


def test_when_lattices_own_files_find_no_room_the_command_is_refused_and_undone(project: Path) -> None:
    with WorkerProcess(project, max_file_bytes=20_000) as worker:
        worker.ok("create", "x", *ANA)
        before = tree_of(project / ".lattice")
        refused = worker.refused("update", "LAT-1", f"description={'word-' * 5000}", *ANA)
        assert refused.code == "REMOTE_STORAGE"
        assert refused.message.startswith("the server cannot store what 'lattice update' writes: ")
        assert tree_of(project / ".lattice") == before
        worker.ok("comment", "LAT-1", "goes on", *ANA)


def test_when_the_journal_has_no_room_the_command_is_refused_undone_and_can_be_sent_again(project: Path) -> None:
    lattice = project / ".lattice"
    with WorkerProcess(project, max_file_bytes=20_000) as worker:
        worker.ok("create", "x", *ANA)
        for answered in range(100):
            before = tree_of(lattice)
            answer = answer_of(worker.run("comment", "LAT-1", "word-" * 200, *ANA, id=f"{answered:032x}"))
            if isinstance(answer, Refused):
                break
        assert answered > 3
        assert isinstance(answer, Refused)
        assert answer.code == "REMOTE_STORAGE"
        assert tree_of(lattice) == before
        worker.kill()
    with WorkerProcess(project) as restarted:
        assert restarted.ready.head == answered + 1
        assert tree_of(lattice) == before
        assert restarted.run("comment", "LAT-1", "word-" * 200, *ANA, id=f"{answered:032x}").seq == answered + 2


def test_an_answer_over_the_frame_limit_is_truncated_with_a_notice(worker: WorkerProcess) -> None:
    worker.ok("create", "x", *ANA)
    task = next((worker.project / ".lattice/tasks").iterdir())
    snapshot = json.loads(task.read_text())
    snapshot["description"] = "x" * (33 * 1024 * 1024)
    task.write_bytes(canonical_json(snapshot))
    worker.reconcile()
    done = worker.run("comment", "LAT-1", "hello", *ANA, "--json")
    assert done.reply is not None
    assert len(done.reply) < MAX_FRAME_BYTES
    assert isinstance(answer := answer_of(done), Reply)
    assert answer.exit_code == 0
    assert b"was truncated" in answer.stderr
