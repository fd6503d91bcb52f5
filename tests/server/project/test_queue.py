"""Fair request queue: connections in turn, each in its own order."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import NamedTuple, cast

import pytest

from lattice_remote.server.ipc import AbandonRequest, PathState, Reconcile, RequestDone, RunCommand, ToWorker
from lattice_remote.server.project.queue import (
    FairLock,
    FairQueue,
    QueuedRequest,
    QueueLimits,
    Requester,
    RequestQueue,
    ResourceWaitQueue,
)


class Asker(NamedTuple):
    """A requester for the queue: two of one lane share its turn."""

    name: str
    fairness_key: str


ANA, BEN, CEM = (cast("Requester", Asker(name, name)) for name in ("ana", "ben", "cem"))
BENS_OTHER = cast("Requester", Asker("ben at another connection", "ben"))


def job(requester: Requester | None, name: str) -> QueuedRequest:
    return QueuedRequest(
        AbandonRequest(name, "", "", "") if requester else Reconcile(None), [requester] if requester else []
    )


def add(turns: FairQueue[QueuedRequest], added: QueuedRequest) -> None:
    turns.add(added, added.fairness_key)


def names(turns: FairQueue[QueuedRequest]) -> str:
    return " ".join(getattr(turns.pop().message, "id", "server") for _ in range(len(turns)))


def test_connections_take_turns_and_each_keeps_its_order() -> None:
    turns: FairQueue[QueuedRequest] = FairQueue()
    for name in ("a1", "a2", "a3", "b1", "b2", "c1"):
        add(turns, job({"a": ANA, "b": BEN, "c": CEM}[name[0]], name))
    add(turns, job(None, ""))
    assert names(turns) == "a1 b1 c1 server a2 b2 a3"


def test_a_late_requester_waits_for_one_request_of_each_other_only() -> None:
    turns: FairQueue[QueuedRequest] = FairQueue()
    for number in range(100):
        add(turns, job(ANA, f"a{number}"))
    assert turns.pop().message.id == "a0"  # type: ignore[union-attr]
    add(turns, job(BEN, "b"))
    assert [turns.pop().message.id for _ in range(2)] == ["a1", "b"]  # type: ignore[union-attr]
    assert turns.has(ANA.fairness_key)
    assert not turns.has(BEN.fairness_key)


def test_all_requesters_of_a_lane_share_its_turn() -> None:
    turns: FairQueue[QueuedRequest] = FairQueue()
    for requester, name in ((BEN, "b1"), (BENS_OTHER, "b2"), (ANA, "a1"), (BENS_OTHER, "b3")):
        add(turns, job(requester, name))
    assert names(turns) == "b1 a1 b2 b3"


def test_requests_of_a_former_worker_go_first() -> None:
    turns: FairQueue[QueuedRequest] = FairQueue()
    add(turns, job(ANA, "a"))
    for name in ("c", "b"):
        turns.add_first(job(BEN, name))
    assert turns.next().message.id == "b"  # type: ignore[union-attr]
    assert names(turns) == "b c a"
    add(turns, job(ANA, "a"))
    turns.clear()
    assert not turns


async def test_lanes_take_a_lock_in_turn_and_a_cancelled_waiter_takes_none() -> None:
    lock, took = FairLock(), list[str]()

    async def take(fairness_key: str, name: str) -> None:
        async with lock.turn(fairness_key):
            took.append(name)
            await asyncio.sleep(0)

    async with lock.turn("a"):
        tasks = {name: asyncio.create_task(take(name[0], name)) for name in ("a1", "a2", "a3", "a4", "b1", "c1")}
        await asyncio.sleep(0)
        tasks["a2"].cancel()
        await asyncio.sleep(0)
    assert not tasks["a1"].done()
    tasks["a1"].cancel()  # its turn has come, and it has not run yet
    await asyncio.wait(tasks.values())
    assert took == ["b1", "c1", "a3", "a4"]
    async with asyncio.timeout(5), lock.turn("a"):
        pass


def waiting_for(resource: str) -> RequestDone:
    return RequestDone("x", 1, waiting_for=resource, wait_timeout_s=60)


async def test_a_waiter_is_tried_at_once_when_those_ahead_of_it_have_left() -> None:
    tried: list[QueuedRequest] = []
    queue = ResourceWaitQueue(tried.append)
    first, second, third = (job(ANA, name) for name in ("1", "2", "3"))
    for number, each in enumerate((first, second, third)):
        each.submitted_at = time.monotonic() + number / 1000
    for each in (second, first, third):
        queue.add(each, waiting_for("gpu"), ahead=[])
    assert tried == [] and len(queue) == 3
    assert queue.ahead_of(second) == ["gpu"] and queue.ahead_of(first) == []
    queue.add(second, waiting_for("gpu"), ahead=["gpu"])
    assert tried == [], "the first one waits still"
    assert queue.leave(first)
    queue.add(second, waiting_for("gpu"), ahead=["gpu"])
    assert tried == [second]
    await asyncio.sleep(0)
    assert not queue.leave(second), "it is being tried"
    queue.clear()


async def test_a_waiter_that_left_is_not_tried_any_more() -> None:
    tried: list[QueuedRequest] = []
    queue = ResourceWaitQueue(tried.append)
    waiter = job(ANA, "1")
    queue.add(waiter, RequestDone("x", 1, waiting_for="gpu", wait_timeout_s=60), ahead=[])
    timer = queue._lines["gpu"][waiter]
    assert timer is not None
    assert queue.leave(waiter) and timer.cancelled() and len(queue) == 0


async def test_only_the_first_waiter_for_a_lock_tries_again_before_its_time() -> None:
    queue = ResourceWaitQueue(lambda _: None)
    first, second, third = (job(ANA, name) for name in ("1", "2", "3"))
    for number, each in enumerate((first, second, third)):
        each.submitted_at = time.monotonic() + number / 1000
    for each in (first, third, second):
        queue.add(each, waiting_for("locks/x"), ahead=[])
    line, now = queue._lines["locks/x"], asyncio.get_running_loop().time()
    delays = [timer.when() - now if (timer := line[each]) is not None else 0 for each in (first, second, third)]
    assert delays[0] < 10 < 30 < min(delays[1:])
    queue.clear()


def test_a_lane_whose_only_item_was_removed_is_gone() -> None:
    turns: FairQueue[QueuedRequest] = FairQueue()
    removed, other = job(ANA, "a"), job(BEN, "b")
    for each in (removed, other):
        add(turns, each)
    turns.remove(removed)
    assert not turns.has(ANA.fairness_key) and turns.has(BEN.fairness_key)
    assert len(turns) == 1 and turns.pop() is other


def queued(name: str, argument: str = "") -> QueuedRequest:
    return QueuedRequest(RunCommand(name, [argument], [], "tok", "human:ana", []), [ANA])


def ids(messages: Iterable[ToWorker]) -> list[str]:
    return [message.id for message in messages]  # type: ignore[union-attr]


@pytest.fixture
async def requests() -> AsyncIterator[RequestQueue]:
    retried: list[None] = []
    queue = RequestQueue(QueueLimits(window=2), ready=lambda: retried.append(None), overdue=lambda _: None)
    yield queue
    queue.clear()
    queue.close()


async def test_a_request_is_queued_then_sent_then_waits_and_is_queued_again(requests: RequestQueue) -> None:
    first, second, third = (queued(name) for name in ("1", "2", "3"))
    for each in (first, second, third):
        requests.add(each)
    assert ids(requests.take()) == ["1", "2"] and requests.take() == [], "the window has two"
    assert [each.state for each in (first, second, third)] == ["sent", "sent", "queued"]
    requests.wait(requests.settle(), waiting_for("gpu"))
    assert first.state == "waiting" and ids(requests.take()) == ["3"]
    requests.waiting.wake_first("gpu")
    assert first.state == "queued" and requests.get("1") is first
    assert not requests.withdraw(second), "the worker has it"
    assert requests.withdraw(first) and requests.get("1") is None and not requests.turns


async def test_a_dead_workers_request_is_sent_again_first_and_alone(requests: RequestQueue) -> None:
    for name in ("1", "2", "3"):
        requests.add(queued(name))
    requests.take()
    requests.add(QueuedRequest(Reconcile(None)))
    assert ids(each.message for each in requests.worker_ended()) == ["1", "2"]
    assert ids(requests.take()) == ["1"], "a suspect runs alone"
    requests.drop(requests.settle())
    assert ids(requests.take()) == ["2"]
    requests.drop(requests.settle())
    assert requests.take()[0].id == "3" and len(requests.sent) == 2  # type: ignore[union-attr]
    assert len(requests.worker_ended()) == 1 and len(requests.turns) == 1, "a check is not repeated"


async def test_a_time_limit_that_ends_after_the_last_request_is_ignored() -> None:
    overdue: list[QueuedRequest] = []
    queue = RequestQueue(QueueLimits(command_s=0.0), ready=lambda: None, overdue=overdue.append)
    queue.add(queued("1"))
    queue.take()
    queue.drop(queue.settle())
    assert queue._timer is not None
    queue._check_deadline()
    queue.close()
    assert overdue == []


async def test_a_token_with_too_much_is_refused_until_its_requests_are_answered(requests: RequestQueue) -> None:
    limits = QueueLimits(in_flight_bytes=300, in_flight_bytes_per_token=200, per_token=3, queued=2)
    queue = RequestQueue(limits, ready=lambda: None, overdue=lambda _: None)
    large = queued("1", "x" * 150)
    assert queue.objection(large) is None
    queue.add(large)
    assert "of this token are in flight" in (queue.objection(queued("2", "x" * 100)) or "")
    assert queue.objection(queued("2", "x" * 50)) is None and queue.bytes == 150
    for name in ("2", "3"):
        queue.add(queued(name))
    assert "too much to do" in (queue.objection(queued("4")) or ""), "it has requests in the queue"
    queue.turns.clear()
    assert queue.objection(queued("4")) == "3 requests of this token are in flight"
    for each in (large, large):
        queue.drop(each)
    assert queue.objection(queued("4", "x" * 200)) is None and queue.bytes == 0
    assert "too much to do" in (queue.objection(queued("4", "x" * 301)) or "")
    queue.add(large)
    queue.clear()
    assert queue.get("2") is None and queue.requesters() == []
    assert queue.bytes == 0 and queue.objection(queued("5", "x" * 200)) is None


async def test_a_worker_gets_no_further_request_beside_large_ones() -> None:
    queue = RequestQueue(QueueLimits(window_bytes=100), ready=lambda: None, overdue=lambda _: None)
    for name in ("1", "2", "3", "4"):
        queue.add(queued(name, "x" * 60))
    assert ids(queue.take()) == ["1", "2"] and queue.take() == []
    queue.drop(queue.settle())
    assert ids(queue.take()) == ["3"] and queue.attempts == 3
    queue.close()


async def test_a_check_is_no_attempt_to_write(requests: RequestQueue) -> None:
    requests.add(QueuedRequest(Reconcile([])))
    requests.add(queued("1"))
    assert len(requests.take()) == 2 and requests.attempts == 1


async def test_an_answered_request_makes_room_for_one_of_its_token() -> None:
    queue = RequestQueue(QueueLimits(per_token=2), ready=lambda: None, overdue=lambda _: None)
    first, second, third = (queued(name) for name in ("1", "2", "3"))
    queue.add(first)
    queue.add(second)
    assert queue.objection(third) is not None
    queue.drop(first)
    assert queue.objection(third) is None
    queue.add(third)
    assert queue.objection(queued("4")) is not None and queue.requesters() == [ANA, ANA]


@pytest.mark.parametrize(
    ("messages", "is_overdue"),
    [
        ([RunCommand("1", [], [], "tok", "human:ana", [])], True),
        ([Reconcile(["plans/x.md"])], True),
        ([Reconcile(None)], False),
    ],
)
async def test_only_a_look_at_the_whole_tree_may_take_longer_than_a_command(
    messages: list[ToWorker], is_overdue: bool
) -> None:
    overdue: list[QueuedRequest] = []
    queue = RequestQueue(QueueLimits(command_s=0.0), ready=lambda: None, overdue=overdue.append)
    for message in messages:
        queue.add(QueuedRequest(message))
    queue.take()
    queue._check_deadline()
    queue.close()
    assert bool(overdue) == is_overdue


async def test_a_waiter_is_tried_for_the_last_time_once_its_wait_is_over(requests: RequestQueue) -> None:
    requests.add(waiter := queued("1"))
    for timeout_s, last in ((60.0, False), (0.0, True)):
        assert ids(requests.take()) == ["1"]
        done = RequestDone("1", 1, waiting_for="gpu", wait_timeout_s=timeout_s)
        requests.wait(requests.settle(), done)
        requests.waiting.wake_first("gpu")
        assert isinstance(waiter.message, RunCommand)
        assert (waiter.message.last_try, waiter.message.may_wait) == (last, True)


async def test_a_request_that_waited_long_enough_for_a_lock_is_refused_next(requests: RequestQueue) -> None:
    requests.add(waiter := queued("1"))
    requests.take()
    requests.wait(requests.settle(), RequestDone("1", 1, waiting_for="locks/x", wait_timeout_s=0.0))
    requests.waiting.wake_first("locks/x")
    assert isinstance(waiter.message, RunCommand)
    assert (waiter.message.last_try, waiter.message.may_wait) == (False, False)


async def test_a_change_of_a_resource_wakes_its_first_waiter_alone(requests: RequestQueue) -> None:
    waiters = {name: queued(name) for name in ("gpu", "cpu")}
    for name, each in waiters.items():
        requests.add(each)
        requests.take()
        requests.wait(requests.settle(), waiting_for(name))
    changed = [PathState(path, 0, None) for path in ("resources/gpu/resource.json", "tasks/cpu.json")]
    requests.waiting.touched(RequestDone("2", 2, after=changed))
    assert [each.state for each in waiters.values()] == ["queued", "waiting"]
    requests.waiting.wake_each_first()
    assert waiters["cpu"].state == "queued"
