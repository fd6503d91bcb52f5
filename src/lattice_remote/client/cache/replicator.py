"""Application of a project's changes to a cache: runs the replica and performs its effects on the files.

Several processes may follow one cache. Each locks it for every batch of frames, takes over their progress, and skips
what is already in the files. A resync runs entirely under the lock, so that the others find it done.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from lattice_remote import __version__
from lattice_remote.client.cache.cache import STATE_FILE, Cache, CacheState
from lattice_remote.client.cache.edits import Edits, TextConflicts
from lattice_remote.client.cache.effect_writer import EffectWriter
from lattice_remote.client.cache.rescued_files import RESTORED, RescuePolicy
from lattice_remote.client.cache.verify import CacheComparison, Reading, RepairSchedule, compare_files, take_readings
from lattice_remote.errors import ConnectionFailed, StorageError
from lattice_remote.files import Signature
from lattice_remote.protocol.messages import Change, ClientFrame, Hello, Part, Parts, Put, Response, ServerFrame
from lattice_remote.protocol.operations import Content
from lattice_remote.protocol.paths import is_payload
from lattice_remote.protocol.replica import (
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

__all__ = ["ReceiveOutcome", "Replicator", "RequestOnlySession"]

_LOOK_AGAIN_S = 1.0
_SAVE_EVERY_S = 1.0
_SAVES_PART = 0.05
"""Interval of storing the state while files arrive; longer if that would take more than this part of the time."""
_MAX_OWN_REQUESTS = 256
_STORE_AGE_TIMEOUT_S = 1.0
"""Longest wait for the lock; the cache's other work waits too."""


@dataclass(slots=True)
class ReceiveOutcome:
    to_send: list[ClientFrame] = field(default_factory=list)
    answers: list[Response] = field(default_factory=list)
    applied: bool = False
    """Whether files and state were written."""


class RequestOnlySession:
    """Session that only sends requests, for a further token."""

    def __init__(self) -> None:
        self.replica = Replica(follow=False)

    @property
    def is_current(self) -> bool:
        return self.replica.welcome is not None

    async def hello(self) -> Hello:
        return self.replica.hello(client_version=__version__, lattice_version=version("lattice-tracker"))

    async def receive(self, frames: Iterable[ServerFrame]) -> ReceiveOutcome:
        outcome = ReceiveOutcome()
        for frame in frames:
            outcome.answers += [e.frame for e in self.replica.receive(frame) if isinstance(e, DeliverReply)]
        return outcome

    async def disconnected(self) -> None:
        self.replica.disconnected()


