"""Call surfaces of the worker (commands, dashboard, mcp, storage): common types and the registry of surfaces.

Its module is imported when a worker first needs it.
"""

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec

from lattice_remote.errors import Rejected
from lattice_remote.server.worker.caller import Attached, Identity, unsupported
from lattice_remote.server.worker.policy import Kind, check

__all__ = [
    "CallRequest",
    "CallResponse",
    "CommandOutput",
    "Operation",
    "Surface",
    "check_fields",
    "is_offered",
    "json_object",
    "payload_of",
    "surface_named",
]

_TEXTS = frozenset({"assigned_to", "description", "priority", "title", "type", "urgency"})
"""Fields of a task that readers expect to be texts or missing."""


@dataclass(frozen=True)
class CallRequest:
    """Unchecked call of a client.

    Attributes:
        payload: possibly not JSON.
        attach: puts the caller's files on disk and replaces the values that name them. Raises Rejected.
        run_line: runs a command line accepted by the policy, and only its checked command, as a step of the operation.
    """

    name: str
    payload: bytes
    identity: Identity
    lattice_dir: Path
    attach: Callable[[Sequence[str]], Attached]
    run_line: Callable[[Sequence[str], str], "CommandOutput"]


@dataclass(frozen=True)
class CommandOutput:
    exit_code: int
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True)
class CallResponse:
    """Result of an operation: ``status`` as in HTTP, ``payload`` JSON. From 400 on its writes are undone."""

    status: int
    payload: bytes


@dataclass(frozen=True)
class Operation:
    """Checked call that may run.

    Attributes:
        label: for the log, for example ``mcp: lattice_create``; contains no value of the caller's.
        run: called once, inside a transaction. An exception undoes it.
        attached: None for an operation without files.
    """

    label: str
    actor: str
    run: Callable[[], CallResponse]
    attached: Attached | None = field(default=None)


class Surface(Protocol):
    def load(self) -> None:
        """Import the surface's dependencies, outside any transaction, which may take a second. Idempotent."""

    def prepare(self, request: CallRequest) -> Operation:
        """Check a call completely; run nothing. Raises Rejected."""


def check_fields(fields: object) -> None:
    """Check the types of a task's fields that lattice stores unchecked and readers rely on. Raises Rejected."""
    for name, value in fields.items() if isinstance(fields, dict) else ():
        if name in _TEXTS and value is not None and not isinstance(value, str):
            raise unsupported(f"{name} must be a text")
        if name == "tags" and isinstance(value, list) and not all(isinstance(tag, str) for tag in value):
            raise unsupported("tags must be texts")


def json_object(payload: bytes) -> dict[str, Any]:
    """Return the JSON object of a payload that every JSON parser reads alike. Raises Rejected."""
    try:
        text = payload.decode()
        check(Kind.JSON, "the payload", text)
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Rejected("the payload of a call must be a JSON object in UTF-8", code="REMOTE_PROTOCOL") from error
    if not isinstance(value, dict):
        raise Rejected("the payload of a call must be a JSON object in UTF-8", code="REMOTE_PROTOCOL")
    return value


def payload_of[T: msgspec.Struct](request: CallRequest, kind: type[T]) -> T:
    """Return the payload of a call, of this form. Raises Rejected."""
    try:
        return msgspec.convert(json_object(request.payload), kind, strict=True)
    except msgspec.ValidationError as error:
        raise Rejected(f"the payload of {request.name}: {error}", code="REMOTE_PROTOCOL") from None


# --- registry ---


@dataclass(frozen=True)
class _Entry:
    """Module of a surface, the package it ``needs``, and the distribution to install."""

    module: str
    needs: str = "lattice"
    install: str = "lattice-remote"


_SURFACES: Mapping[str, _Entry] = {
    "commands": _Entry("commands"),
    "dashboard": _Entry("dashboard"),
    "mcp": _Entry("mcp", needs="mcp", install="lattice-remote[mcp]"),
    "storage": _Entry("storage"),
}


@cache
def is_offered(name: str) -> bool:
    entry = _SURFACES.get(name)
    return entry is not None and importlib.util.find_spec(entry.needs) is not None


def surface_named(name: str) -> Surface:
    """Return a surface, loaded. Raises Rejected: unknown, or its dependencies are not installed."""
    if name not in _SURFACES:
        raise Rejected(f"the server has no surface {name!r}: upgrade the server", code="REMOTE_UNSUPPORTED")
    if not is_offered(name):
        message = f"the server cannot serve {name!r}: install {_SURFACES[name].install} on the server"
        raise Rejected(message, code="REMOTE_UNSUPPORTED")
    return _loaded(name)


@cache
def _loaded(name: str) -> Surface:
    surface = cast("Surface", importlib.import_module(f"{__name__}.{_SURFACES[name].module}"))
    surface.load()
    return surface
