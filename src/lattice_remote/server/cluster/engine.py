"""The cluster's engine: a connection to NATS JetStream, with buckets of keys and values, and contents of files.

Reads of a bucket come from the leader, and writes may expect a revision. A content is stored in parts by its digest;
the object store of JetStream is not used: it sends parts without waiting for their acknowledgement, and reading a
large one takes time that grows with its square.
"""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec

from lattice_remote.files import sync_directory
from lattice_remote.server.cluster.jetstream import (
    FULL,
    WRONG_SEQUENCE,
    EngineFull,
    EngineRefused,
    EngineUnavailable,
    JetStream,
    StoredMessage,
    persist,
    ungrouped,
)

__all__ = ["Bucket", "BucketEntry", "Engine", "EngineRefused", "EngineUnavailable", "StoredContents"]

_SILENT_NS = 5_000_000_000
_PART_BYTES, _PARTS_AT_ONCE = 512 * 1024, 4
_KEEP_CONTENTS_S = 3600.0

_log = logging.getLogger(__name__)


class BucketEntry(NamedTuple):
    """Value of a key. ``revision`` grows with every change in the bucket."""

    value: bytes
    revision: int


class Bucket:
    """A bucket, made by ``open()``. A key has letters, digits, ``-``, ``_``, ``.`` and ``/``.

    Every method raises EngineUnavailable; after one that writes, the outcome is unknown.
    """

    def __init__(self, engine: JetStream, name: str) -> None:
        self._engine = engine
        self._stream = f"KV_{name}"
        self._prefix = f"$KV.{name}."

    @classmethod
    async def open(cls, engine: JetStream, name: str, ttl_s: float | None = None) -> Self:
        """Open a bucket; create it if it is missing.

        Args:
            engine: the connection.
            name: of the bucket.
            ttl_s: time from an entry's last change to its expiry, which notifies no reader; None: it never expires.
        """
        config: dict[str, object] = {
            "subjects": [f"$KV.{name}.>"],
            "max_msgs_per_subject": 1,
            "allow_rollup_hdrs": True,
            "deny_delete": True,
            # A direct read may come from a replica that lags behind.
            "allow_direct": False,
        }
        if ttl_s is not None:
            config |= {"max_age": int(ttl_s * 1e9), "duplicate_window": int(min(ttl_s, 120.0) * 1e9)}
        await engine.ensure_stream(f"KV_{name}", config)
        return cls(engine, name)

    async def get(self, key: str) -> BucketEntry | None:
        """Return the entry, None if there is none or it has expired."""
        found = await self._engine.message(self._stream, last_of=self._prefix + key)
        return None if found is None or _is_deletion(found) else BucketEntry(found.data, found.seq)

    async def changed_at(self, key: str) -> float:
        """Return when a key was changed, by the engine's clock; in seconds since the epoch, 0 if there is none."""
        found = await self._engine.message(self._stream, last_of=self._prefix + key)
        return 0.0 if found is None else found.stored_at

    async def put(self, key: str, value: bytes) -> int:
        """Set a key, over any value. Returns the new revision."""
        revision = await self._write(key, value, {})
        assert revision is not None, "nothing is expected of the last revision"
        return revision

    async def create(self, key: str, value: bytes) -> int | None:
        """Set a key that has no value. Returns its revision, None if it has one."""
        revision = await self.update(key, value, 0)
        if revision is None:
            found = await self._engine.message(self._stream, last_of=self._prefix + key)
            if found is not None and _is_deletion(found):
                return await self.update(key, value, found.seq)
        return revision

    async def update(self, key: str, value: bytes, revision: int) -> int | None:
        """Set a key that still has this revision. Returns the new one, None if another write was faster."""
        return await self._write(key, value, {"Nats-Expected-Last-Subject-Sequence": str(revision)})

    async def delete(self, key: str, revision: int | None = None) -> bool:
        """Remove a key, with ``revision`` only if it still has it. Returns whether it did."""
        headers = {"KV-Operation": "DEL"}
        if revision is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(revision)
        return await self._write(key, b"", headers) is not None

    async def keys(self) -> list[str]:
        """Return the keys with a value, sorted."""
        return sorted(await self.entries())

    async def entries(self) -> dict[str, BucketEntry]:
        """Return all entries. They are read one by one, not at one moment."""
        info = await self._engine.stream_info(self._stream, subjects=f"{self._prefix}>")
        keys = [subject.removeprefix(self._prefix) for subject in info.state.subjects]
        return {key: entry for key in keys if (entry := await self.get(key)) is not None}

    async def servers(self) -> dict[str, bool]:
        """Return the names of the servers with a copy of the bucket, and whether they are up."""
        group = (await self._engine.stream_info(self._stream)).cluster
        if group is None:
            return {}
        return {group.leader: True} | {
            each.name: not each.offline and each.active < _SILENT_NS for each in group.replicas
        }

    async def revision(self) -> int:
        """Return the number of the last change in the bucket: a cheap way to see that there was one."""
        return (await self._engine.stream_info(self._stream)).state.last_seq

    async def _write(self, key: str, value: bytes, headers: dict[str, str]) -> int | None:
        ack = await self._engine.publish(self._prefix + key, value, headers)
        if ack.error is None:
            return ack.seq
        if ack.error.err_code in WRONG_SEQUENCE:
            return None
        if ack.error.err_code in FULL:
            raise EngineFull(ack.error.err_code, ack.error.description)
        raise EngineUnavailable(f"NATS cannot write {key}: {ack.error.description}")


def _is_deletion(message: StoredMessage) -> bool:
    return message.headers.get("KV-Operation") in ("DEL", "PURGE") or "Nats-Marker-Reason" in message.headers


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


class Engine(JetStream):
    """One connection to the engine, made by ``connect()`` and reopened for ever. ``close()`` ends it.

    Attributes:
        contents: of files, for an hour: a node that needs an older one copies the project from another node.
        parts: of records that are too large for a message, until their stream is purged.
    """

    def __init__(self, options: Mapping[str, Any], node: str, replicas: int) -> None:
        super().__init__(options, node, replicas)
        self.contents = StoredContents(self, "contents", _KEEP_CONTENTS_S)
        self.parts = StoredContents(self, "parts")

    async def kv(self, bucket: str, ttl_s: float | None = None) -> Bucket:
        """Open a bucket, see ``Bucket.open``."""
        return await Bucket.open(self, bucket, ttl_s)

    async def put_content(self, digest: bytes, size: int, file: Path) -> bool:
        """Store a file's content, see ``StoredContents.put``."""
        return await self.contents.put(digest, size, file)

    async def get_content(self, digest: bytes, to: Path) -> bool:
        """Write a stored content to a file, see ``StoredContents.get``."""
        return await self.contents.get(digest, to)
