"""Worker process of a project, seen from the server: start, messages and end.

The process inherits the descriptor of the project's writer lock and holds the lock for its lifetime, so even a killed
server leaves no second writer behind (I1).
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import cast

import msgspec

from lattice_remote.server.datadir import ProjectPaths
from lattice_remote.server.ipc import FrameBuffer, ToServer, ToWorker, encode_frames, start_child
from lattice_remote.server.locks import LockedElsewhere, lock

__all__ = ["WORKER_COMMAND", "WorkerProcess"]

WORKER_COMMAND: Sequence[str] = (sys.executable, "-P", "-X", "utf8", "-m", "lattice_remote.server.worker.main")
"""Command line of the worker, independent of the current directory and the locale."""

_LOCK_TIMEOUT_S = 40.0
"""Time to wait for the worker of a killed server to end: a command's time limit plus a margin."""

_LOCK_RETRY_S = 0.05

_decoder: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)


class WorkerProcess(asyncio.Protocol):
    """One worker process, created by ``start()``. Calls ``on_end`` exactly once, after the last ``on_message``."""

    def __init__(self, on_message: Callable[[ToServer], None], on_end: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_end = on_end
        self._received = FrameBuffer()
        self._transport: asyncio.Transport | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    async def start(
        cls,
        slug: str,
        paths: ProjectPaths,
        *,
        on_message: Callable[[ToServer], None],
        on_end: Callable[[], None],
        command: Sequence[str] = WORKER_COMMAND,
    ) -> "WorkerProcess":
        """Start the process; it sends ``Ready`` once it has opened the project.

        Raises LockedElsewhere if the worker of an earlier server is still running after 40 s, or OSError.
        """
        worker = cls(on_message, on_end)
        writer_lock = await _writer_lock(paths)
        try:
            worker._process, connection = start_child(command, paths.root, slug, inherited=[writer_lock])
        finally:
            os.close(writer_lock)
        try:
            connection.setblocking(False)
            await asyncio.get_running_loop().create_unix_connection(lambda: worker, sock=connection)
        except BaseException:
            connection.close()
            raise
        return worker

    @property
    def pid(self) -> int:
        assert self._process is not None, "start() sets it before anybody gets the writer"
        return self._process.pid

    def send(self, *messages: ToWorker) -> None:
        """Send messages in order, in one write. They are lost once the process has ended, which ``on_end`` reports."""
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(encode_frames(*messages))

    def kill(self) -> None:
        """Kill the process; ``on_end`` follows. The next start undoes the running command."""
        assert self._process is not None, "start() sets it before anybody gets the writer"
        self._process.kill()

    async def wait(self, timeout_s: float) -> bool:
        """Wait until the process has ended and ``on_end`` was called; return False on timeout. Reaps the process."""
        assert self._process is not None, "start() sets it before anybody gets the writer"
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._process.poll() is None or self._transport is not None:
            if asyncio.get_running_loop().time() >= deadline:
                return False
            await asyncio.sleep(0.005)
        return True

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclass of it

    def data_received(self, data: bytes) -> None:
        for frame in self._received.receive(data):
            self._on_message(_decoder.decode(frame))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        # The process has ended, or closed its socket and is useless: make sure that it ends.
        self._transport = None
        self.kill()
        self._on_end()


async def _writer_lock(paths: ProjectPaths) -> int:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _LOCK_TIMEOUT_S
    while True:
        try:
            return lock(paths.writer_lock)
        except LockedElsewhere:
            if loop.time() >= deadline:
                raise
            await asyncio.sleep(_LOCK_RETRY_S)
