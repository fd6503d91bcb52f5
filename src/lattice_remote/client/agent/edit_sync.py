"""Sending of edited plans and notes, and settling of the answers (I4).

Each difference is judged first (``cache/evidence``): damage is restored, doubtful edits are withheld for the user.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from lattice_remote.client.agent_runtime import new_request_id
from lattice_remote.client.cache.edits import Sent, is_being_written
from lattice_remote.client.cache.evidence import EDIT, Judgement, Repository, takes_away
from lattice_remote.client.cache.replicator import Replicator
from lattice_remote.client.connection.connection import Connection
from lattice_remote.client.connection.pool import ConnectionPool
from lattice_remote.errors import ConnectionFailed, Rejected, RemoteError, StorageError
from lattice_remote.files import Signature
from lattice_remote.protocol.messages import Put, Refused, Stored
from lattice_remote.protocol.operations import digest_of

__all__ = ["EditSender", "EditWatcher", "RewriteRun", "SentEdits"]

_LONG_BASE_BYTES = 16 * 1024
SAVING_S = 2.0
"""Longest wait for a file that is being written or was just emptied by an editor."""
_POLL_S = 0.02
_MANY_REWRITTEN = 20
"""If more texts than this lose or change lines in one run, a program is assumed to have done it."""
_RUN_PAUSE_NS = 2_000_000_000
"""Longest pause of a program between two files that it rewrites."""
_LEAST_FREE_BYTES = 1 << 20
"""With less free space on its disk, an editor's save may be truncated."""


