"""Operations of the dashboard and of MCP in a worker: once, atomic, and under the caller's own name."""

import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from worker_process import ANA, Copy, WorkerProcess, change_of, make_project, tree_of

from lattice_remote.protocol.messages import Attachment, Refused, Returned
from lattice_remote.server.ipc import AbandonRequest
from lattice_remote.server.project.worker_process import WORKER_COMMAND

NO_TASK = f"task_{'0' * 26}"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with WorkerProcess(make_project(tmp_path_factory.mktemp("surfaces") / "web")) as started:
        yield started


@pytest.fixture(scope="module")
def task(worker: WorkerProcess) -> str:
    """A task's id."""
    return str(json.loads(worker.ok("create", "x", *ANA, "--json"))["data"]["id"])


def returned(worker: WorkerProcess, surface: str, name: str, payload: object, **options: object) -> tuple[int, Any]:
    """Return status and payload of a successful call."""
    answer = worker.call(surface, name, payload, **options)[1]
    assert isinstance(answer, Returned), answer
    return answer.status, json.loads(answer.payload)


def refused(worker: WorkerProcess, surface: str, name: str, payload: object, **options: object) -> str:
    """Return the code of a call that is refused without effect."""
    before = tree_of(worker.project / ".lattice")
    done, answer = worker.call(surface, name, payload, **options)
    assert isinstance(answer, Refused), answer
    assert done.change is None
    assert tree_of(worker.project / ".lattice") == before
    return answer.code


def test_a_post_is_one_change_with_its_actor_and_its_words(worker: WorkerProcess, task: str) -> None:
    lattice = worker.project / ".lattice"
    copy = Copy(lattice, tree_of(lattice))
    done, answer = worker.call("dashboard", f"/api/tasks/{task}/comment", {"body": "hello", "actor": "agent:bot"})
    assert isinstance(answer, Returned) and answer.status == 200, answer
    assert json.loads(answer.payload)["data"]["last_event_id"]
    change = change_of(done)
    assert change is not None
    assert (change.actor, change.token_actor, change.command) == (
        "agent:bot",
        "human:ana",
        "dashboard: POST /api/tasks/…/comment",
    )
    copy.seq = change.seq - 1
    copy.follow(change)
    assert copy.files == tree_of(lattice)
    assert "hello" not in change.command


@pytest.mark.parametrize("named", [{}, {"actor": "dashboard:web"}])
def test_a_post_without_an_actor_of_its_own_is_that_of_the_token(worker: WorkerProcess, named: dict[str, str]) -> None:
    status, answer = returned(worker, "dashboard", "/api/tasks", {"title": "t", **named}, actor="human:bob")
    assert status == 201
    assert answer["data"]["created_by"] == "human:bob"


def test_settings_of_the_page_name_no_actor(worker: WorkerProcess) -> None:
    done, answer = worker.call("dashboard", "/api/config/dashboard", {"theme": "noir"})
    assert isinstance(answer, Returned) and answer.status == 200
    change = change_of(done)
    assert change is not None and change.actor == "human:ana"
    before = tree_of(worker.project / ".lattice")
    status, answer = returned(worker, "dashboard", "/api/config/dashboard", {"theme": "x", "actor": "x"})
    assert (status, answer["error"]["code"]) == (400, "VALIDATION_ERROR")
    assert tree_of(worker.project / ".lattice") == before


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/api/tasks", b"{", 400),
        ("/api/tasks", b"", 400),
        ("/api/tasks", b" " * (1 << 20) + b"{}", 413),
        ("/api/tasks", {"title": ""}, 400),
        ("/api/tasks/none/status", {"status": "done"}, 400),
        (f"/api/tasks/{NO_TASK}/status", {"status": "done"}, 404),
        ("/api/none", {}, 404),
        ("/none", {}, 404),
        (f"/api/tasks/{NO_TASK}/none", {}, 404),
        (f"/api/tasks/{NO_TASK}", {}, 404),
        ("/", {}, 404),
    ],
)
def test_a_failure_is_answered_as_by_the_dashboard_and_changes_nothing(
    worker: WorkerProcess, path: str, body: object, status: int
) -> None:
    before = tree_of(worker.project / ".lattice")
    found, answer = returned(worker, "dashboard", path, body)
    assert found == status
    assert answer["ok"] is False and answer["error"]["code"]
    assert tree_of(worker.project / ".lattice") == before


