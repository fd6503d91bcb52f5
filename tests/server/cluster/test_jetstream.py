"""Cancellation of tasks in calls of the engine's library, which hides some cancellations."""

import asyncio
from contextlib import suppress

import pytest

from lattice_remote.server.cluster.jetstream import cancellable


async def _hide(how: str) -> None:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        if how == "raised as another":
            raise OSError("closed") from None


@pytest.mark.parametrize("how", ["swallowed", "raised as another"])
async def test_a_hidden_cancellation_ends_the_task(how: str) -> None:
    async def work() -> None:
        with suppress(OSError), cancellable():
            await _hide(how)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancelled_task_may_still_use_the_engine() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            with cancellable():
                await asyncio.sleep(0)
            ended.append("released")

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["released"]


async def test_errors_and_timeouts_pass() -> None:
    with pytest.raises(OSError, match="closed"), cancellable():
        raise OSError("closed")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            with cancellable():
                await _hide("swallowed")
