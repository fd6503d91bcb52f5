"""Runs the hooks of ``config.json`` that commands asked for: after the commit, in order, one at a time a project.

As upstream's: a shell command with the event on standard input and a time limit; its output is discarded, and a
failure concerns nobody else. Hooks of a change run at most once; those not begun when the server stops are lost.
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections import deque
from pathlib import Path

from lattice_remote.server.data.ipc import HookCall

__all__ = ["HOOK_TIMEOUT_S", "HookRunner"]

HOOK_TIMEOUT_S = 10.0
_MAX_WAITING = 10_000

_log = logging.getLogger(__name__)


class HookRunner:
    """The hooks of one project, off the write path. ``close()`` it."""

    def __init__(self, slug: str, cwd: Path, *, timeout_s: float = HOOK_TIMEOUT_S) -> None:
        self._slug = slug
        self._cwd = cwd
        self._timeout_s = timeout_s
        self._waiting: deque[HookCall] = deque()
        self._task: asyncio.Task[None] | None = None

    def submit(self, calls: list[HookCall]) -> None:
        """Queue hooks to run after those before them; returns at once."""
        for call in calls:
            if len(self._waiting) >= _MAX_WAITING:
                _log.error("%s: %d hooks are waiting; dropped: %s", self._slug, _MAX_WAITING, call.command)
            else:
                self._waiting.append(call)
        if self._waiting and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run_waiting())

    async def close(self) -> None:
        """End the hook that runs, forget the others."""
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run_waiting(self) -> None:
        try:
            while self._waiting:
                await self._run(self._waiting.popleft())
        finally:
            self._task = None

    async def _run(self, call: HookCall) -> None:
        """Run one hook to its end or its time limit, in a process group of its own so that all of it ends."""
        try:
            process = await asyncio.create_subprocess_shell(  # the administrator's own command, as upstream runs it
                call.command,
                cwd=self._cwd,
                env=call.env,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:  # ValueError: a NUL in the command or in its environment
            _log.error("%s: hook could not start (%s): %s", self._slug, error, call.command)
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                await process.communicate(call.stdin.encode())
        except TimeoutError:
            _log.error("%s: hook took longer than %g s: %s", self._slug, self._timeout_s, call.command)
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        if process.returncode and process.returncode > 0:
            _log.warning("%s: hook ended with %d: %s", self._slug, process.returncode, call.command)