def test_a_call_that_breaks_down_is_answered_as_failed_and_changes_nothing(tmp_path: Path) -> None:
    with WorkerProcess(make_project(tmp_path / "web")) as worker:
        ids = worker.project / ".lattice/ids.json"
        ids.write_bytes(b"[]")  # lattice expects an object
        before = tree_of(worker.project / ".lattice")
        status, answer = returned(worker, "dashboard", "/api/tasks", {"title": "t"})
        assert (status, answer["ok"], answer["error"]["code"]) == (500, False, "REMOTE_FAILED")
        assert "was undone" in answer["error"]["message"]
        assert tree_of(worker.project / ".lattice") == before
        ids.unlink()
        assert returned(worker, "dashboard", "/api/tasks", {"title": "t"})[0] == 201


def test_unlisted_operations_and_fields_are_refused_or_undone(worker: WorkerProcess, task: str) -> None:
    unsupported = "REMOTE_UNSUPPORTED"
    assert refused(worker, "dashboard", "/api/tasks", {"title": "t", "path": "/etc/passwd"}) == unsupported
    assert refused(worker, "dashboard", f"/api/tasks/{task}/open-plans", {}) == unsupported
    assert refused(worker, "dashboard", f"/api/tasks/{NO_TASK}/open-plans", {}) == unsupported  # no handler looks
    assert refused(worker, "dashboard", f"/api/tasks/{task}\n/status", {"status": "done"}) == unsupported
    assert refused(worker, "dashboard", "api/tasks", {"title": "t"}) == unsupported
    assert refused(worker, "mcp", "lattice_show", {"task_id": task}) == unsupported
    assert refused(worker, "mcp", "nothing", {}) == unsupported
    assert refused(worker, "mcp", "lattice_create", {"title": "t", "actor": "human:ana", "x": 1}) == unsupported
    arguments = {"title": "t", "actor": "human:ana", "lattice_root": str(worker.project)}
    assert refused(worker, "mcp", "lattice_create", arguments) == unsupported
    assert refused(worker, "shell", "ls", {}) == unsupported
    file = Attachment(0, "x", b"x")
    assert refused(worker, "dashboard", "/api/tasks", {"title": "t"}, files=[file]) == unsupported


@pytest.mark.parametrize("actor", ["human:bob", "human:ana\n"])
def test_no_client_acts_as_another_actor(worker: WorkerProcess, task: str, actor: str) -> None:
    codes = {"REMOTE_FORBIDDEN", "REMOTE_UNSUPPORTED"}
    assert refused(worker, "dashboard", "/api/tasks", {"title": "t", "actor": actor}) in codes
    assert refused(worker, "mcp", "lattice_create", {"title": "t", "actor": actor}) in codes


@pytest.mark.parametrize("actor", [{"name": "Argus", "base_name": "human:bob"}, ["human:bob"], 7, None, "agents:x", ""])
def test_lattice_refuses_an_invalid_actor(worker: WorkerProcess, actor: object) -> None:
    status, answer = returned(worker, "dashboard", "/api/tasks", {"title": "t", "actor": actor})
    assert (status, answer["error"]["code"]) == (400, "VALIDATION_ERROR")
    status, _ = returned(worker, "mcp", "lattice_create", {"title": "t", "actor": actor})
    assert status == 400


@pytest.mark.parametrize("fields", [{"title": 7}, {"description": {"a": 1}}, {"tags": [{}]}, {"priority": []}])
def test_values_that_would_break_down_every_reader_are_refused(
    worker: WorkerProcess, task: str, fields: dict[str, object]
) -> None:
    """A local lattice stores them, and then fails at its own files."""
    unsupported = "REMOTE_UNSUPPORTED"
    before = tree_of(worker.project / ".lattice")
    for path, body in ((f"/api/tasks/{task}/update", {"fields": fields}), ("/api/tasks", {"title": "t", **fields})):
        status, answer = returned(worker, "dashboard", path, body)
        assert (status, answer["error"]["code"]) in ((422, unsupported), (400, "VALIDATION_ERROR"))
    assert tree_of(worker.project / ".lattice") == before
    arguments = {"task_id": task, "actor": "human:ana", "fields": fields}
    assert refused(worker, "mcp", "lattice_update", arguments) == unsupported


