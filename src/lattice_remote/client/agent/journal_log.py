"""Reading of the server's journal, page by page, for ``lattice remote log`` and ``history``."""

import json
import os
import re
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from lattice_remote import output
from lattice_remote.client.agent_runtime import new_request_id
from lattice_remote.errors import Misuse, ProtocolError
from lattice_remote.protocol.messages import MAX_LOG_ENTRIES, Log, LogEntry, LogPage, ReadVersion, Version

if TYPE_CHECKING:
    from lattice_remote.client.connection.connection import Connection

__all__ = ["MAX_ENTRIES", "TextName", "lines", "read_log", "read_version", "records", "task_of"]

MAX_ENTRIES = 10_000
"""Most entries that one command shows."""
_VERSION = re.compile(r"(?:(.{1,64})-)?([0-9]{1,18})")


TextName = Literal["plan", "notes"]


async def read_log(connection: "Connection", task: str, limit: int, text: TextName | None = None) -> dict[str, Any]:
    """Return the newest entries, optionally of one task or text, and whether older ones exist.

    Requests one entry more than it returns: ``LogPage.before`` alone does not prove another entry.

    Raises:
        Rejected: no such task, or the server has no log.
        ConnectionFailed: the server is unreachable.
        ProtocolError: its pages are not consecutive.
    """
    entries: list[LogEntry] = []
    before: int | None = None
    while True:
        number = min(limit + 1 - len(entries), MAX_LOG_ENTRIES)
        page = await _request(connection, Log(new_request_id(), task, number, before, text or ""), LogPage)
        if before is not None and page.before is not None and page.before >= before:
            raise ProtocolError("the pages of the server's log are not consecutive")
        before = page.before
        entries += page.entries
        if before is None or len(entries) > limit:
            epoch = connection.welcome.epoch if connection.welcome is not None else ""
            return {"entries": msgspec.to_builtins(entries[:limit]), "epoch": epoch, "more": len(entries) > limit}


async def read_version(connection: "Connection", task: str, text: TextName, version: str) -> Version:
    """Return a plan or notes as of a change.

    ``version`` is the change's number, the newest with it; or ``EPOCH-NUMBER``. ``task`` is an id or short id.

    Raises:
        Misuse: ``version`` names no change.
        Rejected: no such version is kept.
        ConnectionFailed: the server is unreachable.
    """
    named = _VERSION.fullmatch(version)
    if named is None:
        raise Misuse(f"{version!r} is not a change's number; list them with: lattice remote history {task}")
    frame = ReadVersion(new_request_id(), task, text, int(named[2]), named[1] or "")
    return await _request(connection, frame, Version)


async def _request[T: LogPage | Version](connection: "Connection", frame: Log | ReadVersion, kind: type[T]) -> T:
    from lattice_remote.client.connection.requests import expect  # commands import this module too

    return expect(await connection.send_request(frame), kind)


def records(answer: dict[str, Any], directory: str) -> dict[str, Any]:
    records = output.as_records(_entries(answer), _short_ids(directory))
    return {"entries": records, "epoch": answer["epoch"], "more": answer["more"]}


def lines(answer: dict[str, Any], directory: str) -> list[str]:
    return output.as_lines(_entries(answer), _short_ids(directory), answer["epoch"])


def _entries(answer: dict[str, Any]) -> list[LogEntry]:
    return msgspec.convert(answer["entries"], list[LogEntry])


def task_of(directory: str, name: str) -> str:
    """Return the task's id in the cache, given it or a short id; ``name`` if there is none."""
    return next((task for task, short_id in _short_ids(directory).items() if short_id == name.upper()), name)


def _short_ids(directory: str) -> dict[str, str]:
    try:
        with open(os.path.join(directory, "ids.json"), encoding="utf-8") as file:
            known: dict[str, str] = json.load(file)["map"]
            return {task: short_id for short_id, task in known.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
