"""Files that were replaced or removed in a cache, kept until the user applies or drops them.

``.lattice/.remote/rescued/<number>/`` is one entry: ``entry.json`` holds reason and time, ``files/`` the contents under
their own paths. An entry is never overwritten, nor dropped to make room.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from lattice_remote.client.cache.cache import BASE_DIRECTORY, Cache
from lattice_remote.client.config import PRIVATE_DIRECTORY
from lattice_remote.errors import StorageError, one_line
from lattice_remote.protocol.messages import MAX_PIECE_BYTES
from lattice_remote.protocol.operations import Content, digest_of
from lattice_remote.protocol.paths import is_editable

__all__ = [
    "RESCUED_DIRECTORY",
    "RESTORED",
    "RescuePolicy",
    "RescuedEntry",
    "RescuedFiles",
    "is_event_log",
    "may_be_by_hand",
]

RESCUED_DIRECTORY = f"{PRIVATE_DIRECTORY}/rescued"
MAX_FILES = 5_000
MAX_BYTES = 256 * 1024 * 1024
_SAME_ENTRY_S = 5.0
"""Files rescued for the same reason within this time share an entry."""


@dataclass(frozen=True, slots=True)
class RescuedEntry:
    number: int
    reason: str
    at: float
    """Time of its creation (seconds since 1970)."""
    files: Mapping[str, int]
    """Size in bytes by path, relative to ``.lattice``."""


class RescuedFiles:
    """One cache's rescued files. Call writing methods under the cache's lock."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._entries: list[RescuedEntry] = []
        self._seen_ns = -1  # the directory's modification time at the last listing
        self._open = (0, "", 0.0)  # number, reason and last use (monotonic) of the current entry
        self.refused = 0
        """Number of files that were not kept because the store is full."""

    def add(self, path: str, content: bytes | None, reason: str) -> bool:
        """Keep one content in the current or a new entry. Durable on return.

        Args:
            reason: why it is no longer in its place, in words that follow "N files: ".

        Returns False if it was kept before, or the store is full.
        """
        size = self._cache.size(path) if content is None else len(content)
        if size is None or (content is not None and self._has(path, content)):
            return False
        entries = self.entries()
        kept = [each for entry in entries for each in entry.files.values()]
        if len(kept) >= MAX_FILES or sum(kept) + size > MAX_BYTES:
            self.refused += 1
            return False
        place = f"{_folder(self._entry_for(path, reason))}/files/{path}"
        if content is None:
            self._cache.move(path, place)
        else:
            self._cache.store(place, content)
        self._seen_ns = -1
        return True

    def _entry_for(self, path: str, reason: str) -> int:
        number, last_reason, at = self._open
        now = time.monotonic()
        found = next((entry for entry in self.entries() if entry.number == number), None)
        if found is None or last_reason != reason or now - at > _SAME_ENTRY_S or path in found.files:
            number = max((entry.number for entry in self.entries()), default=0) + 1
            about = json.dumps({"reason": reason, "at": time.time()}).encode() + b"\n"
            self._cache.store(f"{_folder(number)}/entry.json", about)
            self._seen_ns = -1
        self._open = (number, reason, now)
        return number

    def _has(self, path: str, content: bytes) -> bool:
        return any(
            entry.files.get(path) == len(content) and self.read(entry.number, path) == content
            for entry in self.entries()
        )

    def entries(self) -> list[RescuedEntry]:
        top = self._cache.absolute(RESCUED_DIRECTORY)
        try:
            changed_ns = os.stat(top).st_mtime_ns
        except OSError:
            return []
        if changed_ns != self._seen_ns:
            with contextlib.suppress(OSError):
                numbers = sorted(int(name) for name in os.listdir(top) if name.isdigit())
                self._entries = [self._read_entry(number) for number in numbers]
                self._seen_ns = changed_ns
        return list(self._entries)

    def _read_entry(self, number: int) -> RescuedEntry:
        reason, at = "kept", 0.0
        with contextlib.suppress(StorageError, OSError, ValueError, TypeError, KeyError):
            about = json.loads(self._cache.read(f"{_folder(number)}/entry.json"))
            reason, at = one_line(str(about["reason"])), float(about["at"])
        return RescuedEntry(number, reason, at, dict(sorted(self._files(number))))

    def _files(self, number: int) -> Iterator[tuple[str, int]]:
        top = self._cache.absolute(f"{_folder(number)}/files")
        for directory, _, names in os.walk(top):
            for name in names:
                place = os.path.join(directory, name)
                with contextlib.suppress(OSError):
                    yield os.path.relpath(place, top).replace(os.sep, "/"), os.lstat(place).st_size

    def place(self, number: int, path: str) -> str:
        """Return a rescued file's path, relative to ``.lattice``."""
        return f"{_folder(number)}/files/{path}"

    def read(self, number: int, path: str) -> bytes:
        return self._cache.read(self.place(number, path))

    def drop(self, number: int) -> None:
        try:
            shutil.rmtree(self._cache.absolute(_folder(number)))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StorageError(f"cannot remove {_folder(number)}: {error.strerror}") from error
        self._seen_ns, self.refused = -1, 0

    def notice(self) -> str | None:
        entries = self.entries()
        full = f"; the store is full, and {self.refused} later files were not kept" if self.refused else ""
        if not entries:
            return None
        if len(entries) > 1:
            return f"{len(entries)} sets of files were rescued{full}; see: lattice remote rescued"
        (entry,) = entries
        first = next(iter(entry.files), "")
        more = f" and {len(entry.files) - 1} more" if len(entry.files) > 1 else ""
        return f"{first}{more}: {entry.reason}{full}; see: lattice remote rescued show {entry.number}"


