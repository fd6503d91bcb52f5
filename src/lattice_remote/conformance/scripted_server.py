"""WebSocket server that plays a project to a client under test, and misbehaves when a check wants it."""

import asyncio
import contextlib
import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Literal

import msgspec
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from lattice_remote.conformance.in_memory_server import (
    Files,
    InMemoryConnection,
    InMemoryServer,
    Moment,
    append_to,
    delta,
)
from lattice_remote.errors import ProtocolError
from lattice_remote.protocol.messages import (
    SUBPROTOCOL,
    Applied,
    Bye,
    ClientFrame,
    Download,
    Downloaded,
    Entries,
    Fetch,
    Hello,
    Log,
    LogPage,
    Manifest,
    Put,
    Refused,
    Reply,
    Run,
    ServerFrame,
    Stored,
    decode_client_frame,
    encode,
)
from lattice_remote.protocol.operations import Operation, digest_of

__all__ = ["EXIT_CODE", "LINE", "LOG", "STDOUT", "TOKEN", "Link", "ScriptedServer"]

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