@dataclass(slots=True)
class SentEdits:
    sent: list[dict[str, str]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def refused(self) -> bool:
        return any(sent["outcome"] == "refused" for sent in self.sent)


class RewriteRun:
    """Texts rewritten one after another, as by a slow program.

    Status change times (ns) decide, so a slow agent does not end a run. A text saved again does not prolong it: a
    program rewrites each text once.
    """

    def __init__(self) -> None:
        self._changed_at: dict[str, int] = {}

    def count_with(self, changed_at: Mapping[str, int]) -> int:
        """Return the run's number of texts with these; a longer pause starts a new run."""
        if self._changed_at and changed_at:
            pause_ns = min(changed_at.values()) - max(self._changed_at.values())
            if pause_ns > _RUN_PAUSE_NS:
                self._changed_at.clear()
        return len(self._changed_at.keys() | changed_at.keys())

    def extend(self, changed_at: Mapping[str, int]) -> None:
        self._changed_at = {**changed_at, **self._changed_at}


class EditSender:
    """Sender of one cache's edits, one at a time.

    ``reached`` waits until the files hold every change up to a number, and returns whether they do.
    """

    def __init__(
        self, replicator: Replicator, connection: Connection, reached: Callable[[int], Awaitable[bool]]
    ) -> None:
        self._replicator = replicator
        self._connection = connection
        self._reached = reached
        self._turn = asyncio.Lock()
        self._unanswered = replicator.edits.unanswered
        self._run = RewriteRun()  # texts that lost lines and were sent unasked
        self._noted: dict[str, Signature | None] = {}  # saves recorded while they could not be sent
        self._refused: dict[str, tuple[Signature | None, str, object]] = {}  # path -> signature, reason, server

    def refused(self) -> dict[str, str]:
        return {path: why for path, (found, why, _) in self._refused.items() if self._signature(path) == found}

    async def push(
        self, connection: Connection, paths: Iterable[str] | None = None, *, again: bool = False, confirm: bool = False
    ) -> SentEdits:
        """Send the edits of these files (None: all); restore files that are not edits.

        A refused edit is sent again once it or the server has changed, or with ``again``. With ``confirm`` every
        difference is an edit.

        Raises:
            StorageError: the disk is full.
            RemoteError: unreachable, or the token is refused; unsent edits are kept.
        """
        pushed = SentEdits()
        async with self._turn:
            edited: list[str] = []
            for path in self._replicator.edits.scan() if paths is None else paths:
                if not again and self._is_hopeless(path):
                    continue
                await self._until_saved(path)
                if not self._replicator.edits.is_edited(path):
                    continue
                self._require_room()
                if (before := self._unanswered.get(path)) is not None:
                    await self._settle_unanswered(connection, before)
                    if not self._replicator.edits.is_edited(path):
                        pushed.sent.append({"path": path, "outcome": "unchanged"})
                        continue
                edited.append(path)
            if not edited:
                return pushed
            judged = await self._judge(edited, confirm=confirm, is_asked=paths is None or again)
            await self._restore(judged, pushed)
            await self._push_judged(connection, judged, pushed)
        return pushed

    async def note_saves(self, paths: Iterable[str]) -> None:
        async with self._turn:
            paths = [path for path in paths if self._noted.get(path) != self._signature(path)]
            if not paths:
                return
            self._require_room()
            judged = await self._judge([path for path in paths if self._replicator.edits.is_edited(path)])
            await self._record(judged)
            self._noted |= {path: self._signature(path) for path in paths}

    async def restore_damage(self) -> SentEdits:
        pushed = SentEdits()
        async with self._turn:
            edits = self._replicator.edits
            paths = [path for path in edits.scan() if edits.unanswered.get(path) is None]
            for path in paths:
                await self._until_saved(path)
            judged = await self._judge(path for path in paths if edits.is_edited(path))
            await self._restore(judged, pushed)
        return pushed

    def withheld(self) -> dict[str, str]:
        return self._replicator.edits.evidence.withheld()

    def notice(self) -> str | None:
        withheld = self.withheld()
        if not withheld:
            return None
        reason = Counter(withheld.values()).most_common(1)[0][0]
        if len(withheld) == 1:
            (path,) = withheld
            task = self._replicator.conflicts.name_of(path)
            return (
                f"not sent: {path}: {reason}; to send it: lattice remote push --confirm; to go back to the server's "
                f"text: lattice remote resolve {task} --theirs"
            )
        return (
            f"not sent: {len(withheld)} edits, for example {min(withheld)}: {withheld[min(withheld)]}; see: lattice "
            "remote status; to send them: lattice remote push --confirm; to restore the server's texts: lattice "
            "remote resolve --all --theirs"
        )

    def _require_room(self) -> None:
        """Raise StorageError without room on the disk: a truncated save looks like an edit.

        The edited files are checked for truncated saves once there is room.
        """
        directory = self._replicator.cache.directory
        try:
            found = os.statvfs(directory)
        except (OSError, AttributeError):
            return
        if found.f_bavail * found.f_frsize < _LEAST_FREE_BYTES:
            edits = self._replicator.edits
            edits.evidence.cramped.update((path, self._signature(path)) for path in edits.scan())
            raise StorageError(f"the disk of {directory} is full: edits are not sent until there is room again")

    async def _judge(
        self, paths: Iterable[str], *, confirm: bool = False, is_asked: bool = True
    ) -> dict[str, tuple[Signature, Judgement]]:
        """Classify edited files (with ``confirm`` all as edits) and withhold doubtful ones."""
        edits = self._replicator.edits
        judged: dict[str, tuple[Signature, Judgement]] = {}
        repository = Repository(self._replicator.cache.directory)
        paths = list(paths)
        blobs = {} if confirm else await asyncio.to_thread(repository.blobs, paths)
        rewritten: dict[str, int] = {}  # path -> status change time
        for path in paths:
            if (found := self._signature(path)) is None:
                continue
            text = self._replicator.cache.read(path)
            if confirm:
                judged[path] = found, EDIT
            elif (reason := edits.evidence.withheld_reason(path, text)) is not None:
                judged[path] = found, Judgement("withheld", reason)
            else:
                judged[path] = found, edits.judge(path, text, found, blobs.get(path))
                is_new_edit = judged[path][1] == EDIT and not edits.evidence.is_saved(path, text)
                if is_new_edit and takes_away(edits.base(path), text):
                    rewritten[path] = found[3]
        if are_many := self._run.count_with(rewritten) > _MANY_REWRITTEN:
            why = "it was changed together with many others, as by a formatter"
            judged |= {path: (judged[path][0], Judgement("withheld", why)) for path in rewritten}
        if are_many or not is_asked:  # the last files of a formatter may come in a batch of their own
            self._run.extend(rewritten)
        await self._withhold(judged)
        return judged

    async def _withhold(self, judged: dict[str, tuple[Signature, Judgement]]) -> None:
        evidence = self._replicator.edits.evidence
        waiting = [(path, each.reason) for path, (_, each) in judged.items() if each.outcome == "withheld"]
        if waiting and evidence.withheld().keys() != {path for path, _ in waiting}:
            await self._replicator.withhold(waiting)

    async def _record(self, judged: dict[str, tuple[Signature, Judgement]]) -> None:
        evidence, cache = self._replicator.edits.evidence, self._replicator.cache
        saves = []
        for path, (found, judgement) in judged.items():
            if judgement == EDIT and self._signature(path) == found:
                text = cache.read(path)
                saves += [] if evidence.is_saved(path, text) else [(path, text)]
        if saves:
            await self._replicator.record(saves)

    async def _restore(self, judged: dict[str, tuple[Signature, Judgement]], pushed: SentEdits) -> None:
        without_text = defaultdict(list)
        for path, (found, judgement) in judged.items():
            if judgement.outcome == "restored":
                done = await self.restore(path, found, reason=f"restored to the server's text: {judgement.reason}")
                if done is False:
                    without_text[judgement.reason].append(path)
        for reason, paths in without_text.items():
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            pushed.notices.append(f"{paths[0]}{more}: restored to the server's text: {reason}")

    async def restore(self, path: str, found: Signature | None = None, *, reason: str | None) -> bool | None:
        """Replace a file that is not to be sent with the server's text; rescue its text for a ``reason``.

        Returns whether a text was rescued; None if the file cannot be restored now.
        """
        found = found or self._signature(path)
        if found is None:
            return None
        done = await self._replicator.restore(path, found, reason)
        if done is None:
            return None
        outcome, is_kept = done
        await self._connection.carry_out(outcome)
        return is_kept

    async def _push_judged(
        self, connection: Connection, judged: dict[str, tuple[Signature, Judgement]], pushed: SentEdits
    ) -> None:
        for path, (found, judgement) in judged.items():
            if judgement != EDIT or self._signature(path) != found:  # a newer save is judged on its own
                continue
            try:
                outcome, notice = await self._send(connection, path)
            except RemoteError:
                await self._record(judged)
                raise
            pushed.sent.append({"path": path, "outcome": outcome})
            if notice:
                pushed.notices.append(notice)

    async def _send(self, connection: Connection, path: str) -> tuple[str, str | None]:
        found, base = self._signature(path), self._replicator.edits.base(path)
        text = self._replicator.cache.read(path)
        put = Put(id=new_request_id(), path=path, base=self._replicator.edits.base_of(path, text), text=text)
        answer = await self._ask_briefly(connection, put, base, is_edit=True)
        if isinstance(answer, Refused):
            self._unanswered.forget(path)
            return self._note_refusal(path, found, answer.message)
        self._refused.pop(path, None)
        copy = await self._settle(connection, put, answer, base)
        if copy is not None:
            return "conflict", None  # every command says so until it is resolved
        if put.base != base:
            return answer.outcome, (
                f"{path} was saved from an older version, and others' changes were merged into it: reload it in your "
                "editor (to remove others' lines, remove them again)"
            )
        return answer.outcome, None

    async def _settle(self, connection: Connection, put: Put, answer: Stored, base: bytes | None) -> str | None:
        if connection is not self._connection:
            # The file must still be edited when its own change arrives: an older change, merged with it, may come
            # first.
            await self._reached(answer.seq)
        effects, copy = await self._replicator.settle(put, answer.outcome, base)
        self._unanswered.forget(put.path)
        await self._connection.carry_out(effects)
        return copy

    async def _settle_unanswered(self, connection: Connection, sent: Sent) -> None:
        """Fetch the outcome of an edit whose answer was lost: later saves build on it."""
        answer = await self._ask(connection, sent.frame, sent.first_sent_at(), is_kept=True)
        if isinstance(answer, Stored):
            await self._settle(connection, sent.put, answer, sent.base)
        else:
            self._unanswered.forget(sent.put.path)

    async def put(self, connection: Connection, path: str, text: bytes) -> str:
        """Send a text based on the server's as it is here; return the outcome. Raises RemoteError.

        The file is the server's again then, unless it is edited.
        """
        async with self._turn:
            await self.until_in_place(path)
            base = self._replicator.edits.base(path)
            put = Put(id=new_request_id(), path=path, base=base, text=text)
            answer = await self._ask_briefly(connection, put, base)
            if isinstance(answer, Refused):
                raise Rejected(f"{path} was not sent: {answer.message}", code=answer.code)
            await self._reached(answer.seq)
        return answer.outcome

    async def until_in_place(self, path: str) -> None:
        """Wait briefly until a plan or notes holds the server's text, or an edit of it.

        Raises:
            Rejected: after a conflict, file and base may still be the version that was copied.
        """
        if not await self.are_in_place([path]):
            raise Rejected(
                f"the server's text of {path} has not arrived yet; nothing was changed: if the file is open in an "
                "editor, close it, then repeat",
                code="REMOTE_BUSY",
            )

    async def are_in_place(self, paths: Iterable[str]) -> bool:
        """Wait briefly until the server's texts, or edits of them, are in place; return whether they are."""
        expected = set(paths)
        return await self._connection.changed.until(
            lambda: expected.isdisjoint(self._replicator.replica.missing), SAVING_S
        )

    async def _ask_briefly(
        self, connection: Connection, put: Put, current: bytes | None, *, is_edit: bool = False
    ) -> Stored | Refused:
        """Send the request with the digest of a long base, recorded until its answer is settled."""
        frame = _brief(put, current)
        while True:
            if is_edit:
                self._unanswered.remember(Sent(put, frame, current, time.time()))
            answer = await self._ask(connection, frame, is_kept=is_edit)
            if frame is put or not isinstance(answer, Refused) or answer.code != "REMOTE_STALE_BASE":
                return answer
            frame = put

    async def _ask(
        self, connection: Connection, put: Put, first_sent_at: float | None = None, *, is_kept: bool = False
    ) -> Stored | Refused:
        answer = await connection.send_request(put, first_sent_at=first_sent_at, is_kept=is_kept)
        if not isinstance(answer, Stored | Refused):
            raise ConnectionFailed("unexpected response from the server", sent=True)
        return answer

    # --- files that cannot be sent yet ---

    async def _until_saved(self, path: str) -> None:
        deadline = time.monotonic() + SAVING_S
        while time.monotonic() < deadline and self.is_being_saved(path):  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(_POLL_S)

    def is_being_saved(self, path: str) -> bool:
        found = self._signature(path)
        if found is None:
            return False
        mtime_ns, size = found[0], found[1]
        if not size and 0 <= time.time_ns() - mtime_ns < SAVING_S * 1e9:
            return bool(self._replicator.edits.base(path))
        return is_being_written(self._replicator.cache.absolute(path))

    def _is_hopeless(self, path: str) -> bool:
        refused = self._refused.get(path)
        return refused is not None and (refused[0], refused[2]) == (self._signature(path), self._connection.welcome)

    def hopeless(self) -> set[str]:
        """Return the files whose refused edit the present connection would refuse again."""
        return {path for path in self._refused if self._is_hopeless(path)}

    def _note_refusal(self, path: str, found: Signature | None, why: str) -> tuple[str, str]:
        self._refused[path] = (found, why, self._connection.welcome)
        task = self._replicator.conflicts.name_of(path)
        return "refused", (
            f"{path} was not sent: {why}; to restore the server's text and keep yours for lattice remote rescued: "
            f"lattice remote resolve {task} --theirs"
        )

    def _signature(self, path: str) -> Signature | None:
        return self._replicator.cache.signature(path)


def _brief(put: Put, current: bytes | None) -> Put:
    if put.base is None or put.base != current or len(put.base) < _LONG_BASE_BYTES:
        return put
    return msgspec.structs.replace(put, id=new_request_id(), base=None, base_digest=digest_of(put.base))


QUIET_S = 0.1
"""A file unchanged for this long counts as saved."""
LONGEST_SAVE_S = 30.0
"""A file kept open for longer is sent as it is."""
_QUIET_POLL_S = 0.04
_RETRY_S = 1.0
_FETCH_INTERVAL_S = 0.5
_BURST = 3
"""With more files edited at once, a program may still be at work: wait for it."""
_BURST_QUIET_S = 1.0
_BURST_POLL_S = 0.25
_log = logging.getLogger(__name__)


class _Seen:
    __slots__ = ("at", "began", "signature")

    def __init__(self, signature: Signature | None, now: float) -> None:
        self.signature = signature
        self.at = now
        """Unchanged since then."""
        self.began = now


class EditWatcher:
    """Unrequested edits of one cache, sent while ``run()`` runs."""

    def __init__(self, replicator: Replicator, pool: ConnectionPool, edit_sender: EditSender) -> None:
        self._replicator = replicator
        self._pool = pool
        self._edit_sender = edit_sender
        self._seen: dict[str, _Seen] = {}
        self._is_scan_due = False
        self._wake = asyncio.Event()
        self.notices: list[str] = []

    def touched(self, paths: Iterable[str] | None) -> None:
        now = time.monotonic()
        self._is_scan_due |= paths is None
        for path in paths or ():
            if path not in self._seen:
                self._seen[path] = _Seen(self._replicator.cache.signature(path), now)
        self._wake.set()

    async def run(self) -> None:
        """Send edits until cancelled, waiting out errors."""
        while True:
            try:
                await self._pause()
                await self._push_saved()
                await self._fetch_unedited()
            except RemoteError:
                await asyncio.sleep(_RETRY_S)  # the connection and the next command report it
            except Exception:  # noqa: BLE001 - a defect of ours must not end this silently
                _log.exception("sending the edits of %s failed", self._replicator.cache.directory)
                await asyncio.sleep(_RETRY_S)

    async def _pause(self) -> None:
        if self._is_scan_due:
            self._look_for_unreported_edits()
            self._is_scan_due = False
        if self._seen:
            await asyncio.sleep(_QUIET_POLL_S)
            return
        self._wake.clear()
        is_waiting = bool(self._replicator.replica.blocked or self._edit_sender.refused())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FETCH_INTERVAL_S if is_waiting else None):
                await self._wake.wait()
        # After a reconnection the server, or the token's rights, may be others.
        self._is_scan_due |= bool(self._edit_sender.refused().keys() - self._edit_sender.hopeless())

    async def _push_saved(self) -> None:
        saved = [path for path in self._seen if self._is_saved(path)]
        edited = [path for path in saved if self._is_edit(path)]
        for path in set(saved).difference(edited):
            del self._seen[path]
        if not edited:
            return
        self._look_for_unreported_edits()
        if self._is_burst():
            await asyncio.sleep(_BURST_POLL_S)
            return
        if not self._can_send():
            await self._edit_sender.note_saves(edited)
            await self._pool.following.changed.until(self._can_send, SAVING_S)
            return
        connection = self._pool.for_edits()
        assert connection is not None, "_can_send() says so, and nothing was awaited since"
        await self._push(connection, edited, {path: self._seen.pop(path) for path in edited})

    def _look_for_unreported_edits(self) -> None:
        """Take in edits reported late, before the first file of a burst is sent."""
        known = self._seen.keys() | self._edit_sender.withheld().keys() | self._edit_sender.hopeless()
        self.touched(path for path in self._replicator.edits.scan() if path not in known)

    def _is_burst(self) -> bool:
        """Return whether a program seems to be changing many files still."""
        now, seen = time.monotonic(), self._seen.values()
        quiet_s = now - max(each.at for each in seen)
        lasts_s = now - min(each.began for each in seen)
        return len(seen) > _BURST and quiet_s < _BURST_QUIET_S and lasts_s < LONGEST_SAVE_S

    async def _push(self, connection: Connection, edited: list[str], seen: dict[str, _Seen]) -> None:
        try:
            pushed = await self._edit_sender.push(connection, edited)
        except BaseException:
            self._seen = seen | self._seen
            raise
        self.notices += [notice for notice in pushed.notices if notice not in self.notices]

    def _is_edit(self, path: str) -> bool:
        """Return whether there is an edit to send; files of no task are not."""
        return self._replicator.edits.is_edited(path) and not self._replicator.writer.is_orphan(path)

    def _can_send(self) -> bool:
        connection = self._pool.for_edits()
        return self._replicator.is_following and connection is not None and not connection.is_refused

    def _is_saved(self, path: str) -> bool:
        now, seen = time.monotonic(), self._seen[path]
        found = self._replicator.cache.signature(path)
        if found != seen.signature:
            seen.signature, seen.at = found, now
            return False
        if now - seen.at < QUIET_S:
            return False
        return now - seen.began > LONGEST_SAVE_S or not self._edit_sender.is_being_saved(path)

    async def _fetch_unedited(self) -> None:
        await self._pool.following.carry_out(await self._replicator.look_at_edits())
