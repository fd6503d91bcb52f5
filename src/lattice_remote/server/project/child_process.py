"""Start of a project's worker or reader: forked from the server's template process, or from a command line.

The template has lattice loaded once for all projects (``worker/template.py``). While it cannot be used, children are
started from their command lines.
"""

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from lattice_remote.server.ipc import GO, MAX_FORK_REQUEST_BYTES

__all__ = ["PYTHON", "ChildProcess", "StartChild", "Template", "spawn_child"]

PYTHON: Sequence[str] = (sys.executable, "-P", "-X", "utf8", "-m")
"""Start of a command line that runs a module, independent of the current directory and the locale."""

_COMMAND = (*PYTHON, "lattice_remote.server.worker.template")
_ROOM_CHARACTERS = 400
"""Room for the command lines of children, which ``ps`` shows."""
_RESTART_S = 5.0
"""Shortest time between two starts of a template."""
_REPLY_S = 30.0
_MAX_WAITING = 32
"""Requests that the template has at once: what a socket's buffer holds."""
_END_S = 1.0

_log = logging.getLogger(__name__)


class ChildProcess(Protocol):
    @property
    def pid(self) -> int: ...

    def has_ended(self) -> bool: ...

    def kill(self) -> None: ...

    def end(self) -> None:
        """Kill the process and wait for its end, for a millisecond."""


class StartChild(Protocol):
    async def __call__(
        self, command: Sequence[str], project: Path, slug: str, *, inherited: Sequence[int] = ()
    ) -> tuple[ChildProcess, socket.socket]:
        """Return the process and the socket to it. Raises OSError.

        Args:
            command: the program; ``--fd``, ``--project-dir`` and ``--slug`` are added.
            inherited: descriptors that the process keeps open.
        """


async def spawn_child(
    command: Sequence[str], project: Path, slug: str, *, inherited: Sequence[int] = ()
) -> tuple[ChildProcess, socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            line = [*command, "--fd", str(theirs.fileno()), "--project-dir", str(project), "--slug", slug]
            return _Spawned(_popen(line, [theirs.fileno(), *inherited])), ours
        except BaseException:
            ours.close()
            raise


def _popen(line: Sequence[str], inherited: Sequence[int]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        line,
        pass_fds=inherited,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        process_group=0,  # Ctrl-C in the server's terminal is the server's to handle
    )


class _Spawned:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


class _Forked:
    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd: int | None = pidfd

    def __del__(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)

    def has_ended(self) -> bool:
        return self._wait(0)

    def _wait(self, timeout_s: float) -> bool:
        if self._pidfd is None:
            return True
        ended = select.poll()
        ended.register(self._pidfd, select.POLLIN)
        if not ended.poll(timeout_s * 1000):
            return False
        with contextlib.suppress(OSError):  # ours only if the template is gone and this is the first process
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        os.close(self._pidfd)
        self._pidfd = None
        return True

    def kill(self) -> None:
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def end(self) -> None:
        self.kill()
        self._wait(_END_S)


class _NoTemplate(Exception):
    """The template has ended, or does not reply."""


class Template:
    """The template process of a server, kept running; ``close()`` it. Belongs to the event loop's thread.

    With ``is_for_many`` its children share more memory, and it starts 0.2 s later.
    """

    def __init__(self, *, is_for_many: bool = False) -> None:
        self._options = ["--immortal"] if is_for_many else []
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._is_read = False
        """Whether the running loop takes the replies."""
        self._replies: deque[asyncio.Future[ChildProcess]] = deque()
        self._turns = asyncio.Semaphore(_MAX_WAITING)
        self._started_at = float("-inf")

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start_child(
        self, command: Sequence[str], project: Path, slug: str, *, inherited: Sequence[int] = ()
    ) -> tuple[ChildProcess, socket.socket]:
        """Fork a process if the command runs one of our modules, else start it; see ``StartChild``."""
        if tuple(command[: len(PYTHON)]) == tuple(PYTHON):
            request = [*command[len(PYTHON) :], "--project-dir", str(project), "--slug", slug]
            try:
                async with self._turns:
                    return await self._fork(msgspec.msgpack.encode(request), inherited)
            except _NoTemplate as error:
                _log.warning("%s: %s; a process is started without it", slug, error)
        return await spawn_child(command, project, slug, inherited=inherited)

    def prepare(self) -> None:
        with contextlib.suppress(_NoTemplate, OSError):
            self._require()

    def _require(self) -> None:
        if self._control is not None:
            return
        if not hasattr(os, "pidfd_open"):
            raise _NoTemplate("this system cannot fork from a template process")
        if time.monotonic() - self._started_at < _RESTART_S:
            raise _NoTemplate("the template process has just ended")
        self._started_at = time.monotonic()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                line = [*_COMMAND, "--fd", str(theirs.fileno()), *self._options, " " * _ROOM_CHARACTERS]
                self._process = _popen(line, [theirs.fileno()])
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        self._control = ours

    async def _fork(self, request: bytes, inherited: Sequence[int]) -> tuple[ChildProcess, socket.socket]:
        self._require()
        assert self._control is not None, "it has been started"
        if not self._is_read:
            asyncio.get_running_loop().add_reader(self._control, self._receive)
            self._is_read = True
        if len(request) > MAX_FORK_REQUEST_BYTES:
            raise _NoTemplate("the command line is too long for the template process")
        ours, theirs = socket.socketpair()
        reply: asyncio.Future[ChildProcess] = asyncio.get_running_loop().create_future()
        try:
            with theirs:
                self._send(request, [theirs.fileno(), *inherited])
            self._replies.append(reply)
            try:
                async with asyncio.timeout(_REPLY_S):
                    child = await reply
            except TimeoutError:
                self._end("the template process does not reply")
                raise _NoTemplate("the template process does not reply") from None
            ours.sendall(GO)
        except BaseException:
            ours.close()  # a child that was forked nevertheless exits before it touches the project (I1)
            raise
        return child, ours

    def _send(self, request: bytes, descriptors: Sequence[int]) -> None:
        assert self._control is not None, "_require() has started it"
        try:
            socket.send_fds(self._control, [request], descriptors)
        except OSError as error:
            self._end("the template process has ended")
            raise _NoTemplate("the template process has ended") from error

    def _receive(self) -> None:
        assert self._control is not None, "only an open socket is read"
        try:
            reply, descriptors, _, _ = socket.recv_fds(self._control, 64, 1)
        except BlockingIOError:
            return
        except OSError:
            reply, descriptors = b"", []
        if not reply:
            self._end("the template process has ended")
            return
        number, waiting = msgspec.msgpack.decode(reply, type=int), self._replies.popleft()
        child = _Forked(number, descriptors[0]) if descriptors else None
        if waiting.done():
            return  # its caller was cancelled
        if child is not None:
            waiting.set_result(child)
        else:
            waiting.set_exception(OSError(number, os.strerror(number)))

    def _end(self, why: str) -> None:
        if self._control is None or self._process is None:
            return
        if self._is_read:
            asyncio.get_running_loop().remove_reader(self._control)
            self._is_read = False
        self._control.close()
        self._control = None
        self._process.kill()
        self._process.wait()  # it was killed: this takes no time
        self._process = None
        while self._replies:
            waiting = self._replies.popleft()
            if not waiting.done():
                waiting.set_exception(_NoTemplate(why))

    def close(self) -> None:
        """End the template; children go on. Idempotent."""
        self._end("the server is stopping")
        self._started_at = float("inf")
