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
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from lattice_remote.server.ipc import (
    Edit,
    ImportProject,
    NewEpoch,
    Reconcile,
    RequestDone,
    RunCall,
    RunCommand,
    Stop,
    ToWorker,
)
from lattice_remote.server.project.history import Subscriber

__all__ = [
    "FairLock",
    "FairQueue",
    "InFlightRequests",
    "QueueLimits",
    "QueuedRequest",
    "ResourceWaitQueue",
    "WorkerWindow",
    "weight_of",
]


class FairQueue[T]:
    """A queue of lanes, such as one for each connection or token. ``None`` is the lane of the server's own items."""

    def __init__(self) -> None:
        self._first: deque[T] = deque()
        self._lanes: dict[Hashable, deque[T]] = {}  # whose turn it is comes first
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def has(self, lane: Hashable) -> bool:
        """Tell whether an item of this lane waits here."""
        return lane in self._lanes

    def add(self, item: T, lane: Hashable) -> None:
        """Add an item behind the others of its lane."""
        self._lanes.setdefault(lane, deque()).append(item)
        self._length += 1

    def add_first(self, item: T) -> None:
        """Add an item before all others: it was taken before."""
        self._first.appendleft(item)
        self._length += 1

    def next(self) -> T:
        """Return the item that ``pop`` would take; there must be one."""
        return self._first[0] if self._first else next(iter(self._lanes.values()))[0]

    def pop(self) -> T:
        """Take the next item; there must be one. Then it is the next lane's turn."""
        self._length -= 1
        if self._first:
            return self._first.popleft()
        name, lane = next(iter(self._lanes.items()))
        del self._lanes[name]
        item = lane.popleft()
        if lane:
            self._lanes[name] = lane
        return item

    def remove(self, item: T) -> None:
        """Take an item out that is no longer wanted. Nothing happens when it is not here."""
        for lane in (self._first, *self._lanes.values()):
            if item in lane:
                lane.remove(item)
                self._length -= 1
        for name in [name for name, lane in self._lanes.items() if not lane]:
            del self._lanes[name]

    def clear(self) -> None:
        """Forget all."""
        self._first.clear()
        self._lanes.clear()
        self._length = 0


class FairLock:
    """A lock that lanes take in turn. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue()

    @asynccontextmanager
    async def turn(self, lane: Hashable) -> AsyncIterator[None]:
        """Hold the lock, once it is this lane's turn."""
        await self._acquire(lane)
        try:
            yield
        finally:
            self._release()

    async def _acquire(self, lane: Hashable) -> None:
        if not self._is_taken:
            self._is_taken = True
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter, lane)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                self._waiting.remove(waiter)
            else:  # its turn came in the same tick
                self._release()
            raise

    def _release(self) -> None:
        """Give the lock to the next lane; a waiter that was cancelled in this tick is not the next."""
        while self._waiting:
            waiter = self._waiting.pop()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._is_taken = False


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """One request on its way through the queue, the worker, and perhaps the waiting for a resource."""

    message: ToWorker
    askers: list[Subscriber] = field(default_factory=list)
    """Who wants the answer; the same request may be asked again on a new connection."""
    submitted_at: float = field(default_factory=time.monotonic)
    """When it was first asked for, by the monotonic clock: perhaps of a server before this one."""
    arrived_at: float = field(default_factory=time.monotonic)
    """When it came here."""
    told: Callable[[Any], None] | None = None
    """Is told what came of it, and writes the line in the log; see ``accounts.py``."""
    weight: int = 0
    """Bytes of its arguments and of the files that it carries."""
    suspect: bool = False
    """Was with a worker that died; is sent alone until it is known which request was to blame."""
    deaths: int = 0
    """Workers that certainly died of it."""
    resource: str | None = None
    """What it waited for last."""
    lock_tries: int = 0
    """How often it has found a lock held by another process."""
    lock_until: float = 0.0
    """When it waits for no lock any more, by the monotonic clock; 0 before its first wait for one."""
    wait_until: float = 0.0
    """When that waiting is over, by the monotonic clock."""

    @property
    def lane(self) -> Hashable:
        """That of the request which was first; None for the server's own."""
        return self.askers[0].lane if self.askers else None


