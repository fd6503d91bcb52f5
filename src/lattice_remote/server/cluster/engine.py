"""Connection to NATS JetStream: requests, streams, key-value buckets, stored contents.

A request has a timeout and is never kept back while the connection is down: it raises EngineUnavailable. After that
the outcome is unknown, as the engine may have carried out the request and only the answer was lost.
"""

import asyncio
import base64
import hashlib
import json
import logging
import os
import ssl
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from email.parser import BytesParser
from http import HTTPStatus
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec
import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from lattice_remote.errors import Misuse, StorageError
from lattice_remote.files import sync_directory
from lattice_remote.server.cluster.connection import Connection

__all__ = ["Bucket", "Engine", "EngineRefused", "EngineUnavailable", "Entry", "StoredMessage", "StreamInfo"]

REQUEST_S = 2.0
"""Time for an answer. An append takes some ms; an election of the engine 1 to 5 s."""
_CONNECT_S, _CLOSE_S = 10.0, 2.0
_PROBE_S, _REACHABLE_S = 1.0, 3.5
_PERSIST_S = 60.0
"""For how long the parts of a content are sent again before EngineUnavailable."""
_PART_BYTES, _PARTS_AT_ONCE = 512 * 1024, 4
_HEADERS_BYTES = 4096
"""Of a message's size limit, kept for its headers."""
_MONITOR_S = 3.0
_FRESH_NS = 2_000_000_000
_CONTENTS, _CONTENTS_SUBJECT = "lattice-contents", "lattice.contents"

NO_MESSAGE, NO_STREAM, NAME_IN_USE = 10037, 10059, 10058
WRONG_SEQUENCE = (10071, 10164)
FULL = (10002, 10023, 10028, 10047, 10077)
"""Limits of the stream, the account or the disk are reached; the message was not stored."""
_TEMPORARY = (10004, 10008, 10009, 10118)

_log = logging.getLogger(__name__)


class EngineUnavailable(StorageError):
    """The engine did not answer in time, or has no quorum. The request may have been carried out."""

    code = "REMOTE_BUSY"


class EngineRefused(StorageError):
    """A refusal by the engine; ``number`` is JetStream's ``err_code``. Nothing was changed."""

    def __init__(self, number: int, description: str) -> None:
        super().__init__(f"the cluster's engine refused the request: {description} ({number})")
        self.number = number
        self.description = description


class StreamState(msgspec.Struct):
    """Contents of a stream; without messages ``first_seq`` is ``last_seq + 1``."""

    messages: int
    bytes: int
    first_seq: int
    last_seq: int
    subjects: dict[str, int] = {}


class Replica(msgspec.Struct):
    """A replica beside the leader; ``active`` is the time in ns since the leader heard from it."""

    name: str
    current: bool = False
    active: int = 0
    offline: bool = False
    lag: int = 0


class _Group(msgspec.Struct):
    leader: str = ""
    replicas: list[Replica] = []


class StreamInfo(msgspec.Struct):
    """Answer of a stream's leader, or of a server that still believes itself the leader (``is_fresh``)."""

    created: str
    config: dict[str, Any]
    state: StreamState
    cluster: _Group | None = None

    @property
    def is_fresh(self) -> bool:
        """Whether a majority followed this leader within the last 2 s, so that it misses no acknowledged message."""
        if self.cluster is None or not self.cluster.replicas:
            return True
        following = sum(not each.offline and each.active < _FRESH_NS for each in self.cluster.replicas)
        return bool(self.cluster.leader) and (1 + following) * 2 > len(self.cluster.replicas) + 1


class _Stored(msgspec.Struct):
    subject: str
    seq: int
    data: str = ""
    hdrs: str = ""


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
    """Message of a stream."""

    subject: str
    seq: int
    headers: Mapping[str, str]
    data: bytes


class Entry(NamedTuple):
    """Value of a key. ``revision`` grows with every change in the bucket."""

    value: bytes
    revision: int


class _End(msgspec.Struct, array_like=True):
    """Last message of a stored content; a content without it is incomplete."""

    size: int
    parts: int


