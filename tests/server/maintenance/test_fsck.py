"""fsck finds each kind of damage, says where, repairs what can be repaired, and destroys nothing."""

import json
import os
import shutil
import stat
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner
from worker_process import ANA, WorkerProcess, file_at, make_project

from lattice_remote.errors import Misuse
from lattice_remote.files import frames
from lattice_remote.server.cli import app
from lattice_remote.server.datadir import DataDir, lock
from lattice_remote.server.journal.repair import place_of
from lattice_remote.server.journal.segment import segment_paths
from lattice_remote.server.maintenance import fsck_project
from lattice_remote.server.maintenance.fsck import FsckReport, fsck
from lattice_remote.server.maintenance.fsck_project import Finding
from lattice_remote.server.project.journal_log import read_page
from lattice_remote.server.tokens import TokenFile
from lattice_remote.server.tree.tree import load_manifest, save_manifest
from lattice_remote.server.tree.undo import Begin, UndoLog

SMALL = '{"segment_bytes": 4096, "max_bytes": 1000000}'


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with a project of some changes, in several segments; stopped in order."""
    root = tmp_path_factory.mktemp("original") / "data"
    data = DataDir(root)
    data.create()
    make_tokens_of_every_kind(TokenFile(data.tokens))
    with WorkerProcess(make_project(root / "projects/web"), settings=SMALL) as worker:
        worker.ok("create", "One", *ANA)
        for number in range(12):
            worker.ok("comment", "LAT-1", f"{number} " + "x" * 900, *ANA)
        worker.stop()
    return root


def make_tokens_of_every_kind(tokens: TokenFile) -> None:
    """Make all kinds of tokens that the command line can leave in ``tokens.json``."""
    soon = datetime.now(UTC) + timedelta(days=1)
    rotated, _ = tokens.create(projects=["web"], actor="human:ana", act_as=["agent:*"], expires=soon)
    tokens.rotate(rotated.id, grace=timedelta(hours=1))
    tokens.create(projects=["web"], actor="human:ben", act_as=[], expires=datetime.now(UTC) - timedelta(days=1))
    tokens.create_for_metrics()
    rotated, _ = tokens.create_for_metrics(expires=soon)
    tokens.rotate(rotated.id)


@pytest.fixture
def data(original: Path, tmp_path: Path) -> DataDir:
    """A copy that passes for the original: no edits, and no new epoch."""
    copy = tmp_path / "data"
    shutil.copytree(original, copy, symlinks=True)
    journal = copy / "projects/web/journal"
    listed = load_manifest(journal / "manifest")
    assert listed is not None
    moved = msgspec.structs.replace(listed, place=place_of(journal))
    save_manifest(journal / "manifest", msgspec.msgpack.encode(moved))
    with WorkerProcess(copy / "projects/web", settings=SMALL) as worker:
        worker.stop()
    return DataDir(copy)


def check(data: DataDir, *, repair: bool = False) -> FsckReport:
    return fsck(data, data.slugs(), repair=repair)


def web(data: DataDir) -> Path:
    return data.project("web").root


def a_log(data: DataDir) -> Path:
    return next((web(data) / ".lattice/events").glob("task_*.jsonl"))


def test_a_sound_directory_is_clean_and_checking_changes_nothing(data: DataDir) -> None:
    before = everything(data)
    report = check(data)
    assert (report.findings, report.left, report.projects, report.running) == ([], 0, 1, False)
    assert everything(data) == before
    assert len(segment_paths(web(data) / "journal")) > 3, "there is something to check"


def everything(data: DataDir) -> dict[str, tuple[bytes, int]]:
    return {
        str(path): (path.read_bytes(), path.stat().st_mode)
        for path in data.path.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


# --- each kind of damage: outcome, place and message ---


def rot(path: Path, at: int) -> None:
    """Change a byte as a disk does: no other part of the file changes."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def torn_tail(data: DataDir) -> str:
    with segment_paths(web(data) / "journal")[-1].open("ab") as file:
        file.write(b"\0\0\0\x50half a record")
    return "are no whole record"


def rotten_segment(data: DataDir) -> str:
    rot(segment_paths(web(data) / "journal")[1], -20)
    return "damaged at byte"


def rotten_header(data: DataDir) -> str:
    rot(segment_paths(web(data) / "journal")[1], 12)
    return "it can't be read"


def missing_segment(data: DataDir) -> str:
    segment_paths(web(data) / "journal")[1].unlink()
    return "does not continue the segment before it"


