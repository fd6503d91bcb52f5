"""Opening of WebSockets to a project, reconnect delays, and messages about failed connections.

A token leaves this machine only here, only for the configured URL: redirects are not followed.
"""

import asyncio
import functools
import json
import os
import random
import re
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http import HTTPStatus
from http.client import HTTPException
from typing import Any
from urllib.request import (
    BaseHandler,
    HTTPHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
    getproxies,
    proxy_bypass,
)

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, InvalidProxy, InvalidStatus, InvalidURI, ProxyError
from websockets.proxy import get_proxy, parse_proxy
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from lattice_remote.client.config import Remote, below
from lattice_remote.client.credentials import check_token
from lattice_remote.client.trusted_servers import Server, admit, is_loopback
from lattice_remote.errors import (
    CODES,
    REFUSALS,
    ConnectionFailed,
    Misuse,
    ProtocolError,
    Rejected,
    RemoteError,
    one_line,
)
from lattice_remote.protocol.messages import MAX_FRAME_BYTES, SUBPROTOCOL

__all__ = [
    "MAX_BAR_S",
    "MAX_DELAY_S",
    "MAX_RESETS",
    "MIN_UPTIME_S",
    "RESET_WINDOW_S",
    "Backoff",
    "RetryLater",
    "error_of",
    "fetch_projects",
    "open_socket",
]

OPEN_TIMEOUT_S = 10.0
_MAX_LIST_BYTES = 4 * 1024 * 1024
_PROBE_TIMEOUT_S = 2.0
_MAX_QUEUED_FRAMES = 4
"""Received frames, each up to the protocol's limit, that may wait in the library besides our own queue."""
_NO_PASSWORD = ""
"""Keeps OpenSSL from asking for one on the terminal."""
_COME_BACK = {429, 503}
_CERTIFICATE_ALERTS = ("CERTIFICATE_REQUIRED", "ALERT_BAD_CERTIFICATE", "ALERT_UNKNOWN_CA")
_WHO_ARE_YOU = {400, 401, 403, 407}
"""Statuses of a proxy that authenticates. nginx answers 400 without a client certificate."""
_NOBODY_BEHIND = {502, 504}
"""Statuses of a proxy that cannot reach the server."""
_UNKNOWN_AUTHORITY = {18, 19, 20, 21}
_NOT_NOW = {9: "is not valid yet", 10: "has expired"}
_WRONG_HOST = {62, 64}
"""OpenSSL's X509_V_ERR_... numbers."""


