"""Sends files of the tree to one client, each as it was at a number that the client can rely on.

The tree on disk is ahead of the head by the commands that are running. So what was read counts only once the
manifest at the head says the same: at once, or in the moment in which the change that made it is committed.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from lattice_remote.protocol.messages import Part
from lattice_remote.server.network.outbox import Outbox
from lattice_remote.server.project.history import Content
from lattice_remote.server.project.project import Project
from lattice_remote.server.project.snapshot import PIECE_BYTES, Snapshot

__all__ = ["FileSender"]

_BATCH_FILES = 64
_SETTLE_S = 0.25
"""How long a change may take from the disk to its commit before the worker is asked to look at the file."""

_log = logging.getLogger(__name__)


class FileSender:
    """Answers ``Fetch`` for one client, at the pace of its outbox."""

    def __init__(self, project: Project, outbox: Outbox, push: Callable[[Part], None]) -> None:
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
