"""Looks at every file of a cache: what it holds, and whether other hands than ours have changed it."""

import asyncio
import contextlib
import hashlib
import itertools
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lattice_remote.client.cache.cache import Cache, explained
from lattice_remote.client.cache.edits import Edits
from lattice_remote.client.cache.fingerprints import Signature
from lattice_remote.protocol.effects import Compare

__all__ = [
    "CacheComparison",
    "Compared",
    "Reading",
    "RepairSchedule",
    "compare_files",
    "foreign",
    "read_all",
    "read_gently",
]

_SLICE = 200
_PAUSE_S = 0.01
_RACY_NS = 50_000_000
"""A file this young when it was read may change again under the same times."""


class Reading(NamedTuple):
    """A file as it was read at one moment."""

    size: int
    digest: bytes
    signature: Signature
    settled: bool
    """Whether a later change would show in the signature."""


def read_all(cache: Cache, earlier: Mapping[str, Reading] | None = None) -> dict[str, Reading]:
    """Return what each replicated file holds. Reads everything that is not as in ``earlier``; call it in a thread."""
    return _read(cache, cache.paths(), earlier or {})


async def read_gently(cache: Cache, is_urgent: Callable[[], bool]) -> dict[str, Reading]:
    """Like ``read_all``, without the cache's lock, and with pauses for other work unless it is urgent.

    What is changed after it was read is found by ``read_all`` with this as ``earlier``, at the cost of a look.
    """
    found: dict[str, Reading] = {}
    paths = cache.paths()
    while some := await asyncio.to_thread(lambda: list(itertools.islice(paths, _SLICE))):
        found |= await asyncio.to_thread(_read, cache, some, {})
        await asyncio.sleep(0 if is_urgent() else _PAUSE_S)
    return found


def foreign(cache: Cache) -> list[str]:
    """Return the files that are not as one of us left them, by their times only. May be called in a thread.

    What is being written at that moment may be among them: look again under the cache's lock.
    """
    present = set(cache.paths())
    changed = [path for path in present if not cache.known.agrees(path, cache.signature(path))]
    return changed + [path for path in cache.known.paths() if path not in present]


def _read(cache: Cache, paths: Iterable[str], earlier: Mapping[str, Reading]) -> dict[str, Reading]:
    found: dict[str, Reading] = {}
    for path in paths:
        with explained(path), contextlib.suppress(FileNotFoundError):
            signature = cache.signature(path)
            before = earlier.get(path)
            if signature is None:
                continue
            if before is not None and before.settled and before.signature == signature:
                found[path] = before
                continue
            settled = time.time_ns() - max(signature[0], signature[3]) > _RACY_NS
            size, digest = _digest(cache.absolute(path))
            found[path] = Reading(size, digest, signature, settled and size == signature[1])
    return found


