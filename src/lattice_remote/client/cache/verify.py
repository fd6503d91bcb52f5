"""Comparison of a cache's files with the server's manifest, and the schedule of repairs."""

import asyncio
import contextlib
import itertools
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from lattice_remote.client.cache.cache import Cache, boot_id, storage_errors
from lattice_remote.client.cache.edits import Edits
from lattice_remote.client.config import PRIVATE_DIRECTORY
from lattice_remote.files import READ, Signature, hash_descriptor
from lattice_remote.protocol.operations import digest_of
from lattice_remote.protocol.paths import is_editable
from lattice_remote.protocol.replica import Compare

__all__ = [
    "CacheComparison",
    "Compared",
    "Reading",
    "RepairSchedule",
    "compare_files",
    "foreign",
    "is_settled",
    "keep_readings",
    "read_all",
    "read_gently",
    "take_readings",
]

_SLICE = 200
_PAUSE_S = 0.01
_RACY_NS = 50_000_000
"""A file this young when it was read may change again without new times."""


class Reading(NamedTuple):
    size: int
    digest: bytes
    signature: Signature
    settled: bool
    """Whether a later change would show in the signature."""


def read_all(cache: Cache, earlier: Mapping[str, Reading] | None = None) -> dict[str, Reading]:
    """Return the digests of all replicated files, in a thread; reuses unchanged ``earlier`` readings."""
    return _read(cache, cache.paths(), earlier or {})


async def read_gently(cache: Cache, is_urgent: Callable[[], bool]) -> dict[str, Reading]:
    """Like ``read_all``, without the cache's lock, and with pauses unless urgent.

    Pass the result to ``read_all`` as ``earlier``, to find later changes at one ``stat`` each.
    """
    found: dict[str, Reading] = {}
    paths = cache.paths()
    while some := await asyncio.to_thread(lambda: list(itertools.islice(paths, _SLICE))):
        found |= await asyncio.to_thread(_read, cache, some, {})
        await asyncio.sleep(0 if is_urgent() else _PAUSE_S)
    return found


def foreign(cache: Cache) -> list[str]:
    """Return the files that another program changed, by their times only; thread-safe.

    May include files being written: check again under the cache's lock.
    """
    present = set(cache.paths())
    changed = [path for path in present if not cache.known.agrees(path, cache.signature(path))]
    return changed + [path for path in cache.known.paths() if path not in present]


def _read(cache: Cache, paths: Iterable[str], earlier: Mapping[str, Reading]) -> dict[str, Reading]:
    found: dict[str, Reading] = {}
    for path in paths:
        with storage_errors(path), contextlib.suppress(FileNotFoundError):
            signature = cache.signature(path)
            before = earlier.get(path)
            if signature is None:
                continue
            if before is not None and before.settled and before.signature == signature:
                found[path] = before
                continue
            settled = is_settled(signature)
            size, digest = _digest(cache.absolute(path), signature[1])
            found[path] = Reading(size, digest, signature, settled and size == signature[1])
    return found


def is_settled(signature: Signature) -> bool:
    """Return whether a change of a file from now on would show in its signature."""
    return time.time_ns() - max(signature[0], signature[3]) > _RACY_NS


_AT_ONCE_BYTES = 1 << 20


def _digest(place: str, size: int) -> tuple[int, bytes]:
    handle = os.open(place, READ)
    try:
        if size < _AT_ONCE_BYTES and len(data := os.read(handle, size + 1)) == size:
            return size, digest_of(data)
        size, hasher = hash_descriptor(handle)
        return size, hasher.digest()
    finally:
        os.close(handle)


_READINGS = f"{PRIVATE_DIRECTORY}/readings"


class _KeptReadings(msgspec.Struct):
    boot_id: str
    inode: int
    """Of the cache's directory."""
    files: dict[str, Reading]


def keep_readings(cache: Cache, readings: Mapping[str, Reading]) -> None:
    """Keep readings for the next process, which need not read these files again. Plans and notes equal their bases.

    Valid until a reboot: a power cut changes content without times and size.
    """
    cache.replace(_READINGS, msgspec.msgpack.encode(_KeptReadings(boot_id(), cache.identity[1], dict(readings))))


def take_readings(cache: Cache) -> dict[str, Reading]:
    """Return the kept readings and remove them; empty if there are none."""
    if cache.size(_READINGS) is None:
        return {}
    data = cache.read(_READINGS)
    cache.delete(_READINGS)
    try:
        kept = msgspec.msgpack.decode(data, type=_KeptReadings)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    if not kept.boot_id or (kept.boot_id, kept.inode) != (boot_id(), cache.identity[1]):
        return {}
    for path, reading in kept.files.items():
        if is_editable(path) and reading.settled:
            cache.known.settle_text(path, reading.signature)
    return kept.files


@dataclass(frozen=True, slots=True)
class CacheComparison:
    """Differences between the files and the server's at ``seq``."""

    seq: int
    total: int
    differing: tuple[str, ...]
    missing: tuple[str, ...]
    surplus: tuple[str, ...]
    edited: tuple[str, ...]
    deferred: tuple[str, ...]
    """Deferred contents of artifacts, not expected here."""

    @property
    def is_clean(self) -> bool:
        """Return whether every file equals the server's, except unsent edits."""
        return not (self.differing or self.missing or self.surplus)


