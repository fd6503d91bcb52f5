"""Compares a cache's files with the server's manifest."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from lattice_remote.client.cache.cache import Cache
from lattice_remote.client.cache.edits import Edits
from lattice_remote.client.cache.survey import Reading, read_all
from lattice_remote.protocol.replica import Compare

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
    cache: Cache, edits: Edits, compare: Compare, earlier: Mapping[str, Reading] | None = None
) -> Compared:
    """Read every file, in a thread, and compare. Under the cache's lock, so that nobody changes them meanwhile.

    Raises:
        StorageError: a file can't be read, or what the server has is more than the user lets it put here.
    """
    cache.quota.require(sum(size for size, _ in compare.entries.values()))
    readings = await asyncio.to_thread(read_all, cache, earlier)
    local = {path: (reading.size, reading.digest) for path, reading in readings.items()}
    edited = [path for path in edits.scan() if not edits.is_orphan(path, compare.entries)]
    for path in edited:
        local.pop(path, None)
        if (entry := edits.base_entry(path)) is not None:
            local[path] = entry
    entries = compare.entries
    comparison = Comparison(
        seq=compare.seq,
        total=len(entries),
        differing=tuple(sorted(p for p in local if p in entries and local[p] != entries[p] and p not in edited)),
        missing=tuple(sorted(entries.keys() - local.keys())),
        surplus=tuple(sorted(local.keys() - entries.keys() - set(edited))),
        edited=tuple(edited),
    )
    return Compared(comparison, local, readings)
