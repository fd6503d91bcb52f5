"""A project's ``.lattice`` directory as a replicated tree: plain files, replaced or appended atomically (I8).

Nothing is ever written through a symbolic link: a link in place of a file is replaced, one in place of a
directory is an error (I9). No file is synced to the disk one by one: after a power cut the cache is compared
with the server as a whole (see ``state.py``).
"""

import asyncio
import contextlib
import hashlib
import os
import shutil
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator

from filelock import FileLock, Timeout

from lattice_remote.client.known import Known, Signature
from lattice_remote.client.settings import REMOTE_FILE, Remote
from lattice_remote.client.state import STATE_FILE, CacheState, decode_state, encode_state
from lattice_remote.errors import StorageError
from lattice_remote.protocol.messages import Part
from lattice_remote.protocol.paths import is_replicated

__all__ = ["BASE_DIRECTORY", "Cache", "explained"]

BASE_DIRECTORY = ".base"
"""Holds, for each plan and notes, the server's text on which the local file is based."""
_TEMPORARY = ".tmp"
_LOCK = ".cache.lock"
_GITIGNORE = b"# Written by lattice-remote: only the remote's address belongs into git.\n*\n!remote.json\n!.gitignore\n"
_SKELETON = (
    "archive/events",
    "archive/notes",
    "archive/plans",
    "archive/tasks",
    "artifacts/meta",
    "artifacts/payload",
    "events",
    "locks",
    "notes",
    "plans",
    "resources",
    "sessions/archive",
    "tasks",
)
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_STALE_TEMPORARY_S = 3600
_LOCK_POLL_S = 0.01


