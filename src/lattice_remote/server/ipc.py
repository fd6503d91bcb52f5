"""Messages between a project's server side and its child processes, their framing, and the start of a child.

A frame on the socket pair is a length (4 bytes, big endian) and one msgpack map. The worker answers in order. What it
reports as ``RequestDone`` is on disk (I2).
"""

import contextlib
import os
import socket
import struct
import subprocess
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import msgspec

from lattice_remote.errors import StorageError
from lattice_remote.protocol.messages import Attachment

__all__ = [
    "AbandonRequest",
    "Edit",
    "FrameBuffer",
    "HookCall",
    "ImportProject",
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
    "start_child",
]


class _Message(msgspec.Struct, frozen=True, tag_field="type"):
    pass


# --- to the worker ---


class RunCommand(_Message, frozen=True, tag="command"):
    """Run this command line for the holder of this token, once for this id (I6).

    Attributes:
        last_try: of ``resource acquire --wait``, whose time is over: answer as lattice does. Before, the worker tries
            once and names the awaited resource in ``RequestDone.waiting_for``.
        first_sent_at: seconds since the epoch, if the request may have been sent before.
        ahead: resources and locks (``locks/tasks_...``) with earlier waiters; ``--wait`` takes none of them.
        may_wait: wait for a lock that another process holds, as for a resource; otherwise refuse.
        fingerprint: a digest of the request, if the surface makes one; else the fields count (``asked_by``).
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
    """Run an operation of a surface for the holder of this token, once for this id (I6); see ``CallRequest``.

    Other fields as in ``RunCommand``.
    """

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
    """Store a plan or notes, merged by line if the base differs from the file's content.

    ``base_digest``, unless empty, stands for the base: the file's content if that has this digest.
    """

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
    """Put a checked project in place of this one, if this one is empty, and exit; the next worker completes it.

    ``candidate`` is its directory, relative to the project's; "" if it is gone: the request is answered as before, or
    refused. ``fingerprint`` is a digest of the pushed project; the rest is for the reply.
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
    """Number the outside changes of these files (None: any) (I12)."""

    paths: list[str] | None


class NewEpoch(_Message, frozen=True, tag="new-epoch"):
    """Start a new epoch: a client has proved a rollback (I7)."""

    reason: str


class AbandonRequest(_Message, frozen=True, tag="abandon"):
    """Answer from the journal, else with this refusal, a request that ended its worker.

    Its partial effects were undone when the worker started (I6).
    """

    id: str
    token_id: str
    code: str
    message: str


class Stop(_Message, frozen=True, tag="stop"):
    """Finish and exit."""


def asked_by(request: RunCommand | RunCall | Edit) -> tuple[object, ...]:
    """Return the fields that identify a request: two with the same id and other fields differ (I6)."""
    tag = request.__struct_config__.tag
    match request:
        case RunCommand():
            return (tag, request.argv, request.files)
        case RunCall():
            return (tag, request.surface, request.name, request.payload, request.files)
        case Edit():
            return (tag, request.path, request.base, request.base_digest, request.text)


ToWorker = RunCommand | RunCall | Edit | ImportProject | Reconcile | NewEpoch | AbandonRequest | Stop


# --- from the worker ---


class PathState(msgspec.Struct, frozen=True):
    """A file after a change; without digest it is gone."""

    path: str
    size: int
    digest: bytes | None


class HookCall(msgspec.Struct, frozen=True):
    """A hook of ``config.json`` to run."""

    command: str
    env: dict[str, str]
    stdin: str


class ResultStats(msgspec.Struct, frozen=True):
    """The outcome of a request, for the log and the metrics, without the caller's text.

    Attributes:
        command: its words, for example ``resource acquire``, or the name of an operation; "" if unknown.
        code: of a refusal; "" if it was run.
        status: the exit code of a command, or the HTTP status of an operation.
        seconds: time in the worker, without the wait until it was durable.
        again: the reply of an earlier request with this id.
        made: the number of its change; None if it made none.
    """

    command: str = ""
    code: str = ""
    status: int = 0
    seconds: float = 0.0
    again: bool = False
    made: int | None = None


class Ready(_Message, frozen=True, tag="ready"):
    """The worker has opened the project: its first message, repeated after ``NewEpoch``. ``notes`` are for the log."""

    epoch: str
    head: int
    mark: bytes
    oldest: int
    lattice_version: str
    files: list[PathState]
    notes: list[str] = []


class RequestDone(_Message, frozen=True, tag="done"):
    """One request (``id`` "": a reconciliation) is finished and durable; ``change`` and ``reply`` are encoded frames.

    With ``waiting_for`` nothing was answered. It names a lock (``locks/tasks_...``) that another process holds, or a
    resource whose next change, or expiry at ``retry_at`` (seconds since the epoch), is worth another try. A
    reconciliation with ``retry_at`` has omitted files whose lock was busy.
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
    """An outside change found before the oldest request, which is still unanswered (I12)."""
    report: ResultStats = ResultStats()
    synced_s: float | None = None
    """Of the journal's fsync, in one message for all that it made durable."""


