"""Evidence of saves: damage to a plan by a crash, power cut, git or full disk is never sent (I4)."""

import asyncio
import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest
from client_kit import PLAN, TASK, ask, run, until
from fake_server import TOKEN, FakeServer
from test_cache_repair import looked_after

from lattice_remote.client.agent.service import Service
from lattice_remote.client.cache import cache as state
from lattice_remote.client.cache import evidence
from lattice_remote.client.cache.cache import Cache
from lattice_remote.client.cache.evidence import Repository
from lattice_remote.client.cache.replicator import Replicator
from lattice_remote.client.cache.safe_directory import Directory
from lattice_remote.client.config import read_remote
from lattice_remote.errors import StorageError
from lattice_remote.file_watcher import FileWatcher, Touched
from lattice_remote.files import Signature
from lattice_remote.protocol.messages import Put
from lattice_remote.protocol.operations import digest_of

NOTES = f"notes/{TASK}.md"
SNAPSHOT = f"tasks/{TASK}.json"
FIRST = b"# Plan\n\n- write the parser\n- test the parser\n"
THEIRS = FIRST + b"".join(
    b"\n%d. A paragraph of Ben's, of some length, on what is to be done next.\n" % n for n in range(9)
)
MINE = THEIRS + b"\n- and mine\n"


@pytest.fixture(autouse=True)
def person(home: Path) -> None:
    (home / ".gitconfig").write_text(
        "[user]\n\tname = Ana\n\temail = ana@example.org\n[init]\n\tdefaultBranch = main\n"
    )


@pytest.fixture
def board(server: FakeServer, directory: Path) -> FakeServer:
    server.files |= {PLAN: FIRST, SNAPSHOT: json.dumps({"short_id": "LAT-1"}).encode()}
    return server


