"""Signing in with a real browser, and requests of other sites in a signed-in browser."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Response, expect

from browser import Person, chromium, screenshot
from preloaded_programs import warm
from sandbox import Sandbox, Server, wait_for


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Sandbox(warm()) as sandbox:
        made = sandbox.server()
        made.project()
        made.project("website", "WEB")
        yield made.start()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def token(server: Server) -> str:
    return server.token("human:ana")


@pytest.fixture(scope="module")
def theirs(server: Server) -> str:
    return server.token("human:mallory")


@pytest.fixture(scope="module")
def signed_in(browser: Browser, server: Server, token: str) -> Iterator[Person]:
    with Person(browser, server.url) as person:
        person.enter(token)
        yield person


@pytest.fixture
def ana(signed_in: Person) -> Iterator[Person]:
    """A user who stays signed in."""
    yield signed_in
    for page in signed_in.context.pages:
        page.close()
    signed_in.complaints.clear()


def revoke(server: Server, token: str) -> None:
    server.admin("token", "revoke", token)


# --- signing in and out ---


def test_a_user_signs_in_sees_the_projects_and_signs_out(browser: Browser, server: Server, token: str) -> None:
    with Person(browser, server.url) as person:
        addresses: list[str] = []
        person.context.on("request", lambda request: addresses.append(request.url))
        page = person.open("/")
        expect(page.get_by_label("Token")).to_be_focused()
        page.keyboard.type(token)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="Projects")).to_be_visible()
        expect(page.get_by_role("link", name="board")).to_have_attribute("href", "./projects/board/dashboard/")
        expect(page.get_by_text("human:ana", exact=True)).to_be_visible()
        assert page.evaluate("document.cookie") == ""
        [cookie] = person.context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_label("Token")).to_be_visible()
        assert person.context.cookies() == []
        page.goto("/")
        expect(page.get_by_label("Token")).to_be_visible()
        assert not any(token in address for address in addresses)
        assert person.complaints == []


def test_a_wrong_token_is_reported_and_the_user_can_try_again(browser: Browser, server: Server, token: str) -> None:
    with Person(browser, server.url) as person:
        page = person.open("/projects/board")
        page.get_by_label("Token").fill("ltr_wrong")
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("alert")).to_contain_text("Unknown token")
        expect(page.get_by_label("Token")).to_have_value("")
        page.get_by_label("Token").fill(token)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url("**/projects/board")  # the page requested before signing in


def test_a_revoked_token_signs_out_its_own_browsers_only(browser: Browser, server: Server) -> None:
    mine, yours = server.token("human:ana"), server.token("human:ben")
    with Person(browser, server.url) as ana, Person(browser, server.url) as phone, Person(browser, server.url) as ben:
        for person, token in ((ana, mine), (phone, mine), (ben, yours)):
            person.enter(token)
        pages = [person.open("/") for person in (ana, phone, ben)]
        expect(pages[2].get_by_text("human:ben", exact=True)).to_be_visible()
        revoke(server, mine)
        for page in pages[:2]:
            page.reload()
            expect(page.get_by_role("alert")).to_contain_text("was revoked")
        pages[2].reload()
        expect(pages[2].get_by_role("heading", name="Projects")).to_be_visible()


def test_signing_out_keeps_other_browsers_of_the_token_signed_in(
    browser: Browser, server: Server, ana: Person, token: str
) -> None:
    with Person(browser, server.url) as phone:
        phone.enter(token)
        page = phone.open("/")
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_label("Token")).to_be_visible()
    page = ana.open("/")
    expect(page.get_by_role("heading", name="Projects")).to_be_visible()
    assert ana.complaints == []


def test_pages_fit_their_window_light_and_dark(browser: Browser, server: Server) -> None:
    with Person(browser, server.url) as person:
        page = person.open("/")
        fits(page, "sign-in")
        person.enter(server.token(f"agent:{'a-name-that-goes-on-' * 4}"))
        page.goto("/")
        expect(page.get_by_role("heading", name="Projects")).to_be_visible()
        fits(page, "projects")
        page.goto("/nothing-here")
        fits(page, "refused")


def fits(page: Page, name: str) -> None:
    """Save pictures of the page, wide and narrow, light and dark; require that nothing overflows the window."""
    for width in (1280, 375):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for scheme, ground in (("light", "rgb(246, 247, 245)"), ("dark", "rgb(20, 24, 22)")):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type] # mypy takes it for any text
            screenshot(page, f"{name}-{scheme}-{width}")
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground


# --- other sites ---


class OtherSite:
    """A web server of another site."""

    def __init__(self, host: str, port: int, directory: Path) -> None:
        self._url = f"http://{host}:{port}"
        self._directory = directory
        self.gets_cookies = host == "127.0.0.1"
        """True if a browser sends the cookies of the tested server to this one and with the requests of its pages."""

    def shows(self, html: str) -> str:
        """Serve a page, and return its address."""
        name = f"{len(list(self._directory.iterdir()))}.html"
        (self._directory / name).write_text(f"<!doctype html><title>elsewhere</title>{html}")
        return f"{self._url}/{name}"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture(
    scope="module", params=["localhost", "127.0.0.1"], ids=["another site", "another port of the same site"]
)
def elsewhere(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OtherSite]:
    """To a browser, localhost is another site than 127.0.0.1. Another port is the same site and gets strict cookies."""
    directory = tmp_path_factory.mktemp("elsewhere")
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(directory))) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield OtherSite(request.param, listening.server_port, directory)
        finally:
            listening.shutdown()
            thread.join()


@contextlib.contextmanager
def answers_of(person: Person, server: Server) -> Iterator[list[Response]]:
    """Collect our server's responses to this browser."""
    answers: list[Response] = []

    def note(answer: Response) -> None:
        if answer.url.startswith(server.url) and "/pages/" not in answer.url:  # the style and the icon are public
            answers.append(answer)

    person.context.on("response", note)
    yield answers
    person.context.remove_listener("response", note)


