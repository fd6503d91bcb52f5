"""Requests that wait for the worker: each lane, as that of a connection, in its own order, all lanes in turn.

So a client that has hundreds of requests under way delays another's next one by one request, not by hundreds.
"""

from collections import deque
from collections.abc import Hashable

from lattice_remote.server.project.job import Job

__all__ = ["Turns"]


class Turns:
    """A queue. The server's own jobs, which nobody asked for, take their turn like those of one more connection."""

    def __init__(self) -> None:
        self._first: deque[Job] = deque()
        self._lanes: dict[Hashable, deque[Job]] = {}  # by the lane of who asked first; whose turn it is comes first
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def has(self, lane: Hashable) -> bool:
        """Tell whether a request of this lane waits here."""
        return lane in self._lanes

    def add(self, job: Job) -> None:
        """Add a job behind the others of its lane."""
        self._lanes.setdefault(job.askers[0].lane if job.askers else None, deque()).append(job)
        self._length += 1

    def add_first(self, job: Job) -> None:
        """Add a job before all others: it was with a worker already."""
        self._first.appendleft(job)
        self._length += 1

    def next(self) -> Job:
        """Return the job that ``pop`` would take; there must be one."""
        return self._first[0] if self._first else next(iter(self._lanes.values()))[0]

    def pop(self) -> Job:
        """Take the next job; there must be one. Then it is the next lane's turn."""
        self._length -= 1
        if self._first:
            return self._first.popleft()
        name, lane = next(iter(self._lanes.items()))
        del self._lanes[name]
        job = lane.popleft()
        if lane:
            self._lanes[name] = lane
        return job

    def remove(self, job: Job) -> None:
        """Take a job out that is not to be done any more. Nothing happens when it is not here."""
        for lane in (self._first, *self._lanes.values()):
            if job in lane:
                lane.remove(job)
                self._length -= 1
        for name in [name for name, lane in self._lanes.items() if not lane]:
            del self._lanes[name]

    def clear(self) -> None:
        """Forget all."""
        self._first.clear()
        self._lanes.clear()
        self._length = 0
