"""``/projects/:slug/dashboard/`` responds as a local ``lattice dashboard`` does on the same files."""

import http.client
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

import pytest
import requests
from dashboard_requests import GETS, NO_TASK, POSTS, UNORDERED, PageRequests
from dashboards import Dashboard, serving
from normaliser import Normaliser

from sandbox import Client, Server, tree_of

pytestmark = pytest.mark.e2e

STATIC = ["/static/cube3d.js", "/static/cube3d.css"]


class Hosted(NamedTuple):
    """A project's hosted dashboard, requested as the page does; paths are the page's, from the root."""

    server: Server
    token: str
    slug: str = "board"

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> http.client.HTTPResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        with closing(connection):
            connection.request(
                method,
                f"/projects/{self.slug}/dashboard{path}",
                body,
                {"Authorization": f"Bearer {self.token}", **named},
            )
            answer = connection.getresponse()
            answer.text = answer.read().decode()  # type: ignore[attr-defined]
            return answer

    def get(self, path: str) -> tuple[int, str]:
        answer = self.ask("GET", path)
        return answer.status, answer.text  # type: ignore[attr-defined]

    def post(self, path: str, body: object, **headers: str) -> tuple[int, str]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = self.ask("POST", path, data, **{"Content_Type": "application/json", **headers})
        return answer.status, answer.text  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def hosted(shared_board: tuple[Server, Client, Client]) -> Hosted:
    server, _, _ = shared_board
    return Hosted(server, server.token("human:ana", "agent:*"))


class Done(NamedTuple):
    """The same requests with the responses of a local dashboard and of the hosted one."""

    different: list[tuple[str, tuple[int, str], tuple[int, str]]]
    local_tree: dict[str, bytes]
    hosted_tree: dict[str, bytes]
    tasks: list[str]


@pytest.fixture(scope="module")
def done(shared_board: tuple[Server, Client, Client], hosted: Hosted, tmp_path_factory: pytest.TempPathFactory) -> Done:
    server, ana, _ = shared_board
    local = ana.elsewhere(tmp_path_factory.mktemp("local") / ana.dir.name)
    shutil.copytree(server.lattice_dir(), local.lattice_dir)
    sent = [(path, body) for path, body in POSTS if path.startswith("/api/") and "/open-" not in path]
    with serving(local) as dashboard:
        names = {str(local.dir): "DIR", ana.env["HOME"]: "HOME"}
        here = PageRequests(dashboard, Normaliser(names), is_local=True)
        there = PageRequests(hosted, Normaliser(names), is_local=False)
        answers = [(path, here.post(path, body), there.post(path, body)) for path, body in sent]
    return Done(
        [(path, one, other) for path, one, other in answers if one != other],
        here.normalise.files(tree_of(local.lattice_dir)),
        there.normalise.files(tree_of(server.lattice_dir())),
        there.tasks,
    )


def test_every_write_of_the_page_has_the_response_and_the_files_of_a_local_one(done: Done) -> None:
    assert not done.different, "\n\n".join(f"{path}\n local: {a}\nhosted: {b}" for path, a, b in done.different)
    assert sorted(done.local_tree) == sorted(done.hosted_tree)
    assert {path for path in done.local_tree if done.local_tree[path] != done.hosted_tree[path]} == set()


@pytest.fixture(scope="module")
def beside(shared_board: tuple[Server, Client, Client], done: Done) -> Iterator[Dashboard]:
    """Start a local dashboard on the server's own files."""
    server, ana, _ = shared_board
    with serving(ana.elsewhere(server.lattice_dir().parent)) as dashboard:
        yield dashboard


def own_handlers(text: str) -> str:
    """Return a hosted page with the attribute names that lattice gives to its handlers (decision 0032)."""
    return re.sub(r'\n<meta name="remote-handlers"[^>]*>', "", text).replace("data-on-", "on")


def test_every_read_of_the_page_has_the_bytes_of_a_local_one(done: Done, beside: Dashboard, hosted: Hosted) -> None:
    asked = [path.format(*done.tasks) for path in GETS if path.startswith("/api/")] + STATIC
    different = []
    for path in asked:
        (here, mine), (there, theirs) = beside.get(path), hosted.get(path)
        theirs = own_handlers(theirs) if path in STATIC else theirs
        if path.startswith(UNORDERED):
            mine, theirs = (
                "\n".join(sorted(line.strip(" ,") for line in text.splitlines())) for text in (mine, theirs)
            )
        if (here, mine) != (there, theirs):
            different.append(f"{path}\n local: {here} {mine[:500]}\nhosted: {there} {theirs[:500]}")
    assert not different, "\n\n".join(different)
    assert len(asked) > 15


def test_the_page_is_lattices_own_with_relative_paths_and_one_script(beside: Dashboard, hosted: Hosted) -> None:
    page = hosted.get("/")[1]
    added = '\n<link rel="stylesheet" href="remote/live.css">\n<script src="remote/live.js"></script>'
    assert page.count(added) == 1
    late = 'type="text/plain" data-remote-src='
    assert page.index(added) < page.index(f"<script {late}")
    own = beside.get("/")[1]
    named = re.sub(r'\n<meta name="remote-page"[^>]*>', "", page.replace(added, ""))
    assert re.search(r"<title>[^<]+ · Lattice</title>", named)
    lines = own_handlers(re.sub(r"<title>[^<]*</title>", "<title>Lattice Dashboard</title>", named))
    lines = lines.replace(late, "src=").splitlines()
    differing = [(a, b) for a, b in zip(lines, own.splitlines(), strict=True) if a != b]
    assert len(differing) >= 2, "its style and its script"
    assert all(b.replace('="/', '="') == a for a, b in differing)
    assert not re.search(r'(?:src|href)="/(?!/)', page)
    assert "EventSource" in hosted.get("/remote/live.js")[1]
    assert "remote-editor" in hosted.get("/remote/live.css")[1]


