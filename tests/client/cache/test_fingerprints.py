"""Fingerprints: files written by other programs, and fingerprints that the next process can trust."""

import os
from pathlib import Path

import pytest
from client_kit import make_cache

from lattice_remote.client.cache import fingerprints
from lattice_remote.client.cache.cache import Cache
from lattice_remote.client.cache.fingerprints import Fingerprints
from lattice_remote.client.config import read_remote

FILE = "tasks/a.json"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    directory = make_cache(tmp_path, "http://127.0.0.1:1")
    made = Cache(str(directory), read_remote(str(directory)))
    made.prepare()
    made.replace(FILE, b"ours")
    made.note(FILE)
    return made


def seen(cache: Cache, path: str = FILE) -> tuple[bool, bool]:
    """Return whether a file is unchanged, and whether another program wrote it."""
    found = cache.signature(path)
    return cache.known.agrees(path, found), cache.known.was_written(path, found)


def test_a_changed_mode_is_a_difference_but_no_write(cache: Cache) -> None:
    place = Path(cache.absolute(FILE))
    assert seen(cache) == (True, False) and FILE in cache.known.paths()
    place.chmod(0o600)
    assert seen(cache) == (False, False)
    status = place.stat()
    place.write_bytes(b"his!")
    os.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert seen(cache) == (False, True)


def test_a_removed_file_and_an_unknown_one_are_written_by_others(cache: Cache) -> None:
    Path(cache.absolute("tasks/b.json")).write_bytes(b"his")
    assert seen(cache, "tasks/b.json") == (False, True)
    assert seen(cache, "tasks/c.json") == (True, False)
    Path(cache.absolute(FILE)).unlink()
    assert seen(cache) == (False, True)


def test_only_a_process_of_the_same_boot_trusts_the_stored_state(cache: Cache) -> None:
    assert cache.known.stored("boot") is None, "not every file is known"
    cache.known.settle([(FILE, found)] if (found := cache.signature(FILE)) is not None else [])
    cache.known.share()
    assert cache.known.stored("") is None
    data = cache.known.stored("boot")
    assert data is not None
    for boot_id, text, is_believed in (
        ("boot", data, True),
        ("another", data, False),
        ("", data, False),
        ("boot", b"[]", False),
    ):
        other = Fingerprints(cache.directory)
        other.restore(text, boot_id)
        assert other.is_complete == other.agrees(FILE, cache.signature(FILE)) == is_believed


def test_a_write_by_another_agent_process_is_not_foreign(cache: Cache) -> None:
    other = Fingerprints(cache.directory)
    other.learn()
    cache.append(FILE, b", more")
    cache.note(FILE)
    assert not other.agrees(FILE, cache.signature(FILE))
    cache.known.share()
    other.learn()
    assert other.agrees(FILE, cache.signature(FILE)) and not other.was_written(FILE, cache.signature(FILE))
    cache.delete(FILE)
    cache.note(FILE)
    cache.known.share()
    other.learn()
    assert other.agrees(FILE, None) and FILE not in other


def test_later_comparisons_are_not_replaced_by_older_entries(cache: Cache) -> None:
    other = Fingerprints(cache.directory)
    cache.known.share()
    other.learn()
    cache.append(FILE, b", more")
    found = cache.signature(FILE)
    assert found is not None
    other.settle([(FILE, found)])
    other.learn()
    assert other.agrees(FILE, found)


def test_the_log_of_writes_is_bounded(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Path(cache.absolute(fingerprints.WRITTEN_LOG))
    monkeypatch.setattr(fingerprints, "_MAX_LOG_BYTES", 300)
    sizes = set()
    for _ in range(20):
        cache.note(FILE)
        cache.known.share()
        sizes.add(log.stat().st_size)
    assert min(sizes) > 0 and max(sizes) < 400
    before = log.read_bytes()
    for number in range(40):
        cache.note(f"tasks/{number}.json")
    cache.known.share()
    assert log.read_bytes() == before, "others compare the files instead"
