"""Plans and notes, merged by line."""

import random
import time
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lattice_remote import textmerge
from lattice_remote.textmerge import merge_text

BASE = b"# Plan\n\none\ntwo\nthree\nfour\nfive\n"


@pytest.mark.parametrize(
    ("base", "mine", "theirs", "outcome", "text"),
    [
        (None, b"new\n", None, "stored", b"new\n"),
        (BASE, BASE + b"six\n", BASE, "stored", BASE + b"six\n"),
        (BASE, BASE, BASE + b"six\n", "unchanged", BASE + b"six\n"),
        (BASE, BASE + b"six\n", BASE + b"six\n", "unchanged", BASE + b"six\n"),
        (BASE, BASE.replace(b"one", b"ONE"), BASE.replace(b"five", b"FIVE"), "merged", None),
        (BASE, BASE.replace(b"one", b"ONE"), BASE.replace(b"one", b"Uno"), "conflict", BASE.replace(b"one", b"Uno")),
        (None, b"mine\n", b"theirs\n", "conflict", b"theirs\n"),
        (None, b"same\n", b"same\n", "unchanged", b"same\n"),
        (BASE, BASE + b"six\n", None, "conflict", None),
        (BASE, b"", BASE, "stored", b""),
        (
            b"\xff\xfe\n1\n2\n3\n",
            b"\xff\xfe\n1\n2\n3\n\x80",
            b"\xfe\xff\n1\n2\n3\n",
            "merged",
            b"\xfe\xff\n1\n2\n3\n\x80",
        ),
        (b"a\r\nb\r\nc\r\nd\r\n", b"A\r\nb\r\nc\r\nd\r\n", b"a\r\nb\r\nc\r\nD\r\n", "merged", b"A\r\nb\r\nc\r\nD\r\n"),
    ],
)
def test_outcomes(base: bytes | None, mine: bytes, theirs: bytes | None, outcome: str, text: bytes | None) -> None:
    merged = merge_text(base, mine, theirs)
    assert merged.outcome == outcome
    if outcome == "merged" and text is None:
        text = BASE.replace(b"one", b"ONE").replace(b"five", b"FIVE")
    assert merged.text == text


CRLF = BASE.replace(b"\n", b"\r\n")
BOTH = BASE.replace(b"one", b"1").replace(b"five", b"5")
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("base", "mine", "theirs", "text"),
    [
        # an editor that removes the last line's end, and another side that appends after it
        (b"a\r\nb\nc\n", b"a\r\nb\nc", b"a\r\nb\nc\nd\n", b"a\r\nb\nc\r\nd\n"),
        (b"a\nb\nc\n", b"a\nb\nc", b"a\nb\nc\nd\n", b"a\nb\nc\nd\n"),
        # an editor that writes CR LF everywhere, and another that changes a line
        (BASE, CRLF, BASE.replace(b"one", b"1"), CRLF.replace(b"one", b"1")),
        (BASE, CRLF.replace(b"five", b"5"), BASE.replace(b"one", b"1"), BOTH.replace(b"\n", b"\r\n")),
        (CRLF, BASE.replace(b"five", b"5"), CRLF.replace(b"one", b"1"), BOTH),
        (CRLF, CRLF.replace(b"five", b"5"), BASE.replace(b"one", b"1"), BOTH),
        # only some lines
        (b"a\r\nb\nc\r\nd\n", b"A\r\nb\nc\r\nd\n", b"a\r\nb\nc\r\nD\n", b"A\r\nb\nc\r\nD\n"),
        (b"a\nb\nc\nd\n", b"a\r\nb\nc\nd\n", b"a\nb\nc\nD\n", b"a\r\nb\nc\nD\n"),
        # no line end at the end
        (b"a\nb\nc", b"A\nb\nc", b"a\nb\nc\nd\n", b"A\nb\nc\nd\n"),
        (b"a\nb\nc\n", b"a\nb\nc", b"a\nb\nc\nd\n", b"a\nb\nc\nd\n"),
        (b"a\r\nb\r\nc", b"A\r\nb\r\nc", b"a\r\nb\r\nc\r\nd", b"A\r\nb\r\nc\r\nd"),
        (b"a\nb\nc", b"a\nb\nC", b"A\nb\nc", b"A\nb\nC"),
        # a byte order mark
        (BASE, BOM + BASE.replace(b"five", b"5"), BASE.replace(b"# Plan", b"# Ours"), None),
        (BOM + BASE, BOM + BASE.replace(b"five", b"5"), BASE.replace(b"one", b"1"), None),
        # NUL bytes, and lines without end
        (b"a\0\nb\nc\n", b"a\0\nb\nC\0\n", b"A\0\nb\nc\n", b"A\0\nb\nC\0\n"),
        (b"x" * 9999 + b"\nb\nc\n", b"y" * 9999 + b"\nb\nc\n", b"x" * 9999 + b"\nb\nd\n", b"y" * 9999 + b"\nb\nd\n"),
    ],
)
def test_how_lines_end_is_merged_apart(base: bytes, mine: bytes, theirs: bytes, text: bytes | None) -> None:
    merged = merge_text(base, mine, theirs)
    assert merged.outcome in ("merged", "unchanged") and merged.text is not None
    if text is not None:
        assert merged.text == text
    plain = merged.text.replace(b"\r\n", b"\n").removeprefix(BOM)
    for line in {*mine.split(), *theirs.split()} - set(base.split()):
        assert line.removeprefix(BOM) in plain.split()
    assert merged.text.startswith(BOM) == (
        mine.startswith(BOM) if base.startswith(BOM) == theirs.startswith(BOM) else False
    )