class Replicator:
    """Follower of one cache, driven by one connection."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.edits = Edits(cache)
        self.conflicts = TextConflicts(cache, self.edits)
        self.rescue_policy = RescuePolicy(cache)
        self.repairs = RepairSchedule()
        self.writer = EffectWriter(cache, self.edits, self.rescue_policy, self.repairs)
        """Performs the replica's operations on the files."""
        self.replica = Replica()
        self.state = cache.load_state()
        """The stored state, as far as this process knows."""
        self.current_at = self.state.current_at
        """Last time at which the files were known to be current (seconds since 1970)."""
        self.advanced = asyncio.Event()
        """Set whenever the files reach another sequence number."""
        self.advanced_at: float | None = None
        """Monotonic time of that; None if another process did it, or before the first time."""
        self.trouble: StorageError | None = None
        """Reason why the files cannot be written, while it lasts."""
        self.resyncs = 0
        """Number of resyncs."""
        self.own_requests: deque[str] = deque(maxlen=_MAX_OWN_REQUESTS)
        """Ids of this cache's newest requests, to recognize its own changes."""
        self.on_change: Callable[[str, Change], None] = lambda _epoch, _change: None
        """Called with the epoch and each change that has been received, after its batch."""
        self.received = 0
        """Parts of files received: shows that a long fill advances."""
        self._stored: Signature | None = None
        self._save_again_at = 0.0  # monotonic
        self._is_unsaved = False  # whether files have arrived since
        self._resync_lock = contextlib.AsyncExitStack()
        self._resyncing = False
        self._to_fetch = 0
        self._mutex = asyncio.Lock()
        self._comparing: asyncio.Future[CacheComparison] | None = None
        self._earlier: Mapping[str, Reading] | None = None
        self._deferred_signatures: dict[str, Signature] = {}
        """Contents of artifacts that another program wrote and that the fetching deals with, as they were then."""

    @property
    def is_current(self) -> bool:
        return self.replica.is_current

    @property
    def is_following(self) -> bool:
        """Return whether changes are applied and files can be requested."""
        return self.replica.state is State.FOLLOWING

    @property
    def is_busy(self) -> bool:
        """Return whether it is slow because of the files, not stalled."""
        return self._mutex.locked()

    def progress(self) -> tuple[int, int] | None:
        missing = len(self.replica.missing) - len(self.replica.blocked)
        if self.replica.state is not State.FOLLOWING or not missing or not self._to_fetch:
            return None
        return max(0, self._to_fetch - missing), self._to_fetch

    # --- session ---

    async def hello(self) -> Hello:
        async with self._mutex, self.cache.locked():
            self.cache.prepare()
            self._load()
        return self.replica.hello(client_version=__version__, lattice_version=version("lattice-tracker"))

    async def receive(self, frames: Sequence[ServerFrame]) -> ReceiveOutcome:
        """Apply frames in order.

        Raises:
            StorageError: the cache cannot be written; the stored position stays behind the files.
            ConnectionFailed: another process has moved the cache on; greet again.
        """
        async with self._mutex, self.cache.locked():
            work = self._receive_or_disconnect(frames)
            return await (_uninterrupted(work) if _are_files(frames) else work)

    async def _receive_or_disconnect(self, frames: Sequence[ServerFrame]) -> ReceiveOutcome:
        try:
            outcome = await self._receive(frames)
        except BaseException as error:
            self.trouble = error if isinstance(error, StorageError) else None
            self._is_unsaved = False
            self.replica.disconnected()  # its state may be ahead of the files now
            raise
        finally:
            self.cache.known.share()
        self.trouble = None if outcome.applied else self.trouble
        return outcome

    async def _go_on(self, outcome: ReceiveOutcome) -> None:
        # If this fails, the next batch fails too and ends the connection.
        with contextlib.suppress(ConnectionFailed):
            await self._perform([*self._catch_up_with_others(), *self._release_settled()], outcome)

    async def _receive(self, frames: Sequence[ServerFrame]) -> ReceiveOutcome:
        outcome = ReceiveOutcome()
        save = await self._perform([*self._catch_up_with_others(), *self._release_settled()], outcome)
        for frame in frames:
            save |= await self._perform(self.replica.receive(frame), outcome)
        if save:
            self._is_unsaved = self._may_save_later(frames)
            if not self._is_unsaved:
                self._save()
            outcome.applied = True
        for frame in frames:
            if isinstance(frame, Change) and self.replica.welcome is not None:
                self.on_change(self.replica.welcome.epoch, frame)
        self.heard()
        await self._keep_others_out_while_resyncing()
        return outcome

    async def disconnected(self) -> None:
        async with self._mutex:
            try:
                if self._is_unsaved:
                    with contextlib.suppress(StorageError):
                        await self._save_at_end()
            finally:
                self.replica.disconnected()
                self._fail_comparison()
                self._resyncing = False
                self.rescue_policy.reason = RESTORED
                self.writer.misfits.clear()
                self.cache.forget_parts()
                await self._resync_lock.aclose()
        with contextlib.suppress(StorageError):
            await self.store_age()

    async def _save_at_end(self) -> None:
        async with self.cache.locked(_STORE_AGE_TIMEOUT_S):
            self._is_unsaved = False
            if not self._changed_by_others():
                self._save()

    async def store_known(self) -> None:
        if self.cache.known.is_complete and self.cache.is_there():
            async with self._mutex, self.cache.locked(_STORE_AGE_TIMEOUT_S):
                self.cache.store_known()

    def heard(self) -> None:
        if self.replica.is_current:
            self.current_at = time.time()

    async def store_age(self) -> None:
        if self._changed_by_others():
            return  # another process is using it, or it is being removed and must not be written to
        async with self._mutex, self.cache.locked(_STORE_AGE_TIMEOUT_S):
            if self._stored is not None and not self._changed_by_others():
                self._store(replace(self.state, current_at=self.current_at))

    def _fail_comparison(self) -> None:
        if self._comparing is not None and not self._comparing.done():
            self._comparing.set_exception(ConnectionFailed("the connection was lost while the files were compared"))
            self._comparing.exception()  # marks the error as retrieved, in case no task awaits it
        self._comparing = None

    # --- edits and comparisons ---

    async def settle(self, put: Put, outcome: str, base: bytes | None) -> tuple[ReceiveOutcome, str | None]:
        """Settle an edit that the server has answered.

        ``base`` is the file's base when the edit was sent; the base sent may be older. If it has changed since, the
        edit's own change has arrived.

        Returns:
            What to send, and for a conflict the place of the local text.
        """
        result, copy, path = ReceiveOutcome(), None, put.path
        async with self._mutex, self.cache.locked():
            await self._go_on(result)
            self.edits.evidence.settled(path, put.text)
            if self.edits.base(path) != base:
                pass
            elif outcome != "conflict" and put.base == base:
                self.edits.sent(path, put.text)
            elif self.replica.state is State.FOLLOWING and self.cache.size(path) is not None:
                self.replica.block(path)
                self._save()  # store that the server's text is missing before the edit looks sent
                if put.base != base:
                    self.edits.older.forget(path)
                if outcome == "conflict":
                    copy = self.conflicts.begin(path)
                else:
                    self.edits.sent(path, put.text)
            if self.replica.state is State.FOLLOWING and await self._perform(self.replica.unblock([path]), result):
                self._save()
        return result, copy

    async def record(self, saves: list[tuple[str, bytes]]) -> None:
        """Record these texts, by path, as a person's saves; durable on return."""
        async with self._mutex, self.cache.locked():
            await _uninterrupted(asyncio.to_thread(self.edits.evidence.record, saves))

    async def withhold(self, edits: list[tuple[str, str]]) -> None:
        """Withhold these files' texts, each with a reason; durable on return."""
        async with self._mutex, self.cache.locked():
            texts = [(path, self.cache.read(path), why) for path, why in edits if self.cache.size(path) is not None]
            await _uninterrupted(asyncio.to_thread(self.edits.evidence.withhold, texts))

    async def restore(self, path: str, found: Signature, reason: str | None) -> tuple[ReceiveOutcome, bool] | None:
        """Replace a plan or notes that is not to be sent with the server's text.

        Args:
            reason: rescue the local text for this; None to drop it.

        Returns:
            What to send, and whether a text was rescued; None if the file has changed or cannot be fetched.
        """
        result, is_kept = ReceiveOutcome(), False
        async with self._mutex, self.cache.locked():
            await self._go_on(result)
            if self.replica.state is not State.FOLLOWING or self.cache.signature(path) != found:
                return None
            text = self.cache.read(path)
            if reason is not None:
                is_kept = self.rescue_policy.keep_text(path, reason)
            self.replica.block(path)
            self._save()  # store that the server's text is missing before the file looks like its base
            self.edits.give_up(path, text)
            self.edits.evidence.settled(path, text)
            if await self._perform(self.replica.unblock([path]), result):
                self._save()
        return result, is_kept

    async def look_at_edits(self) -> ReceiveOutcome:
        """Fetch files whose edit is gone: undone, or sent by another process."""
        result = ReceiveOutcome()
        if self.replica.blocked:
            async with self._mutex, self.cache.locked():
                await self._go_on(result)
        return result

    async def repair(self, paths: Iterable[str]) -> ReceiveOutcome:
        result = ReceiveOutcome()
        async with self._mutex, self.cache.locked():
            self.cache.prepare()
            await self._go_on(result)
            strange = [path for path in paths if self.writer.is_strange(path)]
            new = [path for path in strange if path not in self.replica.missing] if self.is_following else []
            self.repairs.suspect(set(strange).difference(new), delay_s=_LOOK_AGAIN_S)
            for path in new:
                self.repairs.strange[path] = self.cache.signature(path), self.cache.digest(path)
            if new:
                await self._perform(self.replica.drifted(self._defer(new)), result)
                self._save()
        return result

    def _defer(self, paths: Iterable[str]) -> list[str]:
        """Defer the contents of artifacts; return the other paths."""
        apart = [path for path in paths if self.replica.defers and is_payload(path)]
        for path in apart:
            found = self.cache.signature(path)
            if path in self.replica.deferred and self._deferred_signatures.get(path) == found is not None:
                continue  # its fetching takes care of it
            self.replica.defer(path)
            if found is None:
                self.cache.note(path)
            else:  # stays strange: it is rescued before it is replaced or removed
                self._deferred_signatures[path] = found
        return [path for path in paths if path not in apart]

    async def compare(
        self, *, repair: bool, earlier: Mapping[str, Reading] | None = None
    ) -> tuple[ReceiveOutcome, "asyncio.Future[CacheComparison]"]:
        """Request the manifest; the future returns the differences, with ``repair`` those repaired.

        Raises:
            ConnectionFailed: the connection is lost; the future raises it too.
        """
        result = ReceiveOutcome()
        async with self._mutex:
            if self.replica.state not in (State.FOLLOWING, State.COMPARING):
                raise ConnectionFailed("the connection was lost before the files were compared")
            if self._comparing is None:
                self._comparing = asyncio.get_running_loop().create_future()
            self._earlier = earlier
            await self._perform(self.replica.compare(repair=repair), result)
            return result, self._comparing

    # --- deferred contents ---

    async def learned(self, path: str, content: Content, seq: int) -> None:
        async with self._mutex, self.cache.locked():
            await self._go_on(ReceiveOutcome())
            if self.is_following and self.replica.learned(path, content, seq):
                self._save()

    async def arrived(self, path: str, content: Content, partial: str | None) -> bool:
        """Put a complete content in place from ``partial`` (None: already there); return whether it was missing."""
        async with self._mutex, self.cache.locked():
            await self._go_on(ReceiveOutcome())
            if not self.is_following or self.replica.deferred.get(path) != content:
                return False
            if partial is not None:
                self.writer.keep([path])
                self.cache.place(partial, path)
            else:
                self.cache.note(path)
            self.replica.here(path)
            self.writer.mark_synced([path])
            self._save()
            self.cache.known.share()
            return True

    async def vacate(self, path: str, content: Content) -> None:
        """Remove the old content of a file whose new one is not fetched."""
        if self.cache.size(path) is None:
            return
        async with self._mutex, self.cache.locked():
            await self._go_on(ReceiveOutcome())
            if self.is_following and self.replica.deferred.get(path) == content:
                self.writer.keep([path])
                self.cache.delete(path)
                self.cache.known.share()

    async def bring(self, path: str) -> ReceiveOutcome:
        result = ReceiveOutcome()
        async with self._mutex, self.cache.locked():
            await self._go_on(result)
            if self.is_following and path in self.replica.deferred:
                await self._perform(self.replica.drifted([path]), result)
                self._save()
        return result

    # --- effects ---

    async def _perform(self, effects: Iterable[Effect], outcome: ReceiveOutcome) -> bool:
        queue = deque(effects)
        save = False
        while queue:
            match queue.popleft():
                case ApplyChange(change=change, operations=operations):
                    self.edits.is_own = change.cause in self.own_requests
                    queue.extend(self.writer.apply(operations, self.replica))
                    self.edits.is_own = False
                case WritePart(part=part):
                    parts = [part]
                    while queue and isinstance(following := queue[0], WritePart):
                        parts.append(following.part)
                        queue.popleft()
                    self.received += len(parts)
                    queue.extend(await _uninterrupted(self.writer.write_parts(parts, self.replica)))
                case Remove(paths=paths):
                    for path in paths:
                        self.writer.remove(path, self.replica)
                case Compare() as compare:
                    queue.extend(await self._compare(compare))
                case Send(frame=frame):
                    outcome.to_send.append(frame)
                case DeliverReply(frame=answer):
                    outcome.answers.append(answer)
                case Save():
                    save = True
        return save

    async def _compare(self, compare: Compare) -> list[Effect]:
        compared = await compare_files(
            self.cache,
            self.edits,
            compare,
            self._earlier,
            may_defer=self.replica.may_defer,
            deferred=self.replica.deferred.keys(),
        )
        self._earlier = None
        comparison = compared.comparison
        if self._comparing is not None and not self._comparing.done():
            self._comparing.set_result(comparison)
        self._comparing = None
        if not compare.repair:
            return self.replica.verified()
        ours = compared.equal()
        if self.replica.position.epoch:  # the files should have been equal, except those being fetched
            for path in (*comparison.differing, *comparison.missing, *comparison.surplus):
                if path not in self.replica.missing:
                    reading = compared.readings.get(path)
                    self.repairs.strange[path] = (reading.signature, reading.digest) if reading else (None, None)
        elif self.replica.welcome is not None and self.replica.welcome.lost:
            self.rescue_policy.keep_lost(comparison.differing, comparison.surplus, compare.entries)
        if (
            not self.replica.position.epoch
        ):  # a difference is an earlier state, unless another program is known to have made it
            others = (*comparison.differing, *comparison.surplus)
            ours += [path for path in others if self._may_be_ours(path, compared.readings[path])]
        self.writer.on_edits(comparison.edited)
        self.cache.known.settle((path, compared.readings[path].signature) for path in ours)
        effects = self.replica.compared(compared.local, edited=comparison.edited)
        self._to_fetch = len(self.replica.missing)
        return effects

    def _may_be_ours(self, path: str, reading: Reading) -> bool:
        return not self.cache.known.is_complete or self.cache.known.agrees(path, reading.signature)

    # --- state ---

    def _load(self) -> None:
        self.cache.load_known()
        self._stored = self.cache.signature(STATE_FILE)
        self.state = self.cache.load_state()
        self.current_at = self.state.current_at
        self.replica = Replica(self.state.position, self.state.missing, deferred=self.state.deferred)
        self._to_fetch = self._to_fetch or len(self.state.missing)
        if not self.state.position.epoch and self._earlier is None:
            self._earlier = take_readings(self.cache)

    def _catch_up_with_others(self) -> list[Effect]:
        if self.replica.state is State.IDLE or not self._changed_by_others():
            return []
        self.cache.known.learn()
        found = self.cache.load_state()
        here = self.replica.position
        if found.position.epoch != here.epoch or found.position.seq < here.seq:
            raise ConnectionFailed("another process has reset this cache")
        self._stored = self.cache.signature(STATE_FILE)
        self.state = found
        if found.position != here:
            self.advanced_at = None
            self.advanced.set()
        is_same = found.position == here and found.deferred == self.replica.deferred
        if is_same and set(found.missing) == self.replica.missing.keys():
            return []  # only the stored age is new
        if self.replica.state is State.COMPARING:
            raise ConnectionFailed("another process has updated the cache during the comparison")
        return self.replica.fast_forward(found.position, found.missing, found.deferred)

    def _release_settled(self) -> list[Effect]:
        settled = [path for path in self.replica.blocked if not self.edits.is_in_use(path)]
        return self.replica.unblock(settled) if settled and self.replica.state is State.FOLLOWING else []

    def _changed_by_others(self) -> bool:
        return self.cache.signature(STATE_FILE) != self._stored

    def _may_save_later(self, frames: Sequence[ServerFrame]) -> bool:
        """Return whether the stored state is still valid: only files have arrived, which would be fetched again."""
        is_recent = time.monotonic() < self._save_again_at
        return is_recent and bool(self.replica.missing) and _are_files(frames)

    def _save(self) -> None:
        began = time.monotonic()
        self.heard()
        self._store(
            CacheState(self.replica.position, tuple(self.replica.missing), dict(self.replica.deferred), self.current_at)
        )
        took_s = time.monotonic() - began
        self._save_again_at = began + max(_SAVE_EVERY_S, took_s / _SAVES_PART)

    def _store(self, state: CacheState) -> None:
        if state.position != self.state.position:
            self.advanced_at = time.monotonic()
            self.advanced.set()
        self.state = state
        self._stored = self.cache.save_state(state)

    async def _keep_others_out_while_resyncing(self) -> None:
        """Hold the lock during a resync, so that others find it done."""
        if (
            self._resyncing
            and self.replica.state is State.FOLLOWING
            and len(self.replica.missing) == len(self.replica.blocked)
        ):
            self._resyncing = False
            self.rescue_policy.reason = RESTORED
            await self._resync_lock.aclose()
        elif not self._resyncing and self.replica.state is State.COMPARING and not self.replica.position.epoch:
            self._resyncing = True
            self.resyncs += 1
            await self._resync_lock.enter_async_context(self.cache.locked())


def _are_files(frames: Iterable[ServerFrame]) -> bool:
    return all(isinstance(frame, Part | Parts) for frame in frames)


async def _uninterrupted[T](work: Coroutine[Any, Any, T]) -> T:
    """Await work to its end even if cancelled: a thread goes on, so its lock must stay, and files count as received."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    finally:
        await asyncio.wait([task])