def no_manifest(data: DataDir) -> str:
    (web(data) / "journal/manifest").unlink()
    return "missing or can't be read"


def rotten_file(data: DataDir) -> str:
    path = a_log(data)
    rot(path, path.stat().st_size // 2)
    return "damaged by the disk"


def edited_file(data: DataDir) -> str:
    next((web(data) / ".lattice/plans").iterdir()).write_text("# Edited while nobody looked\n")
    return "differs from change 13"


def new_file(data: DataDir) -> str:
    (web(data) / ".lattice/context.md").write_text("hello\n")
    return "has no such file"


def lost_file(data: DataDir) -> str:
    next((web(data) / ".lattice/plans").iterdir()).unlink()
    return "it is gone"


def leftovers(data: DataDir) -> str:
    (web(data) / ".lattice/tasks/.tmp.x").write_text("x")
    (web(data) / "journal/00000000000000000099.new").write_text("x")
    return "left over from an interrupted program"


def server_leftovers(data: DataDir) -> str:
    (data.path / "projects/.new-0123456789abcdef").mkdir()
    (data.path / f".tokens.json.{'0' * 16}").write_text("{}")
    return "left over from an interrupted command"


def open_tokens(data: DataDir) -> str:
    data.tokens.chmod(0o644)
    return "others may read or write it"


def open_project(data: DataDir) -> str:
    (web(data) / "journal").chmod(0o777)
    return "any user on this machine can write"


TOGETHER = [
    (torn_tail, edited_file, new_file, open_tokens),
    (rotten_segment, lost_file, server_leftovers),
    (rotten_header, open_project),
    (missing_segment,),
    (no_manifest,),
    (rotten_file, leftovers),
]
"""What is damaged at once: each of these takes some seconds."""


@pytest.mark.parametrize("damages", TOGETHER, ids=lambda damages: "+".join(damage.__name__ for damage in damages))
def test_damage_is_found_and_repaired_and_what_was_taken_away_is_kept(
    data: DataDir, damages: Sequence[Callable[[DataDir], str]]
) -> None:
    content = contents(data)
    words = [damage(data) for damage in damages]
    damaged = contents(data)
    found = check(data)
    for word in words:
        assert [finding for finding in found.findings if word in finding.what], (word, found.findings)
    assert found.left == len(found.findings) > 0
    repaired = check(data, repair=True)
    assert repaired.left == 0, [finding for finding in repaired.findings if not finding.repaired]
    assert check(data).findings == []
    assert damaged - contents(data) <= manifests(damaged), "what was there is still somewhere"
    if rotten_file in damages:
        assert content - contents(data) <= manifests(content), "every byte is back"


def contents(data: DataDir) -> set[bytes]:
    """Return the content of every file, and of every record of the journal."""
    found = set()
    for path in data.path.rglob("*"):
        if path.is_file() and path.name not in (".lock", ".writer.lock", "tree-state"):
            whole = path.read_bytes()
            is_segment = path.parent.name == "journal" and path.suffix == ".log"
            found.update(payload for _, payload in frames(whole)) if is_segment else found.add(whole)
    return found


def manifests(contents_: set[bytes]) -> set[bytes]:
    return {content for content in contents_ if b"boot_id" in content}


def test_a_command_that_was_cut_off_is_found_and_undone(data: DataDir) -> None:
    project, log = web(data), a_log(data)
    before = log.read_bytes()
    listed = load_manifest(project / "journal/manifest")
    assert listed is not None
    undo = UndoLog(project / "journal")
    undo.begin(Begin(listed.epoch, listed.seq + 1, listed.boot_id))
    undo.keep_for_append(*file_at(log))
    with log.open("ab") as file:
        file.write(b'{"half":')
    assert any(finding.where == "journal/undo" for finding in check(data).findings)
    assert check(data, repair=True).left == 0
    assert log.read_bytes() == before
    assert check(data).findings == []


def test_the_files_of_a_running_worker_are_no_damage(data: DataDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that takes long has an undo log, and the oldest segment may expire before it is read."""
    undo = UndoLog(web(data) / "journal")
    undo.begin(Begin("e", 1, "b"))
    undo.keep_for_append(*file_at(a_log(data)))
    expired = web(data) / "journal/00000000000000000000.log"
    expired.rename(expired.with_suffix(".gone"))
    monkeypatch.setattr(fsck_project, "segment_paths", lambda directory: [expired, *segment_paths(directory)])
    held = lock(data.path / ".lock")
    try:
        assert check(data).findings == []
    finally:
        os.close(held)


def test_damaged_files_are_restored_from_a_journal_segment_set_aside(data: DataDir) -> None:
    plan = next((web(data) / ".lattice/plans").iterdir())
    before = plan.read_bytes()
    rotten_segment(data)
    rot(plan, 3)
    assert check(data, repair=True).left == 0
    assert plan.read_bytes() == before


def test_a_damaged_segment_of_a_former_epoch_is_set_aside(data: DataDir) -> None:
    no_manifest(data)
    assert check(data, repair=True).left == 0
    rotten_segment(data)
    report = check(data)
    assert [finding.where for finding in report.findings] == [f"journal/{segment_paths(web(data) / 'journal')[1].name}"]
    report = check(data, repair=True)
    assert report.left == 0, report.findings
    assert check(data).findings == []


def test_the_readable_log_stays_after_a_repair(data: DataDir) -> None:
    rotten_segment(data)
    check(data, repair=True)
    assert [entry.seq for entry in read_page(web(data) / "journal", limit=1).entries] == [13]


def test_tokens_are_checked_and_left_to_a_person(data: DataDir) -> None:
    tokens = json.loads(data.tokens.read_text())["tokens"]
    ghost = {**tokens[0], "id": "tok_2", "sha256": "0" * 64, "projects": ["ghost"], "actor": "nobody"}
    data.tokens.write_text(json.dumps({"tokens": [tokens[0], tokens[0], ghost]}))
    before = data.tokens.read_bytes()
    report = check(data, repair=True)
    words = "\n".join(finding.what for finding in report.findings)
    assert "2 tokens have the id" in words and "2 tokens have the digest" in words
    assert "'ghost', which does not exist" in words and "bad actor 'nobody'" in words
    assert report.left == len(report.findings) == 4
    assert data.tokens.read_bytes() == before
    assert tokens[0]["sha256"] not in words
    data.tokens.write_text("{")
    assert "it can't be read" in check(data).findings[0].what


def test_a_broken_setting_and_lattices_findings_are_reported(data: DataDir) -> None:
    (data.path / "config.json").write_text('{"hoks": true}')
    (web(data) / ".lattice/tasks/x.json").write_text("junk\n")
    found = {(finding.project, finding.where) for finding in check(data).findings}
    assert ("", "config.json") in found
    doctor = [finding for finding in check(data, repair=True).findings if "lattice doctor: error" in finding.what]
    assert doctor and not doctor[0].repaired


def test_nothing_is_repaired_beside_a_running_server(data: DataDir) -> None:
    lost_file(data)
    held = lock(data.path / ".lock")
    try:
        with pytest.raises(Misuse, match="stop it first"):
            check(data, repair=True)
        report = check(data)
        assert report.running and report.left == 1
    finally:
        os.close(held)


def test_nothing_is_repaired_beside_a_worker_that_has_outlived_its_server(data: DataDir) -> None:
    lost_file(data)
    held = lock(data.project("web").writer_lock)
    try:
        with pytest.raises(Misuse, match="still at work"):
            check(data, repair=True)
    finally:
        os.close(held)


def test_the_command_line_has_three_exit_codes_and_json(data: DataDir, tmp_path: Path) -> None:
    def run(*argv: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["--data", str(data.path), "fsck", *argv])
        return done.exit_code, done.output

    assert run() == (0, "Checked 1 project: all is well.\n")
    lost_file(data)
    code, said = run("--project", "web", "--json")
    told = json.loads(said)
    assert code == 1 and told["left"] == 1 and told["findings"][0]["project"] == "web"
    assert told["findings"][0]["repair"] and not told["findings"][0]["repaired"]
    code, said = run("--repair")
    assert code == 0 and "repaired: it becomes a numbered change" in said and "1 repaired, 0 left" in said
    assert run("--project", "nowhere")[0] == 2
    assert CliRunner().invoke(app, ["--data", str(tmp_path / "none"), "fsck"]).exit_code == 2


def test_a_file_name_can_not_take_the_terminal_over() -> None:
    from lattice_remote.server.maintenance.fsck import as_lines

    report = FsckReport([Finding("web", ".lattice/\x1b[2J", "gone")], projects=1)
    assert all(line.isprintable() for line in as_lines(report))


def test_modes_are_right_after_a_repair(data: DataDir) -> None:
    open_tokens(data)
    open_project(data)
    check(data, repair=True)
    assert stat.S_IMODE(data.tokens.stat().st_mode) == 0o600
    assert not (web(data) / "journal").stat().st_mode & stat.S_IWOTH
