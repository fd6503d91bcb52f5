"""Programs that start in milliseconds: forked from a process that has imported everything (``preloaded_process.py``).

Starting ``lattice`` takes a quarter of a second, nearly all of it imports. A test that runs a hundred commands and is
not about their start runs them here. They are processes like any other: with an id of their own, which can be killed.
"""

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from sandbox import COMMAND_TIMEOUT_S, Programs

__all__ = ["Warm", "WarmProcess", "warm"]

_SERVER = Path(__file__).resolve().parent / "preloaded_process.py"
_MAX_REQUEST_BYTES = 128 * 1024


class WarmProcess:
    """One forked program, with what tests use of ``subprocess.Popen``."""

    def __init__(self, status: socket.socket, stdout: IO[bytes] | None) -> None:
        self._status = status
        self.stdout = stdout
        self.returncode: int | None = None
        self.pid: int = struct.unpack("i", self._receive())[0]

    def _receive(self) -> bytes:
        data = self._status.recv(4)
        if len(data) != 4:
            raise RuntimeError("the process that forks is gone")
        return data

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the exit code, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: it runs still.
        """
        if self.returncode is None:
            self._status.settimeout(timeout)
            try:
                self.returncode = struct.unpack("i", self._receive())[0]
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired("a warm process", timeout or 0.0) from None
            self._status.close()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Signal it, unless it is known to have ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def leave(self) -> None:
        """Detach a process that continues by itself."""
        self._status.close()

    def kill(self) -> None:
        """End it with no warning."""
        self.send_signal(signal.SIGKILL)


class Warm(Programs):
    """Forks programs. Thread-safe; the process that forks ends with this one."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("LATTICE_", "XDG_", "PYTHON"))}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, _SERVER, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
            )

    def start(
        self,
        program: str,
        argv: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdout: int | IO[bytes],
        stderr: int | IO[bytes],
        new_session: bool = False,
        stdin: int = subprocess.DEVNULL,
    ) -> WarmProcess:
        """Start ``lattice``, ``lattice-remote``, an ``agent`` or a ``worker``, whose ``stdin`` is its connection."""
        request = {"program": program, "argv": list(argv), "cwd": str(cwd), "env": dict(env)}
        message = json.dumps({**request, "new_session": new_session}).encode()
        if len(message) > _MAX_REQUEST_BYTES:
            raise ValueError("too long a command line to be sent in one message")
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as stack:
            stack.enter_context(theirs)
            nothing = stack.enter_context(open(os.devnull, "r+b"))
            reader: IO[bytes] | None = None
            if stdout == subprocess.PIPE:
                read_end, write_end = os.pipe()
                reader = open(read_end, "rb", buffering=0)  # noqa: SIM115 - the caller's to close
                stdout = stack.enter_context(open(write_end, "wb"))
            out, err = (nothing if target == subprocess.DEVNULL else target for target in (stdout, stderr))
            given = nothing.fileno() if stdin == subprocess.DEVNULL else stdin
            fds = [given, _fileno(out), _fileno(err), theirs.fileno()]
            with self._lock:
                socket.send_fds(self._control, [message], fds)
        return WarmProcess(ours, reader)

    def run(
        self,
        program: str,
        argv: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdin: str = "",
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end and return its result; one that reads its input is not forked."""
        if stdin:
            return super().run(program, argv, cwd=cwd, env=env, stdin=stdin, timeout_s=timeout_s)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = self.start(program, argv, cwd=cwd, env=env, stdout=out, stderr=err)
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGABRT)
                process.wait(10)
                late = subprocess.TimeoutExpired([program, *argv], timeout_s)
                late.add_note(f"in {cwd}; it printed, and was here:\n{_text(out)}{_text(err)}")
                raise late from None
            texts = [_text(out), _text(err)]
        return subprocess.CompletedProcess([program, *argv], code, *texts)

    def close(self) -> None:
        """End the forking process; its forks continue."""
        self._control.close()
        self._process.wait(10)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


@functools.cache
def warm() -> Warm:
    """Return the one of this process, started when it is first asked for."""
    made = Warm()
    atexit.register(made.close)
    return made


def _fileno(target: int | IO[bytes]) -> int:
    return target if isinstance(target, int) else target.fileno()
