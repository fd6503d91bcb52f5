"""Files of which not all pieces have come, and what is done to them meanwhile: kept for their end, bounded.

A log that grows faster than it can be sent as a whole would otherwise never arrive.
"""

from dataclasses import dataclass, field

from lattice_remote.protocol.messages import Change
from lattice_remote.protocol.operations import AppendBytes, MergeJson, weight_of

__all__ = ["Arriving"]

_MAX_KEPT_BYTES = 16 * 1024 * 1024
"""How much of operations is kept, of all files together."""

_Kept = tuple[Change, AppendBytes | MergeJson]


@dataclass(slots=True)
class _File:
    """One file, as it was at ``seq``, and what was done to it after that number."""

    seq: int
    later: list[_Kept] = field(default_factory=list)


class Arriving:
    """All such files of a copy, by path."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        self._kept_bytes = 0

    def begin(self, path: str, seq: int) -> None:
        """The first piece is here: what came after its number and was kept for an earlier pass counts still."""
        before = self.forget(path)
        later = [kept for kept in before if kept[0].seq > seq]
        self._kept_bytes += _weight(later)
        self._files[path] = _File(seq, later)

    def keep(self, change: Change, operation: AppendBytes | MergeJson) -> bool:
        """Keep an operation for the end of its file; return False when the file must come anew."""
        file = self._files.get(operation.path)
        if file is None:
            return False
        if change.seq > file.seq:
            self._kept_bytes += weight_of(operation)
            file.later.append((change, operation))
        return self._kept_bytes <= _MAX_KEPT_BYTES

    def forget(self, path: str) -> list[_Kept]:
        """It is complete, or is to come anew: return what was kept for it."""
        file = self._files.pop(path, None)
        if file is None:
            return []
        self._kept_bytes -= _weight(file.later)
        return file.later

    def clear(self) -> None:
        """Forget all."""
        self._files.clear()
        self._kept_bytes = 0


def _weight(kept: list[_Kept]) -> int:
    return sum(weight_of(operation) for _, operation in kept)
