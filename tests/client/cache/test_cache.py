"""The cache directory: atomic writes, refused links, stored state."""

import asyncio
import errno
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from client_kit import MINE, PLAN, make_cache

from lattice_remote.client.cache import cache as state
from lattice_remote.client.cache import safe_directory as directory_module
from lattice_remote.client.cache.cache import Cache, CacheState, decode_state, encode_deferred, encode_state
from lattice_remote.client.cache.edits import Edits, Sent, TextConflicts
from lattice_remote.client.cache.verify import Reading, keep_readings, read_all, take_readings
from lattice_remote.client.config import Remote, read_remote
from lattice_remote.errors import StorageError
from lattice_remote.protocol.messages import NOWHERE, Part, Position, Put
from lattice_remote.protocol.operations import AnnounceFile, AppendBytes, DeleteFile, PutFile, digest_of


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    directory = make_cache(tmp_path / "with space ü", "http://127.0.0.1:1")
    made = Cache(str(directory), read_remote(str(directory)))
    made.prepare()
    return made


def test_a_file_is_replaced_appended_moved_and_deleted(cache: Cache) -> None:
    cache.replace("resources/gpu/resource.json", b"one")
    cache.append("resources/gpu/resource.json", b"two")
    assert cache.size("resources/gpu/resource.json") == 6
    assert cache.read("resources/gpu/resource.json", 3) == b"two"
    cache.move("resources/gpu/resource.json", "archive/new/r.json")
    assert cache.size("resources/gpu/resource.json") is None
    cache.delete("archive/new/r.json")
    cache.delete("archive/new/r.json")
    assert list(cache.paths()) == []
    assert os.listdir(os.path.join(cache.directory, ".remote/tmp")) == []


def test_a_replacement_does_not_change_a_file_that_a_reader_has_open(cache: Cache) -> None:
    cache.replace("config.json", b"old")
    with open(os.path.join(cache.directory, "config.json"), "rb") as reader:
        cache.replace("config.json", b"new content")
        assert reader.read() == b"old"


