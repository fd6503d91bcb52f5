"""Metrics and access log of HTTP requests, one line each with the number of the change it made.

No query, headers or bodies; parts of the path that are not plain names are masked. Lines of unauthenticated requests
are rate limited; all requests are counted.
"""

import contextlib
import logging
import re
import time
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lattice_remote.server.auth import Login
from lattice_remote.server.project.metrics import RequestOutcome
from lattice_remote.server.registry import ProjectRegistry
from lattice_remote.server.transport.admission import ConnectionQuota, TokenBucket
from lattice_remote.server.transport.websocket import PlainHttp

__all__ = ["AccessLogEntry", "log_entry_of", "with_access_log"]

_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_NOWHERE = "(none)"
_PROBES = {"/healthz", "/readyz", "/metrics"}
"""Logged only on an error, or with ``--log-level debug``."""
_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
_ANONYMOUS_PER_S, _ANONYMOUS_BURST = 2, 50
_LEFT = 499
"""The client disconnected before the response, as in nginx."""

_log = logging.getLogger("lattice_remote.requests")


class AccessLogEntry:
    def __init__(self, scope: Scope, patterns: "_Patterns") -> None:
        self._scope, self._patterns = scope, patterns
        self._quota: ConnectionQuota = scope["state"]["quota"]
        self.method = scope["method"] if scope["method"] in _METHODS else "other"
        self.since = time.time()
        """Since 1970."""
        self.login: Login | None = None
        self.project = ""
        """Once access to it is granted."""
        self.status = _LEFT
        self.is_stream = False
        self.sent_bytes = 0
        self._outcome: RequestOutcome | None = None
        self._began = time.monotonic()

    @property
    def address(self) -> str:
        return self._quota.address

    @property
    def route(self) -> str:
        return self._patterns.of(self._scope)

    @property
    def path(self) -> str:
        return self._patterns.path_of(self._scope)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def count_streamed(self) -> None:
        """Count the bytes sent past the application, see ``PlainHttp.stream``."""
        http: PlainHttp = self._scope["state"]["http"]
        self.sent_bytes += http.take_streamed()

    def take(self, outcome: RequestOutcome) -> None:
        if self._outcome is not None:
            self._outcome.log()
        self._outcome = outcome

    def log(self, suppressed: int = 0) -> None:
        token, outcome = self.login.token if self.login else None, self._outcome
        fields: dict[str, object] = {
            "method": self.method,
            "path": self.path,
            "route": self.route,
            "status": self.status,
            "ms": round(self.seconds * 1000, 1),
            "bytes": self.sent_bytes,
            "address": self.address,
            "project": self.project or None,
            "actor": token.actor if token else None,
            "token": token.id if token else None,
        }
        who, number = f"{token.actor} ({token.id}) at " if token else "", ""
        if outcome is not None:
            fields |= outcome.fields
            number = outcome.change
        if suppressed:
            fields["suppressed"] = suppressed
            number += f" (and {suppressed} without a token before it)"
        is_quiet = self.route in _PROBES and self.status < 400
        text = "%s %s: %d%s, %g ms, %s%s"
        values = (self.method, self.path, self.status, number, fields["ms"], who, self.address)
        _log.log(logging.DEBUG if is_quiet else logging.INFO, text, *values, extra={"fields": fields})


def log_entry_of(request: Request) -> AccessLogEntry:
    entry: AccessLogEntry = request.state.entry
    return entry


def with_access_log(app: ASGIApp, registry: ProjectRegistry, routes: Sequence[BaseRoute]) -> ASGIApp:
    patterns, anonymous = _Patterns(routes), _AnonymousLines()

    async def recording(scope: Scope, receive: Receive, send: Send) -> None:
        entry = scope["state"]["entry"] = AccessLogEntry(scope, patterns)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
                entry.is_stream = _is_stream(message)
            elif message["type"] == "http.response.body":
                entry.sent_bytes += len(message.get("body", b""))
            await send(message)

        with _counted(registry, entry, anonymous):
            await app(scope, receive, sending)

    return recording


@contextlib.contextmanager
def _counted(registry: ProjectRegistry, entry: AccessLogEntry, anonymous: "_AnonymousLines") -> Iterator[None]:
    registry.ongoing.add(entry)
    try:
        yield
    finally:
        registry.ongoing.discard(entry)
        entry.count_streamed()
        metrics = registry.metrics
        route = entry.route
        metrics.http_requests.labels(entry.method, route, entry.status).inc()
        metrics.http_sent_bytes.labels(route).inc(entry.sent_bytes)
        if not entry.is_stream:
            metrics.http_seconds.labels(route).observe(entry.seconds)
        if entry.login is not None or anonymous.allows_line():
            entry.log(anonymous.take_suppressed())


def _is_stream(start: MutableMapping[str, Any]) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in start["headers"]
    )


class _AnonymousLines:
    def __init__(self) -> None:
        self._lines = TokenBucket(_ANONYMOUS_BURST, time.monotonic())
        self._suppressed = 0

    def allows_line(self) -> bool:
        wait_s = self._lines.take(time.monotonic(), rate=_ANONYMOUS_PER_S, burst=_ANONYMOUS_BURST)
        self._suppressed += bool(wait_s)
        return not wait_s

    def take_suppressed(self) -> int:
        suppressed, self._suppressed = self._suppressed, 0
        return suppressed


class _Patterns:
    """Patterns of routes, for labels: these must be few."""

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        self._routes: dict[Any, list[Route | Mount]] = {}
        for route in routes:
            if isinstance(route, Route | Mount):
                self._routes.setdefault(route.endpoint if isinstance(route, Route) else route.app, []).append(route)

    def of(self, scope: Scope) -> str:
        candidates = self._routes.get(scope.get("endpoint"), [])
        if len(candidates) > 1:  # one handler for several paths
            candidates = [route for route in candidates if route.path_regex.match(scope["path"])]
        return candidates[0].path if candidates else _NOWHERE

    def path_of(self, scope: Scope) -> str:
        values = scope.get("path_params", {})

        def shown(part: re.Match[str]) -> str:
            value = values.get(part[1])
            return value if isinstance(value, str) and _PLAIN.fullmatch(value) else "..."

        return _PARAMETER.sub(shown, self.of(scope))
