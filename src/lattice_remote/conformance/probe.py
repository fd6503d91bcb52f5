"""One connection to the server under test: any bytes out, checked frames in."""

import asyncio
import contextlib
import http.client
import json
import secrets
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.frames import Frame, Opcode
from websockets.http11 import Response as HttpResponse
from websockets.typing import Subprotocol

from lattice_remote.conformance import CheckFailed, NotOffered, expect, within
from lattice_remote.errors import ProtocolError
from lattice_remote.protocol.messages import (
    CAPABILITIES,
    SUBPROTOCOL,
    Bye,
    Change,
    ClientFrame,
    Hello,
    Request,
    Response,
    ServerFrame,
    Welcome,
    decode_server_frame,
    encode,
)

__all__ = ["Probe", "Refusal", "ServerTarget", "new_id"]

FRAME_TIMEOUT_S = 15.0
"""For a frame that must come."""


def new_id() -> str:
    return secrets.token_hex(16)


class _Connection(ClientConnection):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pinged = asyncio.Event()

    def process_event(self, event: HttpResponse | Frame) -> None:  # type: ignore[override]
        if isinstance(event, Frame) and event.opcode is Opcode.PING:
            self.pinged.set()
        super().process_event(event)


class ServerTarget:
    def __init__(self, url: str, token: str) -> None:
        self.url, self.token = url.rstrip("/"), token
        self.project = urlsplit(self.url).path.rsplit("/", 1)[-1]
        self.actor = ""
        """Of the token."""
        self.act_as: list[str] = []
        self.capabilities: list[str] = []
        self.task = ""
        """Made by the checks."""
        self.welcome: Welcome | None = None

    def require(self, capability: str) -> None:
        """Raise ``NotOffered`` if the server does not name a capability."""
        if capability not in self.capabilities:
            raise NotOffered(f"the server does not name {capability!r}")

    def get(self, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        address = urlsplit(self.url)
        make = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        connection = make(address.hostname or "", address.port, timeout=FRAME_TIMEOUT_S)
        try:
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        finally:
            connection.close()

    @contextlib.asynccontextmanager
    async def open(self, **options: Any) -> AsyncIterator["Probe"]:
        """Open a WebSocket; the client has yet to greet. Raises CheckFailed: refused."""
        headers = {"Authorization": f"Bearer {options.pop('token', self.token)}"}
        slug = options.pop("slug", self.project)
        address = f"ws{self.url.removeprefix('http').rsplit('/', 1)[0]}/{slug}/ws"
        settings: dict[str, Any] = {
            "subprotocols": [Subprotocol(SUBPROTOCOL)],
            "compression": None,
            "max_size": None,
            "max_queue": None,
            "ping_interval": None,
            "proxy": None,
            "create_connection": _Connection,
            "open_timeout": FRAME_TIMEOUT_S,
            "close_timeout": 2,
            **options,
        }
        try:
            socket = await connect(address, additional_headers=headers, **settings)
        except InvalidStatus as refused:
            raise Refusal(refused.response.status_code, bytes(refused.response.body or b"")) from None
        except (WebSocketException, OSError, ssl.SSLError) as error:
            raise CheckFailed(f"cannot connect: {error}") from None
        try:
            yield Probe(socket)
        finally:
            with contextlib.suppress(AttributeError):  # websockets aborts a transport that is already lost
                await socket.close()

    @contextlib.asynccontextmanager
    async def greeted(self, **fields: Any) -> AsyncIterator["Probe"]:
        async with self.open() as probe:
            await probe.greet(**fields)
            yield probe


class Refusal(CheckFailed):
    def __init__(self, status: int, body: bytes) -> None:
        self.status, self.body = status, body
        super().__init__(f"the upgrade was refused: {status} {body[:200]!r}")

    @property
    def code(self) -> str:
        """The code in its body. Raises CheckFailed: the body is not of section 2.2."""
        try:
            refusal = json.loads(self.body)
            expect(refusal["ok"] is False and isinstance(refusal["error"]["message"], str), f"body {self.body[:200]!r}")
            return str(refusal["error"]["code"])
        except (ValueError, KeyError, TypeError):
            raise CheckFailed(f"{self.status} with a body that is not of 2.2: {self.body[:200]!r}") from None


class Probe:
    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.welcome: Welcome
        """Once greeted."""
        self.changes: list[Change] = []
        """Received so far."""
        self.raw_changes: dict[int, bytes] = {}
        """Their bytes, by number."""

    async def send(self, *frames: ClientFrame | bytes | str) -> None:
        """Send frames, or messages as they are; a closed connection is noticed when reading."""
        with contextlib.suppress(ConnectionClosed):
            for frame in frames:
                await self.socket.send(frame if isinstance(frame, bytes | str) else encode(frame))

    async def greet(self, **fields: Any) -> Welcome:
        defaults = {"client_version": "conformance/1", "lattice_version": "", "capabilities": list(CAPABILITIES)}
        await self.send(Hello(versions=[1], **{**defaults, **fields}))
        frame = await self.receive()
        expect(isinstance(frame, Welcome), f"the first frame is {_shown(frame)}, not Welcome")
        assert isinstance(frame, Welcome)
        self.welcome = frame
        return frame

    async def receive(self) -> ServerFrame:
        """Return the next frame. Raises CheckFailed: it is malformed, or none comes."""
        try:
            async with within(FRAME_TIMEOUT_S, "frame"):
                message = await self.socket.recv()
        except ConnectionClosed as closed:
            raise CheckFailed(f"the server closed the connection: {closed}") from None
        expect(isinstance(message, bytes), "a text message")
        assert isinstance(message, bytes)
        try:
            frame = decode_server_frame(message)
        except ProtocolError as error:
            raise CheckFailed(f"the server sent a frame that a client must refuse: {error.message}") from None
        if isinstance(frame, Change):
            self.changes.append(frame)
            self.raw_changes[frame.seq] = message
        return frame

    async def until[F](self, kind: type[F], fits: Callable[[F], bool] = lambda _: True) -> F:
        async with within(2 * FRAME_TIMEOUT_S, _kind_name(kind)):
            while True:
                frame = await self.receive()
                if isinstance(frame, Bye):
                    raise CheckFailed(f"the server ended the connection: {frame.code} {frame.reason}")
                if isinstance(frame, kind) and fits(frame):
                    return frame

    async def ask(self, request: Request) -> Response:
        await self.send(request)
        return await self.until(Response, lambda answer: answer.id == request.id)  # type: ignore[arg-type]

    async def farewell(self) -> tuple[Bye | None, int]:
        """Read to the end; return the Bye, which must be the last frame, and the close code or 0."""
        bye: Bye | None = None
        try:
            async with within(FRAME_TIMEOUT_S, "end of the connection"):
                while True:
                    message = await self.socket.recv()
                    expect(bye is None, "a frame comes after Bye")
                    frame = decode_server_frame(message if isinstance(message, bytes) else b"")
                    bye = frame if isinstance(frame, Bye) else None
        except ConnectionClosed as closed:
            return bye, closed.rcvd.code if closed.rcvd else 0
        except ProtocolError as error:
            raise CheckFailed(f"the server sent a frame that a client must refuse: {error.message}") from None

    async def pinged(self) -> None:
        assert isinstance(self.socket, _Connection), "open() makes it"
        self.socket.pinged.clear()
        async with within(20, "ping of the server"):
            await self.socket.pinged.wait()

    async def ends(self, code: str, close_code: int) -> Bye:
        bye, closed = await self.farewell()
        found = f"{bye.code if bye else 'no Bye'}, close code {closed}"
        expect(bye is not None and bye.code == code and closed == close_code, f"{found}; not {code}, {close_code}")
        assert bye is not None
        return bye


def _kind_name(kind: Any) -> str:
    return getattr(kind, "__name__", "answer")


def _shown(frame: ServerFrame) -> str:
    return f"Bye {frame.code} {frame.reason}" if isinstance(frame, Bye) else type(frame).__name__
