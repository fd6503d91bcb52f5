"""Checks of a server, by section of SPEC.md. They write tasks, plans and an artifact to the project."""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from importlib import resources
from typing import Any

import msgspec

from lattice_remote.conformance import CheckFailed, CheckList, NotOffered, all_of, expect, within
from lattice_remote.conformance.probe import Probe, Refusal, ServerTarget, new_id
from lattice_remote.errors import ProtocolError
from lattice_remote.output import counted
from lattice_remote.protocol.messages import (
    PROTOCOL_VERSION,
    Applied,
    Attachment,
    Call,
    Change,
    Download,
    Downloaded,
    Entries,
    Entry,
    Fetch,
    Hello,
    Log,
    LogPage,
    Manifest,
    Part,
    Push,
    Put,
    ReadVersion,
    Refused,
    Replay,
    Replayed,
    Reply,
    Returned,
    Run,
    Stored,
    Upload,
    Uploaded,
    Version,
    Welcome,
)
from lattice_remote.protocol.operations import MemoryTree, MoveFile, apply, digest_of
from lattice_remote.protocol.replica import (
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

__all__ = ["CHECKS", "prepare"]

CHECKS: CheckList[ServerTarget] = CheckList()
check = CHECKS


def greeted(section: str, name: str) -> Callable[[Callable[[ServerTarget, Probe], Awaitable[None]]], None]:
    """Add a check that gets a connection on which both sides have greeted."""

    def add(run_check: Callable[[ServerTarget, Probe], Awaitable[None]]) -> None:
        @check(section, name)
        async def _(target: ServerTarget) -> None:
            async with target.greeted() as probe:
                await run_check(target, probe)

    return add


def of_kind[A](answer: object, kind: type[A]) -> A:
    expect(isinstance(answer, kind), f"answered with {answer}")
    assert isinstance(answer, kind)
    return answer


OLD_S = 10 * 365 * 86400.0
"""A request of this age is older than any journal."""
PIECE = os.urandom(4096)


async def prepare(target: ServerTarget, *, may_be_in_use: bool) -> None:
    """Make the task that the checks write to. Raises CheckFailed: no such server, or its project is in use."""
    async with target.greeted() as probe:
        target.welcome = probe.welcome
        target.capabilities, target.actor = probe.welcome.capabilities, probe.welcome.actor
        tasks = [path for path in await manifest(probe) if path.startswith(("tasks/", "archive/tasks/"))]
        if tasks and not may_be_in_use:
            raise CheckFailed(
                f"project {target.project} has {counted(len(tasks), 'task')}, and the checks write to it: name an "
                "empty project, or repeat with --throw-away if this one is not needed"
            )
        request = run(target, "create", "Conformance checks")
        await probe.send(request)
        made = await probe.until(Change, lambda change: change.cause == request.id)
        target.task = next(op.path[6:-5] for op in made.ops if op.path.startswith("tasks/"))


def run(target: ServerTarget, *argv: str, **fields: Any) -> Run:
    return Run(new_id(), [*argv, "--actor", target.actor], **fields)


def comment(target: ServerTarget, **fields: Any) -> Run:
    return run(target, "comment", target.task, "written by a conformance check", **fields)


async def manifest(probe: Probe) -> dict[str, Entry]:
    await probe.send(Manifest())
    first = frame = await probe.until(Entries)
    found = {entry.path: entry for entry in frame.entries}
    count = len(frame.entries)
    while not frame.last:
        expect(frame.entries, "a piece of the manifest is empty and not the last")
        frame = await probe.until(Entries)
        expect((frame.seq, frame.mark) == (first.seq, first.mark), "the pieces of a manifest differ in seq or mark")
        found |= {entry.path: entry for entry in frame.entries}
        count += len(frame.entries)
    expect(len(found) == count, "the manifest lists a file twice")
    return found


async def fetch(probe: Probe, path: str) -> tuple[Part, bytes]:
    await probe.send(Fetch([path]))
    first = part = await probe.until(Part, lambda part: part.path == path)
    data = part.data
    expect(part.offset == 0 and (part.seq >= probe.welcome.head), f"the first part has offset {part.offset}")
    while not part.gone and len(data) < first.size:
        part = await probe.until(Part, lambda part: part.path == path)
        data = data if part.offset else b""
        expect(part.offset == len(data) and part.data, f"a part at {part.offset} after {len(data)} bytes")
        data += part.data
    expect(part.gone or digest_of(data) == part.digest, f"the parts of {path} do not have its digest")
    return part, data


async def answered(probe: Probe, request: Run | Put | Call | Push) -> Reply | Stored | Returned:
    """Send a request; check that its changes come before the answer."""
    answer = await probe.ask(request)
    expect(not isinstance(answer, Refused), f"refused: {answer}")
    assert isinstance(answer, Reply | Stored | Returned)
    seen = max([probe.welcome.head, *(change.seq for change in probe.changes)])
    expect(answer.seq <= seen, f"the answer of {answer.seq} comes before that change; {seen} was the last")
    return answer


def caused(probe: Probe, request: Any) -> list[Change]:
    return [change for change in probe.changes if change.cause == request.id]


def is_refused(answer: object, *codes: str) -> None:
    found = answer.code if isinstance(answer, Refused) else type(answer).__name__
    expect(found in codes, f"answered with {found}, not Refused {' or '.join(codes)}")


# --- 2.1, 2.2: address and refusals ---


async def refusal_of(target: ServerTarget, **options: Any) -> Refusal:
    try:
        async with target.open(**options):
            raise CheckFailed("the connection is accepted")
    except Refusal as refusal:
        return refusal


def refuses(status: int, code: str, **options: Any) -> Callable[[ServerTarget], Awaitable[None]]:
    async def run_check(target: ServerTarget) -> None:
        refusal = await refusal_of(target, **options)
        expect((refusal.status, refusal.code) == (status, code), f"{refusal.status} {refusal.code}")

    return run_check


check("2.2", "an unknown token is refused: 401 REMOTE_UNAUTHORIZED")(
    refuses(401, "REMOTE_UNAUTHORIZED", token="ltr_of_nobody")  # noqa: S106 - no token
)
check("2.2", "a project that the token is not for is refused: 403 REMOTE_FORBIDDEN")(
    refuses(403, "REMOTE_FORBIDDEN", slug="no-such-project-of-conformance")
)
check("2.2", "a client without the subprotocol is refused: 426 REMOTE_VERSION")(
    refuses(426, "REMOTE_VERSION", subprotocols=None)
)


@check("2.1", "the subprotocol is lattice.v1; an offered compression is declined")
async def _(target: ServerTarget) -> None:
    async with target.open(compression="deflate") as probe:
        expect(probe.socket.subprotocol == "lattice.v1", f"subprotocol {probe.socket.subprotocol!r}")
        expect(not probe.socket.protocol.extensions, "an extension is agreed on")


@check("2.2", "a request without a token is refused, an unknown path too")
async def _(target: ServerTarget) -> None:
    for path, status, code in (
        (f"/projects/{target.project}", 401, "REMOTE_UNAUTHORIZED"),
        ("/no/such/path", 404, "REMOTE_NOT_FOUND"),
    ):
        found, _headers, body = await asyncio.to_thread(target.get, path, {})
        expect((found, Refusal(found, body).code) == (status, code), f"{path}: {found} {body[:100]!r}")


@check("2.2", "GET /projects/SLUG returns the token's rights; /healthz needs no token")
async def _(target: ServerTarget) -> None:
    headers = {"Authorization": f"Bearer {target.token}"}
    status, _headers, body = await asyncio.to_thread(target.get, f"/projects/{target.project}", headers)
    rights = json.loads(body) if status == 200 else {}
    names = {"project", "actor", "act_as", "epoch", "head", "server_version", "lattice_version"}
    expect(names <= rights.keys(), f"{status} without {', '.join(sorted(names - rights.keys()))}")
    expect(rights["actor"] == target.actor, f"actor {rights['actor']!r} is not the Welcome's {target.actor!r}")
    status, _headers, _body = await asyncio.to_thread(target.get, "/healthz", {})
    expect(status == 200, f"/healthz: {status}")


# --- 2.3 to 2.6: messages, limits, ends ---


@greeted("3.2", "Welcome fits section 3.2")
async def _(target: ServerTarget, probe: Probe) -> None:
    welcome = probe.welcome
    expect(welcome.version == PROTOCOL_VERSION, f"version {welcome.version} was not offered")
    expect(welcome.epoch, "the epoch is empty")
    expect(welcome.limits.max_frame_bytes >= 4 << 20, "max_frame_bytes is below 4 MiB")
    expect(welcome.project == target.project, f"project {welcome.project!r}")
    expect(welcome.oldest <= welcome.head + 1, f"oldest {welcome.oldest} is beyond the head {welcome.head}")
    expect(welcome.resync, "a client without a position gets no resync")


@check("2.3", "unknown fields are ignored, omitted fields have their defaults")
async def _(target: ServerTarget) -> None:
    hello = {"type": "hello", "versions": [1, 7], "client_version": "", "lattice_version": "", "later": {"a": [None]}}
    async with target.open() as probe:
        await probe.send(msgspec.msgpack.encode({**hello, "capabilities": ["announce", "of-a-later-version"]}))
        expect(isinstance(frame := await probe.receive(), Welcome), f"the server answers with {type(frame).__name__}")
        request = {"type": "run", "id": new_id(), "argv": comment(target).argv, "later": 1.5}
        await probe.send(msgspec.msgpack.encode(request))
        await probe.until(Reply, lambda reply: reply.id == request["id"])


def violation(section: str, name: str, *messages: bytes | str, greets: bool = True) -> None:
    """Add a check that messages end the connection with Bye REMOTE_PROTOCOL and close code 1002."""

    async def run_check(target: ServerTarget) -> None:
        async with target.open() as probe:
            if greets:
                await probe.greet()
            await probe.send(*messages)
            bye, code = await probe.farewell()
            found = f"{bye.code if bye else 'no Bye'}, close code {code}"
            expect(bye is not None and bye.code == "REMOTE_PROTOCOL" and code == 1002, found)

    check(section, f"violation, REMOTE_PROTOCOL and 1002: {name}")(run_check)


_REJECTED: dict[str, str] = json.loads(resources.files(__package__).joinpath("rejected.json").read_text())
_HELLO = msgspec.msgpack.encode({"type": "hello", "versions": [1], "client_version": "", "lattice_version": ""})
violation("2.3", "a text message", "text")
violation("2.3", "bytes after the map", msgspec.msgpack.encode({"type": "manifest"}) + b"\xc0")
violation("2.3", "no MessagePack", b"\xc1")


@check("2.3", "violation, REMOTE_PROTOCOL and 1002: each frame of vectors/rejected.json")
async def _(target: ServerTarget) -> None:
    turn = asyncio.Semaphore(8)

    async def refuses_frame(name: str, message: bytes) -> None:
        async with turn, target.open() as probe:
            if b"\xa5hello" not in message:
                await probe.greet()
            await probe.send(message)
            bye, code = await probe.farewell()
            found = f"{bye.code if bye else 'no Bye'}, close code {code}"
            expect(bye is not None and bye.code == "REMOTE_PROTOCOL" and code == 1002, f"{name}: {found}")

    await all_of(refuses_frame(name, bytes.fromhex(data)) for name, data in _REJECTED.items())


violation("3.1", "a first frame that is not Hello", msgspec.msgpack.encode({"type": "manifest"}), greets=False)
violation("3.1", "a second Hello", _HELLO)


@check("2.6", "Bye is the last frame, the project continues for others")
async def _(target: ServerTarget) -> None:
    async with target.greeted() as other, target.greeted() as probe:
        await probe.send(*[msgspec.msgpack.encode({"type": "shout"})] * 3)
        await probe.ends("REMOTE_PROTOCOL", 1002)
        await answered(other, comment(target))


@check("8", "no common version: REMOTE_VERSION and 1008; the reason names the side to upgrade")
async def _(target: ServerTarget) -> None:
    for versions, side in (([999], "server"), ([0], "client")):
        async with target.open() as probe:
            await probe.send(Hello(versions, "conformance/1", ""))
            bye = await probe.ends("REMOTE_VERSION", 1008)
            expect(side in bye.reason, f"the reason does not name the {side}: {bye.reason}")
            expect(bye.retry_after_s is None, "retry_after_s is not null")


@check("2.4", "a first message over 64 KiB closes with 1009")
async def _(target: ServerTarget) -> None:
    async with target.open() as probe:
        await probe.send(bytes(64 * 1024 + 1))
        _bye, code = await probe.farewell()
        expect(code == 1009, f"close code {code}")


@greeted("2.4", "a message over the limit in Welcome closes with 1009")
async def _(_target: ServerTarget, probe: Probe) -> None:
    await probe.send(bytes(probe.welcome.limits.max_frame_bytes + 1))
    _bye, code = await probe.farewell()
    expect(code == 1009, f"close code {code}")


@check("2.4", "a client that does not greet is closed after 10 s")
async def _(target: ServerTarget) -> None:
    async with target.open() as probe, within(15, "end of the connection"):
        await probe.socket.wait_closed()


@greeted("2.6", "pings are answered; the server sends a ping every 10 s")
async def _(_target: ServerTarget, probe: Probe) -> None:
    async with within(10, "pong"):
        await (await probe.socket.ping())
    await probe.pinged()


# --- 3: a cache ---


class MemoryCache:
    """A cache in memory, kept by the replica of section 5."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.files: dict[str, bytes] = {}
        self.replica = Replica()
        self.differing: list[str] | None = None
        """Paths on which the files differ from the manifest of ``verify()``; None: it has not come."""
        self._parts: dict[str, bytes] = {}

    async def greet(self) -> Welcome:
        await self.probe.send(self.replica.hello(client_version="conformance/1", lattice_version=""))
        frame = await self.probe.receive()
        expect(isinstance(frame, Welcome), f"the first frame is {type(frame).__name__}")
        assert isinstance(frame, Welcome)
        self.probe.welcome = frame
        await self._perform(self.replica.receive(frame))
        return frame

    async def pump(self) -> None:
        """Take one frame. Raises CheckFailed: it violates the protocol."""
        frame = await self.probe.receive()
        try:
            await self._perform(self.replica.receive(frame))
        except ProtocolError as error:
            raise CheckFailed(error.message) from None

    async def catch_up(self) -> None:
        while not self.replica.is_current:
            await self.pump()

    async def verify(self) -> None:
        """Compare all files with a manifest; other clients may write at the same time."""
        await self.catch_up()
        await self._perform(self.replica.compare(repair=False))
        while (differing := self.differing) is None:
            await self.pump()
        expect(not differing, f"files differ from the manifest: {', '.join(differing[:5])}")

    async def _perform(self, effects: Iterable[Effect]) -> None:
        queue = list(effects)
        while queue:
            match queue.pop(0):
                case Send(frame):
                    await self.probe.send(frame)
                case ApplyChange(_, operations):
                    drifted = [path for each in operations for path in apply(each, MemoryTree(self.files))]
                    queue += self.replica.drifted(drifted) if drifted else []
                case WritePart(part):
                    self._parts[part.path] = (self._parts.pop(part.path, b"") if part.offset else b"") + part.data
                    if len(self._parts[part.path]) == part.size:
                        self.files[part.path] = self._parts.pop(part.path)
                        expect(digest_of(self.files[part.path]) == part.digest, f"{part.path} has another digest")
                case Remove(paths):
                    for path in paths:
                        self.files.pop(path, None)
                case Compare(_, entries, repair):
                    local = {path: (len(data), digest_of(data)) for path, data in self.files.items()}
                    if not repair:
                        differing = {path for path in local.keys() | entries if local.get(path) != entries.get(path)}
                        self.differing = sorted(differing - self.replica.missing.keys())
                    queue += self.replica.compared(local) if repair else self.replica.verified()
                case DeliverReply() | Save():
                    pass


@greeted("3.2", "the manifest and the parts of each file agree")
async def _(_target: ServerTarget, probe: Probe) -> None:
    for path, entry in list((await manifest(probe)).items())[:50]:
        part, data = await fetch(probe, path)
        same = part.seq > probe.welcome.head or (len(data), digest_of(data)) == (entry.size, entry.digest)
        expect(same, f"{path} differs from its entry in the manifest")


@greeted("3.2", "a file that is missing is gone")
async def _(_target: ServerTarget, probe: Probe) -> None:
    part, _data = await fetch(probe, "tasks/of-no-project.json")
    expect(part.gone, "the part is not gone")


@check("S3", "a cache that applies every change equals the manifest, byte for byte")
async def _(target: ServerTarget) -> None:
    async with target.open() as probe, target.greeted(follow=False) as writer:
        cache = MemoryCache(probe)
        await cache.greet()
        await cache.catch_up()
        for argv in (
            ("comment", target.task, "größer"),
            ("create", "Archived by a check"),
            ("status", target.task, "in_planning"),
        ):
            await answered_without_changes(writer, run(target, *argv))
        await cache.verify()
        expect(cache.replica.position.seq > 0, "no change came")


async def answered_without_changes(probe: Probe, request: Run | Put) -> Reply | Stored:
    """Send a request on a connection that does not follow."""
    answer = await probe.ask(request)
    expect(isinstance(answer, Reply | Stored), f"refused: {answer}")
    assert isinstance(answer, Reply | Stored)
    expect(not probe.changes, "a change comes on a connection that does not follow")
    return answer


@check("S1", "changes are numbered without a gap, and the same on every connection")
async def _(target: ServerTarget) -> None:
    async with target.greeted() as one, target.greeted() as other:
        requests = [comment(target) for _ in range(10)]
        await one.send(*requests[:5])
        await other.send(*requests[5:])
        pending = {request.id for request in requests}
        for probe, ids in ((one, pending), (other, set(pending))):
            while ids:
                ids.discard((await probe.until(Change)).cause)
        for probe in (one, other):
            numbers = [change.seq for change in probe.changes]
            expected = list(range(probe.welcome.head + 1, probe.welcome.head + 1 + len(numbers)))
            expect(numbers == expected, f"after {probe.welcome.head} come {numbers}")
        by_number = {change.seq: change for change in one.changes}
        same = all(change == by_number.get(change.seq, change) for change in other.changes)
        expect(same, "one number has two changes")


@check("6", "a cache continues at its position: every later change comes, none before")
async def _(target: ServerTarget) -> None:
    async with target.greeted() as probe:
        await answered(probe, comment(target))
        known, epoch = probe.changes[-1], probe.welcome.epoch
        await answered(probe, comment(target))
        later = probe.changes[-1]
    async with target.greeted(epoch=epoch, seq=known.seq, mark=known.mark) as probe:
        expect(not probe.welcome.resync, "the server sets resync")
        await probe.until(Change, lambda change: change.seq == later.seq)
        numbers = [change.seq for change in probe.changes]
        expect(numbers == list(range(known.seq + 1, later.seq + 1)), f"after {known.seq} come {numbers}")


@check("6", "an unknown epoch, another mark or a number ahead: resync, and the epoch stays")
async def _(target: ServerTarget) -> None:
    async with target.greeted() as probe:
        await answered(probe, comment(target))
        epoch, last = probe.welcome.epoch, probe.changes[-1]
    for fields in (
        {"epoch": "0123456789abcdef", "seq": last.seq, "mark": last.mark},
        {"epoch": epoch, "seq": last.seq, "mark": bytes(16)},
        {"epoch": epoch, "seq": last.seq + 1000, "mark": bytes(16)},
    ):
        async with target.greeted(**fields) as probe:
            expect(probe.welcome.resync, f"no resync for {fields}")
            expect(probe.welcome.epoch == epoch, "a position that the server never gave ends the epoch")


@greeted("3.3", "with resync no change up to the head comes again")
async def _(target: ServerTarget, probe: Probe) -> None:
    await answered(probe, comment(target))
    first = probe.changes[0]
    expect(first.seq == probe.welcome.head + 1, f"change {first.seq} comes after the head {probe.welcome.head}")


@greeted("3.3", "a manifest comes after every change up to its number")
async def _(target: ServerTarget, probe: Probe) -> None:
    await probe.send(comment(target), Manifest(), comment(target))
    entries = await probe.until(Entries)
    seen = max([probe.welcome.head, *(change.seq for change in probe.changes)])
    expect(entries.seq == seen, f"the manifest is of {entries.seq}, the last change was {seen}")


@greeted("3.2", "a manifest lists every file that a change wrote")
async def _(target: ServerTarget, probe: Probe) -> None:
    request = run(target, "create", "Listed in a manifest")
    await answered(probe, request)
    listed = await manifest(probe)
    missing = [op.path for op in caused(probe, request)[0].ops if op.path not in listed]
    expect(not missing, f"it lacks {', '.join(missing)}")


@greeted("3.1", "Applied is accepted")
async def _(target: ServerTarget, probe: Probe) -> None:
    await probe.send(Applied(probe.welcome.head), Applied(probe.welcome.head, 0.5), Applied(0))
    await answered(probe, comment(target))


# --- 3.1, 3.4: Run ---


@greeted("S11", "Run: its change comes before the reply, with the request's id and actor")
async def _(target: ServerTarget, probe: Probe) -> None:
    request = comment(target)
    reply = await answered(probe, request)
    changes = caused(probe, request)
    expect(len(changes) == 1 and isinstance(reply, Reply) and reply.exit_code == 0, f"{len(changes)} changes")
    expect(changes[0].seq == reply.seq, f"the reply is of {reply.seq}, its change is {changes[0].seq}")
    expect(changes[0].actor == target.actor, f"the change's actor is {changes[0].actor!r}")


@greeted("3.2", "Run: a command that fails is a Reply with its exit code, and changes nothing")
async def _(target: ServerTarget, probe: Probe) -> None:
    request = run(target, "comment", "task_00000000000000000000000000", "x")
    reply = await answered(probe, request)
    expect(isinstance(reply, Reply) and reply.exit_code != 0, "the exit code is 0")
    expect(not caused(probe, request), "it made a change")


@greeted("S6", "Run: a repeated request has the same reply and runs once, also on another connection")
async def _(target: ServerTarget, probe: Probe) -> None:
    request = comment(target)
    first = await answered(probe, request)
    again = await answered(probe, msgspec.structs.replace(request, age_s=1.0))
    expect(first == again, "the repeated request has another reply")
    async with target.greeted() as other:
        third = await answered(other, msgspec.structs.replace(request, age_s=2.0))
    expect(first == third, "the repeated request has another reply on another connection")
    await answered(probe, comment(target))
    expect(len(caused(probe, request)) == 1, f"it ran {len(caused(probe, request))} times")


@check("S6", "Run: sent twice at once, it runs once")
async def _(target: ServerTarget) -> None:
    async with target.greeted() as one, target.greeted() as other:
        request = comment(target)
        await asyncio.gather(answered(one, request), answered(other, request))
        await answered(one, comment(target))
        expect(len(caused(one, request)) == 1, f"it ran {len(caused(one, request))} times")


@greeted("3.4", "an id with another request is REMOTE_INVALID")
async def _(target: ServerTarget, probe: Probe) -> None:
    request = comment(target)
    await answered(probe, request)
    other = run(target, "comment", target.task, "another text")
    is_refused(await probe.ask(msgspec.structs.replace(other, id=request.id)), "REMOTE_INVALID")


@greeted("3.4", "a request older than the journal is REMOTE_UNKNOWN_OUTCOME and does not run")
async def _(target: ServerTarget, probe: Probe) -> None:
    request = comment(target, age_s=OLD_S)
    is_refused(await probe.ask(request), "REMOTE_UNKNOWN_OUTCOME")
    await answered(probe, comment(target))
    expect(not caused(probe, request), "it ran")


@check("7", "an actor that the token may not use is REMOTE_FORBIDDEN")
async def _(target: ServerTarget) -> None:
    assert target.welcome is not None, "prepare() greeted"
    if any("*" in pattern for pattern in target.welcome.act_as if not pattern.startswith("agent:")):
        raise NotOffered("this token may use any actor")
    async with target.greeted() as probe:
        argv = ["comment", target.task, "x", "--actor", "human:of-no-token-of-conformance"]
        is_refused(await probe.ask(Run(new_id(), argv)), "REMOTE_FORBIDDEN")


@greeted("3.3", "requests of one connection run in the order of their arrival")
async def _(target: ServerTarget, probe: Probe) -> None:
    requests = [comment(target) for _ in range(5)]
    await probe.send(*requests)
    await probe.until(Reply, lambda reply: reply.id == requests[-1].id)
    ids = [request.id for request in requests]
    expect([change.cause for change in probe.changes if change.cause in ids] == ids, "they run in another order")


@greeted("2.3", "an Attachment beyond the argv is Refused, one without content fails like a missing file")
async def _(target: ServerTarget, probe: Probe) -> None:
    argv = ["attach", target.task, "conformance.txt", "--actor", target.actor]
    beyond = await probe.ask(Run(new_id(), argv, [Attachment(99, "conformance.txt", b"x")]))
    expect(isinstance(beyond, Refused), f"answered with {type(beyond).__name__}")
    missing = await probe.ask(Run(new_id(), argv, [Attachment(2, "conformance.txt")]))
    fails = isinstance(missing, Refused) or (isinstance(missing, Reply) and missing.exit_code != 0)
    expect(fails, "a file that the caller does not have is attached")


@greeted("3.1", "Run: an inline Attachment becomes an artifact with its bytes")
async def _(target: ServerTarget, probe: Probe) -> None:
    data = new_id().encode() + b"\x00\xff"
    argv = ["attach", target.task, "conformance.bin", "--actor", target.actor]
    await answered(probe, Run(new_id(), argv, [Attachment(2, "conformance.bin", data)]))
    await _is_artifact(probe, data)


async def _is_artifact(probe: Probe, data: bytes) -> None:
    found = [path for path, entry in (await manifest(probe)).items() if entry.digest == digest_of(data)]
    expect(found, "no file of the project has its content")
    _part, content = await fetch(probe, found[0])
    expect(content == data, "the artifact has other bytes")


# --- 3.1: uploads and downloads ---


@check("3.1", "Upload: pieces in order, resumable, then used by a Run")
async def _(target: ServerTarget) -> None:
    data = os.urandom(10_000)
    digest, size = digest_of(data), len(data)

    async def piece(probe: Probe, offset: int, piece: bytes) -> int:
        return of_kind(await probe.ask(Upload(new_id(), digest, size, offset, piece)), Uploaded).have

    async with target.greeted() as probe:
        expect(await piece(probe, 0, b"") == 0, "a content that was never sent is there")
        expect(await piece(probe, 0, data[:5000]) == 5000, "the first piece is not taken")
        expect(await piece(probe, 9000, data[9000:]) == 5000, "a piece beyond a gap is taken")
    async with target.greeted() as probe:
        expect(await piece(probe, 0, b"") == 5000, "the upload does not survive its connection")
        expect(await piece(probe, 5000, data[5000:]) == size, "the upload is not complete")
        argv = ["attach", target.task, "uploaded.bin", "--actor", target.actor]
        await answered(probe, Run(new_id(), argv, [Attachment(2, "uploaded.bin", digest=digest, size=size)]))
        await _is_artifact(probe, data)


@greeted("2.3", "Upload: a small piece and a wrong digest are Refused, the connection stays open")
async def _(_target: ServerTarget, probe: Probe) -> None:
    small = await probe.ask(Upload(new_id(), digest_of(PIECE + b"1"), 9000, 0, b"x"))
    wrong = await probe.ask(Upload(new_id(), digest_of(b"other"), len(PIECE), 0, PIECE))
    beyond = await probe.ask(Upload(new_id(), digest_of(PIECE + b"2"), 5, 0, PIECE))
    for name, answer in (("a small piece", small), ("a wrong digest", wrong), ("beyond the size", beyond)):
        expect(isinstance(answer, Refused), f"{name}: answered with {type(answer).__name__}")


@greeted("3.1", "Run: an upload that is missing is REMOTE_NOT_UPLOADED")
async def _(target: ServerTarget, probe: Probe) -> None:
    argv = ["attach", target.task, "x.bin", "--actor", target.actor]
    attachment = Attachment(2, "x.bin", digest=digest_of(new_id().encode()), size=5000)
    is_refused(await probe.ask(Run(new_id(), argv, [attachment])), "REMOTE_NOT_UPLOADED")


@greeted("3.2", "Download: pieces by digest; a missing or other content is REMOTE_NOT_FOUND")
async def _(_target: ServerTarget, probe: Probe) -> None:
    files = await manifest(probe)
    path = next(path for path in files if path == "config.json")
    size, digest = files[path].size, files[path].digest
    data = b""
    while len(data) < size:
        request = Download(new_id(), path, digest, len(data), max(1, size // 3))
        answer = of_kind(await probe.ask(request), Downloaded)
        expect((answer.size, answer.digest) == (size, digest) and answer.data, "size or digest differ")
        data += answer.data
    expect(digest_of(data) == digest, "the pieces do not have the file's digest")
    is_refused(await probe.ask(Download(new_id(), path, bytes(32))), "REMOTE_NOT_FOUND")
    is_refused(await probe.ask(Download(new_id(), "tasks/of-no-project.json")), "REMOTE_NOT_FOUND")
    is_refused(await probe.ask(Download(new_id(), path, None, size + 1)), "REMOTE_PROTOCOL")


# --- 3.1: Put ---


@contextlib.asynccontextmanager
async def plan(target: ServerTarget) -> AsyncIterator[tuple[Probe, str, bytes]]:
    async with target.greeted() as probe:
        request = run(target, "create", "Plan of a check")
        await answered(probe, request)
        path = next(op.path for op in caused(probe, request)[0].ops if op.path.startswith("plans/"))
        text = b"one\ntwo\nthree\nfour\nfive\n"
        _part, base = await fetch(probe, path)
        await stored(probe, Put(new_id(), path, base, text), "stored")
        yield probe, path, text


async def stored(probe: Probe, put: Put, outcome: str) -> None:
    answer = await answered(probe, put)
    expect(isinstance(answer, Stored) and answer.outcome == outcome, f"{answer}; not {outcome}")


@check("3.2", "Put: stored, and the change has the request's id")
async def _(target: ServerTarget) -> None:
    async with plan(target) as (probe, path, text):
        put = Put(new_id(), path, text, b"new\n")
        await stored(probe, put, "stored")
        expect(len(caused(probe, put)) == 1, "its change does not name the request")
        _part, found = await fetch(probe, path)
        expect(found == b"new\n", f"the plan is {found!r}")
        await stored(probe, msgspec.structs.replace(put, age_s=1.0), "stored")
        await stored(probe, Put(new_id(), path, text, b"new\n"), "unchanged")


@check("3.1", "Put: an older base is merged by line; line ends do not conflict")
async def _(target: ServerTarget) -> None:
    async with plan(target) as (probe, path, text):
        await stored(probe, Put(new_id(), path, text, text.replace(b"one", b"1")), "stored")
        await stored(probe, Put(new_id(), path, text, text.replace(b"five", b"5")), "merged")
        _part, found = await fetch(probe, path)
        expect(found == b"1\ntwo\nthree\nfour\n5\n", f"the merged plan is {found!r}")
        windows = found.replace(b"\n", b"\r\n").replace(b"three", b"3")
        await stored(probe, Put(new_id(), path, found, windows), "stored")


@check("3.2", "Put: changes of the same line are a conflict, which changes nothing")
async def _(target: ServerTarget) -> None:
    async with plan(target) as (probe, path, text):
        theirs = text.replace(b"one", b"1")
        await stored(probe, Put(new_id(), path, text, theirs), "stored")
        put = Put(new_id(), path, text, text.replace(b"one", b"eins"))
        await stored(probe, put, "conflict")
        _part, found = await fetch(probe, path)
        expect(found == theirs and not caused(probe, put), f"the plan is {found!r}")


@check("3.1", "Put: by the digest of its base; another digest is REMOTE_STALE_BASE")
async def _(target: ServerTarget) -> None:
    async with plan(target) as (probe, path, text):
        await stored(probe, Put(new_id(), path, None, b"new\n", base_digest=digest_of(text)), "stored")
        put = Put(new_id(), path, None, b"newer\n", base_digest=digest_of(text))
        is_refused(await probe.ask(put), "REMOTE_STALE_BASE")


@greeted("2.5", "Put: only plans and notes of a task can be edited")
async def _(target: ServerTarget, probe: Probe) -> None:
    for path in ("config.json", "plans/readme.md", f"tasks/{target.task}.json"):
        answer = await probe.ask(Put(new_id(), path, None, b"x"))
        expect(isinstance(answer, Refused), f"{path}: answered with {type(answer).__name__}")


@check("2.4", "Put: a text over the limit in Welcome is REMOTE_TOO_LARGE")
async def _(target: ServerTarget) -> None:
    async with plan(target) as (probe, path, text):
        long = bytes(probe.welcome.limits.max_text_bytes + 1)
        is_refused(await probe.ask(Put(new_id(), path, text, long)), "REMOTE_TOO_LARGE")


# --- 3.1: Log, ReadVersion, Call, Push ---


@greeted("3.2", "Log: newest first, in pages, by task")
async def _(target: ServerTarget, probe: Probe) -> None:
    request = comment(target)
    await answered(probe, request)
    before: int | None = None
    numbers: list[int] = []
    for _ in range(3):
        page = of_kind(await probe.ask(Log(new_id(), target.task, 2, before)), LogPage)
        expect(len(page.entries) <= 2, f"{len(page.entries)} entries, not 2")
        expect(all(target.task in entry.tasks for entry in page.entries), "an entry is of another task")
        numbers += [entry.seq for entry in page.entries if entry.epoch == probe.welcome.epoch]
        if not numbers or page.before is None:
            break
        before = page.before
    expect(numbers and numbers == sorted(set(numbers), reverse=True), f"the numbers are {numbers}")
    expect(caused(probe, request)[0].seq in numbers, "the newest change is not in it")


@check("3.2", "Replay: the changes after a position, on a connection that does not follow")
async def _(target: ServerTarget) -> None:
    async with target.greeted() as probe, target.greeted(follow=False) as reader:
        await answered(probe, comment(target))
        known = probe.changes[-1]
        last = await answered(probe, comment(target))
        epoch = probe.welcome.epoch
        answer = of_kind(await reader.ask(Replay(new_id(), epoch, known.seq, known.mark)), Replayed)
        numbers = [change.seq for change in answer.changes]
        expect(answer.outcome == "kept" and numbers[0] == known.seq + 1 and last.seq in numbers, f"{numbers}")
        expect(answer.changes[: last.seq - known.seq] == probe.changes[-(last.seq - known.seq) :], "changes differ")
        newest = of_kind(await reader.ask(Replay(new_id())), Replayed)
        expect(newest.outcome == "kept" and not newest.changes, "without seq it is not the head")
        for outcome, request in (
            ("ahead", Replay(new_id(), epoch, newest.head + 1000)),
            ("epoch", Replay(new_id(), "0123456789abcdef", known.seq)),
            ("epoch", Replay(new_id(), epoch, known.seq, bytes(16))),
        ):
            found = of_kind(await reader.ask(request), Replayed).outcome
            expect(found == outcome, f"outcome {found}, not {outcome}, for {request}")


@check("3.2", "ReadVersion: a plan as of each change; an unknown one is REMOTE_NOT_FOUND")
async def _(target: ServerTarget) -> None:
    async with plan(target) as (probe, path, text):
        first = max(change.seq for change in probe.changes)
        await stored(probe, Put(new_id(), path, text, b"second\n"), "stored")
        task = path.removeprefix("plans/").removesuffix(".md")
        for seq, expected in ((first, text), (max(change.seq for change in probe.changes), b"second\n")):
            answer = await probe.ask(ReadVersion(new_id(), task, "plan", seq))
            expect(isinstance(answer, Version) and answer.data == expected, f"version {seq}: {answer}")
        is_refused(await probe.ask(ReadVersion(new_id(), task, "plan", 1 << 40)), "REMOTE_NOT_FOUND")


@greeted("3.5", "Call: runs once, like a command; an unknown operation is REMOTE_UNSUPPORTED")
async def _(target: ServerTarget, probe: Probe) -> None:
    payload = json.dumps({"title": "Made by a Call", "actor": target.actor}).encode()
    call = Call(new_id(), "dashboard", "/api/tasks", payload)
    answer = await answered(probe, call)
    expect(isinstance(answer, Returned) and answer.status < 400, f"answered with {answer}")
    expect(len(caused(probe, call)) == 1, f"it made {len(caused(probe, call))} changes")
    expect(await answered(probe, msgspec.structs.replace(call, age_s=1.0)) == answer, "repeated: another answer")
    unknown = await probe.ask(Call(new_id(), "nothing", "x", b"{}"))
    is_refused(unknown, "REMOTE_UNSUPPORTED", "REMOTE_VERSION")


@greeted("3.6", "Push: to a project that is not empty is Refused")
async def _(_target: ServerTarget, probe: Probe) -> None:
    answer = await probe.ask(Push(new_id(), digest_of(b"no such pack"), 5000))
    of_kind(answer, Refused)


# --- 8: capabilities ---


@check("8", "V1: a change has the same bytes on every connection, live and on replay")
async def _(target: ServerTarget) -> None:
    async with target.greeted() as one, target.greeted() as other:
        epoch, start = one.welcome.epoch, one.welcome.head
        request = comment(target)
        await answered(one, request)
        known = caused(one, request)[0]
        await answered(one, comment(target))
        last = one.changes[-1]
        await other.until(Change, lambda change: change.seq == last.seq)
    async with target.greeted(epoch=epoch, seq=known.seq, mark=known.mark) as replayed:
        await replayed.until(Change, lambda change: change.seq == last.seq)
    expect(start < last.seq, "no change came")
    expect(one.raw_changes[last.seq] == other.raw_changes[last.seq], "two connections get different bytes")
    expect(one.raw_changes[last.seq] == replayed.raw_changes[last.seq], "a replay has different bytes")


@check("8", "V2: a Call of a surface whose capability the client has not named is REMOTE_VERSION")
async def _(target: ServerTarget) -> None:
    target.require("call:mcp")
    async with target.greeted(capabilities=[]) as probe:
        call = Call(new_id(), "mcp", "lattice_comment", json.dumps({"task_id": target.task, "text": "x"}).encode())
        is_refused(await probe.ask(call), "REMOTE_VERSION")


@greeted("9", "a command is all or nothing: its change has all of it")
async def _(target: ServerTarget, probe: Probe) -> None:
    request = run(target, "create", "All or nothing")
    await answered(probe, request)
    (change,) = caused(probe, request)
    paths = {op.to if isinstance(op, MoveFile) else op.path for op in change.ops}
    kinds = {path.split("/")[0] for path in paths}
    expect({"tasks", "events"} <= kinds, f"its change writes {sorted(paths)}")
    order = [op.path.split("/")[0] for op in change.ops]
    expect(order.index("events") < order.index("tasks"), "S8: a snapshot comes before its event log")
