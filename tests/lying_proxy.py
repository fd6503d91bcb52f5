"""A WebSocket proxy that alters the frames of a real server: a server with a planted fault."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.http11 import Request, Response

__all__ = ["Lies", "lying"]

Frame = dict[str, Any]
Message = bytes | str


def _same(frame: Frame) -> list[Frame]:
    return [frame]


class Lies:
    """What the proxy alters: each function gets a frame and returns those that are sent instead."""

    def __init__(
        self,
        *,
        to_client: Callable[[Frame], list[Frame]] = _same,
        to_server: Callable[[Frame], list[Frame]] = _same,
        garbage: bool = True,
        code: Callable[[int], int] = lambda code: code,
        status: Callable[[int], int] = lambda status: status,
    ) -> None:
        self.to_client, self.to_server = to_client, to_server
        self.passes_garbage = garbage
        """Whether messages to the server that are no frames are passed on."""
        self.code, self.status = code, status


@contextlib.asynccontextmanager
async def lying(port: int, lies: Lies) -> AsyncIterator[int]:
    """Yield the port of a proxy to ``port``, until the block ends."""
    upstream: dict[ServerConnection, ClientConnection] = {}

    async def admit(connection: ServerConnection, request: Request) -> Response | None:
        headers = {name: request.headers[name] for name in ("Authorization",) if name in request.headers}
        protocols = [each for each in [request.headers.get("Sec-WebSocket-Protocol")] if each]
        url = f"ws://127.0.0.1:{port}{request.path}"
        options = {"compression": None, "max_size": None, "max_queue": None, "ping_interval": None, "proxy": None}
        try:
            upstream[connection] = await connect(
                url, additional_headers=headers, subprotocols=protocols or None, **options
            )
        except InvalidStatus as refused:
            response = connection.respond(refused.response.status_code, (refused.response.body or b"").decode())
            response.status_code = lies.status(response.status_code)
            return response
        return None

    async def answer(connection: ServerConnection) -> None:
        server = upstream.pop(connection)
        tasks = [
            asyncio.create_task(_pass(connection, server, lies.to_server, lies.passes_garbage, lambda code: code)),
            asyncio.create_task(_pass(server, connection, lies.to_client, True, lies.code)),
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.close()

    options: dict[str, Any] = {"compression": None, "max_size": None, "ping_interval": None, "close_timeout": 2}
    async with serve(
        answer, "127.0.0.1", 0, process_request=admit, subprotocols=["lattice.v1"], select_subprotocol=_any, **options
    ) as proxy:
        yield next(iter(proxy.sockets)).getsockname()[1]


def _any(_connection: ServerConnection, offered: Any) -> Any:
    return offered[0] if offered else None


async def _pass(
    source: Any, target: Any, alter: Callable[[Frame], list[Frame]], garbage: bool, code: Callable[[int], int]
) -> None:
    """Pass messages on until one side closes, then close the other with the same code."""
    try:
        async for message in source:
            for each in _altered(message, alter, garbage):
                await target.send(each)
    except ConnectionClosed:
        pass
    given = source.close_code if source.close_code not in (None, 1005, 1006) else 1000
    await target.close(code(given))


def _altered(message: Message, alter: Callable[[Frame], list[Frame]], garbage: bool) -> list[Message]:
    try:
        frame = msgspec.msgpack.decode(message if isinstance(message, bytes) else b"")
    except (msgspec.DecodeError, UnicodeDecodeError):
        return [message] if garbage else []
    if not isinstance(frame, dict):
        return [message] if garbage else []
    frames = alter(dict(frame))
    return [message] if frames == [frame] else [msgspec.msgpack.encode(each) for each in frames]