def git(place: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(["git", *arguments], cwd=place, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def commit(place: Path, message: str) -> None:
    git(place, "add", "-f", ".lattice/plans", *([".lattice/notes"] if (place / ".lattice" / NOTES).exists() else []))
    git(place, "commit", "-q", "--allow-empty", "-m", message)


@pytest.fixture
async def tracked(board: FakeServer, directory: Path) -> AsyncIterator[Service]:
    """A cache whose repository tracks FIRST. The server has Ben's paragraphs since."""
    async with looked_after(directory) as service:
        git(directory.parent, "init", "-q")
        commit(directory.parent, "tracks the plans")
        board.put(PLAN, THEIRS)
        await until(lambda: (directory / PLAN).read_bytes() == THEIRS)
        yield service


def puts(server: FakeServer) -> list[bytes]:
    return [frame.text for frame in server.frames if isinstance(frame, Put)]


def rescued(service: Service, path: str = PLAN) -> list[bytes]:
    store = service._replicator.rescue_policy.rescued
    return [store.read(entry.number, path) for entry in store.entries() if path in entry.files]


async def is_restored(service: Service, directory: Path, text: bytes = THEIRS, *, reason: str) -> None:
    await until(lambda: (directory / PLAN).exists() and (directory / PLAN).read_bytes() == text)
    await until(lambda: service._is_current() and not service._replicator.edits.scan())
    notices: list[str] = []

    async def said() -> bool:
        notices.extend((await ask(service, "ready"))["notices"])  # type: ignore[arg-type]
        return any("restored to the server's text" in notice and reason in notice for notice in notices)

    deadline = time.monotonic() + 60
    while not await said():
        assert time.monotonic() < deadline, notices
        await asyncio.sleep(0.01)


def checkout(place: Path) -> None:
    git(place, "checkout", "--", ".")


def stash(place: Path) -> None:
    git(place, "stash", "-q")


def reset(place: Path) -> None:
    git(place, "reset", "-q", "--hard")


@pytest.mark.parametrize("act", [checkout, stash, reset], ids=lambda act: act.__name__)
async def test_a_text_restored_by_git_is_never_an_edit(
    board: FakeServer, tracked: Service, directory: Path, act: Callable[[Path], None]
) -> None:
    for _ in range(3):
        act(directory.parent)
        await is_restored(tracked, directory, reason="git wrote it")
    assert puts(board) == [] and board.files[PLAN] == THEIRS
    assert rescued(tracked) == [FIRST]


async def test_a_text_merged_by_git_is_no_edit(board: FakeServer, tracked: Service, directory: Path) -> None:
    place, theirs = directory.parent, directory.parent.parent / "colleague"
    commit(place, "Ben's paragraphs")
    git(place, "worktree", "add", "-q", "-b", "colleague", str(theirs))
    (theirs / ".lattice" / PLAN).write_bytes(b"# By a colleague, in git only\n")
    commit(theirs, "a colleague's")
    git(place, "merge", "-q", "colleague")
    await is_restored(tracked, directory, reason="git wrote it")
    assert puts(board) == []


async def test_an_edit_of_a_tracked_plan_is_sent_and_remains_an_edit_once_committed(
    board: FakeServer, tracked: Service, directory: Path
) -> None:
    (directory / PLAN).write_bytes(MINE)
    await until(lambda: board.files[PLAN] == MINE)
    commit(directory.parent, "with mine")
    await board.stop()
    offline = MINE + b"- on a train\n"
    (directory / PLAN).write_bytes(offline)
    await until(lambda: tracked._replicator.edits.evidence.is_saved(PLAN, offline))
    commit(directory.parent, "on a train")
    git(directory.parent, "checkout", "-q", "HEAD~1", "--", ".")
    git(directory.parent, "checkout", "-q", "HEAD", "--", ".")
    await board.start()
    await until(lambda: board.files[PLAN] == offline)


async def test_git_is_detected_without_an_agent(board: FakeServer, tracked: Service, directory: Path) -> None:
    await tracked.close()
    checkout(directory.parent)
    once = Service(str(directory))
    once.start("ltr_ana")
    try:
        answer = await ask(once, "ready")
        assert (directory / PLAN).read_bytes() == THEIRS, "before the first read"
        assert answer["current"] and "git wrote it" in answer["notices"][0]  # type: ignore[index]
        assert rescued(once) == [FIRST]
    finally:
        await once.close()


def test_a_repository_is_read_in_every_form(tmp_path: Path) -> None:
    """An index with CR LF converted to LF, a worktree, a submodule, SHA-256, an unfinished merge."""
    text, place = b"# Plan\r\n- one\r\n", tmp_path / "main"
    for place, options in ((tmp_path / "main", ()), (tmp_path / "long", ("--object-format=sha256",))):
        (place / ".lattice/plans").mkdir(parents=True)
        git(place, "init", "-q", *options)
        git(place, "config", "core.autocrlf", "input")
        (place / ".lattice" / PLAN).write_bytes(text)
        commit(place, "one")
        (blobs,) = Repository(str(place / ".lattice")).blobs([PLAN, NOTES]).values()
        assert blobs.have(text) and not blobs.have(text + b"x") and not blobs.is_unmerged
    place = tmp_path / "main"
    git(place, "worktree", "add", "-q", "-b", "work", str(tmp_path / "work"))
    assert Repository(str(tmp_path / "work/.lattice")).blobs([PLAN])[PLAN].have(text)
    outer = tmp_path / "outer"
    outer.mkdir()
    git(outer, "init", "-q")
    git(outer, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(place), "inner")
    assert Repository(str(outer / "inner/.lattice")).tracked() == [PLAN]
    (tmp_path / "work/.lattice" / PLAN).write_bytes(b"# Work\n")
    commit(tmp_path / "work", "work")
    (place / ".lattice" / PLAN).write_bytes(b"# Main\n")
    commit(place, "main")
    with pytest.raises(subprocess.CalledProcessError):
        git(place, "merge", "-q", "work")
    found = Repository(str(place / ".lattice")).blobs([PLAN])[PLAN]
    assert found.is_unmerged and found.have(b"# Work\n") and found.have(b"# Main\n")
    assert not found.have((place / ".lattice" / PLAN).read_bytes()), "with the marks of the conflict"
    assert Repository(str(tmp_path)).tracked() == [] and Repository(str(place / ".lattice")).blobs([]) == {}


def test_a_hostile_repository_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, ran = tmp_path / "hostile", tmp_path / "ran"
    (place / ".lattice/plans").mkdir(parents=True)
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho $0 $* >>{ran}\nexit 1\n")
    program.chmod(0o755)
    git(place, "init", "-q")
    (place / ".lattice" / PLAN).write_bytes(b"# Plan\n")
    (place / ".gitattributes").write_text("* filter=evil diff=evil\n")
    commit(place, "one")
    names = ("core.fsmonitor", "core.sshCommand", "core.pager", "filter.evil.clean", "filter.evil.process",
             "diff.evil.textconv", "core.askPass", "core.gitProxy", "credential.helper", "core.editor")  # fmt: skip
    for name in names:
        git(place, "config", name, str(program))
    hooks = place / ".git/hooks"
    for hook in ("post-index-change", "post-checkout", "pre-commit", "fsmonitor-watchman", "reference-transaction"):
        shutil.copy(program, hooks / hook)
    for name, value in (
        ("core.repositoryFormatVersion", "1"),
        ("extensions.partialClone", "origin"),
        ("remote.origin.promisor", "true"),
        ("remote.origin.url", "ssh://example.invalid/x"),
        ("protocol.allow", "always"),
        ("protocol.ssh.allow", "always"),
    ):
        git(place, "config", name, value)
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", str(program))
    monkeypatch.setenv("GIT_SSH_COMMAND", str(program))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    before = {str(path): path.stat().st_mtime_ns for path in (place / ".git").rglob("*")}
    repository = Repository(str(place / ".lattice"))
    assert repository.blobs([PLAN])[PLAN].have(b"# Plan\n")
    for objects in (place / ".git/objects").glob("??"):
        shutil.rmtree(objects)  # git would now fetch the missing objects
    assert repository.tracked() == [PLAN] and repository.blobs([PLAN])[PLAN].have(b"# Plan\n")
    assert not ran.exists(), ran.read_text()
    assert all(Path(path).stat().st_mtime_ns == at for path, at in before.items() if "objects" not in path)
    (tmp_path / "bin").mkdir()
    shutil.copy(program, tmp_path / "bin/git")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "bin")
    assert repository.tracked() == [] and not ran.exists()


# --- crashes ---

NO_EDITS = {
    "empty": b"",
    "nuls": bytes(len(THEIRS)),
    "a lost block": THEIRS[:200] + bytes(128) + THEIRS[328:],
    "cut short": THEIRS[: len(THEIRS) // 2],
}


def damage(place: Path, content: bytes) -> None:
    """Alter a file and keep its times, as a power cut does."""
    found = place.stat()
    place.write_bytes(content)
    os.utime(place, ns=(found.st_atime_ns, found.st_mtime_ns))


def after_reboot(monkeypatch: pytest.MonkeyPatch) -> None:
    booted = time.time()
    monkeypatch.setattr(state, "_boot_id", f"boot-{booted}")
    monkeypatch.setattr(evidence, "booted_at", lambda: booted)


async def leave_without_an_end(service: Service) -> None:
    """Stop a service as a kill does: its watch record stays behind, unlocked."""
    watch = service._replicator.edits.evidence
    assert watch._watch_handle is not None
    os.close(watch._watch_handle)
    watch._watch_handle = None
    await service.close()


@pytest.mark.parametrize("what", NO_EDITS)
@pytest.mark.parametrize("crash", ["reboot", "killed"])
async def test_crash_damage_is_repaired_and_reported(
    board: FakeServer, directory: Path, monkeypatch: pytest.MonkeyPatch, what: str, crash: str
) -> None:
    board.files[PLAN] = THEIRS
    async with looked_after(directory) as service:
        await leave_without_an_end(service)
    damage(directory / PLAN, NO_EDITS[what])
    if crash == "reboot":
        after_reboot(monkeypatch)
    async with looked_after(directory) as service:
        assert (directory / PLAN).read_bytes() == THEIRS, "before the first read"
        assert board.files[PLAN] == THEIRS and puts(board) == []
        assert rescued(service) == ([NO_EDITS[what]] if NO_EDITS[what].strip(b"\0") else [])


async def test_an_unseen_text_from_before_the_reboot_is_withheld(
    board: FakeServer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a save or any earlier version. A save after the reboot is an edit."""
    async with looked_after(directory):
        pass
    damage(directory / PLAN, b"# Of an earlier moment\n")
    after_reboot(monkeypatch)
    async with looked_after(directory) as service:
        answer = await run(service, "x")
        assert "before this machine was started" in answer["notices"][0]  # type: ignore[index]
        assert board.files[PLAN] == FIRST and puts(board) == []
        (directory / PLAN).write_bytes(MINE)
        await until(lambda: board.files[PLAN] == MINE)
        assert (await ask(service, "ready"))["notices"] == []


async def test_a_save_on_top_of_a_withheld_earlier_version_is_an_edit_of_that_version(
    board: FakeServer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison of lines would take its lines for rewordings of lines that others added since."""
    earlier = FIRST + b"- edited by word 1\n"
    current = FIRST + b"- edited by word 2\n- edited by word 3\n"
    async with looked_after(directory):
        for text in (earlier, current):
            board.put(PLAN, text)
            await until(lambda: (directory / PLAN).read_bytes() == text)  # noqa: B023
    damage(directory / PLAN, earlier)
    after_reboot(monkeypatch)
    async with looked_after(directory) as service:
        await until(service._edit_sender.withheld)
        (directory / PLAN).write_bytes(earlier + b"- edited by word 4\n")
        await until(lambda: puts(board))
    (put,) = [frame for frame in board.frames if isinstance(frame, Put)]
    assert put.base == earlier, "the server merges it with what others have written"


async def test_an_edit_made_offline_survives_a_reboot(
    board: FakeServer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with looked_after(directory) as service:
        await board.stop()
        (directory / PLAN).write_bytes(MINE)
        await until(lambda: service._replicator.edits.evidence.is_saved(PLAN, MINE))
    after_reboot(monkeypatch)
    await board.start()
    async with looked_after(directory):
        await until(lambda: board.files[PLAN] == MINE)


class LateWatching(FileWatcher):
    """A watch that starts when the test calls it."""

    def add(self, directory: str, touched: Touched) -> None:
        self.touched = touched


async def test_an_offline_save_from_just_before_the_watch_is_recorded(board: FakeServer, directory: Path) -> None:
    async with looked_after(directory):
        pass
    watching = LateWatching()
    async with looked_after(directory, watching) as service:
        await board.stop()
        await until(lambda: not service._replicator.is_following)
        (directory / PLAN).write_bytes(MINE)
        watching.touched(None)
        await until(lambda: service._replicator.edits.evidence.is_saved(PLAN, MINE))


async def test_an_agent_that_never_reached_the_server_records_saves(board: FakeServer, directory: Path) -> None:
    async with looked_after(directory):
        pass
    await board.stop()
    service, watching = Service(str(directory)), LateWatching()
    service.start(TOKEN)
    service.look_after(watching, asyncio.Semaphore(1))
    try:
        await until(lambda: hasattr(watching, "touched"))
        (directory / PLAN).write_bytes(MINE)
        watching.touched({PLAN})
        await until(lambda: service._replicator.edits.evidence.is_saved(PLAN, MINE))
    finally:
        await service.close()


async def test_a_damaged_base_is_no_edit(board: FakeServer, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with looked_after(directory):
        pass
    (directory / ".remote/base" / PLAN).write_bytes(b"")
    after_reboot(monkeypatch)
    async with looked_after(directory) as service:
        await until(lambda: service._replicator.edits.base(PLAN) == FIRST)
        assert puts(board) == [] and (await ask(service, "status"))["unsent_edits"] == []


class Disk:
    """Model of a disk: the possible contents of each file after a power cut."""

    def __init__(self, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.top = top
        self.earlier: dict[str, list[bytes]] = {}
        self.synced: dict[str, bytes] = {}
        move, append, sync = Directory.move, Directory.append, os.fsync

        def moved(directory: Directory, path: str, to: str) -> None:
            move(directory, path, to)
            self._note(to)

        def appended(directory: Directory, path: str, data: bytes) -> None:
            append(directory, path, data)
            self._note(path)

        def synced(handle: int) -> None:
            sync(handle)
            place = Path(os.readlink(f"/proc/self/fd/{handle}"))
            if place.is_file():
                self.synced[place.relative_to(self.top).as_posix()] = place.read_bytes()

        monkeypatch.setattr(Directory, "move", moved)
        monkeypatch.setattr(Directory, "append", appended)
        monkeypatch.setattr(os, "fsync", synced)

    def _note(self, path: str) -> None:
        if not path.startswith(".remote/tmp"):
            self.earlier.setdefault(path, []).append((self.top / path).read_bytes())

    def cut(self, rng: random.Random) -> dict[str, str]:
        """Cut the power: an unsynced file becomes any earlier version, empty, NULs or missing."""
        fates: dict[str, str] = {}
        for place in sorted(self.top.rglob("*")):
            path = place.relative_to(self.top).as_posix()
            if not place.is_file() or path in ("remote.json", ".remote/lock") or rng.random() < 0.3:
                continue
            content, found = place.read_bytes(), place.stat()
            if self.synced.get(path) == content:
                continue
            fates[path] = fate = rng.choice(["earlier", "empty", "nuls", "cut", "missing"])
            if fate == "missing":
                place.unlink()
                continue
            torn = {"empty": b"", "nuls": bytes(len(content)), "cut": content[: len(content) // 2]}
            place.write_bytes(torn.get(fate, rng.choice(self.earlier.get(path) or [b""])))
            os.utime(place, ns=(found.st_atime_ns, found.st_mtime_ns))
        return fates


@pytest.mark.parametrize("seed", range(12))
async def test_a_power_cut_sends_nothing_and_loses_no_recorded_save(
    board: FakeServer, directory: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """For any content of unsynced files the board is unchanged, and the cache is repaired."""
    rng, disk = random.Random(seed), Disk(directory, monkeypatch)
    others = [f"plans/task_{n:026d}.md" for n in range(6)]
    board.files |= dict.fromkeys(others, FIRST)
    board.files |= {path.replace("plans/", "tasks/").replace(".md", ".json"): b"{}\n" for path in others}
    async with looked_after(directory) as service:
        for n in range(12):
            board.put(rng.choice(others), THEIRS + b"- change %d\n" % n)
        await until(lambda: service._replicator.state.position.seq == board.seq and service._is_current())
        await board.stop()
        (directory / PLAN).write_bytes(MINE)
        digest = digest_of(MINE)[:16].hex().encode()
        await until(lambda: digest in disk.synced.get(".remote/edits.json", b""))
    fates = disk.cut(rng)
    before = dict(board.files)
    after_reboot(monkeypatch)
    await board.start()
    async with looked_after(directory) as service:
        await until(lambda: board.files[PLAN] == MINE or bool(service._replicator.conflicts.copies()))
        await until(service._is_current)
        mine = [service.cache.read(path) for path in service._replicator.conflicts.copies()]
        assert board.files[PLAN] == MINE or MINE in mine, fates
        assert {**board.files, PLAN: b""} == {**before, PLAN: b""}, fates
        withheld = service._edit_sender.withheld()
        for path in set(board.files) - withheld.keys() - {PLAN}:
            await until(lambda path=path: (directory / path).is_file())  # type: ignore[misc]
            assert (directory / path).read_bytes() == board.files[path], (path, fates)


# --- many at once, emptied texts, full disk ---


@pytest.fixture
async def plans(board: FakeServer, directory: Path) -> AsyncIterator[tuple[Service, list[str]]]:
    paths = [f"plans/task_{n:026d}.md" for n in range(92)]
    board.files |= {path: THEIRS + path.encode() + b"\n" for path in paths}
    board.files |= {path.replace("plans/", "tasks/").replace(".md", ".json"): b"{}\n" for path in paths}
    async with looked_after(directory) as service:
        yield service, paths


@pytest.mark.parametrize("decision", ["confirm", "theirs"])
async def test_a_formatter_that_rewrites_many_plans_waits_for_a_decision(
    board: FakeServer, plans: tuple[Service, list[str]], directory: Path, decision: str
) -> None:
    service, paths = plans
    before = dict(board.files)
    for path in paths:
        (directory / path).write_bytes((directory / path).read_bytes().replace(b"- ", b"* "))
    await until(lambda: len(service._edit_sender.withheld()) == len(paths))
    (notice,) = (await run(service, "x"))["notices"]  # type: ignore[misc]
    assert "92 edits" in notice and "as by a formatter" in notice and "resolve --all --theirs" in notice
    assert board.files == before and len((await ask(service, "status"))["withheld_edits"]) == 92  # type: ignore[arg-type]
    if decision == "confirm":
        answer = await ask(service, "push", confirm=True)
        assert {sent["outcome"] for sent in answer["sent"]} == {"stored"}  # type: ignore[index, attr-defined]
        assert all(b"* write" in board.files[path] for path in paths)
    else:
        await ask(service, "resolve", task="", what=None, choice="theirs", text=None)
        await until(lambda: all((directory / path).read_bytes() == before[path] for path in paths))
        assert board.files == before
    assert (await ask(service, "ready"))["notices"] == []


async def test_a_slow_formatter_is_noticed_after_a_few_plans(
    board: FakeServer, plans: tuple[Service, list[str]], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each text is sent before the next is rewritten, within a minute on a busy machine."""
    monkeypatch.setattr("lattice_remote.client.agent.edit_sync._RUN_PAUSE_NS", 60 * 10**9)
    service, paths = plans
    for n, path in enumerate(paths):
        (directory / path).write_bytes((directory / path).read_bytes().replace(b"- ", b"* "))
        await until(lambda n=n: len(puts(board)) + len(service._edit_sender.withheld()) > n)  # type: ignore[misc]
        if len(service._edit_sender.withheld()) > 2:
            break
    assert len(puts(board)) == 20 and len(service._edit_sender.withheld()) == 3


async def test_many_plans_that_only_grow_are_sent(
    board: FakeServer, plans: tuple[Service, list[str]], directory: Path
) -> None:
    _service, paths = plans
    for path in paths[:30]:
        with (directory / path).open("ab") as file:
            file.write(b"- one more\n")
    await until(lambda: all(board.files[path].endswith(b"- one more\n") for path in paths[:30]))


async def test_an_emptied_long_text_is_withheld_and_a_short_one_is_sent(
    board: FakeServer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lattice_remote.client.agent.edit_sync.SAVING_S", 0.2)
    board.files |= {PLAN: THEIRS, NOTES: b"# Notes\n"}
    async with looked_after(directory) as service:
        for path in (PLAN, NOTES):
            (directory / path).write_bytes(b"")
        await until(lambda: board.files[NOTES] == b"")
        await until(lambda: service._edit_sender.withheld() == {PLAN: "it empties a long text"})
        assert board.files[PLAN] == THEIRS
        await ask(service, "push", confirm=True)
        assert board.files[PLAN] == b""


async def test_texts_truncated_by_a_full_disk_are_restored_and_not_sent(
    board: FakeServer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board.files |= {PLAN: THEIRS, NOTES: b"# Notes\n"}
    async with looked_after(directory) as service:
        room = os.statvfs(directory)
        full = os.statvfs_result((*room[:4], 1, *room[5:]))
        with monkeypatch.context() as patched:
            patched.setattr(os, "statvfs", lambda _: full)
            (directory / PLAN).write_bytes(THEIRS[:300])
            (directory / NOTES).write_bytes(b"# Notes\n\nwhole\n")
            await until(lambda: {PLAN, NOTES} <= service._replicator.edits.evidence.cramped.keys())
            assert puts(board) == []
        await until(lambda: board.files[NOTES] == b"# Notes\n\nwhole\n")
        await is_restored(service, directory, reason="a full disk")
        assert puts(board) == [b"# Notes\n\nwhole\n"]


async def test_a_rewritten_text_that_a_full_disk_may_have_truncated_is_withheld(
    board: FakeServer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board.files |= {PLAN: THEIRS}
    async with looked_after(directory) as service:
        room = os.statvfs(directory)
        full = os.statvfs_result((*room[:4], 1, *room[5:]))
        with monkeypatch.context() as patched:
            patched.setattr(os, "statvfs", lambda _: full)
            (directory / PLAN).write_bytes(b"# My line first\n" + THEIRS[:300])
            await until(lambda: PLAN in service._replicator.edits.evidence.cramped)
        await until(lambda: "disk was full" in service._edit_sender.withheld().get(PLAN, ""))
        assert puts(board) == []
        (directory / PLAN).write_bytes(b"# My line first\n" + THEIRS)  # saved again, completely
        await until(lambda: board.files[PLAN] == b"# My line first\n" + THEIRS)


# --- the first read ---


@pytest.mark.parametrize("ended", ["properly", "killed"])
@pytest.mark.parametrize("agent", [True, False])
async def test_the_first_read_shows_earlier_local_changes_unaltered(
    board: FakeServer, directory: Path, ended: str, agent: bool
) -> None:
    board.files |= {f"tasks/task_{n}.json": b'{"n": %d}\n' % n for n in range(50)}
    for n in range(3):
        async with looked_after(directory) as service:
            if ended == "killed":
                await leave_without_an_end(service)
        (directory / f"tasks/task_{n}.json").write_bytes(b'{"n": -1}\n')
        (directory / f"tasks/task_{n + 10}.json").unlink()
        (directory / f"tasks/task_{n}_more.json").write_bytes(b"{}\n")
        (directory / PLAN).unlink()
        service = Service(str(directory))
        service.start("ltr_ana")
        if agent:
            watching = FileWatcher()
            service.look_after(watching, asyncio.Semaphore(1))
        try:
            answer = await ask(service, "ready")
            assert answer["current"]
            found = {path: (directory / path).read_bytes() for path in board.files if (directory / path).is_file()}
            assert found == board.files and not (directory / f"tasks/task_{n}_more.json").exists()
        finally:
            await service.close()


def test_stored_fingerprints_are_valid_until_a_reboot(directory: Path) -> None:
    cache = Cache(str(directory), read_remote(str(directory)))
    cache.prepare()
    cache.replace("tasks/x.json", b"{}\n")
    cache.load_known()
    cache.known.settle([])
    cache.note("tasks/x.json")
    cache.store_known()
    again = Cache(str(directory), cache.remote)
    again.load_known()
    assert again.known.is_complete and again.known.agrees("tasks/x.json", again.signature("tasks/x.json"))
    data = (directory / ".remote/known.json").read_bytes()
    for damaged in (b"", b"[]", b"{}", data[:-20], data.replace(state.boot_id().encode(), b"another")):
        (directory / ".remote/known.json").write_bytes(damaged)
        again = Cache(str(directory), cache.remote)
        again.load_known()
        assert not again.known.is_complete


def test_withheld_texts_survive_a_restart_of_the_agent(directory: Path) -> None:
    cache = Cache(str(directory), read_remote(str(directory)))
    cache.prepare()
    cache.replace(PLAN, FIRST)
    evidence.Evidence(cache).withhold([(PLAN, FIRST, "why")])
    assert evidence.Evidence(cache).withheld() == {PLAN: "why"}
    assert evidence.Evidence(cache).is_last_withheld(PLAN, FIRST)
    cache.replace(PLAN, MINE)
    assert evidence.Evidence(cache).withheld() == {}


@pytest.mark.parametrize("change", ["withhold", "record"])
def test_the_withheld_texts_are_listed_while_a_thread_changes_them(
    directory: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The agent answers ``status`` while a long list is written and fsynced in a thread."""
    cache = Cache(str(directory), read_remote(str(directory)))
    cache.prepare()
    for path in (PLAN, NOTES, "plans/more.md"):
        cache.replace(path, FIRST)
    found, signature = evidence.Evidence(cache), cache.signature
    found.withhold([(PLAN, FIRST, "why"), (NOTES, FIRST, "why")])

    def interrupted(path: str) -> Signature | None:
        if path == PLAN:
            monkeypatch.setattr(cache, "signature", signature)
            act = partial(found.withhold, [("plans/more.md", FIRST, "why")])
            thread = threading.Thread(target=act if change == "withhold" else partial(found.record, [(NOTES, FIRST)]))
            thread.start()
            thread.join()
        return signature(path)

    monkeypatch.setattr(cache, "signature", interrupted)
    assert found.withheld() == {PLAN: "why", NOTES: "why"}
    assert found.withheld().keys() == ({PLAN, NOTES, "plans/more.md"} if change == "withhold" else {PLAN})


async def test_a_record_is_completed_under_the_lock_while_the_agent_stops(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, other = (Cache(str(directory), read_remote(str(directory))) for _ in range(2))
    cache.prepare()
    cache.replace(PLAN, MINE)
    replicator = Replicator(cache)
    began, may_go_on = threading.Event(), threading.Event()
    store = evidence.Evidence._store

    def slowly(found: evidence.Evidence) -> None:
        began.set()
        assert may_go_on.wait(20)
        store(found)

    monkeypatch.setattr(evidence.Evidence, "_store", slowly)
    recording = asyncio.create_task(replicator.record([(PLAN, MINE)]))
    await until(began.is_set)
    recording.cancel()
    try:
        with pytest.raises(StorageError):
            async with other.locked(timeout_s=0.1):
                pass
    finally:
        may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await recording
    async with other.locked():
        assert evidence.Evidence(other).is_saved(PLAN, MINE)
