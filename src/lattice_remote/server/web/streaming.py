"""An answer that goes on for as long as its client listens: a stream of events (``text/event-stream``)."""

from collections.abc import Callable
from http import HTTPStatus
from typing import Protocol

from starlette.types import Receive, Scope, Send

from lattice_remote.protocol.messages import Bye
from lattice_remote.server.network.handoff import PlainHttp
from lattice_remote.server.web.gate import Guest

__all__ = ["EventStream", "Streamed"]

_HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx passes each event on as it comes
    (b"connection", b"close"),  # what was written past uvicorn's own bookkeeping is the last of its connection
]


class Streamed(Protocol):
    """What is sent to one client, through ``PlainHttp.stream``."""

    async def run(self) -> None:
        """Send it, until it is over."""

    def end(self, bye: Bye) -> None:
        """Let it be over. Never waits."""


class EventStream:
    """The answer, as ASGI has it; it ends with the visitor's token, too.

    ``make`` is called with the connection and whether its body is sent in chunks: where the client speaks HTTP/1.0 the
    body is what comes until the end, as uvicorn has told it.
    """

    def __init__(self, visitor: Guest, make: Callable[[PlainHttp, bool], Streamed]) -> None:
        self._visitor, self._make = visitor, make

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": HTTPStatus.OK, "headers": list(_HEADERS)})
        if scope["method"] != "HEAD":
            streamed = self._make(scope["state"]["http"], scope["http_version"] != "1.0")
            with self._visitor.hub.staying(self._visitor.login, streamed.end):
                await streamed.run()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
