"""File locks, and exclusive access of administrative commands to a project.

The command locks ``projects/<slug>/.closing`` and writes a message for its clients there. A running server notices
within a quarter of a second, disconnects them, and ends the project's worker; the command waits for the worker's own
lock. The kernel releases both locks when the command ends in any way.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lattice_remote.errors import Misuse, StorageError

__all__ = ["LockedElsewhere", "closed_because", "closing", "lock"]


class LockedElsewhere(Exception):
    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{path} is locked by process {holder or 'unknown'}")
        self.holder = holder


def lock(path: Path) -> int:
    """Lock ``path``, write this process's id into it, and return the descriptor that holds the lock.

    The lock lives until every process that inherited the descriptor has closed it or died. The file is never removed:
    that would let two processes lock two files of one name.

    Raises LockedElsewhere or OSError.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise LockedElsewhere(path, holder) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


_MARK = ".closing"
_TIMEOUT_S = 60.0
"""A worker finishes its command first."""
_RETRY_S = 0.05


@contextlib.contextmanager
def closing(project: Path, why: str) -> Iterator[Callable[[], None]]:
    """Hold the project in this directory exclusively; it may be moved within. ``why`` is one line for its clients.

    Yields a function that releases the worker's lock early.

    Raises Misuse: another command has it; StorageError: its worker does not end.
    """
    try:
        mark = lock(project / _MARK)
    except LockedElsewhere as error:
        raise Misuse(f"project {project.name} is locked by another command; try again later") from error
    try:
        os.ftruncate(mark, 0)
        os.pwrite(mark, why.encode(), 0)
        with contextlib.ExitStack() as writer:
            writer.callback(os.close, _writer_lock(project))
            yield writer.close
    finally:
        os.close(mark)


def _writer_lock(project: Path) -> int:
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            return lock(project / ".writer.lock")
        except LockedElsewhere as error:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"the worker (pid {error.holder}) of project {project.name} does not end; nothing was changed"
                ) from error
            time.sleep(_RETRY_S)


def closed_because(project: Path) -> str | None:
    """Return the message for clients if a command holds this project."""
    try:
        mark = os.open(project / _MARK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(mark, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(mark, 1000, 0).decode(errors="replace") or "its administrator is at work on it"
    else:
        return None
    finally:
        os.close(mark)
