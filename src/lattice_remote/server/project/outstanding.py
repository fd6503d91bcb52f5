"""The requests that a project's worker has, in the order in which it answers them, and for how long the oldest.

It gets no more than it can work on while others are fsynced. One request was perhaps to blame for the death of the
worker before this one: until that is known, each of those that it had is sent alone.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator

from lattice_remote.server.data.ipc import NewEpoch, Reconcile
from lattice_remote.server.project.bounds import Bounds
from lattice_remote.server.project.job import Job

__all__ = ["Outstanding"]


class Outstanding:
    """Belongs to the event loop's thread; ``close()`` it.

    Args:
        bounds: how many it may have, and how long each may take.
        overdue: is called with the oldest when the worker has had it for too long.
    """

    def __init__(self, bounds: Bounds, overdue: Callable[[Job], None]) -> None:
        self._bounds = bounds
        self._overdue = overdue
        self._jobs: deque[Job] = deque()
        self._weight = 0
        self.attempts = 0
        """How many a worker was ever sent that may write, also where nothing came of it."""
        self._oldest_since = 0.0  # since when the first of them has been the first
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    @property
    def oldest(self) -> Job:
        """The one that is answered next. There must be one."""
        return self._jobs[0]

    def takes(self, job: Job) -> bool:
        """Tell whether the worker may have this one too."""
        first = self._jobs[0] if self._jobs else job
        most = 1 if first.suspect else self._bounds.window
        return len(self._jobs) < most and self._weight < self._bounds.window_bytes

    def add(self, job: Job) -> None:
        """The worker is sent this one."""
        if not self._jobs:
            self._oldest_since = time.monotonic()
        self._jobs.append(job)
        self._weight += job.weight
        self.attempts += not isinstance(job.message, Reconcile)  # which only looks
        self._watch()

    def settle(self) -> Job:
        """The worker has answered the oldest, which is nobody's suspect any more; return it."""
        job = self._jobs.popleft()
        self._weight -= job.weight
        job.suspect, job.deaths = False, 0
        self._oldest_since = time.monotonic()
        return job

    def clear(self) -> list[Job]:
        """The worker is gone; return what it had."""
        jobs = list(self._jobs)
        self._jobs.clear()
        self._weight = 0
        return jobs

    def close(self) -> None:
        """Look after it no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        if self._timer is None:
            # Not later than a command's time limit: the next request may be one, and this timer serves it too.
            delay = min(self._time_left(), self._bounds.command_s)
            self._timer = asyncio.get_running_loop().call_later(delay, self._look)

    def _time_left(self) -> float:
        message = self._jobs[0].message
        reads_all = isinstance(message, NewEpoch) or (isinstance(message, Reconcile) and message.paths is None)
        limit = self._bounds.upkeep_s if reads_all else self._bounds.command_s
        return self._oldest_since + limit - time.monotonic()

    def _look(self) -> None:
        self._timer = None
        if not self._jobs:
            return
        if self._time_left() > 0:
            self._watch()
        else:
            self._overdue(self._jobs[0])
