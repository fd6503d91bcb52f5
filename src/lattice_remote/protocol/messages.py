"""Frames of ``lattice.v1`` (SPEC section 3).

Every frame is one binary WebSocket message: a msgpack map with its kind under ``type``. Receivers ignore unknown
fields; a field with a default may be missing; an unknown kind is a protocol violation. Sequence numbers count a
project's changes from 1 within an epoch; 0 means no change yet (I1).
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from lattice_remote.errors import ProtocolError
from lattice_remote.protocol.operations import Digest, Operation, paths_of
from lattice_remote.protocol.paths import check_path

__all__ = [
    "CAPABILITIES",
    "FIRST_FRAME_BYTES",
    "MAX_ARGV",
    "MAX_FETCH_PATHS",
    "MAX_FRAME_BYTES",
    "MAX_LOG_ENTRIES",
    "MAX_LOG_TASKS",
    "MAX_PARTS_BYTES",
    "MAX_PAYLOAD_BYTES",
    "MAX_PIECE_BYTES",
    "MAX_VERSION_BYTES",
    "MIN_PIECE_BYTES",
    "NOWHERE",
    "PROTOCOL_VERSION",
    "SUBPROTOCOL",
    "SURFACES",
    "Applied",
    "Attachment",
    "Bye",
    "Call",
    "Change",
    "ClientFrame",
    "Download",
    "Downloaded",
    "Entries",
    "Entry",
    "Fetch",
    "Hello",
    "Limits",
    "Log",
    "LogEntry",
    "LogPage",
    "Manifest",
    "Part",
    "Parts",
    "Position",
    "Push",
    "Pushed",
    "Put",
    "Read",
    "ReadVersion",
    "Refused",
    "Replay",
    "Replayed",
    "Reply",
    "Request",
    "Response",
    "Result",
    "Returned",
    "Run",
    "ServerFrame",
    "Stored",
    "Upload",
    "Uploaded",
    "Version",
    "Welcome",
    "WholeFile",
    "Write",
    "decode_client_frame",
    "decode_server_frame",
    "encode",
    "needed_capability",
    "pack_files",
]


SUBPROTOCOL = "lattice.v1"
PROTOCOL_VERSION = 1
CAPABILITIES = ("call:mcp", "parts")
"""Optional parts of this version (SPEC section 8). A peer uses only those that both sides named.

A server omits ``call:SURFACE`` when the surface's dependencies are not installed.
"""
SURFACES = frozenset({"dashboard", "mcp", "storage"})

MAX_ARGV = 1024
MAX_FETCH_PATHS = 1024
MAX_LOG_ENTRIES = 200
MAX_LOG_TASKS = 100
MAX_PAYLOAD_BYTES = 4 * 1024 * 1024
"""Of a ``Call``."""
MAX_PIECE_BYTES = 1024 * 1024
"""Maximum piece of a file in one frame, so that small frames are not delayed."""
MAX_PARTS_BYTES = 2 * 1024 * 1024
"""Of the files in one ``Parts``, decompressed."""
MAX_VERSION_BYTES = 16 * 1024 * 1024
MIN_PIECE_BYTES = 4096
"""Minimum piece of an upload, except for the last."""

Epoch = Annotated[str, Meta(pattern=r"^[0-9A-Za-z]{0,64}(?![\s\S])")]
"""Random, opaque name of one unbroken history of a project (I7): letters and digits."""
Seq = Annotated[int, Meta(ge=0)]
"""Sequence number of a change within its epoch."""
Mark = Annotated[bytes, Meta(max_length=32)]
"""Change id, made by the server. Histories that differ have different ids at the same sequence number."""
RequestId = Annotated[str, Meta(pattern="^[0-9a-f]{32}$", max_length=32)]
"""128 random bits in hexadecimal, made by the client. A retry repeats the id (I6)."""
_Short = Annotated[str, Meta(max_length=256)]
_Line = Annotated[str, Meta(max_length=4096)]
_Path = Annotated[str, Meta(min_length=1, max_length=512)]
_Size = Annotated[int, Meta(ge=0)]
_Age = Annotated[float, Meta(ge=0)]


class _Frame(msgspec.Struct, frozen=True, tag_field="type"):
    pass


class Attachment(msgspec.Struct, frozen=True):
    """A file of the caller for the argument at ``index`` of the argv, counted from 0.

    The content is ``data``, or an upload with this ``digest`` and ``size``. With neither, the caller has no such file.
    In a ``Call``, ``index`` counts the files that its operation takes.
    """

    index: Annotated[int, Meta(ge=0, lt=MAX_ARGV)]
    name: Annotated[str, Meta(min_length=1, max_length=255)]
    data: bytes | None = None
    digest: Digest | None = None
    size: _Size = 0


_POSITION = re.compile(r"([0-9A-Za-z]{1,64})-([0-9]{1,18})(?:-([0-9a-f]{2,64}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Position:
    """A point in a project's history. With an empty epoch there is none: the whole cache must be compared.

    Its text is ``EPOCH-SEQ-MARK``, or ``EPOCH-0`` at the beginning of an epoch.
    """

    epoch: str
    seq: int
    mark: bytes

    @classmethod
    def parse(cls, text: str) -> "Position | None":
        """Return the position that a text names; None if it names none, or lacks the change id."""
        match = _POSITION.fullmatch(text)
        if match is None or (match[3] is None) != (int(match[2]) == 0) or len(match[3] or "") % 2:
            return None
        return cls(match[1], int(match[2]), bytes.fromhex(match[3] or ""))

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}" + (f"-{self.mark.hex()}" if self.mark else "")


NOWHERE = Position("", 0, b"")


class Hello(_Frame, frozen=True, tag="hello"):
    """The client's first frame: its versions and the position of its cache. ``follow`` is False for writes only."""

    versions: Annotated[list[int], Meta(min_length=1, max_length=16)]
    client_version: _Short
    lattice_version: _Short
    capabilities: Annotated[list[_Short], Meta(max_length=64)] = []
    epoch: Epoch = ""
    seq: Seq = 0
    mark: Mark = b""
    follow: bool = True


