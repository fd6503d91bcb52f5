"""WebSockets of clients: the hand-off of uvicorn's upgraded sockets to the websockets package, and send queues (I10).

All that depends on the internals of these packages is here.

uvicorn alone can't abort a transport, and websockets alone can't share the port with plain HTTP (measured in
docs/decisions/0014). Assumptions beyond their documentation, checked by tests/server/transport/test_websocket.py:

- uvicorn's ``H11Protocol`` sets ``cycle`` for each request whose head is complete, and calls ``on_response_complete()``
after each response.
- uvicorn makes ``ws_protocol_class`` with ``config, server_state, app_state``, replays the request's bytes into it as
one ``data_received()``, then calls ``transport.set_protocol()``; it counts ``server_state.connections``, and calls
``shutdown()`` on the remaining ones when it stops.
- ``send()`` has given its data to the transport when it returns, so whole chunks may be written to the transport
between the head of a response and its end; ``flow.write_paused`` is set while the transport wants no more.
- uvicorn calls ``send_400_response()`` for data that is not HTTP, and gives a copy of ``app_state`` to each request.
- websockets' ``serve()`` makes a usable ``Server`` without binding a port; a connection calls its ``is_serving()``.
- ``ServerProtocol.max_message_size`` may change between messages.
- ``ServerProtocol.reader.buffer`` holds the received bytes of an unfinished frame. A connection whose request is not
answered yet has a ``request`` and is ``CONNECTING``.
- A websockets connection passes every frame, of data or control, to ``process_event()``.
- Between messages, a whole frame may be written to ``connection.transport`` past the library, until it has sent a close
frame, which it always does in ``send_data()``.
"""

import asyncio
import contextlib
import fcntl
import functools
import logging
import sys
import termios
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, cast
from weakref import WeakKeyDictionary

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

from lattice_remote.protocol.messages import FIRST_FRAME_BYTES, SUBPROTOCOL
from lattice_remote.server.transport.admission import ConnectionQuota, TokenBucket
from lattice_remote.server.transport.api_error import ApiError

__all__ = [
    "CLOSE_TIMEOUT_S",
    "HEAD_TIMEOUT_S",
    "MAX_PENDING_BYTES",
    "MAX_UNSENT_BYTES_PER_TOKEN",
    "STALL_DEADLINE_S",
    "Handoff",
    "PlainHttp",
    "Request",
    "Response",
    "SendBudget",
    "SendQueue",
    "http_answer",
    "payload_of",
    "websocket_frame",
    "websocket_server",
]


MAX_PENDING_BYTES = 16 * 1024 * 1024
"""The client is cut then. One frame may always be queued, however large."""
STALL_DEADLINE_S = 10.0
"""Without a byte read; then the client is cut."""
_WRITE_BYTES = 256 * 1024
_JOINED_BYTES = 16 * 1024
"""Written together. Larger frames are not copied: joined, each client would have its copy."""
_CHECK_S = 1.0

_log = logging.getLogger(__name__)


def websocket_frame(payload: bytes) -> bytes:
    """Return a binary message in one final, unmasked frame (RFC 6455 section 5.2)."""
    size = len(payload)
    if size < 126:
        return b"\x82" + bytes((size,)) + payload
    if size < 1 << 16:
        return b"\x82\x7e" + size.to_bytes(2) + payload
    return b"\x82\x7f" + size.to_bytes(8) + payload


def payload_of(frame: bytes) -> bytes:
    return frame[{126: 4, 127: 10}.get(frame[1], 2) :]


_due: WeakKeyDictionary[asyncio.AbstractEventLoop, list["SendQueue"]] = WeakKeyDictionary()
"""Queues to flush at the end of the tick, by event loop: a callback of each queue would cost as much as its write."""


def _flush_due(due: list["SendQueue"]) -> None:
    queues = due.copy()
    due.clear()
    for queue in queues:
        try:
            queue.flush()
        except Exception:  # noqa: BLE001 - the other clients get their frames
            _log.exception("cannot write to a client")


