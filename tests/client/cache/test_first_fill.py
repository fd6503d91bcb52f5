"""First fill: files written once into a private directory, afterwards treated like all others."""

import asyncio
import hashlib
import json
import os
import signal
import stat
import time
from pathlib import Path

import pytest
from client_kit import make_cache

from lattice_remote.client.cache.cache import Cache
from lattice_remote.client.cache.edits import Edits
from lattice_remote.client.cache.first_fill import FirstFill
from lattice_remote.client.config import read_remote
from lattice_remote.errors import StorageError
from lattice_remote.protocol.messages import Part
from sandbox import Sandbox, differences, wait_for

PLAN = "plans/task_01M8173J64RGGH4YR2NPR00000.md"
BY = ("--actor", "human:ana")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    directory = make_cache(tmp_path / "with space ü", "http://127.0.0.1:1")
    made = Cache(str(directory), read_remote(str(directory)))
    made.prepare()
    return made


def part(path: str, data: bytes, *, size: int | None = None, digest: bytes | None = None) -> Part:
    whole = len(data) if size is None else size
    return Part(path, 1, whole, digest or hashlib.sha256(data).digest(), data=data)


@pytest.mark.parametrize(("mode", "of_file"), [(0o750, 0o640), (0o777, 0o666), (0o700, 0o600)])
def test_a_file_has_the_directorys_permissions_under_any_umask(cache: Cache, mode: int, of_file: int) -> None:
    os.chmod(cache.directory, mode)
    before = os.umask(0o077)
    try:
        fill = FirstFill(cache)
        assert asyncio.run(fill.write([part("tasks/new/one.json", b"{}")])) == []
        fill.close()
    finally:
        os.umask(before)
    written = Path(cache.absolute("tasks/new/one.json"))
    assert written.read_bytes() == b"{}"
    assert stat.S_IMODE(written.stat().st_mode) == of_file
    assert stat.S_IMODE(written.parent.stat().st_mode) == mode
    assert cache.known.agrees("tasks/new/one.json", cache.signature("tasks/new/one.json"))


def test_parts_wrong_digests_and_existing_files_take_the_usual_path(cache: Cache) -> None:
    cache.replace("tasks/there.json", b"old")
    fill = FirstFill(cache)
    parts = [
        part("tasks/half.json", b"1", size=2),
        part("tasks/wrong.json", b"1", digest=b"0" * 32),
        part("tasks/there.json", b"new"),
        part("config.json", b"{}"),  # may be compared with a text that the user wrote
    ]
    assert asyncio.run(fill.write([*parts, part("tasks/new.json", b"{}")])) == parts
    fill.close()
    assert sorted(cache.paths()) == ["tasks/new.json", "tasks/there.json"]
    assert cache.read("tasks/there.json") == b"old"


def test_a_link_in_the_way_is_not_followed(cache: Cache, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    Path(cache.absolute("tasks/one.json")).symlink_to(victim)
    Path(cache.absolute("linked")).symlink_to(tmp_path)
    fill = FirstFill(cache)
    evil = [part("tasks/one.json", b"evil")]
    assert asyncio.run(fill.write(evil)) == evil
    with pytest.raises(StorageError):
        asyncio.run(fill.write([part("linked/one.json", b"evil")]))
    fill.close()
    assert victim.read_text() == "mine" and not (tmp_path / "one.json").exists()


def test_an_unedited_plan_equals_its_base_also_in_the_next_process(cache: Cache) -> None:
    fill = FirstFill(cache)
    cache.known.settle([])
    cache.known.learn()
    assert asyncio.run(fill.write([part(PLAN, b"# Plan\n")])) == []
    while time.time_ns() - os.stat(cache.absolute(PLAN)).st_ctime_ns < 60_000_000:
        time.sleep(0.005)
    fill.close()
    cache.known.share()
    cache.store_known()
    assert Edits(cache).base(PLAN) == b"# Plan\n"
    found = cache.signature(PLAN)
    assert found is not None and cache.known.is_settled(PLAN, found)
    later = Cache(cache.directory, cache.remote)
    later.load_known()
    edits = Edits(later)
    os.unlink(later.absolute(f".remote/base/{PLAN}"))  # a comparison would fail without it
    assert edits.scan() == []
    Path(later.absolute(PLAN)).write_bytes(b"# Pawn\n")
    assert edits.scan() == [PLAN]


@pytest.mark.e2e
def test_an_edit_made_before_the_first_agent_starts_is_sent(sandbox: Sandbox) -> None:
    server = sandbox.started_server()
    ana, ben = sandbox.client("ana"), sandbox.client("ben")
    ana.add_remote(server, server.token("human:ana", "agent:*"))
    for number in range(1, 31):
        ana.ok("create", f"Task {number}", *BY)
    ben.add_remote(server, server.token("human:ben", "agent:*"))
    assert not differences(ben.lattice_dir, server.lattice_dir())
    agent = json.loads(ben.ok("remote", "agent", "status", "--json"))["data"]["pid"]
    os.kill(agent, signal.SIGKILL)  # a text emptied while no agent runs is withheld only after a crash
    wait_for(lambda: not os.path.exists(f"/proc/{agent}"), "the end of the agent")
    edited, emptied = sorted((ben.lattice_dir / "plans").glob("*.md"))[:2]
    edited.write_text(f"{edited.read_text()}\nA line of Ben's.\n")
    log = next((ben.lattice_dir / "events").glob("task_*.jsonl"))
    log.write_bytes(b"")
    emptied.write_bytes(b"")
    ben.ok("list")
    mine = server.lattice_dir() / edited.relative_to(ben.lattice_dir)
    wait_for(lambda: "A line of Ben's." in mine.read_text(), "the edit to be on the server")
    assert log.read_bytes() == (server.lattice_dir() / log.relative_to(ben.lattice_dir)).read_bytes(), "it is repaired"
    wait_for(lambda: emptied.read_bytes() != b"", "the emptied text to be restored")
    assert not differences(ben.lattice_dir, server.lattice_dir()), "no edit without evidence"
