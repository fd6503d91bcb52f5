"""The frames of ``lattice.v1``: what a client and a server say to each other (SPEC section 3).

Every frame is one binary WebSocket message: a msgpack map with its kind under ``type``. A field that a
receiver does not know is ignored, a field with a default may be missing; an unknown kind is a violation.
Sequence numbers count a project's changes from 1 within an epoch; 0 means "none yet" (I1).
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from lattice_remote.protocol.operations import Digest, Operation

__all__ = [
    "CAPABILITIES",
    "CAPABILITY_OF",
    "MAX_ARGV",
    "MAX_FETCH_PATHS",
    "MAX_LOG_ENTRIES",
    "MAX_LOG_TASKS",
    "MAX_PAYLOAD_BYTES",
    "MAX_PIECE_BYTES",
    "MAX_VERSION_BYTES",
    "MIN_PIECE_BYTES",
    "PROTOCOL_VERSION",
    "SUBPROTOCOL",
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
    "Follow",
    "Followed",
    "Hello",
    "Limits",
    "Log",
    "LogEntry",
    "LogPage",
    "Manifest",
    "Part",
    "Push",
    "Pushed",
    "Put",
    "ReadVersion",
    "Refused",
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
    "Write",
    "needed_capability",
]

SUBPROTOCOL = "lattice.v1"
PROTOCOL_VERSION = 1
CAPABILITIES = (
    *("append", "merge", "move", "announce", "put-text", "put-base", "log"),
    *("uploads", "downloads", "push", "follow", "versions"),
    *("call:dashboard", "call:mcp", "call:storage"),
)
"""What this version can do beyond whole files; a peer uses only what the other side named.

A server does not name ``call:SURFACE`` when what that needs is not installed beside it.
"""

MAX_ARGV = 1024
MAX_FETCH_PATHS = 1024
MAX_LOG_ENTRIES = 200
"""The most entries that one ``LogPage`` holds."""
MAX_LOG_TASKS = 100
"""The most tasks that one ``LogEntry`` names."""
MAX_PAYLOAD_BYTES = 4 * 1024 * 1024
"""The longest payload of a ``Call``."""
MAX_PIECE_BYTES = 1024 * 1024
"""The most of a file that travels in one frame: nothing small waits long behind it."""
MAX_VERSION_BYTES = 16 * 1024 * 1024
"""The longest text that one ``Version`` brings."""
MIN_PIECE_BYTES = 4096
"""The least that a piece of an upload brings, unless it is the last."""

Epoch = Annotated[str, Meta(max_length=64)]
"""Names one unbroken history of a project; random, opaque (I7)."""
Seq = Annotated[int, Meta(ge=0)]
"""The number of a change within its epoch."""
Mark = Annotated[bytes, Meta(max_length=32)]
"""Names one change: two histories that differ have different marks at the same number. Only the server makes them."""
RequestId = Annotated[str, Meta(pattern="^[0-9a-f]{32}$", max_length=32)]
"""128 random bits in hexadecimal, made by the client, the same when it asks again (I6)."""
_Short = Annotated[str, Meta(max_length=256)]
_Line = Annotated[str, Meta(max_length=4096)]
_Path = Annotated[str, Meta(min_length=1, max_length=512)]
_Size = Annotated[int, Meta(ge=0)]
_Age = Annotated[float, Meta(ge=0)]


class _Frame(msgspec.Struct, frozen=True, tag_field="type"):
    pass


class Attachment(msgspec.Struct, frozen=True):
    """A file of the caller, for the argument at ``index`` of the argv.

    Its content is ``data``, or what was uploaded before with this ``digest`` and ``size`` (capability ``uploads``).
    With neither there is no such file.
    In a ``Call`` ``index`` counts the files that its operation takes.
    """

    index: Annotated[int, Meta(ge=0, lt=MAX_ARGV)]
    name: Annotated[str, Meta(min_length=1, max_length=255)]
    data: bytes | None = None
    digest: Digest | None = None
    size: _Size = 0


class Hello(_Frame, frozen=True, tag="hello"):
    """The client's first frame: what it speaks, and where its copy stands. ``follow`` is False to write only."""

    versions: Annotated[list[int], Meta(min_length=1, max_length=16)]
    client_version: _Short
    lattice_version: _Short
    capabilities: Annotated[list[_Short], Meta(max_length=64)] = []
    epoch: Epoch = ""
    seq: Seq = 0
    mark: Mark = b""
    follow: bool = True


