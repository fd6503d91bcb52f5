"""Requests that wait for a resource: who is woken when, so that ``acquire --wait`` holds no writer.

Those that wait for one resource stand in line, by when they were first asked: a client that was cut off and asks
again has its place. A waiter tries again when a change touches its resource and it is the first, when a holder's claim
expires, and a last time when its own time is over. From its first try to its answer nobody behind it takes the
resource, not even one that is with the worker while it is woken: each request says for which resources others stand
before it (``Execute.ahead``). Whoever does not wait is not in line, and takes what is free, as with lattice itself.
"""

import asyncio
import time
from collections.abc import Callable

from lattice_remote.server.data.ipc import Done
from lattice_remote.server.project.job import Job

__all__ = ["Waiting"]

_MIN_RETRY_S = 0.1


class Waiting:
    """The waiters of one project. ``retry`` is called with a job when it is to be tried again."""

    def __init__(self, retry: Callable[[Job], None]) -> None:
        self._retry = retry
        self._lines: dict[str, dict[Job, asyncio.TimerHandle | None]] = {}  # None: it is being tried again

    def add(self, job: Job, done: Done, *, ahead: list[str]) -> None:
        """Let a job wait for the resource that ``done.waiting_for`` names; it was tried behind those of ``ahead``."""
        assert done.waiting_for is not None, "only such an outcome makes a waiter"
        job.resource = done.waiting_for
        job.wait_until = job.submitted_at + done.wait_timeout_s
        delay = job.wait_until - time.monotonic()
        if done.retry_at is not None:
            delay = min(delay, max(done.retry_at - time.time(), _MIN_RETRY_S))
        timer = asyncio.get_running_loop().call_later(max(delay, 0.0), self._wake, job)
        self._lines.setdefault(job.resource, {})[job] = timer
        if job.resource in ahead and job.resource not in self.ahead_of(job):
            self._wake(job)  # who stood before it has left meanwhile, perhaps without taking it

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
        if line:
            self.wake_first(job.resource or "")
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
