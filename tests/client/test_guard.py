"""The write guard: local commands cannot change the cache."""

import os
import shutil
from pathlib import Path

import pytest

from lattice_remote.client.guard import Guard, WriteRefused, allow_writes


def refused(guarded: Path, action: str) -> Guard:
    """Run a line of Python with ``d`` as the guarded directory, under a guard."""
    guard = Guard(str(guarded))
    guard.start()
    try:
        exec(action, {"os": os, "shutil": shutil, "d": str(guarded), "Path": Path})  # noqa: S102
    finally:
        guard.stop()
    return guard


@pytest.mark.parametrize(
    "action",
    [
        "open(d + '/config.json', 'w')",
        "open(d + '/config.json', 'r+')",
        "open(d + '/events.jsonl', 'ab')",
        "os.open(d + '/x', os.O_CREAT | os.O_WRONLY)",
        "os.replace(d + '/config.json', d + '/../x')",
        "Path(d, 'x').mkdir()",
        "os.unlink(d + '/remote.json')",
        "os.symlink('x', d + '/y')",
        "os.truncate(d + '/config.json', 0)",
        "os.rename(d, d + '2')",
        "os.rename(d + '/../other', d + '/x')",
        "os.link(d + '/../other', d + '/x')",
        "os.rmdir(d + '/locks')",
        "os.chmod(d + '/config.json', 0)",
        "os.utime(d + '/config.json')",
        "shutil.rmtree(d)",
        "open(os.fsencode(d) + b'/x', 'w')",
        "os.chdir(d); open('config.json', 'w')",
        "open(d + '/locks/x.lock', 'w')",
    ],
)
def test_writes_into_the_cache_are_refused(guarded: Path, action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(guarded.parent)
    (guarded.parent / "other").write_text("")
    before = (guarded / "config.json").stat()
    with pytest.raises(WriteRefused) as error:
        refused(guarded, action)
    assert error.value.code == "REMOTE_GUARD"
    assert sorted(path.name for path in guarded.iterdir()) == ["config.json", "locks"]
    after = (guarded / "config.json").stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert (guarded / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    "action",
    [
        "open(d + '/config.json').close()",
        "os.listdir(d)",
        "open(d + '/../x', 'w').close()",
        "open(os.open(d + '/../x', os.O_CREAT | os.O_RDWR), 'w').close()",
    ],
)
def test_reading_is_allowed(guarded: Path, action: str) -> None:
    assert refused(guarded, action).refused is None


def test_a_write_through_a_link_into_the_cache_is_refused(guarded: Path) -> None:
    (guarded.parent / "link").symlink_to(guarded)
    with pytest.raises(WriteRefused):
        refused(guarded, "open(d + '/../link/config.json', 'w')")


def test_a_suppressed_refusal_is_remembered(guarded: Path) -> None:
    guard = refused(guarded, "for name in 'xy':\n try:\n  open(f'{d}/{name}', 'w')\n except OSError:\n  pass")
    assert isinstance(guard.refused, WriteRefused) and f"{guarded}/x" in guard.refused.message, "the first one"


@pytest.mark.parametrize("folder", ["plans", ""])
def test_allowed_writes_reach_their_folder_alone(guarded: Path, folder: str) -> None:
    for name in ("plans", "plans2"):
        (guarded / name).mkdir()
    guard = Guard(str(guarded))
    guard.start()
    try:
        with allow_writes(folder):
            (guarded / "plans" / "x.md").write_text("x")
            for path in (guarded / "plans2" / "x.md", guarded / "config.json"):
                if folder:
                    with pytest.raises(WriteRefused):
                        path.write_text("x")
                else:
                    path.write_text("x")
        with pytest.raises(WriteRefused):
            (guarded / "plans" / "x.md").write_text("y")
    finally:
        guard.stop()
    assert (guarded / "plans" / "x.md").read_text() == "x"
