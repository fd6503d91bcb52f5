"""Brings the files of a tree back to what the journal says they were at one number (I2).

After a power cut: the worker leaves out lattice's own fsyncs, because each change is in the journal, which is fsynced
before anybody is told. So a file may be older than the journal, empty, or newer: touched by a command whose record
never reached the disk. And in a copy of a live data directory every file is of another moment, see ``copied.py``.
"""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from lattice_remote.server.journal.contents import Contents
from lattice_remote.server.tree.manifest import sync_directory
from lattice_remote.server.tree.tree import Tree

__all__ = ["Repair", "booted_at", "damaged_since", "differing"]


def booted_at() -> float:
    """Return when this run of the machine began, in seconds since the epoch."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def damaged_since(tree: Tree, boot_time: float) -> list[str]:
    """Return the files that are not as in ``tree.files``, and have not been touched since the machine started again."""
    return differing(tree, lambda status: status.st_ctime >= boot_time)


def differing(tree: Tree, is_edit: Callable[[os.stat_result], bool]) -> list[str]:
    """Return the files that are not as in ``tree.files``, apart from what somebody has edited since."""
    found, seen = [], set()
    for path, status in tree.scan():
        seen.add(path)
        if not is_edit(status) and _digest(tree, path) != _digest_in(tree, path):
            found.append(path)
    return found + [path for path in tree.files if path not in seen]


class Repair:
    """What it takes to bring ``damaged`` files to what they are in ``tree.files``; ``perform`` writes it.

    What can't be brought back is in ``failed``, and is left as it is: it becomes a change like any other difference.

    Args:
        tree: its ``files`` are those of the number to go to.
        contents: has learned every change up to that number that the journal has.
        damaged: paths of files that are not as they should be.
        kept: returns what else may be the content of a path; the digest decides.

    Raises:
        OSError: a file can't be read.
    """

    def __init__(
        self,
        tree: Tree,
        contents: Contents,
        damaged: Iterable[str],
        kept: Callable[[str], bytes | None] = lambda _: None,
    ) -> None:
        self.failed: list[str] = []
        self._tree = tree
        self._restored: dict[str, bytes] = {}
        self._surplus: list[tuple[str, bool]] = []  # with whether the journal says that it was removed
        # Logs first: a snapshot may be rebuilt from its log. What is to go last: a lost rename may be repeated from it.
        for path in sorted(damaged, key=lambda path: (path not in tree.files, "events/" not in path)):
            state = tree.files.get(path)
            if state is None:
                self._surplus.append((path, contents.is_gone(path)))
                continue
            data = contents.find(path, state.size, state.digest, self._read, kept(path))
            if data is None:
                self.failed.append(path)
            else:
                self._restored[path] = data

    def perform(self, lost: Path) -> list[str]:
        """Write the files; return one line for each, for the log.

        Args:
            lost: a directory for files that nobody knows of: they were written by commands that never were.

        Raises:
            OSError: a file can't be written. It may be done again.
        """
        notes = [f"{path}: could not be brought back" for path in self.failed]
        for path, data in self._restored.items():
            _write(self._tree.absolute(path), data)
            notes.append(f"{path}: brought back from the journal")
        for path, was_removed in self._surplus:
            if was_removed:
                os.unlink(self._tree.absolute(path))
                notes.append(f"{path}: removed again")
            else:
                notes.append(_set_aside(self._tree, path, lost))
        return notes

    def _read(self, path: str) -> bytes:
        if path in self._restored:
            return self._restored[path]
        try:
            return Path(self._tree.absolute(path)).read_bytes()
        except FileNotFoundError:
            return b""


def _digest(tree: Tree, path: str) -> bytes | None:
    content = tree.read(path, None)
    return content.state.digest if content is not None else None


def _digest_in(tree: Tree, path: str) -> bytes | None:
    return tree.files[path].digest if path in tree.files else None


def _set_aside(tree: Tree, path: str, lost: Path) -> str:
    target = lost / path
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(tree.absolute(path), target)
    return f"{path}: of a command that was never finished; now in {lost.name}/"


def _write(path: str, data: bytes) -> None:
    directory, name = os.path.split(path)
    os.makedirs(directory, exist_ok=True)
    scratch = os.path.join(directory, f".tmp.repair.{name}")
    with open(scratch, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
    sync_directory(Path(directory))
