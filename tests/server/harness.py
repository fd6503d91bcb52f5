"""A server in the test's event loop, on a real port, and a client with an in-memory cache."""

import asyncio
import contextlib
import hashlib
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from lattice_remote.files import write_atomically
from lattice_remote.protocol.messages import (
    CAPABILITIES,
    MAX_PIECE_BYTES,
    SUBPROTOCOL,
    Bye,
    ClientFrame,
    Hello,
    Part,
    Parts,
    Push,
    Refused,
    Result,
    Run,
    ServerFrame,
    Upload,
    Uploaded,
    decode_server_frame,
    encode,
)
from lattice_remote.protocol.operations import MemoryTree, apply, digest_of
from lattice_remote.protocol.paths import is_replicated
from lattice_remote.protocol.replica import ApplyChange, Compare, DeliverReply, Remove, Replica, Send, WritePart
from lattice_remote.server.config import Config
from lattice_remote.server.datadir import DataDir
from lattice_remote.server.registry import ProjectRegistry
from lattice_remote.server.server import bind, make_server
from lattice_remote.server.tokens import TokenFile
from lattice_remote.server.transport.listener import Certificate

FAKE_WORKER = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))


async def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Wait for a condition, within a bound."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - any condition, not only ours
            await asyncio.sleep(0.005)


@dataclass
class Running:
    """A running server: its registry, address, data directory, and one token for the project ``web``."""

    registry: ProjectRegistry
    port: int
    data: DataDir
    token: str
    server: Any

    def url(self, slug: str = "web") -> str:
        return f"ws://127.0.0.1:{self.port}/projects/{slug}/ws"

    @property
    def tree(self) -> Path:
        return self.data.project("web").lattice

    @contextlib.asynccontextmanager
    async def connected(
        self, token: str | None = None, slug: str = "web", **options: Any
    ) -> AsyncIterator[ClientConnection]:
        headers = {"Authorization": f"Bearer {token or self.token}"}
        more_headers = options.pop("headers", {})
        options = {"compression": None, "max_size": None, "max_queue": None, "subprotocols": [SUBPROTOCOL], **options}
        scheme = "wss" if "ssl" in options else "ws"
        url = f"{scheme}://127.0.0.1:{self.port}/projects/{slug}/ws"
        async with connect(url, additional_headers={**headers, **more_headers}, **options) as socket:
            yield socket


def make_data(path: Path) -> tuple[DataDir, str]:
    """Make a data directory with a bare project ``web`` and a token for it."""
    data = DataDir(path)
    data.create()
    tree = data.project("web").lattice
    tree.mkdir(parents=True)
    (data.project("web").journal).mkdir()
    write_atomically(tree / "config.json", b"{}\n")
    _, text = TokenFile(data.tokens).create(projects=["web"], actor="human:ana", act_as=["agent:*"])
    return data, text


@contextlib.asynccontextmanager
async def serving(
    data: DataDir,
    token: str,
    *,
    worker: Sequence[str] = FAKE_WORKER,
    config: Config | None = None,
    certificate: Certificate | None = None,
) -> AsyncIterator[Running]:
    """Run a server on a free port until the block ends."""
    registry = ProjectRegistry(data, worker_command=worker, config=config)
    registry.start()
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = make_server(registry, certificate)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started or task.done())
    try:
        yield Running(registry, port, data, token, server)
    finally:
        server.should_exit = True
        await task


def parts_in(frame: ServerFrame) -> tuple[Part, ...]:
    """Return the parts of files in a frame, which may hold several small files."""
    return (frame,) if isinstance(frame, Part) else frame.parts if isinstance(frame, Parts) else ()


def hello(**fields: object) -> bytes:
    fields = {"capabilities": list(CAPABILITIES), **fields}
    fields = {"client_version": "t", "lattice_version": "t", **fields}
    return encode(Hello(versions=[1], **fields))  # type: ignore[arg-type]


