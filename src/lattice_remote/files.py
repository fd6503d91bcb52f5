"""File primitives: open flags, complete writes, atomic replacement, digests, signatures, records with a checksum.

Imports only what a short-lived command loads anyway.
"""

import contextlib
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import hashlib

__all__ = [
    "HEAD_BYTES",
    "READ",
    "SAFE",
    "Signature",
    "frame",
    "frames",
    "hash_descriptor",
    "payload_at",
    "signature_of",
    "sync_directory",
    "write_all",
    "write_atomically",
]


SAFE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
"""Flags for opening a path that another program may have replaced: a link fails, a pipe does not block."""
READ = os.O_RDONLY | SAFE
_PIECE_BYTES = 1 << 20

Signature = tuple[int, int, int, int]
"""Modification time (ns), size (bytes), inode and status change time (ns) of a file."""


def signature_of(status: os.stat_result) -> Signature:
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_ctime_ns


def write_all(descriptor: int, data: bytes | bytearray, offset: int | None = None) -> None:
    """Write all of ``data``, at ``offset`` if given. Raises OSError."""
    view = memoryview(data)
    while view:
        if offset is None:
            view = view[os.write(descriptor, view) :]
        else:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written


def write_atomically(
    path: "str | os.PathLike[str]",
    data: bytes,
    *,
    mode: int = 0o644,
    temporary: "str | os.PathLike[str] | None" = None,
    sync: Callable[[int], None] | None = os.fsync,
    is_parent_synced: bool = True,
) -> None:
    """Replace the file with ``data``. A reader sees the old content or the new, never a part (I8).

    Once this returns, the file survives a power cut. On any error the old file remains.

    Args:
        mode: of the new file, reduced by the umask.
        temporary: a path in the same directory, for recovery to know it; a leftover is overwritten. None: random.
        sync: makes a descriptor durable; None leaves that to the caller.
    """
    target = os.fspath(path)
    directory, name = os.path.split(target)
    if temporary is None:
        scratch, exclusive = os.path.join(directory, f".{name}.{os.urandom(8).hex()}"), os.O_EXCL
    else:
        scratch, exclusive = os.fspath(temporary), os.O_TRUNC
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | exclusive | SAFE, mode)
    try:
        try:
            write_all(descriptor, data)
            if sync is not None:
                sync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(scratch, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise
    if sync is not None and is_parent_synced:
        sync_directory(directory or ".", sync)


def sync_directory(path: "str | os.PathLike[str]", sync: Callable[[int], None] = os.fsync) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def hash_descriptor(descriptor: int, size: int | None = None) -> "tuple[int, hashlib._Hash]":
    """Return the number of bytes read, and the SHA-256 of the first ``size`` bytes of an open file (None: all)."""
    import hashlib

    hasher, position = hashlib.sha256(), 0
    while size is None or position < size:
        piece = os.pread(descriptor, _PIECE_BYTES if size is None else min(_PIECE_BYTES, size - position), position)
        if not piece:
            break
        hasher.update(piece)
        position += len(piece)
    return position, hasher


# --- records: length and CRC-32 (4 bytes each, big endian), then the payload ---

_HEAD = struct.Struct(">II")
HEAD_BYTES = _HEAD.size


def frame(payload: bytes) -> bytes:
    return _HEAD.pack(len(payload), zlib.crc32(payload)) + payload


def payload_at(data: bytes | memoryview, offset: int) -> bytes | None:
    """Return the payload of the record at ``offset``; None if it is torn, damaged or missing."""
    start = offset + HEAD_BYTES
    if start > len(data):
        return None
    length, checksum = _HEAD.unpack_from(data, offset)
    payload = bytes(data[start : start + length])
    # A run of zeros, which some file systems leave after a power cut, would pass for empty records.
    return payload if length and len(payload) == length and zlib.crc32(payload) == checksum else None


def frames(data: bytes | memoryview) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while (payload := payload_at(data, offset)) is not None:
        yield offset, payload
        offset += HEAD_BYTES + len(payload)