class RetryLater(ConnectionFailed):
    def __init__(self, message: str, retry_after_s: float, *, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class _Dial(connect):
    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


class _Strict(ClientConnection):
    """The library's connection, aborted at once after a violation: the library would keep reading.

    ``on_accepted`` is called when a server or proxy accepts the connection, before the upgrade.
    """

    def __init__(self, *args: Any, on_accepted: Callable[[], None], **options: Any) -> None:
        super().__init__(*args, **options)
        self._on_accepted = on_accepted

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._on_accepted()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.protocol.handshake_exc is not None or self.protocol.parser_exc is not None:
            self.transport.abort()


async def open_socket(
    remote: Remote, token: str | None, named: Server | None, on_accepted: Callable[[], None]
) -> ClientConnection:
    """Connect and upgrade.

    ``named`` is a server of the environment; ``on_accepted`` see ``_Strict``.

    Raises:
        Rejected: the token is missing, must not be sent there or is refused; or the certificate is refused.
        RetryLater: the server asks to retry later.
        ConnectionFailed: the server or its proxy is unreachable, or is no lattice-remote server.
        StorageError: the user's tokens or servers cannot be read.
    """
    if token is None:
        raise Rejected(
            f"no token for {remote.url}; log in with: lattice remote login {remote.place}", code="REMOTE_UNAUTHORIZED"
        )
    check_token(token)
    server = admit(remote.url, named, token)
    is_tls = remote.url.startswith("https:")
    proxy, via = _proxy(remote)
    try:
        return await _Dial(
            remote.websocket_url,
            create_connection=functools.partial(_Strict, on_accepted=on_accepted),  # type: ignore[arg-type] # any maker
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            additional_headers=[("Authorization", f"Bearer {token}"), *server.headers],
            ssl=_tls(server) if is_tls else None,
            proxy=proxy,
            compression=None,
            max_size=MAX_FRAME_BYTES,
            max_queue=_MAX_QUEUED_FRAMES,
            open_timeout=OPEN_TIMEOUT_S,
            ping_interval=None,
            close_timeout=1,
        )
    except InvalidStatus as refusal:
        response = refusal.response
        raise _refusal(response.status_code, response.headers, bytes(response.body or b""), remote) from refusal
    except TimeoutError as error:
        raise ConnectionFailed("timed out") from error
    except ssl.SSLCertVerificationError as error:
        raise _unverified(error, remote) from error
    except ssl.SSLError as error:
        raise _no_tls(error.reason, remote) from error
    except (InvalidProxy, ProxyError) as error:
        raise ConnectionFailed(f"{via}refused, or no proxy is there") from error
    except ImportError as error:  # only a proxy needs a lazy import here
        raise ConnectionFailed(f"{via}SOCKS needs the package python-socks, which is not installed") from error
    except OSError as error:
        if is_tls and isinstance(error, ConnectionError) and not error.errno:  # asyncio's own, from the handshake
            raise _no_tls("it closes the connection", remote) from error
        raise ConnectionFailed(via + _describe(error)) from error
    except (InvalidHandshake, InvalidURI, EOFError, ValueError) as error:
        if is_tls and proxy is None and (alert := await _alert(remote, server)):
            raise _no_tls(alert, remote) from error
        if is_tls or proxy or not await _speaks_tls(remote):
            is_cut = isinstance(error.__cause__, EOFError)  # by a proxy whose server is down, for example
            why = "it closes the connection without an answer" if is_cut else "it is not a lattice-remote server"
            raise ConnectionFailed(why) from error
        raise ConnectionFailed(
            f"it speaks TLS there: its URL is https{remote.url.removeprefix('http')}; a remote that exists is changed "
            "with: lattice remote set-url"
        ) from error


def fetch_projects(url: str, token: str, named: Server | None) -> list[dict[str, Any]]:
    """Return the projects that a token may use, with ``slug`` and ``name``."""
    remote = Remote("origin", url, "")
    server = admit(url, named, token)
    proxy, via = _proxy(remote)
    if proxy is not None and not proxy.startswith("http"):
        raise ConnectionFailed(f"{via}only connections to a project use SOCKS")
    handlers: list[BaseHandler] = [ProxyHandler({} if proxy is None else {"http": proxy, "https": proxy})]
    if url.startswith("https:"):
        handlers.append(HTTPSHandler(context=_tls(server)))
    opener = OpenerDirector()
    for handler in (*handlers, HTTPHandler(), UnknownHandler()):
        opener.add_handler(handler)
    headers = {**dict(server.headers), "Authorization": f"Bearer {check_token(token)}"}
    request = Request(below(url, "projects"), headers=headers)  # noqa: S310 - parsed
    try:
        with opener.open(request, timeout=OPEN_TIMEOUT_S) as answer:
            status, answered, body = answer.status, answer.headers, answer.read(_MAX_LIST_BYTES)
    except TimeoutError as error:
        raise ConnectionFailed("timed out") from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise _unverified(reason, remote) from error
        cause = error if isinstance(error, ssl.SSLError) else reason
        if isinstance(cause, ssl.SSLError | ConnectionResetError | BrokenPipeError) and url.startswith("https:"):
            alert = asyncio.run(_alert(remote, server)) if proxy is None else ""
            raise _no_tls(alert or getattr(cause, "reason", None) or "it closes the connection", remote) from error
        raise ConnectionFailed(via + (_describe(reason) if isinstance(reason, OSError) else str(reason))) from error
    except (HTTPException, ValueError) as error:
        raise ConnectionFailed("it is not a lattice-remote server") from error
    if status != HTTPStatus.OK:
        raise _refusal(status, answered, body, remote)
    try:
        found = json.loads(body)["data"]
        return [{**project, "slug": str(project["slug"])} for project in found]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _foreign(status, None, remote, None) from None


def _proxy(remote: Remote) -> tuple[str | None, str]:
    """Return the environment's proxy for a server, and its address without password.

    A server on this machine is reached directly: a proxy would carry the token off it.

    Raises:
        ConnectionFailed: the variable holds no valid proxy.
    """
    if is_loopback(remote.url):
        return None, ""
    target = parse_uri(remote.websocket_url)
    found = get_proxy(target)
    if found is None and not proxy_bypass(f"{target.host}:{target.port}"):
        found = getproxies().get("all")
    if not found:
        return None, ""
    scheme, _, address = found.rpartition("://")
    scheme = {"": "http", "socks": "socks5h"}.get(scheme.lower(), scheme.lower())
    try:
        parsed = parse_proxy(f"{scheme}://{address}")
    except (InvalidProxy, ValueError) as error:
        raise ConnectionFailed(
            "a proxy variable of the environment holds no http, https or socks5h URL; see HTTPS_PROXY, HTTP_PROXY and "
            "ALL_PROXY, or name the server's host in NO_PROXY"
        ) from error
    return f"{scheme}://{address}", f"proxy {parsed.scheme}://{parsed.host}:{parsed.port}: "


def _tls(server: Server) -> ssl.SSLContext:
    try:
        return _context(server.ca_file, server.client_cert, server.client_key, _changed_ns(server))
    except (OSError, ssl.SSLError) as error:
        why = "it holds no certificate" if isinstance(error, ssl.SSLError) else error.strerror
        raise Misuse(f"cannot use the authorities in {server.ca_file}: {why}", code="REMOTE_UNTRUSTED") from error


def _changed_ns(server: Server) -> tuple[int, ...]:
    return tuple(os.stat(path).st_mtime_ns for path in (server.ca_file, server.client_cert, server.client_key) if path)


@functools.lru_cache(maxsize=8)
def _context(
    ca_file: str | None, client_cert: str | None, client_key: str | None, _changed: tuple[int, ...]
) -> ssl.SSLContext:
    """Return a context that verifies certificate and host, cached: the system's authorities take 20 ms."""
    context = ssl.create_default_context(cafile=ca_file)
    if client_cert:
        try:
            context.load_cert_chain(client_cert, client_key, password=_NO_PASSWORD)
        except (OSError, ValueError) as error:  # an SSLError is an OSError
            raise Misuse(
                f"cannot use the client certificate {client_cert}: it needs a PEM certificate, and its private key "
                "without a password",
                code="REMOTE_UNTRUSTED",
            ) from error
    return context


def _unverified(error: ssl.SSLCertVerificationError, remote: Remote) -> Rejected:
    number, url = error.verify_code, remote.url
    if number in _NOT_NOW:
        what = f"the certificate of {url} {_NOT_NOW[number]}; its administrator must renew it, or this clock is wrong"
    elif number in _WRONG_HOST:
        what = f"the certificate that {url} shows is for another host; use the name for which it was made"
    elif number in _UNKNOWN_AUTHORITY:
        what = (
            f"cannot verify the certificate of {url}: unknown certificate authority; name a private one with: "
            f"lattice remote trust {url} --ca-file FILE"
        )
    else:
        what = f"the certificate of {url} is not valid: {error.verify_message}"
    return Rejected(what, code="REMOTE_UNTRUSTED")


def _no_tls(reason: str | None, remote: Remote) -> RemoteError:
    if any(alert in (reason or "") for alert in _CERTIFICATE_ALERTS):
        return Rejected(
            f"{remote.url} asks for a client certificate, or does not accept this one; name it with: "
            f"lattice remote trust {remote.url} --client-cert FILE --client-key FILE",
            code="REMOTE_UNTRUSTED",
        )
    why = f" ({reason.lower().replace('_', ' ')})" if reason else ""
    return ConnectionFailed(f"no TLS there{why}; if it speaks plain HTTP, the URL begins with http://")


async def _alert(remote: Remote, server: Server) -> str:
    """Return the alert that ends a connection after the handshake, "" for none; nothing is sent.

    TLS 1.3 asks for a client certificate only then, and the library does not report it.
    """
    target = parse_uri(remote.websocket_url)
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(target.host, target.port, ssl=_tls(server))
            try:
                await reader.read(1)
            finally:
                writer.transport.abort()
    except ssl.SSLError as error:
        return error.reason or ""
    except (OSError, TimeoutError):
        return ""
    return ""


async def _speaks_tls(remote: Remote) -> bool:
    """Return whether a port speaks TLS; only a handshake is sent."""
    host, _, port = remote.url.removeprefix("http://").partition("/")[0].rpartition(":")
    if not port.isdecimal():
        return False
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=_tls(Server(remote.url)))
    except ssl.SSLCertVerificationError:
        return True
    except (OSError, TimeoutError, Misuse):
        return False
    writer.transport.abort()
    return True


