"""Contents in the engine: files by their digest, and records that are too large for a message.

A content is stored in parts, as messages of one stream. A last message has their number. The library's object store is
not used: it sends parts without waiting for their acknowledgement, and reading takes quadratic time.
"""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec

from lattice_remote.files import sync_directory
from lattice_remote.server.cluster.jetstream import (
    FULL,
    EngineFull,
    EngineUnavailable,
    JetStream,
    StoredMessage,
    persist,
    ungrouped,
)

__all__ = ["StoredContents"]

_PART_BYTES, _PARTS_AT_ONCE = 512 * 1024, 4

_log = logging.getLogger(__name__)


class _End(msgspec.Struct, array_like=True):
    """Last message of a stored content; a content without it is incomplete."""

    size: int
    parts: int


class StoredContents:
    """Contents of all projects in one stream, each under a name without dots, or with those of its maker.

    Args:
        engine: the connection.
        name: of the stream: ``lattice-NAME``.
        keep_s: time after which the engine removes a content; None: it stays until it is dropped.
    """

    def __init__(self, engine: JetStream, name: str, keep_s: float | None = None) -> None:
        self._engine = engine
        self._stream = f"lattice-{name}"
        self._subject = f"lattice.{name}"
        self._keep_s = keep_s
        self._is_there = False

    async def put(self, digest: bytes, size: int, file: Path) -> bool:
        """Store the first ``size`` bytes of a file by their digest; False: the file has other ones.

        Nothing is sent if the content is there, and stays for half of its time. Once this returns True, it is on the
        disks of a majority. Raises EngineUnavailable, EngineFull, OSError.
        """
        end = await self._end_of(digest.hex())
        if end is not None and (self._keep_s is None or time.time() - end.stored_at < self._keep_s / 2):
            return True
        hashed = hashlib.sha256()
        with file.open("rb") as opened:

            def piece(offset: int, count: int) -> bytes:
                del offset  # pieces are asked for in order
                data = opened.read(count)
                hashed.update(data)
                return data

            parts = await self._put_pieces(digest.hex(), size, piece)
        if hashed.digest() != digest:
            return False
        await self._put_end(digest.hex(), size, parts)
        return True

    async def get(self, digest: bytes, to: Path) -> bool:
        """Write a stored content to ``to``, atomically and durably. False: it is not stored, or is damaged.

        Raises EngineUnavailable, OSError.
        """
        temporary = to.with_name(f".{to.name}.part")
        hashed = hashlib.sha256()
        try:
            with temporary.open("wb") as opened:
                async for part in self.get_parts(digest.hex()):
                    hashed.update(part)
                    await asyncio.to_thread(opened.write, part)
                await asyncio.to_thread(_flush, opened.fileno(), opened.flush)
        except KeyError:
            temporary.unlink()
            return False
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if hashed.digest() != digest:
            temporary.unlink()
            _log.error("the cluster's content %s is damaged; the project is copied from another node", digest.hex())
            return False
        temporary.replace(to)
        sync_directory(to.parent)
        return True

    async def has(self, digest: bytes) -> bool:
        """Return whether the whole content is stored."""
        return await self._end_of(digest.hex()) is not None

    async def _end_of(self, name: str) -> StoredMessage | None:
        await self._ensure()
        return await self._engine.message(self._stream, last_of=f"{self._subject}.{name}.end")

    async def put_parts(self, name: str, size: int, piece: Callable[[int, int], bytes]) -> None:
        """Store ``size`` bytes under a name. ``piece(offset, count)`` returns a part, in a thread. Idempotent.

        Raises EngineUnavailable, EngineFull.
        """
        await self._put_end(name, size, await self._put_pieces(name, size, piece))

    async def _put_pieces(self, name: str, size: int, piece: Callable[[int, int], bytes]) -> int:
        await self._ensure()
        step = min(_PART_BYTES, self._engine.max_message_bytes)
        waiting: set[asyncio.Task[None]] = set()
        offsets = range(0, size, step)
        with ungrouped():
            async with asyncio.TaskGroup() as group:
                for number, offset in enumerate(offsets):
                    data = await asyncio.to_thread(piece, offset, min(step, size - offset))
                    waiting.add(group.create_task(self._put_part(f"{name}.{number}", data)))
                    if len(waiting) == _PARTS_AT_ONCE:
                        _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return len(offsets)

    async def _put_end(self, name: str, size: int, parts: int) -> None:
        await self._put_part(f"{name}.end", msgspec.msgpack.encode(_End(size, parts)))

    async def get_parts(self, name: str) -> AsyncIterator[bytes]:
        """Yield the parts that are stored under a name. Raises KeyError if they are not there, or no longer."""
        await self._ensure()
        end = await self._part(f"{name}.end")
        for number in range(msgspec.msgpack.decode(end, type=_End).parts):
            yield await self._part(f"{name}.{number}")

    async def drop_parts(self, name: str) -> None:
        """Remove all parts under a name at once."""
        await self._ensure()
        await self._engine.purge(self._stream, subject=f"{self._subject}.{name}.>")

    async def part_names(self, prefix: str) -> list[str]:
        """Return the names ``prefix.*`` under which parts are stored."""
        await self._ensure()
        pattern = f"{self._subject}.{prefix}.*.end"
        found = (await self._engine.stream_info(self._stream, subjects=pattern)).state.subjects
        return [each.removeprefix(f"{self._subject}.").removesuffix(".end") for each in found]

    async def _ensure(self) -> None:
        if not self._is_there:
            config: dict[str, object] = {
                "subjects": [f"{self._subject}.>"],
                "max_msgs_per_subject": 1,
                "allow_rollup_hdrs": True,
                "allow_direct": True,
            }
            if self._keep_s is not None:
                config["max_age"] = int(self._keep_s * 1e9)
            await self._engine.ensure_stream(self._stream, config)
            self._is_there = True

    async def _put_part(self, name: str, data: bytes) -> None:
        async def attempt() -> None:
            ack = await self._engine.publish(f"{self._subject}.{name}", data)
            if ack.error is not None:
                if ack.error.err_code in FULL:
                    raise EngineFull(ack.error.err_code, ack.error.description)
                raise EngineUnavailable(f"NATS cannot store a content: {ack.error.description}")

        await persist(attempt)

    async def _part(self, name: str) -> bytes:
        subject = f"{self._subject}.{name}"

        async def attempt() -> bytes:
            answer = await self._engine.request(f"$JS.API.DIRECT.GET.{self._stream}.{subject}")
            if not (answer.headers or {}).get("Status"):
                return bytes(answer.data)
            found = await self._engine.message(self._stream, last_of=subject)  # a replica that lags behind says 404
            if found is None:
                raise KeyError(name)
            return found.data

        return await persist(attempt)


def _flush(descriptor: int, flush: Callable[[], None]) -> None:
    flush()
    os.fsync(descriptor)
