"""Executor of lattice's commands and calls, one at a time, in the worker's main thread."""

import errno
import io
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

import click

from lattice_remote.server.ipc import HookCall
from lattice_remote.server.tree.capture import Capture
from lattice_remote.server.worker.calls import CallResponse, CommandOutput
from lattice_remote.server.worker.patches import (
    LOCK_PREFIX,
    Clock,
    Copier,
    Disk,
    FlatJson,
    IndentedJson,
    Lock,
    LockBusy,
    LockTable,
    Mover,
    WriteSet,
    parse_faster,
    root_finder,
)

__all__ = ["CommandOutcome", "Executor", "ResourceBusy", "load_lattice"]

_log = logging.getLogger(__name__)
_FAILED = 400
"""Lowest status of a failed operation."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_MAX_WAIT_S = 7 * 24 * 3600.0
"""Of ``resource acquire --wait``."""


@dataclass(frozen=True)
class ResourceBusy:
    """Request to wait for a resource, or for a lock (``locks/tasks_...``), at most ``timeout_s`` in all.

    ``retry_at``: expiry of the first holder's claim in seconds since the epoch.
    """

    resource: str
    timeout_s: float
    retry_at: float | None = None

    @property
    def is_lock(self) -> bool:
        return self.resource.startswith(LOCK_PREFIX)


@dataclass
class CommandOutcome:
    """Result of a command or operation, besides the files it wrote.

    Attributes:
        is_final: it would end the same again; otherwise the reply is not remembered.
        timeout: lattice's message, if another process held a lock for the whole timeout.
    """

    exit_code: int = 0
    stdout: bytes = b""
    stderr: bytes = b""
    answer: CallResponse | None = None
    hooks: list[HookCall] = field(default_factory=list)
    failure: str | None = None
    no_room: OSError | None = None
    is_final: bool = True
    waiting: ResourceBusy | None = None
    timeout: str = ""

    @property
    def is_undone(self) -> bool:
        failed = self.answer is not None and self.answer.status >= _FAILED
        waits = self.waiting is not None and self.waiting.is_lock
        return not self.is_final or failed or waits or bool(self.timeout)


class _WouldWait(BaseException):
    def __init__(self, waiting: ResourceBusy) -> None:
        super().__init__(waiting)
        self.waiting = waiting


@cache
def load_lattice() -> click.Group:
    """Load lattice and its plugins, prepare what does not depend on a project, and return the command group."""
    os.environ["LATTICE_REMOTE_SERVER"] = "1"
    os.environ.pop("_LATTICE_COMPLETE", None)  # Click would complete the line for a shell
    import mimetypes

    from lattice.cli.main import cli

    mimetypes.init()  # reads system files, which a command may not
    _parse_faster(cli)
    return cli


def _parse_faster(command: click.Command) -> None:
    parse_faster(command)
    if isinstance(command, click.Group):
        for each in command.commands.values():
            _parse_faster(each)


class Executor:
    """Runner of commands in the project at ``root``, the real path of the directory that contains ``.lattice``.

    Patches lattice in this process, see ``patches``: create one per process.

    Args:
        lazy: omit lattice's fsyncs; the journal repairs files after a power cut.
        capture: of a shared project: writes to existing files are published only after the command succeeds.
        make_id: makes the ULIDs, by which the repair identifies the writes of commands.
    """

    def __init__(
        self,
        root: Path,
        *,
        lazy: bool,
        capture: Capture | None = None,
        make_id: Callable[[], str] | None = None,
        locks: LockTable | None = None,
    ) -> None:
        os.environ["LATTICE_ROOT"] = str(root)
        cli = load_lattice()
        from lattice.cli import artifact_cmds, helpers, resource_cmds
        from lattice.core import ids, tasks
        from lattice.core.resources import is_resource_available
        from lattice.storage import fs, hooks, short_ids
        from lattice.storage import locks as lattice_locks

        self.cli = cli
        self._root = root
        self._hooks: list[HookCall] = []
        self._clock = Clock(_pause)
        self._mover = Mover()
        self._locks = locks or LockTable(root / ".lattice" / "locks")
        self._may_wait = False
        self._checked = ""
        self._ahead: Collection[str] = ()
        self._guard(cli, [])
        self._has_room = is_resource_available
        setattr(resource_cmds, "is_resource_available", self._is_available)  # noqa: B010 - an imported name
        setattr(resource_cmds, "time", self._clock)  # noqa: B010 - a module's attribute that is not declared
        setattr(artifact_cmds, "shutil", self._mover)  # noqa: B010 - likewise
        setattr(short_ids, "json", FlatJson())  # noqa: B010 - likewise
        setattr(tasks, "copy", Copier())  # noqa: B010 - likewise
        setattr(tasks, "json", IndentedJson())  # noqa: B010 - likewise
        setattr(helpers, "find_root", root_finder(root, fs.find_root))  # noqa: B010 - an imported name
        sync_directory = None if lazy else fs._fsync_directory
        self._writes = WriteSet(sync_directory, capture)
        if lazy or capture is not None:
            setattr(fs, "os", Disk(self._writes if capture is not None else None, lazy=lazy))  # noqa: B010 - likewise
        if lazy:
            fs._fsync_directory = _skip_sync
        if capture is not None:
            setattr(fs, "open", self._writes.open_log)  # noqa: B010 - hides the built-in one
            setattr(fs, "tempfile", self._writes)  # noqa: B010 - for its mkstemp()
            setattr(io, "open", self._writes.open)  # noqa: B010 - pathlib's way to every file
        setattr(lattice_locks, "FileLock", partial(Lock, self._locks.acquire))  # noqa: B010 - an imported name
        if make_id is not None:
            setattr(ids, "ULID", make_id)  # noqa: B010 - an imported name
        hooks._run_hook = self._collect_hook

    def run(
        self,
        argv: Sequence[str],
        checked: str,
        *,
        last_try: bool = False,
        may_wait: bool = False,
        ahead: Collection[str] = (),
        own_copies: Collection[str] = (),
    ) -> CommandOutcome:
        """Run a command line that the policy accepted; never raises an ``Exception``.

        ``AccessDenied`` passes through. Locks stay held until ``release_locks``.

        Args:
            argv: without the program's name.
            checked: words of the only command that may run; empty for a line that only prints.
            last_try: do not wait for a resource.
            may_wait: wait for a lock held by another process instead of failing as lattice does.
            ahead: resources and locks that earlier requests wait for; not taken.
            own_copies: files that the command may move instead of copying.
        """
        self._begin(checked, ahead, last_try=last_try, may_wait=may_wait, own_copies=own_copies)
        outcome = CommandOutcome()
        with _captured_output() as (stdout, stderr), self._ending(outcome, f"lattice {' '.join(argv[:2])}"):
            try:
                self.cli.main(args=list(argv), prog_name="lattice")
            except SystemExit as ending:
                outcome.exit_code = _exit_code(ending)
            except _WouldWait as pause:
                outcome.waiting = pause.waiting
        outcome.stdout, outcome.stderr = stdout(), stderr()
        outcome.hooks = list(self._hooks)
        return outcome

    def call(
        self,
        operation: Callable[[], CallResponse],
        label: str,
        *,
        may_wait: bool = False,
        ahead: Collection[str] = (),
    ) -> CommandOutcome:
        """Run an operation of a surface as ``run`` does, commands only by ``run_step``."""
        self._begin("", ahead, last_try=True, may_wait=may_wait)
        outcome = CommandOutcome()
        with _captured_output(), self._ending(outcome, label):
            outcome.answer = operation()
        outcome.hooks = list(self._hooks)
        return outcome

    def run_step(self, argv: Sequence[str], checked: str) -> CommandOutput:
        """Run a command line within the running operation, which a crash ends."""
        self._checked = checked
        self._clock.restart(is_over=True)
        exit_code = 0
        try:
            with _captured_output() as (stdout, stderr):
                try:
                    self.cli.main(args=list(argv), prog_name="lattice")
                except SystemExit as ending:
                    exit_code = _exit_code(ending)
            return CommandOutput(exit_code, stdout(), stderr())
        finally:
            self._checked = ""

    def release_locks(self) -> None:
        self._locks.release_all()

    def _begin(
        self,
        checked: str,
        ahead: Collection[str],
        *,
        last_try: bool,
        may_wait: bool,
        own_copies: Collection[str] = (),
    ) -> None:
        self._hooks.clear()
        self._checked = checked
        self._ahead = ahead
        self._clock.restart(is_over=last_try)
        self._may_wait = may_wait
        self._locks.begin(ahead)
        self._mover.own_copies = own_copies

    @contextmanager
    def _ending(self, outcome: CommandOutcome, label: str) -> Iterator[None]:
        """Publish the block's writes if it succeeds; otherwise record how it ended."""
        try:
            yield
            if not outcome.is_undone:
                self._writes.publish()
        except LockBusy as busy:
            if self._may_wait:
                outcome.waiting = ResourceBusy(LOCK_PREFIX + busy.key, busy.timeout_s)
            else:
                outcome.timeout = str(busy)
        except Exception as error:  # noqa: BLE001 - a command may fail in any way, the worker continues
            self._failed(outcome, label, error)
        finally:
            self._writes.forget()

    def _guard(self, group: click.Group, words: list[str]) -> None:
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
        """Replace lattice's function: a waiting command leaves resources to earlier waiters."""
        values = click.get_current_context().params
        stands_behind = values.get("do_wait") and not values.get("force") and snapshot.get("name") in self._ahead
        return not stands_behind and bool(self._has_room(snapshot, now))

    def _collect_hook(self, cmd: str, env: dict[str, str], stdin_data: str) -> None:
        """Replace lattice's function: the server runs hooks after the commit."""
        self._hooks.append(HookCall(cmd, env, stdin_data))

    def _failed(self, outcome: CommandOutcome, label: str, error: Exception) -> None:
        outcome.failure, outcome.is_final = self._describe(error), False
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            outcome.no_room = error
            _log.error("%s: cannot write to the disk: %s", label, error.strerror)
        else:
            _log.error("%s failed", label, exc_info=error)

    def _describe(self, error: Exception) -> str:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        return line.replace(f"{self._root}/", "")[:1000]


def _skip_sync(path: Path) -> None: ...


@contextmanager
def _captured_output() -> Iterator[tuple[Callable[[], bytes], Callable[[], bytes]]]:
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
    assert isinstance(buffer, io.BytesIO), "made by _captured_output"
    return buffer.getvalue()


def _exit_code(ending: SystemExit) -> int:
    if ending.code is None or isinstance(ending.code, int):
        return ending.code or 0
    sys.stderr.write(f"{ending.code}\n")
    return 1


def _pause() -> NoReturn:
    raise _WouldWait(_waiting())


def _waiting() -> ResourceBusy:
    from lattice.cli.helpers import require_root, resolve_resource

    values = click.get_current_context().params
    _, name, snapshot = resolve_resource(require_root(), values["name"], False)
    return ResourceBusy(name, float(min(values["timeout"], _MAX_WAIT_S)), _first_expiry(snapshot or {}))


def _first_expiry(snapshot: dict[str, Any]) -> float | None:
    times = [holder["expires_at"] for holder in snapshot.get("holders", []) if holder.get("expires_at")]
    return min((datetime.fromisoformat(time_).timestamp() for time_ in times), default=None)
