"""A worker with an observer, which shares nothing with the capture.

It starts as the worker does. The observer writes to the file ``HOSTILE_REPORT`` each access of a command to foreign
paths, by the real path. ``HOSTILE_UNGUARDED`` disables the policy: every command line passes, so only the capture
remains.
"""

import os
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import click

from lattice_remote.errors import Rejected
from lattice_remote.server.tree.capture import Capture
from lattice_remote.server.tree.undo import UndoLog
from lattice_remote.server.worker import dispatcher, policy
from lattice_remote.server.worker import main as worker
from lattice_remote.server.worker.caller import Identity
from lattice_remote.server.worker.executor import Executor

_PATHS_OF = {
    **dict.fromkeys(("open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"), 1),
    **dict.fromkeys(("os.chmod", "os.chown", "os.utime", "os.setxattr", "os.removexattr", "os.getxattr"), 1),
    **dict.fromkeys(("os.listxattr", "os.rename", "os.link", "os.symlink"), 2),
}
"""The number of an event's first arguments that are paths (or descriptors, or numbers)."""
_NEVER = (
    *("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.system", "os.kill", "os.ch", "os.symlink"),
    *("os.link", "ctypes.", "sqlite3.", "mmap.", "pty.", "webbrowser.", "urllib.", "_thread.", "os.putenv"),
)
_OPEN_TO_ALL = ("/dev/null", "/dev/urandom", "/usr/share/zoneinfo", "/usr/lib/locale", "/usr/share/locale")


class Observer:
    """Observes what the capture permits: hooks run in turn, and none runs after a veto."""

    def __init__(self, capture: Capture, allowed: Sequence[str], report: int) -> None:
        self._capture = capture
        self._allowed = tuple(os.path.realpath(path) for path in (*allowed, *_OPEN_TO_ALL))
        self._report = report

    def hook(self, event: str, args: tuple[object, ...]) -> None:
        if self._capture._thread != threading.get_ident():
            return  # the worker's own access
        if event.startswith(_NEVER) and event not in ("os.chmod", "os.chown"):
            self._tell(f"{event} {args!r}")
        for given in args[: _PATHS_OF.get(event, 0)]:
            if isinstance(given, str | bytes):
                self._look(event, os.fsdecode(given))

    def _look(self, event: str, given: str) -> None:
        path = os.path.realpath(given)  # lstat and readlink, which raise no events
        if not any(path == place or path.startswith(f"{place}/") for place in self._allowed):
            self._tell(f"{event} {given!r} which is {path!r}")

    def _tell(self, what: str) -> None:
        os.write(self._report, what.encode("utf-8", "backslashreplace") + b"\n")


def _observe() -> None:
    report = os.open(os.environ["HOSTILE_REPORT"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    make: Callable[..., None] = Capture.__init__

    def make_observed(self: Capture, tree: str, private: str, undo: UndoLog, code: Sequence[str]) -> None:
        make(self, tree, private, undo, code)
        sys.addaudithook(Observer(self, (tree, private, *code), report).hook)

    Capture.__init__ = make_observed  # type: ignore[method-assign]


def _parse_nothing_refused(
    cli: click.Group, argv: Sequence[str], identity: Identity, *, files: Collection[str], **others: object
) -> policy.Command:
    """Replace ``policy.parse``: parse the line and permit it in any case."""
    del identity, others
    values: dict[str, Any]
    try:
        path, values = policy._split_line(cli, list(argv), files)
    except (click.UsageError, Rejected):
        path, values = None, {}
    return policy.Command(path or "", values)


if __name__ == "__main__":
    _observe()
    if os.environ.get("HOSTILE_UNGUARDED"):
        dispatcher.parse = _parse_nothing_refused  # type: ignore[attr-defined]
        Executor._invoke = lambda _, __, invoke, context: invoke(context)  # type: ignore[method-assign]
    sys.exit(worker.main())
