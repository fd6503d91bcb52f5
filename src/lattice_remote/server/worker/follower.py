"""Replica of a project on a node of a cluster: records of the owner are applied, not executed.

A record reaches the journal before the files, so recovery can finish a change that a kill or a power cut interrupted.
No outside change is numbered here: its content is moved aside and the numbered one restored (I12).
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from lattice_remote.errors import Rejected
from lattice_remote.files import write_all, write_atomically
from lattice_remote.protocol.operations import AnnounceFile, AppendBytes, MoveFile, apply
from lattice_remote.server.ipc import ApplyRecords, PathState, RecordApplied
from lattice_remote.server.journal.contents import Contents, change_of
from lattice_remote.server.journal.journal import CommitJob, Committer
from lattice_remote.server.journal.repair import Repair
from lattice_remote.server.journal.segment import JournalReader, Record, decoder
from lattice_remote.server.tree.tree import FileState, ProjectTree, TreeDiff, sync_files
from lattice_remote.server.worker.caller import SessionOwners
from lattice_remote.server.worker.store import Store

__all__ = ["CopyNeeded", "Follower", "restore_all"]


class CopyNeeded(Exception):
    """The files cannot be brought to the journal's head from here: copy the project from another node."""


class Follower:
    def __init__(self, store: Store, committer: Committer, owners: SessionOwners) -> None:
        self._store = store
        self._owners = owners
        self._committer = committer
        self._files = _Files(store)
        self._is_restored = False

    def apply(self, message: ApplyRecords) -> None:
        """Apply records in order; report each once it is durable.

        Raises:
            CopyNeeded: a record does not fit.
            OSError: the storage failed.
        """
        if not self._is_restored:
            self.restore_outside_changes(None)
        for payload in message.records:
            record = decoder.decode(payload)
            if not isinstance(record, Record):
                raise CopyNeeded("the order holds something that is no record")
            self._apply(record, payload, message.contents)
            self._store.keep_retention()
        self._committer.flush()

    def restore_outside_changes(self, paths: Iterable[str] | None) -> None:
        """Restore files that another program has changed (None: all). Raises as ``apply``."""
        _restore_differing(self._store, paths)
        self._is_restored = self._is_restored or paths is None

    def _apply(self, record: Record, payload: bytes, contents: Mapping[str, str]) -> None:
        journal, after = self._store.journal, list[PathState]()
        if record.change is not None:
            if record.seq != journal.head + 1:
                raise CopyNeeded(f"change {record.seq} follows change {journal.head}")
            self._keep_replaced(record)
            self._place_contents(record, contents)
            self._note_sessions(record)
        descriptor = journal.append(record, payload)
        if record.change is not None:
            with self._store.applying():
                after = self._change_files(record)
        applied = RecordApplied(
            record.seq, record.mark, record.change, after, oldest=journal.oldest, number=journal.next_number
        )
        self._committer.submit(CommitJob(applied, descriptor))

    def _note_sessions(self, record: Record) -> None:
        change = change_of(record)
        if change.command.startswith("session start"):
            with contextlib.suppress(Rejected):  # an unreadable file: this node's administrator must look
                self._owners.note(change.ops, record.token_id, change.token_actor or change.actor)

    def _keep_replaced(self, record: Record) -> None:
        """Make the contents that a change replaces durable in the journal, before its record: the later one counts."""
        for operation in change_of(record).ops:
            if not isinstance(operation, AppendBytes | AnnounceFile):
                path = operation.to if isinstance(operation, MoveFile) else operation.path
                if (size := self._files.size(path)) is not None:
                    self._store.write_ahead(self._store.tree.absolute(path), size)

    def _place_contents(self, record: Record, contents: Mapping[str, str]) -> None:
        """Copy announced contents into place, durably, before the journal has their record."""
        placed = []
        for operation in change_of(record).ops:
            if isinstance(operation, AnnounceFile) and (source := contents.get(operation.digest.hex())):
                target = self._store.tree.absolute(operation.path)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                scratch = os.path.join(os.path.dirname(target), f".tmp.apply.{os.path.basename(target)}")
                shutil.copyfile(source, scratch)
                os.replace(scratch, target)
                placed.append(target)
        sync_files(placed)

    def _change_files(self, record: Record) -> list[PathState]:
        unfit: set[str] = set()
        for operation in change_of(record).ops:
            unfit |= apply(operation, self._files)
        states: dict[str, FileState | None] = {}
        after = []
        for path, state in record.files.items():
            status = self._store.tree.status(path)
            if (state is None) != (status is None) or (state and status and state.size != status.st_size):
                unfit.add(path)
            elif state is None or status is None:
                states[path] = None
                after.append(PathState(path, 0, None))
            else:
                states[path] = FileState(state.size, state.digest, status.st_mtime_ns, status.st_ino, settled=False)
                after.append(PathState(path, state.size, state.digest))
        if unfit:
            raise CopyNeeded(f"change {record.seq} does not fit {min(unfit)}")
        self._store.adopt(TreeDiff(states=states))
        return after


