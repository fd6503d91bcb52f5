"""What a client does with each frame: the state of one copy of a project, without I/O (SPEC section 5).

The shell around it feeds ``receive()`` and performs the effects it returns, in order, before it feeds the next
frame. Files are the shell's; the replica decides which operations reach them, which files must be fetched
whole, and at which number of the history the copy stands:

    idle --hello()--> greeting --Welcome--> following <--> comparing (a manifest is being read)

Its promise: when ``position`` is (epoch, n) and ``wanted`` is empty, the files equal the server's tree at
(epoch, n) (I3); a path in ``wanted`` is one of which that can't be said yet, so the number is never ahead of
the files (I5). Any interleaving of cuts, repeats, restarts and epochs gets there.

Large contents of artifacts may be left out: they are in ``away``, with what they are, and nobody waits for them. The
shell gets them by their digest (``Download``), now or never, and says when one is ``here()``.
"""

import enum
from collections.abc import Iterable, Iterator, Mapping

from lattice_remote.errors import ProtocolError
from lattice_remote.protocol.effects import (
    NOWHERE,
    ApplyChange,
    Compare,
    Content,
    DeliverReply,
    Effect,
    Position,
    Remove,
    Save,
    Send,
    WritePart,
)
from lattice_remote.protocol.messages import (
    CAPABILITIES,
    PROTOCOL_VERSION,
    Bye,
    Change,
    Downloaded,
    Entries,
    Fetch,
    Followed,
    Hello,
    LogPage,
    Manifest,
    Part,
    Pushed,
    Refused,
    Reply,
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
    DeleteFile,
    MergeJson,
    MoveFile,
    Operation,
    PutFile,
)
from lattice_remote.protocol.paths import is_payload
from lattice_remote.protocol.transfers import Arriving, ManifestComparison

__all__ = ["LARGE_BYTES", "Replica", "State"]

FETCH_BATCH = 256
"""How many files are asked for at once."""
LARGE_BYTES = 256 * 1024
"""An artifact's content of more than this may be left out; a smaller one comes with everything else."""


class State(enum.Enum):
    """Where the conversation stands."""

    IDLE = "idle"
    GREETING = "greeting"
    FOLLOWING = "following"
    COMPARING = "comparing"


