"""Undo log: pre-images of the files of one transaction, so that a command is all or nothing (I6, decision 0001).

Each is written with ``write()`` before the change: it survives the death of the process, but not a power cut, which the
boot id reveals.
"""

import contextlib
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import msgspec

from lattice_remote.files import frame, frames, write_atomically
from lattice_remote.protocol.operations import digest_of
from lattice_remote.server.ipc import TreeState
from lattice_remote.server.tree.capture import Replacement

__all__ = ["Begin", "UndoLog"]

SMALL_BYTES = 32 * 1024
"""Larger files that are replaced as a whole get a hard link instead of a copy."""


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    epoch: str
    seq: int
    boot_id: str


class _Absent(msgspec.Struct, frozen=True, tag="absent"):
    path: str
    inode_after: int = 0
    """Of the new file, if known: another one is another process's."""


class _Directory(msgspec.Struct, frozen=True, tag="directory"):
    path: str


class _Length(msgspec.Struct, frozen=True, tag="length"):
    path: str
    size: int
    added: bytes = b""
    """Appended bytes, if known: bytes after them are another process's."""


class _Content(msgspec.Struct, frozen=True, tag="content"):
    path: str
    data: bytes
    mode: int
    inode_after: int
    """Of the replacing file, 0 if unknown: a third one is another process's."""


class _Linked(msgspec.Struct, frozen=True, tag="linked"):
    path: str
    name: str
    size: int
    inode: int
    inode_after: int


_Image = _Absent | _Directory | _Length | _Content | _Linked
_decoder: msgspec.msgpack.Decoder[Begin | _Image] = msgspec.msgpack.Decoder(Begin | _Image)
_encoder = msgspec.msgpack.Encoder()


