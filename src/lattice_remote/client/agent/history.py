"""History of a project: its changes after a position, its log, and versions of plans and notes.

For ``lattice remote watch``, new changes come from the agent's own connection, earlier ones from the server's journal
(``Replay``). A watcher asks with its position, so a slow one holds no connection and misses nothing (I10).
"""

import re
from collections import deque
from typing import Any, Literal

import msgspec

from lattice_remote.client.agent_runtime import new_request_id
from lattice_remote.client.cache.replicator import Replicator
from lattice_remote.client.connection.connection import Connection, expect
from lattice_remote.client.tasks import read_object
from lattice_remote.errors import Misuse, ProtocolError
from lattice_remote.protocol.change_summary import summarize, summary_json
from lattice_remote.protocol.messages import (
    MAX_LOG_ENTRIES,
    Change,
    Log,
    LogEntry,
    LogPage,
    Position,
    ReadVersion,
    Replay,
    Replayed,
    Version,
)
from lattice_remote.protocol.operations import weight_of

__all__ = ["ChangeFeed", "TextName", "read_log", "read_version"]

_WAIT_S = 30.0
_MAX_CHANGES, _MAX_BYTES = 256, 1024 * 1024


class ChangeFeed:
    def __init__(self, replicator: Replicator, connection: Connection) -> None:
        self._replicator, self._connection = replicator, connection
        self._recent: deque[tuple[str, Change]] = deque()  # consecutive, of one epoch
        self._recent_bytes = 0
        replicator.on_change = self._add

    async def after(
        self, connection: Connection, epoch: str, seq: int | None, mark: bytes, *, wait: bool
    ) -> dict[str, Any]:
        """Return the changes after a position; with ``wait``, wait a while for one.

        The answer has ``outcome``, ``epoch``, ``head`` and ``oldest`` as in ``Replayed``; ``seq`` and ``mark``
        (hexadecimal) of the start; and ``changes`` as printed by ``--json``.

        Args:
            epoch: "" for the present one.
            seq: None for the head.
            mark: empty if unknown.

        Raises:
            Rejected: the server refuses the token.
            ConnectionFailed: the server is unreachable; repeat the request.
        """
        newer = None if seq is None else self._recent_after(epoch, seq, mark)
        if seq is not None and newer is not None:
            newer = newer or (await self._next(epoch, seq) if wait else [])
            if newer:
                return self._answer(Replayed("", "kept", epoch, 0, 0, seq, mark, newer))
        answer = await _replay(connection, Replay(new_request_id(), epoch, seq, mark))
        if wait and newer is None and answer.outcome == "kept" and not answer.changes:
            answer.changes.extend(await self._next(answer.epoch, answer.seq))
        return self._answer(answer)

    async def _next(self, epoch: str, seq: int) -> list[Change]:
        welcome = self._connection.welcome

        def newer() -> list[Change]:
            return [change for of, change in self._recent if of == epoch and change.seq > seq]

        await self._connection.changed.until(lambda: bool(newer()) or self._connection.welcome is not welcome, _WAIT_S)
        found = newer()
        return found if found and found[0].seq == seq + 1 else []

    def _recent_after(self, epoch: str, seq: int, mark: bytes) -> list[Change] | None:
        index = seq - self._recent[0][1].seq if self._recent and self._recent[0][0] == epoch else -1
        if not 0 <= index < len(self._recent) or self._recent[index][1].mark != mark:
            return None
        welcome, head = self._connection.welcome, self._replicator.replica.head
        if welcome is None or welcome.epoch != epoch or self._recent[-1][1].seq != head:
            return None  # the cache may have caught up by a comparison
        return [change for _, change in self._recent][index + 1 :]

    def _add(self, epoch: str, change: Change) -> None:
        while self._recent and (self._recent[-1][0] != epoch or self._recent[-1][1].seq >= change.seq):
            self._recent_bytes -= _weight(self._recent.pop()[1])
        if self._recent and self._recent[-1][1].seq + 1 != change.seq:  # a resync came between
            self._recent.clear()
            self._recent_bytes = 0
        self._recent.append((epoch, change))
        self._recent_bytes += _weight(change)
        while len(self._recent) > _MAX_CHANGES or (self._recent_bytes > _MAX_BYTES and len(self._recent) > 1):
            self._recent_bytes -= _weight(self._recent.popleft()[1])

    def _answer(self, found: Replayed) -> dict[str, Any]:
        titles = _Titles(self._replicator.cache.directory)
        return {
            "outcome": found.outcome,
            "epoch": found.epoch,
            "head": max(found.head, found.seq + len(found.changes)) if found.outcome == "kept" else found.head,
            "oldest": found.oldest,
            "seq": found.seq,
            "mark": found.mark.hex(),
            "changes": [_record(found.epoch, change, titles) for change in found.changes],
        }


async def _replay(connection: Connection, request: Replay) -> Replayed:
    """Return the server's answer. Waits for a lost connection without hurrying it."""
    failed_before = connection.failed_attempts
    await connection.changed.until(
        lambda: connection.welcome is not None or connection.is_refused or connection.failed_attempts > failed_before,
        _WAIT_S,
    )
    if connection.welcome is None:
        raise (
            connection.error
            if connection.is_refused and connection.error is not None
            else connection.unreachable(is_write=False)
        )
    return expect(await connection.send_request(request), Replayed)


def _weight(change: Change) -> int:
    return sum(map(weight_of, change.ops))


class _Titles:
    """Tasks' short ids and titles, from a batch and from the cache."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._known: dict[str, dict[str, Any]] = {}

    def learn(self, task: str, snapshot: Any) -> None:
        self._known[task] = {"short_id": _text(snapshot.get("short_id")), "title": _text(snapshot.get("title"))}

    def of(self, task: str) -> dict[str, Any]:
        if task not in self._known:
            self.learn(
                task,
                read_object(self._directory, f"tasks/{task}.json")
                or read_object(self._directory, f"archive/tasks/{task}.json"),
            )
        return {"id": task, **self._known[task]}


def _record(epoch: str, change: Change, titles: _Titles) -> dict[str, Any]:
    found = summarize(change)
    for task, snapshot in found.snapshots.items():
        titles.learn(task, snapshot)
    return {
        **summary_json(change, found),
        "epoch": epoch,
        "position": str(Position(epoch, change.seq, change.mark)),
        "tasks": [titles.of(task) for task in found.tasks],
        "events": found.events,
        "events_complete": found.is_complete,
    }


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


# --- the log, page by page ---

_VERSION = re.compile(r"(?:(.{1,64})-)?([0-9]{1,18})")
TextName = Literal["plan", "notes"]


async def read_log(connection: Connection, task: str, limit: int, text: TextName | None = None) -> dict[str, Any]:
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


async def read_version(connection: Connection, task: str, text: TextName, version: str) -> Version:
    """Return a plan or notes as of a change.

    ``version`` is the change's number, the newest with it; or ``EPOCH-NUMBER``.

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


async def _request[T: LogPage | Version](connection: Connection, frame: Log | ReadVersion, kind: type[T]) -> T:
    return expect(await connection.send_request(frame), kind)