class SendQueue:
    """Queue in front of one transport; its owner passes on ``pause()``, ``resume()`` and ``close()``."""

    def __init__(
        self,
        transport: asyncio.Transport,
        name: str,
        *,
        max_bytes: int = MAX_PENDING_BYTES,
        stall_deadline_s: float = STALL_DEADLINE_S,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self._log = log or partial(_log.warning, "%s %s: cut", name)
        self._transport = transport
        self._max_bytes = max_bytes
        self._deadline_s = stall_deadline_s
        self._loop = asyncio.get_running_loop()
        self._due = _due.setdefault(self._loop, [])
        self._frames: deque[bytes] = deque()
        self._bytes = 0  # in _frames; the transport's own buffer comes on top
        self._written = 0  # bytes since the last query
        self._paused = False
        self._is_due = False
        self._closed = False
        self._left = 0  # bytes in the transport at its last progress
        self._taken_at = 0.0  # time of that progress
        self._check: asyncio.TimerHandle | None = None
        self._room: list[asyncio.Future[None]] = []
        self.drained: Callable[[], None] = lambda: None
        """All queued is with the transport and it wants more; and after the end."""

    @property
    def pending_bytes(self) -> int:
        """Not taken by the client's kernel."""
        return self._bytes + (0 if self._closed else self._transport.get_write_buffer_size())

    def take_written(self) -> int:
        written, self._written = self._written, 0
        return written

    def push(self, frame: bytes) -> None:
        """Queue one frame, to be written at the end of this loop tick; a no-op after the end."""
        if self._closed:
            return
        if (self._frames or self._paused) and self.pending_bytes >= self._max_bytes:
            self._cut(f"has not taken {self.pending_bytes} bytes")
            return
        self._frames.append(frame)
        self._bytes += len(frame)
        if not self._paused:
            self._flush_soon()

    async def room(self) -> None:
        """Wait until the transport wants more; return at once after the end."""
        if self._closed or not (self._frames or self._paused):
            return
        waiter = self._loop.create_future()
        self._room.append(waiter)
        await waiter

    def pause(self) -> None:
        self._paused = True
        self._left = self._untaken()
        self._taken_at = self._loop.time()
        if self._check is None:
            self._check = self._loop.call_later(min(_CHECK_S, self._deadline_s / 4), self._check_progress)

    def resume(self) -> None:
        self._paused = False
        self.flush()

    def finish(self) -> None:
        """Hand all to the transport; the owner then sends its goodbye."""
        while self._frames:
            self._transport.write(self._next_write())
        self.close()

    def close(self) -> None:
        self._closed = True
        self._frames.clear()
        self._bytes = 0
        if self._check is not None:
            self._check.cancel()
            self._check = None
        self._wake()

    def flush(self) -> None:
        """Hand frames to the transport until it has enough."""
        self._is_due = False
        transport = self._transport
        while self._frames and not self._paused and transport.get_write_buffer_size() < _WRITE_BYTES:
            transport.write(self._next_write())
        if self._paused:
            return
        if not self._frames and transport.get_write_buffer_size() <= transport.get_write_buffer_limits()[1]:
            self._wake()
        else:
            # uvloop writes, and pauses this queue if needed, at the end of the tick: continue after that.
            self._flush_soon()

    def _flush_soon(self) -> None:
        if self._is_due:
            return
        self._is_due = True
        if not self._due:
            self._loop.call_soon(_flush_due, self._due)
        self._due.append(self)

    def _next_write(self) -> bytes:
        first = self._frames.popleft()
        size = len(first)
        if not self._frames:
            self._bytes = 0
            self._written += size
            return first
        batch = [first]
        while size < _WRITE_BYTES and self._frames and len(batch[-1]) <= _JOINED_BYTES >= len(self._frames[0]):
            batch.append(self._frames.popleft())
            size += len(batch[-1])
        self._bytes -= size
        self._written += size
        return first if len(batch) == 1 else b"".join(batch)

    def _wake(self) -> None:
        self.drained()
        for waiter in self._room:
            if not waiter.done():
                waiter.set_result(None)
        self._room.clear()

    def _check_progress(self) -> None:
        """Cut a client that reads nothing. The keepalive does not: a ping waits behind the queue."""
        self._check = None
        if not self._paused or self._closed:
            return
        left = self._untaken()
        now = self._loop.time()
        if left < self._left:
            self._taken_at = now
        self._left = left
        if now - self._taken_at >= self._deadline_s:
            self._cut(f"has taken nothing for {self._deadline_s:g} s")
        else:
            self._check = self._loop.call_later(min(_CHECK_S, self._deadline_s / 4), self._check_progress)

    def _untaken(self) -> int:
        """Return the bytes that the client has not acknowledged, those in the kernel included.

        It takes no more until much of its queue is sent, which takes a slow client longer than the deadline.
        """
        left = self._transport.get_write_buffer_size()
        descriptor = self._transport.get_extra_info("socket")
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no socket, or it is closed
            queued = fcntl.ioctl(descriptor.fileno(), termios.TIOCOUTQ, bytes(4))
            left += int.from_bytes(queued, sys.byteorder)
        return left

    def _cut(self, why: str) -> None:
        self._log(why)
        self.close()
        self._transport.abort()


MAX_UNSENT_BYTES_PER_TOKEN = 128 * 1024 * 1024
"""Over all connections. A token with no unread bytes always gets one answer of any size."""


class SendBudget:
    """Unread bytes by token."""

    def __init__(self, max_bytes: int = MAX_UNSENT_BYTES_PER_TOKEN) -> None:
        self._max_bytes = max_bytes
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[tuple[int, asyncio.Future[None]]]] = {}

    def held(self, token_id: str) -> int:
        return self._held[token_id]

    def take(self, token_id: str, size: int) -> bool:
        """Count bytes; return False, and count nothing, beyond the bound."""
        if not self._fits(token_id, size):
            return False
        self._held[token_id] += size
        return True

    def give_back(self, token_id: str, size: int) -> None:
        """Uncount bytes, and wake waiters."""
        self._held[token_id] -= size
        if not self._held[token_id]:
            del self._held[token_id]
        waiting = self._waiting.get(token_id, deque())
        while waiting and (waiting[0][1].done() or self._fits(token_id, waiting[0][0])):
            wanted, waiter = waiting.popleft()
            if not waiter.done():
                self._held[token_id] += wanted
                waiter.set_result(None)
        if not waiting:
            self._waiting.pop(token_id, None)

    @asynccontextmanager
    async def reserved(self, token_id: str, size: int) -> AsyncIterator[None]:
        """Wait for room, first come, first served; count the bytes during the block."""
        if token_id in self._waiting or not self.take(token_id, size):
            await self._turn(token_id, size)
        try:
            yield
        finally:
            self.give_back(token_id, size)

    async def _turn(self, token_id: str, size: int) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(token_id, deque()).append((size, waiter))
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():  # its turn came in the same tick
                self.give_back(token_id, size)
            raise

    def _fits(self, token_id: str, size: int) -> bool:
        return not self._held[token_id] or self._held[token_id] + size <= self._max_bytes


