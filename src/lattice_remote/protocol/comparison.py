"""A manifest while it is being read, with the changes that come meanwhile: both bounded, neither with a gap."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from lattice_remote.errors import ProtocolError
from lattice_remote.protocol.effects import Content
from lattice_remote.protocol.messages import Change, Entry
from lattice_remote.protocol.operations import weight_of

__all__ = ["MAX_BUFFERED_BYTES", "MAX_ENTRIES", "Comparison"]

MAX_ENTRIES = 250_000
"""How many files a project may have: a manifest that never ends must not fill the memory."""
MAX_BUFFERED_BYTES = 64 * 1024 * 1024
"""How much of changes may wait for a manifest to be complete; past that it is better to begin again."""


@dataclass(slots=True)
class Comparison:
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
