"""What every surface is made of: what is asked, what it comes to once it is checked, and what it answers."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lattice_remote.errors import Rejected
from lattice_remote.server.worker.arguments import Kind, check, unsupported
from lattice_remote.server.worker.attachments import Attached
from lattice_remote.server.worker.identity import Identity

__all__ = ["CallRequest", "CallResponse", "CommandOutput", "Operation", "Surface", "check_fields", "json_object"]

_TEXTS = frozenset({"assigned_to", "description", "priority", "title", "type", "urgency"})
"""Fields of a task that every reader of a board takes to be texts, or missing."""


@dataclass(frozen=True)
class CallRequest:
    """One call, as a client sent it: nothing of it is checked.

    Attributes:
        name: of the operation.
        payload: what it is given; JSON, or not.
        identity: who asks.
        lattice_dir: the project's ``.lattice``.
        attach: puts the caller's files where the operation can read them, in place of the values that name them there.
            An operation that takes none does not call it. Raises Rejected.
        run_line: runs a command line which the policy has let through, and only this command of it (its words), as a
            step of the operation. Call it only while that runs.
    """

    name: str
    payload: bytes
    identity: Identity
    lattice_dir: Path
    attach: Callable[[Sequence[str]], Attached]
    run_line: Callable[[Sequence[str], str], "CommandOutput"]


@dataclass(frozen=True)
class CommandOutput:
    """What a command printed, and the exit code that it would have."""

    exit_code: int
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True)
class CallResponse:
    """What an operation returned: ``status`` as in HTTP, ``payload`` JSON. From 400 on its writes are undone."""

    status: int
    payload: bytes


@dataclass(frozen=True)
class Operation:
    """A call that was checked and may run.

    Attributes:
        label: what it is, in a few words for the log, as ``mcp: lattice_create``; no value of the caller's.
        actor: in whose name it acts.
        run: does it; called once, inside a transaction. An exception undoes it.
        attached: where the caller's files were put; None for an operation that takes none.
    """

    label: str
    actor: str
    run: Callable[[], CallResponse]
    attached: Attached | None = field(default=None)


class Surface(Protocol):
    """A module of this folder."""

    def load(self) -> None:
        """Import what the surface needs, outside of any transaction. Idempotent; the first time may take a second."""

    def prepare(self, asked: CallRequest) -> Operation:
        """Check all of a call; nothing is run.

        Raises:
            Rejected: it may not run here.
        """


def check_fields(fields: object) -> None:
    """Do nothing if a task may be given these fields, of those that lattice stores as they are; the rest it checks.

    Raises:
        Rejected: one is of a type that would break down whoever reads the board.
    """
    for name, value in fields.items() if isinstance(fields, dict) else ():
        if name in _TEXTS and value is not None and not isinstance(value, str):
            raise unsupported(f"{name} must be a text")
        if name == "tags" and isinstance(value, list) and not all(isinstance(tag, str) for tag in value):
            raise unsupported("tags must be texts")


def json_object(payload: bytes) -> dict[str, Any]:
    """Return the JSON object in a payload, which every JSON reader would read alike.

    Raises:
        Rejected: it is something else, nested too deep, or holds what not every program can read.
    """
    try:
        text = payload.decode()
        check(Kind.JSON, "the payload", text)
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Rejected("the payload of a call must be a JSON object in UTF-8", code="REMOTE_PROTOCOL") from error
    if not isinstance(value, dict):
        raise Rejected("the payload of a call must be a JSON object in UTF-8", code="REMOTE_PROTOCOL")
    return value
