"""Detection of edits that an editor based on an older text than the latest.

An editor that does not reread the disk saves the text that it opened, edited. Taken for an edit of a newer text, this
would undo others' changes. So the last few texts that others' changes have replaced are kept for a while. A saved text
that shows nothing of such a change is an edit of the text before it, and the server merges.

Texts are compared by counting lines; if that is inconclusive, the newest text is the base.
"""

import difflib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable

from lattice_remote.client.cache.cache import BASE_DIRECTORY, Cache

__all__ = ["KEPT_S", "StaleEditDetector", "base_of"]

KEPT_S = 900.0
"""Period in which an editor may still hold a replaced text."""
_MAX_TEXTS = 4
"""Most older texts of one file."""
_MAX_BYTES = 8 * 1024 * 1024
"""Larger texts are not kept."""
_MAX_PAIRS = 2000
_MAX_COMPARED = 400
"""Longest compared beginning of a line, in bytes."""
_LIKE = 0.6
"""From this ratio on a line is a rewording of another."""


class StaleEditDetector:
    """The older texts of one cache's plans and notes. Call writing methods under the cache's lock."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def remember(self, path: str, text: bytes | None) -> None:
        """Record a server's text that another client's change is about to replace."""
        if text is None or len(text) > _MAX_BYTES:
            return
        self._cache.replace(f"{_directory(path)}/{time.time_ns():020d}", text)
        for name in self._names(path)[_MAX_TEXTS:]:
            self._cache.delete(f"{_directory(path)}/{name}")

    def base_of(
        self, path: str, text: bytes, current: bytes | None, *, is_known: Callable[[bytes], bool] = lambda _older: False
    ) -> bytes | None:
        """Return the base of a saved text: ``current``, or an older one.

        ``is_known`` recognises the older text that the file held before it was saved. A text that equals an older one
        is withheld before (see ``evidence``); if the user confirms it, it replaces ``current``.
        """
        if current is None:
            return None
        older = [self._cache.read(f"{_directory(path)}/{name}") for name in self._names(path)]
        base = next(filter(is_known, older), None) or base_of(text, current, older)
        return current if base == text else base

    def forget(self, path: str) -> None:
        """Forget the older texts: no editor can hold them any longer."""
        for name in self._names(path, all_ages=True):
            self._cache.delete(f"{_directory(path)}/{name}")

    def _names(self, path: str, *, all_ages: bool = False) -> list[str]:
        try:
            names = os.listdir(os.path.join(self._cache.directory, _directory(path)))
        except OSError:
            return []
        oldest = 0 if all_ages else time.time_ns() - int(KEPT_S * 1e9)
        return sorted((name for name in names if name.isdigit() and int(name) >= oldest), reverse=True)


def _directory(path: str) -> str:
    return f"{BASE_DIRECTORY}/.older/{path}"


def base_of(text: bytes, current: bytes, older: Iterable[bytes]) -> bytes:
    """Return the base of ``text`` among ``current`` and ``older`` (newest first).

    This is the closest one after which only changes came that ``text`` does not show.
    """
    behind = [before for before in older if _shows_nothing_of(text, before, current)]
    return min(behind, key=lambda before: _distance(text, before), default=current)


def _distance(one: bytes, other: bytes) -> int:
    """Return the number of lines in only one of two texts."""
    a, b = _lines(one), _lines(other)
    return (a - b).total() + (b - a).total()


def _shows_nothing_of(text: bytes, before: bytes, after: bytes) -> bool:
    """Return whether a text has no line that a change added, and most lines that it removed.

    False for one that has little in common with either, or rewords added lines.
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
    """Return whether half of the added lines have a rewording that does not reword a removed line.

    Assumed for very many lines.
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
    """Count a text's lines regardless of line endings, without blank ones."""
    return Counter(line for line in (line.strip() for line in text.splitlines()) if line)
