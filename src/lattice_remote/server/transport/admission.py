"""Admission control: connection and request limits per address and per token, and the memory of unread responses.

Each connection has a ``ConnectionQuota`` from its acceptance, before TLS, until it is closed. Beyond a limit of
unauthenticated connections, the address with the most loses its oldest, so a flood does not exclude clients that show a
token at once. A request with a valid token counts for the token, any other for its address: agents that share an
address do not affect each other, and a token gains nothing from many addresses.

A response's body is counted from its creation to the end of its response, once for all responses that share it (I10).
A request waits for room before a large body is made, so a token holds at most ``answer_bytes_per_token`` and one
response of each of its projects.

State is bounded. Nothing here does I/O, and only requests for room wait.
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from math import ceil

from lattice_remote.errors import Misuse, Rejected
from lattice_remote.protocol.messages import FIRST_FRAME_BYTES
from lattice_remote.server.config import LimitSettings
from lattice_remote.server.transport.api_error import ApiError

__all__ = [
    "COUNTED_BYTES",
    "MAX_ADDRESSES",
    "AdmissionControl",
    "ConnectionQuota",
    "Proxies",
    "ResponseBudget",
    "ResponseShare",
    "TokenBucket",
    "UnauthenticatedConnections",
    "counted_as",
    "is_loopback",
]


class UnauthenticatedConnections[T: Hashable]:
    def __init__(self) -> None:
        self._address_of: dict[T, str] = {}
        self._at: dict[str, dict[T, None]] = {}  # by address, the oldest first
        self._with: list[dict[str, None]] = []  # [n]: addresses that have n; the last is not empty

    def __len__(self) -> int:
        return len(self._address_of)

    def at(self, address: str) -> int:
        return len(self._at.get(address, ()))

    def oldest_at(self, address: str) -> T:
        return next(iter(self._at[address]))

    def put(self, connection: T, address: str) -> None:
        self.remove(connection)
        self._address_of[connection] = address
        self._at.setdefault(address, {})[connection] = None
        self._recount(address, self.at(address) - 1)

    def remove(self, connection: T) -> None:
        address = self._address_of.pop(connection, None)
        if address is not None:
            del self._at[address][connection]
            self._recount(address, self.at(address) + 1)
            if not self._at[address]:
                del self._at[address]

    def next_to_cut(self) -> T:
        return next(iter(self._at[next(iter(self._with[-1]))]))

    def _recount(self, address: str, before: int) -> None:
        count = self.at(address)
        if before:
            del self._with[before][address]
        if count:
            self._with += [{} for _ in range(len(self._with), count + 1)]
            self._with[count][address] = None
        while self._with and not self._with[-1]:
            self._with.pop()


class TokenBucket:
    """``burst`` at once, then ``rate`` per second."""

    __slots__ = ("_at", "_left")

    def __init__(self, burst: float, now: float) -> None:
        self._left = burst
        self._at = now

    def take(self, now: float, *, rate: float, burst: float) -> float:
        self._left = min(burst, self._left + (now - self._at) * rate)
        self._at = now
        if self._left < 1.0:
            return (1.0 - self._left) / rate
        self._left -= 1.0
        return 0.0


def counted_as(host: str) -> str:
    """Return an address, or the /64 of an IPv6 address, usually one customer."""
    address = _parsed(host)
    if isinstance(address, IPv6Address):
        return str(ip_network((address, 64), strict=False))
    return str(address or host)


def is_loopback(host: str) -> bool:
    address = _parsed(host)
    return address is not None and address.is_loopback


class Proxies:
    """Trusted proxies, by addresses and networks. Raises Misuse."""

    def __init__(self, trusted: Sequence[str]) -> None:
        try:
            self._networks = [ip_network(text, strict=False) for text in trusted]
        except ValueError as error:
            raise Misuse(f"bad address of a trusted proxy: {error}; name it like 10.0.0.7 or 10.0.0.0/8") from error

    def __contains__(self, host: str) -> bool:
        address = _parsed(host) if self._networks else None
        return address is not None and any(address in network for network in self._networks)

    def origin(self, host: str, forwarded_for: Sequence[str]) -> str:
        """Return the last hop that is not a trusted proxy, else ``host``. The client wrote the hops before it."""
        at = host
        for hop in reversed(",".join(forwarded_for).split(",")):
            address = _parsed(_without_port(hop.strip()))
            if address is None:
                break
            at = str(address)
            if at not in self:
                break
        return at


def _parsed(host: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _without_port(hop: str) -> str:
    if hop.startswith("["):
        return hop[1:].partition("]")[0]
    return hop.partition(":")[0] if hop.count(":") == 1 else hop


MAX_ADDRESSES = 10_000
"""Without a connection."""
_BURST_S = 10
"""Of new connections."""
_TOKEN_BURST_S = 4
"""Of requests with one token."""
_PATIENCE_S = 1.0
"""Age at which an unauthenticated connection may be closed for the next of its address. A token comes with the first
packet; a shorter time would cut TLS handshakes when hundreds of agents reconnect together.
"""
_LOG_EVERY_S = 10.0
_FROM_ADDRESS = " from your address"

_log = logging.getLogger(__name__)


class _Address:
    __slots__ = ("admitted", "arrivals", "connections", "failures", "name")

    def __init__(self, name: str, limits: LimitSettings, now: float) -> None:
        self.name = name
        self.connections = 0
        self.admitted = 0  # with a valid token
        self.arrivals = TokenBucket(limits.new_connections_per_second * _BURST_S, now)
        self.failures = TokenBucket(limits.failed_logins_per_minute, now)


class ConnectionQuota:
    def __init__(self, admission: "AdmissionControl", host: str) -> None:
        self.cut: Callable[[], object] = lambda: None
        """Set by its owner."""
        self._admission = admission
        self._host = host
        self.since = admission.clock()
        """By ``AdmissionControl.clock``."""
        self._origin: _Address | None = None  # behind a proxy known once a request has come
        self._refusal: ApiError | None = None
        self._requests = 0
        self._token_id = ""
        self._held = 0
        self._gone = False

    @property
    def limits(self) -> LimitSettings:
        return self._admission.limits

    @property
    def address(self) -> str:
        return self._host if self._origin is None else self._origin.name

    @property
    def from_proxy(self) -> bool:
        return self._host in self._admission.proxies

    def enter(self, forwarded_for: Sequence[str], token_id: str = "") -> ApiError | None:
        """Count a request's head; return the refusal, if any.

        Args:
            forwarded_for: used only from a trusted proxy.
            token_id: of this request's valid token. Earlier ones do not count: a proxy sends many people's requests.
        """
        proxies = self._admission.proxies
        if self._host in proxies and not self._gone:
            name = counted_as(proxies.origin(self._host, forwarded_for))
            if self._origin is None or self._origin.name != name:
                self._leave_origin()
                self.count_at(self._admission.known(name), is_new=not token_id)
                self._requests = 0
        self._requests += 1
        if token_id:  # other connections of its address
            return self._admission.check_rate_of_token(token_id, self.address)
        # The first request was counted with its connection.
        if self._refusal is None and self._requests > 1 and self._origin is not None:
            self._refusal = self._admission.check_rate_of_address(self._origin)
        if self._refusal is not None:  # only now: a request with a valid token is not refused
            self.log(self._refusal.message.partition(_FROM_ADDRESS)[0])
        return self._refusal

    def count_at(self, origin: _Address, *, is_new: bool = True) -> None:
        """Count it for an address; ``enter()`` refuses it if needed."""
        self._origin = origin
        origin.connections += 1
        origin.admitted += bool(self._token_id)
        if not self._token_id:
            self._admission.unauthenticated.put(self, origin.name)
        self._refusal = self._admission.check_arrival(origin, is_new=is_new)

    def log(self, reason: str) -> None:
        self._admission.log(reason, self.address)

    def log_cut(self, reason: str) -> None:  # noqa: ARG002 - the figures in it differ each time
        self._admission.log("cut: the client does not read", self.address)

    def failed(self) -> ApiError | None:
        return self._admission.count_failed_login(self._admission.known(self.address))

    def admit(self, token_id: str) -> ApiError | None:
        """Count the connection for this token, no longer as unauthenticated; or return the refusal."""
        if token_id == self._token_id:
            return None
        if self._gone:  # closed while its request was checked: no later call would uncount it
            return _too_many("this connection is closed", 1)
        if (
            self._origin is not None
            and not self._token_id
            and (refusal := self._admission.check_admitted(self._origin))
        ):
            return refusal
        refusal = self._admission.count_token(token_id, self.address)
        if refusal is None:
            self._admission.unauthenticated.remove(self)
            if self._token_id:
                self._admission.uncount_token(self._token_id)
            elif self._origin is not None:
                self._origin.admitted += 1
            self._token_id = token_id
        return refusal

    def holds(self, size: int) -> bool:
        """Count the bytes of an unfinished message; return False over the token's limit. Small messages pass."""
        held = self._admission.held_by_token
        if self._token_id and not self._gone:
            held[self._token_id] += size - self._held
            self._held = size
        return size <= FIRST_FRAME_BYTES or held[self._token_id] <= self.limits.unfinished_bytes_per_token

    def leave(self) -> None:
        """Uncount the closed connection. Idempotent."""
        if not self._gone:
            self.holds(0)
            self._gone = True
            self._leave_origin()
            self._admission.unauthenticated.remove(self)
            if self._token_id:
                self._admission.uncount_token(self._token_id)

    def _leave_origin(self) -> None:
        if self._origin is not None:
            self._origin.connections -= 1
            self._origin.admitted -= bool(self._token_id)
            self._origin = None


