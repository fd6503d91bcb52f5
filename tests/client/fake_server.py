"""A server for the client's tests: one project as a dictionary, real WebSockets and scripted misbehaviour.

Its commands are ``put PATH TEXT``, ``append PATH TEXT``, ``delete PATH``, ``move PATH TO``, ``slow``, and
anything else, which changes nothing. Each answers with its own argv as stdout.
"""

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from lattice_remote.protocol.bundle import first_sign_of_use
from lattice_remote.protocol.messages import (
    CAPABILITIES,
    PROTOCOL_VERSION,
    SUBPROTOCOL,
    Call,
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
    LogEntry,
    LogPage,
    Manifest,
    Part,
    Put,
    Refused,
    Replay,
    Replayed,
    Reply,
    Returned,
    Run,
    ServerFrame,
    Stored,
    Upload,
    Uploaded,
    Welcome,
    decode_client_frame,
    encode,
)
from lattice_remote.protocol.operations import (
    TAIL_BYTES,
    AppendBytes,
    DeleteFile,
    MoveFile,
    Operation,
    PutFile,
    digest_of,
)

TOKEN = "ltr_ana"
PIECE = 64


def refusal_body(code: str, message: str) -> bytes:
    """Return the body of a refusal before the upgrade (SPEC section 2.2)."""
    return json.dumps({"ok": False, "error": {"code": code, "message": message}}).encode()