@pytest.mark.parametrize(
    "payload",
    [
        b'{"title": NaN}',
        b'{"title": ' + b"[" * 100 + b"]" * 100 + b"}",
        b"[" * 1000,
        b"[]",
        b"7",
        b'{"title": "\\ud800"}',
        b'{"title": ' + b"9" * 5000 + b"}",
    ],
)
def test_payloads_that_not_every_reader_can_parse_are_refused(worker: WorkerProcess, payload: bytes) -> None:
    code = {"REMOTE_PROTOCOL", "REMOTE_UNSUPPORTED"}
    assert refused(worker, "mcp", "lattice_create", payload) in code
    if payload != b"[" * 1000:  # no JSON at all: the dashboard's own handler says so
        assert refused(worker, "dashboard", "/api/tasks", payload) in code


def test_a_tool_call_returns_what_the_tool_does(worker: WorkerProcess) -> None:
    done, answer = worker.call("mcp", "lattice_create", {"title": "made", "actor": "human:ana", "tags": None})
    assert isinstance(answer, Returned) and answer.status == 200
    made = json.loads(answer.payload)["result"]
    assert made["title"] == "made"
    change = change_of(done)
    assert change is not None
    assert (change.actor, change.command) == ("human:ana", "mcp: lattice_create")
    assert (worker.project / f".lattice/plans/{made['id']}.md").is_file()
    status, error = returned(
        worker, "mcp", "lattice_status", {"task_id": "LAT-99", "new_status": "x", "actor": "human:ana"}
    )
    assert (status, error["error"]["message"]) == (400, "Short ID 'LAT-99' not found.")
    status, error = returned(worker, "mcp", "lattice_create", {"actor": "human:ana"})
    assert status == 400 and "title" in error["error"]["message"]


def test_a_file_travels_with_a_tool_call_under_its_own_name(worker: WorkerProcess, task: str) -> None:
    source = "--dir=/home/ana/größer.log"
    arguments = {"task_id": task, "source": source, "actor": "human:ana"}
    files = [Attachment(0, "größer.log", b"\x00\xff")]
    status, answer = returned(worker, "mcp", "lattice_attach", arguments, files=files)
    assert status == 200, answer
    made = answer["result"]
    assert (made["title"], made["payload"]["size_bytes"]) == ("größer.log", 2)
    payload = worker.project / ".lattice/artifacts/payload" / made["payload"]["file"]
    assert payload.read_bytes() == b"\x00\xff"
    status, answer = returned(worker, "mcp", "lattice_attach", arguments, files=[Attachment(0, "größer.log", None)])
    assert (status, answer["error"]["message"]) == (400, f"Source file not found: '{source}'.")
    assert refused(worker, "mcp", "lattice_attach", {**arguments, "source": "/etc/passwd"}) == "REMOTE_UNSUPPORTED"
    assert refused(worker, "mcp", "lattice_attach", arguments, files=[Attachment(1, "x", b"")]) == "REMOTE_PROTOCOL"
    assert os.listdir(worker.project / "tmp") == []
    status, answer = returned(worker, "mcp", "lattice_attach", {**arguments, "source": "https://example.org/x"})
    assert status == 200 and answer["result"]["custom_fields"] == {"url": "https://example.org/x"}


def test_a_call_runs_once_and_is_answered_again(tmp_path: Path) -> None:
    """I6."""
    request_id = secrets.token_hex(16)
    payload = {"title": "once"}
    with WorkerProcess(make_project(tmp_path / "web")) as worker:
        first = worker.call("dashboard", "/api/tasks", payload, id=request_id)[0]
        again = worker.call("dashboard", "/api/tasks", payload, id=request_id)[0]
        assert (again.reply, again.change, again.seq) == (first.reply, None, first.seq)
        assert (
            refused(worker, "dashboard", "/api/tasks", payload, id=request_id, token_id="tok_2") == "REMOTE_FORBIDDEN"
        )
        worker.kill()
    with WorkerProcess(worker.project) as restarted:
        assert restarted.call("dashboard", "/api/tasks", payload, id=request_id)[0].reply == first.reply
        restarted.send(AbandonRequest(request_id, "tok_1", "REMOTE_FAILED", "given up"))
        assert restarted.done().reply == first.reply
        assert len(os.listdir(worker.project / ".lattice/tasks")) == 1


