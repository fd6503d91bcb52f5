"""Bounded encoding and decoding of frames (SPEC section 2).

For any input, decoding raises only ``ProtocolError``.
"""

import msgspec

from lattice_remote.errors import ProtocolError
from lattice_remote.protocol.messages import (
    Change,
    ClientFrame,
    Download,
    Entries,
    Fetch,
    Part,
    Put,
    Replayed,
    ServerFrame,
)
from lattice_remote.protocol.operations import paths_of
from lattice_remote.protocol.paths import check_path

__all__ = ["FIRST_FRAME_BYTES", "MAX_FRAME_BYTES", "decode_client_frame", "decode_server_frame", "encode"]

FIRST_FRAME_BYTES = 64 * 1024
"""Maximum size of a client's first frame."""
MAX_FRAME_BYTES = 32 * 1024 * 1024
"""Maximum size of any frame."""

_encoder = msgspec.msgpack.Encoder()
_client_decoder: msgspec.msgpack.Decoder[ClientFrame] = msgspec.msgpack.Decoder(ClientFrame)
_server_decoder: msgspec.msgpack.Decoder[ServerFrame] = msgspec.msgpack.Decoder(ServerFrame)
_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def encode(frame: ClientFrame | ServerFrame) -> bytes:
    """Return a frame as bytes: one msgpack map."""
    return _encoder.encode(frame)


def decode_client_frame(data: bytes, *, max_bytes: int = MAX_FRAME_BYTES) -> ClientFrame:
    """Return a client's frame.

    Raises:
        ProtocolError: over ``max_bytes``, not msgpack, an unknown kind, a wrong type, out of bounds, or a
            path outside the replicated tree.
    """
    _check_size(data, max_bytes)
    try:
        frame = _client_decoder.decode(data)
    except _MALFORMED as error:
        raise ProtocolError(f"malformed frame: {error}") from error
    match frame:
        case Put() | Download():
            check_path(frame.path)
        case Fetch():
            for path in frame.paths:
                check_path(path)
        case _:
            pass
    return frame


def decode_server_frame(data: bytes, *, max_bytes: int = MAX_FRAME_BYTES) -> ServerFrame:
    """Return a server's frame.

    Raises:
        ProtocolError: in the cases of ``decode_client_frame``.
    """
    _check_size(data, max_bytes)
    try:
        frame = _server_decoder.decode(data)
    except _MALFORMED as error:
        raise ProtocolError(f"malformed frame: {error}") from error
    match frame:
        case Change():
            _check_change(frame)
        case Replayed():
            for change in frame.changes:
                _check_change(change)
        case Entries():
            for entry in frame.entries:
                check_path(entry.path)
        case Part():
            check_path(frame.path)
        case _:
            pass
    return frame


def _check_change(change: Change) -> None:
    for operation in change.ops:
        for path in paths_of(operation):
            check_path(path)


def _check_size(data: bytes, max_bytes: int) -> None:
    if len(data) > max_bytes:
        raise ProtocolError(f"frame of {len(data)} bytes is over the limit of {max_bytes}", code="REMOTE_TOO_LARGE")
