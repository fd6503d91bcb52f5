"""A replica converges to its server's tree despite faults (I3, I5, I7)."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from lattice_remote.conformance.scripted_server import (
    PIECE,
    Files,
    InMemoryConnection,
    InMemoryServer,
    announce,
    append_to,
    delta,
    merge_into,
    received,
)
from lattice_remote.errors import ProtocolError
from lattice_remote.protocol.messages import (
    MAX_FETCH_PATHS,
    NOWHERE,
    Bye,
    Change,
    Entries,
    Entry,
    Fetch,
    Limits,
    Manifest,
    Part,
    Parts,
    Position,
    Refused,
    Reply,
    ServerFrame,
    Stored,
    Welcome,
    WholeFile,
    encode,
    pack_files,
)
from lattice_remote.protocol.operations import (
    AppendBytes,
    DeleteFile,
    MemoryTree,
    MoveFile,
    Operation,
    PutFile,
    apply,
    canonical_json,
    digest_of,
    paths_of,
    weight_of,
)
from lattice_remote.protocol.replica import (
    MAX_BUFFERED_BYTES,
    MAX_ENTRIES,
    ApplyChange,
    Compare,
    DeliverReply,
    Effect,
    Remove,
    Replica,
    Save,
    Send,
    State,
    WritePart,
)

PLAN = "plans/a.md"
LOGS = ("events/a.jsonl", "events/b.jsonl", PLAN)
JSONS = ("ids.json", "tasks/a.json")
PATHS = (*LOGS, *JSONS, "archive/plans/a.md", "archive/tasks/a.json", "notes/a.md")
REQUEST = "0" * 32


class Crash(Exception):
    """A crash of the process."""


class Disk:
    """The files and the stored state of one cache, shared by one or more processes."""

    def __init__(self) -> None:
        self.files: Files = {}
        self.saved: tuple[Position, tuple[str, ...]] = (NOWHERE, ())
        self.version = 0  # counts the stores
        self.locked_by: Copy | None = None  # a process in a resync excludes the others until it is done
        self.edits: dict[str, bytes | None] = {}  # path -> base of the edit
        self.touched: set[str] = set()  # files changed by other programs, until a full comparison
        self.ahead = 0  # files may be at up to this number after a crash, ahead of the stored one
        self.rolled_back = False  # the server lost changes that may be in files ahead of the stored number


class Copy:
    """The shell of one replica: a process that updates a disk's files from the server."""

    def __init__(self, server: InMemoryServer, disk: Disk) -> None:
        self.server = server
        self.disk = disk
        self.version = 0  # version of the disk that this process has loaded
        self.replica = Replica()
        self.connection: InMemoryConnection | None = None
        self.arriving: dict[str, bytes] = {}
        self.sent: dict[str, int] = {}  # path -> change number of an edit that the server has stored

    # --- running ---

    @property
    def may_run(self) -> bool:
        return self.disk.locked_by in (None, self)

    def connect(self) -> None:
        """Connect and send Hello. Keeps the replica if no other process has stored anything since."""
        if self.version != self.disk.version:
            self.restart()
        self.connection = self.server.accept()
        hello = self.replica.hello(client_version="0", lattice_version="0")
        self.connection.to_server.append(encode(hello))

    def cut(self) -> None:
        if self.connection in self.server.connections:
            self.server.connections.remove(self.connection)
        self.connection = None
        self.sent.clear()
        self.replica.disconnected()
        if self.disk.locked_by is self:
            self.disk.locked_by = None

    def restart(self) -> None:
        if self.connection is not None:
            self.cut()
        position, wanted = self.disk.saved
        self.version = self.disk.version
        self.replica = Replica(position, wanted)
        self.arriving.clear()

    def receive(self, *, crash_at: int | None = None) -> None:
        assert self.may_run, "it would wait for the lock"
        if not self.catch_up_with_others():
            return
        assert self.connection is not None
        self.release_settled()
        self.perform(self.replica.receive(received(self.connection)), crash_at=crash_at)
        for path in [path for path, seq in self.sent.items() if seq <= self.replica.position.seq]:
            del self.sent[path]
            self.disk.edits.pop(path, None)
            self.perform(self.replica.unblock([path]))
        replica = self.replica
        if replica.state is State.COMPARING and not replica.position.epoch:
            self.disk.locked_by = self
        elif replica.state is State.FOLLOWING and len(replica.missing) == len(replica.blocked) and self.disk.locked_by:
            self.disk.locked_by = None

    def release_settled(self) -> None:
        """Unblock the files whose edits were sent, abandoned or undone by this or another process."""
        self.perform(self.replica.unblock([path for path in self.replica.blocked if path not in self.disk.edits]))

    def catch_up_with_others(self) -> bool:
        """Continue at the position of another process. Return whether that is possible."""
        if self.version == self.disk.version:
            return True
        (position, wanted), here = self.disk.saved, self.replica.position
        greeted = self.replica.state is State.FOLLOWING
        if not greeted or position.epoch != here.epoch or position.seq < here.seq:
            self.cut()
            return False
        self.version = self.disk.version
        self.arriving.clear()
        self.perform(self.replica.fast_forward(position, wanted))
        return True

    def perform(self, effects: list[Effect], *, crash_at: int | None = None) -> None:
        drifted = False
        for number, effect in enumerate(effects):
            if number == crash_at:
                raise Crash
            match effect:
                case ApplyChange(change, operations):
                    drifted |= self._apply(change, operations, torn=number + 1 == crash_at)
                case WritePart(part):
                    self._write(part)
                case Remove(paths):
                    for path in paths:
                        self._replace(path, None)
                case Compare():
                    self._compare(effect)
                case Send(frame):
                    assert self.connection is not None
                    self.connection.to_server.append(encode(frame))
                case DeliverReply(frame):
                    assert not isinstance(frame, Refused)
                    assert self.replica.position.seq >= frame.seq
                    if not drifted:
                        self.check(at_least=frame.seq)
                case Save():
                    self.check()
                    self.disk.saved = (self.replica.position, tuple(self.replica.missing))
                    self.disk.version += 1
                    self.version = self.disk.version

    def _apply(self, change: Change, operations: tuple[Operation, ...], *, torn: bool) -> bool:
        self.disk.ahead = max(self.disk.ahead, change.seq)
        drifted: set[str] = set()
        for number, operation in enumerate(operations):
            if torn and number == len(operations) - 1:
                if (
                    isinstance(operation, AppendBytes)
                    and self.disk.files.get(operation.path, b"").__len__() == operation.offset
                ):
                    MemoryTree(self.disk.files).append(operation.path, operation.data[:1])
                raise Crash
            edited = [path for path in paths_of(operation) if path in self.disk.edits]
            for path in edited:
                self.replica.block(path)
            if edited:
                drifted |= {path for path in paths_of(operation) if path not in edited}
            else:
                drifted |= apply(operation, MemoryTree(self.disk.files))
        self.perform(self.replica.drifted(drifted))
        return bool(drifted)

    def _write(self, part: Part) -> None:
        before = b"" if part.offset == 0 else self.arriving.get(part.path, b"")
        content = self.arriving[part.path] = before + part.data
        if part.offset + len(part.data) < part.size:
            return
        del self.arriving[part.path]
        if digest_of(content) == part.digest:
            self._replace(part.path, content)
        else:
            self.perform(self.replica.drifted([part.path]))

    def _replace(self, path: str, content: bytes | None) -> None:
        if path in self.disk.edits:
            self.replica.block(path)
        elif content is None:
            self.disk.files.pop(path, None)
        else:
            self.disk.files[path] = content

    def _compare(self, compare: Compare) -> None:
        files = self.disk.files | {path: text for path, text in self.disk.edits.items() if text is not None}
        local = {
            path: (len(data), digest_of(data))
            for path, data in files.items()
            if self.disk.edits.get(path, data) is not None
        }
        if compare.repair:
            self.disk.touched.clear()
            self.disk.rolled_back = False
            self.disk.ahead = 0
            self.perform(self.replica.compared(local, edited=list(self.disk.edits)))
            return
        known = {*local, *compare.entries} - {*self.replica.missing}
        differences = {path for path in known if local.get(path) != compare.entries.get(path)}
        excused = {*self.disk.edits, *self.disk.touched}
        assert differences <= excused or self.disk.rolled_back or self.disk.ahead > compare.seq
        self.perform(self.replica.verified())

    # --- invariants ---

    def check(self, *, at_least: int = 0) -> None:
        """Check that every file equals the server's at the replica's position, except those reported as unknown."""
        position = self.replica.position
        if not position.epoch or self.disk.rolled_back:
            return
        expected = self.server.trees[position.epoch, position.mark]
        excused = {*self.disk.edits, *self.disk.touched}
        excused |= {path for path, seq in self.replica.missing.items() if not 0 < seq <= at_least}
        acceptable = [expected]
        if self.disk.ahead > position.seq and position.epoch == self.server.epoch:
            acceptable += [moment.files for moment in self.server.history[position.seq : self.disk.ahead + 1]]
        for path in {*expected, *self.disk.files} - excused:
            found = self.disk.files.get(path)
            torn = self.disk.ahead > position.seq and found is not None
            assert torn or found in [files.get(path) for files in acceptable], f"{path} at {position}"


