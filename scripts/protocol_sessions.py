"""Sessions of protocol/vectors/sessions.json, recorded from a replica over a tree in memory."""

import base64
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lattice_remote.errors import ProtocolError
from lattice_remote.protocol import messages as m
from lattice_remote.protocol import operations as o
from lattice_remote.protocol.messages import NOWHERE, Position, decode_server_frame
from lattice_remote.protocol.paths import is_editable
from lattice_remote.protocol.replica import (
    LARGE_BYTES,
    ApplyChange,
    Compare,
    DeliverReply,
    Effect,
    Remove,
    Replica,
    Save,
    Send,
    WritePart,
)

Files = dict[str, bytes]
Step = dict[str, Any]
SENT_AGAIN = "above 0"
"""Stands for any positive ``age_s`` in a session."""


class MemoryCache:
    """A replica with its files, edits and requests in memory: the smallest shell that a session needs."""

    def __init__(self, tree: Files, position: Position, missing: Iterable[str], *, defers: bool) -> None:
        self.files = dict(tree)
        self.bases = {path: text for path, text in tree.items() if is_editable(path)}
        self.answers: list[str] = []
        self.stored: tuple[Position, tuple[str, ...]] = position, tuple(missing)
        self._defers = defers
        self._open: dict[str, m.Run | m.Put] = {}
        self._sent: set[str] = set()
        self.restart()

    def restart(self) -> None:
        self.replica = Replica(*self.stored, deferred={} if self._defers else None)
        self._parts: Files = {}
        self._open.clear()

    def connect(self) -> list[m.ClientFrame]:
        return [self.replica.hello(client_version="", lattice_version="")]

    def lose(self) -> None:
        self.replica.disconnected()

    def receive(self, frame: m.ServerFrame) -> list[m.ClientFrame]:
        sent = self._perform(self.replica.receive(frame))
        if isinstance(frame, m.Welcome):
            sent += [msgspec.structs.replace(r, age_s=1.0 if r.id in self._sent else 0.0) for r in self._open.values()]
            self._sent.update(self._open)
        return sent

    def request(self, frame: m.Run | m.Put) -> list[m.ClientFrame]:
        self._open[frame.id] = frame
        if self.replica.welcome is None:
            return []
        self._sent.add(frame.id)
        return [frame]

    def save_edit(self, path: str, text: bytes, id_: str) -> list[m.ClientFrame]:
        self.files[path] = text
        return self.request(m.Put(id_, path, self.bases.get(path), text))

    def _is_edit(self, path: str) -> bool:
        return is_editable(path) and path in self.files and self.files[path] != self.bases.get(path)

    def _perform(self, effects: Iterable[Effect]) -> list[m.ClientFrame]:
        queue, sent = list(effects), []
        while queue:
            match queue.pop(0):
                case Send(frame):
                    sent.append(frame)
                case ApplyChange(_, operations):
                    for operation in operations:
                        queue += self._apply(operation)
                case WritePart(part):
                    queue += self._write(part)
                case Remove(paths):
                    for path in paths:
                        self._store(path, None)
                case Compare():
                    queue += self._compare()
                case DeliverReply(frame):
                    queue += self._settle(frame)
                case Save():
                    self.stored = self.replica.position, tuple(self.replica.missing)
        return sent

    def _apply(self, operation: o.Operation) -> list[Effect]:
        path = operation.path
        if self._is_edit(path):
            if isinstance(operation, o.PutFile) and operation.data == self.files[path]:
                self.bases[path] = operation.data
                return []
            self.replica.block(path)
            return self.replica.drifted([operation.to]) if isinstance(operation, o.MoveFile) else []
        drifted = o.apply(operation, o.MemoryTree(self.files))
        for each in o.paths_of(operation):
            self._store(each, self.files.get(each))
        return self.replica.drifted(sorted(drifted)) if drifted else []

    def _store(self, path: str, data: bytes | None) -> None:
        for files in (self.files, self.bases) if is_editable(path) else (self.files,):
            if data is None:
                files.pop(path, None)
            else:
                files[path] = data

    def _write(self, part: m.Part) -> list[Effect]:
        data = (self._parts.pop(part.path) if part.offset else b"") + part.data
        if len(data) < part.size:
            self._parts[part.path] = data
        elif o.digest_of(data) == part.digest:
            self._store(part.path, data)
        else:
            return self.replica.drifted([part.path])
        return []

    def _compare(self) -> list[Effect]:
        edited = [path for path in self.files if self._is_edit(path)]
        texts = self.files | {path: self.bases.get(path, b"") for path in edited}
        local = {path: (len(text), o.digest_of(text)) for path, text in texts.items()}
        return self.replica.compared(local, edited=edited)

    def _settle(self, answer: m.Response) -> list[Effect]:
        self.answers.append(answer.id)
        request = self._open.pop(answer.id, None)
        if not isinstance(request, m.Put) or not isinstance(answer, m.Stored):
            return []
        path = request.path
        if answer.outcome == "conflict":
            self.replica.block(path)
            self.bases[path] = self.files[path]
        else:
            self.bases[path] = request.text
        return self.replica.unblock([path])


