"""What a replica asks of the shell around it, and the points in a history of which both speak (SPEC section 5)."""

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
"""A file's size in bytes and its digest."""


_POSITION = re.compile(r"([0-9A-Za-z]{1,64})-([0-9]{1,18})(?:-([0-9a-f]{2,64}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Position:
    """A point in a project's history. The empty epoch is "nowhere": the copy must be compared as a whole.

    As text it is ``EPOCH-SEQ-MARK``, and ``EPOCH-0`` at the beginning of an epoch.
    """

    epoch: str
    seq: int
    mark: bytes

    @classmethod
    def parse(cls, text: str) -> "Position | None":
        """Return the position that a text names, None when it names none: a number without its mark is none."""
        match = _POSITION.fullmatch(text)
        if match is None or (match[3] is None) != (int(match[2]) == 0) or len(match[3] or "") % 2:
            return None
        return cls(match[1], int(match[2]), bytes.fromhex(match[3] or ""))

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}" + (f"-{self.mark.hex()}" if self.mark else "")


NOWHERE = Position("", 0, b"")


@dataclass(frozen=True, slots=True)
class ApplyChange:
    """Apply ``operations`` in order; report paths that did not match with ``drifted()``.

    An operation on a file that somebody edits here is not applied: ``hold()`` its path, and for a move also
    report its target with ``drifted()``.
    """

    change: Change
    operations: tuple[Operation, ...]


@dataclass(frozen=True, slots=True)
class WritePart:
    """Write this piece of a file; one at offset 0 begins it anew.

    On the last piece, check size and digest and replace the file; when they differ, report ``drifted()``.
    """

    part: Part


@dataclass(frozen=True, slots=True)
class Remove:
    """Remove these files; the server has none there."""

    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Compare:
    """Compare the files with the server's at ``seq`` and call ``compared()`` (to mend) or ``verified()``."""

    seq: int
    entries: Mapping[str, Content]
    mend: bool


@dataclass(frozen=True, slots=True)
class Send:
    """Send this frame."""

    frame: ClientFrame


@dataclass(frozen=True, slots=True)
class DeliverReply:
    """A request's outcome; every change up to its number is in the files."""

    frame: Response


@dataclass(frozen=True, slots=True)
class Save:
    """Store ``position`` and ``wanted`` durably enough that they are never ahead of the files (I5)."""


Effect = ApplyChange | WritePart | Remove | Compare | Send | DeliverReply | Save
