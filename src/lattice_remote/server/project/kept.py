"""Answers that may be given again: for as long as the tree is as it was, for a few seconds, and bounded in memory."""

import asyncio

from lattice_remote.server.data.read_ipc import Found, Read, ReadCommand

__all__ = ["Kept"]

_KEPT_S = 5.0
"""How long an answer may be given again: some say how long ago something was."""
_MAX_BYTES = 32 * 1024 * 1024
_OVERHEAD_BYTES = 1024
"""What each takes beside its contents: there may be many that say next to nothing."""

_ITEM_BYTES = 160
"""What is known of each item of a list."""


class Kept:
    """The newest answers of one state of the tree. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._state: object | None = None
        self._answers: dict[Read, tuple[float, Found]] = {}  # the oldest first
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, asked: Read, state: object | None) -> Found | None:
        """Return what was found in this state, None when that is not known; a state of None is none."""
        since, found = self._answers.get(asked, (0.0, None))
        is_fresh = state is not None and state == self._state and _now() - since < _KEPT_S
        return found if is_fresh else None

    def keep(self, asked: Read, state: object, found: Found) -> None:
        """Keep an answer, and drop those of another state, the old ones, and as many as there is no room for."""
        if state != self._state:
            self._answers.clear()
            self._bytes, self._state = 0, state
        self._drop(asked)
        self._answers[asked] = _now(), found
        self._bytes += _weight_of(asked, found)
        while len(self) > 1 and (self._bytes > _MAX_BYTES or _now() - self._oldest[1] >= _KEPT_S):
            self._drop(self._oldest[0])

    @property
    def _oldest(self) -> tuple[Read, float]:
        asked, (since, _) = next(iter(self._answers.items()))
        return asked, since

    def _drop(self, asked: Read) -> None:
        if (kept := self._answers.pop(asked, None)) is not None:
            self._bytes -= _weight_of(asked, kept[1])


def _now() -> float:
    return asyncio.get_running_loop().time()


def _weight_of(asked: Read, found: Found) -> int:
    said = sum(map(len, asked.argv)) if isinstance(asked, ReadCommand) else len(asked.path)
    items = 0 if found.items is None else len(found.items.ids) * _ITEM_BYTES
    return _OVERHEAD_BYTES + said + len(found.body) + len(found.message) + items
