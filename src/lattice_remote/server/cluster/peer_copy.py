"""Copy of a project in use to another node: its files and its journal, exactly as they are at one change.

The receiver lists the files that it has. The sender first sends the others while writes go on, and repeats this for
those that have changed since. For the last few it holds back the worker's next request, reads them and opens the
journal, which only grows, so that it can send the rest at the receiver's pace (I10).

The receiver collects everything in ``copying/`` of the project's directory. A later attempt continues from there. The
rename to ``copied/`` decides: from then on every start puts the copy in place. The copy keeps the epoch, so the node
must follow the owner's order from then on (I7).
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import batched
from pathlib import Path
from typing import Literal

import msgspec
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from lattice_remote.errors import ConnectionFailed, ProtocolError, RemoteError, StorageError
from lattice_remote.files import READ, SAFE, hash_descriptor, sync_directory, write_all
from lattice_remote.protocol.messages import Position
from lattice_remote.protocol.paths import DIRECTORIES, check_path, is_replicated
from lattice_remote.server.cluster.peer_access import PEER_MESSAGE_BYTES, PeerAccess
from lattice_remote.server.datadir import ProjectPaths
from lattice_remote.server.journal.repair import place_of
from lattice_remote.server.project.history import Content
from lattice_remote.server.project.project import Project
from lattice_remote.server.transport.websocket import Handoff, websocket_frame
from lattice_remote.server.tree.tree import FileState, ManifestFile, save_manifest, sync_file_systems

__all__ = ["copy_from", "finish_copies", "send_copy"]

_PIECE_BYTES = 1024 * 1024
_QUEUED_BYTES = 4 * 1024 * 1024
"""With the connection, before the sender reads on."""
_SETTLED_BYTES = 8 * 1024 * 1024
"""Of files read while the worker's next request is held back."""
_MAX_ROUNDS = 50
_ROUND_DELAY_S = 0.1
"""Before the files are compared again, when another program writes them."""
_ENTRIES_PER_MESSAGE = 10_000
_OWNERS = "session_owners.json"
"""``worker.caller.OWNERS_FILE``."""
_JOURNAL_FILE = re.compile(r"[0-9]{20}\.(log|files)|key|request-ids|cluster-cursor")
_SILENCE_S = 60.0
"""A command is finished first; then the connection is lost."""
_COPYING, _COPIED = "copying", "copied"

_log = logging.getLogger(__name__)

_Place = Literal["tree", "journal", "project"]


class _Message(msgspec.Struct, frozen=True, tag_field="type"):
    pass


class _Have(_Message, frozen=True, tag="have"):
    """Files of the receiver, with their digests."""

    files: dict[str, bytes]
    is_last: bool


class _End(msgspec.Struct, frozen=True):
    """Digest of a whole file, and its modification time and permissions."""

    digest: bytes
    mtime_ns: int
    mode: int


class _Piece(msgspec.Struct, frozen=True):
    """A piece of a file, in order; at offset 0 it replaces an earlier version. ``end`` comes with the last one."""

    place: _Place
    path: str
    offset: int
    data: bytes
    end: _End | None = None


class _Pieces(_Message, frozen=True, tag="pieces"):
    """Pieces of about ``_PIECE_BYTES`` together: a message for each small file would be slow."""

    pieces: list[_Piece]


class _Cut(_Message, frozen=True, tag="cut"):
    """Files at the position; the last message has ``is_last``."""

    epoch: str
    seq: int
    mark: bytes
    files: dict[str, Content]
    is_last: bool


class _Failed(_Message, frozen=True, tag="failed"):
    """There is no copy; ``reason`` is one line."""

    reason: str


_from_receiver: msgspec.msgpack.Decoder[_Have] = msgspec.msgpack.Decoder(_Have)
_from_sender: msgspec.msgpack.Decoder[_Pieces | _Cut | _Failed] = msgspec.msgpack.Decoder(_Pieces | _Cut | _Failed)
_encoder = msgspec.msgpack.Encoder()


def _decode[T](decoder: "msgspec.msgpack.Decoder[T]", message: str | bytes) -> T:
    if isinstance(message, str):
        raise ProtocolError("received a text message; frames are binary")
    try:
        return decoder.decode(message)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"invalid message of a node: {error}") from error


# --- the sender ---