def test_the_page_is_found_without_a_trailing_slash_below_any_path(hosted: Hosted) -> None:
    answer = hosted.ask("GET", "")
    assert (answer.status, answer.headers["Location"]) == (308, "dashboard/")


def test_browsers_cache_files_and_revalidate_them_each_time(hosted: Hosted) -> None:
    for path in ("/", "/static/cube3d.js", "/remote/live.js", "/remote/live.css"):
        first = hosted.ask("GET", path)
        assert first.headers["Cache-Control"] == "private, no-cache"
        again = hosted.ask("GET", path, If_None_Match=first.headers["ETag"])
        assert (again.status, again.text) == (304, "")  # type: ignore[attr-defined]
        assert hosted.ask("GET", path, If_None_Match='"another"').status == 200
    assert hosted.ask("GET", "/api/tasks").headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("path", ["/api/graph", "/api/tasks", "/api/config", "/api/stats", "/api/archived"])
def test_content_that_the_client_has_is_not_sent_again(hosted: Hosted, path: str) -> None:
    first = hosted.ask("GET", path)
    tag = first.headers["ETag"]
    again = hosted.ask("GET", path, If_None_Match=tag)
    assert (again.status, again.headers["ETag"], again.text) == (304, tag, "")  # type: ignore[attr-defined]
    assert hosted.ask("GET", path, If_None_Match='"0:"').status == 200


def test_a_body_over_the_limit_is_refused_with_lattices_message(hosted: Hosted) -> None:
    status, text = hosted.post("/api/tasks", b" " * (1024 * 1024 + 1))
    error = {"code": "PAYLOAD_TOO_LARGE", "message": "Request body exceeds 1048576 bytes"}
    assert (status, json.loads(text)["error"]) == (413, error)


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py",
        "/static/%2e%2e/server.py",
        "/static/..%2fserver.py",
        "/static//etc/passwd",
        "/static/.hidden",
        "/static/none.js",
        "/static/",
        "/stats-demo",
        "/none",
        "/remote/plans/none",
        f"/remote/plans/{NO_TASK}",
        "/remote/tasks/x",
        "/remote/plans/..%2f..%2fconfig",
        "/api/none",
    ],
)
def test_other_paths_are_not_found(hosted: Hosted, path: str) -> None:
    assert hosted.get(path)[0] == 404


def test_only_tokens_of_the_project_see_it(hosted: Hosted) -> None:
    hosted.server.project("other")
    for token, status in ((hosted.server.token("human:eve", slug="other"), 403), ("nonsense", 401)):
        stranger = hosted._replace(token=token)
        for path in ("/", "/api/tasks", "/static/cube3d.js", "/remote/live.js", "/remote/events", "/remote/plans/x"):
            assert stranger.get(path)[0] == status
        assert stranger.post("/api/tasks", {"title": "x"})[0] == status


def test_commands_that_start_programs_and_foreign_actors_are_refused(hosted: Hosted, done: Done) -> None:
    before = tree_of(hosted.server.lattice_dir())
    for what in ("notes", "plans"):
        status, text = hosted.post(f"/api/tasks/{done.tasks[0]}/open-{what}", {})
        assert (status, json.loads(text)["error"]["code"]) == (422, "REMOTE_UNSUPPORTED")
    assert hosted.post("/api/tasks", {"title": "x", "actor": "human:ben"})[0] == 403
    assert hosted.post("/api/tasks", b" " * (1 << 20) + b" ")[0] == 413
    assert tree_of(hosted.server.lattice_dir()) == before


# --- lists of the page ---


def put_together(text: str, steps: list[list[str | list[int]]]) -> str:
    """Apply differences as requests.js does."""
    for step in steps:
        text = "".join(part if isinstance(part, str) else text[part[0] : part[1]] for part in step)
    return text


@pytest.mark.parametrize("path", ["/api/tasks", "/api/graph"])
def test_only_the_changes_of_a_list_are_sent(hosted: Hosted, path: str) -> None:
    with requests.Session() as session:
        session.headers["Authorization"] = f"Bearer {hosted.token}"
        url = f"{hosted.server.url}/projects/{hosted.slug}"

        def make(title: str) -> None:
            assert session.post(f"{url}/tasks", json={"title": title}, timeout=30).ok

        def ask(**headers: str) -> requests.Response:
            return session.get(f"{url}/dashboard{path}", headers=headers, timeout=30)

        for number in range(10):
            make(f"Listed {number}")
        before = ask()
        tag = before.headers["ETag"]
        assert before.headers["Content-Encoding"] == "gzip"
        assert "Content-Encoding" not in ask(**{"Accept-Encoding": "gzip;q=0"}).headers
        assert ask(**{"If-None-Match": tag}).status_code == 304
        make("Added to the list")
        make("Another")
        changed = ask(**{"If-None-Match": tag, "A-IM": "lattice-ranges"})
        whole = ask()
        assert (changed.status_code, changed.headers["IM"], changed.headers["Delta-Base"]) == (
            226,
            "lattice-ranges",
            tag,
        )
        assert changed.headers["ETag"] == whole.headers["ETag"] != tag
        assert put_together(before.text, changed.json()) == whole.text
        assert len(changed.content) < len(whole.content)
        assert ask(**{"If-None-Match": tag}).text == whole.text, "without A-IM it is the whole list"
        assert ask(**{"If-None-Match": f'"{"0" * 32}"', "A-IM": "lattice-ranges"}).text == whole.text
