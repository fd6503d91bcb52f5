"""Capture of file accesses by a command, and refusal of forbidden ones."""

import contextlib
import ctypes
import gc
import mmap
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lattice_remote.server.tree.capture import HARMLESS, REFUSED, WATCHED, AccessDenied, AccessLog, Capture, Move
from lattice_remote.server.tree.undo import Begin, UndoLog


class Place:
    """A project's tree, a scratch directory and an unrelated directory."""

    def __init__(self, root: Path) -> None:
        self.tree, self.scratch, self.outside = root / ".lattice", root / "tmp", root / "outside"
        for path in (self.tree / "tasks", self.tree / "locks", self.scratch, self.outside, root / "journal"):
            path.mkdir(parents=True)
        (self.tree / "tasks/a.json").write_text("a")
        (self.outside / "secret").write_text("secret")
        self.undo = UndoLog.open(root / "journal")
        self.capture = Capture(str(self.tree), str(self.scratch), self.undo, [sysconfig.get_path("stdlib")])

    def watch(self, deed: Callable[[], object]) -> AccessLog:
        self.undo.begin(Begin("e", 1, "b"))
        with self.capture.watch() as touched:
            try:
                deed()
            except AccessDenied:
                assert touched.veto is not None
        return touched


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_touches_are_seen_in_order(place: Place) -> None:
    tasks = place.tree / "tasks"

    def deed() -> None:
        with (place.tree / "log.jsonl").open("a") as file:
            file.write("1")
        scratch = tempfile.mkstemp(dir=tasks, prefix=".tmp.")[1]
        os.replace(scratch, tasks / "b.json")
        shutil.move(str(tasks / "a.json"), str(tasks / "c.json"))
        (tasks / "b.json").unlink()
        (place.tree / "locks/x.lock").write_text("")
        (place.tree / "log.jsonl").read_text()

    touched = place.watch(deed)
    assert touched.steps == ["log.jsonl", "tasks/b.json", Move("tasks/a.json", "tasks/c.json")]
    assert touched.appended == {"log.jsonl": None}
    assert (touched.veto, touched.unshared, touched.private) == (None, [], False)


def test_a_file_that_was_not_only_appended_to_is_not_called_so(place: Place) -> None:
    def deed() -> None:
        for mode in ("a", "w"):
            with (place.tree / "log.jsonl").open(mode) as file:
                file.write("1")

    assert place.watch(deed).appended == {}


def test_a_file_that_is_cut_is_restored_and_not_called_appended_to(place: Place) -> None:
    log = place.tree / "log.jsonl"
    log.write_text("before")
    touched = place.watch(lambda: os.truncate(log, 2))
    assert (touched.steps, touched.appended, log.read_text()) == (["log.jsonl"], {}, "be")
    place.undo.restore()
    assert log.read_text() == "before"


def test_an_announced_append_is_called_so_and_keeps_no_content(place: Place) -> None:
    log = place.tree / "log.jsonl"
    log.write_bytes(os.urandom(100_000))

    def deed() -> None:
        for path, status in place.capture.expect([str(log)]).items():
            place.capture.note_append(path, status, b"x")

    assert place.watch(deed).appended.keys() == {"log.jsonl"}
    assert place.undo.before(str(log)) is None


def test_only_a_change_that_readers_see_waits_for_pending_writes(place: Place) -> None:
    seen: list[str] = []
    deeds: dict[str, Callable[[], object]] = {
        "read": (place.tree / "tasks/a.json").read_text,
        "list": lambda: os.listdir(place.tree),
        "lock": lambda: (place.tree / "locks/x.lock").write_text(""),
        "scratch": lambda: (place.scratch / "x").write_text(""),
        "temporary": lambda: (place.tree / "tasks/.tmp.x").write_text(""),
        "rename": lambda: os.replace(place.tree / "tasks/.tmp.x", place.tree / "tasks/b.json"),
        "write": lambda: (place.tree / "tasks/a.json").write_text("b"),
        "cut": lambda: os.truncate(place.tree / "tasks/a.json", 0),
        "archive": lambda: os.replace(place.tree / "tasks/a.json", place.tree / "tasks/.tmp.y"),
        "remove": lambda: os.unlink(place.tree / "tasks/b.json"),
    }
    name = ""
    place.capture.before_change = lambda: seen.append(name)
    place.undo.begin(Begin("e", 1, "b"))
    with place.capture.watch() as touched:
        (place.tree / "config.json").write_text("nothing is pending yet")
        assert seen == []
        place.capture.pending = {"x"}
        for name, deed in deeds.items():  # noqa: B007 - before_change() reads the name
            deed()
    assert touched.veto is None
    assert list(dict.fromkeys(seen)) == ["rename", "write", "cut", "archive", "remove"]


