"""The cluster's engine: a connection to NATS JetStream, with buckets and contents."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lattice_remote.server.cluster.bucket import Bucket, BucketEntry
from lattice_remote.server.cluster.contents import StoredContents
from lattice_remote.server.cluster.jetstream import EngineRefused, EngineUnavailable, JetStream

__all__ = ["Bucket", "BucketEntry", "Engine", "EngineRefused", "EngineUnavailable"]

_KEEP_CONTENTS_S = 3600.0


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
