"""A project's tree, undo log and journal as one thing that commits: the only writer (I1, I2, I5, I6).

A transaction runs ``with store.transaction() as transaction:``; it ends with ``store.commit(...)`` or
``store.roll_back()``. Whatever happens before the commit's record is in the journal, it is as if nothing had been done.
"""

import contextlib
import logging
import os
import queue
import secrets
import shlex
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

import click
import msgspec

from lattice_remote.errors import Rejected
from lattice_remote.protocol.codec import MAX_FRAME_BYTES, decode_server_frame, encode
from lattice_remote.protocol.messages import Change, Refused, Reply, Result, Returned
from lattice_remote.protocol.operations import MoveFile, PutFile, digest_of, paths_of
from lattice_remote.server.ipc import (
    HookCall,
    PathState,
    RequestDone,
    ResultStats,
    ToServer,
    WorkerFailed,
    encode_frames,
)
from lattice_remote.server.journal.journal import Journal
from lattice_remote.server.journal.repair import is_snapshot, place_of
from lattice_remote.server.journal.segment import Record, list_beside, remove_segments
from lattice_remote.server.logging import masked
from lattice_remote.server.tree.capture import AccessLog, Capture
from lattice_remote.server.tree.tree import (
    ManifestFile,
    ProjectTree,
    TreeDiff,
    TrustedDigest,
    save_manifest,
    sync,
    sync_files,
)
from lattice_remote.server.tree.undo import Begin, UndoLog
from lattice_remote.server.worker.executor import ResourceBusy

__all__ = [
    "BY_SERVER",
    "ChangeOrigin",
    "ChangeTooLarge",
    "CommitJob",
    "Committer",
    "Store",
    "begin_anew",
    "command_words",
    "describe_call",
    "describe_command",
    "describe_edit",
    "describe_paths",
]

_log = logging.getLogger(__name__)
_encoder = msgspec.msgpack.Encoder()


@dataclass(frozen=True)
class CommitJob:
    """What is to happen: fsync ``descriptor``, then run ``then``, then send ``message``."""

    message: ToServer | None = None
    descriptor: int | None = None
    then: Callable[[], None] | None = None


class Committer:
    """Takes jobs in order; a batch of them costs one fsync per journal file.

    When the storage fails it says ``Failed`` and ends the process at once: whatever is not acknowledged by then
    never will be, and the next start goes by what is really on disk.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._jobs: queue.SimpleQueue[CommitJob | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
        self._thread.start()

    def submit(self, job: CommitJob) -> None:
        """Add a job; returns at once."""
        self._jobs.put(job)

    def finish(self) -> None:
        """Return when every job is done. The committer can't be used afterwards."""
        self._jobs.put(None)
        self._thread.join()

    def wait(self) -> None:
        """Return when every job submitted so far is done."""
        done = threading.Event()
        self.submit(CommitJob(then=done.set))
        done.wait()

    def _run(self) -> None:
        try:
            while self._run_batch():
                pass
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing may be acknowledged any more
            _log.exception("the journal can't be written")
            self._send([WorkerFailed(f"the journal can't be written: {error}")])
            os._exit(1)

    def _run_batch(self) -> bool:
        """Do all that is waiting; return False when there will be no more."""
        batch = [self._jobs.get()]
        while not self._jobs.empty():
            batch.append(self._jobs.get())
        jobs = [job for job in batch if job is not None]
        began = time.perf_counter()
        descriptors = dict.fromkeys(job.descriptor for job in jobs if job.descriptor is not None)
        for descriptor in descriptors:
            sync(descriptor)
        synced_s = time.perf_counter() - began if descriptors else None
        for job in jobs:
            if job.then is not None:
                job.then()
        messages = [job.message for job in jobs if job.message is not None]
        self._send(messages if synced_s is None else _telling(messages, synced_s))
        return len(jobs) == len(batch)

    def _send(self, messages: list[ToServer]) -> None:
        # The server may be gone; what was committed is on disk, and the main thread is about to notice.
        with contextlib.suppress(OSError):
            self._connection.sendall(encode_frames(*messages))


def _telling(messages: list[ToServer], synced_s: float) -> list[ToServer]:
    """Have the first outcome say how long the fsync took."""
    for number, message in enumerate(messages):
        if isinstance(message, RequestDone):
            told = msgspec.structs.replace(message, synced_s=synced_s)
            return [*messages[:number], told, *messages[number + 1 :]]
    return messages


MAX_CHARS = 200
_MAX_PATHS = 5
_LOOKED_AT_CHARS = 8 * MAX_CHARS


