"""Worker process of a project, seen from the server: start, messages and end.

The process inherits the descriptor of the project's writer lock and holds the lock for its lifetime, so even a killed
server leaves no second writer behind (I1). The server holds it too, so it is kept while no worker runs.
"""

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import cast

import msgspec

from lattice_remote.server.datadir import LockedElsewhere, ProjectPaths, lock
from lattice_remote.server.ipc import FrameBuffer, ToServer, ToWorker, encode_frames
from lattice_remote.server.project.child_process import PYTHON, ChildProcess, StartChild, spawn_child

__all__ = ["WORKER_COMMAND", "WorkerProcess", "WriterLock"]

WORKER_COMMAND: Sequence[str] = (*PYTHON, "lattice_remote.server.worker.main")

_LOCK_TIMEOUT_S = 40.0
"""Time to wait for the worker of a killed server to end: a command's time limit plus a margin."""

_LOCK_RETRY_S = 0.05

_decoder: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)


class WriterLock:
    def __init__(self, paths: ProjectPaths) -> None:
        self._path = paths.writer_lock
        self._descriptor: int | None = None

    async def acquire(self) -> int:
        """Return the descriptor that holds the lock. Raises LockedElsewhere after 40 s, or OSError."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _LOCK_TIMEOUT_S
        while self._descriptor is None:
            try:
                self._descriptor = lock(self._path)
            except LockedElsewhere:
                if loop.time() >= deadline:
                    raise
                await asyncio.sleep(_LOCK_RETRY_S)
        return self._descriptor

    def release(self) -> None:
        """Leave the lock to a worker that still runs. Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class WorkerProcess(asyncio.Protocol):
    """One worker process, created by ``start()``. Calls ``on_end`` exactly once, after the last ``on_message``."""

    def __init__(self, on_message: Callable[[ToServer], None], on_end: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_end = on_end
        self._received = FrameBuffer()
        self._transport: asyncio.Transport | None = None
        self._process: ChildProcess | None = None

    @classmethod
    async def start(
        cls,
        slug: str,
        paths: ProjectPaths,
        writer_lock: WriterLock,
        *,
        on_message: Callable[[ToServer], None],
        on_end: Callable[[], None],
        command: Sequence[str] = WORKER_COMMAND,
        start_child: StartChild = spawn_child,
    ) -> "WorkerProcess":
        """Start the process; it sends ``Ready`` once it has opened the project.

        Raises LockedElsewhere after 40 s, or OSError.
        """
        worker = cls(on_message, on_end)
        held = await writer_lock.acquire()
        worker._process, connection = await start_child(command, paths.root, slug, inherited=[held])
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
        """Send messages in order, in one write; an ended process gets none."""
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(encode_frames(*messages))

    def kill(self) -> None:
        """Kill the process; the next start undoes the running command."""
        assert self._process is not None, "start() sets it before anybody gets the writer"
        self._process.kill()

    async def wait(self, timeout_s: float) -> bool:
        """Wait until the process has ended and ``on_end`` was called; return False on timeout."""
        assert self._process is not None, "start() sets it before anybody gets the writer"
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not self._process.has_ended() or self._transport is not None:
            if asyncio.get_running_loop().time() >= deadline:
                return False
            await asyncio.sleep(0.005)
        return True

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
