"""Event stream's view of a change: the same events in the same order for every client. No I/O.

    task_event      {"task": ID, "event": {...}}                   a line added to the task's log
    resource_event  {"resource": ID, "name": NAME, "event": {...}}      a line added to a resource's log
    task_snapshot   {"task": ID, "archived": false, "gone": false, "snapshot": {...}}    the task after the change
    text            {"task": ID, "text": "plan"}                   its plan, or its "notes", was written or removed
    files           {"paths": [...], "more": 0}                    all other changed files: settings, sessions, ...
    change          {"seq": 7, "actor": ..., "command": ..., ...}  the change itself, as its last event
    position        {"epoch": ..., "seq": 7}                       where the stream is: at its start and in silence

Each also has ``type``, that of the log's event or else its own kind; one of a task has ``task_id``; one of a log has
the fields that its event changed, with their new values.

An event's id is the position after it: ``EPOCH-SEQ-MARK`` for the last event of a change, ``EPOCH-SEQ-MARK.1``,
``EPOCH-SEQ-MARK.2`` and so on before it. A stream cut within a change continues after the last event that arrived.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from lattice_remote.protocol.change_summary import is_log, snapshot_of, summarize, summary_json, tasks_in, texts_of
from lattice_remote.protocol.messages import Change, Position
from lattice_remote.protocol.operations import (
    AnnounceFile,
    AppendBytes,
    DeleteFile,
    MergeJson,
    MoveFile,
    Operation,
    PutFile,
    paths_of,
)

__all__ = ["ChangeEvent", "EventId", "Wanted", "block", "blocks", "events_of", "position_block"]

_MAX_PATHS = 100
_NOT_BY_COMMAND = ("edit", "recovery")
_FOLLOWS_FROM_OTHERS = frozenset({"ids.json", "events/_lifecycle.jsonl"})
"""Reported only if nothing else changed."""
_MAX_SPREAD_BYTES = 64 * 1024
"""A longer line is sent only as ``event``."""
_FIELD_OF = {"status_changed": "status", "assignment_changed": "assigned_to"}
"""Field of the task that an event changes to its ``to``."""
_NUMBER = re.compile(r"[0-9]{1,18}", re.ASCII)
_EVENTS = re.compile(r"\.([0-9]{1,9})\Z", re.ASCII)


@dataclass(frozen=True)
class EventId:
    """The position after an event: all of the change at ``position``, or its first ``events`` events."""

    position: Position
    events: int | None = None

    @classmethod
    def parse(cls, text: str) -> "EventId | None":
        if _NUMBER.fullmatch(text):
            return cls(Position("", int(text), b""))
        partly = _EVENTS.search(text)
        position = Position.parse(text[: partly.start()] if partly else text)
        if position is None or (partly and position.seq == 0):
            return None
        return cls(position, int(partly[1]) if partly else None)

    def __str__(self) -> str:
        return str(self.position) + ("" if self.events is None else f".{self.events}")

    @property
    def whole(self) -> int:
        return self.position.seq if self.events is None else self.position.seq - 1


class Wanted(NamedTuple):
    path: str
    digest: bytes


@dataclass(frozen=True)
class ChangeEvent:
    """One event; if ``wanted``, its ``snapshot`` is that file's content."""

    kind: str
    data: Mapping[str, Any]
    wanted: Wanted | None = None


def events_of(change: Change) -> list[ChangeEvent]:
    reported: set[str] = set()
    events = [*_log_events(change, reported), *_snapshots(change, reported), *_texts(change, reported)]
    paths = dict.fromkeys(path for operation in change.ops for path in paths_of(operation))
    others = [path for path in paths if path not in reported]
    if rest := [path for path in others if path not in _FOLLOWS_FROM_OTHERS] or ([] if events else others):
        events.append(ChangeEvent("files", {"paths": rest[:_MAX_PATHS], "more": max(0, len(rest) - _MAX_PATHS)}))
    return [*events, ChangeEvent("change", summary_json(change, summarize(change)))]


def _log_events(change: Change, reported: set[str]) -> Iterator[ChangeEvent]:
    """Yield the lines added to logs; none of a replaced log, whose new lines are unknown."""
    resources = {path.split("/")[1]: path for path in _paths(change) if re.fullmatch(r"resources/[^/]+/[^/]+", path)}
    name = next(iter(resources)) if len(resources) == 1 else None
    for operation in change.ops:
        is_new = isinstance(operation, PutFile) and change.cause not in _NOT_BY_COMMAND
        if not is_log(operation.path) or not (is_new or isinstance(operation, AppendBytes)):
            continue
        assert isinstance(operation, PutFile | AppendBytes), "one of the two"
        lines = [_compact(line) for line in operation.data.splitlines()]
        if None in lines:
            continue  # malformed, for example edited by hand
        reported.add(operation.path)
        owner = operation.path.rpartition("/")[2].removesuffix(".jsonl")
        for line in lines:
            if owner.startswith("task_"):
                own = {"task": owner, "task_id": owner, "event": line}
                yield ChangeEvent("task_event", _spread(line) | own)
            else:
                reported.update(resources.values())
                yield ChangeEvent("resource_event", _spread(line) | {"resource": owner, "name": name, "event": line})


