"""One connected client: its greeting, what it missed, and then changes, answers and files, in that order's keeping.

Two things run for a client. What it sends is read at once, whatever it is owed. What it is owed goes out in its
own time: first the changes that it missed, then, for good, every new change in the very moment in which it is
committed, and files in pieces between them as the outbox has room.

    greeting --Hello--> catching up --its last change is the head--> live

Answers are held until it is live, so that each comes after its change. A manifest and each part of a file are
queued in the tick in which they are right, so the number they carry is that of the last change queued before.
"""

import asyncio
import functools
import logging
import os
import time
from collections import deque
from collections.abc import Hashable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec
from websockets.exceptions import ConnectionClosed

import lattice_remote
from lattice_remote.errors import ProtocolError, RemoteError, StorageError
from lattice_remote.protocol.codec import decode_client_frame, encode
from lattice_remote.protocol.effects import Position
from lattice_remote.protocol.messages import (
    CAPABILITIES,
    PROTOCOL_VERSION,
    Applied,
    Bye,
    Call,
    Change,
    ClientFrame,
    Download,
    Downloaded,
    Fetch,
    Follow,
    Followed,
    Hello,
    Limits,
    Log,
    Manifest,
    Push,
    Put,
    ReadVersion,
    Refused,
    Request,
    Run,
    ServerFrame,
    Upload,
    Welcome,
    Write,
    needed_capability,
)
from lattice_remote.protocol.operations import AnnounceFile, AppendBytes, DeleteFile, MergeJson, MoveFile, Operation
from lattice_remote.protocol.paths import is_editable
from lattice_remote.server.datadir import ProjectPaths
from lattice_remote.server.ipc import Edit, RunCall, RunCommand
from lattice_remote.server.metrics import ProjectMetrics
from lattice_remote.server.project.file_reader import FileSender
from lattice_remote.server.project.history import CommitTimes, History
from lattice_remote.server.project.project import Project
from lattice_remote.server.tokens import Token
from lattice_remote.server.transport.send_queue import MAX_PENDING_BYTES, payload_of, websocket_frame
from lattice_remote.server.transport.websocket import Handoff
from lattice_remote.server.worker.calls.registry import is_offered
from lattice_remote.text import describe_difference, printable

__all__ = [
    "HELLO_TIMEOUT_S",
    "ChangeEncoder",
    "ClientConnection",
    "ReplicationStatus",
    "can_continue",
    "common_capabilities",
    "dialect",
    "download",
    "followed",
    "is_on_record",
    "offered_capabilities",
]


async def is_on_record(project: Project, position: Position) -> bool | None:
    """Tell whether a position is of the present history; None where its change is not kept any more.

    A genuine one that is not begins a new epoch: the server was rolled back since the client has seen it.
    """
    history = project.history
    if position.epoch != history.epoch:
        return False
    known = await history.mark_at(position.seq) if position.seq <= history.head else b""
    if known is None or (known == position.mark and position.seq <= history.head):
        return None if known is None else True
    if await history.is_genuine(position):
        why = f"a client has seen another change {position.seq}; the head is {history.head}"
        await project.rollback_proved(position.epoch, why)
    return False


async def can_continue(project: Project, position: Position) -> bool:
    """Tell whether changes can bring a cache up to date that is at this position."""
    if not await is_on_record(project, position):
        return False
    history = project.history
    return position.seq == history.head or position.seq + 1 >= history.oldest


async def followed(project: Project, follow: Follow) -> Followed:
    """Answer a ``Follow``; from the last look at the history to the return nothing waits.

    One without a mark is a person's guess: it gets the changes after that number, of whichever history is present.
    """
    history = project.history
    epoch, mark, is_known = history.epoch, follow.mark, True
    if follow.seq is not None and mark:
        is_known = await is_on_record(project, Position(follow.epoch, follow.seq, mark)) is not False
    elif follow.seq is not None and follow.seq <= history.head:
        mark = await history.mark_at(follow.seq) or b""
    if follow.seq is None:
        seq, mark = history.head, history.mark
    else:
        seq = follow.seq
    outcome: Literal["following", "expired", "ahead", "epoch"]
    if history.epoch != epoch or follow.epoch not in ("", epoch) or (not is_known and seq <= history.head):
        outcome = "epoch"
    elif seq > history.head:
        outcome = "ahead"
    else:
        outcome = "following" if seq == history.head or seq + 1 >= history.oldest else "expired"
    return Followed(seq, outcome, history.epoch, history.head, history.oldest, mark)


