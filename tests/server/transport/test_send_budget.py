"""Budget of unsent WebSocket bytes of a token: bounded, with waiters in order."""

import asyncio

import pytest
from harness import until

from lattice_remote.server.transport.websocket import SendBudget


def test_a_token_holds_up_to_its_bound_and_always_one_answer() -> None:
    budget = SendBudget(10)
    assert budget.take("a", 25), "it holds nothing"
    assert not budget.take("a", 1)
    assert budget.take("b", 10)
    assert not budget.take("b", 1)
    budget.give_back("a", 25)
    assert budget.take("a", 4) and budget.take("a", 6) and not budget.take("a", 1)
    assert budget.held("a") == 10


async def test_waiters_are_served_in_order() -> None:
    budget, turns = SendBudget(10), []

    async def hold(name: int, size: int, until_set: asyncio.Event) -> None:
        async with budget.reserved("a", size):
            turns.append(name)
            await until_set.wait()

    ends = [asyncio.Event() for _ in range(4)]
    async with asyncio.TaskGroup() as group:
        for name, size in enumerate((8, 6, 2, 4)):
            group.create_task(hold(name, size, ends[name]))
        await until(lambda: turns == [0])
        ends[0].set()
        await until(lambda: turns == [0, 1, 2])
        assert budget.held("a") == 8
        ends[1].set()
        await until(lambda: turns == [0, 1, 2, 3])
        ends[2].set()
        ends[3].set()
    assert budget.held("a") == 0
    async with budget.reserved("a", 100):
        assert budget.held("a") == 100


@pytest.mark.parametrize("is_granted", [False, True])
async def test_a_cancelled_waiter_holds_nothing(is_granted: bool) -> None:
    budget = SendBudget(10)
    assert budget.take("a", 10)

    async def wait() -> None:
        async with budget.reserved("a", 5):
            raise AssertionError("it was cancelled before")

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    if is_granted:
        budget.give_back("a", 10)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    assert budget.held("a") == (0 if is_granted else 10)
    if not is_granted:
        budget.give_back("a", 10)
    assert budget.held("a") == 0
    async with budget.reserved("a", 10):
        pass
