"""The order of a project's changes, on one real server."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats_servers import NatsCluster, nats_cluster

from faultproxy import FaultProxy
from lattice_remote.server.cluster.engine import Engine
from lattice_remote.server.cluster.jetstream import Ack, EngineFull, EngineUnavailable, StreamInfo
from lattice_remote.server.cluster.order import Batch, Fenced, JetStreamOrder, StreamLost, TooOld

PIPELINE = 8


async def followed(order: JetStreamOrder, count: int, after: int = 0) -> list[Batch]:
    """Return the next batches of a follower."""
    found: list[Batch] = []
    async with asyncio.timeout(60):
        async for batch in order.follow(after):
            found.append(batch)
            if len(found) == count:
                break
    return found


async def everything(order: JetStreamOrder) -> list[Batch]:
    """Return all batches."""
    found: list[Batch] = []
    while more := await order.read(found[-1].seq if found else 0):
        found += more
    return found


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition; the caller has a bound."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.02)


async def opened(engine: Engine, like: JetStreamOrder, slug: str) -> JetStreamOrder:
    """Return another node's view of an order."""
    other = JetStreamOrder(engine, slug, "e1", lost_s=1.0)
    await other.open()
    assert other.name == like.name
    return other


async def test_batches_are_read_and_followed_in_order(engine: Engine, order: JetStreamOrder, slug: str) -> None:
    other = await opened(engine, order, slug)
    following = asyncio.create_task(followed(other, 4))
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


async def test_an_order_is_created_once_and_deleted_with_everything(engine: Engine, slug: str) -> None:
    order = JetStreamOrder(engine, slug, "e1", lost_s=0.2)
    with pytest.raises(StreamLost, match="is missing"):
        await order.open()
    await order.create()
    assert await order.bounds() == (1, 0)
    with pytest.raises(StreamLost, match="already has a stream"):
        await JetStreamOrder(engine, slug, "e1").create()
    await order.take_over(0, node="a", term=1)
    await order.append(1, [bytes(engine.max_message_bytes)])
    await order.delete()
    await order.delete()
    assert await engine.parts.part_names(f"order.{order.name}") == []
    await JetStreamOrder(engine, slug, "e1").create()


async def test_an_owner_that_was_replaced_is_fenced_and_its_successor_read_everything(
    engine: Engine, order: JetStreamOrder, slug: str
) -> None:
    last = await order.append(await order.take_over(0, node="a", term=1), [b"a"])
    other = await opened(engine, order, slug)
    with pytest.raises(Fenced):  # it has not read to the end
        await other.take_over(last - 1, node="b", term=2)
    taken = await other.take_over(last, node="b", term=2)
    with pytest.raises(Fenced, match="is of b, term 2"):
        await order.append(last, [b"late"])
    assert [batch.records for batch in await order.read(0)] == [(), (b"a",), ()]
    last = await other.append(taken, [b"b"])
    back = await order.take_over(last, node="a", term=3)
    assert await order.append(back, [b"again"]) == back + 1


async def _stale(order: JetStreamOrder, engine: Engine, last: int, outstanding: int) -> list[int]:
    """Let an owner append from its last number on and never give up; return the numbers of its messages in the stream.

    It gives the expected number alone, without the second condition of ``append()``.
    """

    async def one(number: int) -> int:
        headers = {
            "Nats-Expected-Last-Sequence": str(last + number),
            "Nats-Msg-Id": f"stale-{outstanding}-{number}",
        }
        for _ in range(3):
            ack = await engine.publish(f"{order.subject}.log", b"", headers)
            if ack.error is None:
                return ack.seq
        return 0

    return [seq for seq in await asyncio.gather(*map(one, range(outstanding))) if seq]


async def test_a_stale_owner_gets_nothing_in_behind_a_takeover_but_a_pipeline_would(
    engine: Engine, order: JetStreamOrder, slug: str
) -> None:
    last = await order.append(await order.take_over(0, node="a", term=1), [b"a"])
    other = await opened(engine, order, slug)
    taken = await other.take_over(last, node="b", term=2)
    for _ in range(5):
        with pytest.raises(Fenced):
            await order.append(last, [b"stale"])
    assert await _stale(order, engine, last, 1) == []
    assert (await other.bounds())[1] == taken
    # The same with several outstanding appends: all but the first are behind the takeover. So the number alone
    # fences an owner only while it waits for each answer.
    assert len(await _stale(order, engine, last, PIPELINE)) == PIPELINE - 1
    # The record of the owner, which append() names too, fences it once more.
    with pytest.raises(Fenced):
        await order.append(taken + PIPELINE - 1, [b"stale"])


