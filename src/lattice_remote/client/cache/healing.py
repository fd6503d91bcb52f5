"""Which files of a cache other hands have changed, how often each was put right, and when it is next.

A process that keeps writing one file must not make us fetch it as often: after a few times the file is left for
longer and longer, and named.
"""

import time
from collections import OrderedDict
from collections.abc import Iterable

from lattice_remote.client.cache.known import Signature

__all__ = ["Healing"]

_FREE_HEALS = 3
"""So often a file is put right at once; then after 1, 2, 4 ... seconds."""
_MAX_DELAY_S = 60.0
_FORGET_S = 600.0
_MAX_REMEMBERED = 10_000
_CONFIRM_S = 1.0
"""A plan that is missing may be on its way to be saved: editors remove a file, then write it anew."""


class Healing:
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
