"""Messages between a project's server side and its child processes, and their framing.

A frame is a length (4 bytes, big endian) and one msgpack map. The worker answers in order; a ``RequestDone`` is durable
(I2).
"""

import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

import msgspec

from lattice_remote.errors import StorageError
from lattice_remote.protocol.messages import Attachment
from lattice_remote.protocol.operations import AnnounceFile

__all__ = [
    "GO",
    "MAX_FORK_REQUEST_BYTES",
    "AbandonRequest",
    "ApplyRecords",
    "CopyMissing",
    "Edit",
    "FrameBuffer",
    "HookCall",
    "ImportProject",
    "Lead",
    "ListIndex",
    "NewEpoch",
    "PathState",
    "Read",
    "ReadCommand",
    "ReadPage",
    "ReadResult",
    "Ready",
    "ReceivedFrames",
    "Reconcile",
    "RecordApplied",
    "RequestDone",
    "ResultStats",
    "RunCall",
    "RunCommand",
    "Stop",
    "ToServer",
    "ToWorker",
    "WorkerFailed",
    "asked_by",
    "encode_frames",
]


class _Message(msgspec.Struct, frozen=True, tag_field="type"):
    pass


class RunCommand(_Message, frozen=True, tag="command"):
    """A command line to run once for this id (I6).

    Attributes:
        last_try: ``resource acquire --wait`` answers as lattice does. Otherwise the worker tries once and names the
            awaited resource in ``RequestDone.waiting_for``.
        first_sent_at: seconds since the epoch, if the request may have been sent before.
        ahead: resources and locks (``locks/tasks_...``) with earlier waiters; ``--wait`` takes none of them.
        may_wait: wait for another process's lock, as for a resource; otherwise refuse.
        fingerprint: digest of the request; empty: made from ``asked_by``.
    """

    id: str
    argv: list[str]
    files: list[Attachment]
    token_id: str
    actor: str
    act_as: list[str]
    last_try: bool = False
    first_sent_at: float | None = None
    ahead: list[str] = []
    may_wait: bool = True
    fingerprint: bytes = b""


class RunCall(_Message, frozen=True, tag="call"):
    """An operation of a surface; see ``CallRequest`` and ``RunCommand``."""

    id: str
    surface: str
    name: str
    payload: bytes
    files: list[Attachment]
    token_id: str
    actor: str
    act_as: list[str]
    first_sent_at: float | None = None
    ahead: list[str] = []
    may_wait: bool = True
    fingerprint: bytes = b""


class Edit(_Message, frozen=True, tag="edit"):
    """A plan or notes, merged by line. ``base_digest``, unless empty, stands for a base equal to the file's content."""

    id: str
    path: str
    base: bytes | None
    text: bytes
    token_id: str
    actor: str
    first_sent_at: float | None = None
    base_digest: bytes = b""
    fingerprint: bytes = b""


class ImportProject(_Message, frozen=True, tag="import"):
    """A checked project that replaces this empty one. The worker exits; the next one completes it and replies.

    ``candidate`` is relative to the project's directory; "" if it is gone: repeat the reply, or refuse. ``fingerprint``
    is a digest of the pushed project.
    """

    id: str
    token_id: str
    actor: str
    candidate: str = ""
    tasks: int = 0
    archived: int = 0
    files: int = 0
    notes: list[str] = []
    first_sent_at: float | None = None
    fingerprint: bytes = b""


class Reconcile(_Message, frozen=True, tag="reconcile"):
    """A request to number the outside changes of these files; None: of any (I12)."""

    paths: list[str] | None


class NewEpoch(_Message, frozen=True, tag="new-epoch"):
    """A client has proved a rollback (I7)."""

    reason: str


class AbandonRequest(_Message, frozen=True, tag="abandon"):
    """A request that ended its worker: repeat its journalled reply, else refuse it; its effects were undone (I6)."""

    id: str
    token_id: str
    code: str
    message: str


class ApplyRecords(_Message, frozen=True, tag="apply"):
    """Apply these records of the project's owner, see ``worker/follower.py``.

    ``contents`` has a file with each announced content, by digest in hexadecimal digits.
    """

    records: list[bytes]
    contents: dict[str, str] = {}