# --- refusals ---


def _refusal(status: int, headers: Mapping[str, str] | Message, body: bytes, remote: Remote) -> RemoteError:
    retry_after_s = _seconds(headers.get("Retry-After"))
    said = _own_words(body)
    if said is None:
        return _foreign(status, headers.get("Location"), remote, retry_after_s)
    code, message = said
    return error_of(code, f"{remote.url}: {message}", remote, retry_after_s)


def _own_words(body: bytes) -> tuple[str, str] | None:
    """Return code and message of a refusal in the form of SPEC 2.2."""
    try:
        answer = json.loads(body)
        ok, code, message = answer["ok"], answer["error"]["code"], answer["error"]["message"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return (code, str(message)) if ok is False and isinstance(code, str) and code.startswith("REMOTE_") else None


def _foreign(status: int, location: str | None, remote: Remote, retry_after_s: float | None) -> ConnectionFailed:
    """Return the error for another program's response, which says nothing about token or project."""
    if 300 <= status < 400:
        to = one_line(location or "elsewhere")[:200]
        return ConnectionFailed(
            f"it redirects to {to}, and a token is not sent after a redirect; if that is your server: "
            f"lattice remote set-url {remote.name} URL; if a proxy authenticates there: {_authenticate(remote)}"
        )
    if status in _NOBODY_BEHIND:
        return ConnectionFailed(f"a proxy answers instead, HTTP {status}: the server is stopped or starting")
    message = f"a proxy or another program answers instead, HTTP {status}; check the URL and the proxy"
    if status in _WHO_ARE_YOU:
        message += f"; for one that authenticates: {_authenticate(remote)}"
    if status in _COME_BACK and retry_after_s is not None:
        return RetryLater(message, retry_after_s)
    return ConnectionFailed(message)


def _authenticate(remote: Remote) -> str:
    return f"lattice remote trust {remote.url} --header 'NAME: VALUE', or --client-cert FILE"


def error_of(code: str, message: str, remote: Remote, retry_after_s: float | None = None) -> RemoteError:
    if code in ("REMOTE_UNAUTHORIZED", "REMOTE_FORBIDDEN"):
        message += f"; log in with: lattice remote login {remote.place}"
    if code in REFUSALS:
        return Rejected(message, code=code)
    if retry_after_s is not None:
        return RetryLater(message, retry_after_s, code=code if code in CODES else None)
    if code == "REMOTE_PROTOCOL":
        return ProtocolError(message)
    return ConnectionFailed(message, code=code if code in CODES else None)


def _seconds(retry_after: str | None) -> float | None:
    return float(retry_after) if retry_after is not None and re.fullmatch(r"[0-9]{1,9}", retry_after) else None


def _describe(error: OSError) -> str:
    numbers = [error.errno] if error.errno else [int(n) for n in re.findall(r"\[Errno (\d+)\]", str(error))]
    reason = os.strerror(numbers[0]) if numbers and numbers[0] > 0 else error.strerror or str(error)
    return one_line(reason[:1].lower() + reason[1:])


FIRST_DELAY_S, MAX_DELAY_S = 0.2, 15.0
REFUSED_DELAY_S, MAX_REFUSED_DELAY_S = 30.0, 300.0
MIN_UPTIME_S = 5.0
"""A connection that lasted this long, and brought the cache up to date, resets the delay."""
MAX_BAR_S = 300.0
"""Longest delay that a server can impose."""
MAX_RESETS, RESET_WINDOW_S, RESET_BAR_S = 10, 600.0, 30.0
"""After this many resets within the window the next attempt is delayed, longer with each further one."""


@dataclass(slots=True)
class Backoff:
    """Reconnect delays of one connection."""

    uniform: Callable[[float, float], float] = random.uniform
    streak: int = 0
    """Consecutive connections or attempts that did not last."""
    _resets: deque[float] = field(default_factory=deque)
    _is_reset: bool = False
    _barred_until: float = float("-inf")

    def was_reset(self, now: float) -> None:
        self._resets.append(now)
        self._is_reset = True

    def resets(self, now: float) -> int:
        while self._resets and self._resets[0] < now - RESET_WINDOW_S:
            self._resets.popleft()
        return len(self._resets)

    def ended(
        self,
        now: float,
        *,
        lasted: bool,
        is_refused: bool = False,
        retry_after_s: float | None = None,
        binds: bool = True,
    ) -> float:
        """Return the delay before the next attempt, in seconds.

        Args:
            retry_after_s: the delay that the server asks for.
            binds: whether that is a demand, not an estimate of its return.
        """
        self.streak = 0 if lasted else self.streak + 1
        excess = self.resets(now) - MAX_RESETS
        if self._is_reset and excess >= 0:
            self._bar(now, RESET_BAR_S * 2 ** min(excess, 10))
        self._is_reset = False
        if retry_after_s is not None and binds:
            self._bar(now, retry_after_s)
        return max(self._delay(is_refused, retry_after_s), self.barred_s(now) + self._jitter())

    def barred_s(self, now: float) -> float:
        return max(0.0, self._barred_until - now)

    def lift(self) -> None:
        """Reset the delays: the obstacle has changed."""
        self.streak = 0

    def _delay(self, is_refused: bool, retry_after_s: float | None) -> float:
        # Bounded: after a thousand failures the power would overflow a float.
        doubled = 2 ** min(self.streak, 10)
        if is_refused:
            return self.uniform(REFUSED_DELAY_S / 2, min(MAX_REFUSED_DELAY_S, REFUSED_DELAY_S / 2 * doubled))
        if retry_after_s is not None:
            return min(retry_after_s, MAX_BAR_S) + self._jitter()
        return self.uniform(0, min(MAX_DELAY_S, FIRST_DELAY_S * doubled))

    def _bar(self, now: float, seconds: float) -> None:
        self._barred_until = max(self._barred_until, now + min(seconds, MAX_BAR_S))

    def _jitter(self) -> float:
        return self.uniform(0, FIRST_DELAY_S)
