"""A project's queue, its worker's life and its followers, with a real process that misbehaves on demand."""

import asyncio
import logging
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from harness import FAKE_WORKER, until

from lattice_remote.errors import Rejected
from lattice_remote.protocol.messages import Attachment, Bye, Change, Refused, Reply, decode_server_frame
from lattice_remote.server.config import Config
from lattice_remote.server.datadir import LockedElsewhere, ProjectPaths, lock
from lattice_remote.server.ipc import Read, ReadPage, ReadResult, Ready, RunCommand, Stop, ToWorker
from lattice_remote.server.project.hooks import HookRunner
from lattice_remote.server.project.project import Project
from lattice_remote.server.project.queue import QueueLimits
from lattice_remote.server.project.worker_process import WorkerProcess


class Watcher:
    """A follower that records its messages in order."""

    def __init__(self) -> None:
        self.events: list[object] = []
        self.answers: dict[str, Reply | Refused] = {}
        self.byes: list[Bye] = []

    @property
    def fairness_key(self) -> "Watcher":
        return self

    def change_committed(self, seq: int, frame: bytes) -> None:
        payload = frame[2:] if frame[1] < 126 else frame[4:] if frame[1] == 126 else frame[10:]
        change = decode_server_frame(payload)
        assert isinstance(change, Change)
        assert change.seq == seq
        self.events.append(change)

    def answer(self, request_id: str, reply: bytes) -> None:
        frame = decode_server_frame(reply)
        assert isinstance(frame, Reply | Refused)
        assert request_id not in self.answers, "every request is answered once"
        self.answers[request_id] = frame
        self.events.append(frame)

    def end(self, bye: Bye) -> None:
        self.byes.append(bye)

    @property
    def changes(self) -> list[int]:
        return [event.seq for event in self.events if isinstance(event, Change)]


def command(*argv: str, id_: str | None = None, holder: str = "t") -> RunCommand:
    return RunCommand(id_ or secrets.token_hex(16), list(argv), [], holder, "human:ana", [])


@pytest.fixture
def paths(tmp_path: Path) -> ProjectPaths:
    (tmp_path / ".lattice").mkdir()
    (tmp_path / "journal").mkdir()
    return ProjectPaths(tmp_path)


class Opened:
    def __init__(self, project: Project, watcher: Watcher) -> None:
        self.project = project
        self.watcher = watcher

    async def run(self, *argv: str, id_: str | None = None) -> Reply | Refused:
        request = command(*argv, id_=id_)
        self.project.submit(request, self.watcher)
        await until(lambda: request.id in self.watcher.answers)
        return self.watcher.answers.pop(request.id)


@pytest.fixture
async def opened(paths: ProjectPaths) -> AsyncIterator[Opened]:
    bounds = QueueLimits(command_s=1.0, queued=100)
    project = Project("web", paths, hooks=HookRunner("web", paths.root), bounds=bounds, worker_command=FAKE_WORKER)
    project.start()
    await project.opened()
    watcher = Watcher()
    project.history.join(watcher)
    yield Opened(project, watcher)
    await project.drain(1.0)
    await project.stop(1.0)


async def test_a_change_precedes_the_answer_that_names_it(opened: Opened) -> None:
    requests = [command("put", f"f{i}", "x") for i in range(50)]
    for request in requests:
        opened.project.submit(request, opened.watcher)
    await until(lambda: len(opened.watcher.answers) == 50)
    assert opened.watcher.changes == list(range(1, 51))
    seen = 0
    for event in opened.watcher.events:
        seen = event.seq if isinstance(event, Change) else seen
        assert event.seq <= seen  # type: ignore[attr-defined]


async def test_the_manifest_is_that_of_the_head(opened: Opened) -> None:
    await opened.run("put", "a", "xyz")
    assert opened.project.history.files["a"][0] == 3
    assert len(opened.project.history.entries()) == 1
    assert opened.project.history.entries() is opened.project.history.entries()


async def test_a_settled_project_runs_nothing_until_it_is_released(opened: Opened, paths: ProjectPaths) -> None:
    first, second = command("slow", "a", "1"), command("put", "b", "1")
    opened.project.submit(first, opened.watcher)
    async with opened.project.settled():
        assert first.id in opened.watcher.answers
        opened.project.submit(second, opened.watcher)
        await asyncio.sleep(0)
        assert opened.project.load.with_worker == 0
        assert set(opened.project.history.files) == {"a"} == {path.name for path in paths.lattice.iterdir()}
    await until(lambda: second.id in opened.watcher.answers)


