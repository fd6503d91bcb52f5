"""A whole project as one sequence of bytes, for a push (SPEC 3.6).

A *pack* is the magic line, then each file: its head (length in 4 bytes, big endian, and a msgpack map of ``path``,
``size`` and ``digest``), then its content; then a length of 0. Paths ascend by code point, so that a project has one
pack, and none comes twice. There is nothing else in it: no links, no modes, no times, no owners.
"""

import hashlib
from collections.abc import Iterator

import msgspec

from lattice_remote.errors import ProtocolError
from lattice_remote.protocol.messages import Entry

__all__ = ["END", "MAGIC", "Unpacker", "head_of"]

MAGIC = b"lattice-pack 1\n"
END = bytes(4)
_MAX_HEAD_BYTES = 1024
"""A path of 512 bytes, a size and a digest take less."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Entry)


def head_of(entry: Entry) -> bytes:
    """Return what goes before a file's content."""
    encoded = _encoder.encode(entry)
    return len(encoded).to_bytes(4) + encoded


class Unpacker:
    """Takes a pack piece by piece, however it is cut, and gives out what is in it.

    Everything but the paths' meaning is checked: order, sizes, digests, the end.
    """

    def __init__(self) -> None:
        self.is_complete = False
        """Whether the end has come."""
        self._received = bytearray()
        self._started = False
        self._last = ""
        self._entry: Entry | None = None
        self._left = 0
        self._hasher = hashlib.sha256()

    def receive(self, data: bytes) -> Iterator[Entry | bytes]:
        """Yield an ``Entry`` where a file begins, then its content in pieces, none of them empty.

        All must be consumed before the next call.

        Raises:
            ProtocolError: this is no pack.
        """
        self._received += data
        if not self._started:
            if not MAGIC.startswith(self._received[: len(MAGIC)]):
                raise ProtocolError("not a pack of a project")
            if len(self._received) < len(MAGIC):
                return
            del self._received[: len(MAGIC)]
            self._started = True
        while True:
            if self._entry is not None:
                if self._left and not self._received:
                    return
                if piece := bytes(self._received[: self._left]):
                    del self._received[: len(piece)]
                    self._left -= len(piece)
                    self._hasher.update(piece)
                    yield piece
                if self._left:
                    return
                self._end_file(self._entry)
            elif (entry := self._next_head()) is not None:
                yield entry
            else:
                return

    def _next_head(self) -> Entry | None:
        """Return the head that has come; None while it has not come whole, and at the end."""
        if self.is_complete:
            if self._received:
                raise ProtocolError("something follows the end of the pack")
            return None
        if len(self._received) < 4:
            return None
        length = int.from_bytes(self._received[:4])
        if not length:
            self.is_complete = True
            del self._received[:4]
            return self._next_head()
        if length > _MAX_HEAD_BYTES:
            raise ProtocolError(f"a head of {length} bytes in the pack")
        if len(self._received) < 4 + length:
            return None
        entry = self._decoded(bytes(self._received[4 : 4 + length]))
        del self._received[: 4 + length]
        self._entry, self._left, self._hasher, self._last = entry, entry.size, hashlib.sha256(), entry.path
        return entry

    def _decoded(self, head: bytes) -> Entry:
        try:
            entry = _decoder.decode(head)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"a malformed head in the pack: {error}") from error
        if _encoder.encode(entry) != head:
            raise ProtocolError(f"the head of {entry.path!r} in the pack has another form than it must have")
        if self._last >= entry.path:
            raise ProtocolError(f"{entry.path!r} is not in its place in the pack")
        return entry

    def _end_file(self, entry: Entry) -> None:
        if self._hasher.digest() != entry.digest:
            raise ProtocolError(f"{entry.path!r} has another digest than its head in the pack says")
        self._entry = None