async def send_copy(connection: Handoff, node: str, project: Project | None) -> None:
    """Send a project to another node, then close the connection. Raises nothing.

    ``project`` is None if this node does not have it.
    """
    connection.allow_message_bytes(PEER_MESSAGE_BYTES)
    sender = _Sender(connection)
    try:
        sender.known = await sender.receive_list()
        await sender.send(project, node)
    except ConnectionClosed:
        pass
    except RemoteError as error:
        sender.push(_Failed(error.message))
    except OSError as error:
        sender.push(_Failed(f"cannot read the project: {error.strerror}"))
    except Exception:  # noqa: BLE001 - one connection's failure must not stop the server
        _log.exception("cannot send a copy to node %s", node)
        sender.push(_Failed("the node failed; see its log"))
    finally:
        connection.end(1000, "")


@dataclass
class _Journal:
    """The open files of a journal and their sizes at one moment."""

    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Descriptor and size, by name."""

    @classmethod
    def open(cls, paths: ProjectPaths) -> "_Journal":
        """Open a settled project's files. Raises OSError."""
        journal = cls()
        try:
            names = sorted(name for name in os.listdir(paths.journal) if _JOURNAL_FILE.fullmatch(name))
            for name in names:
                journal._add(name, paths.journal / name)
            if (paths.root / _OWNERS).exists():
                journal._add(_OWNERS, paths.root / _OWNERS)
        except BaseException:
            journal.close()
            raise
        return journal

    def _add(self, name: str, path: Path) -> None:
        descriptor = os.open(path, READ)
        self.files[name] = descriptor, os.fstat(descriptor).st_size

    def pieces(self) -> Iterator[_Piece]:
        for name, (descriptor, size) in self.files.items():
            yield from _pieces("project" if name == _OWNERS else "journal", name, descriptor, size)

    def close(self) -> None:
        for descriptor, _ in self.files.values():
            os.close(descriptor)
        self.files.clear()


def _pieces(place: _Place, path: str, descriptor: int, size: int | None = None) -> Iterator[_Piece]:
    """Yield an open file, up to ``size``. Blocking. Raises OSError."""
    status, hasher, offset = os.fstat(descriptor), hashlib.sha256(), 0
    size = status.st_size if size is None else size
    while True:
        data = os.pread(descriptor, min(_PIECE_BYTES, size - offset), offset)
        hasher.update(data)
        is_last = not data or offset + len(data) >= size
        end = _End(hasher.digest(), status.st_mtime_ns, status.st_mode & 0o777) if is_last else None
        yield _Piece(place, path, offset, data, end)
        if is_last:
            return
        offset += len(data)


def _tree_pieces(root: Path, paths: Iterable[str]) -> Iterator[_Piece]:
    """Yield files of a tree; those that have vanished are skipped. Blocking. Raises OSError."""
    for path in paths:
        try:
            descriptor = os.open(root / path, READ)
        except FileNotFoundError:
            continue
        try:
            yield from _pieces("tree", path, descriptor)
        finally:
            os.close(descriptor)


class _Sender:
    """One copy for one receiver."""

    def __init__(self, connection: Handoff) -> None:
        self.known: dict[str, bytes] = {}
        """Digests of the files that the receiver has, as far as sent."""
        self._connection = connection

    async def receive_list(self) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        while True:
            message = _decode(_from_receiver, await self._connection.recv())
            found |= message.files
            if message.is_last:
                return found

    async def send(self, project: Project | None, node: str) -> None:
        """Send everything. Raises StorageError: there is no project, or other programs keep writing; OSError."""
        if project is None:
            raise StorageError("this node does not have it")
        await project.opened()
        history, tree = project.history, project.paths.lattice
        for _ in range(_MAX_ROUNDS):
            missing = self._missing(history.files)
            if sum(history.files[path][0] for path in missing) > _SETTLED_BYTES:
                await self._send_pieces(_tree_pieces(tree, missing))
                continue
            async with project.settled():
                position, files, journal = history.position, dict(history.files), _Journal.open(project.paths)
                missing = self._missing(files)
                is_small = sum(files[path][0] for path in missing) <= _SETTLED_BYTES
                last = await asyncio.to_thread(list, _tree_pieces(tree, missing)) if is_small else []
            try:
                await self._send_pieces(iter(last))
                if not self._missing(files):
                    await self._send_pieces(journal.pieces())
                    await self._send_cut(position, files)
                    _log.info("%s: node %s has a copy of change %d", project.slug, node, position.seq)
                    return
            finally:
                journal.close()
            await asyncio.sleep(_ROUND_DELAY_S)  # a change by another program gets its number
        raise StorageError("other programs keep changing the project's files; try again")

    def _missing(self, files: Mapping[str, Content]) -> list[str]:
        return [path for path, (_, digest) in files.items() if self.known.get(path) != digest]

    async def _send_pieces(self, pieces: Iterator[_Piece]) -> None:
        while batch := await asyncio.to_thread(_take, pieces):
            for piece in batch:
                if piece.place == "tree":
                    self.known.pop(piece.path, None)
                    if piece.end is not None:
                        self.known[piece.path] = piece.end.digest
            self.push(_Pieces(batch))
            await self._has_room()

    async def _send_cut(self, position: Position, files: dict[str, Content]) -> None:
        pieces = [dict(piece) for piece in batched(files.items(), _ENTRIES_PER_MESSAGE)] or [{}]
        for number, piece in enumerate(pieces, 1):
            self.push(_Cut(position.epoch, position.seq, position.mark, piece, number == len(pieces)))
            await self._has_room()

    def push(self, message: _Pieces | _Cut | _Failed) -> None:
        self._connection.outbox.push(websocket_frame(_encoder.encode(message)))

    async def _has_room(self) -> None:
        if self._connection.outbox.pending_bytes >= _QUEUED_BYTES:
            await self._connection.outbox.room()