class Replica:
    """One copy of a project. Not thread-safe; see the module's text for how a shell drives it."""

    def __init__(
        self,
        position: Position = NOWHERE,
        wanted: Iterable[str] = (),
        *,
        follow: bool = True,
        capabilities: Iterable[str] = CAPABILITIES,
        away: Mapping[str, Content | None] | None = None,
    ) -> None:
        self.position = position
        """Where the copy stands: every change up to here is in the files, except in ``wanted`` ones."""
        self.wanted: dict[str, int] = dict.fromkeys(wanted, position.seq)
        """Paths of which ``position`` can't be said yet, with the least number at which they must be read.

        A file that was read at a later number than ``position`` stays here until the changes up to there came:
        should the server lose them (I7), it is fetched again.
        """
        self.away: dict[str, Content | None] = dict(away or {})
        """Contents of artifacts that are left out, and what they are at ``position``; None: only the server knows.

        The file may hold nothing, or what it held before.
        """
        self.away_version = 0
        """Grows whenever ``away`` changes."""
        self._may_leave_out = away is not None
        self.held: set[str] = set()
        """Those of ``wanted`` that somebody is editing here: not fetched until ``release()``."""
        self.welcome: Welcome | None = None
        """What the server said of itself on this connection; None before."""
        self.state = State.IDLE
        self.head = position.seq
        """The highest number that the server has named on this connection."""
        self._follow = follow
        self._capabilities = list(capabilities)
        self._requested: set[str] = set()
        self._arriving = Arriving()
        self._floors: dict[str, int] = {}  # path -> number at which its content was read, while that is ahead of us
        self._comparison: ManifestComparison | None = None
        self._answers: list[Result] = []

    @property
    def is_current(self) -> bool:
        """Whether the files hold everything that the server has told of, as far as nobody edits them."""
        return self.state is State.FOLLOWING and self.position.seq >= self.head and len(self.wanted) == len(self.held)

    # --- the connection ---

    def hello(self, *, client_version: str, lattice_version: str) -> Hello:
        """Start a conversation on a new connection and return its first frame."""
        self.state = State.GREETING
        self.welcome = None
        self._forget_requests()
        self._comparison = None
        self._answers.clear()
        return Hello(
            versions=[PROTOCOL_VERSION],
            client_version=client_version,
            lattice_version=lattice_version,
            capabilities=self._capabilities,
            epoch=self.position.epoch,
            seq=self.position.seq,
            mark=self.position.mark,
            follow=self._follow,
        )

    def disconnected(self) -> None:
        """The connection is gone; requests without an answer are the shell's to ask again."""
        self.state = State.IDLE
        self.welcome = None

    def receive(self, frame: ServerFrame) -> list[Effect]:
        """Take one frame and return what to do, in order.

        Raises:
            ProtocolError: the server broke the protocol (a gap in the numbers, a frame out of turn); the
                connection must be closed. Nothing of the frame was taken.
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
                return self._part_received(frame)
            case Reply() | Stored() | Pushed() | Returned():
                self.head = max(self.head, frame.seq) if self._follow else self.head
                self._answers.append(frame)
                return self._answers_ready()
            case LogPage() | Version() | Uploaded() | Downloaded() | Refused():
                return [DeliverReply(frame)]
            case Followed():
                raise ProtocolError("Followed, which a copy never asks for")
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
            raise ProtocolError("the server continues an epoch that this copy is not in")
        if self._follow and not frame.resync and frame.head < self.position.seq:
            raise ProtocolError(f"the server continues at {frame.head}, this copy is already at {self.position.seq}")
        self.welcome = frame
        self.head = frame.head
        self.state = State.FOLLOWING
        self._floors.clear()
        # Their old numbers may lie in a future that the server has lost; what it reads now is good enough.
        self.wanted = dict.fromkeys(self.wanted, self.position.seq)
        if not self.leaves_out:  # a server that was downgraded: they come as everything else does
            for path in list(self.away):
                self._want(path, self.position.seq)
        if not self._follow or not frame.resync:
            return self._requests()
        self.position = Position("", 0, b"")
        self.wanted.clear()
        self._set_away({})
        self.held.clear()
        return [Save(), *self.compare(mend=True)]

    # --- changes ---

    def _changed(self, change: Change) -> Iterator[Effect]:
        if not self._follow:
            raise ProtocolError(f"change {change.seq} on a connection that only writes")
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
        """Go on by one change; no ``Save`` may come before what is returned, since ``position`` is past it already."""
        operations = tuple(op for given in change.ops for op in self._reduce(given, change))
        self.position = Position(self.position.epoch, change.seq, change.mark)
        for path in [path for path, floor in self._floors.items() if floor <= change.seq]:
            self._unwant(path)
        return ApplyChange(change, operations)

    def _reduce(self, operation: Operation, change: Change) -> Iterator[Operation]:
        """Yield what of an operation still has to reach the files now, given what was or will be fetched."""
        path, seq = operation.path, change.seq
        if path in self._floors:  # read at this number or later: the operation is in it
            if isinstance(operation, MoveFile) and operation.to not in self._floors:
                self._want(operation.to, seq)
            return
        match operation:
            case PutFile() | DeleteFile():
                self._unwant(path)
                yield operation
            case AppendBytes() | MergeJson():
                if path in self.away:
                    self._want(path, seq)
                elif path not in self.wanted:
                    yield operation
                elif not self._arriving.keep(change, operation):
                    self._want(path, seq)
            case AnnounceFile(size=size, digest=digest) if self.may_leave_out(path, size):
                self._leave_out(path, (size, digest))
            case AnnounceFile():
                if path in self.wanted or path in self.away:
                    self._want(path, seq)
                yield operation
            case MoveFile():
                yield from self._reduce_move(operation, seq)

    def _reduce_move(self, operation: MoveFile, seq: int) -> Iterator[Operation]:
        path, to = operation.path, operation.to
        if path in self.away:
            content = self.away[path]
            self._unwant(path)
            yield DeleteFile(path)
            if to not in self._floors:
                self._leave_out(to, content)
        elif path in self.wanted:
            self._unwant(path)
            yield DeleteFile(path)
            if to not in self._floors:
                self._want(to, seq)
        else:
            self._unwant(to)
            yield operation

    def _arrived(self, path: str) -> list[Effect]:
        """All pieces of a file are here: return what was kept for it."""
        later = self._arriving.forget(path)
        self._unwant(path)
        return [ApplyChange(change, (operation,)) for change, operation in later]

    def _forget_requests(self) -> None:
        self._requested.clear()
        self._arriving.clear()

    def drifted(self, paths: Iterable[str]) -> list[Effect]:
        """These files were not what an operation or a digest expected: have them fetched whole."""
        for path in paths:
            self._want(path, self.position.seq)
        return self._requests()

    # --- what is left out ---

    @property
    def leaves_out(self) -> bool:
        """Whether large contents of artifacts are left out of what is fetched; known while connected."""
        return self._may_leave_out and self.welcome is not None and "downloads" in self.welcome.capabilities

    def may_leave_out(self, path: str, size: int) -> bool:
        """Whether a file of this size, that is not here, is left out."""
        return self.leaves_out and size > LARGE_BYTES and is_payload(path)

    def leave_out(self, path: str) -> None:
        """Others have changed this content of an artifact: leave it out, until the server has said what it is."""
        assert self.leaves_out, "nobody would fetch it"
        self._leave_out(path, None)

    def learned(self, path: str, content: Content, seq: int) -> bool:
        """A file that is left out is this at ``seq``; return whether that says what it is at ``position``.

        It does not while ``position`` is behind: the changes in between are still to come.
        """
        if path in self.away and self.away[path] is None and self.position.seq >= seq:
            self._leave_out(path, content)
        return self.away.get(path) == content

    def here(self, path: str) -> None:
        """The file holds what ``away`` says: it is left out no more."""
        del self.away[path]
        self.away_version += 1

    def _leave_out(self, path: str, content: Content | None) -> None:
        self._unwant(path)
        self.away[path] = content
        self.away_version += 1

    def hold(self, path: str) -> None:
        """Somebody edits this file here: what the server has for it waits until ``release()``.

        That must come once the edit was sent, given up or undone, by whichever process.
        """
        self._want(path, self.position.seq)
        self.held.add(path)

    def release(self, paths: Iterable[str]) -> list[Effect]:
        """The edits on these files are settled: fetch what is still wanted of them."""
        self.held.difference_update(paths)
        return [*self._requests(), *self._answers_ready()]

    def overtaken(
        self, position: Position, wanted: Iterable[str], away: Mapping[str, Content | None] | None = None
    ) -> list[Effect]:
        """Another process has brought the same files to ``position``: go on from there. Not while comparing.

        What was on its way is asked for anew: only the other process knows what the files hold now.
        """
        assert self._comparison is None, "the manifest is compared with the files of one number; greet again"
        self.position = position
        self.head = max(self.head, position.seq)
        self.wanted = dict.fromkeys(wanted, position.seq)
        self._set_away(away or {})
        self.held.intersection_update(self.wanted)
        self._floors.clear()
        self._forget_requests()
        return [*self._requests(), *self._answers_ready()]

    def _set_away(self, away: Mapping[str, Content | None]) -> None:
        self.away = dict(away)
        self.away_version += 1

    def _come_back(self, path: str) -> None:
        if path in self.away:
            self.here(path)

    def _want(self, path: str, seq: int) -> None:
        self._come_back(path)
        self.wanted[path] = seq
        self._requested.discard(path)
        self._arriving.forget(path)
        self._floors.pop(path, None)

    def _unwant(self, path: str) -> None:
        self._come_back(path)
        self.wanted.pop(path, None)
        self.held.discard(path)
        self._requested.discard(path)
        self._arriving.forget(path)
        self._floors.pop(path, None)

    # --- whole files ---

    def _requests(self) -> list[Effect]:
        """Ask for more of the wanted files once most of the last batch has come."""
        if self.state is not State.FOLLOWING or self._comparison is not None or len(self._requested) > FETCH_BATCH // 2:
            return []
        paths: list[str] = []
        for path in self.wanted:
            if path not in self._requested and path not in self.held and path not in self._floors:
                paths.append(path)
                if len(paths) == FETCH_BATCH:
                    break
        self._requested.update(paths)
        return [Send(Fetch(paths))] if paths else []

    def _part_received(self, part: Part) -> list[Effect]:
        if part.offset + len(part.data) > part.size:
            raise ProtocolError(f"part of {part.path!r} reaches beyond its size")
        if not part.data and part.offset < part.size and not part.gone:
            raise ProtocolError(f"part of {part.path!r} brings nothing")
        if part.path not in self._requested or part.seq < self.wanted.get(part.path, part.seq + 1):
            return []  # it answers an older request: an operation, an edit or a newer request came since
        self.head = max(self.head, part.seq)
        if part.offset == 0:
            self._arriving.begin(part.path, part.seq)
        effects: list[Effect] = [Remove((part.path,)) if part.gone else WritePart(part)]
        if part.gone or part.offset + len(part.data) == part.size:
            effects += self._arrived(part.path)
            if part.seq > self.position.seq:
                self.wanted[part.path] = self._floors[part.path] = part.seq
            effects += [Save(), *self._requests(), *self._answers_ready()]
        return effects

    # --- comparing with the server's manifest ---

    def compare(self, *, mend: bool) -> list[Effect]:
        """Ask for the manifest; a ``Compare`` effect follows. Call while following or comparing."""
        if self._comparison is not None:
            self._comparison.mend |= mend
            return []
        assert self.state is State.FOLLOWING, "there is no server to compare with"
        self._comparison = ManifestComparison(mend)
        self.state = State.COMPARING
        return [Send(Manifest())]

    def _listed(self, frame: Entries) -> list[Effect]:
        comparison = self._comparison
        if comparison is None or comparison.complete or comparison.seq not in (-1, frame.seq):
            raise ProtocolError("a manifest that was not asked for")
        if self.position.epoch and frame.seq != self.position.seq:
            raise ProtocolError(f"the manifest is of {frame.seq}, but changes came up to {self.position.seq}")
        if comparison.seq < 0:
            comparison.begin(frame.seq, frame.mark)
        comparison.add(frame.entries, last=frame.last)
        if not frame.last:
            return []
        return [Compare(frame.seq, comparison.entries, comparison.mend)]

    def verified(self) -> list[Effect]:
        """The comparison is over and nothing is to be mended: go on."""
        comparison = self._finish_comparison()
        applied = [self._advance(change) for change in comparison.later]
        return [*applied, *([Save()] if applied else []), *self._requests(), *self._answers_ready()]

    def compared(self, local: Mapping[str, tuple[int, bytes]], *, edited: Iterable[str] = ()) -> list[Effect]:
        """Mend: fetch what differs from the manifest and remove what it does not list.

        Args:
            local: size in bytes and digest of each file of the copy, ``edited`` ones by their content before.
            edited: paths with unsent edits; these are left alone, and held where the server has another text, or none.
        """
        comparison = self._finish_comparison()
        assert self.welcome is not None, "a manifest only comes after a Welcome"
        self.position = Position(self.welcome.epoch, comparison.seq, comparison.mark)
        self.head = max(self.head, comparison.seq)
        self._floors.clear()
        differing = {path: entry for path, entry in comparison.entries.items() if local.get(path) != entry}
        self._set_away({path: entry for path, entry in differing.items() if self.may_leave_out(path, entry[0])})
        self.wanted = {path: comparison.seq for path in differing if path not in self.away}
        untouchable = frozenset(edited)
        self.wanted |= {path: comparison.seq for path in untouchable if path not in comparison.entries}
        self.held = {path for path in self.wanted if path in untouchable}
        self._forget_requests()
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

    # --- answers ---

    def _answers_ready(self) -> list[Effect]:
        """Hand on the answers whose changes are in the files; the others wait."""
        if not self._answers or self._comparison is not None:
            return []
        missing = [seq for path, seq in self.wanted.items() if path not in self.held] if self._follow else []
        reached = self.position.seq if self._follow else self._answers[-1].seq
        ready = [a for a in self._answers if a.seq <= reached and not any(seq <= a.seq for seq in missing)]
        self._answers = [a for a in self._answers if a not in ready]
        return [DeliverReply(answer) for answer in ready]
