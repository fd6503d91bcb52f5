"""Data directory copied file by file while commands run: it becomes the project at one number."""

import itertools
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from random_commands import command_lines
from worker_process import ANA, WorkerProcess, make_project, tree_of

from lattice_remote.protocol.messages import Attachment
from lattice_remote.server.ipc import NewEpoch, Ready
from lattice_remote.server.journal.segment import list_beside, segment_paths
from lattice_remote.server.tree.tree import INLINE_BYTES


def files_in_order(source: Path) -> Iterator[Path]:
    """Yield paths as rsync reads them: a directory's own files, then its directories, by name; listed before."""
    entries = sorted(os.scandir(source), key=lambda entry: (entry.is_dir(follow_symlinks=False), entry.name))
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from files_in_order(Path(entry.path))
        else:
            yield Path(entry.path)


def copy_file(path: Path, source: Path, target: Path) -> None:
    place = target / path.relative_to(source)
    place.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():  # else it has vanished
        shutil.copy2(path, place)


@pytest.mark.parametrize(("seed", "is_listed_before"), [(21, True), (22, False), (24, True)])
def test_a_torn_copy_becomes_the_project_at_one_number(tmp_path: Path, seed: int, is_listed_before: bool) -> None:
    rng = random.Random(seed)
    project = make_project(tmp_path / "web")
    lattice, copied = project / ".lattice", tmp_path / "copied" / "web"
    with WorkerProcess(project) as worker:
        commands = iter(command_lines(rng, 200, lattice))
        for _, (argv, files) in zip(range(50), commands, strict=False):
            worker.run(*argv, files=files)
        states = [tree_of(lattice)]
        paths = files_in_order(project)
        for path in list(paths) if is_listed_before else paths:
            copy_file(path, project, copied)
            if rng.random() < 0.5 and (command := next(commands, None)) is not None:
                worker.run(*command[0], files=command[1])
                states.append(tree_of(lattice))
        epoch = worker.ready.epoch
        worker.kill()
    assert tree_of(copied / ".lattice") not in states, "the copy is torn, or this shows nothing"
    with WorkerProcess(copied) as worker:
        assert tree_of(copied / ".lattice") in states, worker.ready.notes
        assert worker.ready.epoch != epoch
        assert "No issues found" in worker.ok("doctor")


def test_a_list_of_files_that_is_newer_than_the_copied_journal_is_not_trusted(tmp_path: Path) -> None:
    rng = random.Random(25)
    project = make_project(tmp_path / "web")
    lattice, copied = project / ".lattice", tmp_path / "copied" / "web"
    commands = command_lines(rng, 120, lattice)
    states = []
    with WorkerProcess(project) as worker:
        for path in files_in_order(project):
            if path.name != "manifest":
                copy_file(path, project, copied)
            for argv, files in itertools.islice(commands, 3):
                worker.run(*argv, files=files)
                states.append(tree_of(lattice))
        worker.kill()
    with WorkerProcess(project) as worker:  # it lists the files anew
        worker.run("create", "not in the copied journal", *ANA)
        worker.kill()
    copy_file(project / "journal/manifest", project, copied)
    with WorkerProcess(copied) as worker:
        assert tree_of(copied / ".lattice") in states, worker.ready.notes
        assert "No issues found" in worker.ok("doctor")


