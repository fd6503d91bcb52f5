"""A project's ``.lattice`` directory as a replicated tree: plain files, replaced or appended atomically (I8).

How a file is reached, never through a link, is for ``directory.py``. No file is synced to the disk one by one: after
a power cut the cache is compared with the server as a whole (see ``state.py``). Saves that wait to be sent are the
exception (see ``evidence.py``).
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
from lattice_remote.client.cache.fingerprints import STORED, Fingerprints, Signature
from lattice_remote.client.cache.safe_directory import QUIET_S, TEMPORARY, Directory
from lattice_remote.client.config import REMOTE_FILE, STATE_FILE, Quota, Remote
from lattice_remote.client.trusted_servers import cache_limit
from lattice_remote.errors import HostilePath, StorageError
from lattice_remote.protocol.effects import NOWHERE, Content, Position
from lattice_remote.protocol.messages import Part
from lattice_remote.protocol.paths import DIRECTORIES, check_path, is_replicated

__all__ = [
    "AWAY_FILE",
    "BASE_DIRECTORY",
    "GITIGNORE",
    "LOCKS_FILE",
    "LOCKS_TEXT",
    "LOCK_FILE",
    "PARTIAL",
    "PRIVATE_DIRECTORY",
    "STATE_FILE",
    "Cache",
    "CacheState",
    "boot_id",
    "booted_at",
    "decode_state",
    "encode_away",
    "encode_state",
    "explained",
]

AWAY_FILE = ".away"


@dataclass(frozen=True, slots=True)
class CacheState:
    """What the last process that changed the cache knew of it."""

    position: Position = NOWHERE
    """Every change up to here is in the files, except in the ``wanted`` ones."""
    wanted: tuple[str, ...] = ()
    """Paths whose content is still to come from the server."""
    away: Mapping[str, Content | None] = field(default_factory=dict)
    """Contents of artifacts that are left out, see ``Replica.away``."""
    current_at: float | None = None
    """When the files were last known to be all that the server had (seconds since 1970); None: never yet."""

    @property
    def is_filled(self) -> bool:
        """Whether the files were ever complete, so that there is something to show."""
        return self.current_at is not None


def encode_state(state: CacheState, remote: Remote) -> bytes:
    """Return the file's content."""
    fields = {
        "epoch": state.position.epoch,
        "seq": state.position.seq,
        "mark": state.position.mark.hex(),
        "wanted": sorted(state.wanted),
        "away": len(state.away),
        "time": state.current_at,
        "boot_id": boot_id(),
        "url": remote.url,
        "project": remote.project,
    }
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def encode_away(away: Mapping[str, Content | None]) -> bytes:
    """Return the content of the file that is written before the state, whenever it has changed."""
    entries = {path: content and [content[0], content[1].hex()] for path, content in sorted(away.items())}
    return (json.dumps(entries, indent=0) + "\n").encode()


def _decode_away(data: bytes) -> dict[str, Content | None]:
    entries: dict[str, list[object] | None] = json.loads(data)
    return {
        check_path(path): None if entry is None else (int(str(entry[0])), bytes.fromhex(str(entry[1])))
        for path, entry in entries.items()
    }


def decode_state(data: bytes, away: bytes, remote: Remote) -> CacheState:
    """Return what the two files say, as far as it can be relied on.

    Of another project it says nothing. After a reboot the files, which are not synced to the disk one by one,
    may hold less than the number says: the position is then nowhere, and they are compared as a whole.
    """
    try:
        found = json.loads(data)
        if (found["url"], found["project"]) != (remote.url, remote.project):
            return CacheState()
        position = Position(str(found["epoch"]), int(found["seq"]), bytes.fromhex(found["mark"]))
        current_at = None if found["time"] is None else float(found["time"])
        wanted = tuple(_checked(found["wanted"]))
        left_out = _decode_away(away) if found.get("away") else {}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, HostilePath):
        return CacheState()
    if found["boot_id"] != boot_id():
        return CacheState(NOWHERE, (), {}, current_at)
    return CacheState(position, wanted, left_out, current_at)


def _checked(paths: Iterable[object]) -> Iterable[str]:
    return (check_path(str(path)) for path in paths)


