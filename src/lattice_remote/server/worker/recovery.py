"""What happened while nobody looked: a killed process, a power cut, somebody's edit, a restored backup (I6, I7, I12).

At the start of a worker the tree is compared with what the journal says it was. A command that was cut off is undone,
everything else that differs becomes a numbered change.
"""

import contextlib
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lattice_remote.server.journal.journal import Journal, Retention
from lattice_remote.server.journal.reader import JournalReader
from lattice_remote.server.journal.repair import (
    Contents,
    Repair,
    derive,
    differing,
    is_copied,
    is_snapshot,
    log_of,
    mend_copy,
)
from lattice_remote.server.journal.segment import remove_segments
from lattice_remote.server.tree.capture import Capture
from lattice_remote.server.tree.tree import FileState, ManifestFile, ProjectTree, TreeDiff, load_manifest
from lattice_remote.server.tree.undo import UndoLog
from lattice_remote.server.worker.project_import import answer_to, cause_of, finish, first_difference, put_in_place
from lattice_remote.server.worker.store import BY_SERVER, Committer, Store, begin_anew

__all__ = ["Opened", "is_in_doubt", "open_store"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass
class Opened:
    """A project ready for work.

    Attributes:
        store, capture: see there.
        notes: what had to be done, one line each.
        can_repair: a power cut will be noticed and repaired from the journal: lattice's own fsyncs may be left out.
    """

    store: Store
    capture: Capture
    notes: list[str]
    can_repair: bool


@dataclass
class _History:
    """What the journal and the list of files say.

    Attributes:
        journal: None when it can't be read, or does not fit the list.
        abandoned: the journal that does not fit the list.
        files: those at the journal's head.
        unsynced: paths that were changed since the list was written.
        listed: the files as the list has them: what the disk has of others is at least that new.
        is_in_doubt: the machine may have stopped since the last worker wrote, which did not end in order: a file that
            is not as the journal says may be a lost write.
        notes: what was found amiss.
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
    """Open the project in ``project``, which holds ``.lattice/`` and gets ``journal/``.

    One that was brought whole and waits in ``adopting/`` is given its place first, see ``adoption.py``.

    Args:
        project: a real path.
        scratch: the worker's private directory, a real path.
        committer: takes what is found as the first commit.
        code: where Python and its packages lie: what commands may read besides the project.
        retention: how much history is kept.

    Raises:
        OSError: a file can't be read or written.
    """
    adopted = put_in_place(project)
    directory = project / "journal"
    directory.mkdir(mode=0o700, exist_ok=True)
    boot_id = _boot_id(project)
    listed = load_manifest(directory / "manifest")
    if not (project / ".lattice").is_dir():
        raise FileNotFoundError(f"{project} has no .lattice")  # moved away: that does not mean that all is deleted
    was_cache = _make_locks(project / ".lattice" / "locks")
    copied = is_copied(directory, listed)
    undo = UndoLog.open(directory)
    journal = Journal.open(directory, retention)
    mended: list[str] = []
    if adopted is None and copied and listed is not None and journal is not None:
        mended = mend_copy(ProjectTree(project / ".lattice", {}), journal, listed, kept=undo.before)
        undo.clear()  # what it keeps of large files may be another command's by now: it was copied later
    is_new = adopted is not None and (journal is None or journal.find(adopted.id) is None)
    if adopted is not None and is_new:
        mended = [f"{adopted.actor} brought a whole project: a new epoch begins"]
    history = _History(None, journal, notes=mended) if mended else _read_history(journal, listed, boot_id)
    journal = history.journal or _new_journal(directory, history.abandoned, retention)
    tree = ProjectTree(project / ".lattice", history.files)
    notes = list(history.notes)
    if history.journal is not None and history.is_in_doubt and boot_id:
        notes += _repair_after_power_cut(tree, journal, history, undo)
    notes += _undo_what_was_cut_off(undo, journal, boot_id, tree)
    if was_cache:
        notes.append("locks was a file, as in a copied cache; it is a directory again")
    capture = Capture(str(tree.root), str(scratch), undo, tuple(code))
    store = Store(
        journal=journal,
        tree=tree,
        undo=undo,
        capture=capture,
        committer=committer,
        boot_id=boot_id,
        unsynced=history.unsynced,
    )
    if history.journal is None:
        store.adopt(tree.reconcile(trust_signatures=False, limit=None))
        if adopted is not None and is_new:
            store.commit(first_difference(tree), cause_of(adopted), partial(answer_to, adopted), report=False)
    else:
        notes += _number_what_differs(store, trust_signatures=bool(boot_id) or not history.is_in_doubt)
    committer.wait()
    if journal.is_damaged:
        store.new_epoch()
        notes.append("the journal was damaged after changes that were acknowledged: a new epoch begins")
    elif copied and history.journal is not None:
        # Whole, but a copy: the original may have gone on after it was taken, and its numbers are given again here.
        store.new_epoch()
        notes.append("this is a copy of the project's directory: a new epoch begins")
    else:
        store.save_manifest(clean=False)
    if adopted is not None:
        finish(project)
    remove_segments(store.journal.expire(time.time()))
    return Opened(store, capture, notes, bool(boot_id))


def _make_locks(place: Path) -> bool:
    """Make lattice's directory of locks; return whether a file had to be removed for that.

    A cache has a file there, so that plain lattice can't write into it; ``rsync`` may have brought it here.
    """
    is_file = place.is_file() or place.is_symlink()
    if is_file:
        place.unlink()
    place.mkdir(exist_ok=True)
    return is_file


def _number_what_differs(store: Store, *, trust_signatures: bool) -> list[str]:
    """Commit what is not as the journal says, in as many changes as it takes; return a line for each, for the log."""
    notes: list[str] = []
    while True:
        found = store.tree.reconcile(trust_signatures=trust_signatures)
        if found.operations:
            notes.append(_describe(found, store.journal.head))
            store.commit(found, BY_SERVER("recovery"), report=False)
        else:
            store.adopt(found)
        if not found.is_partial:
            return notes


def _read_history(journal: Journal | None, listed: ManifestFile | None, boot_id: str) -> _History:
    """Return what was; without a journal when the history can't be continued (I7)."""
    if journal is None and listed is None:
        return _History(None)
    notes = list(journal.notes) if journal is not None else []
    if journal is None or listed is None or listed.epoch != journal.epoch:
        return _History(
            None, journal, notes=[*notes, "journal and list of files don't belong together: a new epoch begins"]
        )
    if not journal.oldest - 1 <= listed.seq <= journal.head:
        ends = f"the journal has {journal.oldest} to {journal.head}, the list of files is of {listed.seq}"
        return _History(None, journal, notes=[*notes, f"{ends}: a new epoch begins"])
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
    """Tell whether the machine may have stopped while a worker was at work: files may have lost writes since."""
    return _may_have_lost_writes(listed, _boot_id(project))


def _may_have_lost_writes(listed: ManifestFile, boot_id: str) -> bool:
    return not listed.clean and not listed.boot_id == boot_id != ""


def _new_journal(directory: Path, abandoned: Journal | None, retention: Retention | None) -> Journal:
    if abandoned is not None:
        return begin_anew(abandoned)
    return Journal.create(directory, secrets.token_hex(16), retention)


def _repair_after_power_cut(tree: ProjectTree, journal: Journal, history: _History, undo: UndoLog) -> list[str]:
    """Bring back what the machine had not written; return lines for the log."""
    damaged = differing(tree, history.unsynced)
    if not damaged:
        return []
    contents = Contents(damaged)
    for path, state in history.listed.items():
        contents.learn_state(path, state)
    for record in JournalReader(journal.directory).records():
        contents.learn(record)
    epoch = "" if journal.is_damaged else journal.epoch  # then acknowledged commands are among those it lacks
    repair = Repair(tree, contents, damaged, lambda path: undo.before(tree.absolute(path)), epoch=epoch)
    tree.distrust([*repair.edits, *repair.failed])
    return repair.perform(journal.directory / "lost")


def _describe(found: TreeDiff, head: int) -> str:
    paths = [operation.path for operation in found.operations]
    shown = ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "")
    return f"{len(paths)} files were not as change {head} left them, see change {head + 1}: {shown}"


