"""``lattice remote log``: who changed what, as the server's journal tells it.

The log is no part of the copy, so this asks the server, page by page. Nothing is written anywhere.
"""

import json
import os
from typing import Any

import msgspec

from lattice_remote import logtext
from lattice_remote.client.link.link import Link
from lattice_remote.errors import ConnectionFailed, ProtocolError, Rejected
from lattice_remote.protocol.messages import MAX_LOG_ENTRIES, Log, LogEntry, LogPage, Refused

__all__ = ["MAX_ENTRIES", "lines", "read_log", "records"]

MAX_ENTRIES = 10_000
"""The most that one command shows."""


async def read_log(link: Link, task: str, limit: int) -> dict[str, Any]:
    """Return the newest entries, of one task if it is named, and whether older ones are kept.

    Asks for one entry more than it returns: ``LogPage.before`` alone does not say that another entry exists.

    Raises:
        Rejected: there is no such task, or the server can't tell its log.
        ConnectionFailed: the server is out of reach.
        ProtocolError: its pages don't follow each other.
    """
    entries: list[LogEntry] = []
    before: int | None = None
    while True:
        page = await _page(
            link, Log(os.urandom(16).hex(), task, min(limit + 1 - len(entries), MAX_LOG_ENTRIES), before)
        )
        if before is not None and page.before is not None and page.before >= before:
            raise ProtocolError("the pages of the server's log don't lead to its beginning")
        before = page.before
        entries += page.entries
        if before is None or len(entries) > limit:
            return {"entries": msgspec.to_builtins(entries[:limit]), "more": len(entries) > limit}


async def _page(link: Link, asked: Log) -> LogPage:
    answer = await link.ask(asked)
    if isinstance(answer, Refused):
        raise Rejected(answer.message, code=answer.code)
    if not isinstance(answer, LogPage):
        raise ConnectionFailed("the server answered something else")
    return answer


def records(answer: dict[str, Any], directory: str) -> dict[str, Any]:
    """Return an answer of ``read_log`` as ``--json`` prints it."""
    return {"entries": logtext.as_records(_entries(answer), _short_ids(directory)), "more": answer["more"]}


def lines(answer: dict[str, Any], directory: str) -> list[str]:
    """Return an answer of ``read_log`` as lines for a terminal."""
    return logtext.as_lines(_entries(answer), _short_ids(directory))


def _entries(answer: dict[str, Any]) -> list[LogEntry]:
    return msgspec.convert(answer["entries"], list[LogEntry])


def _short_ids(directory: str) -> dict[str, str]:
    """Return the copy's short ids by task id; without what can't be read."""
    try:
        with open(os.path.join(directory, "ids.json"), encoding="utf-8") as file:
            known: dict[str, str] = json.load(file)["map"]
            return {task: short_id for short_id, task in known.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
