"""Atomic transactions: killed at any step, a request has run once or not at all (I1, I6)."""

import errno
import itertools
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from worker_process import closing, tree_of

from lattice_remote.errors import Rejected
from lattice_remote.protocol.messages import Refused, Reply, encode
from lattice_remote.server.ipc import RequestDone
from lattice_remote.server.journal.journal import CommitJob, Retention
from lattice_remote.server.tree.capture import Capture
from lattice_remote.server.worker import store as store_module
from lattice_remote.server.worker.patches import WriteSet
from lattice_remote.server.worker.recovery import Opened, open_store
from lattice_remote.server.worker.store import ChangeOrigin, ChangeTooLarge

REQUEST = "7" * 32
CAUSE = ChangeOrigin(REQUEST, "tok", "human:ana", REQUEST)
TINY_SEGMENTS = Retention(segment_bytes=1)
FILES = {
    "events/log.jsonl": b"line\n",
    "events/published.jsonl": b"line\n",
    "tasks/published.json": os.urandom(50_000),
    "tasks/small.json": b"small\n",
    "tasks/large.json": os.urandom(50_000),
    "tasks/moved.json": os.urandom(50_000),
    "plans/rewritten.md": b"# Plan\n",
    "notes/removed.md": b"# Notes\n",
}


Hook = Callable[[str, tuple[object, ...]], None]


class Killed(BaseException):
    """Simulated death of the process."""


