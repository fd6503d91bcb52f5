"""Stored owners of sessions."""

import json
from pathlib import Path

import pytest
from worker_process import ANA, WorkerProcess, make_project

from lattice_remote.errors import Rejected
from lattice_remote.protocol.operations import DeleteFile, PutFile
from lattice_remote.server.worker.caller import OWNERS_FILE, Identity, Owner, SessionOwners


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / ".lattice" / "sessions").mkdir(parents=True)
    return tmp_path


def begin(project: Path, name: str, own_id: str) -> list[PutFile]:
    data = json.dumps({"name": name, "session": own_id}).encode()
    (project / ".lattice/sessions" / f"{name}.json").write_bytes(data)
    return [PutFile(f"sessions/{name}.json", data), PutFile("sessions/index.json", b"{}")]


def test_an_owner_is_known_after_a_restart_by_the_sessions_id(project: Path) -> None:
    SessionOwners(project).note(begin(project, "A-1", "sess_1"), "tok_1", "human:ana")
    assert SessionOwners(project).of("A-1", "sess_1") == Owner("sess_1", "tok_1", "human:ana")
    assert SessionOwners(project).of("A-1", "sess_2") is None, "another session of the same name, after a rollback"
    assert SessionOwners(project).of("B-1", "sess_1") is None and SessionOwners().of("A-1", "sess_1") is None


def test_ended_sessions_are_removed_when_the_next_starts(project: Path) -> None:
    owners = SessionOwners(project)
    owners.note(begin(project, "A-1", "sess_1"), "tok_1", "human:ana")
    (project / ".lattice/sessions/A-1.json").unlink()
    owners.note([DeleteFile("sessions/A-1.json"), *begin(project, "B-1", "sess_2")], "tok_2", "human:ben")
    assert set(json.loads((project / OWNERS_FILE).read_text())) == {"B-1"}


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"A-1": {"session": 3}}', b"\xff", b"null"])
def test_a_damaged_file_is_reported_and_grants_nothing(project: Path, content: bytes) -> None:
    (project / OWNERS_FILE).write_bytes(content)
    with pytest.raises(Rejected, match="cannot read the owners of sessions") as refused:
        SessionOwners(project).of("A-1", "sess_1")
    assert refused.value.code == "REMOTE_STORAGE"


def test_a_full_disk_leaves_what_was_known(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owners = SessionOwners(project)
    owners.note(begin(project, "A-1", "sess_1"), "tok_1", "human:ana")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lattice_remote.server.worker.caller.write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        owners.note(begin(project, "B-1", "sess_2"), "tok_2", "human:ben")
    assert owners.of("B-1", "sess_2") is None and owners.of("A-1", "sess_1") is not None


def test_a_session_is_used_by_its_token_and_ended_by_its_actor_alone(project: Path) -> None:
    owners = SessionOwners(project)
    owners.note(begin(project, "A-1", "sess_1"), "tok_1", "human:ana")
    may = {
        ("tok_1", "human:ana"): (True, True),
        ("tok_2", "human:ana"): (False, True),
        ("tok_3", "human:ben"): (False, False),
    }
    for (token_id, actor), (use, end) in may.items():
        identity = Identity(actor, token_id=token_id, owners=owners)
        for to_end, is_allowed in ((False, use), (True, end)):
            if is_allowed:
                identity.require_session("A-1", "sess_1", to_end=to_end)
                continue
            with pytest.raises(Rejected, match="belongs to another token") as refused:
                identity.require_session("A-1", "sess_1", to_end=to_end)
            assert refused.value.code == "REMOTE_FORBIDDEN"


def test_a_session_that_a_command_starts_belongs_to_its_token(tmp_path: Path) -> None:
    with WorkerProcess(make_project(tmp_path / "web")) as worker:
        worker.ok("create", "x", *ANA)
        start = ("session", "start", "--model", "m", "--framework", "f", "--quiet", "--name", "Argus")
        name = worker.ok(*start, token_id="tok_1").strip()
        other = worker.refused("comment", "LAT-1", "y", "--name", name, token_id="tok_2")
        assert other.code == "REMOTE_FORBIDDEN" and "belongs to another token" in other.message
        worker.ok("comment", "LAT-1", "y", "--name", name, token_id="tok_1")
        worker.ok("session", "end", name, token_id="tok_1")
        assert set(json.loads((worker.project / OWNERS_FILE).read_text())) == {name}, "written at the next start"
