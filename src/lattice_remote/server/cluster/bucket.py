"""Keys and values in the engine. Reads come from the leader, writes may expect a revision."""

from typing import NamedTuple, Self

from lattice_remote.server.cluster.jetstream import (
    FULL,
    WRONG_SEQUENCE,
    EngineFull,
    EngineUnavailable,
    JetStream,
    StoredMessage,
)

__all__ = ["Bucket", "BucketEntry"]

_SILENT_NS = 5_000_000_000


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
