"""The order on three real servers that are killed, stopped and paused."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from nats_servers import NatsCluster, NatsServer

from cluster_order import Account, Node, finished, observe, verdict, wait_for_acks
from lattice_remote.server.cluster.engine import Engine, EngineUnavailable
from lattice_remote.server.cluster.order import Batch, JetStreamOrder


async def created(engine: Engine, servers: NatsCluster, slug: str) -> tuple[JetStreamOrder, NatsServer]:
    """Return a new order, and the server that leads its stream."""
    order = JetStreamOrder(engine, slug, "e1")
    await order.create()
    group = (await engine.stream_info(order.name)).cluster
    assert group is not None
    return order, servers.named(group.leader)


@asynccontextmanager
async def observed(order: JetStreamOrder, node: Node, account: Account) -> AsyncIterator[None]:
    """Let a node append, and an observer follow. At the end both have the same history, with all acknowledgements."""
    history: list[Batch] = []
    observing, running = asyncio.create_task(observe(order, history)), asyncio.create_task(node.run())
    try:
        await wait_for_acks(account, 10)
        yield
        await wait_for_acks(account, 10)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        stream = await finished(order)
        async with asyncio.timeout(60):
            while len(history) < len(stream) and not observing.done():  # noqa: ASYNC110 - of another task
                await asyncio.sleep(0.02)
        assert verdict(account, stream, history) == []
    finally:
        running.cancel()
        observing.cancel()
        await asyncio.gather(running, observing, return_exceptions=True)


@pytest.mark.parametrize(("how", "count"), [("stop", 1), ("kill", 3)])
async def test_nothing_acknowledged_is_lost_or_doubled_without_some_servers(
    engine3: Engine, healed: NatsCluster, slug: str, how: str, count: int
) -> None:
    account = Account()
    order, leader = await created(engine3, healed, slug)
    async with observed(order, Node("a", engine3, slug, account), account):
        for each in sorted(healed.servers, key=lambda each: each is not leader)[:count]:
            getattr(each, how)()
        if count == 1:
            await wait_for_acks(account, 10)  # two are enough
        await asyncio.to_thread(healed.heal)


async def test_a_silent_leader_is_left_with_what_it_does_not_read(
    engine3: Engine, healed: NatsCluster, slug: str
) -> None:
    account = Account()
    order, leader = await created(engine3, healed, slug)
    async with connected_to(leader, healed) as engine, observed(order, Node("a", engine, slug, account), account):
        leader.pause()
        # Together more than the system takes for a server that reads nothing.
        large = bytes(engine.max_message_bytes)
        unread = [asyncio.create_task(engine.publish("unused", large)) for _ in range(16)]
        await wait_for_acks(account, 10)
        assert engine.connected_port != leader.port
        await asyncio.gather(*unread, return_exceptions=True)


@asynccontextmanager
async def connected_to(server: NatsServer, servers: NatsCluster) -> AsyncIterator[Engine]:
    """Connect to one of all servers: the library chooses at random."""
    while True:
        engine = await Engine.connect(servers.urls, node="a")
        try:
            if engine.connected_port == server.port:
                yield engine
                return
        finally:
            await engine.close()


async def test_a_minority_acknowledges_nothing(engine3: Engine, healed: NatsCluster, slug: str) -> None:
    order = JetStreamOrder(engine3, slug, "e1", answer_s=0.5)
    await order.create()
    last = await order.append(await order.take_over(0, node="a", term=1), [b"before"])
    for each in healed.servers[1:]:
        each.pause()
    append = asyncio.create_task(order.append(last, [b"in doubt"]))
    async with asyncio.timeout(60):
        while not order.in_doubt:  # noqa: ASYNC110 - of the clock
            await asyncio.sleep(0.05)
        assert not append.done()
        with pytest.raises(EngineUnavailable):  # it must not wait: its caller dismisses the clients
            await order.require(last + 1)
        await asyncio.to_thread(healed.heal)
        await append
    assert [batch.records for batch in await order.read(0)] == [(), (b"before",), (b"in doubt",)]
