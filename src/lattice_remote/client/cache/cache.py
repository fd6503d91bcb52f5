"""A project's ``.lattice`` directory as a replicated tree: plain files, replaced or appended atomically (I8).

Files are not fsynced one by one: after a power cut the whole cache is compared with the server (see ``decode_state``).
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from lattice_remote.client.agent_runtime import boot_time
from lattice_remote.client.cache.fingerprints import STORED, WRITTEN_LOG, Fingerprints
from lattice_remote.client.cache.safe_directory import TEMPORARY, Directory, Quota
from lattice_remote.client.config import PRIVATE_DIRECTORY, REMOTE_FILE, STATE_FILE, Remote
from lattice_remote.client.trusted_servers import cache_limit
from lattice_remote.errors import HostilePath, StorageError
from lattice_remote.files import READ, SAFE, Signature, signature_of
from lattice_remote.protocol.messages import NOWHERE, Part, Position
from lattice_remote.protocol.operations import Content
from lattice_remote.protocol.paths import DIRECTORIES, check_path, is_replicated

__all__ = [
    "BASE_DIRECTORY",
    "GITIGNORE",
    "LOCKS_FILE",
    "LOCKS_TEXT",
    "LOCK_FILE",
    "STATE_FILE",
    "WATCHES_DIRECTORY",
    "Cache",
    "CacheLock",
    "CacheState",
    "boot_id",
    "booted_at",
    "decode_state",
    "encode_deferred",
    "encode_state",
    "storage_errors",
]


@dataclass(frozen=True, slots=True)
class CacheState:
    position: Position = NOWHERE
    """Every change up to here is in the files, except in the ``missing`` ones."""
    missing: tuple[str, ...] = ()
    """Paths whose content must still be fetched."""
    deferred: Mapping[str, Content | None] = field(default_factory=dict)
    """Deferred contents of artifacts, see ``Replica.deferred``."""
    current_at: float | None = None
    """Last time (seconds since 1970) at which the files had every change of the server; None: never."""

    @property
    def is_filled(self) -> bool:
        return self.current_at is not None


def encode_state(state: CacheState, remote: Remote, inode: int = 0) -> bytes:
    """Return the content of the state file; ``inode`` is that of the cache's directory."""
    fields = {
        "epoch": state.position.epoch,
        "seq": state.position.seq,
        "mark": state.position.mark.hex(),
        "missing": sorted(state.missing),
        "deferred": len(state.deferred),
        "time": state.current_at,
        "boot_id": boot_id(),
        "inode": inode,
        "url": remote.url,
        "project": remote.project,
    }
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def encode_deferred(deferred: Mapping[str, Content | None]) -> bytes:
    """Return the content of the file of deferred contents; it is written before the state."""
    entries = {path: content and [content[0], content[1].hex()] for path, content in sorted(deferred.items())}
    return (json.dumps(entries, indent=0) + "\n").encode()


def _decode_deferred(data: bytes) -> dict[str, Content | None]:
    entries: dict[str, list[object] | None] = json.loads(data)
    return {
        check_path(path): None if entry is None else (int(str(entry[0])), bytes.fromhex(str(entry[1])))
        for path, entry in entries.items()
    }


def decode_state(data: bytes, contents: bytes, remote: Remote, inode: int = 0) -> CacheState:
    """Return the stored state as far as it is reliable.

    State of another project is ignored. After a reboot, and in a directory that git or a copy tool brought, files may
    lag behind the number: the position is ``NOWHERE``, and all files are compared (I5).
    """
    try:
        found = json.loads(data)
        if (found["url"], found["project"]) != (remote.url, remote.project):
            return CacheState()
        position = Position(str(found["epoch"]), int(found["seq"]), bytes.fromhex(found["mark"]))
        current_at = None if found["time"] is None else float(found["time"])
        missing = tuple(_checked(found["missing"]))
        deferred = _decode_deferred(contents) if found["deferred"] else {}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, HostilePath):
        return CacheState()
    if found["boot_id"] != boot_id() or found.get("inode", inode) != inode:
        return CacheState(NOWHERE, (), {}, current_at)
    return CacheState(position, missing, deferred, current_at)


def _checked(paths: Iterable[object]) -> Iterable[str]:
    return (check_path(str(path)) for path in paths)


def boot_id() -> str:
    global _boot_id  # noqa: PLW0603 - constant once read
    if _boot_id is None:
        try:
            with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
                _boot_id = file.read().strip()
        except OSError:
            _boot_id = ""
    return _boot_id


def booted_at() -> float:
    """Return the boot time (seconds since 1970); 0 if there is no boot id."""
    return time.time() - boot_time() if boot_id() else 0.0


_boot_id: str | None = None