def _take(pieces: Iterator[_Piece]) -> list[_Piece]:
    """Return the next pieces, of about ``_PIECE_BYTES``; none at the end. Blocking."""
    found: list[_Piece] = []
    size = 0
    for piece in pieces:
        found.append(piece)
        size += len(piece.data) + 100
        if size >= _PIECE_BYTES:
            break
    return found


# --- the receiver ---


async def copy_from(url: str, slug: str, paths: ProjectPaths, access: PeerAccess) -> Position:
    """Replace a project, or create it, with a copy from the node at ``url``; return its position.

    No worker runs on the project. After a crash at any moment the directory holds the old project, or the copy once
    ``finish_copies`` was called.

    Raises:
        ConnectionFailed: the node is out of reach, or the connection was lost.
        StorageError: the node cannot send it, or a file cannot be written here.
        ProtocolError: the node sent invalid messages.
    """
    receiver = _Receiver(paths)
    try:
        await asyncio.to_thread(receiver.prepare)
        # A ping's answer would wait behind the files.
        socket = await access.connect(url, f"/cluster/{slug}/copy", keepalive=False)
        async with socket:
            await _send_list(socket, receiver.found)
            while not receiver.is_whole:
                async with asyncio.timeout(_SILENCE_S):
                    message = await socket.recv()
                await asyncio.to_thread(receiver.take, _decode(_from_sender, message))
        return await asyncio.to_thread(receiver.finish)
    except (ConnectionClosed, TimeoutError) as error:
        raise ConnectionFailed(f"the connection to the node at {url} was lost during a copy") from error
    except OSError as error:
        raise StorageError(f"cannot write the copy of project {slug}: {error.strerror}") from error
    finally:
        receiver.close()


async def _send_list(socket: ClientConnection, found: dict[str, bytes]) -> None:
    pieces = [dict(piece) for piece in batched(found.items(), _ENTRIES_PER_MESSAGE)] or [{}]
    for number, piece in enumerate(pieces, 1):
        await socket.send(_encoder.encode(_Have(piece, number == len(pieces))))


