"""Request queue of a project: fair turns, the requests with the worker, and waits for resources.

``acquire --wait`` does not occupy the worker. The waiters of a resource are ordered by the time of their first request,
so a client that reconnects keeps its place. The first waiter is retried when a change touches its resource, when a
holder's claim expires, and once more at its own timeout. From its first try to its reply no later waiter takes the
resource, even one that is already with the worker: each request lists the resources with earlier waiters
(``RunCommand.ahead``). Requests without ``--wait`` do not queue and take a free resource, as in plain lattice.

A lattice lock held by another process is awaited the same way, for as long as lattice waits. No event reports its
release, so the first waiter polls with growing delays.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import msgspec

from lattice_remote.protocol.messages import Bye
from lattice_remote.server.ipc import (
    AbandonRequest,
    Edit,
    ImportProject,
    NewEpoch,
    Reconcile,
    RequestDone,
    RunCall,
    RunCommand,
    ToWorker,
    asked_by,
)

__all__ = [
    "FairLock",
    "FairQueue",
    "QueueLimits",
    "QueuedRequest",
    "RequestQueue",
    "Requester",
    "ResourceWaitQueue",
    "refusal_to_join",
]


class Requester(Protocol):
    """Recipient of a reply; no method waits or raises."""

    @property
    def fairness_key(self) -> Hashable:
        """Key of its requests, which keep their order; keys take turns."""

    def answer(self, request_id: str, reply: bytes) -> None: ...

    def end(self, bye: Bye) -> None: ...


class FairQueue[T]:
    """Queue that serves fairness keys in turn; ``None`` is the server's."""

    def __init__(self) -> None:
        self._first: deque[T] = deque()
        self._by_key: dict[Hashable, deque[T]] = {}  # the next key first
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def has(self, fairness_key: Hashable) -> bool:
        return fairness_key in self._by_key

    def add(self, item: T, fairness_key: Hashable) -> None:
        self._by_key.setdefault(fairness_key, deque()).append(item)
        self._length += 1

    def add_first(self, item: T) -> None:
        self._first.appendleft(item)
        self._length += 1

    def next(self) -> T:
        return self._first[0] if self._first else next(iter(self._by_key.values()))[0]

    def pop(self) -> T:
        self._length -= 1
        if self._first:
            return self._first.popleft()
        name, fairness_key = next(iter(self._by_key.items()))
        del self._by_key[name]
        item = fairness_key.popleft()
        if fairness_key:
            self._by_key[name] = fairness_key
        return item

    def remove(self, item: T) -> None:
        for fairness_key in (self._first, *self._by_key.values()):
            if item in fairness_key:
                fairness_key.remove(item)
                self._length -= 1
        for name in [name for name, fairness_key in self._by_key.items() if not fairness_key]:
            del self._by_key[name]

    def clear(self) -> None:
        self._first.clear()
        self._by_key.clear()
        self._length = 0


class FairLock:
    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue()

    @asynccontextmanager
    async def turn(self, fairness_key: Hashable) -> AsyncIterator[None]:
        await self._acquire(fairness_key)
        try:
            yield
        finally:
            self._release()

    async def _acquire(self, fairness_key: Hashable) -> None:
        if not self._is_taken:
            self._is_taken = True
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter, fairness_key)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                self._waiting.remove(waiter)
            else:  # acquired in the tick of the cancellation
                self._release()
            raise

    def _release(self) -> None:
        while self._waiting:
            waiter = self._waiting.pop()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._is_taken = False


@dataclass(slots=True, eq=False)
class QueuedRequest:
    message: ToWorker
    requesters: list[Requester] = field(default_factory=list)
    """A request may be repeated on a new connection."""
    state: Literal["queued", "sent", "waiting"] = "queued"
    """In its turn, with the worker, or for a resource."""
    submitted_at: float = field(default_factory=time.monotonic)
    """First submission, possibly to an earlier server process; monotonic."""
    arrived_at: float = field(default_factory=time.monotonic)
    """In this process; monotonic."""
    on_result: Callable[[Any], None] | None = None
    """Writes the log line (see ``metrics``)."""
    suspect: bool = False
    """Was with a worker that died; runs alone."""
    deaths: int = 0
    """Workers that died of it."""
    resource: str = ""
    lock_tries: int = 0
    lock_until: float = 0.0
    """Deadline of its lock waits; 0 before the first."""
    wait_until: float = 0.0
    """Deadline of the current wait."""
    weight: int = field(init=False)
    """Bytes of its arguments and files, as submitted."""
    fairness_key: Hashable = field(init=False)
    """None for the server's own."""

    def __post_init__(self) -> None:
        self.weight = _weight_of(self.message)
        self.fairness_key = self.requesters[0].fairness_key if self.requesters else None

    @property
    def id(self) -> str:
        return getattr(self.message, "id", "")


