"""Reader process of a project: failures, hostile requests, concurrent reads, caching and isolation."""

import asyncio
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import pytest_asyncio
import requests
from harness import tree_of, until
from server_process import Process, children_of, is_gone
from test_server import make_data, make_token
from worker_process import file_at

from lattice_remote.errors import Rejected, StorageError
from lattice_remote.server.datadir import DataDir
from lattice_remote.server.http import pages
from lattice_remote.server.http.pages import Overviews
from lattice_remote.server.ipc import Read, ReadCommand, ReadPage, ReadResult
from lattice_remote.server.project import reader_process
from lattice_remote.server.project import reader_process as reader_module
from lattice_remote.server.project.reader_process import ReaderProcess
from lattice_remote.server.tree.undo import Begin, UndoLog
from sandbox import wait_for

LIST = ReadCommand("list", ("list", "--json"))
TASKS = ReadPage("/api/tasks")
CONFIG = ReadPage("/api/config")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataDir:
    return make_data(tmp_path_factory.mktemp("reader") / "data")


shares_a_reader = pytest.mark.asyncio(loop_scope="module")
"""Its process costs a second to start, so that most tests share one."""


class State:
    """State of the project's tree, set by the test."""

    numbers = itertools.count()

    def __init__(self) -> None:
        self.value: object | None = None
        self.head = ("e", 0)
        self.touch()

    def durable(self) -> tuple[str, int]:
        return self.head

    def touch(self) -> None:
        """Invalidate earlier reads."""
        self.value = ("e", next(self.numbers))

    def __call__(self) -> object | None:
        return self.value


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared(data: DataDir) -> AsyncIterator[tuple[ReaderProcess, State]]:
    state = State()
    made = ReaderProcess("web", data.project("web"), state, state.durable)
    yield made, state
    made.close()


@pytest.fixture
def state(shared: tuple[ReaderProcess, State]) -> State:
    return shared[1]


@pytest.fixture
def reader(shared: tuple[ReaderProcess, State]) -> ReaderProcess:
    shared[1].touch()
    return shared[0]


def pid_of(reader: ReaderProcess) -> int:
    assert reader._process is not None
    return reader._process.pid


@shares_a_reader
async def test_commands_and_pages_equal_those_of_lattice(reader: ReaderProcess) -> None:
    listed = await reader.read(LIST)
    assert (listed.status, json.loads(listed.body)) == (0, {"ok": True, "data": []})
    page = await reader.read(CONFIG)
    assert (page.status, page.content_type.split(";")[0]) == (200, "application/json")
    assert b'"project_code": "WEB"' in page.body


async def stopped(reader: ReaderProcess) -> int:
    """Suspend the process; return its pid."""
    await reader.read(CONFIG)
    os.kill(pid_of(reader), signal.SIGSTOP)
    return pid_of(reader)


@shares_a_reader
async def test_a_killed_reader_is_reported_and_replaced_for_the_next_read(reader: ReaderProcess) -> None:
    pid = await stopped(reader)
    reading = asyncio.create_task(reader.read(TASKS))
    behind = asyncio.create_task(reader.read(LIST))
    await until(lambda: reader.waiting == 2)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(StorageError, match="try again"):
        await reading
    assert (await behind).status == 0
    assert pid_of(reader) != pid