def _text(files: Mapping[str, bytes]) -> dict[str, str]:
    return {path: base64.b64encode(data).decode() for path, data in sorted(files.items())}


def _sent(frames: Iterable[m.ClientFrame]) -> list[dict[str, Any]]:
    """Return the frames with the fields that every client has in common; all paths to fetch are in one Fetch."""
    sent, paths = [], set()
    for frame in frames:
        fields = msgspec.to_builtins(frame)
        match frame:
            case m.Fetch():
                paths.update(frame.paths)
                continue
            case m.Hello():
                names = ("type", "epoch", "seq", "mark")
            case m.Run():
                names = ("type", "id", "argv", "age_s")
            case m.Put():
                names = ("type", "id", "path", "base", "text", "age_s")
            case _:
                names = ("type",)
        sent.append({name: SENT_AGAIN if name == "age_s" and fields[name] else fields[name] for name in names})
    return [*sent, {"type": "fetch", "paths": sorted(paths)}] if paths else sent


# --- frames ---

EPOCH, NEXT_EPOCH = "e1", "e2"
ID, ANOTHER_ID = "00112233445566778899aabbccddeeff", "ffeeddccbbaa99887766554433221100"
TASK = "task_01ARZ3NDEKTSV4RRFFQ69G5FAV"
EVENTS, PLAN, SNAPSHOT = f"events/{TASK}.jsonl", f"plans/{TASK}.md", f"tasks/{TASK}.json"
PAYLOAD = "artifacts/payload/art_1.bin"
LINE, CONFIG = b'{"type":"comment_added"}\n', b"{}\n"
LARGE = bytes(LARGE_BYTES + 1)
"""Its size is in frames only: a client may defer such a content."""


def mark_of(seq: int, epoch: str = EPOCH) -> bytes:
    return o.digest_of(f"{epoch}-{seq}".encode())[:4] if seq else b""


def at(seq: int, epoch: str = EPOCH) -> Position:
    return Position(epoch, seq, mark_of(seq, epoch))


def welcome(head: int, *, resync: bool = False, epoch: str = EPOCH) -> m.Welcome:
    limits = m.Limits(1 << 25, 1 << 24)
    return m.Welcome(1, "", "", "web", "human:ana", epoch, head, 1, resync, limits)


def change(seq: int, *operations: o.Operation, cause: str = "edit", epoch: str = EPOCH) -> m.Change:
    time, mark = "2026-01-02T03:04:05.678Z", mark_of(seq, epoch)
    return m.Change(seq, mark, time, "human:ana", "", cause, "", list(operations))


def entries(seq: int, tree: Files, *, last: bool = True, epoch: str = EPOCH) -> m.Entries:
    listed = [m.Entry(path, len(data), o.digest_of(data)) for path, data in tree.items()]
    return m.Entries(seq, mark_of(seq, epoch), listed, last)


