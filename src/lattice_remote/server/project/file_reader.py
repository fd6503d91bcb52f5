"""Files of the tree for clients, each consistent with a sequence number.

The tree on disk is ahead of the head by the running commands. A read counts only once the manifest at the head has the
same digest: at once, or in the tick that commits the change.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path

from lattice_remote.errors import Rejected, StorageError
from lattice_remote.files import READ
from lattice_remote.protocol.messages import Part, Parts, WholeFile, pack_files
from lattice_remote.protocol.operations import digest_of
from lattice_remote.server.project.history import Content
from lattice_remote.server.project.project import Project
from lattice_remote.server.transport.admission import ResponseShare
from lattice_remote.server.transport.websocket import SendQueue

__all__ = ["PIECE_BYTES", "FileSender", "Snapshot", "read_content", "text_at_head"]

_TEXT_SETTLE_S = 5.0
_RETRY_S = 0.02
_MAX_BYTES = 64 * 1024 * 1024
"""Larger than any text that clients may send; only a program on the server can create one."""


async def text_at_head(project: Project, path: str, share: ResponseShare) -> bytes | None:
    """Return the content of a plan or notes at the head, as part of ``share``.

    Raises Rejected: REMOTE_TOO_LARGE, or REMOTE_BUSY, too many responses outstanding; StorageError: it cannot be read,
    or differed from the head for ``_TEXT_SETTLE_S``.
    """
    try:
        async with share.making(), asyncio.timeout(_TEXT_SETTLE_S):
            text = await _settled(project, path)
            share.hold(text or b"")
            return text
    except TimeoutError:
        raise StorageError(f"{path} keeps changing; try again") from None
    except OSError as error:
        raise StorageError(f"the server cannot read {path}: {error.strerror}") from error


async def _settled(project: Project, path: str) -> bytes | None:
    while (content := project.history.files.get(path)) is not None:
        if content[0] > _MAX_BYTES:
            raise Rejected(f"{path} is too large to send: {content[0]} bytes", code="REMOTE_TOO_LARGE")
        data = await asyncio.to_thread(read_content, project.paths.lattice / path, content)
        if data is not None:
            return data
        if project.history.files.get(path) == content:
            project.files_touched({path})  # perhaps edited on the server
            await asyncio.sleep(_RETRY_S)
    return None


def read_content(path: Path, content: Content) -> bytes | None:
    """Return a file's bytes if they are this content. Blocking; raises OSError."""
    size, digest = content
    try:
        descriptor = os.open(path, READ)
    except FileNotFoundError:
        return None
    try:
        data = os.read(descriptor, size + 1)
    finally:
        os.close(descriptor)
    return data if digest_of(data) == digest else None


PIECE_BYTES = 1024 * 1024
"""Per frame."""
_MAX_GROWTH_BYTES = 4 * 1024 * 1024


class Snapshot:
    """Open file, digested as a whole and at its expected size: either may be sent."""

    def __init__(
        self, descriptor: int, size: int, digest: bytes, first: "tuple[int, hashlib._Hash]", data: bytes | None
    ) -> None:
        self.size = size
        self.digest = digest
        self._first = first  # number of leading bytes, and a hasher that has seen them
        self._descriptor: int | None = descriptor
        self._data = data  # the whole content of a small file
        if data is not None:
            self.close()  # a thousand clients in resync must not hold a descriptor per small file

    @classmethod
    def open(cls, path: Path, expected_size: int) -> "Snapshot | None":
        """Open and digest a file; None if there is none. Blocking; raises OSError."""
        try:
            descriptor = os.open(path, READ)
        except FileNotFoundError:
            return None
        try:
            return cls._read(descriptor, expected_size)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def _read(cls, descriptor: int, expected_size: int) -> "Snapshot":
        digest = hashlib.sha256()
        first = (0, digest.copy())
        data: bytes | None = b""
        size = 0
        while True:
            if size == expected_size:
                first = (size, digest.copy())
            wanted = PIECE_BYTES if size >= expected_size else min(PIECE_BYTES, expected_size - size)
            piece = os.pread(descriptor, wanted, size)
            if not piece:
                return cls(descriptor, size, digest.digest(), first, data)
            digest.update(piece)
            size += len(piece)
            data = None if data is None or size > PIECE_BYTES else data + piece

    def digest_at(self, size: int) -> bytes | None:
        """Return the digest of the first ``size`` bytes; None if the file is shorter, or has grown by much.

        Raises OSError.
        """
        if self._data is not None:
            return hashlib.sha256(self._data[:size]).digest() if size <= len(self._data) else None
        seen, digest = self._first
        if not seen <= size <= seen + _MAX_GROWTH_BYTES:
            return None
        assert self._descriptor is not None, "a large file stays open until close()"
        grown = os.pread(self._descriptor, size - seen, seen)
        digest = digest.copy()
        digest.update(grown)
        return digest.digest() if len(grown) == size - seen else None

    def piece(self, offset: int, size: int) -> bytes:
        """Return a piece of the content that has ``size`` bytes. Raises OSError."""
        if self._data is not None:
            return self._data[offset : min(size, offset + PIECE_BYTES)]
        assert self._descriptor is not None, "a large file stays open until close()"
        return os.pread(self._descriptor, min(PIECE_BYTES, size - offset), offset)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_BATCH_FILES = 256