class Cache:
    """One ``.lattice`` directory. The methods of ``operations.Tree`` must be called under ``locked()``.

    Raises ``StorageError`` where the file system refuses; what was applied before stays whole.
    """

    def __init__(self, directory: str, remote: Remote) -> None:
        self.directory = os.path.realpath(directory)
        self.remote = remote
        self._identity = self._stat_directory()
        self._parts: dict[str, tuple[str, int]] = {}  # path -> temporary file, bytes in it
        self._serial = 0
        self.is_held_by_others = False
        """Whether another process has the lock that this one waits for."""
        self.known = Known(self.directory)
        """The files as our own processes left them."""
        self._lock = FileLock(os.path.join(self.directory, _LOCK), thread_local=False, mode=0o600)

    # --- the directory ---

    def prepare(self) -> None:
        """Make what lattice expects of a directory, and what keeps git from storing the cache."""
        with explained(self.directory):
            for directory in (*_SKELETON, _TEMPORARY, f"{BASE_DIRECTORY}/plans", f"{BASE_DIRECTORY}/notes"):
                self._make_directory(directory)
            ignore = os.path.join(self.directory, ".gitignore")
            if not os.path.lexists(ignore):
                self._write_temporary(_GITIGNORE, ignore)
            self._remove_stale_temporaries()

    def is_whole(self) -> bool:
        """Whether the directories that lattice expects are there."""
        return all(os.path.isdir(os.path.join(self.directory, directory)) for directory in _SKELETON)

    def is_there(self) -> bool:
        """Whether the directory is still the one that was opened, not removed, being removed, or made anew."""
        try:
            here = self._stat_directory() == self._identity
            return here and os.path.lexists(os.path.join(self.directory, REMOTE_FILE))
        except StorageError:
            return False

    @contextlib.asynccontextmanager
    async def locked(self, timeout_s: float = 60.0) -> AsyncIterator[None]:
        """Hold the cache against other processes; may be nested within one task.

        Raises:
            StorageError: the directory is gone, can't be written, or another process holds on to it.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self._check_there()
            try:
                with explained(self.directory):
                    self._lock.acquire(timeout=0)
                break
            except Timeout:
                self.is_held_by_others = True
                if time.monotonic() > deadline:
                    raise StorageError(f"another process has held {self.directory} for {timeout_s:.0f} s") from None
                await asyncio.sleep(_LOCK_POLL_S)
        self.is_held_by_others = False
        try:
            yield
        finally:
            self._lock.release()

    def _check_there(self) -> None:
        if not self.is_there():
            raise StorageError(f"{self.directory} was removed or replaced")

    def _stat_directory(self) -> tuple[int, int]:
        try:
            found = os.stat(self.directory)
        except OSError as error:
            raise StorageError(f"cannot read {self.directory}: {error.strerror}") from error
        return found.st_dev, found.st_ino

    # --- state ---

    def load_state(self) -> CacheState:
        """Return which point of the history the files hold."""
        try:
            return decode_state(self._read_file(STATE_FILE), self.remote)
        except FileNotFoundError:
            return CacheState()
        except OSError as error:
            raise StorageError(f"cannot read the cache's state: {error.strerror}") from error

    def save_state(self, state: CacheState) -> Signature | None:
        """Store which point of the history the files hold; call after the files hold it (I5)."""
        with explained(STATE_FILE):
            self._write_temporary(encode_state(state, self.remote), os.path.join(self.directory, STATE_FILE))
        return self.signature(STATE_FILE)

    def signature(self, path: str) -> Signature | None:
        """Return what tells whether a file was written since, None when there is no plain file."""
        try:
            found = os.lstat(os.path.join(self.directory, path))
        except OSError:
            return None
        if not stat.S_ISREG(found.st_mode):
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino, found.st_ctime_ns

    def absolute(self, path: str) -> str:
        """Return the place on disk of a path of the tree."""
        return os.path.join(self.directory, path)

    # --- the tree (operations.Tree) ---

    def size(self, path: str) -> int | None:
        """Return the file's size in bytes; None when there is no file, or something that is not a plain one."""
        found = self.signature(path)
        return None if found is None else found[1]

    def read(self, path: str, offset: int = 0) -> bytes:
        """Return the content from ``offset`` on."""
        with explained(path):
            return self._read_file(path, offset)

    def digest(self, path: str) -> bytes | None:
        """Return the SHA-256 of the content; None when there is no plain file."""
        with explained(path), contextlib.suppress(FileNotFoundError):
            return None if self.signature(path) is None else _digest_of_file(self.absolute(path))
        return None

    def replace(self, path: str, data: bytes) -> None:
        """Make the file exactly ``data``, atomically, with its parent directories."""
        with explained(path):
            self._write_temporary(data, self._place(path))
            self.note(path)

    def replace_if(self, path: str, data: bytes, found: Signature | None) -> bool:
        """Like ``replace``, but only if the file is still as ``found``, which is looked at as late as can be."""
        with explained(path):
            done = self._write_temporary(data, self._place(path), lambda: self.signature(path) == found)
            if done:
                self.note(path)
            return done

    def append(self, path: str, data: bytes) -> None:
        """Add ``data`` at the end in one write; creates the file."""
        with explained(path):
            is_ours = not self.known.is_complete or self.known.agrees(path, self.signature(path))
            handle = os.open(self._place(path), os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_FOLLOW, 0o644)
            try:
                _write_all(handle, data)
            finally:
                os.close(handle)
            if is_ours:  # what other hands did to the rest of it must still be noticed
                self.note(path)

    def move(self, path: str, to: str) -> None:
        """Rename, replacing what is at ``to``."""
        with explained(path):
            os.replace(self._place(path), self._place(to))
            self.note(path)
            self.note(to)

    def delete(self, path: str) -> None:
        """Remove the file; nothing happens when there is none."""
        with explained(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(self._place(path, make=False))
        self.note(path)

    def note(self, path: str) -> None:
        """The file is as one of us wants it: what differs later was done by other hands."""
        if not path.startswith("."):
            self.known.note(path, self.signature(path))

    # --- files that come in pieces ---

    def write_part(self, part: Part) -> bool | None:
        """Write a piece of a file beside it; the last one puts the file in place.

        Returns:
            True once the file is in place, None while pieces are missing, False when the pieces don't fit
            together or don't add up to the digest: the file must be fetched again.
        """
        if part.offset == 0 and len(part.data) == part.size:
            return self._put_whole(part)
        with explained(part.path):
            temporary, written = self._parts.pop(part.path, ("", 0))
            if part.offset == 0:
                _unlink(temporary)
                temporary, written = self._temporary_path(), 0
            placed: bool | None = False
            try:
                if part.offset == written:
                    placed = self._add_part(part, temporary)
            finally:
                if placed is None:
                    self._parts[part.path] = (temporary, written + len(part.data))
                elif not placed:
                    _unlink(temporary)  # on a full disk most of all: it would stay full of this
            return placed

    def _add_part(self, part: Part, temporary: str) -> bool | None:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_FOLLOW, 0o644)
        try:
            _write_all(handle, part.data)
        finally:
            os.close(handle)
        if part.offset + len(part.data) < part.size:
            return None
        if _digest_of_file(temporary) != part.digest:
            return False
        os.replace(temporary, self._place(part.path))
        self.note(part.path)
        return True

    def forget_parts(self) -> None:
        """Remove what has come of files whose other pieces won't come any more."""
        for temporary, _ in self._parts.values():
            _unlink(temporary)
        self._parts.clear()

    def _put_whole(self, part: Part) -> bool:
        if hashlib.sha256(part.data).digest() != part.digest:
            return False
        self.replace(part.path, part.data)
        return True

    # --- the whole tree ---

    def paths(self) -> Iterator[str]:
        """Yield the path of each replicated plain file, relative to the directory."""
        for directory, directories, names in os.walk(self.directory):
            directories[:] = [name for name in directories if not name.startswith(".")]
            prefix = os.path.relpath(directory, self.directory).replace(os.sep, "/") + "/"
            for name in names:
                path = (prefix + name).removeprefix("./")
                if is_replicated(path) and not os.path.islink(os.path.join(directory, name)):
                    yield path

    # --- how files are written ---

    def _place(self, path: str, *, make: bool = True) -> str:
        """Return the absolute path of a file whose parent directories are real directories."""
        parent, _, _ = path.rpartition("/")
        if make and parent:
            self._make_directory(parent)
        elif parent:
            self._refuse_links(parent)
        return os.path.join(self.directory, path)

    def _make_directory(self, path: str) -> None:
        place = self.directory
        for component in path.split("/"):
            place = os.path.join(place, component)
            with contextlib.suppress(FileExistsError):
                os.mkdir(place)
            _require_directory(place)

    def _refuse_links(self, path: str) -> None:
        place = self.directory
        for component in path.split("/"):
            place = os.path.join(place, component)
            if os.path.lexists(place):
                _require_directory(place)

    def _write_temporary(self, data: bytes, target: str, is_wanted: Callable[[], bool] = lambda: True) -> bool:
        temporary = self._temporary_path()
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o644)
            try:
                _write_all(handle, data)
            finally:
                os.close(handle)
            if is_wanted():
                os.replace(temporary, target)
                return True
        except BaseException:
            _unlink(temporary)
            raise
        _unlink(temporary)
        return False

    def _temporary_path(self) -> str:
        directory = os.path.join(self.directory, _TEMPORARY)
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory)
        _require_directory(directory)
        self._serial += 1
        return os.path.join(directory, f"{os.getpid()}-{id(self):x}-{self._serial}")

    def _remove_stale_temporaries(self) -> None:
        """Remove what processes that were killed left behind; those of living ones are younger than an hour."""
        for entry in os.scandir(os.path.join(self.directory, _TEMPORARY)):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE_TEMPORARY_S:
                    os.unlink(entry.path)

    def _read_file(self, path: str, offset: int = 0) -> bytes:
        handle = os.open(os.path.join(self.directory, path), os.O_RDONLY | _NO_FOLLOW)
        with open(handle, "rb") as file:
            file.seek(offset)
            return file.read()


def remove_tree(directory: str) -> None:
    """Remove a directory that is ours with all that is in it; links in it are removed, not followed."""
    shutil.rmtree(directory, ignore_errors=True)


def _require_directory(place: str) -> None:
    found = os.lstat(place)
    if not stat.S_ISDIR(found.st_mode):
        raise StorageError(f"{place} is in the way: it is a link or a file, not a directory; remove it")


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _digest_of_file(place: str) -> bytes:
    handle = os.open(place, os.O_RDONLY | _NO_FOLLOW)
    with open(handle, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _unlink(place: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(place)


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn an error of the file system into ours, naming the file."""
    try:
        yield
    except Timeout:
        raise  # filelock's own, also an OSError
    except OSError as error:
        raise StorageError(f"cannot write the cache ({what}): {error.strerror or error}") from error
