"""uvicorn's upgraded sockets, handed to the websockets package: everything that leans on their insides.

uvicorn alone can't abort a transport, websockets alone can't share the port with plain HTTP (measured in
docs/decisions/0014). What is relied on beyond their documentation, checked by tests/server/test_websocket.py:

- uvicorn's ``H11Protocol`` sets ``cycle`` for each request whose head is complete, and calls
  ``on_response_complete()`` after each response.
- uvicorn makes ``ws_protocol_class`` with ``config, server_state, app_state``, replays the request's bytes into it
  as one ``data_received()``, then calls ``transport.set_protocol()``; it counts ``server_state.connections``, and
  calls ``shutdown()`` on what is left of them when it stops.
- What its ``send()`` is given is with the transport when it returns, so that whole chunks may be written to that
  between the head of an answer and its end; ``flow.write_paused`` says whether the transport wants no more.
- uvicorn says ``send_400_response()`` to what is not HTTP, and gives a copy of ``app_state`` to each request.
- websockets' ``serve()`` makes a usable ``Server`` without binding a port; a connection asks its ``is_serving()``.
- ``ServerProtocol.max_message_size`` may change between messages.
- What has come of an unfinished frame is in ``ServerProtocol.reader.buffer``. A connection whose request was not
  answered yet has a ``request`` and is ``CONNECTING``.
- A websockets connection passes every frame, of data or control, to ``process_event()``.
- Between messages, a whole frame may be written to ``connection.transport`` past the library, until it has sent a
  close frame, which it always does in ``send_data()``.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.frames import DATA_OPCODES, Frame
from websockets.http11 import Request, Response
from websockets.protocol import Event, State
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from lattice_remote.protocol.codec import FIRST_FRAME_BYTES
from lattice_remote.protocol.messages import SUBPROTOCOL
from lattice_remote.server.transport.admission import ConnectionQuota, TokenBucket
from lattice_remote.server.transport.api_error import ApiError
from lattice_remote.server.transport.send_queue import MAX_PENDING_BYTES, SendQueue

__all__ = [
    "CLOSE_TIMEOUT_S",
    "HEAD_TIMEOUT_S",
    "Handoff",
    "PlainHttp",
    "Request",
    "Response",
    "handoff_class",
    "http_answer",
    "websocket_server",
]

CLOSE_TIMEOUT_S = 0.6
"""How long a client has to answer a close frame before its connection is aborted."""
HEAD_TIMEOUT_S = 10.0
"""How long a client has for the head of its request, from connecting or from taking some of the response before it."""
_SLICE_BYTES = 8 * 1024
_FRAGMENT_BYTES = 256
"""What a frame of an unfinished message takes beside its data."""
_BURST_S = 4
_KEEPALIVE_S = 10.0
_HIGH_WATER_BYTES = 64 * 1024


class PlainHttp(H11Protocol):
    """uvicorn's own, which would wait for the rest of a request's head for ever."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        *,
        visit: ConnectionQuota,
    ) -> None:
        super().__init__(config, server_state, {**app_state, "visit": visit, "http": self})
        if config.ws_protocol_class is not None:
            self.ws_protocol_class = cast("Any", functools.partial(cast("Any", config.ws_protocol_class), visit=visit))
        self._visit = visit
        self._deadline: asyncio.TimerHandle | None = None
        self._streamed: tuple[SendQueue, Callable[[], None]] | None = None
        self._left = 0  # bytes of the last answer that were not taken when that was looked at

    def stream(self, name: str, lost: Callable[[], None], *, max_bytes: int) -> SendQueue:
        """Return the way to write the body of the answer whose head was sent: past uvicorn, and bounded (I10).

        Pushed are whole chunks, or any bytes to a client of HTTP/1.0. When there is no more, call ``end_stream()``,
        then end the answer as ever; it is the last of its connection. ``lost`` is called when that is gone before.
        """
        outbox = SendQueue(self.transport, name, max_bytes=max_bytes)
        self._streamed = outbox, lost
        if self.flow.write_paused:
            outbox.pause()
        if self.transport.is_closing():
            self._stream_lost()
        return outbox

    def end_stream(self) -> None:
        """Hand over what is queued, and abort the connection if the client does not take it in time."""
        if self._streamed is not None:
            self._streamed[0].finish()
            self.loop.call_later(CLOSE_TIMEOUT_S, self.transport.abort)

    def take_streamed(self) -> int:
        """Return how many bytes were streamed since this was last called."""
        return 0 if self._streamed is None else self._streamed[0].take_written()

    def _stream_lost(self) -> None:
        if self._streamed is not None:
            outbox, lost = self._streamed
            outbox.close()
            lost()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalling.pause()
        if self._streamed is not None:
            self._streamed[0].pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalling.resume()
        if self._streamed is not None:
            self._streamed[0].resume()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._visit.cut = transport.abort
        # Nothing is queued in it: it cuts a client that takes nothing of an answer of uvicorn's.
        self._stalling = SendQueue(transport, self._visit.address, log=self._visit.log_cut)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before or self not in self.connections:  # a request, or it was handed over
            self._head_received()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; behind a request that is being answered nothing can be said any more."""
        self._visit.log("no HTTP")
        answering: RequestResponseCycle | None = self.cycle
        if answering is not None and not answering.response_complete:
            answering.disconnected = True  # else its answer fails, with a traceback in the log
            self.transport.abort()
        else:
            super().send_400_response(msg)

    def on_response_complete(self) -> None:
        answered = self.cycle
        super().on_response_complete()
        if self.cycle is answered:  # else the next request was there already
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._visit.leave()
        self._head_received()
        self._stalling.close()
        self._stream_lost()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._head_received()
        self._left = self.transport.get_write_buffer_size()
        self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self._head_overdue)

    def _head_overdue(self) -> None:
        """End it, unless it is still taking the answer before."""
        if self.transport.get_write_buffer_size() < self._left:
            self._await_head()
        else:
            self.transport.abort()

    def _head_received(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()


class Handoff(ServerConnection):
    """One client's WebSocket connection. ``outbox`` is the only way to send a message."""

    outbox: SendQueue

    def __init__(self, server: Server, state: ServerState, visit: ConnectionQuota) -> None:
        super().__init__(
            ServerProtocol(subprotocols=[Subprotocol(SUBPROTOCOL)], max_size=FIRST_FRAME_BYTES),
            server,
            ping_interval=_KEEPALIVE_S,
            ping_timeout=_KEEPALIVE_S,
            close_timeout=CLOSE_TIMEOUT_S,
            write_limit=_HIGH_WATER_BYTES,
        )
        self._state = state
        self.visit = visit
        """How the door counts it."""
        self._messages_per_s = visit.limits.messages_per_second
        self._messages = TokenBucket(self._messages_per_s * _BURST_S, self.loop.time())
        self._fragments = 0  # bytes kept of a message of which not every frame has come
        self._over = False
        self.who: Any = None
        """Whatever the check of the request left here for the handler."""

    @property
    def peer_name(self) -> str:
        """The client's address and port, for the log."""
        address = self.remote_address
        return f"{address[0]}:{address[1]}" if address else "client"

    def allow_message_bytes(self, limit: int) -> None:
        """Take messages of up to ``limit`` bytes from now on; before, it is ``FIRST_FRAME_BYTES``."""
        self.protocol.max_message_size = limit

    def end(self, code: int, reason: str) -> None:
        """Send what is queued and a close frame; abort when the client does not answer in time. Never waits."""
        if self.protocol.state is State.OPEN:
            self.outbox.finish()
            self.protocol.send_close(code, reason.encode()[:120].decode(errors="ignore"))
            self.send_data()
        self.loop.call_later(CLOSE_TIMEOUT_S, self.transport.abort)

    def send_data(self) -> None:
        """Write what the library wants written: after a close frame, nothing may follow it."""
        super().send_data()
        if self.protocol.state in (State.CLOSING, State.CLOSED):
            self.outbox.close()

    # --- asyncio.Protocol, and uvicorn's addition to it ---

    def data_received(self, data: bytes) -> None:
        """Take what has come, in slices: thousands of tiny frames may come at once, and each takes its time."""
        if self.request is not None and self.protocol.state is State.CONNECTING:
            return  # nobody may say more before the answer, and what fails now would fail the answer
        for start in range(0, len(data), _SLICE_BYTES):
            if self._over:
                return
            super().data_received(data[start : start + _SLICE_BYTES])
        if not self.visit.holds(self._fragments + len(self.protocol.reader.buffer)):
            self.visit.log("too many bytes of unfinished messages")
            self._end_over("too many unfinished messages with this token")
        if self.outbox.pending_bytes > MAX_PENDING_BYTES:  # pongs count as well
            self.transport.abort()

    def process_event(self, event: Event) -> None:
        """Take one frame, if there are not too many."""
        rate = self._messages_per_s
        if self._messages.take(self.loop.time(), rate=rate, burst=rate * _BURST_S):
            self._end_over(f"more than {rate} messages a second")
        elif not self._over:
            if isinstance(event, Frame) and event.opcode in DATA_OPCODES:
                self._fragments = 0 if event.fin else self._fragments + len(event.data) + _FRAGMENT_BYTES
            super().process_event(event)

    def _end_over(self, limit: str) -> None:
        """End it, and read no more of what it sends."""
        self._over = True
        self.visit.holds(0)  # it is gone in a moment; nobody else is to be cut for it
        self.end(1012, limit)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.visit.cut = cast("asyncio.Transport", transport).abort
        self._state.connections.add(cast("Any", self))
        super().connection_made(transport)
        self.outbox = SendQueue(self.transport, self.peer_name)

    def connection_lost(self, exc: Exception | None) -> None:
        self._state.connections.discard(cast("Any", self))
        self.visit.leave()
        self.outbox.close()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.outbox.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.outbox.resume()

    def shutdown(self) -> None:
        """uvicorn stops, and whoever is still here has had his goodbye."""
        self.transport.abort()