def boot_id() -> str:
    """Return what tells this start of the machine from others; empty where the system doesn't say."""
    global _boot_id  # noqa: PLW0603 - constant once read
    if _boot_id is None:
        try:
            with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
                _boot_id = file.read().strip()
        except OSError:
            _boot_id = ""
    return _boot_id


def booted_at() -> float:
    """Return when this machine was started (seconds since 1970); 0 where the system does not identify its starts."""
    return time.time() - boot_time() if boot_id() else 0.0


_boot_id: str | None = None


BASE_DIRECTORY = ".base"
"""Holds, for each plan and notes, the server's text on which the local file is based."""
PARTIAL = ".fetch"
"""Holds, for each large content that is being fetched, what has come of it, by its digest."""
PRIVATE_DIRECTORY = ".remote"
"""Holds what else only this client knows."""
LOCK_FILE = ".cache.lock"
GITIGNORE = b"# Written by lattice-remote: only the remote's address belongs into git.\n*\n!remote.json\n"
LOCKS_FILE = "locks"
LOCKS_TEXT = b"""\
This directory is a copy of a board on a server; see remote.json. This file stands where lattice looks for its
lock files, so that a lattice which does not know of the server can read here, but fails before it writes: the
server would not get what it writes.

To write, install lattice-remote beside the lattice that failed: pip install lattice-remote
For MCP, run lattice remote mcp instead of lattice-mcp.
To make this directory a local project again: lattice remote remove NAME --keep-local
"""
_DIRECTORIES = tuple(directory for directory in DIRECTORIES if directory != LOCKS_FILE)
_PRIVATE = (TEMPORARY, PARTIAL, PRIVATE_DIRECTORY, f"{BASE_DIRECTORY}/plans", f"{BASE_DIRECTORY}/notes")
_LAYOUT = (*_DIRECTORIES, *_PRIVATE)
_LOCK_POLL_S = 0.01


