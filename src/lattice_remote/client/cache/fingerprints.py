"""Stat signatures of a cache's files as our own processes wrote them: they reveal modifications by other programs.

A writing process notes each file, and shares its notes in ``.remote/written``, a short log, with other processes on the
same cache. The log is written under the cache's lock and may be lost or truncated at any time: unknown files are then
fetched again, never trusted.

``stored()`` keeps all of it for the next process, which then need not read every file to find changes. It is valid
until a reboot: a power cut changes content without times and size.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, MutableMapping

from lattice_remote.client.config import PRIVATE_DIRECTORY
from lattice_remote.files import SAFE, Signature, write_all
from lattice_remote.protocol.file_table import FileTable, compacted

__all__ = ["STORED", "WRITTEN_LOG", "Fingerprints", "Signature"]

WRITTEN_LOG = f"{PRIVATE_DIRECTORY}/written"
STORED = f"{PRIVATE_DIRECTORY}/known.json"
_MAX_LOG_BYTES = 256 * 1024
_TICK_NS = 50_000_000
"""Two writes within a clock tick leave the same times."""


class Fingerprints:
    """Fingerprints of one cache, in about 200 bytes a file."""

    def __init__(self, directory: str) -> None:
        self.is_complete = False
        """Whether every file was compared with the server's, so that an unknown one is foreign."""
        self._log = os.path.join(directory, WRITTEN_LOG)
        self._marks: MutableMapping[str, int] = {}  # path -> hashes of the signature: a quarter of the memory
        self._settled: MutableMapping[str, int] = {}  # the same for plans and notes that equal their base
        self._settled_before: MutableMapping[str, int] = {}  # those of earlier processes
        self._unshared: dict[str, Signature | None] = {}
        self._read_up_to: tuple[int, int] | None = None  # inode of the log, bytes

    def __contains__(self, path: object) -> bool:
        return path in self._marks

    def paths(self) -> list[str]:
        return list(self._marks)

    def is_below(self, directory: str) -> bool:
        return any(path.startswith(directory + "/") for path in self._marks)

    def agrees(self, path: str, found: Signature | None) -> bool:
        return self._marks.get(path) == (None if found is None else _mark(found))

    def was_written(self, path: str, found: Signature | None) -> bool:
        """Return whether another program changed content, not only mode, owner or links."""
        mark = self._marks.get(path)
        return not self.agrees(path, found) and (mark is None or found is None or mark >> 64 != _mark(found) >> 64)

    def is_settled(self, path: str, found: Signature) -> bool:
        """Return whether a plan or notes is as it was when it equalled its base, also for an earlier process."""
        mark = _mark(found)
        if self._settled_before.get(path) == mark:
            self._settled[path] = self._settled_before.pop(path)
        return self._settled.get(path) == mark

    def was_settled(self, path: str) -> bool:
        return path in self._settled

    def settle_text(self, path: str, found: Signature | None) -> None:
        """Record that a plan or notes equals its base, or with None that this is unknown.

        A file just written is read again: a further write would leave the same times.
        """
        if found is None:
            self._settled.pop(path, None)
            self._settled_before.pop(path, None)
        elif time.time_ns() - found[3] > _TICK_NS:
            self._settled[path] = _mark(found)
            self._settled = compacted(self._settled, _mark_table)

    def note(self, path: str, found: Signature | None) -> None:
        self._unshared[path] = found
        self._remember(path, found)

    def settle(self, files: Iterable[tuple[str, Signature]]) -> None:
        self._marks = compacted({path: _mark(found) for path, found in files}, _mark_table)
        self.is_complete = True

    def _remember(self, path: str, found: Signature | None) -> None:
        if found is None:
            self._marks.pop(path, None)
        else:
            self._marks[path] = _mark(found)
            self._marks = compacted(self._marks, _mark_table)

    # --- storage ---

    def stored(self, boot_id: str) -> bytes | None:
        """Return the input of ``restore()``, if every file is known."""
        if not self.is_complete or self._read_up_to is None or not boot_id:
            return None
        known = {**self._settled_before, **self._settled}
        settled = [path for path, mark in known.items() if self._marks.get(path) == mark]
        fields = {"boot_id": boot_id, "log": self._read_up_to, "marks": dict(self._marks.items()), "settled": settled}
        return json.dumps(fields).encode()

    def restore(self, data: bytes, boot_id: str) -> None:
        """Load another process's fingerprints of this boot."""
        try:
            found = json.loads(data)
            inode, offset = found["log"]
            marks = {str(path): int(mark) for path, mark in found["marks"].items()}
            settled = {path: marks[path] for path in map(str, found["settled"])}
            if not boot_id or found["boot_id"] != boot_id:
                return
        except (ValueError, TypeError, KeyError, AttributeError):
            return
        self._marks, self._settled_before = compacted(marks, _mark_table), compacted(settled, _mark_table)
        self._read_up_to, self.is_complete = (int(inode), int(offset)), True

    # --- other processes of ours; under the cache's lock ---

    def learn(self) -> None:
        """Load others' new entries; at first only note the log's end, after ``restore()`` all since then."""
        with contextlib.suppress(OSError), open(self._log, "rb") as log:
            status = os.fstat(log.fileno())
            if self._read_up_to is not None:
                inode, offset = self._read_up_to
                log.seek(offset if inode == status.st_ino and offset <= status.st_size else 0)
                for path, found in _entries(log.read()):
                    if path not in self._unshared:
                        self._remember(path, found)
            self._read_up_to = (status.st_ino, status.st_size)

    def share(self) -> None:
        if not self._unshared:
            return
        self.learn()
        lines = "".join(_line(path, found) for path, found in self._unshared.items()).encode()
        self._unshared.clear()
        if len(lines) > _MAX_LOG_BYTES:
            return
        with contextlib.suppress(OSError):
            handle = os.open(self._log, os.O_WRONLY | os.O_APPEND | SAFE)  # created with the cache's layout
            try:
                if os.fstat(handle).st_size > _MAX_LOG_BYTES:
                    os.ftruncate(handle, 0)
                write_all(handle, lines)
                status = os.fstat(handle)
            finally:
                os.close(handle)
            self._read_up_to = (status.st_ino, status.st_size)


def _mark(found: Signature) -> int:
    """Return two hashes in one: of the fields that a write changes, and of all."""
    return (hash(found[:3]) << 64) | (hash(found) & (2**64 - 1))


def _mark_table() -> FileTable[int]:
    return FileTable("<qQ", lambda mark: (mark >> 64, mark & (2**64 - 1)), lambda high, low: high << 64 | low)


def _line(path: str, found: Signature | None) -> str:
    return f"{path}\t{' '.join(map(str, found or ()))}\n"


def _entries(data: bytes) -> Iterator[tuple[str, Signature | None]]:
    for line in data.decode(errors="replace").splitlines():
        path, _, numbers = line.partition("\t")
        with contextlib.suppress(ValueError):
            match [int(number) for number in numbers.split()]:
                case []:
                    yield path, None
                case [mtime, size, inode, ctime]:
                    yield path, (mtime, size, inode, ctime)
