"""Server that plays a project to a client under test, and misbehaves when a check wants it.

``InMemoryServer`` does no I/O. It keeps every tree of its history, and does what SPEC.md allows a server at the least
convenient moment: it replays slowly while others write, reads files for a ``Fetch`` long before the replay gets there,
and sends manifests and files in small pieces. ``ScriptedServer`` puts it behind a WebSocket.
"""

import asyncio
import contextlib
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import takewhile
from typing import Any, Literal

import msgspec
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from lattice_remote.errors import ProtocolError
from lattice_remote.protocol.messages import (
    CAPABILITIES,
    SUBPROTOCOL,
    Applied,
    Bye,
    Change,
    ClientFrame,
    Download,
    Downloaded,
    Entries,
    Entry,
    Fetch,
    Hello,
    Limits,
    Log,
    LogPage,
    Manifest,
    Part,
    Parts,
    Put,
    Refused,
    Reply,
    Run,
    ServerFrame,
    Stored,
    Welcome,
    WholeFile,
    decode_client_frame,
    decode_server_frame,
    encode,
    pack_files,
)
from lattice_remote.protocol.operations import (
    TAIL_BYTES,
    AnnounceFile,
    AppendBytes,
    DeleteFile,
    MergeJson,
    MoveFile,
    Operation,
    PutFile,
    canonical_json,
    digest_of,
    merge_patch,
)

__all__ = [
    "EXIT_CODE",
    "LINE",
    "LOG",
    "STDOUT",
    "TOKEN",
    "Link",
    "ScriptedServer",
]

Files = dict[str, bytes]
PIECE = 7
"""Small, so that everything comes in several pieces."""


def append_to(path: str, before: bytes, data: bytes) -> AppendBytes:
    return AppendBytes(path, offset=len(before), tail=digest_of(before[-TAIL_BYTES:]), data=data)


def merge_into(path: str, before: bytes, patch: dict[str, object]) -> tuple[MergeJson, bytes]:
    """Return the operation that patches a canonical JSON file, and the content afterwards."""
    import json

    after = canonical_json(merge_patch(json.loads(before), patch))
    return MergeJson(path, patch=json.dumps(patch).encode(), digest=digest_of(after)), after


def announce(path: str, after: bytes) -> AnnounceFile:
    return AnnounceFile(path, size=len(after), digest=digest_of(after))


def delta(before: Files, after: Files, *, announced: frozenset[str] = frozenset()) -> list[Operation]:
    """Return operations that lead from one tree to another: appends where a file grew, moves where one moved."""
    operations: list[Operation] = []
    gone = [path for path in before if path not in after]
    for path, data in after.items():
        old = before.get(path)
        if old == data:
            continue
        source = next((p for p in gone if before[p] == data), None) if old is None else None
        if path in announced:
            operations.append(announce(path, data))
        elif source is not None:
            gone.remove(source)
            operations.append(MoveFile(source, to=path, digest=digest_of(data)))
        elif old is not None and len(data) > len(old) and data.startswith(old):
            operations.append(append_to(path, old, data[len(old) :]))
        else:
            operations.append(PutFile(path, data))
    return operations + [DeleteFile(path) for path in gone]


@dataclass(frozen=True)
class Moment:
    mark: bytes
    files: Files
    change: Change | None = None


class InMemoryConnection:
    """Two FIFO streams of encoded frames, and the pieces that are still to be sent."""

    def __init__(self) -> None:
        self.to_client: deque[bytes] = deque()
        self.to_server: deque[bytes] = deque()
        self.cursor: int | None = None  # last change sent
        self.takes_parts = False
        self.pending: deque[ServerFrame | str] = deque()
        """Pieces of files and manifests, and paths whose files are read when their turn comes."""

    def send(self, frame: ServerFrame) -> None:
        self.to_client.append(encode(frame))