def test_an_append_after_a_rename_is_no_append_to_a_known_file(place: Place) -> None:
    tasks = place.tree / "tasks"

    def deed() -> None:
        os.replace(tasks / "a.json", tasks / "b.json")
        with (tasks / "b.json").open("a") as file:
            file.write("more")
        (tasks / "a.json").write_text("again")

    touched = place.watch(deed)
    assert touched.steps == [Move("tasks/a.json", "tasks/b.json"), "tasks/b.json"] and touched.appended == {}


def test_names_that_no_cache_would_accept_are_reported(place: Place) -> None:
    touched = place.watch(lambda: (place.tree / "tasks/x:y").write_text(""))
    assert touched.unshared == ["tasks/x:y"]


def test_reading_the_project_the_scratch_directory_and_devices_is_free(place: Place) -> None:
    def deed() -> None:
        (place.tree / "tasks/a.json").read_text()
        os.listdir(place.tree)
        list(os.scandir(place.tree / "tasks"))
        with tempfile.NamedTemporaryFile(dir=place.scratch) as file:
            file.write(b"x")
        Path("/dev/urandom").open("rb").close()
        os.listdir(sysconfig.get_path("stdlib"))

    touched = place.watch(deed)
    assert touched.veto is None
    assert touched.private
    assert touched.steps == []


Deed = Callable[[Path, Path], object]
"""Something that a command may not do, given the tree and a directory outside of it."""

DEEDS: dict[str, Deed] = {
    "write outside": lambda _, outside: (outside / "x").write_text(""),
    "write outside by ..": lambda tree, _: (tree / "../outside/x").write_text(""),
    "append outside": lambda _, outside: (outside / "secret").open("a"),
    "read outside": lambda _, outside: (outside / "secret").read_text(),
    "read outside as bytes": lambda _, outside: os.open(os.fsencode(outside / "secret"), os.O_RDONLY),
    "list outside": lambda _, outside: os.listdir(outside),
    "rename out": lambda tree, outside: (tree / "tasks/a.json").rename(outside / "a"),
    "rename in": lambda tree, outside: (outside / "secret").rename(tree / "a"),
    "remove outside": lambda _, outside: (outside / "secret").unlink(),
    "make a directory outside": lambda _, outside: (outside / "d").mkdir(),
    "write through a link": lambda tree, _: (tree / "link.json").write_text("x"),
    "write below a link": lambda tree, _: (tree / "away/x").write_text("x"),
    "read through a link": lambda tree, _: (tree / "link.json").read_text(),
    "read below a link": lambda tree, _: (tree / "away/secret").read_text(),
    "make a link": lambda tree, _: (tree / "l").symlink_to("/"),
    "make a hard link": lambda tree, outside: (tree / "l").hardlink_to(outside / "secret"),
    "remove a tree": lambda tree, _: shutil.rmtree(tree / "tasks"),
    "rename a directory": lambda tree, _: (tree / "tasks").rename(tree / "gone"),
    "run a process": lambda _, __: subprocess.run(["true"], check=False),
    "run a shell": lambda _, __: os.system("true"),  # noqa: S605
    "fork": lambda _, __: os.fork(),
    "open a socket": lambda _, __: socket.socket(),
    "start a thread": lambda _, __: threading.Thread(target=print).start(),
    "leave the directory": lambda _, __: os.chdir("/"),
    "truncate outside": lambda _, outside: os.truncate(outside / "secret", 0),
    "leave by a link and ..": lambda tree, _: (tree / "away/../outside/secret").read_text(),
    "return by a link and ..": lambda tree, _: Path(f"{tree}/away/../.lattice/tasks/a.json").write_text("x"),
    "write to a pipe": lambda tree, _: os.open(tree / "pipe", os.O_RDWR),
    "read from a pipe": lambda tree, _: (tree / "pipe").read_text(),
    "remove an empty directory by a descriptor": lambda tree, _: os.rmdir("locks", dir_fd=os.open(tree, os.O_RDONLY)),
    "open a database": lambda _, outside: sqlite3.connect(outside / "x.db"),
    "open by a descriptor": lambda tree, _: os.open("x", os.O_CREAT, dir_fd=os.open(tree, os.O_RDONLY)),
    "open what is here": lambda _, __: Path("x").write_text(""),
    "list what is here": lambda _, __: os.listdir(),
    "read attributes outside": lambda _, outside: os.listxattr(outside / "secret"),
    "map memory": lambda tree, _: mmap.mmap(-1, 1),
    "change the environment": lambda _, __: os.putenv("X", "y"),
    "load a library": lambda _, __: ctypes.CDLL(None),
    "ask a person": lambda _, __: input(),
    "look at other objects": lambda _, __: gc.get_objects(),
    "add a hook": lambda _, __: sys.addaudithook(print),
    "do what nobody has heard of": lambda _, __: sys.audit("something.new", 1),
    "chmod outside": lambda _, outside: (outside / "secret").chmod(0),
}


