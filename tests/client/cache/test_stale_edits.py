"""Base of a saved file: an editor opened before a change must not undo the change."""

import random
from pathlib import Path

import pytest
from client_kit import PLAN

from lattice_remote.client.cache import edits as older_module
from lattice_remote.client.cache.cache import Cache
from lattice_remote.client.cache.edits import StaleEditDetector, base_of
from lattice_remote.client.config import Remote
from lattice_remote.textmerge import merge_text

BEFORE = b"# Plan\n\n- write the parser\n- test the parser\n- write the printer\n"
AFTER = BEFORE + b"- ask Ben about Unicode\n"
CHANGED = BEFORE.replace(b"- test the parser\n", b"- test the parser with real files\n")


@pytest.mark.parametrize(
    ("text", "after", "base"),
    [
        # opened before the change
        (BEFORE.replace(b"# Plan", b"# The plan"), AFTER, BEFORE),
        (BEFORE + b"- measure how fast it is\n", AFTER, BEFORE),
        (BEFORE + b"- measure how fast it is\n", CHANGED, BEFORE),
        (BEFORE, AFTER, BEFORE),
        # opened after the change
        (AFTER + b"- measure how fast it is\n", AFTER, AFTER),
        (AFTER.replace(b"# Plan", b"# The plan"), AFTER, AFTER),
        (AFTER.replace(b"- ask Ben", b"- [x] ask Ben"), AFTER, AFTER),
        (BEFORE + b"- ask Ben and Eve about Unicode\n", AFTER, AFTER),
        (CHANGED.replace(b"real files", b"very real files"), CHANGED, CHANGED),
        # no evidence
        (b"# Something else\n\nwritten from scratch\n", AFTER, AFTER),
        (b"", AFTER, AFTER),
        (BEFORE, BEFORE + b"\n\n", BEFORE + b"\n\n"),
        (b"x\n" * 5, b"x\n" * 4, b"x\n" * 4),
    ],
)
def test_a_text_is_an_edit_of_the_newest_version_that_it_contains_lines_of(
    text: bytes, after: bytes, base: bytes
) -> None:
    assert base_of(text, after, [BEFORE]) == base


def test_the_base_is_as_old_as_the_editors_text() -> None:
    newest = AFTER.replace(b"# Plan", b"# Our common plan")
    mine = BEFORE + b"- measure how fast it is\n"
    assert base_of(mine, newest, [AFTER, BEFORE]) == BEFORE
    assert base_of(AFTER + b"- measure how fast it is\n", newest, [AFTER, BEFORE]) == AFTER
    assert base_of(newest + b"- measure how fast it is\n", newest, [AFTER, BEFORE]) == newest


@pytest.mark.parametrize(("count", "is_compared"), [(40, True), (60, False)])
def test_very_many_lines_are_not_compared_one_by_one(count: int, is_compared: bool) -> None:
    """The comparison takes too long, so the save counts as an edit of the newest text."""
    after = BEFORE + b"".join(b"a%d %s\n" % (n, b"x" * n) for n in range(count))
    mine = BEFORE + b"".join(b"b%d %s\n" % (n, b"y" * n) for n in range(count))
    assert base_of(mine, after, [BEFORE]) == (BEFORE if is_compared else after)


WORDS = Path(older_module.__file__).read_text().split()


def line(rng: random.Random) -> bytes:
    return (" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) + "\n").encode()


def edit(rng: random.Random, text: bytes, *, times: int) -> bytes:
    """Add, reword and remove a few lines."""
    lines = text.splitlines(keepends=True)
    for _ in range(times):
        at = rng.randrange(len(lines)) if lines else 0
        match rng.randrange(4) if lines else 0:
            case 0 | 1:
                lines.insert(rng.choice([at, len(lines)]), line(rng))
            case 2:
                words = lines[at].split()
                words.insert(rng.randrange(len(words) + 1), rng.choice(WORDS).encode())
                lines[at] = b" ".join(words) + b"\n"
            case 3:
                del lines[at]
    return b"".join(lines)


def test_guessed_bases_are_mostly_right() -> None:
    """A thousand saves of each kind. A wrong guess leads to a merge or a conflict and loses no line silently."""
    rng = random.Random(1)
    right = {"behind": 0, "current": 0}
    undone = 0
    for _ in range(1000):
        before = b"".join(line(rng) for _ in range(rng.randint(3, 40)))
        after = edit(rng, before, times=rng.randint(1, 3))
        if after == before:
            after += line(rng)
        behind, current = (edit(rng, text, times=rng.randint(1, 3)) for text in (before, after))
        right["behind"] += base_of(behind, after, [before]) == before
        right["current"] += base_of(current, after, [before]) == after
        merged = merge_text(base_of(behind, after, [before]), behind, after)
        brought = set(after.splitlines()) - set(before.splitlines())
        undone += merged.outcome != "conflict" and not brought <= set((merged.text or b"").splitlines())
    print(f"of 1000: {right}, undone: {undone}")
    assert right["behind"] > 900 and right["current"] > 950


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    made = Cache(str(tmp_path), Remote("origin", "http://127.0.0.1:1", "web"))
    made.prepare()
    return made


def test_kept_entries_are_bounded_in_number_size_and_time(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    older = StaleEditDetector(cache)
    texts = [bytes([97 + n]) * 9 + b"\n" + BEFORE for n in range(7)]
    for text in texts[:-1]:
        older.remember(PLAN, text)
    older.remember(PLAN, b"x" * 9_000_000)
    older.remember(PLAN, None)
    kept = [path.read_bytes() for path in Path(cache.directory, ".remote/older", PLAN).iterdir()]
    assert sorted(kept) == sorted(texts[2:-1])
    edited = texts[2] + b"- measure it\n"
    assert StaleEditDetector(cache).base_of(PLAN, edited, texts[-1]) == texts[2], "another process knows them too"
    assert older.base_of(PLAN, texts[2], texts[-1]) == texts[-1], "confirmed by the user, see evidence.py"
    monkeypatch.setattr(older_module, "KEPT_S", 0.0)
    assert older.base_of(PLAN, edited, texts[-1]) == texts[-1]
    older.forget(PLAN)
    assert not list(Path(cache.directory, ".remote/older", PLAN).iterdir())