class AdmissionControl:
    """Admission of all connections and addresses. Raises Misuse for a bad proxy."""

    def __init__(
        self, limits: LimitSettings, trusted_proxies: Sequence[str] = (), *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = limits
        self.proxies = Proxies(trusted_proxies)
        self.clock = clock
        self._addresses: OrderedDict[str, _Address] = OrderedDict()  # most recently seen last
        self.unauthenticated: UnauthenticatedConnections[ConnectionQuota] = UnauthenticatedConnections()
        self._by_token: Counter[str] = Counter()
        self.held_by_token: Counter[str] = Counter()
        """Of unfinished messages."""
        self._requests_of: dict[str, TokenBucket] = {}  # bounded by the number of tokens
        self._logged: dict[str, tuple[float, int]] = {}  # by reason: last line, omitted since

    def arrive(self, host: str) -> ConnectionQuota | None:
        """Count a new connection; None if its address has no room for another unauthenticated one."""
        quota = ConnectionQuota(self, host)
        if host in self.proxies:
            self.unauthenticated.put(quota, host)
        else:
            origin = self.known(counted_as(host))
            if self.unauthenticated.at(origin.name) >= self.limits.waiting_connections_per_address:
                oldest = self.unauthenticated.oldest_at(origin.name)
                if quota.since - oldest.since < _PATIENCE_S:
                    self.log("too many connections without a token", origin.name)
                    return None
                self._cut(oldest)
            quota.count_at(origin)
        if len(self.unauthenticated) > self.limits.waiting_connections:
            self._cut(self.unauthenticated.next_to_cut())
        return quota

    def _cut(self, leaving: ConnectionQuota) -> None:
        self.log("cut, to make room for connections without a token", leaving.address)
        leaving.leave()
        leaving.cut()

    def log(self, reason: str, address: str) -> None:
        """Log a refusal at a limited rate per reason."""
        now = self.clock()
        at, silent = self._logged.get(reason, (float("-inf"), 0))
        if now - at < _LOG_EVERY_S:
            self._logged[reason] = at, silent + 1
        else:
            _log.warning("%s: %s%s", address, reason, f" (and {silent} more since the last time)" if silent else "")
            self._logged[reason] = now, 0

    def known(self, name: str) -> _Address:
        known = self._addresses.get(name)
        if known is None:
            known = self._addresses[name] = _Address(name, self.limits, self.clock())
            if len(self._addresses) > MAX_ADDRESSES:
                self._forget_one()
        self._addresses.move_to_end(name)
        return known

    def _forget_one(self) -> None:
        for _ in range(100):
            name, oldest = self._addresses.popitem(last=False)
            if not oldest.connections:
                return
            self._addresses[name] = oldest

    def check_arrival(self, origin: _Address, *, is_new: bool) -> ApiError | None:
        if is_new and (refusal := self.check_rate_of_address(origin)) is not None:
            return refusal
        if self.unauthenticated.at(origin.name) > self.limits.waiting_connections_per_address:
            return _too_many(f"too many connections without a token{_FROM_ADDRESS}", 1)
        return None

    def check_admitted(self, origin: _Address) -> ApiError | None:
        most = self.limits.connections_per_address
        if origin.admitted < most:
            return None
        self.log("too many connections", origin.name)
        return _too_many(f"your address has {most} connections already", 10)

    def check_rate_of_address(self, origin: _Address) -> ApiError | None:
        rate = self.limits.new_connections_per_second
        wait_s = origin.arrivals.take(self.clock(), rate=rate, burst=rate * _BURST_S)
        return _too_many(f"too many new connections or requests{_FROM_ADDRESS}", wait_s) if wait_s else None

    def check_rate_of_token(self, token_id: str, address: str) -> ApiError | None:
        rate, now = self.limits.messages_per_second, self.clock()
        requests = self._requests_of.setdefault(token_id, TokenBucket(rate * _TOKEN_BURST_S, now))
        wait_s = requests.take(now, rate=rate, burst=rate * _TOKEN_BURST_S)
        if not wait_s:
            return None
        self.log(f"too many requests with {token_id}", address)
        return _too_many(f"too many requests with token {token_id}", wait_s)

    def count_failed_login(self, origin: _Address) -> ApiError | None:
        per_minute = self.limits.failed_logins_per_minute
        wait_s = origin.failures.take(self.clock(), rate=per_minute / 60, burst=per_minute)
        self.log("no valid token", origin.name)
        return _too_many("too many requests without a valid token from your address", wait_s) if wait_s else None

    def count_token(self, token_id: str, address: str) -> ApiError | None:
        most = self.limits.connections_per_token
        if self._by_token[token_id] >= most:
            self.log(f"too many connections with {token_id}", address)
            return _too_many(f"token {token_id} has {most} connections already", 10)
        self._by_token[token_id] += 1
        return None

    def uncount_token(self, token_id: str) -> None:
        self._by_token[token_id] -= 1
        if not self._by_token[token_id]:
            del self._by_token[token_id], self.held_by_token[token_id]


def _too_many(why: str, wait_s: float) -> ApiError:
    return ApiError(HTTPStatus.TOO_MANY_REQUESTS, "REMOTE_BUSY", f"{why}; come back later", max(1, ceil(wait_s)))


COUNTED_BYTES = 64 * 1024
"""Larger bodies are counted, and sent in such pieces."""
_WAIT_S = 30.0
"""Three times the limit of a client that does not read."""


class _Bodies:
    """Bodies in memory, each counted once. A counted body is referenced, so no other has its ``id()``."""

    def __init__(self) -> None:
        self.bytes = 0
        self._uses: dict[int, tuple[bytes, int]] = {}

    def has(self, body: bytes) -> bool:
        return id(body) in self._uses

    def add(self, body: bytes) -> None:
        _, uses = self._uses.get(id(body), (body, 0))
        self._uses[id(body)] = body, uses + 1
        if not uses:
            self.bytes += len(body)

    def remove(self, body: bytes) -> None:
        _, uses = self._uses.pop(id(body))
        if uses > 1:
            self._uses[id(body)] = body, uses - 1
        else:
            self.bytes -= len(body)


@asynccontextmanager
async def _in_time() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(_WAIT_S):
            yield
    except TimeoutError:
        why = "responses to this token are unread: read them, then try again"
        raise Rejected(why, code="REMOTE_BUSY") from None


class ResponseBudget:
    def __init__(self, limits: LimitSettings) -> None:
        self._limits = limits
        self._all = _Bodies()
        self._of: dict[str, _Bodies] = {}
        self._waiting: defaultdict[str, list[asyncio.Future[None]]] = defaultdict(list)  # by token
        self._making: dict[str, asyncio.Lock] = {}  # by token: bounded by the number of tokens

    @property
    def total_bytes(self) -> int:
        return self._all.bytes

    def of(self, token_id: str) -> int:
        return self._of[token_id].bytes if token_id in self._of else 0

    def has_room(self, token_id: str) -> bool:
        """Return whether a token may have one more response; one that holds nothing may."""
        held = self.of(token_id)
        is_below = held < self._limits.answer_bytes_per_token and self.total_bytes < self._limits.answer_bytes
        return not held or is_below

    def has(self, token_id: str, body: bytes) -> bool:
        """Return whether a response of this token holds this very body."""
        return token_id in self._of and self._of[token_id].has(body)

    async def room(self, token_id: str) -> None:
        """Wait until ``has_room``. Raises Rejected (REMOTE_BUSY) after ``_WAIT_S``."""
        async with _in_time():
            while not self.has_room(token_id):
                await self._released(token_id)

    async def _released(self, token_id: str) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[token_id].append(waiter)
        try:
            await waiter
        finally:
            if waiter in (waiting := self._waiting.get(token_id, [])):
                waiting.remove(waiter)

    @asynccontextmanager
    async def alone(self, token_id: str) -> AsyncIterator[None]:
        """Be the only request of its token that makes a response; raises as ``room``."""
        lock = self._making.setdefault(token_id, asyncio.Lock())
        async with _in_time():
            await lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def add(self, token_id: str, body: bytes) -> None:
        self._of.setdefault(token_id, _Bodies()).add(body)
        self._all.add(body)

    def remove(self, token_id: str, body: bytes) -> None:
        self._of[token_id].remove(body)
        self._all.remove(body)
        if not self._of[token_id].bytes:
            del self._of[token_id]
        for waiting in tuple(self._waiting) if self.total_bytes < self._limits.answer_bytes else (token_id,):
            for waiter in self._waiting.pop(waiting, ()):
                if not waiter.done():
                    waiter.set_result(None)


class ResponseShare:
    """Share of one response; ``close()`` it."""

    def __init__(self, budget: ResponseBudget) -> None:
        self._budget = budget
        self._bodies: list[bytes] = []
        self.token_id = ""
        """Once known; responses without one are small."""

    @property
    def has_room(self) -> bool:
        """Whether a body may be made now; later parts always may."""
        return bool(self._bodies) or self._budget.has_room(self.token_id)

    async def room(self) -> None:
        if not self.has_room:
            await self._budget.room(self.token_id)

    @asynccontextmanager
    async def making(self) -> AsyncIterator[None]:
        """Make a body of unknown size, alone of its token; ``hold`` it before the end."""
        async with self._budget.alone(self.token_id):
            await self.room()
            yield

    def may_hold(self, body: bytes) -> bool:
        """Return whether the response may share this body in memory."""
        return len(body) <= COUNTED_BYTES or self.has_room or self._budget.has(self.token_id, body)

    def hold(self, body: bytes) -> None:
        if len(body) > COUNTED_BYTES and self.token_id and not any(body is held for held in self._bodies):
            self._bodies.append(body)
            self._budget.add(self.token_id, body)

    def hold_if_room(self, body: bytes) -> bool:
        """Count a body made without waiting; return False if there is no room."""
        has_room = len(body) <= COUNTED_BYTES or self.has_room
        if has_room:
            self.hold(body)
        return has_room

    def hold_only(self, body: bytes) -> None:
        """Count the body that is sent, and nothing that it was made from."""
        self.hold(body)
        for held in [held for held in self._bodies if held is not body]:
            self.drop(held)

    def drop(self, body: bytes) -> None:
        if any(body is held for held in self._bodies):
            self._bodies = [held for held in self._bodies if held is not body]
            self._budget.remove(self.token_id, body)

    def close(self) -> None:
        while self._bodies:
            self._budget.remove(self.token_id, self._bodies.pop())