@dataclass(frozen=True, slots=True)
class Compared:
    comparison: CacheComparison
    local: Mapping[str, tuple[int, bytes]]
    """Size and digest of each file; for an edited one, of its base."""
    readings: Mapping[str, Reading]

    def equal(self) -> list[str]:
        differing = {*self.comparison.differing, *self.comparison.surplus}
        return [path for path in self.readings if path not in differing]


async def compare_files(
    cache: Cache,
    edits: Edits,
    compare: Compare,
    earlier: Mapping[str, Reading] | None = None,
    *,
    may_defer: Callable[[str, int], bool],
    deferred: Collection[str] = (),
) -> Compared:
    """Read every file, in a thread, and compare. Call under the cache's lock.

    Raises:
        StorageError: a file cannot be read, or the server's files exceed the quota.
    """
    entries = compare.entries
    cache.quota.require(sum(size for path, (size, _) in entries.items() if not may_defer(path, size)))
    readings = await asyncio.to_thread(read_all, cache, earlier)
    local = {path: (reading.size, reading.digest) for path, reading in readings.items()}
    edited = [path for path in edits.scan(readings) if not edits.is_orphan(path, compare.entries)]
    for path in [path for path in edited if path in local and local[path] == entries.get(path)]:
        if edits.unanswered.get(path) is None:  # else its answer settles it
            edits.sent(path, cache.read(path))  # the base was behind, or damaged
            edited.remove(path)
    for path in edited:
        local.pop(path, None)
        if (entry := edits.base_entry(path)) is not None:
            local[path] = entry
    differing = {p for p in local if p in entries and local[p] != entries[p] and p not in edited}
    missing = entries.keys() - local.keys()
    omitted = {p for p in missing if may_defer(p, entries[p][0])} | (differing & set(deferred))
    comparison = CacheComparison(
        seq=compare.seq,
        total=len(entries),
        differing=tuple(sorted(differing - omitted)),
        missing=tuple(sorted(missing - omitted)),
        surplus=tuple(sorted(local.keys() - entries.keys() - set(edited))),
        edited=tuple(edited),
        deferred=tuple(sorted(omitted)),
    )
    return Compared(comparison, local, readings)


_FREE_REPAIRS = 3
"""A file is repaired this often at once; further repairs wait 1, 2, 4 ... seconds."""
_MAX_DELAY_S = 60.0
_FORGET_S = 600.0
_MAX_REMEMBERED = 10_000
_CONFIRM_S = 1.0
"""Delay before a missing plan is restored: editors remove a file, then write it again."""


class RepairSchedule:
    """Repairs of one cache: due files, backoff and counts."""

    def __init__(self) -> None:
        self.count = 0
        """Number of repaired files."""
        self.last_path: str | None = None
        self.last_at: float | None = None
        """Time of the last repair (seconds since 1970)."""
        self.strange: dict[str, tuple[Signature | None, bytes | None]] = {}
        """Modified files being fetched: path to signature and digest found there, None for a missing file."""
        self._history: OrderedDict[str, tuple[int, float]] = (
            OrderedDict()
        )  # path -> recent repairs, last one (monotonic)
        self._due: dict[str, float] = {}

    # --- due files ---

    def suspect(self, paths: Iterable[str], *, delay_s: float = 0.0) -> None:
        now = time.monotonic()
        for path in paths:
            if path not in self._due:
                self._due[path] = max(now + delay_s, self._not_before(path, now))

    def suspect_missing(self, paths: Iterable[str]) -> None:
        """Check these files in a moment: an editor may write them again."""
        self.suspect(paths, delay_s=_CONFIRM_S)

    def take_due(self, limit: int) -> list[str]:
        now = time.monotonic()
        due = [path for path, at in self._due.items() if at <= now][:limit]
        for path in due:
            del self._due[path]
        return due

    def count_due(self) -> int:
        now = time.monotonic()
        return sum(at <= now for at in self._due.values())

    def next_due_s(self) -> float | None:
        return max(0.0, min(self._due.values()) - time.monotonic()) if self._due else None

    def repaired(self, path: str) -> bool:
        """Record a repaired file; return whether it has just become a contested one."""
        self.count += 1
        self.last_path, self.last_at = path, time.time()
        return self.fetched(path)

    def fetched(self, path: str) -> bool:
        """Like ``repaired``, for a file with the right content, fetched only for its times."""
        now = time.monotonic()
        repairs = self._recent(path, now) + 1
        self._history[path] = (repairs, now)
        self._history.move_to_end(path)
        if len(self._history) > _MAX_REMEMBERED:
            self._history.popitem(last=False)
        return repairs == _FREE_REPAIRS + 1

    def contested(self) -> list[str]:
        now = time.monotonic()
        return sorted(path for path in self._history if self._recent(path, now) > _FREE_REPAIRS)

    def _recent(self, path: str, now: float) -> int:
        repairs, at = self._history.get(path, (0, now))
        return repairs if now - at < _FORGET_S else 0

    def _not_before(self, path: str, now: float) -> float:
        repairs = self._recent(path, now)
        if repairs < _FREE_REPAIRS:
            return now
        delay_s: float = min(_MAX_DELAY_S, 2.0 ** min(repairs - _FREE_REPAIRS, 10))
        return self._history[path][1] + delay_s