_LOCKS = "locks/"
"""No resource name has a slash."""
_MIN_RETRY_S = 0.1
_LOCK_RETRY_S, _MAX_LOCK_RETRY_S = 0.02, 0.25
"""Plain lattice holds a lock for about 10 ms."""


class ResourceWaitQueue:
    def __init__(self, retry: Callable[[QueuedRequest], None]) -> None:
        self._retry = retry
        self._lines: dict[str, dict[QueuedRequest, asyncio.TimerHandle | None]] = {}  # None: being tried

    def add(self, job: QueuedRequest, done: RequestDone, *, ahead: list[str]) -> None:
        """Wait for ``done.waiting_for``; ``ahead`` had earlier waiters at the last try."""
        assert done.waiting_for is not None, "only waiting outcomes are added"
        if job.resource != done.waiting_for:
            self.leave(job)
        job.resource = done.waiting_for
        line = self._lines.setdefault(job.resource, {})
        delay = self._lock_delay(job, done, line) if done.waiting_for.startswith(_LOCKS) else _delay(job, done)
        line[job] = asyncio.get_running_loop().call_later(max(delay, 0.0), self._wake, job)
        if job.resource in ahead and job.resource not in self.ahead_of(job):
            self._wake(job)  # the earlier waiter has left, perhaps without the resource

    def _lock_delay(
        self, job: QueuedRequest, done: RequestDone, line: dict[QueuedRequest, asyncio.TimerHandle | None]
    ) -> float:
        """Return the delay of a lock attempt. Only the first waiter retries before its deadline."""
        job.lock_until = job.lock_until or time.monotonic() + done.wait_timeout_s
        job.wait_until = job.lock_until
        delay = job.wait_until - time.monotonic()
        if any(other is not job and other.submitted_at < job.submitted_at for other in line):
            return delay
        job.lock_tries += 1
        return min(delay, _LOCK_RETRY_S * 1.5**job.lock_tries, _MAX_LOCK_RETRY_S)

    def ahead_of(self, job: QueuedRequest) -> list[str]:
        return [
            resource
            for resource, line in self._lines.items()
            if any(other is not job and other.submitted_at < job.submitted_at for other in line)
        ]

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def touched(self, done: RequestDone) -> None:
        if not self._lines:
            return
        names = {after.path.split("/")[1] for after in done.after if after.path.startswith("resources/")}
        for name in names:
            self.wake_first(name)

    def wake_first(self, resource: str) -> None:
        if line := self._lines.get(resource):
            self._wake(min(line, key=lambda job: job.submitted_at))

    def wake_each_first(self) -> None:
        for resource in tuple(self._lines):
            self.wake_first(resource)

    def leave(self, job: QueuedRequest) -> bool:
        """Remove a waiter and wake the next; return False if it is being tried."""
        line = self._lines.get(job.resource, {})
        if job not in line:
            return False
        timer = line.pop(job)
        if timer is not None:
            timer.cancel()
        if line:  # in the next tick, so that waiters that leave together are not tried
            asyncio.get_running_loop().call_soon(self.wake_first, job.resource)
        else:
            del self._lines[job.resource]
        return timer is not None

    def clear(self) -> None:
        for line in self._lines.values():
            for timer in line.values():
                if timer is not None:
                    timer.cancel()
        self._lines.clear()

    def _wake(self, job: QueuedRequest) -> None:
        line = self._lines.get(job.resource, {})
        if (timer := line.get(job)) is not None:
            timer.cancel()
            line[job] = None
            self._retry(job)


def _delay(job: QueuedRequest, done: RequestDone) -> float:
    job.lock_until, job.lock_tries = 0.0, 0
    job.wait_until = job.submitted_at + done.wait_timeout_s
    delay = job.wait_until - time.monotonic()
    if done.retry_at is not None:
        delay = min(delay, max(done.retry_at - time.time(), _MIN_RETRY_S))
    return delay


