"""Client state machine: one cache of a project, without I/O (SPEC section 5).

The shell performs the effects of ``receive()`` in order before it feeds the next frame. It owns the files; the replica
decides which operations to apply, which files to fetch, and the cache's position:

    idle --hello()--> greeting --Welcome--> following <--> comparing (reading a manifest)

When ``position`` is (epoch, n) and ``missing`` is empty, the files equal the server's tree at (epoch, n) (I3). A path
in ``missing`` is not guaranteed yet, so the position is never ahead of the files (I5), for every interleaving of cuts,
repeats, restarts and epochs.

Replies do not wait for the large contents in ``deferred``. The shell downloads them by digest (``Download``) at any
time and reports each with ``here()``.
"""

import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from lattice_remote.errors import ProtocolError
from lattice_remote.protocol.messages import (
    CAPABILITIES,
    MAX_FETCH_PATHS,
    NOWHERE,
    PROTOCOL_VERSION,
    Bye,
    Change,
    ClientFrame,
    Downloaded,
    Entries,
    Entry,
    Fetch,
    Hello,
    LogPage,
    Manifest,
    Part,
    Parts,
    Position,
    Pushed,
    Refused,
    Replayed,
    Reply,
    Response,
    Result,
    Returned,
    ServerFrame,
    Stored,
    Uploaded,
    Version,
    Welcome,
)
from lattice_remote.protocol.operations import (
    AnnounceFile,
    AppendBytes,
    Content,
    DeleteFile,
    MergeJson,
    MoveFile,
    Operation,
    PutFile,
    weight_of,
)
from lattice_remote.protocol.paths import is_payload

__all__ = [
    "LARGE_BYTES",
    "MAX_BUFFERED_BYTES",
    "MAX_ENTRIES",
    "ApplyChange",
    "Arriving",
    "Compare",
    "DeliverReply",
    "Effect",
    "ManifestComparison",
    "Remove",
    "Replica",
    "Save",
    "Send",
    "State",
    "WritePart",
]


@dataclass(frozen=True, slots=True)
class ApplyChange:
    """Apply ``operations`` in order; report mismatching paths with ``drifted()``.

    Do not apply an operation on a file with a local edit: call ``block()`` with its path, and for a move also
    ``drifted()`` with its target.
    """

    change: Change
    operations: tuple[Operation, ...]


@dataclass(frozen=True, slots=True)
class WritePart:
    """Write this piece of a file; one at offset 0 starts the file.

    On the last piece, check size and digest and replace the file; on a mismatch call ``drifted()``.
    """

    part: Part


@dataclass(frozen=True, slots=True)
class Remove:
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Compare:
    """Compare the files with the server's at ``seq``; call ``compared()`` to repair, or ``verified()``."""

    seq: int
    entries: Mapping[str, Content]
    repair: bool


@dataclass(frozen=True, slots=True)
class Send:
    frame: ClientFrame


@dataclass(frozen=True, slots=True)
class DeliverReply:
    """A reply whose changes are in the files."""

    frame: Response


@dataclass(frozen=True, slots=True)
class Save:
    """Store ``position`` and ``missing`` durably, never ahead of the files (I5)."""


Effect = ApplyChange | WritePart | Remove | Compare | Send | DeliverReply | Save


_MAX_KEPT_BYTES = 16 * 1024 * 1024
"""For all files."""

_Kept = tuple[Change, AppendBytes | MergeJson]


class Arriving:
    """Files under transfer: path -> the operations on it since its first piece."""

    def __init__(self) -> None:
        self._files: dict[str, list[_Kept]] = {}
        self._kept_bytes = 0

    def __contains__(self, path: str) -> bool:
        return path in self._files

    def begin(self, path: str) -> None:
        """Start a file at its first piece, which includes every operation so far."""
        self.forget(path)
        self._files[path] = []

    def keep(self, change: Change, operation: AppendBytes | MergeJson) -> bool:
        """Keep an operation until its file is complete; return False if that is too much: fetch the file again."""
        self._files[operation.path].append((change, operation))
        self._kept_bytes += weight_of(operation)
        return self._kept_bytes <= _MAX_KEPT_BYTES

    def forget(self, path: str) -> list[_Kept]:
        kept = self._files.pop(path, [])
        self._kept_bytes -= sum(weight_of(operation) for _, operation in kept)
        return kept

    def clear(self) -> None:
        self._files.clear()
        self._kept_bytes = 0