class Run(_Frame, frozen=True, tag="run"):
    """Run ``lattice`` with this argv (the program's name left out), once for this id (I6).

    ``age_s`` is 0 unless it may have been sent before: then how many seconds ago that was first done.
    """

    id: RequestId
    argv: Annotated[list[str], Meta(min_length=1, max_length=MAX_ARGV)]
    files: Annotated[list[Attachment], Meta(max_length=16)] = []
    age_s: _Age = 0.0


class Put(_Frame, frozen=True, tag="put"):
    """A plan or notes as edited here: ``text``, made from ``base`` (None: there was no file).

    ``age_s`` as in ``Run``. Capability ``put-text``. With ``base_digest``, which takes the capability ``put-base``,
    ``base`` is None and stands for the server's own text if that has this digest; else it is refused.
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
    of a program); ``payload`` is JSON: the request's body, the tool's arguments, what is to be written. ``age_s`` as in
    ``Run``. Capability ``call:SURFACE``.
    """

    id: RequestId
    surface: Annotated[str, Meta(pattern="^[a-z]{1,32}$", max_length=32)]
    name: _Short
    payload: Annotated[bytes, Meta(max_length=MAX_PAYLOAD_BYTES)]
    files: Annotated[list[Attachment], Meta(max_length=16)] = []
    age_s: _Age = 0.0


class Upload(_Frame, frozen=True, tag="upload"):
    """A piece of content that requests can refer to by its ``digest``; empty at offset 0, a question what is there.

    ``purpose`` says what it is for, which bounds its size: ``attachment``, a file of a command, or ``project``,
    a pack for ``Push``. Capability ``uploads``.
    """

    id: RequestId
    digest: Digest
    size: _Size
    offset: _Size = 0
    data: Annotated[bytes, Meta(max_length=MAX_PIECE_BYTES)] = b""
    purpose: _Short = "attachment"


class Push(_Frame, frozen=True, tag="push"):
    """Take the project that was uploaded as a pack (``pack.py``) with this digest and size, in place of an empty one.

    Once for this id (I6). ``age_s`` as in ``Run``. Capability ``push``.
    """

    id: RequestId
    digest: Digest
    size: _Size
    age_s: _Age = 0.0


class Download(_Frame, frozen=True, tag="download"):
    """Send a piece of a file: at most ``limit`` bytes from ``offset`` on, if its content has this digest.

    Without a digest, of whatever the file holds. Capability ``downloads``.
    """

    id: RequestId
    path: _Path
    digest: Digest | None = None
    offset: _Size = 0
    limit: Annotated[int, Meta(ge=1, le=MAX_PIECE_BYTES)] = MAX_PIECE_BYTES


class Fetch(_Frame, frozen=True, tag="fetch"):
    """Send the content of these files."""

    paths: Annotated[list[_Path], Meta(min_length=1, max_length=MAX_FETCH_PATHS)]


class Manifest(_Frame, frozen=True, tag="manifest"):
    """Send the list of all files."""


class Log(_Frame, frozen=True, tag="log"):
    """Tell who changed what, newest first: at most ``limit`` changes, those of one task if it is named.

    ``task`` is a task's id or short id, "" for all. ``before`` goes on where a ``LogPage.before`` says, None
    begins with the newest. Capability ``log``. ``text`` selects the changes of the task's plan or notes: each
    entry then names a version of that text. Capability ``versions``.
    """

    id: RequestId
    task: _Short = ""
    limit: Annotated[int, Meta(ge=1, le=MAX_LOG_ENTRIES)] = 20
    before: Seq | None = None
    text: Literal["", "plan", "notes"] = ""