class Cache:
    """One ``.lattice`` directory. The methods of ``operations.Tree`` must be called under ``locked()``.

    Raises ``StorageError`` where the file system refuses; what was applied before stays whole.
    """

    def __init__(self, directory: str, remote: Remote) -> None:
        self.directory = os.path.realpath(directory)
        self.remote = remote
        self.identity = self._stat_directory()
        """Device and inode of the directory."""
        self.quota = Quota(self.directory, lambda: cache_limit(remote.url), remote.url)
        """How large the server may make it."""
        self._files = Directory(self.directory, self.quota)
        self._away = b""  # what the file of left out contents holds
        self._parts: dict[str, tuple[str, int]] = {}  # path -> temporary file, bytes in it
        self._present: set[str] = set()  # the files of ours at the top that were there
        self.held_since: float | None = None
        """Since when (monotonic) this process waits for the lock that another one has; None: it does not wait."""
        self.known = Fingerprints(self.directory)
        """The files as our own processes left them."""
        self._lock = _Lock(os.path.join(self.directory, LOCK_FILE))

    # --- the directory ---

    def prepare(self) -> None:
        """Make what lattice expects of a directory, and what keeps git from storing the cache."""
        with explained(self.directory):
            for directory in _LAYOUT:
                self._files.make(directory)
            if not os.path.lexists(self.absolute(".gitignore")):
                self._files.replace(".gitignore", GITIGNORE)
            self._files.remove_stale_temporaries()
            self._block_plain_writes()

    def _block_plain_writes(self) -> None:
        """Put a file where lattice makes its locks: without our plugin every write then fails at its first step (I4).

        A project that waits to be pushed is none of ours yet.
        """
        if self._blocks_plain_writes() or not os.path.lexists(os.path.join(self.directory, REMOTE_FILE)):
            return
        place = self.absolute(LOCKS_FILE)
        with contextlib.suppress(OSError):  # other files in there: what plain lattice writes is rescued
            if os.path.isdir(place) and not os.path.islink(place):
                for name in os.listdir(place):
                    if name.endswith(".lock"):
                        self._files.remove(f"{LOCKS_FILE}/{name}")
            self._files.replace(LOCKS_FILE, LOCKS_TEXT)  # also in place of an empty directory

    def _blocks_plain_writes(self) -> bool:
        return self.signature(LOCKS_FILE) is not None

    def allow_plain_writes(self) -> None:
        """Give lattice its directory of locks back: this is going to be a local project."""
        with explained(LOCKS_FILE):
            if self._blocks_plain_writes():
                self._files.remove(LOCKS_FILE)
            self._files.make(LOCKS_FILE)

    @property
    def is_held_by_others(self) -> bool:
        """Whether another process has the lock that this one waits for."""
        return self.held_since is not None

    def is_whole(self) -> bool:
        """Whether the directories that lattice expects are there, and what keeps plain lattice from writing."""
        directories = all(os.path.isdir(os.path.join(self.directory, directory)) for directory in _DIRECTORIES)
        return directories and self._blocks_plain_writes()

    def is_there(self) -> bool:
        """Whether the directory is still the one that was opened, not removed, being removed, or made anew."""
        try:
            here = self._stat_directory() == self.identity
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
            await self._until_quiet(deadline)
            with explained(self.directory):
                if self._lock.acquire():
                    break
            if self.held_since is None:
                self.held_since = time.monotonic()
            if time.monotonic() > deadline:
                raise StorageError(f"another process has held {self.directory} for {timeout_s:.0f} s")
            await asyncio.sleep(_LOCK_POLL_S)
        self._present.add(LOCK_FILE)
        self.held_since = None
        try:
            self._check_there()  # whoever had the lock may have made it a local project
            yield
        finally:
            self._lock.release()

    async def _until_quiet(self, deadline: float) -> None:
        """Wait while another program seems to remove the whole directory: what is created meanwhile is in its way."""
        while self._is_vanishing() and self._files.changed_s_ago() < QUIET_S and time.monotonic() < deadline:
            await asyncio.sleep(_LOCK_POLL_S)
            self._check_there()
        if self._is_vanishing():  # by intention, and in the past
            self._files.forget_names()
            self._present.clear()

    def _is_vanishing(self) -> bool:
        """Whether something that was there is gone: files, a directory of the layout, or what we always have."""
        if self._files.is_shrinking or self._files.is_missing_any():
            return True
        return any(not os.path.lexists(self.absolute(name)) for name in self._present)

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
            away = b""
            with contextlib.suppress(FileNotFoundError):
                away = self._files.read(AWAY_FILE)
            self._away = away
            return decode_state(self._files.read(STATE_FILE), away, self.remote)
        except FileNotFoundError:
            return CacheState()
        except OSError as error:
            raise StorageError(f"cannot read the cache's state: {error.strerror}") from error

    def save_state(self, state: CacheState) -> Signature | None:
        """Store which point of the history the files hold; call after the files hold it (I5).

        What is left out comes first: between the two it says too much, at worst, and that shows when it is fetched.
        """
        with explained(STATE_FILE):
            if (away := encode_away(state.away)) != self._away:
                self._files.replace(AWAY_FILE, away)
                self._away = away
            if STATE_FILE in self._present and not os.path.lexists(self.absolute(STATE_FILE)):
                self._files.is_shrinking = True
                raise StorageError(f"{STATE_FILE} was removed from {self.directory}")
            self._files.replace(STATE_FILE, encode_state(state, self.remote))
            self._present.add(STATE_FILE)
            self._files.is_filled = state.is_filled and not state.wanted
        return self.signature(STATE_FILE)

    def load_known(self) -> None:
        """Take over what the last process knew of the files, and what others have written since."""
        if not self.known.is_complete and self.size(STORED) is not None:
            self.known.restore(self.read(STORED), boot_id())
        self.known.learn()

    def store_known(self) -> None:
        """Keep what is known of the files for the next process."""
        self.known.share()
        if (data := self.known.stored(boot_id())) is not None:
            self.replace(STORED, data)

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
            return self._files.read(path, offset)

    def digest(self, path: str) -> bytes | None:
        """Return the SHA-256 of the content; None when there is no plain file."""
        with explained(path), contextlib.suppress(FileNotFoundError):
            return None if self.signature(path) is None else self._files.digest(path)
        return None

    def store(self, path: str, data: bytes) -> None:
        """Make a file of ours exactly ``data``, so that it survives a power cut once this returns."""
        with explained(path):
            self._files.replace(path, data, is_synced=True)

    def replace(self, path: str, data: bytes) -> None:
        """Make the file exactly ``data``, atomically, with its parent directories."""
        with explained(path):
            self._files.replace(path, data)
            self.note(path)

    def sync(self, paths: Iterable[str]) -> None:
        """Sync these files to the disk."""
        for path in paths:
            with explained(path):
                self._files.sync(path)

    def replace_if(self, path: str, data: bytes, found: Signature | None) -> bool:
        """Like ``replace``, but only if the file is still as ``found``, which is looked at as late as can be."""
        with explained(path):
            done = self._files.replace(path, data, lambda: self.signature(path) == found)
            if done:
                self.note(path)
            return done

    def append(self, path: str, data: bytes) -> None:
        """Add ``data`` at the end in one write; creates the file, also in place of a link."""
        found = self.signature(path)
        if found is None:
            self.replace(path, data)
            return
        is_ours = not self.known.is_complete or self.known.agrees(path, found)
        with explained(path):
            self._files.append(path, data)
            if is_ours:  # what other hands did to the rest of it must still be noticed
                self.note(path)

    def move(self, path: str, to: str) -> None:
        """Rename, replacing what is at ``to``."""
        with explained(path):
            self._files.move(path, to)
            self.note(path)
            self.note(to)

    def delete(self, path: str) -> None:
        """Remove the file or link; nothing happens when there is none, or a directory."""
        with explained(path), contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            self._files.remove(path)
        self.note(path)

    def note(self, path: str) -> None:
        """The file is as one of us wants it: what differs later was done by other hands."""
        if not path.startswith("."):
            self.known.note(path, self.signature(path))

    # --- files that come in pieces ---

    def write_part(self, part: Part, place: Callable[[str, bytes], bool] | None = None) -> bool | None:
        """Write a piece of a file beside it; the last one puts the file in place.

        Args:
            part: the piece.
            place: puts the whole content in place, and returns whether it did; None for a plain rename.

        Returns:
            True once the file is in place, None while pieces are missing, False when the pieces don't fit
            together or don't add up to the digest, or ``place`` did not: the file must be fetched again.
        """
        if part.offset == 0 and len(part.data) == part.size:
            return self._put_whole(part, place)
        self.quota.require(part.size)
        with explained(part.path):
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
                    self._files.discard(temporary)  # on a full disk most of all: it would stay full of this
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
        """Remove what has come of files whose other pieces won't come any more."""
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

    # --- contents that are fetched apart ---

    def partial(self, digest: bytes) -> str:
        """Return where the pieces of a content are gathered; they stay when the process ends."""
        return f"{PARTIAL}/{digest.hex()}"

    def add(self, partial: str, data: bytes) -> None:
        """Add a piece at the end of what has been gathered."""
        with explained(partial):
            self._files.extend(partial, data)

    def place(self, partial: str, path: str) -> None:
        """What has been gathered is this file."""
        with explained(path):
            self._files.move(partial, path)
            self.note(path)

    def discard(self, partial: str) -> None:
        """Forget what has been gathered."""
        self._files.discard(partial)

    def discard_partials(self, keep: Iterable[bytes]) -> None:
        """Forget what has been gathered of all contents but these."""
        kept = {digest.hex() for digest in keep}
        with contextlib.suppress(OSError):
            for name in os.listdir(self.absolute(PARTIAL)):
                if name not in kept:
                    self._files.discard(f"{PARTIAL}/{name}")

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


class _Lock:
    """An advisory lock on a file, for one process at a time; nested use within one is counted."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._handle: int | None = None
        self._depth = 0

    @property
    def is_locked(self) -> bool:
        return self._handle is not None

    def acquire(self) -> bool:
        """Take the lock and return True, or return False if another process holds it. Makes no directory."""
        if self._handle is None:
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
            handle = os.open(self._place, flags, 0o600)
            if not _is_locked(handle):
                os.close(handle)
                return False
            self._handle = handle
        self._depth += 1
        return True

    def release(self) -> None:
        """Leave the lock, once for each ``acquire``."""
        self._depth -= 1
        if self._depth == 0 and self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _is_locked(handle: int) -> bool:
    """Lock an open file; return whether that was possible, and the file was not removed meanwhile."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(handle).st_nlink > 0


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn an error of the file system into ours, naming the file."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write the cache ({what}): {error.strerror or error}") from error
