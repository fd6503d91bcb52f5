"""Texts as of earlier changes, restored from the remaining part of the journal."""

from pathlib import Path

import pytest
from worker_process import ANA, WorkerProcess, make_project

from lattice_remote.errors import Rejected
from lattice_remote.protocol.messages import LogEntry
from lattice_remote.server.datadir import ProjectPaths
from lattice_remote.server.ipc import Reconcile
from lattice_remote.server.journal.segment import segment_paths
from lattice_remote.server.project.journal_log import read_page, read_version

SMALL_SEGMENTS = '{"segment_bytes": 4096}'
PARAGRAPH = "word " * 500


def versions(paths: ProjectPaths, task: str) -> list[LogEntry]:
    return read_page(paths.journal, task, "notes", limit=100).entries


def text(paths: ProjectPaths, task: str, seq: int, head: int = 1000) -> bytes:
    return read_version(paths, task, "notes", ("", seq), head=(versions(paths, task)[0].epoch, head)).data


def grown(tmp_path: Path) -> tuple[ProjectPaths, str, list[bytes]]:
    """Return a project whose task has notes that an editor on the server only appended to, and their versions."""
    project = make_project(tmp_path / "web")
    notes: list[bytes] = []
    with WorkerProcess(project, settings=SMALL_SEGMENTS) as worker:
        worker.run("create", "One", *ANA)
        task = read_page(project / "journal").entries[0].tasks[0]
        for number in range(6):
            notes.append((notes or [b""])[-1] + f"{number} {PARAGRAPH}\n".encode())
            (project / f".lattice/notes/{task}.md").write_bytes(notes[-1])
            worker.send(Reconcile(None))
            assert worker.done().change is not None
    return ProjectPaths(project), task, notes


def test_every_version_is_restored_also_when_the_journal_begins_with_an_append(tmp_path: Path) -> None:
    paths, task, notes = grown(tmp_path)
    found = versions(paths, task)
    assert [entry.text_bytes for entry in reversed(found)] == [len(text) for text in notes]
    for segment in segment_paths(paths.journal)[:2]:
        segment.unlink()
    left = versions(paths, task)
    assert 0 < len(left) < len(found)
    for entry, expected in zip(left, reversed(notes), strict=False):
        assert text(paths, task, entry.seq) == expected


def test_a_version_whose_beginning_is_nowhere_is_refused_not_guessed(tmp_path: Path) -> None:
    paths, task, _ = grown(tmp_path)
    for segment in segment_paths(paths.journal)[:2]:
        segment.unlink()
    (paths.lattice / f"notes/{task}.md").write_text("another text\n")
    newest = versions(paths, task)[0]
    with pytest.raises(Rejected, match="cannot be rebuilt: the journal starts after it") as refused:
        text(paths, task, newest.seq)
    assert refused.value.code == "REMOTE_NOT_FOUND"


def test_a_version_after_the_durable_head_is_not_shown(tmp_path: Path) -> None:
    paths, task, notes = grown(tmp_path)
    newest = versions(paths, task)[0].seq
    assert text(paths, task, newest - 1, head=newest - 1) == notes[-2]
    with pytest.raises(Rejected, match="not found"):
        text(paths, task, newest, head=newest - 1)
