"""Push of a local project: changes made during the push become edits or are rescued, never lost (I4)."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from client_kit import PLAN, TASK, rescued
from filelock import FileLock

from lattice_remote.client.cache.cache import LOCK_FILE, Cache
from lattice_remote.client.cache.edits import Edits
from lattice_remote.client.cache.verify import read_all, take_readings
from lattice_remote.client.cli import push
from lattice_remote.client.cli.push import Pack, survey
from lattice_remote.client.config import UNPUSHED_FILE, Remote, is_unpushed, read_remote, write_remote
from lattice_remote.errors import Misuse, StorageError
from lattice_remote.protocol.bundle import Unpacker
from lattice_remote.protocol.messages import Entry

REMOTE = Remote("origin", "http://127.0.0.1:1", "web")
FILES = {
    "config.json": b'{"hooks": {"post_event": "true"}}\n',
    "context.md": b"# ours\n",
    f"tasks/{TASK}.json": b"{}\n",
    PLAN: b"# Plan\n",
    PLAN.replace("plans", "notes"): b"# Notes\n",
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "work" / ".lattice"
    for path, data in FILES.items():
        (made / path).parent.mkdir(parents=True, exist_ok=True)
        (made / path).write_bytes(data)
    write_remote(str(made), REMOTE, UNPUSHED_FILE)
    return made


def digests() -> dict[str, bytes]:
    return {path: hashlib.sha256(data).digest() for path, data in FILES.items()}


def test_a_pack_is_a_consistent_and_reproducible_snapshot(directory: Path) -> None:
    found = survey(str(directory))
    assert found.has_hooks and not found.skipped and set(found.files) == set(FILES)
    with (
        Pack.of(str(directory), found, lambda _done, _total: None) as one,
        Pack.of(str(directory), found, lambda _done, _total: None) as other,
    ):
        assert (one.size, one.digest) == (other.size, other.digest)
        data = os.pread(one.file.fileno(), one.size, 0)
        assert hashlib.sha256(data).digest() == one.digest and len(data) == one.size
        items = list(Unpacker().receive(data))
        assert [item.path for item in items if isinstance(item, Entry)] == sorted(FILES)
        (directory / PLAN).write_bytes(b"later")
        assert one.content(PLAN) == FILES[PLAN]
    with pytest.raises(StorageError, match="changed while it was read"):
        Pack.of(str(directory), found, lambda _done, _total: None)
    assert push._changed(str(directory), found) == PLAN


def test_a_file_that_no_server_accepts_is_reported_before_the_upload(directory: Path) -> None:
    (directory / "tasks" / "old.json").write_text("{}")
    with pytest.raises(Misuse, match=r"tasks/old\.json is not a file name of lattice"):
        survey(str(directory))
    (directory / "tasks" / "old.json").unlink()
    (directory / "notes" / "away").symlink_to("/etc")
    (directory / "plans" / "x.md.swp").write_text("")
    assert survey(str(directory)).skipped == ["notes/away", "plans/x.md.swp"]
    (directory / "config.json").unlink()
    with pytest.raises(Misuse, match="not a lattice project"):
        survey(str(directory))


@pytest.mark.parametrize("knows_texts", [True, False])
def test_changes_during_a_push_are_edits_or_rescued(directory: Path, knows_texts: bool) -> None:
    (directory / PLAN).write_bytes(b"# Plan, edited since\n")
    (directory / f"tasks/{TASK}.json").write_bytes(b'{"changed": 1}\n')
    (directory / "new.txt").write_bytes(b"new")
    texts = {path: data for path, data in FILES.items() if path.startswith(("plans/", "notes/"))}
    kept = push._become_cache(str(directory), REMOTE, digests(), texts if knows_texts else {})
    assert kept == ["new.txt", f"tasks/{TASK}.json"]
    assert rescued(directory) == {"new.txt": [b"new"], f"tasks/{TASK}.json": [b'{"changed": 1}\n']}
    assert read_remote(str(directory)) == REMOTE and not is_unpushed(str(directory))
    assert not list(directory.glob(".remote/unpushed*")) and not list(directory.glob(".remote/pushing*"))
    edits = Edits(Cache(str(directory), REMOTE))
    assert edits.scan() == [PLAN]
    assert edits.base(PLAN) == (FILES[PLAN] if knows_texts else None)


def test_files_that_differ_from_the_pack_are_compared_by_the_agent(directory: Path) -> None:
    """I3, I4."""
    found = survey(str(directory))
    with Pack.of(str(directory), found, lambda _done, _total: None) as pack:
        (directory / "context.md").write_bytes(b"# since\n")
        (directory / PLAN).write_bytes(b"# Plan, edited since\n")
        texts = {path: pack.content(path) for path in pack.entries if path.startswith(("plans/", "notes/"))}
        assert push._become_cache(str(directory), REMOTE, digests(), texts, pack.readings) == ["context.md"]
    cache = Cache(str(directory), REMOTE)
    (directory / f"tasks/{TASK}.json").write_bytes(b"[]\n")  # same length
    kept = take_readings(cache)
    assert kept.keys() == FILES.keys() - {"context.md", PLAN}
    assert read_all(cache, kept)[f"tasks/{TASK}.json"].digest == hashlib.sha256(b"[]\n").digest()
    assert Edits(cache).scan(kept) == [PLAN]


def test_a_push_can_be_repeated(directory: Path) -> None:
    (directory / "context.md").write_bytes(b"# since\n")
    first = push._become_cache(str(directory), REMOTE, digests(), {})
    assert push._become_cache(str(directory), REMOTE, digests(), {}) == first == ["context.md"]
    assert rescued(directory) == {"context.md": [b"# since\n"]}


def test_only_our_file_marks_a_project_that_waits_to_be_pushed(directory: Path) -> None:
    assert is_unpushed(str(directory)) and read_remote(str(directory), UNPUSHED_FILE) == REMOTE
    assert json.loads((directory / UNPUSHED_FILE).read_text())["project"] == "web"
    push.stay_local(str(directory))
    assert not is_unpushed(str(directory)) and set(survey(str(directory)).files) == set(FILES)


async def test_one_push_at_a_time_in_a_directory(directory: Path) -> None:
    """A second push must not disturb the first or the resulting cache."""
    with FileLock(directory / LOCK_FILE):
        with pytest.raises(Misuse, match="wait for it"):
            await push.push_project(str(directory), None)
        with pytest.raises(Misuse, match="wait for it"):
            push.stay_local(str(directory))
    assert is_unpushed(str(directory))
    push.stay_local(str(directory))
    assert not (directory / LOCK_FILE).exists()
    with pytest.raises(Misuse, match="no longer"):
        await push.push_project(str(directory), None)
