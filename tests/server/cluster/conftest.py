"""The engine's servers and connections to them."""

import secrets
from collections.abc import AsyncIterator, Iterator

import pytest
from nats_servers import NatsCluster, nats_cluster

from lattice_remote.server.cluster.engine import Engine
from lattice_remote.server.cluster.order import JetStreamOrder


@pytest.fixture(scope="session")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsCluster]:
    """One server, for tests that do not stop it."""
    with nats_cluster(1, tmp_path_factory.mktemp("nats")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def three_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsCluster]:
    """Three servers, for tests that stop none or repair them: see ``healed``."""
    with nats_cluster(3, tmp_path_factory.mktemp("nats")) as cluster:
        yield cluster


@pytest.fixture
def healed(three_servers: NatsCluster) -> Iterator[NatsCluster]:
    """Three servers that the test may stop and pause."""
    try:
        yield three_servers
    finally:
        three_servers.heal()


@pytest.fixture
async def engine(one_server: NatsCluster) -> AsyncIterator[Engine]:
    """A connection to the one server."""
    connected = await Engine.connect(one_server.urls, node="a", replicas=1)
    yield connected
    await connected.close()


@pytest.fixture
async def engine3(three_servers: NatsCluster) -> AsyncIterator[Engine]:
    """A connection to the three servers."""
    connected = await Engine.connect(three_servers.urls, node="a")
    yield connected
    await connected.close()


@pytest.fixture
def slug() -> str:
    """A unique name for each test."""
    return f"p-{secrets.token_hex(4)}"


@pytest.fixture
async def order(engine: Engine, slug: str) -> JetStreamOrder:
    """An empty order on the one server."""
    made = JetStreamOrder(engine, slug, "e1", lost_s=0.5)
    await made.create()
    return made