def part(path: str, data: bytes, seq: int, piece: slice = slice(None)) -> m.Part:
    return m.Part(path, seq, len(data), o.digest_of(data), piece.start or 0, data[piece])


def append(path: str, before: bytes, data: bytes) -> o.AppendBytes:
    return o.AppendBytes(path, len(before), o.digest_of(before[-o.TAIL_BYTES :]), data)


def announce(path: str, data: bytes) -> o.AnnounceFile:
    return o.AnnounceFile(path, len(data), o.digest_of(data))


def move(path: str, to: str, data: bytes) -> o.MoveFile:
    return o.MoveFile(path, to, o.digest_of(data))


def reply(seq: int, id_: str = ID) -> m.Reply:
    return m.Reply(id_, seq, 0, b"", b"")


# --- recording ---


@dataclass
class Session:
    """One session. Each method is a step: the client's reaction and state after it are recorded."""

    name: str
    section: str
    before: Files = field(default_factory=dict)
    position: Position = NOWHERE
    missing: tuple[str, ...] = ()
    defers: bool | None = None
    """Only for a client that defers large contents, or only for one that does not; None: for every client."""
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = MemoryCache(self.before, self.position, self.missing, defers=bool(self.defers))
        self._start = self._last = self._state()

    def connect(self, *frames: m.ServerFrame) -> "Session":
        self._record({"do": "connect"}, self.cache.connect)
        return self.frames(*frames)

    def lose(self) -> "Session":
        return self._record({"do": "lose"}, lambda: self.cache.lose() or [])

    def restart(self) -> "Session":
        return self._record({"do": "restart"}, lambda: self.cache.restart() or [])

    def run(self, *argv: str, id_: str = ID) -> "Session":
        request = m.Run(id_, list(argv))
        return self._record({"do": "run", "id": id_, "argv": list(argv)}, lambda: self.cache.request(request))

    def edit(self, text: bytes, id_: str = ID) -> "Session":
        step = {"do": "edit", "path": PLAN, "text": base64.b64encode(text).decode(), "id": id_}
        return self._record(step, lambda: self.cache.save_edit(PLAN, text, id_))

    def frames(self, *frames: m.ServerFrame) -> "Session":
        for frame in frames:
            data = msgspec.msgpack.encode(frame)
            step = {"do": "receive", "frame": msgspec.to_builtins(frame), "msgpack": data.hex()}
            self._record(step, lambda data=data: self.cache.receive(decode_server_frame(data)))
        return self

    def violation(self, frame: m.ServerFrame) -> "Session":
        """Record a frame that ends the connection."""
        data = msgspec.msgpack.encode(frame)
        try:
            self.cache.receive(decode_server_frame(data))
        except ProtocolError:
            self.cache.lose()
        else:
            raise AssertionError(f"{self.name}: {frame} is no violation")
        step = {"do": "receive", "frame": msgspec.to_builtins(frame), "msgpack": data.hex(), "violation": True}
        return self._record(step, list)

    def equals(self, tree: Files) -> "Session":
        """Check that the recorded client has the server's tree, and nothing is missing."""
        assert self.cache.files == tree, f"{self.name}: {self.cache.files}"
        assert not self.cache.replica.missing, f"{self.name}: {self.cache.replica.missing}"
        return self

    def _record(self, step: Step, perform: Callable[[], list[m.ClientFrame]]) -> "Session":
        self.cache.answers = []
        sends = _sent(perform())
        after = self._state()
        changed = {name: value for name, value in after.items() if value != self._last[name]}
        self._last = after
        self.steps.append({**step, "sends": sends, "answers": list(self.cache.answers), **changed})
        return self

    def _state(self) -> dict[str, Any]:
        replica = self.cache.replica
        position = "" if replica.position == NOWHERE else str(replica.position)
        deferred = {"deferred": sorted(replica.deferred)} if self.defers else {}
        return {
            "tree": _text(self.cache.files),
            "missing": sorted(replica.missing),
            "position": position,
            **deferred,
        }

    def as_vector(self) -> dict[str, Any]:
        defers = {} if self.defers is None else {"defers": self.defers}
        return {"name": self.name, "section": self.section, **defers, "before": self._start, "steps": self.steps}


