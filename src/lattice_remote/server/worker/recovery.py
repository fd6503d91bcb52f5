"""Recovery at the start of a worker: after a kill, a power cut, outside edits or a restored backup (I6, I7, I12).

An interrupted command is undone; every other difference from the journal becomes a numbered change.
"""

import contextlib
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec

from lattice_remote.protocol.operations import PutFile
from lattice_remote.server.journal.contents import Contents, counterpart, derive, is_snapshot, log_of
from lattice_remote.server.journal.journal import Committer, Journal, Retention
from lattice_remote.server.journal.repair import (
    Repair,
    differing,
    files_at_head,
    is_copied,
    parsed,
    repair_copy,
)
from lattice_remote.server.journal.segment import JournalReader, cut_records, remove_segments
from lattice_remote.server.tree.capture import Capture
from lattice_remote.server.tree.tree import FileState, ManifestFile, ProjectTree, TreeDiff, load_manifest
from lattice_remote.server.tree.undo import UndoLog
from lattice_remote.server.worker.follower import CopyNeeded, restore_all
from lattice_remote.server.worker.project_import import (
    answer_to,
    cause_of,
    finish,
    first_difference,
    put_in_place,
    states_of,
)
from lattice_remote.server.worker.store import Store, server_origin, start_new_epoch

