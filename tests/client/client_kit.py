"""Helpers for the client's tests."""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

from fake_server import TOKEN

from lattice_remote.client import trusted_servers
from lattice_remote.client.agent.service import Service
from lattice_remote.client.cache.cache import Cache
from lattice_remote.client.config import Remote, read_remote, write_remote

TASK = "task_01HZZZZZZZZZZZZZZZZZZZZZZZ"
PLAN = f"plans/{TASK}.md"
MINE = f".remote/conflicts/{PLAN}"


def make_clone(root: Path, url: str, project: str = "web") -> Path:
    """Make a directory with only a ``remote.json``, as after ``git clone``."""
    directory = root / ".lattice"
    directory.mkdir(parents=True)
    write_remote(str(directory), Remote("origin", url, project))
    return directory


def make_cache(root: Path, url: str, project: str = "web") -> Path:
    """Make a clone whose server the user trusts on this machine."""
    trusted_servers.record(trusted_servers.name(url))
    return make_clone(root, url, project)


async def ask(service: Service, do: str, token: str | None = TOKEN, **fields: object) -> dict[str, object]:
    async with asyncio.timeout(30):
        return await service.handle({"do": do, "token": token, **fields}, lambda _: None)


async def ready(service: Service) -> None:
    """Wait until the cache is current. The bound is longer than a command's, for slow machines."""
    async with asyncio.timeout(60):
        while not (await ask(service, "ready"))["current"]:  # noqa: ASYNC110 - each look starts the work
            await asyncio.sleep(0.01)


async def run(service: Service, *argv: str, token: str | None = TOKEN, **fields: object) -> dict[str, object]:
    return await ask(service, "run", token, id=os.urandom(16).hex(), argv=list(argv), files=[], **fields)


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait for a condition, at most ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.005)


def tree(directory: Path) -> dict[str, bytes]:
    """Return the replicated files of a cache."""
    cache = Cache(str(directory), read_remote(str(directory)))
    return {path: cache.read(path) for path in cache.paths()}


def rescued(directory: Path) -> dict[str, list[bytes]]:
    """Return the rescued contents of a cache by path, oldest first."""
    found: dict[str, list[bytes]] = {}
    for entry in sorted((directory / ".remote/rescued").glob("*"), key=lambda place: int(place.name)):
        for place in sorted((entry / "files").rglob("*")):
            if place.is_file():
                found.setdefault(place.relative_to(entry / "files").as_posix(), []).append(place.read_bytes())
    return found
