"""The engine's connection, buckets and contents, on real servers."""

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trustme
import uvloop
from nats_servers import NatsCluster, nats_cluster

from lattice_remote.errors import Misuse
from lattice_remote.server.cluster.engine import Bucket, BucketEntry, Engine, EngineUnavailable, StoredContents

ACCOUNTS = """
accounts {
  APP { jetstream: enabled, users: [ { user: app, password: secret } ] }
  SYS { users: [ { user: admin, password: other } ] }
}
system_account: SYS
"""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsCluster]:
    """One server with a login and the default sync."""
    with nats_cluster(1, tmp_path_factory.mktemp("guarded"), sync=None, extra=ACCOUNTS) as cluster:
        yield cluster


def names(directory: Path) -> list[str]:
    """Return the names of a directory's files."""
    return sorted(each.name for each in directory.iterdir())


@pytest.fixture
async def bucket(engine: Engine, slug: str) -> AsyncIterator[Bucket]:
    yield await engine.kv(f"bucket-{slug}")


async def test_only_a_login_of_the_file_is_let_in(guarded: NatsCluster, tmp_path: Path) -> None:
    login = tmp_path / "login"
    for text in ("app:wrong\n", "token\n"):
        login.write_text(text)
        with pytest.raises(Misuse, match="refuses the login"):
            await Engine.connect(guarded.urls, node="a", credentials=login, replicas=1)
    login.write_text("app:secret\n")
    engine = await Engine.connect(guarded.urls, node="a", credentials=login, replicas=1)
    await engine.kv("some")
    await engine.close()


async def test_a_connection_may_use_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "pem")
    files = f'tls {{ cert_file: "{tmp_path}/pem", key_file: "{tmp_path}/pem" }}'
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with (
        pytest.raises(EngineUnavailable, match="certificate verify failed"),
        nats_cluster(1, tmp_path, extra=files) as tls,
    ):
        engine = await Engine.connect(tls.urls, node="a", tls=trusting, replicas=1)
        bucket = await engine.kv("b")
        assert await bucket.put("k", b"1")
        await engine.close()
        await Engine.connect(tls.urls, node="a", tls=ssl.create_default_context(), replicas=1, timeout_s=1.0)


@pytest.mark.parametrize("text", ["", "a:b\nc:d\n", None])
async def test_a_file_that_is_no_login_is_named(one_server: NatsCluster, tmp_path: Path, text: str | None) -> None:
    login = tmp_path / "login"
    if text is not None:
        login.write_text(text)
    with pytest.raises(Misuse, match=str(login)):
        await Engine.connect(one_server.urls, node="a", credentials=login)


async def test_a_server_that_does_not_sync_is_refused_if_its_setting_is_known(
    guarded: NatsCluster, engine: Engine, one_server: NatsCluster, tmp_path: Path
) -> None:
    login = tmp_path / "login"
    login.write_text("app:secret")
    weak = await Engine.connect(guarded.urls, node="a", credentials=login, replicas=1)
    with pytest.raises(Misuse, match="n1 acknowledges before its disk has the data"):
        await weak.check_durability(guarded.monitor_urls)
    await weak.close()
    only_copy = "NATS keeps one copy of each change, not 3"
    assert await engine.check_durability(one_server.monitor_urls) == [only_copy]
    unknown, few = await engine.check_durability()
    assert unknown.startswith("the sync setting is known of 0 of 1 NATS servers")
    assert few == only_copy
    monitors = [*one_server.monitor_urls, "http://127.0.0.1:9", "file:///etc/passwd"]
    first, second, _ = await engine.check_durability(monitors)
    assert first.startswith("cannot read the settings of the NATS server at http://127.0.0.1:9: ")
    assert second.startswith("cannot read the settings of the NATS server at file:///etc/passwd: not an http")


async def test_several_copies_at_one_server_are_refused_with_advice(one_server: NatsCluster, slug: str) -> None:
    engine = await Engine.connect(one_server.urls, node="a")
    with pytest.raises(Misuse, match="use --cluster-replicas 1"):
        await engine.kv(slug)
    await engine.close()


async def test_an_engine_that_is_not_there_is_named_with_the_reason() -> None:
    with pytest.raises(EngineUnavailable, match=r"cannot connect to NATS at nats://127.0.0.1:9: Connection refused"):
        await Engine.connect(["nats://127.0.0.1:9"], node="a", timeout_s=0.5)


