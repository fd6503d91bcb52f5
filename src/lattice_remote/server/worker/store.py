"""Durable store of a project: tree, undo log and journal committed together (I1, I2, I5, I6).

Until a transaction's record is in the journal, a crash undoes it.
"""

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn, cast

import msgspec

from lattice_remote.errors import Rejected
from lattice_remote.files import write_atomically
from lattice_remote.protocol.messages import (
    MAX_FRAME_BYTES,
    Change,
    Refused,
    Reply,
    Result,
    Returned,
    decode_server_frame,
    encode,
)
from lattice_remote.protocol.operations import AnnounceFile, MoveFile, PutFile, digest_of, paths_of
from lattice_remote.protocol.paths import is_replicated
from lattice_remote.server.datadir import ProjectPaths
from lattice_remote.server.ipc import (
    HookCall,
    PathState,
    RequestDone,
    ResultStats,
)
from lattice_remote.server.journal.contents import is_snapshot
from lattice_remote.server.journal.ids import make_id
from lattice_remote.server.journal.journal import CommitJob, Committer, Journal, encode_record
from lattice_remote.server.journal.repair import files_of_task, grown_tasks, place_of, repair_task
from lattice_remote.server.journal.segment import Record, list_beside, remove_segments
from lattice_remote.server.tree.capture import AccessLog, Capture, Replacement
from lattice_remote.server.tree.tree import (
    FileState,
    ManifestFile,
    ProjectTree,
    SyncFailed,
    TreeDiff,
    TrustedDigest,
    encode_manifest,
    save_manifest,
    sync,
    sync_files,
)
from lattice_remote.server.tree.undo import Begin, UndoLog
from lattice_remote.server.worker.executor import ResourceBusy
from lattice_remote.server.worker.patches import LockTable
from lattice_remote.server.worker.policy import describe_paths

__all__ = [
    "ChangeOrigin",
    "ChangeTooLarge",
    "OutsideChange",
    "Store",
    "server_origin",
    "start_new_epoch",
]

_log = logging.getLogger(__name__)


_MAX_MOVED_BYTES = 8 * 1024 * 1024
"""Larger contents are not journalled: they would displace too much history."""
_MAX_ENCODED_BYTES = MAX_FRAME_BYTES - 64 * 1024
_MAX_SETTLED_FILES = 500
"""Read at the end of a worker, which must be quick."""
_MAX_LOCKED_TASKS = 64
"""More changed tasks come from a copied project, for example; they are not locked."""
_REPLY_RETENTION_S = 600.0
"""How long replies survive the end of their history."""


class ChangeTooLarge(Exception):
    pass


