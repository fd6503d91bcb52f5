"""Server in memory, without I/O, for scripted conversations with a client.

It keeps every tree of its history, and does what SPEC.md allows a server at the least convenient moment: it replays
slowly while others write, reads files for a ``Fetch`` long before the replay gets there, and sends manifests and files
in small pieces.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from lattice_remote.protocol.messages import (
    CAPABILITIES,
    Change,
    Entries,
    Entry,
    Fetch,
    Hello,
    Limits,
    Manifest,
    Part,
    Parts,
    Reply,
    ServerFrame,
    Welcome,
    WholeFile,
    decode_client_frame,
    decode_server_frame,
    encode,
    pack_files,
)
from lattice_remote.protocol.operations import (
    TAIL_BYTES,
    AnnounceFile,
    AppendBytes,
    DeleteFile,
    MergeJson,
    MoveFile,
    Operation,
    PutFile,
    canonical_json,
    digest_of,
    merge_patch,
)

Files = dict[str, bytes]
PIECE = 7
"""Small, so that everything comes in several pieces."""


def append_to(path: str, before: bytes, data: bytes) -> AppendBytes:
    return AppendBytes(path, offset=len(before), tail=digest_of(before[-TAIL_BYTES:]), data=data)


def merge_into(path: str, before: bytes, patch: dict[str, object]) -> tuple[MergeJson, bytes]:
    """Return the operation that patches a canonical JSON file, and the content afterwards."""
    import json

    after = canonical_json(merge_patch(json.loads(before), patch))
    return MergeJson(path, patch=json.dumps(patch).encode(), digest=digest_of(after)), after


def announce(path: str, after: bytes) -> AnnounceFile:
    return AnnounceFile(path, size=len(after), digest=digest_of(after))


def delta(before: Files, after: Files, *, announced: frozenset[str] = frozenset()) -> list[Operation]:
    """Return operations that lead from one tree to another: appends where a file grew, moves where one moved."""
    operations: list[Operation] = []
    gone = [path for path in before if path not in after]
    for path, data in after.items():
        old = before.get(path)
        if old == data:
            continue
        source = next((p for p in gone if before[p] == data), None) if old is None else None
        if path in announced:
            operations.append(announce(path, data))
        elif source is not None:
            gone.remove(source)
            operations.append(MoveFile(source, to=path, digest=digest_of(data)))
        elif old is not None and len(data) > len(old) and data.startswith(old):
            operations.append(append_to(path, old, data[len(old) :]))
        else:
            operations.append(PutFile(path, data))
    return operations + [DeleteFile(path) for path in gone]


@dataclass(frozen=True)
class Moment:
    mark: bytes
    files: Files
    change: Change | None = None


class InMemoryConnection:
    """Two FIFO streams of encoded frames, and the pieces that are still to be sent."""

    def __init__(self) -> None:
        self.to_client: deque[bytes] = deque()
        self.to_server: deque[bytes] = deque()
        self.cursor: int | None = None  # last change sent
        self.takes_parts = False
        self.pending: deque[ServerFrame | str] = deque()
        """Pieces of files and manifests, and paths whose files are read when their turn comes."""

    def send(self, frame: ServerFrame) -> None:
        self.to_client.append(encode(frame))


@dataclass
class InMemoryServer:
    epoch: str = "epoch0"
    history: list[Moment] = field(default_factory=lambda: [Moment(b"", {})])
    oldest: int = 1
    piece: int = PIECE
    """Bytes in a part, entries in a piece of a manifest."""
    compresses: bool = False
    """Whether files that wait are sent whole, and together in one ``Parts``, to clients that take it."""
    connections: list[InMemoryConnection] = field(default_factory=list)
    trees: dict[tuple[str, bytes], Files] = field(default_factory=lambda: {("epoch0", b""): {}})
    """Every tree that ever was, also in histories that were rolled back, by epoch and mark."""
    _marks: int = 0
    _epochs: int = 0

    @property
    def head(self) -> int:
        return len(self.history) - 1

    @property
    def files(self) -> Files:
        return self.history[-1].files

    def write(
        self, operations: list[Operation], after: Files, *, request_id: str | None = None, cause: str = "edit"
    ) -> int:
        """Append a change; with ``request_id``, answer that request on every connection."""
        self._marks += 1
        mark = hashlib.sha256(b"%d" % self._marks).digest()[:8]
        change = Change(self.head + 1, mark, "2026-01-01T00:00:00.000Z", "human:ana", "", cause, "x", operations)
        self.history.append(Moment(mark, after, change))
        self.trees[self.epoch, mark] = after
        for connection in self.connections:
            if connection.cursor == self.head - 1:
                connection.cursor = self.head
                connection.send(change)
            if connection.cursor is not None and request_id is not None:
                connection.pending.append(Reply(request_id, self.head, 0, b"", b""))
        return self.head

    def trim(self, oldest: int) -> None:
        self.oldest = max(self.oldest, min(oldest, self.head + 1))

    def roll_back(self, seq: int) -> None:
        """Lose the changes after ``seq``, as a restored backup does, without noticing."""
        del self.history[seq + 1 :]
        self.oldest = min(self.oldest, self.head + 1)
        self.connections.clear()

    def new_epoch(self) -> None:
        """Start a new epoch with the present files (I7)."""
        self._epochs += 1
        self.epoch = f"epoch{self._epochs}"
        self.history = [Moment(b"", self.files)]
        self.oldest = 1
        self.trees[self.epoch, b""] = self.files
        self.connections.clear()

    def accept(self) -> InMemoryConnection:
        connection = InMemoryConnection()
        self.connections.append(connection)
        return connection

    def take(self, connection: InMemoryConnection) -> None:
        if connection not in self.connections:
            connection.to_server.clear()
            return
        match decode_client_frame(connection.to_server.popleft()):
            case Hello() as hello:
                self._greet(connection, hello)
            case Manifest():
                self._list(connection)
            case Fetch(paths):
                waiting = {item for item in connection.pending if isinstance(item, str)}
                connection.pending.extend(path for path in paths if path not in waiting)
            case frame:
                raise AssertionError(f"a replica never sends {frame}")

    def _greet(self, connection: InMemoryConnection, hello: Hello) -> None:
        known = hello.epoch == self.epoch
        if known and (hello.seq > self.head or self.history[hello.seq].mark != hello.mark):
            self.new_epoch()
            self.connections.append(connection)
            known = False
        resync = not known or hello.seq + 1 < self.oldest
        connection.cursor = self.head if resync else hello.seq
        connection.takes_parts = "parts" in hello.capabilities
        connection.send(
            Welcome(
                version=1,
                server_version="0",
                lattice_version="0",
                project="p",
                actor="human:ana",
                epoch=self.epoch,
                head=self.head,
                oldest=self.oldest,
                resync=resync,
                limits=Limits(1 << 20, 1 << 20),
                capabilities=list(CAPABILITIES),
            )
        )

    def _list(self, connection: InMemoryConnection) -> None:
        while self._replay_one(connection):
            pass
        entries = [Entry(path, len(data), digest_of(data)) for path, data in self.files.items()]
        pieces = [entries[i : i + self.piece] for i in range(0, len(entries), self.piece)] or [[]]
        frames = [
            Entries(self.head, self.history[-1].mark, piece, last=i == len(pieces) - 1)
            for i, piece in enumerate(pieces)
        ]
        connection.send(frames[0])
        connection.pending.extend(frames[1:])

    def _parts(self, path: str, seq: int) -> Iterator[Part]:
        data = self.history[seq].files.get(path)
        if data is None:
            yield Part(path, seq, gone=True)
            return
        for offset in range(0, max(1, len(data)), self.piece):
            yield Part(path, seq, len(data), digest_of(data), offset, data[offset : offset + self.piece])

    def _compressed(self, connection: InMemoryConnection) -> Parts | None:
        """Return the files at the front of the queue in one frame, if there are any."""
        assert connection.cursor is not None, "files are sent after the greeting"
        files = self.history[connection.cursor].files
        taken = list(takewhile(lambda item: isinstance(item, str) and item in files, connection.pending))
        for _ in taken:
            connection.pending.popleft()
        whole = [WholeFile(path, digest_of(files[path]), files[path]) for path in map(str, taken)]
        return Parts(connection.cursor, *pack_files(whole)) if whole else None

    def _replay_one(self, connection: InMemoryConnection) -> bool:
        if connection.cursor is None or connection.cursor >= self.head:
            return False
        connection.cursor += 1
        change = self.history[connection.cursor].change
        assert change is not None
        connection.send(change)
        return True

    def send_next(self, connection: InMemoryConnection, *, piece_first: bool) -> bool:
        """Send a change that is being replayed, or a piece; return False if there is none."""
        if connection not in self.connections:
            return False
        if not (piece_first and connection.pending) and self._replay_one(connection):
            return True
        if not connection.pending:
            return False
        frame = connection.pending[0]
        if isinstance(frame, Reply) and connection.cursor is not None and connection.cursor < frame.seq:
            return self._replay_one(connection)
        if self.compresses and connection.takes_parts and (parts := self._compressed(connection)) is not None:
            connection.send(parts)
            return True
        connection.pending.popleft()
        if isinstance(frame, str):
            assert connection.cursor is not None, "files are sent after the greeting"
            frame, *rest = self._parts(frame, connection.cursor)
            connection.pending.extendleft(reversed(rest))
        connection.send(frame)
        return True


def received(connection: InMemoryConnection) -> ServerFrame:
    return decode_server_frame(connection.to_client.popleft())