async def test_the_same_append_sent_twice_at_once_is_stored_once(order: JetStreamOrder) -> None:
    last = await order.take_over(0, node="a", term=1)
    assert await asyncio.gather(*(order.append(last, [b"same"]) for _ in range(4))) == [2, 2, 2, 2]
    assert [batch.records for batch in await order.read(0)] == [(), (b"same",)]


@pytest.fixture
def proxy(one_server: NatsCluster) -> Iterator[FaultProxy]:
    with FaultProxy(one_server.servers[0].port) as made:
        yield made


@asynccontextmanager
async def behind(proxy: FaultProxy, slug: str) -> AsyncIterator[JetStreamOrder]:
    """The owner's view, over a network that misbehaves."""
    far = await Engine.connect([f"nats://127.0.0.1:{proxy.port}"], node="far", replicas=1)
    try:
        order = JetStreamOrder(far, slug, "e1", answer_s=0.3, lost_s=2.0)
        await order.open()
        yield order
    finally:
        proxy.flow()
        await far.close()


@pytest.mark.parametrize("fault", ["lost", "delayed", "cut", "stalled"])
async def test_an_append_without_an_answer_is_stored_exactly_once(
    engine: Engine, order: JetStreamOrder, slug: str, proxy: FaultProxy, fault: str
) -> None:
    async with behind(proxy, slug) as far:
        last = await far.append(await far.take_over(0, node="far", term=1), [b"before"])
        if fault == "lost":
            proxy.swallow_answers()
        elif fault == "delayed":
            proxy.delay(1.0)  # each way: several copies are under way before the first answer
        elif fault == "cut":
            proxy.cut_after(150)  # in the middle of the message
        else:
            proxy.stall()
        append = asyncio.create_task(far.append(last, [b"in doubt"]))
        async with asyncio.timeout(60):
            await until(lambda: far.in_doubt or append.done())  # after a cut the next copy may be there at once
            if fault == "stalled":
                proxy.flow()
            elif fault == "lost":
                proxy.cut()  # the client would connect anew after some seconds without an answer
            last = await append
            proxy.flow()
            last = await far.append(last, [b"after"])
    expected: list[tuple[bytes, ...]] = [(), (b"before",), (b"in doubt",), (b"after",)]
    assert [batch.records for batch in await order.read(0)] == expected
    assert await order.bounds() == (1, last)