async def test_a_connection_is_opened_again_after_its_server_restarted(tmp_path: Path) -> None:
    with nats_cluster(1, tmp_path) as cluster:
        engine = await Engine.connect(cluster.urls, node="a", replicas=1)
        try:
            bucket = await engine.kv("b")
            revision = await bucket.put("k", b"1")
            async with asyncio.timeout(60):
                cluster.servers[0].kill()
                with pytest.raises(EngineUnavailable):
                    await bucket.put("k", b"2")
                await asyncio.to_thread(cluster.heal)
                found = None
                while found is None:
                    await asyncio.sleep(0.02)
                    with suppress(EngineUnavailable):
                        found = await bucket.get("k")
            assert found == BucketEntry(b"1", revision)
        finally:
            await engine.close()


async def test_a_bucket_writes_only_over_the_expected_revision(bucket: Bucket) -> None:
    assert await bucket.get("a") is None
    first = await bucket.create("a", b"1")
    assert first is not None
    assert await bucket.create("a", b"2") is None
    second = await bucket.update("a", b"2", first)
    assert second is not None
    assert await bucket.update("a", b"3", first) is None
    assert not await bucket.delete("a", first)
    assert await bucket.get("a") == BucketEntry(b"2", second)
    assert await bucket.revision() == second
    assert await bucket.delete("a", second)
    assert await bucket.get("a") is None
    assert await bucket.entries() == {}
    assert await bucket.create("a", b"4") is not None
    await bucket.put("b.c", b"5")
    assert await bucket.keys() == ["a", "b.c"]
    assert (await bucket.entries())["b.c"].value == b"5"


async def test_an_entry_expires_after_its_last_change(engine: Engine, slug: str) -> None:
    bucket = await engine.kv(f"short-{slug}", ttl_s=0.5)
    await bucket.put("a", b"1")
    async with asyncio.timeout(60):
        while await bucket.get("a") is not None:  # noqa: ASYNC110 - of the server's clock
            await asyncio.sleep(0.02)
    assert await bucket.create("a", b"2") is not None


@pytest.mark.parametrize("size", [0, 1, 512 * 1024, 3 * 1024 * 1024 + 7])
async def test_a_content_is_stored_by_its_digest(engine: Engine, tmp_path: Path, size: int) -> None:
    data = (b"%d " % size * (size + 1))[:size]
    digest = hashlib.sha256(data).digest()
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(data)
    assert not await engine.contents.has(digest)
    assert not await engine.get_content(digest, target)
    await engine.put_content(digest, size, source)
    await engine.put_content(digest, size, source)
    assert await engine.contents.has(digest)
    assert await engine.get_content(digest, target)
    assert target.read_bytes() == data
    assert names(tmp_path) == ["source", "target"]


async def test_a_content_is_removed_after_its_time_unless_it_is_stored_again(
    engine: Engine, slug: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"content")
    digest = hashlib.sha256(b"content").digest()
    contents = StoredContents(engine, slug, keep_s=1.0)
    stream = f"lattice-{slug}"
    await contents.put(digest, len(b"content"), source)
    first = (await engine.stream_info(stream)).state.last_seq
    async with asyncio.timeout(60):
        while (await engine.stream_info(stream)).state.last_seq == first:
            await contents.put(digest, len(b"content"), source)
        while (await engine.stream_info(stream)).state.messages:  # noqa: ASYNC110 - of the server's clock
            await asyncio.sleep(0.02)
    assert not await contents.has(digest)
    assert not await contents.get(digest, tmp_path / "target")


async def test_a_content_that_has_changed_since_is_not_stored(engine: Engine, tmp_path: Path) -> None:
    source, digest = tmp_path / "source", hashlib.sha256(b"one").digest()
    for data in (b"two", b"", b"on"):
        source.write_bytes(data)
        assert not await engine.put_content(digest, 3, source)
        assert not await engine.contents.has(digest)
    source.write_bytes(b"one and more")
    assert await engine.put_content(digest, 3, source)
    assert await engine.get_content(digest, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"one"


async def test_a_content_that_is_damaged_replaces_nothing(engine: Engine, tmp_path: Path) -> None:
    target, digest = tmp_path / "target", hashlib.sha256(b"none").digest()
    target.write_bytes(b"before")
    await engine.contents.put_parts(digest.hex(), 7, lambda offset, count: b"another"[offset : offset + count])
    assert not await engine.get_content(digest, target)
    assert target.read_bytes() == b"before"
    assert names(tmp_path) == ["target"]


def test_a_node_ends_in_order_after_the_engine_has_died(tmp_path: Path) -> None:
    async def end(nats: NatsCluster) -> None:
        engine = await Engine.connect(nats.urls, node="a", replicas=1)
        nats.kill_all()
        with pytest.raises(EngineUnavailable):
            await engine.request("unanswered", b"kept by the client", timeout_s=0.5)
        await engine.close()

    with nats_cluster(1, tmp_path) as nats, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(end(nats))
