"""``lattice dashboard`` in a remote project: responses, files, write access, and the delay until a page is notified."""

import io
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from dashboard_requests import GETS, NO_TASK, POSTS, UNORDERED, PageRequests
from dashboards import Dashboard, serving
from lattice.dashboard import server as lattices
from normaliser import Normaliser

from lattice_remote.client.dashboard import _HERE
from lattice_remote.server.worker.calls.dashboard import _ROUTES
from sandbox import Client, Server, differences, tree_of, wait_for

pytestmark = pytest.mark.e2e


class Side(PageRequests):
    """One dashboard, and the ids of its project so far."""

    def __init__(self, dashboard: Dashboard, client: Client, *, is_local: bool) -> None:
        super().__init__(dashboard, Normaliser({str(client.dir): "DIR", client.env["HOME"]: "HOME"}), is_local=is_local)
        self.dashboard, self.client = dashboard, client

    def get(self, path: str) -> tuple[int, str]:
        status, text = self.dashboard.get(path.format(*self.tasks))
        said = self.said(text)
        if path.startswith(UNORDERED):
            said = "\n".join(sorted(line.strip(" ,") for line in said.splitlines()))
        return status, said

    def said(self, text: str) -> str:
        """Return a response without the parts that differ by nature, and without additions to the page."""
        own = re.sub(r'\n<(?:link|script)[^>]* (?:href|src)="remote/.*', "", text)
        return self.normalise(own.replace('type="text/plain" data-remote-src=', "src="))


class Both(NamedTuple):
    """The same requests, answered in a local project and in a cache."""

    server: Server
    here: Side
    there: Side
    posts: list[tuple[str, tuple[int, str], tuple[int, str]]]
    gets: list[tuple[str, tuple[int, str], tuple[int, str]]]


def editor(directory: Path, does: str) -> Path:
    """Install this as the machine's editor, for commands with the directory in their PATH."""
    program = directory / "xdg-open"
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)
    return directory


