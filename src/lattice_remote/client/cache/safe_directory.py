"""Files below one directory, opened step by step without following links; each replaced or appended atomically (I8).

Every directory on the path is opened relative to the previous one (``openat``), so that a link, pipe or file put in the
way at any moment leads nowhere. A link instead of a file is replaced; one instead of a directory is an error (I9). A
file with several hard links is replaced, not written into. Nothing is fsynced unless requested.

New files get the directory's own permissions under any umask, so that every user of the directory can use them.

Nothing is created in a directory that is being removed: ``rm -rf`` reads the names once and would then find it not
empty. So only ``make`` creates directories of the fixed layout, and a new name is added only if no other program has
just removed names beside it.
"""

import contextlib
import errno
import itertools
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator

from lattice_remote.client.config import PRIVATE_DIRECTORY
from lattice_remote.errors import StorageError
from lattice_remote.files import READ, SAFE, hash_descriptor, write_all

__all__ = ["QUIET_S", "TEMPORARY", "Directory", "Quota", "remove_tree"]

TEMPORARY = f"{PRIVATE_DIRECTORY}/tmp"  # noqa: S108 - inside the cache
"""Holds files until they get their name."""
_DIRECTORY = READ | getattr(os, "O_DIRECTORY", 0)
_STALE_TEMPORARY_S = 3600
_SEVERAL = 2
"""A person may remove one file, and the next change must not wait for that."""
QUIET_S = 1.0
"""A directory without a removal for this long is not being removed."""


_MIB = 1024 * 1024
_STEP_BYTES = 64 * _MIB
"""Bytes written between two measurements: the limit may be exceeded by this much."""


class Quota:
    """Size limit of a cache. Call ``take`` before each write; the directory is measured once enough was written."""

    def __init__(self, root: str, limit: Callable[[], int], whose: str) -> None:
        self._root = root
        self._limit = limit
        self._whose = whose
        self._unseen = 0  # bytes written since the last measurement

    def require(self, size: int) -> None:
        """Require that a total of ``size`` bytes is within the limit. Raises StorageError."""
        if size > (limit := self._limit()):
            raise StorageError(
                f"this cache would exceed the {limit // _MIB} MiB allowed for {self._whose}; allow more "
                f"with: lattice remote trust {self._whose} --max-cache MIB"
            )

    def require_room(self, size: int) -> None:
        """Require room for ``size`` more bytes; measures every file. Raises StorageError."""
        self.require(_bytes_below(self._root) + size)

    def take(self, size: int) -> None:
        """Require room for ``size`` more bytes, to the precision of one step. Raises StorageError."""
        self._unseen += size
        if self._unseen > min(_STEP_BYTES, self._limit()):
            self.require(_bytes_below(self._root) + size)
            self._unseen = 0


def _bytes_below(root: str) -> int:
    total = 0
    pending = [root]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue  # removed since
    return total


