"""Programs that speak HTTP: what they read is what lattice prints, what they write is numbered like any command."""

from collections.abc import Iterator

import pytest
import requests
from server_process import Process
from test_app import make_data, make_token


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    started = Process(make_data(tmp_path_factory.mktemp("rest") / "data"))
    yield started
    assert started.end() == 0


@pytest.fixture(scope="module")
def session(server: Process) -> Iterator[requests.Session]:
    with requests.Session() as made:
        made.headers["Authorization"] = f"Bearer {make_token(server.data)}"
        yield made


def test_a_task_is_made_and_listed(server: Process, session: requests.Session) -> None:
    url = f"http://127.0.0.1:{server.port}/projects/web"
    made = session.post(f"{url}/tasks", json={"title": "--help me"})
    assert made.status_code == 201, made.text
    assert made.json()["data"]["title"] == "--help me"
    listed = session.get(f"{url}/tasks").json()
    assert [task["id"] for task in listed["data"]] == [made.json()["data"]["id"]]
    assert session.get(url).json()["head"] >= 1


def test_what_is_wrong_is_said_in_an_envelope(server: Process, session: requests.Session) -> None:
    url = f"http://127.0.0.1:{server.port}/projects/web/tasks"
    for asked, status, code in (
        (requests.get(url, timeout=10), 401, "REMOTE_UNAUTHORIZED"),
        (session.get(url.replace("web", "other")), 403, "REMOTE_FORBIDDEN"),
        (session.post(url, data=b"{"), 400, "REMOTE_PROTOCOL"),
        (session.post(url, data=b" " * 2_000_000), 413, "REMOTE_TOO_LARGE"),
        (session.get(url, data=b"x"), 413, "REMOTE_TOO_LARGE"),
    ):
        assert (asked.status_code, asked.json()["error"]["code"]) == (status, code)
        assert asked.json()["ok"] is False
