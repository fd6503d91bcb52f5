"""Which text of the server's a saved file was made from, where an editor had opened it before the last change came.

An editor that does not look at the disk again saves what it opened, edited: taken for an edit of the text that came
meanwhile, it would undo what others wrote. So the last few texts that others' changes have replaced are kept for a
while, and a saved text that shows nothing of such a change is an edit of the text before it; the server merges then.

What is told apart is lines, by their number: where that says nothing the newest text counts.
"""

import difflib
import os
import time
from collections import Counter
from collections.abc import Iterable

from lattice_remote.client.cache.cache import BASE_DIRECTORY, Cache

__all__ = ["KEPT_S", "StaleEditDetector", "base_of"]

KEPT_S = 900.0
"""For how long an editor that was open when a change came is reckoned with."""
_MAX_TEXTS = 4
"""How many older texts of one file are kept."""
_MAX_BYTES = 8 * 1024 * 1024
"""Of larger texts none are kept."""
_MAX_PAIRS = 2000
_MAX_COMPARED = 400
"""Of longer lines the beginnings are compared, in bytes."""
_LIKE = 0.6
"""From this ratio on a line is another one's new wording."""


class StaleEditDetector:
    """The older texts of one cache's plans and notes. Methods that write must be called under the cache's lock."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def remember(self, path: str, text: bytes | None) -> None:
        """A change of others' is about to replace this text of the server's."""
        if text is None or len(text) > _MAX_BYTES:
            return
        self._cache.replace(f"{_directory(path)}/{time.time_ns():020d}", text)
        for name in self._names(path)[_MAX_TEXTS:]:
            self._cache.delete(f"{_directory(path)}/{name}")

    def base_of(self, path: str, text: bytes, current: bytes | None) -> bytes | None:
        """Return the text that a saved one was made from: ``current``, or an older one.

        Text that is exactly an older one is withheld before (``evidence.py``); if the user confirms it, it replaces
        ``current``.
        """
        if current is None:
            return None
        older = [self._cache.read(f"{_directory(path)}/{name}") for name in self._names(path)]
        base = base_of(text, current, older)
        return current if base == text else base

    def forget(self, path: str) -> None:
        """No editor needs to be reckoned with any more."""
        for name in self._names(path, all_ages=True):
            self._cache.delete(f"{_directory(path)}/{name}")

    def _names(self, path: str, *, all_ages: bool = False) -> list[str]:
        """Return the names of the older texts, newest first."""
        try:
            names = os.listdir(os.path.join(self._cache.directory, _directory(path)))
        except OSError:
            return []
        oldest = 0 if all_ages else time.time_ns() - int(KEPT_S * 1e9)
        return sorted((name for name in names if name.isdigit() and int(name) >= oldest), reverse=True)


def _directory(path: str) -> str:
    return f"{BASE_DIRECTORY}/.older/{path}"


def base_of(text: bytes, current: bytes, older: Iterable[bytes]) -> bytes:
    """Return which of the texts ``current`` and ``older`` (newest first) ``text`` was made from.

    That is the closest of those after which came only what ``text`` shows nothing of.
    """
    behind = [before for before in older if _shows_nothing_of(text, before, current)]
    return min(behind, key=lambda before: _distance(text, before), default=current)


def _distance(one: bytes, other: bytes) -> int:
    """Return how many lines only one of two texts has."""
    a, b = _lines(one), _lines(other)
    return (a - b).total() + (b - a).total()


def _shows_nothing_of(text: bytes, before: bytes, after: bytes) -> bool:
    """Whether a text has none of the lines that a change brought, and most of those that it took away.

    False for one that has little in common with either, or new wordings of what the change brought.
    """
    has, had, has_now = _lines(text), _lines(before), _lines(after)
    added, removed = has_now - had, had - has_now
    if not (added or removed) or (has & had).total() * 2 < had.total():
        return False
    if any(has[line] > had[line] for line in added):
        return False
    if (removed & has).total() * 2 < removed.total():
        return False
    return not _are_reworded(added, has - had, removed)


def _are_reworded(added: Counter[bytes], own: Counter[bytes], removed: Counter[bytes]) -> bool:
    """Whether half of the added lines are there in a new wording, which is not one of a line that was removed.

    With very many lines that is taken to be so.
    """
    if len(own) * (len(added) + len(removed)) > _MAX_PAIRS:
        return True
    likest = {line: max((_likeness(line, other) for other in removed), default=0.0) for line in own}
    reworded = sum(any(_likeness(line, other) >= max(_LIKE, likest[line]) for line in own) for other in added)
    return 0 < len(added) <= 2 * reworded


def _likeness(one: bytes, other: bytes) -> float:
    matcher = difflib.SequenceMatcher(None, one[:_MAX_COMPARED], other[:_MAX_COMPARED], autojunk=False)
    return matcher.ratio() if matcher.quick_ratio() >= _LIKE else 0.0


def _lines(text: bytes) -> Counter[bytes]:
    """Count a text's lines, whatever they end with; blank ones tell nothing."""
    return Counter(line for line in (line.strip() for line in text.splitlines()) if line)