def _folder(number: int) -> str:
    return f"{RESCUED_DIRECTORY}/{number}"


LOST = "the server was restored to an earlier state that lacks it; the content is kept"
RESTORED = "changed here by another program, and restored to the server's version; what it wrote is kept"
_MAX_READ_BYTES = 32 * 1024 * 1024
"""Larger files are moved, not copied, and missing until the server's version arrives."""
_BLANK = b" \t\r\n\v\f\0"
_WRITTEN_BY_PROGRAMS = frozenset({"artifacts", "events", "ids.json", "resources", "sessions", "tasks"})


def is_event_log(path: str) -> bool:
    return path.startswith(("events/", "archive/events/"))


def may_be_by_hand(path: str) -> bool:
    """Return whether a file of no task may be written by a person."""
    top, _, rest = path.partition("/")
    if top == "archive":
        return rest.startswith(("plans/", "notes/"))
    return top not in _WRITTEN_BY_PROGRAMS and not is_editable(path)


class RescuePolicy:
    """Selection of contents to rescue. Call methods under the cache's lock."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.rescued = RescuedFiles(cache)
        self.reason = RESTORED
        """Current reason for replacing files, used for rescued ones."""
        self.notices: list[str] = []
        """Notices for the next command."""

    def remember(self, path: str) -> None:
        """Record the file as the server's: a later difference is a person's text."""
        if "/" in path or not may_be_by_hand(path):
            return
        if self._cache.size(path) is None:
            self._cache.delete(_base_path(path))
        elif (text := self._cache.read(path)) != self._base(path):
            self._cache.replace(_base_path(path), text)

    def keep(self, path: str, *, is_strange: bool, after: bytes | None = None, is_ours: bool = False) -> None:
        """Rescue the file's content if it is not the server's, before it is replaced or removed.

        Args:
            is_strange: another program is known to have changed it. Otherwise only texts that differ from the record
                and events that the server lacks are rescued.
            after: the server's content if known.
            is_ours: no other program changed the file, so that events were in the server's log before.
        """
        size, base = self._cache.size(path), self._base(path)
        if not size or path.endswith("~"):
            return
        has_events = after is not None and is_event_log(path)
        if not (is_strange or base is not None or has_events):
            return
        content = self._cache.read(path) if size <= _MAX_READ_BYTES else None
        if content is not None and (content in (base, after) or not content.strip()):
            return
        if has_events and content is not None and after is not None and _lacks_nothing(after, content):
            return
        self.rescued.add(path, content, LOST if has_events and is_ours else self.reason)

    def keep_text(self, path: str, reason: str) -> bool:
        """Rescue a plan or notes that is not to be sent; return whether it is not empty."""
        size = self._cache.size(path)
        content = self._cache.read(path) if size is not None and size <= _MAX_READ_BYTES else None
        if size is None or (content is not None and not content.strip(_BLANK)):
            return False
        self.rescued.add(path, content, reason)
        return True

    def keep_lost(self, differing: Iterable[str], surplus: Iterable[str], entries: Mapping[str, Content]) -> None:
        """Rescue contents that a restored server lacks (I7).

        Files derived from events are skipped if the server has the events. An event log with another continuation is
        compared when it arrives.
        """
        self.reason = LOST
        for path in surplus:
            self._keep_lost(path)
        for path in differing:
            if is_event_log(path):
                size = entries[path][0]
                if size > MAX_PIECE_BYTES or self._begins_with(path, entries[path]):
                    self._keep_lost(path)
            elif is_editable(path) or may_be_by_hand(path):
                self._keep_lost(path)

    def _keep_lost(self, path: str) -> None:
        if size := self._cache.size(path):
            self.rescued.add(path, self._cache.read(path) if size <= _MAX_READ_BYTES else None, LOST)

    def _begins_with(self, path: str, content: Content) -> bool:
        size, digest = content
        return digest_of(self._cache.read(path)[:size]) == digest

    def _base(self, path: str) -> bytes | None:
        place = _base_path(path)
        return None if self._cache.size(place) is None else self._cache.read(place)


def _lacks_nothing(log: bytes, other: bytes) -> bool:
    return log.startswith(other) or not set(other.splitlines()) - set(log.splitlines())


def _base_path(path: str) -> str:
    return f"{BASE_DIRECTORY}/{path}"