class Run(_Frame, frozen=True, tag="run"):
    """Run ``lattice`` with this argv, without the program's name, once for this id (I6).

    ``age_s`` is the number of seconds since the request was first sent, 0 for the first attempt.
    """

    id: RequestId
    argv: Annotated[list[str], Meta(min_length=1, max_length=MAX_ARGV)]
    files: Annotated[list[Attachment], Meta(max_length=16)] = []
    age_s: _Age = 0.0


class Put(_Frame, frozen=True, tag="put"):
    """Store a plan or notes: ``text``, edited from ``base`` (None: there was no file).

    With ``base_digest``, ``base`` is None and the base is the server's text. The request is refused if that text has
    another digest. ``age_s`` is the same as in ``Run``.
    """

    id: RequestId
    path: _Path
    base: bytes | None
    text: bytes
    age_s: _Age = 0.0
    base_digest: Annotated[bytes, Meta(max_length=32)] = b""


class Call(_Frame, frozen=True, tag="call"):
    """Carry out an operation of one of lattice's surfaces, once for this id (I6).

    ``surface`` is ``dashboard`` (``name`` is the path of a POST), ``mcp`` (the name of a tool) or ``storage`` (a write
    of a program). ``payload`` is JSON: the request's body, the tool's arguments or the data to write. ``age_s`` is the
    same as in ``Run``. ``mcp`` needs the capability ``call:mcp``.
    """

    id: RequestId
    surface: Annotated[str, Meta(pattern="^[a-z]{1,32}$", max_length=32)]
    name: _Short
    payload: Annotated[bytes, Meta(max_length=MAX_PAYLOAD_BYTES)]
    files: Annotated[list[Attachment], Meta(max_length=16)] = []
    age_s: _Age = 0.0


class Upload(_Frame, frozen=True, tag="upload"):
    """A piece of content to which requests refer by ``digest``. Empty at offset 0, it asks how much is there.

    ``purpose`` bounds the size: ``attachment`` for a command's file, ``project`` for the pack of a ``Push``.
    """

    id: RequestId
    digest: Digest
    size: _Size
    offset: _Size = 0
    data: Annotated[bytes, Meta(max_length=MAX_PIECE_BYTES)] = b""
    purpose: _Short = "attachment"


