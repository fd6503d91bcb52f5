"""A real WebSocket client without files, for load, races and backups.

A command costs it one frame each way instead of a process, so that one machine can play a whole team.
"""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from websockets.asyncio.client import ClientConnection, connect

from lattice_remote.protocol.messages import (
    CAPABILITIES,
    SUBPROTOCOL,
    Attachment,
    Change,
    Hello,
    Log,
    LogPage,
    Put,
    Refused,
    Reply,
    Run,
    Stored,
    Welcome,
    decode_server_frame,
    encode,
)

__all__ = ["Answer", "Light", "several"]

Answer = Reply | Stored | Refused | LogPage


class Light:
    """One connection; an async context manager. Several tasks may send requests at once."""

    def __init__(self, url: str, token: str, *, slug: str = "board", follow: bool = False) -> None:
        self._url = f"{url.replace('http', 'ws', 1)}/projects/{slug}/ws"
        self._token = token
        self._follow = follow
        self._answers: dict[str, asyncio.Future[Answer]] = {}
        self._reading: asyncio.Task[None]
        self._stalled = False
        self.welcome: Welcome
        """What the server said of itself."""
        self.seq = 0
        """The last change that has come."""
        self.socket: ClientConnection

    async def __aenter__(self) -> Self:
        self.socket = await connect(
            self._url,
            subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
            additional_headers={"Authorization": f"Bearer {self._token}"},
            compression=None,
            max_size=None,
            max_queue=4,
            open_timeout=60,
            ping_interval=None,
            close_timeout=1,
        )
        hello = Hello(
            versions=[1],
            client_version="light",
            lattice_version="",
            capabilities=list(CAPABILITIES),
            follow=self._follow,
        )
        await self.socket.send(encode(hello))
        frame = decode_server_frame(bytes(await self.socket.recv(decode=False)))
        assert isinstance(frame, Welcome), frame
        self.welcome, self.seq = frame, frame.head
        self._reading = asyncio.get_running_loop().create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await self._reading
        self.socket.transport.abort()

    async def run(self, *argv: str, files: list[Attachment] | None = None) -> Answer:
        """Run a command line and return its answer; an exception when the connection is lost first."""
        id_ = secrets.token_hex(16)
        return await self._ask(id_, Run(id_, list(argv), files or []))

    async def put(self, path: str, base: bytes | None, text: bytes) -> Answer:
        """Store an edited plan or notes."""
        id_ = secrets.token_hex(16)
        return await self._ask(id_, Put(id_, path, base, text))

    async def reached(self) -> None:
        """Wait until the server, not necessarily the worker, has read all that was sent."""
        id_ = secrets.token_hex(16)
        await self._ask(id_, Log(id_, limit=1))

    async def ok(self, *argv: str) -> str:
        """Run a command line, which must succeed, and return its output."""
        answer = await self.run(*argv)
        assert isinstance(answer, Reply), answer
        assert answer.exit_code == 0, answer
        return answer.stdout.decode()

    async def _ask(self, id_: str, frame: Run | Put | Log) -> Answer:
        future = self._answers[id_] = asyncio.get_running_loop().create_future()
        try:
            await self.socket.send(encode(frame))
            return await future
        finally:
            del self._answers[id_]

    async def _read(self) -> None:
        """Read frames; at the end of the connection, fail the waiting requests."""
        try:
            while True:
                frame = decode_server_frame(bytes(await self.socket.recv(decode=False)))
                if isinstance(frame, Change):
                    assert frame.seq == self.seq + 1, "numbers have no gap (I1)"
                    self.seq = frame.seq
                elif isinstance(frame, Answer) and frame.id in self._answers:
                    self._answers[frame.id].set_result(frame)
        except Exception as error:  # noqa: BLE001 - the connection's end, whatever it is
            for future in self._answers.values():
                if not future.done():
                    future.set_exception(error)


@contextlib.asynccontextmanager
async def several(count: int, url: str, token: str, *, follow: bool = False) -> AsyncIterator[list[Light]]:
    """Open ``count`` connections at once."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(Light(url, token, follow=follow)) for _ in range(count)]