# --- the sessions ---


def sessions() -> list[dict[str, Any]]:
    """Return every session, with what the client sends and has after each step."""
    return [session.as_vector() for make in _MAKERS for session in make()]


def _filling() -> list[Session]:
    tree = {"config.json": CONFIG, EVENTS: LINE * 2, SNAPSHOT: b"", PLAN: b"# Plan\n"}
    first, rest = dict(list(tree.items())[:2]), dict(list(tree.items())[2:])
    log = tree[EVENTS]
    after = {**tree, EVENTS: log + LINE, "notes.md": b"note"}
    return [
        Session("fill: an empty project", "5.3").connect(welcome(0, resync=True), entries(0, {})).equals({}),
        Session("fill: the manifest and a file come in pieces", "5.2, 5.3")
        .connect(welcome(4, resync=True), entries(4, first, last=False), entries(4, rest))
        .frames(part("config.json", CONFIG, 4), part(EVENTS, log, 4, slice(0, 20)), part(SNAPSHOT, b"", 4))
        .frames(part(EVENTS, log, 4, slice(20, 30)), part(PLAN, b"# Plan\n", 4), part(EVENTS, log, 4, slice(30, None)))
        .equals(tree),
        Session(
            "fill: files that differ are fetched, others removed, equal ones kept",
            "5.3",
            {"config.json": CONFIG, SNAPSHOT: b"old", "tasks/other.json": b"{}"},
        )
        .connect(welcome(4, resync=True), entries(4, {"config.json": CONFIG, SNAPSHOT: b"new"}))
        .frames(part(SNAPSHOT, b"new", 4))
        .equals({"config.json": CONFIG, SNAPSHOT: b"new"}),
        Session("fill: changes before the manifest are in it, changes between its pieces come after it", "3.3, 5")
        .connect(welcome(2, resync=True), change(3, o.PutFile("notes.md", b"note")))
        .frames(entries(3, {"config.json": CONFIG, "notes.md": b"note"}, last=False))
        .frames(change(4, append(EVENTS, log, LINE)), change(5, o.DeleteFile("old.json")))
        .frames(entries(3, {"old.json": b"old", EVENTS: log, SNAPSHOT: b"", PLAN: b"# Plan\n"}))
        .frames(part("config.json", CONFIG, 5), part("notes.md", b"note", 5), part(EVENTS, log + LINE, 5))
        .frames(part(SNAPSHOT, b"", 5), part(PLAN, b"# Plan\n", 5))
        .equals(after),
        Session("fill: cut in the middle, it starts again", "5")
        .connect(welcome(4, resync=True), entries(4, first, last=False))
        .lose()
        .connect(welcome(4, resync=True), entries(4, tree), part("config.json", CONFIG, 4))
        .lose()
        .connect(welcome(4), part(EVENTS, log, 4), part(SNAPSHOT, b"", 4), part(PLAN, b"# Plan\n", 4))
        .equals(tree),
        Session("fill: a manifest that lists a file twice", "3.2")
        .connect(welcome(4, resync=True), entries(4, first, last=False))
        .violation(entries(4, first)),
        Session("fill: pieces of two manifests", "3.2")
        .connect(welcome(4, resync=True), entries(4, first, last=False))
        .violation(entries(5, rest)),
    ]


