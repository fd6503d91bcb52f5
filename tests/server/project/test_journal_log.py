"""Author and content of each change, as recorded by a worker and read from the journal."""

from pathlib import Path

import pytest
from worker_process import ANA, WorkerProcess, make_project

from lattice_remote.protocol.messages import LogEntry
from lattice_remote.server.datadir import ProjectPaths
from lattice_remote.server.ipc import Reconcile
from lattice_remote.server.project import journal_log
from lattice_remote.server.project.journal_log import read_log, read_page


def entries(project: Path, task: str = "", limit: int = 100) -> list[LogEntry]:
    return read_log(ProjectPaths(project), task, limit)[0]


def test_the_log_has_commands_edits_and_outside_changes(tmp_path: Path) -> None:
    project = make_project(tmp_path / "web")
    with WorkerProcess(project) as worker:
        worker.run("create", "One", *ANA)
        worker.run("comment", "LAT-1", "by a bot", "--actor", "agent:bot")
        task = entries(project)[0].tasks[0]
        worker.edit(f"plans/{task}.md", (project / f".lattice/plans/{task}.md").read_bytes(), b"# Mine\n")
        (project / f".lattice/notes/{task}.md").write_text("by an editor\n")
        worker.send(Reconcile(None))
        assert worker.done().change is not None
        found = entries(project)
    assert [entry.seq for entry in found] == [4, 3, 2, 1]
    by_editor, edit, bot, create = found
    assert {tuple(entry.tasks) for entry in found} == {(task,)}
    assert (create.actor, create.token_actor, create.command) == ("human:ana", "", "create One --actor human:ana")
    assert (bot.actor, bot.token_actor, bot.token_id) == ("agent:bot", "human:ana", create.token_id)
    assert (edit.actor, edit.command) == ("human:ana", f"edit plans/{task}.md") and len(edit.cause) == 32
    assert (by_editor.actor, by_editor.token_id, by_editor.cause) == ("server", "", "edit")
    assert by_editor.command == f"changed notes/{task}.md"


def test_a_session_acts_as_its_own_actor_through_the_token(tmp_path: Path) -> None:
    project = make_project(tmp_path / "web")
    with WorkerProcess(project) as worker:
        worker.ok("session", "start", "--name", "Argus", "--model", "opus", "--framework", "x")
        worker.ok("create", "By a session", "--name", "Argus-1")
        found = entries(project)
    assert [(entry.actor, entry.token_actor) for entry in found] == [("agent:Argus", "human:ana")] * len(found)
    event = next((project / ".lattice/events").glob("task_*.jsonl")).read_text()
    assert '"Argus"' in event, "lattice itself recorded the session that the log names"


def test_a_task_is_found_by_either_id_also_when_it_is_archived(tmp_path: Path) -> None:
    project = make_project(tmp_path / "web")
    with WorkerProcess(project) as worker:
        worker.run("create", "One", *ANA)
        worker.run("create", "Two", *ANA)
        worker.run("comment", "LAT-1", "again", *ANA)
        worker.run("archive", "LAT-1", *ANA)
    found = entries(project, "lat-1")
    assert [entry.seq for entry in found] == [4, 3, 1]
    assert entries(project, found[0].tasks[0]) == found
    with pytest.raises(Exception, match="no task 'LAT-9'"):
        entries(project, "LAT-9")


def test_pages_of_any_size_lead_to_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = make_project(tmp_path / "web")
    with WorkerProcess(project) as worker:
        for number in range(7):
            worker.run("create", f"Task {number}", *ANA)
    everything = entries(project)
    for limit in (1, 3, 7):
        page = read_page(project / "journal", limit=limit)
        told = page.entries
        while page.before is not None:
            page = read_page(project / "journal", limit=limit, before=page.before)
            assert len(page.entries) <= limit
            told += page.entries
        assert told == everything
    monkeypatch.setattr(journal_log, "MAX_SCAN_BYTES", 1)
    assert entries(project) == everything


@pytest.mark.parametrize("scan_bytes", [1, journal_log.MAX_SCAN_BYTES])
def test_there_is_more_exactly_when_another_entry_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scan_bytes: int
) -> None:
    project = make_project(tmp_path / "web")
    with WorkerProcess(project, settings='{"segment_bytes": 4096, "max_bytes": 1000000}') as worker:
        for number in range(3):
            worker.ok("create", f"Task {number}", *ANA)
            worker.ok("comment", "LAT-1", "x" * 5000, *ANA)
    monkeypatch.setattr(journal_log, "MAX_SCAN_BYTES", scan_bytes)
    paths = ProjectPaths(project)
    for task, count in (("", 6), ("LAT-1", 4), ("LAT-2", 1), ("LAT-3", 1)):
        found = {limit: read_log(paths, task, limit) for limit in range(1, count + 2)}
        assert {limit: (len(page), more) for limit, (page, more) in found.items()} == {
            limit: (min(limit, count), limit < count) for limit in found
        }


def test_a_change_is_not_announced_before_it_is_durable(tmp_path: Path) -> None:
    project = make_project(tmp_path / "web")
    with WorkerProcess(project) as worker:
        worker.run("create", "One", *ANA)
        worker.run("create", "Two", *ANA)
        head = (worker.ready.epoch, 1)
    assert [entry.seq for entry in read_page(project / "journal", head=head).entries] == [1]


def test_a_damaged_record_ends_its_segment_and_nothing_else(tmp_path: Path) -> None:
    project = make_project(tmp_path / "web")
    with WorkerProcess(project) as worker:
        worker.run("create", "One", *ANA)
        worker.run("create", "Two", *ANA)
    (segment,) = (project / "journal").glob("*.log")
    segment.write_bytes(segment.read_bytes()[:-3])
    assert [entry.seq for entry in entries(project)] == [1]