def websocket_server(
    handler: Callable[[Handoff], Awaitable[None]],
    check: Callable[[Handoff, Request], Awaitable[Response | None] | Response | None],
    is_serving: Callable[[], bool],
) -> Server:
    """Return the server object that connections belong to; it never has a port of its own.

    ``check`` sees each request before the upgrade and returns an answer to refuse it. ``handler`` runs for each
    connection; when it returns the connection is closed.
    """
    server = serve(
        cast("Callable[[ServerConnection], Awaitable[None]]", handler),
        process_request=cast("Any", check),
        compression=None,
        server_header=None,
    )
    server.server = cast("asyncio.Server", SimpleNamespace(is_serving=is_serving))
    return server


def handoff_class(server: Server) -> type[asyncio.Protocol]:
    """Return the class for ``uvicorn.Config(ws=...)``, whose connections belong to ``server``."""

    class BoundHandoff(Handoff):
        def __init__(
            self,
            config: Config,  # noqa: ARG002
            server_state: ServerState,
            app_state: dict[str, Any],  # noqa: ARG002
            *,
            visit: ConnectionQuota,
        ) -> None:
            super().__init__(server, server_state, visit)

    return cast("type[asyncio.Protocol]", BoundHandoff)


def http_answer(refusal: ApiError) -> Response:
    """Return the answer for ``check`` to refuse an upgrade with."""
    headers = Headers(refusal.headers)
    headers["Content-Length"] = str(len(refusal.body))
    return Response(refusal.status, refusal.status.phrase, headers, refusal.body)
