"""Connection to NATS JetStream: requests, streams, messages.

A request has a timeout and is never kept back while the connection is down: it raises EngineUnavailable. After that
the outcome is unknown, as the engine may have carried out the request and only the answer was lost.
"""

import asyncio
import base64
import json
import logging
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from email.parser import BytesParser
from http import HTTPStatus
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import msgspec
import nats.errors
from nats.aio.client import Client, Srv
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport

from lattice_remote.errors import Misuse, StorageError

__all__ = [
    "FULL",
    "NAME_IN_USE",
    "NO_STREAM",
    "WRONG_SEQUENCE",
    "Ack",
    "EngineFull",
    "EngineRefused",
    "EngineUnavailable",
    "JetStream",
    "StoredMessage",
    "StreamInfo",
    "cancellable",
    "persist",
    "server_problems",
    "ungrouped",
]

REQUEST_S = 2.0
"""Time for an answer. An append takes some ms; an election of the engine 1 to 5 s."""
_FIRST_MESSAGE_S = (0.25, 0.25, 0.5, REQUEST_S)
"""Times for the first message of a read, which is sent again after each: it may have gone to a replica cut off."""
_CONNECT_S, _CLOSE_S = 10.0, 2.0
_REOPEN_S = 1.0
_PERSIST_S = 60.0
"""Longest wait for an engine without a quorum, where the caller cannot go on without it."""
_HEADERS_BYTES = 4096
"""Of a message's size limit, kept for its headers."""
_MONITOR_S = 3.0
_FRESH_S = 3.0
"""A server that hears from no leader for 4 s stands for election."""
_SLACK_BYTES = 1 << 20
_END, _NOTHING = "204", "404"

NO_MESSAGE, NO_STREAM, NAME_IN_USE = 10037, 10059, 10058
_NOT_CLUSTERED = 10074
WRONG_SEQUENCE = (10071, 10164)
FULL = (10002, 10023, 10028, 10047, 10077)
"""Limits of the stream, the account or the disk are reached; the message was not stored."""
_UNKNOWN_CA = (18, 19, 20, 21)
"""OpenSSL's numbers for a certificate whose authority is unknown."""
_TEMPORARY = (10004, 10005, 10008, 10009, 10118)

_log = logging.getLogger(__name__)


class EngineUnavailable(StorageError):
    """The engine did not answer in time, or has no quorum. The request may have been carried out."""

    code = "REMOTE_BUSY"


class EngineRefused(StorageError):
    """A refusal by the engine; ``number`` is JetStream's ``err_code``. Nothing was changed."""

    said = "NATS refused the request"

    def __init__(self, number: int, description: str) -> None:
        super().__init__(f"{self.said}: {description} ({number})")
        self.number = number
        self.description = description


class EngineFull(EngineRefused):
    """A limit of the stream, the account or the disk is reached; nothing was stored."""

    said = "NATS cannot store more"


class StreamState(msgspec.Struct):
    """Contents of a stream; without messages ``first_seq`` is ``last_seq + 1``."""

    messages: int
    bytes: int
    first_seq: int
    last_seq: int
    subjects: dict[str, int] = {}


class StreamReplica(msgspec.Struct):
    """A replica beside the leader; ``active`` is the time in ns since the leader heard from it."""

    name: str
    current: bool = False
    active: int = 0
    offline: bool = False
    lag: int = 0


class _Group(msgspec.Struct):
    leader: str = ""
    replicas: list[StreamReplica] = []


class StreamInfo(msgspec.Struct):
    """Answer of a stream's leader, or of a server that still believes itself the leader (``is_fresh``)."""

    created: str
    config: dict[str, Any]
    state: StreamState
    cluster: _Group | None = None

    @property
    def is_fresh(self) -> bool:
        """Whether a majority followed this leader so recently that there is no other."""
        if self.cluster is None or not self.cluster.replicas:
            return True
        following = sum(not each.offline and 0 < each.active < _FRESH_S * 1e9 for each in self.cluster.replicas)
        return bool(self.cluster.leader) and (1 + following) * 2 > len(self.cluster.replicas) + 1