class WorkerFailed(_Message, frozen=True, tag="failed"):
    """The journal cannot be written, or the tree cannot be read; the worker exits."""

    message: str


ToServer = Ready | RequestDone | WorkerFailed


# --- framing and processes ---

_RECEIVE_BYTES = 256 * 1024
_encoder = msgspec.msgpack.Encoder()


def encode_frames(*messages: object) -> bytearray:
    """Return frames to be sent in one write."""
    frames = bytearray()
    for message in messages:
        data = _encoder.encode(message)
        frames += len(data).to_bytes(4) + data
    return frames


class FrameBuffer:
    """Received bytes that are not yet a whole frame of at most ``max_bytes``."""

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
    """Frames from a socket until the peer is gone. Blocking."""

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
        """Return the number of whole frames that have arrived, without waiting."""
        with contextlib.suppress(BlockingIOError):
            self._receive(socket.MSG_DONTWAIT)
        return len(self._frames)

    def _receive(self, flags: int = 0) -> bool:
        """Receive more; return False if the peer is gone."""
        try:
            size = self._connection.recv_into(self._received, 0, flags)
        except ConnectionError:
            return False
        self._frames.extend(self._buffer.receive(memoryview(self._received)[:size]))
        return size > 0


def start_child(
    command: Sequence[str], project: Path, slug: str, *, inherited: Sequence[int] = ()
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a process for a project; return it and the socket to it. Raises OSError.

    Args:
        command: the program; ``--fd``, ``--project-dir`` and ``--slug`` are appended.
        inherited: descriptors that the process keeps open.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = subprocess.Popen(
                [*command, "--fd", str(theirs.fileno()), "--project-dir", str(project), "--slug", slug],
                pass_fds=(theirs.fileno(), *inherited),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C in the server's terminal is the server's to handle
            )
        except BaseException:
            ours.close()
            raise
    return process, ours


# --- beside the messages ---


class TreeState(NamedTuple):
    """State of the tree against the committed changes, in ``journal/tree-state``.

    The worker writes it before a transaction changes its first file and at its end; the server compares it before and
    after a read (I2). It is not fsynced: it is not used after a power cut.

    Attributes:
        is_open: a transaction has changed files, and is neither committed nor rolled back.
        ended, rolled_back: numbers of transactions that changed files, and of those rolled back.
        seq: the newest change whose files are in the tree, perhaps not durable yet.
    """

    is_open: bool = False
    ended: int = 0
    rolled_back: int = 0
    seq: int = 0

    @classmethod
    def read(cls, journal: Path) -> Self:
        """Return the state of the project with this journal; an empty one before the first transaction."""
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
        """Return a descriptor for ``write``."""
        return os.open(journal / _TREE_STATE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, descriptor: int) -> None:
        """Publish the state with one system call."""
        os.pwrite(descriptor, _tree_state.pack(*self), 0)


_TREE_STATE = "tree-state"
_tree_state = struct.Struct("<?QQQ")


class ReadCommand(msgspec.Struct, frozen=True, tag_field="type", tag="command"):
    """Run this command line, which only reads; ``path`` are its words, for example ``resource list``.

    ``list_at`` leads to a list in the envelope, which is then returned as the data, with its index.
    """

    path: str
    argv: tuple[str, ...]
    list_at: tuple[str, ...] = ()


class ReadPage(msgspec.Struct, frozen=True, tag_field="type", tag="page"):
    """Have the dashboard's own handlers answer a GET of this path.

    Attributes:
        base: entity tag of the body that the client has; the response is 304 if it is still this one.
        takes_difference: the response may be 226, the difference from that body.
        gzip: compress a large body.
        state: name of the tree's state, within which no file changes; "" if it has none.
    """

    path: str
    base: str = ""
    takes_difference: bool = False
    gzip: bool = False
    state: str = ""


Read = ReadCommand | ReadPage


class ListIndex(msgspec.Struct, frozen=True):
    """The items of a list, each between commas in a body that ends with them and ``]}``.

    Attributes:
        start: where the first one begins.
        ids: of each; "" for one that has none.
        ends: where each ends.
    """

    start: int
    ids: list[str]
    ends: list[int]


class ReadResult(msgspec.Struct, frozen=True):
    """The result of a read.

    Attributes:
        status: a command's exit code; a page's HTTP status.
        body: standard output, or the page's body.
        content_type, etag: of a page; "" for none. The tag is that of the whole, uncompressed body.
        is_gzip: the body is compressed.
        message: standard error.
        items: of the requested list; None if it could not be read.
    """

    status: int
    body: bytes
    content_type: str = ""
    etag: str = ""
    is_gzip: bool = False
    message: str = ""
    items: ListIndex | None = None
