"""Plans and notes that people edit in place: what was edited, and on which text of the server's (I4).

Beside each such file, ``.base/`` keeps the server's text on which it is based. A file that differs from its base
is an edit: it is sent with that base, and the server merges. The base is always written after the file, so that
a crash in between looks like an edit that the server already has, never like one that undoes what it has.
"""

import contextlib
import errno
import fcntl
import os
import signal
import time
from collections.abc import Container, Iterator

import msgspec

from lattice_remote.client.agent_runtime import boot_time
from lattice_remote.client.cache.cache import BASE_DIRECTORY, Cache
from lattice_remote.client.cache.evidence import Evidence, Judgement
from lattice_remote.client.cache.fingerprints import Signature
from lattice_remote.client.cache.repository import Blobs
from lattice_remote.client.cache.stale_edits import StaleEditDetector
from lattice_remote.errors import StorageError
from lattice_remote.protocol.messages import Put
from lattice_remote.protocol.operations import AnnounceFile, AppendBytes, MoveFile, Operation, PutFile, digest_of
from lattice_remote.protocol.paths import is_editable

__all__ = ["Edits", "PendingEdits", "Sent", "is_being_written"]

_MAX_KEPT_BYTES = 1024 * 1024
"""A larger edit is only kept in memory."""


class Sent(msgspec.Struct, frozen=True):
    """An edit on its way."""

    put: Put
    """With its base, whole."""
    frame: Put
    """As it was sent."""
    base: bytes | None
    """On which the file was based here."""
    at: float
    """When (seconds since 1970)."""

    def first_sent_at(self) -> float:
        """Return when that was, on the clock on which requests say how old they are."""
        return boot_time() - max(0.0, time.time() - self.at)


_decoder = msgspec.msgpack.Decoder(Sent)


