"""Files below one directory, opened without following links; each replaced or appended atomically (I8).

Every directory on the path is opened relative to the previous one (``openat``): a link, pipe or file put in the way
leads nowhere. A link instead of a file is replaced; one instead of a directory is an error (I9). A file with several
hard links is replaced, not written into. Nothing is fsynced unless requested. New files get the directory's permissions
under any umask, so that its other users can use them.

Nothing is created in a directory that is being removed: ``rm -rf`` keeps it open, lists its names once, and fails if
one appears later. So a name is added only while no other program has the root open, and an existing one is replaced by
an exchange, which cannot create it again.
"""

import contextlib
import ctypes
import errno
import itertools
import os
import shutil
import stat
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator

from lattice_remote.client.config import PRIVATE_DIRECTORY
from lattice_remote.errors import StorageError
from lattice_remote.files import READ, SAFE, hash_descriptor, write_all

__all__ = ["QUIET_S", "TEMPORARY", "Directory", "Quota", "remove_tree"]

TEMPORARY = f"{PRIVATE_DIRECTORY}/tmp"  # noqa: S108 - inside the cache
"""Holds files until they get their name."""
_DIRECTORY = SAFE | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_PATH", os.O_RDONLY)
_STALE_TEMPORARY_S = 3600
QUIET_S = 1.0
"""A directory without a removal for this long is not being removed."""
_LISTING_S = 0.25
"""A program that has the directory open for this long, while nothing changes, only reads it."""
_POLL_S = 0.001


_MIB = 1024 * 1024
_STEP_BYTES = 64 * _MIB
"""Bytes written between two measurements: the limit may be exceeded by this much."""


