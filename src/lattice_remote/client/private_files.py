"""Small JSON files in the user's configuration which nobody else may read or change. Standard library only.

A file that others could have read or written is refused, not mended: what is in it may be known already, or
not be this user's.
"""

import json
import os
import stat
from collections.abc import Callable
from typing import Any

from lattice_remote.errors import StorageError

__all__ = ["Signature", "change", "directory", "path_of", "read", "signature"]

MAX_BYTES = 1024 * 1024
_LOCK_TIMEOUT_S = 10.0
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)

Signature = tuple[int, int, int]
"""A file's modification time in nanoseconds, size in bytes and inode."""


def directory() -> str:
    """Return the absolute path of this user's configuration directory, which need not exist.

    A relative ``XDG_CONFIG_HOME`` counts for nothing, as its specification says: tokens would go into a repository.
    """
    base = os.environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(base):
        base = os.path.abspath(os.path.join(os.path.expanduser("~"), ".config"))
    return os.path.join(base, "lattice")


def path_of(name: str) -> str:
    """Return where this user's file of that name is kept."""
    return os.path.join(directory(), name)


def signature(path: str) -> Signature | None:
    """Return what changes whenever the file does; None when there is none."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def read(path: str, what: str) -> dict[str, Any]:
    """Return the object under the key ``what`` of a file, empty when there is no file.

    Raises:
        StorageError: it can't be read, is no plain file of this user alone, or not what we wrote. Its content is
            not in the message.
    """
    try:
        handle = os.open(path, _FLAGS)
        with open(handle, "rb") as file:
            _require_private(path, os.fstat(handle))
            found = json.loads(file.read(MAX_BYTES + 1))[what]
        return dict(found.items())
    except (FileNotFoundError, NotADirectoryError):
        return {}  # a home may also be /dev/null
    except OSError as error:
        if os.path.islink(path):
            raise StorageError(f"{path} is a link; put the file itself in its place") from None
        raise StorageError(f"cannot read {path}: {error.strerror}; XDG_CONFIG_HOME can name another place") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise StorageError(f"{path} is not valid; mend it, or remove it and name your servers again") from None


def change(path: str, what: str, edit: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Replace the object under ``what`` by what ``edit`` makes of it; None leaves the file alone.

    Atomic, and one at a time: of two commands that change the file at once, neither undoes the other. Once this
    returns the file holds it; it is on the disk before it gets its name.

    Raises:
        StorageError: as for ``read``, or it can't be written.
    """
    from filelock import FileLock, Timeout

    parent, name = os.path.split(path)
    try:
        os.makedirs(parent, mode=0o700, exist_ok=True)
        with FileLock(os.path.join(parent, f".{name}.lock"), timeout=_LOCK_TIMEOUT_S, mode=0o600):
            edited = edit(read(path, what))
            if edited is not None:
                _replace(path, {what: edited})
    except Timeout:
        raise StorageError(f"another command holds on to {path}; try again") from None
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}; XDG_CONFIG_HOME can name another place, and LATTICE_TOKEN with "
            "LATTICE_REMOTE_URL do without one"
        ) from error


def _replace(path: str, content: dict[str, Any]) -> None:
    import tempfile

    parent, name = os.path.split(path)
    handle, temporary = tempfile.mkstemp(dir=parent, prefix=f".{name}.")  # made with mode 0600
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _require_private(path: str, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise StorageError(f"{path} is not a plain file; remove it")
    if hasattr(os, "geteuid") and found.st_uid not in (os.geteuid(), 0):
        raise StorageError(f"{path} belongs to another user; remove it, and name your servers again")
    if found.st_mode & 0o077:
        raise StorageError(f"{path} can be read or changed by others; if that did no harm yet: chmod 600 {path}")