@pytest.fixture(scope="module")
def both(shared_board: tuple[Server, Client, Client], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    server, ana, ben = shared_board
    local = ben.elsewhere(tmp_path_factory.mktemp("local") / ana.dir.name)
    shutil.copytree(server.lattice_dir(), local.lattice_dir)
    env = {"PATH": f"{editor(tmp_path_factory.mktemp('bin'), ':')}{os.pathsep}{ana.env['PATH']}"}
    with serving(local, env=env) as one, serving(ana, env=env) as other:
        here, there = Side(one, local, is_local=True), Side(other, ana, is_local=False)
        posts = [(path, here.post(path, body), there.post(path, body)) for path, body in POSTS]
        gets = [(path, here.get(path), there.get(path)) for path in GETS]
        yield Both(server, here, there, posts, gets)


def test_every_response_equals_a_local_projects(both: Both) -> None:
    different = [(path, here, there) for path, here, there in [*both.posts, *both.gets] if here != there]
    assert not different, "\n\n".join(f"{path}\n local: {here}\nremote: {there}" for path, here, there in different)
    assert {status for _, (status, _), _ in both.posts} == {200, 201, 400, 404}


def test_every_request_leaves_the_files_of_a_local_project(both: Both) -> None:
    local, remote = (side.normalise.files(tree_of(side.client.lattice_dir)) for side in (both.here, both.there))
    assert sorted(local) == sorted(remote)
    assert {path for path in local if local[path] != remote[path]} == set()


def test_the_cache_equals_the_server_and_the_log_names_each_request(both: Both) -> None:
    """I3."""
    ana = both.there.client
    assert differences(ana.lattice_dir, both.server.lattice_dir()) == []
    log = json.loads(ana.ok("remote", "log", "--json", "-n", "100"))["data"]["entries"]
    told = {entry["command"] for entry in log}
    assert told == {f"dashboard: POST {route}" for route in _ROUTES}
    assert {entry["actor"] for entry in log} == {"human:ana", "agent:bot"}


def test_every_route_of_the_dashboard_is_tried(tmp_path: Path) -> None:
    """The routes are lattice's own handlers: a handler that no request here reaches fails this test."""
    lattices_handler: Any = lattices._make_handler_class(tmp_path)
    every = {name for name in dir(lattices_handler) if name.startswith("_handle_post")}
    reached: dict[str, set[str]] = {}
    for path, _ in POSTS:
        for name in _reached(lattices_handler, every, path.replace("{0}", NO_TASK).replace("{1}", NO_TASK)):
            reached.setdefault(name, set()).add(path.replace(NO_TASK, "…").replace("{0}", "…").replace("{1}", "…"))
    assert reached.keys() == every
    known = {path for paths in reached.values() for path in paths if path in _ROUTES or _HERE.fullmatch(path)}
    assert len(known) == len(every) == len(_ROUTES) + 2


def _reached(handler: Any, names: set[str], path: str) -> list[str]:
    """Return the lattice function that handles a POST to this path."""
    found: list[str] = []
    stand_ins = {name: lambda *_, name=name: found.append(name) for name in names}

    class Request(handler):  # type: ignore[misc]
        def __init__(self) -> None:
            self.path, self.headers, self.rfile = path, {}, io.BytesIO()

        def _send_json(self, status: int, body: str) -> None:
            """Handle an unknown route."""

    for name, stand_in in stand_ins.items():
        setattr(Request, name, stand_in)
    Request().do_POST()
    return found


def test_a_body_that_is_too_large_or_has_no_length_is_refused_without_reading_it(both: Both) -> None:
    for length in (str((1 << 20) + 1), "-1", "many"):
        answer = both.there.dashboard.post("/api/tasks", b"", Content_Length=length)
        assert answer[0] in (400, 413)
        if length != "-1":  # a local dashboard waits for it without end
            assert both.here.dashboard.post("/api/tasks", b"", Content_Length=length) == answer


# --- write access ---


@pytest.fixture(scope="module")
def there(both: Both) -> Dashboard:
    return both.there.dashboard


def test_no_client_writes_as_another_actor(both: Both, there: Dashboard) -> None:
    before = tree_of(both.server.lattice_dir())
    status, text = there.post("/api/tasks", {"title": "x", "actor": "human:ben"})
    assert status == 403
    assert json.loads(text)["error"] == {
        "code": "REMOTE_FORBIDDEN",
        "message": "token may act as human:ana, agent:*; not as human:ben",
    }
    assert there.post("/api/tasks", {"title": "x", "path": "/etc"})[0] == 400
    assert tree_of(both.server.lattice_dir()) == before


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1:{port}"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Content_Type": "text/plain"},
        {"Content_Type": "application/x-www-form-urlencoded"},
        {"Content_Type": ""},
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:{port}"},
        {"Host": "["},
        {"Host": ""},
    ],
)
@pytest.mark.parametrize("path", ["/api/tasks", "/api/tasks/{0}/open-plans"])
def test_pages_of_other_sites_cannot_write(both: Both, there: Dashboard, headers: dict[str, str], path: str) -> None:
    before = tree_of(both.server.lattice_dir())
    filled = {name: value.format(port=there.port) for name, value in headers.items()}
    status, text = there.post(path.format(*both.there.tasks), {"title": "x"}, **filled)
    assert (status, json.loads(text)["error"]["code"]) == (403, "FORBIDDEN")
    assert tree_of(both.server.lattice_dir()) == before


def test_pages_of_other_sites_cannot_read_through_a_name_that_resolves_here(there: Dashboard) -> None:
    assert there.ask("GET", "/api/tasks", Host="evil.example")[0] == 403
    assert there.ask("GET", "/remote/events", Host="evil.example")[0] == 403
    for name in ("localhost", f"localhost:{there.port}", f"127.0.0.1:{there.port}", "[::1]:1"):
        assert there.ask("GET", "/api/config", Host=name)[0] == 200


def test_our_own_page_may_write(there: Dashboard) -> None:
    own = {"Origin": f"http://127.0.0.1:{there.port}", "Sec_Fetch_Site": "same-origin"}
    assert there.post("/api/config/dashboard", {"theme": "x"}, **own)[0] == 200
    assert there.post("/api/config/dashboard", {"theme": "y"}, Content_Type="application/json; charset=utf-8")[0] == 200


def test_on_other_interfaces_the_dashboard_is_read_only(shared_board: tuple[Server, Client, Client]) -> None:
    with serving(shared_board[1], host="127.0.0.2") as exposed:
        status, text = exposed.post("/api/tasks", {"title": "x"})
        assert (status, json.loads(text)["error"]["code"]) == (403, "FORBIDDEN")
        assert "read-only" in text
        assert exposed.ask("GET", "/api/tasks", Host="board.example")[0] == 200


# --- open pages ---


def test_an_open_page_is_notified_of_a_change_within_a_second(both: Both, there: Dashboard) -> None:
    task = both.there.tasks[0]
    page = there.get("/")[1]
    assert page.index("remote/live.js") < page.index("setInterval")
    assert "AUTO_REFRESH_MS = 5000;" in page, "live.js knows the page's own looks by their time"
    assert "EventSource" in there.get("/remote/live.js")[1]
    with there.events() as events:
        first = next(events)
        assert first["trouble"] == ""
        log = both.server.lattice_dir() / "events" / f"{task}.jsonl"
        began = time.monotonic()
        both.there.dashboard.post(f"/api/tasks/{task}/comment", {"body": "see"})
        second = next(events)
        # No round trip to a server: this measures the delay from the cache to the page.
        assert second["version"] != first["version"]
        assert time.monotonic() - began < 20
        assert log.read_bytes() == (both.there.client.lattice_dir / "events" / f"{task}.jsonl").read_bytes()


