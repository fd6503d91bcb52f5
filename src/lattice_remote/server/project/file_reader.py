"""Sends files of the tree to one client, each as it was at a number that the client can rely on.

The tree on disk is ahead of the head by the commands that are running. So what was read counts only once the
manifest at the head says the same: at once, or in the moment in which the change that made it is committed.
"""

import asyncio
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from lattice_remote.errors import Rejected, StorageError
from lattice_remote.files import READ
from lattice_remote.protocol.messages import Part
from lattice_remote.protocol.operations import digest_of
from lattice_remote.server.project.history import Content
from lattice_remote.server.project.project import Project
from lattice_remote.server.transport.response_budget import ResponseShare
from lattice_remote.server.transport.send_queue import SendQueue

__all__ = ["PIECE_BYTES", "FileSender", "Snapshot", "text_at_head"]

_TEXT_SETTLE_S = 5.0
_LOOK_AGAIN_S = 0.02
_MAX_BYTES = 64 * 1024 * 1024
"""No client may send a text as large as this; somebody at the server may have put it there."""


async def text_at_head(project: Project, path: str, share: ResponseShare) -> bytes | None:
    """Return the content of a plan or notes; None when there is none. Belongs to the event loop's thread.

    It is counted as a part of the response that has this ``share``.

    The disk is ahead of the head by what is being written: what was read counts once it is what the head says.

    Raises:
        Rejected: REMOTE_TOO_LARGE, over 64 MiB; REMOTE_BUSY, the token has too many answers outstanding.
        StorageError: it can't be read, or was different from the head's for seconds.
    """
    try:
        async with share.making(), asyncio.timeout(_TEXT_SETTLE_S):
            text = await _settled(project, path)
            share.hold(text or b"")
            return text
    except TimeoutError:
        raise StorageError(f"{path} is changing all the time; try again") from None
    except OSError as error:
        raise StorageError(f"the server can't read {path}: {error.strerror}") from error


async def _settled(project: Project, path: str) -> bytes | None:
    while (content := project.history.files.get(path)) is not None:
        if content[0] > _MAX_BYTES:
            raise Rejected(f"{path} has {content[0]} bytes, too many to be sent at once", code="REMOTE_TOO_LARGE")
        data = await asyncio.to_thread(_read, project.paths.lattice / path, content[0])
        if data is not None and digest_of(data) == content[1]:
            return data
        if project.history.files.get(path) == content:
            project.files_touched({path})  # perhaps somebody has edited it here
            await asyncio.sleep(_LOOK_AGAIN_S)
    return None


def _read(path: Path, size: int) -> bytes | None:
    """Return a plain file's content, or one byte more than ``size`` when it is longer; None when there is none."""
    try:
        descriptor = os.open(path, READ)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read(size + 1)


PIECE_BYTES = 1024 * 1024
"""The most of a file that travels in one frame."""
_MAX_GROWTH_BYTES = 4 * 1024 * 1024


class Snapshot:
    """An open file of which both the first bytes and the whole may be what somebody asks for. Close it."""

    def __init__(
        self, descriptor: int, size: int, digest: bytes, first: "tuple[int, hashlib._Hash]", data: bytes | None
    ) -> None:
        self.size = size
        """Of the whole file, in bytes."""
        self.digest = digest
        """Of the whole file."""
        self._first = first  # a hasher that has seen as many first bytes
        self._descriptor: int | None = descriptor
        self._data = data  # all of it, when it is small
        if data is not None:
            self.close()  # a thousand clients that are filled at once hold no descriptor for every small file

    @classmethod
    def open(cls, path: Path, expected_size: int) -> "Snapshot | None":
        """Open and digest a file; None when there is none, or no plain one. Blocking: call it from a thread.

        Raises:
            OSError: it can't be read.
        """
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
        """Digest the file in one pass of bounded memory, with its expected first bytes on the way."""
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
        """Return the digest of the first ``size`` bytes, None when it would take long to say, or there are fewer.

        Takes at most a few ms: the file may have grown since it was opened by what a busy log grows in that time.

        Raises:
            OSError: it can't be read.
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
        """Return the piece at ``offset`` of content that is ``size`` bytes long.

        Raises:
            OSError: it can't be read.
        """
        if self._data is not None:
            return self._data[offset : min(size, offset + PIECE_BYTES)]
        assert self._descriptor is not None, "a large file stays open until close()"
        return os.pread(self._descriptor, min(PIECE_BYTES, size - offset), offset)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_BATCH_FILES = 64
_SETTLE_S = 0.25
"""How long a change may take from the disk to its commit before the worker is asked to look at the file."""

_log = logging.getLogger(__name__)


class FileSender:
    """Answers ``Fetch`` for one client, at the pace of its outbox."""

    def __init__(self, project: Project, outbox: SendQueue, push: Callable[[Part], None]) -> None:
        self._project = project
        self._outbox = outbox
        self._push = push

    def batch(self, paths: dict[str, None]) -> list[str]:
        """Take off the front of ``paths`` what can be read together: some files, or one large one."""
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
        """Send these files; return those that were changing all the while, to be sent again later."""
        files = self._project.history.files
        known = [(path, files[path]) for path in paths if path in files]
        snapshots = await asyncio.to_thread(_open_all, self._project.paths.lattice, known)
        try:
            expected = dict(known)
            return [path for path in paths if not await self._send(path, expected.get(path), snapshots.get(path))]
        finally:
            for snapshot in snapshots.values():
                snapshot.close()

    async def _send(self, path: str, expected: Content | None, snapshot: Snapshot | None) -> bool:
        """Send one file; return whether it could be done. From a look at the manifest to the push nothing waits."""
        content = self._project.history.files.get(path)
        if content is None:
            self._push(Part(path, self._project.history.head, gone=True))
            return True
        if snapshot is None or snapshot.digest_at(content[0]) != content[1]:
            # While it was read it changed, and what was read may have had its moment already: look again.
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
                return False  # somebody is cutting it short
            self._push(Part(path, seq, size, digest, offset, piece))
            await self._outbox.room()
        return True

    async def _send_when_committed(self, path: str, snapshot: Snapshot | None) -> bool:
        """The disk is ahead of the head: wait for the change that makes what was read the truth, for a while."""
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
            except OSError as error:  # this client's trouble, not that of whoever publishes
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