MAX_ENTRIES = 500_000
"""Bound of an endless manifest's memory."""
MAX_BUFFERED_BYTES = 64 * 1024 * 1024
"""Of changes during a manifest; beyond it the comparison restarts."""


@dataclass(slots=True)
class ManifestComparison:
    repair: bool
    seq: int = -1  # of the manifest; -1 before its first piece
    mark: bytes = b""
    entries: dict[str, Content] = field(default_factory=dict)
    later: list[Change] = field(default_factory=list)  # without a gap, from ``seq`` on
    complete: bool = False
    later_bytes: int = 0

    def keep(self, change: Change) -> None:
        """Keep a change until the comparison ends. Raises ProtocolError on a gap, before any effect."""
        last = self.later[-1].seq if self.later else self.seq
        if 0 <= last < change.seq - 1:
            raise ProtocolError(f"change {change.seq} follows {last}: the history has a gap")
        if change.seq > last:
            self.later.append(change)
            self.later_bytes += sum(map(weight_of, change.ops))
        if self.later_bytes > MAX_BUFFERED_BYTES:
            raise ProtocolError("too many changes before the manifest was complete")

    def begin(self, seq: int, mark: bytes) -> None:
        """Start a manifest at ``seq``; drop the changes that it includes."""
        later = [change for change in self.later if change.seq > seq]
        if later and later[0].seq != seq + 1:
            raise ProtocolError(f"change {later[0].seq} follows the manifest of {seq}: the history has a gap")
        self.seq, self.mark, self.later = seq, mark, later

    def add(self, entries: Iterable[Entry], *, last: bool) -> None:
        """Add a piece; only the last may be empty."""
        before = len(self.entries)
        pairs = [(entry.path, (entry.size, entry.digest)) for entry in entries]
        self.entries.update(pairs)
        if len(self.entries) != before + len(pairs):
            raise ProtocolError("the manifest lists a file twice")
        if not pairs and not last:
            raise ProtocolError("a piece of the manifest is empty")
        if len(self.entries) > MAX_ENTRIES:
            raise ProtocolError(f"the manifest lists more than {MAX_ENTRIES} files")
        self.complete = last


FETCH_BATCH = MAX_FETCH_PATHS
LARGE_BYTES = 256 * 1024
"""Above it an artifact's content may be deferred."""


class State(enum.Enum):
    IDLE = "idle"
    GREETING = "greeting"
    FOLLOWING = "following"
    COMPARING = "comparing"


