"""Resumable upload of a file in parts.

The server keeps received parts for a day under the content's digest, so another agent or command can resume. Use a
separate connection (``ConnectionPool.bulk``): no command should wait behind the parts.
"""

import asyncio
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from lattice_remote.client.agent_runtime import new_request_id
from lattice_remote.client.connection.connection import RequestSender, expect
from lattice_remote.errors import ConnectionFailed, Rejected, StorageError
from lattice_remote.files import hash_descriptor
from lattice_remote.protocol.messages import Refused, Upload, Uploaded

__all__ = ["Source", "upload"]

_PIECE_BYTES = 256 * 1024
_WINDOW = 8
"""Parts in flight: enough to fill a line, few enough to leave room for others."""
_MAX_SETBACKS = 10
"""Most losses of received parts; a restarted server loses them once."""
_BUSY_ATTEMPTS, _BUSY_DELAY_S = 20, 0.5


@dataclass(frozen=True, slots=True)
class Source:
    descriptor: int
    size: int
    digest: bytes

    @classmethod
    async def of(cls, descriptor: int) -> "Source":
        """Read a plain file, in a thread, for its digest. Raises OSError."""
        return await asyncio.to_thread(cls._read, descriptor)

    @classmethod
    def _read(cls, descriptor: int) -> "Source":
        size, hasher = hash_descriptor(descriptor)
        return cls(descriptor, size, hasher.digest())


async def upload(
    connection: RequestSender,
    source: Source,
    *,
    purpose: str = "attachment",
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Upload ``source``, without the parts that the server already has. Repeat it after a cancellation or failure.

    Args:
        connection: its token may then refer to the upload by digest and size, for a day.
        purpose: see ``messages.Upload``.

    Raises:
        Rejected: too large, no room on the server, or a server version without uploads.
        ConnectionFailed: the server is unreachable.
        StorageError: the file cannot be read, or changes while it is read.
    """
    for attempts_left in (1, 0):
        sender = _Sender(connection, source, purpose, on_progress or (lambda _have, _size: None))
        try:
            await sender.run()
        except Rejected as rejected:
            if rejected.code != "REMOTE_PROTOCOL":
                raise
            if not attempts_left:  # the earlier parts may have been of another file; this time all were ours
                raise StorageError("the file that is to be sent changes while it is read; try again") from rejected
        else:
            return
        finally:
            await sender.stop()


class _Sender:
    def __init__(
        self, connection: RequestSender, source: Source, purpose: str, report: Callable[[int, int], None]
    ) -> None:
        self._connection = connection
        self._source = source
        self._purpose = purpose
        self._report = report
        self._under_way: deque[tuple[int, asyncio.Task[int]]] = deque()  # end of each part in flight

    async def run(self) -> None:
        size = self._source.size
        have = sent = await self._ask(0, b"")
        self._report(have, size)
        setbacks = 0
        while have < size:
            while sent < size and len(self._under_way) < _WINDOW:
                piece = await self._piece(sent)
                sent += len(piece)
                self._under_way.append((sent, asyncio.create_task(self._ask(sent - len(piece), piece))))
            end, work = self._under_way.popleft()
            have = await work
            self._report(have, size)
            if not end <= have <= sent:  # the server lost parts, or has others by now: continue from there
                setbacks += have < end
                if setbacks > _MAX_SETBACKS:
                    raise ConnectionFailed("the server keeps losing what is sent; try again later")
                await self.stop()
                sent = have

    async def stop(self) -> None:
        for _, work in self._under_way:
            work.cancel()
        await asyncio.gather(*(work for _, work in self._under_way), return_exceptions=True)
        self._under_way.clear()

    async def _piece(self, offset: int) -> bytes:
        try:
            piece = await asyncio.to_thread(os.pread, self._source.descriptor, _PIECE_BYTES, offset)
        except OSError as error:
            raise StorageError(f"cannot read the file that is to be sent: {error.strerror}") from error
        if len(piece) != min(_PIECE_BYTES, self._source.size - offset):
            raise StorageError("the file that is to be sent was cut short while it was read; try again")
        return piece

    async def _ask(self, offset: int, data: bytes) -> int:
        """Send a part, or a query without data; return the size there."""
        source = self._source
        for attempts_left in reversed(range(_BUSY_ATTEMPTS)):
            frame = Upload(new_request_id(), source.digest, source.size, offset, data, self._purpose)
            answer = await self._connection.send_request(frame)
            if isinstance(answer, Refused) and answer.code == "REMOTE_BUSY" and attempts_left:
                await asyncio.sleep(_BUSY_DELAY_S)
                continue
            if (have := expect(answer, Uploaded).have) > source.size:
                raise ConnectionFailed("unexpected response from the server")
            return have
        raise AssertionError("the last attempt returns or raises")
