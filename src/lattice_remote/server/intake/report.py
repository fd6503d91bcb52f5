"""What a project that was taken in holds, and what was done to it; or why it is refused."""

import msgspec

__all__ = ["Report"]

MAX_NAMED = 20
_MAX_NOTE_CHARS = 2000
"""A frame's line has room for 4096."""


class Report(msgspec.Struct, kw_only=True):
    """One candidate, checked. ``refused`` is empty when it may be put in place."""

    refused: str = ""
    tasks: int = 0
    archived: int = 0
    files: int = 0
    bytes: int = 0
    hooks: bool = False
    """Whether it came with hooks."""
    hooks_kept: bool = False
    left_out: list[str] = []
    """What lies in the directory and is no part of the project."""
    rebuilt: list[str] = []
    """Files that were not what the event logs say, and now are."""
    warnings: list[str] = []
    """What lattice's own doctor says of it."""

    def notes(self) -> list[str]:
        """Return what a person should know, one line each."""
        lines = []
        if self.hooks and not self.hooks_kept:
            lines.append("its hooks were left out: an administrator must allow them")
        if self.rebuilt:
            lines.append(f"rebuilt from the event logs, which say otherwise: {_named(self.rebuilt)}")
        if self.left_out:
            lines.append(f"left out, no part of a project: {_named(self.left_out)}")
        lines += [f"lattice doctor: {warning}" for warning in self.warnings[:MAX_NAMED]]
        return [line[:_MAX_NOTE_CHARS] for line in lines]


def _named(paths: list[str]) -> str:
    more = len(paths) - MAX_NAMED
    return ", ".join(paths[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
