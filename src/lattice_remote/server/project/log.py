"""Who changed what: the journal, read from its end (the answer to ``Log``, and ``lattice-remote log``).

Nothing but the journal and ``ids.json`` is read, and nothing is locked: it works whether the server runs or not.
"""

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from lattice_remote.errors import Misuse, RemoteError
from lattice_remote.protocol.about import tasks_in
from lattice_remote.protocol.messages import MAX_LOG_TASKS, Log, LogEntry, LogPage, ReadVersion, Refused, Version
from lattice_remote.server.data.datadir import ProjectPaths
from lattice_remote.server.data.framing import frames
from lattice_remote.server.journal.segments import Segment, header_of, segment_paths
from lattice_remote.server.project.text_versions import TextKind, paths_of_text, read_version
from lattice_remote.server.tree.manifest import FileState

__all__ = ["LogReader", "Page", "find_task", "present_epoch", "read_log", "read_page", "short_ids"]

MAX_SCAN_BYTES = 16 * 1024 * 1024
"""About how much of the journal is read for one page."""

_TASK_ID = re.compile(r"task_[0-9A-HJKMNP-TV-Z]{26}")


class _Record(msgspec.Struct, frozen=True, tag="record"):
    """What the log needs of a ``journal.Record``."""

    seq: int
    change: bytes | None = None
    files: dict[str, FileState | None] = {}


class _Operation(msgspec.Struct, frozen=True):
    path: str
    to: str = ""


class _Change(msgspec.Struct, frozen=True, tag="change", tag_field="type"):
    """A ``Change`` without the content of its operations, which is most of it."""

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


@dataclass
class Page:
    """Entries, newest first, and where to go on: before this record, None at the beginning of what is kept."""

    entries: list[LogEntry] = field(default_factory=list)
    before: int | None = None


class LogReader:
    """Answers ``Log`` and ``ReadVersion`` for one project, one at a time, in a thread, off the event loop."""

    def __init__(self, paths: ProjectPaths) -> None:
        self._paths = paths
        self._turn = asyncio.Lock()

    async def answer(self, asked: Log | ReadVersion, *, epoch: str, head: int) -> LogPage | Version | Refused:
        """Return a page of the changes up to ``head``, which are durable (I2), or a text as of one of them."""
        async with self._turn:
            try:
                return await asyncio.to_thread(self._answer, asked, (epoch, head))
            except RemoteError as error:
                return Refused(asked.id, error.code, error.message)
            except OSError as error:
                return Refused(asked.id, "REMOTE_STORAGE", f"the server cannot read its journal: {error.strerror}")

    def _answer(self, asked: Log | ReadVersion, head: tuple[str, int]) -> LogPage | Version:
        task = find_task(self._paths.lattice, asked.task) if asked.task else ""
        if task is None or (asked.text and not task):
            raise Misuse(f"there is no task {asked.task!r} in this project", code="REMOTE_NOT_FOUND")
        if isinstance(asked, Log):
            page = read_page(
                *(self._paths.journal, task, asked.text or None), limit=asked.limit, before=asked.before, head=head
            )
            return LogPage(asked.id, page.entries, page.before)
        found = read_version(self._paths, task, asked.text, (asked.epoch, asked.seq), head=head)
        return Version(asked.id, found.epoch, found.seq, found.data)


def present_epoch(paths: ProjectPaths) -> str:
    """Return the name of the project's epoch, empty without a journal that can be read. Blocking.

    Raises:
        OSError: the journal can't be read.
    """
    headers = map(header_of, reversed(segment_paths(paths.journal)))
    return next((header.epoch for header in headers if header is not None), "")


def read_log(paths: ProjectPaths, task: str, limit: int) -> tuple[list[LogEntry], bool]:
    """Return the newest changes, of one task if it is named, and whether there are more. Blocking.

    Raises:
        Misuse: there is no such task.
        OSError: the journal can't be read.
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
) -> Page:
    """Return the newest ``limit`` changes before a record, or fewer when that means reading too much. Blocking.

    Args:
        journal: the project's journal directory.
        task: a task's id: only what touched it; "" for everything.
        text: only what wrote this text of the task.
        limit: how many entries at most.
        before: ``Page.before`` of the page before this one, None for the newest.
        head: epoch and number of the last change to tell of; None for all that are there.

    Raises:
        OSError: a segment can't be read.
    """
    page = Page()
    scanned = 0
    for path in reversed(segment_paths(journal)):
        number = int(path.stem)
        if before is not None and number >= before:
            continue
        if scanned >= MAX_SCAN_BYTES:
            page.before = before
            break
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            break  # expired meanwhile, and so has everything before it
        for position, entry in reversed(list(_entries(data, task, text, before, head))):
            page.entries.append(entry)
            if len(page.entries) == limit:
                page.before = position
                return page
        scanned, before = scanned + len(data), number
    return page


def find_task(lattice: Path, name: str) -> str | None:
    """Return the id of a task, archived ones too, that is named by its id or its short id; None when there is none.

    Raises:
        OSError: ``ids.json`` can't be read.
    """
    return name if _TASK_ID.fullmatch(name) else _ids(lattice).get(name.upper())


def short_ids(lattice: Path) -> dict[str, str]:
    """Return the tasks' short ids by their ids.

    Raises:
        OSError: ``ids.json`` can't be read.
    """
    return {task: short_id for short_id, task in _ids(lattice).items()}


def _ids(lattice: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode((lattice / "ids.json").read_bytes(), type=_Ids).map
    except (FileNotFoundError, *_MALFORMED):
        return {}


def _entries(
    data: bytes, task: str, text: TextKind | None, before: int | None, head: tuple[str, int] | None
) -> Iterator[tuple[int, LogEntry]]:
    """Yield the changes of one segment with the numbers of their records, oldest first; as far as it is whole."""
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
        told = _change_decoder.decode(item.change)
        tasks = tasks_in(path for operation in told.ops for path in (operation.path, operation.to))
        # A text that goes to the archive, or comes back, is not written: its operation is a move.
        written = [operation.path for operation in told.ops if operation.path in paths and not operation.to]
        if text and written:
            state = item.files.get(written[-1])
            size = None if state is None else state.size
            yield position, msgspec.structs.replace(_entry(epoch, told, tasks), text_bytes=size)
        elif not text and (not task or task in tasks):
            yield position, _entry(epoch, told, tasks)


def _entry(epoch: str, told: _Change, tasks: list[str]) -> LogEntry:
    return LogEntry(
        seq=told.seq,
        epoch=epoch,
        time=told.time,
        actor=told.actor,
        token_id=told.token_id,
        token_actor=told.token_actor,
        cause=told.cause,
        command=told.command,
        tasks=tasks[:MAX_LOG_TASKS],
        more_tasks=max(0, len(tasks) - MAX_LOG_TASKS),
        mark=told.mark,
    )