def test_a_change_of_another_client_reaches_an_open_page(
    shared_board: tuple[Server, Client, Client], both: Both
) -> None:
    ben = shared_board[2]
    with both.there.dashboard.events() as events:
        known = next(events)["version"]
        ben.ok("create", "By Ben", "--actor", "human:ben")
        assert next(events)["version"] != known
        assert "By Ben" in both.there.dashboard.get("/api/tasks")[1]


def test_a_saved_plan_is_an_ordinary_edit(shared_board: tuple[Server, Client, Client], tmp_path: Path) -> None:
    """``open-plans`` starts this machine's editor on the cache's own file, and creates a missing plan."""
    server, ana, _ = shared_board
    editor(tmp_path, 'printf "written in an editor\\n" >> "$1"')
    task = json.loads(ana.ok("create", "Planned", "--actor", "human:ana", "--json"))["data"]["id"]
    with serving(ana, env={"PATH": f"{tmp_path}{os.pathsep}{ana.env['PATH']}"}) as dashboard:
        status, text = dashboard.post(f"/api/tasks/{task}/open-plans", {})
        assert status == 200, text
        plan = server.lattice_dir() / "plans" / f"{task}.md"
        wait_for(lambda: b"written in an editor" in plan.read_bytes(), "the edit to reach the server")


# --- failures ---


def test_an_unreachable_server_is_reported_to_requests_and_open_pages(sandbox: Any) -> None:
    server = sandbox.started_server()
    ana = sandbox.client("ana")
    ana.add_remote(server, server.token("human:ana"))
    ana.ok("create", "One", "--actor", "human:ana")
    with serving(ana) as dashboard, dashboard.events() as events:
        assert next(events)["trouble"] == ""
        server.stop()
        trouble = next(event["trouble"] for event in events if event["trouble"])
        assert trouble.startswith("cannot reach the server (") and "this is the state of" in trouble
        status, text = dashboard.post("/api/tasks", {"title": "x"})
        assert status == 503
        error = json.loads(text)["error"]
        assert error["code"] == "REMOTE_UNREACHABLE"
        assert error["message"].startswith("cannot reach server") and "nothing was written" in error["message"]
        assert "One" in dashboard.get("/api/tasks")[1], "reads go on"
        server.start()
        assert next(event for event in events if not event["trouble"])
        assert dashboard.post("/api/tasks", {"title": "again"})[0] == 201
        agent = json.loads(ana.ok("remote", "agent", "status", "--json"))["data"]["pid"]
        os.kill(agent, signal.SIGKILL)
        assert dashboard.post("/api/tasks", {"title": "with another agent"})[0] == 201
        code, stderr = dashboard.interrupt()
        assert (code, "Traceback" in stderr) == (0, False), stderr
        assert len(list(events)) < 20, "the stream ends with the dashboard"
    assert differences(ana.lattice_dir, server.lattice_dir()) == []


def test_pages_get_live_updates_without_an_agent(shared_board: tuple[Server, Client, Client]) -> None:
    _, ana, ben = shared_board
    with serving(ana, env={"LATTICE_REMOTE_AGENT": "off"}) as dashboard, dashboard.events() as events:
        next(events)
        status, text = dashboard.post("/api/tasks", {"title": "without"})
        assert status == 201, text
        ben.ok("create", "seen without an agent", "--actor", "human:ben")
        wait_for(lambda: "seen without an agent" in dashboard.get("/api/tasks")[1], "the change of somebody else")


def test_the_dashboard_restarts_in_place_as_lattices_own(shared_board: tuple[Server, Client, Client]) -> None:
    _, ana, _ = shared_board
    with serving(ana) as dashboard:
        with dashboard.events() as events:
            next(events)
            dashboard.process.send_signal(signal.SIGHUP)
            assert len(list(events)) < 20, "an open page is sent to the new one"

        def answers() -> bool:
            try:
                return dashboard.get("/api/config")[0] == 200
            except OSError:
                return False

        wait_for(answers, "the dashboard to be back")
        assert dashboard.post("/api/tasks", {"title": "after the restart"})[0] == 201
        code, stderr = dashboard.interrupt()
        assert code == 0 and "restarted" in stderr
