"""Bounded buffers of incomplete files and manifests, with the operations and changes that arrive during the transfer.

They let a log arrive that grows faster than it can be sent whole.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from lattice_remote.errors import ProtocolError
from lattice_remote.protocol.effects import Content
from lattice_remote.protocol.messages import Change, Entry
from lattice_remote.protocol.operations import AppendBytes, MergeJson, weight_of

__all__ = ["MAX_BUFFERED_BYTES", "MAX_ENTRIES", "Arriving", "ManifestComparison"]

_MAX_KEPT_BYTES = 16 * 1024 * 1024
"""Maximum size of the kept operations of all files."""

_Kept = tuple[Change, AppendBytes | MergeJson]


class Arriving:
    """Files of a cache under transfer: path -> the operations on it since its first piece."""

    def __init__(self) -> None:
        self._files: dict[str, list[_Kept]] = {}
        self._kept_bytes = 0

    def __contains__(self, path: str) -> bool:
        return path in self._files

    def begin(self, path: str) -> None:
        """Start a file at its first piece, which includes every operation so far."""
        self.forget(path)
        self._files[path] = []

    def keep(self, change: Change, operation: AppendBytes | MergeJson) -> bool:
        """Keep an operation until its file is complete; return False if that is too much: fetch the file again."""
        self._files[operation.path].append((change, operation))
        self._kept_bytes += weight_of(operation)
        return self._kept_bytes <= _MAX_KEPT_BYTES

    def forget(self, path: str) -> list[_Kept]:
        """Remove a file that is complete or must be fetched again; return its kept operations."""
        kept = self._files.pop(path, [])
        self._kept_bytes -= sum(weight_of(operation) for _, operation in kept)
        return kept

    def clear(self) -> None:
        self._files.clear()
        self._kept_bytes = 0


MAX_ENTRIES = 250_000
"""Maximum number of files of a project, so that an endless manifest cannot fill the memory."""
MAX_BUFFERED_BYTES = 64 * 1024 * 1024
"""Maximum size of the changes kept during a manifest; beyond it the comparison restarts."""


@dataclass(slots=True)
class ManifestComparison:
    """A manifest under transfer, and the changes received during it."""

    repair: bool
    seq: int = -1  # of the manifest; -1 before its first piece
    mark: bytes = b""
    entries: dict[str, Content] = field(default_factory=dict)
    later: list[Change] = field(default_factory=list)  # without a gap, from ``seq`` on
    complete: bool = False
    later_bytes: int = 0

    def keep(self, change: Change) -> None:
        """Keep a change until the comparison ends. Detects a gap before the change has any effect."""
        last = self.later[-1].seq if self.later else self.seq
        if 0 <= last < change.seq - 1:
            raise ProtocolError(f"change {change.seq} follows {last}: the history has a gap")
        if change.seq > last:
            self.later.append(change)
            self.later_bytes += sum(map(weight_of, change.ops))
        if self.later_bytes > MAX_BUFFERED_BYTES:
            raise ProtocolError("too many changes before the manifest was complete")

    def begin(self, seq: int, mark: bytes) -> None:
        """Start a manifest at ``seq``; drop the changes that it includes."""
        later = [change for change in self.later if change.seq > seq]
        if later and later[0].seq != seq + 1:
            raise ProtocolError(f"change {later[0].seq} follows the manifest of {seq}: the history has a gap")
        self.seq, self.mark, self.later = seq, mark, later

    def add(self, entries: Iterable[Entry], *, last: bool) -> None:
        """Add a piece of the manifest. Only the last may be empty; others could repeat forever."""
        before = len(self.entries)
        pairs = [(entry.path, (entry.size, entry.digest)) for entry in entries]
        self.entries.update(pairs)
        if len(self.entries) != before + len(pairs):
            raise ProtocolError("the manifest lists a file twice")
        if not pairs and not last:
            raise ProtocolError("a piece of the manifest is empty")
        if len(self.entries) > MAX_ENTRIES:
            raise ProtocolError(f"the manifest lists more than {MAX_ENTRIES} files")
        self.complete = last
