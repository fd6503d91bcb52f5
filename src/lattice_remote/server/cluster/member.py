"""Membership of one project in a cluster, on one node: it follows the order, or owns the project and extends it.

    following --lease taken, own record appended--> owning --lease lost, append refused--> following

Before each start of the worker the journal is compared with the order, record by record: records that the cluster
lacks are cut, missing ones are applied afterwards. A node that cannot be aligned copies the project from another one.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import batched
from pathlib import Path

import msgspec

from lattice_remote.errors import RemoteError, StorageError
from lattice_remote.files import write_atomically
from lattice_remote.protocol.messages import Bye
from lattice_remote.protocol.operations import AnnounceFile
from lattice_remote.server.cluster.directory import ProjectEntry
from lattice_remote.server.cluster.engine import Engine, EngineUnavailable
from lattice_remote.server.cluster.forward import ForwardedRequest, Forwarder
from lattice_remote.server.cluster.jetstream import EngineRefused, ungrouped
from lattice_remote.server.cluster.lease import Held, Lease
from lattice_remote.server.cluster.order import Batch, Fenced, JetStreamOrder, StreamLost, TooOld
from lattice_remote.server.cluster.peer_access import PeerAccess, Reached
from lattice_remote.server.cluster.peer_copy import copy_from, finish_copy
from lattice_remote.server.datadir import ProjectPaths
from lattice_remote.server.ipc import ApplyRecords, ImportProject, Ready, RecordApplied, RequestDone
from lattice_remote.server.journal.contents import change_of
from lattice_remote.server.journal.segment import JournalReader, Record, decoder, next_number
from lattice_remote.server.project.metrics import OutcomeListener
from lattice_remote.server.project.order import WriteRequest
from lattice_remote.server.project.project import Project
from lattice_remote.server.project.queue import Requester
from lattice_remote.server.worker.recovery import Membership

__all__ = ["CURSOR_FILE", "Cursor", "Member", "NodeIdentity", "id_of", "load_cursors", "save_cursor"]

CURSOR_FILE = "cluster-cursor"
"""Beside the journal's segments."""
_MAX_CURSORS = 64
_CURSOR_INTERVAL_S = 1.0
_POLL_S = 0.5
_CONFIRM_S, _CURRENT_S = 1.0, 6.0
"""Interval of the looks at the stream's end, and age of the last one at which this node refuses its clients.

An election of the engine takes 1 to 5 s.
"""
_BEHIND_S = 10.0
"""For the worker to apply what the stream has, until this node says that it is behind."""
_REACH_S = 5.0
_COPY_RETRY_S = 1.0
_BATCH_BYTES = 512 * 1024
"""Of records in one message, and the last one."""
_MAX_OUTSTANDING = 64
"""Batches with the worker."""
_LEASE_S = 5.0
_TAKE_OVER_S = 60.0
"""For the worker to apply what it has, before a new owner serves."""
_HEAR_S = 2.0
"""For another node's answer: one that has died must not hold up a takeover."""
_CLAIM_S, _CLAIM_AGAIN_S = 30.0, 5.0
_RETIRE_S = 7.0
"""Longer than a lease of an owner that has died."""
_CONTENTS_AT_ONCE = 8
_KEPT_MESSAGES = 10_000
"""In the stream, for nodes that were away; a node away for longer copies the project."""
_PURGE_INTERVAL_S = 60.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeIdentity:
    """A node's name, and the address at which the others reach it."""

    name: str
    url: str


class Cursor(msgspec.Struct, frozen=True):
    """The journal up to record ``number`` (exclusive) equals the stream up to message ``seq``.

    ``node`` and ``term`` are of the last owner there, ``project`` is the project's id in the cluster.
    """

    epoch: str
    seq: int
    number: int
    node: str = ""
    term: int = 0
    project: str = ""


def load_cursors(journal: Path) -> list[Cursor]:
    try:
        return msgspec.json.decode((journal / CURSOR_FILE).read_bytes(), type=list[Cursor])
    except (FileNotFoundError, msgspec.DecodeError):
        return []


