"""Leases: which node should own a project. The stream decides which one does (``order.py``)."""

import asyncio
import secrets
import time

import msgspec

from lattice_remote.server.cluster.engine import Bucket, BucketEntry, Engine, EngineRefused, EngineUnavailable

__all__ = ["Held", "Lease", "LeaseHolder"]

_BUCKET = "lattice-leases"


class LeaseHolder(msgspec.Struct, frozen=True):
    """Value of a lease.

    Attributes:
        node: name of the node; empty once it was released.
        url: where other nodes reach it.
        term: grows with every holder.
        wanted: the only node that may take a released lease before it expires; empty: any.
        token: of the one ``acquire()`` that wrote this.
    """

    node: str
    url: str
    term: int
    wanted: str = ""
    token: str = ""


class Lease:
    """The leases of all projects, one entry each. An entry expires ``ttl_s`` after its last renewal."""

    def __init__(self, engine: Engine, ttl_s: float = 5.0, *, bucket: str = _BUCKET) -> None:
        self._engine = engine
        self._ttl_s = ttl_s
        self._name = bucket
        self._opened: Bucket | None = None

    async def acquire(self, slug: str, *, node: str, url: str, after: int | None = None) -> "Held | None":
        """Take the lease of a project. None: another node has it, or was faster.

        Args:
            slug: of the project.
            node, url: of this node.
            after: the last owner's term according to the stream; the new term is higher, also if the leases were lost.

        Raises EngineUnavailable; the lease may have been taken and then expires unused.
        """
        bucket = await self._bucket()
        started = time.monotonic()
        found, number = await self._entry(slug)
        token = secrets.token_hex(8)
        revision: int | None
        if found is None:
            holder = LeaseHolder(node, url, max(number, after or 0) + 1, token=token)
            revision = await bucket.create(slug, msgspec.json.encode(holder))
        else:
            last = msgspec.json.decode(found.value, type=LeaseHolder)
            if last.node or last.wanted not in ("", node):
                return None
            holder = LeaseHolder(node, url, max(last.term, after or 0) + 1, token=token)
            revision = await bucket.update(slug, msgspec.json.encode(holder), found.revision)
        return None if revision is None else Held(bucket, slug, holder, revision, ttl_s=self._ttl_s, renewed=started)

    async def holder(self, slug: str) -> LeaseHolder | None:
        """Return the current holder; None: there is none, or it has released the lease. Raises EngineUnavailable."""
        found, _ = await self._entry(slug)
        if found is None:
            return None
        holder = msgspec.json.decode(found.value, type=LeaseHolder)
        return holder if holder.node or holder.wanted else None

    async def _entry(self, slug: str) -> tuple[BucketEntry | None, int]:
        """Return the entry of a project, and the number of the last change of any."""
        bucket = await self._bucket()
        try:
            return await bucket.get(slug), await bucket.revision()
        except EngineRefused as error:  # the bucket was deleted: no node has a lease
            self._opened = None
            raise EngineUnavailable(error.message) from error

    async def _bucket(self) -> Bucket:
        if self._opened is None:
            self._opened = await self._engine.kv(self._name, ttl_s=self._ttl_s)
        return self._opened


class Held:
    """A lease that this node holds. ``renew()`` at a third of its time, and only while there is progress.

    Attributes:
        holder: its value.
        lost: set once another node may have the lease: after a refused renewal, and ``ttl_s`` after the last one.
    """

    def __init__(
        self, bucket: Bucket, slug: str, holder: LeaseHolder, revision: int, *, ttl_s: float, renewed: float
    ) -> None:
        self.holder = holder
        self.lost = asyncio.Event()
        self._bucket = bucket
        self._slug = slug
        self._revision = revision
        self._ttl_s = ttl_s
        self._expiry: asyncio.TimerHandle | None = None
        self._extend(renewed)

    @property
    def term(self) -> int:
        return self.holder.term

    async def renew(self) -> bool:
        """Extend the lease. False: not now, for example without an answer; True also ends doubt about an earlier one.

        ``lost`` is set if another node has it.
        """
        if self.lost.is_set():
            return False
        started = time.monotonic()
        try:
            revision = await self._bucket.update(self._slug, msgspec.json.encode(self.holder), self._revision)
            if revision is None:
                # Another node, or an earlier renewal whose answer was lost.
                found = await self._bucket.get(self._slug)
                if found is None or msgspec.json.decode(found.value, type=LeaseHolder).token != self.holder.token:
                    self._lose()
                    return False
                self._revision = found.revision
                revision = await self._bucket.update(self._slug, msgspec.json.encode(self.holder), self._revision)
        except (EngineUnavailable, EngineRefused):
            return False
        if revision is None:
            return False
        self._revision = revision
        self._extend(started)
        return True

    async def release(self, hand_to: str = "") -> None:
        """Give the lease up, at once for ``hand_to`` or for any node. ``lost`` is set. Without an answer it expires."""
        if self.lost.is_set():
            return
        self._lose()
        given = LeaseHolder("", "", self.holder.term, wanted=hand_to)
        try:
            await self._bucket.update(self._slug, msgspec.json.encode(given), self._revision)
        except (EngineUnavailable, EngineRefused):
            return

    def _extend(self, since: float) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        left = since + self._ttl_s - time.monotonic()
        self._expiry = asyncio.get_running_loop().call_later(max(0.0, left), self._lose)

    def _lose(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        self.lost.set()
