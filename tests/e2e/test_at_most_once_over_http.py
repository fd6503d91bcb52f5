"""HTTP requests with an idempotency key run once under crashes at any point (I6)."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from account import check_numbers, effects_in
from faults import inject
from preloaded_programs import warm
from sandbox import Sandbox, Server, wait_for

pytestmark = pytest.mark.e2e
_MAX_POINTS = 60


class Program:
    """A program that comments on the first task, with a key and a new connection for each comment."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._headers = {"Authorization": f"Bearer {server.token('human:ana', 'agent:*')}"}
        self._metrics = server.admin("token", "create", "--metrics")
        self.post("/tasks", "first", title="One")

    def waits(self) -> bool:
        """Report whether a request waits for a resource, by the server's metrics."""
        headers = {"Authorization": f"Bearer {self._metrics}"}
        figures = requests.get(f"{self._server.url}/metrics", headers=headers, timeout=60).text
        return 'lattice_remote_queue_requests{project="board",where="resource"} 1.0' in figures

    def post(self, path: str, key: str, **body: object) -> requests.Response:
        url = f"{self._server.url}/projects/board{path}"
        headers = {**self._headers, "Idempotency-Key": key}
        return requests.post(url, json=body, headers=headers, timeout=30)

    def comments(self) -> int:
        """Return the server's number of comments."""
        url = f"{self._server.url}/projects/board/tasks/LAT-1/comments"
        return len(requests.get(url, headers=self._headers, timeout=30).json()["data"])

    def comment(self, key: str, **body: object) -> requests.Response:
        return self.post("/tasks/LAT-1/comments", key, body=f"comment {key}", actor=f"agent:{key}", **body)


@pytest.fixture(scope="module")
def injected() -> Iterator[tuple[Server, Program, Path]]:
    with Sandbox(warm()) as sandbox:
        server = sandbox.server()
        faults = inject(server)
        server.project()
        server.start()
        yield server, Program(server), faults


def test_a_server_killed_before_it_responds_has_run_the_request_once(injected: tuple[Server, Program, Path]) -> None:
    server, program, faults = injected
    keys, done_before = [], 0
    for point in range(3, _MAX_POINTS, 3):
        keys.append(key := f"p{point}")
        wait_for(lambda: len(server.worker_pids()) == 1, "the worker")
        (faults / f"server-dies-{server.worker_pids()[0]}").write_text("." * point)
        try:
            answer = program.comment(key)
        except requests.ConnectionError:
            server.kill()  # it has exited; collect it
            server.start()
            done_before += program.comments() == len(keys)
            answer = program.comment(key)
        else:
            keys.append("")  # the command has no further points
            (faults / f"server-dies-{server.worker_pids()[0]}").unlink()
        assert answer.status_code == 201, answer.text
        again = program.comment(key)
        assert (again.status_code, again.content) == (201, answer.content), "an answer is given again as it was"
        assert program.comment(key, reply_to="ev_1").json()["error"]["code"] == "REMOTE_INVALID"
        if keys[-1] == "":
            break
    assert keys.pop() == "", "the server was to survive in the end"
    assert program.comments() == len(keys)
    found = effects_in(server.lattice_dir())
    assert {key: found[key, "comment_added"] for key in keys} == dict.fromkeys(keys, 1)
    assert done_before, "it was to die once between what it did and the answer"
    check_numbers(server)


def test_a_key_is_remembered_under_many_writes_of_others() -> None:
    """It lasts for the documented 30 days, for any size of the journal and in a new epoch."""
    with Sandbox(warm()) as sandbox:
        server = sandbox.server()
        (server.data / "config.json").write_text('{"journal": {"max_bytes": 65536, "segment_bytes": 8192}}')
        server.project()
        server.start()
        program = Program(server)
        program.post("/tasks", "first", title="One")
        assert program.comment("once").status_code == 201
        for number in range(12):
            assert program.post("/tasks/LAT-1/comments", f"much {number}", body="x" * 8000).status_code == 201
        for moment in ("now", "after a restart", "in a new epoch"):
            answer = program.comment("once")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "REMOTE_UNKNOWN_OUTCOME"), moment
            other = program.comment("once", reply_to="ev_1")
            assert (other.status_code, other.json()["error"]["code"]) == (422, "REMOTE_INVALID"), moment
            server.stop()
            if moment != "now":
                (server.data / "projects/board/journal/manifest").unlink()
            server.start()
        assert effects_in(server.lattice_dir())["once", "comment_added"] == 1


def test_a_stopping_server_replies_to_waiting_requests(injected: tuple[Server, Program, Path]) -> None:
    server, program, _ = injected
    assert program.post("/resources/gpu", "made").status_code == 201
    assert program.post("/resources/gpu/acquire", "held").status_code == 200
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(program.post, "/resources/gpu/acquire", "waits", actor="agent:w", wait=True, timeout=60)
        wait_for(program.waits, "its place in line")
        began = time.monotonic()
        assert server.stop() == 0
        answer = waits.result(10)
    assert time.monotonic() - began < 30
    assert (answer.status_code, answer.json()["ok"]) == (503, False)
    assert "the server is stopping" in answer.json()["error"]["message"]
    server.start()
    assert program.post("/resources/gpu/release", "free").status_code == 200, "nobody has taken it meanwhile"
