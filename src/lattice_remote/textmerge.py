"""Three-way line merge of edited plans and notes.

Works on bytes of any encoding. Lines are equal when they differ only in their ends, so an editor that writes CR LF does
not change every line. Line ends and a byte order mark are merged separately; the content of a line is never altered.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from itertools import chain
from typing import Literal, NamedTuple

from merge3 import Merge3

__all__ = ["MergeResult", "merge_text"]

_MAX_WORK = 1_000_000
"""Bound on a merge in steps of about a microsecond: on repetitive lines the time grows with the square."""
_BOM = b"\xef\xbb\xbf"

MergeOutcome = Literal["stored", "merged", "unchanged", "conflict"]


class MergeResult(NamedTuple):
    """``text`` is the file's new content; on ``unchanged`` and ``conflict`` it is the present one."""

    outcome: MergeOutcome
    text: bytes | None


class _TooMuch(Exception):
    """Texts with too many differences to compare in bounded time."""


def merge_text(base: bytes | None, mine: bytes, theirs: bytes | None) -> MergeResult:
    """Merge ``mine``, an edit of ``base``, into the file's present text ``theirs``; None means no file.

    Conflicts: a file that was removed, two different texts without a base, and texts that differ too much to merge in
    about a second.
    """
    if mine in (theirs, base):
        return MergeResult("unchanged", theirs)
    if theirs == base:
        return MergeResult("stored", mine)
    if base is None or theirs is None:
        return MergeResult("conflict", theirs)
    try:
        text = _merge(_Text(base), _Text(mine), _Text(theirs))
    except _TooMuch:
        text = None
    if text is None:
        return MergeResult("conflict", theirs)
    return MergeResult("unchanged", theirs) if text == theirs else MergeResult("merged", text)


class _Text:
    def __init__(self, text: bytes) -> None:
        self.bom = _BOM if text.startswith(_BOM) else b""
        whole = text[len(self.bom) :].splitlines(keepends=True)
        self.lines = [line.rstrip(b"\r\n") for line in whole]
        self.ends = [line[len(content) :] for line, content in zip(whole, self.lines, strict=True)]


def _merge(base: _Text, mine: _Text, theirs: _Text) -> bytes | None:
    """Return the merged text, None for a conflict. Raises _TooMuch."""
    merge = _Merge3(base.lines, mine.lines, theirs.lines, sequence_matcher=_Matcher)
    lines: list[bytes] = []
    ends: list[bytes] = []
    common = {region[0]: region for region in merge.find_sync_regions()}
    for kind, start, end, *_ in merge.merge_regions():
        if kind == "conflict":
            return None
        side = {"unchanged": base, "b": theirs}.get(kind, mine)
        lines += side.lines[start:end]
        if kind == "unchanged":
            _, _, at_mine, _, at_theirs, _ = common[start]
            length = end - start
            at_base = base.ends[start:end]
            ends += map(
                _pick, at_base, mine.ends[at_mine : at_mine + length], theirs.ends[at_theirs : at_theirs + length]
            )
        else:
            ends += side.ends[start:end]
    style = _style(base, mine, theirs)
    usual = next((end for end in (*theirs.ends[:1], *mine.ends[:1]) if end), b"\n")
    ends[:-1] = [style or end or usual for end in ends[:-1]]  # the former last line may have moved up
    ends[-1:] = [style if style and end else end for end in ends[-1:]]
    return _pick(base.bom, mine.bom, theirs.bom) + b"".join(chain.from_iterable(zip(lines, ends, strict=True)))


class _Merge3(Merge3[bytes]):
    """A ``Merge3`` that computes the common regions once."""

    _regions: list[tuple[int, int, int, int, int, int]] | None = None

    def find_sync_regions(self) -> list[tuple[int, int, int, int, int, int]]:
        if self._regions is None:
            self._regions = super().find_sync_regions()
        return self._regions


def _style(*texts: _Text) -> bytes | None:
    """Return the line end for all lines if base, mine and theirs each use a single one."""
    ways = [set(filter(None, text.ends)) for text in texts]
    if any(len(way) != 1 for way in ways):
        return None
    base, mine, theirs = (way.pop() for way in ways)
    return _pick(base, mine, theirs)