class FakeServer:
    """One project. ``files`` is its tree; ``frames`` holds every frame that clients have sent."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"config.json": b"{}\n", "tasks/task_1.json": b'{"id": 1}\n'}
        self.epoch = "epoch1"
        self.uploads: dict[bytes, bytes] = {}
        """What has come of contents, by digest."""
        self.capabilities = list(CAPABILITIES)
        self.lattice_version = "0"
        self.changes: list[Change] = []
        self.frames: list[ClientFrame] = []
        self.replies: dict[str, ServerFrame] = {}
        self.tokens = {TOKEN: "human:ana"}
        self.status: HTTPStatus | None = None
        self.error_body = b""
        self.connections: dict[ServerConnection, bool] = {}
        self.greetings = 0
        self.cut_before_reply = 0
        self.misbehave: Callable[[ServerConnection, ClientFrame], asyncio.Future[bool] | None] | None = None
        self.put_outcome: str | None = None
        self.slow = asyncio.Event()
        self.port = 0
        self.tls: ssl.SSLContext | None = None
        self.error_headers: dict[str, str] = {}
        self.limits = Limits(1 << 25, 1 << 25)
        self.head: int | None = None
        """What it says the number of its last change is, when it lies."""
        self.oldest = 1
        """The first change that it keeps."""
        self.replay = 100
        """Most changes in one ``Replayed``."""
        self.requests: list[Request] = []
        """Every request for an upgrade, whatever came of it."""
        self._server: Server | None = None

    # --- start and stop ---

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}" if self.tls else f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await serve(
            self._serve,
            "127.0.0.1",
            self.port,
            subprotocols=[SUBPROTOCOL],
            process_request=self._check,
            compression=None,
            max_size=None,
            ping_interval=None,
            ssl=self.tls,
        )
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def stop(self) -> None:
        self.slow.set()
        if self._server is not None:
            for connection in list(self.connections):
                connection.transport.abort()
            self._server.close()
            async with asyncio.timeout(30):
                await self._server.wait_closed()
            self._server = None

    def cut(self) -> None:
        for connection in list(self.connections):
            connection.transport.abort()

    def _check(self, connection: ServerConnection, request: Request) -> Response | None:
        self.requests.append(request)
        if self.status is not None:
            return self._turned_away(connection, self.status, self.error_body)
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.tokens:
            body = refusal_body("REMOTE_UNAUTHORIZED", "the server does not know this token")
            return self._turned_away(connection, HTTPStatus.UNAUTHORIZED, body)
        return None

    def _turned_away(self, connection: ServerConnection, status: HTTPStatus, body: bytes) -> Response:
        response = connection.respond(status, "")
        response.body = body
        del response.headers["Content-Length"]
        response.headers["Content-Length"] = str(len(body))
        response.headers.update(self.error_headers)
        return response

    # --- the project ---

    @property
    def seq(self) -> int:
        return len(self.changes)

    @property
    def mark(self) -> bytes:
        return self.changes[-1].mark if self.changes else b""

    def change(self, *operations: Operation, cause: str = "edit") -> Change:
        """Number and apply a change, and send it to all connections."""
        made = self.numbered(*operations, cause=cause)
        for operation in operations:
            self._carry_out(operation)
        self.broadcast(made)
        return made

    def numbered(self, *operations: Operation, cause: str = "edit") -> Change:
        seq = self.seq + 1
        change = Change(seq, bytes([seq % 256]) * 16, "2026-01-01T00:00:00.000Z", "x", "t", cause, "", list(operations))
        self.changes.append(change)
        return change

    def put(self, path: str, data: bytes) -> Change:
        return self.change(PutFile(path, data))

    def append(self, path: str, data: bytes, cause: str = "edit") -> Change:
        before = self.files.get(path, b"")
        return self.change(AppendBytes(path, len(before), digest_of(before[-TAIL_BYTES:]), data), cause=cause)

    def broadcast(self, frame: ServerFrame) -> None:
        for connection, follows in self.connections.items():
            if follows:
                asyncio.get_running_loop().create_task(_send(connection, frame))

    def _carry_out(self, operation: Operation) -> None:
        match operation:
            case PutFile():
                self.files[operation.path] = operation.data
            case AppendBytes():
                self.files[operation.path] = self.files.get(operation.path, b"") + operation.data
            case DeleteFile():
                self.files.pop(operation.path, None)
            case MoveFile():
                self.files[operation.to] = self.files.pop(operation.path)

    # --- one connection ---

    async def _serve(self, connection: ServerConnection) -> None:
        token = connection.request.headers["Authorization"].removeprefix("Bearer ")
        try:
            async for message in connection:
                assert isinstance(message, bytes)
                frame = decode_client_frame(message)
                self.frames.append(frame)
                if self.misbehave is not None and await self.misbehave(connection, frame):
                    continue
                await self._answer(connection, frame, self.tokens[token])
        except ConnectionClosed:
            pass
        finally:
            self.connections.pop(connection, None)

    async def _answer(self, connection: ServerConnection, frame: ClientFrame, actor: str) -> None:
        match frame:
            case Hello():
                await self._greet(connection, frame, actor)
            case Manifest():
                await self._list(connection)
            case Replay():
                await _send(connection, self._replayed(frame))
            case Fetch(paths=paths):
                for path in paths:
                    await self._part(connection, path)
            case Upload():
                await _send(connection, self._upload(frame))
            case Download():
                await _send(connection, self._download(frame))
            case Log():
                first = len(self.changes) if frame.before is None else frame.before
                told = [_entry(change, self.epoch) for change in reversed(self.changes[:first])][: frame.limit]
                await _send(connection, LogPage(frame.id, told, first - len(told) or None))
            case Run() | Put() | Call():
                if frame.id not in self.replies:
                    self.replies[frame.id] = await self._answered(frame)
                    await asyncio.sleep(0)  # the change is sent first
                if self.cut_before_reply:
                    self.cut_before_reply -= 1
                    connection.transport.abort()
                else:
                    await _send(connection, self.replies[frame.id])

    def _upload(self, frame: Upload) -> ServerFrame:
        have = self.uploads.setdefault(frame.digest, b"")
        if frame.offset == len(have):
            have = self.uploads[frame.digest] = have + frame.data
        return Uploaded(frame.id, len(have))

    def _download(self, frame: Download) -> ServerFrame:
        data = self.files.get(frame.path)
        if data is None or frame.digest not in (None, digest_of(data)):
            return Refused(frame.id, "REMOTE_NOT_FOUND", "it is not there")
        piece = data[frame.offset : frame.offset + frame.limit]
        return Downloaded(frame.id, self.seq, len(data), digest_of(data), piece)

    async def _greet(self, connection: ServerConnection, hello: Hello, actor: str) -> None:
        self.greetings += 1
        marks = [b"", *(change.mark for change in self.changes)]
        resync = hello.epoch != self.epoch or hello.seq > self.seq or marks[hello.seq] != hello.mark
        await _send(
            connection,
            Welcome(
                version=PROTOCOL_VERSION,
                server_version="0",
                lattice_version=self.lattice_version,
                project="web",
                actor=actor,
                epoch=self.epoch,
                head=self.seq if self.head is None else self.head,
                oldest=self.oldest,
                resync=resync,
                limits=self.limits,
                capabilities=self.capabilities,
                used=first_sign_of_use((path, len(data)) for path, data in self.files.items()) or "",
            ),
        )
        sent = hello.seq
        while hello.follow and not resync and sent < self.seq:  # also changes that are numbered during the replay
            await _send(connection, self.changes[sent])
            sent += 1
        self.connections[connection] = hello.follow

    def _replayed(self, asked: Replay) -> Replayed:
        seq = self.seq if asked.seq is None else asked.seq
        marks = [b"", *(change.mark for change in self.changes)]
        outcome = "epoch" if asked.epoch not in ("", self.epoch) else "kept"
        outcome = "ahead" if seq > self.seq and outcome == "kept" else outcome
        outcome = "epoch" if outcome == "kept" and asked.mark not in (b"", marks[seq]) else outcome
        outcome = "expired" if outcome == "kept" and seq + 1 < self.oldest else outcome
        mark, changes = (marks[seq], self.changes[seq : seq + self.replay]) if outcome == "kept" else (b"", [])
        where = (self.epoch, self.seq, self.oldest)
        return Replayed(asked.id, outcome, *where, seq, mark, changes)  # type: ignore[arg-type]

    async def _list(self, connection: ServerConnection) -> None:
        entries = [Entry(path, len(data), digest_of(data)) for path, data in self.files.items()]
        for start in range(0, len(entries), 3):
            piece = entries[start : start + 3]
            await _send(connection, Entries(self.seq, self.mark, piece, last=start + 3 >= len(entries)))
        if not entries:
            await _send(connection, Entries(self.seq, self.mark, [], last=True))

    async def _part(self, connection: ServerConnection, path: str) -> None:
        data = self.files.get(path)
        if data is None:
            await _send(connection, Part(path, self.seq, gone=True))
            return
        for offset in range(0, max(1, len(data)), PIECE):
            piece = data[offset : offset + PIECE]
            await _send(connection, Part(path, self.seq, len(data), digest_of(data), offset, piece))

    async def _answered(self, request: Run | Put | Call) -> ServerFrame:
        match request:
            case Run():
                return await self._run(request)
            case Put():
                return await self._put(request)
            case Call():
                return self._call(request)

    async def _run(self, run: Run) -> ServerFrame:
        match run.argv:
            case ["put", path, text]:
                self.change(PutFile(path, text.encode()), cause=run.id)
            case ["append", path, text]:
                self.append(path, text.encode(), cause=run.id)
            case ["delete", path]:
                self.change(DeleteFile(path), cause=run.id)
            case ["move", path, to]:
                self.change(MoveFile(path, to, digest_of(self.files[path])), cause=run.id)
            case ["slow"]:
                await self.slow.wait()
            case ["refuse"]:
                return Refused(run.id, "REMOTE_FORBIDDEN", "token may act as human:ana; not as human:bob")
        return Reply(run.id, self.seq, 7 if run.argv[0] == "fail" else 0, " ".join(run.argv).encode(), b"")

    def _call(self, call: Call) -> ServerFrame:
        """Store the payload under the path in its name."""
        if call.name.startswith("fail"):
            return Returned(call.id, self.seq, 404, call.payload)
        self.change(PutFile(call.name, call.payload), cause=call.id)
        return Returned(call.id, self.seq, 200, call.payload)

    async def _put(self, put: Put) -> ServerFrame:
        outcome = self.put_outcome or ("stored" if self.files.get(put.path) == put.base else "conflict")
        if outcome == "stored":
            self.change(PutFile(put.path, put.text), cause=put.id)
        elif outcome == "merged":
            self.change(PutFile(put.path, put.text + b"theirs\n"), cause=put.id)
        return Stored(put.id, self.seq, outcome)  # type: ignore[arg-type]


def _entry(change: Change, epoch: str) -> LogEntry:
    return LogEntry(change.seq, epoch, change.time, change.actor, change.token_id, "", change.cause, change.command, [])


async def _send(connection: ServerConnection, frame: ServerFrame) -> None:
    with contextlib.suppress(ConnectionClosed):
        await connection.send(encode(frame))


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[FakeServer]:
    server = FakeServer()
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