class ReadVersion(_Frame, frozen=True, tag="read-version"):
    """Ask for a task's plan or notes as of the change (``epoch``, ``seq``), which must be one of that text.

    An empty ``epoch`` is the newest with such a change. Capability ``versions``.
    """

    id: RequestId
    task: _Short
    text: Literal["plan", "notes"]
    seq: Seq
    epoch: Epoch = ""


class Follow(_Frame, frozen=True, tag="follow"):
    """Send the changes after ``seq`` (None: after the head) to a connection that has no copy and only looks on.

    Once, on a connection whose Hello did not follow. ``mark`` is that of the change at ``seq``, empty when it is not
    known: then nothing can prove that the server was rolled back. Capability ``follow``.
    """

    epoch: Epoch = ""
    seq: Seq | None = None
    mark: Mark = b""


class Applied(_Frame, frozen=True, tag="applied"):
    """The client's files hold every change up to ``seq``. Informs only.

    ``held_s`` is for how long they have held the last of these, in seconds; None when that is not known.
    """

    seq: Seq
    held_s: float | None = None


class Limits(msgspec.Struct, frozen=True):
    """What the server takes, in bytes."""

    max_frame_bytes: _Size
    max_file_bytes: _Size
    max_text_bytes: _Size = 1024 * 1024
    """Of a plan or notes."""


class Welcome(_Frame, frozen=True, tag="welcome"):
    """The server's first frame.

    With ``resync`` the client's copy can't be continued: it asks for the manifest. Otherwise the changes
    after its number follow. ``oldest`` is the first change that can still be replayed.
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
    """The server has no record of the copy's position: it lacks changes that the copy may have."""
    used: _Short = ""
    """What shows that something was done in the project, such as ``3 tasks``; "" when it is empty, or not said."""


class Change(_Frame, frozen=True, tag="change"):
    """One change: what was written, by whom, when, and because of what.

    ``cause`` is the id of the request, or ``edit`` (somebody changed the server's files), or ``recovery``.
    ``actor`` is who the command acted as; ``token_actor`` is whose token it was, "" when that is the same.
    ``time`` is UTC, RFC 3339 with milliseconds. The operations are applied in order.
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


class Followed(_Frame, frozen=True, tag="followed"):
    """The answer to ``Follow``: with ``following`` every change after ``seq`` comes, in order, with no gap.

    Else none does: those after ``seq`` are not kept any more (``expired``; ``oldest`` is the first that is), there is
    no change ``seq`` yet (``ahead``), or the epoch is another (``epoch``).
    """

    seq: Seq
    outcome: Literal["following", "expired", "ahead", "epoch"]
    epoch: Epoch
    head: Seq
    oldest: Seq
    mark: Mark = b""
    """Of the change at ``seq`` when the changes after it follow."""


class Reply(_Frame, frozen=True, tag="reply"):
    """A command's outcome. Every change up to ``seq`` has travelled before it on this connection."""

    id: RequestId
    seq: Seq
    exit_code: int
    stdout: bytes
    stderr: bytes


class Returned(_Frame, frozen=True, tag="returned"):
    """The outcome of a ``Call``: ``status`` as in HTTP, ``payload`` JSON. What did not succeed changed nothing.

    Every change up to ``seq`` has travelled before it on this connection.
    """

    id: RequestId
    seq: Seq
    status: Annotated[int, Meta(ge=200, le=599)]
    payload: bytes


class Stored(_Frame, frozen=True, tag="stored"):
    """The outcome of a ``Put``; on ``conflict`` the server's text is unchanged, and so is every file."""

    id: RequestId
    seq: Seq
    outcome: Literal["stored", "merged", "unchanged", "conflict"]


class Uploaded(_Frame, frozen=True, tag="uploaded"):
    """The answer to ``Upload``: so many bytes of the content are there, without a gap.

    With all of them it has its digest, and can be referred to.
    """

    id: RequestId
    have: _Size


class Pushed(_Frame, frozen=True, tag="pushed"):
    """The outcome of a ``Push``: the project is that of the pack now, in a new epoch. ``notes`` are for its user."""

    id: RequestId
    seq: Seq
    tasks: _Size
    archived: _Size
    files: _Size
    notes: Annotated[list[_Line], Meta(max_length=100)] = []


