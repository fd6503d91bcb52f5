"""One WebSocket to a project that comes back after every cut, and the requests that travel on it.

A request that was cut off is sent again under its own id after the link is back (I6). The link never stops
silently: even after a refusal (a wrong token, say) it looks again now and then, and at once when a command asks.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import random
import re
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.typing import Subprotocol

from lattice_remote.client.credentials import check_token
from lattice_remote.client.follower import Outcome
from lattice_remote.client.runtime import boot_time
from lattice_remote.client.settings import Remote
from lattice_remote.errors import CODES, ConnectionFailed, ProtocolError, Rejected, RemoteError, StorageError
from lattice_remote.protocol.codec import MAX_FRAME_BYTES, decode_server_frame, encode
from lattice_remote.protocol.messages import (
    SUBPROTOCOL,
    Bye,
    ClientFrame,
    Hello,
    Log,
    Request,
    Response,
    ServerFrame,
    Welcome,
)

__all__ = ["Conversation", "Link", "Signal"]

OPEN_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 0.5
PING_INTERVAL_S = 10.0
PING_TIMEOUT_S = 10.0
ALIVE_S = PING_INTERVAL_S + PING_TIMEOUT_S + 2.0
"""A link from which nothing was heard for longer is not called connected."""
FIRST_DELAY_S, MAX_DELAY_S, REFUSED_DELAY_S = 0.2, 15.0, 30.0
MIN_ATTEMPT_GAP_S = 0.1
MIN_UPTIME_S = 5.0
"""A connection must have lasted this long before the delay starts again from the least."""
UNSENT_PATIENCE_S = 3.0
SENT_PATIENCE_S = 10.0
"""How long a request waits for a link that is down: before it was sent, and after."""
MAX_SENDS = 8
"""How often a request is sent on connections that do not last: one that always ends them must not go on for ever."""
_INBOX = 128
_log = logging.getLogger(__name__)
_REFUSALS = {"REMOTE_UNAUTHORIZED", "REMOTE_FORBIDDEN", "REMOTE_NOT_FOUND", "REMOTE_VERSION"}
_STATUS_CODES = {
    401: ("REMOTE_UNAUTHORIZED", "the server does not know this token"),
    403: ("REMOTE_FORBIDDEN", "this token is not for this project"),
    404: ("REMOTE_NOT_FOUND", "the server has no such project"),
    426: ("REMOTE_VERSION", "the server speaks another version of the protocol"),
}

_Inbox = asyncio.Queue[ServerFrame | RemoteError]


class Conversation(Protocol):
    """What a link talks for: a ``Follower`` or a ``Writer``."""

    async def hello(self) -> Hello:
        """Return the first frame on a new connection."""

    async def receive(self, frames: list[ServerFrame]) -> Outcome:
        """Take frames; an exception ends the connection."""

    async def disconnected(self) -> None:
        """The connection is gone."""


class Signal:
    """Wakes everybody who waits for something to have changed."""

    def __init__(self) -> None:
        self._waiting: asyncio.Future[None] | None = None

    def notify(self) -> None:
        """Something has changed."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
        self._waiting = None

    async def until(self, predicate: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until ``predicate`` holds; return whether it does by the end of ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                while not predicate():
                    if self._waiting is None:
                        self._waiting = asyncio.get_running_loop().create_future()
                    await asyncio.shield(self._waiting)
        except TimeoutError:
            return predicate()
        return True


@dataclass(slots=True, eq=False)
class _Pending:
    """A request that waits for its answer."""

    frame: Request
    answer: "asyncio.Future[Response]"
    asked_at: float = field(default_factory=time.monotonic)
    sends: int = 0
    """How often it was sent, since a connection last lasted."""
    first_sent_at: float | None = None
    """When it was first sent (``boot_time()``), perhaps by an agent before this one."""

    @property
    def is_write(self) -> bool:
        """Whether it is asked so that something changes."""
        return not isinstance(self.frame, Log)

    @property
    def sent(self) -> bool:
        """Whether it may have taken effect."""
        return self.is_write and self.first_sent_at is not None

    def to_send(self) -> Request:
        """Return the frame to send now: one that is sent again says how old it is (SPEC section 3.4)."""
        self.sends += 1
        if self.first_sent_at is None:
            self.first_sent_at = boot_time()
        elif not isinstance(self.frame, Log):
            return msgspec.structs.replace(self.frame, age_s=max(0.0, boot_time() - self.first_sent_at))
        return self.frame


@dataclass(slots=True)
class _Dismissed(Exception):
    """The server said goodbye."""

    bye: Bye


@dataclass(slots=True)
class Link:
    """See the module's text. ``start()`` it once; ``close()`` it in the end."""

    remote: Remote
    conversation: Conversation
    token: str | None = field(repr=False)
    on_heard: Callable[[], None] = lambda: None
    changed: Signal = field(default_factory=Signal)
    """Notified whenever anything below changes."""
    welcome: Welcome | None = None
    """What the server said of itself; None while there is no open conversation."""
    error: RemoteError | None = None
    """Why the last attempt or connection failed; None once one has succeeded."""
    failed_attempts: int = 0
    """Attempts and connections that have ended, ever: tells a waiter that one has failed since it asked."""
    heard_at: float | None = None
    """When the last frame or pong came (``boot_time()``)."""
    _socket: ClientConnection | None = None
    _task: "asyncio.Task[None] | None" = None
    _pending: dict[str, _Pending] = field(default_factory=dict)
    _kicked: asyncio.Event = field(default_factory=asyncio.Event)
    _probe: asyncio.Event = field(default_factory=asyncio.Event)
    _down_since: float = field(default_factory=time.monotonic)
    _streak: int = 0

    # --- life ---

    def start(self) -> None:
        """Begin to connect, and keep at it."""
        self._task = asyncio.get_running_loop().create_task(self._live())

    async def close(self) -> None:
        """End the connection; requests that wait fail."""
        if self._socket is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._socket.close()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for pending in self._pending.values():
            pending.answer.cancel()

    def kick(self) -> None:
        """A command wants the link: don't sit out the delay; if it has been silent for a while, probe it."""
        self._kicked.set()
        if self.silence_s() > PING_INTERVAL_S + 2:
            self._probe.set()

    def use_token(self, token: str | None) -> None:
        """Connect with another token from now on."""
        if token != self.token:
            self.token = token
            self.error = None
            self.abort()
            self.kick()

    def abort(self) -> None:
        """Cut the connection; a new one is made."""
        if self._socket is not None:
            self._socket.transport.abort()

    @property
    def is_open(self) -> bool:
        """Whether the conversation is under way, and the server was heard within what the keepalive allows."""
        return self.welcome is not None and self.silence_s() <= ALIVE_S

    @property
    def is_waiting(self) -> bool:
        """Whether a request waits for its answer."""
        return bool(self._pending)

    @property
    def is_refused(self) -> bool:
        """Whether the server said no: trying again changes nothing until something else does."""
        return self.error is not None and self.error.code in _REFUSALS

    def silence_s(self) -> float:
        """Return the seconds since the last frame or pong; infinite before the first."""
        return float("inf") if self.heard_at is None else boot_time() - self.heard_at

    # --- requests ---

    async def ask(self, frame: Request, *, first_sent_at: float | None = None) -> Response:
        """Send a request and return its answer, whatever cuts come in between.

        ``first_sent_at`` is when (``boot_time()``) it may have been sent by somebody else, under the same id.

        Raises:
            Rejected: the server refuses this token, project or version.
            ConnectionFailed: out of reach for too long; ``sent`` tells whether it may have taken effect.
        """
        pending = _Pending(frame, asyncio.get_running_loop().create_future(), first_sent_at=first_sent_at)
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

    async def _answered(self, pending: _Pending, failed_before: int) -> bool:
        """Wait a while for the answer; give up when the link has been down for too long."""
        self._give_up(pending, failed_before)
        await asyncio.wait([pending.answer], timeout=0.1)
        return pending.answer.done()

    def _give_up(self, pending: _Pending, failed_before: int) -> None:
        if self.welcome is not None or pending.answer.done():
            return
        if self.is_refused and self.failed_attempts > failed_before and self.error is not None:
            raise self.error
        if isinstance(self.error, StorageError) and self.failed_attempts > failed_before:
            effect = "the command may have taken effect" if pending.sent else "nothing was sent"
            raise StorageError(f"{self.error.message}; {effect}")
        patience = SENT_PATIENCE_S if pending.sent else UNSENT_PATIENCE_S
        since = max(self._down_since, pending.asked_at)
        if time.monotonic() - since > patience or pending.sends >= MAX_SENDS:
            raise self.unreachable(sent=pending.sent, is_write=pending.is_write)

    def unreachable(self, *, sent: bool = False, is_write: bool = True) -> ConnectionFailed:
        """Return the error that says why there is no connection."""
        why = f" ({self.error.message})" if self.error is not None else ""
        if sent:
            return ConnectionFailed(
                f"lost the connection to server {self.remote.url}{why}; the command may have taken effect: look before "
                "you repeat it",
                sent=True,
            )
        return ConnectionFailed(
            f"cannot reach server {self.remote.url}{why}" + ("; nothing was written" if is_write else "")
        )

    async def _send_pending(self, pending: _Pending) -> None:
        if self.welcome is not None:
            await self.send(pending.to_send())

    async def send(self, *frames: ClientFrame) -> None:
        """Send frames if there is a connection; one that fails here is noticed where frames are received."""
        with contextlib.suppress(ConnectionClosed):
            for frame in frames:
                if self._socket is not None:
                    await self._socket.send(encode(frame))

    async def carry_out(self, outcome: Outcome) -> None:
        """Send what a batch led to, and hand answers to those who wait for them."""
        for answer in outcome.answers:
            pending = self._pending.get(answer.id)
            if pending is not None and not pending.answer.done():
                pending.answer.set_result(answer)
        await self.send(*outcome.to_send)
        self.changed.notify()

    # --- connections ---

    async def _live(self) -> None:
        while True:
            self._kicked.clear()
            began = time.monotonic()
            retry_after_s: float | None = None
            try:
                await self._converse()
            except _Dismissed as goodbye:
                retry_after_s = goodbye.bye.retry_after_s
                self.error = _error_of(goodbye.bye.code, goodbye.bye.reason)
            except RemoteError as error:
                self.error = error
            except Exception as error:  # noqa: BLE001
                # A defect of ours must not end the link silently: it is logged, shown, and tried again.
                _log.exception("the link to %s failed", self.remote.url)
                self.error = RemoteError(f"internal error: {error!r}")
            finally:
                await self._hang_up()
            self.failed_attempts += 1
            self.changed.notify()
            self._count(lasted=time.monotonic() - began > MIN_UPTIME_S)
            await self._sit_out(retry_after_s)

    def _count(self, *, lasted: bool) -> None:
        self._streak = 0 if lasted else self._streak + 1
        if lasted:
            for pending in self._pending.values():
                pending.sends = min(pending.sends, 1)

    async def _hang_up(self) -> None:
        if self.welcome is not None:
            self._down_since = time.monotonic()
        self.welcome = None
        if self._socket is not None:
            self._socket.transport.abort()
            self._socket = None
        await self.conversation.disconnected()

    async def _sit_out(self, retry_after_s: float | None) -> None:
        """Wait before the next attempt: full jitter, unless a command asks meanwhile."""
        if self.is_refused:
            delay = REFUSED_DELAY_S
        elif retry_after_s is not None:
            delay = retry_after_s + random.uniform(0, FIRST_DELAY_S)  # noqa: S311 - spreads load, hides nothing
        else:
            # The exponent is bounded too: after a thousand failures the power alone would be past any float.
            delay = random.uniform(0, min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** min(self._streak, 10)))  # noqa: S311
        await asyncio.sleep(MIN_ATTEMPT_GAP_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._kicked.wait()

    async def _converse(self) -> None:
        """Connect, greet, and talk until the connection ends, which is always an exception."""
        self._socket = await self._connect()
        inbox: _Inbox = asyncio.Queue(_INBOX)
        await self._socket.send(encode(await self.conversation.hello()))
        jobs: list[Awaitable[None]] = [
            self._read(self._socket, inbox),
            self._talk(inbox),
            self._keep_alive(self._socket, inbox),
        ]
        tasks = [asyncio.ensure_future(job) for job in jobs]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        errors = [result for result in results if isinstance(result, Exception)]
        # A reason that was given, by the server or by the files, says more than the closing that came with it.
        raise min(errors, key=lambda error: isinstance(error, ConnectionFailed))

    async def _connect(self) -> ClientConnection:
        if self.token is None:
            raise Rejected(
                f"no token for {self.remote.url}; log in with: lattice remote login {self.remote.url}",
                code="REMOTE_UNAUTHORIZED",
            )
        check_token(self.token)
        try:
            return await connect(
                self.remote.websocket_url,
                subprotocols=[Subprotocol(SUBPROTOCOL)],
                additional_headers={"Authorization": f"Bearer {self.token}"},
                compression=None,
                max_size=MAX_FRAME_BYTES,
                open_timeout=OPEN_TIMEOUT_S,
                ping_interval=None,
                close_timeout=1,
            )
        except InvalidStatus as refusal:
            raise _refused(refusal, self.remote) from refusal
        except TimeoutError as error:
            raise ConnectionFailed("it does not answer") from error
        except ssl.SSLError as error:
            raise ConnectionFailed(f"TLS: {error.reason or error}") from error
        except OSError as error:
            raise ConnectionFailed(_describe(error)) from error
        except (InvalidHandshake, InvalidURI, EOFError, ValueError) as error:
            raise ConnectionFailed("what answers there is not a lattice-remote server") from error

    async def _read(self, socket: ClientConnection, inbox: _Inbox) -> None:
        """Decode what comes; apart from taking it, so that a slow disk does not look like a silent server.

        What ends the connection goes through the inbox too: the frames before it, a goodbye say, come first.
        """
        try:
            while True:
                data = await socket.recv()
                self._hear()
                await inbox.put(_frame_of(data))
        except ConnectionClosed as closed:
            reason = f": {_one_line(closed.rcvd.reason)}" if closed.rcvd is not None and closed.rcvd.reason else ""
            await inbox.put(ConnectionFailed(f"the connection was closed{reason}"))
        except ProtocolError as violation:
            await inbox.put(violation)

    async def _talk(self, inbox: _Inbox) -> None:
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                await self._take([await inbox.get()])
        except TimeoutError as error:
            raise ConnectionFailed("it accepts the connection but says nothing") from error
        while True:
            items = [await inbox.get()]
            while not inbox.empty() and len(items) < _INBOX:
                items.append(inbox.get_nowait())
            await self._take(items)

    async def _take(self, items: list[ServerFrame | RemoteError]) -> None:
        """Hand on the frames that come before a goodbye or a failure, then end with that."""
        frames = list(itertools.takewhile(lambda item: not isinstance(item, Bye | RemoteError), items))
        if frames:
            await self.carry_out(await self.conversation.receive(cast("list[ServerFrame]", frames)))
            if self.welcome is None and isinstance(frames[0], Welcome):
                await self._welcomed(frames[0])
        if len(frames) < len(items):
            end = items[len(frames)]
            raise _Dismissed(end) if isinstance(end, Bye) else cast("RemoteError", end)

    async def _welcomed(self, welcome: Welcome) -> None:
        self.welcome = welcome
        self.error = None
        self.changed.notify()
        for pending in list(self._pending.values()):
            await self._send_pending(pending)

    def _hear(self) -> None:
        self.heard_at = boot_time()
        self.on_heard()

    async def _keep_alive(self, socket: ClientConnection, inbox: _Inbox) -> None:
        """Ping a silent server; give up one that does not answer. A full inbox is our own slowness, not its."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PING_INTERVAL_S):
                    await self._probe.wait()
            self._probe.clear()
            if inbox.full():
                continue
            try:
                async with asyncio.timeout(PING_TIMEOUT_S):
                    await (await socket.ping())
            except TimeoutError as error:
                raise ConnectionFailed(f"no answer to a ping within {PING_TIMEOUT_S:.0f} s") from error
            self._hear()
            self.changed.notify()


def _frame_of(data: str | bytes) -> ServerFrame:
    if isinstance(data, str):
        raise ProtocolError("a text message; frames are binary")
    return decode_server_frame(data)


def _refused(refusal: InvalidStatus, remote: Remote) -> RemoteError:
    """Return the error for an HTTP answer in place of the upgrade."""
    status = refusal.response.status_code
    code, message = _STATUS_CODES.get(status, ("", ""))
    try:
        said: dict[str, Any] = json.loads(refusal.response.body or b"")["error"]
        code, message = str(said["code"]), str(said["message"])
    except (ValueError, TypeError, KeyError):
        pass  # not our server's own answer: a proxy's, say
    if not code:
        return ConnectionFailed(f"it answers HTTP {status}")
    hint = f"; log in with: lattice remote login {remote.url}" if code == "REMOTE_UNAUTHORIZED" else ""
    return _error_of(code, f"{remote.url}: {message}{hint}")


def _error_of(code: str, message: str) -> RemoteError:
    message = _one_line(message)
    if code in _REFUSALS:
        return Rejected(message, code=code)
    if code == "REMOTE_PROTOCOL":
        return ProtocolError(message)
    return ConnectionFailed(message, code=code if code in CODES else None)


def _one_line(text: str) -> str:
    """Return what a peer says as one printable line: it is shown on a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)[:500].strip()


def _describe(error: OSError) -> str:
    """Return why a connection failed, in the system's own words: ``connection refused``."""
    numbers = [error.errno] if error.errno else [int(n) for n in re.findall(r"\[Errno (\d+)\]", str(error))]
    reason = os.strerror(numbers[0]) if numbers and numbers[0] > 0 else error.strerror or str(error)
    return _one_line(reason[:1].lower() + reason[1:])