_text = st.lists(st.sampled_from([b"a\n", b"b\n", b"\xff\r\n", b"c", b"\n"]), max_size=6).map(b"".join)


@given(st.none() | _text, _text, st.none() | _text)
def test_a_merge_loses_nothing_that_only_one_side_wrote(base: bytes | None, mine: bytes, theirs: bytes | None) -> None:
    merged = merge_text(base, mine, theirs)
    if merged.outcome in ("unchanged", "conflict"):
        assert merged.text == theirs
    if theirs == base and mine != base:
        assert merged == ("stored", mine)


@st.composite
def _edited_apart(draw: st.DrawFn) -> tuple[bytes, bytes, bytes]:
    """Return a base, an edit of some of its first lines, and one of some of its last."""
    line = st.sampled_from([b"a\n", b"b\n", b"\xff\r\n", b"\n", b"c\r\n"])
    lines = st.lists(line, max_size=4).map(b"".join)
    first, last, middle = draw(lines), draw(lines), b"one\n" + draw(lines) + b"two\n"
    return first + middle + last, draw(lines) + middle + last, first + middle + draw(lines)


@given(_edited_apart())
def test_edits_of_different_lines_are_merged_without_a_loss(texts: tuple[bytes, bytes, bytes]) -> None:
    base, mine, theirs = texts
    merged = merge_text(base, mine, theirs)
    assume(merged.outcome not in ("stored", "unchanged"))
    assert merged.outcome == "merged" and merged.text is not None
    known = Counter(line for text in texts for line in text.splitlines())
    found = merged.text.splitlines()
    assert set(found) <= known.keys()
    for text in (mine, theirs):
        added = Counter(text.splitlines()) - Counter(base.splitlines())
        assert not added - Counter(found), "a line that one side added"
    assert merge_text(theirs, merged.text, theirs) == ("stored", merged.text)
    assert merge_text(mine, merged.text, mine) == ("stored", merged.text)


@pytest.mark.parametrize("edits", [1, 100, 60_000])
def test_a_merge_of_five_mib_takes_no_longer_than_a_worker_can_spare(edits: int) -> None:
    rng = random.Random(edits)
    base = [b"%d and so on, for as long as a line is, which is about eighty characters\n" % n for n in range(68_000)]
    texts = []
    for side in (b"mine", b"theirs"):
        lines = list(base)
        for at in rng.sample(range(0, len(lines), 3), min(edits, 20_000)):
            lines[at + (side == b"mine")] = b"%d %s\n" % (at, side)
        texts.append(b"".join(lines))
    began = time.process_time()
    merged = merge_text(b"".join(base), *texts)
    assert time.process_time() - began < 5
    assert merged.outcome == ("merged" if edits == 1 else merged.outcome)


def test_texts_that_would_take_minutes_to_merge_are_a_conflict() -> None:
    lines = [b"%d\n" % (number % 190) for number in range(150_000)]
    mine = b"".join(lines[95:] + lines[:95])
    theirs = b"".join([*lines[:75_000], b"z\n", *lines[75_000:]])
    began = time.process_time()
    assert merge_text(b"".join(lines), mine, theirs) == ("conflict", theirs)
    assert time.process_time() - began < 10


def test_lines_that_occur_once_in_both_texts_anchor_a_comparison() -> None:
    a, b = [b"x", b"1", b"x", b"2", b"3", b"x"], [b"1", b"y", b"3", b"y", b"2"]
    anchors = textmerge._anchors(a, b)
    assert anchors in ([(1, 0), (3, 4)], [(1, 0), (4, 2)])
    assert textmerge._anchors([], b) == []


def test_lines_that_occur_often_are_matched_between_their_neighbours() -> None:
    base = [b"a\n", b"x\n", b"x\n", b"y\n", b"y\n", b"z\n"]
    other = [b"b\n", b"x\n", b"x\n", b"c\n", b"y\n", b"y\n", b"d\n"]
    blocks = [block for block in textmerge._Matcher(None, base, other).get_matching_blocks() if block[2]]
    assert blocks == [(1, 1, 2), (3, 4, 2)]