class Lead(_Message, frozen=True, tag="lead"):
    """Execute requests from now on: this node owns the project.

    Outside changes are numbered if ``keeps_edits``, else undone (I12).
    """

    keeps_edits: bool


class Stop(_Message, frozen=True, tag="stop"):
    pass


def asked_by(request: RunCommand | RunCall | Edit) -> tuple[object, ...]:
    """Return the identity of a request: two with one id must have the same (I6)."""
    tag = request.__struct_config__.tag
    match request:
        case RunCommand():
            return (tag, request.argv, request.files)
        case RunCall():
            return (tag, request.surface, request.name, request.payload, request.files)
        case Edit():
            return (tag, request.path, request.base, request.base_digest, request.text)


ToWorker = (
    RunCommand | RunCall | Edit | ImportProject | Reconcile | NewEpoch | AbandonRequest | ApplyRecords | Lead | Stop
)


class PathState(msgspec.Struct, frozen=True, gc=False):
    path: str
    size: int
    digest: bytes | None


class HookCall(msgspec.Struct, frozen=True):
    command: str
    env: dict[str, str]
    stdin: str


class ResultStats(msgspec.Struct, frozen=True):
    """The outcome of a request for log and metrics, without the caller's text.

    Attributes:
        seconds: in the worker, without the wait until it was durable.
        again: the reply was repeated.
        made: sequence number of its change.
    """

    command: str = ""
    code: str = ""
    status: int = 0
    seconds: float = 0.0
    again: bool = False
    made: int | None = None


class Ready(_Message, frozen=True, tag="ready"):
    """The project is open: the first message, repeated after ``NewEpoch``. ``notes`` are for the log."""

    epoch: str
    head: int
    mark: bytes
    oldest: int
    lattice_version: str
    files: list[PathState]
    notes: list[str] = []


class RequestDone(_Message, frozen=True, tag="done"):
    """One finished, durable request, or a reconciliation (``id`` "").

    With ``waiting_for`` it is unanswered: it waits for another process's lock (``locks/tasks_...``), or for the next
    change of a resource or its expiry at ``retry_at`` (seconds since the epoch). A reconciliation with ``retry_at`` has
    omitted files whose lock was busy.
    """

    id: str
    seq: int
    mark: bytes = b""
    change: bytes | None = None
    reply: bytes | None = None
    after: list[PathState] = []
    hooks: list[HookCall] = []
    waiting_for: str | None = None
    wait_timeout_s: float = 0.0
    retry_at: float | None = None
    oldest: int = 0
    more: bool = False
    """Request it again."""
    is_extra: bool = False
    """An outside change before the oldest request, which is still unanswered (I12)."""
    report: ResultStats = ResultStats()
    synced_s: float | None = None
    """Duration of the journal's fsync, in one message of all that it covers."""
    record: bytes = b""
    """The journal's record of it, for a cluster's other nodes."""
    announced: list[AnnounceFile] = []
    """Files with a content that the record only announces, likewise; each has a link in ``ProjectPaths.announced``."""
    number: int = 0
    """The number of the next record in the journal, likewise."""


class WorkerFailed(_Message, frozen=True, tag="failed"):
    """The journal cannot be written, or the tree not read; the worker exits."""

    message: str


class RecordApplied(_Message, frozen=True, tag="applied"):
    """One of ``ApplyRecords`` is durable; ``change`` is its encoded frame, None for one without."""

    seq: int
    mark: bytes
    change: bytes | None
    after: list[PathState]
    oldest: int
    number: int
    """The number of the next record in the journal."""


class CopyMissing(_Message, frozen=True, tag="copy-missing"):
    """This node's copy of the project is unusable and must be fetched from another node; the worker exits."""

    reason: str


ToServer = Ready | RequestDone | RecordApplied | CopyMissing | WorkerFailed


_RECEIVE_BYTES = 256 * 1024
_encoder = msgspec.msgpack.Encoder()


def encode_frames(*messages: object) -> bytearray:
    frames = bytearray()
    for message in messages:
        data = _encoder.encode(message)
        frames += len(data).to_bytes(4) + data
    return frames


