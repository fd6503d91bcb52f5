"""Execution of requests without an agent: for ``LATTICE_REMOTE_AGENT=off``, and without Unix sockets."""

import asyncio
from collections.abc import Callable
from typing import Any

from lattice_remote.client.agent.service import Service, answered
from lattice_remote.client.trusted_servers import from_environment
from lattice_remote.errors import StorageError

__all__ = ["ask_directly"]


def ask_directly(request: dict[str, Any], on_progress: Callable[[dict[str, Any]], None] | None) -> dict[str, Any]:
    """Open the cache, run the request, and close it. Returns the answer, never raises a ``RemoteError``."""
    return asyncio.run(_ask(request, on_progress or _ignore))


async def _ask(request: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    return await answered(_serve_once(request, report))


async def _serve_once(request: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    service = Service(request["directory"])
    if not service.is_meant_by(request):
        raise StorageError(f"{request['directory']} was replaced while this command ran; repeat it")
    service.start(request.get("token"), named=from_environment(request.get("named")))
    try:
        return await service.handle(request, report)
    finally:
        await service.close()


def _ignore(_progress: dict[str, Any]) -> None:
    """Ignore progress."""