class Quota:
    def __init__(self, root: str, limit: Callable[[], int], whose: str) -> None:
        self._root = root
        self._limit = limit
        self._whose = whose
        self._unseen = 0  # bytes written since the last measurement
        self._unchecked = 0  # bytes written since the limit was read

    def require(self, size: int) -> None:
        if size > (limit := self._limit()):
            raise StorageError(
                f"this cache would exceed the {limit // _MIB} MiB allowed for {self._whose}; allow more "
                f"with: lattice remote trust {self._whose} --max-cache MIB"
            )

    def require_room(self, size: int) -> None:
        """Require room for ``size`` more bytes, measuring every file. Raises StorageError."""
        self.require(_bytes_below(self._root) + size)

    def take(self, size: int) -> None:
        """Require room to the precision of one step."""
        self._unseen += size
        self._unchecked += size
        if self._unchecked > _MIB:  # the limit is in MiB, and stored in a file
            if self._unseen > min(_STEP_BYTES, self._limit()):
                self.require(_bytes_below(self._root) + size)
                self._unseen = 0
            self._unchecked = 0  # not before: each write after a refusal is measured


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
    """Directory tree below ``root``. Paths are relative, with ``/``, and checked already.

    Raises ``StorageError`` if something is in the way or the quota is exceeded, else ``OSError``.
    """

    def __init__(self, root: str, quota: Quota) -> None:
        self._root = root
        self._quota = quota
        self._serials = itertools.count(1)  # shared by threads
        self._layout: set[str] = set()  # directories created by ``make``, and their parents
        self._root_handle = os.open(root, _DIRECTORY)  # O_PATH: not an opening that other agents would notice
        self._openings = _inotify.watch(self._root_handle)
        weakref.finalize(self, _release, self._root_handle, self._openings).atexit = False
        self._changes = 0  # names added or removed here
        self._listed_at: float | None = None  # when another program was seen to have opened the root (monotonic)
        self._before: tuple[int, list[int]] = 0, []  # ``_changes`` and all times since then
        self._is_shrinking = False

    # --- reading ---

    def read(self, path: str, offset: int = 0) -> bytes:
        with self._opened(path, os.O_RDONLY) as handle, open(handle, "rb", closefd=False) as file:
            file.seek(offset)
            return file.read()

    def digest(self, path: str) -> bytes:
        with self._opened(path, os.O_RDONLY) as handle:
            return hash_descriptor(handle)[1].digest()

    def top_level(self) -> list[tuple[str, bool]]:
        with _readable(self._root_handle) as handle, os.scandir(handle) as entries:
            return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]

    # --- writing ---

    def make(self, path: str) -> None:
        """Create a directory and its parents."""
        self._layout.difference_update(set(_and_above(path)))
        with self._parent(f"{path}/."):
            pass
        self._layout.update(_and_above(path))

    def replace(
        self, path: str, data: bytes, is_wanted: Callable[[], bool] = lambda: True, *, is_synced: bool = False
    ) -> bool:
        """Write a file atomically if ``is_wanted`` holds at the last moment; return whether it did.

        With ``is_synced``, durable on return.
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
        with self._opened(path, os.O_RDONLY) as handle:
            os.fsync(handle)
        for each in (*(f"{each}/." for each in _and_above(_parent_of(path))), "."):
            with self._parent(each, make=False) as (directory, _), _readable(directory) as handle:
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
        with self._parent(path, make=False) as (source, name), self._parent(to) as (target, new_name):
            self._changes += 1
            mode = _mode_of(target, new_name)
            if stat.S_ISDIR(mode):
                os.rmdir(new_name, dir_fd=target)
            if not mode or stat.S_ISDIR(mode):
                self._add(
                    lambda: os.replace(name, new_name, src_dir_fd=source, dst_dir_fd=target),
                    undo=lambda: os.replace(new_name, name, src_dir_fd=target, dst_dir_fd=source),
                )
            elif path.startswith(PRIVATE_DIRECTORY) and _exchange(source, name, target, new_name):
                os.unlink(name, dir_fd=source)
            else:  # no reader may see a project file under another one's name
                os.replace(name, new_name, src_dir_fd=source, dst_dir_fd=target)

    def remove(self, path: str) -> None:
        with self._parent(path, make=False) as (handle, name):
            self._changes += 1
            os.unlink(name, dir_fd=handle)

    # --- directories that are being removed ---

    def is_being_removed(self) -> bool:
        """Return whether another program removes the directory, or may be about to."""
        if self._is_listed():
            return True
        times = self._times()
        if not self._is_shrinking and all(times):
            return False
        self._is_shrinking = abs(time.time() - max(times) / 1e9) < QUIET_S  # else it was a mistake, some time ago
        return self._is_shrinking

    def _is_listed(self) -> bool:
        """Return whether another program has just opened the directory."""
        openings = _inotify.update(self._openings)
        if self._listed_at is None and not openings.now:
            return False
        times, is_new = self._times(), self._listed_at is None
        if self._listed_at is None:
            self._listed_at = time.monotonic()
        if is_new or self._before[0] != self._changes:
            self._before = self._changes, times
        if openings.now and times == self._before[1] and time.monotonic() - self._listed_at < _LISTING_S:
            return True
        self._is_shrinking |= times != self._before[1] if openings.now else not all(times)
        openings.now, self._listed_at = 0, None
        return False

    def _times(self) -> list[int]:
        found = []
        for each in (".", *self._layout):
            try:
                found.append(os.stat(each, dir_fd=self._root_handle).st_mtime_ns)
            except OSError:
                found.append(0)
        return found

    def _add(self, add: Callable[[], object], undo: Callable[[], object]) -> None:
        """Add a name; if another program opened the root during that, undo it and try again.

        Blocks the thread for up to ``_LISTING_S`` per opening.

        Raises:
            StorageError: the directory is being removed.
        """
        while True:
            while self._is_listed():
                time.sleep(_POLL_S)
            if self._is_shrinking and self.is_being_removed():
                raise StorageError(f"files are being removed from {self._root}")
            before = self._openings.total
            self._changes += 1
            add()
            if _inotify.update(self._openings).total == before:
                return
            self._changes += 1
            undo()

    # --- temporary files ---

    def new_temporary(self) -> str:
        return f"{TEMPORARY}/{os.getpid()}-{id(self):x}-{next(self._serials)}"

    def extend(self, temporary: str, data: bytes, *, is_synced: bool = False) -> None:
        """Append to a temporary file, creating it first."""
        self._quota.take(len(data))
        with self._opened(temporary, os.O_WRONLY | os.O_APPEND, make=True) as handle:
            write_all(handle, data)
            if is_synced:
                os.fsync(handle)

    def discard(self, temporary: str) -> None:
        with contextlib.suppress(OSError, StorageError):
            self.remove(temporary)

    def remove_stale_temporaries(self) -> None:
        """Remove killed processes' temporary files: those older than an hour."""
        for entry in os.scandir(os.path.join(self._root, TEMPORARY)):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE_TEMPORARY_S:
                    os.unlink(entry.path)

    @contextlib.contextmanager
    def _opened(self, path: str, flags: int, *, make: bool = False) -> Iterator[int]:
        mode = self._mode() & 0o666 if make else 0
        with self._parent(path, make=make) as (directory, name):
            try:
                if make and not _mode_of(directory, name):
                    self._add(
                        lambda: os.close(os.open(name, os.O_WRONLY | os.O_CREAT | SAFE, mode, dir_fd=directory)),
                        undo=lambda: os.unlink(name, dir_fd=directory),
                    )
                handle = os.open(name, flags | SAFE, dir_fd=directory)
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
        *parents, name = path.split("/")
        handle = self._root_handle
        try:
            for depth, component in enumerate(parents, 1):
                is_fixed = "/".join(parents[:depth]) in self._layout
                try:
                    inner = self._enter(handle, component, make=make and not is_fixed)
                except OSError as error:
                    if error.errno in (errno.ELOOP, errno.ENOTDIR):
                        raise self._in_the_way("/".join(parents[:depth]), "directory") from None
                    raise
                if handle != self._root_handle:
                    os.close(handle)
                handle = inner
            yield handle, name
        finally:
            if handle != self._root_handle:
                os.close(handle)

    def _enter(self, handle: int, name: str, *, make: bool) -> int:
        try:
            return os.open(name, _DIRECTORY, dir_fd=handle)
        except FileNotFoundError:
            if not make:
                raise
        with contextlib.suppress(FileExistsError):
            self._add(lambda: os.mkdir(name, self._mode(), dir_fd=handle), undo=lambda: os.rmdir(name, dir_fd=handle))
        inner = os.open(name, _DIRECTORY, dir_fd=handle)
        with _readable(inner) as readable:
            _permit(readable, os.fstat(readable), self._mode())
        return inner

    def _mode(self) -> int:
        return os.stat(self._root_handle).st_mode & 0o777

    def _in_the_way(self, path: str, wanted: str) -> StorageError:
        return StorageError(f"{os.path.join(self._root, path)} is in the way: not a plain {wanted}; remove it")


