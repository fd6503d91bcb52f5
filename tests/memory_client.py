"""A client with its cache in memory: the connection and the replica of a real one, without files.

A process holds hundreds of them, and each can be compared with the server's directory byte for byte.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Iterable

from lattice_remote.client.cache.replicator import ReceiveOutcome
from lattice_remote.client.config import Remote
from lattice_remote.client.connection.connection import Connection
from lattice_remote.client.trusted_servers import Server
from lattice_remote.protocol.messages import Hello, Part, Position, ServerFrame
from lattice_remote.protocol.operations import MemoryTree, apply, digest_of
from lattice_remote.protocol.replica import ApplyChange, Compare, DeliverReply, Effect, Remove, Replica, Send, WritePart

__all__ = ["MemoryClient", "close_all"]


class MemoryClient:
    """One cache in memory with its connection. ``start()`` it inside a loop, ``close()`` it in the end."""

    def __init__(self, url: str, token: str, *, slug: str = "board", after: "MemoryClient | None" = None) -> None:
        self.files: dict[str, bytes] = dict(after.files) if after is not None else {}
        """The copy, by path."""
        self.replica = Replica(after.replica.position if after is not None else Position("", 0, b""))
        self.resyncs = 0
        """How often the whole copy was compared."""
        self._received: Counter[str] = Counter()
        self._parts: dict[str, bytearray] = {}
        self.link = Connection(Remote(name="origin", url=url, project=slug), self, token, named=Server(url))

    def start(self) -> None:
        """Begin to follow."""
        self.link.start()

    async def close(self) -> None:
        """End the connection."""
        await self.link.close()

    async def current(self, seq: int = 0, *, timeout_s: float = 60.0) -> None:
        """Wait until the cache has all that the server has announced, up to ``seq`` at least."""
        ok = await self.link.changed.until(lambda: self.has(seq), timeout_s)
        assert ok, f"at {self.replica.position.seq} of {self.replica.head} after {timeout_s} s: {self.link.error}"

    def has(self, seq: int) -> bool:
        """Return whether the cache has all that the server has announced, up to ``seq`` at least."""
        return self.is_current and self.replica.position.seq >= seq

    def received_bytes(self, prefix: str) -> int:
        """Return the received bytes of files below this directory."""
        return sum(size for path, size in self._received.items() if path.startswith(prefix))

    def digest(self) -> bytes:
        """Return one digest of all paths and contents."""
        whole = hashlib.sha256()
        for path in sorted(self.files):
            whole.update(path.encode() + b"\0" + digest_of(self.files[path]))
        return whole.digest()

    # --- Conversation ---

    @property
    def is_current(self) -> bool:
        return self.replica.is_current

    async def hello(self) -> Hello:
        return self.replica.hello(client_version="memory", lattice_version="memory")

    async def receive(self, frames: Iterable[ServerFrame]) -> ReceiveOutcome:
        outcome = ReceiveOutcome()
        for frame in frames:
            effects = self.replica.receive(frame)
            while effects:
                effects += self._perform(effects.pop(0), outcome)
        return outcome

    async def disconnected(self) -> None:
        self.replica.disconnected()
        self._parts.clear()

    def _perform(self, effect: Effect, outcome: ReceiveOutcome) -> list[Effect]:
        match effect:
            case ApplyChange(operations=operations):
                drifted = [path for operation in operations for path in apply(operation, MemoryTree(self.files))]
                return self.replica.drifted(drifted) if drifted else []
            case WritePart(part=part):
                return self._write(part)
            case Remove(paths=paths):
                for path in paths:
                    self.files.pop(path, None)
            case Compare():
                self.resyncs += 1
                local = {path: (len(data), digest_of(data)) for path, data in self.files.items()}
                return self.replica.compared(local)
            case Send(frame=frame):
                outcome.to_send.append(frame)
            case DeliverReply(frame=answer):
                outcome.answers.append(answer)
            case _:
                pass
        return []

    def _write(self, part: Part) -> list[Effect]:
        self._received[part.path] += len(part.data)
        data = bytearray() if part.offset == 0 else self._parts.pop(part.path, bytearray())
        if len(data) != part.offset:
            return self.replica.drifted([part.path])
        data += part.data
        if len(data) < part.size:
            self._parts[part.path] = data
        elif digest_of(bytes(data)) == part.digest:
            self.files[part.path] = bytes(data)
        else:
            return self.replica.drifted([part.path])
        return []


async def close_all(clients: Iterable[MemoryClient]) -> None:
    """End them all."""
    await asyncio.gather(*(client.close() for client in clients))
