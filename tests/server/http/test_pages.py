"""The server's own pages over HTTP: signing in and out, redirects, and messages."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
import requests
from server_process import Process
from test_server import make_data

from http_from_address import session_from
from lattice_remote.server.http.pages import ago, did, local_path, slices
from lattice_remote.server.tokens import TokenFile
from sandbox import wait_for

PAGE = {"Accept": "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"}
OURS = {**PAGE, "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
ELSEWHERE = {**OURS, "Sec-Fetch-Site": "cross-site"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    started = Process(make_data(tmp_path_factory.mktemp("pages") / "data"))
    yield started
    assert started.end() == 0


class Visitor:
    """A browser as far as HTTP goes: keeps cookies, follows nothing."""

    def __init__(self, server: Process, headers: dict[str, str] = OURS) -> None:
        self.base = f"http://127.0.0.1:{server.port}"
        self.session = requests.Session()
        self.session.headers.update(headers)

    def get(self, path: str, **headers: str) -> requests.Response:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.session.get(self.base + path, allow_redirects=False, timeout=30, headers=sent)

    def post(self, path: str, data: object = None, **headers: str) -> requests.Response:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.session.post(self.base + path, data=data, allow_redirects=False, timeout=30, headers=sent)

    def sign_in(self, token: str, following: str = "/") -> requests.Response:
        return self.post("/sign-in", {"token": token, "next": following})


def leads_to(answer: requests.Response) -> str:
    """Return path and query to which a browser is redirected; the server names it relative to the requested path."""
    location = answer.headers["Location"]
    assert location.startswith(("./", "../")), location
    return requests.compat.urljoin(answer.request.url, location).removeprefix(
        answer.request.url[: answer.request.url.index("/", 8)]
    )


@pytest.fixture
def visitor(server: Process) -> Iterator[Visitor]:
    made = Visitor(server)
    with made.session:
        yield made


@pytest.fixture
def token(server: Process) -> str:
    return TokenFile(server.data.tokens).create(projects=["web"], actor="human:ana", act_as=[])[1]


def test_signing_in_exchanges_the_token_for_a_cookie(visitor: Visitor, token: str) -> None:
    away = visitor.get("/")
    assert (away.status_code, leads_to(away)) == (303, "/sign-in")
    signed = visitor.sign_in(f" {token}\n")  # as it was pasted
    assert (signed.status_code, leads_to(signed)) == (303, "/")
    home = visitor.get("/")
    assert home.status_code == 200
    assert "human:ana" in home.text and "/projects/web/dashboard/" in home.text
    assert token not in home.text + str(signed.headers) + signed.text
    made = visitor.session.post(f"{visitor.base}/projects/web/tasks", json={"title": "From a browser"}, timeout=30)
    assert made.status_code == 201
    wait_for(lambda: "just now" in visitor.get("/").text, "what was done to be on the page", 60)
    [project] = visitor.session.get(f"{visitor.base}/projects", timeout=30).json()["data"]
    assert project["last"]["actor"] == "human:ana"
    out = visitor.post("/sign-out")
    assert (out.status_code, leads_to(out)) == (303, "/sign-in")
    assert visitor.get("/").status_code == 303


def test_a_signed_in_user_is_not_asked_again(visitor: Visitor, token: str) -> None:
    visitor.sign_in(token)
    assert leads_to(visitor.get("/sign-in?next=/projects/web")) == "/projects/web"


def test_sign_in_redirects_to_the_requested_page(visitor: Visitor, token: str) -> None:
    away = visitor.get("/projects/web?a=1&b=%2F")
    assert leads_to(away) == "/sign-in?next=/projects/web%3Fa%3D1%26b%3D%252F"
    form = visitor.get(leads_to(away)).text
    [following] = re.findall(r'name="next" value="([^"]*)"', form)
    assert following.replace("&amp;", "&") == "/projects/web?a=1&b=%2F"
    assert leads_to(visitor.sign_in(token, "/projects/web?a=1&b=%2F")) == "/projects/web?a=1&b=%2F"


@pytest.mark.parametrize(
    "wanted",
    [
        "//evil.example",
        "///evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "/\t/evil.example",
        "\t//evil.example",
        "/\n/evil.example",
        " //evil.example",
        "/\r\nSet-Cookie: a=b",
        "https://evil.example",
        "javascript:alert(1)",
        "evil.example",
        "",
        "/sign-in?next=/",
        "/sign-out",
        "/" + "x" * 2000,
        "/a\x00b",
        "/a\x85b",
    ],
)
def test_sign_in_redirects_to_no_other_server(visitor: Visitor, token: str, wanted: str) -> None:
    assert local_path(wanted) == "/"
    assert leads_to(visitor.sign_in(token, wanted)) == "/"
    again = visitor.session.get(f"{visitor.base}/sign-in", params={"next": wanted}, allow_redirects=False, timeout=30)
    assert leads_to(again) == "/"


@pytest.mark.parametrize(
    ("wanted", "path"),
    [
        ("/projects/web/dashboard/", "/projects/web/dashboard/"),
        ("/%2f%2fevil.example", "/%2f%2fevil.example"),  # no browser unquotes it
        ("/a?next=//evil.example", "/a?next=//evil.example"),
        ("/ü\u2028", "/%C3%BC%E2%80%A8"),
        ('/"><b>', "/%22%3E%3Cb%3E"),
    ],
)
def test_a_local_path_stays_a_path(wanted: str, path: str) -> None:
    assert local_path(wanted) == path


def test_a_wrong_token_is_reported_and_counted_and_a_valid_one_still_accepted(
    server: Process,
) -> None:
    visitor = Visitor(server)
    visitor.session = session_from("127.0.0.8")  # failures counted here must not count against the other tests
    visitor.session.headers.update(OURS)
    with visitor.session:
        assert {visitor.get("/").status_code for _ in range(40)} == {303}  # looking in is no guessing
        first = visitor.sign_in("wrong")
        assert first.status_code == 401 and "Unknown token" in first.text and 'role="alert"' in first.text
        last = [visitor.sign_in("wrong") for _ in range(35)][-1]
        assert last.status_code == 429 and int(last.headers["Retry-After"]) >= 1
        assert "text/html" in last.headers["Content-Type"] and "come back later" in last.text
        good = TokenFile(server.data.tokens).create(projects=["web"], actor="human:ana", act_as=[])[1]
        assert visitor.sign_in(good).status_code == 303
    log = (server.data.path.parent / "log").read_text()
    assert good not in log


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        ("token=a&token=b", "application/x-www-form-urlencoded", 400),
        ("token=a&next=/&more=1", "application/x-www-form-urlencoded", 400),
        ("token=a&other=1", "application/x-www-form-urlencoded", 400),
        ("token=" + "a" * 9000, "application/x-www-form-urlencoded", 413),
        ("token=%ff%00", "application/x-www-form-urlencoded", 401),
        ("next=/", "application/x-www-form-urlencoded", 401),
        ('{"token": "a"}', "application/json", 415),
        ("token=a", "text/plain", 415),
        ("token=a", "multipart/form-data; boundary=x", 415),
    ],
)
def test_only_the_form_of_the_page_is_taken(visitor: Visitor, body: str, kind: str, status: int) -> None:
    assert visitor.post("/sign-in", body, Content_Type=kind).status_code == status


@pytest.mark.parametrize("path", ["/sign-in", "/sign-out"])
@pytest.mark.parametrize("site", ["cross-site", "same-site", "none"])
def test_no_other_site_signs_a_user_in_or_out(visitor: Visitor, token: str, path: str, site: str) -> None:
    answer = visitor.post(path, {"token": token}, Sec_Fetch_Site=site)
    assert answer.status_code == 403
    assert "Set-Cookie" not in answer.headers


def test_an_ended_session_is_reported_on_the_sign_in_page(server: Process, visitor: Visitor) -> None:
    tokens = TokenFile(server.data.tokens)
    made, text = tokens.create(projects=["web"], actor="human:ana", act_as=[])
    visitor.sign_in(text)
    tokens.revoke(made.id)
    wait_for(lambda: visitor.get("/").status_code == 303, "the end of the token", 30)
    said = visitor.get("/sign-in")
    assert f"token {made.id} was revoked" in said.text
    assert "was revoked" not in visitor.get("/sign-in").text  # the cookie is gone


def test_a_link_from_another_site_is_reloaded_with_the_cookie(visitor: Visitor, token: str) -> None:
    first = visitor.get("/projects/web?a=1", Sec_Fetch_Site="cross-site")  # the browser holds a strict cookie back
    assert first.status_code == 200
    assert '<meta http-equiv="refresh" content="0; url=../projects/web?a=1">' in first.text
    assert leads_to(visitor.get("/projects/web?a=1")).startswith("/sign-in?next=")  # and no further round
    visitor.sign_in(token)
    assert visitor.get("/projects/web?a=1").status_code == 200


def test_programs_get_errors_as_json_and_people_as_a_page(server: Process) -> None:
    base = f"http://127.0.0.1:{server.port}"
    for path, status in (("/nothing", 404), ("/pages/0/pages.css", 404), ("/sign-out", 405)):
        page = requests.get(base + path, headers=PAGE, timeout=10)
        assert (page.status_code, page.headers["Content-Type"]) == (status, "text/html; charset=utf-8")
        assert requests.get(base + path, timeout=10).json()["ok"] is False
    assert requests.get(f"{base}/", timeout=10).status_code == 401
    assert requests.get(f"{base}/<b>&", headers=PAGE, timeout=10).text.count("<b>") == 0


def test_every_page_may_use_its_own_files_only_and_is_kept_nowhere(visitor: Visitor, token: str) -> None:
    answers = [visitor.get("/sign-in"), visitor.get("/", Sec_Fetch_Site="cross-site")]
    visitor.sign_in(token)
    for answer in (*answers, visitor.get("/"), visitor.get("/nothing")):
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Referrer-Policy"] == "same-origin"
        assert not re.search(r"<script|<style|\sstyle=|\son\w+=", answer.text)
        for path in re.findall(r'(?:href|src)="(/pages/[^"]*)"', answer.text):
            file = visitor.get(path)
            assert file.status_code == 200 and "immutable" in file.headers["Cache-Control"]
    assert visitor.get("/favicon.ico").headers["Content-Type"] == "image/svg+xml"


def test_a_project_with_a_name_that_is_markup_is_shown_as_text(server: Process, visitor: Visitor) -> None:
    name = '<img src=x onerror="alert(1)">'
    server.data.create_project("markup", code="MRK", name=name, actor=None)
    token = TokenFile(server.data.tokens).create(projects=["markup", "gone"], actor="human:ana", act_as=[])[1]
    visitor.sign_in(token)
    home = visitor.get("/").text
    assert "&lt;img src=x onerror=&#34;alert(1)&#34;&gt;" in home
    assert name not in home


def test_without_projects_the_page_says_what_to_do(server: Process, visitor: Visitor) -> None:
    visitor.sign_in(TokenFile(server.data.tokens).create(projects=["gone"], actor="human:ana", act_as=[])[1])
    assert "lattice-remote project create gone" in visitor.get("/").text


# --- what the list shows ---


def test_elapsed_time() -> None:
    now = datetime(2026, 3, 1, tzinfo=UTC)
    cases = {
        0: "just now",
        59: "just now",
        60: "1 minute ago",
        7200: "2 hours ago",
        86_400 * 3: "3 days ago",
        -5: "just now",
    }
    for seconds, words in cases.items():
        assert ago((now - timedelta(seconds=seconds)).isoformat(), now) == words
    assert ago("2025-01-02T03:04:05Z", now) == "on 2025-01-02"
    assert ago("2026-02-28T23:59:59", now) == "2026-02-28T23:59:59"  # of no time zone
    assert ago("whenever", now) == "whenever"


def test_descriptions_of_activities() -> None:
    assert did("status LAT-4 done --actor human:ana") == "status LAT-4 done"
    assert did("create --json -- --help") == "create"
    assert did("--odd") == "--odd"


def test_a_bar_is_full_and_in_order() -> None:
    parts = slices({"backlog": 3, "in_progress": 1, "on fire": 4})
    assert [(part.status, part.kind, part.count) for part in parts] == [
        ("backlog", "backlog", 3),
        ("in progress", "in-progress", 1),
        ("on fire", "other", 4),
    ]
    assert [part.start for part in parts] == [0, 37.5, 50]
    assert parts[-1].start + parts[-1].width == 100
    assert slices({}) == []