def save_cursor(journal: Path, cursor: Cursor) -> None:
    """Add a cursor to the stored ones. Raises OSError."""
    kept = [known for known in load_cursors(journal) if known.epoch == cursor.epoch and known.seq < cursor.seq]
    data = msgspec.json.encode([*kept[1 - _MAX_CURSORS :], cursor])
    write_atomically(journal / CURSOR_FILE, data, mode=0o600)


def id_of(journal: Path) -> str:
    """Return the id of the project with this journal; "" if it belongs to no cluster."""
    cursors = load_cursors(journal)
    return cursors[-1].project if cursors else ""


class _LostOnOther(StreamLost):
    """Another node has seen another stream than this one, or more of it."""


class _CopyNeeded(Exception):
    """This node's journal does not reach the stream."""


def _announced_by(payload: bytes) -> list[AnnounceFile]:
    record = decoder.decode(payload)
    if not isinstance(record, Record) or record.change is None:
        return []
    return [operation for operation in change_of(record).ops if isinstance(operation, AnnounceFile)]


@dataclass
class _Applying:
    """A batch with the worker; ``left`` records of it are not applied yet. ``contents`` are files, by digest."""

    batch: Batch
    left: int
    contents: dict[str, str]


class Member:
    """The ``Order`` of a project on a node of a cluster. ``attach()`` its project before that starts.

    Args:
        slug, paths: of the project.
        entry: of the project in the catalogue.
        others: returns the addresses of the other nodes.
        ask_to_own: asks the owner to hand the project to this node; raises EngineUnavailable.
    """

    is_shared = True

    def __init__(
        self,
        slug: str,
        paths: ProjectPaths,
        *,
        entry: ProjectEntry,
        engine: Engine,
        lease: Lease,
        access: PeerAccess,
        identity: NodeIdentity,
        others: Callable[[], Sequence[str]],
        ask_to_own: Callable[[], Awaitable[None]],
    ) -> None:
        self._ask_to_own = ask_to_own
        self._owns = asyncio.Event()  # this node does
        self._claimed: list[tuple[ImportProject, Requester, OutcomeListener | None]] = []  # wait for that
        self.slug = slug
        self.epoch = entry.epoch
        self._id = entry.id
        self._paths = paths
        self._engine = engine
        self._lease = lease
        self._access = access
        self._identity = identity
        self._others = others
        self._order = JetStreamOrder(engine, entry.stream, entry.epoch)
        self._project: Project | None = None
        self._forwarder: Forwarder | None = None
        self._held: Held | None = None
        self._is_owner = False
        self._owner_url: str | None = None
        self.owner = ""
        """Name of the last known owner."""
        self.term = 0
        cursors = load_cursors(paths.journal)
        self._seq = cursors[-1].seq if cursors and cursors[-1].epoch == self.epoch else 0
        """The last message of the stream that was appended or given to the worker."""
        self._furthest = 0  # that was ever seen, also where the journal is behind it
        self.has_lost_order = False
        """This node has seen another stream than this one, or more of it."""
        self.lost_on_other = ""
        """Another node's report of that; "" if there is none."""
        self._skip = 0  # records of the next message that the journal has already
        self._number = 0
        self._applying: deque[_Applying] = deque()
        self._applied = asyncio.Event()
        self._pending: deque[tuple[Callable[[], None], RequestDone | None]] = deque()
        self._work = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._is_ready = False
        self._copy_reason = ""
        self._cursor_at = 0.0
        self._stored: Cursor | None = None
        self._purge_at = time.monotonic() + _PURGE_INTERVAL_S
        self._head_changed = asyncio.Event()
        self._confirmed_at = -_CURRENT_S  # when a majority was last asked that answered
        self._current_at = -_BEHIND_S  # when this node last lacked nothing
        self._was_current = False  # clients have connected since
        self._fetching: set[str] = set()  # digests of the contents of the next batch
        self._is_closed = False
        self._wanted = ""
        self._is_retiring = False

    def attach(self, project: Project) -> None:
        self._project = project
        self._forwarder = Forwarder(project, self._access)
        self._start("campaign", self._campaign())
        self._start("confirm", self._confirm())

    @property
    def project(self) -> Project:
        assert self._project is not None, "attach() comes first"
        return self._project

    @property
    def _forward(self) -> Forwarder:
        assert self._forwarder is not None, "attach() comes first"
        return self._forwarder

    # --- what the project asks ---

    @property
    def is_owner(self) -> bool:
        return self._is_owner

    @property
    def is_settled(self) -> bool:
        return not self._applying

    @property
    def unavailable(self) -> str:
        if time.monotonic() - self._confirmed_at > _CURRENT_S:
            return "this node cannot reach the cluster; try again, or use another node"
        is_usable = self._is_ready and self._is_current
        return "" if is_usable else "this node is catching up with the cluster; try again in a moment"

    @property
    def _is_current(self) -> bool:
        """Whether this node had, some seconds ago, every change that was acknowledged then."""
        now = time.monotonic()
        return now - self._confirmed_at <= _CURRENT_S and now - self._current_at <= _BEHIND_S

    @property
    def position(self) -> int:
        """Number of the stream's last message that is in this node's files."""
        return self._applying[0].batch.seq - 1 if self._applying else self._seq

    @property
    def reached(self) -> Reached:
        return Reached(self.epoch, max(self._furthest, self._seq))

    @property
    def in_doubt(self) -> int:
        """Appends, ever, whose answer was late or missing."""
        return self._order.in_doubt

    @property
    def figures(self) -> Mapping[str, int]:
        return {
            "cluster_owner": int(self._is_owner),
            "cluster_available": int(not self.unavailable),
            "cluster_term": self.term,
            "cluster_unapplied": len(self._applying),
            "cluster_in_doubt": self.in_doubt,
        }

    async def prepare(self) -> Sequence[str]:
        """Align the journal with the stream; waits until the engine, or a node with the project, answers.

        Raises StorageError: the stream is lost.
        """
        self._leave()
        self._stop("follow")
        self._applying.clear()
        while True:
            try:
                membership = await self._align()
            except (_CopyNeeded, TooOld) as error:
                await self._copy(str(error))
            except StreamLost as error:
                self._order_lost(error)
                raise
            else:
                return ("--member", msgspec.json.encode(membership).decode())

    def opened(self, ready: Ready) -> None:
        del ready
        self._is_ready, self.has_lost_order = True, False
        if self._is_owner:
            self.project.lead(keeps_edits=True)
        else:
            self._start("follow", self._follow())

    def pass_on(self, deliver: Callable[[], None], done: RequestDone | None = None) -> None:
        if self._is_owner and not self._is_closed and (self._pending or (done is not None and done.record)):
            self._pending.append((deliver, done))
            self._work.set()
        else:
            deliver()

    def applied(self, message: RecordApplied) -> None:
        self._number = message.number
        if self._applying:
            self._applying[0].left -= 1
        self._finish_batches()

    def copy_missing(self, reason: str) -> None:
        self._copy_reason = reason

    def committed(self, seq: int) -> None:
        del seq
        self._head_changed.set()

    async def reach(self, seq: int) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REACH_S):
                while self.project.history.head < seq:
                    self._head_changed.clear()
                    await self._head_changed.wait()
        return self.project.history.head >= seq

    async def catch_up(self) -> bool:
        if self._is_owner:
            return False
        with contextlib.suppress(TimeoutError, EngineUnavailable, StreamLost):
            async with asyncio.timeout(_REACH_S):
                _, last = await self._order.bounds()
                while self.position < last:
                    self._applied.clear()
                    await self._applied.wait()
        return True

    def forward(self, message: WriteRequest, requester: Requester, on_result: OutcomeListener | None) -> None:
        if isinstance(message, ImportProject) and message.candidate:
            self._claimed.append((message, requester, on_result))
            if "claim" not in self._tasks:
                self._start("claim", self._claim())
        else:
            self._forward.submit(message, requester, on_result)

    async def _claim(self) -> None:
        """Become the owner: only its worker puts a pushed project in place, and this node has the project."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLAIM_S):
                while not self._is_owner:
                    with contextlib.suppress(EngineUnavailable):
                        await self._ask_to_own()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._owns.wait(), _CLAIM_AGAIN_S)
        claimed, self._claimed = self._claimed, []
        for message, requester, on_result in claimed:
            if self._is_owner:
                self.project.submit(message, requester, on_result)
            else:
                why = "this node could not become the project's owner; nothing was changed, push again"
                self.project.refuse(requester, message, on_result, "REMOTE_BUSY", why)

    def requesters(self) -> Sequence[Requester]:
        return self._forward.requesters()

    def forget(self, requester: Requester, request_ids: set[str]) -> None:
        self._claimed = [claim for claim in self._claimed if claim[1] is not requester]
        self._forward.forget(requester, request_ids)

    def withdraw(self, requester: Requester, request_id: str, code: str) -> bool:
        return self._forward.withdraw(requester, request_id, code)

    async def close(self) -> None:
        self._is_closed = True
        held, self._held = self._held, None
        self._is_owner = False
        if (storing := self._tasks.get("cursor")) is not None:
            await asyncio.wait({storing})
        for name in tuple(self._tasks):
            self._stop(name)
        self._drop_pending()
        self._save_cursor(now=True)
        if held is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await held.release()
        if self._forwarder is not None:
            await self._forwarder.close()

    # --- before a worker starts ---

    async def _align(self) -> Membership:
        journal = self._paths.journal
        await asyncio.to_thread(finish_copy, self._paths)
        if self._copy_reason:
            reason, self._copy_reason = self._copy_reason, ""
            raise _CopyNeeded(reason)
        if self.lost_on_other:
            raise _LostOnOther(self.lost_on_other)
        self._furthest = self.reached.seq
        reader = JournalReader(journal)
        end = await asyncio.to_thread(next_number, journal)
        cursors = [cursor for cursor in load_cursors(journal) if cursor.epoch == self.epoch and cursor.number <= end]
        if not cursors or not await asyncio.to_thread(reader.reaches, cursors[-1].number):
            raise _CopyNeeded("this node has no usable copy of the project")
        cursor = cursors[-1]
        tail = deque(await asyncio.to_thread(lambda: list(reader.payloads(cursor.number))))
        self._stored = cursor
        self._seq, self._number, self._skip = cursor.seq, cursor.number, 0
        self.owner, self.term = cursor.node, cursor.term
        await self._order.open()
        await self._check(cursor)
        while True:
            with contextlib.suppress(EngineUnavailable):
                await self._hear_others()
                break
            await asyncio.sleep(_POLL_S)
        cut = await self._compare(tail)
        if tail and self._is_owner:
            await self._append_tail(tail)
        elif tail:
            cut = tail[0][0]
        for link in self._paths.announced.glob("*"):
            link.unlink(missing_ok=True)
        if cut is not None:
            if cursor.node != self._identity.name:
                raise StreamLost(f"this node has acknowledged records that {self._order.name} lacks")
            _log.warning("%s: the last records here are not part of the cluster's order; they are undone", self.slug)
            self._number = cut
        return Membership(cut, keeps_edits=self.owner == self._identity.name)

    async def _check(self, cursor: Cursor) -> None:
        """Raise StreamLost unless the stream has, at the cursor, the records that this journal has there.

        A stream that was restored from an older copy, and extended since, differs.
        """
        try:
            found = await self._order.read(cursor.seq - 1) if cursor.seq else []
        except TooOld:
            return
        if not found:
            if cursor.seq:
                raise StreamLost(f"the stream {self._order.name} ends before {cursor.seq}, which was acknowledged")
            return
        records, reader = found[0].records, JournalReader(self._paths.journal)
        here = await asyncio.to_thread(reader.payloads_before, cursor.number, len(records))
        if here is None:
            return
        is_owner_here = records or (found[0].node, found[0].term) == (cursor.node, cursor.term)
        if here != list(records) or not is_owner_here:
            raise StreamLost(f"message {cursor.seq} of {self._order.name} is another one than was acknowledged")

    async def _hear_others(self) -> bool:
        """Return whether this node has seen as much of the order as the others that answer now.

        After a restore from an older copy the stream agrees with a node that lagged behind. Only the nodes know then
        that changes behind its end were acknowledged, as the engine's other records are as old.

        Raises StreamLost, EngineUnavailable.
        """

        async def ask(url: str) -> Reached:
            try:
                async with asyncio.timeout(_HEAR_S):
                    return await self._access.reached(url, self.slug)
            except (TimeoutError, RemoteError):
                return Reached()

        found = await asyncio.gather(*map(ask, self._others()))
        furthest = max((each.seq for each in found if each.epoch == self.epoch), default=0)
        if furthest <= self._seq:
            return True
        try:
            await self._order.require(furthest)
        except StreamLost as error:
            raise _LostOnOther(error.message) from error
        return False

    async def _compare(self, tail: deque[tuple[int, bytes]]) -> int | None:
        """Advance along the stream while the journal's ``tail`` agrees; return the record from which it does not.

        ``tail`` then has the records that follow the stream's end.
        """
        while batches := await self._order.read(self._seq):
            for batch in batches:
                self._skip = 0
                for record in batch.records:
                    if not tail:
                        return None
                    number, payload = tail[0]
                    if payload != record:
                        tail.clear()
                        return number
                    tail.popleft()
                    self._number, self._skip = number + 1, self._skip + 1
                self._skip = 0
                self._note(batch)
        return None

    async def _append_tail(self, tail: deque[tuple[int, bytes]]) -> None:
        """Append the records that a worker of this owner has journalled, and did not report before it ended."""
        while tail:
            number, payload = tail.popleft()
            await self._put_contents(_announced_by(payload))
            self._seq = await self._order.append(self._seq, [payload])
            self._number = number + 1

    async def _copy(self, reason: str) -> None:
        """Copy the project from another node; waits for one."""
        _log.info("%s: %s; copying the project from another node", self.slug, reason)
        said = ""
        while True:
            for url in dict.fromkeys([*filter(None, [self._owner_url]), *self._others()]):
                try:
                    position = await copy_from(url, self.slug, self._paths, self._access)
                except RemoteError as error:
                    if error.message != said:
                        said = error.message
                        _log.warning("%s: no copy from %s: %s", self.slug, url, said)
                else:
                    _log.info("%s: copied change %d from %s", self.slug, position.seq, url)
                    return
            await asyncio.sleep(_COPY_RETRY_S)

    # --- following ---

    async def _follow(self) -> None:
        self._fetching.clear()
        for file in self._contents.iterdir() if self._contents.is_dir() else ():
            file.unlink(missing_ok=True)
        async for batch in self._order.follow(self._seq):
            while len(self._applying) > _MAX_OUTSTANDING:
                self._applied.clear()
                await self._applied.wait()
            records = batch.records[self._skip :]
            contents = await self._contents_of(records)
            self._applying.append(_Applying(batch, len(records), contents))
            self._fetching.clear()
            self._seq, self._skip = batch.seq, 0
            if records:
                self.project.apply(ApplyRecords(list(records), contents))
            self._finish_batches()

    async def _contents_of(self, records: Sequence[bytes]) -> dict[str, str]:
        """Fetch the contents that records announce; without one that was superseded. Returns files by digest."""
        digests: list[bytes] = []
        for payload in records:
            digests += [each.digest for each in _announced_by(payload)]
        self._fetching.update(digest.hex() for digest in digests)
        found: dict[str, str] = {}

        async def fetch(digest: bytes) -> None:
            target = self._contents / digest.hex()
            if target.exists() or await self._engine.get_content(digest, target):
                found[digest.hex()] = str(target)

        if digests:
            self._contents.mkdir(mode=0o700, exist_ok=True)
        for some in batched(dict.fromkeys(digests), _CONTENTS_AT_ONCE):
            with ungrouped():
                async with asyncio.TaskGroup() as group:
                    for digest in some:
                        group.create_task(fetch(digest))
        return found

    @property
    def _contents(self) -> Path:
        return self._paths.root.absolute() / "contents"  # the worker has another current directory

    def _finish_batches(self) -> None:
        while self._applying and self._applying[0].left <= 0:
            done = self._applying.popleft()
            self._note_owner(done.batch)
            for digest in done.contents.keys() - self._fetching.union(*(each.contents for each in self._applying)):
                (self._contents / digest).unlink(missing_ok=True)
        self._applied.set()
        self._save_cursor()

    def _note(self, batch: Batch) -> None:
        self._seq = batch.seq
        self._note_owner(batch)

    def _note_owner(self, batch: Batch) -> None:
        if not batch.records:
            self.owner, self.term = batch.node, batch.term

    def _save_cursor(self, *, now: bool = False) -> None:
        if self._applying or self._skip or not self._is_ready:
            return  # the journal ends within a message
        if not now and time.monotonic() - self._cursor_at < _CURSOR_INTERVAL_S:
            return
        cursor = Cursor(self.epoch, self._seq, self._number, self.owner, self.term, self._id)
        if cursor == self._stored or (not now and "cursor" in self._tasks):
            return
        self._cursor_at, self._stored = time.monotonic(), cursor
        if now:
            self._store_cursor(cursor)
        else:
            self._start("cursor", asyncio.to_thread(self._store_cursor, cursor))

    def _store_cursor(self, cursor: Cursor) -> None:
        with contextlib.suppress(OSError):  # a full disk: an older one is as good
            save_cursor(self._paths.journal, cursor)

    # --- owning ---

    async def _campaign(self) -> None:
        """Know the owner; become it when there is none."""
        while True:
            await asyncio.sleep(_POLL_S * random.uniform(0.8, 1.2))  # noqa: S311 - only spreads the nodes
            try:
                self._dismiss_if_behind()
                self._save_cursor()  # also of the last message before a pause
                if self._is_owner:
                    await self._keep_owning()
                else:
                    await self._look()
            except EngineUnavailable:
                continue
            except StreamLost as error:
                self._order_lost(error)
            except RemoteError as error:
                _log.error("%s: %s", self.slug, error)

    async def _confirm(self) -> None:
        """Know, within seconds, whether this node has every acknowledged change; without that, dismiss the clients.

        Only a leader with a majority proves the stream's end: behind one without, the others may be writing.
        """
        due, due_at = 0, -_BEHIND_S  # the end of the stream at some look, until this node has reached it
        while True:
            asked = time.monotonic()
            try:
                if self.lost_on_other and self.project.failure is None:
                    raise _LostOnOther(self.lost_on_other)
                _, last = await self._order.bounds()
                self._confirmed_at = max(self._confirmed_at, asked)
                if self.position >= due:
                    self._current_at = max(self._current_at, due_at)
                    due, due_at = last, asked
                if self.position >= last:
                    self._current_at = max(self._current_at, asked)
            except EngineUnavailable:
                pass
            except StreamLost as error:
                self._order_lost(error)
            await asyncio.sleep(max(0.0, asked + _CONFIRM_S - time.monotonic()))

    def _order_lost(self, error: StreamLost) -> None:
        """Close the project until an administrator has looked: this node may lack changes, or others may (I7)."""
        self.has_lost_order = not isinstance(error, _LostOnOther)
        why = f"{error}; on the node with the most changes, run: lattice-remote cluster rebuild {self.slug}"
        self.project.fail(why)
        self._lose(error.message) if self._is_owner else self._restart()

    def _proved(self, asked: float) -> None:
        """Note that at ``asked`` no message was missing here: a majority has stored one behind the last."""
        self._confirmed_at = max(self._confirmed_at, asked)
        self._current_at = max(self._current_at, asked)

    def _dismiss_if_behind(self) -> None:
        if self._is_current:
            self._was_current = True
        elif self._was_current:
            self._was_current = False
            why = self.unavailable
            _log.error("%s: %s", self.slug, why.partition(";")[0])
            self.project.dismiss(Bye("REMOTE_BUSY", why, 1.0))

    async def _look(self) -> None:
        holder = await self._lease.holder(self.slug)
        if holder is not None and holder.node:
            self._owner_url = holder.url if holder.node != self._identity.name else None
            self._forward.owner_is(self._owner_url)
            return
        self._owner_url = None
        self._forward.owner_is(None)
        may_take = holder is None or holder.wanted in ("", self._identity.name)
        if not may_take or not self._is_ready or self._is_retiring or self.project.stopping:
            return
        if not await self._hear_others():
            return
        held = await self._lease.acquire(self.slug, node=self._identity.name, url=self._identity.url, after=self.term)
        if held is not None:
            await self._take_over(held)

    async def _take_over(self, held: Held) -> None:
        was_owner, asked = self.owner == self._identity.name, time.monotonic()
        try:
            async with asyncio.timeout(_LEASE_S):
                seq = await self._order.take_over(self._seq, node=self._identity.name, term=held.term)
        except (Fenced, TimeoutError):  # there is more to apply first
            await held.release()
            return
        except EngineRefused as error:
            self._forward.obstacle = error.message
            await held.release()
            return
        self._forward.obstacle = ""
        self._stop("follow")
        self._seq = seq
        self._start("renew", self._renew(held))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TAKE_OVER_S):
                while self._applying and not held.lost.is_set():
                    self._applied.clear()
                    await self._applied.wait()
        self.owner, self.term = self._identity.name, held.term
        if self._applying or held.lost.is_set() or not self._is_ready:
            self._stop("renew")
            await held.release()
            self._restart()
            return
        self._proved(asked)
        self._held, self._is_owner = held, True
        self._owns.set()
        _log.info("%s: this node owns the project, term %d", self.slug, held.term)
        self._start("append", self._append())
        self.project.lead(keeps_edits=was_owner)
        self._forward.hand_over(self.project.submit)
        self._save_cursor(now=True)

    async def _renew(self, held: Held) -> None:
        while not held.lost.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LEASE_S / 3):
                    await held.lost.wait()
                    break
            await held.renew()
        if self._held is held:
            self._lose("its lease has ended")

    async def _keep_owning(self) -> None:
        if self._wanted and self._wanted != self._identity.name and not self._pending:
            await self._hand_over(self._wanted)
        elif time.monotonic() > self._purge_at:
            self._purge_at = time.monotonic() + _PURGE_INTERVAL_S
            first, last = await self._order.bounds()
            if last - first > 2 * _KEPT_MESSAGES:
                await self._order.purge(last - _KEPT_MESSAGES)

    def move_to(self, node: str) -> None:
        """Hand the project to this node, soon."""
        self._wanted = node

    async def retire(self) -> None:
        """Apply what the owner has appended, if this node is not it, before the project is archived; some seconds."""
        self._is_retiring = True
        with contextlib.suppress(TimeoutError, EngineUnavailable, StorageError):
            async with asyncio.timeout(_RETIRE_S):
                while not self._is_owner:
                    holder = await self._lease.holder(self.slug)
                    last = (await self._order.bounds())[1]
                    if (holder is None or not holder.node) and self.position >= last:
                        return
                    await asyncio.sleep(_POLL_S / 5)

    async def _hand_over(self, node: str) -> None:
        held, self._held, self._wanted = self._held, None, ""
        _log.info("%s: handing the project to node %s", self.slug, node)
        self._stop("renew")
        self._lose("it was moved")
        if held is not None:
            await held.release(hand_to=node)

    async def _append(self) -> None:
        """Append the worker's records, one message at a time, and deliver the outcomes that are final then."""
        try:
            while True:
                self._work.clear()
                if not self._pending:
                    await self._work.wait()
                batch = self._next_batch()
                records = [done.record for _, done in batch if done is not None and done.record]
                if records:
                    await self._put_contents([file for _, done in batch if done is not None for file in done.announced])
                    asked = time.monotonic()
                    self._seq = await self._order.append(self._seq, records)
                    self._proved(asked)
                    self._number = max(done.number for _, done in batch if done is not None)
                for deliver, _ in batch:
                    self._pending.popleft()
                    deliver()
                self._save_cursor()
        except Fenced as error:
            _log.warning("%s: %s", self.slug, error)
            self._lose("another node owns the project")
        except EngineRefused as error:
            self._forward.obstacle = error.message
            self._lose(error.message, is_full=True)

    def _next_batch(self) -> list[tuple[Callable[[], None], RequestDone | None]]:
        batch, size = [], 0
        for item in self._pending:
            batch.append(item)
            size += len(item[1].record) if item[1] is not None else 0
            if size > _BATCH_BYTES:
                break
        return batch

    async def _put_contents(self, announced: Sequence[AnnounceFile]) -> None:
        """Store the contents that records announce. Raises EngineRefused: the cluster has no room for one."""
        for some in batched(announced, _CONTENTS_AT_ONCE):
            with ungrouped():
                async with asyncio.TaskGroup() as group:
                    for file in some:
                        group.create_task(self._put_content(file))

    async def _put_content(self, announced: AnnounceFile) -> None:
        """Store a content from the worker's link to it, or else from its file.

        Only one that was rewritten in place since, by hand, is omitted: a later record has the new one.
        """
        link = self._paths.announced / announced.digest.hex()
        for source in (link, self._paths.lattice / announced.path):
            with contextlib.suppress(OSError):
                while True:
                    try:
                        is_stored = await self._engine.put_content(announced.digest, announced.size, source)
                        break
                    except EngineUnavailable:
                        await asyncio.sleep(_POLL_S)
                if is_stored:
                    link.unlink(missing_ok=True)
                    return
        _log.info("%s: %s has changed since it was announced", self.slug, announced.path)

    def _lose(self, why: str, *, is_full: bool = False) -> None:
        """Follow from now on: the worker restarts, and unanswered requests go to the next owner.

        If the engine is full, those that no owner has had before are refused: none of them is in the stream (I6).
        """
        if not self._is_owner:
            return
        _log.warning("%s: this node no longer owns the project: %s", self.slug, why)
        self._leave()
        self._is_owner, self._held = False, None
        self._owns.clear()
        unanswered = self.project.step_down()
        self._drop_pending()
        for job in unanswered:
            message = job.message
            if not isinstance(message, ForwardedRequest):
                continue  # given up here: the client asks again, and learns the outcome
            if is_full and message.first_sent_at is None and not job.suspect:
                for requester in job.requesters:
                    self._forward.refuse(requester, message, job.on_result, "REMOTE_STORAGE", why)
                continue
            first = message.first_sent_at or time.time() - (time.monotonic() - job.submitted_at)
            for requester in job.requesters:
                self.forward(msgspec.structs.replace(message, first_sent_at=first), requester, job.on_result)
        self._stop("append")
        self._stop("renew")

    def _leave(self) -> None:
        """Note, before the journal is compared with the stream, which of its records are in it: these are never cut."""
        self._save_cursor(now=True)
        self._is_ready = False

    def _drop_pending(self) -> None:
        """Drop the outcomes that were not appended; deliver the other messages."""
        pending = list(self._pending)
        self._pending.clear()
        for deliver, done in pending:
            if done is None:
                deliver()

    def _restart(self) -> None:
        """Restart the worker, to align it with the stream again."""
        self._leave()
        self.project.step_down()

    # --- tasks ---

    def _start(self, name: str, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name=f"{name} {self.slug}")
        self._tasks[name] = task
        task.add_done_callback(partial(self._ended, name))

    def _stop(self, name: str) -> None:
        task = self._tasks.pop(name, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(name) is task:
            del self._tasks[name]
        if task.cancelled() or (error := task.exception()) is None or self._is_closed:
            return
        if isinstance(error, TooOld):
            self.copy_missing(str(error))
        elif isinstance(error, StreamLost):
            self._order_lost(error)
            return
        else:
            _log.error("%s: %s ended: %s", self.slug, name, error, exc_info=error)
        if self._is_owner:
            self._lose(str(error))
        else:
            self._restart()
