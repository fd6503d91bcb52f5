"""Edits that were sent and not answered: what became of them is asked before anything is built on them (I6).

What was saved after an edit that was stored would else be taken for an edit of the text before it, and be a conflict
with itself; or for no edit, where it is just that text again, and be replaced by what it takes back. Kept on the disk
as well, as an agent may be killed between.
"""

import os
import time

import msgspec

from lattice_remote.client.cache.cache import BASE_DIRECTORY, Cache
from lattice_remote.client.runtime import boot_time
from lattice_remote.errors import StorageError
from lattice_remote.protocol.messages import Put

__all__ = ["Sent", "Unanswered"]

_MAX_KEPT_BYTES = 1024 * 1024
"""A larger edit is only kept in memory."""


class Sent(msgspec.Struct, frozen=True):
    """An edit on its way."""

    put: Put
    """With its base, whole."""
    frame: Put
    """As it was sent."""
    base: bytes | None
    """On which the file was based here."""
    at: float
    """When (seconds since 1970)."""

    def first_sent_at(self) -> float:
        """Return when that was, on the clock on which requests say how old they are."""
        return boot_time() - max(0.0, time.time() - self.at)


_decoder = msgspec.msgpack.Decoder(Sent)


class Unanswered:
    """The edits of one cache that were sent and not answered, one a file at the most."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._sent: dict[str, Sent] = {}

    def remember(self, sent: Sent) -> None:
        """This is about to be sent."""
        self._sent[sent.put.path] = sent
        data = msgspec.msgpack.encode(sent)
        if len(data) <= _MAX_KEPT_BYTES:
            self._cache.replace(_place(sent.put.path), data)

    def forget(self, path: str) -> None:
        """The answer is here, and was settled."""
        self._sent.pop(path, None)
        self._cache.delete(_place(path))

    def may_replace(self, path: str, base: bytes | None) -> bool:
        """Whether the server may have an edit in place of ``base``, which a file is based on here."""
        sent = self.get(path)
        return sent is not None and sent.base == base

    def get(self, path: str) -> Sent | None:
        """Return what was sent of a file and not answered, by this process or one before it."""
        if path not in self._sent and os.path.exists(self._cache.absolute(_place(path))):
            try:
                sent = _decoder.decode(self._cache.read(_place(path)))
            except (msgspec.DecodeError, StorageError, OSError):
                return None
            if sent.put.path == path:
                self._sent[path] = sent
        return self._sent.get(path)


def _place(path: str) -> str:
    return f"{BASE_DIRECTORY}/.sent/{path}"