__all__ = ["Membership", "Opened", "is_in_doubt", "open_member", "open_store"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass
class Opened:
    """A project that is ready for requests.

    Attributes:
        can_repair: power cuts are detected and repaired, so lattice's own fsyncs may be omitted.
    """

    store: Store
    capture: Capture
    notes: list[str]
    can_repair: bool


@dataclass
class _History:
    """State according to the journal and the manifest.

    Attributes:
        journal: None if it cannot be read or does not match the manifest.
        abandoned: the journal that does not match the manifest.
        listed: the manifest's files; other versions on disk are at least that new.
        is_in_doubt: the machine may have stopped before the last worker: a differing file may be a lost write.
    """

    journal: Journal | None
    abandoned: Journal | None = None
    files: dict[str, FileState] = field(default_factory=dict)
    unsynced: set[str] = field(default_factory=set)
    listed: dict[str, FileState] = field(default_factory=dict)
    is_in_doubt: bool = True
    notes: list[str] = field(default_factory=list)


def open_store(
    project: Path, scratch: Path, committer: Committer, *, code: Iterable[str], retention: Retention | None = None
) -> Opened:
    """Open the project in ``project``, which contains ``.lattice/`` and gets ``journal/``. Raises OSError.

    A project waiting in ``adopting/`` is put in place first, see ``project_import``.

    Args:
        code: directories of Python and its packages, which commands may read.
    """
    adopted = put_in_place(project)
    directory = project / "journal"
    directory.mkdir(mode=0o700, exist_ok=True)
    boot_id = _boot_id(project)
    listed = load_manifest(directory / "manifest")
    if not (project / ".lattice").is_dir():
        raise FileNotFoundError(f"{project} has no .lattice")  # moved away: no file was deleted
    was_cache = _make_locks(project / ".lattice" / "locks")
    copied = is_copied(directory, listed)
    undo = UndoLog.open(directory)
    journal = Journal.open(directory, retention)
    repaired: list[str] = []
    if adopted is None and copied and listed is not None and journal is not None:
        repaired = repair_copy(ProjectTree(project / ".lattice", {}), journal, listed, kept=undo.before)
        undo.clear()  # copied later than the files: its pre-images may belong to a later command
    is_new = adopted is not None and (journal is None or journal.find(adopted.id) is None)
    states: dict[str, FileState] = {}
    if adopted is not None and is_new:
        states = states_of(project)
        repaired = [f"{adopted.actor} pushed a whole project: started a new epoch"]
    history = _History(None, journal, notes=repaired) if repaired else _read_history(journal, listed, boot_id)
    journal = history.journal or _new_journal(directory, history.abandoned, retention)
    tree = ProjectTree(project / ".lattice", states or history.files)
    notes = list(history.notes)
    if history.journal is not None and history.is_in_doubt and boot_id:
        notes += _repair_after_power_cut(tree, journal, history, undo)
    notes += _undo_interrupted_command(undo, journal, boot_id, tree)
    if was_cache:
        notes.append("locks was a file, as in a copied cache; it is a directory again")
    capture = Capture(str(tree.root), str(scratch), undo, tuple(code))
    store = Store(journal, tree, undo, capture, committer, boot_id=boot_id, unsynced=history.unsynced)
    if history.journal is None:
        store.adopt(tree.reconcile(trust_signatures=bool(states), limit=None))
        if adopted is not None and is_new:
            store.commit(first_difference(tree), cause_of(adopted), partial(answer_to, adopted), report=False)
    else:
        notes += _commit_differences(store, trust_signatures=bool(boot_id) or not history.is_in_doubt)
    committer.wait()
    if journal.is_damaged:
        store.new_epoch()
        notes.append("the journal was damaged after acknowledged changes: started a new epoch")
    elif copied and history.journal is not None:
        # An intact copy: the original may have continued, so its later numbers would be used twice.
        store.new_epoch()
        notes.append("this is a copy of the project's directory: started a new epoch")
    else:
        store.save_manifest(clean=False)
    if adopted is not None:
        finish(project)
    remove_segments(store.journal.expire(time.time()))
    return Opened(store, capture, notes, bool(boot_id))


class Membership(msgspec.Struct, frozen=True):
    """Start of a worker on a node of a cluster.

    Attributes:
        cut: number of the first record that the cluster does not have; None if it has all.
        keeps_edits: this node was the last owner, so outside changes stay until it is known who owns the project next.
    """

    cut: int | None = None
    keeps_edits: bool = False


def open_member(
    project: Path,
    scratch: Path,
    committer: Committer,
    membership: Membership,
    *,
    code: Iterable[str],
    retention: Retention | None = None,
) -> Opened:
    """Open a node's copy of the project in ``project`` at its journal's head; no change is numbered.

    Raises:
        CopyNeeded: the journal or a file cannot be used.
        OSError: the storage failed.
    """
    directory = project / "journal"
    boot_id = _boot_id(project)
    if membership.cut is not None:
        cut_records(directory, membership.cut, project / "set-aside" / f"cut-{membership.cut}")
    listed = load_manifest(directory / "manifest")
    if not (project / ".lattice").is_dir() or listed is None:
        raise CopyNeeded("there are no files here")
    _make_locks(project / ".lattice" / "locks")
    copied = is_copied(directory, listed)
    undo = UndoLog.open(directory)
    journal = Journal.open(directory, retention)
    if journal is None or listed.epoch != journal.epoch:
        raise CopyNeeded("the journal is not readable")
    reached = journal.oldest - 1 <= listed.seq <= journal.head
    history = _read_history(journal, listed, boot_id) if reached else None
    files = history.files if history is not None else files_at_head(journal, listed, project / ".lattice")
    tree = ProjectTree(project / ".lattice", files)
    notes = list(journal.notes)
    keeps_edits = membership.keeps_edits and membership.cut is None and not copied and history is not None
    if keeps_edits and history is not None and history.is_in_doubt and boot_id:
        notes += _repair_after_power_cut(tree, journal, history, undo)
    if copied or membership.cut is not None:
        undo.clear()
    else:
        notes += _undo_interrupted_command(undo, journal, boot_id, tree)
    unsynced = history.unsynced if history is not None else tree.files
    capture = Capture(str(tree.root), str(scratch), undo, tuple(code))
    store = Store(journal, tree, undo, capture, committer, boot_id=boot_id, unsynced=unsynced, is_member=True)
    if not keeps_edits:
        notes += restore_all(store, trust_signatures=bool(boot_id) and history is not None and not history.is_in_doubt)
    committer.wait()
    store.save_manifest(clean=False)
    remove_segments(store.journal.expire(time.time()))
    return Opened(store, capture, notes, bool(boot_id))


def _make_locks(place: Path) -> bool:
    """Create lattice's directory of locks; return whether it replaced a file, as a cache has."""
    is_file = place.is_file() or place.is_symlink()
    if is_file:
        place.unlink()
    place.mkdir(exist_ok=True)
    return is_file


def _commit_differences(store: Store, *, trust_signatures: bool) -> list[str]:
    notes: list[str] = []
    rest: list[str] = []
    while True:
        is_whole = not rest
        found, _ = store.find_outside_changes(trust_signatures=trust_signatures, rest=rest)
        if registered := _register_added(store, found):
            notes.append(f"ids.json lacked tasks that were added here: {', '.join(registered)}")
            continue
        if found.operations:
            notes.append(_describe(found, store.journal.head))
            store.commit(found, server_origin("recovery"), report=False)
        else:
            store.adopt(found)
        if is_whole and not found.rest:
            return notes
        rest = found.rest  # at the end of it, the whole tree once more


def _register_added(store: Store, found: TreeDiff) -> list[str]:
    """Add new tasks to an older ``ids.json``, as a backup copied over a project has it; return their short ids.

    Otherwise the next tasks get the same ids. An id that belongs to another task stays; ``fsck`` reports it.
    """
    from lattice.storage.short_ids import save_id_index

    tree = store.tree
    ids: dict[str, str] = {}
    for added in found.operations:
        if isinstance(added, PutFile) and is_snapshot(added.path) and not _is_known(tree, added.path):
            snapshot = parsed(added.data) or {}
            ids[str(snapshot.get("short_id"))] = str(snapshot.get("id"))
    if not ids:
        return []
    with store.locks.trying("ids_json") as is_held:
        index = parsed(Path(tree.absolute("ids.json")).read_bytes()) if is_held and tree.status("ids.json") else None
        if index is None or not isinstance(known := index.get("map"), dict):
            return []
        following = index.setdefault("next_seqs", {})
        missing = {id_: task for id_, task in ids.items() if id_ not in known and id_.rpartition("-")[2].isdecimal()}
        for id_, task in missing.items():
            prefix, _, number = id_.rpartition("-")
            known[id_] = task
            following[prefix] = max(following.get(prefix, 1), int(number) + 1)
        if missing:
            save_id_index(tree.root, index)
    return sorted(missing)


def _is_known(tree: ProjectTree, path: str) -> bool:
    return path in tree.files or counterpart(path) in tree.files


def _read_history(journal: Journal | None, listed: ManifestFile | None, boot_id: str) -> _History:
    """Return the recorded history; without a journal if it cannot be continued (I7)."""
    if journal is None and listed is None:
        return _History(None)
    notes = list(journal.notes) if journal is not None else []
    if journal is None or listed is None or listed.epoch != journal.epoch:
        return _History(None, journal, notes=[*notes, "the journal does not match the manifest: started a new epoch"])
    if not journal.oldest - 1 <= listed.seq <= journal.head:
        ends = f"the journal has {journal.oldest} to {journal.head}, the manifest is of {listed.seq}"
        return _History(None, journal, notes=[*notes, f"{ends}: started a new epoch"])
    files = dict(listed.files)
    unsynced: set[str] = set()
    for states in journal.states_after(listed.seq):
        unsynced.update(states)
        for path, state in states.items():
            if state is None:
                files.pop(path, None)
            else:
                files[path] = state
    return _History(journal, None, files, unsynced, listed.files, _may_have_lost_writes(listed, boot_id), notes)


def is_in_doubt(listed: ManifestFile, project: Path) -> bool:
    """Return whether the machine may have stopped while a worker was running, so that writes may be lost."""
    return _may_have_lost_writes(listed, _boot_id(project))


def _may_have_lost_writes(listed: ManifestFile, boot_id: str) -> bool:
    return not listed.clean and not listed.boot_id == boot_id != ""


def _new_journal(directory: Path, abandoned: Journal | None, retention: Retention | None) -> Journal:
    if abandoned is not None:
        return start_new_epoch(abandoned)
    return Journal.create(directory, secrets.token_hex(16), retention)


def _repair_after_power_cut(tree: ProjectTree, journal: Journal, history: _History, undo: UndoLog) -> list[str]:
    damaged = differing(tree, history.unsynced)
    if not damaged:
        return []
    contents = Contents(damaged)
    for path, state in history.listed.items():
        contents.learn_state(path, state)
    for record in JournalReader(journal.directory).records():
        contents.learn(record)
    epoch = "" if journal.is_damaged else journal.epoch  # a damaged journal lacks acknowledged commands
    repair = Repair(tree, contents, damaged, lambda path: undo.before(tree.absolute(path)), epoch=epoch)
    tree.distrust([*repair.edits, *repair.failed])
    return repair.perform(journal.directory / "lost")


def _describe(found: TreeDiff, head: int) -> str:
    paths = [operation.path for operation in found.operations]
    shown = ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "")
    return f"{len(paths)} files differed from change {head}, see change {head + 1}: {shown}"


