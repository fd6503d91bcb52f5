"""Runs the hooks of ``config.json`` that commands asked for: after the commit, in order, one at a time a project.

As upstream's: a shell command with the event on standard input and a time limit; what it prints is discarded, and
a failure concerns nobody else. It is logged with the number of the change. Hooks of a change run at most once;
those not begun when the server stops are lost.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
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

from lattice_remote.server.ipc import HookCall
from lattice_remote.text import printable

__all__ = ["HOOK_TIMEOUT_S", "HookRunner", "without_secrets"]

HOOK_TIMEOUT_S = 10.0
_MAX_WAITING = 10_000
_MAX_LINE_BYTES = 4096
"""So much of what a hook writes to stderr is looked at; the rest is read and forgotten."""
_MAX_SHOWN_CHARS = 200
_LOOK_S = 0.05
"""How often is looked whether a hook has ended that has left its stderr to a process in the background."""

_SECRETS = re.compile(
    r"(?P<token>ltr_)[\w-]+|(?P<user>://[^\s/@:]{0,100}):[^\s/@]+(?=@)"
    r"|(?P<named>\b(?:bearer|basic|token|password|passwd|secret|api[_-]?key)\b['\"]?\s*[:= ]\s*)\S+",
    re.IGNORECASE,
)

_log = logging.getLogger(__name__)


class HookRunner:
    """The hooks of one project, off the write path. ``close()`` it.

    They run in a thread of their own: what the loop's subprocesses do when a hook ends before it has read its event
    differs from one event loop to the other, and a hook may take its whole time without holding up anybody.
    """

    def __init__(self, slug: str, cwd: Path, *, timeout_s: float = HOOK_TIMEOUT_S) -> None:
        self._slug = slug
        self._cwd = cwd
        self._timeout_s = timeout_s
        self._waiting: deque[tuple[int, HookCall]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._closing = threading.Event()

    def submit(self, seq: int, calls: list[HookCall]) -> None:
        """Queue the hooks of change ``seq`` to run after those before them; returns at once."""
        for call in calls:
            if len(self._waiting) >= _MAX_WAITING:
                self._failed(seq, call, f"was dropped: {_MAX_WAITING} are waiting")
            else:
                self._waiting.append((seq, call))
        if self._waiting and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run_waiting(), name=f"hooks {self._slug}")

    async def close(self) -> None:
        """End the hook that runs, forget the others."""
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
        """Run one hook to its end or its time limit; whatever happens, the next one has its turn. Blocking."""
        try:
            with _event_file(call.stdin) as stdin, self._started(call, stdin) as process:
                assert process.stderr is not None, "it was asked for"
                code, said = self._watch(process, process.stderr)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the command or in its environment
            self._failed(seq, call, f"could not start: {error}")
        else:
            if code is None and not self._closing.is_set():
                self._failed(seq, call, f"took longer than {self._timeout_s:g} s and was ended", said)
            elif code:
                self._failed(seq, call, f"ended with {code}" if code > 0 else f"ended by signal {-code}", said)

    @contextlib.contextmanager
    def _started(self, call: HookCall, stdin: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
        """Start a hook in a process group of its own, so that all of it can be ended; at the end it has ended."""
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
        """Wait for a hook's end; return its exit code, None when its time is over, and how its stderr begins."""
        os.set_blocking(stderr.fileno(), False)
        deadline = time.monotonic() + self._timeout_s
        said = bytearray()
        is_open = True
        while process.poll() is None:
            if time.monotonic() >= deadline or self._closing.is_set():
                return None, bytes(said)
            if not is_open:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_LOOK_S)
            elif select.select([stderr], [], [], _LOOK_S)[0]:
                is_open = _read_some(stderr, said)
        _read_some(stderr, said)
        return process.returncode, bytes(said)

    def _failed(self, seq: int, call: HookCall, how: str, said: bytes = b"") -> None:
        """Log what became of a hook. Neither its command line, which may hold a password, nor anything of its kind."""
        line = said.decode(errors="replace").strip().splitlines()[:1]
        text = f": {printable(without_secrets(line[0]))[:_MAX_SHOWN_CHARS]}" if line else ""
        event = call.env.get("LATTICE_EVENT_TYPE", "?")
        _log.error("%s: change %d: hook %s of %s %s%s", self._slug, seq, self._name(call), printable(event), how, text)

    def _name(self, call: HookCall) -> str:
        """Return where in ``config.json`` a hook stands, as ``hooks.on.task_created``."""
        try:
            config = json.loads((self._cwd / ".lattice" / "config.json").read_text("utf-8"))
            names = [name for name, command in _commands(config["hooks"]) if command == call.command]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            names = []
        return printable(names[0])[:_MAX_SHOWN_CHARS] if names else "(not in config.json any more)"


def without_secrets(line: str) -> str:
    """Return a line that a hook has printed without what looks like a token or a password."""

    def masked(found: re.Match[str]) -> str:
        return f"{found['token'] or found['named'] or found['user'] + ':'}***"

    return _SECRETS.sub(masked, line)


def _commands(hooks: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the places of the hooks in ``config.json``, and what is there."""
    yield "hooks.post_event", hooks.get("post_event", "")
    for kind in ("on", "transitions"):
        for key, value in (hooks.get(kind) or {}).items():
            for command in value if isinstance(value, list) else [value]:
                yield f"hooks.{kind}.{key}", command


@contextlib.contextmanager
def _event_file(text: str) -> Iterator[IO[bytes]]:
    """A hook's standard input: a file, so that nobody waits for a hook that does not read it; on Linux on no disk."""
    in_memory = getattr(os, "memfd_create", None)
    with os.fdopen(in_memory("event"), "w+b") if in_memory else tempfile.TemporaryFile() as file:
        file.write(text.encode())
        file.seek(0)  # which also writes it out
        yield file


def _read_some(stderr: IO[bytes], said: bytearray) -> bool:
    """Read what there is, keep the beginning; return whether there may be more."""
    try:
        data = os.read(stderr.fileno(), 65536)
    except BlockingIOError:
        return True
    said += data[: _MAX_LINE_BYTES - len(said)]
    return bool(data)


async def _in_thread(work: Callable[[int, HookCall], None], seq: int, call: HookCall) -> None:
    """Run blocking work in a thread of its own: the loop's few are for those who wait for an answer."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def run() -> None:
        try:
            work(seq, call)
        except Exception:  # noqa: BLE001 - whatever it is, the next one has its turn
            _log.exception("a hook could not be run")
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, name="hook", daemon=True).start()
    await done.wait()
