"""One client connection to a project: greeting, catch-up, then live changes, replies and files.

The reader handles frames as they arrive. The sender first sends the missed changes; from then on each change is queued
in the loop tick of its commit, with pieces of files between changes as the send queue has room.

    greeting --Hello--> catching up --its last change is the head--> live

Replies wait until the connection is live, so each follows its change. A manifest entry or the first part of a file is
queued in the tick in which it is correct, so its sequence number is that of the last change queued before it.
"""

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Hashable
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import msgspec
from websockets.exceptions import ConnectionClosed

import lattice_remote
from lattice_remote.errors import ProtocolError, RemoteError, StorageError, printable
from lattice_remote.files import READ
from lattice_remote.output import describe_difference
from lattice_remote.protocol.messages import (
    CAPABILITIES,
    PROTOCOL_VERSION,
    SURFACES,
    Applied,
    Bye,
    Call,
    Change,
    ClientFrame,
    Download,
    Downloaded,
    Fetch,
    Hello,
    Limits,
    Log,
    Manifest,
    Position,
    Push,
    Put,
    Read,
    ReadVersion,
    Refused,
    Replay,
    Replayed,
    Request,
    Run,
    ServerFrame,
    Upload,
    Welcome,
    Write,
    decode_client_frame,
    encode,
    needed_capability,
)
from lattice_remote.protocol.paths import is_editable
from lattice_remote.server.datadir import ProjectPaths
from lattice_remote.server.ipc import Edit, RunCall, RunCommand
from lattice_remote.server.project.file_reader import PIECE_BYTES, FileSender
from lattice_remote.server.project.history import REPLAY_BYTES, CommitTimes, History
from lattice_remote.server.project.metrics import ProjectMetrics
from lattice_remote.server.project.project import Project
from lattice_remote.server.tokens import READ_ONLY, Token
from lattice_remote.server.transport.admission import COUNTED_BYTES
from lattice_remote.server.transport.websocket import (
    MAX_PENDING_BYTES,
    Handoff,
    SendBudget,
    payload_of,
    websocket_frame,
)
from lattice_remote.server.worker.calls import is_offered

__all__ = [
    "HELLO_TIMEOUT_S",
    "ClientConnection",
    "ReplicationStatus",
    "download",
    "offered_capabilities",
    "replay",
]


class ReplicationStatus:
    def __init__(self, commit_times: CommitTimes, metrics: ProjectMetrics) -> None:
        self.since = datetime.now(UTC)
        self.client_version = ""
        """As the client reports it."""
        self.lattice_version = ""
        self.applied: int | None = None
        """Last change known to be applied by the cache; None without a cache."""
        self._commit_times = commit_times
        self._metrics = metrics
        self._measured_from = 0  # the head at the greeting: earlier changes are not measured

    def greeted(self, hello: Hello, *, start: int, head: int) -> None:
        self.client_version, self.lattice_version = hello.client_version[:40], hello.lattice_version[:40]
        self._measured_from = head
        if hello.follow:
            self.applied = start

    def acknowledged(self, frame: Applied, *, sent: int) -> None:
        if self.applied is None or not self.applied < frame.seq <= sent:
            return
        self.applied = frame.seq
        age_s = self._commit_times.age_of(frame.seq, time.monotonic())
        if frame.held_s is not None and age_s is not None and frame.seq > self._measured_from:
            self._metrics.delivery_lag_seconds.observe(max(0.0, age_s - max(0.0, frame.held_s)))


def offered_capabilities() -> list[str]:
    """Return the capabilities, given the installed packages."""
    return [name for name in CAPABILITIES if not name.startswith("call:") or is_offered(name.removeprefix("call:"))]


async def download(request: Download, history: History, paths: ProjectPaths) -> Downloaded | Refused:
    """Return a piece of a file as of the head, read in a thread."""
    content = history.files.get(request.path)
    if content is None:
        return Refused(request.id, "REMOTE_NOT_FOUND", f"there is no file {request.path!r} in this project")
    size, digest = content
    if request.digest not in (None, digest):
        return Refused(request.id, "REMOTE_NOT_FOUND", f"{request.path!r} has changed since")
    if request.offset > size:
        return Refused(request.id, "REMOTE_PROTOCOL", f"{request.path!r} has {size} bytes")
    seq, wanted = history.head, min(request.limit, size - request.offset)
    try:
        data = await asyncio.to_thread(_read, paths.lattice / request.path, request.offset, wanted)
    except OSError as error:
        return Refused(request.id, "REMOTE_STORAGE", f"the server cannot read {request.path!r}: {error.strerror}")
    if len(data) != wanted:  # a write is in progress; its change follows
        return Refused(request.id, "REMOTE_BUSY", f"{request.path!r} is changing; try again")
    return Downloaded(request.id, seq, size, digest, data)


