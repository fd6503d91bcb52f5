"""A copy of a data directory that was taken while its server was at work (I2, I7, I12).

Whoever copies file by file, as rsync does, gets each file as it was at another moment; a file that was moved meanwhile
may have been caught twice or not at all. The journal is copied after the tree, since its name sorts after
``.lattice``. So it tells what every file of the copy was to become: the tree is brought to the journal's head, and
where a file that the journal only announces is missing, to the last change before it. Then a new epoch begins: a
copy is another history from here on, so that clients of the original compare their files as a whole. That holds for a
copy of a stopped server too: the original may have gone on since, or may go on elsewhere.

A copy is recognised by the inodes of the journal's directory and its undo log: they stay the same as long as a
project lives, and a copy seldom has them.
"""

import os
from collections.abc import Callable
from pathlib import Path

from lattice_remote.server.journal.contents import Contents
from lattice_remote.server.journal.journal import Journal
from lattice_remote.server.journal.journal_reader import JournalReader
from lattice_remote.server.journal.repair import Repair, differing
from lattice_remote.server.journal.segments import Record, list_beside, segment_paths
from lattice_remote.server.tree.manifest import FileState, ManifestFile, load_manifest
from lattice_remote.server.tree.tree import Tree

__all__ = ["is_copied", "mend_copy", "place_of"]


def place_of(directory: Path) -> list[int]:
    """Return what names this journal directory, and no copy of it; empty before its undo log was made."""
    try:
        return [os.stat(directory).st_ino, os.stat(directory / "undo").st_ino]
    except FileNotFoundError:
        return []


def is_copied(directory: Path, listed: ManifestFile | None) -> bool:
    """Tell whether the list of files was written in another place than this."""
    return listed is not None and bool(listed.place) and listed.place != place_of(directory)


def mend_copy(tree: Tree, journal: Journal, listed: ManifestFile, *, kept: Callable[[str], bytes | None]) -> list[str]:
    """Bring the tree to the last change of the journal to which all of it can be brought; return lines for the log.

    Empty when there is nothing to repair. Outside changes in the copy before its first start stay
    (``Repair``), and so does all of it if files were written there after the server had ended in order. May be done
    again after a crash.

    Args:
        tree: of the copy; its ``files`` are of the number that was reached in the end.
        journal: the copied one, open.
        listed: the copied list of files.
        kept: returns what the copied undo log keeps of a path, by its absolute path.

    Raises:
        OSError: a file can't be read or written.
    """
    states = _States(journal, listed, tree)
    target = journal.head
    while True:
        tree.files = states.at(target)
        damaged = differing(tree)
        epoch = "" if journal.is_damaged else journal.epoch
        repair = Repair(tree, states.contents, damaged, lambda path: kept(tree.absolute(path)), epoch=epoch)
        is_whole = not repair.is_needed or (listed.clean and _is_edited(tree, journal.newest))
        if is_whole and target == journal.head:
            return []
        late = [states.changed_at[path] for path in repair.failed if path in states.changed_at]
        if not late:
            break
        target = min(late) - 1
    notes = repair.perform(journal.directory / "lost")
    first = (
        f"this is a copy of a running server: {len(notes)} files were brought to change {target}, a new epoch begins"
    )
    return [first, *notes]


def _is_edited(tree: Tree, after: float) -> bool:
    """Tell whether any file was written after this time, in seconds since the epoch."""
    return any(status.st_mtime > after for _, status in tree.scan())


class _States:
    """The files at any number that the journal reaches, as far as it and the list tell."""

    def __init__(self, journal: Journal, listed: ManifestFile, tree: Tree) -> None:
        self.contents = Contents()
        """What the journal tells up to the number last asked for."""
        self.changed_at: dict[str, int] = {}
        """The last change of each file up to there that can be taken back."""
        self._journal = journal
        oldest = _oldest_list(journal, listed)
        self._has_list = oldest is not None
        self._first = oldest.seq if oldest is not None else journal.oldest - 1
        # Without a list: what the journal does not name has not changed since it began, so it is as on the disk.
        self._files = oldest.files if oldest is not None else _on_disk(tree)

    def at(self, seq: int) -> dict[str, FileState]:
        """Return the files at this number, and learn what leads there."""
        files = dict(self._files)
        self.contents, self.changed_at = Contents(), {}
        for path, state in self._files.items():
            self.contents.learn_state(path, state)
        for record in JournalReader(self._journal.directory).records():
            if record.seq > seq:
                break
            self.contents.learn(record)
            if record.seq > self._first:
                self._apply(files, record)
        return files

    def _apply(self, files: dict[str, FileState], record: Record) -> None:
        for path, state in record.files.items():
            if state is None:
                files.pop(path, None)
            else:
                files[path] = state
            if self._has_list:
                self.changed_at[path] = record.seq


def _oldest_list(journal: Journal, listed: ManifestFile) -> ManifestFile | None:
    """Return the oldest list of files from which the journal leads on.

    The copied ``manifest`` may be newer than the copied journal, or than the change to go to.
    """
    beside = map(load_manifest, map(list_beside, segment_paths(journal.directory)))
    lists = [found for found in (listed, *beside) if found is not None and found.epoch == journal.epoch]
    reached = range(journal.oldest - 1, journal.head + 1)
    return min((found for found in lists if found.seq in reached), key=lambda found: found.seq, default=None)


def _on_disk(tree: Tree) -> dict[str, FileState]:
    read = {path: tree.read(path, None) for path, _ in tree.scan()}
    return {path: content.state for path, content in read.items() if content is not None}
