"""Compares a cache's files with the server's manifest."""

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from lattice_remote.client.cache.cache import Cache
from lattice_remote.client.cache.edits import Edits
from lattice_remote.client.cache.survey import Reading, read_all
from lattice_remote.protocol.effects import Compare

__all__ = ["Compared", "Comparison", "compare_files"]


@dataclass(frozen=True, slots=True)
class Comparison:
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

    comparison: Comparison
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
    comparison = Comparison(
        seq=compare.seq,
        total=len(entries),
        differing=tuple(sorted(differing - left_out)),
        missing=tuple(sorted(missing - left_out)),
        surplus=tuple(sorted(local.keys() - entries.keys() - set(edited))),
        edited=tuple(edited),
        away=tuple(sorted(left_out)),
    )
    return Compared(comparison, local, readings)