@pytest.mark.parametrize("method", ["replace", "append"])
def test_a_linked_directory_is_an_error(cache: Cache, tmp_path: Path, method: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    Path(cache.directory, "linked").symlink_to(victim)
    with pytest.raises(StorageError, match="in the way"):
        getattr(cache, method)("linked/x", b"evil")
    with pytest.raises(StorageError, match="in the way"):
        cache.delete("linked/x")
    assert list(victim.iterdir()) == []


def test_a_linked_file_is_replaced_never_written_through(cache: Cache, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    Path(cache.directory, "config.json").symlink_to(victim)
    assert cache.size("config.json") is None
    cache.append("config.json", b"ours")
    assert victim.read_bytes() == b"precious" and cache.read("config.json") == b"ours"
    Path(cache.directory, "ids.json").symlink_to(victim)
    cache.replace("ids.json", b"ours")
    assert victim.read_bytes() == b"precious" and cache.read("ids.json") == b"ours"
    Path(cache.directory, "tasks/x.json").mkdir(parents=True)
    cache.delete("tasks/x.json")
    cache.append("tasks/x.json", b"ours")
    assert cache.read("tasks/x.json") == b"ours"


def test_a_linked_temporary_directory_is_an_error(cache: Cache, tmp_path: Path) -> None:
    os.rmdir(os.path.join(cache.directory, ".remote/tmp"))
    Path(cache.directory, ".remote/tmp").symlink_to(tmp_path)
    with pytest.raises(StorageError, match="in the way"):
        cache.replace("config.json", b"x")


def part(data: bytes, offset: int, piece: bytes, digest: bytes | None = None) -> Part:
    return Part("tasks/x.json", 1, len(data), digest or digest_of(data), offset, piece)


def test_parts_become_a_file_atomically(cache: Cache) -> None:
    data = b"0123456789"
    assert cache.write_part(part(data, 0, data[:4])) is None
    assert cache.size("tasks/x.json") is None
    assert cache.write_part(part(data, 4, data[4:])) is True
    assert cache.read("tasks/x.json") == data


def test_parts_that_do_not_fit_are_refused(cache: Cache) -> None:
    data = b"0123456789"
    assert cache.write_part(part(data, 4, data[4:])) is False
    assert cache.write_part(part(data, 0, data[:4])) is None
    assert cache.write_part(part(data, 5, data[5:])) is False
    assert cache.write_part(part(data, 0, data[:4])) is None
    assert cache.write_part(part(data, 4, b"xxxxxx")) is False
    assert cache.write_part(part(data, 0, data, digest=b"0" * 32)) is False
    assert cache.size("tasks/x.json") is None
    assert os.listdir(os.path.join(cache.directory, ".remote/tmp")) == []


def test_a_first_part_restarts_the_file(cache: Cache) -> None:
    data = b"0123456789"
    cache.write_part(part(data, 0, data[:4]))
    assert cache.write_part(part(data, 0, data[:2])) is None
    assert cache.write_part(part(data, 2, data[2:])) is True
    assert cache.read("tasks/x.json") == data


def test_the_manifest_lists_the_replicated_files(cache: Cache) -> None:
    for path in ("config.json", "tasks/a.json", "plans/x.md~", "locks", ".remote/base/plans/x.md", "notes/a.md.x"):
        cache.replace(path, b"x")
    found = {path: (reading.size, reading.digest) for path, reading in read_all(cache).items()}
    assert found == {path: (1, digest_of(b"x")) for path in ("config.json", "tasks/a.json")}


@pytest.mark.parametrize("settled", [True, False])
def test_a_file_read_within_a_clock_tick_of_its_change_is_read_again(cache: Cache, settled: bool) -> None:
    cache.replace("tasks/a.json", b"2")
    signature = cache.signature("tasks/a.json")
    assert signature is not None
    earlier = {"tasks/a.json": Reading(1, digest_of(b"1"), signature, settled)}
    assert read_all(cache, earlier)["tasks/a.json"].digest == digest_of(b"1" if settled else b"2")
    touched = {"tasks/a.json": Reading(1, digest_of(b"1"), (*signature[:3], signature[3] + 1), settled)}
    assert read_all(cache, touched)["tasks/a.json"].digest == digest_of(b"2")


def settled(readings: dict[str, Reading]) -> dict[str, Reading]:
    """Return the readings as if the files were old."""
    return {path: reading._replace(settled=True) for path, reading in readings.items()}


def test_stored_readings_are_used_by_the_next_process_once(cache: Cache) -> None:
    for path in ("tasks/a.json", "tasks/b.json", PLAN):
        cache.replace(path, b"1")
    Edits(cache).rebase(PLAN)
    kept = settled(read_all(cache))
    keep_readings(cache, kept)
    later = Cache(cache.directory, cache.remote)
    assert take_readings(later) == kept
    assert take_readings(later) == {} and read_all(later).keys() == kept.keys(), "they were removed"
    later.replace("tasks/a.json", b"2")
    now = read_all(later, kept)
    assert now["tasks/a.json"].digest == digest_of(b"2"), "a changed file is read"
    assert now["tasks/b.json"] == kept["tasks/b.json"]


@pytest.mark.parametrize("harm", ["damaged", "another boot", "another directory"])
def test_stored_readings_without_proof_are_dropped(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, harm: str
) -> None:
    cache.replace("tasks/a.json", b"1")
    keep_readings(cache, read_all(cache))
    later = Cache(cache.directory, cache.remote)
    if harm == "damaged":
        (Path(cache.directory) / ".remote/readings").write_bytes(b"\x83\xa7boot")
    elif harm == "another boot":
        monkeypatch.setattr("lattice_remote.client.cache.verify.boot_id", lambda: "another")
    else:
        shutil.copytree(cache.directory, tmp_path / "copy")
        later = Cache(str(tmp_path / "copy"), cache.remote)
    assert take_readings(later) == {} and take_readings(later) == {}


async def test_a_process_waits_for_a_lock_of_another(cache: Cache) -> None:
    other = Cache(cache.directory, cache.remote)
    async with other.locked():
        with pytest.raises(StorageError, match="another process"):
            async with cache.locked(timeout_s=0.05):
                pass
        waiting = asyncio.ensure_future(_lock(cache))
        await asyncio.sleep(0)
        assert cache.is_held_by_others
    await waiting
    assert not cache.is_held_by_others


async def _lock(cache: Cache) -> None:
    async with cache.locked(), cache.locked():
        assert cache.is_there()


async def test_a_recreated_directory_is_another_one(cache: Cache) -> None:
    os.rename(cache.directory, cache.directory + ".gone")
    os.mkdir(cache.directory)
    with pytest.raises(StorageError, match="removed or replaced"):
        await _lock(cache)


# --- state ---

REMOTE = Remote("origin", "http://h", "web")


async def test_a_cache_that_has_just_become_a_local_project_is_not_written(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The previous holder of the lock removed remote.json: the server's files may no longer be written (I4)."""
    acquire = cache._lock.acquire

    def late(**options: float) -> object:
        os.unlink(cache.absolute("remote.json"))
        return acquire(**options)

    monkeypatch.setattr(cache._lock, "acquire", late)
    with pytest.raises(StorageError, match="was removed"):
        async with cache.locked():
            raise AssertionError("it was taken for a copy")
    assert cache._lock._handle is None


def test_state_is_read_as_it_was_stored() -> None:
    stored = CacheState(
        Position("e", 7, b"m" * 16),
        ("plans/a.md",),
        {"artifacts/payload/a": (9, b"d" * 32), "artifacts/payload/b": None},
        12.5,
    )
    assert decode_state(encode_state(stored, REMOTE), encode_deferred(stored.deferred), REMOTE) == stored


def test_state_of_another_project_is_ignored() -> None:
    data = encode_state(CacheState(Position("e", 7, b""), (), {}, 1.0), REMOTE)
    assert decode_state(data, b"", Remote("origin", "http://h", "other")) == CacheState()


def test_state_of_another_directory_does_not_apply_to_the_files() -> None:
    data = encode_state(CacheState(Position("e", 7, b""), (), {}, 1.0), REMOTE, inode=1)
    assert decode_state(data, b"", REMOTE, inode=2) == CacheState(NOWHERE, (), {}, 1.0)


def test_state_from_before_a_reboot_is_only_an_age(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_state(CacheState(Position("e", 7, b""), (), {}, 1.0), REMOTE)
    monkeypatch.setattr(state, "_boot_id", "another")
    assert decode_state(data, b"", REMOTE) == CacheState(NOWHERE, (), {}, 1.0)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"url": 1}', b"\xff"])
def test_damaged_state_is_ignored(data: bytes) -> None:
    assert decode_state(data, b"", REMOTE) == CacheState()


def test_state_with_a_hostile_path_is_ignored() -> None:
    data = encode_state(CacheState(Position("e", 7, b""), ("../x",), {}, 1.0), REMOTE)
    assert decode_state(data, b"", REMOTE) == CacheState()


# --- edits ---


def test_a_file_equal_to_its_base_is_no_edit(cache: Cache) -> None:
    edits = Edits(cache)
    cache.replace(PLAN, b"server")
    assert edits.scan() == [PLAN]
    edits.rebase(PLAN)
    assert edits.scan() == [] and edits.base(PLAN) == b"server"
    cache.replace(PLAN, b"mine")
    assert edits.scan() == [PLAN]
    edits.sent(PLAN, b"mine")
    assert edits.scan() == []
    cache.delete(PLAN)
    edits.rebase(PLAN)
    assert edits.base(PLAN) is None


def test_an_edit_is_found_with_and_without_an_older_reading(cache: Cache) -> None:
    edits = Edits(cache)
    cache.replace(PLAN, b"server")
    edits.rebase(PLAN)
    unedited = settled(read_all(cache))
    assert edits.scan(unedited) == []
    cache.replace(PLAN, b"edited")  # same length
    assert edits.scan(unedited) == [PLAN], "the reading is of another state"
    assert edits.scan(settled(read_all(cache))) == [PLAN]


def test_a_file_with_an_unanswered_edit_counts_as_edited(cache: Cache) -> None:
    """The server may have applied the edit although the user has reverted it."""
    edits = Edits(cache)
    cache.replace(PLAN, b"server")
    edits.rebase(PLAN)
    put = Put("1" * 32, PLAN, b"mine", b"server")
    edits.unanswered.remember(Sent(put, put, b"server", time.time()))
    for looking in (edits, Edits(cache)):  # also in another process
        looking.unanswered.get(PLAN)
        cache.replace(PLAN, b"server")
        assert looking.is_edited(PLAN) and looking.scan() == [PLAN]
    edits.unanswered.forget(PLAN)
    assert Edits(cache).scan() == []


def test_a_save_in_the_same_clock_tick_as_the_last_scan_is_an_edit(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = Edits(cache)
    cache.replace(PLAN, b"server")
    edits.rebase(PLAN)
    found = cache.signature(PLAN)
    assert found is not None
    same = (*found[:3], time.time_ns())
    monkeypatch.setattr(cache, "signature", lambda _: same)
    assert not edits.is_edited(PLAN)
    Path(cache.absolute(PLAN)).write_bytes(b"edited")  # same length and clock tick
    assert edits.is_edited(PLAN)


def test_an_own_edit_is_not_fetched(cache: Cache) -> None:
    edits = Edits(cache)
    cache.replace(PLAN, b"server\n")
    edits.rebase(PLAN)
    cache.replace(PLAN, b"server\nmine\n")
    assert not edits.absorb(PutFile(PLAN, b"other"))
    assert not edits.absorb(DeleteFile(PLAN))
    assert edits.absorb(AppendBytes(PLAN, 7, digest_of(b"server\n"), b"mine\n"))
    assert edits.scan() == []


def test_an_own_large_edit_is_not_fetched(cache: Cache) -> None:
    """Its change announces only size and digest."""
    edits = Edits(cache)
    cache.replace(PLAN, b"server\n")
    edits.rebase(PLAN)
    cache.replace(PLAN, b"mine\n")
    assert not edits.absorb(AnnounceFile(PLAN, 5, digest_of(b"his!\n")))
    assert not edits.absorb(AnnounceFile(PLAN, 6, digest_of(b"mine\n")))
    assert edits.scan() == [PLAN]
    assert edits.absorb(AnnounceFile(PLAN, 5, digest_of(b"mine\n")))
    assert edits.scan() == [] and edits.base(PLAN) == b"mine\n"


def test_a_conflict_is_kept_once(cache: Cache) -> None:
    conflicts = TextConflicts(cache, Edits(cache))
    cache.replace(PLAN, b"mine")
    assert conflicts.begin(PLAN) == MINE
    assert conflicts.begin(PLAN) == MINE
    cache.replace(PLAN, b"mine again")
    assert conflicts.begin(PLAN) == MINE.replace(".md", ".2.md")
    assert conflicts.copies() == [MINE, MINE.replace(".md", ".2.md")]


def test_a_file_that_does_not_fit_on_the_disk_is_removed(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(handle: int, data: bytes) -> None:
        os.write(handle, data[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(directory_module, "write_all", no_room)
    with pytest.raises(StorageError, match="No space left"):
        cache.write_part(Part("artifacts/payload/x", 1, 4, digest_of(b"abcd"), 0, b"ab"))
    assert os.listdir(os.path.join(cache.directory, ".remote/tmp")) == []


def test_incomplete_parts_are_discarded(cache: Cache) -> None:
    assert cache.write_part(Part("artifacts/payload/x", 1, 4, digest_of(b"abcd"), 0, b"ab")) is None
    assert len(os.listdir(os.path.join(cache.directory, ".remote/tmp"))) == 1
    cache.forget_parts()
    assert os.listdir(os.path.join(cache.directory, ".remote/tmp")) == []


# --- removal of the directory ---


def test_a_file_removed_during_its_replacement_is_not_recreated(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.replace("config.json", b"old")
    exchange = directory_module._exchange

    def too_late(source: int, name: str, target: int, new_name: str) -> bool:
        os.unlink(new_name, dir_fd=target)
        return exchange(source, name, target, new_name)

    monkeypatch.setattr(directory_module, "_exchange", too_late)
    with pytest.raises(StorageError, match="No such file"):
        cache.replace("config.json", b"new")
    assert cache.size("config.json") is None
    assert os.listdir(os.path.join(cache.directory, ".remote/tmp")) == []


@pytest.mark.parametrize("step", ["replace", "mkdir", "open"])
def test_a_name_that_a_removing_program_has_not_listed_is_removed(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The program lists the names just before one is added, and has removed nothing yet."""
    real_open, real_step, has_listed, is_over = os.open, getattr(os, step), threading.Event(), threading.Event()

    def listed_before(*arguments: object, **named: object) -> object:
        if not has_listed.is_set() and (step != "open" or int(arguments[1]) & os.O_CREAT):  # type: ignore[call-overload]
            handles.append(real_open(cache.directory, os.O_RDONLY))
            has_listed.set()
        return real_step(*arguments, **named)

    def remove_slowly() -> None:
        assert has_listed.wait(10)
        for name in ("sessions/archive", "sessions", "events", "notes", "artifacts/meta", "artifacts/payload"):
            os.rmdir(os.path.join(cache.directory, name))
            is_over.wait(0.02)

    handles, remover = list[int](), threading.Thread(target=remove_slowly)
    remover.start()
    with monkeypatch.context() as patch:
        patch.setattr(os, step, listed_before)
        with pytest.raises(StorageError, match="being removed"):
            cache.replace("resources/gpu/resource.json", b"new")
    is_over.set()
    remover.join()
    assert not os.path.exists(os.path.join(cache.directory, "resources/gpu/resource.json"))
    assert os.listdir(os.path.join(cache.directory, ".remote/tmp")) == []
    for handle in handles:
        os.close(handle)


async def test_a_reader_of_the_directory_blocks_no_write(cache: Cache) -> None:
    with os.scandir(cache.directory):
        cache.replace("tasks/one.json", b"{}")
        async with asyncio.timeout(20), cache.locked():
            cache.replace("tasks/two.json", b"{}")
    assert sorted(cache.paths()) == ["tasks/one.json", "tasks/two.json"]


async def test_a_brief_listing_of_the_directory_fails_no_write(cache: Cache) -> None:
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.001):
            os.listdir(cache.directory)

    looker = threading.Thread(target=look)
    looker.start()
    for n in range(500):
        cache.replace(f"tasks/{n}.json", b"{}")
    is_over.set()
    looker.join()
    assert len(list(cache.paths())) == 500
