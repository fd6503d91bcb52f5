"""Edited plans and notes, merged by line against the text they were made from.

Bytes throughout: nothing is assumed of the encoding.
"""

from typing import Literal, NamedTuple

from merge3 import Merge3

__all__ = ["Merged", "merge_text"]

_MAX_LINES = 10_000
"""Longer texts are not merged: on repetitive ones the time grows with the square (here 0.3 s, with ten times 30 s)."""

Outcome = Literal["stored", "merged", "unchanged", "conflict"]


class Merged(NamedTuple):
    """``text`` is what the file has to hold afterwards; on ``unchanged`` and ``conflict`` what it held before."""

    outcome: Outcome
    text: bytes | None


def merge_text(base: bytes | None, mine: bytes, theirs: bytes | None) -> Merged:
    """Merge an edit of ``base`` that reads ``mine`` into the file, which now reads ``theirs``.

    None for ``base`` or ``theirs``: there was, or is, no file. A file that was removed meanwhile is a conflict, and so
    are two texts that were begun independently and differ, or that are too long to be merged in good time.
    """
    if mine in (theirs, base):
        return Merged("unchanged", theirs)
    if theirs == base:
        return Merged("stored", mine)
    if base is None or theirs is None:
        return Merged("conflict", theirs)
    texts = _lines(base), _lines(mine), _lines(theirs)
    if max(map(len, texts)) > _MAX_LINES:
        return Merged("conflict", theirs)
    merge = Merge3(*texts)
    pieces: list[bytes] = []
    for group in merge.merge_groups():
        if group[0] == "conflict":
            return Merged("conflict", theirs)
        pieces += group[1]
    text = b"".join(pieces)
    return Merged("unchanged", theirs) if text == theirs else Merged("merged", text)


def _lines(text: bytes) -> list[bytes]:
    """Split after each line end, so that joining gives back the same bytes."""
    return text.splitlines(keepends=True)