CLOSE_TIMEOUT_S = 0.6
"""For a client's close frame; then it is aborted."""
HEAD_TIMEOUT_S = 10.0
"""From connecting or from the last progress of the response before it."""
_SLICE_BYTES = 8 * 1024
_FRAGMENT_BYTES = 256
"""Beside its data."""
_BURST_S = 4
_KEEPALIVE_S = 10.0
_HIGH_WATER_BYTES = 64 * 1024


class PlainHttp(H11Protocol):
    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        *,
        quota: ConnectionQuota,
    ) -> None:
        super().__init__(config, server_state, {**app_state, "quota": quota, "http": self})
        if config.ws_protocol_class is not None:
            self.ws_protocol_class = cast("Any", functools.partial(cast("Any", config.ws_protocol_class), quota=quota))
        self._quota = quota
        self._deadline: asyncio.TimerHandle | None = None
        self._streamed: tuple[SendQueue, Callable[[], None]] | None = None
        self._left = 0  # unread bytes of the last response at the last check

    def stream(self, name: str, lost: Callable[[], None], *, max_bytes: int) -> SendQueue:
        """Return a queue for the body of the response whose head was sent: past uvicorn, and bounded (I10).

        Push whole chunks, or any bytes to a client of HTTP/1.0; then call ``end_stream()``: it is the connection's last
        response. ``lost`` is called if the connection ends before.
        """
        outbox = SendQueue(self.transport, name, max_bytes=max_bytes)
        self._streamed = outbox, lost
        if self.flow.write_paused:
            outbox.pause()
        if self.transport.is_closing():
            self._stream_lost()
        return outbox

    def end_stream(self) -> None:
        """Hand over the queue; abort if the client does not read it in time."""
        if self._streamed is not None:
            self._streamed[0].finish()
            self.loop.call_later(CLOSE_TIMEOUT_S, self.transport.abort)

    def take_streamed(self) -> int:
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
        self._quota.cut = transport.abort
        # The queue is empty here: it only cuts a client that does not read uvicorn's own response.
        self._stalling = SendQueue(transport, self._quota.address, log=self._quota.log_cut)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before or self not in self.connections:  # a request, or it was handed over
            self._head_received()

    def send_400_response(self, msg: str) -> None:
        """Answer data that is not HTTP, unless a response is under way."""
        self._quota.log("no HTTP")
        answering: RequestResponseCycle | None = self.cycle
        if answering is not None and not answering.response_complete:
            answering.disconnected = True  # else its response fails, with a traceback in the log
            self.transport.abort()
        else:
            super().send_400_response(msg)

    def on_response_complete(self) -> None:
        answered = self.cycle
        super().on_response_complete()
        if self.cycle is answered:  # else the next request was there already
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._quota.leave()
        self._head_received()
        self._stalling.close()
        self._stream_lost()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._head_received()
        self._left = self.transport.get_write_buffer_size()
        self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self._head_overdue)

    def _head_overdue(self) -> None:
        """End it, unless it still reads the response before."""
        if self.transport.get_write_buffer_size() < self._left:
            self._await_head()
        else:
            self.transport.abort()

    def _head_received(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()


class Handoff(ServerConnection):
    """One client's WebSocket, made by uvicorn."""

    outbox: SendQueue

    def __init__(
        self,
        config: Config,  # noqa: ARG002
        server_state: ServerState,
        app_state: dict[str, Any],  # noqa: ARG002
        *,
        server: Server,
        quota: ConnectionQuota,
    ) -> None:
        super().__init__(
            ServerProtocol(subprotocols=[Subprotocol(SUBPROTOCOL)], max_size=FIRST_FRAME_BYTES),
            server,
            ping_interval=_KEEPALIVE_S,
            ping_timeout=_KEEPALIVE_S,
            close_timeout=CLOSE_TIMEOUT_S,
            write_limit=_HIGH_WATER_BYTES,
        )
        self._state = server_state
        self.quota = quota
        self._messages_per_s = quota.limits.messages_per_second
        self._messages = TokenBucket(self._messages_per_s * _BURST_S, self.loop.time())
        self._fragments = 0  # bytes held of a message with frames outstanding
        self._over = False
        self.who: Any = None
        """Set by the check of the request."""

    @property
    def peer_name(self) -> str:
        address = self.remote_address
        return f"{address[0]}:{address[1]}" if address else "client"

    def allow_message_bytes(self, limit: int) -> None:
        """Accept longer messages than ``FIRST_FRAME_BYTES``."""
        self.protocol.max_message_size = limit

    def allow_messages_per_s(self, rate: int) -> None:
        self._messages_per_s = rate

    def end(self, code: int, reason: str) -> None:
        """Send the queue and a close frame; abort without an answer in time. Never waits."""
        if self.protocol.state is State.OPEN:
            self.outbox.finish()
            self.protocol.send_close(code, reason.encode()[:120].decode(errors="ignore"))
            self.send_data()
        self.loop.call_later(CLOSE_TIMEOUT_S, self.transport.abort)

    def send_data(self) -> None:
        """Write the library's data; nothing follows a close frame."""
        super().send_data()
        if self.protocol.state in (State.CLOSING, State.CLOSED):
            self.outbox.close()

    # --- asyncio.Protocol, and uvicorn's addition to it ---

    def data_received(self, data: bytes) -> None:
        """Process data in slices: thousands of tiny frames take time."""
        if self.request is not None and self.protocol.state is State.CONNECTING:
            return  # no data may follow before the response, and a failure now would break the response
        for start in range(0, len(data), _SLICE_BYTES):
            if self._over:
                return
            super().data_received(data[start : start + _SLICE_BYTES])
        if not self.quota.holds(self._fragments + len(self.protocol.reader.buffer)):
            self.quota.log("too many bytes of unfinished messages")
            self._end_over("too many unfinished messages with this token")
        if self.outbox.pending_bytes > MAX_PENDING_BYTES:  # pongs count as well
            self.transport.abort()

    def process_event(self, event: Event) -> None:
        """Process one frame, unless there are too many."""
        rate = self._messages_per_s
        if self._messages.take(self.loop.time(), rate=rate, burst=rate * _BURST_S):
            self._end_over(f"more than {rate} messages a second")
        elif not self._over:
            if isinstance(event, Frame) and event.opcode in DATA_OPCODES:
                self._fragments = 0 if event.fin else self._fragments + len(event.data) + _FRAGMENT_BYTES
            super().process_event(event)

    def _end_over(self, limit: str) -> None:
        self._over = True
        self.quota.holds(0)  # it is about to close; cut no other connection for it
        self.end(1012, limit)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.quota.cut = cast("asyncio.Transport", transport).abort
        self._state.connections.add(cast("Any", self))
        super().connection_made(transport)
        self.outbox = SendQueue(self.transport, self.peer_name)

    def connection_lost(self, exc: Exception | None) -> None:
        self._state.connections.discard(cast("Any", self))
        self.quota.leave()
        self.outbox.close()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.outbox.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.outbox.resume()

    def shutdown(self) -> None:
        """Abort: the goodbye was sent before."""
        self.transport.abort()


def websocket_server(
    handler: Callable[[Handoff], Awaitable[None]],
    check: Callable[[Handoff, Request], Awaitable[Response | None] | Response | None],
    is_serving: Callable[[], bool],
) -> Server:
    """Return the server object of the connections.

    ``check`` may refuse a request before the upgrade.
    """
    server = serve(
        cast("Callable[[ServerConnection], Awaitable[None]]", handler),
        process_request=cast("Any", check),
        compression=None,
        server_header=None,
    )
    server.server = cast("asyncio.Server", SimpleNamespace(is_serving=is_serving))
    return server


def http_answer(refusal: ApiError) -> Response:
    headers = Headers(refusal.headers)
    headers["Content-Length"] = str(len(refusal.body))
    return Response(refusal.status, refusal.status.phrase, headers, refusal.body)