class Engine:
    """One connection to the engine, reopened for ever. ``close()`` ends it.

    Attributes:
        node: name of this node, shown in the engine's list of connections.
        replicas: copies of every stream, 3 in production.
    """

    def __init__(self, options: Mapping[str, Any], node: str, replicas: int) -> None:
        self.node = node
        self.replicas = replicas
        self._options = options
        self._client = Connection()
        self._is_closing = False
        self._heard = -_REACHABLE_S
        self._has_contents = False
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
    ) -> Self:
        """Connect to one of ``urls``; the connection moves to another if its server ends.

        Args:
            urls: ``nats://host:port``, ``tls://host:port``.
            node: name of this node.
            credentials: a file with one line ``user:password`` or one token, or a NATS ``.creds`` file.
            tls: for servers that require TLS.
            replicas: of every stream and bucket that this engine creates.

        Raises EngineUnavailable if no server accepts the connection within 10 s, Misuse if ``credentials`` is unusable.
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
            async with asyncio.timeout(_CONNECT_S):
                await engine._open()
        except (nats.errors.Error, OSError, TimeoutError) as error:
            await engine.close()
            reason = engine._last_error or str(error) or "timed out"
            raise EngineUnavailable(f"cannot connect to the cluster's engine at {', '.join(urls)}: {reason}") from error
        except BaseException:
            await engine.close()
            raise
        engine._start(engine._probe())
        return engine

    @property
    def is_reachable(self) -> bool:
        """Whether JetStream, with its quorum, answered within the last seconds."""
        return time.monotonic() - self._heard < _REACHABLE_S

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
        with suppress(nats.errors.Error, OSError, TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await self._client.close()

    async def request(
        self, subject: str, payload: bytes = b"", *, headers: dict[str, str] | None = None, timeout_s: float = REQUEST_S
    ) -> Msg:
        """Send a request and return the answer. Raises EngineUnavailable: the outcome is unknown."""
        try:
            return await self._client.request(subject, payload, timeout=timeout_s, headers=headers)
        except (nats.errors.Error, OSError, TimeoutError) as error:
            # Without responders too: the leader may have been lost between the request and the answer of its successor.
            raise EngineUnavailable(f"no answer from the cluster's engine: {error}") from error

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
            raise EngineUnavailable(f"the cluster's engine is not ready: {error.description}")
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

    async def subscribe(self, subject: str, *, max_bytes: int) -> Subscription:
        """Subscribe to a subject of the core; up to ``max_bytes`` wait, the rest is dropped."""
        try:
            return await self._client.subscribe(subject, pending_bytes_limit=max_bytes)
        except (nats.errors.Error, OSError) as error:
            raise EngineUnavailable(f"cannot subscribe at the cluster's engine: {error}") from error

    async def create_stream(self, name: str, config: Mapping[str, object]) -> StreamInfo:
        """Create a stream, or return the one of the same name and configuration. Raises EngineRefused if it differs."""
        full = {"name": name, "storage": "file", "num_replicas": self.replicas, "discard": "new", **config}
        return await self.api(f"STREAM.CREATE.{name}", StreamInfo, full, timeout_s=10.0)

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

        return await _persist(attempt)

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
        return StoredMessage(found.subject, found.seq, dict(headers.items()), base64.b64decode(found.data))

    async def messages(self, stream: str, first: int, *, max_bytes: int, count: int = 1000) -> list[StoredMessage]:
        """Return messages from number ``first`` on, in order, from any replica: perhaps fewer than the leader has.

        The first may have a higher number: then the replica has none in between.
        """
        found: list[StoredMessage] = []
        request = {"seq": first, "batch": count, "max_bytes": max_bytes}
        subscription = await self.subscribe(self._client.new_inbox(), max_bytes=4 * max_bytes + 2 * _PART_BYTES)
        try:
            await self._client.publish(
                f"$JS.API.DIRECT.GET.{stream}", json.dumps(request).encode(), reply=subscription.subject
            )
            while True:
                answer = await subscription.next_msg(timeout=REQUEST_S)
                headers: dict[str, str] = answer.headers or {}
                status = headers.get("Status")
                if status is None:
                    seq = int(headers["Nats-Sequence"])
                    if seq != (found[-1].seq + 1 if found else seq):
                        return found  # a piece of the answer was lost, or there is a gap: the next call shows it
                    found.append(StoredMessage(headers["Nats-Subject"], seq, headers, answer.data))
                elif status in ("204", "404"):
                    return found
                else:
                    raise EngineUnavailable(f"the cluster's engine cannot read messages: {status}")
        except (nats.errors.Error, OSError, TimeoutError) as error:
            if found:
                return found
            raise EngineUnavailable(f"no messages from the cluster's engine: {error}") from error
        finally:
            with suppress(nats.errors.Error, OSError):
                await subscription.unsubscribe()

    async def kv(self, bucket: str, ttl_s: float | None = None) -> "Bucket":
        """Open a bucket; create it if it is missing.

        With ``ttl_s`` an entry expires so many seconds after its last change. Expiry is silent: no reader is notified.
        """
        config: dict[str, object] = {
            "subjects": [f"$KV.{bucket}.>"],
            "max_msgs_per_subject": 1,
            "allow_rollup_hdrs": True,
            "deny_delete": True,
            # A direct read may come from a replica that lags behind.
            "allow_direct": False,
        }
        if ttl_s is not None:
            config |= {"max_age": int(ttl_s * 1e9), "duplicate_window": int(min(ttl_s, 120.0) * 1e9)}
        await self.ensure_stream(f"KV_{bucket}", config)
        return Bucket(self, bucket)

    async def put_content(self, digest: bytes, file: Path) -> None:
        """Store a file's content by its digest; nothing is sent if it is there already.

        Once this returns, the content is on the disks of a majority. Raises EngineUnavailable, OSError.
        """
        if await self.has_content(digest):
            return
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size

            def piece(offset: int, count: int) -> bytes:
                opened.seek(offset)
                return opened.read(count)

            await self.put_parts(digest.hex(), size, piece)

    async def get_content(self, digest: bytes, to: Path) -> bool:
        """Write a stored content to ``to``, atomically and durably. False: it is not stored.

        Raises EngineUnavailable, OSError; StorageError if the stored content has another digest.
        """
        temporary = to.with_name(f".{to.name}.part")
        hashed = hashlib.sha256()
        try:
            with temporary.open("wb") as opened:
                async for part in self.get_parts(digest.hex()):
                    hashed.update(part)
                    await asyncio.to_thread(opened.write, part)
                await asyncio.to_thread(_flush, opened.fileno(), opened.flush)
        except KeyError:
            temporary.unlink()
            return False
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if hashed.digest() != digest:
            temporary.unlink()
            raise StorageError(f"the cluster's content {digest.hex()} is damaged; copy the project from another node")
        temporary.replace(to)
        sync_directory(to.parent)
        return True

    async def has_content(self, digest: bytes) -> bool:
        """Return whether the whole content is stored."""
        await self._ensure_contents()
        return await self.message(_CONTENTS, last_of=f"{_CONTENTS_SUBJECT}.{digest.hex()}.end") is not None

    async def drop_content(self, digest: bytes) -> None:
        """Remove a content; a missing one is no error."""
        await self.drop_parts(digest.hex())

    async def put_parts(self, name: str, size: int, piece: Callable[[int, int], bytes]) -> None:
        """Store ``size`` bytes under a name. ``piece(offset, count)`` returns a part, in a thread. Idempotent."""
        await self._ensure_contents()
        step = min(_PART_BYTES, self.max_message_bytes)
        waiting: set[asyncio.Task[None]] = set()
        offsets = range(0, size, step)
        async with asyncio.TaskGroup() as group:
            for number, offset in enumerate(offsets):
                data = await asyncio.to_thread(piece, offset, min(step, size - offset))
                waiting.add(group.create_task(self._put_part(f"{name}.{number}", data)))
                if len(waiting) == _PARTS_AT_ONCE:
                    _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        await self._put_part(f"{name}.end", msgspec.msgpack.encode(_End(size, len(offsets))))

    async def get_parts(self, name: str) -> AsyncIterator[bytes]:
        """Yield the parts that are stored under a name. Raises KeyError if they are not there, or no longer."""
        await self._ensure_contents()
        end = await self._part(f"{name}.end")
        for number in range(msgspec.msgpack.decode(end, type=_End).parts):
            yield await self._part(f"{name}.{number}")

    async def drop_parts(self, name: str) -> None:
        """Remove all parts under a name at once."""
        await self._ensure_contents()
        await self.purge(_CONTENTS, subject=f"{_CONTENTS_SUBJECT}.{name}.>")

    async def part_names(self, prefix: str) -> list[str]:
        """Return the names ``prefix.*`` under which parts are stored."""
        await self._ensure_contents()
        pattern = f"{_CONTENTS_SUBJECT}.{prefix}.*.end"
        found = (await self.stream_info(_CONTENTS, subjects=pattern)).state.subjects
        return [each.removeprefix(f"{_CONTENTS_SUBJECT}.").removesuffix(".end") for each in found]

    async def check_durability(self, monitors: Sequence[str] = ()) -> list[str]:
        """Check that every server syncs before it acknowledges, and that there are three copies.

        Args:
            monitors: ``http://host:port`` of each server's monitoring port. A client cannot read this setting without
                them, unless its account imports ``$SYS.REQ.SERVER.PING.VARZ``.

        Returns warnings: each names something that could not be known, or is weaker than it should be.
        Raises Misuse if a server is known to have another setting than ``sync_interval: always``.
        """
        warnings = []
        known = await self._settings_by_request()
        for url in monitors:
            try:
                settings = await asyncio.to_thread(_read_settings, url)
            except (OSError, ValueError, msgspec.MsgspecError) as error:
                warnings.append(f"cannot read the settings of the engine's server at {url}: {error}")
            else:
                known[settings.server_name] = settings
        for name, each in sorted(known.items()):
            if not each.jetstream.config.sync_always:
                raise Misuse(
                    f"the engine's server {name} acknowledges before its disk has the data: a power cut loses changes. "
                    "Set 'sync_interval: always' in its jetstream { } block and restart it"
                )
        if len(known) < self.replicas:
            warnings.append(
                f"the sync setting is known of {len(known)} of the engine's {self.replicas} servers; "
                "set 'sync_interval: always' on each, and name their monitoring ports to have it checked"
            )
        if self.replicas < 3:
            warnings.append(f"the engine keeps {self.replicas} copy of each change, not 3")
        return warnings

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
            self._last_error = str(error) or type(error).__name__
            _log.debug("connection to the cluster's engine: %s", self._last_error)

        async def lost() -> None:
            if not self._is_closing:
                _log.warning("connection to the cluster's engine lost: %s", self._last_error)

        async def closed() -> None:
            if not self._is_closing:  # a refusal by the server, for example of the login, after which the client ends
                self._start(self._reopen())

        client = self._client
        await client.connect(**self._options, error_cb=failed, disconnected_cb=lost)
        client._closed_cb = closed

    async def _reopen(self) -> None:
        while not self._is_closing:
            self._client = Connection()
            try:
                await self._open()
            except (nats.errors.Error, OSError, TimeoutError) as error:
                _log.warning("cannot connect to the cluster's engine: %s", error)
                await asyncio.sleep(_PROBE_S)
            else:
                return

    async def _probe(self) -> None:
        while True:
            asked = time.monotonic()
            with suppress(EngineUnavailable, EngineRefused):
                await self.api("INFO", _Failure)
                self._heard = asked
            await asyncio.sleep(_PROBE_S)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ensure_contents(self) -> None:
        if not self._has_contents:
            config = {
                "subjects": [f"{_CONTENTS_SUBJECT}.>"],
                "max_msgs_per_subject": 1,
                "allow_rollup_hdrs": True,
                "allow_direct": True,
            }
            await self.ensure_stream(_CONTENTS, config)
            self._has_contents = True

    async def _put_part(self, name: str, data: bytes) -> None:
        async def attempt() -> None:
            ack = await self.publish(f"{_CONTENTS_SUBJECT}.{name}", data)
            if ack.error is not None:
                if ack.error.err_code in FULL:
                    raise EngineRefused(ack.error.err_code, ack.error.description)
                raise EngineUnavailable(f"the cluster's engine cannot store a content: {ack.error.description}")

        await _persist(attempt)

    async def _part(self, name: str) -> bytes:
        subject = f"{_CONTENTS_SUBJECT}.{name}"

        async def attempt() -> bytes:
            answer = await self.request(f"$JS.API.DIRECT.GET.{_CONTENTS}.{subject}")
            if not (answer.headers or {}).get("Status"):
                return bytes(answer.data)
            found = await self.message(_CONTENTS, last_of=subject)  # a replica that lags behind says 404
            if found is None:
                raise KeyError(name)
            return found.data

        return await _persist(attempt)


class Bucket:
    """Keys and values in the engine, made by ``Engine.kv``. A key has letters, digits, ``-``, ``_``, ``.`` and ``/``.

    Every method raises EngineUnavailable; after one that writes, the outcome is unknown.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self._stream = f"KV_{name}"
        self._prefix = f"$KV.{name}."

    async def get(self, key: str) -> Entry | None:
        """Return the entry, None if there is none or it has expired."""
        found = await self._engine.message(self._stream, last_of=self._prefix + key)
        return None if found is None or _is_deletion(found) else Entry(found.data, found.seq)

    async def put(self, key: str, value: bytes) -> int:
        """Set a key, over any value. Returns the new revision."""
        revision = await self._write(key, value, {})
        assert revision is not None, "nothing is expected of the last revision"
        return revision

    async def create(self, key: str, value: bytes) -> int | None:
        """Set a key that has no value. Returns its revision, None if it has one."""
        revision = await self.update(key, value, 0)
        if revision is None:
            found = await self._engine.message(self._stream, last_of=self._prefix + key)
            if found is not None and _is_deletion(found):
                return await self.update(key, value, found.seq)
        return revision

    async def update(self, key: str, value: bytes, revision: int) -> int | None:
        """Set a key that still has this revision. Returns the new one, None if another write was faster."""
        return await self._write(key, value, {"Nats-Expected-Last-Subject-Sequence": str(revision)})

    async def delete(self, key: str, revision: int | None = None) -> bool:
        """Remove a key, with ``revision`` only if it still has it. Returns whether it did."""
        headers = {"KV-Operation": "DEL"}
        if revision is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(revision)
        return await self._write(key, b"", headers) is not None

    async def keys(self) -> list[str]:
        """Return the keys with a value, sorted."""
        return sorted(await self.entries())

    async def entries(self) -> dict[str, Entry]:
        """Return all entries. They are read one by one, not at one moment."""
        info = await self._engine.stream_info(self._stream, subjects=f"{self._prefix}>")
        keys = [subject.removeprefix(self._prefix) for subject in info.state.subjects]
        return {key: entry for key in keys if (entry := await self.get(key)) is not None}

    async def revision(self) -> int:
        """Return the number of the last change in the bucket: a cheap way to see that there was one."""
        return (await self._engine.stream_info(self._stream)).state.last_seq

    async def _write(self, key: str, value: bytes, headers: dict[str, str]) -> int | None:
        ack = await self._engine.publish(self._prefix + key, value, headers)
        if ack.error is None:
            return ack.seq
        if ack.error.err_code in WRONG_SEQUENCE:
            return None
        if ack.error.err_code in FULL:
            raise EngineRefused(ack.error.err_code, ack.error.description)
        raise EngineUnavailable(f"the cluster's engine cannot write {key}: {ack.error.description}")


