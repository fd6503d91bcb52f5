"""Replacement of an empty project by an imported one: atomic at any crash (I2, I6)."""

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec import structs
from worker_process import WorkerProcess, answer_of, execute, make_project, tree_of

from lattice_remote.protocol.messages import Pushed, Refused, decode_server_frame
from lattice_remote.protocol.operations import digest_of
from lattice_remote.server.datadir import ProjectPaths
from lattice_remote.server.ipc import ImportProject, RequestDone
from lattice_remote.server.maintenance.fsck_project import check_project
from lattice_remote.server.tree.tree import FileState, ProjectTree, load_manifest
from lattice_remote.server.worker import project_import
from lattice_remote.server.worker.project_import import save_states
from sample_projects import sample_project

ID = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_project(tmp_path_factory.mktemp("own"))


def candidate(project: Path, own: Path) -> ImportProject:
    """Put a checked project beside the one that it is to replace; return the request."""
    place = project / "incoming" / ID
    shutil.copytree(own, place / ".lattice")
    return ImportProject(ID, "tok_1", "human:ana", f"incoming/{ID}", 2, 1, len(tree_of(own)), ["a note"])


def asked_again(worker: WorkerProcess) -> Pushed | Refused:
    worker.send(ImportProject(ID, "tok_1", "human:ana"))
    frame = decode_server_frame(worker.done().reply or b"")
    assert isinstance(frame, Pushed | Refused)
    return frame


def left(worker: WorkerProcess) -> bool:
    """Return whether the worker has ended without another message."""
    try:
        return not isinstance(worker.receive(), RequestDone)
    except EOFError:
        return True


def test_the_worker_decides_and_leaves_and_the_next_one_goes_on(tmp_path: Path, own: Path) -> None:
    project = make_project(tmp_path / "web")
    with WorkerProcess(project) as worker:
        before = worker.ready.epoch
        worker.send(candidate(project, own))
        assert left(worker)
    assert tree_of(project / ".lattice") != tree_of(own), "not yet"
    with WorkerProcess(project) as worker:
        assert tree_of(project / ".lattice") == tree_of(own)
        assert worker.ready.epoch != before and worker.ready.head == 1
        assert asked_again(worker) == Pushed(ID, 1, 2, 1, len(tree_of(own)), ["a note"])
        worker.ok("comment", "OWN-1", "goes on", "--actor", "human:ana")
    assert not (project / "adopting").exists() and not os.listdir(project / "incoming")
    with WorkerProcess(project) as worker:
        assert asked_again(worker).id == ID, "it is answered for as long as the journal is kept"
    assert not check_project("web", ProjectPaths(project), at_rest=True).findings


def checked(project: Path, own: Path) -> tuple[ImportProject, dict[str, FileState]]:
    """Return the request of a candidate, and the states that the check leaves with it."""
    request = candidate(project, own)
    tree = ProjectTree(project / request.candidate / ".lattice", {})
    tree.accept(tree.reconcile(limit=None))
    return request, {path: structs.replace(state, settled=True) for path, state in tree.files.items()}


def imported(project: Path, request: ImportProject) -> dict[str, bytes]:
    """Have the candidate put in place; return the digests of its files as the worker knows them."""
    for _ in range(2):
        with WorkerProcess(project) as worker:
            if (project / request.candidate).exists():
                worker.send(request)
                assert left(worker)
    manifest = load_manifest(project / "journal" / "manifest")
    assert manifest is not None
    return {path: state.digest for path, state in manifest.files.items()}


def test_files_are_as_the_check_found_them_unless_they_changed(tmp_path: Path, own: Path) -> None:
    project = make_project(tmp_path / "web")
    request, states = checked(project, own)
    place = project / request.candidate
    states["context.md"] = structs.replace(states["context.md"], digest=bytes(32))
    save_states(place, states)
    (place / ".lattice" / "config.json").write_bytes(b"{}\n")
    found = imported(project, request)
    assert found["context.md"] == bytes(32), "it was not read again"
    assert found["config.json"] == digest_of(b"{}\n")
    assert found.keys() == tree_of(own).keys()


