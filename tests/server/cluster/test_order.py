"""The order of a project's changes, on real servers."""

import asyncio

import pytest
from nats_servers import NatsCluster

from lattice_remote.server.cluster.engine import Engine
from lattice_remote.server.cluster.order import Batch, JetStreamOrder


async def _first(order: JetStreamOrder, count: int, after: int = 0) -> list[Batch]:
    """Return the next batches of a follower."""
    found: list[Batch] = []
    async with asyncio.timeout(60):
        async for batch in order.follow(after):
            found.append(batch)
            if len(found) == count:
                break
    return found


async def test_batches_are_read_and_followed_in_order(engine: Engine, order: JetStreamOrder, slug: str) -> None:
    other = JetStreamOrder(engine, slug, "e1")
    await other.open()
    following = asyncio.create_task(_first(other, 4))
    assert await order.take_over(0, node="a", term=7) == 1
    assert await order.append(1, [b"one"]) == 2
    assert await order.append(2, [b"two", b"three"]) == 3
    assert await order.append(3, [b""]) == 4
    expected = [
        Batch(1, 7, "a", ()),
        Batch(2, 7, "a", (b"one",)),
        Batch(3, 7, "a", (b"two", b"three")),
        Batch(4, 7, "a", (b"",)),
    ]
    assert await other.read(0) == expected
    assert await other.read(2) == expected[2:]
    assert await other.read(4) == []
    assert await following == expected
    assert await other.bounds() == (1, 4)


@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_an_append_goes_on_without_one_server(engine3: Engine, healed: NatsCluster, slug: str, how: str) -> None:
    order = JetStreamOrder(engine3, slug, "e1")
    await order.create()
    await order.take_over(0, node="a", term=1)
    following = asyncio.create_task(_first(order, 21))
    leader = healed.named((await engine3.stream_info(order.name)).cluster.leader)
    for number in range(1, 21):
        if number == 10:
            getattr(leader, how)()
        assert await order.append(number, [b"%d" % number]) == number + 1
    assert [each.records for each in await following] == [(), *((b"%d" % number,) for number in range(1, 21))]