def _changes() -> list[Session]:
    tree = {"config.json": CONFIG, EVENTS: LINE, PLAN: b"# Plan\n", "ids.json": b'{\n  "next": 1\n}\n'}
    ids = b'{\n  "next": 2\n}\n'
    merge = o.MergeJson("ids.json", b'{"next":2}', o.digest_of(ids))
    archived = f"archive/{PLAN}"
    every = change(
        8,
        append(EVENTS, LINE, LINE),
        o.PutFile(SNAPSHOT, b"{}"),
        merge,
        move(PLAN, archived, b"# Plan\n"),
        o.DeleteFile("config.json"),
        announce("context.md", b"context"),
    )
    after = {EVENTS: LINE * 2, SNAPSHOT: b"{}", "ids.json": ids, archived: b"# Plan\n", "context.md": b"context"}
    damaged = {**tree, EVENTS: b"damaged", "ids.json": b"{}\n", PLAN: b"damaged"}
    new = {"position": at(7), "before": tree}
    return [
        Session("changes: every operation, and a repeated change", "4, 5", **new)
        .connect(welcome(7), every)
        .frames(part("context.md", b"context", 8), every)
        .equals(after),
        Session("changes: a gap", "5", **new).connect(welcome(9)).violation(change(9, o.DeleteFile("config.json"))),
        Session("changes: the stored position is behind the files", "4, 5", position=at(7), before=after)
        .connect(welcome(8), every)
        .equals(after),
        Session(
            "changes: files that another program damaged have drifted",
            "4, 5",
            position=at(7),
            before={**damaged, f"archive/{PLAN}": b"damaged"},
        )
        .connect(welcome(7), change(8, append(EVENTS, LINE, LINE), merge, move(f"archive/{PLAN}", "x.md", b"# Plan\n")))
        .frames(part("ids.json", ids, 8), part(EVENTS, LINE * 2, 8), part("x.md", b"# Plan\n", 8))
        .equals({"config.json": CONFIG, EVENTS: LINE * 2, "ids.json": ids, PLAN: b"damaged", "x.md": b"# Plan\n"}),
        Session("changes: continue after a cut", "6", **new)
        .connect(welcome(7))
        .lose()
        .connect(welcome(8), every, part("context.md", b"context", 8))
        .equals(after),
        Session("changes: what is missing survives a restart", "5", **new)
        .connect(welcome(7), every)
        .restart()
        .connect(welcome(8), part("context.md", b"context", 8))
        .equals(after),
        Session("greeting: another epoch is continued", "5", **new).connect().violation(welcome(7, epoch=NEXT_EPOCH)),
        Session("greeting: the head is behind the position", "5", **new).connect().violation(welcome(6)),
        Session("greeting: a change before the Welcome", "3.3", **new).connect().violation(every),
        Session("greeting: a second Welcome", "3.3", **new).connect(welcome(7)).violation(welcome(7)),
        Session("greeting: a manifest that was not requested", "5", **new)
        .connect(welcome(7))
        .violation(entries(7, tree)),
    ]