class _Line(msgspec.Struct):
    type: str
    data: dict[str, msgspec.Raw] = {}


def _spread(line: msgspec.Raw | None) -> dict[str, Any]:
    assert line is not None, "a log with a malformed line is not reported"
    try:
        event = msgspec.json.decode(line, type=_Line)
        kind, data = event.type, event.data
        new = data.get("to", data.get("new_value"))
        changed = _FIELD_OF.get(kind) or (msgspec.json.decode(data["field"], type=str) if "field" in data else None)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    if len(bytes(line)) > _MAX_SPREAD_BYTES:
        data = {}
    elif changed is not None and new is not None:
        data = {changed: new}
    return {**data, "type": kind}


def _snapshots(change: Change, reported: set[str]) -> Iterator[ChangeEvent]:
    places: dict[str, tuple[str, bytes | Wanted | None]] = {}  # by task: path and content; None: deleted
    for operation in change.ops:
        _follow(operation, places)
    for task, (path, content) in places.items():
        snapshot = _compact(content) if isinstance(content, bytes) else None
        if isinstance(content, bytes) and snapshot is None:
            continue
        reported.update(other for other in _paths(change) if snapshot_of(other) == task)
        reported.update(_moved_with(task, change))
        is_archived = path.startswith("archive/")
        data = {"task": task, "task_id": task, "archived": is_archived, "gone": content is None, "snapshot": snapshot}
        yield ChangeEvent("task_snapshot", data, content if isinstance(content, Wanted) else None)


def _follow(operation: Operation, places: dict[str, tuple[str, bytes | Wanted | None]]) -> None:
    path = operation.path
    task, known = snapshot_of(path), places.get(snapshot_of(path) or "")
    match operation:
        case PutFile() if task:
            places[task] = (path, operation.data)
        case MergeJson() | AnnounceFile() if task:
            places[task] = (path, Wanted(path, operation.digest))
        case DeleteFile() if task and (known is None or known[0] == path):
            places[task] = (path, None)
        case MoveFile():
            if task and (known is None or known[0] == path):
                places[task] = (path, None)
            if target := snapshot_of(operation.to):
                is_known = target == task and known is not None and known[0] == path and known[1] is not None
                content = known[1] if is_known and known else Wanted(operation.to, operation.digest)
                places[target] = (operation.to, _moved(content, operation.to))
        case _:
            pass


def _moved(content: bytes | Wanted | None, to: str) -> bytes | Wanted | None:
    return Wanted(to, content.digest) if isinstance(content, Wanted) else content


def _moved_with(task: str, change: Change) -> Iterator[str]:
    for operation in change.ops:
        if isinstance(operation, MoveFile) and tasks_in(paths_of(operation)) == [task]:
            yield from paths_of(operation)


def _texts(change: Change, reported: set[str]) -> Iterator[ChangeEvent]:
    for path, kind, task in texts_of(change):
        reported.add(path)
        yield ChangeEvent("text", {"task": task, "task_id": task, "text": "plan" if kind == "plans" else "notes"})


def _paths(change: Change) -> list[str]:
    return [path for operation in change.ops for path in paths_of(operation)]


def blocks(position: Position, events: Sequence[ChangeEvent], contents: Mapping[Wanted, bytes]) -> list[bytes]:
    """Return the encoded events of the change at ``position``.

    A wanted file that ``contents`` lacks is null: a later change includes it.
    """
    sent = []
    for number, event in enumerate(events, 1):
        data = event.data
        if event.wanted is not None:
            data = {**data, "snapshot": _compact(contents.get(event.wanted, b""))}
        behind = EventId(position, None if number == len(events) else number)
        sent.append(block(event.kind, behind, data))
    return sent


def position_block(behind: EventId) -> bytes:
    return block("position", behind, {"epoch": behind.position.epoch, "seq": behind.position.seq})


def block(kind: str, behind: EventId, data: Mapping[str, Any]) -> bytes:
    return b"event: %b\nid: %b\ndata: %b\n\n" % (
        kind.encode(),
        str(behind).encode(),
        msgspec.json.encode({"type": kind, **data}),
    )


def _compact(data: bytes) -> msgspec.Raw | None:
    try:
        data.decode()
        msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        return msgspec.Raw(msgspec.json.format(data, indent=-1))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