@dataclass
class InMemoryServer:
    epoch: str = "epoch0"
    history: list[Moment] = field(default_factory=lambda: [Moment(b"", {})])
    oldest: int = 1
    piece: int = PIECE
    """Bytes in a part, entries in a piece of a manifest."""
    compresses: bool = False
    """Whether files that wait are sent whole, and together in one ``Parts``, to clients that take it."""
    connections: list[InMemoryConnection] = field(default_factory=list)
    trees: dict[tuple[str, bytes], Files] = field(default_factory=lambda: {("epoch0", b""): {}})
    """Every tree that ever was, also in histories that were rolled back, by epoch and mark."""
    _marks: int = 0
    _epochs: int = 0

    @property
    def head(self) -> int:
        return len(self.history) - 1

    @property
    def files(self) -> Files:
        return self.history[-1].files

    def write(
        self, operations: list[Operation], after: Files, *, request_id: str | None = None, cause: str = "edit"
    ) -> int:
        """Append a change; with ``request_id``, answer that request on every connection."""
        self._marks += 1
        mark = hashlib.sha256(b"%d" % self._marks).digest()[:8]
        change = Change(self.head + 1, mark, "2026-01-01T00:00:00.000Z", "human:ana", "", cause, "x", operations)
        self.history.append(Moment(mark, after, change))
        self.trees[self.epoch, mark] = after
        for connection in self.connections:
            if connection.cursor == self.head - 1:
                connection.cursor = self.head
                connection.send(change)
            if connection.cursor is not None and request_id is not None:
                connection.pending.append(Reply(request_id, self.head, 0, b"", b""))
        return self.head

    def trim(self, oldest: int) -> None:
        self.oldest = max(self.oldest, min(oldest, self.head + 1))

    def roll_back(self, seq: int) -> None:
        """Lose the changes after ``seq``, as a restored backup does, without noticing."""
        del self.history[seq + 1 :]
        self.oldest = min(self.oldest, self.head + 1)
        self.connections.clear()

    def new_epoch(self) -> None:
        """Start a new epoch with the present files (I7)."""
        self._epochs += 1
        self.epoch = f"epoch{self._epochs}"
        self.history = [Moment(b"", self.files)]
        self.oldest = 1
        self.trees[self.epoch, b""] = self.files
        self.connections.clear()

    def accept(self) -> InMemoryConnection:
        connection = InMemoryConnection()
        self.connections.append(connection)
        return connection

    def take(self, connection: InMemoryConnection) -> None:
        if connection not in self.connections:
            connection.to_server.clear()
            return
        match decode_client_frame(connection.to_server.popleft()):
            case Hello() as hello:
                self._greet(connection, hello)
            case Manifest():
                self._list(connection)
            case Fetch(paths):
                waiting = {item for item in connection.pending if isinstance(item, str)}
                connection.pending.extend(path for path in paths if path not in waiting)
            case frame:
                raise AssertionError(f"a replica never sends {frame}")

    def _greet(self, connection: InMemoryConnection, hello: Hello) -> None:
        known = hello.epoch == self.epoch
        if known and (hello.seq > self.head or self.history[hello.seq].mark != hello.mark):
            self.new_epoch()
            self.connections.append(connection)
            known = False
        resync = not known or hello.seq + 1 < self.oldest
        connection.cursor = self.head if resync else hello.seq
        connection.takes_parts = "parts" in hello.capabilities
        connection.send(
            Welcome(
                version=1,
                server_version="0",
                lattice_version="0",
                project="p",
                actor="human:ana",
                epoch=self.epoch,
                head=self.head,
                oldest=self.oldest,
                resync=resync,
                limits=Limits(1 << 20, 1 << 20),
                capabilities=list(CAPABILITIES),
            )
        )

    def _list(self, connection: InMemoryConnection) -> None:
        while self._replay_one(connection):
            pass
        entries = [Entry(path, len(data), digest_of(data)) for path, data in self.files.items()]
        pieces = [entries[i : i + self.piece] for i in range(0, len(entries), self.piece)] or [[]]
        frames = [
            Entries(self.head, self.history[-1].mark, piece, last=i == len(pieces) - 1)
            for i, piece in enumerate(pieces)
        ]
        connection.send(frames[0])
        connection.pending.extend(frames[1:])

    def _parts(self, path: str, seq: int) -> Iterator[Part]:
        data = self.history[seq].files.get(path)
        if data is None:
            yield Part(path, seq, gone=True)
            return
        for offset in range(0, max(1, len(data)), self.piece):
            yield Part(path, seq, len(data), digest_of(data), offset, data[offset : offset + self.piece])

    def _compressed(self, connection: InMemoryConnection) -> Parts | None:
        """Return the files at the front of the queue in one frame, if there are any."""
        assert connection.cursor is not None, "files are sent after the greeting"
        files = self.history[connection.cursor].files
        taken = list(takewhile(lambda item: isinstance(item, str) and item in files, connection.pending))
        for _ in taken:
            connection.pending.popleft()
        whole = [WholeFile(path, digest_of(files[path]), files[path]) for path in map(str, taken)]
        return Parts(connection.cursor, *pack_files(whole)) if whole else None

    def _replay_one(self, connection: InMemoryConnection) -> bool:
        if connection.cursor is None or connection.cursor >= self.head:
            return False
        connection.cursor += 1
        change = self.history[connection.cursor].change
        assert change is not None
        connection.send(change)
        return True

    def send_next(self, connection: InMemoryConnection, *, piece_first: bool) -> bool:
        """Send a change that is being replayed, or a piece; return False if there is none."""
        if connection not in self.connections:
            return False
        if not (piece_first and connection.pending) and self._replay_one(connection):
            return True
        if not connection.pending:
            return False
        frame = connection.pending[0]
        if isinstance(frame, Reply) and connection.cursor is not None and connection.cursor < frame.seq:
            return self._replay_one(connection)
        if self.compresses and connection.takes_parts and (parts := self._compressed(connection)) is not None:
            connection.send(parts)
            return True
        connection.pending.popleft()
        if isinstance(frame, str):
            assert connection.cursor is not None, "files are sent after the greeting"
            frame, *rest = self._parts(frame, connection.cursor)
            connection.pending.extendleft(reversed(rest))
        connection.send(frame)
        return True