WHO = st.integers(0, 1)


class Replication(RuleBasedStateMachine):
    """One server, one cache with one or two processes, and all faults between them.

    Faults of one kind share a rule. Most steps are thus ordinary work, and faults occur in all its phases.
    """

    @initialize(
        files=st.dictionaries(st.sampled_from(PATHS), st.just(b"{}\n"), min_size=1),
        processes=st.integers(1, 2),
        compresses=st.booleans(),
    )
    def begin(self, files: Files, processes: int, compresses: bool) -> None:
        self.server = InMemoryServer(compresses=compresses)
        self.server.write([], files)
        self.server.trim(2)
        self.disk = Disk()
        self.copies = [Copy(self.server, self.disk) for _ in range(processes)]

    @property
    def unsent(self) -> list[str]:
        sent = {path for copy in self.copies for path in copy.sent}
        return [path for path in self.disk.edits if path not in sent]

    # --- the server ---

    @rule(log=st.sampled_from(LOGS), data=st.binary(min_size=1, max_size=3 * PIECE), mine=st.booleans())
    def log_grows(self, log: str, data: bytes, mine: bool) -> None:
        before = self.server.files.get(log, b"")
        self._write([append_to(log, before, data)], self.server.files | {log: before + data}, mine)

    @rule(
        path=st.sampled_from(JSONS), key=st.sampled_from("abc"), value=st.integers(0, 2) | st.none(), mine=st.booleans()
    )
    def json_is_patched(self, path: str, key: str, value: int | None, mine: bool) -> None:
        before = self.server.files.get(path, b"")
        try:
            operation, after = merge_into(path, before, {key: value})
        except ValueError:
            after = canonical_json({key: value})
            self._write([PutFile(path, after)], self.server.files | {path: after}, mine)
        else:
            self._write([operation], self.server.files | {path: after}, mine)

    @rule(path=st.sampled_from(PATHS), to=st.sampled_from(PATHS), mine=st.booleans())
    def file_moves(self, path: str, to: str, mine: bool) -> None:
        if path not in self.server.files or path == to:
            return
        after = dict(self.server.files)
        data = after[to] = after.pop(path)
        self._write([MoveFile(path, to=to, digest=digest_of(data))], after, mine)

    @rule(
        changed=st.dictionaries(st.sampled_from(PATHS), st.binary(max_size=4 * PIECE) | st.none(), max_size=4),
        announced=st.booleans(),
    )
    def several_files_change(self, changed: dict[str, bytes | None], announced: bool) -> None:
        after = {path: data for path, data in (self.server.files | changed).items() if data is not None}
        large = frozenset(path for path, data in changed.items() if data is not None) if announced else frozenset()
        self._write(delta(self.server.files, after, announced=large), after, False)

    def _write(self, operations: list[Operation], after: Files, mine: bool) -> None:
        self.server.write(operations, after, request_id=REQUEST if mine else None)

    @rule(what=st.sampled_from(["rolled back", "rolled back", "new epoch", "trimmed"]), number=st.integers(0, 11))
    def history_changes(self, what: str, number: int) -> None:
        if what == "rolled back":
            self._roll_back(1 + number % 3, number // 3)
        elif what == "trimmed":
            self.server.trim(self.server.head - number)
        else:
            self._cut_all()
            self.server.new_epoch()

    def _roll_back(self, back: int, overtake: int) -> None:
        """Restore the server from a backup, which may accept changes before a client connects."""
        seq = max(self.server.head - back, 0)
        self._cut_all()
        # Files left ahead of the stored number by a crash may be of the lost history. Only a comparison detects them.
        self.disk.rolled_back |= self.disk.ahead > min(seq, self.disk.saved[0].seq)
        self.server.roll_back(seq)
        for number in range(overtake):
            self.log_grows("events/a.jsonl", b"other%d\n" % number, False)

    def _cut_all(self) -> None:
        for copy in self.copies:
            if copy.connection is not None:
                copy.cut()

    # --- the connection ---

    @rule(who=WHO)
    def server_takes_a_frame(self, who: int) -> None:
        connection = self.copies[who % len(self.copies)].connection
        if connection is not None and connection.to_server:
            self.server.take(connection)

    @rule(who=WHO, piece_first=st.booleans(), frames=st.integers(1, 4))
    def server_says_more(self, who: int, piece_first: bool, frames: int) -> None:
        connection = self.copies[who % len(self.copies)].connection
        for _ in range(frames):
            if connection is not None:
                self.server.send_next(connection, piece_first=piece_first)

    @rule(who=WHO, frames=st.integers(1, 4))
    def client_receives(self, who: int, frames: int) -> None:
        for _ in range(frames):
            if self._can_receive(who):
                self.copies[who % len(self.copies)].receive()

    @rule(who=WHO, frames=st.integers(2, 60))
    def much_gets_through(self, who: int, frames: int) -> None:
        copy = self.copies[who % len(self.copies)]
        if copy.connection is None and copy.may_run:
            copy.connect()
        self._exchange(who, frames)

    def _can_receive(self, who: int) -> bool:
        copy = self.copies[who % len(self.copies)]
        return copy.may_run and copy.connection is not None and bool(copy.connection.to_client)

    # --- the client ---

    @rule(who=WHO, what=st.sampled_from(["cut", "cut and back", "restart", "crash"]), crash_at=st.integers(0, 3))
    def client_is_disturbed(self, who: int, what: str, crash_at: int) -> None:
        copy = self.copies[who % len(self.copies)]
        if what == "restart":
            copy.restart()
        elif what == "crash" and self._can_receive(who):
            try:
                copy.receive(crash_at=crash_at)
            except Crash:
                copy.restart()
        elif copy.connection is not None:
            copy.cut()
            if what == "cut and back" and copy.may_run:
                copy.connect()

    @rule(who=WHO, repair=st.booleans())
    def client_compares(self, who: int, repair: bool) -> None:
        copy = self.copies[who % len(self.copies)]
        if copy.replica.state in (State.FOLLOWING, State.COMPARING):
            copy.perform(copy.replica.compare(repair=repair))

    @rule(path=st.sampled_from(PATHS), data=st.binary(max_size=PIECE) | st.none())
    def file_is_tampered_with(self, path: str, data: bytes | None) -> None:
        if path in self.disk.edits:
            return
        self.disk.touched.add(path)
        if data is None:
            self.disk.files.pop(path, None)
        else:
            self.disk.files[path] = data

    @rule(path=st.sampled_from([PLAN, "notes/a.md"]), text=st.binary(max_size=PIECE))
    def somebody_edits(self, path: str, text: bytes) -> None:
        self.disk.edits.setdefault(path, self.disk.files.get(path))
        self.disk.files[path] = text

    @precondition(lambda self: self.unsent)
    @rule(who=WHO)
    def edit_is_given_up(self, who: int) -> None:
        copy = self.copies[who % len(self.copies)]
        if not copy.may_run or copy.replica.state is not State.FOLLOWING or not copy.catch_up_with_others():
            return
        path = self.unsent[0]
        base = self.disk.edits.pop(path)
        if base is None:
            self.disk.files.pop(path, None)
        else:
            self.disk.files[path] = base
        copy.perform(copy.replica.unblock([path]))

    @precondition(lambda self: self.unsent)
    @rule(who=WHO)
    def edit_is_stored(self, who: int) -> None:
        copy = self.copies[who % len(self.copies)]
        if copy.connection in self.server.connections and copy.replica.welcome is not None:
            path = self.unsent[0]
            text = self.disk.files.get(path, b"")
            copy.sent[path] = self.server.write([PutFile(path, text)], self.server.files | {path: text})

    # --- convergence ---

    def _exchange(self, who: int, frames: int = 10_000) -> None:
        """Deliver frames until both sides are idle, or until ``frames`` steps have run."""
        copy = self.copies[who % len(self.copies)]
        for _ in range(frames):
            if copy.connection is None:
                return
            if copy.connection.to_server:
                self.server.take(copy.connection)
            elif self._can_receive(who):
                copy.receive()
            elif not self.server.send_next(copy.connection, piece_first=False):
                return
        assert frames < 10_000, "the conversation never ends"

    def _settle(self, who: int) -> None:
        self._exchange(who)
        copy = self.copies[who % len(self.copies)]
        assert copy.replica.is_current, "the copy is stuck"
        assert copy.replica.position.seq == self.server.head, "the copy is behind"

    def teardown(self) -> None:
        """Check that the cache converges once there are no further faults."""
        if not hasattr(self, "copies"):
            return
        first, *others = self.copies
        for other in others:
            if other.connection is not None:
                other.cut()
        if first.connection is not None and first.connection not in self.server.connections:
            first.cut()
        if first.connection is None:
            first.connect()
        self._exchange(0)
        if first.connection is None:
            first.connect()  # it detected that the other process had reset the cache
        first.release_settled()
        self._settle(0)
        while self.unsent:
            self.edit_is_stored(who=0)
        self._settle(0)
        if self.disk.touched or self.disk.rolled_back:
            first.perform(first.replica.compare(repair=True))
            self._settle(0)
        assert not first.replica.missing
        assert self.disk.files == self.server.files
        assert self.disk.saved[0] == first.replica.position
        assert first.replica.position.epoch == self.server.epoch
        for other in others:
            other.connect()
            self._settle(1)
            assert self.disk.files == self.server.files


TestReplication = Replication.TestCase
TestReplication.settings = settings(
    max_examples=200, stateful_step_count=80, deadline=None, suppress_health_check=list(HealthCheck)
)


# --- single steps: frames of the server and their effects ---


def welcome(*, epoch: str = "e", head: int = 0, resync: bool = False, version: int = 1) -> Welcome:
    return Welcome(version, "0", "0", "p", "human:ana", epoch, head, 1, resync, Limits(1, 1))


def change(seq: int, *operations: Operation) -> Change:
    return Change(seq, b"m%d" % seq, "2026-01-01T00:00:00.000Z", "human:ana", "", "edit", "x", list(operations))


def reply(seq: int) -> Reply:
    return Reply(REQUEST, seq, 0, b"", b"")


def part(path: str, seq: int, data: bytes = b"x") -> Part:
    return Part(path, seq, len(data), digest_of(data), 0, data)


def following(seq: int = 1, *, head: int | None = None, missing: tuple[str, ...] = ()) -> Replica:
    """Return a replica at (e, seq) whose server has just confirmed that position."""
    replica = Replica(Position("e", seq, b"m%d" % seq), missing)
    replica.hello(client_version="0", lattice_version="0")
    replica.receive(welcome(head=seq if head is None else head))
    return replica


def sent(effects: list[Effect]) -> list[object]:
    return [effect.frame for effect in effects if isinstance(effect, Send)]


def answers(effects: list[Effect]) -> list[int]:
    return [
        effect.frame.seq
        for effect in effects
        if isinstance(effect, DeliverReply) and not isinstance(effect.frame, Refused)
    ]


def test_hello_states_the_position() -> None:
    replica = Replica(Position("e", 7, b"m"), follow=False)
    hello = replica.hello(client_version="0.1", lattice_version="0.2")
    assert (hello.epoch, hello.seq, hello.mark, hello.follow) == ("e", 7, b"m", False)
    assert (hello.client_version, hello.lattice_version) == ("0.1", "0.2")


def test_resync_clears_the_position_before_it_requests_the_manifest() -> None:
    replica = Replica(Position("old", 7, b"m"), ["a"])
    replica.hello(client_version="0", lattice_version="0")
    assert replica.receive(welcome(resync=True, head=3)) == [Save(), Send(Manifest())]
    assert (replica.position, replica.missing, replica.state) == (NOWHERE, {}, State.COMPARING)


def test_change_is_applied_then_saved() -> None:
    replica = following()
    operation = PutFile("a", b"1")
    assert replica.receive(change(2, operation)) == [ApplyChange(change(2, operation), (operation,)), Save()]
    assert replica.position == Position("e", 2, b"m2")


def test_repeated_change_is_ignored() -> None:
    assert following(5).receive(change(5, PutFile("a", b"1"))) == []


def test_replica_is_current_once_it_has_the_head_and_every_wanted_file() -> None:
    replica = following(1, head=2, missing=("a",))
    assert not replica.is_current
    replica.receive(change(2))
    assert not replica.is_current
    replica.receive(part("a", 2))
    assert replica.is_current


def test_reply_waits_for_the_files_that_its_changes_touched() -> None:
    replica = following()
    replica.receive(change(2, announce("a", b"large")))
    replica.drifted(["a"])
    assert replica.receive(reply(2)) == []
    assert answers(replica.receive(part("a", 2, b"large"))) == [2]


def test_reply_does_not_wait_for_a_locally_edited_file() -> None:
    replica = following()
    replica.block(PLAN)
    assert answers(replica.receive(reply(1))) == [1]
    assert sent(replica.unblock([PLAN])) == [Fetch([PLAN])]


def test_reply_before_its_change_waits_for_it() -> None:
    replica = following()
    assert replica.receive(reply(2)) == []
    assert answers(replica.receive(change(2))) == [2]


def test_reply_of_a_lost_connection_is_discarded() -> None:
    replica = following()
    replica.receive(reply(2))
    replica.disconnected()
    replica.hello(client_version="0", lattice_version="0")
    replica.receive(welcome(head=2))
    assert answers(replica.receive(change(2))) == []


def test_refusal_is_delivered_at_once() -> None:
    refused = Refused(REQUEST, "REMOTE_FORBIDDEN", "no")
    assert following().receive(refused) == [DeliverReply(refused)]


def test_connection_that_only_writes_receives_its_reply_at_once() -> None:
    replica = Replica(follow=False)
    replica.hello(client_version="0", lattice_version="0")
    assert replica.receive(welcome(head=40, resync=True)) == []
    stored = Stored(REQUEST, 41, "merged")
    assert replica.receive(stored) == [DeliverReply(stored)]
    assert replica.position == NOWHERE


def test_files_are_requested_in_batches_while_the_last_batch_arrives() -> None:
    paths = [f"tasks/{number}.json" for number in range(3 * MAX_FETCH_PATHS)]
    replica = Replica(Position("e", 1, b"m1"), paths)
    replica.hello(client_version="0", lattice_version="0")
    asked = [list(frame.paths) for frame in sent(replica.receive(welcome(head=1))) if isinstance(frame, Fetch)]
    assert [len(paths_asked) for paths_asked in asked] == [MAX_FETCH_PATHS]
    for path in paths:
        asked += [list(frame.paths) for frame in sent(replica.receive(part(path, 1))) if isinstance(frame, Fetch)]
    assert [path for paths_asked in asked for path in paths_asked] == paths
    assert all(len(paths_asked) <= MAX_FETCH_PATHS for paths_asked in asked)
    assert replica.is_current


def test_a_file_that_is_ahead_of_the_changes_is_a_violation() -> None:
    replica = following(1, head=9, missing=("a",))
    for ahead in (part("a", 5, b"as of 5"), Part("a", 2, gone=True)):
        with pytest.raises(ProtocolError, match="changes came up to 1"):
            replica.receive(ahead)
    assert replica.missing == {"a": 1}


def test_a_file_moved_during_its_transfer_is_fetched_at_its_new_path() -> None:
    replica = following(1, missing=("a",))
    move = MoveFile("a", to="b", digest=digest_of(b"x"))
    effects = replica.receive(change(2, move))
    assert effects[0] == ApplyChange(change(2, move), (DeleteFile("a"),))
    assert sent(effects) == [Fetch(["b"])]


def parts(seq: int, **files: bytes) -> Parts:
    return Parts(seq, *pack_files([WholeFile(path, digest_of(data), data) for path, data in files.items()]))


def test_files_received_together_are_written_together_and_unrequested_ones_ignored() -> None:
    replica = following(1, missing=("a", "b", "c"))
    replica.block("c")
    effects = replica.receive(parts(1, a=b"1", b=b"", c=b"3", d=b"4"))
    assert effects == [WritePart(part("a", 1, b"1")), WritePart(part("b", 1, b"")), Save()]
    assert replica.is_current and replica.missing == {"c": 1}
    assert replica.receive(parts(1, a=b"2")) == []


def test_files_received_together_are_those_of_the_position() -> None:
    replica = following(2, missing=("a", "b"))
    assert replica.receive(parts(1, a=b"1", b=b"2")) == []
    with pytest.raises(ProtocolError, match="is of 3"):
        replica.receive(parts(3, a=b"1", b=b"2"))


def test_the_first_missing_files_are_requested_again_when_half_have_arrived() -> None:
    names = [f"tasks/{number}.json" for number in range(MAX_FETCH_PATHS + 5)]
    replica = following(1, missing=())
    (first,) = sent(replica.drifted(names))
    assert first == Fetch(names[:MAX_FETCH_PATHS])
    half = MAX_FETCH_PATHS // 2
    assert sent(replica.receive(parts(1, **dict.fromkeys(names[: half - 1], b"{}")))) == []
    assert sent(replica.receive(parts(1, **{names[half]: b"{}"}))) == [Fetch(names[MAX_FETCH_PATHS:])]


def test_whole_file_in_a_change_is_no_longer_fetched() -> None:
    for operation in (PutFile("a", b"x"), DeleteFile("a"), MoveFile("b", to="a", digest=digest_of(b"x"))):
        replica = following(1, missing=("a",))
        assert replica.receive(change(2, operation)) == [ApplyChange(change(2, operation), (operation,)), Save()]
        assert replica.is_current
        assert replica.receive(part("a", 2)) == []


def test_a_file_announced_before_its_first_part_arrives_as_announced() -> None:
    replica = following(1, missing=("a",))
    assert sent(replica.receive(change(2, announce("a", b"new")))) == []
    assert replica.missing == {"a": 2}
    assert replica.receive(part("a", 2, b"new"))[0] == WritePart(part("a", 2, b"new"))
    assert replica.is_current


def test_a_file_announced_between_its_parts_is_fetched_again() -> None:
    replica = following(1, missing=("a",))
    first, last = pieces("a", 1, b"o", b"ld")
    replica.receive(first)
    assert sent(replica.receive(change(2, announce("a", b"new")))) == [Fetch(["a"])]
    assert replica.receive(last) == [], "the rest of the earlier transfer"
    assert replica.receive(part("a", 2, b"new"))[0] == WritePart(part("a", 2, b"new"))
    assert replica.is_current


def test_a_file_edited_during_its_transfer_is_not_written() -> None:
    replica = following(1, missing=("a",))
    replica.block("a")
    assert replica.receive(part("a", 1)) == []
    assert sent(replica.unblock(["a"])) == [Fetch(["a"])]


def test_files_requested_on_a_lost_connection_are_requested_again() -> None:
    replica = following(1, missing=("a",))
    replica.disconnected()
    replica.hello(client_version="0", lattice_version="0")
    assert sent(replica.receive(welcome(head=1))) == [Fetch(["a"])]


def pieces(path: str, seq: int, *data: bytes) -> list[Part]:
    whole = b"".join(data)
    offsets = [len(b"".join(data[:number])) for number in range(len(data))]
    return [Part(path, seq, len(whole), digest_of(whole), at, d) for at, d in zip(offsets, data, strict=True)]


def test_an_append_during_a_transfer_is_applied_after_the_last_part() -> None:
    replica = following(1, head=1, missing=("a",))
    first, last = pieces("a", 1, b"one\n", b"two\n")
    grown = append_to("a", b"one\ntwo\n", b"three\n")
    assert replica.receive(first) == [WritePart(first)]
    assert replica.receive(change(2, grown)) == [ApplyChange(change(2, grown), ()), Save()]
    assert replica.receive(reply(2)) == []
    effects = replica.receive(last)
    assert effects == [WritePart(last), ApplyChange(change(2, grown), (grown,)), Save(), DeliverReply(reply(2))]
    assert replica.is_current


def test_a_restarted_transfer_includes_earlier_appends() -> None:
    replica = following(1, head=1, missing=("a",))
    replica.receive(pieces("a", 1, b"one\n", b"two\n")[0])
    replica.receive(change(2, append_to("a", b"one\ntwo\n", b"three\n")))
    first, last = pieces("a", 2, b"one\ntwo\n", b"three\n")
    replica.receive(first)
    replica.receive(change(3, later := append_to("a", b"one\ntwo\nthree\n", b"four\n")))
    assert replica.receive(last)[:2] == [WritePart(last), ApplyChange(change(3, later), (later,))]


def test_an_append_before_the_first_part_is_not_applied_again() -> None:
    replica = following(1, missing=("a",))
    assert replica.receive(change(2, grown := append_to("a", b"x", b"y"))) == [
        ApplyChange(change(2, grown), ()),
        Save(),
    ]
    assert replica.receive(part("a", 2, b"xy"))[0] == WritePart(part("a", 2, b"xy"))
    assert replica.is_current


def test_parts_during_a_manifest_are_requested_again_after_it() -> None:
    replica = following(1, missing=("a", "b"))
    replica.compare(repair=False)
    assert replica.receive(part("b", 1))[0] == WritePart(part("b", 1)), "it has not begun yet"
    assert replica.receive(Entries(1, b"m1", [LISTED], last=False)) == []
    assert replica.receive(change(2)) == [] and replica.receive(part("a", 2)) == []
    replica.receive(Entries(1, b"m1", [], last=True))
    assert sent(replica.verified()) == [Fetch(["a"])]
    assert replica.receive(part("a", 2))[0] == WritePart(part("a", 2))
    assert replica.is_current


def test_appends_beyond_the_buffer_limit_fetch_the_file_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lattice_remote.protocol.replica._MAX_KEPT_BYTES", 10)
    replica = following(1, head=1, missing=("a",))
    replica.receive(pieces("a", 1, b"one\n", b"two\n")[0])
    effects = replica.receive(change(2, append_to("a", b"one\ntwo\n", b"three\n")))
    assert sent(effects) == [Fetch(["a"])]
    assert sent(replica.receive(change(3, append_to("a", b"one\ntwo\nthree\n", b"four\n")))) == []
    assert replica.missing == {"a": 2}
    replica.receive(part("a", 3, b"one\ntwo\nthree\nfour\n"))
    assert replica.is_current


def test_operations_buffered_on_lost_connections_do_not_count_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replica = following(1, head=1, missing=("a",))
    text = b"one\n"
    monkeypatch.setattr(
        "lattice_remote.protocol.replica._MAX_KEPT_BYTES", 3 * weight_of(append_to("a", text, b"two\n"))
    )
    for seq in range(1, 6):
        replica.receive(pieces("a", seq, text, b"unsent")[0])
        assert sent(replica.receive(change(seq + 1, append_to("a", text + b"unsent", b"two\n")))) == []
        replica.disconnected()
        replica.hello(client_version="0", lattice_version="0")
        assert sent(replica.receive(welcome(head=seq + 1))) == [Fetch(["a"])]


def test_remaining_parts_of_an_older_request_are_ignored() -> None:
    replica = following(1, missing=("a",))
    first, last = pieces("a", 1, b"x", b"y")
    replica.receive(first)
    replica.drifted(["a"])
    assert replica.receive(last) == []
    assert replica.missing == {"a": 1}


def test_replica_continues_at_the_position_of_another_process() -> None:
    replica = following(1, head=5, missing=("a", "b", "d"))
    replica.receive(pieces("a", 1, b"o", b"ld")[0])
    replica.receive(reply(4))
    replica.block("c")
    effects = replica.fast_forward(Position("e", 4, b"m4"), ["a", "d"])
    assert (sent(effects), answers(effects)) == ([Fetch(["a", "d"])], [])
    assert replica.blocked == set()
    assert replica.receive(change(4)) == []
    assert replica.receive(part("b", 4)) == []
    assert replica.receive(part("d", 3)) == [], "older than the files"
    assert replica.receive(change(5, PutFile("a", b"x")))[0] == ApplyChange(
        change(5, PutFile("a", b"x")), (PutFile("a", b"x"),)
    )
    assert answers(replica.receive(part("d", 5))) == [4]
    assert replica.is_current


def test_repair_fetches_differing_and_removes_unlisted_files() -> None:
    replica = following()
    assert replica.compare(repair=True) == [Send(Manifest())]
    same, other = (1, digest_of(b"s")), (1, digest_of(b"o"))
    effects = replica.receive(
        Entries(1, b"m1", [Entry("same", *same), Entry("differs", *same), Entry("edited", *same)], last=True)
    )
    assert effects == [Compare(1, {"same": same, "differs": same, "edited": same}, repair=True)]
    local = {"same": same, "differs": other, "edited": other, "surplus": same, "new": same}
    effects = replica.compared(local, edited=["edited", "new"])
    assert effects == [Remove(("surplus",)), Save(), Send(Fetch(["differs"]))]
    assert replica.blocked == {"edited", "new"}


def test_changes_during_a_comparison_follow_it() -> None:
    replica = following()
    replica.compare(repair=False)
    assert replica.receive(Entries(1, b"m1", [LISTED], last=False)) == []
    assert replica.receive(change(2)) == []
    assert replica.receive(reply(2)) == []
    assert replica.receive(Entries(1, b"m1", [], last=True)) == [
        Compare(1, {LISTED.path: (1, LISTED.digest)}, repair=False)
    ]
    assert replica.verified() == [ApplyChange(change(2), ()), Save(), *[DeliverReply(reply(2))]]


def test_no_state_is_saved_between_a_repair_and_the_changes_that_follow_it() -> None:
    replica = told(resyncing(), Entries(5, b"m5", [LISTED], last=False), change(6, DeleteFile("a")), change(7))
    replica.receive(Entries(5, b"m5", [], last=True))
    effects = replica.compared({"a": (1, b""), "b": (1, b""), LISTED.path: (1, LISTED.digest)})
    six = ApplyChange(change(6, DeleteFile("a")), (DeleteFile("a"),))
    assert effects == [Remove(("a", "b")), six, ApplyChange(change(7), ()), Save()]


def test_a_comparison_requested_twice_runs_once_with_repair() -> None:
    replica = following()
    replica.compare(repair=False)
    assert replica.compare(repair=True) == []
    assert replica.receive(Entries(1, b"m1", [], last=True)) == [Compare(1, {}, repair=True)]


LISTED = Entry("tasks/listed.json", 1, b"d" * 32)


def resyncing() -> Replica:
    replica = Replica()
    replica.hello(client_version="0", lattice_version="0")
    replica.receive(welcome(head=5, resync=True))
    return replica


def greeting(*, position: Position = NOWHERE, follow: bool = True) -> Replica:
    replica = Replica(position, follow=follow)
    replica.hello(client_version="0", lattice_version="0")
    return replica


def write_only() -> Replica:
    replica = greeting(follow=False)
    replica.receive(welcome())
    return replica


def told(replica: Replica, *frames: ServerFrame) -> Replica:
    for frame in frames:
        replica.receive(frame)
    return replica


@pytest.mark.parametrize(
    ("replica", "frame"),
    [
        pytest.param(Replica(), welcome(), id="nobody said hello"),
        pytest.param(greeting(), change(1), id="a change before the greeting"),
        pytest.param(following(), welcome(), id="a second greeting"),
        pytest.param(greeting(), welcome(version=2, resync=True), id="another version"),
        pytest.param(greeting(position=Position("f", 1, b"")), welcome(), id="another epoch goes on"),
        pytest.param(greeting(), welcome(), id="a copy that is nowhere goes on"),
        pytest.param(greeting(position=Position("e", 3, b"")), welcome(head=2), id="goes on behind the copy"),
        pytest.param(following(1), change(3), id="a gap"),
        pytest.param(write_only(), change(1), id="a change to a connection that only writes"),
        pytest.param(following(), Entries(1, b"", [], last=True), id="a manifest nobody asked for"),
        pytest.param(told(resyncing(), change(6)), change(8), id="a gap before the manifest"),
        pytest.param(told(resyncing(), change(7)), Entries(5, b"", [], last=True), id="a gap after the manifest"),
        pytest.param(
            told(resyncing(), Entries(5, b"", [LISTED], last=False)), change(7), id="a gap within the manifest"
        ),
        pytest.param(
            told(resyncing(), Entries(5, b"", [LISTED], last=False)), Entries(6, b"", [], last=True), id="two manifests"
        ),
        pytest.param(
            told(resyncing(), Entries(5, b"", [], last=True)), Entries(5, b"", [], last=True), id="too many pieces"
        ),
        pytest.param(resyncing(), Entries(5, b"", [], last=False), id="a piece that lists nothing"),
        pytest.param(resyncing(), Entries(5, b"", [LISTED, LISTED], last=True), id="a file listed twice"),
        pytest.param(
            told(resyncing(), Entries(5, b"", [LISTED], last=False)),
            Entries(5, b"", [LISTED], last=True),
            id="a file listed again",
        ),
        pytest.param(following(missing=("a",)), Part("a", 1, 1, b"", 1, b"x"), id="a part beyond its file"),
        pytest.param(following(missing=("a",)), Part("a", 1, 2, b"", 1, b""), id="a part that brings nothing"),
        pytest.param(following(), Bye("REMOTE_SHUTDOWN", "later", 1.0), id="the end"),
        pytest.param(greeting(), Bye("REMOTE_VERSION", "upgrade the server"), id="the end at once"),
    ],
)
def test_violation_ends_the_connection_and_leaves_the_replica_unchanged(replica: Replica, frame: ServerFrame) -> None:
    before = (replica.position, dict(replica.missing), replica.state, replica.head)
    with pytest.raises(ProtocolError) as caught:
        replica.receive(frame)
    assert (replica.position, dict(replica.missing), replica.state, replica.head) == before
    if isinstance(frame, Bye):
        assert (caught.value.code, caught.value.message) == (frame.code, frame.reason)


def test_manifest_at_another_number_than_the_replicas_is_a_violation() -> None:
    replica = following(1)
    replica.compare(repair=False)
    with pytest.raises(ProtocolError):
        replica.receive(Entries(2, b"", [], last=True))


# --- bounds against a misbehaving server ---


def test_changes_that_wait_for_a_manifest_are_bounded_in_bytes() -> None:
    replica = resyncing()
    data = bytes(1 << 20)
    with pytest.raises(ProtocolError, match="too many changes"):
        for seq in range(6, 6 + (MAX_BUFFERED_BYTES >> 20) + 1):
            replica.receive(Change(seq, b"", "", "x", "t", "edit", "", [PutFile("tasks/x.json", data)]))
    assert seq - 6 >= (MAX_BUFFERED_BYTES >> 20) - 2


def test_a_manifest_that_never_ends_is_bounded() -> None:
    replica, sent = resyncing(), 0
    with pytest.raises(ProtocolError, match="more than"):
        while sent <= MAX_ENTRIES + 1000:
            replica.receive(
                Entries(5, b"", [Entry(f"tasks/{sent + n}", 0, b"d" * 32) for n in range(1000)], last=False)
            )
            sent += 1000
    assert sent == MAX_ENTRIES


def test_an_unrequested_part_does_not_prove_the_head() -> None:
    replica = following(1)
    assert replica.receive(Part("tasks/x", 1 << 60, 1, b"d" * 32, 0, b"x")) == []
    assert replica.is_current


def test_a_reply_that_waits_only_for_an_edit_is_delivered_once_the_edit_is_settled() -> None:
    replica = following()
    replica.receive(change(2, announce(PLAN, b"large")))
    replica.drifted([PLAN])
    assert replica.receive(reply(2)) == []
    replica.block(PLAN)
    assert answers(replica.unblock([])) == [2]