def _read(path: Path, offset: int, size: int) -> bytes:
    descriptor = os.open(path, READ)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


async def replay(request: Replay, project: Project) -> Replayed:
    """Return about ``REPLAY_BYTES`` of the changes after a position."""
    history = project.history
    outcome, position = await project.find_start(request.epoch, request.seq, request.mark)
    batch = await history.changes_after(position.seq) if outcome == "kept" else []
    if history.epoch != position.epoch:
        outcome, batch = "epoch", []
    elif outcome == "kept" and not batch and position.seq < history.head:
        outcome = "expired"
    changes: list[Change] = []
    size = 0
    for _, frame in batch:
        if size >= REPLAY_BYTES:
            break
        size += len(frame)
        changes.append(cast("Change", msgspec.Raw(payload_of(frame))))  # encoded already
    where = (history.epoch, history.head, history.oldest)
    return Replayed(request.id, outcome, *where, position.seq, position.mark, changes)


HELLO_TIMEOUT_S = 10.0
_MAX_FETCHES = 65_536
_OTHER_FIELDS_BYTES = 64 * 1024
"""Room in a frame beside the content of a file."""

_CLOSE_CODES = {
    "REMOTE_SHUTDOWN": 1001,
    "REMOTE_PROTOCOL": 1002,
    "REMOTE_UNAUTHORIZED": 1008,
    "REMOTE_FORBIDDEN": 1008,
    "REMOTE_VERSION": 1008,
    "REMOTE_TOO_LARGE": 1009,
    "REMOTE_BUSY": 1012,
}
"""Close code (RFC 6455 section 7.4) of each ``Bye``; 1011 (internal error) for any other."""

_log = logging.getLogger(__name__)