_SETTLE_S = 0.25
"""Then the worker is asked to check the file."""

_log = logging.getLogger(__name__)


class FileSender:
    """Sender of files to one client, at the pace of its send queue; small ones in ``Parts`` if it ``compresses``."""

    def __init__(
        self, project: Project, outbox: SendQueue, push: Callable[[Part | Parts], None], *, compresses: bool = False
    ) -> None:
        self._project = project
        self._outbox = outbox
        self._push = push
        self._compresses = compresses

    def batch(self, paths: dict[str, None]) -> list[str]:
        taken: list[str] = []
        weight = 0
        for path in paths:
            weight += self._project.history.files.get(path, (0, b""))[0]
            if taken and (weight > PIECE_BYTES or len(taken) == _BATCH_FILES):
                break
            taken.append(path)
        for path in taken:
            del paths[path]
        return taken

    async def send(self, paths: list[str]) -> list[str]:
        """Send files; return those that kept changing."""
        if self._compresses and len(paths) > 1:
            sent = await self._send_compressed(paths)
            paths = [path for path in paths if path not in sent]
        files = self._project.history.files
        known = [(path, files[path]) for path in paths if path in files]
        snapshots = await asyncio.to_thread(_open_all, self._project.paths.lattice, known)
        try:
            expected = dict(known)
            return [path for path in paths if not await self._send(path, expected.get(path), snapshots.get(path))]
        finally:
            for snapshot in snapshots.values():
                snapshot.close()

    async def _send_compressed(self, paths: list[str]) -> Collection[str]:
        """Send most of these small files in one frame, unless one of them changes now; return those sent."""
        history, tree = self._project.history, self._project.paths.lattice
        known = [(path, history.files[path]) for path in paths if path in history.files]
        contents, size, data = await asyncio.to_thread(_compressed, tree, known)
        if not contents or any(history.files.get(path) != content for path, content in contents.items()):
            return ()
        self._push(Parts(history.head, size, data))
        await self._outbox.room()
        return contents.keys()

    async def _send(self, path: str, expected: Content | None, snapshot: Snapshot | None) -> bool:
        """Send one file if possible, without yielding between checking the manifest and pushing."""
        content = self._project.history.files.get(path)
        if content is None:
            self._push(Part(path, self._project.history.head, gone=True))
            return True
        if snapshot is None or snapshot.digest_at(content[0]) != content[1]:
            # It changed while being read, and the snapshot may already be outdated: retry.
            return content == expected and await self._send_when_committed(path, snapshot)
        seq = self._send_first(path, snapshot, content)
        return await self._send_rest(path, snapshot, content, seq)

    def _send_first(self, path: str, snapshot: Snapshot, content: Content) -> int:
        seq = self._project.history.head
        size, digest = content
        self._push(Part(path, seq, size, digest, 0, snapshot.piece(0, size)))
        return seq

    async def _send_rest(self, path: str, snapshot: Snapshot, content: Content, seq: int) -> bool:
        size, digest = content
        await self._outbox.room()
        for offset in range(PIECE_BYTES, size, PIECE_BYTES):
            piece = await asyncio.to_thread(snapshot.piece, offset, size)
            if len(piece) != min(PIECE_BYTES, size - offset):
                return False  # it is being truncated
            self._push(Part(path, seq, size, digest, offset, piece))
            await self._outbox.room()
        return True

    async def _send_when_committed(self, path: str, snapshot: Snapshot | None) -> bool:
        """Wait up to ``_SETTLE_S`` for the commit of the change that makes the snapshot current."""
        if snapshot is None:
            self._project.files_touched({path})
            await asyncio.sleep(_SETTLE_S)
            return False
        sent: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        content = (snapshot.size, snapshot.digest)

        def begin() -> None:
            if sent.done():
                return
            try:
                sent.set_result(self._send_first(path, snapshot, content))
            except OSError as error:  # must not reach the publisher
                sent.set_exception(error)

        forget = self._project.history.expect(path, content, begin)
        try:
            async with asyncio.timeout(_SETTLE_S):
                seq = await sent
        except TimeoutError:
            self._project.files_touched({path})
            return False
        finally:
            forget()
        return await self._send_rest(path, snapshot, content, seq)


def _compressed(tree: Path, known: list[tuple[str, Content]]) -> tuple[dict[str, Content], int, bytes]:
    """Return the files that have these contents, and ``size`` and ``data`` of their ``Parts``. Blocking."""
    contents: dict[str, Content] = {}
    files: list[WholeFile] = []
    for path, content in known:
        with contextlib.suppress(OSError):  # reported when it is sent by itself
            if (data := read_content(tree / path, content)) is not None:
                contents[path] = content
                files.append(WholeFile(path, content[1], data))
    return (contents, *pack_files(files)) if files else ({}, 0, b"")


def _open_all(tree: Path, known: list[tuple[str, Content]]) -> dict[str, Snapshot]:
    snapshots: dict[str, Snapshot] = {}
    for path, (size, _) in known:
        try:
            snapshot = Snapshot.open(tree / path, size)
        except OSError as error:
            _log.warning("cannot read %s: %s", tree / path, error)
            continue
        if snapshot is not None:
            snapshots[path] = snapshot
    return snapshots
