"""Fixtures for tests with a client: a home directory, a fake server and a cache that follows it."""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from client_kit import make_cache
from fake_server import TOKEN, FakeServer, running

from lattice_remote.client.agent.service import Service

__all__ = ["directory", "guarded", "home", "server", "service"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Create a home directory and clear our environment variables."""
    for name in [name for name in os.environ if name.startswith("LATTICE")]:
        monkeypatch.delenv(name)
    place = tmp_path / "home"
    place.mkdir()
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place / "config"))
    monkeypatch.setenv("LATTICE_REMOTE_RUNTIME_DIR", str(place / "run"))
    yield place


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with running() as made:
        yield made


@pytest.fixture
def directory(tmp_path: Path, server: FakeServer) -> Path:
    return make_cache(tmp_path / "ana", server.url)


@pytest.fixture
async def service(directory: Path) -> AsyncIterator[Service]:
    made = Service(str(directory))
    made.start(TOKEN)
    yield made
    await made.close()


@pytest.fixture
def guarded(tmp_path: Path) -> Path:
    """Create a directory that the guard protects."""
    directory = tmp_path / ".lattice"
    (directory / "locks").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    return directory