def _transfers() -> list[Session]:
    log, longer, longest = LINE, LINE * 2, LINE * 3
    wanted = {"position": at(3), "missing": (EVENTS,), "before": {"config.json": CONFIG}}
    rest = {"config.json": CONFIG}
    again = Session("parts: the digest is another, the file is fetched again", "5.2", **wanted)
    wrong = msgspec.structs.replace(part(EVENTS, log, 3), data=b"x" * len(log))
    return [
        Session("parts: appends during the transfer are applied after it", "5.1", **wanted)
        .connect(welcome(3), part(EVENTS, log, 3, slice(0, 9)), change(4, append(EVENTS, log, LINE)))
        .frames(part(EVENTS, log, 3, slice(9, None)))
        .equals({**rest, EVENTS: longer}),
        Session("parts: an append before the first piece", "5.1", **wanted)
        .connect(welcome(3), change(4, append(EVENTS, log, LINE)), part(EVENTS, longer, 4))
        .equals({**rest, EVENTS: longer}),
        Session("parts: a restarted file, without the pieces and operations before", "5.2", **wanted)
        .connect(welcome(3), part(EVENTS, log, 3, slice(0, 9)), change(4, append(EVENTS, log, LINE)))
        .frames(part(EVENTS, longer, 4, slice(0, 30)), change(5, append(EVENTS, longer, LINE)))
        .frames(part(EVENTS, longer, 4, slice(30, None)))
        .equals({**rest, EVENTS: longest}),
        again.connect(welcome(3), wrong, part(EVENTS, log, 3)).equals({**rest, EVENTS: log}),
        Session("parts: a put ends the wait, its later part is ignored", "5.1, 5.2", **wanted)
        .connect(welcome(3), change(4, o.PutFile(EVENTS, longest)), part(EVENTS, log, 3))
        .equals({**rest, EVENTS: longest}),
        Session("parts: a delete ends the wait", "5.1", **wanted)
        .connect(welcome(3), change(4, o.DeleteFile(EVENTS)), part(EVENTS, log, 3))
        .equals(rest),
        Session("parts: the file is gone", "5.2", **{**wanted, "before": {**rest, EVENTS: b"old"}})
        .connect(welcome(3), m.Part(EVENTS, 3, gone=True))
        .equals(rest),
        Session("parts: announced again before the first piece", "5.1, 5.2", position=at(3), before=rest)
        .connect(welcome(3), change(4, announce(EVENTS, log)), change(5, announce(EVENTS, longer)))
        .frames(part(EVENTS, longer, 5))
        .equals({**rest, EVENTS: longer}),
        Session("parts: announced again between the pieces, the rest is ignored", "5.1, 5.2", **wanted)
        .connect(welcome(3), part(EVENTS, log, 3, slice(0, 9)), change(4, announce(EVENTS, longer)))
        .frames(part(EVENTS, log, 3, slice(9, None)), part(EVENTS, longer, 4))
        .equals({**rest, EVENTS: longer}),
        Session("parts: of an earlier number", "5.2", **wanted)
        .connect(welcome(3), change(4, o.DeleteFile("x.json")), part(EVENTS, log, 3), part(EVENTS, longer, 4))
        .equals({**rest, EVENTS: longer}),
        Session("parts: of a number that no change has reached", "3.3, 5.2", **wanted)
        .connect(welcome(4))
        .violation(part(EVENTS, log, 4)),
        Session("parts: the target of a move is missing instead", "5.1", **wanted)
        .connect(welcome(3), change(4, move(EVENTS, f"archive/{EVENTS}", log)), part(EVENTS, log, 3))
        .frames(part(f"archive/{EVENTS}", log, 4))
        .equals({**rest, f"archive/{EVENTS}": log}),
        Session(
            "parts: a move replaces a missing file",
            "5.1",
            position=at(3),
            missing=(EVENTS,),
            before={**rest, "events/x.jsonl": log},
        )
        .connect(welcome(3), change(4, move("events/x.jsonl", EVENTS, log)), part(EVENTS, longest, 3))
        .equals({**rest, EVENTS: log}),
        Session("parts: of a file that was not requested", "5.2", position=at(3), before=rest)
        .connect(welcome(3), part("config.json", b"other", 3))
        .equals(rest),
        Session("parts: beyond the file's size", "3.2", **wanted)
        .connect(welcome(3))
        .violation(msgspec.structs.replace(part(EVENTS, log, 3), data=log + b"x")),
        Session("parts: an empty piece", "3.2", **wanted)
        .connect(welcome(3))
        .violation(msgspec.structs.replace(part(EVENTS, log, 3), data=b"")),
    ]