class Downloaded(_Frame, frozen=True, tag="downloaded"):
    """The answer to ``Download``: what the file is at ``seq``, and the piece of it that was asked for."""

    id: RequestId
    seq: Seq
    size: _Size
    digest: Digest
    data: bytes


class Entry(msgspec.Struct, frozen=True):
    """One file of the manifest."""

    path: _Path
    size: _Size
    digest: Digest


class Entries(_Frame, frozen=True, tag="entries"):
    """A piece of the manifest as it is at ``seq``; ``last`` ends it."""

    seq: Seq
    mark: Mark
    entries: list[Entry]
    last: bool


class Part(_Frame, frozen=True, tag="part"):
    """A piece of a file as it was at ``seq``; the piece that reaches ``size`` ends it. ``gone``: no such file."""

    path: _Path
    seq: Seq
    size: _Size = 0
    digest: Annotated[bytes, Meta(max_length=32)] = b""
    offset: _Size = 0
    data: bytes = b""
    gone: bool = False


class LogEntry(msgspec.Struct, frozen=True):
    """One change as the log tells it: the fields of ``Change`` without operations, and the tasks that they touch.

    ``tasks`` are ids, sorted, the first ``MAX_LOG_TASKS``; ``more_tasks`` counts the others. ``epoch`` tells
    apart two changes of one number.
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
    """In the answer to a ``Log`` with ``text``: the length of that text after the change; None: removed or moved."""
    mark: Mark = b""


class LogPage(_Frame, frozen=True, tag="log-page"):
    """The answer to ``Log``: entries, newest first, perhaps none though there are more.

    ``before`` is what to ask for next; None when the log that is kept has been read to its beginning.
    """

    id: RequestId
    entries: Annotated[list[LogEntry], Meta(max_length=MAX_LOG_ENTRIES)]
    before: Seq | None


class Version(_Frame, frozen=True, tag="version"):
    """The answer to ``ReadVersion``: the whole text, at most ``MAX_VERSION_BYTES``."""

    id: RequestId
    epoch: Epoch
    seq: Seq
    data: bytes


class Refused(_Frame, frozen=True, tag="refused"):
    """A request was not carried out; it had no effect, except with ``REMOTE_UNKNOWN_OUTCOME``: nobody knows."""

    id: RequestId
    code: _Short
    message: _Line


class Bye(_Frame, frozen=True, tag="bye"):
    """The server's last frame: why it closes, and in how many seconds to come back (None: don't)."""

    code: _Short
    reason: _Line
    retry_after_s: Annotated[float, Meta(ge=0, le=3600)] | None = None


CAPABILITY_OF: Mapping[type, str] = {
    Put: "put-text",
    Log: "log",
    Upload: "uploads",
    Download: "downloads",
    Push: "push",
    Follow: "follow",
    ReadVersion: "versions",
}
"""What both sides must have named before a frame of this kind is sent, and answered; see ``needed_capability``."""
Write = Run | Put | Push | Call
"""A request that may change something, once for its id (I6)."""
Request = Write | Log | ReadVersion | Upload | Download
"""What a server answers, by its id."""
Response = Reply | Stored | Pushed | Returned | LogPage | Version | Uploaded | Downloaded | Refused
"""What answers a ``Request``."""
Result = Reply | Stored | Pushed | Returned
"""What answers a request that was carried out; it is journalled, and has the number up to which it is true."""
ClientFrame = (
    Hello | Run | Put | Push | Call | Fetch | Manifest | Log | ReadVersion | Upload | Download | Follow | Applied
)
ServerFrame = Welcome | Change | Followed | Entries | Part | Response | Bye


def needed_capability(frame: Request) -> str | None:
    """Return what both sides must have named before this frame is sent, and answered; None when that is nothing."""
    if isinstance(frame, Call):
        return f"call:{frame.surface}"
    if isinstance(frame, Put) and frame.base_digest:
        return "put-base"
    if isinstance(frame, Log) and frame.text:
        return "versions"
    return CAPABILITY_OF.get(type(frame))