class UndoLog:
    """The pre-images of one transaction at a time, in ``directory``; paths are absolute.

    On disk they are relative to the project: a copy started at another path must not restore the original.

    Order: ``begin``, then a ``keep_`` method before each change, then ``clear`` (it stays) or ``restore``. All raise
    OSError if the storage fails.
    """

    def __init__(self, directory: Path) -> None:
        self._place = f"{directory.parent}/"
        self._links = directory / "undo.d"
        self._links.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(directory / "undo", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._images: dict[str, _Image] = {}
        self.of_others: list[str] = []
        self._announced: tuple[str, bytes | Replacement | None] = ("", None)  # a path, and its next change's outcome
        self._expected: set[str] = set()  # ``before_first_changes`` was called
        self._made: dict[str, Replacement] = {}  # announced replacements that were made, by path
        self.before_first_changes: Callable[[Mapping[str, os.stat_result | None]], None] = lambda _statuses: None
        """Called with statuses by path before the transaction's first change of these files; may raise."""
        self.before_overwrite: Callable[[str, int], None] = lambda _path, _size: None
        """Called with path and size before a content is changed in place, replaced or removed."""
        self._begin: Begin | None = None
        self._size = 0  # bytes of whole records on disk
        self._linked = 0
        self._state, self._state_descriptor = TreeState.read(directory), TreeState.open(directory)

    @classmethod
    def open(cls, directory: Path) -> Self:
        log = cls(directory)
        data = os.pread(log._descriptor, os.fstat(log._descriptor).st_size, 0)
        for _, payload in frames(data):
            item = _decoder.decode(payload)
            if isinstance(item, Begin):
                log._begin, log._size = item, len(data)
            else:
                image = msgspec.structs.replace(item, path=os.path.join(log._place, item.path))
                log._images[image.path] = image
                log._linked += isinstance(image, _Linked)
        if data and log._begin is None:
            os.ftruncate(log._descriptor, 0)  # killed before the first record was whole
        return log

    @property
    def pending(self) -> Begin | None:
        return self._begin if self._size else None

    def begin(self, transaction: Begin) -> None:
        """Start a transaction; nothing is written before its first change."""
        assert not self._size, "the last transaction was neither cleared nor restored"
        self._begin = transaction
        self._announced = "", None

    def clear(self, seq: int | None = None) -> None:
        """Drop the pre-images: the transaction stays as change ``seq``, or there was none."""
        if self._size:
            os.ftruncate(self._descriptor, 0)
        for number in range(self._linked):
            (self._links / str(number)).unlink(missing_ok=True)
        self._images.clear()
        self._made.clear()
        self._expected.clear()
        self._begin, self._size, self._linked = None, 0, 0
        state = self._state
        ended = state.ended + state.is_open
        self._show(state._replace(is_open=False, ended=ended, seq=state.seq if seq is None else seq))

    def _show(self, state: TreeState) -> None:
        if state != self._state:
            state.write(self._state_descriptor)
            self._state = state

    def show_open(self) -> None:
        self._show(self._state._replace(is_open=True))

    @property
    def paths(self) -> list[str]:
        return list(self._images)

    # --- before a change ---

    def expect(self, statuses: Mapping[str, os.stat_result | None]) -> None:
        self.before_first_changes({path: statuses[path] for path in statuses if path not in self._images})
        self._expected.update(statuses)

    def announce(self, path: str, after: bytes | Replacement) -> None:
        """Note the next change of a file: these bytes are appended, or this file replaces it.

        If the process dies, lattice's locks are free; later writes of plain lattice are recognized by this, and stay.
        """
        self._announced = path, after

    def keep_for_append(self, path: str, status: os.stat_result | None) -> None:
        after, known = self._take_announced(path), self._images.get(path)
        added = after if isinstance(after, bytes) else b""
        if known is None:
            self._require_known(path, status)
            self._keep(_Length(path, status.st_size, added) if status else _Absent(path))
        elif isinstance(known, _Length) and (known.added or added):
            self._keep(_Length(path, known.size, known.added + added if added else b""))

    def keep_for_rewrite(self, path: str, status: os.stat_result | None) -> None:
        known = self._images.get(path)
        if known is None:
            self._require_known(path, status)
        self._made.pop(path, None)
        if status is None:
            if known is None:
                self._keep(_Absent(path))
            return
        self.before_overwrite(path, status.st_size)
        for image in list(self._images.values()):
            # A hard link does not protect against changes in place.
            if isinstance(image, _Linked) and image.inode == status.st_ino:
                self._keep_content(image.path, path, image.size)
        if known is None:
            self._keep_content(path, path, status.st_size)
        elif isinstance(known, _Length):
            self._keep_content(path, path, known.size)

    def keep_for_replace(self, path: str, status: os.stat_result | None) -> None:
        if path not in self._images:
            self._require_known(path, status)
        if status is not None:
            self.before_overwrite(path, status.st_size)
        self._keep_whole(path, status)

    def keep_for_move(self, path: str, status: os.stat_result | None) -> None:
        if path not in self._images:
            self._require_known(path, status)
        self._keep_whole(path, status)

    def _require_known(self, path: str, status: os.stat_result | None) -> None:
        if path not in self._expected:
            self.before_first_changes({path: status})

    def _keep_whole(self, path: str, status: os.stat_result | None) -> None:
        after, known = self._take_announced(path), self._images.get(path)
        inode_after = 0
        if isinstance(after, Replacement):
            inode_after = after.inode
            self._made[path] = after
        if known is not None and not isinstance(known, _Length):
            if isinstance(known, _Content | _Linked) and known.inode_after != inode_after:
                self._keep(msgspec.structs.replace(known, inode_after=inode_after))
            return
        if status is None:
            if known is None:
                self._keep(_Absent(path, inode_after))
            return
        size = known.size if isinstance(known, _Length) else status.st_size
        before = after.before if isinstance(after, Replacement) else None
        if before is not None and len(before) == size:
            self._keep(_Content(path, before, stat.S_IMODE(status.st_mode), inode_after))
        elif status.st_size <= SMALL_BYTES or not self._link(path, size, status.st_ino, inode_after):
            self._keep_content(path, path, size, inode_after)

    def keep_directory(self, path: str) -> None:
        if path not in self._images and not os.path.lexists(path):
            self._keep(_Directory(path))

    def before(self, path: str) -> bytes | None:
        match self._images.get(path):
            case _Content(data=data):
                return data
            case _Linked(name=name, size=size):
                with contextlib.suppress(OSError):
                    return (self._links / name).read_bytes()[:size]
        return None

    def _keep_content(self, path: str, source: str, size: int, inode_after: int = 0) -> None:
        with open(source, "rb", buffering=0) as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            self._keep(_Content(path, file.read(size), mode, inode_after))

    def _link(self, path: str, size: int, inode: int, inode_after: int) -> bool:
        name = str(self._linked)
        target = self._links / name
        target.unlink(missing_ok=True)
        try:
            os.link(path, target, follow_symlinks=False)
        except OSError:
            return False  # a file system without hard links: copy
        self._linked += 1
        self._keep(_Linked(path, name, size, inode, inode_after))
        return True

    @property
    def replaced(self) -> Mapping[str, Replacement]:
        """The announced replacements that were made and not changed again, by path."""
        return self._made

    def _is_overwritten(self, path: str) -> bool:
        made, status = self._made.get(path), _status(path)
        if made is None:
            return False
        if status is None or status.st_ino != made.inode:
            return True
        return made.digest is not None and digest_of(Path(path).read_bytes()) != made.digest

    def _take_announced(self, path: str) -> bytes | Replacement | None:
        self._made.pop(path, None)
        announced, after = self._announced
        if announced != path:
            return None
        self._announced = "", None
        return after

    def _keep(self, image: _Image) -> None:
        data = frame(_encoder.encode(msgspec.structs.replace(image, path=image.path.removeprefix(self._place))))
        if not self._size:
            assert self._begin is not None, "begin() comes before the first change"
            data = frame(_encoder.encode(self._begin)) + data
        if os.write(self._descriptor, data) != len(data):
            os.ftruncate(self._descriptor, self._size)  # records behind a torn one would never be read
            raise OSError("short write to the undo log")
        self._size += len(data)
        self._images[image.path] = image
        if not self._state.is_open and not os.path.basename(image.path).startswith(".tmp."):
            self._show(self._state._replace(is_open=True))  # no reader sees a temporary file

    # --- going back ---

    def restore(self) -> list[str]:
        """Restore every pre-image and ``clear``; return the paths. Repeatable after a kill.

        ``of_others`` then has the paths in which the writes of another process stay.
        """
        paths = list(self._images)
        self.of_others = []
        for image in reversed(self._images.values()):
            self._restore_one(image)
        if self._state.is_open:
            self._show(self._state._replace(rolled_back=self._state.rolled_back + 1))
        self.clear()
        return paths

    def _is_anothers(self, path: str, inode_after: int) -> bool:
        """Return whether a file is neither as before nor as the transaction made it."""
        status = _status(path)
        if not inode_after or status is None or (status.st_ino == inode_after and not self._is_overwritten(path)):
            return False
        return Path(path).read_bytes() != self.before(path)

    def _restore_one(self, image: _Image) -> None:
        match image:
            case _Absent() | _Content() | _Linked() if self._is_anothers(image.path, image.inode_after):
                self.of_others.append(image.path)
            case _Absent(path=path):
                with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # a directory existed before, too
                    os.unlink(path)
            case _Directory(path=path):
                with contextlib.suppress(OSError):
                    os.rmdir(path)  # only if no other file is in it
            case _Length(path=path, size=size, added=added):
                with contextlib.suppress(FileNotFoundError):
                    if _cut(path, size, added):
                        self.of_others.append(path)
            case _Content(path=path, data=data, mode=mode):
                _replace(path, data, mode)
            case _Linked(path=path, name=name, size=size):
                scratch = _scratch(path)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(scratch)
                os.link(self._links / name, scratch)
                os.truncate(scratch, size)
                os.replace(scratch, path)
                # rename() does nothing if both names are the same file already.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(scratch)


def _status(path: str) -> os.stat_result | None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _cut(path: str, size: int, added: bytes) -> bool:
    """Remove the appended bytes; return whether another process's bytes stay."""
    if os.stat(path).st_size <= size:
        return False
    with open(path, "rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        file.seek(size)
        tail = file.read() if added else b""
        anothers = tail.removeprefix(added)
        if added.startswith(tail):
            os.truncate(path, size)
            return False
        file.seek(0)
        before = file.read(size)
    _replace(path, before + anothers, mode)
    return True


def _scratch(path: str) -> str:
    directory, name = os.path.split(path)
    return os.path.join(directory, f".tmp.undo.{name}")[:4096]


def _replace(path: str, data: bytes, mode: int) -> None:
    def sync(descriptor: int) -> None:
        os.fchmod(descriptor, mode)  # the umask does not reduce it
        os.fsync(descriptor)

    write_atomically(path, data, mode=mode, temporary=_scratch(path), sync=sync, is_parent_synced=False)
