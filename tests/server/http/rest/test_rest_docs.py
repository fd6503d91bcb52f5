"""Examples and endpoint list of docs/use/rest.md."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from server_process import Process
from test_server import make_data, make_token

from lattice_remote.server.http.app import ENDPOINTS
from lattice_remote.server.http.rest import Nothing
from lattice_remote.server.tokens import TokenFile

PAGE = (Path(__file__).resolve().parents[4] / "docs" / "use" / "rest.md").read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    data = make_data(tmp_path_factory.mktemp("docs") / "data")
    data.create_project("board", code="LAT", name=None, actor=None)
    started = Process(data)
    yield started
    assert started.end() == 0


def test_the_examples_run_as_documented(server: Process) -> None:
    data = server.data
    token = TokenFile(data.tokens).create(projects=["board"], actor="human:ana", act_as=["agent:*"])[1]
    lines = [line for block in re.findall("^```\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
    script = "\n".join(line.replace("curl ", "curl -sS --fail-with-body ", 1) + "; echo" for line in lines)
    environment = {**os.environ, "SERVER": f"http://127.0.0.1:{server.port}", "TOKEN": token}
    done = subprocess.run(["bash", "-ec", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert len(lines) > 10
    assert "\n# The plan\n" in done.stdout
    tree = data.project("board").lattice
    [task] = [json.loads(path.read_text()) for path in (tree / "tasks").iterdir()]
    assert (task["title"], task["status"], task["assigned_to"]) == ("Write it all down", "in_planning", "agent:scribe")
    assert task["comment_count"] == 2
    assert (tree / "notes" / f"{task['id']}.md").read_text() == "A note"
    assert json.loads((tree / "resources/gpu/resource.json").read_text())["holders"] == []


def test_every_endpoint_is_listed() -> None:
    [table] = re.findall(r"^\| \| \|\n\|---\|---\|\n(.*?)\n\n", PAGE, re.M | re.S)[:1]
    for endpoint in ENDPOINTS:
        last = re.sub("{.*}", "", endpoint.path).strip("/").rpartition("/")[2]
        assert last in table, endpoint
        assert any(endpoint.method in row and last in row for row in table.splitlines()) or endpoint.method == "POST"
    filters = next(endpoint.takes[0] for endpoint in ENDPOINTS if endpoint.name == "list_tasks")
    assert filters is not Nothing
    for name in filters.__struct_fields__:
        assert f"`{name}" in PAGE, name


def test_each_described_path_exists(server: Process) -> None:
    """Includes paths that are served by other modules."""
    token = make_token(server.data)
    with requests.Session() as session:
        described = session.get(f"http://127.0.0.1:{server.port}/openapi.json", timeout=10).json()
        session.headers["Authorization"] = f"Bearer {token}"
        assert described["openapi"] == "3.1.0"
        for path, methods in described["paths"].items():
            url = f"http://127.0.0.1:{server.port}" + path.replace("{slug}", "web").replace("{", "x").replace("}", "")
            answer = session.delete(url, timeout=10)
            assert answer.status_code == 405, path
            assert {*answer.headers["Allow"].split(", ")} - {"HEAD"} == {method.upper() for method in methods}, path
        for path in ("/healthz", "/readyz", "/projects", "/projects/web", "/projects/web/dashboard/data"):
            answer = session.get(f"http://127.0.0.1:{server.port}{path}", timeout=10)
            assert str(answer.status_code) in described["paths"][path.replace("web", "{slug}")]["get"]["responses"]
            assert answer.status_code == 200
    names = [method["operationId"] for methods in described["paths"].values() for method in methods.values()]
    assert len(names) == len(set(names)) > 20
