"""Plain lattice beside a running worker: no lost, early or delayed data (I2, I12)."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from filelock import FileLock
from rest_client import Rest, rest_server
from server_process import Process
from test_server import make_token
from worker_process import ANA, WorkerProcess, change_of, execute, make_project, tree_of

from sandbox import wait_for

_LATTICE = (sys.executable, "-c", "from lattice.cli.main import cli; cli(prog_name='lattice')")
_HOLD = """
import sys
from pathlib import Path
from lattice.storage.locks import multi_lock
with multi_lock(Path(sys.argv[1]), sys.argv[2:]):
    print("locked", flush=True)
    sys.stdin.read()
"""
_LATE = """
import os, sys
from lattice.storage import operations
from lattice_remote.server.worker import main
reached = os.open(os.environ["REACHED"], os.O_WRONLY | os.O_CREAT)
lock = operations.multi_lock
def lock_late(*arguments):
    os.write(reached, b"x")
    while not os.path.exists(os.environ["GO"]):
        pass
    return lock(*arguments)
operations.multi_lock = lock_late
sys.exit(main.main())
"""
_NEVER_COMMITTED = """
import os, sys
from lattice_remote.server.worker import main, store
reached = os.open(os.environ["REACHED"], os.O_WRONLY | os.O_CREAT)
commit = store.Store.commit
def never_commit(self, difference, cause, *arguments, **options):
    if cause.id == os.environ["STUCK"]:
        os.write(reached, b"x")
        while True:
            pass
    return commit(self, difference, cause, *arguments, **options)
store.Store.commit = never_commit
sys.exit(main.main())
"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Process, Rest]]:
    with rest_server(tmp_path) as both:
        yield both


def plain(root: Path, *argv: str) -> str:
    """Run plain lattice in a directory; return its output."""
    environment = {**os.environ, "LATTICE_ROOT": str(root)}
    done = subprocess.run([*_LATTICE, *argv], cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@contextmanager
def holding(locks: Path, *keys: str) -> Iterator["subprocess.Popen[str]"]:
    """Hold locks of lattice in another process, with lattice's own function."""
    command = [sys.executable, "-c", _HOLD, str(locks), *keys]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        try:
            yield process
        finally:
            process.send_signal(signal.SIGCONT)


class Repeated:
    """Calls a function again and again in a thread; an exception ends the test."""

    def __init__(self, *functions: Callable[[], None]) -> None:
        self._over = threading.Event()
        self.counts = [0] * len(functions)
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=each) for each in enumerate(functions)]

    def _run(self, number: int, function: Callable[[], None]) -> None:
        try:
            while not self._over.is_set():
                function()
                self.counts[number] += 1
        except BaseException as error:  # noqa: BLE001 - raised again in the test's own thread
            self._errors.append(error)

    def __enter__(self) -> "Repeated":
        for thread in self._threads:
            thread.start()
        return self

    def rounds(self, least: int, calls: int) -> Iterator[int]:
        """Count from 0, at least to ``least`` (exclusive), until each function has returned ``calls`` times."""
        for number in itertools.count():
            if number >= least and (self._errors or min(self.counts) >= calls):
                return
            yield number

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]


def test_a_refused_request_takes_nothing_from_plain_lattice_and_is_never_seen(served: tuple[Process, Rest]) -> None:
    server, rest = served
    root = server.data.project("web").root
    task = rest.task("right")
    task_id = rest.ok("GET", f"/tasks/{task}")["id"]
    token = make_token(server.data)

    def asking(path: str, method: str = "GET", **body: str) -> Callable[[], None]:
        session = requests.Session()
        session.headers["Authorization"] = f"Bearer {token}"

        def ask() -> None:
            answer = session.request(method, rest.url + path, json=body or None, timeout=30)
            assert answer.status_code == (422 if body else 200), answer.text
            assert b"WRONG" not in answer.content, path

        return ask

    paths = (f"/tasks/{task}", "/tasks", f"/tasks/{task}/events", "/dashboard/data", f"/dashboard/api/tasks/{task_id}")
    refused = asking(f"/tasks/{task}", "PATCH", title="WRONG", status="done")
    with Repeated(refused, *(asking(path) for path in paths)) as repeated:
        for number in repeated.rounds(12, calls=12):
            plain(root, "comment", task, f"plain {number}", "--actor", "human:bob")
    log = (root / f".lattice/events/{task_id}.jsonl").read_text()
    assert [log.count(f'"plain {each}"') for each in range(number + 1)] == [1] * (number + 1)
    assert "WRONG" not in log
    assert json.loads((root / f".lattice/tasks/{task_id}.json").read_text())["title"] == "right"
    before = tree_of(root / ".lattice")
    assert json.loads(plain(root, "doctor", "--json"))["data"]["findings"] == []
    plain(root, "rebuild", "--all")
    assert tree_of(root / ".lattice") == before
    wait_for(lambda: rest.ok("GET", f"/tasks/{task}")["comment_count"] == number + 1, "the comments to be numbered")