class PendingEdits:
    """The edits of one cache that were sent and not answered, one a file at the most."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._sent: dict[str, Sent] = {}

    def remember(self, sent: Sent) -> None:
        """This is about to be sent."""
        self._sent[sent.put.path] = sent
        data = msgspec.msgpack.encode(sent)
        if len(data) <= _MAX_KEPT_BYTES:
            self._cache.replace(_place(sent.put.path), data)

    def forget(self, path: str) -> None:
        """The answer is here, and was settled."""
        self._sent.pop(path, None)
        self._cache.delete(_place(path))

    def may_replace(self, path: str, base: bytes | None) -> bool:
        """Whether the server may have an edit in place of ``base``, which a file is based on here."""
        sent = self.get(path)
        return sent is not None and sent.base == base

    def get(self, path: str) -> Sent | None:
        """Return what was sent of a file and not answered, by this process or one before it."""
        if path not in self._sent and os.path.exists(self._cache.absolute(_place(path))):
            try:
                sent = _decoder.decode(self._cache.read(_place(path)))
            except (msgspec.DecodeError, StorageError, OSError):
                return None
            if sent.put.path == path:
                self._sent[path] = sent
        return self._sent.get(path)


def _place(path: str) -> str:
    return f"{BASE_DIRECTORY}/.sent/{path}"


_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)


def is_being_written(place: str) -> bool:
    """Whether somebody has this file open for writing; False where that can't be told. About 20 microseconds."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        handle = os.open(place, _FLAGS)
    except OSError:
        return False
    try:
        # Who opens the file to write within these microseconds waits for the end of the lease, and we are sent a
        # signal: SIGURG, which nobody minds, in place of SIGIO, which would end the process.
        fcntl.fcntl(handle, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    else:
        with contextlib.suppress(OSError):
            fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return False
    finally:
        os.close(handle)


_EDITED_DIRECTORIES = ("plans", "notes")
_TICK_NS = 50_000_000
"""Two writes within a tick of the system's clock leave the same times: what is younger is read, not recognised."""


class Edits:
    """The edited files of one cache. Methods that write must be called under the cache's lock."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.older = StaleEditDetector(cache)
        self.unanswered = PendingEdits(cache)
        self.evidence = Evidence(cache)
        self.is_own = False
        """Whether the change that is being applied comes of a request from this cache, not of others."""
        self._given_up: set[str] = set()  # files whose base is no text of the server's, until they are replaced
        self._settled: dict[str, Signature] = {}  # files known to equal their base, as they were then

    def scan(self) -> list[str]:
        """Return the paths of all edited files. Costs one ``stat`` for each plan and notes."""
        return sorted(path for path in self._unsettled() if is_editable(path) and self.is_edited(path))

    def is_edited(self, path: str) -> bool:
        """Whether a file differs from its base, or may once the server has answered. A removed file is no edit."""
        signature = self._cache.signature(path)
        if signature is None or self._settled.get(path) == signature:
            return False
        base = self.base(path)
        if self._cache.read(path) != base or self.unanswered.may_replace(path, base):
            return True
        if time.time_ns() - signature[3] > _TICK_NS:
            self._settled[path] = signature
        return False

    def is_in_use(self, path: str) -> bool:
        """Whether the server's text must not be put in place now: edited, or somebody has it open for writing.

        A program that goes on writing into a file that was replaced meanwhile would write into nothing.
        """
        return self.is_edited(path) or is_being_written(self._cache.absolute(path))

    def base(self, path: str) -> bytes | None:
        """Return the server's text on which the local file is based; None when the server had none."""
        place = _base_path(path)
        return None if self._cache.size(place) is None else self._cache.read(place)

    def is_orphan(self, path: str, files: Container[str]) -> bool:
        """Whether a plan or notes belongs to no task among the server's ``files``: then it is no edit of anything."""
        if path in files or self.base(path) is not None:
            return False
        task = path.rpartition("/")[2].removesuffix(".md")
        return f"tasks/{task}.json" not in files and f"archive/tasks/{task}.json" not in files

    def base_entry(self, path: str) -> tuple[int, bytes] | None:
        """Return size and digest of a file's base, as the manifest lists them."""
        base = self.base(path)
        return None if base is None else (len(base), digest_of(base))

    def rebase(self, path: str) -> None:
        """The file is now the server's text: remember that."""
        if self._cache.size(path) is None:
            self._settled.pop(path, None)
            self._cache.delete(_base_path(path))
            self.older.forget(path)
            self.evidence.forget_versions(path)
        elif (text := self._cache.read(path)) != self.base(path):
            self._replace_base(path, text)

    def sent(self, path: str, text: bytes) -> None:
        """The server has ``text``: what the file holds beyond that is the next edit."""
        self._settled.pop(path, None)
        self._cache.replace(_base_path(path), text)

    def give_up(self, path: str, text: bytes) -> None:
        """The file's ``text`` is not to be sent: it counts as the base until the server's text replaces both."""
        self.sent(path, text)
        self._given_up.add(path)

    def _replace_base(self, path: str, text: bytes) -> None:
        """The server's text is another one now: unless that is our own doing, remember the one before."""
        if path in self._given_up:
            self._given_up.discard(path)
        elif not self.is_own and (base := self.base(path)) is not None:
            self.older.remember(path, base)
            self.evidence.replaced(path, base)
        self.sent(path, text)

    def judge(self, path: str, text: bytes, found: Signature, blobs: Blobs | None) -> Judgement:
        """Decide whether a file that differs from its base was saved by a person, see ``evidence.py``."""
        is_watched = path in self._settled
        return self.evidence.judge(path, text, self.base(path), found, is_watched=is_watched, blobs=blobs)

    def take(self, path: str, text: bytes) -> bool:
        """Put the server's text in place, unless the file is edited, even at the last moment; tell whether it was."""
        found = self._cache.signature(path)
        if self.is_in_use(path) or not self._cache.replace_if(path, text, found):
            return False
        if text != self.base(path):
            self._replace_base(path, text)
        return True

    def absorb(self, operation: Operation) -> bool:
        """Whether an operation only makes an edited file what it already is: our own edit, come back."""
        after = self.text_after(operation)
        if after is None:
            return isinstance(operation, AnnounceFile) and self._absorb_announced(operation)
        if self._cache.read(operation.path) != after:
            return False
        self.sent(operation.path, after)
        self._cache.note(operation.path)
        return True

    def _absorb_announced(self, operation: AnnounceFile) -> bool:
        """The same for a text that is too large to travel with its change."""
        if not is_editable(operation.path) or self._cache.size(operation.path) != operation.size:
            return False
        text = self._cache.read(operation.path)
        if digest_of(text) != operation.digest:
            return False
        self.sent(operation.path, text)
        self._cache.note(operation.path)
        return True

    def text_after(self, operation: Operation) -> bytes | None:
        """Return the server's text of a plan or notes after an operation; None when that can't be told from here."""
        if not is_editable(operation.path):
            return None
        match operation:
            case PutFile():
                return operation.data
            case AppendBytes() if (base := self.base(operation.path)) is not None and len(base) == operation.offset:
                return base + operation.data
            case _:
                return None

    def edited_by(self, operation: Operation) -> list[str]:
        """Return which of the files that an operation changes are edited here, or being edited."""
        paths = (operation.path, operation.to) if isinstance(operation, MoveFile) else (operation.path,)
        return [path for path in paths if is_editable(path) and self.is_in_use(path)]

    def _unsettled(self) -> Iterator[str]:
        """Yield the files that are not as they were when they were last known to equal their base."""
        for directory in _EDITED_DIRECTORIES:
            with contextlib.suppress(OSError), os.scandir(os.path.join(self._cache.directory, directory)) as entries:
                for entry in entries:
                    path = f"{directory}/{entry.name}"
                    if not self._is_settled(path, entry):
                        yield path

    def _is_settled(self, path: str, entry: os.DirEntry[str]) -> bool:
        settled = self._settled.get(path)
        if settled is None:
            return False
        try:
            found = entry.stat(follow_symlinks=False)
        except OSError:
            return False  # removed this moment
        return settled == (found.st_mtime_ns, found.st_size, found.st_ino, found.st_ctime_ns)


def _base_path(path: str) -> str:
    return f"{BASE_DIRECTORY}/{path}"