async def farewell(client: object) -> tuple[Bye | None, int]:
    """Read to the end; return the goodbye and the close code."""
    bye = None
    try:
        async with asyncio.timeout(60):
            while True:
                frame = decode_server_frame(await client.recv())  # type: ignore[attr-defined]
                bye = frame if isinstance(frame, Bye) else bye
    except ConnectionClosed as closed:
        return bye, closed.rcvd.code if closed.rcvd else 1006


class Copy:
    """Client with a replica over a connection and files in memory. ``pump()`` takes one frame."""

    def __init__(self, *, follow: bool = True) -> None:
        self.replica = Replica(follow=follow)
        self.tree: dict[str, bytes] = {}
        self.answers: dict[str, Result | Refused] = {}
        self.frames: list[ServerFrame] = []
        self._parts: dict[str, bytes] = {}
        self._socket: ClientConnection | None = None

    async def greet(self, socket: ClientConnection, **fields: object) -> None:
        """Send Hello, with these fields instead of the replica's, and take the answer."""
        self._socket = socket
        hello = self.replica.hello(client_version="test", lattice_version="test")
        await self.send(msgspec.structs.replace(hello, **fields))
        await self.pump()

    async def send(self, frame: ClientFrame) -> None:
        assert self._socket is not None
        await self._socket.send(encode(frame))

    async def run(self, *argv: str) -> Result | Refused:
        id_ = secrets.token_hex(16)
        await self.send(Run(id_, list(argv)))
        return await self.answer(id_)

    async def answer(self, id_: str) -> Result | Refused:
        async with asyncio.timeout(60):
            while id_ not in self.answers:
                await self.pump()
        return self.answers[id_]

    async def sync(self) -> None:
        """Take frames until the cache is current."""
        async with asyncio.timeout(60):
            while not self.replica.is_current:
                await self.pump()

    async def pump(self) -> ServerFrame:
        assert self._socket is not None
        data = await self._socket.recv()
        assert isinstance(data, bytes)
        frame = decode_server_frame(data)
        self.frames.append(frame)
        assert not isinstance(frame, Bye), frame
        effects = list(self.replica.receive(frame))
        while effects:
            effects += await self._perform(effects.pop(0))
        return frame

    async def _perform(self, effect: object) -> list[Any]:
        match effect:
            case Send(frame):
                await self.send(frame)
            case ApplyChange(_, operations):
                drifted = [path for operation in operations for path in apply(operation, MemoryTree(self.tree))]
                return self.replica.drifted(drifted) if drifted else []
            case WritePart(part):
                data = part.data if part.offset == 0 else self._parts.pop(part.path) + part.data
                if len(data) < part.size:
                    self._parts[part.path] = data
                elif digest_of(data) == part.digest:
                    self.tree[part.path] = data
                else:
                    return self.replica.drifted([part.path])
            case Remove(paths):
                for path in paths:
                    self.tree.pop(path, None)
            case Compare(_, entries, repair):
                local = {path: (len(data), digest_of(data)) for path, data in self.tree.items()}
                if repair:
                    return self.replica.compared(local)
                assert local == entries
                return self.replica.verified()
            case DeliverReply(frame):
                self.answers[frame.id] = frame
        return []


def tree_of(directory: Path) -> dict[str, bytes]:
    """Return the shared files of a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and is_replicated(str(path.relative_to(directory)))
    }


async def upload(copy: Copy, pack: bytes) -> Push:
    """Upload a pack; return the request that makes it the project."""
    digest = hashlib.sha256(pack).digest()
    for offset in range(0, len(pack), MAX_PIECE_BYTES):
        piece = Upload(
            secrets.token_hex(16), digest, len(pack), offset, pack[offset : offset + MAX_PIECE_BYTES], "project"
        )
        await copy.send(piece)
        assert isinstance(await copy.answer(piece.id), Uploaded)
    return Push(secrets.token_hex(16), digest, len(pack))
