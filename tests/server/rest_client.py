"""HTTP client for tests: one session and one project, with checked responses."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
from server_process import Process
from test_server import make_data, make_token

__all__ = ["Rest", "rest_server"]

_PLAN = "# A plan\n\n- done in one step\n"


class Rest:
    """Asks for paths of the project ``web`` over one connection that is kept."""

    def __init__(self, port: int, token: str) -> None:
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/projects/web"
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {token}"

    def ask(self, method: str, path: str, **options: Any) -> requests.Response:
        """Send a request, and check that the response is an envelope whose refusal is one line."""
        answer = self.session.request(method, self.url + path, timeout=30, **options)
        assert answer.status_code != 500, answer.text
        if answer.status_code >= 400:
            said = answer.json()
            assert said["ok"] is False
            assert re.fullmatch("[A-Z_]+", said["error"]["code"])
            assert said["error"]["message"] and "\n" not in said["error"]["message"], said
        return answer

    def ok(self, method: str, path: str, *, status: int = 200, **options: Any) -> Any:
        """Send a request that must succeed; return the data."""
        answer = self.ask(method, path, **options)
        assert answer.status_code == status, (answer.status_code, answer.text)
        return answer.json()["data"]

    def refused(self, method: str, path: str, **options: Any) -> tuple[int, str]:
        """Send a request that must be refused without effect; return the status and the code."""
        before = self.head
        answer = self.ask(method, path, **options)
        assert answer.status_code >= 400, answer.text
        assert self.head == before
        return answer.status_code, answer.json()["error"]["code"]

    @property
    def head(self) -> int:
        """The number of the last change."""
        return int(self.session.get(self.url, timeout=30).json()["head"])

    def task(self, title: str = "t", *, planned: bool = False, **fields: Any) -> str:
        """Create a task and return its short id; ``planned`` makes it ready to begin."""
        made = self.ok("POST", "/tasks", status=201, json={"title": title, **fields})
        if planned:
            self.ok("PUT", f"/plans/{made['id']}", data=_PLAN, headers={"If-Match": "*"})
        return str(made["short_id"])


@contextlib.contextmanager
def rest_server(directory: Path) -> Iterator[tuple[Process, Rest]]:
    """Run a server on a new data directory, with a program that has a token of human:ana, and of every agent."""
    started = Process(make_data(directory / "data"))
    try:
        client = Rest(started.port, make_token(started.data))
        with client.session:
            yield started, client
    finally:
        code = started.end()
    assert code == 0