def _undo_interrupted_command(undo: UndoLog, journal: Journal, boot_id: str, tree: ProjectTree) -> list[str]:
    """Restore the pre-images of a command whose commit never reached the journal (I6).

    Lines that plain lattice has since appended stay (I12), and the snapshot is derived again.
    """
    pending = undo.pending
    if pending is None:
        return []
    if (pending.epoch, pending.seq, pending.boot_id) == (journal.epoch, journal.head + 1, boot_id):
        with _locked(undo.paths):
            restored = undo.restore()
            _rederive_snapshots(restored, undo.of_others, tree)
            count = len(restored)
        return [f"an interrupted command was undone ({count} files)"]
    undo.clear()
    return []


def _rederive_snapshots(restored: Iterable[str], of_others: Iterable[str], tree: ProjectTree) -> None:
    from lattice.storage.fs import atomic_write

    def read(path: str) -> bytes:
        return Path(tree.absolute(path)).read_bytes()

    prefix = tree.absolute("")
    logs = {path.removeprefix(prefix) for path in of_others}
    for path in sorted({path.removeprefix(prefix) for path in restored}):
        if is_snapshot(path) and tree.status(path) is not None and log_of(path, read) in logs:
            data = derive(path, read)
            if data:
                atomic_write(Path(tree.absolute(path)), data)


