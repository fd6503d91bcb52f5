"""What happened while nobody looked: a killed process, a power cut, somebody's edit, a restored backup (I6, I7, I12).

At the start of a worker the tree is compared with what the journal says it was. A command that was cut off is undone,
everything else that differs becomes a numbered change.
"""

import secrets
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lattice_remote.server.capture import Capture
from lattice_remote.server.committer import Committer
from lattice_remote.server.journal import Journal, Retention
from lattice_remote.server.manifest import FileState, ManifestFile, load_manifest
from lattice_remote.server.store import BY_SERVER, Store
from lattice_remote.server.tree import Tree
from lattice_remote.server.undo import UndoLog

__all__ = ["Opened", "open_store"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass
class Opened:
    """A project ready for work, and what had to be done for that, one line each."""

    store: Store
    notes: list[str] = field(default_factory=list)


def open_store(
    project: Path, scratch: Path, committer: Committer, *, code: Iterable[str], retention: Retention | None = None
) -> Opened:
    """Open the project in ``project``, which holds ``.lattice/`` and gets ``journal/``.

    Args:
        project: a real path.
        scratch: the worker's private directory, a real path.
        committer: takes what is found as the first commit.
        code: where Python and its packages lie: what commands may read besides the project.
        retention: how much history is kept.

    Raises:
        OSError: a file can't be read or written.
    """
    directory = project / "journal"
    directory.mkdir(mode=0o700, exist_ok=True)
    boot_id = _boot_id()
    undo = UndoLog.open(directory)
    journal = Journal.open(directory, retention)
    listed = load_manifest(directory / "manifest")
    files, notes = _files_at_head(journal, listed)
    if journal is None or files is None:
        if listed is not None or journal is not None:
            notes.append("the journal is not complete: a new epoch begins")
        journal = Journal.create(directory, secrets.token_hex(16), retention)
        begins, trusted = True, False
    else:
        begins, trusted = False, listed is not None and (listed.clean or listed.boot_id == boot_id != "")
    notes += _undo_what_was_cut_off(undo, journal, boot_id)
    tree = Tree(project / ".lattice", files or {})
    capture = Capture(str(tree.root), str(scratch), undo, tuple(code))
    store = Store(journal=journal, tree=tree, undo=undo, capture=capture, committer=committer, boot_id=boot_id)
    found = tree.reconcile(trust_signatures=trusted)
    if found.operations and not begins:
        store.commit(found, BY_SERVER("recovery"))
        shown = ", ".join(list(found.states)[:5])
        notes.append(f"{len(found.states)} files differed from change {journal.head - 1}: now {journal.head} ({shown})")
        committer.wait()
    else:
        tree.accept(found)
    store.save_manifest(clean=False)
    return Opened(store, notes)


def _files_at_head(
    journal: Journal | None, listed: ManifestFile | None
) -> tuple[dict[str, FileState] | None, list[str]]:
    """Return the files as of the journal's head: the list on disk, rolled forward. None when that can't be done."""
    if journal is None:
        return None, []
    notes = list(journal.notes)
    if listed is None:
        return None, [*notes, "there is no list of files"]
    if listed.epoch != journal.epoch:
        return None, [*notes, "the list of files and the journal are of different epochs"]
    if not journal.oldest - 1 <= listed.seq <= journal.head:
        return None, [*notes, f"the list of files is of {listed.seq}, the journal ends at {journal.head}"]
    files = dict(listed.files)
    for states in journal.states_after(listed.seq):
        for path, state in states.items():
            if state is None:
                files.pop(path, None)
            else:
                files[path] = state
    return files, notes


def _undo_what_was_cut_off(undo: UndoLog, journal: Journal, boot_id: str) -> list[str]:
    """Restore the pre-images of a command whose commit never reached the journal (I6)."""
    pending = undo.pending
    if pending is None:
        return []
    if (pending.epoch, pending.seq, pending.boot_id) == (journal.epoch, journal.head + 1, boot_id):
        count = len(undo.restore())
        return [f"a command was cut off and has been undone ({count} files)"]
    undo.clear()
    return []


def _boot_id() -> str:
    """Return what names this run of the machine; empty where that is not known: nothing is trusted across a crash."""
    if sys.platform != "linux":
        return ""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
