"""Saves by editors: the text is sent whole, and backup and swap files stay local (I4, I9)."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from http import HTTPStatus
from pathlib import Path

import pytest
from client_kit import PLAN, TASK, ask, ready, rescued, run, until
from fake_server import TOKEN, FakeServer
from test_cache_repair import looked_after
from websockets.asyncio.server import ServerConnection

from lattice_remote.client import credentials
from lattice_remote.client.agent import edit_sync, integrity_monitor
from lattice_remote.client.agent.edit_sync import RewriteRun
from lattice_remote.client.agent.service import Service
from lattice_remote.errors import ConnectionFailed, Rejected
from lattice_remote.protocol.messages import Bye, ClientFrame, Put, Refused, Run, Stored, encode
from lattice_remote.protocol.operations import PutFile, digest_of

OLD = b"# Plan\n\n" + b"- a step\n" * 400
NEW = OLD + b"- another step\n"
PAUSE_S = 0.12
"""Longer than a file must be at rest to be taken for saved."""

Steps = Callable[[Path], Iterator[None]]
"""Saves NEW in a file as an editor does; each ``yield`` is a moment in which we may look."""


def vim_in_place(plan: Path) -> Iterator[None]:
    """backupcopy=yes: write a swap file, a probe and a backup, then truncate and write the file."""
    swap, probe, backup = (plan.with_name(name) for name in (f".{plan.name}.swp", "4913", f"{plan.name}~"))
    swap.write_bytes(b"b0VIM 9.0")
    yield
    probe.write_bytes(b"")
    probe.unlink()
    backup.write_bytes(plan.read_bytes())
    with plan.open("wb") as file:
        for start in range(0, len(NEW), 1500):
            file.write(NEW[start : start + 1500])
            file.flush()
            yield
    backup.unlink()
    swap.unlink()


def vim_by_rename(plan: Path) -> Iterator[None]:
    """backupcopy=no: rename the old file to a backup, which stays, and write a new file."""
    plan.rename(plan.with_name(f"{plan.name}~"))
    yield
    with plan.open("xb") as file:
        file.write(NEW[:1000])
        file.flush()
        yield
        file.write(NEW[1000:])


def emacs(plan: Path) -> Iterator[None]:
    """Create a lock as a dangling link, an auto-save file and a backup by rename, then write in place."""
    lock, auto = plan.with_name(f".#{plan.name}"), plan.with_name(f"#{plan.name}#")
    lock.symlink_to("ana@host.123:456")
    auto.write_bytes(NEW[:-8])
    yield
    plan.rename(plan.with_name(f"{plan.name}~"))
    plan.write_bytes(NEW)
    yield
    auto.unlink()
    lock.unlink()


def nano(plan: Path) -> Iterator[None]:
    """Create a lock file and the backup of a lost session, and write in place after a truncation."""
    plan.with_name(f".{plan.name}.swp").write_bytes(b"b0nano")
    plan.with_name(f"{plan.name}.save").write_bytes(NEW[:-8])
    with plan.open("r+b") as file:
        file.truncate(0)
        yield
        file.write(NEW)


def vs_code(plan: Path) -> Iterator[None]:
    """Truncate and write the file with separate opens."""
    plan.write_bytes(b"")
    yield
    plan.write_bytes(NEW)


def jetbrains(plan: Path) -> Iterator[None]:
    """Write a new file, rename the old one away, then rename the new one to its name."""
    fresh, old = plan.with_name(f"{plan.name}___jb_tmp___"), plan.with_name(f"{plan.name}___jb_old___")
    fresh.write_bytes(NEW)
    yield
    plan.rename(old)
    yield
    fresh.rename(plan)
    old.unlink()


def atomic_rename(plan: Path) -> Iterator[None]:
    """Write, fsync and rename a temporary file, as coding agents, formatters and sed -i do."""
    for name in (f"{plan.name}.tmp123", "sedXy12Zq"):
        scratch = plan.with_name(name)
        scratch.write_bytes(NEW[:500])
        yield
        scratch.write_bytes(NEW)
        yield
    plan.with_name("sedXy12Zq").rename(plan)


def removed_and_written(plan: Path) -> Iterator[None]:
    plan.unlink()
    yield
    plan.write_bytes(NEW)


def slow_pipe(plan: Path) -> Iterator[None]:
    """Write one line at a time, with pauses."""
    with plan.open("wb") as file:
        for line in NEW.splitlines(keepends=True)[::40]:
            file.write(line)
            file.flush()
            yield
        file.seek(0)
        file.write(NEW)


def desktop(plan: Path) -> Iterator[None]:
    """Create the files that desktops and file synchronisers add."""
    for name in (".DS_Store", f".~lock.{plan.name}#", f"{plan.stem} (copy).md", f"~syncthing~{plan.name}.tmp"):
        plan.with_name(name).write_bytes(b"not for anybody else\n")
        yield
    plan.write_bytes(NEW)


EDITORS: list[Steps] = [
    vim_in_place, vim_by_rename, emacs, nano, vs_code, jetbrains, atomic_rename, removed_and_written, slow_pipe,
    desktop,
]  # fmt: skip


@pytest.fixture
async def live(server: FakeServer, directory: Path) -> AsyncIterator[Service]:
    server.files |= {PLAN: OLD, f"tasks/{TASK}.json": json.dumps({"short_id": "LAT-1"}).encode()}
    async with looked_after(directory) as service:
        yield service


def beside(directory: Path) -> set[str]:
    """Return the files in the plans' directory that are no plans."""
    return set(os.listdir(directory / "plans")) - {Path(PLAN).name}


