"""Audit log of a project: changes and earlier versions of texts, read from the end of the journal.

Reads only the journal and ``ids.json``, without locks: it works with and without a running server.
"""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from lattice_remote.errors import Misuse, Rejected, RemoteError
from lattice_remote.files import frames
from lattice_remote.protocol.change_summary import tasks_in
from lattice_remote.protocol.messages import (
    MAX_LOG_TASKS,
    MAX_VERSION_BYTES,
    Log,
    LogEntry,
    LogPage,
    ReadVersion,
    Refused,
    Version,
)
from lattice_remote.server.datadir import ProjectPaths
from lattice_remote.server.journal.contents import Contents
from lattice_remote.server.journal.segment import Record, Segment, decoder, header_of, segment_paths
from lattice_remote.server.tree.tree import FileState

__all__ = [
    "LogReader",
    "TextKind",
    "find_task",
    "paths_of_text",
    "present_epoch",
    "read_log",
    "read_page",
    "read_version",
    "short_ids",
]

TextKind = Literal["plan", "notes"]
_NOT_FOUND = "REMOTE_NOT_FOUND"


def paths_of_text(task: str, kind: TextKind) -> tuple[str, str]:
    path = f"{'plans' if kind == 'plan' else kind}/{task}.md"
    return path, f"archive/{path}"


def read_version(
    project: ProjectPaths, task: str, kind: TextKind, change: tuple[str, int], *, head: tuple[str, int]
) -> Version:
    """Return a text as of one change, without a request id.

    It is rebuilt from the journal's operations, with its beginning from the file on disk if the first of them only
    appends, and verified by the record's digest.

    Raises Rejected: REMOTE_NOT_FOUND, or REMOTE_TOO_LARGE, over ``MAX_VERSION_BYTES``; or OSError.
    """
    (epoch, seq), paths = change, paths_of_text(task, kind)
    contents = Contents(paths)
    found: tuple[str, FileState] | None = None  # its epoch, and the state of the file
    data: bytes | None = None

    def on_disk(_path: str) -> bytes:
        for path in paths:
            try:
                with (project.lattice / path).open("rb") as file:
                    return file.read(MAX_VERSION_BYTES + 1)
            except FileNotFoundError:
                continue
        return b""

    for its_epoch, record in _records(project.journal, paths, head):
        contents.learn(record)
        if record.seq != seq or epoch not in ("", its_epoch):
            continue
        for path in paths:
            state = record.files.get(path)
            if state is not None:
                found = (its_epoch, state)
                is_small = state.size <= MAX_VERSION_BYTES
                data = contents.find(path, state.size, state.digest, on_disk) if is_small else None
    if found is None:
        raise Rejected(f"change {seq} of this text not found in the journal", code=_NOT_FOUND)
    if found[1].size > MAX_VERSION_BYTES:
        raise Rejected(f"the text of change {seq} is too large to send: {found[1].size} bytes", code="REMOTE_TOO_LARGE")
    if data is None:
        raise Rejected(f"the text of change {seq} cannot be rebuilt: the journal starts after it", code=_NOT_FOUND)
    return Version("", found[0], seq, data)


def _records(journal: Path, paths: tuple[str, str], head: tuple[str, int]) -> Iterator[tuple[str, Record]]:
    for segment in segment_paths(journal):
        try:
            data = segment.read_bytes()
        except FileNotFoundError:
            continue  # just expired
        if not any(path.encode() in data for path in paths):
            continue
        epoch = ""
        for _, payload in frames(data):
            try:
                item = decoder.decode(payload)
            except (msgspec.DecodeError, UnicodeDecodeError):
                break
            if isinstance(item, Segment):
                epoch = item.epoch
            elif epoch == head[0] and item.seq > head[1]:
                continue
            elif any(path.encode() in payload for path in paths):
                yield epoch, item


MAX_SCAN_BYTES = 16 * 1024 * 1024
"""Approximately, for one page."""

_TASK_ID = re.compile(r"task_[0-9A-HJKMNP-TV-Z]{26}")


class _Record(msgspec.Struct, frozen=True, tag="record"):
    seq: int
    change: bytes | None = None
    files: dict[str, FileState | None] = {}


class _Operation(msgspec.Struct, frozen=True):
    path: str
    to: str = ""


class _Change(msgspec.Struct, frozen=True, tag="change", tag_field="type"):
    """A ``Change`` without the contents of its operations."""

    seq: int
    mark: bytes
    time: str
    actor: str
    token_id: str
    cause: str
    command: str
    ops: list[_Operation]
    token_actor: str = ""


class _Ids(msgspec.Struct):
    map: dict[str, str] = {}


_decoder: msgspec.msgpack.Decoder[Segment | _Record] = msgspec.msgpack.Decoder(Segment | _Record)
_change_decoder = msgspec.msgpack.Decoder(_Change)
_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError)