def test_a_partial_success_is_undone_as_a_whole(worker: WorkerProcess, task: str) -> None:
    """Archiving appends to two logs and makes a snapshot before it finds that it can't move the plan."""
    lattice = worker.project / ".lattice"
    made = returned(worker, "mcp", "lattice_create", {"title": "half", "actor": "human:ana"})[1]["result"]["id"]
    obstacle = lattice / f"archive/plans/{made}.md"
    obstacle.parent.mkdir(exist_ok=True)
    obstacle.mkdir()
    (obstacle / f"{made}.md").mkdir()
    before = tree_of(lattice)
    status, answer = returned(worker, "dashboard", f"/api/tasks/{made}/archive", {})
    assert (status, answer["error"]["code"]) == (500, "WRITE_ERROR")
    assert tree_of(lattice) == before
    status, _ = returned(worker, "mcp", "lattice_archive", {"task_id": made, "actor": "human:ana"})
    assert status == 400
    assert tree_of(lattice) == before


def test_mcp_is_loaded_at_its_first_call(tmp_path: Path) -> None:
    with WorkerProcess(make_project(tmp_path / "web"), command=WORKER_COMMAND) as worker:
        maps = Path(f"/proc/{worker.pid}/maps")
        worker.ok("create", "x", *ANA)
        assert returned(worker, "dashboard", "/api/tasks", {"title": "x"})[0] == 201
        assert "pydantic_core" not in maps.read_text()
        assert returned(worker, "mcp", "lattice_create", {"title": "x", "actor": "human:ana"})[0] == 200
        assert "pydantic_core" in maps.read_text()


def test_a_server_without_the_package_says_what_to_install_there(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['mcp'] = None\n")
    project = make_project(tmp_path / "web")
    with WorkerProcess(project, environment={"PYTHONPATH": str(tmp_path)}) as worker:
        answer = worker.call("mcp", "lattice_create", {"title": "x", "actor": "human:ana"})[1]
        assert isinstance(answer, Refused) and answer.code == "REMOTE_UNSUPPORTED"
        assert answer.message.endswith("install lattice-remote[mcp] on the server")
        worker.ok("create", "commands go on", *ANA)


def test_hooks_of_a_call_are_handed_to_the_server(tmp_path: Path) -> None:
    project = make_project(tmp_path / "web")
    config = project / ".lattice/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hooks": {"post_event": "true"}}))
    with WorkerProcess(project) as worker:
        done, _ = worker.call("dashboard", "/api/tasks", {"title": "t"})
        assert [hook.command for hook in done.hooks] == ["true"]
        done, _ = worker.call("dashboard", "/api/tasks", {"title": ""})
        assert done.hooks == []


@pytest.mark.parametrize("fields", ['{"title": 7}', '{"tags": [{}]}', '{"title": "\\ud800"}'])
def test_fields_that_are_json_in_a_text_are_looked_into(worker: WorkerProcess, task: str, fields: str) -> None:
    """MCP's library reads a text as JSON where a tool takes none, and would do so after everything was checked."""
    arguments = {"task_id": task, "actor": "human:ana", "fields": fields}
    assert refused(worker, "mcp", "lattice_update", arguments) == "REMOTE_UNSUPPORTED"


@pytest.mark.parametrize("value", ["NaN", "1e999", '"\\ud800"', "[" * 100 + "]" * 100, "9" * 5000])
def test_json_within_a_text_is_readable_to_every_reader(worker: WorkerProcess, task: str, value: str) -> None:
    arguments = {"task_id": task, "actor": "human:ana", "event_type": "x_seen", "data": f'{{"a": {value}}}'}
    assert refused(worker, "mcp", "lattice_event", arguments) == "REMOTE_UNSUPPORTED"
    status, _ = returned(worker, "mcp", "lattice_event", {**arguments, "data": '{"a": [1]}'})
    assert status == 200
