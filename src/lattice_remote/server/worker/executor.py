"""One command line, run by lattice itself in this process, with what it prints and the exit code it would have.

Or one operation of another surface, in the same circumstances.

The process must have been prepared with ``prepare()``; one command runs at a time, in the main thread.
"""

import errno
import fcntl
import io
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import click
import filelock

from lattice_remote.server.data.ipc import HookCall
from lattice_remote.server.tree.tree import MERGE_FROM_BYTES
from lattice_remote.server.worker.surfaces.surface import Answer, Printed

__all__ = ["Executor", "Outcome", "Waiting"]

_log = logging.getLogger(__name__)
_LOCK_RETRY_S = 0.02
_FAILED = 400
"""From this status on an operation did not succeed."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
"""What the system says when the disk takes nothing: it is full, or over a quota or a limit, or it fails."""
_MAX_WAIT_S = 7 * 24 * 3600.0
"""The longest that ``resource acquire --wait`` waits, whatever it was told."""


@dataclass(frozen=True)
class Waiting:
    """``resource acquire --wait`` would wait here: for the resource, at most ``timeout_s`` in all.

    ``retry_at`` is when its first holder's time is over, in seconds since the epoch; None when not known.
    """

    resource: str
    timeout_s: float
    retry_at: float | None


@dataclass
class Outcome:
    """What a command, or an operation of a surface, did besides writing files.

    Attributes:
        answer: of an operation that did not break down.
        failure: one line when the command broke down, so that all it did must be undone; None otherwise.
        no_room: the failure is that the disk did not take what it wrote.
        is_final: it came to its own end, and would come to the same again. A breakdown, or a lock that others did not
            give back in time, says nothing of the next try: it is undone, and answered without being remembered.
        waiting: it would wait; nothing was printed.
    """

    exit_code: int = 0
    stdout: bytes = b""
    stderr: bytes = b""
    answer: Answer | None = None
    hooks: list[HookCall] = field(default_factory=list)
    failure: str | None = None
    no_room: OSError | None = None
    is_final: bool = True
    waiting: Waiting | None = None

    @property
    def is_undone(self) -> bool:
        """Tell whether all that was written must be undone."""
        return not self.is_final or (self.answer is not None and self.answer.status >= _FAILED)


class _WouldWait(BaseException):
    def __init__(self, waiting: Waiting) -> None:
        super().__init__(waiting)
        self.waiting = waiting


class _Clock:
    """Stands for ``time`` in lattice's resource commands: nobody sleeps while holding the writer."""

    def __init__(self) -> None:
        self.is_over = False
        self._asked = 0

    def restart(self, *, is_over: bool) -> None:
        """Begin a command; with ``is_over`` its time is up as soon as it has tried once."""
        self.is_over, self._asked = is_over, 0

    def monotonic(self) -> float:
        self._asked += 1
        return float("inf") if self.is_over and self._asked > 1 else 0.0

    def sleep(self, seconds: float) -> NoReturn:
        del seconds
        raise _WouldWait(_waiting())

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class _LazyDisk:
    """Stands for ``os`` in lattice's file functions: leaves out the fsyncs that the journal makes needless.

    What is kept is that of a file which the journal holds only as a patch on what it was before.
    """

    def fsync(self, descriptor: int) -> None:
        appends = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND
        if not appends and os.fstat(descriptor).st_size >= MERGE_FROM_BYTES:
            os.fsync(descriptor)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


