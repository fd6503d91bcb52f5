"""What every answer over HTTP tells browsers: to guess nothing, to show it in no frame, to let no other site have it.

A page of ours sets a ``Content-Security-Policy`` of its own; whatever else is answered may do nothing at all.
"""

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["OUR_PAGES", "with_headers"]

OUR_PAGES = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
"""The policy of the pages that we have written: everything is a file of this server."""

_ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # with no-referrer a form would not say its Origin
}
_UNLESS_SAID = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'",
    "Cache-Control": "no-store",
}
_HSTS = "max-age=15552000"
_LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}


def with_headers(app: ASGIApp) -> ASGIApp:
    """Return the app such that each of its answers has these headers; a handler may set those of ``_UNLESS_SAID``."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                headers.update(_ALWAYS)
                for name, value in _UNLESS_SAID.items():
                    headers.setdefault(name, value)
                if _is_our_tls(scope):
                    headers["Strict-Transport-Security"] = _HSTS
            await send(message)

        await app(scope, receive, sending)

    return wrapped


def _is_our_tls(scope: Scope) -> bool:
    """Whether TLS is ours to promise: that of a proxy is the proxy's. A developer's own machine has many servers."""
    host = Headers(scope=scope).get("Host", "")
    return scope["scheme"] == "https" and host.rpartition(":")[0] not in _LOCAL_NAMES and host not in _LOCAL_NAMES
