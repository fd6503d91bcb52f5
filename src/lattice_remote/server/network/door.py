"""Who may come in, and how much of the server he may take before and after he has shown a token.

A connection is a ``Visit`` from the moment in which it is accepted, before any TLS, until it is closed. What is held
for strangers is bounded, whoever and however many they are. Connections that have shown no token are counted by
address and all together; when those are too many, the address with the most makes room for the next
(``strangers.py``), so a flood keeps nobody out who shows his token at once. What else is known of an address is
forgotten when more than ``MAX_ADDRESSES`` are known.

A request that shows a valid token is counted for the token, and any other for its address: a flood without a token
slows down no request with one from the same address, agents that share an address don't stand in each other's way, and
a token is no faster from many addresses.

Nothing here waits or does I/O.
"""

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from http import HTTPStatus
from math import ceil

from lattice_remote.protocol.codec import FIRST_FRAME_BYTES
from lattice_remote.server.data.settings import Limits
from lattice_remote.server.network.addresses import Proxies, counted_as
from lattice_remote.server.network.bucket import Bucket
from lattice_remote.server.network.refusal import Refusal
from lattice_remote.server.network.strangers import Strangers

__all__ = ["MAX_ADDRESSES", "Door", "Visit"]

MAX_ADDRESSES = 10_000
"""How many addresses are remembered that have no connection."""
_BURST_S = 10
"""How many seconds' worth of new connections may come at once."""
_TOKEN_BURST_S = 4
"""How many seconds' worth of requests with one token may come at once."""
_PATIENCE_S = 1.0
"""A connection that has shown no token after this time makes room for the next of its address. A token comes with the
first packet; a shorter time would cut TLS handshakes when hundreds of agents come back together."""
_LOG_EVERY_S = 10.0

_log = logging.getLogger(__name__)


class _Address:
    """What is known of one address."""

    __slots__ = ("admitted", "arrivals", "connections", "failures", "name")

    def __init__(self, name: str, limits: Limits, now: float) -> None:
        self.name = name
        self.connections = 0
        self.admitted = 0  # those of them that have shown a valid token
        self.arrivals = Bucket(limits.new_connections_per_second * _BURST_S, now)
        self.failures = Bucket(limits.failed_logins_per_minute, now)