class _Mover:
    """Stands for ``shutil`` in lattice's ``attach``: what came with the command is a copy, nobody needs another."""

    def __init__(self) -> None:
        self.own_copies: Collection[str] = ()

    def copy2(self, source: str, target: str) -> str:
        if source in self.own_copies:
            with suppress(OSError):  # another file system, for one: then it is copied
                os.replace(source, target)
                return target
        return shutil.copy2(source, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(shutil, name)


class _Lock:
    """Stands for ``FileLock`` in lattice: the same flock on the same file, at a tenth of the cost.

    Plain ``lattice`` in the same directory still waits for it, and is waited for (I12).
    """

    has_timed_out: ClassVar[bool] = False
    """Whether any lock was waited for in vain since this was last set to False."""

    def __init__(self, path: Path, timeout: float) -> None:
        self._path = path
        self._timeout_s = timeout
        self._descriptor = -1

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            filelock.Timeout: somebody else has had it for all of the time.
        """
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    self.release()
                    _Lock.has_timed_out = True
                    raise filelock.Timeout(str(self._path)) from None
                time.sleep(_LOCK_RETRY_S)
            else:
                return

    def release(self) -> None:
        """Give the lock back."""
        os.close(self._descriptor)


class Executor:
    """Runs commands in the project at ``root`` (the directory that holds ``.lattice``).

    Making one changes the process: lattice is loaded with ``LATTICE_ROOT`` set, its hooks are collected instead of
    run, and its waiting is taken out. So there is one per process.

    Args:
        root: a real path.
        lazy: leave out lattice's fsyncs; a power cut is then repaired from the journal.
    """

    def __init__(self, root: Path, *, lazy: bool) -> None:
        os.environ["LATTICE_ROOT"] = str(root)
        os.environ["LATTICE_REMOTE_SERVER"] = "1"
        os.environ.pop("_LATTICE_COMPLETE", None)  # Click would complete the line for a shell in place of running it
        import mimetypes

        from lattice.cli import artifact_cmds, resource_cmds
        from lattice.cli.main import cli
        from lattice.core.resources import is_resource_available
        from lattice.storage import fs, hooks, locks

        mimetypes.init()  # reads system files, which a command may not
        self.cli: click.Group = cli
        self._root = root
        self._hooks: list[HookCall] = []
        self._clock = _Clock()
        self._mover = _Mover()
        self._checked = ""
        self._ahead: Collection[str] = ()
        self._guard(cli, [])
        self._has_room = is_resource_available
        setattr(resource_cmds, "is_resource_available", self._is_available)  # noqa: B010 - an imported name
        setattr(resource_cmds, "time", self._clock)  # noqa: B010 - a module's attribute that is not declared
        setattr(artifact_cmds, "shutil", self._mover)  # noqa: B010 - likewise
        if lazy:
            setattr(fs, "os", _LazyDisk())  # noqa: B010 - likewise
            fs._fsync_directory = _leave_it
        setattr(locks, "FileLock", _Lock)  # noqa: B010 - likewise
        hooks._run_hook = self._collect_hook

    def run(
        self,
        argv: Sequence[str],
        checked: str,
        *,
        last_try: bool = False,
        ahead: Collection[str] = (),
        own_copies: Collection[str] = (),
    ) -> Outcome:
        """Run a command line that the policy has let through; never raises an ``Exception``.

        ``ahead`` are resources that it does not take with ``--wait``, because others stand before it in line.
        ``own_copies`` are files that the command may take instead of copying them.

        ``checked`` is the command that the policy saw in it, as ``resource acquire``: no other is run, and none at all
        when it is empty, for a line that only prints. ``Vetoed`` passes through. What the command printed is what a
        pipe would have received.
        """
        self._begin(checked, last_try=last_try, own_copies=own_copies)
        self._ahead = ahead
        outcome = Outcome()
        with _printing() as (stdout, stderr):
            try:
                self.cli.main(args=list(argv), prog_name="lattice")
            except SystemExit as ending:
                outcome.exit_code = _exit_code(ending)
            except _WouldWait as pause:
                outcome.waiting = pause.waiting
            except Exception as error:  # noqa: BLE001 - a command may fail in any way, the writer goes on
                self._failed(outcome, f"lattice {' '.join(argv[:2])}", error)
        outcome.stdout, outcome.stderr = stdout(), stderr()
        outcome.hooks = list(self._hooks)
        outcome.is_final &= not (_Lock.has_timed_out and outcome.exit_code)
        return outcome

    def call(self, operation: Callable[[], Answer], label: str) -> Outcome:
        """Run an operation of a surface, which may run no command but by ``run_step``; never raises an ``Exception``.

        ``Vetoed`` passes through. What is printed is nobody's to see.
        """
        self._begin("", last_try=True)
        outcome = Outcome()
        with _printing():
            try:
                outcome.answer = operation()
            except Exception as error:  # noqa: BLE001 - an operation may fail in any way, the writer goes on
                self._failed(outcome, label, error)
        outcome.hooks = list(self._hooks)
        outcome.is_final &= not (_Lock.has_timed_out and outcome.answer and outcome.answer.status >= _FAILED)
        return outcome

    def run_step(self, argv: Sequence[str], checked: str) -> Printed:
        """Run a command line as a part of the operation that is running; otherwise as ``run``.

        What breaks down is raised: the operation does not go on.
        """
        self._checked = checked
        self._clock.restart(is_over=True)
        self._ahead = ()
        exit_code = 0
        try:
            with _printing() as (stdout, stderr):
                try:
                    self.cli.main(args=list(argv), prog_name="lattice")
                except SystemExit as ending:
                    exit_code = _exit_code(ending)
            return Printed(exit_code, stdout(), stderr())
        finally:
            self._checked = ""

    def _begin(self, checked: str, *, last_try: bool, own_copies: Collection[str] = ()) -> None:
        self._hooks.clear()
        self._checked = checked
        _Lock.has_timed_out = False
        self._clock.restart(is_over=last_try)
        self._mover.own_copies = own_copies

    def _guard(self, group: click.Group, words: list[str]) -> None:
        """Have every command below ``group`` make sure that it is the one that was checked."""
        for word, command in group.commands.items():
            path = [*words, word]
            if isinstance(command, click.Group):
                self._guard(command, path)
            else:
                setattr(command, "invoke", partial(self._invoke, " ".join(path), command.invoke))  # noqa: B010 - a method

    def _invoke(self, path: str, invoke: Callable[[click.Context], Any], context: click.Context) -> Any:
        if path != self._checked:
            raise RuntimeError(f"{path!r} is not the command that was checked")
        return invoke(context)

    def _is_available(self, snapshot: dict[str, Any], now: str) -> bool:
        """Stand for lattice's own function: who waits does not take what others have waited for longer."""
        values = click.get_current_context().params
        stands_behind = values.get("do_wait") and not values.get("force") and snapshot.get("name") in self._ahead
        return not stands_behind and bool(self._has_room(snapshot, now))

    def _collect_hook(self, cmd: str, env: dict[str, str], stdin_data: str) -> None:
        """Stand for lattice's own function: the server runs hooks after the commit."""
        self._hooks.append(HookCall(cmd, env, stdin_data))

    def _failed(self, outcome: Outcome, label: str, error: Exception) -> None:
        """Note what ended a command that did not come to its end by itself; the log has it too."""
        outcome.failure, outcome.is_final = self._describe(error), False
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            outcome.no_room = error
            _log.error("%s: the disk does not take what it writes: %s", label, error.strerror)
        else:
            _log.error("%s broke down", label, exc_info=error)

    def _describe(self, error: Exception) -> str:
        """Return one line on an error, without the server's directories."""
        line = " ".join(f"{type(error).__name__}: {error}".split())
        return line.replace(f"{self._root}/", "")[:1000]


def _leave_it(path: Path) -> None:
    """Stand for lattice's fsync of a directory."""


@contextmanager
def _printing() -> Iterator[tuple[Callable[[], bytes], Callable[[], bytes]]]:
    """Collect what is printed, encoded as it is for a pipe."""
    before = sys.stdout, sys.stderr
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    sys.stdout, sys.stderr = out, err
    try:
        yield lambda: _collected(out), lambda: _collected(err)
    finally:
        sys.stdout, sys.stderr = before


def _collected(stream: io.TextIOWrapper) -> bytes:
    stream.flush()
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO), "made by _printing"
    return buffer.getvalue()


def _exit_code(ending: SystemExit) -> int:
    """Return the exit code of a process that ends like this."""
    if ending.code is None or isinstance(ending.code, int):
        return ending.code or 0
    sys.stderr.write(f"{ending.code}\n")
    return 1


def _waiting() -> Waiting:
    """Return what the running ``resource acquire`` waits for; call within it."""
    from lattice.cli.helpers import require_root, resolve_resource

    values = click.get_current_context().params
    _, name, snapshot = resolve_resource(require_root(), values["name"], False)
    return Waiting(name, float(min(values["timeout"], _MAX_WAIT_S)), _first_expiry(snapshot or {}))


def _first_expiry(snapshot: dict[str, Any]) -> float | None:
    times = [holder["expires_at"] for holder in snapshot.get("holders", []) if holder.get("expires_at")]
    return min((datetime.fromisoformat(time_).timestamp() for time_ in times), default=None)
