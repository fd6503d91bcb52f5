"""Reconnecting WebSocket to one project, and the requests sent on it.

A request that was cut off is sent again under its id (I6). Refusals, such as of a token, do not end the attempts: they
continue now and then, and at once when a command asks or the token changes.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, cast

import msgspec
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from lattice_remote.client.agent_runtime import boot_time
from lattice_remote.client.cache.replicator import ReceiveOutcome
from lattice_remote.client.config import Remote
from lattice_remote.client.connection.dial import (
    MAX_RESETS,
    MIN_UPTIME_S,
    RESET_WINDOW_S,
    Backoff,
    RetryLater,
    error_of,
    open_socket,
)
from lattice_remote.client.trusted_servers import Server
from lattice_remote.errors import (
    REFUSALS,
    ConnectionFailed,
    ProtocolError,
    Rejected,
    RemoteError,
    StorageError,
    one_line,
)
from lattice_remote.protocol.messages import (
    MAX_FRAME_BYTES,
    Bye,
    Call,
    ClientFrame,
    Hello,
    Log,
    Parts,
    Put,
    Refused,
    Request,
    Response,
    Run,
    ServerFrame,
    Welcome,
    Write,
    decode_server_frame,
    encode,
    needed_capability,
)

__all__ = ["Condition", "Connection", "PendingRequest", "RequestSender", "Session", "expect", "refusal_of"]

FIRST_FRAME_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 0.5
PING_INTERVAL_S = 10.0
PING_TIMEOUT_S = 10.0
ALIVE_S = PING_INTERVAL_S + PING_TIMEOUT_S + 2.0
"""A connection that was silent for longer does not count as connected."""
MIN_ATTEMPT_GAP_S = 0.1
ASKED_DELAY_S = 0.5
"""Longest delay between attempts while a request waits."""
MAX_FRAMES = 128
MAX_BYTES = 64 * 1024 * 1024
MAX_FRAGMENTS = 1024
"""Most fragments of a message: empty ones cost the sender nothing."""
UNSENT_PATIENCE_S = 3.0
SENT_PATIENCE_S = 10.0
"""Longest wait of a request for a lost connection: before it was sent, and after."""
MAX_SENDS = 8
"""Most sends of a request over connections that do not last."""
_VIOLATIONS = {1002, 1007, 1009}
"""Close codes with which the library reports a violation of WebSocket by the peer."""
_log = logging.getLogger(__name__)


# --- requests and their answers ---


class RequestSender(Protocol):
    async def send_request(self, frame: Request) -> Response: ...


def expect[T: Response](answer: Response, kind: type[T], *, sent: bool = False) -> T:
    """Return an answer of the expected kind.

    Raises:
        Rejected: the server refused the request.
        ConnectionFailed: another kind; ``sent``: the request may have taken effect.
    """
    if isinstance(answer, Refused):
        raise Rejected(answer.message, code=answer.code)
    if not isinstance(answer, kind):
        raise ConnectionFailed("unexpected response from the server", sent=sent)
    return answer


@dataclass(slots=True, eq=False)
class PendingRequest:
    frame: Request
    answer: "asyncio.Future[Response]"
    asked_at: float = field(default_factory=time.monotonic)
    sends: int = 0
    """Sends since a connection last lasted."""
    first_sent_at: float | None = None
    """Time of the first send (``boot_time()``), perhaps by an earlier agent."""
    is_kept: bool = False
    """Whether the caller keeps an edit and sends it again under its id: no error says that it is in doubt."""

    @property
    def is_write(self) -> bool:
        return isinstance(self.frame, Write)

    @property
    def patience_s(self) -> float:
        is_under_way = self.first_sent_at is not None and not isinstance(self.frame, Log)
        return SENT_PATIENCE_S if is_under_way else UNSENT_PATIENCE_S

    @property
    def sent(self) -> bool:
        return self.is_write and self.first_sent_at is not None

    @property
    def is_in_doubt(self) -> bool:
        return self.sent and not self.is_kept

    def to_send(self) -> Request:
        """Return the frame to send now; a resent one carries its age (SPEC section 3.4)."""
        self.sends += 1
        if self.first_sent_at is None:
            self.first_sent_at = boot_time()
        elif isinstance(self.frame, Write):
            return msgspec.structs.replace(self.frame, age_s=max(0.0, boot_time() - self.first_sent_at))
        return self.frame


def refusal_of(frame: Request, welcome: Welcome) -> Refused | None:
    """Return the refusal of a request that this server does not support (SPEC V3 and 2.4)."""
    return _not_offered(frame, welcome) or _too_large(frame, welcome)


def _not_offered(frame: Request, welcome: Welcome) -> Refused | None:
    needed = needed_capability(frame)
    if needed is None or needed in welcome.capabilities:
        return None
    server = one_line(f"the server (lattice-remote {welcome.server_version})")
    surface = needed.removeprefix("call:")
    why = f"{server} does not offer {surface}: install lattice-remote[{surface}] on the server"
    return Refused(frame.id, "REMOTE_VERSION", why)


def _too_large(frame: Request, welcome: Welcome) -> Refused | None:
    limits = welcome.limits
    if isinstance(frame, Put) and len(frame.text) > limits.max_text_bytes:
        takes = f"it has {len(frame.text)} bytes, the server takes at most {limits.max_text_bytes}"
        return Refused(frame.id, "REMOTE_TOO_LARGE", takes)
    size, limit = len(encode(frame)), min(limits.max_frame_bytes, MAX_FRAME_BYTES)
    largest = _largest_file(frame)
    if largest <= limits.max_file_bytes and size <= limit:
        return None
    return Refused(
        frame.id,
        "REMOTE_TOO_LARGE",
        f"this takes {size} bytes, {largest} of them one file; the server takes at most {limit}, and "
        f"{limits.max_file_bytes} of a file",
    )


def _largest_file(frame: Request) -> int:
    match frame:
        case Run() | Call():
            return max((len(file.data or b"") for file in frame.files), default=0)
        case Put():
            return len(frame.text)
        case _:
            return 0


Item = ServerFrame | RemoteError
"""A frame, or the error that ended the connection after the frames before it."""


class ReceiveQueue:
    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()

    @property
    def is_full(self) -> bool:
        return len(self._items) >= MAX_FRAMES or self._bytes >= MAX_BYTES

    async def put(self, item: Item, size: int = 0) -> None:
        """Add an item of ``size`` bytes once there is room."""
        while self.is_full:
            await self._next_change()
        self._items.append(item)
        self._bytes += size
        self._changed.set()

    async def take(self) -> list[Item]:
        while not self._items:
            await self._next_change()
        items = list(self._items)
        self._items.clear()
        self._bytes = 0
        self._changed.set()
        return items

    async def _next_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


async def read_frames(socket: ClientConnection, queue: ReceiveQueue, on_heard: Callable[[], None]) -> None:
    """Decode frames into ``queue``. A slow disk delays the session, but must not look like a silent server.

    The connection's end goes through the queue too, after the frames before it, such as a goodbye.
    """
    try:
        while True:
            data = await _message(socket)
            on_heard()
            frame = decode_server_frame(data)
            await queue.put(frame, len(data) + (frame.size if isinstance(frame, Parts) else 0))
    except ConnectionClosed as closed:
        await queue.put(closing_error(closed))
    except ProtocolError as violation:
        await queue.put(violation)


def closing_error(closed: ConnectionClosed) -> RemoteError:
    if closed.sent is not None and closed.rcvd is None and closed.sent.code in _VIOLATIONS:
        return ProtocolError(f"the server broke the protocol: {closed.sent.reason}")
    reason = f": {closed.rcvd.reason}" if closed.rcvd is not None and closed.rcvd.reason else ""
    return ConnectionFailed(f"the connection was closed{reason}")


async def _message(socket: ClientConnection) -> bytes:
    """Return the next message. Raises ProtocolError for text and too many fragments, ConnectionClosed."""
    pieces: list[bytes] = []
    async for piece in socket.recv_streaming():
        if isinstance(piece, str):
            raise ProtocolError("a text message; frames are binary")
        pieces.append(piece)
        if len(pieces) > MAX_FRAGMENTS:
            raise ProtocolError(f"a message in more than {MAX_FRAGMENTS} pieces")
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class Session(Protocol):
    @property
    def is_current(self) -> bool: ...

    async def hello(self) -> Hello: ...

    async def receive(self, frames: list[ServerFrame]) -> ReceiveOutcome: ...

    async def disconnected(self) -> None: ...


class Condition:
    def __init__(self) -> None:
        self._waiting: asyncio.Future[None] | None = None

    def notify(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
        self._waiting = None

    async def until(self, predicate: Callable[[], bool], timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while not predicate():
                    if self._waiting is None:
                        self._waiting = asyncio.get_running_loop().create_future()
                    await asyncio.shield(self._waiting)
        except TimeoutError:
            return predicate()
        return True


@dataclass(slots=True)
class Connection:
    """Reconnecting connection to one project; ``start()`` and ``close()`` it once."""

    remote: Remote
    session: Session
    token: str | None = field(repr=False)
    named: Server | None = None
    """A server from the environment, in addition to the stored ones."""
    on_heard: Callable[[], None] = lambda: None
    changed: Condition = field(default_factory=Condition)
    """Notified whenever anything below changes."""
    welcome: Welcome | None = None
    """None while disconnected."""
    error: RemoteError | None = None
    """Of the last attempt or connection; None after a success."""
    failed_attempts: int = 0
    """Ended attempts and connections: a waiter sees by it that one has failed since."""
    heard_at: float | None = None
    """Time of the last frame or pong (``boot_time()``)."""
    _socket: ClientConnection | None = None
    _is_accepted: bool = False  # the server has accepted the connection, and has not said more yet
    _task: "asyncio.Task[None] | None" = None
    _pending: dict[str, PendingRequest] = field(default_factory=dict)
    _kicked: asyncio.Event = field(default_factory=asyncio.Event)
    _probe: asyncio.Event = field(default_factory=asyncio.Event)
    _down_since: float = field(default_factory=time.monotonic)
    _backoff: Backoff = field(default_factory=Backoff)
    _was_current: bool = False
    _offered: str = ""  # the epoch of the last Hello
    _epoch: str = ""  # of the last Welcome
    _verdict: RemoteError | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Fail the pending requests and disconnect."""
        if self._socket is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._socket.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})  # awaiting the task itself would hide our own cancellation
        for pending in self._pending.values():
            pending.answer.cancel()

    def kick(self) -> None:
        if self.welcome is None:
            self._kicked.set()
        if self.silence_s() > PING_INTERVAL_S + 2:
            self._probe.set()

    def use_token(self, token: str | None) -> None:
        if token != self.token:
            self.token = token
            self.error = None
            self.abort()
            self.try_again()

    def try_again(self) -> None:
        self._backoff.lift()
        self._kicked.set()

    def abort(self, why: RemoteError | None = None) -> None:
        """Disconnect with the error ``why``; counts as a failure."""
        self._verdict = why
        if self._socket is not None:
            self._socket.transport.abort()

    @property
    def is_open(self) -> bool:
        return self.welcome is not None and self.silence_s() <= ALIVE_S

    @property
    def is_waiting(self) -> bool:
        return bool(self._pending)

    @property
    def is_refused(self) -> bool:
        return self.error is not None and self.error.code in REFUSALS

    @property
    def is_barred(self) -> bool:
        return self._backoff.barred_s(time.monotonic()) > 0

    def silence_s(self) -> float:
        """Return the seconds since the last frame or pong."""
        return float("inf") if self.heard_at is None else boot_time() - self.heard_at

    async def send_request(
        self, frame: Request, *, first_sent_at: float | None = None, is_kept: bool = False
    ) -> Response:
        """Return the answer to a request, sent again after a reconnect.

        ``first_sent_at`` (``boot_time()``): an earlier sender's time under the same id. ``is_kept``: an edit that
        the caller sends again until it is answered.

        Raises:
            Rejected: the server refuses this token, project or version.
            ConnectionFailed: unreachable for too long; ``sent`` says whether it may have taken effect.
        """
        pending = PendingRequest(
            frame, asyncio.get_running_loop().create_future(), first_sent_at=first_sent_at, is_kept=is_kept
        )
        self._pending[frame.id] = pending
        failed_before = self.failed_attempts
        self.kick()
        try:
            await self._send_pending(pending)
            while not await self._answered(pending, failed_before):
                pass
            return pending.answer.result()
        finally:
            del self._pending[frame.id]

    async def _answered(self, pending: PendingRequest, failed_before: int) -> bool:
        """Wait 0.1 s for the answer; raise if the connection is lost for too long."""
        self._give_up(pending, failed_before)
        await asyncio.wait([pending.answer], timeout=0.1)
        return pending.answer.done()

    def _give_up(self, pending: PendingRequest, failed_before: int) -> None:
        if self.welcome is not None or pending.answer.done():
            return
        if self.is_refused and self.failed_attempts > failed_before and self.error is not None:
            if pending.is_in_doubt:
                message = f"{self.error.message}; the command may have taken effect: look before you repeat it"
                raise Rejected(message, code=self.error.code)
            raise self.error
        if self._backoff.barred_s(time.monotonic()) > UNSENT_PATIENCE_S:
            raise self.unreachable(sent=pending.is_in_doubt, is_write=not pending.sent)
        if isinstance(self.error, StorageError) and self.failed_attempts > failed_before:
            effect = "the command may have taken effect" if pending.is_in_doubt else "nothing was sent"
            raise StorageError(f"{self.error.message}; {effect}")
        if self._is_accepted:
            return  # the attempt has time limits of its own: a server that has just started may be slow
        since = max(self._down_since, pending.asked_at)
        if time.monotonic() - since > pending.patience_s or pending.sends >= MAX_SENDS:
            raise self.unreachable(sent=pending.is_in_doubt, is_write=pending.is_write and not pending.sent)

    def unreachable(self, *, sent: bool = False, is_write: bool = True) -> ConnectionFailed:
        why = f" ({self.error.message if self.error is not None else 'no answer yet'})"
        if sent:
            return ConnectionFailed(
                f"lost the connection to server {self.remote.url}{why}; the command may have taken effect: look before "
                "you repeat it",
                sent=True,
            )
        return ConnectionFailed(
            f"cannot reach server {self.remote.url}{why}" + ("; nothing was written" if is_write else "")
        )

    async def _send_pending(self, pending: PendingRequest) -> None:
        if self.welcome is None or pending.answer.done():
            return
        if not pending.sent and (refused := refusal_of(pending.frame, self.welcome)) is not None:
            pending.answer.set_result(refused)
        else:
            await self.send(pending.to_send())

    async def send(self, *frames: ClientFrame) -> None:
        """Send frames if connected."""
        with contextlib.suppress(ConnectionClosed):
            for frame in frames:
                if self._socket is not None:
                    await self._socket.send(encode(frame))

    async def carry_out(self, outcome: ReceiveOutcome) -> None:
        for answer in outcome.answers:
            pending = self._pending.get(answer.id)
            if pending is not None and not pending.answer.done():
                pending.answer.set_result(answer)
        await self.send(*outcome.to_send)
        self.changed.notify()

    async def _run(self) -> None:
        while True:
            self._kicked.clear()
            began = time.monotonic()
            self._was_current = False
            try:
                await self._converse()
            except RemoteError as error:
                self.error = error
            except ConnectionClosed as closed:
                self.error = closing_error(closed)
            except Exception as error:  # noqa: BLE001
                # A defect must not end the connection silently: log it, show it, try again.
                _log.exception("the connection to %s failed", self.remote.url)
                self.error = RemoteError(f"internal error: {error!r}")
            finally:
                await self._hang_up()
            self.failed_attempts += 1
            delay_s = self._ended(time.monotonic(), lasted=self._has_lasted(began))
            self.changed.notify()
            await self._sit_out(delay_s)

    def _has_lasted(self, began: float) -> bool:
        verdict, self._verdict = self._verdict, None
        if verdict is not None:
            self.error = verdict
        return verdict is None and self._was_current and time.monotonic() - began > MIN_UPTIME_S

    def _ended(self, now: float, *, lasted: bool) -> float:
        """Record a connection's end; return the delay in seconds."""
        if lasted:
            for pending in self._pending.values():
                pending.sends = min(pending.sends, 1)
        error = self.error
        delay_s = self._backoff.ended(
            now,
            lasted=lasted,
            is_refused=self.is_refused,
            retry_after_s=error.retry_after_s if isinstance(error, RetryLater) else None,
            binds=error is not None and error.code != "REMOTE_SHUTDOWN",
        )
        if self.is_barred:
            self.error = self._explain_bar(now)
        return delay_s

    def _explain_bar(self, now: float) -> RemoteError:
        seconds, resets = self._backoff.barred_s(now), self._backoff.resets(now)
        if resets >= MAX_RESETS:
            return ConnectionFailed(
                f"it reset this cache {resets} times within {RESET_WINDOW_S / 60:.0f} minutes; next "
                f"attempt in {seconds:.0f} s; its administrator should check its log"
            )
        why, code = (self.error.message, self.error.code) if self.error is not None else ("", None)
        return ConnectionFailed(f"{why}; next attempt in {seconds:.0f} s", code=code)

    def _accepted(self) -> None:
        self._is_accepted = True

    async def _hang_up(self) -> None:
        self._is_accepted = False
        if self.welcome is not None:
            self._down_since = time.monotonic()
        self.welcome = None
        if self._socket is not None:
            self._socket.transport.abort()
            self._socket = None
        await self.session.disconnected()

    async def _sit_out(self, delay_s: float) -> None:
        """Wait for the next attempt, unless a command asks and no bar applies."""
        least_s = max(MIN_ATTEMPT_GAP_S, self._backoff.barred_s(time.monotonic()))
        if self._pending and not self.is_refused:
            delay_s = min(delay_s, least_s + ASKED_DELAY_S)
        await asyncio.sleep(least_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s - least_s):
                await self._kicked.wait()

    async def _converse(self) -> None:
        self._socket = await open_socket(self.remote, self.token, self.named, self._accepted)
        queue = ReceiveQueue()
        hello = await self.session.hello()
        self._offered = hello.epoch
        await self._socket.send(encode(hello))
        jobs: list[Awaitable[None]] = [
            read_frames(self._socket, queue, self._hear),
            self._talk(queue),
            self._keep_alive(self._socket, queue),
        ]
        tasks = [asyncio.ensure_future(job) for job in jobs]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        errors = [result for result in results if isinstance(result, Exception)]
        # An explicit reason, from the server or the files, says more than the close that came with it.
        raise min(errors, key=lambda error: isinstance(error, ConnectionClosed) or type(error) is ConnectionFailed)

    async def _talk(self, queue: ReceiveQueue) -> None:
        try:
            async with asyncio.timeout(FIRST_FRAME_TIMEOUT_S):
                items = await queue.take()
        except TimeoutError as error:
            raise ConnectionFailed("it accepts the connection but sends nothing") from error
        while True:
            await self._take(items)
            items = await queue.take()

    async def _take(self, items: list[Item]) -> None:
        frames = cast(
            "list[ServerFrame]", list(itertools.takewhile(lambda item: not isinstance(item, Bye | RemoteError), items))
        )
        greeting = frames[0] if frames and self.welcome is None else None
        if isinstance(greeting, Welcome):
            self._note_reset(greeting)
        if frames:
            taken = [frame for frame in frames if not self._is_unasked(frame)]
            await self.carry_out(await self.session.receive(taken))
            self._was_current = self._was_current or self.session.is_current
        if isinstance(greeting, Welcome):
            await self._welcomed(greeting)
        if len(frames) < len(items):
            end = items[len(frames)]
            if isinstance(end, Bye):
                raise error_of(end.code, end.reason, self.remote, end.retry_after_s)
            raise cast("RemoteError", end)

    def _is_unasked(self, frame: ServerFrame) -> bool:
        """Return whether this answers no pending request: unlimited, such frames would fill the memory."""
        return isinstance(frame, Response) and frame.id not in self._pending and self.welcome is not None

    def _note_reset(self, welcome: Welcome) -> None:
        """Count resets of this cache, except first fills."""
        if welcome.resync and (self._offered or self._epoch not in ("", welcome.epoch)):
            self._backoff.was_reset(time.monotonic())
        self._epoch = welcome.epoch

    async def _welcomed(self, welcome: Welcome) -> None:
        self.welcome = welcome
        self._kicked.clear()
        self.error = None
        self.changed.notify()
        for pending in list(self._pending.values()):
            await self._send_pending(pending)

    def _hear(self) -> None:
        self.heard_at = boot_time()
        self.on_heard()

    async def _keep_alive(self, socket: ClientConnection, queue: ReceiveQueue) -> None:
        """Ping a silent server; abort without an answer. A full queue means a slow client, not a silent server."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PING_INTERVAL_S):
                    await self._probe.wait()
            self._probe.clear()
            if queue.is_full:
                continue
            try:
                async with asyncio.timeout(PING_TIMEOUT_S):
                    await (await socket.ping())
            except TimeoutError as error:
                raise ConnectionFailed(f"no answer to a ping within {PING_TIMEOUT_S:.0f} s") from error
            self._hear()
            self.changed.notify()