class Push(_Frame, frozen=True, tag="push"):
    """Replace an empty project with the uploaded pack of this digest and size, once for this id (I6).

    ``age_s`` is the same as in ``Run``.
    """

    id: RequestId
    digest: Digest
    size: _Size
    age_s: _Age = 0.0


class Download(_Frame, frozen=True, tag="download"):
    """Request at most ``limit`` bytes of a file from ``offset``, if its content has this digest.

    Without a digest, any content is sent.
    """

    id: RequestId
    path: _Path
    digest: Digest | None = None
    offset: _Size = 0
    limit: Annotated[int, Meta(ge=1, le=MAX_PIECE_BYTES)] = MAX_PIECE_BYTES


class Fetch(_Frame, frozen=True, tag="fetch"):
    """Request the content of these files."""

    paths: Annotated[list[_Path], Meta(min_length=1, max_length=MAX_FETCH_PATHS)]


class Manifest(_Frame, frozen=True, tag="manifest"):
    """Request the list of all files."""


class Log(_Frame, frozen=True, tag="log"):
    """Request at most ``limit`` changes, newest first.

    ``task`` is a task's id or short id, "" for all tasks. ``before`` is the previous ``LogPage.before``, None for the
    first page. ``text`` selects the changes of the task's plan or notes, the versions of that text.
    """

    id: RequestId
    task: _Short = ""
    limit: Annotated[int, Meta(ge=1, le=MAX_LOG_ENTRIES)] = 20
    before: Seq | None = None
    text: Literal["", "plan", "notes"] = ""


class ReadVersion(_Frame, frozen=True, tag="read-version"):
    """Request a task's plan or notes as of the change (``epoch``, ``seq``), which must have changed that text.

    An empty ``epoch`` selects the newest epoch with such a change.
    """

    id: RequestId
    task: _Short
    text: Literal["plan", "notes"]
    seq: Seq
    epoch: Epoch = ""


class Replay(_Frame, frozen=True, tag="replay"):
    """Request the changes after a position, for a program without a cache.

    ``seq`` is the last known change, None for the head. ``mark`` is its id, empty if unknown; then a rollback of the
    server is not detected. An empty ``epoch`` is the project's own.
    """

    id: RequestId
    epoch: Epoch = ""
    seq: Seq | None = None
    mark: Mark = b""


class Applied(_Frame, frozen=True, tag="applied"):
    """Report that the client's files hold every change up to ``seq``. Informational.

    ``held_s`` is the number of seconds since the last of them was applied; None if unknown.
    """

    seq: Seq
    held_s: float | None = None


class Limits(msgspec.Struct, frozen=True):
    """The server's limits in bytes."""

    max_frame_bytes: _Size
    max_file_bytes: _Size
    max_text_bytes: _Size = 1024 * 1024
    """Maximum length of a plan or notes."""


class Welcome(_Frame, frozen=True, tag="welcome"):
    """The server's first frame.

    With ``resync`` the client's cache cannot be continued and the client requests the manifest. Otherwise the changes
    after its position follow. ``oldest`` is the first change that can still be replayed.
    """

    version: int
    server_version: _Short
    lattice_version: _Short
    project: _Short
    actor: _Short
    epoch: Epoch
    head: Seq
    oldest: Seq
    resync: bool
    limits: Limits
    act_as: list[_Short] = []
    capabilities: list[_Short] = []
    lost: bool = False
    """The server has no record of the cache's position: it lacks changes that the cache may have."""
    used: _Short = ""
    """The content that shows that the project is in use, for example ``3 tasks``; "" if it is empty or unknown."""


class Change(_Frame, frozen=True, tag="change"):
    """One change: its operations in order, author, time and cause.

    ``cause`` is a request id, ``edit`` (the server's files were edited) or ``recovery``. ``actor`` is the actor of the
    command; ``token_actor`` is the token's, "" if it is the same. ``time`` is UTC, RFC 3339 with milliseconds.
    """

    seq: Annotated[int, Meta(ge=1)]
    mark: Mark
    time: _Short
    actor: _Short
    token_id: _Short
    cause: _Short
    command: _Line
    ops: list[Operation]
    token_actor: _Short = ""