class ReplicationStatus:
    """One connection. ``greeted()`` comes first; before it nothing is known."""

    def __init__(self, pace: CommitTimes, metrics: ProjectMetrics) -> None:
        self.since = datetime.now(UTC)
        """When it was connected."""
        self.client_version = ""
        """What it runs, as it says; "" before its greeting."""
        self.lattice_version = ""
        self.applied: int | None = None
        """The last change that its files hold, as far as is known; None: it keeps no copy on this connection."""
        self._pace = pace
        self._metrics = metrics
        self._measured_from = 0  # changes up to here were committed before it was there

    def greeted(self, hello: Hello, *, start: int, head: int) -> None:
        """It was welcomed, and is sent the changes after ``start``."""
        self.client_version, self.lattice_version = hello.client_version[:40], hello.lattice_version[:40]
        self._measured_from = head
        if hello.follow:
            self.applied = start

    def follows_from(self, seq: int) -> None:
        """It follows from now on, and holds this change."""
        self.applied = seq

    def acknowledged(self, frame: Applied, *, sent: int) -> None:
        """Take what it says; ``sent`` is the last change that was sent to it."""
        if self.applied is None or not self.applied < frame.seq <= sent:
            return
        self.applied = frame.seq
        age_s = self._pace.age_of(frame.seq, time.monotonic())
        if frame.held_s is not None and age_s is not None and frame.seq > self._measured_from:
            self._metrics.delivery_lag_seconds.observe(max(0.0, age_s - max(0.0, frame.held_s)))


_UNKNOWN = bytes(32)
"""A digest that no file has: whatever the client holds, it is to be fetched."""
_OPERATIONS = frozenset({"append", "merge", "move"})
_decoder = msgspec.msgpack.Decoder(Change)


def offered_capabilities() -> list[str]:
    """Return what this server can do with what is installed beside it."""
    return [name for name in CAPABILITIES if not name.startswith("call:") or is_offered(name.removeprefix("call:"))]


def common_capabilities(hello: Hello) -> frozenset[str]:
    """Return what both sides understand.

    Raises:
        ProtocolError: it is too little for a client that follows; the message says which side to upgrade.
    """
    common = frozenset(hello.capabilities) & frozenset(CAPABILITIES)
    if hello.follow and "announce" not in common:
        raise ProtocolError(
            f"the client (lattice-remote {hello.client_version[:40]}) can't fetch announced files: upgrade the client",
            code="REMOTE_VERSION",
        )
    return common


class ChangeEncoder:
    """How changes are told to clients that understand the same operations.

    A new change is told to all of them in one loop tick, so keeping the last is enough to translate it once, however
    many they are (I10).
    """

    def __init__(self, capabilities: frozenset[str]) -> None:
        self._capabilities = capabilities
        self._is_whole = capabilities >= _OPERATIONS
        self._last: tuple[bytes, bytes] = (b"", b"")  # a frame, and how it was told

    def told(self, frame: bytes) -> bytes:
        """Return a change's WebSocket frame as these clients understand it: the shared one, if they do."""
        if self._is_whole:
            return frame
        if self._last[0] is not frame:
            self._last = frame, self._translated(frame)
        return self._last[1]

    def _translated(self, frame: bytes) -> bytes:
        change = _decoder.decode(payload_of(frame))
        operations = [plain for operation in change.ops for plain in self._plain(operation)]
        if operations == change.ops:
            return frame
        return websocket_frame(encode(msgspec.structs.replace(change, ops=operations)))

    def _plain(self, operation: Operation) -> Iterator[Operation]:
        match operation:
            case AppendBytes() if "append" not in self._capabilities:
                yield AnnounceFile(operation.path, 0, _UNKNOWN)
            case MergeJson() if "merge" not in self._capabilities:
                yield AnnounceFile(operation.path, 0, _UNKNOWN)
            case MoveFile() if "move" not in self._capabilities:
                yield DeleteFile(operation.path)
                yield AnnounceFile(operation.to, 0, _UNKNOWN)
            case _:
                yield operation


def dialect(capabilities: frozenset[str]) -> ChangeEncoder:
    """Return the one that all clients with these capabilities share. There are as many as sets of operations: eight."""
    return _dialect(capabilities & _OPERATIONS)


@functools.cache
def _dialect(operations: frozenset[str]) -> ChangeEncoder:
    return ChangeEncoder(operations)