class Visit:
    """One connection, as the door counts it. Whoever owns the connection calls ``leave()`` when it is closed."""

    def __init__(self, door: "Door", host: str) -> None:
        self.cut: Callable[[], None] = lambda: None
        """Ends the connection at once; set by its owner."""
        self._door = door
        self._host = host
        self.since = door.now()
        """When it was accepted, by the door's clock, in seconds."""
        self._home: _Address | None = None  # whose it is; behind a proxy that is known when a request has come
        self._refusal: Refusal | None = None
        self._requests = 0
        self._token_id = ""
        self._held = 0
        self._gone = False

    @property
    def limits(self) -> Limits:
        """What it may take."""
        return self._door.limits

    @property
    def address(self) -> str:
        """Where it comes from."""
        return self._host if self._home is None else self._home.name

    @property
    def from_proxy(self) -> bool:
        """Whether a trusted proxy has made the connection, whose headers about its client are believed."""
        return self._host in self._door.proxies

    def enter(self, forwarded_for: Sequence[str], token_id: str = "") -> Refusal | None:
        """Take note of a request's head; return why it is turned away, if it is.

        Args:
            forwarded_for: the values of all X-Forwarded-For headers, which count when a trusted proxy sent them.
            token_id: of the valid token that this very request shows, "" for none. What an earlier request on the
                connection has shown counts for nothing: a proxy has many people's requests on one.
        """
        proxies = self._door.proxies
        if self._host in proxies and not self._gone:
            name = counted_as(proxies.origin(self._host, forwarded_for))
            if self._home is None or self._home.name != name:
                self._leave_home()
                self.come_from(self._door.known(name), is_new=not token_id)
                self._requests = 0
        self._requests += 1
        if token_id:  # whatever else comes from its address
            return self._door.too_fast_with(token_id, self.address)
        if (
            self._refusal is None and self._requests > 1 and self._home is not None
        ):  # the first came with its connection
            self._refusal = self._door.too_fast(self._home)
        return self._refusal

    def come_from(self, home: _Address, *, is_new: bool = True) -> None:
        """Count it for an address, as new or as one more that is open; ``enter()`` says if it is too much."""
        self._home = home
        home.connections += 1
        home.admitted += bool(self._token_id)
        if not self._token_id:
            self._door.stranger(self, home.name)
        self._refusal = self._door.one_more_from(home, is_new=is_new)

    def log(self, reason: str) -> None:
        """Log what it did, now and then."""
        self._door.log(reason, self.address)

    def log_cut(self, reason: str) -> None:  # noqa: ARG002 - the figures in it differ each time
        """Log, now and then, that it was cut because it does not take what it is sent."""
        self._door.log("cut: it does not take what it is sent", self.address)

    def failed(self) -> Refusal | None:
        """Take note of a request without a valid token; return what to say instead when there were too many."""
        return self._door.login_failed(self._door.known(self.address))

    def admit(self, token_id: str) -> Refusal | None:
        """Count it for its token from now on, and with the strangers no more; or return why not.

        A connection may show another token with each request, as that of a proxy does; it is counted for the last.
        """
        if token_id == self._token_id:
            return None
        if self._gone:  # cut, or ended by the client, while its request was looked at: nobody would take it off again
            return _too_many("this connection is closed", 1)
        if self._home is not None and not self._token_id and (refusal := self._door.one_more_admitted(self._home)):
            return refusal
        refusal = self._door.one_more_with(token_id, self.address)
        if refusal is None:
            self._door.no_stranger(self)
            if self._token_id:
                self._door.one_less_with(self._token_id)
            elif self._home is not None:
                self._home.admitted += 1
            self._token_id = token_id
        return refusal

    def holds(self, size: int) -> bool:
        """Note how many bytes of an unfinished message are kept for it; return whether its token may have so many.

        Small messages always may, whatever else is sent with the same token.
        """
        if self._token_id and not self._gone:
            self._door.holds_more(self._token_id, size - self._held)
            self._held = size
        return size <= FIRST_FRAME_BYTES or not self._door.holds_too_much(self._token_id)

    def leave(self) -> None:
        """The connection is closed. Idempotent."""
        if not self._gone:
            self.holds(0)
            self._gone = True
            self._leave_home()
            self._door.no_stranger(self)
            if self._token_id:
                self._door.one_less_with(self._token_id)

    def _leave_home(self) -> None:
        if self._home is not None:
            self._home.connections -= 1
            self._home.admitted -= bool(self._token_id)
            self._home = None


