"""Files of which not all pieces have come, and what is done to them meanwhile: kept for their end, bounded.

A log that grows faster than it can be sent as a whole would otherwise never arrive.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from lattice_remote.errors import ProtocolError
from lattice_remote.protocol.effects import Content
from lattice_remote.protocol.messages import Change, Entry
from lattice_remote.protocol.operations import AppendBytes, MergeJson, weight_of

__all__ = ["MAX_BUFFERED_BYTES", "MAX_ENTRIES", "Arriving", "ManifestComparison"]

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


MAX_ENTRIES = 250_000
"""How many files a project may have: a manifest that never ends must not fill the memory."""
MAX_BUFFERED_BYTES = 64 * 1024 * 1024
"""How much of changes may wait for a manifest to be complete; past that it is better to begin again."""


@dataclass(slots=True)
class ManifestComparison:
    """A manifest that is being read, and the changes that arrived meanwhile."""

    mend: bool
    seq: int = -1  # of the manifest, once its first piece is here
    mark: bytes = b""
    entries: dict[str, Content] = field(default_factory=dict)
    later: list[Change] = field(default_factory=list)  # without a gap, from ``seq`` on
    complete: bool = False
    later_bytes: int = 0

    def keep(self, change: Change) -> None:
        """Remember a change until the comparison is over; a gap is noticed here, before anything is taken."""
        last = self.later[-1].seq if self.later else self.seq
        if 0 <= last < change.seq - 1:
            raise ProtocolError(f"change {change.seq} follows {last}: the history has a gap")
        if change.seq > last:
            self.later.append(change)
            self.later_bytes += sum(map(weight_of, change.ops))
        if self.later_bytes > MAX_BUFFERED_BYTES:
            raise ProtocolError("too many changes before the manifest was complete")

    def begin(self, seq: int, mark: bytes) -> None:
        """The manifest is of this number: the changes up to it are in it."""
        later = [change for change in self.later if change.seq > seq]
        if later and later[0].seq != seq + 1:
            raise ProtocolError(f"change {later[0].seq} follows the manifest of {seq}: the history has a gap")
        self.seq, self.mark, self.later = seq, mark, later

    def add(self, entries: Iterable[Entry], *, last: bool) -> None:
        """Take a piece of the manifest; it must be of some use, or it could go on for ever."""
        before = len(self.entries)
        pairs = [(entry.path, (entry.size, entry.digest)) for entry in entries]
        self.entries.update(pairs)
        if len(self.entries) != before + len(pairs):
            raise ProtocolError("the manifest lists a file twice")
        if not pairs and not last:
            raise ProtocolError("a piece of the manifest lists nothing")
        if len(self.entries) > MAX_ENTRIES:
            raise ProtocolError(f"the manifest lists more than {MAX_ENTRIES} files")
        self.complete = last
