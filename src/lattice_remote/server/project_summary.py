"""Project summaries for lists: tasks per status, and the last change with its actor.

Read from the files alone, so that no worker starts for an idle project, and again only if they have changed.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterator

import msgspec

from lattice_remote.files import READ, Signature, signature_of
from lattice_remote.server.datadir import DataDir, ProjectPaths
from lattice_remote.server.ipc import TreeState
from lattice_remote.server.journal.segment import segment_paths
from lattice_remote.server.project.journal_log import read_page

__all__ = ["LastChange", "Overview", "Overviews"]

_FRESH_S = 0.5
"""Many requests at once get the same summary."""
_MAX_LOOKS, _LOOK_AGAIN_S = 100, 0.005
"""A write takes some ms. After half a second the project may have no worker that ends one."""
_UNREADABLE = "unknown"


class LastChange(msgspec.Struct, frozen=True):
    """The newest change of a project; ``tasks`` are ids."""

    seq: int
    time: str
    actor: str
    command: str
    tasks: list[str]


class Overview(msgspec.Struct, frozen=True):
    """Summary of one project.

    Attributes:
        name, code: from ``config.json``; None if absent.
        tasks, archived: numbers of tasks.
        statuses: number of ``tasks`` per status, in descending order.
        last: the newest change; None if none is kept.
    """

    slug: str
    name: str | None
    code: str | None
    tasks: int
    archived: int
    statuses: dict[str, int]
    last: LastChange | None


class _Task(msgspec.Struct):
    status: str = _UNREADABLE


_task_decoder = msgspec.json.Decoder(_Task)


class Overviews:
    """Summaries of the projects of a data directory. Belongs to the event loop's thread."""

    def __init__(self, data: DataDir) -> None:
        self._data = data
        self._known: dict[str, _Known] = {}

    async def of(self, slug: str) -> Overview:
        """Return a summary at most ``_FRESH_S`` old. Raises OSError."""
        known = self._known.setdefault(slug, _Known(self._data, slug))
        async with known.turn:
            if known.overview is None or time.monotonic() - known.taken_at >= _FRESH_S:
                known.overview = await asyncio.to_thread(known.take)
                known.taken_at = time.monotonic()
            return known.overview


class _Known:
    def __init__(self, data: DataDir, slug: str) -> None:
        self.turn = asyncio.Lock()
        self.overview: Overview | None = None
        self.taken_at = 0.0
        self._data, self._slug = data, slug
        self._statuses: dict[str, tuple[Signature, str]] = {}  # by file name
        self._last: tuple[tuple[str, Signature] | None, LastChange | None] = (None, None)

    def take(self) -> Overview:
        """Read the files. Blocking."""
        summary = self._data.summary(self._slug)
        paths = self._data.project(self._slug)
        self._statuses = self._committed_statuses(paths)
        statuses = Counter(status for _, status in self._statuses.values())
        return Overview(
            self._slug,
            summary.name,
            summary.code,
            sum(statuses.values()),
            summary.archived,
            dict(statuses.most_common()),
            self._last_change(paths),
        )

    def _committed_statuses(self, paths: ProjectPaths) -> dict[str, tuple[Signature, str]]:
        """Read the statuses; repeat if a write in them was rolled back, or may be (I2)."""
        for _ in range(_MAX_LOOKS):
            before = TreeState.read(paths.journal)
            statuses = dict(self._read_statuses(paths))
            after = TreeState.read(paths.journal)
            if not after.is_open and after.rolled_back == before.rolled_back:
                break
            time.sleep(_LOOK_AGAIN_S)
        return statuses

    def _read_statuses(self, paths: ProjectPaths) -> Iterator[tuple[str, tuple[Signature, str]]]:
        try:
            entries = [
                entry
                for entry in os.scandir(paths.lattice / "tasks")
                if entry.name.endswith(".json") and not entry.name.startswith(".")
            ]
        except FileNotFoundError:
            return
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
                signature = signature_of(status)
                before = self._statuses.get(entry.name)
                yield entry.name, before if before and before[0] == signature else (signature, _status_of(entry.path))
            except FileNotFoundError:
                continue  # archived just now

    def _last_change(self, paths: ProjectPaths) -> LastChange | None:
        newest = max(segment_paths(paths.journal), default=None)
        if newest is None:
            return None
        try:
            state = (newest.name, signature_of(newest.stat()))
        except FileNotFoundError:  # expired since: another is the newest, and the next call sees it
            return self._last[1]
        if self._last[0] != state:
            newest_of = [
                LastChange(entry.seq, entry.time, entry.actor, entry.command, entry.tasks)
                for entry in read_page(paths.journal, limit=1).entries
            ]
            self._last = state, newest_of[0] if newest_of else None
        return self._last[1]


def _status_of(path: str) -> str:
    try:
        with open(os.open(path, READ), "rb") as file:
            return _task_decoder.decode(file.read()).status
    except FileNotFoundError:
        raise
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _UNREADABLE  # one odd file must not hide all projects
