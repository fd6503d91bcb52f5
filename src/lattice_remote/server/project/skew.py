"""Clients of another version: what is sent to one that understands less than this server (SPEC section 8).

An operation that a client has not named is told as an announcement of unknown content: the client then fetches the
file whole. That costs it a round trip, and keeps its copy equal (I3).
"""

import functools
from collections.abc import Iterator

import msgspec

from lattice_remote.errors import ProtocolError
from lattice_remote.protocol.codec import encode
from lattice_remote.protocol.messages import CAPABILITIES, Change, Hello
from lattice_remote.protocol.operations import AnnounceFile, AppendBytes, DeleteFile, MergeJson, MoveFile, Operation
from lattice_remote.server.network.outbox import payload_of, websocket_frame
from lattice_remote.server.worker.surfaces.registry import is_offered

__all__ = ["Dialect", "common_capabilities", "dialect", "offered_capabilities"]

_UNKNOWN = bytes(32)
"""A digest that no file has: whatever the client holds, it is to be fetched."""
_OPERATIONS = frozenset({"append", "merge", "move"})
_decoder = msgspec.msgpack.Decoder(Change)


def offered_capabilities() -> list[str]:
    """Return what this server can do with what is installed beside it."""
    return [name for name in CAPABILITIES if not name.startswith("call:") or is_offered(name.removeprefix("call:"))]


def common_capabilities(hello: Hello) -> frozenset[str]:
    """Return what both sides understand.

    Raises:
        ProtocolError: it is too little for a client that follows; the message says which side to upgrade.
    """
    common = frozenset(hello.capabilities) & frozenset(CAPABILITIES)
    if hello.follow and "announce" not in common:
        raise ProtocolError(
            f"the client (lattice-remote {hello.client_version[:40]}) can't fetch announced files: upgrade the client",
            code="REMOTE_VERSION",
        )
    return common


class Dialect:
    """How changes are told to clients that understand the same operations.

    A new change is told to all of them in one loop tick, so keeping the last is enough to translate it once, however
    many they are (I10).
    """

    def __init__(self, capabilities: frozenset[str]) -> None:
        self._capabilities = capabilities
        self._is_whole = capabilities >= _OPERATIONS
        self._last: tuple[bytes, bytes] = (b"", b"")  # a frame, and how it was told

    def told(self, frame: bytes) -> bytes:
        """Return a change's WebSocket frame as these clients understand it: the shared one, if they do."""
        if self._is_whole:
            return frame
        if self._last[0] is not frame:
            self._last = frame, self._translated(frame)
        return self._last[1]

    def _translated(self, frame: bytes) -> bytes:
        change = _decoder.decode(payload_of(frame))
        operations = [plain for operation in change.ops for plain in self._plain(operation)]
        if operations == change.ops:
            return frame
        return websocket_frame(encode(msgspec.structs.replace(change, ops=operations)))

    def _plain(self, operation: Operation) -> Iterator[Operation]:
        match operation:
            case AppendBytes() if "append" not in self._capabilities:
                yield AnnounceFile(operation.path, 0, _UNKNOWN)
            case MergeJson() if "merge" not in self._capabilities:
                yield AnnounceFile(operation.path, 0, _UNKNOWN)
            case MoveFile() if "move" not in self._capabilities:
                yield DeleteFile(operation.path)
                yield AnnounceFile(operation.to, 0, _UNKNOWN)
            case _:
                yield operation


def dialect(capabilities: frozenset[str]) -> Dialect:
    """Return the one that all clients with these capabilities share. There are as many as sets of operations: eight."""
    return _dialect(capabilities & _OPERATIONS)


@functools.cache
def _dialect(operations: frozenset[str]) -> Dialect:
    return Dialect(operations)
