"""Runner of the ``config.json`` hooks requested by commands: after the commit, in order, one at a time per project.

As upstream, a hook is a shell command with the event on standard input and a time limit; its output is discarded. A
failure is logged and affects nothing else. A hook runs at most once; those not started when the server stops are lost.
"""

import asyncio
import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from lattice_remote.errors import printable
from lattice_remote.server.ipc import HookCall
from lattice_remote.server.logging import masked_output

__all__ = ["HOOK_TIMEOUT_S", "HookRunner"]

HOOK_TIMEOUT_S = 10.0
_MAX_WAITING = 10_000
_MAX_LINE_BYTES = 4096
"""Examined; the rest is discarded."""
_MAX_SHOWN_CHARS = 200
_POLL_S = 0.05
"""For the end of a hook that left its stderr to a background process."""

_log = logging.getLogger(__name__)


class HookRunner:
    """Hooks of one project, off the write path; ``close()`` it.

    They run in a thread: event loops differ if a subprocess ends before it has read its input.
    """

    def __init__(self, slug: str, cwd: Path, *, timeout_s: float = HOOK_TIMEOUT_S) -> None:
        self._slug = slug
        self._cwd = cwd
        self._timeout_s = timeout_s
        self._waiting: deque[tuple[int, HookCall]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._closing = threading.Event()

    def submit(self, seq: int, calls: list[HookCall]) -> None:
        for call in calls:
            if len(self._waiting) >= _MAX_WAITING:
                self._failed(seq, call, f"was dropped: {_MAX_WAITING} are waiting")
            else:
                self._waiting.append((seq, call))
        if self._waiting and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run_waiting(), name=f"hooks {self._slug}")

    async def close(self) -> None:
        self._waiting.clear()
        self._closing.set()
        if self._task is not None:
            await self._task

    async def _run_waiting(self) -> None:
        try:
            while self._waiting:
                await _in_thread(self._run, *self._waiting.popleft())
        finally:
            self._task = None

    def _run(self, seq: int, call: HookCall) -> None:
        try:
            with _event_file(call.stdin) as stdin, self._started(call, stdin) as process:
                assert process.stderr is not None, "stderr is a pipe"
                code, output = self._watch(process, process.stderr)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the command or in its environment
            self._failed(seq, call, f"could not start: {error}")
        else:
            if code is None and not self._closing.is_set():
                self._failed(seq, call, f"took longer than {self._timeout_s:g} s and was ended", output)
            elif code:
                self._failed(seq, call, f"ended with {code}" if code > 0 else f"ended by signal {-code}", output)

    @contextlib.contextmanager
    def _started(self, call: HookCall, stdin: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
        """Start a hook in its own process group, which the block's end kills."""
        process = subprocess.Popen(  # noqa: S602 - the administrator's own command, as upstream runs it
            call.command,
            shell=True,
            cwd=self._cwd,
            env=call.env,
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        with process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)

    def _watch(self, process: "subprocess.Popen[bytes]", stderr: IO[bytes]) -> tuple[int | None, bytes]:
        os.set_blocking(stderr.fileno(), False)
        deadline = time.monotonic() + self._timeout_s
        output = bytearray()
        is_open = True
        while process.poll() is None:
            if time.monotonic() >= deadline or self._closing.is_set():
                break
            if not is_open:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
            elif select.select([stderr], [], [], _POLL_S)[0]:
                is_open = _read_some(stderr, output)
        if is_open:
            _read_some(stderr, output)
        return process.returncode, bytes(output)

    def _failed(self, seq: int, call: HookCall, how: str, output: bytes = b"") -> None:
        """Log a failed hook; its command line may contain a password."""
        line = output.decode(errors="replace").strip().splitlines()[:1]
        text = f": {printable(masked_output(line[0]))[:_MAX_SHOWN_CHARS]}" if line else ""
        event = call.env.get("LATTICE_EVENT_TYPE", "?")
        _log.error("%s: change %d: hook %s of %s %s%s", self._slug, seq, self._name(call), printable(event), how, text)

    def _name(self, call: HookCall) -> str:
        try:
            config = json.loads((self._cwd / ".lattice" / "config.json").read_text("utf-8"))
            names = [name for name, command in _commands(config["hooks"]) if command == call.command]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            names = []
        return printable(names[0])[:_MAX_SHOWN_CHARS] if names else "(no longer in config.json)"


def _commands(hooks: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "hooks.post_event", hooks.get("post_event", "")
    for kind in ("on", "transitions"):
        for key, value in (hooks.get(kind) or {}).items():
            for command in value if isinstance(value, list) else [value]:
                yield f"hooks.{kind}.{key}", command


@contextlib.contextmanager
def _event_file(text: str) -> Iterator[IO[bytes]]:
    """Open standard input: a file, so that no pipe blocks; in memory on Linux."""
    in_memory = getattr(os, "memfd_create", None)
    with os.fdopen(in_memory("event"), "w+b") if in_memory else tempfile.TemporaryFile() as file:
        file.write(text.encode())
        file.seek(0)  # which also writes it out
        yield file


def _read_some(stderr: IO[bytes], output: bytearray) -> bool:
    try:
        data = os.read(stderr.fileno(), 65536)
    except BlockingIOError:
        return True
    output += data[: _MAX_LINE_BYTES - len(output)]
    return bool(data)


async def _in_thread(work: Callable[[int, HookCall], None], seq: int, call: HookCall) -> None:
    """Run blocking work in its own thread: the loop's pool is for work that callers wait for."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def run() -> None:
        try:
            work(seq, call)
        except Exception:  # noqa: BLE001 - the next hook must run
            _log.exception("cannot run a hook")
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, name="hook", daemon=True).start()
    await done.wait()