@dataclass(frozen=True, slots=True)
class QueueLimits:
    command_s: float = 30.0
    """A command is then undone."""
    upkeep_s: float = 600.0
    """For opening the project, or reading or replacing its whole tree; checks of single files have ``command_s``."""
    window: int = 16
    """Requests with the worker at once. More would only delay the next connection."""
    queued: int = 1024
    """Beyond, connections with a queued request are refused as busy."""
    per_token: int = 512
    """In flight."""
    in_flight_bytes: int = 256 * 1024 * 1024
    """Weight of requests in flight: queued, sent or waiting."""
    in_flight_bytes_per_token: int = 128 * 1024 * 1024
    """The same for one token; the rest is reserved for other tokens."""
    window_bytes: int = 32 * 1024 * 1024
    """Weight of the worker's requests above which it gets no other."""


class RequestQueue:
    """Requests of one project without a reply. ``close()`` it.

    Args:
        ready: called when a waiting request is queued again.
        overdue: called with the oldest request of the worker when it exceeds its time limit.
    """

    def __init__(
        self, limits: QueueLimits, *, ready: Callable[[], None], overdue: Callable[[QueuedRequest], None]
    ) -> None:
        self._limits, self._ready, self._overdue = limits, ready, overdue
        self._by_id: dict[str, QueuedRequest] = {}  # without the server's own
        self.turns: FairQueue[QueuedRequest] = FairQueue()
        self.sent: deque[QueuedRequest] = deque()
        """With the worker, oldest first."""
        self.waiting = ResourceWaitQueue(self._retry)
        self._count: Counter[str] = Counter()  # by token
        self._weight: Counter[str] = Counter()  # by token
        self._weight_sent = 0
        self.attempts = 0
        """Requests ever sent that may write."""
        self._oldest_since = 0.0  # when the oldest with the worker became the oldest
        self._timer: asyncio.TimerHandle | None = None

    @property
    def bytes(self) -> int:
        return self._weight.total()

    def get(self, request_id: str) -> QueuedRequest | None:
        return self._by_id.get(request_id)

    def requests(self) -> list[QueuedRequest]:
        return list(self._by_id.values())

    def requesters(self) -> list[Requester]:
        return [requester for request in self._by_id.values() for requester in request.requesters]

    # --- admission ---

    def objection(self, request: QueuedRequest) -> str | None:
        """Return why a client may not add a request."""
        limits, token_id = self._limits, _token_of(request.message)
        busy = "the server has too much to do for this project; try again"
        # A requester with nothing queued is always admitted: others must not lock it out.
        if len(self.turns) >= limits.queued and self.turns.has(request.fairness_key):
            return busy
        if self.bytes + request.weight > limits.in_flight_bytes:
            return busy
        if self._count[token_id] >= limits.per_token:
            return f"{limits.per_token} requests of this token are in flight"
        if self._weight[token_id] + request.weight > limits.in_flight_bytes_per_token:
            return f"requests of {limits.in_flight_bytes_per_token >> 20} MiB of this token are in flight; try again"
        return None

    def add(self, request: QueuedRequest) -> None:
        if request.id:
            token_id = _token_of(request.message)
            self._by_id[request.id] = request
            self._count[token_id] += 1
            self._weight[token_id] += request.weight
        self.turns.add(request, request.fairness_key)

    def take(self) -> list[ToWorker]:
        batch: list[ToWorker] = []
        while self.turns and self._has_room(self.turns.next()):
            request = self.turns.pop()
            if isinstance(request.message, RunCommand | RunCall):
                ahead = self.waiting.ahead_of(request)
                if ahead != request.message.ahead:
                    request.message = msgspec.structs.replace(request.message, ahead=ahead)
            self._send(request)
            batch.append(request.message)
        return batch

    def _has_room(self, request: QueuedRequest) -> bool:
        first = self.sent[0] if self.sent else request
        most = 1 if first.suspect else self._limits.window
        return len(self.sent) < most and self._weight_sent < self._limits.window_bytes

    def _send(self, request: QueuedRequest) -> None:
        if not self.sent:
            self._oldest_since = time.monotonic()
        request.state = "sent"
        self.sent.append(request)
        self._weight_sent += request.weight
        self.attempts += not isinstance(request.message, Reconcile)  # a check writes nothing
        self._watch()

    def settle(self) -> QueuedRequest:
        """Remove and return the worker's oldest request."""
        request = self.sent.popleft()
        self._weight_sent -= request.weight
        request.suspect, request.deaths = False, 0
        self._oldest_since = time.monotonic()
        return request

    def wait(self, request: QueuedRequest, done: RequestDone) -> None:
        assert isinstance(request.message, RunCommand | RunCall), "only commands and calls wait"
        request.state = "waiting"
        self.waiting.add(request, done, ahead=request.message.ahead)

    def worker_ended(self) -> list[QueuedRequest]:
        """Queue the worker's requests again, first and in order, as suspects; return them. Drops checks."""
        unanswered = [request for request in self.sent if not isinstance(request.message, Reconcile)]
        self.sent.clear()
        self._weight_sent = 0
        for request in reversed(unanswered):
            request.state, request.suspect = "queued", True
            self.turns.add_first(request)
        return unanswered

    def drop(self, request: QueuedRequest) -> None:
        self.waiting.leave(request)
        if self._by_id.pop(request.id, None) is not None:
            token_id = _token_of(request.message)
            self._count[token_id] -= 1
            self._weight[token_id] -= request.weight

    def withdraw(self, request: QueuedRequest) -> bool:
        """Forget a request without effect; return False if the worker has it."""
        if request.state == "sent":
            return False
        if request.state == "queued":
            self.turns.remove(request)
        self.drop(request)
        return True

    def clear(self) -> None:
        self.waiting.clear()
        self.turns.clear()
        self._by_id.clear()
        self._count.clear()
        self._weight.clear()

    def unanswered(self) -> list[QueuedRequest]:
        """Return every client's request, in the order of arrival."""
        return list(self._by_id.values())

    def reset(self) -> None:
        """Forget everything, also the worker's: it does not answer any more."""
        self.clear()
        self.sent.clear()
        self._weight_sent = 0

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _retry(self, request: QueuedRequest) -> None:
        is_over = time.monotonic() >= request.wait_until
        if request.lock_until:
            request.message = msgspec.structs.replace(request.message, may_wait=not is_over)
        elif isinstance(request.message, RunCommand):
            request.message = msgspec.structs.replace(request.message, last_try=is_over, may_wait=True)
        request.state = "queued"
        self.turns.add(request, request.fairness_key)
        self._ready()

    def _watch(self) -> None:
        if self._timer is None:
            # Not later than a command's time limit: the next request may be one, and this timer serves it too.
            delay = min(self._time_left(), self._limits.command_s)
            self._timer = asyncio.get_running_loop().call_later(delay, self._check_deadline)

    def _time_left(self) -> float:
        message = self.sent[0].message
        reads_all = isinstance(message, NewEpoch | ImportProject) or (
            isinstance(message, Reconcile) and message.paths is None
        )
        limit = self._limits.upkeep_s if reads_all else self._limits.command_s
        return self._oldest_since + limit - time.monotonic()

    def _check_deadline(self) -> None:
        self._timer = None
        if not self.sent:
            return
        if self._time_left() > 0:
            self._watch()
        else:
            self._overdue(self.sent[0])


