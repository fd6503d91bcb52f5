"""Requests that wait for a resource: who is woken when, so that ``acquire --wait`` holds no writer.

A waiter tries again when a change touches its resource, first come first served, when a holder's claim expires,
and a last time when its own time is over. One waiter is woken at a time: if it gets the resource, that is itself
a change, which wakes the next.
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
        self._by_resource: dict[str, dict[Job, asyncio.TimerHandle]] = {}

    def add(self, job: Job, done: Done) -> None:
        """Let a job wait for the resource that ``done.waiting_for`` names."""
        assert done.waiting_for is not None, "only such an outcome makes a waiter"
        job.resource = done.waiting_for
        job.wait_until = job.submitted_at + done.wait_timeout_s
        delay = job.wait_until - time.monotonic()
        if done.retry_at is not None:
            delay = min(delay, max(done.retry_at - time.time(), _MIN_RETRY_S))
        timer = asyncio.get_running_loop().call_later(max(delay, 0.0), self._wake, job)
        self._by_resource.setdefault(job.resource, {})[job] = timer

    def touched(self, done: Done) -> None:
        """Wake the first waiter of each resource whose files a change has touched."""
        if not self._by_resource:
            return
        names = {after.path.split("/")[1] for after in done.after if after.path.startswith("resources/")}
        for name in names:
            self.wake_first(name)

    def wake_first(self, resource: str) -> None:
        """Let the waiter that came first try again, if there is one."""
        if waiters := self._by_resource.get(resource):
            self._wake(min(waiters, key=lambda job: job.submitted_at))

    def wake_each_first(self) -> None:
        """Let the first waiter of every resource try again."""
        for resource in tuple(self._by_resource):
            self.wake_first(resource)

    def remove(self, job: Job) -> bool:
        """Forget a waiter; return whether it was one."""
        waiters = self._by_resource.get(job.resource or "", {})
        timer = waiters.pop(job, None)
        if timer is None:
            return False
        timer.cancel()
        if not waiters:
            del self._by_resource[job.resource or ""]
        return True

    def clear(self) -> None:
        """Forget all."""
        for waiters in self._by_resource.values():
            for timer in waiters.values():
                timer.cancel()
        self._by_resource.clear()

    def _wake(self, job: Job) -> None:
        if self.remove(job):
            self._retry(job)
