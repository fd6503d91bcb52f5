"""Lattice's own MCP server, with writes run on the projects' servers. stdout carries only the protocol.

A reading tool runs here, on an updated cache, under the guard; if the server is out of reach, its result says how old
the data is. Every other tool is called on the server (``worker/calls/mcp.py``); its change is then in the cache.
Lattice handles projects without a remote.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from types import FrameType
from typing import Any

import anyio.to_thread
from lattice.mcp.server import mcp as lattices
from lattice.storage.fs import LATTICE_DIR, LatticeRootError, find_root
from mcp.types import (
    CallToolRequest,
    CallToolResult,
    ReadResourceRequest,
    ReadResourceResult,
    ServerResult,
    TextContent,
    TextResourceContents,
)

from lattice_remote.client.agent_client import call, ensure_current, stay_connected
from lattice_remote.client.attachments import CallersFiles
from lattice_remote.client.config import is_cache
from lattice_remote.client.guard import Guard
from lattice_remote.errors import RemoteError

__all__ = ["serve"]

_READS = frozenset({"lattice_comments", "lattice_config", "lattice_list", "lattice_show"})
"""Tools that only read the project. The server refuses unknown ones.

``lattice_doctor`` also needs ``locks/``, which no cache has.
"""
_FILES = {"lattice_attach": "source"}
"""The argument with a caller's file, whose content travels with the call."""


_stale: ContextVar[list[str]] = ContextVar("stale")
"""Age of the data that the present request reads."""


def serve() -> None:
    """Serve lattice's MCP server over stdin and stdout until stdin ends, or Ctrl-C."""
    caches = _Caches()
    for tool in lattices._tool_manager.list_tools():
        tool.fn, tool.is_async = partial(_called, caches, tool.name, tool.fn), True
    handlers = lattices._mcp_server.request_handlers
    handlers[ReadResourceRequest] = partial(_read_resource, caches, handlers[ReadResourceRequest])
    handlers[CallToolRequest] = partial(_call_tool, handlers[CallToolRequest])
    signal.signal(signal.SIGINT, _leave)
    if (directory := _cache_of(None)) is not None:
        try:  # start the agent and update the cache before the first call
            ensure_current(directory, _say)
        except RemoteError as error:
            _say(f"lattice-remote: {error.message}")
    with stay_connected():
        lattices.run(transport="stdio")


def _leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signal module's signature
    """Exit at once, despite the thread that reads stdin."""
    os._exit(128 + number)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


class _Caches:
    def __init__(self) -> None:
        self._guards: dict[str, Guard] = {}

    def prepare(self, directory: str) -> None:
        """Update a cache and guard it against writes by tools that run here. Blocking; raises RemoteError."""
        if directory not in self._guards:
            self._guards[directory] = Guard(directory)
            self._guards[directory].start()
        if (line := ensure_current(directory, _say)) is not None:
            _stale.get().append(line)


async def _call_tool(call_tool: Callable[[Any], Any], request: Any) -> Any:
    lines: list[str] = []
    _stale.set(lines)
    answer = await call_tool(request)
    result = answer.root
    if lines and isinstance(result, CallToolResult):
        result.content.append(TextContent(type="text", text=f"Not current: {lines[0]}"))
        if result.structuredContent is not None:
            result.structuredContent = {**result.structuredContent, "not_current": lines[0]}
    return answer


async def _called(caches: _Caches, name: str, tool: Callable[..., Any], **arguments: Any) -> Any:
    directory = _cache_of(arguments.get("lattice_root"))
    if directory is None:
        return tool(**arguments)
    if name in _READS:
        await anyio.to_thread.run_sync(caches.prepare, directory)
        return tool(**arguments)
    return await anyio.to_thread.run_sync(_call_there, directory, name, arguments)


async def _read_resource(caches: _Caches, read: Callable[[Any], Any], request: Any) -> Any:
    directory = _cache_of(None)
    lines: list[str] = []
    _stale.set(lines)
    if directory is not None:
        await anyio.to_thread.run_sync(caches.prepare, directory)
    answer: ServerResult = await read(request)
    if lines and isinstance(answer.root, ReadResourceResult):
        notice = TextResourceContents(uri=request.params.uri, mimeType="text/plain", text=f"Not current: {lines[0]}")
        answer.root.contents.append(notice)
    return answer


def _cache_of(lattice_root: str | None) -> str | None:
    try:
        root = lattice_root or find_root()
    except (LatticeRootError, OSError):
        return None
    directory = os.path.join(os.path.abspath(root), LATTICE_DIR) if root else None
    return directory if directory and is_cache(directory) else None


def _call_there(directory: str, name: str, arguments: dict[str, Any]) -> Any:
    sent = {key: value for key, value in arguments.items() if key != "lattice_root" and value is not None}
    with CallersFiles.of_value(sent.get(_FILES.get(name, ""))) as files:
        answer = call(directory, "mcp", name, json.dumps(sent), files.described)
    value = json.loads(answer.payload)
    if answer.status >= 400:
        raise ValueError(value["error"]["message"])  # which lattice's MCP server formats
    return value["result"]
