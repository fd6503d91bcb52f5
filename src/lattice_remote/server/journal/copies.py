"""Copies of a data directory, and the repair of one that was made while the server ran (I7)."""

import os
from collections.abc import Callable
from pathlib import Path

from lattice_remote.server.journal.contents import Contents
from lattice_remote.server.journal.journal import Journal
from lattice_remote.server.journal.repair import Repair, differing
from lattice_remote.server.journal.segment import JournalReader, Record, list_beside, segment_paths
from lattice_remote.server.tree.tree import FileState, ManifestFile, ProjectTree, load_manifest

__all__ = ["is_copied", "place_of", "repair_copy"]


def place_of(directory: Path) -> list[int]:
    """Return an identity that a copy of this journal directory does not share; empty before its undo log exists."""
    try:
        return [os.stat(directory).st_ino, os.stat(directory / "undo").st_ino]
    except FileNotFoundError:
        return []


def is_copied(directory: Path, listed: ManifestFile | None) -> bool:
    """Return whether the manifest was written in another directory."""
    return listed is not None and bool(listed.place) and listed.place != place_of(directory)


def repair_copy(
    tree: ProjectTree, journal: Journal, listed: ManifestFile, *, kept: Callable[[str], bytes | None]
) -> list[str]:
    """Bring the tree to the last change that all of it can reach; return lines for the log. Repeatable after a crash.

    Empty if nothing is repaired: the files fit, or some were written after the server had stopped in order. Other
    outside changes stay, see ``Repair``.

    Args:
        tree: of the copy; its ``files`` are of the reached number afterwards.
        journal: the copied one, open.
        listed: the copied manifest.
        kept: returns the copied undo log's content of an absolute path.

    Raises:
        OSError: a file cannot be read or written.
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
        f"this is a copy of a running server: {len(notes)} files were restored to change {target}; a new epoch starts"
    )
    return [first, *notes]


def _is_edited(tree: ProjectTree, after: float) -> bool:
    """Return whether any file was written after this time, in seconds since the epoch."""
    return any(status.st_mtime > after for _, status in tree.scan())


class _States:
    """The files at any number that the journal reaches."""

    def __init__(self, journal: Journal, listed: ManifestFile, tree: ProjectTree) -> None:
        self.contents = Contents()
        """Contents up to the number last asked for."""
        self.changed_at: dict[str, int] = {}
        """The last change of each file up to that number that can be undone."""
        self._journal = journal
        oldest = _oldest_list(journal, listed)
        self._has_list = oldest is not None
        self._first = oldest.seq if oldest is not None else journal.oldest - 1
        # Without a manifest: files that the journal does not name have not changed since it began, so the disk has
        # them.
        self._files = oldest.files if oldest is not None else _on_disk(tree)

    def at(self, seq: int) -> dict[str, FileState]:
        """Return the files at this number, and learn the contents up to it."""
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
    """Return the oldest manifest from which the journal continues.

    The copied ``manifest`` may be newer than the journal, or than the target.
    """
    beside = map(load_manifest, map(list_beside, segment_paths(journal.directory)))
    lists = [found for found in (listed, *beside) if found is not None and found.epoch == journal.epoch]
    reached = range(journal.oldest - 1, journal.head + 1)
    return min((found for found in lists if found.seq in reached), key=lambda found: found.seq, default=None)


def _on_disk(tree: ProjectTree) -> dict[str, FileState]:
    read = {path: tree.read(path, None) for path, _ in tree.scan()}
    return {path: content.state for path, content in read.items() if content is not None}