def test_a_project_without_its_directory_of_locks_is_written(served: tuple[Process, Rest]) -> None:
    server, rest = served
    locks = server.data.project("web").lattice / "locks"
    task = rest.task()
    shutil.rmtree(locks)
    rest.ok("PATCH", f"/tasks/{task}", json={"title": "a"})
    assert locks.is_dir()
    shutil.rmtree(locks)
    assert rest.refused("PATCH", f"/tasks/{task}", json={"title": "b", "status": "done"})[0] == 422
    rest.ok("POST", "/tasks", status=201, json={"title": "another"})


def test_a_stopped_lattice_that_holds_a_lock_delays_only_requests_that_need_it(served: tuple[Process, Rest]) -> None:
    server, rest = served
    locks = server.data.project("web").lattice / "locks"
    waited_for, other = rest.task("held"), rest.task("other")
    task_id = rest.ok("GET", f"/tasks/{waited_for}")["id"]

    def took(path: str, **changes: str) -> tuple[float, requests.Response]:
        began = time.monotonic()
        answer = requests.patch(rest.url + path, json=changes, headers=dict(rest.session.headers), timeout=60)
        return time.monotonic() - began, answer

    answers: list[tuple[float, requests.Response]] = []
    with holding(locks, f"events_{task_id}", f"tasks_{task_id}") as holder:
        holder.send_signal(signal.SIGSTOP)
        waiting = threading.Thread(target=lambda: answers.append(took(f"/tasks/{waited_for}", title="patient")))
        waiting.start()
        beside = 0
        while waiting.is_alive():
            assert took(f"/tasks/{other}", title=f"beside {beside}")[1].ok
            beside += waiting.is_alive()
        [(seconds, answer)] = answers
        assert seconds > 9.5 and beside >= 10, "a request that waited for the lock would take all of the 10 s"
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "REMOTE_BUSY")
        assert f"Could not acquire lock 'events_{task_id}' within 10s" in answer.json()["error"]["message"]
        waiting = threading.Thread(target=lambda: answers.append(took(f"/tasks/{waited_for}", title="after all")))
        waiting.start()
        wait_for(lambda: rest.session.get(rest.url).ok, "a turn of the server")
    waiting.join()
    assert answers[1][1].status_code == 200, answers[1][1].text
    assert rest.ok("GET", f"/tasks/{waited_for}")["title"] == "after all"


# --- the worker ---


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerProcess]:
    with WorkerProcess(make_project(tmp_path / "web")) as started:
        yield started


def wrote(worker: WorkerProcess, *argv: str, **options: object) -> bool:
    """Run a command that is not to wait; return whether it made a change."""
    done = worker.run(*argv, *ANA, **options)
    assert done.waiting_for is None
    return change_of(done) is not None


def test_a_lock_of_another_process_is_waited_for_without_the_writer(worker: WorkerProcess) -> None:
    lattice = worker.project / ".lattice"
    worker.ok("create", "x", *ANA)
    task_id = json.loads((lattice / "ids.json").read_text())["map"]["LAT-1"]
    before = tree_of(lattice)
    with holding(lattice / "locks", f"tasks_{task_id}"):
        done = worker.run("comment", "LAT-1", "hello", *ANA, id="1" * 32)
        assert (done.waiting_for, done.wait_timeout_s, done.reply, done.change) == (
            f"locks/tasks_{task_id}",
            10.0,
            None,
            None,
        )
        assert tree_of(lattice) == before
        assert wrote(worker, "create", "another")
        refused = worker.refused("comment", "LAT-1", "hello", *ANA, id="1" * 32, may_wait=False)
        assert refused.code == "REMOTE_BUSY"
        assert refused.message.startswith(f"Could not acquire lock 'tasks_{task_id}' within 10s: ")
    assert wrote(worker, "comment", "LAT-1", "hello", id="1" * 32), "a lock that was busy is no answer for ever"
    log = (lattice / f"events/{task_id}.jsonl").read_text()
    assert log.count("hello") == 1


