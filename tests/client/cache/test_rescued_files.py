"""Rescued files: replaced contents are stored once, under their own names, within bounds."""

from pathlib import Path

import pytest
from client_kit import PLAN, TASK, make_cache, rescued

from lattice_remote.client.cache import rescued_files
from lattice_remote.client.cache.cache import Cache
from lattice_remote.client.cache.rescued_files import RescuedFiles, RescuePolicy, may_be_by_hand
from lattice_remote.client.config import read_remote
from lattice_remote.protocol.operations import Content, digest_of

LOG = f"events/{TASK}.jsonl"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    directory = make_cache(tmp_path, "http://127.0.0.1:1")
    made = Cache(str(directory), read_remote(str(directory)))
    made.prepare()
    return made


def kept(cache: Cache) -> dict[str, list[bytes]]:
    return rescued(Path(cache.directory))


def entry(content: bytes) -> Content:
    return len(content), digest_of(content)


def test_a_text_changed_while_no_agent_ran_is_rescued_once(cache: Cache) -> None:
    policy = RescuePolicy(cache)
    cache.replace("context.md", b"# Ours\n")
    policy.remember("context.md")
    Path(cache.absolute("context.md")).write_bytes(b"# Mine\n")
    for after in (b"# Ours, later\n", b"# Ours, later still\n"):
        policy.keep("context.md", is_strange=False, after=after)
        cache.replace("context.md", after)
        policy.remember("context.md")
    assert kept(cache) == {"context.md": [b"# Mine\n"]}


def test_a_blank_file_or_one_that_the_server_has_is_not_rescued(cache: Cache) -> None:
    policy = RescuePolicy(cache)
    for path, content in (("context.md", b"# Ours\n"), ("todo.txt", b" \n"), ("draft.md~", b"a backup")):
        cache.replace(path, content)
        policy.keep(path, is_strange=True, after=b"# Ours\n")
    assert kept(cache) == {}


@pytest.mark.parametrize(
    ("path", "is_by_hand"),
    [
        ("context.md", True),
        ("drawings/x.svg", True),
        ("plans/draft.md", True),
        ("archive/plans/x.md", True),
        (PLAN, False),
        (f"tasks/{TASK}.json", False),
        ("archive/tasks/x.json", False),
        (LOG, False),
    ],
)
def test_a_differing_file_is_rescued_if_a_user_may_have_written_it(cache: Cache, path: str, is_by_hand: bool) -> None:
    policy = RescuePolicy(cache)
    cache.replace(path, b"ours")
    policy.keep(path, is_strange=False, after=b"theirs" if path != LOG else b"ours")
    assert kept(cache) == {} and may_be_by_hand(path) == is_by_hand


def test_a_file_too_large_to_read_is_moved(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescued_files, "_MAX_READ_BYTES", 3)
    for path, content in (("large.bin", b"1234"), ("small.bin", b"123")):
        cache.replace(path, content)
        RescuePolicy(cache).keep(path, is_strange=True)
    assert kept(cache) == {"large.bin": [b"1234"], "small.bin": [b"123"]}
    assert cache.size("large.bin") is None and cache.size("small.bin") == 3


@pytest.mark.parametrize(("more", "is_kept"), [(b"", False), (b"2\n", False), (b"his\n", True)])
def test_a_log_is_rescued_if_it_has_an_event_that_the_server_lacks(cache: Cache, more: bytes, is_kept: bool) -> None:
    cache.replace(LOG, b"1\n" + more)
    RescuePolicy(cache).keep(LOG, is_strange=False, after=b"1\n2\n3\n")
    assert kept(cache) == ({LOG: [b"1\nhis\n"]} if is_kept else {})


def test_after_a_restore_all_contents_missing_on_the_server_are_rescued(cache: Cache) -> None:
    """Of files with another content: texts, and logs that continue the server's."""
    here = {
        "tasks/gone.json": b"{}\n",
        "artifacts/empty": b"",
        PLAN: b"# Longer\n",
        LOG: b"1\n2\n",
        "events/other.jsonl": b"1\nhis\n",
        f"tasks/{TASK}.json": b"derived\n",
        "context.md": b"# Mine\n",
    }
    there = {
        PLAN: b"#\n",
        LOG: b"1\n",
        "events/other.jsonl": b"1\n2\n",
        f"tasks/{TASK}.json": b"",
        "context.md": b"#\n",
    }
    for path, content in here.items():
        cache.replace(path, content)
    policy = RescuePolicy(cache)
    policy.keep_lost(there, here.keys() - there.keys(), {path: entry(content) for path, content in there.items()})
    assert kept(cache) == {path: [here[path]] for path in ("tasks/gone.json", PLAN, LOG, "context.md")}
    assert {each.reason for each in policy.rescued.entries()} == {rescued_files.LOST}


def test_a_content_is_stored_once_and_never_overwrites_another(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescued_files, "_SAME_ENTRY_S", 3600.0)
    files = RescuedFiles(cache)
    assert files.add(PLAN, b"one", "why") and files.add("a.txt", b"a", "why")
    assert not files.add(PLAN, b"one", "why")
    assert files.add(PLAN, b"two", "why")
    assert RescuedFiles(cache).add(PLAN, b"six", "why")
    assert kept(cache) == {PLAN: [b"one", b"two", b"six"], "a.txt": [b"a"]}
    again = RescuedFiles(cache)
    first = again.entries()[0]
    assert (first.number, first.reason, dict(first.files)) == (1, "why", {"a.txt": 1, PLAN: 3})
    again.drop(1)
    again.drop(1)
    assert [each.number for each in again.entries()] == [2, 3]


@pytest.mark.parametrize(("bound", "value"), [("MAX_FILES", 2), ("MAX_BYTES", 2)])
def test_a_full_store_keeps_its_contents_and_reports_that(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, bound: str, value: int
) -> None:
    monkeypatch.setattr(rescued_files, bound, value)
    files = RescuedFiles(cache)
    assert files.notice() is None
    assert [files.add(f"{name}.txt", name.encode(), "why") for name in "abc"] == [True, True, False]
    assert "the store is full, and 1 later files were not kept" in str(files.notice())
    assert kept(cache) == {"a.txt": [b"a"], "b.txt": [b"b"]}
    files.drop(1)
    assert files.add("c.txt", b"c", "why") and "full" not in str(files.notice())
