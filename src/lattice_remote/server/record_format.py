"""Record format on disk: length and CRC-32 (4 bytes each, big endian), then the payload."""

import struct
import zlib
from collections.abc import Iterator

__all__ = ["HEAD_BYTES", "frame", "frames", "payload_at"]

_HEAD = struct.Struct(">II")
HEAD_BYTES = _HEAD.size


def frame(payload: bytes) -> bytes:
    """Return the record that holds ``payload``."""
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
    """Yield each whole record's offset and payload, up to the first that is torn or damaged."""
    offset = 0
    while (payload := payload_at(data, offset)) is not None:
        yield offset, payload
        offset += HEAD_BYTES + len(payload)