async def download(asked: Download, history: History, paths: ProjectPaths) -> Downloaded | Refused:
    """Return the piece that is asked for, as of the head. Reads in a thread."""
    content = history.files.get(asked.path)
    if content is None:
        return Refused(asked.id, "REMOTE_NOT_FOUND", f"there is no file {asked.path!r} in this project")
    size, digest = content
    if asked.digest not in (None, digest):
        return Refused(asked.id, "REMOTE_NOT_FOUND", f"{asked.path!r} has another content by now")
    if asked.offset > size:
        return Refused(asked.id, "REMOTE_PROTOCOL", f"{asked.path!r} has {size} bytes")
    seq, wanted = history.head, min(asked.limit, size - asked.offset)
    try:
        data = await asyncio.to_thread(_read, paths.lattice / asked.path, asked.offset, wanted)
    except OSError as error:
        return Refused(asked.id, "REMOTE_STORAGE", f"the server can't read {asked.path!r}: {error.strerror}")
    if len(data) != wanted:  # somebody is changing it; the change that tells of it is on its way
        return Refused(asked.id, "REMOTE_BUSY", f"{asked.path!r} is changing; try again")
    return Downloaded(asked.id, seq, size, digest, data)


def _read(path: Path, offset: int, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


HELLO_TIMEOUT_S = 10.0
_MAX_FETCHES = 65_536
_OTHER_FIELDS_BYTES = 64 * 1024
"""What a frame may have beside a file."""

_CLOSE_CODES = {
    "REMOTE_SHUTDOWN": 1001,
    "REMOTE_PROTOCOL": 1002,
    "REMOTE_UNAUTHORIZED": 1008,
    "REMOTE_FORBIDDEN": 1008,
    "REMOTE_VERSION": 1008,
    "REMOTE_TOO_LARGE": 1009,
    "REMOTE_BUSY": 1012,
}
"""RFC 6455 section 7.4 for each goodbye; 1011 (internal error) for any other."""

_log = logging.getLogger(__name__)


class ClientConnection:
    """One client's connection to one project. ``run()`` it; everything else is called by its project and by itself."""

    def __init__(self, connection: Handoff, token: Token, project: Project) -> None:
        self.token = token
        self.project = project
        self.standing = ReplicationStatus(project.pace, project.metrics)
        """How far it is."""
        self._connection = connection
        self._outbox = connection.outbox
        self._limits = connection.visit.limits
        self._name = f"{project.slug}: {token.actor} ({token.id}) at {connection.peer_name}"
        self._capabilities: frozenset[str] = frozenset()  # what both sides understand
        self._dialect = dialect(frozenset(CAPABILITIES))
        self._follows = True
        self._live = False
        self._sent = 0  # the last change that was queued for it
        self._held_answers: list[bytes] = []  # until it is live
        self._held_bytes = 0
        self._in_flight: dict[str, Request] = {}
        self._wanted: dict[str, None] = {}  # files to send, in the order in which they were asked for
        self._wants_manifest = False
        self._asked: deque[Log | ReadVersion | Download] = (
            deque()
        )  # what is read for it when it has taken what it is owed before
        self._follow: Follow | None = None  # asked for, and not answered yet
        self._work = asyncio.Event()
        self._ended = False

    @property
    def lane(self) -> Hashable:
        """Its own: a connection's requests keep their order."""
        return self

    async def run(self) -> None:
        """Serve the client until its connection is closed, from either side. Raises nothing."""
        try:
            await self._welcome(await self._greeting())
            async with asyncio.TaskGroup() as group:
                sender = group.create_task(self._send_owed())
                await self._read()
                sender.cancel()
        except* ConnectionClosed:
            pass
        except* RemoteError as group:
            self._end_because(group)
        except* Exception as group:  # noqa: BLE001 - one client's trouble must not be the server's
            _log.exception("%s: unexpected failure", self._name)
            self._end_because(group)
        finally:
            self.project.history.leave(self)
            self.project.forget(self, set(self._in_flight))
            self.count_sent()
            _log.info("%s: disconnected", self._name)

    @property
    def address(self) -> str:
        """Where it comes from, as far as the door knows."""
        return self._connection.visit.address

    @property
    def behind(self) -> int | None:
        """How many changes its copy lacks, as far as it has said; None when it keeps none on this connection."""
        applied = self.standing.applied
        return None if applied is None else max(0, self.project.history.head - applied)

    @property
    def waiting_bytes(self) -> int:
        """What it was sent and has not taken yet."""
        return self._outbox.pending_bytes

    def count_sent(self) -> None:
        """Count what was sent since this was last called."""
        self.project.metrics.sent_bytes.inc(self._outbox.take_written())

    def end(self, bye: Bye) -> None:
        """Say goodbye and close; what is queued goes first. Idempotent, never waits."""
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
        """Refuse the requests that have had no effect yet: nobody may ask for them again, so they are not run."""
        for request_id in tuple(self._in_flight):
            if self.project.withdraw(self, request_id, bye.code):
                del self._in_flight[request_id]
                self._push(Refused(request_id, bye.code, f"{bye.reason}; nothing was changed"))

    def _end_because(self, group: BaseExceptionGroup[BaseException]) -> None:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, RemoteError):
            self.end(Bye(error.code, error.message[:4096], None if isinstance(error, ProtocolError) else 1.0))
        else:
            self.end(Bye("REMOTE_FAILED", "the server failed at this; see its log", 1.0))

    # --- greeting ---

    async def _greeting(self) -> Hello:
        """Return the client's first frame.

        Raises:
            ProtocolError: it is something else, or does not come in time, or shares no version with this side.
        """
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
        """Answer the greeting. From the last look at the project to the queued frame nothing waits."""
        project = self.project
        self._capabilities = common_capabilities(hello)
        self._dialect = dialect(self._capabilities)
        await project.opened()
        position = Position(hello.epoch, hello.seq, hello.mark)
        continues = hello.follow and await can_continue(project, position)
        is_lost = hello.follow and not continues and await project.history.lacks(position)
        continues = continues and hello.epoch == project.history.epoch  # it may have begun anew meanwhile
        if project.failure is not None:  # meanwhile; it told its followers, of whom this is not yet one
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
        self.standing.greeted(hello, start=self._sent, head=project.history.head)
        programs = _programs(hello, project.lattice_version)
        _log.info("%s: connected at %d of %d, %s", self._name, self._sent, project.history.head, programs)
        if self._sent == project.history.head:
            self._go_live()

    # --- what the client sends ---

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
            case Follow():
                self._ask_to_follow(frame)
            case Applied():
                self.standing.acknowledged(frame, sent=self._sent)
            case Hello():
                raise ProtocolError("Hello comes once")
            case _:
                self._take_request(frame)

    def _ask_to_follow(self, frame: Follow) -> None:
        if self._follows or self._follow is not None or "follow" not in self._capabilities:
            raise ProtocolError("Follow comes once, from a client that names it and whose Hello does not follow")
        self._follow = frame
        self._work.set()

    def _fetch(self, frame: Fetch) -> None:
        self._wanted.update(dict.fromkeys(frame.paths))
        if len(self._wanted) > _MAX_FETCHES:
            raise ProtocolError(f"more than {_MAX_FETCHES} files asked for at once")
        self._work.set()

    def _take_request(self, frame: Request) -> None:
        """Take what is to be answered: refuse it, or have it carried out."""
        needed = needed_capability(frame)
        if needed is not None and needed not in self._capabilities:
            self._refuse(frame.id, "REMOTE_VERSION", f"the client does not name {needed!r}: upgrade the client")
        elif isinstance(frame, Run | Call) and any(f.size > self._limits.attachment_bytes for f in frame.files):
            most = self._limits.attachment_bytes
            self._refuse(frame.id, "REMOTE_TOO_LARGE", f"a file of a command has at most {most} bytes here")
        elif isinstance(frame, Put) and not is_editable(frame.path):
            self._refuse(frame.id, "REMOTE_UNSUPPORTED", f"{frame.path!r} is not a file that people edit in place")
        elif isinstance(frame, Put) and max(len(frame.text), len(frame.base or b"")) > self._limits.text_bytes:
            most = self._limits.text_bytes
            self._refuse(frame.id, "REMOTE_TOO_LARGE", f"{frame.path} is longer than {most} bytes")
        elif self._is_taken(frame):
            self._carry_out(frame)

    def _carry_out(self, frame: Request) -> None:
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
            case Log() | ReadVersion() | Download():
                self._asked.append(frame)
                self._work.set()

    def _is_taken(self, frame: Request) -> bool:
        """Note a request that is to be answered; return whether it is: one at a time of an id, and not too many.

        Raises:
            ProtocolError: it is another request than the one that is under way with this id.
        """
        if (known := self._in_flight.get(frame.id)) is not None:
            if _without_age(known) != _without_age(frame):
                raise ProtocolError(f"request {frame.id} is under way on this connection, and is another one")
            return False  # asked twice on one connection: one answer
        most = self._limits.requests_per_connection
        if len(self._in_flight) >= most:
            self._refuse(frame.id, "REMOTE_BUSY", f"{most} requests are under way on this connection")
            return False
        self._in_flight[frame.id] = frame
        return True

    def _refuse(self, request_id: str, code: str, message: str) -> None:
        self.project.accounts.refused_other(code)
        self.answer(request_id, encode(Refused(request_id, code, message)))

    # --- what the client is owed ---

    def change_committed(self, seq: int, frame: bytes) -> None:
        """Queue a change, if the client has all before it."""
        if self._live and self._follows:
            assert seq == self._sent + 1, "a live client was sent every change up to the head"
            self._sent = seq
            self._outbox.push(self._dialect.told(frame))

    def answer(self, request_id: str, reply: bytes) -> None:
        """Queue an answer; one that comes while the client catches up waits for the changes before it."""
        self._in_flight.pop(request_id, None)
        frame = websocket_frame(reply)
        if self._live:
            self._outbox.push(frame)
        elif self._held_bytes + len(frame) > MAX_PENDING_BYTES:
            self.end(Bye("REMOTE_BUSY", "too many answers wait for the changes before them; read those first", 1.0))
        else:
            self._held_answers.append(frame)
            self._held_bytes += len(frame)

    def _push(self, frame: ServerFrame) -> None:
        self._outbox.push(websocket_frame(encode(frame)))

    def _go_live(self) -> None:
        self._live = True
        for answer in self._held_answers:
            self._outbox.push(answer)
        self._held_answers.clear()

    async def _send_owed(self) -> None:
        """Send what it missed, then manifests and files as it asks for them."""
        await self._catch_up()
        files = FileSender(self.project, self._outbox, self._push)
        while True:
            if self._follow is not None and not self._follows:
                await self._begin_to_follow(self._follow)
            elif self._wants_manifest:
                self._wants_manifest = False
                for frame in self.project.history.entries():
                    self._outbox.push(frame)
                    await self._outbox.room()
            elif self._wanted:
                unsettled = await files.send(files.batch(self._wanted))
                self._wanted.update(dict.fromkeys(unsettled))
            elif self._asked:
                asked = self._asked.popleft()
                self.answer(asked.id, encode(await self._read_for(asked)))
                await self._outbox.room()
            else:
                self._work.clear()
                await self._work.wait()

    async def _begin_to_follow(self, asked: Follow) -> None:
        """Answer, and in the same tick begin with the changes after the number that was asked for."""
        answer = await followed(self.project, asked)
        self._push(answer)
        self._follow = None
        if answer.outcome == "following":
            self._follows, self._sent = True, answer.seq
            self.standing.follows_from(answer.seq)
            self._live = answer.seq == answer.head
            await self._catch_up()

    async def _read_for(self, asked: Log | ReadVersion | Download) -> ServerFrame:
        history = self.project.history
        if isinstance(asked, Log | ReadVersion):
            return await self.project.log.answer(asked, epoch=history.epoch, head=history.head)
        return await download(asked, history, self.project.paths)

    async def _catch_up(self) -> None:
        """Send the changes after ``_sent`` at the client's pace, and go live in the tick in which there are no more."""
        while not self._live:
            batch = await self.project.history.changes_after(self._sent)
            if not batch:
                raise StorageError(f"change {self._sent + 1} is not kept any more; come back to resync")
            for seq, frame in batch:
                assert seq == self._sent + 1, "numbers have no gap (I1)"
                self._sent = seq
                self._outbox.push(self._dialect.told(frame))
            await self._outbox.room()
            if self._sent == self.project.history.head:
                self._go_live()


def _programs(hello: Hello, lattice_version: str) -> str:
    """Return what a client runs, for the log, and which side to upgrade where that is not what this server runs."""
    parts = []
    for name, theirs, ours in (
        ("lattice-remote", hello.client_version, lattice_remote.__version__),
        ("lattice-tracker", hello.lattice_version, lattice_version),
    ):
        difference = describe_difference(theirs, ours, here_is="the client", there_is="the server")
        parts.append(f"{name} {printable(theirs[:40])}" + (f" ({printable(difference[:120])})" if difference else ""))
    return ", ".join(parts)


def _first_sent_at(frame: Write) -> float | None:
    """Return when a request that is sent again was first sent, by this machine's clock; None for a new one."""
    return time.time() - frame.age_s if frame.age_s else None


def _without_age(frame: Request) -> Request:
    return msgspec.structs.replace(frame, age_s=0.0) if isinstance(frame, Write) else frame


def _decode(message: str | bytes) -> ClientFrame:
    if isinstance(message, str):
        raise ProtocolError("frames are binary messages, this one is text")
    return decode_client_frame(message)
