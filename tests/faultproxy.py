"""A TCP proxy that cuts, delays, stalls, swallows and refuses traffic between clients and a server."""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

__all__ = ["FaultProxy"]

_CHUNK = 16 * 1024


class FaultProxy:
    """Proxy on a loopback port of its own to ``port``, in a thread, until ``close()``."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.port = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._flowing: asyncio.Event
        self._refusing = False
        self._delay_s = 0.0
        self._cut_after: int | None = None
        self._stall_after: int | None = None
        self.to_server = 0
        """Bytes that were passed on to the server, ever."""
        self.to_clients = 0
        self._swallowed: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._ended: asyncio.Event
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve(started)))
        self._thread.start()
        if not started.wait(10):
            raise TimeoutError("the proxy did not start")

    @property
    def url(self) -> str:
        """Address for clients."""
        return f"http://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Reset every connection, also in the middle of a frame."""
        self._call(self._reset)

    def stall(self) -> None:
        """Keep connections open and forward nothing: a peer that silently went away."""
        self._call(self._flowing.clear)

    def delay(self, seconds: float) -> None:
        """Delay each piece by ``seconds``."""
        self._delay_s = seconds

    def cut_after(self, count: int) -> None:
        """Let ``count`` more bytes through and then reset every connection: somewhere inside a frame."""
        self._cut_after = count

    def stall_after(self, count: int) -> None:
        """Let ``count`` more bytes through to clients and then stall."""
        self._stall_after = self.to_clients + count

    @property
    def is_stalled(self) -> bool:
        return not self._flowing.is_set()

    def swallow(self) -> None:
        """Keep the present connections open, and drop all that is sent on them."""
        self._call(lambda: self._swallowed.update(self._writers))

    def swallow_answers(self) -> None:
        """Drop the answers on the present connections; requests arrive."""
        self._call(lambda: self._swallowed.update(each for each in self._writers if not self._is_to_server(each)))

    def flow(self) -> None:
        """Forward and accept again; dropped data stays lost."""
        self._refusing = False
        self._delay_s, self._cut_after, self._stall_after = 0.0, None, None
        self._call(self._flowing.set)

    def refuse(self) -> None:
        """Reset open and new connections."""
        self._refusing = True
        self.cut()

    def close(self) -> None:
        """End the proxy and its thread."""
        self._call(self._ended.set)
        self._thread.join(timeout=10)
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, function: Callable[[], object]) -> None:
        done = threading.Event()

        def run() -> None:
            function()
            done.set()

        self._loop.call_soon_threadsafe(run)
        done.wait(10)

    def _is_to_server(self, writer: asyncio.StreamWriter) -> bool:
        return bool(writer.get_extra_info("peername")[1] == self.target)

    def _reset(self) -> None:
        for writer in list(self._writers):
            if writer.is_closing():
                continue
            sock: socket.socket = writer.get_extra_info("socket")
            # With a linger of 0 seconds, closing sends RST and drops unsent data.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    def _reset_soon(self) -> None:
        """Reset once the written data has left."""
        self._loop.call_later(0.01, self._reset)

    async def _serve(self, started: threading.Event) -> None:
        self._flowing, self._ended = asyncio.Event(), asyncio.Event()
        self._flowing.set()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self._ended.wait()
        server.close()
        self._flowing.set()
        self._reset()
        pending = asyncio.all_tasks() - {asyncio.current_task()}
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if self._refusing:
                writer.transport.abort()
                return
            upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self.target)
            self._writers.add(upstream)
            try:
                await asyncio.gather(self._pump(reader, upstream), self._pump(upstream_reader, writer))
            finally:
                self._writers.discard(upstream)
                upstream.transport.abort()
        except (OSError, asyncio.CancelledError):  # cancelled only by close()
            writer.transport.abort()
        finally:
            self._writers.discard(writer)
            self._swallowed.discard(writer)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK):
            await self._flowing.wait()
            if self._delay_s:
                await asyncio.sleep(self._delay_s)
            if writer in self._swallowed:
                continue
            if self._cut_after is not None and self._cut_after < len(data):
                writer.write(data[: self._cut_after])
                self._cut_after = None
                self._reset_soon()
                return
            if self._cut_after is not None:
                self._cut_after -= len(data)
            writer.write(data)
            if self._is_to_server(writer):
                self.to_server += len(data)
            else:
                self.to_clients += len(data)
                if self._stall_after is not None and self.to_clients >= self._stall_after:
                    self._flowing.clear()
            await writer.drain()
        writer.transport.abort()
