"""Whose request is next: connections in turn, each in its own order."""

import asyncio
from typing import NamedTuple, cast

from lattice_remote.server.ipc import AbandonRequest, Reconcile
from lattice_remote.server.project.history import Subscriber
from lattice_remote.server.project.queue import FairLock, FairQueue, QueuedRequest


class Asker(NamedTuple):
    """A follower, as far as turns go: two of one lane are as one."""

    name: str
    fairness_key: str


ANA, BEN, CEM = (cast("Subscriber", Asker(name, name)) for name in ("ana", "ben", "cem"))
BENS_OTHER = cast("Subscriber", Asker("ben at another connection", "ben"))


def job(requester: Subscriber | None, name: str) -> QueuedRequest:
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


def test_whoever_comes_late_waits_for_one_of_each_only() -> None:
    turns: FairQueue[QueuedRequest] = FairQueue()
    for number in range(100):
        add(turns, job(ANA, f"a{number}"))
    assert turns.pop().message.id == "a0"  # type: ignore[union-attr]
    add(turns, job(BEN, "b"))
    assert [turns.pop().message.id for _ in range(2)] == ["a1", "b"]  # type: ignore[union-attr]
    assert turns.has(ANA.fairness_key)
    assert not turns.has(BEN.fairness_key)


def test_all_askers_of_a_lane_share_its_turn() -> None:
    turns: FairQueue[QueuedRequest] = FairQueue()
    for requester, name in ((BEN, "b1"), (BENS_OTHER, "b2"), (ANA, "a1"), (BENS_OTHER, "b3")):
        add(turns, job(requester, name))
    assert names(turns) == "b1 a1 b2 b3"


def test_what_was_with_a_worker_goes_before_all() -> None:
    turns: FairQueue[QueuedRequest] = FairQueue()
    add(turns, job(ANA, "a"))
    for name in ("c", "b"):
        turns.add_first(job(BEN, name))
    assert turns.next().message.id == "b"  # type: ignore[union-attr]
    assert names(turns) == "b c a"
    add(turns, job(ANA, "a"))
    turns.clear()
    assert not turns


async def test_lanes_take_a_lock_in_turn_and_who_gives_up_takes_nobodys() -> None:
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