def _requests() -> list[Session]:
    tree = {"config.json": CONFIG}
    new = {"position": at(3), "before": tree}
    done = change(4, o.PutFile(SNAPSHOT, b"{}"), cause=ID)
    after = {**tree, SNAPSHOT: b"{}"}
    return [
        Session("run: the change comes before the reply", "S11", **new)
        .connect(welcome(3))
        .run("create", "T")
        .frames(done, reply(4))
        .equals(after),
        Session("run: the reply waits for missing content", "5", **new)
        .connect(welcome(3))
        .run("attach", "LAT-1", "x")
        .frames(change(4, announce(PAYLOAD, LINE), cause=ID), reply(4), part(PAYLOAD, LINE, 4))
        .equals({**tree, PAYLOAD: LINE}),
        Session("run: content that is missing since a later change holds no reply up", "5", **new)
        .connect(welcome(3))
        .run("create", "T")
        .frames(done, change(5, announce(PAYLOAD, LINE)), reply(4), part(PAYLOAD, LINE, 5))
        .equals({**after, PAYLOAD: LINE}),
        Session("run: refused", "3.2", **new)
        .connect(welcome(3))
        .run("create", "T")
        .frames(m.Refused(ID, "REMOTE_FORBIDDEN", "no"))
        .equals(tree),
        Session("run: requested without a connection, it is sent on the next one", "3.1", **new)
        .run("create", "T")
        .connect(welcome(3), done, reply(4))
        .equals(after),
        Session("run: cut, sent again with its id", "3.4", **new)
        .connect(welcome(3))
        .run("create", "T")
        .lose()
        .connect(welcome(3), done, reply(4))
        .equals(after),
        Session("run: the reply is lost, the change is not", "3.4", **new)
        .connect(welcome(3))
        .run("create", "T")
        .frames(done)
        .lose()
        .connect(welcome(4), reply(4))
        .equals(after),
        Session("run: two requests, answered in another order", "3.3", **new)
        .connect(welcome(3))
        .run("create", "T")
        .run("list", id_=ANOTHER_ID)
        .frames(reply(3, ANOTHER_ID), done, reply(4))
        .equals(after),
        Session("resync: in a new epoch the request is sent again", "3.4, 6, S6", **new)
        .connect(welcome(3))
        .run("create", "T")
        .lose()
        .connect(welcome(2, resync=True, epoch=NEXT_EPOCH), entries(2, after, epoch=NEXT_EPOCH))
        .frames(part(SNAPSHOT, b"{}", 2), reply(0))
        .equals(after),
        Session("resync: the changes in between are no longer kept", "6", **new)
        .connect(welcome(9, resync=True), entries(9, {"ids.json": b"{}\n"}), part("ids.json", b"{}\n", 9))
        .frames(change(10, o.PutFile("ids.json", b"[]\n")))
        .equals({"ids.json": b"[]\n"}),
        Session("resync: cut before the manifest, the next connection compares too", "5, 6", **new)
        .connect(welcome(9, resync=True))
        .restart()
        .connect(welcome(9, resync=True), entries(9, tree))
        .equals(tree),
    ]


