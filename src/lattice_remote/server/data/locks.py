"""Advisory locks on files, held by a descriptor: released by the kernel when its last holder is gone."""

import fcntl
import os
from pathlib import Path

__all__ = ["LockedElsewhere", "lock"]


class LockedElsewhere(Exception):
    """Another process holds the lock; ``holder`` is what it wrote there, usually its process id."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{path} is locked by process {holder or 'unknown'}")
        self.holder = holder


def lock(path: Path) -> int:
    """Lock ``path``, write this process's id into it, and return the descriptor that holds the lock.

    The lock lives until every process that inherited the descriptor has closed it or died, however it died. A
    child that is to keep it gets it through ``pass_fds``. The file is never removed: that would let two
    processes lock two files of one name.

    Raises:
        LockedElsewhere: somebody else holds it.
        OSError: the file cannot be opened.
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
