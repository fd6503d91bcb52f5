"""Cluster directory created by several nodes at the same moment."""

import asyncio

import pytest

from lattice_remote.server.cluster.directory import ClusterDirectory
from lattice_remote.server.cluster.engine import Bucket, Engine


async def test_nodes_that_start_at_once_get_one_secret(engine: Engine, slug: str) -> None:
    bucket = await engine.kv(slug)
    directories = [ClusterDirectory(bucket, engine.max_message_bytes) for _ in range(8)]
    assert len(set(await asyncio.gather(*(each.secret() for each in directories)))) == 1


async def test_a_secret_that_another_node_is_writing_is_awaited(
    engine: Engine, slug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = await engine.kv(slug)
    create, refused = bucket.create, 0

    async def refuse_first(self: Bucket, key: str, value: bytes) -> int | None:
        nonlocal refused
        refused += 1
        return None if refused < 3 else await create(key, value)

    monkeypatch.setattr(Bucket, "create", refuse_first)
    assert len(await ClusterDirectory(bucket, engine.max_message_bytes).secret()) == 32