def _edits() -> list[Session]:
    text, mine, theirs = b"# Plan\n", b"# Plan\nmine\n", b"# Plan\ntheirs\n"
    both = b"# Plan\nmine\ntheirs\n"
    new = {"position": at(3), "before": {PLAN: text}}
    put = change(4, o.PutFile(PLAN, mine), cause=ID)
    return [
        Session("edit: stored", "5.5", **new)
        .connect(welcome(3))
        .edit(mine)
        .frames(put, m.Stored(ID, 4, "stored"))
        .equals({PLAN: mine}),
        Session("edit: merged with a change that came before", "5.5", **new)
        .connect(welcome(3))
        .edit(mine)
        .frames(change(4, o.PutFile(PLAN, theirs)), change(5, o.PutFile(PLAN, both), cause=ID))
        .frames(m.Stored(ID, 5, "merged"), part(PLAN, both, 5))
        .equals({PLAN: both}),
        Session("edit: a conflict, the server's text is fetched", "5.5", **new)
        .connect(welcome(3))
        .edit(mine)
        .frames(change(4, o.PutFile(PLAN, theirs)), m.Stored(ID, 4, "conflict"), part(PLAN, theirs, 4))
        .equals({PLAN: theirs}),
        Session("edit: the server had this text", "5.5", **new)
        .connect(welcome(3))
        .edit(mine)
        .frames(m.Stored(ID, 3, "unchanged"))
        .equals({PLAN: mine}),
        Session("edit: a refused Put keeps the text, and delays no command", "5.5", **new)
        .connect(welcome(3))
        .edit(mine)
        .frames(m.Refused(ID, "REMOTE_TOO_LARGE", "too long"), change(4, o.PutFile(PLAN, theirs)))
        .run("list", id_=ANOTHER_ID)
        .frames(reply(4, ANOTHER_ID)),
        Session("edit: cut, sent again with its id", "3.4, 5.5", **new)
        .connect(welcome(3))
        .edit(mine)
        .lose()
        .connect(welcome(3), put, m.Stored(ID, 4, "stored"))
        .equals({PLAN: mine}),
        Session("edit: the server deletes the plan", "5.5", **new)
        .connect(welcome(3))
        .edit(mine)
        .frames(change(4, o.DeleteFile(PLAN)), m.Stored(ID, 4, "conflict"), m.Part(PLAN, 4, gone=True))
        .equals({}),
        Session("edit: the server archives the plan", "5.5", **new)
        .connect(welcome(3))
        .edit(mine)
        .frames(change(4, move(PLAN, f"archive/{PLAN}", text)), part(f"archive/{PLAN}", text, 4))
        .frames(m.Stored(ID, 4, "conflict"), m.Part(PLAN, 4, gone=True))
        .equals({f"archive/{PLAN}": text}),
        Session("edit: a comparison leaves it alone", "5.5", **new)
        .connect(welcome(3))
        .edit(mine)
        .lose()
        .connect(welcome(9, resync=True), entries(9, {PLAN: theirs}))
        .frames(change(10, o.PutFile(PLAN, both), cause=ID), m.Stored(ID, 10, "merged"), part(PLAN, both, 10))
        .equals({PLAN: both}),
        Session("edit: in a comparison its base counts", "5.3, 5.5", **new)
        .connect(welcome(3))
        .edit(mine)
        .lose()
        .connect(welcome(9, resync=True), entries(9, {PLAN: text}))
        .frames(change(10, o.PutFile(PLAN, mine), cause=ID), m.Stored(ID, 10, "stored"))
        .equals({PLAN: mine}),
        Session("edit: a comparison with a server that lacks the plan", "5.3, 5.5", **new)
        .connect(welcome(3))
        .edit(mine)
        .lose()
        .connect(welcome(9, resync=True), entries(9, {}), m.Stored(ID, 9, "conflict"), m.Part(PLAN, 9, gone=True))
        .equals({}),
    ]


def _deferred() -> list[Session]:
    tree = {"config.json": CONFIG}
    new = {"position": at(3), "before": tree, "defers": True}
    listed = {**tree, PAYLOAD: LARGE}
    to = "artifacts/payload/art_2.bin"
    return [
        Session("deferred: an announced content is not fetched, and holds no reply up", "5.4", **new)
        .connect(welcome(3))
        .run("attach", "LAT-1", "x")
        .frames(change(4, announce(PAYLOAD, LARGE), cause=ID), reply(4), change(5, o.PutFile(PAYLOAD, b"small")))
        .equals({**tree, PAYLOAD: b"small"}),
        Session("deferred: listed in a manifest, moved, deleted", "5.4", defers=True)
        .connect(welcome(3, resync=True), entries(3, listed), part("config.json", CONFIG, 3))
        .frames(change(4, move(PAYLOAD, to, LARGE)), change(5, o.DeleteFile(to)))
        .equals(tree),
        Session("deferred: appended to, it is fetched", "5.4", **new)
        .connect(welcome(3), change(4, announce(PAYLOAD, LARGE)), change(5, append(PAYLOAD, LARGE, LINE)))
        .frames(part(PAYLOAD, b"small", 5))
        .equals({**tree, PAYLOAD: b"small"}),
        Session("large: a client that defers nothing fetches it", "5.2", position=at(3), before=tree, defers=False)
        .connect(welcome(3), change(4, announce(PAYLOAD, LARGE)), change(5, announce(PAYLOAD, LINE)))
        .frames(part(PAYLOAD, LINE, 5))
        .equals({**tree, PAYLOAD: LINE}),
    ]


_MAKERS = (_filling, _changes, _transfers, _requests, _edits, _deferred)