class ClientConnection:
    """Connection of one client; serve it with ``run()``."""

    def __init__(self, connection: Handoff, token: Token, project: Project, budget: SendBudget) -> None:
        self.token = token
        self.project = project
        self.replication = ReplicationStatus(project.commit_times, project.metrics)
        self._connection = connection
        self._outbox = connection.outbox
        self._outbox.drained = self._release_answers
        self._budget = budget
        self._counted_bytes = 0  # of answers that the client has not taken
        self._limits = connection.quota.limits
        self._name = f"{project.slug}: {token.actor} ({token.id}) at {connection.peer_name}"
        self._capabilities: frozenset[str] = frozenset()  # of the client
        self._follows = True
        self._live = False
        self._sent = 0  # the last change queued
        self._deferred_replies: list[bytes] = []  # replies that wait until the connection is live
        self._deferred_bytes = 0
        self._in_flight: dict[str, Request] = {}
        self._wanted: dict[str, None] = {}  # files to send, in order of request
        self._wants_manifest = False
        self._reads: deque[Read] = deque()  # read at the client's pace
        self._work = asyncio.Event()
        self._ended = False

    @property
    def fairness_key(self) -> Hashable:
        return self

    async def run(self) -> None:
        try:
            await self._welcome(await self._greeting())
            async with asyncio.TaskGroup() as group:
                sender = group.create_task(self._send_pending())
                await self._read()
                sender.cancel()
        except* ConnectionClosed:
            pass
        except* RemoteError as group:
            self._end_with_error(group)
        except* Exception as group:  # noqa: BLE001 - one connection's failure must not stop the server
            _log.exception("%s: unexpected failure", self._name)
            self._end_with_error(group)
        finally:
            self.project.history.leave(self)
            self.project.forget(self, set(self._in_flight))
            self._deferred_replies.clear()
            self._release_answers()
            self.count_sent()
            _log.info("%s: disconnected", self._name)

    @property
    def address(self) -> str:
        return self._connection.quota.address

    @property
    def behind(self) -> int | None:
        """Changes that the cache lacks; None without a cache."""
        applied = self.replication.applied
        return None if applied is None else max(0, self.project.history.head - applied)

    @property
    def waiting_bytes(self) -> int:
        return self._outbox.pending_bytes

    def count_sent(self) -> None:
        self.project.metrics.sent_bytes.inc(self._outbox.take_written())

    def end(self, bye: Bye) -> None:
        """Queue a ``Bye`` behind all queued frames, then close; idempotent."""
        if self._ended:
            return
        self._ended = True
        if bye.code == "REMOTE_UNAUTHORIZED":
            self._withdraw_requests(bye)
        self.project.metrics.said_goodbye(bye.code)
        _log.info("%s: bye, %s %s", self._name, bye.code, bye.reason)
        self._outbox.push(websocket_frame(encode(bye)))
        self._connection.end(_CLOSE_CODES.get(bye.code, 1011), bye.reason)

    def _withdraw_requests(self, bye: Bye) -> None:
        """Refuse requests without effect so far: a revoked token cannot send them again."""
        for request_id in tuple(self._in_flight):
            if self.project.withdraw(self, request_id, bye.code):
                del self._in_flight[request_id]
                self._push(Refused(request_id, bye.code, f"{bye.reason}; nothing was changed"))

    def _end_with_error(self, group: BaseExceptionGroup[BaseException]) -> None:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, RemoteError):
            self.end(Bye(error.code, error.message[:4096], None if isinstance(error, ProtocolError) else 1.0))
        else:
            self.end(Bye("REMOTE_FAILED", "internal error; see the server's log", 1.0))

    # --- greeting ---

    async def _greeting(self) -> Hello:
        """Return the client's first frame. Raises ProtocolError: none in time, or no common version."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = _decode(await self._connection.recv())
        except TimeoutError:
            raise ProtocolError(f"no Hello within {HELLO_TIMEOUT_S:g} s") from None
        if not isinstance(hello, Hello):
            raise ProtocolError(f"the first frame must be Hello, not {type(hello).__name__}")
        if PROTOCOL_VERSION not in hello.versions:
            side = "client" if max(hello.versions) < PROTOCOL_VERSION else "server"
            raise ProtocolError(
                f"the client speaks protocol {hello.versions}, the server {PROTOCOL_VERSION}: upgrade the {side}",
                code="REMOTE_VERSION",
            )
        return hello

    async def _welcome(self, hello: Hello) -> None:
        """Answer the greeting, without yielding between the last look at the project and the queued frame."""
        project = self.project
        self._capabilities = frozenset(hello.capabilities)
        await project.opened()
        position = Position(hello.epoch, hello.seq, hello.mark)
        continues = hello.follow and await project.can_continue(position)
        is_lost = hello.follow and not continues and await project.history.lacks(position)
        continues = continues and hello.epoch == project.history.epoch  # the epoch may have changed while reading
        if project.failure is not None:  # failed before this connection joined the subscribers
            raise project.failure
        self._follows = hello.follow
        self._sent = hello.seq if continues else project.history.head
        most = self._limits.request_bytes
        self._connection.allow_message_bytes(most)
        project.history.join(self)
        self._push(
            Welcome(
                version=PROTOCOL_VERSION,
                server_version=lattice_remote.__version__,
                lattice_version=project.lattice_version,
                project=project.slug,
                actor=self.token.actor,
                epoch=project.history.epoch,
                head=project.history.head,
                oldest=project.history.oldest,
                resync=hello.follow and not continues,
                lost=is_lost,
                limits=Limits(most, most - _OTHER_FIELDS_BYTES, self._limits.text_bytes),
                act_as=self.token.act_as,
                capabilities=offered_capabilities(),
                used=(project.history.used or "")[:256],
            )
        )
        self.replication.greeted(hello, start=self._sent, head=project.history.head)
        programs = _describe_versions(hello, project.lattice_version)
        _log.info("%s: connected at %d of %d, %s", self._name, self._sent, project.history.head, programs)
        if self._sent == project.history.head:
            self._go_live()

    async def _read(self) -> None:
        async for message in self._connection:
            if not self._ended:
                self._take(_decode(message))

    def _take(self, frame: ClientFrame) -> None:
        match frame:
            case Fetch():
                self._fetch(frame)
            case Manifest():
                self._wants_manifest = True
                self._work.set()
            case Applied():
                self.replication.acknowledged(frame, sent=self._sent)
            case Hello():
                raise ProtocolError("Hello comes once")
            case _:
                self._take_request(frame)

    def _fetch(self, frame: Fetch) -> None:
        self._wanted.update(dict.fromkeys(frame.paths))
        if len(self._wanted) > _MAX_FETCHES:
            raise ProtocolError(f"more than {_MAX_FETCHES} files requested at once")
        self._work.set()

    def _take_request(self, frame: Request) -> None:
        needed = needed_capability(frame)
        if self.token.read_only and isinstance(frame, Run | Call | Put | Upload | Push):
            self._refuse(frame.id, "REMOTE_FORBIDDEN", READ_ONLY)
        elif needed is not None and needed not in self._capabilities:
            self._refuse(frame.id, "REMOTE_VERSION", f"the client does not name {needed!r}: upgrade the client")
        elif isinstance(frame, Call) and frame.surface not in SURFACES:
            self._refuse(frame.id, "REMOTE_UNSUPPORTED", f"the server has no surface {frame.surface!r}")
        elif isinstance(frame, Run | Call) and any(f.size > self._limits.attachment_bytes for f in frame.files):
            most = self._limits.attachment_bytes
            self._refuse(frame.id, "REMOTE_TOO_LARGE", f"a file of a command has at most {most} bytes here")
        elif isinstance(frame, Put) and not is_editable(frame.path):
            self._refuse(frame.id, "REMOTE_UNSUPPORTED", f"{frame.path!r} is not an editable file")
        elif isinstance(frame, Put) and max(len(frame.text), len(frame.base or b"")) > self._limits.text_bytes:
            most = self._limits.text_bytes
            self._refuse(frame.id, "REMOTE_TOO_LARGE", f"{frame.path} is longer than {most} bytes")
        elif self._register(frame):
            self._start_request(frame)

    def _start_request(self, frame: Request) -> None:
        token, project = self.token, self.project
        match frame:
            case Run():
                run = RunCommand(frame.id, frame.argv, frame.files, token.id, token.actor, token.act_as)
                project.submit(msgspec.structs.replace(run, first_sent_at=_first_sent_at(frame)), self)
            case Call():
                call = RunCall(
                    *(frame.id, frame.surface, frame.name, frame.payload, frame.files),
                    *(token.id, token.actor, token.act_as, _first_sent_at(frame)),
                )
                project.submit(call, self)
            case Put():
                first = _first_sent_at(frame)
                edit = Edit(frame.id, frame.path, frame.base, frame.text, token.id, token.actor, first)
                project.submit(msgspec.structs.replace(edit, base_digest=frame.base_digest), self)
            case Upload():
                project.uploads.take(frame, token.id, self)
            case Push():
                project.pushes.take(frame, token, _first_sent_at(frame), project.history.used, self)
            case Log() | ReadVersion() | Download() | Replay():
                self._reads.append(frame)
                self._work.set()

    def _register(self, frame: Request) -> bool:
        """Register a request; return False for a duplicate or above the limit.

        Raises ProtocolError: a different request with this id is in flight.
        """
        if (known := self._in_flight.get(frame.id)) is not None:
            if _without_age(known) != _without_age(frame):
                raise ProtocolError(f"a different request with id {frame.id} is in flight on this connection")
            return False  # a duplicate on one connection gets one reply
        most = self._limits.requests_per_connection
        if len(self._in_flight) >= most:
            self._refuse(frame.id, "REMOTE_BUSY", f"{most} requests are in flight on this connection")
            return False
        self._in_flight[frame.id] = frame
        return True

    def _refuse(self, request_id: str, code: str, message: str) -> None:
        self.project.request_log.refused_other(code)
        self.answer(request_id, encode(Refused(request_id, code, message)))

    def change_committed(self, seq: int, frame: bytes) -> None:
        if self._live and self._follows:
            assert seq == self._sent + 1, "a live client was sent every change up to the head"
            self._sent = seq
            self._outbox.push(frame)

    def answer(self, request_id: str, reply: bytes) -> None:
        """Queue a reply; during catch-up it waits for the changes before it."""
        size = len(reply)
        if size > COUNTED_BYTES and not self._budget.take(self.token.id, size):
            self._in_flight.pop(request_id, None)
            self.end(Bye("REMOTE_BUSY", "too many answers to this token were not read; read those first", 1.0))
            return
        self._counted_bytes += size if size > COUNTED_BYTES else 0
        self._queue_answer(request_id, reply)

    def _release_answers(self) -> None:
        if self._counted_bytes and not self._deferred_replies:
            self._budget.give_back(self.token.id, self._counted_bytes)
            self._counted_bytes = 0

    def _queue_answer(self, request_id: str, reply: bytes) -> None:
        self._in_flight.pop(request_id, None)
        frame = websocket_frame(reply)
        if self._live:
            self._outbox.push(frame)
        elif self._deferred_bytes + len(frame) > MAX_PENDING_BYTES:
            self.end(Bye("REMOTE_BUSY", "too many replies are waiting for earlier changes; read those first", 1.0))
        else:
            self._deferred_replies.append(frame)
            self._deferred_bytes += len(frame)

    def _push(self, frame: ServerFrame) -> None:
        self._outbox.push(websocket_frame(encode(frame)))

    def _go_live(self) -> None:
        self._live = True
        for answer in self._deferred_replies:
            self._outbox.push(answer)
        self._deferred_replies.clear()

    async def _send_pending(self) -> None:
        await self._catch_up()
        files = FileSender(self.project, self._outbox, self._push, compresses="parts" in self._capabilities)
        while True:
            if self._wants_manifest:
                self._wants_manifest = False
                for frame in self.project.history.entries():
                    self._outbox.push(frame)
                    await self._outbox.room()
            elif self._wanted:
                async with self._budget.reserved(self.token.id, 2 * PIECE_BYTES):
                    unsettled = await files.send(files.batch(self._wanted))
                self._wanted.update(dict.fromkeys(unsettled))
            elif self._reads:
                request = self._reads.popleft()
                async with self._budget.reserved(self.token.id, self._max_bytes_of(request)):
                    self._queue_answer(request.id, encode(await self._read_for(request)))
                    await self._outbox.room()
            else:
                self._work.clear()
                await self._work.wait()

    def _max_bytes_of(self, request: Read) -> int:
        match request:
            case ReadVersion():
                return self._limits.text_bytes
            case Download():
                return request.limit
        return PIECE_BYTES

    async def _read_for(self, request: Read) -> ServerFrame:
        history = self.project.history
        match request:
            case Log() | ReadVersion():
                return await self.project.log.answer(request, epoch=history.epoch, head=history.head)
            case Replay():
                return await replay(request, self.project)
            case Download():
                return await download(request, history, self.project.paths)

    async def _catch_up(self) -> None:
        """Send missed changes at the client's pace; go live in the tick of the last."""
        while not self._live:
            batch = await self.project.history.changes_after(self._sent)
            if not batch:
                raise StorageError(f"change {self._sent + 1} is no longer kept; reconnect to resync")
            for seq, frame in batch:
                assert seq == self._sent + 1, "numbers have no gap (I1)"
                self._sent = seq
                self._outbox.push(frame)
            await self._outbox.room()
            if self._sent == self.project.history.head:
                self._go_live()


def _describe_versions(hello: Hello, lattice_version: str) -> str:
    parts = []
    for name, theirs, ours in (
        ("lattice-remote", hello.client_version, lattice_remote.__version__),
        ("lattice-tracker", hello.lattice_version, lattice_version),
    ):
        if not theirs:
            continue
        difference = describe_difference(theirs, ours, here_is="the client", there_is="the server")
        parts.append(f"{name} {printable(theirs[:40])}" + (f" ({printable(difference[:120])})" if difference else ""))
    return ", ".join(parts) or "unknown versions"


def _first_sent_at(frame: Write) -> float | None:
    """Return when a repeated request was first sent, by this clock."""
    return time.time() - frame.age_s if frame.age_s else None


def _without_age(frame: Request) -> Request:
    return msgspec.structs.replace(frame, age_s=0.0) if isinstance(frame, Write) else frame


def _decode(message: str | bytes) -> ClientFrame:
    if isinstance(message, str):
        raise ProtocolError("received a text message; frames are binary")
    return decode_client_frame(message)
