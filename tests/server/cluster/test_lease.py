"""Leases of projects, on a real server."""

import asyncio

import pytest

from lattice_remote.server.cluster.engine import Engine, EngineUnavailable
from lattice_remote.server.cluster.lease import Held, Lease, LeaseHolder

SHORT_S = 0.5


@pytest.fixture
def lease(engine: Engine) -> Lease:
    """Leases that do not expire while a test runs."""
    return Lease(engine, 600.0, bucket="long-leases-of-tests")


@pytest.fixture
def short(engine: Engine) -> Lease:
    """Leases that expire soon; a machine that is busy for so long loses one."""
    return Lease(engine, SHORT_S, bucket="short-leases-of-tests")


async def taken(lease: Lease, slug: str, node: str, **options: int) -> Held:
    """Take the lease, once it is free."""
    async with asyncio.timeout(60):
        while True:
            if (held := await lease.acquire(slug, node=node, url=f"http://{node}", **options)) is not None:
                return held
            await asyncio.sleep(0.02)


async def test_one_node_has_the_lease(lease: Lease, slug: str) -> None:
    assert await lease.holder(slug) is None
    first = await taken(lease, slug, "a")
    assert first.holder.url == "http://a"
    assert await lease.acquire(slug, node="b", url="http://b") is None
    assert await first.renew()
    assert await lease.acquire(slug, node="b", url="http://b") is None
    assert await lease.holder(slug) == first.holder
    assert not first.lost.is_set()


async def test_a_lease_that_is_not_renewed_is_lost_before_another_node_has_it(short: Lease, slug: str) -> None:
    first = await taken(short, slug, "a")
    second = await taken(short, slug, "b")
    assert first.lost.is_set()
    assert second.term > first.term
    assert not await first.renew()
    await first.release()  # is not the second node's
    assert await short.holder(slug) in (second.holder, None)


async def test_a_renewed_lease_outlives_its_time(short: Lease, slug: str) -> None:
    clock = asyncio.get_running_loop().time
    async with asyncio.timeout(60):
        held, since = await taken(short, slug, "a"), clock()
        while clock() < since + 3 * SHORT_S:
            await held.renew()
            other = await short.acquire(slug, node="b", url="")
            if held.lost.is_set():  # this machine was busy
                if other is not None:
                    await other.release()
                held, since = await taken(short, slug, "a"), clock()
            else:
                assert other is None
            await asyncio.sleep(SHORT_S / 10)


async def test_a_released_lease_is_free_at_once_with_a_higher_term(lease: Lease, slug: str) -> None:
    first = await taken(lease, slug, "a")
    await first.release()
    assert first.lost.is_set()
    assert await lease.holder(slug) is None
    second = await lease.acquire(slug, node="b", url="")
    assert second is not None
    assert second.term > first.term


async def test_a_lease_that_is_handed_over_is_for_one_node(lease: Lease, short: Lease, slug: str) -> None:
    first = await taken(lease, slug, "a")
    await first.release(hand_to="b")
    assert await lease.holder(slug) == LeaseHolder("", "", first.term, wanted="b")
    assert await lease.acquire(slug, node="c", url="") is None
    second = await lease.acquire(slug, node="b", url="http://b")
    assert second is not None
    assert second.term > first.term
    assert await second.renew()
    await (await taken(short, slug, "a")).release(hand_to="gone")
    assert await taken(short, slug, "c")  # once the time of the wanted node is over


async def test_a_term_is_higher_than_the_last_of_the_stream(lease: Lease, slug: str) -> None:
    held = await taken(lease, slug, "a", after=10_000)
    assert held.term == 10_001
    await held.release()
    assert (await taken(lease, slug, "a", after=3)).term == 10_002


async def test_a_renewal_whose_answer_was_lost_keeps_the_lease(lease: Lease, engine: Engine, slug: str) -> None:
    held = await taken(lease, slug, "a")
    bucket = await engine.kv("long-leases-of-tests", ttl_s=600.0)
    entry = await bucket.get(slug)
    assert entry is not None
    assert await bucket.update(slug, entry.value, entry.revision) is not None  # the renewal that had no answer
    assert await held.renew()
    assert not held.lost.is_set()


async def test_a_lease_is_lost_while_the_engine_is_away(short: Lease, engine: Engine, slug: str) -> None:
    held = await taken(short, slug, "a")
    await engine.close()
    assert not await held.renew()
    async with asyncio.timeout(60):
        await held.lost.wait()


async def test_leases_whose_bucket_was_deleted_are_free(engine: Engine, slug: str) -> None:
    lease = Lease(engine, 600.0, bucket=f"leases-{slug}")
    first = await taken(lease, slug, "a")
    await engine.delete_stream(f"KV_leases-{slug}")
    assert not await first.renew()
    with pytest.raises(EngineUnavailable):
        await lease.holder(slug)
    second = await lease.acquire(slug, node="b", url="", after=first.term)
    assert second is not None
    assert second.term > first.term


async def test_of_many_nodes_one_gets_the_lease(engine: Engine, slug: str) -> None:
    leases = [Lease(engine, 600.0, bucket="long-leases-of-tests") for _ in range(8)]
    got = await asyncio.gather(*(each.acquire(slug, node=f"n{number}", url="") for number, each in enumerate(leases)))
    assert sum(each is not None for each in got) == 1