_LOCKS = "locks/"
"""Starts the name of a lock; no resource has a slash in its name."""
_MIN_RETRY_S = 0.1
_LOCK_RETRY_S, _MAX_LOCK_RETRY_S = 0.02, 0.25
"""Plain lattice holds a lock for some 10 ms."""


class ResourceWaitQueue:
    """The waiters of one project. ``retry`` is called with a job when it is to be tried again."""

    def __init__(self, retry: Callable[[QueuedRequest], None]) -> None:
        self._retry = retry
        self._lines: dict[str, dict[QueuedRequest, asyncio.TimerHandle | None]] = {}  # None: it is being tried again

    def add(self, job: QueuedRequest, done: RequestDone, *, ahead: list[str]) -> None:
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

    def _lock_delay(
        self, job: QueuedRequest, done: RequestDone, line: dict[QueuedRequest, asyncio.TimerHandle | None]
    ) -> float:
        """Return when a job tries again to get a lock, in seconds: before its time is over only the first in line."""
        job.lock_until = job.lock_until or time.monotonic() + done.wait_timeout_s
        job.wait_until = job.lock_until
        delay = job.wait_until - time.monotonic()
        if any(other is not job and other.submitted_at < job.submitted_at for other in line):
            return delay
        job.lock_tries += 1
        return min(delay, _LOCK_RETRY_S * 1.5**job.lock_tries, _MAX_LOCK_RETRY_S)

    def ahead_of(self, job: QueuedRequest) -> list[str]:
        """Return the resources for which somebody has waited for longer than this job."""
        return [
            resource
            for resource, line in self._lines.items()
            if any(other is not job and other.submitted_at < job.submitted_at for other in line)
        ]

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def touched(self, done: RequestDone) -> None:
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

    def leave(self, job: QueuedRequest) -> bool:
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

    def _wake(self, job: QueuedRequest) -> None:
        line = self._lines.get(job.resource or "", {})
        if (timer := line.get(job)) is not None:
            timer.cancel()
            line[job] = None
            self._retry(job)


def _delay(job: QueuedRequest, done: RequestDone) -> float:
    """Return when a job tries again to get a resource if nothing happens to that before, in seconds."""
    job.lock_until, job.lock_tries = 0.0, 0
    job.wait_until = job.submitted_at + done.wait_timeout_s
    delay = job.wait_until - time.monotonic()
    if done.retry_at is not None:
        delay = min(delay, max(done.retry_at - time.time(), _MIN_RETRY_S))
    return delay


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds of a project's queue and its worker."""

    command_s: float = 30.0
    """A command that takes longer is ended and undone."""
    upkeep_s: float = 600.0
    """How long opening the project, or reading all of its tree, may take; a look at some files is a command's."""
    window: int = 16
    """Requests that the worker may hold at once: enough for it to work on while others are fsynced; more would only
    make the next connection's wait longer."""
    queued: int = 1024
    """Requests that may wait; more are refused as busy, of connections that have one waiting already."""
    per_token: int = 512
    """Requests of one token that may be queued, with the worker, or waiting for a resource."""
    held_bytes: int = 256 * 1024 * 1024
    """What all requests may weigh together that are queued, with the worker, or waiting for a resource."""
    held_bytes_per_token: int = 128 * 1024 * 1024
    """The same for those of one token: the rest is for others, who would be told that the server is busy."""
    window_bytes: int = 32 * 1024 * 1024
    """The worker gets no more requests while those that it holds weigh this much."""