@shares_a_reader
async def test_a_reader_over_its_time_is_ended(reader: ReaderProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = await stopped(reader)
    monkeypatch.setattr(reader_module, "_READ_S", 0.3)
    with pytest.raises(StorageError, match=r"timed out on the server after 0\.3 s"):
        await reader.read(TASKS)
    assert is_gone(pid)
    monkeypatch.undo()
    assert (await reader.read(TASKS)).status == 200


@shares_a_reader
async def test_a_cancelled_read_discards_its_partial_answer(reader: ReaderProcess) -> None:
    """Otherwise the next read would get it as its own."""
    pid = await stopped(reader)
    reading = asyncio.create_task(reader.read(TASKS))
    await until(lambda: reader.waiting == 1)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert is_gone(pid)
    assert b'"project_code"' in (await reader.read(ReadPage("/api/config?again"))).body


@shares_a_reader
async def test_a_special_file_blocks_no_read(reader: ReaderProcess, data: DataDir) -> None:
    """A pipe would hold up every read behind it."""
    pipe = data.project("web").lattice / "tasks/task_00000000000000000000000000.json"
    os.mkfifo(pipe)
    try:
        found = await reader.read(TASKS)
    finally:
        pipe.unlink()
    assert (found.status, found.body) == (500, b"")
    assert "no plain file" in found.message


FORBIDDEN: list[Read] = [
    ReadCommand("create", ("create", "--json", "a task", "--actor", "human:a")),
    ReadCommand("resource create", ("resource", "create", "--json", "db", "--actor", "human:a")),
    ReadCommand("session start", ("session", "start", "--json", "--name", "A")),
    ReadCommand("next", ("next", "--json", "--claim", "--name", "A")),
]


@shares_a_reader
async def test_a_command_that_would_write_does_not(reader: ReaderProcess, data: DataDir) -> None:
    before = tree_of(data.project("web").lattice)
    await reader.read(CONFIG)
    pid = pid_of(reader)
    for asked in FORBIDDEN:
        found = await reader.read(asked)
        assert found.status not in (0, 200), found
        assert tree_of(data.project("web").lattice) == before
    assert pid_of(reader) == pid, "it has ended one read, not itself"


HOSTILE = [
    "/api/tasks/../..",
    "/api/tasks/../../../tokens.json",
    "/api/tasks/..%2f..%2f..%2ftokens.json",
    "/api/tasks/%2e%2e/full",
    "/api/tasks/../../../../../tokens/full",
    "/api/tasks/../../../../../tokens/events",
    "/api/tasks/task_00000000000000000000000000/../../../tokens",
    "/static/../server.py",
    "/static/..%2fserver.py",
    "/static//etc/passwd",
    "/static/%2fetc%2fpasswd",
    "/static/./././../server.py",
    "//etc/passwd",
    "/stats-demo",
    "/api/git/branches/--output=x/commits",
    "/api/git/branches/../../x/commits",
    "http://127.0.0.1:1/api/config",
    "/\x00",
    "/api/tasks/\x00",
    "/api/tasks/" + "a" * 60_000,
    "",
    "?",
    "*",
    "/api/tasks/task_\u202e",
]


@shares_a_reader
async def test_no_path_leads_out(reader: ReaderProcess) -> None:
    for path in HOSTILE:
        found = await reader.read(ReadPage(path))
        harmless = path in ("", "?") or b'"project_code": "WEB"' in found.body or b'"available": false' in found.body
        assert found.status >= 400 or harmless, (path, found)
        for secret in (b"sha256", b"root:x:", b"HTTP server for the Lattice dashboard"):
            assert secret not in found.body, path


@shares_a_reader
async def test_no_argument_leads_out(reader: ReaderProcess) -> None:
    for name in ("../../../tokens", "../config", "/etc/passwd", "-x", "a\x00b", "x" * 60_000):
        found = await reader.read(ReadCommand("show", ("show", "--json", "--", name)))
        assert found.status != 0
        assert b"sha256" not in found.body


@shares_a_reader
async def test_answers_are_kept_until_the_next_change_only(
    reader: ReaderProcess, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanged: list[Read] = []
    original = ReaderProcess._exchange

    async def counted(self: ReaderProcess, asked: Read) -> object:
        exchanged.append(asked)
        return await original(self, asked)

    monkeypatch.setattr(ReaderProcess, "_exchange", counted)
    first = await reader.read(LIST)
    assert await reader.read(LIST) is first
    state.touch()
    assert await reader.read(LIST) is not first
    assert len(exchanged) == 2
    state.value = None  # while something is written nothing is kept
    await reader.read(LIST)
    await reader.read(LIST)
    assert len(exchanged) == 4
    state.touch()
    monkeypatch.setattr(reader_process, "_MAX_AGE_S", 0.0)
    await reader.read(LIST)
    await reader.read(LIST)
    assert len(exchanged) == 6


async def test_kept_answers_are_bounded_however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_process, "_MAX_BYTES", 100_000)
    answers, found = reader_process.ReadCache(), ReadResult(404, b"")
    for n in range(1000):
        answers.keep(ReadPage(f"/{n}/{'x' * 10_000}"), ("e", 1), found)
    assert len(answers) <= 10
    for n in range(1000):
        answers.keep(ReadPage(f"/{n}"), ("e", 2), found)
    assert 50 < len(answers) < 100
    assert answers.get(ReadPage("/999"), ("e", 2)) is found
    assert answers.get(ReadPage("/0"), ("e", 2)) is None
    large = ReadResult(200, bytes(200_000))
    answers.keep(TASKS, ("e", 2), large)
    assert (len(answers), answers.get(TASKS, ("e", 2))) == (1, large)  # the last one always is


@shares_a_reader
async def test_identical_requests_share_one_read(reader: ReaderProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    found = await asyncio.gather(*(reader.read(LIST) for _ in range(200)))
    assert all(one is found[0] for one in found)
    monkeypatch.setattr(reader_module, "_MAX_WAITING", 5)
    asked = [asyncio.create_task(reader.read(ReadPage(f"/api/config?{n}"))) for n in range(9)]
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    busy = [outcome for outcome in outcomes if isinstance(outcome, Rejected)]
    assert len(busy) == 4
    assert {outcome.code for outcome in busy} == {"REMOTE_BUSY"}


@shares_a_reader
async def test_a_read_of_several_files_is_of_one_state_or_reports_that_it_is_not(
    reader: ReaderProcess, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, is_exact = await reader.read_together([CONFIG, TASKS])
    assert ([one.status for one in found], is_exact) == ([200, 200], True)
    original = ReaderProcess._exchange

    async def changing(self: ReaderProcess, asked: Read) -> object:
        state.touch()
        return await original(self, asked)

    monkeypatch.setattr(ReaderProcess, "_exchange", changing)
    found, is_exact = await reader.read_together([ReadPage("/api/stats"), ReadPage("/api/archived")])
    assert ([one.status for one in found], is_exact) == ([200, 200], False)


# --- beside transactions ---


@pytest.fixture
def title(data: DataDir) -> Iterator["Title"]:
    made = Title(data.project("web").root)
    yield made
    made.task.unlink(missing_ok=True)


class Title:
    """A task whose title a transaction changes, as the worker does it."""

    def __init__(self, root: Path) -> None:
        self.undo = UndoLog.open(root / "journal")
        self.task = root / ".lattice/tasks/task_01M8NJW80DRQAH63DYSNCA0NRP.json"
        self.write("before")

    def write(self, title: str) -> None:
        self.task.write_text(json.dumps({"id": self.task.stem, "title": title, "status": "backlog"}))

    def change(self) -> None:
        self.undo.begin(Begin("e", 1, "boot"))
        self.undo.keep_for_rewrite(*file_at(self.task))
        self.write("after")

    @staticmethod
    async def seen(reader: ReaderProcess) -> list[str]:
        found = await reader.read(ReadCommand("list", ("list", "--json")))
        return [task["title"] for task in json.loads(found.body)["data"]]


@shares_a_reader
async def test_a_read_in_a_transaction_waits_for_its_commit_and_for_the_disk(
    reader: ReaderProcess, state: State, title: Title
) -> None:
    state.value = None  # the worker is at work
    title.change()
    seeing = asyncio.create_task(title.seen(reader))
    await has_read(reader)
    assert not seeing.done(), "what it has seen may still be undone"
    title.undo.clear(1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(seeing), 0.05)  # the change is not durable
    state.head = ("e", 1)
    assert await seeing == ["after"]
    state.head = ("e", 0)
    title.undo.clear(0)


@shares_a_reader
async def test_a_rolled_back_change_is_read_again(reader: ReaderProcess, state: State, title: Title) -> None:
    state.value = None
    title.change()
    seeing = asyncio.create_task(title.seen(reader))
    await has_read(reader)
    title.undo.restore()
    assert await seeing == ["before"]


@shares_a_reader
async def test_a_read_in_a_transaction_that_does_not_end_is_refused(
    reader: ReaderProcess, state: State, title: Title, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.value = None
    monkeypatch.setattr(reader_module, "_COMMIT_S", 0.1)
    title.change()
    with pytest.raises(Rejected, match="try again") as error:
        await title.seen(reader)
    assert error.value.code == "REMOTE_BUSY"
    title.undo.restore()
    monkeypatch.setattr(reader_module, "_TRIES_TO_COMMIT", 0)
    with pytest.raises(Rejected, match="again and again"):
        await title.seen(reader)


@shares_a_reader
async def test_a_change_of_an_earlier_epoch_is_not_waited_for(
    reader: ReaderProcess, state: State, title: Title
) -> None:
    state.value = None
    title.undo.clear(7)
    seeing = asyncio.create_task(title.seen(reader))
    await has_read(reader)
    assert not seeing.done()
    title.undo.clear(0)
    state.head = ("f", 0)
    assert await seeing == ["before"]
    state.head = ("e", 0)


@shares_a_reader
async def test_a_list_of_projects_counts_no_status_that_is_rolled_back(
    data: DataDir, title: Title, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = threading.Event()
    monkeypatch.setattr(pages.time, "sleep", lambda _: looked.set())
    monkeypatch.setattr(pages, "_MAX_LOOKS", 1_000_000)
    title.change()
    title.task.write_text(title.task.read_text().replace("backlog", "done"))
    counting = asyncio.create_task(Overviews(data).of("web"))
    await asyncio.to_thread(looked.wait, 10)
    title.undo.restore()
    assert (await counting).statuses == {"backlog": 1}


async def has_read(reader: ReaderProcess) -> None:
    """Return once the reader process has answered; its answer may be pending."""
    await asyncio.sleep(0)  # the read begins, and takes its turn
    async with reader._lock.turn(None):
        pass


@shares_a_reader
async def test_an_idle_reader_exits(reader: ReaderProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_idle_s", 0.1)
    await reader.read(CONFIG)
    pid = pid_of(reader)
    await until(lambda: is_gone(pid))
    assert (await reader.read(ReadPage("/api/config?again"))).status == 200


@shares_a_reader
async def test_a_closed_reader_starts_no_process(data: DataDir, state: State) -> None:
    reader = ReaderProcess("web", data.project("web"), state, state.durable)
    await reader.read(CONFIG)
    pid = pid_of(reader)
    reader.close()
    reader.close()
    assert is_gone(pid)
    with pytest.raises(StorageError):
        await reader.read(ReadPage("/api/config?again"))


# --- in a running server ---


def connections_to(server: Process) -> int:
    """Return the number of connections to a server's port."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(line.split()[1].endswith(f":{server.port:04X}") and line.split()[3] == "01" for line in lines)


def test_a_read_sees_what_was_acknowledged_and_a_stop_waits_for_none(tmp_path: Path) -> None:
    """Through HTTP. Killing its reader fails only the read in progress."""
    server = Process(make_data(tmp_path / "data"))
    headers = {"Authorization": f"Bearer {make_token(server.data)}"}
    url = f"http://127.0.0.1:{server.port}/projects/web/tasks"

    def write_and_look(n: int) -> int:
        with requests.Session() as session:
            session.headers.update(headers)
            retries = 0
            made = session.post(url, json={"title": f"no {n}"}, timeout=60)
            assert made.status_code == 201, made.text
            while (answer := session.get(url, timeout=60)).status_code == 503:
                retries += 1
            assert made.json()["data"]["id"] in [task["id"] for task in answer.json()["data"]]
            return retries

    with ThreadPoolExecutor(4) as pool:
        looks = [pool.submit(write_and_look, n) for n in range(16)]
        killed = 0
        while not all(look.done() for look in looks):
            for pid in children_of(server, b"worker.reader")[: 1 if killed < 2 else 0]:
                os.kill(pid, signal.SIGKILL)
                killed += 1
            time.sleep(0.1)
        assert sum(look.result() for look in looks) <= 4 * killed
    [pid] = children_of(server, b"worker.reader")
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        board = url.replace("/tasks", "/dashboard/data")
        stuck = pool.submit(requests.get, board, headers=headers, timeout=60)
        wait_for(lambda: connections_to(server) == 1, "the request to be there", 60)
        began = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - began < 20
        assert is_gone(pid)
        assert stuck.exception() is not None or stuck.result().status_code == 503


# --- several processes ---


async def test_in_a_large_project_a_slow_view_delays_no_other(data: DataDir) -> None:
    state, files = State(), [0]
    readers = ReaderProcess("web", data.project("web"), state, state.durable, count_files=lambda: files[0])
    try:
        assert (await readers.read(ReadPage("/api/activity"))).status == 200
        assert not readers._others, "a small project has one process"
        files[0] = 10**6
        state.touch()
        assert (await readers.read(ReadPage("/api/activity"))).status == 200
        slow = readers._others["activity"]
        os.kill(pid_of(slow), signal.SIGSTOP)
        state.touch()
        reading = asyncio.create_task(readers.read(ReadPage("/api/activity?search=x")))
        await until(lambda: readers.waiting == 1)
        for request in (TASKS, CONFIG, LIST, ReadPage("/api/stats")):
            assert (await readers.read(request)).status in (0, 200)
        assert not reading.done()
        os.kill(pid_of(slow), signal.SIGCONT)
        assert (await reading).status == 200
        pids = [pid_of(each) for each in (readers, *readers._others.values())]
    finally:
        readers.close()
    assert len(set(pids)) == 4
    assert all(is_gone(pid) for pid in pids)


async def test_a_process_that_is_kept_outlasts_its_idle_time(data: DataDir) -> None:
    state = State()
    reader = ReaderProcess("web", data.project("web"), state, state.durable, idle_s=0.05)
    try:
        with reader.kept():
            await reader.read(CONFIG)
            pid, timer = pid_of(reader), reader._idle_timer
            await until(lambda: reader._idle_timer is not timer)  # it has expired, and runs again
            assert pid_of(reader) == pid
        await until(lambda: reader._process is None)
    finally:
        reader.close()