class OutsideChange(BaseException):
    """Another program has changed ``paths`` (relative), which the request is about to change: it must run again.

    No ``Exception``, so it passes a command's own error handling.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__(*paths)
        self.paths = paths


@dataclass(frozen=True)
class ChangeOrigin:
    """Origin of a change: a request (``id``) of a token, or the server."""

    id: str
    token_id: str
    actor: str
    cause: str
    command: str = ""
    token_actor: str = ""
    fingerprint: bytes = b""


def server_origin(cause: str) -> ChangeOrigin:
    return ChangeOrigin("", "", "server", cause)


class Store:
    """Durable state of one project.

    Raises OSError when the storage fails: then the process must end, and the next start recovers.
    """

    def __init__(
        self,
        journal: Journal,
        tree: ProjectTree,
        undo: UndoLog,
        capture: Capture,
        committer: Committer,
        *,
        boot_id: str,
        unsynced: Iterable[str] = (),
        is_member: bool = False,
    ) -> None:
        self.journal = journal
        self.tree = tree
        self.locks = LockTable(tree.root / "locks")
        self._undo = undo
        self._undo.before_first_changes = self._require_known
        self._undo.before_overwrite = self.write_ahead
        self._whole: set[str] = set()  # files whose whole content is in the newest segment
        self._unsynced = set(unsynced)
        self._capture = capture
        self._committer = committer
        self._boot_id = boot_id
        self.is_member = is_member
        """Whether this is a node of a cluster."""
        self.unwatched = capture.unwatched
        self._current = ("", time.perf_counter())
        self.is_keyed = False
        """Whether the running request's id is the caller's key; see ``Record``."""

    def begin_request(self, command: str, *, is_keyed: bool) -> None:
        self._current, self.is_keyed = (command, time.perf_counter()), is_keyed

    def make_id(self) -> str:
        return make_id(self.journal.epoch)

    def set_label(self, command: str) -> None:
        self._current = (command, self._current[1])

    @contextmanager
    def transaction(self) -> Iterator[AccessLog]:
        """Record accesses and pre-images in the block; ``commit`` or ``roll_back`` follows.

        Raises OutsideChange, with the block undone, before it changes a file with an outside change.
        """
        self._undo.begin(Begin(self.journal.epoch, self.journal.head + 1, self._boot_id))
        try:
            with self._capture.watch() as touched:
                yield touched
        except OutsideChange:
            self.roll_back()
            raise

    def _require_known(self, statuses: Mapping[str, os.stat_result | None]) -> None:
        """Raise ``OutsideChange`` if files are not as last numbered: the token would get the change (I13)."""
        prefix = self.tree.absolute("")
        changed = [
            relative
            for path, status in statuses.items()
            if not self.tree.is_as_known(relative := path.removeprefix(prefix), status) and is_replicated(relative)
        ]
        if changed:
            raise OutsideChange(changed)

    def replace_text(self, path: str, text: bytes) -> None:
        target = self.tree.absolute(path)
        directory, name = os.path.split(target)
        os.makedirs(directory, exist_ok=True)

        def announce(descriptor: int) -> None:
            self._undo.announce(target, Replacement(os.fstat(descriptor).st_ino, digest_of(text)))

        scratch = os.path.join(directory, f".tmp.edit.{name}")
        write_atomically(target, text, mode=0o666, temporary=scratch, sync=announce, is_parent_synced=False)

    def find_outside_changes(
        self, paths: Iterable[str] | None = None, *, trust_signatures: bool = True, rest: Sequence[str] = ()
    ) -> tuple[TreeDiff, bool]:
        """Return the differences of these files and their tasks' files (None: all), and whether a task was busy. With
        ``rest``, continue a scan that found too many.

        Files of tasks are compared under lattice's locks, so no half of a command is numbered, and stale snapshots are
        repaired first.
        """
        if paths is not None:
            paths = {file for path in paths for file in files_of_task(path)}
        found = self.tree.reconcile(paths, trust_signatures=trust_signatures, rest=rest)
        busy: set[str] = set()
        with contextlib.ExitStack() as held:
            grown = grown_tasks(self.tree, found)[:_MAX_LOCKED_TASKS]
            for task in grown:
                if held.enter_context(self.locks.trying(f"events_{task}", f"tasks_{task}")):
                    repair_task(self.tree, task)
                else:
                    busy |= {path for path in found.states if os.path.basename(path).startswith(f"{task}.json")}
            if grown:
                found = self.tree.reconcile(paths, trust_signatures=trust_signatures, rest=rest)
        return found.without(busy), bool(busy)

    def commit_outside_changes(self, paths: Iterable[str]) -> None:
        """Number the outside changes of files, and of their tasks' other files, apart from the running request.

        Raises Rejected: the disk is full; SyncFailed: it lost a content that the record refers to.
        """
        found, _ = self.find_outside_changes(paths)
        if not found.operations:
            self.adopt(found)
            return
        try:
            self.commit(found, server_origin("edit"), is_extra=True)
        except SyncFailed:
            raise
        except OSError as error:
            raise _cannot_journal(error) from error

    @contextmanager
    def applying(self) -> Iterator[None]:
        """Show readers that the tree is between two numbers."""
        self._undo.show_open()
        yield
        self._undo.clear(self.journal.head)

    def show_head(self) -> None:
        self._undo.clear(self.journal.head)

    def difference(self, touched: AccessLog, vouched: Mapping[int, TrustedDigest] | None = None) -> TreeDiff:
        """Return the transaction's changes, before its end.

        Raises OutsideChange, with the transaction undone, if another program has changed a file since.
        """
        found = self.tree.after_command(touched, self._undo.before, vouched)
        prefix = self.tree.absolute("")
        replaced = {path.removeprefix(prefix): made for path, made in self._undo.replaced.items()}
        changed = [path for path, made in replaced.items() if not _is_made(found.states.get(path), made)]
        if changed:
            self.roll_back()
            raise OutsideChange(changed)
        return found

    def roll_back(self) -> None:
        """Undo the transaction. Outside changes are left for the next check of the tree."""
        restored = self._undo.restore()
        prefix = self.tree.absolute("")
        found = self.tree.reconcile([path.removeprefix(prefix) for path in restored])
        if not found.operations:
            self.adopt(found)

    def adopt(self, difference: TreeDiff) -> None:
        """Accept files without a number: no announced content has changed."""
        self._unsynced.update(difference.states)
        self.tree.accept(difference)

    def commit(
        self,
        difference: TreeDiff,
        cause: ChangeOrigin,
        answer: Callable[[int], Result] | None = None,
        *,
        hooks: Sequence[HookCall] = (),
        waiting: ResourceBusy | None = None,
        report: bool = True,
        is_extra: bool = False,
        retry_at: float | None = None,
    ) -> None:
        """Number the difference (unless empty), journal it with its reply, and report it once durable.

        A killed process leaves all or nothing of it. A power cut may undo it until it has been reported.

        Args:
            answer: makes the reply, given the sequence number that it is valid from.
            waiting: the request waits instead of getting a reply.
            report: send ``RequestDone``; otherwise the change is only journalled.
            retry_at: when to look for outside changes again.

        Raises:
            ChangeTooLarge: the transaction must be rolled back.
            Rejected: the disk is full; the request was undone.
            OSError: the same, without a request.
            SyncFailed: the disk lost a content that the record refers to.
        """
        seq, mark, change, payload = self.journal.head, self.journal.mark, None, b""
        if difference.operations:
            seq += 1
            mark = self.journal.change_ids.make(self.journal.epoch, seq)
            change = _encode_change(seq, mark, cause, difference)
            if len(change) > _MAX_ENCODED_BYTES:
                raise ChangeTooLarge
        result = answer(seq) if answer is not None else None
        reply = encode(result) if result is not None else None
        descriptor = None
        if change is not None or reply is not None:
            id_ = cause.id if reply is not None else ""
            states = difference.states if change is not None else {}
            moved = self._moved(difference)
            fingerprint = cause.fingerprint if id_ else b""
            record = Record(
                *(seq, mark, time.time(), id_, cause.token_id, change, reply, states, moved, fingerprint),
                is_keyed=self.is_keyed and bool(id_),
            )
            # The kernel may write the record before any fsync: the contents it refers to come first.
            sync_files(map(self.tree.absolute, difference.volatile))
            payload = encode_record(record)
            try:
                descriptor = self.journal.append(record, payload)
            except OSError as error:
                self._undo_unrecorded(cause, error)
            self._whole.update(moved, (put.path for put in difference.operations if isinstance(put, PutFile)))
        self._undo.clear(self.journal.head)
        after = self._after(difference) if change is not None else []
        self.adopt(difference)
        done = RequestDone(
            id=cause.id,
            seq=seq,
            mark=mark,
            change=change,
            reply=reply,
            after=after,
            hooks=list(hooks),
            waiting_for=waiting.resource if waiting else None,
            wait_timeout_s=waiting.timeout_s if waiting else 0.0,
            retry_at=waiting.retry_at if waiting else retry_at,
            oldest=self.journal.oldest,
            more=difference.is_partial,
            report=self._stats(status=_status_of(result)),
            is_extra=is_extra,
        )
        if self.is_member:
            announced = self._link_announced(difference)
            done = msgspec.structs.replace(done, record=payload, announced=announced, number=self.journal.next_number)
        self._committer.submit(CommitJob(done if report else None, descriptor))
        self.keep_retention()

    def _link_announced(self, difference: TreeDiff) -> list[AnnounceFile]:
        """Keep the contents of announced files, which the next command may replace, or extend."""
        announced = [operation for operation in difference.operations if isinstance(operation, AnnounceFile)]
        links = ProjectPaths(self.journal.directory.parent).announced
        for operation in announced:
            with contextlib.suppress(OSError):  # without a link, the file itself is read
                links.mkdir(mode=0o700, exist_ok=True)
                os.link(self.tree.absolute(operation.path), links / operation.digest.hex())
        return announced

    def write_ahead(self, path: str, size: int) -> None:
        """Journal the only durable copy of a content before a command overwrites it, with one fsync per file and
        segment.

        Lattice's fsyncs are omitted: a power cut could leave the file empty although the command was never
        acknowledged. Snapshots follow from their logs.
        """
        relative = path.removeprefix(self.tree.absolute(""))
        state = self.tree.files.get(relative)
        if state is None or relative in self._whole or is_snapshot(relative) or size > _MAX_MOVED_BYTES:
            return
        data = Path(path).read_bytes()
        if digest_of(data) == state.digest:
            journal = self.journal
            sync(journal.append(Record(journal.head, journal.mark, time.time(), moved={relative: data})))
            self._whole.add(relative)

    def _moved(self, difference: TreeDiff) -> dict[str, bytes]:
        targets = [operation.to for operation in difference.operations if isinstance(operation, MoveFile)]
        states = difference.states
        return {
            path: Path(self.tree.absolute(path)).read_bytes()
            for path in targets
            if (state := states.get(path)) is not None and state.size <= _MAX_MOVED_BYTES
        }

    def _undo_unrecorded(self, cause: ChangeOrigin, error: OSError) -> NoReturn:
        """Undo a transaction that the journal has no room for.

        Raises Rejected for a request; else OSError: the files stay, and the next start numbers them.
        """
        if not cause.id:
            raise error
        self.roll_back()
        raise _cannot_journal(error)

    def _after(self, difference: TreeDiff) -> list[PathState]:
        files, after = self.tree.files, []
        for path, state in difference.states.items():
            if state is None:
                after.append(PathState(path, 0, None))
            elif path not in files or files[path].digest != state.digest:
                after.append(PathState(path, state.size, state.digest))
        return after

    def resend_reply(self, request_id: str, record: Record) -> None:
        made = record.seq if record.change is not None else None
        self._report_reply(request_id, record.reply, record.seq, self._stats(again=True, made=made))

    def reply_without_record(self, answer: Callable[[int], Result]) -> None:
        """Send, in order, the reply to a request that was undone: a retry may succeed."""
        result = answer(self.journal.head)
        self._report_reply(result.id, encode(result), self.journal.head, self._stats(status=_status_of(result)))

    def refuse(self, refused: Refused) -> None:
        """Send a refusal in order; not journalled, since it had no effect."""
        self._report_reply(refused.id, encode(refused), self.journal.head, self._stats(code=refused.code))

    def _report_reply(self, request_id: str, reply: bytes | None, seq: int, report: ResultStats) -> None:
        done = RequestDone(request_id, seq, self.journal.mark, reply=reply, oldest=self.journal.oldest, report=report)
        self._committer.submit(CommitJob(done))

    def _stats(self, *, code: str = "", status: int = 0, again: bool = False, made: int | None = None) -> ResultStats:
        command, since = self._current
        return ResultStats(command, code, status, time.perf_counter() - since, again, made)

    # --- the journal's upkeep ---

    def keep_retention(self) -> None:
        if self.journal.is_rotation_due(now := time.time()):
            self._rotate()
        elif expired := self.journal.expire(now):
            self._committer.submit(CommitJob(then=lambda: remove_segments(expired)))

    def _rotate(self) -> None:
        """Start a new segment, in a crash-safe order."""
        old = self.journal.rotate()
        self._whole.clear()
        content, segment = self.manifest(clean=False), self.journal.segment
        unsynced = self._take_unsynced()
        expired = self.journal.expire(time.time())

        def finish() -> None:
            os.close(old)
            sync_files(unsynced)
            try:
                save_manifest(self._manifest_path, content)
            except OSError as error:  # full disk: the older manifest and segments suffice
                _log.warning("cannot write the manifest: %s", error)
                return
            self._list_beside(segment)
            remove_segments(expired)

        self._committer.submit(CommitJob(descriptor=old, then=finish))

    @property
    def _manifest_path(self) -> Path:
        return self.journal.directory / "manifest"

    def manifest(self, *, clean: bool) -> bytes:
        journal = self.journal
        return encode_manifest(
            ManifestFile(
                journal.epoch,
                journal.head,
                journal.mark,
                self._boot_id,
                clean,
                cast("dict[str, FileState]", self.tree.files),
                place_of(journal.directory),
            )
        )

    def _take_unsynced(self) -> list[str]:
        paths = [self.tree.absolute(path) for path in self._unsynced]
        self._unsynced = set()
        return paths

    def save_manifest(self, *, clean: bool) -> None:
        """Fsync the files, then write the manifest; after ``Committer.wait``."""
        sync_files(self._take_unsynced())
        save_manifest(self._manifest_path, self.manifest(clean=clean))
        if self.journal.is_segment_new:
            self._list_beside(self.journal.segment)

    def _list_beside(self, segment: Path) -> None:
        """Link the manifest beside the segment that it precedes; skipped without hard links.

        A copied directory may have a newer manifest than its journal reaches.
        """
        with contextlib.suppress(OSError):
            os.link(self._manifest_path, list_beside(segment))

    def new_epoch(self) -> None:
        sync_files(self._take_unsynced())  # the journal that could repair them is removed
        self.journal = start_new_epoch(self.journal)
        self._whole.clear()
        self.save_manifest(clean=False)

    def close(self) -> None:
        """Shut down so that the next start trusts the manifest."""
        self._committer.finish()
        self._settle()
        self.save_manifest(clean=True)
        self.journal.close()

    def _settle(self) -> None:
        """Read the files again that were young when they were listed, so that the next start trusts them."""
        young = [path for path, state in self.tree.files.items() if not state.settled]
        if len(young) <= _MAX_SETTLED_FILES:
            found = self.tree.reconcile(young)
            if not found.operations:
                self.adopt(found)


def _cannot_journal(error: OSError) -> Rejected:
    why = error.strerror or error
    return Rejected(f"the server cannot write its journal: {why}; nothing was changed", code="REMOTE_STORAGE")


def _is_made(state: FileState | None, made: Replacement) -> bool:
    return state is not None and state.inode == made.inode and made.digest in (None, state.digest)


def _status_of(result: Result | None) -> int:
    match result:
        case Reply():
            return result.exit_code
        case Returned():
            return result.status
    return 0


def start_new_epoch(journal: Journal) -> Journal:
    """Close a journal; start a new history with its readable recent replies (I6). Raises OSError."""
    since = max(journal.since, time.time() - _REPLY_RETENTION_S)
    answered = [_carried_over(record) for record in journal.answered_since(since)]
    journal.close()
    known_since = None if journal.is_damaged else since
    return Journal.create(
        journal.directory, secrets.token_hex(16), journal.retention, answered=answered, since=known_since
    )


def _carried_over(record: Record) -> Record:
    """Return the record for a history whose files at number 0 have its effects."""
    assert record.reply is not None, "a record with an id has an answer"
    answer = decode_server_frame(record.reply, max_bytes=len(record.reply))
    assert isinstance(answer, Result), "nothing else is journalled"
    reply = encode(msgspec.structs.replace(answer, seq=0))
    return Record(
        *(0, b"", record.time, record.id, record.token_id),
        reply=reply,
        fingerprint=record.fingerprint,
        is_keyed=record.is_keyed,
    )


def _encode_change(seq: int, mark: bytes, cause: ChangeOrigin, difference: TreeDiff) -> bytes:
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    command = cause.command or describe_paths(
        [path for operation in difference.operations for path in paths_of(operation)]
    )
    token_actor = cause.token_actor if cause.token_actor != cause.actor else ""
    return encode(
        Change(seq, mark, now, cause.actor, cause.token_id, cause.cause, command, difference.operations, token_actor)
    )