class Directory:
    """Directory tree below the absolute path ``root``. Paths are relative, with ``/``, and already checked.

    Raises ``StorageError`` if something is in the way or the quota is exceeded, else ``OSError``.
    """

    def __init__(self, root: str, quota: Quota) -> None:
        self._root = root
        self._quota = quota
        self._serials = itertools.count(1)  # shared by threads
        self._layout: set[str] = set()  # directories created by ``make``, and their parents
        self._names: dict[
            str, tuple[int, int]
        ] = {}  # directory -> its modification time after our last change, number of names
        self.is_shrinking = False
        """Whether another program was seen removing files; reset by ``forget_names``."""
        self.is_filled = False
        """Whether single files come and go, so that each may be checked twice; set by the caller."""

    # --- reading ---

    def read(self, path: str, offset: int = 0) -> bytes:
        """Return the content of a plain file from ``offset`` on."""
        with self._opened(path, os.O_RDONLY) as handle, open(handle, "rb", closefd=False) as file:
            file.seek(offset)
            return file.read()

    def digest(self, path: str) -> bytes:
        """Return the SHA-256 of a plain file's content."""
        with self._opened(path, os.O_RDONLY) as handle:
            return hash_descriptor(handle)[1].digest()

    # --- writing ---

    def make(self, path: str) -> None:
        """Create a directory and its parents. No other method creates it again."""
        self._layout.difference_update(set(_and_above(path)))
        with self._parent(f"{path}/."):
            pass
        self._layout.update(_and_above(path))

    def replace(
        self, path: str, data: bytes, is_wanted: Callable[[], bool] = lambda: True, *, is_synced: bool = False
    ) -> bool:
        """Write a file atomically, with its parent directories, if ``is_wanted`` still holds at the last moment.

        Returns whether it did. With ``is_synced``, durable on return.
        """
        temporary = self.new_temporary()
        try:
            self.extend(temporary, data, is_synced=is_synced)
            if is_wanted():
                self.move(temporary, path)
                if is_synced:
                    self.sync(path)
                return True
        except BaseException:
            self.discard(temporary)
            raise
        self.discard(temporary)
        return False

    def sync(self, path: str) -> None:
        """Fsync a file and every directory on its path."""
        with self._opened(path, os.O_RDONLY) as handle:
            os.fsync(handle)
        *parents, _ = path.split("/")
        for depth in range(len(parents), -1, -1):
            with self._parent("/".join([*parents[:depth], "."]), make=False) as (handle, _name):
                os.fsync(handle)

    def append(self, path: str, data: bytes) -> None:
        """Append ``data`` in one write; create a missing file."""
        self._quota.take(len(data))
        try:
            with self._opened(path, os.O_WRONLY | os.O_APPEND) as handle:
                if os.fstat(handle).st_nlink == 1:
                    write_all(handle, data)
                    return
        except FileNotFoundError:
            self.replace(path, data)
            return
        self.replace(path, self.read(path) + data)

    def move(self, path: str, to: str) -> None:
        """Rename, replacing ``to``, even if it is an empty directory."""
        with self._parent(path, make=False) as (source, name), self._parent(to) as (target, new_name):
            is_new = self._is_new(to, target, new_name)
            first = _first_name(target) if is_new and self.is_filled else None
            try:
                os.replace(name, new_name, src_dir_fd=source, dst_dir_fd=target)
            except IsADirectoryError:
                os.rmdir(new_name, dir_fd=target)
                os.replace(name, new_name, src_dir_fd=source, dst_dir_fd=target)
                is_new = False
            if first is not None and not _has(target, first):  # removal of a directory begins with its first name
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(new_name, dir_fd=target)
                raise self._shrinking(_parent_of(to))
            self._changed(to, target, is_new)
            self._changed(path, source, -1)

    def remove(self, path: str) -> None:
        with self._parent(path, make=False) as (handle, name):
            os.unlink(name, dir_fd=handle)
            self._changed(path, handle, -1)

    # --- directories that are being removed ---

    def _is_new(self, path: str, directory: int, name: str) -> bool:
        """Return whether a name is new in an open directory and may be added.

        Raises:
            StorageError: another program is removing files there.
        """
        if _has(directory, name):
            return False
        before = self._names.get(parent := _parent_of(path))
        changed_ns = os.fstat(directory).st_mtime_ns
        if before is not None and before[0] != changed_ns:
            count = len(os.listdir(directory))
            if before[1] - count >= _SEVERAL and abs(time.time() - changed_ns / 1e9) < QUIET_S:
                raise self._shrinking(parent)
            self._names[parent] = (changed_ns, count)
        return True

    def _shrinking(self, parent: str) -> StorageError:
        self.is_shrinking = True
        return StorageError(f"files are being removed from {os.path.join(self._root, parent)}")

    def _changed(self, path: str, directory: int, difference: int) -> None:
        """Record the state of an open directory after our own change to one of its names."""
        parent = _parent_of(path)
        if parent == TEMPORARY:
            return
        before = self._names.get(parent)
        count = len(os.listdir(directory)) if before is None else before[1] + difference
        self._names[parent] = (os.fstat(directory).st_mtime_ns, count)

    def forget_names(self) -> None:
        """Accept every directory as it is now."""
        self._names.clear()
        self.is_shrinking = False

    def is_missing_any(self) -> bool:
        """Return whether a directory of the layout is gone."""
        return any(not os.path.isdir(os.path.join(self._root, each)) for each in self._layout)

    def changed_s_ago(self) -> float:
        """Return the seconds since a name was added to or removed from the root or the layout."""
        latest = 0.0
        for each in ("", *self._layout):
            with contextlib.suppress(OSError):
                latest = max(latest, os.stat(os.path.join(self._root, each)).st_mtime)
        return abs(time.time() - latest)

    # --- temporary files ---

    def new_temporary(self) -> str:
        """Return the path of a new temporary file."""
        return f"{TEMPORARY}/{os.getpid()}-{id(self):x}-{next(self._serials)}"

    def extend(self, temporary: str, data: bytes, *, is_synced: bool = False) -> None:
        """Append to a temporary file, creating it first."""
        self._quota.take(len(data))
        with self._opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_APPEND, make=True) as handle:
            write_all(handle, data)
            if is_synced:
                os.fsync(handle)

    def discard(self, temporary: str) -> None:
        """Remove a temporary file, ignoring failure."""
        with contextlib.suppress(OSError, StorageError):
            self.remove(temporary)

    def remove_stale_temporaries(self) -> None:
        """Remove temporary files of killed processes; those of living ones are younger than an hour."""
        for entry in os.scandir(os.path.join(self._root, TEMPORARY)):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE_TEMPORARY_S:
                    os.unlink(entry.path)

    # --- opening ---

    @contextlib.contextmanager
    def _opened(self, path: str, flags: int, *, make: bool = False) -> Iterator[int]:
        """Open a plain file and close it afterwards."""
        mode = self._mode() & 0o666 if make else 0
        with self._parent(path, make=make) as (directory, name):
            try:
                handle = os.open(name, flags | SAFE, mode, dir_fd=directory)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                    raise self._in_the_way(path, "file") from None
                raise
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise self._in_the_way(path, "file")
            if make and not found.st_size:
                _permit(handle, found, mode)
            yield handle
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def _parent(self, path: str, *, make: bool = True) -> Iterator[tuple[int, str]]:
        """Open the parent directory; yield its descriptor and the last component."""
        *parents, name = path.split("/")
        handle = os.open(self._root, _DIRECTORY)
        try:
            for depth, component in enumerate(parents, 1):
                is_fixed = "/".join(parents[:depth]) in self._layout
                try:
                    inner = self._enter(handle, component, make=make and not is_fixed)
                except OSError as error:
                    if error.errno in (errno.ELOOP, errno.ENOTDIR):
                        raise self._in_the_way("/".join(parents[:depth]), "directory") from None
                    raise
                os.close(handle)
                handle = inner
            yield handle, name
        finally:
            os.close(handle)

    def _enter(self, handle: int, name: str, *, make: bool) -> int:
        try:
            return os.open(name, _DIRECTORY, dir_fd=handle)
        except FileNotFoundError:
            if not make:
                raise
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, self._mode(), dir_fd=handle)
        inner = os.open(name, _DIRECTORY, dir_fd=handle)
        _permit(inner, os.fstat(inner), self._mode())
        return inner

    def _mode(self) -> int:
        return os.stat(self._root).st_mode & 0o777

    def _in_the_way(self, path: str, wanted: str) -> StorageError:
        return StorageError(f"{os.path.join(self._root, path)} is in the way: not a plain {wanted}; remove it")


def remove_tree(directory: str) -> None:
    """Remove one of our directories with its content; links are removed, not followed."""
    shutil.rmtree(directory, ignore_errors=True)


def _permit(handle: int, found: os.stat_result, mode: int) -> None:
    """Add the permissions of ``mode`` that a umask removed from a new file."""
    if found.st_mode & 0o777 != mode:
        with contextlib.suppress(PermissionError):  # another user created it first
            os.fchmod(handle, stat.S_IMODE(found.st_mode) & ~0o777 | mode)


def _has(directory: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _first_name(directory: int) -> str | None:
    with os.scandir(directory) as entries:
        return next((entry.name for entry in entries), None)


def _parent_of(path: str) -> str:
    return path.rpartition("/")[0]


def _and_above(path: str) -> Iterator[str]:
    """Yield a directory and its parents below the root."""
    while path:
        yield path
        path = _parent_of(path)