@pytest.mark.parametrize("editor", EDITORS, ids=lambda editor: editor.__name__)
async def test_a_save_is_sent_once_and_whole_without_temporary_files(
    server: FakeServer, live: Service, directory: Path, editor: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edit_sync, "SAVING_S", 60.0)  # long enough for the text of an emptied file on a slow machine
    files = set(server.files)
    seen: set[str] = set()
    for _ in editor(directory / PLAN):
        seen |= beside(directory)
        await asyncio.sleep(PAUSE_S)
        assert seen & beside(directory) == beside(directory), "nothing is removed under an editor's hands"
    left = beside(directory)
    await until(lambda: server.files[PLAN] == NEW)
    assert [frame.text for frame in server.frames if isinstance(frame, Put)] == [NEW]
    assert set(server.files) == files
    await until(lambda: live._is_current() and not live._replicator.edits.scan())
    assert (directory / PLAN).read_bytes() == NEW and beside(directory) == left
    assert (await ask(live, "status"))["unsent_edits"] == []


async def test_the_outcome_of_a_save_is_reported_by_the_next_command(
    server: FakeServer, live: Service, directory: Path
) -> None:
    (directory / PLAN).write_bytes(bytes(40))
    await until(lambda: (directory / PLAN).read_bytes() == server.files[PLAN])
    said: list[str] = []
    async with asyncio.timeout(20):
        while not said:
            said += (await ask(live, "ready"))["notices"]  # type: ignore[arg-type]
    said += (await ask(live, "ready"))["notices"]  # type: ignore[arg-type]
    assert sum("restored to the server's text: it held NUL bytes" in notice for notice in said) == 1, said