def test_another_site_writes_nothing(server: Server, ana: Person, elsewhere: OtherSite) -> None:
    target = f"{server.url}/projects/board/tasks"
    form = f"""<form method=post enctype=text/plain action="{target}">
        <input name='{{"title":"evil","x":"' value='"}}'></form><script>document.forms[0].submit()</script>"""
    fetched = f"""<script>fetch("{target}", {{method: "POST", mode: "no-cors", credentials: "include", body: "{{}}"}})
        .finally(() => document.title = "done")</script>"""
    with answers_of(ana, server) as answers:
        page = ana.open(elsewhere.shows(form))
        page.wait_for_url(target)
        page.goto(elsewhere.shows(fetched))
        expect(page).to_have_title("done")
        [post] = [answer for answer in answers if answer.request.method == "POST"]  # the browser withholds the response
        assert post.status == (403 if elsewhere.gets_cookies else 401)
        listed = ana.context.request.get("/projects/board/tasks")
        assert listed.json()["data"] == []


def test_another_site_reads_and_frames_nothing(server: Server, ana: Person, elsewhere: OtherSite) -> None:
    html = f"""<iframe src="{server.url}/"></iframe><iframe src="{server.url}/projects"></iframe>
        <script>
        const asked = ["/projects", "/", "/projects/board/tasks"].map(async path => {{
            try {{ return (await fetch("{server.url}" + path, {{credentials: "include"}})).status }}
            catch (error) {{ return "refused" }}
        }});
        asked.push(new Promise(done => {{
            const script = document.createElement("script");
            script.src = "{server.url}/projects";
            script.onload = () => done("ran"); script.onerror = () => done("refused");
            document.head.append(script);
        }}));
        Promise.all(asked).then(all => document.title = [...new Set(all)].join());
        </script>"""
    with answers_of(ana, server) as answers:
        page = ana.open(elsewhere.shows(html))
        expect(page).to_have_title("refused")
        wait_for(lambda: [page.wait_for_timeout(10), len(page.frames) == 3][1], "the frames")
        for frame in page.frames[1:]:
            assert frame.url.startswith("chrome-error:") or not frame.get_by_text("board").count()
        assert all(answer.status in (200, 303, 401, 403) for answer in answers)
        if elsewhere.gets_cookies:
            assert {answer.status for answer in answers} == {403}


def test_another_site_cannot_sign_a_user_in_with_its_own_token(
    browser: Browser, server: Server, theirs: str, elsewhere: OtherSite
) -> None:
    form = f"""<form method=post action="{server.url}/sign-in"><input name=token value="{theirs}"></form>
        <script>document.forms[0].submit()</script>"""
    with Person(browser, server.url) as person:
        page = person.open(elsewhere.shows(form))
        page.wait_for_url(f"{server.url}/sign-in")
        expect(page.get_by_role("heading")).to_have_text("Forbidden")
        assert person.context.cookies() == []


def test_another_site_cannot_sign_a_user_out(server: Server, ana: Person, elsewhere: OtherSite) -> None:
    form = f"""<form method=post action="{server.url}/sign-out"></form><script>document.forms[0].submit()</script>"""
    page = ana.open(elsewhere.shows(form))
    page.wait_for_url(f"{server.url}/sign-out")
    page.goto("/")
    expect(page.get_by_role("heading", name="Projects")).to_be_visible()


def test_a_link_from_another_site_leads_to_the_board_without_signing_in_again(
    browser: Browser, server: Server, ana: Person, elsewhere: OtherSite
) -> None:
    page = ana.open(elsewhere.shows(f'<a href="{server.url}/">our board</a>'))
    page.get_by_role("link").click()
    expect(page.get_by_role("heading", name="Projects")).to_be_visible()
    with Person(browser, server.url) as stranger:
        page = stranger.open(elsewhere.shows(f'<a href="{server.url}/projects/board">our board</a>'))
        page.get_by_role("link").click()
        expect(page.get_by_label("Token")).to_be_visible()
        assert "next=" in page.url
