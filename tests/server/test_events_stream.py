"""Who listens over HTTP: every change, whole, once, in order; and what ends it."""

from collections.abc import Iterator

import pytest
import requests
from server_process import Process
from test_app import make_data, make_token

from sse import Listening, assembled


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    started = Process(make_data(tmp_path_factory.mktemp("events") / "data"))
    yield started
    assert started.end() == 0


@pytest.fixture(scope="module")
def token(server: Process) -> str:
    return make_token(server.data)


@pytest.fixture(scope="module")
def session(token: str) -> Iterator[requests.Session]:
    with requests.Session() as made:
        made.headers["Authorization"] = f"Bearer {token}"
        yield made


@pytest.fixture
def url(server: Process) -> str:
    return f"http://127.0.0.1:{server.port}/projects/web"


def create(session: requests.Session, url: str, title: str = "a task") -> str:
    made = session.post(f"{url}/tasks", json={"title": title}, timeout=30)
    assert made.status_code == 201, made.text
    return made.json()["data"]["id"]


def test_a_new_task_is_told(server: Process, token: str, session: requests.Session, url: str) -> None:
    with Listening(server.port, token) as listening:
        assert listening.status == 200
        assert listening.response.headers["Content-Type"] == "text/event-stream"
        task = create(session, url, "told")
        events = listening.take(3)
    by_kind = {event.kind: event.data for event in events}
    assert list(by_kind) == ["task_event", "task_snapshot", "text"]
    assert by_kind["task_event"]["task"] == task
    assert by_kind["task_event"]["event"]["type"] == "task_created"
    assert by_kind["task_snapshot"]["snapshot"]["title"] == "told"
    assert by_kind["text"] == {"task": task, "text": "plan"}
    described = session.get(url, timeout=10).json()
    assert assembled(events) == [(described["epoch"], described["head"])]
