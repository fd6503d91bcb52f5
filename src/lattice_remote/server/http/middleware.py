"""ASGI middleware: security headers, request bodies, response pacing, client disconnects, JSON envelopes; metrics and
access log, one line a request with the number of the change it made.

A log line has no query, headers or bodies; parts of the path that are not plain names are masked. Lines of
unauthenticated requests are rate limited; all requests are counted.
"""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Coroutine, Iterator, MutableMapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lattice_remote.server.auth import Login
from lattice_remote.server.project.metrics import RequestOutcome
from lattice_remote.server.registry import ProjectRegistry
from lattice_remote.server.transport.admission import (
    COUNTED_BYTES,
    ConnectionQuota,
    ResponseBudget,
    ResponseShare,
    TokenBucket,
)
from lattice_remote.server.transport.api_error import ApiError
from lattice_remote.server.transport.websocket import PlainHttp

__all__ = [
    "OUR_PAGES",
    "AccessLogEntry",
    "cancel_on_disconnect",
    "closing_after_unread_body",
    "log_entry_of",
    "ok",
    "read_body",
    "refuse_body",
    "wants_page",
    "with_access_log",
    "with_paced_bodies",
    "with_security_headers",
]

OUR_PAGES = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
"""Policy of the server's own pages: all content is files of this server."""

_ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # with no-referrer, a form would send no Origin
}
_UNLESS_SAID = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'",
    "Cache-Control": "no-store",
}
_HSTS = "max-age=15552000"
_LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}


def with_security_headers(app: ASGIApp) -> ASGIApp:
    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                headers.update(_ALWAYS)
                for name, value in _UNLESS_SAID.items():
                    headers.setdefault(name, value)
                host = Headers(scope=scope).get("Host", "")
                # Not for a proxy's TLS, nor for a developer's machine, which runs many servers.
                if scope["scheme"] == "https" and not {host, host.rpartition(":")[0]} & _LOCAL_NAMES:
                    headers["Strict-Transport-Security"] = _HSTS
            await send(message)

        await app(scope, receive, sending)

    return wrapped


_BODY_S = 30.0
"""For the whole body."""
_LINGER_S = 1.0
"""For the rest of an unread body, before the connection is closed."""
_WITH_BODY = {"POST", "PUT", "PATCH"}


def refuse_body(method: str, headers: Headers) -> ApiError | None:
    """Refuse a body with a method that has none: no request is smuggled in it."""
    if method in _WITH_BODY or not _has_body(headers):
        return None
    return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "REMOTE_TOO_LARGE", f"a {method} request cannot have a body")


def _has_body(headers: Headers) -> bool:
    return "Transfer-Encoding" in headers or headers.get("Content-Length", "0") != "0"


async def read_body(request: Request, most: int, *, within_s: float = _BODY_S) -> bytes:
    """Return a request's body of at most ``most`` bytes.

    Raises ApiError if it is too long or too slow, the token's requests hold too much, or the client disconnects.
    """
    quota: ConnectionQuota = request.state.quota
    length = request.headers.get("Content-Length", "0")
    if length.isdecimal() and int(length) > most:
        raise _too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(within_s):
            async for piece in request.stream():
                body += piece
                if len(body) > most:
                    raise _too_large(most)
                if not quota.holds(len(body)):
                    why = "too many bytes of unfinished requests with this token; try again"
                    raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "REMOTE_BUSY", why, retry_after_s=1)
    except TimeoutError:
        why = f"the request's body did not arrive within {within_s:g} s"
        raise ApiError(HTTPStatus.REQUEST_TIMEOUT, "REMOTE_PROTOCOL", why) from None
    except ClientDisconnect:
        raise ApiError(HTTPStatus.BAD_REQUEST, "REMOTE_PROTOCOL", "the client has disconnected") from None
    return bytes(body)


def _too_large(most: int) -> ApiError:
    why = f"the request's body is longer than {most} bytes"
    return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "REMOTE_TOO_LARGE", why)


def closing_after_unread_body(app: ASGIApp) -> ASGIApp:
    """Close the connection after a response that comes before the end of the request body.

    The rest is discarded for at most ``_LINGER_S``: a closed socket would drop the response, and a proxy answer 502.
    """

    async def ending(scope: Scope, receive: Receive, send: Send) -> None:
        unread = scope["method"] in _WITH_BODY and _has_body(Headers(scope=scope))

        async def receiving() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def sending(message: Message) -> None:
            if unread and message["type"] == "http.response.start":
                MutableHeaders(raw=message["headers"])["Connection"] = "close"
            if unread and message["type"] == "http.response.body" and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await throw_away()
                message = {"type": "http.response.body"}
            await send(message)

        async def throw_away() -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LINGER_S):
                    while unread:
                        await receiving()

        await app(scope, receiving, sending)

    return ending


def with_paced_bodies(app: ASGIApp, budget: ResponseBudget) -> ASGIApp:
    """Count large response bodies against the budget and send them in pieces.

    ``scope["state"]["share"]`` is the request's ``ResponseShare``.
    """

    async def pacing(scope: Scope, receive: Receive, send: Send) -> None:
        share = scope["state"]["share"] = ResponseShare(budget)
        quota: ConnectionQuota = scope["state"]["quota"]

        async def sending(message: Message) -> None:
            body = message.get("body", b"")
            if message["type"] == "http.response.body" and len(body) > COUNTED_BYTES:
                share.hold_only(body)
                last = (len(body) - 1) // COUNTED_BYTES * COUNTED_BYTES
                for start in range(0, last, COUNTED_BYTES):
                    piece = body[start : start + COUNTED_BYTES]
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                message = {**message, "body": body[last:]}
            await send(message)

        try:
            await app(scope, receive, sending)
        finally:
            share.close()
            quota.holds(0)

    return pacing


async def cancel_on_disconnect[T](request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``; cancel it, and raise ApiError, if the client disconnects. Read the request's body first."""
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_leaving(request))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return await doing
    finally:
        doing.cancel()
        leaving.cancel()
        await asyncio.wait({doing, leaving})
    raise ApiError(HTTPStatus.BAD_REQUEST, "REMOTE_PROTOCOL", "the client has disconnected")


async def _leaving(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def wants_page(request: Request) -> bool:
    """Return whether a browser navigates."""
    return "text/html" in request.headers.get("Accept", "")


def ok(data: Any) -> Response:
    return Response(msgspec.json.encode({"ok": True, "data": data}), media_type="application/json")


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