def _pick(base: bytes, mine: bytes, theirs: bytes) -> bytes:
    return mine if theirs == base else theirs


Block = tuple[int, int, int]
"""A common run of lines: its start in each text, and its length."""


class _Matcher:
    """Bounded sequence matcher for merge3.

    Matches lines that occur once in both texts first, then their neighbours; difflib compares the rest.
    """

    def __init__(self, _junk: None, a: Sequence[bytes], b: Sequence[bytes], autojunk: bool = True) -> None:  # noqa: ARG002 - difflib's
        self._a, self._b = a, b
        self._work = _Work(_MAX_WORK)

    def get_matching_blocks(self) -> list[Block]:
        """Return the common runs in order; the last is empty. Raises _TooMuch."""
        a, b = self._a, self._b
        found: list[Block] = []
        i, j = 0, 0
        for at_a, at_b in [*_anchors(a, b), (len(a), len(b))]:
            found += self._between(i, at_a, j, at_b)
            i, j = at_a, at_b
        return [*_joined(found), (len(a), len(b), 0)]

    def _between(self, alo: int, ahi: int, blo: int, bhi: int) -> Iterator[Block]:
        """Yield the matches of two ranges: common prefix and suffix, and difflib's in between."""
        a, b = self._a, self._b
        head = 0
        while alo + head < ahi and blo + head < bhi and a[alo + head] == b[blo + head]:
            head += 1
        tail, most = 0, min(ahi - alo, bhi - blo) - head
        while tail < most and a[ahi - 1 - tail] == b[bhi - 1 - tail]:
            tail += 1
        yield alo, blo, head
        left_a, left_b = a[alo + head : ahi - tail], b[blo + head : bhi - tail]
        if left_a and left_b:
            for i, j, size in _Bounded(left_a, left_b, self._work).get_matching_blocks():
                yield alo + head + i, blo + head + j, size
        yield ahi - tail, bhi - tail, tail


def _anchors(a: Sequence[bytes], b: Sequence[bytes]) -> list[tuple[int, int]]:
    """Return the places of the lines that occur once in each text, as many as have the same order."""
    once_a, once_b = _once(a), _once(b)
    pairs = [(i, once_b[line]) for line, i in once_a.items() if line in once_b]  # in the order of a
    ends: list[int] = []  # of the best row of each length: its last place in b
    last: list[int] = []  # the same, as an index into pairs
    before: list[int] = []
    for n, (_, j) in enumerate(pairs):
        length = bisect_left(ends, j)
        before.append(last[length - 1] if length else -1)
        ends[length : length + 1] = [j]
        last[length : length + 1] = [n]
    row: list[tuple[int, int]] = []
    n = last[-1] if last else -1
    while n >= 0:
        row.append(pairs[n])
        n = before[n]
    return row[::-1]


def _once(lines: Sequence[bytes]) -> dict[bytes, int]:
    often = Counter(lines)
    return {line: n for n, line in enumerate(lines) if often[line] == 1}


def _joined(blocks: Iterable[Block]) -> list[Block]:
    joined: list[Block] = []
    for i, j, size in blocks:
        if joined and (joined[-1][0] + joined[-1][2], joined[-1][1] + joined[-1][2]) == (i, j):
            joined[-1] = (joined[-1][0], joined[-1][1], joined[-1][2] + size)
        elif size:
            joined.append((i, j, size))
    return joined


class _Work:
    def __init__(self, steps: int) -> None:
        self._left = steps

    def spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise _TooMuch


class _Bounded(SequenceMatcher[bytes]):
    def __init__(self, a: Sequence[bytes], b: Sequence[bytes], work: _Work) -> None:
        often = Counter(b)
        # Match very frequent lines, such as blank ones, only beside others.
        popular = len(b) if len(b) < 200 else len(b) // 100 + 1
        work.spend(sum(often[line] for line in a if often[line] <= popular))
        self._work = work
        super().__init__(None, a, b)

    def find_longest_match(self, alo, ahi, blo, bhi):  # type: ignore[no-untyped-def,override] # of difflib itself
        """Return difflib's result and count the work."""
        self._work.spend(ahi - alo)
        return super().find_longest_match(alo, ahi, blo, bhi)