def describe_command(argv: Sequence[str]) -> str:
    """Return a command line as it could be typed, cut to ``MAX_CHARS``."""
    line = ""
    for argument in argv:
        line += (" " if line else "") + shlex.quote(argument[:_LOOKED_AT_CHARS])
        if len(line) > _LOOKED_AT_CHARS:  # an argument may have a megabyte; what is cut off need not be looked at
            break
    return _cut(masked(line[:_LOOKED_AT_CHARS]))


def command_words(cli: click.Group, argv: Sequence[str]) -> str:
    """Return the words of the command that a line begins with, as ``resource acquire``: no option and no value."""
    words: list[str] = []
    command: click.Command | None = cli
    for word in argv:
        command = command.commands.get(word) if isinstance(command, click.Group) else None
        if command is None:
            break
        words.append(word)
    return " ".join(words)


def describe_call(label: str) -> str:
    """Return what is said of an operation of a surface."""
    return _cut(masked(label))


def describe_edit(path: str) -> str:
    """Return what is said of a plan or notes that a client has sent."""
    return f"edit {path}"


def describe_paths(paths: Collection[str]) -> str:
    """Return what is said of files that were found changed: the first of them, and how many there are."""
    shown = ", ".join(list(paths)[:_MAX_PATHS])
    more = len(paths) - _MAX_PATHS
    if more <= 0:
        return _cut(f"changed {shown}")
    tail = f", and {more} more"
    return f"changed {shown}"[: MAX_CHARS - len(tail)] + tail


def _cut(line: str) -> str:
    return line if len(line) <= MAX_CHARS else line[: MAX_CHARS - 1] + "…"


_MAX_MOVED_BYTES = 8 * 1024 * 1024
"""A moved file that is larger is not kept in the journal: it would push out too much history."""
_MAX_ENCODED_BYTES = MAX_FRAME_BYTES - 64 * 1024
_ASKED_AGAIN_S = 600.0
"""For how long an answer is kept when its history ends: a client that lost its connection gives up much sooner."""


class ChangeTooLarge(Exception):
    """A command has changed so many files that no frame can carry it."""


@dataclass(frozen=True)
class ChangeOrigin:
    """Why something changes: a request (``id``) of a token, or the server itself.

    ``actor`` is who it acts as, ``token_actor`` whose token it is, ``fingerprint`` the request's.
    """

    id: str
    token_id: str
    actor: str
    cause: str
    command: str = ""
    token_actor: str = ""
    fingerprint: bytes = b""


def BY_SERVER(cause: str) -> ChangeOrigin:  # noqa: N802 - reads as the constant it nearly is
    """Return the cause of a change that nobody asked for: ``edit`` or ``recovery``."""
    return ChangeOrigin("", "", "server", cause)