class _Stored(msgspec.Struct):
    subject: str
    seq: int
    data: str = ""
    hdrs: str = ""
    time: str = ""


class _StoredAnswer(msgspec.Struct):
    message: _Stored


class _Error(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Failure(msgspec.Struct):
    error: _Error | None = None


class Ack(msgspec.Struct):
    """Answer to a message for a stream."""

    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    error: _Error | None = None


class StoredMessage(NamedTuple):
    """Message of a stream; ``stored_at`` is in seconds since the epoch, 0 if unknown."""

    subject: str
    seq: int
    headers: Mapping[str, str]
    data: bytes
    stored_at: float = 0.0


class _Transport(TcpTransport):
    """Transport that ends with its last unsent bytes, instead of waiting for a silent server to take them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    async def connect(self, *args: Any, **options: Any) -> None:
        self.close()  # of an attempt that failed after it was connected
        await super().connect(*args, **options)

    async def connect_tls(self, *args: Any, **options: Any) -> None:
        await super().connect_tls(*args, **options)
        # The stream's protocol was made for plain TCP, and would ask for a half-closed connection, with a warning.
        assert self._io_writer is not None, "it is connected"
        cast("Any", self._io_writer.transport.get_protocol())._over_ssl = True

    def close(self) -> None:
        if self._io_writer is not None:
            self._io_writer.transport.abort()

    def __bool__(self) -> bool:
        return True  # else the client makes its own


class NatsClient(Client):
    """The client over this transport; for ``nats://`` and ``tls://`` only."""

    async def _connect_to_server(self, s: Srv) -> None:
        if self._transport is None:
            self._transport = _Transport()
        await super()._connect_to_server(s)


@contextmanager
def cancellable() -> Iterator[None]:
    """Raise CancelledError if the task was cancelled inside, also where the library hides that.

    The library swallows a cancellation while it flushes, and turns one into ConnectionClosedError while it closes.
    """
    task = asyncio.current_task()
    assert task is not None, "a coroutine of the cluster runs in a task"
    before = task.cancelling()
    try:
        yield
    except Exception as error:
        if task.cancelling() > before:
            raise asyncio.CancelledError from error
        raise
    if task.cancelling() > before:
        raise asyncio.CancelledError


class JetStream:
    """One connection to the engine, reopened for ever. ``close()`` ends it.

    Attributes:
        node: name of this node, shown in the engine's list of connections.
        replicas: copies of every stream, 3 in production.
    """

    def __init__(self, options: Mapping[str, Any], node: str, replicas: int) -> None:
        self.node = node
        self.replicas = replicas
        self._options = options
        self._client = NatsClient()
        self._is_open = self._is_closing = False
        self._last_error = ""
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def connect(
        cls,
        urls: Sequence[str],
        *,
        node: str,
        credentials: Path | None = None,
        tls: ssl.SSLContext | None = None,
        replicas: int = 3,
        timeout_s: float = _CONNECT_S,
    ) -> Self:
        """Connect to one of ``urls``; the connection moves to another if its server ends.

        Args:
            urls: ``nats://host:port``, ``tls://host:port``.
            node: name of this node.
            credentials: a file with one line ``user:password`` or one token, or a NATS ``.creds`` file.
            tls: for servers that require TLS.
            replicas: of every stream and bucket that this engine creates.
            timeout_s: bound of the first connection.

        Raises EngineUnavailable if no server accepts the connection, Misuse if ``credentials`` is unusable or refused.
        """
        options: dict[str, Any] = {
            "servers": list(urls),
            "name": node,
            "reconnect_time_wait": 0.2,
            "max_reconnect_attempts": -1,  # by default the client closes for good after 60
            "ping_interval": 2,  # by default a silent server is noticed after 4 minutes
            "max_outstanding_pings": 2,
            "connect_timeout": 2,
            "pending_size": 0,  # a message that waits for a connection could arrive behind a takeover
            **_login(credentials),
        }
        if tls is not None:
            options["tls"] = tls
        engine = cls(options, node, replicas)
        try:
            async with asyncio.timeout(timeout_s):
                await engine._open()
        except (nats.errors.Error, OSError, TimeoutError) as error:
            await engine.close()
            reason = engine._last_error or _reason(error)
            raise EngineUnavailable(f"cannot connect to NATS at {', '.join(urls)}: {reason}") from error
        except BaseException:
            await engine.close()
            raise
        return engine

    @property
    def connected_port(self) -> int | None:
        """Port of the server at the other end; None while there is none."""
        address = self._client.connected_url
        return None if address is None else address.port

    @property
    def max_message_bytes(self) -> int:
        """Largest payload of one message, with room for its headers."""
        return int(self._client.max_payload) - _HEADERS_BYTES

    async def close(self) -> None:
        """End the connection. Requests in progress raise EngineUnavailable."""
        self._is_closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self._client.is_connected:  # the client would send this over the lost connection; uvloop raises then
            self._client._pending, self._client._pending_data_size = [], 0
        with suppress(nats.errors.Error, OSError, TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await self._client.close()

    async def request(
        self, subject: str, payload: bytes = b"", *, headers: dict[str, str] | None = None, timeout_s: float = REQUEST_S
    ) -> Msg:
        """Send a request and return the answer. Raises EngineUnavailable: the outcome is unknown."""
        try:
            with cancellable():
                return await self._client.request(subject, payload, timeout=timeout_s, headers=headers)
        except (nats.errors.Error, OSError, TimeoutError) as error:
            # Without responders too: the leader may have been lost between the request and the answer of its successor.
            raise EngineUnavailable(f"no answer from NATS: {error}") from error

    async def api[T](
        self, action: str, kind: type[T], request: Mapping[str, object] | None = None, *, timeout_s: float = REQUEST_S
    ) -> T:
        """Call JetStream's API. Raises EngineUnavailable (outcome unknown) or EngineRefused (nothing changed)."""
        payload = json.dumps(request).encode() if request else b""
        answer = (await self.request(f"$JS.API.{action}", payload, timeout_s=timeout_s)).data
        error = msgspec.json.decode(answer, type=_Failure).error
        if error is None:
            return msgspec.json.decode(answer, type=kind)
        if error.code == HTTPStatus.SERVICE_UNAVAILABLE or error.err_code in _TEMPORARY:
            raise EngineUnavailable(f"NATS is not ready: {error.description}; a majority of its servers must run")
        raise EngineRefused(error.err_code, error.description)

    async def publish(
        self, subject: str, payload: bytes, headers: dict[str, str] | None = None, *, timeout_s: float = REQUEST_S
    ) -> Ack:
        """Store a message and return the stream's answer, which may be an error.

        Once an ack without error is here, a majority of the engine's servers has the message on disk.
        Raises EngineUnavailable: the message may be stored, now or later.
        """
        return msgspec.json.decode(
            (await self.request(subject, payload, headers=headers, timeout_s=timeout_s)).data, type=Ack
        )

    async def subscribe(
        self, subject: str, *, max_bytes: int, callback: Callable[[Msg], Awaitable[None]] | None = None
    ) -> Subscription:
        """Subscribe to a subject of the core; up to ``max_bytes`` wait, the rest is dropped."""
        try:
            with cancellable():
                return await self._client.subscribe(subject, cb=callback, pending_bytes_limit=max_bytes)
        except (nats.errors.Error, OSError) as error:
            raise EngineUnavailable(f"cannot subscribe at NATS: {error}") from error

    async def create_stream(self, name: str, config: Mapping[str, object]) -> StreamInfo:
        """Create a stream, or return the one of the same name and configuration.

        Raises EngineRefused if it differs, Misuse if the server is alone and several copies are wanted.
        """
        full = {"name": name, "storage": "file", "num_replicas": self.replicas, "discard": "new", **config}
        try:
            return await self.api(f"STREAM.CREATE.{name}", StreamInfo, full, timeout_s=10.0)
        except EngineRefused as error:
            if error.number != _NOT_CLUSTERED:
                raise
            raise Misuse(
                "this NATS server runs alone and keeps one copy of each change: run three as a cluster, or for a "
                "trial use --cluster-replicas 1"
            ) from error

    async def ensure_stream(self, name: str, config: Mapping[str, object]) -> StreamInfo:
        """Return the stream; create it if it is missing. Waits for an engine without a quorum, 60 s at most."""

        async def attempt() -> StreamInfo:
            try:
                return await self.stream_info(name)
            except EngineRefused as error:
                if error.number != NO_STREAM:
                    raise
            try:
                return await self.create_stream(name, config)
            except EngineRefused as error:
                if error.number != NAME_IN_USE:  # another node was faster
                    raise
                return await self.stream_info(name)

        return await persist(attempt)

    async def stream_info(self, name: str, *, subjects: str | None = None) -> StreamInfo:
        """Return the leader's view of a stream. It may be stale, see ``StreamInfo.is_fresh``."""
        return await self.api(f"STREAM.INFO.{name}", StreamInfo, {"subjects_filter": subjects} if subjects else None)

    async def purge(self, name: str, *, subject: str | None = None, before: int | None = None) -> None:
        """Remove the messages of a subject (None: of all) with a number below ``before`` (None: all)."""
        request: dict[str, object] = {}
        if subject is not None:
            request["filter"] = subject
        if before is not None:
            request["seq"] = before
        await self.api(f"STREAM.PURGE.{name}", _Failure, request, timeout_s=10.0)

    async def delete_stream(self, name: str) -> None:
        """Delete a stream; a missing one is no error."""
        try:
            await self.api(f"STREAM.DELETE.{name}", _Failure, timeout_s=10.0)
        except EngineRefused as error:
            if error.number != NO_STREAM:
                raise

    async def message(self, stream: str, *, seq: int | None = None, last_of: str | None = None) -> StoredMessage | None:
        """Return a message by number, or the last one of a subject, from the leader. None: not there, or not yet."""
        request: dict[str, object] = {"seq": seq} if seq is not None else {"last_by_subj": last_of}
        try:
            found = (await self.api(f"STREAM.MSG.GET.{stream}", _StoredAnswer, request)).message
        except EngineRefused as error:
            if error.number == NO_MESSAGE:
                return None
            raise
        # The first line is the version, as HTTP's status line.
        headers = BytesParser().parsebytes(base64.b64decode(found.hdrs).partition(b"\r\n")[2])
        stored_at = datetime.fromisoformat(found.time).timestamp() if found.time else 0.0
        return StoredMessage(found.subject, found.seq, dict(headers.items()), base64.b64decode(found.data), stored_at)

    async def messages(self, stream: str, first: int, *, max_bytes: int, count: int = 1000) -> list[StoredMessage]:
        """Return messages from number ``first`` on, in order, from any replica: perhaps fewer than the leader has.

        The first may have a higher number: then the replica has none in between.
        Raises EngineUnavailable after 3 s without an answer.
        """
        for first_s in _FIRST_MESSAGE_S:
            found, status = await self._messages(stream, first, max_bytes, count, first_s)
            if found or status in (_END, _NOTHING):
                return found
            if status is not None:
                break
        raise EngineUnavailable(f"cannot read from NATS: {status or 'timed out'}")

    async def _messages(
        self, stream: str, first: int, max_bytes: int, count: int, first_s: float
    ) -> tuple[list[StoredMessage], str | None]:
        """Return messages of one answer and its status; None: it did not end."""
        found: list[StoredMessage] = []
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def arrived(answer: Msg) -> None:
            headers: dict[str, str] = answer.headers or {}
            status = headers.get("Status")
            if ended.done():
                return
            if status is not None:
                ended.set_result(status)
                return
            seq = int(headers["Nats-Sequence"])
            if found and seq != found[-1].seq + 1:
                ended.set_result(_END)  # a gap, or a piece of the answer was lost: the next call shows it
            else:
                found.append(StoredMessage(headers["Nats-Subject"], seq, headers, answer.data))

        request = {"seq": first, "batch": count, "max_bytes": max_bytes}
        inbox = self._client.new_inbox()
        subscription = await self.subscribe(inbox, max_bytes=4 * max_bytes + _SLACK_BYTES, callback=arrived)
        try:
            with cancellable():
                await self._client.publish(f"$JS.API.DIRECT.GET.{stream}", json.dumps(request).encode(), reply=inbox)
                await asyncio.wait([ended], timeout=first_s)
                seen = 0
                while not ended.done() and len(found) > seen:
                    seen = len(found)
                    await asyncio.wait([ended], timeout=REQUEST_S)
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise EngineUnavailable(f"cannot read from NATS: {error}") from error
        finally:
            with suppress(nats.errors.Error, OSError):
                await subscription.unsubscribe()
        return found, ended.result() if ended.done() else None

    async def check_durability(self, monitors: Sequence[str] = ()) -> list[str]:
        """Check that every server syncs before it acknowledges, and that there are three copies.

        Args:
            monitors: ``http://host:port`` of each server's monitoring port. A client cannot read this setting without
                them, unless its account imports ``$SYS.REQ.SERVER.PING.VARZ``.

        Returns warnings: each names something that could not be known, or is weaker than it should be.
        Raises Misuse if a server is known to have another setting than ``sync_interval: always``.
        """
        known, warnings = await self.sync_settings(monitors)
        for name, is_always in sorted(known.items()):
            if not is_always:
                raise Misuse(
                    f"the NATS server {name} acknowledges before its disk has the data: a power cut loses changes. "
                    "Set 'sync_interval: always' in its jetstream { } block and restart it"
                )
        if len(known) < self.replicas:
            warnings.append(
                f"the sync setting is known of {len(known)} of {self.replicas} NATS servers; "
                "set 'sync_interval: always' on each, and name their ports with --cluster-monitor to have it checked"
            )
        if self.replicas < 3:
            copies = "one copy" if self.replicas == 1 else f"{self.replicas} copies"
            warnings.append(f"NATS keeps {copies} of each change, not 3")
        return warnings

    async def sync_settings(self, monitors: Sequence[str] = ()) -> tuple[dict[str, bool], list[str]]:
        """Return whether each server syncs before it acknowledges, as far as known, and warnings about ``monitors``."""
        warnings = []
        known = await self._settings_by_request()
        for url in monitors:
            try:
                settings = await asyncio.to_thread(_read_settings, url)
            except (OSError, ValueError, msgspec.MsgspecError) as error:
                warnings.append(f"cannot read the settings of the NATS server at {url}: {_reason_of_monitor(error)}")
            else:
                known[settings.server_name] = settings
        return {name: each.jetstream.config.sync_always for name, each in known.items()}, warnings

    async def _settings_by_request(self) -> dict[str, "_Settings"]:
        known: dict[str, _Settings] = {}
        subscription = await self.subscribe(self._client.new_inbox(), max_bytes=1 << 20)
        try:
            await self._client.publish("$SYS.REQ.SERVER.PING.VARZ", b"", reply=subscription.subject)
            while True:
                answer = await subscription.next_msg(timeout=0.5)
                if (answer.headers or {}).get("Status"):
                    break
                settings = msgspec.json.decode(answer.data, type=_SettingsAnswer).data
                known[settings.server_name] = settings
        except (nats.errors.Error, OSError, TimeoutError, msgspec.MsgspecError):
            pass  # not permitted, or all have answered
        finally:
            with suppress(nats.errors.Error, OSError):
                await subscription.unsubscribe()
        return known

    async def _open(self) -> None:
        async def failed(error: Exception) -> None:
            self._last_error = _reason(error)
            if not self._is_open and "authorization" in self._last_error.lower():
                # Raised out of connect(), which would otherwise try for ever.
                raise Misuse(f"NATS refuses the login: {self._last_error}")
            _log.debug("connection to NATS: %s", self._last_error)

        async def lost() -> None:
            if not self._is_closing:
                _log.warning("connection to NATS lost; connecting again")

        async def closed() -> None:
            if not self._is_closing:  # a refusal by the server, for example of the login, after which the client ends
                self._start(self._reopen())

        client = self._client
        await client.connect(**self._options, error_cb=failed, disconnected_cb=lost)
        client._closed_cb = closed
        self._is_open = True

    async def _reopen(self) -> None:
        while not self._is_closing:
            self._client = NatsClient()
            try:
                await self._open()
            except (nats.errors.Error, OSError, TimeoutError) as error:
                _log.warning("cannot connect to NATS: %s", error)
                await asyncio.sleep(_REOPEN_S)
            else:
                return

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _reason(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        why = f"certificate verify failed: {error.verify_message}"
        return f"{why}; name a file with its authority with --cluster-ca" if error.verify_code in _UNKNOWN_CA else why
    if isinstance(error, ssl.SSLError):  # its number is not the system's
        return error.reason or str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return str(error).removeprefix("nats: ").strip("'") or type(error).__name__


class _SyncConfig(msgspec.Struct):
    sync_always: bool = False


class _JetStream(msgspec.Struct):
    config: _SyncConfig = msgspec.field(default_factory=_SyncConfig)


class _Settings(msgspec.Struct):
    server_name: str
    jetstream: _JetStream = msgspec.field(default_factory=_JetStream)


class _Health(msgspec.Struct):
    error: str = ""


class _SettingsAnswer(msgspec.Struct):
    data: _Settings


def _reason_of_monitor(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    return reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)


def _read_settings(url: str) -> _Settings:
    if not url.startswith(("http://", "https://")):
        raise ValueError("not an http:// or https:// address")
    with urllib.request.urlopen(f"{url.rstrip('/')}/varz", timeout=_MONITOR_S) as answer:  # noqa: S310
        return msgspec.json.decode(answer.read(), type=_Settings)


async def server_problems(monitors: Sequence[str]) -> dict[str, str]:
    """Return the servers that report a problem at their monitoring ports, or by address those that do not answer."""
    found = await asyncio.gather(*(asyncio.to_thread(_problem_at, url) for url in monitors))
    return {name: problem for name, problem in found if problem}


def _problem_at(url: str) -> tuple[str, str]:
    name = url
    try:
        name = _read_settings(url).server_name
        with urllib.request.urlopen(f"{url.rstrip('/')}/healthz", timeout=_MONITOR_S):  # noqa: S310
            return name, ""
    except urllib.error.HTTPError as error:
        with suppress(msgspec.MsgspecError, OSError):
            return name, msgspec.json.decode(error.read(), type=_Health).error or error.reason
        return name, error.reason
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        return name, _reason_of_monitor(error)


def _login(credentials: Path | None) -> dict[str, str]:
    """Return the client's options for a file of ``user:password``, of a token, or of NATS credentials."""
    if credentials is None:
        return {}
    try:
        text = credentials.read_text().strip()
    except (OSError, ValueError) as error:
        raise Misuse(f"cannot read the NATS credentials {credentials}: {error}") from error
    if "BEGIN NATS USER JWT" in text:
        if find_spec("nkeys") is None:
            raise Misuse("a .creds file needs the package nkeys: pip install nkeys")
        return {"user_credentials": str(credentials)}
    if not text or "\n" in text:
        raise Misuse(f"{credentials} has neither one line user:password, nor a token, nor NATS credentials")
    user, colon, password = text.partition(":")
    return {"user": user, "password": password} if colon else {"token": text}


async def persist[T](attempt: Callable[[], Awaitable[T]]) -> T:
    """Repeat until the engine answers, for 60 s at most. Then raises EngineUnavailable."""
    end = time.monotonic() + _PERSIST_S
    while True:
        try:
            return await attempt()
        except EngineUnavailable:
            if time.monotonic() > end:
                raise
        await asyncio.sleep(0.1)


@contextmanager
def ungrouped() -> Iterator[None]:
    """Raise the first error of a task group as itself."""
    try:
        yield
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