async def test_a_killed_worker_loses_and_doubles_nothing(opened: Opened, paths: ProjectPaths) -> None:
    requests = [command("put", f"f{i}", "x") for i in range(300)]
    for request in requests[:90]:
        opened.project.submit(request, opened.watcher)
    await until(lambda: len(opened.watcher.answers) > 5)
    os.kill(_worker_pid(opened.project), signal.SIGKILL)
    for request in requests[90:99]:
        opened.project.submit(request, opened.watcher)
    await until(lambda: len(opened.watcher.answers) == 99)
    assert opened.watcher.changes == list(range(1, 100))
    runs = (paths.root / "runs").read_text().split()
    assert all(isinstance(answer, Reply) for answer in opened.watcher.answers.values())
    assert set(runs) == {request.id for request in requests[:99]}


def _worker_pid(project: Project) -> int:
    writer = project._worker
    assert writer is not None
    return writer.pid


async def test_a_change_whose_worker_died_before_saying_so_still_reaches_the_followers(opened: Opened) -> None:
    answer = await opened.run("die-after", "died")
    assert isinstance(answer, Reply)
    assert answer.seq == 1
    assert opened.watcher.changes == [1]
    assert (await opened.run("put", "b", "y")).seq == 2  # type: ignore[union-attr]


async def test_a_worker_that_ends_as_soon_as_it_is_ready_loses_no_request(
    opened: Opened, paths: ProjectPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, publish_missed = opened.project, opened.project.history._publish_missed

    async def publish_slowly(ready: Ready) -> None:
        if not again.is_set():
            again.set()
            await project._worker_ended.wait()
        await publish_missed(ready)

    again = asyncio.Event()
    monkeypatch.setattr(project.history, "_publish_missed", publish_slowly)
    (paths.root / "die-when-ready").touch()
    os.kill(_worker_pid(project), signal.SIGKILL)
    await again.wait()
    assert isinstance(await opened.run("put", "a", "x"), Reply)


async def test_a_command_that_ends_its_worker_once_is_run_again(opened: Opened) -> None:
    assert isinstance(await opened.run("die-once"), Reply)


async def test_a_command_that_ends_its_worker_twice_is_refused_and_the_others_go_on(opened: Opened) -> None:
    bad, good = command("die"), command("put", "a", "x")
    opened.project.submit(bad, opened.watcher)
    opened.project.submit(good, opened.watcher)
    await until(lambda: len(opened.watcher.answers) == 2)
    refused = opened.watcher.answers[bad.id]
    assert isinstance(refused, Refused)
    assert refused.code == "REMOTE_FAILED"
    assert isinstance(opened.watcher.answers[good.id], Reply)


async def test_a_command_over_its_time_is_refused_and_the_others_go_on(opened: Opened) -> None:
    slow, good = command("sleep", "60"), command("put", "a", "x")
    opened.project.submit(slow, opened.watcher)
    opened.project.submit(good, opened.watcher)
    await until(lambda: len(opened.watcher.answers) == 2)
    refused = opened.watcher.answers[slow.id]
    assert isinstance(refused, Refused)
    assert "longer than 1 s" in refused.message
    assert isinstance(opened.watcher.answers[good.id], Reply)


async def test_upkeep_before_a_command_does_not_lengthen_its_time(opened: Opened) -> None:
    opened.project.files_touched({"edited/none"})
    await opened.run("noop")
    slow = command("sleep", "60")
    opened.project.submit(slow, opened.watcher)
    await until(lambda: opened.watcher.answers, 20.0)  # the worker is started again, and the machine may be busy
    assert isinstance(opened.watcher.answers[slow.id], Refused)


async def test_the_same_request_asked_again_runs_once(opened: Opened, paths: ProjectPaths) -> None:
    request = command("sleep", "0.2")
    other = Watcher()
    opened.project.submit(request, opened.watcher)
    opened.project.submit(request, other)
    await until(lambda: other.answers and opened.watcher.answers)
    again = Watcher()
    opened.project.submit(request, again)
    await until(lambda: again.answers)
    assert again.answers == other.answers == opened.watcher.answers
    assert (paths.root / "runs").read_text().split() == [request.id]


async def test_a_request_id_belongs_to_its_token(opened: Opened) -> None:
    request = command("sleep", "0.2")
    other = Watcher()
    opened.project.submit(request, opened.watcher)
    opened.project.submit(command("noop", id_=request.id, holder="other"), other)
    await until(lambda: other.answers)
    refused = other.answers[request.id]
    assert isinstance(refused, Refused)
    assert refused.code == "REMOTE_FORBIDDEN"


async def test_a_full_queue_refuses_as_busy(opened: Opened) -> None:
    requests = [command("sleep", "0.001") for _ in range(300)]
    for request in requests:
        opened.project.submit(request, opened.watcher)
    await until(lambda: len(opened.watcher.answers) == 300)
    codes = {answer.code for answer in opened.watcher.answers.values() if isinstance(answer, Refused)}
    assert codes == {"REMOTE_BUSY"}


def carrying(size: int, whose: str = "t") -> RunCommand:
    """Return a request with a file."""
    file = Attachment(0, "f", b"x" * size)
    return RunCommand(secrets.token_hex(16), ["sleep", "0.05"], [file], whose, "human:ana", [])


async def test_requests_with_the_worker_are_bounded_in_bytes(paths: ProjectPaths) -> None:
    bounds = QueueLimits(in_flight_bytes=2500, window_bytes=1000)
    project = Project("web", paths, hooks=None, bounds=bounds, worker_command=FAKE_WORKER)
    project.start()
    await project.opened()
    watcher = Watcher()
    requests = [carrying(600) for _ in range(5)]
    for request in requests:
        project.submit(request, watcher)
    assert [len(queue) for queue in (project._queue.sent, project._queue.turns)] == [2, 2]
    await until(lambda: len(watcher.answers) == 5)
    refused = watcher.answers[requests[4].id]
    assert isinstance(refused, Refused)
    assert refused.code == "REMOTE_BUSY"
    assert all(isinstance(watcher.answers[request.id], Reply) for request in requests[:4])
    assert project.load.in_flight_bytes == 0
    await project.stop(1.0)


async def test_one_token_leaves_room_for_the_files_of_others(paths: ProjectPaths) -> None:
    bounds = QueueLimits(in_flight_bytes=4000, in_flight_bytes_per_token=2000)
    project = Project("web", paths, hooks=None, bounds=bounds, worker_command=FAKE_WORKER)
    project.start()
    await project.opened()
    watcher = Watcher()
    greedy, other = [carrying(900) for _ in range(4)], carrying(900, "other")
    for request in (*greedy, other):
        project.submit(request, watcher)
    await until(lambda: len(watcher.answers) == 5)
    answered = [isinstance(watcher.answers[request.id], Reply) for request in (*greedy, other)]
    assert answered == [True, True, False, False, True]
    assert not +project._queue._weight
    await project.stop(1.0)


async def test_a_failed_project_answers_no_request_but_gives_the_reason(opened: Opened) -> None:
    requester = Watcher()
    opened.project.submit(command("sleep", "0.2"), requester)
    opened.project.submit(command("fail"), opened.watcher)
    opened.project.submit(command("put", "a", "x"), requester)
    await until(lambda: opened.watcher.byes and requester.byes)
    assert opened.watcher.byes[0].code == requester.byes[0].code == "REMOTE_STORAGE"
    assert len(requester.answers) == 1 and not requester.changes, "it does not follow"
    assert opened.project.failure is not None
    assert not opened.watcher.answers


async def test_a_waiter_gets_the_resource_when_a_change_frees_it(opened: Opened) -> None:
    request = command("want", "gpu", "30")
    opened.project.submit(request, opened.watcher)
    await opened.run("put", "other", "x")
    assert request.id not in opened.watcher.answers
    await opened.run("put", "resources/gpu/free", "")
    await until(lambda: request.id in opened.watcher.answers)
    answer = opened.watcher.answers[request.id]
    assert isinstance(answer, Reply)
    assert opened.project.history.files.get("resources/gpu/free") is None


async def test_a_waiter_gets_what_was_freed_by_a_worker_that_died_before_saying_so(opened: Opened) -> None:
    request = command("want", "gpu", "30")
    opened.project.submit(request, opened.watcher)
    await opened.run("die-after", "resources/gpu/free")
    await until(lambda: request.id in opened.watcher.answers)
    answer = opened.watcher.answers[request.id]
    assert isinstance(answer, Reply)
    assert answer.seq == 2


async def test_one_of_many_waiters_gets_it_and_the_others_wait_on(opened: Opened) -> None:
    requests = [command("want", "gpu", "30") for _ in range(8)]
    for request in requests:
        opened.project.submit(request, opened.watcher)
    await opened.run("noop")
    for n in range(1, 4):
        await opened.run("put", "resources/gpu/free", "")
        await until(lambda n=n: len(opened.watcher.answers) == n)
    assert list(opened.watcher.answers) == [request.id for request in requests[:3]]


async def test_a_waiter_whose_time_is_over_tries_a_last_time(opened: Opened) -> None:
    before = time.monotonic()
    answer = await opened.run("want", "gpu", "0.3")
    assert isinstance(answer, Reply)
    assert answer.stdout == b"timeout"
    assert time.monotonic() - before >= 0.3


async def test_a_waiter_whose_connection_is_gone_takes_nothing(opened: Opened) -> None:
    request = command("want", "gpu", "30")
    gone = Watcher()
    opened.project.submit(request, gone)
    await opened.run("noop")
    opened.project.forget(gone, {request.id})
    await opened.run("put", "resources/gpu/free", "")
    await opened.run("noop")
    assert "resources/gpu/free" in opened.project.history.files


async def test_a_withdrawn_request_does_not_run_and_a_running_one_is_not_withdrawn(paths: ProjectPaths) -> None:
    bounds = QueueLimits(window_bytes=1000)
    project = Project("web", paths, hooks=None, bounds=bounds, worker_command=FAKE_WORKER)
    project.start()
    await project.opened()
    watcher, again = Watcher(), Watcher()
    running, second, queued = requests = [carrying(600) for _ in range(3)]
    for request in requests:
        project.submit(request, watcher)
    project.submit(queued, again)
    assert [len(queue) for queue in (project._queue.sent, project._queue.turns)] == [2, 1]
    assert not project.withdraw(watcher, running.id, "REMOTE_UNAUTHORIZED"), "the worker has it"
    assert not project.withdraw(again, queued.id, "REMOTE_UNAUTHORIZED"), "another connection asks for it"
    project.forget(again, {queued.id})
    assert project.withdraw(watcher, queued.id, "REMOTE_UNAUTHORIZED")
    assert not project.withdraw(watcher, queued.id, "REMOTE_UNAUTHORIZED")
    await until(lambda: set(watcher.answers) == {running.id, second.id})
    assert project.load.in_flight_bytes == 0 and project.load.queued == 0
    await project.stop(1.0)


async def wait_in_line(opened: Opened, count: int) -> list[RunCommand]:
    requests = [command("want", "gpu", "30") for _ in range(count)]
    for request in requests:
        opened.project.submit(request, opened.watcher)
    await opened.run("noop")
    return requests


async def test_a_request_during_the_wake_up_of_a_waiter_does_not_overtake_it(opened: Opened) -> None:
    (first,) = await wait_in_line(opened, 1)
    late = [command("want", "gpu", "30") for _ in range(5)]
    freed = command("put", "resources/gpu/free", "")
    other = Watcher()
    # All in one tick: the worker has the late requests queued before the server knows that the resource is free.
    opened.project.submit(freed, opened.watcher)
    for request in late:
        opened.project.submit(request, other)
    await until(lambda: first.id in opened.watcher.answers)
    await opened.run("noop")
    assert not other.answers
    for n in range(1, 6):
        await opened.run("put", "resources/gpu/free", "")
        await until(lambda n=n: len(other.answers) == n)
    assert list(other.answers) == [request.id for request in late]


async def test_waiters_keep_their_order_when_the_worker_dies(opened: Opened) -> None:
    requests = await wait_in_line(opened, 5)
    order = [request.id for request in requests]
    os.kill(_worker_pid(opened.project), signal.SIGKILL)
    for n in range(1, 6):
        if n == 3:
            opened.project.submit(command("die-once"), Watcher())
        await opened.run("put", "resources/gpu/free", "")
        await until(lambda n=n: len(set(opened.watcher.answers) & set(order)) == n)
    assert [id_ for id_ in opened.watcher.answers if id_ in order] == order


async def test_a_reconnected_waiter_keeps_its_place_and_its_deadline(opened: Opened) -> None:
    (second,) = await wait_in_line(opened, 1)
    now = time.time()
    first = msgspec.structs.replace(command("want", "gpu", "30"), first_sent_at=now - 20)
    over = msgspec.structs.replace(command("want", "gpu", "30"), first_sent_at=now - 40)
    again = Watcher()
    for request in (first, over):
        opened.project.submit(request, again)
    await until(lambda: over.id in again.answers)
    assert again.answers[over.id].stdout == b"timeout"  # type: ignore[union-attr]
    await opened.run("put", "resources/gpu/free", "")
    await until(lambda: first.id in again.answers)
    assert second.id not in opened.watcher.answers


async def test_a_waiter_that_leaves_lets_the_next_one_try(opened: Opened) -> None:
    gone = Watcher()
    first = command("want", "gpu", "30")
    opened.project.submit(first, gone)
    (second,) = await wait_in_line(opened, 1)
    freed = command("put", "resources/gpu/free", "")
    opened.project.submit(freed, opened.watcher)
    opened.project.forget(gone, {first.id})  # before the worker has freed it
    await until(lambda: second.id in opened.watcher.answers)
    assert not gone.answers and not opened.project._queue._by_id and not opened.project._queue.waiting._lines


async def test_local_edits_become_changes(opened: Opened, paths: ProjectPaths) -> None:
    (paths.lattice / "edited").mkdir()
    (paths.lattice / "edited/x").write_text("by hand")
    opened.project.files_touched({"edited/x"})
    await until(lambda: opened.watcher.changes == [1])
    assert opened.project.history.files["edited/x"][0] == 7


async def test_more_edits_than_fit_in_a_change_become_several(opened: Opened, paths: ProjectPaths) -> None:
    (paths.lattice / "edited").mkdir()
    names = {f"edited/{number}" for number in range(3)}
    for name in names:
        (paths.lattice / name).write_text("by hand")
    opened.project.files_touched(names)
    await until(lambda: opened.watcher.changes == [1, 2, 3])
    assert names <= opened.project.history.files.keys()


async def test_a_rollback_begins_a_new_epoch_once(opened: Opened) -> None:
    await opened.run("put", "a", "x")
    epoch = opened.project.history.epoch
    await opened.project.rollback_proved(epoch, "a client is ahead")
    assert opened.project.history.epoch != epoch
    assert opened.project.history.head == 0
    assert opened.watcher.byes[0].retry_after_s == 0
    renewed = opened.project.history.epoch
    await opened.project.rollback_proved(epoch, "and again")
    assert opened.project.history.epoch == renewed
    assert (await opened.run("put", "a", "y")).seq == 1  # type: ignore[union-attr]


async def test_missed_changes_come_from_memory_and_from_the_journal(opened: Opened) -> None:
    for i in range(20):
        await opened.run("put", "a", str(i))
    from_memory = await opened.project.history.changes_after(5)
    opened.project.history._recent.clear()
    from_disk = await opened.project.history.changes_after(5)
    assert [seq for seq, _ in from_disk] == list(range(6, 21))
    assert from_memory == from_disk
    assert await opened.project.history.mark_at(20) == opened.project.history.mark


async def test_a_read_of_an_undone_command_is_not_reused(
    opened: Opened, paths: ProjectPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head and queue are then as before."""
    file, asked = paths.lattice / "a", ReadPage("/api/tasks")

    async def look(_: Read) -> ReadResult:
        return ReadResult(200, file.read_bytes() if file.exists() else b"")

    async def look_in_the_middle(_: Read) -> ReadResult:
        running = asyncio.create_task(opened.run("undone", "a", "x"))
        await until(file.exists)
        found = await look(asked)
        (paths.root / "seen").touch()
        await running
        return found

    reader = opened.project.reader
    monkeypatch.setattr(reader, "_exchange", look_in_the_middle)
    assert (await reader.read(asked)).body == b"x", "it was there when it was read"
    assert (await reader.read_together([ReadPage("/api/stats")]))[1] is False
    monkeypatch.setattr(reader, "_exchange", look)
    found = await reader.read(asked)
    assert found.body == b""
    opened.project.files_touched({"a"})  # as after each change; the worker finds nothing new
    assert opened.project.load.with_worker
    await until(lambda: not opened.project.load.with_worker)
    assert await reader.read(asked) is found
    assert (await reader.read_together([ReadPage("/api/stats")]))[1] is True


async def test_stopping_finishes_what_runs(paths: ProjectPaths) -> None:
    project = Project("web", paths, hooks=None, worker_command=FAKE_WORKER)
    project.start()
    await project.opened()
    watcher = Watcher()
    request = command("sleep", "0.3")
    project.submit(request, watcher)
    await project.drain(2.0)
    assert isinstance(watcher.answers[request.id], Reply)
    await project.stop(1.0)


async def test_a_request_that_waits_for_a_project_to_open_is_answered_at_the_stop(paths: ProjectPaths) -> None:
    project = Project("web", paths, hooks=None, worker_command=("/bin/sh", "-c", "exec sleep 60"))
    project.start()
    waiting = asyncio.create_task(project.opened())
    await asyncio.sleep(0)
    await project.drain(1.0)
    with pytest.raises(Rejected, match="stopping") as refused:
        await asyncio.wait_for(waiting, 60)
    assert refused.value.code == "REMOTE_SHUTDOWN"
    await project.stop(0.1)


async def test_a_worker_that_does_not_start_closes_the_project_until_it_does(
    paths: ProjectPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lattice_remote.server.project.project._RESTART_DELAYS_S", (0.001,))
    full = paths.root / "disk-full"
    full.touch()
    script = f'test -e "{full}" && exit 1; exec "$@"'
    project = Project("web", paths, hooks=None, worker_command=("/bin/sh", "-c", script, "sh", *FAKE_WORKER))
    project.start()
    with pytest.raises(Exception, match="does not start"):
        await project.opened()
    full.unlink()
    await until(lambda: project.failure is None)
    watcher = Watcher()
    request = command("put", "a", "x")
    project.submit(request, watcher)
    await until(lambda: isinstance(watcher.answers.get(request.id), Reply))
    await project.stop(1.0)


async def test_a_worker_that_keeps_dying_is_replaced_ever_more_slowly(
    paths: ProjectPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Delays(tuple[float, ...]):
        def __getitem__(self, restarts: Any) -> Any:
            asked.append(restarts)
            return super().__getitem__(restarts)

    asked: list[int] = []
    delays = Delays((0.0, 0.0, 0.0, 60.0))
    monkeypatch.setattr("lattice_remote.server.project.project._RESTART_DELAYS_S", delays)
    starts = paths.root / "starts"
    script = f'echo x >> "{starts}"; "$@" <&0 & sleep 0.3; kill -9 $!'
    project = Project("web", paths, hooks=None, worker_command=("/bin/sh", "-c", script, "sh", *FAKE_WORKER))
    project.start()
    await until(lambda: asked == [1, 2, 3], 30.0)
    assert starts.read_text().count("x") == 3
    await project.stop(1.0)


async def test_a_worker_is_named_once_it_works(paths: ProjectPaths) -> None:
    """Not during its start: it may be repairing files, and must not be taken for hung."""
    gate = paths.root / "may-start"
    script = f'while [ ! -e "{gate}" ]; do sleep 0.01; done; exec "$@"'
    project = Project("web", paths, hooks=None, worker_command=("/bin/sh", "-c", script, "sh", *FAKE_WORKER))
    project.start()
    await until(lambda: project._worker is not None)
    assert project.load.worker_pid is None
    gate.touch()
    await project.opened()
    assert project.load.worker_pid == _worker_pid(project)
    await project.stop(1.0)


async def test_a_second_writer_waits_for_the_first_to_end(paths: ProjectPaths) -> None:
    first = Project("web", paths, hooks=None, worker_command=FAKE_WORKER)
    first.start()
    await first.opened()
    second = Project("web", paths, hooks=None, worker_command=FAKE_WORKER)
    second.start()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(second.opened(), 0.3)
    await first.stop(1.0)
    await asyncio.wait_for(second.opened(), 60.0)
    await second.stop(1.0)


async def test_a_requester_that_does_not_follow_gets_its_reply_across_a_new_epoch(opened: Opened) -> None:
    project, requester = opened.project, Watcher()
    before, after = command("put", "a", "1"), command("put", "a", "2")
    epoch = project.history.epoch
    project.submit(before, requester)
    proved = asyncio.create_task(project.rollback_proved(epoch, "a test says so"))
    await asyncio.sleep(0)
    project.submit(after, requester)
    await proved
    await until(lambda: len(requester.answers) == 2)
    assert project.history.epoch != epoch and opened.watcher.byes
    assert not requester.byes and not requester.changes
    assert all(isinstance(answer, Reply) for answer in requester.answers.values())


# --- an idle worker ---


@pytest.fixture
async def dozing(paths: ProjectPaths) -> AsyncIterator[Opened]:
    """A project whose worker leaves soon."""
    config = Config(idle_seconds=0.02)
    project = Project("web", paths, hooks=None, config=config, worker_command=FAKE_WORKER)
    project.start()
    await project.opened()
    watcher = Watcher()
    project.history.join(watcher)
    yield Opened(project, watcher)
    await project.drain(1.0)
    await project.stop(1.0)


def is_away(project: Project) -> bool:
    return project._worker is None


async def test_an_idle_worker_leaves_and_the_next_request_starts_another(
    dozing: Opened, paths: ProjectPaths, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    project = dozing.project
    starts = project.metrics.worker_starts._value.get()
    await dozing.run("put", "a", "1")
    await until(lambda: is_away(project))
    assert project.is_ready and project.failure is None and project.load.worker_pid is None
    assert project._settled_state() is not None, "reads are served from the cache of their results"
    with pytest.raises(LockedElsewhere):
        lock(paths.writer_lock)  # an administrator's command waits until the server has released the project
    reply = await dozing.run("put", "b", "2")
    assert isinstance(reply, Reply) and reply.seq == 2
    assert dozing.watcher.changes == [1, 2] and not dozing.watcher.byes
    await until(lambda: is_away(project))
    assert project.metrics.worker_starts._value.get() == starts, "none of them died"
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


async def test_a_request_beside_the_workers_end_is_run_once(dozing: Opened, paths: ProjectPaths) -> None:
    """Each request comes at another moment of the worker's end: before, during and after it."""
    project, requests = dozing.project, []
    for n in range(25):
        await until(lambda: project._resting)
        for _ in range(n % 5):
            await asyncio.sleep(0)
        if n % 3 == 0:
            await until(lambda: is_away(project))
        requests.append(command("put", f"f{n}", "x"))
        project.submit(requests[-1], dozing.watcher)
        await until(lambda: requests[-1].id in dozing.watcher.answers)
    assert all(isinstance(answer, Reply) for answer in dozing.watcher.answers.values())
    assert (paths.root / "runs").read_text().split() == [request.id for request in requests]
    assert dozing.watcher.changes == list(range(1, 26))


async def test_a_worker_that_is_killed_as_it_leaves_costs_nothing(
    dozing: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, stopped = WorkerProcess.send, list[int]()

    def hold(self: WorkerProcess, *messages: ToWorker) -> None:
        if Stop() in messages and not stopped:
            os.kill(self.pid, signal.SIGSTOP)
            stopped.append(self.pid)
        send(self, *messages)

    monkeypatch.setattr(WorkerProcess, "send", hold)
    project = dozing.project
    await dozing.run("put", "a", "1")
    await until(lambda: stopped)
    request = command("put", "b", "2")
    project.submit(request, dozing.watcher)
    os.kill(stopped[0], signal.SIGKILL)
    await until(lambda: request.id in dozing.watcher.answers)
    assert isinstance(dozing.watcher.answers[request.id], Reply)
    assert dozing.watcher.changes == [1, 2]


async def test_a_worker_stays_for_a_request_that_waits(dozing: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    request = command("want", "gpu", "60")
    dozing.project.submit(request, dozing.watcher)
    await until(lambda: len(dozing.project._queue.waiting) == 1)
    pid, checks, is_idle = _worker_pid(dozing.project), [], dozing.project._is_idle
    monkeypatch.setattr(dozing.project, "_is_idle", lambda: checks.append(is_idle()))
    await until(lambda: len(checks) == 3)
    assert not any(checks) and _worker_pid(dozing.project) == pid
    monkeypatch.undo()
    reply = await dozing.run("put", "resources/gpu/free", "x")
    assert isinstance(reply, Reply)
    await until(lambda: isinstance(dozing.watcher.answers.get(request.id), Reply))


async def test_an_edit_on_the_server_wakes_the_worker(dozing: Opened, caplog: pytest.LogCaptureFixture) -> None:
    await until(lambda: is_away(dozing.project))
    caplog.set_level(logging.INFO)
    dozing.project.files_touched({"a"})
    await until(lambda: "open at change" in caplog.text)
    await until(lambda: is_away(dozing.project))


async def test_a_new_epoch_is_begun_by_a_worker_that_was_away(dozing: Opened) -> None:
    project = dozing.project
    await until(lambda: is_away(project))
    epoch = project.history.epoch
    await project.rollback_proved(epoch, "a test says so")
    assert project.history.epoch != epoch