class Door:
    """All visits together. Belongs to the event loop's thread."""

    def __init__(
        self, limits: Limits, trusted_proxies: Sequence[str] = (), *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises Misuse when a trusted proxy is no address."""
        self.limits = limits
        self.proxies = Proxies(trusted_proxies)
        self._clock = clock
        self._addresses: OrderedDict[str, _Address] = OrderedDict()  # the one that was seen last is the last
        self._strangers: Strangers[Visit] = Strangers()
        self._by_token: Counter[str] = Counter()
        self._held_by_token: Counter[str] = Counter()
        self._requests_of: dict[str, Bucket] = {}  # by token: there are no more than were ever made
        self._logged: dict[str, tuple[float, int]] = {}  # by reason: when, and how often it was not since

    def arrive(self, host: str) -> Visit | None:
        """Count a new connection; return None when there is no room for one more stranger from there."""
        visit = Visit(self, host)
        if host in self.proxies:
            self.stranger(visit, host)
        else:
            home = self.known(counted_as(host))
            if self._strangers.at(home.name) >= self.limits.waiting_connections_per_address:
                oldest = self._strangers.oldest_at(home.name)
                if visit.since - oldest.since < _PATIENCE_S:
                    self.log("too many connections without a token", home.name)
                    return None
                self._cut(oldest)
            visit.come_from(home)
        if len(self._strangers) > self.limits.waiting_connections:
            self._cut(self._strangers.next_to_go())
        return visit

    def _cut(self, leaving: Visit) -> None:
        self.log("cut, to make room for connections without a token", leaving.address)
        leaving.leave()
        leaving.cut()

    def now(self) -> float:
        """Return the time, in seconds, by a clock that is never set."""
        return self._clock()

    def log(self, reason: str, address: str) -> None:
        """Log that somebody was turned away, now and then for each reason. ``reason`` has no text of the client's."""
        now = self._clock()
        at, silent = self._logged.get(reason, (float("-inf"), 0))
        if now - at < _LOG_EVERY_S:
            self._logged[reason] = at, silent + 1
        else:
            _log.warning("%s: %s%s", address, reason, f" (and {silent} more since the last time)" if silent else "")
            self._logged[reason] = now, 0

    # --- for its visits ---

    def known(self, name: str) -> _Address:
        """Return what is known of an address, and forget those of which nothing was heard for longest."""
        known = self._addresses.get(name)
        if known is None:
            known = self._addresses[name] = _Address(name, self.limits, self._clock())
            if len(self._addresses) > MAX_ADDRESSES:
                self._forget_one()
        self._addresses.move_to_end(name)
        return known

    def _forget_one(self) -> None:
        """Forget the oldest address that has no connection. With connections they are as few as open files allow."""
        for _ in range(100):
            name, oldest = self._addresses.popitem(last=False)
            if not oldest.connections:
                return
            self._addresses[name] = oldest

    def one_more_from(self, home: _Address, *, is_new: bool) -> Refusal | None:
        """Return why one more connection from an address, already counted, is too much."""
        if is_new and (refusal := self.too_fast(home)) is not None:
            return refusal
        if self._strangers.at(home.name) > self.limits.waiting_connections_per_address:
            self.log("too many connections without a token", home.name)
            return _too_many("too many connections without a token from your address", 1)
        return None

    def one_more_admitted(self, home: _Address) -> Refusal | None:
        """Return why an address may not have one more connection that has shown a token; others don't count here."""
        most = self.limits.connections_per_address
        if home.admitted < most:
            return None
        self.log("too many connections", home.name)
        return _too_many(f"your address has {most} connections already", 10)

    def too_fast(self, home: _Address) -> Refusal | None:
        """Count a new connection, or a further request on one; return why it is too much."""
        rate = self.limits.new_connections_per_second
        wait_s = home.arrivals.take(self._clock(), rate=rate, burst=rate * _BURST_S)
        if not wait_s:
            return None
        self.log("too many new connections or requests", home.name)
        return _too_many("too many new connections or requests from your address", wait_s)

    def too_fast_with(self, token_id: str, address: str) -> Refusal | None:
        """Count a request that shows a valid token; return why it is too much."""
        rate, now = self.limits.messages_per_second, self._clock()
        requests = self._requests_of.setdefault(token_id, Bucket(rate * _TOKEN_BURST_S, now))
        wait_s = requests.take(now, rate=rate, burst=rate * _TOKEN_BURST_S)
        if not wait_s:
            return None
        self.log(f"too many requests with {token_id}", address)
        return _too_many(f"too many requests with token {token_id}", wait_s)

    def login_failed(self, home: _Address) -> Refusal | None:
        """Count a failed login, and return a refusal when it is one too many."""
        per_minute = self.limits.failed_logins_per_minute
        wait_s = home.failures.take(self._clock(), rate=per_minute / 60, burst=per_minute)
        self.log("no valid token", home.name)
        return _too_many("too many requests without a valid token from your address", wait_s) if wait_s else None

    def one_more_with(self, token_id: str, address: str) -> Refusal | None:
        """Count a connection for its token, or return why it is too much."""
        most = self.limits.connections_per_token
        if self._by_token[token_id] >= most:
            self.log(f"too many connections with {token_id}", address)
            return _too_many(f"token {token_id} has {most} connections already", 10)
        self._by_token[token_id] += 1
        return None

    def one_less_with(self, token_id: str) -> None:
        """Count a connection less for its token."""
        self._by_token[token_id] -= 1
        if not self._by_token[token_id]:
            del self._by_token[token_id], self._held_by_token[token_id]

    def holds_more(self, token_id: str, size: int) -> None:
        """Count what is kept of the unfinished messages of a token."""
        self._held_by_token[token_id] += size

    def holds_too_much(self, token_id: str) -> bool:
        """Tell whether that is more than it may be."""
        return self._held_by_token[token_id] > self.limits.unfinished_bytes_per_token

    def stranger(self, visit: Visit, address: str) -> None:
        """It has shown no token, and belongs to this address."""
        self._strangers.put(visit, address)

    def no_stranger(self, visit: Visit) -> None:
        """It has shown its token, or is gone."""
        self._strangers.remove(visit)


def _too_many(why: str, wait_s: float) -> Refusal:
    return Refusal(HTTPStatus.TOO_MANY_REQUESTS, "REMOTE_BUSY", f"{why}; come back later", max(1, ceil(wait_s)))