class _SyncConfig(msgspec.Struct):
    sync_always: bool = False


class _JetStream(msgspec.Struct):
    config: _SyncConfig = msgspec.field(default_factory=_SyncConfig)


class _Settings(msgspec.Struct):
    server_name: str
    jetstream: _JetStream = msgspec.field(default_factory=_JetStream)


class _SettingsAnswer(msgspec.Struct):
    data: _Settings


def _read_settings(url: str) -> _Settings:
    if not url.startswith(("http://", "https://")):
        raise ValueError("not an http:// or https:// address")
    with urllib.request.urlopen(f"{url.rstrip('/')}/varz", timeout=_MONITOR_S) as answer:  # noqa: S310
        return msgspec.json.decode(answer.read(), type=_Settings)


def _login(credentials: Path | None) -> dict[str, str]:
    """Return the client's options for a file of ``user:password``, of a token, or of NATS credentials."""
    if credentials is None:
        return {}
    try:
        text = credentials.read_text().strip()
    except (OSError, ValueError) as error:
        raise Misuse(f"cannot read the engine's credentials {credentials}: {error}") from error
    if "BEGIN NATS USER JWT" in text:
        if find_spec("nkeys") is None:
            raise Misuse("a .creds file needs the package nkeys: pip install 'nats-py[nkeys]'")
        return {"user_credentials": str(credentials)}
    if not text or "\n" in text:
        raise Misuse(f"{credentials} has neither one line user:password, nor a token, nor NATS credentials")
    user, colon, password = text.partition(":")
    return {"user": user, "password": password} if colon else {"token": text}


def _is_deletion(message: StoredMessage) -> bool:
    return message.headers.get("KV-Operation") in ("DEL", "PURGE") or "Nats-Marker-Reason" in message.headers


def _flush(descriptor: int, flush: Callable[[], None]) -> None:
    flush()
    os.fsync(descriptor)


async def _persist[T](attempt: Callable[[], Awaitable[T]]) -> T:
    """Repeat until the engine answers, for 60 s at most. Then raises EngineUnavailable."""
    end = time.monotonic() + _PERSIST_S
    while True:
        try:
            return await attempt()
        except EngineUnavailable:
            if time.monotonic() > end:
                raise
        await asyncio.sleep(0.1)
