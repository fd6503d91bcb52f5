"""The bodies of requests and responses: bounded, in size and in time.

A request has none where none is expected. A response is sent in pieces, each when the client has taken those before it,
so that what uvicorn and TLS copy of it is small; a client that takes nothing is cut by ``PlainHttp``.
"""

import asyncio
import contextlib
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lattice_remote.server.network.refusal import Refusal
from lattice_remote.server.network.response_budget import COUNTED_BYTES, ResponseBudget, ResponseShare
from lattice_remote.server.web.answers import TurnedAway

__all__ = ["body_of", "ending_where_unread", "refused_body", "sent_in_pieces"]

_BODY_S = 30.0
"""How long a client has for the whole of a body."""
_LINGER_S = 1.0
"""How long what is left of a body that nobody wants is thrown away before its connection is closed."""
_WITH_BODY = {"POST", "PUT", "PATCH"}


def refused_body(method: str, headers: Headers) -> Refusal | None:
    """Refuse a body that comes with a method which has none; what it hides is never read."""
    has_body = "Transfer-Encoding" in headers or headers.get("Content-Length", "0") != "0"
    if not has_body or method in _WITH_BODY:
        return None
    return Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "REMOTE_TOO_LARGE", f"a {method} request has no body here")


async def body_of(request: Request, most: int, *, within_s: float = _BODY_S) -> bytes:
    """Return a request's body of at most so many bytes, all of which must come within so many seconds.

    Raises:
        TurnedAway: it is longer, or does not come in time, or the client has left.
    """
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
    except TimeoutError:
        why = f"the request's body did not come within {within_s:g} s"
        raise TurnedAway(Refusal(HTTPStatus.REQUEST_TIMEOUT, "REMOTE_PROTOCOL", why)) from None
    except ClientDisconnect:
        raise TurnedAway(Refusal(HTTPStatus.BAD_REQUEST, "REMOTE_PROTOCOL", "the client has left")) from None
    return bytes(body)


def _too_large(most: int) -> TurnedAway:
    why = f"the request's body is longer than {most} bytes"
    return TurnedAway(Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "REMOTE_TOO_LARGE", why))


def ending_where_unread(app: ASGIApp) -> ASGIApp:
    """Return the app such that a connection ends with an answer that comes before all of the body was read.

    It is closed only when the rest has come, or after a moment: what arrives at a socket that is closed makes the
    system forget the answer that was sent, and a proxy then answers 502 in its place.
    """

    async def ending(scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        unread = scope["method"] in _WITH_BODY and (
            "Transfer-Encoding" in headers or headers.get("Content-Length", "0") != "0"
        )

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


def sent_in_pieces(app: ASGIApp, budget: ResponseBudget) -> ASGIApp:
    """Return the app such that its large bodies are counted until they are sent, and sent in pieces.

    ``scope["state"]["share"]`` is the request's ``ResponseShare``.
    """

    async def pacing(scope: Scope, receive: Receive, send: Send) -> None:
        share = scope["state"]["share"] = ResponseShare(budget)

        async def sending(message: Message) -> None:
            body = message.get("body", b"")
            if message["type"] == "http.response.body" and len(body) > COUNTED_BYTES:
                share.hold(body)
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

    return pacing