class Killer:
    """Kill this thread before its n-th step that changes the disk; every later step fails as well."""

    def __init__(self) -> None:
        self._left: int | None = None
        self._thread = threading.get_ident()
        self._write = os.write
        self._watcher: Hook = lambda event, args: None
        sys.addaudithook(self._hook)

    def watch_also(self, hook: Hook) -> None:
        """Stand for ``sys.addaudithook``: hooks of stores that are gone would only cost time."""
        self._watcher = hook

    @contextmanager
    def killing(self, step: int | None) -> Iterator[None]:
        self._left = step
        try:
            yield
        finally:
            self._left = None

    def write(self, descriptor: int, data: bytes) -> int:
        if self._is_over():
            self._write(descriptor, data[: len(data) // 2])  # torn
            raise Killed
        return self._write(descriptor, data)

    def _is_over(self) -> bool:
        if self._left is None or threading.get_ident() != self._thread:
            return False
        self._left -= 1
        return self._left < 0

    def _hook(self, event: str, args: tuple[object, ...]) -> None:
        if self._left is not None and self._changes_something(event, args) and self._is_over():
            raise Killed
        self._watcher(event, args)

    def _changes_something(self, event: str, args: tuple[object, ...]) -> bool:
        changes = event in ("os.rename", "os.remove", "os.truncate", "os.link", "os.mkdir", "os.rmdir")
        if event == "open":
            flags = args[2]
            assert isinstance(flags, int)
            changes = bool(flags & (os.O_WRONLY | os.O_RDWR))
        return changes


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Killer:
    made = Killer()
    monkeypatch.setattr(sys, "addaudithook", made.watch_also)
    monkeypatch.setattr(os, "write", made.write)
    for sync in ("fsync", "fdatasync"):  # the death of a process loses nothing that was written
        monkeypatch.setattr(os, sync, lambda _: None)
    return made


class AtOnce:
    """Committer stub that completes each batch before it returns."""

    def __init__(self) -> None:
        self.done: list[RequestDone] = []

    def submit(self, job: CommitJob) -> None:
        if isinstance(job.message, RequestDone):
            self.done.append(job.message)
        if job.then is not None:
            job.then()

    def wait(self) -> None:
        """Return at once: no job is pending."""


def open_here(project: Path) -> Opened:
    return open_store(project, project / "tmp", AtOnce(), code=[], retention=TINY_SEGMENTS)  # type: ignore[arg-type]


def replace(path: Path, data: bytes) -> None:
    scratch = path.with_name(f".tmp.{path.name}")
    write(scratch, data, os.O_CREAT | os.O_TRUNC)
    scratch.replace(path)


def write(path: Path, data: bytes, flags: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | flags)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def deed(lattice: Path, capture: Capture) -> None:
    """Do everything that commands do to files."""
    writes = WriteSet(None, capture)
    write(lattice / "tasks/.tmp.published", b"published " * 10_000, os.O_CREAT | os.O_EXCL)
    writes.append(str(lattice / "events/published.jsonl"), "more\n")
    writes.replace(str(lattice / "tasks/.tmp.published"), lattice / "tasks/published.json")
    writes.publish()
    write(lattice / "events/log.jsonl", b"more\n", os.O_APPEND | os.O_CREAT)
    write(lattice / "events/new.jsonl", b"first\n", os.O_APPEND | os.O_CREAT)
    replace(lattice / "tasks/small.json", b"other\n")
    replace(lattice / "tasks/large.json", b"other " * 10_000)
    replace(lattice / "tasks/large.json", b"again " * 10_000)
    (lattice / "archive").mkdir()
    (lattice / "tasks/moved.json").rename(lattice / "archive/moved.json")
    write(lattice / "archive/moved.json", b"more\n", os.O_APPEND | os.O_CREAT)
    write(lattice / "plans/rewritten.md", b"# Another\n", os.O_TRUNC)
    (lattice / "notes/removed.md").unlink()


def run(project: Path) -> None:
    """Open the project, run the request unless it has run, and leave without closing."""
    opened = open_here(project)
    store = opened.store
    if store.journal.find(REQUEST) is not None:
        return
    with store.transaction() as touched:
        deed(project / ".lattice", opened.capture)
    store.commit(store.difference(touched), CAUSE, lambda seq: Reply(REQUEST, seq, 0, b"", b""))


@pytest.fixture(autouse=True)
def _closing() -> Iterator[None]:
    with closing():
        yield


@pytest.fixture
def projects(tmp_path: Path) -> tuple[Path, Path]:
    """A project before the request, and one after it."""
    before, after = tmp_path / "before", tmp_path / "after"
    for name, content in FILES.items():
        (before / ".lattice" / name).parent.mkdir(parents=True, exist_ok=True)
        (before / ".lattice" / name).write_bytes(content)
    (before / "tmp").mkdir()
    open_here(before)
    shutil.copytree(before, after)
    run(after)
    return before, after


def test_killed_at_every_step_a_request_has_run_once_or_not_at_all(
    killer: Killer, projects: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = (tree_of(project / ".lattice") for project in projects)
    outcomes: list[bool] = []

    def is_killed_at(step: int, project: Path) -> bool:
        shutil.copytree(projects[0], project)
        try:
            with killer.killing(step):
                run(project)
        except Killed:
            pass
        else:
            return False
        try:
            with killer.killing(step % 7):  # and again, soon after its return
                open_here(project)
        except Killed:
            pass
        opened = open_here(project)
        has_run = opened.store.journal.find(REQUEST) is not None
        outcomes.append(has_run)
        assert opened.store.journal.head == has_run, f"numbers have no gap (I1), step {step}"
        assert tree_of(project / ".lattice") == (new if has_run else old), f"step {step}"
        assert not any("differed from change" in note for note in opened.notes), opened.notes
        run(project)
        assert tree_of(project / ".lattice") == new, f"step {step}"
        assert open_here(project).store.journal.head == 1
        shutil.rmtree(project)
        return True

    for step in itertools.count():
        with closing():
            if not is_killed_at(step, tmp_path / "killed"):
                break
    assert outcomes.count(False) > 40
    assert outcomes.count(True) > 3


def test_a_change_that_no_frame_can_carry_is_not_made(
    projects: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = projects[0]
    before = tree_of(project / ".lattice")
    opened = open_here(project)
    monkeypatch.setattr(store_module, "_MAX_ENCODED_BYTES", 100)
    with opened.store.transaction() as touched:
        deed(project / ".lattice", opened.capture)
    with pytest.raises(ChangeTooLarge):
        opened.store.commit(opened.store.difference(touched), CAUSE)
    opened.store.roll_back()
    assert tree_of(project / ".lattice") == before
    assert opened.store.journal.head == 0


def test_a_change_without_room_in_the_journal_is_undone_and_refused(
    projects: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = projects[0]
    before = tree_of(project / ".lattice")
    opened = open_here(project)
    store = opened.store

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with store.transaction() as touched:
        deed(project / ".lattice", opened.capture)
    monkeypatch.setattr(store.journal, "append", full)
    with pytest.raises(Rejected, match="nothing was changed"):
        store.commit(store.difference(touched), CAUSE, lambda seq: Reply(REQUEST, seq, 0, b"", b""))
    assert tree_of(project / ".lattice") == before


def test_a_new_segment_closes_the_one_before(projects: tuple[Path, Path]) -> None:
    project = projects[0]
    store = open_here(project).store

    def change(number: int) -> int:
        with store.transaction() as touched:
            replace(project / ".lattice/tasks/small.json", b"%d\n" % number)
        store.commit(store.difference(touched), ChangeOrigin("", "", "", "edit"))
        return len(os.listdir("/proc/self/fd"))

    opened = [change(number) for number in range(5)]
    assert opened[-1] == opened[0]


def test_no_segment_is_removed_while_the_list_of_files_can_not_be_written(
    projects: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = projects[0]
    tiny = Retention(segment_bytes=1, max_bytes=1)
    store = open_store(project, project / "tmp", AtOnce(), code=[], retention=tiny).store  # type: ignore[arg-type]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def change(number: int) -> int:
        with store.transaction() as touched:
            replace(project / ".lattice/tasks/small.json", b"%d\n" % number)
        store.commit(store.difference(touched), ChangeOrigin("", "", "", "edit"))
        return len(list((project / "journal").glob("*.log")))

    kept = change(1), change(2)
    assert kept[0] == kept[1]
    monkeypatch.setattr(store_module, "save_manifest", full)
    assert change(3) > kept[0]


# --- reports of requests ---


@pytest.mark.parametrize("is_keyed", [True, False])
def test_each_request_is_reported_with_its_command_and_its_time(
    projects: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, is_keyed: bool
) -> None:
    now = 100.0
    monkeypatch.setattr(store_module, "time", SimpleNamespace(perf_counter=lambda: now, time=time.time))
    committer = AtOnce()
    project = projects[0]
    stubs: tuple[Any] = (committer,)
    store = open_store(project, project / "tmp", *stubs, code=[], retention=TINY_SEGMENTS).store
    store.begin_request("create", is_keyed=is_keyed)
    now = 102.5
    store.set_label("mcp: create")
    with store.transaction() as touched:
        replace(project / ".lattice/tasks/small.json", b"other\n")
    reply = Reply(REQUEST, 1, 0, b"", b"")
    store.commit(store.difference(touched), CAUSE, lambda _: reply)
    done = committer.done[-1]
    assert (done.id, done.seq, done.reply) == (REQUEST, 1, encode(reply))
    assert (done.report.command, done.report.seconds) == ("mcp: create", 2.5), "from its beginning"
    assert (done.report.again, done.report.made, done.report.code) == (False, None, "")
    record = store.journal.find(REQUEST)
    assert record is not None and record.is_keyed == is_keyed
    store.begin_request("edit", is_keyed=True)
    now = 103.0
    with store.transaction() as touched:
        replace(project / ".lattice/tasks/small.json", b"another\n")
    store.commit(store.difference(touched), ChangeOrigin("", "", "server", "edit"))
    assert (committer.done[-1].report.command, committer.done[-1].report.seconds) == ("edit", 0.5)
    store.resend_reply(REQUEST, record)
    again = committer.done[-1]
    assert (again.id, again.seq, again.reply) == (REQUEST, 1, encode(reply))
    assert (again.report.again, again.report.made) == (True, 1)
    store.refuse(Refused(REQUEST, "REMOTE_BUSY", "x"))
    assert (committer.done[-1].report.code, committer.done[-1].seq) == ("REMOTE_BUSY", 2)
    store.reply_without_record(lambda seq: Reply(REQUEST, seq, 1, b"", b""))
    assert committer.done[-1].reply == encode(Reply(REQUEST, 2, 1, b"", b"")) and store.journal.head == 2