def _undo_what_was_cut_off(undo: UndoLog, journal: Journal, boot_id: str, tree: ProjectTree) -> list[str]:
    """Restore the pre-images of a command whose commit never reached the journal (I6).

    Lines that plain lattice has added to a log since stay (I12), and the snapshot is derived from the log again.
    """
    pending = undo.pending
    if pending is None:
        return []
    if (pending.epoch, pending.seq, pending.boot_id) == (journal.epoch, journal.head + 1, boot_id):
        with _locked(undo.paths):
            restored = undo.restore()
            _derive_again(restored, undo.of_others, tree)
            count = len(restored)
        return [f"a command was cut off and has been undone ({count} files)"]
    undo.clear()
    return []


def _derive_again(restored: Iterable[str], of_others: Iterable[str], tree: ProjectTree) -> None:
    """Derive the snapshots of the logs to which others have added."""
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
    """Hold lattice's locks on these files: plain lattice may be writing them since the last worker died.

    A lock that another process does not release in 10 s is done without: the project has to open.
    """
    from lattice.storage.locks import LockTimeout, multi_lock

    keys = {key for path in paths if (key := _lock_of(Path(path))) is not None}
    locks = next(
        (parent / "locks" for path in paths for parent in Path(path).parents if parent.name == ".lattice"), None
    )
    with contextlib.ExitStack() as held:
        if locks is not None and keys:
            with contextlib.suppress(LockTimeout):
                held.enter_context(multi_lock(locks, sorted(keys)))
        yield


def _lock_of(path: Path) -> str | None:
    """Return the name of the lock under which lattice writes a file; None for a file that it writes without one."""
    if path.name == "ids.json":
        return "ids_json"
    match path.parent.name:
        case "events" | "tasks" as kind:
            return f"{kind}_{path.stem}"
        case "sessions":
            return "sessions_index"
    return f"resources_{path.parent.name}" if path.name == "resource.json" else None


def _boot_id(project: Path) -> str:
    """Return what names this run of the machine, with the device: a snapshot of it may be mounted in the same run.

    Empty where that is not known: nothing is trusted across a crash.
    """
    if sys.platform != "linux":
        return ""
    try:
        return f"{_BOOT_ID.read_text().strip()}:{project.stat().st_dev}"
    except OSError:
        return ""