class LogReader:
    """Reader of logs and versions, one at a time, in a thread."""

    def __init__(self, paths: ProjectPaths) -> None:
        self._paths = paths
        self._turn = asyncio.Lock()

    async def answer(self, request: Log | ReadVersion, *, epoch: str, head: int) -> LogPage | Version | Refused:
        """Return a page of the durable changes up to ``head`` (I2), or a text as of one."""
        async with self._turn:
            try:
                return await asyncio.to_thread(self._answer, request, (epoch, head))
            except RemoteError as error:
                return Refused(request.id, error.code, error.message)
            except OSError as error:
                return Refused(request.id, "REMOTE_STORAGE", f"the server cannot read its journal: {error.strerror}")

    def _answer(self, request: Log | ReadVersion, head: tuple[str, int]) -> LogPage | Version:
        task = find_task(self._paths.lattice, request.task) if request.task else ""
        if task is None or (request.text and not task):
            raise Misuse(f"there is no task {request.task!r} in this project", code="REMOTE_NOT_FOUND")
        if isinstance(request, Log):
            text, limit, before = request.text or None, request.limit, request.before
            page = read_page(self._paths.journal, task, text, limit=limit, before=before, head=head)
            return msgspec.structs.replace(page, id=request.id)
        found = read_version(self._paths, task, request.text, (request.epoch, request.seq), head=head)
        return msgspec.structs.replace(found, id=request.id)


def present_epoch(paths: ProjectPaths) -> str:
    """Return the epoch; "" without a readable journal. Blocking; raises OSError."""
    headers = map(header_of, reversed(segment_paths(paths.journal)))
    return next((header.epoch for header in headers if header is not None), "")


def read_log(paths: ProjectPaths, task: str, limit: int) -> tuple[list[LogEntry], bool]:
    """Return the newest changes, of one task if named, and whether there are more.

    Blocking; raises OSError, or Misuse if there is no such task.
    """
    task_id = find_task(paths.lattice, task) if task else ""
    if task_id is None:
        raise Misuse(f"there is no task {task!r} in this project")
    entries: list[LogEntry] = []
    before: int | None = None
    while True:
        page = read_page(paths.journal, task=task_id, limit=limit + 1 - len(entries), before=before)
        entries += page.entries
        before = page.before
        if before is None or len(entries) > limit:
            return entries[:limit], len(entries) > limit


def read_page(
    journal: Path,
    task: str = "",
    text: TextKind | None = None,
    *,
    limit: int = 20,
    before: int | None = None,
    head: tuple[str, int] | None = None,
) -> LogPage:
    """Return the newest ``limit`` changes before a record; fewer over ``MAX_SCAN_BYTES``. Blocking; raises OSError.

    Args:
        task: a task's id: only changes that touched it.
        text: only changes that wrote this text of the task.
        head: epoch and number of the last change to include.
    """
    found: list[LogEntry] = []
    scanned = 0
    for path in reversed(segment_paths(journal)):
        number = int(path.stem)
        if before is not None and number >= before:
            continue
        if scanned >= MAX_SCAN_BYTES:
            return LogPage("", found, before)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            break  # just expired, as have all before it
        for position, entry in reversed(list(_entries(data, task, text, before, head))):
            found.append(entry)
            if len(found) == limit:
                return LogPage("", found, position)
        scanned, before = scanned + len(data), number
    return LogPage("", found, None)


def find_task(lattice: Path, name: str) -> str | None:
    """Return the id of an active or archived task, given its id or short id. Raises OSError."""
    return name if _TASK_ID.fullmatch(name) else _ids(lattice).get(name.upper())


def short_ids(lattice: Path) -> dict[str, str]:
    return {task: short_id for short_id, task in _ids(lattice).items()}


def _ids(lattice: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode((lattice / "ids.json").read_bytes(), type=_Ids).map
    except (FileNotFoundError, *_MALFORMED):
        return {}


def _entries(
    data: bytes, task: str, text: TextKind | None, before: int | None, head: tuple[str, int] | None
) -> Iterator[tuple[int, LogEntry]]:
    """Yield the changes of one segment with their record numbers."""
    epoch, position = "", -1
    paths = set(paths_of_text(task, text)) if text else set[str]()
    for _, payload in frames(data):
        try:
            item = _decoder.decode(payload)
        except _MALFORMED:
            return
        if isinstance(item, Segment):
            epoch, position = item.epoch, item.number - 1
            continue
        position += 1
        if before is not None and position >= before:
            return
        if item.change is None or (head is not None and epoch == head[0] and item.seq > head[1]):
            continue
        change = _change_decoder.decode(item.change)
        tasks = tasks_in(path for operation in change.ops for path in (operation.path, operation.to))
        # Archiving moves a text, which does not count as a write.
        written = [operation.path for operation in change.ops if operation.path in paths and not operation.to]
        if text and written:
            state = item.files.get(written[-1])
            size = None if state is None else state.size
            yield position, msgspec.structs.replace(_entry(epoch, change, tasks), text_bytes=size)
        elif not text and (not task or task in tasks):
            yield position, _entry(epoch, change, tasks)


def _entry(epoch: str, change: _Change, tasks: list[str]) -> LogEntry:
    return LogEntry(
        seq=change.seq,
        epoch=epoch,
        time=change.time,
        actor=change.actor,
        token_id=change.token_id,
        token_actor=change.token_actor,
        cause=change.cause,
        command=change.command,
        tasks=tasks[:MAX_LOG_TASKS],
        more_tasks=max(0, len(tasks) - MAX_LOG_TASKS),
        mark=change.mark,
    )
