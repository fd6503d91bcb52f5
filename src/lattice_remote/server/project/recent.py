"""The newest changes of a project in memory, framed for the wire, so that most clients catch up without a disk."""

from collections import deque
from itertools import islice

__all__ = ["Recent"]


class Recent:
    """A bounded run of consecutive changes, up to the project's head. The newest is always kept."""

    def __init__(self, max_bytes: int = 8 * 1024 * 1024) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._changes: deque[tuple[int, bytes, bytes]] = deque()  # number, mark, frame

    def append(self, seq: int, mark: bytes, frame: bytes) -> None:
        """Keep change ``seq``, the one after the last."""
        assert not self._changes or self._changes[-1][0] == seq - 1, "numbers have no gap (I1)"
        self._changes.append((seq, mark, frame))
        self._bytes += len(frame)
        while self._bytes > self._max_bytes and len(self._changes) > 1:
            self._bytes -= len(self._changes.popleft()[2])

    def clear(self) -> None:
        """Forget everything: another history begins."""
        self._changes.clear()
        self._bytes = 0

    def after(self, seq: int, max_bytes: int) -> list[tuple[int, bytes]]:
        """Return numbers and frames of the changes after ``seq``, of about ``max_bytes``; empty when not kept."""
        index = self._index(seq + 1)
        found: list[tuple[int, bytes]] = []
        if index is None:
            return found
        for number, _, frame in islice(self._changes, index, None):
            found.append((number, frame))
            max_bytes -= len(frame)
            if max_bytes <= 0:
                break
        return found

    def mark_at(self, seq: int) -> bytes | None:
        """Return the mark of change ``seq``, None when it is not kept."""
        index = self._index(seq)
        return None if index is None else self._changes[index][1]

    def _index(self, seq: int) -> int | None:
        if not self._changes or not self._changes[0][0] <= seq <= self._changes[-1][0]:
            return None
        return seq - self._changes[0][0]
