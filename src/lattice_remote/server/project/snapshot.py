"""A file of the tree as it was when it was opened, to be sent in pieces while commands go on changing it.

lattice replaces files or appends to them. An open descriptor keeps what was replaced, and what was appended comes
after the bytes that count, so the content stays as it was. An editor that rewrites a file in place breaks that;
the client notices by the digest and asks again.
"""

import hashlib
import os
from pathlib import Path

__all__ = ["PIECE_BYTES", "Snapshot"]

PIECE_BYTES = 1024 * 1024
"""The most of a file that travels in one frame."""
_MAX_GROWTH_BYTES = 4 * 1024 * 1024


class Snapshot:
    """An open file of which both the first bytes and the whole may be what somebody asks for. Close it."""

    def __init__(
        self, descriptor: int, size: int, digest: bytes, first: "tuple[int, hashlib._Hash]", data: bytes | None
    ) -> None:
        self.size = size
        """Of the whole file, in bytes."""
        self.digest = digest
        """Of the whole file."""
        self._first = first  # a hasher that has seen as many first bytes
        self._descriptor: int | None = descriptor
        self._data = data  # all of it, when it is small
        if data is not None:
            self.close()  # a thousand clients that are filled at once hold no descriptor for every small file

    @classmethod
    def open(cls, path: Path, expected_size: int) -> "Snapshot | None":
        """Open and digest a file; None when there is none, or no plain one. Blocking: call it from a thread.

        Raises:
            OSError: it can't be read.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            return cls._read(descriptor, expected_size)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def _read(cls, descriptor: int, expected_size: int) -> "Snapshot":
        """Digest the file in one pass of bounded memory, with its expected first bytes on the way."""
        digest = hashlib.sha256()
        first = (0, digest.copy())
        data: bytes | None = b""
        size = 0
        while True:
            if size == expected_size:
                first = (size, digest.copy())
            wanted = PIECE_BYTES if size >= expected_size else min(PIECE_BYTES, expected_size - size)
            piece = os.pread(descriptor, wanted, size)
            if not piece:
                return cls(descriptor, size, digest.digest(), first, data)
            digest.update(piece)
            size += len(piece)
            data = None if data is None or size > PIECE_BYTES else data + piece

    def digest_at(self, size: int) -> bytes | None:
        """Return the digest of the first ``size`` bytes, None when it would take long to say, or there are fewer.

        Takes at most a few ms: the file may have grown since it was opened by what a busy log grows in that time.

        Raises:
            OSError: it can't be read.
        """
        if self._data is not None:
            return hashlib.sha256(self._data[:size]).digest() if size <= len(self._data) else None
        seen, digest = self._first
        if not seen <= size <= seen + _MAX_GROWTH_BYTES:
            return None
        assert self._descriptor is not None, "a large file stays open until close()"
        grown = os.pread(self._descriptor, size - seen, seen)
        digest = digest.copy()
        digest.update(grown)
        return digest.digest() if len(grown) == size - seen else None

    def piece(self, offset: int, size: int) -> bytes:
        """Return the piece at ``offset`` of content that is ``size`` bytes long.

        Raises:
            OSError: it can't be read.
        """
        if self._data is not None:
            return self._data[offset : min(size, offset + PIECE_BYTES)]
        assert self._descriptor is not None, "a large file stays open until close()"
        return os.pread(self._descriptor, min(PIECE_BYTES, size - offset), offset)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
