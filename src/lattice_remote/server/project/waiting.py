"""Requests that wait for a resource: who is woken when, so that ``acquire --wait`` holds no writer.

Those that wait for one resource stand in line, by when they were first asked: a client that was cut off and asks
again has its place. A waiter tries again when a change touches its resource and it is the first, when a holder's claim
expires, and a last time when its own time is over. From its first try to its answer nobody behind it takes the
resource, not even one that is with the worker while it is woken: each request says for which resources others stand
before it (``Execute.ahead``). Whoever does not wait is not in line, and takes what is free, as with lattice itself.

A lock of lattice's that another process holds is waited for in the same way, by any request that needs it, for as long
as lattice waits. No event tells of its release: the first in line tries again, ever more slowly.
"""

import asyncio
import time
from collections.abc import Callable

from lattice_remote.server.data.ipc import Done
from lattice_remote.server.project.job import Job

__all__ = ["Waiting"]

_LOCKS = "locks/"
"""Starts the name of a lock; no resource has a slash in its name."""
_MIN_RETRY_S = 0.1
_LOCK_RETRY_S, _MAX_LOCK_RETRY_S = 0.02, 0.25
"""Plain lattice holds a lock for some 10 ms."""


class Waiting:
    """The waiters of one project. ``retry`` is called with a job when it is to be tried again."""

    def __init__(self, retry: Callable[[Job], None]) -> None:
        self._retry = retry
        self._lines: dict[str, dict[Job, asyncio.TimerHandle | None]] = {}  # None: it is being tried again

    def add(self, job: Job, done: Done, *, ahead: list[str]) -> None:
        """Let a job wait for the resource that ``done.waiting_for`` names; it was tried behind those of ``ahead``."""
        assert done.waiting_for is not None, "only such an outcome makes a waiter"
        if job.resource != done.waiting_for:
            self.leave(job)
        job.resource = done.waiting_for
        line = self._lines.setdefault(job.resource, {})
        delay = self._lock_delay(job, done, line) if done.waiting_for.startswith(_LOCKS) else _delay(job, done)
        line[job] = asyncio.get_running_loop().call_later(max(delay, 0.0), self._wake, job)
        if job.resource in ahead and job.resource not in self.ahead_of(job):
            self._wake(job)  # who stood before it has left meanwhile, perhaps without taking it

    def _lock_delay(self, job: Job, done: Done, line: dict[Job, asyncio.TimerHandle | None]) -> float:
        """Return when a job tries again to get a lock, in seconds: before its time is over only the first in line."""
        job.lock_until = job.lock_until or time.monotonic() + done.wait_timeout_s
        job.wait_until = job.lock_until
        delay = job.wait_until - time.monotonic()
        if any(other is not job and other.submitted_at < job.submitted_at for other in line):
            return delay
        job.lock_tries += 1
        return min(delay, _LOCK_RETRY_S * 1.5**job.lock_tries, _MAX_LOCK_RETRY_S)

    def ahead_of(self, job: Job) -> list[str]:
        """Return the resources for which somebody has waited for longer than this job."""
        return [
            resource
            for resource, line in self._lines.items()
            if any(other is not job and other.submitted_at < job.submitted_at for other in line)
        ]

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def touched(self, done: Done) -> None:
        """Wake the first waiter of each resource whose files a change has touched."""
        if not self._lines:
            return
        names = {after.path.split("/")[1] for after in done.after if after.path.startswith("resources/")}
        for name in names:
            self.wake_first(name)

    def wake_first(self, resource: str) -> None:
        """Let the waiter that came first try again, if there is one that is not at it already."""
        if line := self._lines.get(resource):
            self._wake(min(line, key=lambda job: job.submitted_at))

    def wake_each_first(self) -> None:
        """Let the first waiter of every resource try again."""
        for resource in tuple(self._lines):
            self.wake_first(resource)

    def leave(self, job: Job) -> bool:
        """A waiter has its answer, or is gone: let the next one try. Return whether it was waiting, not being tried."""
        line = self._lines.get(job.resource or "", {})
        if job not in line:
            return False
        timer = line.pop(job)
        if timer is not None:
            timer.cancel()
        if line:  # in the next tick: of those who leave together none is tried for the one before it
            asyncio.get_running_loop().call_soon(self.wake_first, job.resource or "")
        else:
            del self._lines[job.resource or ""]
        return timer is not None

    def clear(self) -> None:
        """Forget all."""
        for line in self._lines.values():
            for timer in line.values():
                if timer is not None:
                    timer.cancel()
        self._lines.clear()

    def _wake(self, job: Job) -> None:
        line = self._lines.get(job.resource or "", {})
        if (timer := line.get(job)) is not None:
            timer.cancel()
            line[job] = None
            self._retry(job)


def _delay(job: Job, done: Done) -> float:
    """Return when a job tries again to get a resource if nothing happens to that before, in seconds."""
    job.lock_until, job.lock_tries = 0.0, 0
    job.wait_until = job.submitted_at + done.wait_timeout_s
    delay = job.wait_until - time.monotonic()
    if done.retry_at is not None:
        delay = min(delay, max(done.retry_at - time.time(), _MIN_RETRY_S))
    return delay