class _Files:
    """The project's files as ``protocol.operations.Tree``. Paths come from the journal of another node: checked."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def size(self, path: str) -> int | None:
        status = self._store.tree.status(path)
        return None if status is None else status.st_size

    def read(self, path: str, offset: int = 0) -> bytes:
        with open(self._store.tree.absolute(path), "rb") as file:
            file.seek(offset)
            return file.read()

    def replace(self, path: str, data: bytes) -> None:
        target = self._prepare(path)
        directory, name = os.path.split(target)
        scratch = os.path.join(directory, f".tmp.apply.{name}")
        write_atomically(target, data, mode=0o666, temporary=scratch, sync=None)

    def append(self, path: str, data: bytes) -> None:
        descriptor = os.open(self._prepare(path), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            write_all(descriptor, data)
        finally:
            os.close(descriptor)

    def move(self, path: str, to: str) -> None:
        os.replace(self._store.tree.absolute(path), self._prepare(to))

    def delete(self, path: str) -> None:
        Path(self._store.tree.absolute(path)).unlink(missing_ok=True)

    def _prepare(self, path: str) -> str:
        target = self._store.tree.absolute(path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        return target


def restore_all(store: Store, *, trust_signatures: bool) -> list[str]:
    """Bring every file to its numbered state; return lines for the log. Raises as ``Follower.apply``."""
    return _restore_differing(store, None, trust_signatures=trust_signatures)


def _restore_differing(store: Store, paths: Iterable[str] | None, *, trust_signatures: bool = True) -> list[str]:
    found = store.tree.reconcile(paths, trust_signatures=trust_signatures, limit=None)
    notes = []
    if found.operations:
        notes = _restore(store.tree, store.journal.directory, found)
        found = store.tree.reconcile(found.states, trust_signatures=False, limit=None)
        if found.operations:
            raise CopyNeeded(f"{found.operations[0].path} could not be restored")
    store.adopt(found)
    return notes


def _restore(tree: ProjectTree, journal: Path, found: TreeDiff) -> list[str]:
    """Bring the files that ``found`` names to their numbered state; return lines for the log.

    Their present contents are kept below ``set-aside/``, beside the journal.

    Raises:
        CopyNeeded: the journal lacks a content.
        OSError: a file cannot be read or written.
    """
    paths = {operation.path for operation in found.operations} | found.states.keys()
    contents = Contents(paths)
    for path, state in tree.files.items():
        contents.learn_state(path, state)
    for record in JournalReader(journal).records():
        contents.learn(record)
    repair = Repair(tree, contents, paths, has_edits=False)
    if repair.failed:
        raise CopyNeeded(f"the journal lacks the content of {repair.failed[0]}")
    aside = journal.parent / "set-aside" / f"node-{time.time_ns()}"
    for path in paths:
        if tree.status(path) is not None:
            kept = aside / path
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tree.absolute(path), kept)
    return repair.perform(journal / "lost")