@pytest.mark.parametrize("deed", DEEDS.values(), ids=DEEDS.keys())
def test_everything_else_is_refused_before_it_happens(place: Place, deed: Deed) -> None:
    (place.tree / "link.json").symlink_to(place.outside / "secret")
    (place.tree / "away").symlink_to(place.outside)
    os.mkfifo(place.tree / "pipe")

    def swallowing() -> None:
        try:
            deed(place.tree, place.outside)
        except Exception:  # noqa: BLE001 - a command's own error handling must not hide it
            pytest.fail("a veto is not an Exception")

    assert place.watch(swallowing).veto is not None
    assert (place.outside / "secret").read_text() == "secret"
    assert [path.name for path in place.outside.iterdir()] == ["secret"]
    assert (place.tree / "tasks/a.json").read_text() == "a"


def test_other_threads_and_other_times_are_not_watched(place: Place) -> None:
    path = place.outside / "secret"
    path.read_text()
    start = threading.Event()
    thread = threading.Thread(target=lambda: (start.wait(), path.read_text()))
    thread.start()

    def deed() -> None:
        start.set()
        thread.join()

    assert place.watch(deed).veto is None


def test_every_audit_event_of_this_python_is_decided_once() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    raised = set()
    for path in (*library.glob("*.py"), *library.glob("[c-u]*/*.py")):
        if path.parent.name in ("test", "site-packages"):
            continue
        raised |= set(re.findall(r"""sys\.audit\(\s*['"]([\w./]+)['"]""", path.read_text("utf-8")))
    assert len(raised) > 25
    assert raised <= WATCHED | HARMLESS | REFUSED
    assert not WATCHED & HARMLESS | WATCHED & REFUSED | HARMLESS & REFUSED


def test_the_first_refusal_is_reported(place: Place) -> None:
    def deed() -> None:
        for act in (os.fork, place.outside.rmdir):
            with contextlib.suppress(AccessDenied):
                act()

    first = place.watch(os.fork).veto
    assert first is not None and place.watch(deed).veto == first


def test_a_log_that_is_emptied_when_it_is_opened_to_append_is_not_only_appended_to(place: Place) -> None:
    log = place.tree / "log.jsonl"
    log.write_text("before")
    touched = place.watch(lambda: os.close(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_TRUNC)))
    assert (touched.steps, touched.appended) == (["log.jsonl"], {})


def test_an_empty_directory_is_removed_in_the_scratch_directory_alone(place: Place) -> None:
    for top, is_refused in ((place.tree, True), (place.scratch, False)):
        (top / "empty").mkdir()
        assert (place.watch((top / "empty").rmdir).veto is not None) == is_refused
        assert (top / "empty").exists() == is_refused
