"""Reports of a directory, also after its replacement, and after a name that stops the library."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from harness import until

from lattice_remote import file_watcher
from lattice_remote.file_watcher import FileWatcher


@asynccontextmanager
async def watching(directory: Path, **options: bool) -> AsyncIterator[tuple[FileWatcher, list[set[str] | None]]]:
    watcher, reports = FileWatcher(**options), list[set[str] | None]()
    watcher.add(str(directory), reports.append)
    try:
        yield watcher, reports
    finally:
        watcher.close()


def has(reports: list[set[str] | None], path: str) -> Callable[[], bool]:
    return lambda: any(path in report for report in reports if report)


async def changed(directory: Path, reports: list[set[str] | None], name: str) -> None:
    """Write until it is reported: the watch begins in its thread."""
    numbers = iter(range(100_000))

    def written() -> bool:
        (directory / name).write_text(str(next(numbers)))
        return has(reports, name)()

    await until(written)


async def test_changes_are_reported_and_the_beginning_first(tmp_path: Path) -> None:
    async with watching(tmp_path) as (_, reports):
        await changed(tmp_path, reports, "a.json")
        assert reports[0] is None
        (tmp_path / "plans").mkdir()
        await until(has(reports, "plans"))
        (tmp_path / ".tmp").write_text("x")
        await changed(tmp_path, reports, "plans/b.md")
        assert not has(reports, ".tmp")()


async def test_an_owner_that_reads_all_anyway_hears_of_no_beginning(tmp_path: Path) -> None:
    async with watching(tmp_path, is_scanned=True) as (_, reports):
        await changed(tmp_path, reports, "a.json")
        assert None not in reports


@pytest.mark.parametrize("pause_s", [0.0, 1.2])
async def test_another_directory_in_its_place_is_all_new(
    tmp_path: Path, pause_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, and after an interval without a directory."""
    place = tmp_path / "place"
    place.mkdir()
    async with watching(place, is_scanned=True) as (_, reports):
        await changed(place, reports, "a.json")
        place.rename(tmp_path / "away")
        await asyncio.sleep(pause_s)
        place.mkdir()
        await until(lambda: None in reports)
        await changed(place, reports, "b.json")
    assert [record.getMessage() for record in caplog.records] == [f"{place} was replaced by another directory"]


async def test_a_directory_may_be_missing_at_first_and_be_removed(tmp_path: Path) -> None:
    place = tmp_path / "place"
    async with watching(place) as (_, reports):
        await until(lambda: reports == [None])
        place.mkdir()
        await until(lambda: reports == [None, None])
        await changed(place, reports, "a.json")
        shutil.rmtree(place)
        await asyncio.sleep(0)
        place.mkdir()
        await changed(place, reports, "b.json")


async def test_an_undecodable_name_is_reported_and_the_watch_is_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(file_watcher, "_AGAIN_S", 0.2)
    async with watching(tmp_path, is_scanned=True) as (watcher, reports):
        await changed(tmp_path, reports, "a.json")
        (tmp_path / os.fsdecode(b"caf\xe9.md")).write_bytes(b"x")
        await until(lambda: None in reports)
        assert "they are compared periodically" in caplog.text
        await changed(tmp_path, reports, "b.json")
        await until(lambda: watcher.trouble is None)


LIMITED = (
    "unshare",
    "--user",
    "--map-root-user",
    "sh",
    "-ec",
    'echo 20 >/proc/sys/user/max_inotify_watches; exec "$@"',
)
WATCHES_ALL = """
import asyncio, json, sys
from lattice_remote.file_watcher import FileWatcher

async def main():
    watcher, began = FileWatcher(), asyncio.Event()
    watcher.add(sys.argv[1], lambda paths: began.set())
    await asyncio.wait_for(began.wait(), 20)
    print(json.dumps(watcher.trouble))
    watcher.close()

asyncio.run(main())
"""


@pytest.mark.parametrize(("directories", "is_partial"), [(5, False), (40, True)])
def test_a_tree_that_can_be_watched_only_in_part_is_trouble(tmp_path: Path, directories: int, is_partial: bool) -> None:
    """The user's limit of watches is reached half way."""
    if subprocess.run([*LIMITED, "sh", "true"], capture_output=True, check=False).returncode:
        pytest.skip("user namespaces are not available")
    for number in range(directories):
        (tmp_path / str(number)).mkdir()
    argv = [*LIMITED, "sh", sys.executable, "-c", WATCHES_ALL, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert (json.loads(done.stdout) is not None) is is_partial, done.stderr
