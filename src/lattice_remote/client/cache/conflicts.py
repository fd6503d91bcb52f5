"""Conflicting edits of plans and notes, set aside until the user resolves them.

The local text is below ``.remote/conflicts/``, under its file's path (a second one as ``task_....2.md``). The file
itself holds the server's text.
"""

import contextlib
import itertools
import json
import os
from dataclasses import dataclass

from lattice_remote.client.cache.cache import Cache
from lattice_remote.client.cache.edits import Edits
from lattice_remote.client.config import PRIVATE_DIRECTORY
from lattice_remote.errors import StorageError, one_line
from lattice_remote.files import Signature
from lattice_remote.protocol.paths import is_editable

__all__ = ["CONFLICTS_DIRECTORY", "TextConflict", "TextConflicts"]

CONFLICTS_DIRECTORY = f"{PRIVATE_DIRECTORY}/conflicts"
_FOLDERS = ("plans", "notes")
_MAX_NAMED = 3


@dataclass(frozen=True, slots=True)
class TextConflict:
    """One file whose local text was set aside."""

    path: str
    copies: tuple[str, ...]
    task: str
    """The task's id."""
    short_id: str
    """The task's short id; its id if it has none."""
    is_active: bool
    """Whether the task is active, so that its plan and notes can be edited."""
    found: tuple[Signature | None, ...]
    """Signature of each copy when it was found."""

    @property
    def what(self) -> str:
        """``plan`` or ``notes``."""
        return "plan" if self.path.startswith("plans/") else "notes"

    def is_called(self, name: str) -> bool:
        """Return whether ``name`` is its task's id, short id, or a path of it."""
        path = name.replace(os.sep, "/").removeprefix("./")
        return name.upper() in (self.task.upper(), self.short_id.upper()) or any(
            path == known or path.endswith("/" + known) for known in (self.path, *self.copies)
        )


class TextConflicts:
    """The conflicts of one cache. Call ``set_aside`` and ``end`` under the cache's lock."""

    def __init__(self, cache: Cache, edits: Edits) -> None:
        self._cache = cache
        self._edits = edits

    def set_aside(self, path: str) -> str:
        """Save a conflicting edit, once, and return the copy's path."""
        text, stem = self._cache.read(path), f"{CONFLICTS_DIRECTORY}/{path.removesuffix('.md')}"
        for number in itertools.count(1):
            copy = f"{stem}.md" if number == 1 else f"{stem}.{number}.md"
            if self._cache.size(copy) is None or self._cache.read(copy) == text:
                break
        self._cache.replace(copy, text)
        self._edits.give_up(path, text)
        return copy

    def end(self, conflict: TextConflict) -> None:
        """Remove the copies of a conflict; one that was saved again since remains a conflict."""
        for copy, found in zip(conflict.copies, conflict.found, strict=True):
            if self._cache.signature(copy) == found:
                self._cache.delete(copy)

    def copies(self) -> list[str]:
        """Return the existing copies; the user may remove one by hand."""
        found: list[str] = []
        for folder in _FOLDERS:
            with contextlib.suppress(OSError):
                names = os.listdir(self._cache.absolute(f"{CONFLICTS_DIRECTORY}/{folder}"))
                found += [f"{CONFLICTS_DIRECTORY}/{folder}/{name}" for name in sorted(names, key=lambda n: (len(n), n))]
        return found

    def all(self) -> list[TextConflict]:
        files: dict[str, list[str]] = {}
        for copy in self.copies():
            folder, name = copy.split("/")[-2:]
            path = f"{folder}/{name.partition('.')[0]}.md"
            if is_editable(path):
                files.setdefault(path, []).append(copy)
        return [self._conflict(path, copies) for path, copies in files.items()]

    def notice(self) -> str | None:
        """Return the one-line notice for every command while there are conflicts."""
        if not self.copies():
            return None
        found = self.all()
        if not found:
            return None
        tasks = list(dict.fromkeys(conflict.short_id for conflict in found))
        if len(found) == 1:
            one = found[0]
            return (
                f"conflict: your text of the {one.what} of {one.short_id} was not sent, it is in "
                f".lattice/{one.copies[0]}; see: lattice remote resolve {one.short_id}"
            )
        named = ", ".join(tasks[:_MAX_NAMED]) + (f" and {len(tasks) - _MAX_NAMED} more" * (len(tasks) > _MAX_NAMED))
        return f"{len(found)} conflicts: your texts for {named} were not sent; see: lattice remote resolve"

    def name_of(self, path: str) -> str:
        """Return the short id of a plan's or notes' task."""
        return self.waiting(path).short_id

    def waiting(self, path: str) -> TextConflict:
        """Return a withheld edit as a conflict without a copy: the file itself holds the text."""
        return self._conflict(path, [])

    def _conflict(self, path: str, copies: list[str]) -> TextConflict:
        task = path.rpartition("/")[2].removesuffix(".md")
        active = f"tasks/{task}.json"
        is_active = self._cache.size(active) is not None
        short_id = self._short_id(active if is_active else f"archive/{active}")
        found = tuple(map(self._cache.signature, copies))
        return TextConflict(path, tuple(copies), task, short_id or task, is_active, found)

    def _short_id(self, snapshot: str) -> str | None:
        with contextlib.suppress(StorageError, OSError, ValueError, AttributeError):
            short_id = json.loads(self._cache.read(snapshot)).get("short_id")
            return one_line(short_id) if isinstance(short_id, str) else None
        return None
