"""What comes of a write: expected outcomes are values, to be told apart with ``match``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Conflict", "Event", "Merged", "Snapshot", "Written"]

type Event = Mapping[str, Any]
"""One event of lattice, as ``lattice.core.events.create_event`` makes it."""
type Snapshot = dict[str, Any]
"""A task or resource as its events have made it, as in lattice's JSON files."""


@dataclass(frozen=True, slots=True)
class Written[T]:
    """It is done, and durable. ``content`` is what is there now: a snapshot, or a text."""

    content: T


@dataclass(frozen=True, slots=True)
class Merged:
    """A text was merged by line with what others have written since its base; ``content`` is the whole text now."""

    content: str


@dataclass(frozen=True, slots=True)
class Conflict:
    """Nothing was written: the base has moved. Read again, decide again, write again.

    Attributes:
        expected: what the write was built on: the id of the last event, or the text; None for nothing yet.
        found: what is there in its place; None for nothing any more.
    """

    expected: str | None
    found: str | None