def test_a_request_passes_none_that_waits_for_the_same_lock(worker: WorkerProcess) -> None:
    worker.ok("create", "x", *ANA)
    task_id = json.loads((worker.project / ".lattice/ids.json").read_text())["map"]["LAT-1"]
    done = worker.run("comment", "LAT-1", "second", *ANA, ahead=[f"locks/events_{task_id}"])
    assert done.waiting_for == f"locks/events_{task_id}", "it is free, but others have waited for longer"
    assert wrote(worker, "comment", "LAT-1", "first")


def test_the_locks_are_free_after_a_command_however_it_ends(worker: WorkerProcess) -> None:
    lattice = worker.project / ".lattice"
    worker.ok("create", "x", *ANA)
    worker.ok("resource", "create", "gpu", *ANA)
    worker.ok("session", "start", "--name", "Argus", "--model", "m", "--framework", "f")
    worker.reply("status", "LAT-1", "nowhere", *ANA)
    lines = [["update", "LAT-1", "title=y", "--json", *ANA], ["status", "LAT-1", "done", "--json", *ANA]]
    worker.call("commands", "together", {"lines": lines})
    worker.refused("attach", "LAT-1", "/etc/passwd", *ANA)
    for path in (lattice / "locks").iterdir():
        with FileLock(path, timeout=0):
            pass


def test_a_command_does_not_write_over_what_plain_lattice_has_just_written(tmp_path: Path) -> None:
    """Lattice reads a task before it takes the lock; a command of the server that was overtaken looks again."""
    project, reached, go = make_project(tmp_path / "web"), tmp_path / "reached", tmp_path / "go"
    plain(project, "create", "x", *ANA)
    environment = {**os.environ, "REACHED": str(reached), "GO": str(go)}
    with WorkerProcess(project, command=(sys.executable, "-c", _LATE), environment=environment) as worker:
        update = execute("update", "LAT-1", "title=y", *ANA)
        worker.send(update)
        wait_for(lambda: reached.exists() and reached.read_text() == "x", "the worker to have read the task")
        plain(project, "comment", "LAT-1", "plain", *ANA)
        go.touch()
        assert change_of(worker.done()) is not None
    [path] = (project / ".lattice/tasks").iterdir()
    snapshot = json.loads(path.read_text())
    assert (snapshot["title"], snapshot["comment_count"]) == ("y", 1)


@pytest.mark.parametrize("size", [10, 100_000])
def test_writes_of_plain_lattice_after_a_killed_worker_are_kept(tmp_path: Path, size: int) -> None:
    """A worker that is killed before its commit releases its locks; only its own half is taken back."""
    project, reached = make_project(tmp_path / "web"), tmp_path / "reached"
    plain(project, "create", "x", "--description", "d" * size, *ANA)
    stuck = execute("comment", "LAT-1", "by the worker" * (size // 10), *ANA)
    environment = {**os.environ, "REACHED": str(reached), "STUCK": stuck.id}
    with WorkerProcess(project, command=(sys.executable, "-c", _NEVER_COMMITTED), environment=environment) as worker:
        wrote(worker, "update", "LAT-1", "title=y")
        worker.send(stuck)
        wait_for(lambda: reached.exists() and reached.read_text() == "x", "the worker to have written")
        [log] = (project / ".lattice/events").glob("task_*.jsonl")
        assert "by the worker" in log.read_text()
        seen = json.loads((project / f".lattice/tasks/{log.stem}.json").read_text())
        assert seen["comment_count"] == 1
        started = subprocess.Popen(
            [*_LATTICE, "comment", "LAT-1", "plain", *ANA], env={**os.environ, "LATTICE_ROOT": str(project)}
        )
        worker.kill()
        assert started.wait(30) == 0
    with WorkerProcess(project) as worker:
        assert "an interrupted command was undone" in worker.ready.notes[0]
        assert ("plain" in log.read_text(), "by the worker" in log.read_text()) == (True, False)
        assert "No issues found" in worker.ok("doctor")
        assert wrote(worker, "comment", "LAT-1", "by the worker", id=stuck.id)
    before = tree_of(project / ".lattice")
    plain(project, "rebuild", "--all")
    assert tree_of(project / ".lattice") == before