def test_a_large_file_that_was_missed_returns_the_copy_to_the_change_before(tmp_path: Path) -> None:
    project = make_project(tmp_path / "web")
    lattice, copied = project / ".lattice", tmp_path / "copied" / "web"
    with WorkerProcess(project) as worker:
        worker.ok("create", "x", *ANA)
        for path in files_in_order(lattice):
            copy_file(path, project, copied)
        worker.ok("comment", "LAT-1", "before", *ANA)
        before = tree_of(lattice)
        large = Attachment(2, "large.bin", random.Random(1).randbytes(INLINE_BYTES + 1))
        worker.ok("attach", "LAT-1", "large.bin", *ANA, files=[large])
        worker.ok("comment", "LAT-1", "after", *ANA)
        for path in files_in_order(project / "journal"):
            copy_file(path, project, copied)
        worker.kill()
    with WorkerProcess(project) as worker:  # the list of files is newer than the copied journal, as after a rotation
        worker.ok("comment", "LAT-1", "long after", *ANA)
        worker.kill()
    with WorkerProcess(project) as worker:
        worker.kill()
    copy_file(project / "journal/manifest", project, copied)
    with WorkerProcess(copied) as worker:
        assert tree_of(copied / ".lattice") == before, worker.ready.notes
        assert "No issues found" in worker.ok("doctor")


def test_without_a_list_of_files_no_change_is_taken_back(tmp_path: Path) -> None:
    """The files of an earlier number are unknown: the missing changes are named, and the rest is the newest."""
    project = make_project(tmp_path / "web")
    lattice, copied = project / ".lattice", tmp_path / "copied" / "web"
    with WorkerProcess(project) as worker:
        worker.ok("create", "x", *ANA)
        for path in files_in_order(lattice):
            copy_file(path, project, copied)
        large = Attachment(2, "large.bin", random.Random(1).randbytes(INLINE_BYTES + 1))
        worker.ok("attach", "LAT-1", "large.bin", *ANA, files=[large])
        worker.ok("comment", "LAT-1", "after", *ANA)
        after = tree_of(lattice)
        for path in files_in_order(project / "journal"):
            copy_file(path, project, copied)
        worker.kill()
    for _ in range(2):  # the list of files becomes newer than the copied journal
        with WorkerProcess(project) as worker:
            worker.ok("comment", "LAT-1", "long after", *ANA)
            worker.kill()
    copy_file(project / "journal/manifest", project, copied)
    for segment in segment_paths(copied / "journal"):
        list_beside(segment).unlink()
    with WorkerProcess(copied) as worker:
        (payload,) = (path for path in after if path.startswith("artifacts/payload/"))
        assert {**tree_of(copied / ".lattice"), payload: b""} == {**after, payload: b""}
        assert f"{payload}: could not be restored" in worker.ready.notes


def test_a_list_of_files_of_an_earlier_epoch_is_not_used(tmp_path: Path) -> None:
    """It stays beside its segment, and its number says nothing of the journal's last epoch."""
    project, copied = make_project(tmp_path / "web"), tmp_path / "copied" / "web"
    with WorkerProcess(project) as worker:
        worker.ok("create", "of the first epoch", *ANA)
        worker.send(NewEpoch("a client is ahead"))
        assert isinstance(worker.receive(), Ready)
        worker.ok("comment", "LAT-1", "of the second epoch", *ANA)
        worker.stop()
    with WorkerProcess(project) as worker:  # the list of files is of its start
        worker.ok("comment", "LAT-1", "the last", *ANA)
        for path in files_in_order(project):
            copy_file(path, project, copied)
        worker.kill()
    with WorkerProcess(copied) as worker:
        assert tree_of(copied / ".lattice") == tree_of(project / ".lattice"), worker.ready.notes


def test_edits_in_a_copy_are_kept(tmp_path: Path) -> None:
    project = make_project(tmp_path / "web")
    with WorkerProcess(project) as worker:
        worker.ok("create", "x", *ANA)
        worker.kill()
    copied = tmp_path / "copied"
    shutil.copytree(project, copied)
    (next((copied / ".lattice/tasks").iterdir())).unlink()
    plan = next((copied / ".lattice/plans").iterdir())
    plan.write_text("# By hand\n")
    later = plan.stat().st_mtime + 3600
    os.utime(plan, (later, later))
    with WorkerProcess(copied) as worker:
        assert tree_of(copied / ".lattice") == {**tree_of(project / ".lattice"), f"plans/{plan.name}": b"# By hand\n"}
        assert "is a copy of a running server: 1 files" in worker.ready.notes[0]