@pytest.mark.parametrize("data", [b"", b"\x81", b"\x81\xa1x\xc0"])
def test_files_are_read_where_the_states_are_damaged(tmp_path: Path, own: Path, data: bytes) -> None:
    project = make_project(tmp_path / "web")
    request, _ = checked(project, own)
    (project / request.candidate / "states").write_bytes(data)
    assert imported(project, request) == {path: digest_of(content) for path, content in tree_of(own).items()}


class Cut(BaseException):
    """The machine stops here."""


def cutting(monkeypatch: pytest.MonkeyPatch, steps: int) -> Callable[[], None]:
    """Allow ``steps`` changes of the disk, then raise Cut; return the function that restores them."""
    left = [steps]

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            if not left[0]:
                raise Cut
            left[0] -= 1
            return function(*arguments, **options)

        return call

    for module, name in (
        (os, "rename"),
        (os, "write"),
        (os, "unlink"),
        (os, "rmdir"),
        (project_import, "sync_directory"),
    ):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return monkeypatch.undo


@pytest.mark.parametrize("steps", range(9))
def test_a_crash_at_any_step_leaves_the_old_project_or_the_new(
    tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    project = make_project(tmp_path / "web")
    with WorkerProcess(project) as worker:
        worker.stop()
    empty, request = tree_of(project / ".lattice"), candidate(project, own)
    undo = cutting(monkeypatch, steps)
    try:
        project_import.decide(project, request)
        project_import.put_in_place(project)
    except Cut:
        pass
    finally:
        undo()
    with WorkerProcess(project) as worker:
        answer = asked_again(worker)
        if isinstance(answer, Pushed):
            assert tree_of(project / ".lattice") == tree_of(own)
        else:
            assert tree_of(project / ".lattice") == empty and answer.code == "REMOTE_NOT_FOUND"
            assert steps < 4, "it was decided"
    assert not (project / "adopting").exists()


def test_a_crash_after_journalling_does_not_repeat_the_import(tmp_path: Path, own: Path) -> None:
    project = make_project(tmp_path / "web")
    with WorkerProcess(project) as worker:
        worker.send(candidate(project, own))
        assert left(worker)
    shutil.copytree(project / "adopting", tmp_path / "adopting")
    with WorkerProcess(project) as worker:
        epoch = worker.ready.epoch
        worker.ok("comment", "OWN-1", "since then", "--actor", "human:ana")
        worker.kill()
    shutil.rmtree(tmp_path / "adopting" / ".lattice")
    shutil.copytree(tmp_path / "adopting", project / "adopting")  # as if it had not been removed yet
    with WorkerProcess(project) as worker:
        assert worker.ready.epoch == epoch and worker.ready.head == 2
        logs = [path.read_text() for path in (project / ".lattice/events").glob("task_*.jsonl")]
        assert sum("since then" in log for log in logs) == 1
    assert not (project / "adopting").exists()


def test_the_first_command_in_an_empty_project_wins_over_a_push(tmp_path: Path, own: Path) -> None:
    """I1."""
    project = make_project(tmp_path / "web")
    with WorkerProcess(project) as worker:
        request = candidate(project, own)
        worker.send(execute("create", "first", "--actor", "human:ana"))
        worker.send(request)
        worker.done()
        refused = answer_of(worker.done())
        assert isinstance(refused, Refused) and "has 1 task" in refused.message
        worker.ok("create", "second", "--actor", "human:ana")


def test_outside_changes_make_an_empty_project_refuse_a_push(tmp_path: Path, own: Path) -> None:
    """I12."""
    project = make_project(tmp_path / "web")
    with WorkerProcess(project) as worker:
        (project / ".lattice/notes/README.md").write_text("mine")
        worker.send(candidate(project, own))
        refused = answer_of(worker.done())
        assert isinstance(refused, Refused) and "notes/README.md" in refused.message
        (project / ".lattice/notes/README.md").unlink()
        (project / ".lattice/ids.json").write_text('{"map": {"LAT-1": "task_x"}}')
        worker.send(ImportProject(secrets.token_hex(16), "tok_1", "human:ana", f"incoming/{ID}"))
        refused = answer_of(worker.done())
        assert isinstance(refused, Refused) and "short ids" in refused.message
