"""Resource leaks of the agent: descriptors, tasks and threads stay bounded."""

import asyncio
import contextlib
import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from client_kit import ask, make_cache, run, until
from fake_server import TOKEN, FakeServer

from lattice_remote.client.agent.service import Service
from lattice_remote.client.connection import connection as link
from lattice_remote.client.connection import dial
from lattice_remote.file_watcher import FileWatcher

CACHES, ROUNDS = 20, int(os.environ.get("ROUNDS", "10"))
"""A thousand reconnects with ``ROUNDS=50``; the suite takes less time."""
TASKS = 11 * CACHES + 1
"""What runs when nothing is under way: the same for each cache, with the server's side of it, and the test itself."""


def held(foreign: frozenset[str]) -> dict[str, int]:
    """Count the resources of this process, including the server's. Descriptors in ``foreign`` are excluded."""
    gc.collect()
    return {
        "descriptors": sum(name not in foreign for name in open_files()),
        "tasks": len(asyncio.all_tasks()),
        "threads": threading.active_count(),
        "threads of the system": len(os.listdir("/proc/self/task")),
    }


def grown(before: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    """Return the counts that have grown."""
    return {name: count for name, count in now.items() if count > before[name]}


def open_files() -> list[str]:
    """Return the targets of the open descriptors."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own descriptor
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return found


def resident_kib() -> int:
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1])


async def fill_pool(size: int = 4) -> None:
    """Start all threads of the loop's pool, which otherwise grows at each new peak of concurrent work."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(size))
    all_here = threading.Barrier(size)
    await asyncio.gather(*(asyncio.to_thread(all_here.wait, 30) for _ in range(size)))


async def test_twenty_caches_leak_nothing_over_many_reconnects(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = frozenset(open_files())  # descriptors of earlier tests may be closed at any moment
    monkeypatch.setattr(link, "MIN_ATTEMPT_GAP_S", 0.01)
    monkeypatch.setattr(dial, "MAX_DELAY_S", 0.01)
    await fill_pool()
    watching, turn = FileWatcher(), asyncio.Semaphore(1)
    services = [Service(str(make_cache(tmp_path / str(n), server.url))) for n in range(CACHES)]
    for service in services:
        service.start(TOKEN)
        service.look_after(watching, turn)

    async def settled() -> None:
        await until(lambda: all(s._is_current() and s.cache.known.is_complete for s in services), 30)
        # Stable counts mean that old connections and tasks have ended.
        await until(lambda: sum(connection.close_code is None for connection in server.connections) == CACHES, 30)

    await settled()
    await asyncio.gather(*(run(service, "put", "tasks/x.json", "x") for service in services))
    await until(lambda: len(asyncio.all_tasks()) == TASKS, 30)  # otherwise work in progress is counted
    before, memory = held(foreign), resident_kib()
    greetings = server.greetings
    for n in range(ROUNDS):
        failed = [service._connection.failed_attempts for service in services]
        server.cut()
        await until(lambda: all(s._connection.failed_attempts > f for s, f in zip(services, failed, strict=True)), 30)  # noqa: B023
        server.put("tasks/x.json", str(n).encode())
        server.frames.clear()
        server.requests.clear()
        await settled()
    assert server.greetings - greetings >= CACHES * ROUNDS
    # System threads of earlier tests may end late: lower counts are not a leak.
    try:
        await until(lambda: not grown(before, held(foreign)), 30)
    except AssertionError:
        raise AssertionError(f"grown: {grown(before, held(foreign))}, from {before}") from None
    assert resident_kib() - memory < 16 * 1024
    with capsys.disabled():
        print(f"{server.greetings - greetings} reconnects: {held(foreign)}, {resident_kib() - memory:+} KiB")
    assert (await ask(services[0], "ready"))["current"]
    for service in services:
        await service.close()
    watching.close()