class Replayed(_Frame, frozen=True, tag="replayed"):
    """The reply to ``Replay``. With ``kept``, the changes after ``seq`` in order; none: ``seq`` is the head.

    Without: ``expired``, the changes after ``seq`` are no longer kept; ``ahead``, there is no change ``seq`` yet;
    ``epoch``, the position is not in the present history.
    """

    id: RequestId
    outcome: Literal["kept", "expired", "ahead", "epoch"]
    epoch: Epoch
    head: Seq
    oldest: Seq
    seq: Seq
    mark: Mark = b""
    """Id of the change at ``seq``, if that is kept."""
    changes: list[Change] = []
    """About 1 MiB of them: request the others from the last one on."""


class Reply(_Frame, frozen=True, tag="reply"):
    """A command's result. Every change up to ``seq`` was sent before it on this connection."""

    id: RequestId
    seq: Seq
    exit_code: int
    stdout: bytes
    stderr: bytes


class Returned(_Frame, frozen=True, tag="returned"):
    """The result of a ``Call``: ``status`` as in HTTP, ``payload`` JSON. A failed call changed nothing.

    Every change up to ``seq`` was sent before it on this connection.
    """

    id: RequestId
    seq: Seq
    status: Annotated[int, Meta(ge=200, le=599)]
    payload: bytes


class Stored(_Frame, frozen=True, tag="stored"):
    """The result of a ``Put``. A ``conflict`` changes no file on the server."""

    id: RequestId
    seq: Seq
    outcome: Literal["stored", "merged", "unchanged", "conflict"]


class Uploaded(_Frame, frozen=True, tag="uploaded"):
    """The reply to ``Upload``: the number of bytes that have arrived without a gap.

    When all have arrived, the digest is verified and requests can refer to the content.
    """

    id: RequestId
    have: _Size


class Pushed(_Frame, frozen=True, tag="pushed"):
    """The result of a ``Push``: the project has the pack's content, in a new epoch. ``notes`` are for the user."""

    id: RequestId
    seq: Seq
    tasks: _Size
    archived: _Size
    files: _Size
    notes: Annotated[list[_Line], Meta(max_length=100)] = []


class Downloaded(_Frame, frozen=True, tag="downloaded"):
    """The reply to ``Download``: size and digest of the file at ``seq``, and the piece requested."""

    id: RequestId
    seq: Seq
    size: _Size
    digest: Digest
    data: bytes


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One file of the manifest."""

    path: _Path
    size: _Size
    digest: Digest


class Entries(_Frame, frozen=True, tag="entries"):
    """A piece of the manifest at ``seq``; ``last`` ends it."""

    seq: Seq
    mark: Mark
    entries: list[Entry]
    last: bool


class Part(_Frame, frozen=True, tag="part"):
    """A piece of a file at ``seq``; the piece that reaches ``size`` ends it. ``gone``: there is no such file."""

    path: _Path
    seq: Seq
    size: _Size = 0
    digest: Annotated[bytes, Meta(max_length=32)] = b""
    offset: _Size = 0
    data: bytes = b""
    gone: bool = False


class WholeFile(msgspec.Struct, frozen=True):
    """One file of a ``Parts``."""

    path: _Path
    digest: Digest
    data: bytes


class Parts(_Frame, frozen=True, tag="parts", dict=True):
    """Several whole files at ``seq``, compressed together. Needs the capability ``parts``.

    ``data`` is a zlib stream (RFC 1950) of a msgpack array of 1 to 1024 ``WholeFile``; ``size`` is its length before
    the compression.
    """

    seq: Seq
    size: Annotated[int, Meta(ge=1, le=MAX_PARTS_BYTES)]
    data: Annotated[bytes, Meta(max_length=MAX_PARTS_BYTES)]

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The files, each as one ``Part``. Raises ProtocolError; never decompresses more than ``size`` + 1 bytes."""
        stream = zlib.decompressobj()
        try:
            packed = stream.decompress(self.data, self.size + 1)
            if len(packed) != self.size or not stream.eof or stream.unused_data:
                raise ProtocolError(f"compressed files have another size than {self.size} bytes")
            files = _files_decoder.decode(packed)
        except (zlib.error, *_MALFORMED) as error:
            raise ProtocolError(f"malformed compressed files: {error}") from error
        for file in files:
            check_path(file.path)
        return tuple(Part(file.path, self.seq, len(file.data), file.digest, 0, file.data) for file in files)