class Store:
    """Everything durable of one project; see ``recovery.open_store``. Raises OSError when the storage fails.

    After such an error the store must not be used any more: the process ends, and the next start recovers.
    """

    def __init__(
        self,
        *,
        journal: Journal,
        tree: ProjectTree,
        undo: UndoLog,
        capture: Capture,
        committer: Committer,
        boot_id: str,
        unsynced: Iterable[str] = (),
    ) -> None:
        self.journal = journal
        self.tree = tree
        self._undo = undo
        self._undo.before_overwrite = self._write_ahead
        self._whole: set[str] = set()  # files of which the newest segment has a whole content
        self._unsynced = set(unsynced)
        self._capture = capture
        self._committer = committer
        self._boot_id = boot_id
        self._taken = ("", time.perf_counter())

    def taken_up(self, command: str) -> None:
        """A request is begun, which the log calls ``command``; what is reported next is what came of it."""
        self._taken = (command, time.perf_counter())

    def called(self, command: str) -> None:
        """What was taken up has a better name, now that it is known."""
        self._taken = (command, self._taken[1])

    @contextmanager
    def transaction(self) -> Iterator[AccessLog]:
        """Watch what the block touches, with pre-images; then call ``difference`` and ``commit``, or ``roll_back``."""
        self._undo.begin(Begin(self.journal.epoch, self.journal.head + 1, self._boot_id))
        with self._capture.watch() as touched:
            yield touched

    def show_head(self) -> None:
        """Tell readers that the tree is as at the journal's head, before the first request and in a new epoch."""
        self._undo.clear(self.journal.head)

    def difference(self, touched: AccessLog, vouched: Mapping[int, TrustedDigest] | None = None) -> TreeDiff:
        """Return what a transaction did to the tree; call before its end. ``vouched`` as for ``after_command``."""
        return self.tree.after_command(touched, self._undo.before, vouched)

    def roll_back(self) -> None:
        """Undo the transaction: every file is as before.

        What others had changed in them is left for the next look at the tree: a request has one outcome.
        """
        restored = self._undo.restore()
        prefix = self.tree.absolute("")
        found = self.tree.reconcile([path.removeprefix(prefix) for path in restored])
        if not found.operations:
            self.adopt(found)

    def adopt(self, difference: TreeDiff) -> None:
        """Take the files as they are without a number: what changed is no content that anybody has been told of."""
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
    ) -> None:
        """Number the difference (if it is one), journal it with its answer, and report it once it is durable.

        A killed process has done either all of it or nothing; a power cut may take it back as long as it has not
        been reported.

        Args:
            difference: what to number; without operations only the answer is journalled.
            cause: whose doing it is. Its id can be asked again if there is an answer.
            answer: makes the reply from the number up to which it is true.
            hooks: what lattice wanted to run after the commit.
            waiting: there is no answer yet.
            report: send ``Done``; without, the change is found in the journal.

        Raises:
            ChangeTooLarge: no client could take it; nothing was done, and the transaction must be rolled back.
            Rejected: the journal can't take it (the disk is full); a request was undone.
            OSError: likewise, of what nobody asked for.
            SyncFailed: the disk could not keep a content that the record only refers to.
        """
        seq, mark, change = self.journal.head, self.journal.mark, None
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
            asked = cause.fingerprint if id_ else b""
            record = Record(seq, mark, time.time(), id_, cause.token_id, change, reply, states, moved, asked)
            # The kernel may write the record before any fsync, so what it only refers to is on the disk before it.
            sync_files(map(self.tree.absolute, difference.volatile))
            try:
                descriptor = self.journal.append(record)
            except OSError as error:
                self._take_back(cause, error)
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
            retry_at=waiting.retry_at if waiting else None,
            oldest=self.journal.oldest,
            more=difference.is_partial,
            report=self._report_of(status=_status_of(result)),
        )
        self._committer.submit(CommitJob(done if report else None, descriptor))
        self.keep_retention()

    def _write_ahead(self, path: str, size: int) -> None:
        """Make a content durable in the journal before a command destroys it, if it is nowhere else.

        Lattice's own fsyncs are left out: after a power cut the file may be empty, though the command was never
        acknowledged. It costs an fsync for each such file in each segment. Snapshots follow from their logs.
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
        """Return the content of files that were moved, apart from very large ones."""
        targets = [operation.to for operation in difference.operations if isinstance(operation, MoveFile)]
        states = difference.states
        return {
            path: Path(self.tree.absolute(path)).read_bytes()
            for path in targets
            if (state := states.get(path)) is not None and state.size <= _MAX_MOVED_BYTES
        }

    def _take_back(self, cause: ChangeOrigin, error: OSError) -> NoReturn:
        """The journal can't take a commit, for want of space: undo it, and go on with the next.

        Raises:
            Rejected: it was a request's.
            OSError: it was nobody's: what is to be numbered stays in the files, for the next start to find.
        """
        if not cause.id:
            raise error
        self.roll_back()
        why = error.strerror or error
        raise Rejected(f"the server can't write its journal: {why}; nothing was changed", code="REMOTE_STORAGE")

    def _after(self, difference: TreeDiff) -> list[PathState]:
        """Return the files whose content the difference changes; call before it is accepted."""
        files, after = self.tree.files, []
        for path, state in difference.states.items():
            if state is None:
                after.append(PathState(path, 0, None))
            elif path not in files or files[path].digest != state.digest:
                after.append(PathState(path, state.size, state.digest))
        return after

    def reply_again(self, request_id: str, record: Record) -> None:
        """Report once more what was answered to a request."""
        made = record.seq if record.change is not None else None
        self._tell(request_id, record.reply, record.seq, self._report_of(again=True, made=made))

    def answer_once(self, answer: Callable[[int], Result]) -> None:
        """Report, in its turn, how a request ended that was undone. Nothing is journalled: the next try may succeed."""
        result = answer(self.journal.head)
        self._tell(result.id, encode(result), self.journal.head, self._report_of(status=_status_of(result)))

    def refuse(self, refused: Refused) -> None:
        """Report, in its turn, that a request was not carried out. Nothing is journalled: it had no effect."""
        self._tell(refused.id, encode(refused), self.journal.head, self._report_of(code=refused.code))

    def _tell(self, request_id: str, reply: bytes | None, seq: int, report: ResultStats) -> None:
        done = RequestDone(request_id, seq, self.journal.mark, reply=reply, oldest=self.journal.oldest, report=report)
        self._committer.submit(CommitJob(done))

    def _report_of(
        self, *, code: str = "", status: int = 0, again: bool = False, made: int | None = None
    ) -> ResultStats:
        command, since = self._taken
        return ResultStats(command, code, status, time.perf_counter() - since, again, made)

    # --- the journal's upkeep ---

    def keep_retention(self) -> None:
        """Begin a new segment of the journal if it is time, and drop what is over the retention."""
        if self.journal.is_rotation_due(now := time.time()):
            self._rotate()
        elif expired := self.journal.expire(now):
            self._committer.submit(CommitJob(then=lambda: remove_segments(expired)))

    def _rotate(self) -> None:
        """Begin a new segment, list the files, drop what is over the retention: in an order that a crash may cut."""
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
            except OSError as error:  # a full disk: the older list and the older segments do as well
                _log.warning("the list of files could not be written: %s", error)
                return
            self._list_beside(segment)
            remove_segments(expired)

        self._committer.submit(CommitJob(descriptor=old, then=finish))

    @property
    def _manifest_path(self) -> Path:
        return self.journal.directory / "manifest"

    def manifest(self, *, clean: bool) -> bytes:
        """Return the list of all files at the head, encoded."""
        journal = self.journal
        return _encoder.encode(
            ManifestFile(
                journal.epoch,
                journal.head,
                journal.mark,
                self._boot_id,
                clean,
                self.tree.files,
                place_of(journal.directory),
            )
        )

    def _take_unsynced(self) -> list[str]:
        paths = [self.tree.absolute(path) for path in self._unsynced]
        self._unsynced = set()
        return paths

    def save_manifest(self, *, clean: bool) -> None:
        """Make the files durable, then write the list of them; every commit must be (``Committer.wait``)."""
        sync_files(self._take_unsynced())
        save_manifest(self._manifest_path, self.manifest(clean=clean))
        if self.journal.is_segment_new:
            self._list_beside(self.journal.segment)

    def _list_beside(self, segment: Path) -> None:
        """Keep the list that was just written, which is of the segment's beginning, for as long as the segment.

        A copy may have a newer list than its journal reaches. Without hard links it has to do without.
        """
        with contextlib.suppress(OSError):
            os.link(self._manifest_path, list_beside(segment))

    def new_epoch(self) -> None:
        """Begin a new history on the files as they are (I7); every commit must have been reported."""
        sync_files(self._take_unsynced())  # the journal that could repair them goes
        self.journal = begin_anew(self.journal)
        self._whole.clear()
        self.save_manifest(clean=False)

    def close(self) -> None:
        """End in order: the next start trusts the list of files."""
        self._committer.finish()
        self.save_manifest(clean=True)
        self.journal.close()


def _status_of(result: Result | None) -> int:
    match result:
        case Reply():
            return result.exit_code
        case Returned():
            return result.status
    return 0


def begin_anew(journal: Journal) -> Journal:
    """Close a journal and begin a new history in its place, which still knows the answers on their way (I6).

    Of a damaged one it knows those that can be read, and that there were others.

    Raises:
        OSError: the old one can't be read, or the new one written.
    """
    since = max(journal.since, time.time() - _ASKED_AGAIN_S)
    answered = [_at_beginning(record) for record in journal.answered_since(since)]
    journal.close()
    known_since = None if journal.is_damaged else since
    return Journal.create(
        journal.directory, secrets.token_hex(16), journal.retention, answered=answered, since=known_since
    )


def _at_beginning(record: Record) -> Record:
    """Return a record for a new history: its files, at number 0, hold what was done."""
    assert record.reply is not None, "a record with an id has an answer"
    answer = decode_server_frame(record.reply, max_bytes=len(record.reply))
    assert isinstance(answer, Result), "nothing else is journalled"
    reply = encode(msgspec.structs.replace(answer, seq=0))
    return Record(0, b"", record.time, record.id, record.token_id, reply=reply, fingerprint=record.fingerprint)


def _encode_change(seq: int, mark: bytes, cause: ChangeOrigin, difference: TreeDiff) -> bytes:
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    command = cause.command or describe_paths(
        [path for operation in difference.operations for path in paths_of(operation)]
    )
    token_actor = cause.token_actor if cause.token_actor != cause.actor else ""
    return encode(
        Change(seq, mark, now, cause.actor, cause.token_id, cause.cause, command, difference.operations, token_actor)
    )