async def test_an_append_that_a_stopping_leader_has_lost_is_sent_again_at_once(
    engine: Engine, slug: str, order: JetStreamOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    del order  # it has created the stream
    patient = JetStreamOrder(engine, slug, "e1", answer_s=600.0)
    await patient.open()
    last = await patient.take_over(0, node="a", term=1)
    publish, sent = engine.publish, 0

    async def lose_first(*args: Any, **options: Any) -> Ack:
        nonlocal sent
        sent += 1
        return await (asyncio.Event().wait() if sent == 1 else publish(*args, **options))

    monkeypatch.setattr(engine, "publish", lose_first)
    async with asyncio.timeout(60):
        assert await patient.append(last, [b"sent again"]) == last + 1
    assert patient.in_doubt == 0


@pytest.mark.parametrize("is_lost", [False, True])
async def test_a_refusal_for_want_of_room_counts_once_each_copy_is_answered(
    engine: Engine, slug: str, order: JetStreamOrder, monkeypatch: pytest.MonkeyPatch, *, is_lost: bool
) -> None:
    del order
    sender = JetStreamOrder(engine, slug, "e1")
    await sender.open()
    last = await sender.take_over(0, node="a", term=1)
    sent, again, full = 0, asyncio.Event(), msgspec.convert({"error": {"err_code": 10077}}, Ack)

    async def answer_late(*_: Any, **__: Any) -> Ack:
        nonlocal sent
        sent += 1
        if sent == 1:
            await again.wait()
            if is_lost:
                raise EngineUnavailable("no answer")
        elif sent == 3:
            again.set()
        return full

    monkeypatch.setattr(engine, "publish", answer_late)
    append = asyncio.create_task(sender.append(last, [b"no room"]))
    async with asyncio.timeout(60):
        await until(lambda: sent >= 6 if is_lost else append.done())
    if is_lost:  # the first copy may be stored
        assert not append.done()
        append.cancel()
    with pytest.raises(asyncio.CancelledError if is_lost else EngineFull):
        await append


async def test_an_append_in_doubt_is_refused_after_a_takeover(
    engine: Engine, order: JetStreamOrder, slug: str, proxy: FaultProxy
) -> None:
    async with behind(proxy, slug) as far:
        last = await far.take_over(0, node="far", term=1)
        proxy.stall()
        append = asyncio.create_task(far.append(last, [b"late"]))
        async with asyncio.timeout(60):
            await until(lambda: far.in_doubt)
            taken = await order.take_over(last, node="near", term=2)
            await order.append(taken, [b"new"])
            proxy.flow()
            with pytest.raises(Fenced):
                await append
    assert [batch.records for batch in await order.read(0)] == [(), (), (b"new",)]


async def test_a_full_stream_refuses_clearly_and_takes_more_after_a_purge(engine: Engine, slug: str) -> None:
    order = JetStreamOrder(engine, slug, "e1")
    await order.create(max_bytes=20_000)
    last = await order.take_over(0, node="a", term=1)
    with pytest.raises(EngineFull, match="maximum bytes exceeded"):
        while True:
            last = await order.append(last, [bytes(3000)])
    assert await order.bounds() == (1, last)
    assert [batch.seq for batch in await everything(order)] == list(range(1, last + 1))
    await order.purge(last - 2)
    assert await order.append(last, [b"more"]) == last + 1
    assert [batch.seq for batch in await order.read(last - 2)] == [last - 1, last, last + 1]


async def test_a_purge_keeps_the_owner_and_all_behind_it(engine: Engine, order: JetStreamOrder, slug: str) -> None:
    last = await order.take_over(0, node="a", term=1)
    for number in range(5):
        last = await order.append(last, [b"%d" % number])
    await order.purge(3)
    await order.purge(3)
    assert await order.bounds() == (4, last)
    with pytest.raises(TooOld):
        await order.read(1)
    with pytest.raises(TooOld):
        await followed(order, 1, after=2)
    assert [batch.seq for batch in await followed(order, 3, after=3)] == [4, 5, 6]
    await order.purge(last)
    assert await order.bounds() == (last + 1, last)
    assert await order.read(last) == []
    last = await order.append(last, [b"next"])
    other = await opened(engine, order, slug)
    assert await other.take_over(last, node="b", term=2) == last + 1
    await other.purge(last + 1)
    assert await other.bounds() == (last + 1, last + 1)


async def test_a_batch_over_the_message_limit_is_read_as_it_was(engine: Engine, order: JetStreamOrder) -> None:
    large = bytes(range(256)) * (3 * engine.max_message_bytes // 256)
    last = await order.append(await order.take_over(0, node="a", term=1), [b"small", large])
    assert (await order.read(0))[1].records == (b"small", large)
    assert (await followed(order, 2))[1].records == (b"small", large)
    await order.purge(last)
    assert await engine.parts.part_names(f"order.{order.name}") == []


async def test_a_batch_over_the_message_limit_is_refused_without_room_for_it(
    engine: Engine, order: JetStreamOrder
) -> None:
    taken = await order.take_over(0, node="a", term=1)
    await engine.parts.put_parts("first", 1, lambda offset, count: b"1")
    info = await engine.stream_info("lattice-parts")
    await engine.api(
        "STREAM.UPDATE.lattice-parts", StreamInfo, {**info.config, "max_bytes": info.state.bytes + 2_000_000}
    )
    try:
        with pytest.raises(EngineFull, match="NATS cannot store more"):
            await order.append(taken, [bytes(3 * engine.max_message_bytes)])
    finally:
        await engine.api("STREAM.UPDATE.lattice-parts", StreamInfo, info.config)
    assert await order.append(taken, [b"small"]) == taken + 1


async def test_a_stream_that_another_program_emptied_loses_nothing(
    engine: Engine, order: JetStreamOrder, slug: str
) -> None:
    last = await _with_changes(order)
    follower = await opened(engine, order, slug)
    await engine.purge(order.name)
    with pytest.raises(Fenced, match="owner's record"):
        await order.append(last, [b"c"])
    last = await order.append(await order.take_over(last, node="a", term=2), [b"c"])
    assert [batch.records for batch in await followed(follower, 2, after=last - 2)] == [(), (b"c",)]
    with pytest.raises(TooOld):
        await follower.read(last - 3)


async def _with_changes(order: JetStreamOrder) -> int:
    return await order.append(await order.append(await order.take_over(0, node="a", term=1), [b"a"]), [b"b"])


async def _delete(engine: Engine, order: JetStreamOrder) -> None:
    await engine.delete_stream(order.name)


async def _recreate(engine: Engine, order: JetStreamOrder) -> None:
    config = (await engine.stream_info(order.name)).config
    await engine.delete_stream(order.name)
    await engine.create_stream(order.name, config)


async def _recreate_longer(engine: Engine, order: JetStreamOrder) -> None:
    await _recreate(engine, order)
    last = 0
    async with asyncio.timeout(30):
        for number in range(9):
            ack = await engine.publish(f"{order.subject}.log", b"x")
            assert ack.error is None, number
            last = ack.seq
    assert last == 9


async def _write_foreign(engine: Engine, order: JetStreamOrder) -> None:
    await engine.publish(f"{order.subject}.log", b"not ours")


async def _replace_by_another_name(engine: Engine, order: JetStreamOrder) -> None:
    config = (await engine.stream_info(order.name)).config
    await engine.delete_stream(order.name)
    await engine.create_stream(f"other-{order.name}", {**config, "name": f"other-{order.name}"})


DAMAGES = [_delete, _recreate, _recreate_longer, _write_foreign, _replace_by_another_name]


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_stream_stops_its_owner_and_its_followers(
    engine: Engine, order: JetStreamOrder, slug: str, damage: object
) -> None:
    last = await _with_changes(order)
    follower = await opened(engine, order, slug)
    await followed(follower, last)
    await damage(engine, order)  # type: ignore[operator]
    async with asyncio.timeout(60):
        with pytest.raises(StreamLost):
            await order.append(last, [b"c"])
        with pytest.raises(StreamLost):
            await followed(follower, 1, after=last)
        # Neither can a node that comes later continue behind the number that it has.
        with pytest.raises((StreamLost, Fenced)):
            later = JetStreamOrder(engine, slug, "e1", lost_s=0.5)
            await later.open()
            await later.read(last)
            await later.take_over(last, node="b", term=2)
            await later.read(1)


async def test_an_engine_without_space_refuses_clearly(tmp_path: Path, slug: str) -> None:
    with nats_cluster(1, tmp_path, max_file="200KB") as small:
        engine = await Engine.connect(small.urls, node="a", replicas=1)
        order = JetStreamOrder(engine, slug, "e1")
        await order.create()
        last = await order.take_over(0, node="a", term=1)
        with pytest.raises(EngineFull):
            while True:
                last = await order.append(last, [bytes(20_000)])
        assert [batch.seq for batch in await everything(order)] == list(range(1, last + 1))
        await order.purge(last - 1)
        assert await order.append(last, [b"more"]) == last + 1
        await engine.close()


async def test_an_engine_that_was_restored_from_an_older_copy_is_refused(tmp_path: Path, slug: str) -> None:
    with nats_cluster(1, tmp_path) as restored:
        server = restored.servers[0]
        engine = await Engine.connect(restored.urls, node="a", replicas=1)
        order = JetStreamOrder(engine, slug, "e1", lost_s=0.5)
        await order.create()
        last = await order.append(await order.take_over(0, node="a", term=1), [b"in the copy"])
        await asyncio.to_thread(server.stop)
        shutil.copytree(server.directory / "js", tmp_path / "copy")
        await asyncio.to_thread(restored.heal)
        last = await order.append(last, [b"after the copy"])
        await asyncio.to_thread(server.stop)
        shutil.rmtree(server.directory / "js")
        shutil.copytree(tmp_path / "copy", server.directory / "js")
        await asyncio.to_thread(restored.heal)
        later = await opened(engine, order, slug)
        async with asyncio.timeout(60):
            with pytest.raises(StreamLost, match="ends at 2; 3 was acknowledged"):
                await order.append(last, [b"next"])
            with pytest.raises(StreamLost, match="ends at 2"):
                await later.read(last)
            with pytest.raises(StreamLost, match="ends at 2"):
                await later.take_over(last, node="b", term=2)
            with pytest.raises(StreamLost, match="ends at 2"):
                await followed(later, 1, after=last)
        await engine.close()
