"""Board snapshot in one request, and the events after it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from server_process import Process
from test_server import make_data, make_token

from sse import Listening


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    started = Process(make_data(tmp_path_factory.mktemp("board") / "data"))
    yield started
    assert started.end() == 0


@pytest.fixture(scope="module")
def token(server: Process) -> str:
    return make_token(server.data)


@pytest.fixture
def session(token: str) -> Iterator[requests.Session]:
    with requests.Session() as made:
        made.headers["Authorization"] = f"Bearer {token}"
        yield made


def url_of(server: Process) -> str:
    return f"http://127.0.0.1:{server.port}/projects/web"


def board(session: requests.Session, url: str) -> dict:
    answer = session.get(f"{url}/dashboard/data", timeout=30)
    assert answer.status_code == 200, answer.text
    assert answer.json()["ok"] is True
    return answer.json()["data"]


def test_the_data_equals_the_answers_of_the_dashboards_handlers_at_the_head(
    server: Process, session: requests.Session
) -> None:
    url = url_of(server)
    made = session.post(f"{url}/tasks", json={"title": "shown"}, timeout=30).json()["data"]
    shown, described = board(session, url), session.get(url, timeout=10).json()
    assert (shown["epoch"], shown["head"], shown["exact"]) == (described["epoch"], described["head"], True)
    assert [(task["id"], task["title"]) for task in shown["tasks"]] == [(made["id"], "shown")]
    assert shown["config"]["project_code"] == "WEB"
    assert shown["stats"]["summary"]["active_tasks"] == 1
    assert requests.get(f"{url}/dashboard/data", timeout=10).status_code == 401


def test_the_board_and_the_events_after_it_are_the_board_later(
    server: Process, token: str, session: requests.Session
) -> None:
    """Writes continue during the requests."""
    url = url_of(server)

    def write(n: int) -> None:
        assert requests.post(f"{url}/tasks", json={"title": f"no {n}"}, headers=dict(session.headers), timeout=60).ok

    with ThreadPoolExecutor(3) as pool:
        writes = [pool.submit(write, n) for n in range(15)]
        first = board(session, url)
        for done in writes:
            done.result()
    last = board(session, url)
    assert last["exact"]
    titles = {task["id"]: task["title"] for task in first["tasks"]}
    with Listening(server.port, token, since=first["position"]) as listening:
        for event in listening.until(ends=last["position"]) if first["position"] != last["position"] else ():
            if event.kind == "task_snapshot" and event.data["snapshot"]:
                titles[event.data["task"]] = event.data["snapshot"]["title"]
    assert titles == {task["id"]: task["title"] for task in last["tasks"]}
    assert len(titles) >= 15