class LogEntry(msgspec.Struct, frozen=True):
    """One change in the log: the fields of ``Change`` without operations, and the tasks it touches.

    ``tasks`` are ids, sorted, at most 100; ``more_tasks`` counts the others. ``epoch`` distinguishes
    changes with the same sequence number.
    """

    seq: Seq
    epoch: Epoch
    time: _Short
    actor: _Short
    token_id: _Short
    token_actor: _Short
    cause: _Short
    command: _Line
    tasks: Annotated[list[_Short], Meta(max_length=MAX_LOG_TASKS)]
    more_tasks: _Size = 0
    text_bytes: _Size | None = None
    """With ``Log.text``: the length of the text after the change; None: removed or moved."""
    mark: Mark = b""


class LogPage(_Frame, frozen=True, tag="log-page"):
    """The reply to ``Log``: entries, newest first. A page may be empty although more follow.

    ``before`` requests the next page; None at the beginning of the log.
    """

    id: RequestId
    entries: Annotated[list[LogEntry], Meta(max_length=MAX_LOG_ENTRIES)]
    before: Seq | None


class Version(_Frame, frozen=True, tag="version"):
    """The reply to ``ReadVersion``: the whole text, at most 16 MiB."""

    id: RequestId
    epoch: Epoch
    seq: Seq
    data: bytes


class Refused(_Frame, frozen=True, tag="refused"):
    """A request was refused without effect, except with ``REMOTE_UNKNOWN_OUTCOME``: its effect is unknown."""

    id: RequestId
    code: _Short
    message: _Line


class Bye(_Frame, frozen=True, tag="bye"):
    """The server's last frame: the reason, and the seconds until the client may reconnect (None: never)."""

    code: _Short
    reason: _Line
    retry_after_s: Annotated[float, Meta(ge=0, le=3600)] | None = None


Write = Run | Put | Push | Call
"""A request that may change the project, once for its id (I6)."""
Read = Log | ReadVersion | Download | Replay
"""A request that changes nothing. It may be repeated."""
Request = Write | Read | Upload
"""A request that the server answers by id."""
Response = Reply | Stored | Pushed | Returned | LogPage | Version | Uploaded | Downloaded | Replayed | Refused
"""A reply to a ``Request``."""
Result = Reply | Stored | Pushed | Returned
"""A reply to a request that ran. It is journalled, with the sequence number up to which it is true."""
ClientFrame = (
    Hello | Run | Put | Push | Call | Fetch | Manifest | Log | ReadVersion | Upload | Download | Replay | Applied
)
ServerFrame = Welcome | Change | Entries | Part | Parts | Response | Bye


def needed_capability(frame: Request) -> str | None:
    """Return the capability that both sides must have named before this frame is sent; None if none is needed."""
    name = f"call:{frame.surface}" if isinstance(frame, Call) else ""
    return name if name in CAPABILITIES else None


FIRST_FRAME_BYTES = 64 * 1024
"""Maximum size of a client's first frame."""
MAX_FRAME_BYTES = 32 * 1024 * 1024

_encoder = msgspec.msgpack.Encoder()
_client_decoder: msgspec.msgpack.Decoder[ClientFrame] = msgspec.msgpack.Decoder(ClientFrame)
_server_decoder: msgspec.msgpack.Decoder[ServerFrame] = msgspec.msgpack.Decoder(ServerFrame)
_files_decoder = msgspec.msgpack.Decoder(Annotated[list[WholeFile], Meta(min_length=1, max_length=MAX_FETCH_PATHS)])
_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def encode(frame: ClientFrame | ServerFrame) -> bytes:
    return _encoder.encode(frame)


def pack_files(files: Sequence[WholeFile]) -> tuple[int, bytes]:
    """Return ``size`` and ``data`` of a ``Parts``. Takes about 5 ms a MiB."""
    packed = _encoder.encode(files)
    return len(packed), zlib.compress(packed, 1)


def decode_client_frame(data: bytes, *, max_bytes: int = MAX_FRAME_BYTES) -> ClientFrame:
    """Return a client's frame.

    Raises ProtocolError: over ``max_bytes``, malformed, out of bounds, or a path outside the replicated tree.
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
    """Return a server's frame. Raises ProtocolError like ``decode_client_frame``."""
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
        case Parts():
            _ = frame.parts  # checks them
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