def remove_tree(directory: str) -> None:
    """Remove a directory of ours; links are not followed."""
    shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _readable(directory: int) -> Iterator[int]:
    handle = os.open(".", READ, dir_fd=directory)
    try:
        yield handle
    finally:
        os.close(handle)


def _permit(handle: int, found: os.stat_result, mode: int) -> None:
    if found.st_mode & 0o777 != mode:
        with contextlib.suppress(PermissionError):  # another user created it first
            os.fchmod(handle, stat.S_IMODE(found.st_mode) & ~0o777 | mode)


def _mode_of(directory: int, name: str) -> int:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return 0


def _parent_of(path: str) -> str:
    return path.rpartition("/")[0]


def _and_above(path: str) -> Iterator[str]:
    while path:
        yield path
        path = _parent_of(path)


# --- the system ---

_libc = ctypes.CDLL(None, use_errno=True)
_RENAME_EXCHANGE = 2
_IN_CLOSE_NOWRITE, _IN_OPEN, _IN_OVERFLOW, _IN_IGNORED = 0x10, 0x20, 0x4000, 0x8000
_EVENT = struct.Struct("iIII")
_EVENTS_BYTES = 65536


def _exchange(source: int, name: str, target: int, new_name: str) -> bool:
    """Exchange two existing names atomically; return whether the system can. Raises FileNotFoundError."""
    if not hasattr(_libc, "renameat2"):
        return False
    if not _libc.renameat2(source, os.fsencode(name), target, os.fsencode(new_name), _RENAME_EXCHANGE):
        return True
    if (code := ctypes.get_errno()) in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), new_name)


class _Openings:
    __slots__ = ("now", "total", "users", "watch")

    def __init__(self, watch: int) -> None:
        self.watch = watch
        self.users = 0
        self.now = 0
        """How many have it open."""
        self.total = 0


class _Inotify:
    """Counts of directories' openings, from one descriptor: a user may have only 128."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all: in a child process the events are the parent's."""
        self._lock = threading.RLock()  # a finalizer may run at any moment
        self._handle = -1
        self._watched: dict[int, _Openings] = {}

    def watch(self, directory: int) -> _Openings:
        with self._lock:
            if self._handle < 0 and hasattr(_libc, "inotify_init1"):
                self._handle = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            number = -1
            if self._handle >= 0:
                place = f"/proc/self/fd/{directory}".encode()
                number = _libc.inotify_add_watch(self._handle, place, _IN_OPEN | _IN_CLOSE_NOWRITE)
            openings = self._watched.setdefault(number, _Openings(number))
            openings.users += 1
            return openings

    def forget(self, openings: _Openings) -> None:
        with self._lock:
            openings.users -= 1
            if not openings.users and self._watched.get(openings.watch) is openings:
                del self._watched[openings.watch]
                _libc.inotify_rm_watch(self._handle, openings.watch)

    def update(self, openings: _Openings) -> _Openings:
        """Return current counts: an opening is reported before it returns to the program."""
        if openings.watch >= 0:
            with self._lock, contextlib.suppress(BlockingIOError):
                while True:
                    self._take(os.read(self._handle, _EVENTS_BYTES))
        return openings

    def _take(self, events: bytes) -> None:
        offset = 0
        while offset < len(events):
            number, mask, _cookie, size = _EVENT.unpack_from(events, offset)
            offset += _EVENT.size + size
            if mask & _IN_OVERFLOW:
                for openings in list(self._watched.values()):
                    openings.now, openings.total = 0, openings.total + 1
            elif mask & _IN_IGNORED:
                self._watched.pop(number, None)
            elif not size and number in self._watched:  # with a name, it is about a file inside
                openings, is_opened = self._watched[number], bool(mask & _IN_OPEN)
                openings.total += is_opened
                openings.now = max(0, openings.now + (1 if is_opened else -1))


_inotify = _Inotify()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_inotify.reset)


def _release(handle: int, openings: _Openings) -> None:
    os.close(handle)
    _inotify.forget(openings)
