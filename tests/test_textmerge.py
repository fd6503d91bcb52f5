"""Plans and notes, merged by line."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


_text = st.lists(st.sampled_from([b"a\n", b"b\n", b"\xff\r\n", b"c", b"\n"]), max_size=6).map(b"".join)


@given(st.none() | _text, _text, st.none() | _text)
def test_a_merge_loses_nothing_that_only_one_side_wrote(base: bytes | None, mine: bytes, theirs: bytes | None) -> None:
    merged = merge_text(base, mine, theirs)
    if merged.outcome in ("unchanged", "conflict"):
        assert merged.text == theirs
    if theirs == base and mine != base:
        assert merged == ("stored", mine)
    if merged.outcome == "merged":
        assert merge_text(theirs, merged.text or b"", theirs).outcome in ("stored", "unchanged")


def test_texts_that_would_take_minutes_to_merge_are_a_conflict() -> None:
    lines = [b"%d\n" % (number % 190) for number in range(150_000)]
    mine = b"".join(lines[95:] + lines[:95])
    theirs = b"".join([*lines[:75_000], b"z\n", *lines[75_000:]])
    start = time.monotonic()
    assert merge_text(b"".join(lines), mine, theirs) == ("conflict", theirs)
    assert time.monotonic() - start < 2