_DEFERRED_FILE = f"{PRIVATE_DIRECTORY}/deferred.json"
BASE_DIRECTORY = f"{PRIVATE_DIRECTORY}/base"
"""Holds, for each plan and notes, the server's text on which the local file is based."""
_DOWNLOADS = f"{PRIVATE_DIRECTORY}/downloads"
"""Holds the parts of large contents that are being fetched, named by digest."""
LOCK_FILE = f"{PRIVATE_DIRECTORY}/lock"
WATCHES_DIRECTORY = f"{PRIVATE_DIRECTORY}/watches"
GITIGNORE = b"# Written by lattice-remote: only the remote's address belongs into git.\n*\n!remote.json\n"
LOCKS_FILE = "locks"
LOCKS_TEXT = b"""\
This directory is a cache of a project on a server; see remote.json. This file takes the place of lattice's lock
directory, so that a lattice without lattice-remote can read here, but fails before it writes: the server would not
receive its changes.

To write, install lattice-remote beside the lattice that failed: pip install lattice-remote
For MCP, run lattice remote mcp instead of lattice-mcp.
To make this directory a local project again: lattice remote remove NAME --keep-local
"""
_DIRECTORIES = tuple(directory for directory in DIRECTORIES if directory != LOCKS_FILE)
_LAYOUT = (*_DIRECTORIES, TEMPORARY, _DOWNLOADS, f"{BASE_DIRECTORY}/plans", f"{BASE_DIRECTORY}/notes")
_LOCK_POLL_S = 0.01


