"""Helpers for tests of the agent, which runs as a real process."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from client_kit import until
from fake_server import TOKEN

from lattice_remote.client import agent_client, agent_runtime


@pytest.fixture(autouse=True)
async def agent_ends(home: Path) -> AsyncIterator[None]:
    """Stop the agent that a test has started."""
    yield
    for pid in [int(file.read_text()) for file in list(home.glob("run/*.pid"))]:  # noqa: ASYNC240
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        await until(lambda: not os.path.exists(f"/proc/{pid}/cmdline") or is_zombie(pid))  # noqa: B023


def agent_pid() -> int | None:
    try:
        return int(Path(agent_runtime.locate().pid).read_text())
    except (OSError, ValueError):
        return None


def is_zombie(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


async def ask(do: str, directory: Path, **fields: object) -> dict[str, Any]:
    """Send a request as a command does. It runs in a thread, as the call blocks and the server runs in this process."""
    return await asyncio.to_thread(agent_client.send_request, request(do, directory, **fields))


def request(do: str, directory: Path, **fields: object) -> dict[str, Any]:
    return {**agent_client.request(do, str(directory)), "token": TOKEN, **fields}


async def run(directory: Path, *argv: str) -> dict[str, Any]:
    return await ask("run", directory, id=os.urandom(16).hex(), argv=list(argv), files=[])


async def status() -> dict[str, Any] | None:
    return await asyncio.to_thread(agent_client.send_if_running, {"do": "agent-status"})


def resident_kib() -> int:
    text = Path(f"/proc/{agent_pid()}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1])