class Replica:
    def __init__(
        self,
        position: Position = NOWHERE,
        missing: Iterable[str] = (),
        *,
        follow: bool = True,
        deferred: Mapping[str, Content | None] | None = None,
    ) -> None:
        self.position = position
        """The files hold every change up to here, except those in ``missing``."""
        self.missing: dict[str, int] = dict.fromkeys(missing, position.seq)
        """Paths that ``position`` does not cover yet -> the number of the change since which they are missing."""
        self.deferred: dict[str, Content | None] = dict(deferred or {})
        """Contents at ``position``; None: known to the server only. The file may be empty, or hold its earlier content.
        """
        self.deferred_version = 0
        self.defers = deferred is not None
        self.blocked: set[str] = set()
        """Paths in ``missing`` with a local edit: not fetched until ``unblock()``."""
        self.welcome: Welcome | None = None
        """None before the server's first frame on this connection."""
        self.state = State.IDLE
        self.head = position.seq
        """Highest number that the server named on this connection."""
        self._follow = follow
        self._requested: set[str] = set()
        self._arriving = Arriving()
        self._comparison: ManifestComparison | None = None
        self._answers: list[Result] = []

    @property
    def is_current(self) -> bool:
        return (
            self.state is State.FOLLOWING and self.position.seq >= self.head and len(self.missing) == len(self.blocked)
        )

    def hello(self, *, client_version: str, lattice_version: str) -> Hello:
        self.state = State.GREETING
        self.welcome = None
        self._forget_requests()
        self._comparison = None
        self._answers.clear()
        return Hello(
            versions=[PROTOCOL_VERSION],
            client_version=client_version,
            lattice_version=lattice_version,
            capabilities=list(CAPABILITIES),
            epoch=self.position.epoch,
            seq=self.position.seq,
            mark=self.position.mark,
            follow=self._follow,
        )

    def disconnected(self) -> None:
        """Reset the session; the shell resends unanswered requests."""
        self.state = State.IDLE
        self.welcome = None

    def receive(self, frame: ServerFrame) -> list[Effect]:
        """Process one frame; return the effects in order.

        Raises ProtocolError, without effect: close the connection.
        """
        greeting = isinstance(frame, Welcome) and self.state is State.GREETING
        talking = not isinstance(frame, Welcome) and self.state in (State.FOLLOWING, State.COMPARING)
        if not greeting and not talking and not (isinstance(frame, Bye) and self.state is State.GREETING):
            raise ProtocolError(f"{type(frame).__name__} is out of turn while {self.state.value}")
        match frame:
            case Welcome():
                return self._welcomed(frame)
            case Change():
                effects = list(self._changed(frame))
                self.head = max(self.head, frame.seq)
                return effects
            case Entries():
                return self._listed(frame)
            case Part():
                return self._parts_received((frame,))
            case Parts():
                return self._parts_received(frame.parts)
            case Reply() | Stored() | Pushed() | Returned():
                self.head = max(self.head, frame.seq) if self._follow else self.head
                self._answers.append(frame)
                return self._answers_ready()
            case LogPage() | Version() | Uploaded() | Downloaded() | Replayed() | Refused():
                return [DeliverReply(frame)]
            case Bye():
                raise ProtocolError(frame.reason, code=frame.code)

    def _welcomed(self, frame: Welcome) -> list[Effect]:
        if frame.version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the server chose protocol {frame.version}, this side speaks {PROTOCOL_VERSION}: "
                f"upgrade the {'client' if frame.version > PROTOCOL_VERSION else 'server'}",
                code="REMOTE_VERSION",
            )
        if self._follow and not frame.resync and frame.epoch != self.position.epoch:
            raise ProtocolError("the server continues an epoch other than the cache's")
        if self._follow and not frame.resync and frame.head < self.position.seq:
            raise ProtocolError(f"the server's head {frame.head} is behind the cache's position {self.position.seq}")
        self.welcome = frame
        self.head = frame.head
        self.state = State.FOLLOWING
        self.missing = dict.fromkeys(self.missing, self.position.seq)
        if not self._follow or not frame.resync:
            return self._requests()
        self.position = Position("", 0, b"")
        self.missing.clear()
        self._set_deferred({})
        self.blocked.clear()
        return [Save(), *self.compare(repair=True)]

    def _changed(self, change: Change) -> Iterator[Effect]:
        if not self._follow:
            raise ProtocolError(f"change {change.seq} on a connection that did not subscribe")
        if self._comparison is not None and (self._comparison.seq >= 0 or not self.position.epoch):
            self._comparison.keep(change)
            return
        if change.seq <= self.position.seq:
            return
        if change.seq != self.position.seq + 1:
            raise ProtocolError(f"change {change.seq} follows {self.position.seq}: the history has a gap")
        yield self._advance(change)
        yield Save()
        yield from self._requests()
        yield from self._answers_ready()

    def _advance(self, change: Change) -> ApplyChange:
        """Advance by one change. ``position`` already includes it, so no ``Save`` may precede the returned effects."""
        operations = tuple(op for given in change.ops for op in self._reduce(given, change))
        self.position = Position(self.position.epoch, change.seq, change.mark)
        return ApplyChange(change, operations)

    def _reduce(self, operation: Operation, change: Change) -> Iterator[Operation]:
        """Yield the parts of an operation to apply now (SPEC 5.1)."""
        path, seq = operation.path, change.seq
        match operation:
            case PutFile() | DeleteFile():
                self._cover(path)
                yield operation
            case AppendBytes() | MergeJson():
                if path in self.deferred:
                    self._mark_missing(path, seq)
                elif path not in self.missing:
                    yield operation
                elif path in self._arriving and not self._arriving.keep(change, operation):
                    self._mark_missing(path, seq)
            case AnnounceFile(size=size, digest=digest) if self.may_defer(path, size):
                self._defer(path, (size, digest))
            case AnnounceFile():
                if path in self._arriving or path in self.deferred:
                    self._mark_missing(path, seq)
                elif path in self.missing:
                    self.missing[path] = seq
                else:
                    yield operation
            case MoveFile():
                yield from self._reduce_move(operation, seq)

    def _reduce_move(self, operation: MoveFile, seq: int) -> Iterator[Operation]:
        path, to = operation.path, operation.to
        if path in self.deferred:
            content = self.deferred[path]
            self._cover(path)
            yield DeleteFile(path)
            self._defer(to, content)
        elif path in self.missing:
            self._cover(path)
            yield DeleteFile(path)
            self._mark_missing(to, seq)
        else:
            self._cover(to)
            yield operation

    def _arrived(self, path: str) -> list[Effect]:
        later = self._arriving.forget(path)
        self._cover(path)
        return [ApplyChange(change, (operation,)) for change, operation in later]

    def _forget_requests(self) -> None:
        self._requested.clear()
        self._arriving.clear()

    def drifted(self, paths: Iterable[str]) -> list[Effect]:
        """Fetch files whole that did not match an operation or a digest."""
        for path in paths:
            self._mark_missing(path, self.position.seq)
        return self._requests()

    def may_defer(self, path: str, size: int) -> bool:
        return self.defers and size > LARGE_BYTES and is_payload(path)

    def defer(self, path: str) -> None:
        """Defer an artifact's content that another program changed, until the server has sent size and digest."""
        assert self.defers, "its content would never be fetched"
        self._defer(path, None)

    def learned(self, path: str, content: Content, seq: int) -> bool:
        """Record a deferred file's size and digest at ``seq``; return False if ``position`` has yet to reach it."""
        if path in self.deferred and self.deferred[path] is None and self.position.seq >= seq:
            self._defer(path, content)
        return self.deferred.get(path) == content

    def here(self, path: str) -> None:
        del self.deferred[path]
        self.deferred_version += 1

    def _defer(self, path: str, content: Content | None) -> None:
        self._cover(path)
        self.deferred[path] = content
        self.deferred_version += 1

    def block(self, path: str) -> None:
        """Suspend updates of a file with a local edit.

        Call ``unblock()`` once any process has sent, discarded or undone the edit.
        """
        self._mark_missing(path, self.position.seq)
        self.blocked.add(path)

    def unblock(self, paths: Iterable[str]) -> list[Effect]:
        """Fetch the missing files among ``paths``, whose edits are settled."""
        self.blocked.difference_update(paths)
        return [*self._requests(), *self._answers_ready()]

    def fast_forward(
        self, position: Position, missing: Iterable[str], deferred: Mapping[str, Content | None] | None = None
    ) -> list[Effect]:
        """Continue from ``position``, to which another process advanced the same files. Not while comparing.

        Outstanding fetches are sent again: only the other process knows the files' content.
        """
        assert self._comparison is None, "the manifest is compared with the files of one number; greet again"
        self.position = position
        self.head = max(self.head, position.seq)
        self.missing = dict.fromkeys(missing, position.seq)
        self._set_deferred(deferred or {})
        self.blocked.intersection_update(self.missing)
        self._forget_requests()
        return [*self._requests(), *self._answers_ready()]

    def _set_deferred(self, deferred: Mapping[str, Content | None]) -> None:
        self.deferred = dict(deferred)
        self.deferred_version += 1

    def _end_deferral(self, path: str) -> None:
        if path in self.deferred:
            self.here(path)

    def _mark_missing(self, path: str, seq: int) -> None:
        self._end_deferral(path)
        self.missing[path] = seq
        self._requested.discard(path)
        self._arriving.forget(path)

    def _cover(self, path: str) -> None:
        self._end_deferral(path)
        self.missing.pop(path, None)
        self.blocked.discard(path)
        self._requested.discard(path)
        self._arriving.forget(path)

    # --- whole files ---

    def _requests(self) -> list[Effect]:
        """Fetch more of the missing files once most of the last batch has arrived."""
        if self.state is not State.FOLLOWING or self._comparison is not None or len(self._requested) > FETCH_BATCH // 2:
            return []
        paths: list[str] = []
        for path in self.missing:
            if path not in self._requested and path not in self.blocked:
                paths.append(path)
                if len(paths) == FETCH_BATCH:
                    break
        self._requested.update(paths)
        return [Send(Fetch(paths))] if paths else []

    def _parts_received(self, parts: Iterable[Part]) -> list[Effect]:
        requested = len(self._requested)
        effects = [effect for part in parts for effect in self._take_part(part)]
        if len(self._requested) < requested:  # some are complete
            effects += [Save(), *self._requests(), *self._answers_ready()]
        return effects

    def _take_part(self, part: Part) -> list[Effect]:
        if part.offset + len(part.data) > part.size:
            raise ProtocolError(f"part of {part.path!r} reaches beyond its size")
        if not part.data and part.offset < part.size and not part.gone:
            raise ProtocolError(f"part of {part.path!r} is empty")
        if part.path not in self._requested:
            return []  # an operation, an edit or a comparison has superseded the request
        if part.offset == 0:
            if part.seq > self.position.seq:
                raise ProtocolError(f"{part.path!r} is of {part.seq}, but changes came up to {self.position.seq}")
            if part.seq < self.position.seq:
                return []  # another process has advanced the cache
            self._arriving.begin(part.path)
        elif part.path not in self._arriving:
            return []  # the rest of an earlier transfer
        effects: list[Effect] = [Remove((part.path,)) if part.gone else WritePart(part)]
        if part.gone or part.offset + len(part.data) == part.size:
            effects += self._arrived(part.path)
        return effects

    # --- comparison with the server's manifest ---

    def compare(self, *, repair: bool) -> list[Effect]:
        """Request the manifest; a ``Compare`` effect follows. Call while following or comparing."""
        if self._comparison is not None:
            self._comparison.repair |= repair
            return []
        assert self.state is State.FOLLOWING, "there is no server to compare with"
        self._comparison = ManifestComparison(repair)
        self.state = State.COMPARING
        return [Send(Manifest())]

    def _listed(self, frame: Entries) -> list[Effect]:
        comparison = self._comparison
        if comparison is None or comparison.complete or comparison.seq not in (-1, frame.seq):
            raise ProtocolError("unexpected manifest")
        if self.position.epoch and frame.seq != self.position.seq:
            raise ProtocolError(f"the manifest is of {frame.seq}, but changes came up to {self.position.seq}")
        if comparison.seq < 0:
            comparison.begin(frame.seq, frame.mark)
            self._forget_requests()  # parts wait as changes do: they are requested again
        comparison.add(frame.entries, last=frame.last)
        if not frame.last:
            return []
        return [Compare(frame.seq, comparison.entries, comparison.repair)]

    def verified(self) -> list[Effect]:
        comparison = self._finish_comparison()
        applied = [self._advance(change) for change in comparison.later]
        return [*applied, *([Save()] if applied else []), *self._requests(), *self._answers_ready()]

    def compared(self, local: Mapping[str, tuple[int, bytes]], *, edited: Iterable[str] = ()) -> list[Effect]:
        """Repair the cache: fetch files that differ from the manifest, remove files that it does not list.

        Args:
            local: size and digest of each file of the cache; for ``edited`` files those before the edit.
            edited: paths with unsent edits. They stay, blocked if the server's text differs or is missing.
        """
        comparison = self._finish_comparison()
        assert self.welcome is not None, "a manifest only comes after a Welcome"
        self.position = Position(self.welcome.epoch, comparison.seq, comparison.mark)
        self.head = max(self.head, comparison.seq)
        differing = {path: entry for path, entry in comparison.entries.items() if local.get(path) != entry}
        self._set_deferred({path: entry for path, entry in differing.items() if self.may_defer(path, entry[0])})
        self.missing = {path: comparison.seq for path in differing if path not in self.deferred}
        untouchable = frozenset(edited)
        self.missing |= {path: comparison.seq for path in untouchable if path not in comparison.entries}
        self.blocked = {path for path in self.missing if path in untouchable}
        surplus = tuple(path for path in local if path not in comparison.entries and path not in untouchable)
        removed = [Remove(surplus)] if surplus else []
        applied = [self._advance(change) for change in comparison.later]
        return [*removed, *applied, Save(), *self._requests(), *self._answers_ready()]

    def _finish_comparison(self) -> ManifestComparison:
        comparison = self._comparison
        assert comparison is not None, "compared() and verified() answer a Compare effect"
        assert comparison.complete, "compared() and verified() answer a Compare effect"
        self._comparison = None
        self.state = State.FOLLOWING
        return comparison

    def _answers_ready(self) -> list[Effect]:
        if not self._answers or self._comparison is not None:
            return []
        awaited = [seq for path, seq in self.missing.items() if path not in self.blocked] if self._follow else []
        reached = self.position.seq if self._follow else self._answers[-1].seq
        ready = [a for a in self._answers if a.seq <= reached and not any(seq <= a.seq for seq in awaited)]
        self._answers = [a for a in self._answers if a not in ready]
        return [DeliverReply(answer) for answer in ready]