def refusal_to_join(job: QueuedRequest, message: RunCommand | RunCall | Edit | ImportProject) -> tuple[str, str] | None:
    """Return code and reason why a request may not join the running one with its id (I6)."""
    running = job.message
    assert isinstance(running, RunCommand | RunCall | Edit | ImportProject | AbandonRequest), "others have no id"
    if running.token_id != message.token_id:
        return "REMOTE_FORBIDDEN", "this request id belongs to another token"
    if _differs(running, message):
        return "REMOTE_INVALID", "a different request with this id or key is in flight: use a new one"
    return None


def _differs(running: ToWorker, message: ToWorker) -> bool:
    """Return whether two requests with one id differ; an abandoned request matches any."""
    if not isinstance(running, RunCommand | RunCall | Edit | ImportProject) or not isinstance(message, type(running)):
        return not isinstance(running, AbandonRequest)
    if (
        running.fingerprint
        or message.fingerprint
        or isinstance(running, ImportProject)
        or isinstance(message, ImportProject)
    ):
        return running.fingerprint != message.fingerprint
    return asked_by(running) != asked_by(message)


def _token_of(message: ToWorker) -> str:
    assert isinstance(message, RunCommand | RunCall | Edit | ImportProject | AbandonRequest), "others are the server's"
    return message.token_id


def _weight_of(message: ToWorker) -> int:
    match message:
        case Edit():
            return len(message.text) + len(message.base or b"")
        case RunCommand() | RunCall():
            said = len(message.payload) if isinstance(message, RunCall) else sum(map(len, message.argv))
            return said + sum(len(file.data or b"") for file in message.files)
    return 0
