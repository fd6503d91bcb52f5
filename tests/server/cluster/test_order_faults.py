"""The order on three real servers that are killed, stopped and paused."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from nats_servers import NatsCluster

from cluster_order import Account, Node, finished, observe, verdict, wait_for_acks
from lattice_remote.server.cluster.engine import Engine, EngineUnavailable
from lattice_remote.server.cluster.order import Batch, JetStreamOrder


@asynccontextmanager
async def running(engine: Engine, slug: str, nodes: list[Node], account: Account) -> AsyncIterator[str]:
    """Let nodes compete and an observer look on; yields the stream's name, and looks at the account at the end."""
    order, history = JetStreamOrder(engine, slug, "e1"), list[Batch]()
    await order.create()
    tasks = [asyncio.create_task(observe(order, history)), *(asyncio.create_task(node.run()) for node in nodes)]
    try:
        await wait_for_acks(account, 10)
        yield order.name
        await wait_for_acks(account, 10)
        for task in tasks[1:]:
            task.cancel()
        await asyncio.gather(*tasks[1:], return_exceptions=True)
        stream = await finished(order)
        async with asyncio.timeout(60):
            while len(history) < len(stream) and not tasks[0].done():  # noqa: ASYNC110 - of another task
                await asyncio.sleep(0.02)
        assert verdict(account, stream, history) == []
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(("how", "count"), [("pause", 1), ("stop", 1), ("kill", 3)])
async def test_nothing_acknowledged_is_lost_or_doubled_without_some_servers(
    engine3: Engine, healed: NatsCluster, slug: str, how: str, count: int
) -> None:
    account = Account()
    async with running(engine3, slug, [Node("a", engine3, slug, account)], account) as stream:
        group = (await engine3.stream_info(stream)).cluster
        assert group is not None
        servers = sorted(healed.servers, key=lambda each: each.name != group.leader)[:count]
        for each in servers:
            getattr(each, how)()
        if count == 1:
            await wait_for_acks(account, 10)  # two are enough
        await asyncio.to_thread(healed.heal)


async def test_a_minority_acknowledges_nothing(engine3: Engine, healed: NatsCluster, slug: str) -> None:
    order = JetStreamOrder(engine3, slug, "e1", answer_s=0.5)
    await order.create()
    last = await order.append(await order.take_over(0, node="a", term=1), [b"before"])
    for each in healed.servers[1:]:
        each.pause()
    append = asyncio.create_task(order.append(last, [b"in doubt"]))
    async with asyncio.timeout(60):
        while engine3.is_reachable or not order.in_doubt:  # noqa: ASYNC110 - of the clock
            await asyncio.sleep(0.05)
        assert not append.done()
        await asyncio.to_thread(healed.heal)
        last = await append
        while not engine3.is_reachable:  # noqa: ASYNC110 - of the clock
            await asyncio.sleep(0.05)
    assert [batch.records for batch in await order.read(0)] == [(), (b"before",), (b"in doubt",)]


async def test_a_silent_server_is_left_with_what_it_does_not_read(
    three_servers: NatsCluster, healed: NatsCluster, engine3: Engine, slug: str
) -> None:
    order = JetStreamOrder(engine3, slug, "e1")
    await order.create()
    silent = next(each for each in healed.servers if each.port == engine3.connected_port)
    silent.pause()
    large = bytes(engine3.max_message_bytes)  # together more than the system takes for a server that reads nothing
    sent = [asyncio.create_task(engine3.publish(f"unused.{slug}", large)) for _ in range(16)]
    assert all(isinstance(each, EngineUnavailable) for each in await asyncio.gather(*sent, return_exceptions=True))
    async with asyncio.timeout(60):
        await order.append(await order.take_over(0, node="a", term=1), [b"after"])
    assert engine3.connected_port != silent.port
