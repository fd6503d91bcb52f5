"""What somebody put by hand into a place that only the server changes: kept aside once, before that is restored.

Plans and notes are edited in place, and edits of them are sent (see ``edits.py``). Every other file is restored when
other hands change it (I4). What may be a person's, ``context.md``, ``config.json`` or any file that the server does
not have, text or not, is first copied to ``.mine/``; what programs write (tasks, events, ids) is not.
"""

import os
from collections.abc import Iterator

from lattice_remote.client.cache.cache import BASE_DIRECTORY, Cache
from lattice_remote.protocol.paths import is_editable

__all__ = ["KEPT_DIRECTORY", "Keepsakes", "may_be_by_hand"]

KEPT_DIRECTORY = ".mine"
_MAX_COPIES_OF_ONE = 5
_MAX_COPIES = 1000
_MAX_READ_BYTES = 32 * 1024 * 1024
"""What is larger is moved, not copied: the file is missing until the server's comes."""
_WRITTEN_BY_PROGRAMS = frozenset({"artifacts", "events", "ids.json", "resources", "sessions", "tasks"})


def may_be_by_hand(path: str) -> bool:
    """Whether a person may have written this file, though it is neither a plan nor notes of a task."""
    top, _, rest = path.partition("/")
    if top == "archive":
        return rest.startswith(("plans/", "notes/"))
    return top not in _WRITTEN_BY_PROGRAMS and not is_editable(path)


class Keepsakes:
    """The files that were set aside in one cache. Methods must be called under the cache's lock."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.notices: list[str] = []
        """What the next command should say."""

    def remember(self, path: str) -> None:
        """The file is the server's now: what differs from it later is somebody's text, also if nobody watched."""
        if "/" in path or not may_be_by_hand(path):
            return
        if self._cache.size(path) is None:
            self._cache.delete(_base_path(path))
        elif (text := self._cache.read(path)) != self._base(path):
            self._cache.replace(_base_path(path), text)

    def keep(self, path: str, *, is_strange: bool) -> None:
        """Copy the file aside if somebody may have written it; call before it is replaced or removed.

        Args:
            path: the file.
            is_strange: other hands are known to have changed it. Otherwise only a text that differs from what was
                remembered counts.
        """
        size, base = self._cache.size(path), self._base(path)
        if not size or path.endswith("~") or not (is_strange or base is not None):
            return
        content = self._cache.read(path) if size <= _MAX_READ_BYTES else None
        if content is not None and (content == base or not content.strip()):
            return
        copy = self._place_for(path, content)
        if copy is None:
            return
        if len(list(self._copies())) >= _MAX_COPIES:
            self._say(f"nothing more is kept of what was restored: {KEPT_DIRECTORY} holds {_MAX_COPIES} files")
            return
        if content is None:
            self._cache.move(path, copy)
        else:
            self._cache.replace(copy, content)
        self._say(f"{path} belongs to the server and was restored; what was written into it is in {copy}")

    def _say(self, notice: str) -> None:
        if notice not in self.notices:
            self.notices.append(notice)

    def copies(self) -> list[str]:
        """Return the copies that nobody has removed yet."""
        return sorted(self._copies())

    def _base(self, path: str) -> bytes | None:
        place = _base_path(path)
        return None if self._cache.size(place) is None else self._cache.read(place)

    def _place_for(self, path: str, content: bytes | None) -> str | None:
        """Return where to put a file's content, None where that was too much to read; None when it is kept already."""
        copy = f"{KEPT_DIRECTORY}/{path}"
        for number in range(2, _MAX_COPIES_OF_ONE + 2):
            if (size := self._cache.size(copy)) is None:
                return copy
            if content is not None and size == len(content) and self._cache.read(copy) == content:
                return None
            copy = f"{KEPT_DIRECTORY}/{path}.{number}"
        return f"{KEPT_DIRECTORY}/{path}.{_MAX_COPIES_OF_ONE}"  # the last one gives way to the newest

    def _copies(self) -> Iterator[str]:
        top = os.path.join(self._cache.directory, KEPT_DIRECTORY)
        for directory, _, names in os.walk(top):
            for name in names:
                yield os.path.relpath(os.path.join(directory, name), self._cache.directory).replace(os.sep, "/")


def _base_path(path: str) -> str:
    return f"{BASE_DIRECTORY}/{path}"
