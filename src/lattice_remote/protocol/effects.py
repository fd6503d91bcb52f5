"""Effects that a replica returns to its shell, and positions in a history (SPEC section 5)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lattice_remote.protocol.messages import Change, ClientFrame, Part, Response
from lattice_remote.protocol.operations import Operation

__all__ = [
    "NOWHERE",
    "ApplyChange",
    "Compare",
    "Content",
    "DeliverReply",
    "Effect",
    "Position",
    "Remove",
    "Save",
    "Send",
    "WritePart",
]

Content = tuple[int, bytes]
"""Size in bytes and digest."""


_POSITION = re.compile(r"([0-9A-Za-z]{1,64})-([0-9]{1,18})(?:-([0-9a-f]{2,64}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Position:
    """A point in a project's history. With an empty epoch there is none: the whole cache must be compared.

    Its text is ``EPOCH-SEQ-MARK``, or ``EPOCH-0`` at the beginning of an epoch.
    """

    epoch: str
    seq: int
    mark: bytes

    @classmethod
    def parse(cls, text: str) -> "Position | None":
        """Return the position that a text names; None if it names none, or lacks the change id."""
        match = _POSITION.fullmatch(text)
        if match is None or (match[3] is None) != (int(match[2]) == 0) or len(match[3] or "") % 2:
            return None
        return cls(match[1], int(match[2]), bytes.fromhex(match[3] or ""))

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}" + (f"-{self.mark.hex()}" if self.mark else "")


NOWHERE = Position("", 0, b"")


@dataclass(frozen=True, slots=True)
class ApplyChange:
    """Apply ``operations`` in order; report mismatching paths with ``drifted()``.

    Do not apply an operation on a file with a local edit: call ``block()`` with its path, and for a move also
    ``drifted()`` with its target.
    """

    change: Change
    operations: tuple[Operation, ...]


@dataclass(frozen=True, slots=True)
class WritePart:
    """Write this piece of a file; one at offset 0 starts the file.

    On the last piece, check size and digest and replace the file; on a mismatch call ``drifted()``.
    """

    part: Part


@dataclass(frozen=True, slots=True)
class Remove:
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Compare:
    """Compare the files with the server's at ``seq``; call ``compared()`` to repair, or ``verified()``."""

    seq: int
    entries: Mapping[str, Content]
    repair: bool


@dataclass(frozen=True, slots=True)
class Send:
    frame: ClientFrame


@dataclass(frozen=True, slots=True)
class DeliverReply:
    """A reply whose changes are in the files."""

    frame: Response


@dataclass(frozen=True, slots=True)
class Save:
    """Store ``position`` and ``missing`` durably, never ahead of the files (I5)."""


Effect = ApplyChange | WritePart | Remove | Compare | Send | DeliverReply | Save