@contextlib.contextmanager
def _locked(paths: Iterable[str]) -> Iterator[None]:
    """Hold lattice's locks on these files, for at most 10 s: the project must open."""
    from lattice.storage.locks import LockTimeout, multi_lock

    keys = {key for path in paths if (key := _lock_of(Path(path))) is not None}
    locks = next(
        (parent / "locks" for path in paths for parent in Path(path).parents if parent.name == ".lattice"), None
    )
    with contextlib.ExitStack() as stack:
        if locks is not None and keys:
            with contextlib.suppress(LockTimeout):
                stack.enter_context(multi_lock(locks, sorted(keys)))
        yield


def _lock_of(path: Path) -> str | None:
    if path.name == "ids.json":
        return "ids_json"
    match path.parent.name:
        case "events" | "tasks" as kind:
            return f"{kind}_{path.stem}"
        case "sessions":
            return "sessions_index"
    return f"resources_{path.parent.name}" if path.name == "resource.json" else None


def _boot_id(project: Path) -> str:
    """Return an id of the machine's boot and of the device, which a mounted snapshot changes; empty if unknown."""
    if sys.platform != "linux":
        return ""
    try:
        return f"{_BOOT_ID.read_text().strip()}:{project.stat().st_dev}"
    except OSError:
        return ""