async def test_an_old_file_that_is_no_plan_is_rescued(
    server: FakeServer, live: Service, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = directory / f"plans/{TASK} (copy).md"
    copy.write_bytes(b"# A copy\n")
    monkeypatch.setattr(integrity_monitor, "STRAY_S", 0.5)
    live._integrity_monitor.touched(None)  # type: ignore[union-attr]
    await until(lambda: not copy.exists())
    assert rescued(directory) == {f"plans/{copy.name}": [b"# A copy\n"]}
    assert any(copy.name in notice for notice in (await ask(live, "ready"))["notices"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["at rest", "a change comes"])
async def test_a_link_that_replaces_a_plan_is_reported_and_not_followed(
    server: FakeServer, live: Service, directory: Path, tmp_path: Path, how: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"not for the board\n")
    (directory / PLAN).unlink()
    (directory / PLAN).symlink_to(secret)
    text = OLD if how == "at rest" else NEW
    if how != "at rest":
        server.put(PLAN, text)
    await until(lambda: not (directory / PLAN).is_symlink() and (directory / PLAN).exists())
    assert (directory / PLAN).read_bytes() == text == server.files[PLAN]
    assert secret.read_bytes() == b"not for the board\n"
    notices = (await ask(live, "ready"))["notices"]
    assert any("was a link" in notice and str(secret) in notice for notice in notices)  # type: ignore[attr-defined]


async def test_a_plan_renamed_by_hand_is_restored_and_the_other_kept(
    server: FakeServer, live: Service, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity_monitor, "STRAY_S", 0.5)
    (directory / PLAN).write_bytes(NEW)
    (directory / PLAN).rename(directory / "plans/parser.md")
    await until(lambda: (directory / PLAN).exists() and not (directory / "plans/parser.md").exists())
    assert (directory / PLAN).read_bytes() == OLD
    assert rescued(directory) == {"plans/parser.md": [NEW]}


async def test_a_text_is_not_replaced_while_a_program_writes_it(
    server: FakeServer, live: Service, directory: Path
) -> None:
    """After a rename over the file, further writes would go to an unlinked file."""
    with (directory / PLAN).open("ab") as file:
        server.put(PLAN, OLD.replace(b"# Plan", b"# Ours"))
        await until(lambda: live._replicator.replica.position.seq == server.seq)
        assert (directory / PLAN).read_bytes() == OLD
        server.put_outcome = "merged"
        file.write(b"- written meanwhile\n")
    await until(lambda: server.files[PLAN] == OLD + b"- written meanwhile\ntheirs\n")
    await until(lambda: (directory / PLAN).read_bytes() == server.files[PLAN])


async def test_a_server_text_is_written_once_the_local_writer_is_done(
    server: FakeServer, live: Service, directory: Path
) -> None:
    with (directory / PLAN).open("ab"):
        server.put(PLAN, NEW)
        await until(lambda: live._replicator.replica.position.seq == server.seq)
        assert (directory / PLAN).read_bytes() == OLD
    await until(lambda: (directory / PLAN).read_bytes() == NEW)
    assert not [frame for frame in server.frames if isinstance(frame, Put)]


async def test_a_refused_edit_is_reported_once_and_blocks_nothing(
    server: FakeServer, live: Service, directory: Path
) -> None:
    async def no_latin(connection: ServerConnection, frame: ClientFrame) -> bool:
        if isinstance(frame, Put) and b"\xe9" in frame.text:
            await connection.send(encode(Refused(frame.id, "REMOTE_UNSUPPORTED", "it is no UTF-8 text")))
            return True
        return False

    server.misbehave = no_latin  # type: ignore[assignment]
    notes = f"notes/{TASK}.md"
    (directory / PLAN).write_bytes(b"caf\xe9\n")
    await until(lambda: live._edit_sender.refused() != {})
    (directory / notes).write_bytes(b"and these\n")
    await until(lambda: server.files.get(notes) == b"and these\n")
    for _ in range(3):
        await ask(live, "run", id=os.urandom(16).hex(), argv=["x"], files=[])
    puts = [frame.text for frame in server.frames if isinstance(frame, Put)]
    assert puts == [b"caf\xe9\n", b"and these\n"], "it is not sent again as it is"
    status = await ask(live, "status")
    assert status["unsent_edits"] == [PLAN] and status["refused_edits"] == {PLAN: "it is no UTF-8 text"}
    assert (directory / PLAN).read_bytes() == b"caf\xe9\n"
    assert (await ask(live, "push"))["sent"] == [{"path": PLAN, "outcome": "refused"}]
    (directory / PLAN).write_bytes("café\n".encode())
    await until(lambda: server.files[PLAN] == "café\n".encode())
    assert (await ask(live, "status"))["refused_edits"] == {}


async def _refused_for_reading_only(connection: ServerConnection, frame: ClientFrame) -> bool:
    if isinstance(frame, Put):
        await connection.send(encode(Refused(frame.id, "REMOTE_FORBIDDEN", "this token may only read")))
    return isinstance(frame, Put)


async def test_a_refused_edit_can_be_replaced_by_the_servers_text_and_is_kept(
    server: FakeServer, live: Service, directory: Path
) -> None:
    server.misbehave = _refused_for_reading_only
    (directory / PLAN).write_bytes(NEW)
    await until(lambda: live._edit_sender.refused() != {})
    (notice,) = (await ask(live, "ready"))["notices"]  # type: ignore[misc]
    assert "lattice remote resolve LAT-1 --theirs" in notice
    (shown,) = (await ask(live, "resolve", task="", what=None, choice=None, text=None))["conflicts"]  # type: ignore[misc]
    assert shown["path"] == PLAN and shown["reason"] == "this token may only read"  # type: ignore[index]
    with pytest.raises(Rejected, match="may only read"):
        await ask(live, "resolve", task="LAT-1", what=None, choice="mine", text=None)
    assert (directory / PLAN).read_bytes() == NEW
    answer = await ask(live, "resolve", task="LAT-1", what=None, choice="theirs", text=None)
    assert answer["resolved"] == [{"path": PLAN, "outcome": "rescued"}]
    await until(lambda: (directory / PLAN).read_bytes() == OLD)
    assert rescued(directory)[PLAN] == [NEW]
    status = await ask(live, "status")
    assert status["unsent_edits"] == [] and status["refused_edits"] == {}


async def test_a_refused_edit_is_sent_once_the_token_may_write(
    server: FakeServer, live: Service, directory: Path
) -> None:
    server.misbehave = _refused_for_reading_only
    (directory / PLAN).write_bytes(NEW)
    await until(lambda: live._edit_sender.refused() != {})
    server.misbehave = None
    live._connection.abort(ConnectionFailed("the token was changed"))
    await until(lambda: server.files[PLAN] == NEW)
    await until(lambda: live._edit_sender.refused() == {})


async def test_an_unanswered_edit_does_not_make_an_unsent_command_uncertain(
    server: FakeServer, live: Service, directory: Path
) -> None:
    async def revoke(connection: ServerConnection, frame: ClientFrame) -> bool:
        if isinstance(frame, Put):
            server.tokens.clear()
            await connection.send(encode(Bye("REMOTE_UNAUTHORIZED", "token tok_1 was revoked")))
        return isinstance(frame, Put)

    server.misbehave = revoke
    (directory / PLAN).write_bytes(NEW)
    await until(lambda: not server.tokens and not live._connection.is_open)
    for _ in range(2):
        with pytest.raises(Rejected) as error:
            await run(live, "put", "tasks/x.json", "x")
        assert error.value.code == "REMOTE_UNAUTHORIZED" and "may have taken effect" not in error.value.message
    assert not any(isinstance(frame, Run) for frame in server.frames)


@pytest.mark.parametrize("then", [OLD, NEW + b"- and more\n"], ids=["taken back", "gone on with"])
async def test_a_save_after_an_edit_whose_answer_was_lost_builds_on_it(
    server: FakeServer, live: Service, directory: Path, then: bytes
) -> None:
    """Also a save of the earlier text: the server has the edit by then, whose text must not overwrite the save."""
    server.cut_before_reply = 1
    server.status = None

    async def stay_away(_: object, frame: object) -> bool:
        if isinstance(frame, Put):
            server.status = HTTPStatus.SERVICE_UNAVAILABLE
        return False

    server.misbehave = stay_away  # type: ignore[assignment]
    (directory / PLAN).write_bytes(NEW)
    await until(lambda: server.files[PLAN] == NEW and not live._connection.is_open)
    (directory / PLAN).write_bytes(then)
    server.misbehave = server.status = None
    await until(lambda: server.files[PLAN] == then)
    await until(lambda: live._is_current() and not live._replicator.edits.scan())
    assert (directory / PLAN).read_bytes() == then


async def test_a_text_emptied_long_ago_is_not_a_save_in_progress(
    server: FakeServer, service: Service, directory: Path
) -> None:
    server.files[PLAN] = OLD
    await ready(service)
    sender, plan = service._edit_sender, directory / PLAN
    assert not sender.is_being_saved(PLAN)
    plan.write_bytes(b"")
    assert sender.is_being_saved(PLAN), "an editor may have truncated it first"
    for age_s in (3600, -3600):
        os.utime(plan, (0, time.time() - age_s))
        assert not sender.is_being_saved(PLAN)
    plan.write_bytes(NEW)


@pytest.mark.parametrize("is_known", [True, False])
async def test_a_long_base_is_sent_as_a_digest_unless_the_server_requests_it(
    server: FakeServer, service: Service, directory: Path, is_known: bool
) -> None:
    old = b"".join(b"line %d\n" % number for number in range(3000))
    server.files[PLAN] = old
    await ready(service)

    async def by_digest(connection: ServerConnection, frame: object) -> bool:
        if not isinstance(frame, Put) or not frame.base_digest:
            return False
        answer: Stored | Refused = Refused(frame.id, "REMOTE_STALE_BASE", "send the whole base")
        if is_known:
            change = server.change(PutFile(PLAN, frame.text), cause=frame.id)
            answer = Stored(frame.id, change.seq, "stored")
        await connection.send(encode(answer))
        return True

    server.misbehave = by_digest  # type: ignore[assignment]
    (directory / PLAN).write_bytes(old + b"mine\n")
    await ask(service, "push")
    await until(lambda: server.files[PLAN] == old + b"mine\n")
    first, *later = [frame for frame in server.frames if isinstance(frame, Put)]
    assert first.base is None and first.base_digest == digest_of(old) and first.text == old + b"mine\n"
    assert [(frame.base, frame.base_digest) for frame in later] == ([] if is_known else [(old, b"")])
    assert len({frame.id for frame in (first, *later)}) == 1 + len(later)


async def test_a_text_reverted_during_its_transfer_is_sent_again(
    server: FakeServer, live: Service, directory: Path
) -> None:
    arrived, may_go_on = asyncio.Event(), asyncio.Event()

    async def wait(_: object, frame: object) -> bool:
        if isinstance(frame, Put):
            arrived.set()
            await may_go_on.wait()
        return False

    server.misbehave = wait  # type: ignore[assignment]
    (directory / PLAN).write_bytes(NEW)
    await arrived.wait()
    (directory / PLAN).write_bytes(OLD)
    live._replicator.edits.scan()
    may_go_on.set()
    await until(lambda: server.files[PLAN] == NEW)
    await until(lambda: server.files[PLAN] == OLD)
    await until(lambda: live._is_current() and not live._replicator.edits.scan())
    assert (directory / PLAN).read_bytes() == OLD


async def test_the_stored_token_sent_by_a_command_counts_as_the_same_token(
    server: FakeServer, live: Service, directory: Path
) -> None:
    credentials.store(server.url, "web", TOKEN)
    await ask(live, "ready", TOKEN)
    await ask(live, "ready", None)
    (directory / PLAN).write_bytes(NEW)
    await until(lambda: server.files[PLAN] == NEW)


PAUSES = {
    "ten a second": ([0.1] * 30, 31),
    "one in two seconds": ([2.0] * 30, 31),
    "a longer pause begins another run": ([0.1] * 30 + [2.1] + [0.1] * 5, 6),
    "a person's pauses": ([2.1] * 30, 1),
}


@pytest.mark.parametrize("case", PAUSES)
def test_texts_rewritten_one_after_another_are_one_run(case: str) -> None:
    pauses, length = PAUSES[case]
    rewrites, at_ns = RewriteRun(), 10**18
    for n, pause_s in enumerate([0.0, *pauses]):
        at_ns += round(pause_s * 1e9)
        found = rewrites.count_with({f"plans/{n}.md": at_ns})
        rewrites.extend({f"plans/{n}.md": at_ns})
    assert found == length


def test_repeated_saves_of_one_text_prolong_no_run() -> None:
    rewrites = RewriteRun()
    rewrites.extend({f"plans/{n}.md": n for n in range(21)})
    found = []
    for second in range(4):
        found.append(rewrites.count_with({"plans/0.md": second * 10**9}))
        rewrites.extend({"plans/0.md": second * 10**9})
    assert found == [21, 21, 21, 1]