def _digest(place: str) -> tuple[int, bytes]:
    handle = os.open(place, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0))
    with open(handle, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
        return file.tell(), digest


@dataclass(frozen=True, slots=True)
class CacheComparison:
    """How the files differ from the server's at ``seq``."""

    seq: int
    total: int
    differing: tuple[str, ...]
    missing: tuple[str, ...]
    surplus: tuple[str, ...]
    edited: tuple[str, ...]
    away: tuple[str, ...]
    """Contents of artifacts that are left out: nobody said that they are here."""

    @property
    def is_clean(self) -> bool:
        """Whether every file is the server's, unsent edits aside."""
        return not (self.differing or self.missing or self.surplus)


@dataclass(frozen=True, slots=True)
class Compared:
    """A comparison, and the files as they were read for it."""

    comparison: CacheComparison
    local: Mapping[str, tuple[int, bytes]]
    """Size and digest of each file; of an edited one, of its base."""
    readings: Mapping[str, Reading]

    def equal(self) -> list[str]:
        """Return the files that need no mending: equal to the server's, or edited here."""
        differing = {*self.comparison.differing, *self.comparison.surplus}
        return [path for path in self.readings if path not in differing]


async def compare_files(
    cache: Cache,
    edits: Edits,
    compare: Compare,
    earlier: Mapping[str, Reading] | None = None,
    *,
    may_leave_out: Callable[[str, int], bool],
    away: Collection[str] = (),
) -> Compared:
    """Read every file, in a thread, and compare. Under the cache's lock, so that nobody changes them meanwhile.

    Args:
        cache, edits: what is here.
        compare: what the server has.
        earlier: files that were read before: those that were not changed since need not be read again.
        may_leave_out: tells of a path and a size whether the content may be left out.
        away: the paths of which the content is left out now.

    Raises:
        StorageError: a file can't be read, or what the server has is more than the user lets it put here.
    """
    entries = compare.entries
    cache.quota.require(sum(size for path, (size, _) in entries.items() if not may_leave_out(path, size)))
    readings = await asyncio.to_thread(read_all, cache, earlier)
    local = {path: (reading.size, reading.digest) for path, reading in readings.items()}
    edited = [path for path in edits.scan() if not edits.is_orphan(path, compare.entries)]
    for path in [path for path in edited if path in local and local[path] == entries.get(path)]:
        if edits.unanswered.get(path) is None:  # else its answer says what became of it
            edits.sent(path, cache.read(path))  # the base was behind, or damaged
            edited.remove(path)
    for path in edited:
        local.pop(path, None)
        if (entry := edits.base_entry(path)) is not None:
            local[path] = entry
    differing = {p for p in local if p in entries and local[p] != entries[p] and p not in edited}
    missing = entries.keys() - local.keys()
    left_out = {p for p in missing if may_leave_out(p, entries[p][0])} | (differing & set(away))
    comparison = CacheComparison(
        seq=compare.seq,
        total=len(entries),
        differing=tuple(sorted(differing - left_out)),
        missing=tuple(sorted(missing - left_out)),
        surplus=tuple(sorted(local.keys() - entries.keys() - set(edited))),
        edited=tuple(edited),
        away=tuple(sorted(left_out)),
    )
    return Compared(comparison, local, readings)


_FREE_HEALS = 3
"""So often a file is put right at once; then after 1, 2, 4 ... seconds."""
_MAX_DELAY_S = 60.0
_FORGET_S = 600.0
_MAX_REMEMBERED = 10_000
_CONFIRM_S = 1.0
"""A plan that is missing may be on its way to be saved: editors remove a file, then write it anew."""


class RepairSchedule:
    """What is known of other hands' work on one cache. Pure: knows no files."""

    def __init__(self) -> None:
        self.count = 0
        """How many files were put right, ever."""
        self.last_path: str | None = None
        self.last_at: float | None = None
        """When the last one was put right (seconds since 1970)."""
        self.strange: dict[str, tuple[Signature | None, bytes | None]] = {}
        """Files that other hands have changed, being fetched: path to what was found there, None for nothing."""
        self._history: OrderedDict[str, tuple[int, float]] = OrderedDict()  # path -> heals of late, last (monotonic)
        self._due: dict[str, float] = {}

    # --- what to look at, and when ---

    def suspect(self, paths: Iterable[str], *, delay_s: float = 0.0) -> None:
        """Look at these files, at once unless they were put right too often of late."""
        now = time.monotonic()
        for path in paths:
            if path not in self._due:
                self._due[path] = max(now + delay_s, self._not_before(path, now))

    def suspect_missing(self, paths: Iterable[str]) -> None:
        """Look at these files in a moment: an editor may be about to write them anew."""
        self.suspect(paths, delay_s=_CONFIRM_S)

    def take_due(self, limit: int) -> list[str]:
        """Return files to look at now, and forget that."""
        now = time.monotonic()
        due = [path for path, at in self._due.items() if at <= now][:limit]
        for path in due:
            del self._due[path]
        return due

    def count_due(self) -> int:
        """Return how many files there are to look at now."""
        now = time.monotonic()
        return sum(at <= now for at in self._due.values())

    def next_due_s(self) -> float | None:
        """Return in how many seconds there is something to look at; None for nothing."""
        return max(0.0, min(self._due.values()) - time.monotonic()) if self._due else None

    # --- what was done ---

    def healed(self, path: str) -> bool:
        """A file is the server's again; return whether it is one that somebody keeps changing, found just now."""
        self.count += 1
        self.last_path, self.last_at = path, time.time()
        return self.fetched(path)

    def fetched(self, path: str) -> bool:
        """Like ``healed``, of a file that held what it should, and was fetched for its times alone."""
        now = time.monotonic()
        heals = self._recent(path, now) + 1
        self._history[path] = (heals, now)
        self._history.move_to_end(path)
        if len(self._history) > _MAX_REMEMBERED:
            self._history.popitem(last=False)
        return heals == _FREE_HEALS + 1

    def fought_over(self) -> list[str]:
        """Return the files that somebody keeps changing."""
        now = time.monotonic()
        return sorted(path for path in self._history if self._recent(path, now) > _FREE_HEALS)

    def _recent(self, path: str, now: float) -> int:
        heals, at = self._history.get(path, (0, now))
        return heals if now - at < _FORGET_S else 0

    def _not_before(self, path: str, now: float) -> float:
        heals = self._recent(path, now)
        if heals < _FREE_HEALS:
            return now
        delay_s: float = min(_MAX_DELAY_S, 2.0 ** min(heals - _FREE_HEALS, 10))
        return self._history[path][1] + delay_s