def received(connection: InMemoryConnection) -> ServerFrame:
    return decode_server_frame(connection.to_client.popleft())


TOKEN = "ltr_of_a_scripted_server"  # noqa: S105 - known to everyone
LOG = "events/task_01ARZ3NDEKTSV4RRFFQ69G5FAV.jsonl"
"""Every Run appends ``LINE`` to it."""
LINE = b'{"type":"comment_added"}\n'
STDOUT, EXIT_CODE = b"answered by a scripted server\n", 7
"""Reply to every Run."""
_RIGHTS = {"project": "web", "actor": "human:ana", "act_as": [], "server_version": "0", "lattice_version": "0"}


class Link:
    def __init__(self, socket: ServerConnection, connection: InMemoryConnection) -> None:
        self.socket = socket
        self.connection = connection
        self.hello: Hello | None = None
        self.pinged = asyncio.Event()
        self.closed = asyncio.Event()

    async def send(self, *messages: bytes | str) -> None:
        with contextlib.suppress(ConnectionClosed):
            for message in messages:
                await self.socket.send(message)


class _Connection(ServerConnection):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.on_ping: Callable[[], None] = lambda: None

    def process_event(self, event: Request | Frame) -> None:  # type: ignore[override]
        if isinstance(event, Frame) and event.opcode is Opcode.PING:
            self.on_ping()
        super().process_event(event)