class _Receiver:
    """The files of a copy. Blocking; methods raise OSError."""

    def __init__(self, paths: ProjectPaths) -> None:
        self.found: dict[str, bytes] = {}
        """Digests of the tree's files that are here."""
        self.is_whole = False
        self._paths = paths
        self._copying = paths.root / _COPYING
        self._tree = self._copying / ".lattice"
        self._files: dict[str, Content] = {}
        self._position = Position("", 0, b"")
        self._open: tuple[str, Path, int] | None = None  # name, path and descriptor of an incomplete file
        self._size = 0
        self._hasher = hashlib.sha256()

    def prepare(self) -> None:
        """Collect the files of an earlier attempt and those of the present project."""
        finish_copy(self._paths)
        shutil.rmtree(self._copying / "journal", ignore_errors=True)
        for directory in (self._copying / "journal", self._tree, *(self._tree / name for name in DIRECTORIES)):
            directory.mkdir(mode=0o700 if directory.name == "journal" else 0o755, parents=True, exist_ok=True)
        self.found = dict(_digests(self._tree))
        for path, digest in _digests(self._paths.lattice):
            if path not in self.found:
                # Nothing changes either name in place: there is no worker, and the copy replaces whole files.
                target = self._tree / path
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(self._paths.lattice / path, target)
                self.found[path] = digest

    def take(self, message: _Pieces | _Cut | _Failed) -> None:
        """Write pieces. Raises ProtocolError, StorageError."""
        match message:
            case _Failed(reason):
                raise StorageError(f"the node cannot send the project: {reason}")
            case _Pieces(pieces):
                for piece in pieces:
                    self._write(piece)
            case _Cut(epoch, seq, mark, files, is_last):
                self._position = Position(epoch, seq, mark)
                self._files |= files
                self.is_whole = is_last

    def _target(self, piece: _Piece) -> Path:
        """Return the path of a file. Raises ProtocolError if it is not one of a project (I9)."""
        match piece.place:
            case "tree":
                check_path(piece.path)
                if is_replicated(piece.path):
                    return self._tree / piece.path
            case "journal" if _JOURNAL_FILE.fullmatch(piece.path):
                return self._copying / "journal" / piece.path
            case "project" if piece.path == _OWNERS:
                return self._copying / _OWNERS
        raise ProtocolError(f"a node sent a file that is not one of a project: {piece.path!r}")

    def _write(self, piece: _Piece) -> None:
        if piece.offset == 0:
            if self._open is not None:
                raise ProtocolError(f"{self._open[0]} is incomplete")
            path = self._target(piece)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # it may be a link to the present project's
            self._open = piece.path, path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | SAFE, 0o600)
            self._size, self._hasher = 0, hashlib.sha256()
        if self._open is None or (self._open[0], self._size) != (piece.path, piece.offset):
            raise ProtocolError(f"a piece of {piece.path!r} at {piece.offset} does not continue the one before")
        name, path, descriptor = self._open
        write_all(descriptor, piece.data)
        self._size += len(piece.data)
        self._hasher.update(piece.data)
        if piece.end is not None:
            if piece.end.digest != self._hasher.digest():
                raise ProtocolError(f"{name} does not have its digest")
            os.fchmod(descriptor, piece.end.mode & 0o777)
            os.utime(descriptor, ns=(piece.end.mtime_ns, piece.end.mtime_ns))
            self.close()
            if piece.place == "tree":
                self.found[name] = piece.end.digest

    def close(self) -> None:
        if self._open is not None:
            os.close(self._open[2])
            self._open = None

    def finish(self) -> Position:
        """Put the complete copy in place; it survives a crash. Raises ProtocolError if a file is missing."""
        for path in self.found.keys() - self._files.keys():
            (self._tree / path).unlink()
        states: dict[str, FileState] = {}
        for path, (size, digest) in self._files.items():
            if self.found.get(path) != digest:
                raise ProtocolError(f"the node did not send {path!r}")
            status = os.stat(self._tree / path, follow_symlinks=False)
            states[path] = FileState(size, digest, status.st_mtime_ns, status.st_ino)
        journal = self._copying / "journal"
        (journal / "undo").touch(mode=0o600)  # part of the journal's identity
        position = self._position
        listed = ManifestFile(position.epoch, position.seq, position.mark, "", False, states, place_of(journal))
        if not sync_file_systems([str(self._copying)]):  # cheaper than an fsync for each of thousands of files
            os.sync()
        save_manifest(journal / "manifest", msgspec.msgpack.encode(listed))
        os.rename(self._copying, self._paths.root / _COPIED)
        sync_directory(self._paths.root)
        finish_copy(self._paths)
        return position


def _digests(tree: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the replicated files with their digests."""
    for directory, _, names in os.walk(tree):
        for name in names:
            place = Path(directory) / name
            path = str(place.relative_to(tree))
            if not is_replicated(path):
                continue
            with contextlib.suppress(OSError):  # a link, or unreadable: it is sent
                descriptor = os.open(place, READ)
                try:
                    yield path, hash_descriptor(descriptor)[1].digest()
                finally:
                    os.close(descriptor)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        target.unlink()
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without links
        shutil.copy2(source, target, follow_symlinks=False)


def finish_copies(projects: Path) -> None:
    """Put the complete copies in place that a crash has left, before any project is opened. Raises OSError."""
    for copied in projects.glob(f"*/{_COPIED}"):
        finish_copy(ProjectPaths(copied.parent))


def finish_copy(paths: ProjectPaths) -> None:
    """Put a complete copy in place, if there is one. Idempotent after a crash. Raises OSError."""
    copied = paths.root / _COPIED
    if not copied.is_dir():
        return
    for name in (".lattice", "journal", _OWNERS):
        new, here = copied / name, paths.root / name
        if not new.exists():
            continue
        if here.exists():
            os.rename(here, copied / f"replaced-{name}")
        os.rename(new, here)
    sync_directory(copied)
    sync_directory(paths.root)
    shutil.rmtree(copied)