class InFlightRequests:
    """Jobs by request id, with what they weigh together and for each token."""

    def __init__(self, bounds: QueueLimits) -> None:
        self._bounds = bounds
        self._jobs: dict[str, QueuedRequest] = {}
        self._count: Counter[str] = Counter()  # by token
        self._weight: Counter[str] = Counter()  # by token
        self.bytes = 0
        """What all of them weigh."""

    def get(self, request_id: str) -> QueuedRequest | None:
        """Return the job of a request, None when it is not under way."""
        return self._jobs.get(request_id)

    def objection(self, token_id: str, weight: int) -> str | None:
        """Return why a token may not have one more request of this weight under way, None when it may."""
        bounds = self._bounds
        if self.bytes + weight > bounds.held_bytes:
            return "the server has too much to do for this project; try again"
        if self._count[token_id] >= bounds.per_token:
            return f"{bounds.per_token} requests of this token are under way"
        if self._weight[token_id] + weight > bounds.held_bytes_per_token:
            return f"requests of {bounds.held_bytes_per_token >> 20} MiB of this token are under way; try again"
        return None

    def add(self, request_id: str, token_id: str, job: QueuedRequest) -> None:
        """Take a job on."""
        self._jobs[request_id] = job
        self._count[token_id] += 1
        self._weight[token_id] += job.weight
        self.bytes += job.weight

    def drop(self, request_id: str) -> None:
        """A request is answered, or nobody asks for it any more. Idempotent."""
        if (job := self._jobs.pop(request_id, None)) is None:
            return
        assert not isinstance(job.message, Reconcile | NewEpoch | Stop), "these have no request id"
        self._count[job.message.token_id] -= 1
        self._weight[job.message.token_id] -= job.weight
        self.bytes -= job.weight

    def clear(self) -> None:
        """Forget all."""
        self._jobs.clear()
        self._count.clear()
        self._weight.clear()
        self.bytes = 0


def weight_of(message: RunCommand | RunCall | Edit | ImportProject) -> int:
    """Return what a request weighs: the bytes of its arguments, and of the files that it carries."""
    if isinstance(message, ImportProject):
        return 0
    if isinstance(message, Edit):
        return len(message.text) + len(message.base or b"")
    said = len(message.payload) if isinstance(message, RunCall) else sum(map(len, message.argv))
    return said + sum(len(file.data or b"") for file in message.files)


class WorkerWindow:
    """Belongs to the event loop's thread; ``close()`` it.

    Args:
        bounds: how many it may have, and how long each may take.
        overdue: is called with the oldest when the worker has had it for too long.
    """

    def __init__(self, bounds: QueueLimits, overdue: Callable[[QueuedRequest], None]) -> None:
        self._bounds = bounds
        self._overdue = overdue
        self._jobs: deque[QueuedRequest] = deque()
        self._weight = 0
        self.attempts = 0
        """How many a worker was ever sent that may write, also where nothing came of it."""
        self._oldest_since = 0.0  # since when the first of them has been the first
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[QueuedRequest]:
        return iter(self._jobs)

    @property
    def oldest(self) -> QueuedRequest:
        """The one that is answered next. There must be one."""
        return self._jobs[0]

    def takes(self, job: QueuedRequest) -> bool:
        """Tell whether the worker may have this one too."""
        first = self._jobs[0] if self._jobs else job
        most = 1 if first.suspect else self._bounds.window
        return len(self._jobs) < most and self._weight < self._bounds.window_bytes

    def add(self, job: QueuedRequest) -> None:
        """The worker is sent this one."""
        if not self._jobs:
            self._oldest_since = time.monotonic()
        self._jobs.append(job)
        self._weight += job.weight
        self.attempts += not isinstance(job.message, Reconcile)  # which only looks
        self._watch()

    def settle(self) -> QueuedRequest:
        """The worker has answered the oldest, which is nobody's suspect any more; return it."""
        job = self._jobs.popleft()
        self._weight -= job.weight
        job.suspect, job.deaths = False, 0
        self._oldest_since = time.monotonic()
        return job

    def clear(self) -> list[QueuedRequest]:
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