class Cache:
    """One ``.lattice`` directory. Call the methods of ``operations.Tree`` under ``locked()``.

    Raises ``StorageError`` if the file system refuses.
    """

    def __init__(self, directory: str, remote: Remote) -> None:
        self.directory = os.path.realpath(directory)
        self.remote = remote
        self.identity = self._stat_directory()
        """Device and inode of the directory."""
        self.quota = Quota(self.directory, lambda: cache_limit(remote.url), remote.url)
        """Size limit of the cache."""
        with storage_errors(self.directory):
            self._files = Directory(self.directory, self.quota)
        self._deferred = b""  # content of the file of deferred contents
        self._parts: dict[str, tuple[str, int]] = {}  # path -> temporary file, bytes in it
        self.held_since: float | None = None
        """Time (monotonic) since which this process waits for another's lock; None: it does not wait."""
        self.known = Fingerprints(self.directory)
        """Signatures of the files as our own processes left them."""
        self._lock = self.file_lock(LOCK_FILE)

    # --- the directory ---

    def prepare(self) -> None:
        with storage_errors(self.directory):
            for directory in _LAYOUT:
                self._files.make(directory)
            if not os.path.lexists(self.absolute(".gitignore")):
                self._files.replace(".gitignore", GITIGNORE)
            self._files.extend(WRITTEN_LOG, b"")
            self._files.remove_stale_temporaries()
            self._block_plain_writes()

    def open_directory(self, path: str) -> int:
        """Create a directory and its parents; return its descriptor. Raises OSError."""
        self._files.make(path)
        return os.open(self.absolute(path), READ | os.O_DIRECTORY)

    def make_private(self) -> None:
        with storage_errors(PRIVATE_DIRECTORY):
            for directory in (PRIVATE_DIRECTORY, WATCHES_DIRECTORY):
                self._files.make(directory)

    def _block_plain_writes(self) -> None:
        """Replace lattice's lock directory by a file, so that writes without the plugin fail at once (I4).

        Skipped in a project that waits to be pushed.
        """
        if self._blocks_plain_writes() or not os.path.lexists(os.path.join(self.directory, REMOTE_FILE)):
            return
        place = self.absolute(LOCKS_FILE)
        with contextlib.suppress(OSError):  # other files inside: what plain lattice writes is rescued
            if os.path.isdir(place) and not os.path.islink(place):
                for name in os.listdir(place):
                    if name.endswith(".lock"):
                        self._files.remove(f"{LOCKS_FILE}/{name}")
            self._files.replace(LOCKS_FILE, LOCKS_TEXT)  # also replaces an empty directory

    def _blocks_plain_writes(self) -> bool:
        return self.signature(LOCKS_FILE) is not None

    def allow_plain_writes(self) -> None:
        """Restore lattice's lock directory before this becomes a local project."""
        with storage_errors(LOCKS_FILE):
            if self._blocks_plain_writes():
                self._files.remove(LOCKS_FILE)
            self._files.make(LOCKS_FILE)

    @property
    def is_held_by_others(self) -> bool:
        return self.held_since is not None

    def is_whole(self) -> bool:
        directories = all(os.path.isdir(os.path.join(self.directory, directory)) for directory in _DIRECTORIES)
        return directories and self._blocks_plain_writes()

    def is_there(self) -> bool:
        try:
            here = self._stat_directory() == self.identity
            return here and os.path.lexists(os.path.join(self.directory, REMOTE_FILE))
        except StorageError:
            return False

    @contextlib.asynccontextmanager
    async def locked(self, timeout_s: float = 60.0) -> AsyncIterator[None]:
        """Lock the cache against other processes; may be nested within one task.

        Raises:
            StorageError: the directory is gone or not writable, or another process keeps the lock.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self._check_there()
            await self._until_quiet(deadline)
            with storage_errors(self.directory):
                if self._lock.acquire():
                    break
            if self.held_since is None:
                self.held_since = time.monotonic()
            if time.monotonic() > deadline:
                raise StorageError(f"{self.directory} was locked by another process for {timeout_s:.0f} s")
            await asyncio.sleep(_LOCK_POLL_S)
        self.held_since = None
        try:
            self._check_there()  # the previous holder may have made it a local project
            yield
        finally:
            self._lock.release()

    def file_lock(self, path: str) -> "CacheLock":
        def make() -> None:
            with storage_errors(path):
                self._files.make(PRIVATE_DIRECTORY)
                self._files.extend(path, b"")

        return CacheLock(self.absolute(path), make)

    async def _until_quiet(self, deadline: float) -> None:
        while self._files.is_being_removed() and time.monotonic() < deadline:
            await asyncio.sleep(_LOCK_POLL_S)
            self._check_there()

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
        try:
            deferred = b""
            with contextlib.suppress(FileNotFoundError):
                deferred = self._files.read(_DEFERRED_FILE)
            self._deferred = deferred
            return decode_state(self._files.read(STATE_FILE), deferred, self.remote, self.identity[1])
        except FileNotFoundError:
            return CacheState()
        except OSError as error:
            raise StorageError(f"cannot read the cache's state: {error.strerror}") from error

    def save_state(self, state: CacheState) -> Signature | None:
        """Store the state, after the files are in place (I5).

        Deferred contents are stored first: after a crash between the two, extra entries show when they are fetched.
        """
        with storage_errors(STATE_FILE):
            if (deferred := encode_deferred(state.deferred)) != self._deferred:
                self._files.replace(_DEFERRED_FILE, deferred)
                self._deferred = deferred
            self._files.replace(STATE_FILE, encode_state(state, self.remote, self.identity[1]))
        return self.signature(STATE_FILE)

    def load_known(self) -> None:
        if not self.known.is_complete and self.size(STORED) is not None:
            self.known.restore(self.read(STORED), boot_id())
        self.known.learn()

    def store_known(self) -> None:
        self.known.share()
        if (data := self.known.stored(boot_id())) is not None:
            self.replace(STORED, data)

    def signature(self, path: str) -> Signature | None:
        """Return a signature that changes with every write; None without a plain file."""
        try:
            found = os.lstat(os.path.join(self.directory, path))
        except OSError:
            return None
        if not stat.S_ISREG(found.st_mode):
            return None
        return signature_of(found)

    def absolute(self, path: str) -> str:
        return os.path.join(self.directory, path)

    # --- the tree (operations.Tree) ---

    def size(self, path: str) -> int | None:
        found = self.signature(path)
        return None if found is None else found[1]

    def read(self, path: str, offset: int = 0) -> bytes:
        with storage_errors(path):
            return self._files.read(path, offset)

    def digest(self, path: str) -> bytes | None:
        with storage_errors(path), contextlib.suppress(FileNotFoundError):
            return None if self.signature(path) is None else self._files.digest(path)
        return None

    def store(self, path: str, data: bytes) -> None:
        """Write a private file atomically; durable on return."""
        with storage_errors(path):
            self._files.replace(path, data, is_synced=True)

    def replace(self, path: str, data: bytes) -> None:
        with storage_errors(path):
            self._files.replace(path, data)
            self.note(path)

    def sync(self, paths: Iterable[str]) -> None:
        for path in paths:
            with storage_errors(path):
                self._files.sync(path)

    def replace_if(self, path: str, data: bytes, found: Signature | None) -> bool:
        """Replace the file only if its signature is still ``found``, checked as late as possible."""
        with storage_errors(path):
            done = self._files.replace(path, data, lambda: self.signature(path) == found)
            if done:
                self.note(path)
            return done

    def append(self, path: str, data: bytes) -> None:
        """Append in one write; create the file, also instead of a link."""
        found = self.signature(path)
        if found is None:
            self.replace(path, data)
            return
        is_ours = not self.known.is_complete or self.known.agrees(path, found)
        with storage_errors(path):
            self._files.append(path, data)
            if is_ours:  # a modification of the rest must still be noticed
                self.note(path)

    def move(self, path: str, to: str) -> None:
        with storage_errors(path):
            self._files.move(path, to)
            self.note(path)
            self.note(to)

    def delete(self, path: str) -> None:
        """Remove a file or link; ignore a directory."""
        with storage_errors(path), contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            self._files.remove(path)
        self.note(path)

    def note(self, path: str) -> None:
        if not path.startswith("."):
            self.known.note(path, self.signature(path))

    # --- files received in parts ---

    def write_part(self, part: Part, place: Callable[[str, bytes], bool] | None = None) -> bool | None:
        """Write a part to a temporary file; the last part puts it in place.

        Returns:
            True once in place, None while parts are missing, False if the file must be fetched again.
        """
        if part.offset == 0 and len(part.data) == part.size:
            return self._put_whole(part, place)
        self.quota.require(part.size)
        with storage_errors(part.path):
            temporary, written = self._parts.pop(part.path, ("", 0))
            if part.offset == 0:
                self._files.discard(temporary)
                temporary, written = self._files.new_temporary(), 0
            placed: bool | None = False
            try:
                if part.offset == written:
                    placed = self._add_part(part, temporary, place)
            finally:
                if placed is None:
                    self._parts[part.path] = (temporary, written + len(part.data))
                elif not placed:
                    self._files.discard(temporary)  # especially on a full disk, which it would keep full
            return placed

    def _add_part(self, part: Part, temporary: str, place: Callable[[str, bytes], bool] | None) -> bool | None:
        self._files.extend(temporary, part.data)
        if part.offset + len(part.data) < part.size:
            return None
        if self._files.digest(temporary) != part.digest:
            return False
        if place is not None:
            data = self._files.read(temporary)
            self._files.discard(temporary)
            return place(part.path, data)
        self._files.move(temporary, part.path)
        self.note(part.path)
        return True

    def forget_parts(self) -> None:
        for temporary, _ in self._parts.values():
            self._files.discard(temporary)
        self._parts.clear()

    def _put_whole(self, part: Part, place: Callable[[str, bytes], bool] | None) -> bool:
        if hashlib.sha256(part.data).digest() != part.digest:
            return False
        if place is not None:
            return place(part.path, part.data)
        self.replace(part.path, part.data)
        return True

    # --- background downloads ---

    def partial(self, digest: bytes) -> str:
        """Return the file that collects a content's parts."""
        return f"{_DOWNLOADS}/{digest.hex()}"

    def add(self, partial: str, data: bytes) -> None:
        with storage_errors(partial):
            self._files.extend(partial, data)

    def place(self, partial: str, path: str) -> None:
        with storage_errors(path):
            self._files.move(partial, path)
            self.note(path)

    def discard(self, partial: str) -> None:
        self._files.discard(partial)

    def discard_partials(self, keep: Iterable[bytes]) -> None:
        kept = {digest.hex() for digest in keep}
        with contextlib.suppress(OSError):
            for name in os.listdir(self.absolute(_DOWNLOADS)):
                if name not in kept:
                    self._files.discard(f"{_DOWNLOADS}/{name}")

    # --- listing ---

    def paths(self) -> Iterator[str]:
        with storage_errors(self.directory):
            top = self._files.top_level()
        for name, is_directory in top:
            if not is_directory:
                if is_replicated(name) and not os.path.islink(self.absolute(name)):
                    yield name
            elif not name.startswith("."):
                yield from self._paths_below(name)

    def _paths_below(self, directory: str) -> Iterator[str]:
        try:
            with os.scandir(self.absolute(directory)) as found:
                entries = list(found)  # does not keep the directory open between two paths
        except OSError:
            return  # removed since
        for entry in entries:
            path = f"{directory}/{entry.name}"
            if not entry.is_dir(follow_symlinks=False):
                if is_replicated(path) and not entry.is_symlink():
                    yield path
            elif not entry.name.startswith("."):
                yield from self._paths_below(path)


class CacheLock:
    """Lock between processes; nested use is counted. ``make`` creates the file."""

    def __init__(self, place: str, make: Callable[[], None]) -> None:
        self._place = place
        self._make = make
        self._handle: int | None = None
        self._depth = 0

    def acquire(self) -> bool:
        if self._handle is None:
            if not os.path.lexists(self._place):
                self._make()
            handle = os.open(self._place, os.O_RDWR | SAFE)
            if not _is_locked(handle):
                os.close(handle)
                return False
            self._handle = handle
        self._depth += 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if self._depth == 0 and self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _is_locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(handle).st_nlink > 0


@contextlib.contextmanager
def storage_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        if isinstance(error, PermissionError):
            why += ", see lattice remote doctor"
        raise StorageError(f"cannot write the cache ({what}): {why}") from error