class FrameBuffer:
    def __init__(self, max_bytes: int = 2**32) -> None:
        self._max_bytes = max_bytes
        self._received = bytearray()

    def receive(self, data: bytes | memoryview) -> Iterator[bytes]:
        """Yield the content of each whole frame; consume all before the next call. Raises StorageError: one is too
        large.
        """
        received, start = self._received, 0
        received += data
        try:
            while len(received) - start >= 4:
                length = int.from_bytes(received[start : start + 4])
                if length > self._max_bytes:
                    raise StorageError(f"a message of {length} bytes is too large")
                end = start + 4 + length
                if len(received) < end:
                    break
                frame, start = bytes(memoryview(received)[start + 4 : end]), end
                yield frame
        finally:
            del received[:start]


class ReceivedFrames:
    """Frames from a socket until the peer is gone."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = FrameBuffer()
        self._frames: deque[bytes] = deque()
        self._received = bytearray(_RECEIVE_BYTES)

    def __iter__(self) -> Iterator[bytes]:
        while self._frames or self._receive():
            while self._frames:
                yield self._frames.popleft()

    def __len__(self) -> int:
        return len(self._frames)

    def arrived(self) -> int:
        with contextlib.suppress(BlockingIOError):
            self._receive(socket.MSG_DONTWAIT)
        return len(self._frames)

    def _receive(self, flags: int = 0) -> bool:
        try:
            size = self._connection.recv_into(self._received, 0, flags)
        except ConnectionError:
            return False
        self._frames.extend(self._buffer.receive(memoryview(self._received)[:size]))
        return size > 0


# --- beside the messages ---

GO = b"\0"
"""Sent by the server to a forked child before anything else, once it knows the child."""
MAX_FORK_REQUEST_BYTES = 65536
"""Largest request to the template process."""


class TreeState(NamedTuple):
    """State of the tree against the committed changes, in ``journal/tree-state``; not fsynced.

    The worker writes it before a transaction changes its first file and at its end; the server compares it before and
    after a read (I2).

    Attributes:
        is_open: a transaction has changed files and has not ended.
        ended, rolled_back: numbers of transactions that changed files, and of those rolled back.
        seq: the newest change in the tree, perhaps not durable yet.
    """

    is_open: bool = False
    ended: int = 0
    rolled_back: int = 0
    seq: int = 0

    @classmethod
    def read(cls, journal: Path) -> Self:
        try:
            descriptor = os.open(journal / _TREE_STATE, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return cls()
        try:
            data = os.pread(descriptor, _tree_state.size, 0)
        finally:
            os.close(descriptor)
        return cls(*_tree_state.unpack(data)) if len(data) == _tree_state.size else cls()

    @staticmethod
    def open(journal: Path) -> int:
        return os.open(journal / _TREE_STATE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, descriptor: int) -> None:
        os.pwrite(descriptor, _tree_state.pack(*self), 0)


_TREE_STATE = "tree-state"
_tree_state = struct.Struct("<?QQQ")


class ReadCommand(msgspec.Struct, frozen=True, tag_field="type", tag="command"):
    """A read-only command line; ``path`` are its words, for example ``resource list``.

    ``list_at`` leads to a list in the envelope: it becomes the data, with an index.
    """

    path: str
    argv: tuple[str, ...]
    list_at: tuple[str, ...] = ()


class ReadPage(msgspec.Struct, frozen=True, tag_field="type", tag="page"):
    """A GET to the dashboard's own handlers.

    Attributes:
        base: entity tag of the client's body, for a 304.
        takes_difference: the response may be 226, the difference from that body.
        state: name of the tree's state, within which no file changes; "" if it has none.
    """

    path: str
    base: str = ""
    takes_difference: bool = False
    gzip: bool = False
    state: str = ""


Read = ReadCommand | ReadPage


class ListIndex(msgspec.Struct, frozen=True):
    """Place and id ("": none) of each item of a list, separated by commas; the body ends with the list and ``]}``."""

    start: int
    ids: list[str]
    ends: list[int]


class ReadResult(msgspec.Struct, frozen=True):
    """The result of a read.

    Attributes:
        body, message: standard output or page; standard error.
        items: of the requested list; None if it could not be read.
    """

    status: int
    body: bytes
    content_type: str = ""
    etag: str = ""
    is_gzip: bool = False
    message: str = ""
    items: ListIndex | None = None