class ScriptedServer:
    """One project in memory behind a real socket. A write is sent to the client at once."""

    def __init__(self, files: Files) -> None:
        self.model = InMemoryServer(history=[Moment(b"", files)])
        self.port = 0
        self.links: list[Link] = []
        self.first: Link | None = None
        """It may have ended."""
        self.frames: list[ClientFrame] = []
        self.faults: list[str] = []
        self.refuses: tuple[HTTPStatus, str] | None = None
        """Status and code ("": from a proxy) with which every upgrade is refused."""
        self.attempts = 0
        self.next_run: Literal["answer", "cut before", "cut after", "new epoch"] = "answer"
        """Whether the next Run is answered, or its connection cut before it runs, after it, or with a new epoch."""
        self.refusals: dict[type[Run | Put], str] = {}
        """Codes with which requests of a kind are Refused."""
        self.outcome = ""
        """Of every Put; "": that of its base."""
        self.holds_pieces = False
        """Keeps the pieces of files and manifests back."""
        self.rewrite: Callable[[dict[str, Any]], dict[str, Any]] | None = None
        """Changes the fields of each frame before it is sent."""
        self._requests: dict[str, Run | Put] = {}
        self._answers: dict[str, ServerFrame] = {}
        self._server: Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/projects/web"

    @property
    def files(self) -> Files:
        return self.model.files

    async def start(self) -> None:
        """Listen on a free port, or on the earlier one."""
        self._server = await serve(
            self._serve,
            "127.0.0.1",
            self.port,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            process_request=self._admit,
            compression=None,
            max_size=1 << 25,
            ping_interval=None,
            close_timeout=2,
            create_connection=_Connection,
        )
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def stop(self) -> None:
        self.cut()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    def cut(self) -> None:
        for link in list(self.links):
            link.socket.transport.abort()

    def new_epoch(self, files: Files) -> None:
        """Start a new epoch with these files, and abort every connection. Earlier answers have ``seq`` 0 now (S6)."""
        self.model.new_epoch()
        self.model.history = [Moment(b"", files)]
        for id_, answer in self._answers.items():
            if isinstance(answer, Reply | Stored):
                self._answers[id_] = msgspec.structs.replace(answer, seq=0)
        self.cut()

    async def change(self, files: dict[str, bytes | None], *, announced: frozenset[str] = frozenset()) -> None:
        after = {path: data for path, data in (self.files | files).items() if data is not None}
        await self.write(delta(self.files, after, announced=announced), after)

    async def write(self, operations: list[Operation], after: Files, *, cause: str = "edit") -> None:
        self.model.write(operations, after, cause=cause)
        await self.flush()

    async def flush(self) -> None:
        for link in list(self.links):
            await self._flush(link)

    async def send(self, *messages: bytes | str) -> None:
        for link in list(self.links):
            await link.send(*messages)

    async def bye(self, code: str, retry_after_s: float | None, close_code: int) -> None:
        for link in list(self.links):
            await link.send(encode(Bye(code, "ended by a check", retry_after_s)))
            await link.socket.close(close_code)

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _json(connection, HTTPStatus.UNAUTHORIZED, _refusal("REMOTE_UNAUTHORIZED"))
        if request.path == "/projects/web":
            return _json(connection, HTTPStatus.OK, {**_RIGHTS, "epoch": self.model.epoch, "head": self.model.head})
        self.attempts += 1
        if request.path != "/projects/web/ws":
            self.faults.append(f"2.1: it requests {request.path!r}")
            return _json(connection, HTTPStatus.NOT_FOUND, _refusal("REMOTE_NOT_FOUND"))
        if SUBPROTOCOL not in request.headers.get("Sec-WebSocket-Protocol", ""):
            self.faults.append(f"2.1: it does not offer the subprotocol {SUBPROTOCOL}")
            return _json(connection, HTTPStatus.UPGRADE_REQUIRED, _refusal("REMOTE_VERSION"))
        if self.refuses is not None:
            status, code = self.refuses
            return _json(connection, status, _refusal(code)) if code else connection.respond(status, "<html>")
        return None

    async def _serve(self, socket: ServerConnection) -> None:
        link = Link(socket, self.model.accept())
        assert isinstance(socket, _Connection), "start() makes it"
        socket.on_ping = link.pinged.set
        self.links.append(link)
        self.first = self.first or link
        try:
            async for message in socket:
                await self._receive(link, message)
        except ConnectionClosed:
            pass
        except ProtocolError as error:
            self.faults.append(error.message)
            await socket.close(1002)
        finally:
            self.links.remove(link)
            if link.connection in self.model.connections:
                self.model.connections.remove(link.connection)
            link.closed.set()

    async def _receive(self, link: Link, message: bytes | str) -> None:
        frame = decode_client_frame(message if isinstance(message, bytes) else b"")
        self.frames.append(frame)
        if isinstance(frame, Hello) != (link.hello is None):
            raise ProtocolError(f"3.3: {type(frame).__name__} is out of turn")
        match frame:
            case Hello():
                link.hello = frame
                self._take(link, frame)
                await self._send_queued(link)
            case Manifest():
                if any(isinstance(each, Entries) for each in link.connection.pending):
                    raise ProtocolError("3.1: Manifest is repeated before it has arrived")
                self._take(link, frame)
            case Fetch():
                self._take(link, frame)
            case Run() | Put():
                await self._request(link, frame)
            case Log():
                await link.send(encode(LogPage(frame.id, [], None)))
            case Download():
                await link.send(encode(self._download(frame)))
            case Applied():
                if frame.seq > self.model.head:
                    raise ProtocolError(f"3.1: it has applied {frame.seq}, the head is {self.model.head}")
            case _:
                raise ProtocolError(f"{type(frame).__name__} is not part of any check")
        await self._flush(link)

    def _take(self, link: Link, frame: ClientFrame) -> None:
        link.connection.to_server.append(encode(frame))
        self.model.take(link.connection)

    async def pieces(self, count: int) -> None:
        for link in list(self.links):
            for _ in range(count):
                self.model.send_next(link.connection, piece_first=True)
            await self._send_queued(link)

    async def _flush(self, link: Link) -> None:
        while (self._is_behind(link) or not self.holds_pieces) and self.model.send_next(
            link.connection, piece_first=False
        ):
            pass
        await self._send_queued(link)

    async def _send_queued(self, link: Link) -> None:
        queue = link.connection.to_client
        while queue:
            message = queue.popleft()
            if self.rewrite is not None:
                message = msgspec.msgpack.encode(self.rewrite(msgspec.msgpack.decode(message)))
            await link.send(message)

    def _is_behind(self, link: Link) -> bool:
        return (link.connection.cursor or 0) < self.model.head

    async def _request(self, link: Link, request: Run | Put) -> None:
        plain = msgspec.structs.replace(request, age_s=0.0)
        if self._requests.setdefault(request.id, plain) != plain:
            raise ProtocolError(f"3.4: id {request.id} comes with another request")
        if request.id in self._answers and not request.age_s:
            raise ProtocolError("3.4: a repeated request has no age_s")
        script, self.next_run = self.next_run, "answer"
        if script == "cut before":
            link.socket.transport.abort()
            return
        if request.id not in self._answers:
            self._answers[request.id] = await self._carry_out(request)
        if script == "new epoch":
            self.new_epoch(self.files)
        elif script == "cut after":
            link.socket.transport.abort()
        else:
            await self._flush(link)
            await link.send(encode(self._answers[request.id]))

    async def _carry_out(self, request: Run | Put) -> ServerFrame:
        if code := self.refusals.get(type(request)):
            return Refused(request.id, code, "refused by a check")
        if isinstance(request, Put):
            return await self._put(request)
        before = self.files.get(LOG, b"")
        after = {**self.files, LOG: before + LINE}
        await self.write([append_to(LOG, before, LINE)], after, cause=request.id)
        return Reply(request.id, self.model.head, EXIT_CODE, STDOUT, b"")

    async def _put(self, put: Put) -> Stored:
        found = self.files.get(put.path)
        has_base = found == put.base or (put.base is None and put.base_digest == digest_of(found or b""))
        outcome = "unchanged" if found == put.text else "stored" if has_base else self.outcome or "conflict"
        text = put.text if outcome == "stored" else put.text + (found or b"").removeprefix(put.base or b"")
        if outcome in {"stored", "merged"}:
            await self.change({put.path: text})
        return msgspec.convert({"type": "stored", "id": put.id, "seq": self.model.head, "outcome": outcome}, Stored)

    def _download(self, request: Download) -> ServerFrame:
        data = self.files.get(request.path)
        if data is None or request.digest not in (None, digest_of(data)):
            return Refused(request.id, "REMOTE_NOT_FOUND", "there is no such content")
        piece = data[request.offset : request.offset + request.limit]
        return Downloaded(request.id, self.model.head, len(data), digest_of(data), piece)


def _refusal(code: str) -> dict[str, object]:
    return {"ok": False, "error": {"code": code, "message": "refused by a check"}}


def _json(connection: ServerConnection, status: HTTPStatus, body: dict[str, object]) -> Response:
    response = connection.respond(status, json.dumps(body))
    del response.headers["Content-Type"]
    response.headers["Content-Type"] = "application/json"
    return response
