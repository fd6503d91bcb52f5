"""Session cookie of a signed-in browser: rights, expiry and protection against other sites."""

from collections.abc import Iterator
from datetime import timedelta
from http import HTTPStatus
from http.cookies import SimpleCookie
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from itsdangerous import BadSignature, SignatureExpired
from server_process import Process
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message
from test_server import make_data

from http_from_address import session_from
from lattice_remote.errors import StorageError
from lattice_remote.server.auth import Login, signing_key
from lattice_remote.server.config import LimitSettings
from lattice_remote.server.http import auth
from lattice_remote.server.http.auth import Cookies
from lattice_remote.server.http.middleware import with_security_headers
from lattice_remote.server.tokens import Token, TokenFile, digest_of_text
from lattice_remote.server.transport.admission import AdmissionControl
from lattice_remote.server.transport.api_error import ApiError

KEY = b"k" * 32
TOKEN = Token(id="tok_1", sha256="d", projects=["web"], actor="human:ana")


def request_with(cookies: str = "", *, scheme: str = "http", host: str = "192.0.2.1", **headers: str) -> Request:
    """Return a request that has come from ``host``; 10.0.0.1 is a trusted proxy."""
    quota = AdmissionControl(LimitSettings(), ["10.0.0.1"]).arrive(host)
    raw = [(b"host", b"board.example"), (b"cookie", cookies.encode())]
    raw += [(name.replace("_", "-").lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": raw, "scheme": scheme}
    return Request({**scope, "server": ("board.example", 80), "state": {"quota": quota}})


def given(cookies: Cookies, login: Login, request: Request) -> SimpleCookie:
    """Return the cookie that a browser is given."""
    response = Response()
    cookies.give(request, response, login)
    return SimpleCookie(response.headers["Set-Cookie"])


# --- without a server ---


@pytest.mark.parametrize(
    ("origin", "scheme", "host", "forwarded", "is_ours"),
    [
        ("http://board.example", "http", "192.0.2.1", "", True),
        ("https://board.example", "http", "192.0.2.1", "", True),
        ("http://BOARD.example", "http", "192.0.2.1", "", True),
        ("http://other.example", "http", "192.0.2.1", "", False),
        ("https://board.example", "https", "192.0.2.1", "", True),
        ("http://board.example", "https", "192.0.2.1", "", False),
        ("https://board.example", "http", "10.0.0.1", "https, http", True),
        ("http://board.example", "http", "10.0.0.1", "https, http", False),
        ("http://board.example", "http", "10.0.0.1", "http", True),
        ("http://board.example", "http", "192.0.2.1", "https", True),
    ],
)
def test_a_page_without_tls_is_another_site_for_a_board_with_tls(
    origin: str, scheme: str, host: str, forwarded: str, is_ours: bool
) -> None:
    request = request_with(scheme=scheme, host=host, Origin=origin, X_Forwarded_Proto=forwarded)
    assert (auth.cross_site_objection(request) == "") == is_ours


def test_a_cookie_holds_no_token_and_is_hidden_from_scripts() -> None:
    text = "ltr_secret"
    [(name, cookie)] = given(Cookies(KEY, 30), Login(TOKEN, digest_of_text(text)), request_with()).items()
    assert text not in cookie.value
    assert (cookie["httponly"], cookie["samesite"], cookie["path"], cookie["domain"]) == (True, "strict", "/", "")
    assert cookie["max-age"] == str(30 * 86_400)
    assert Cookies(KEY, 30).read(request_with(f"{name}={cookie.value}")) == ("tok_1", digest_of_text(text))


@pytest.mark.parametrize(
    ("scheme", "host", "proto", "secure"),
    [
        ("http", "192.0.2.1", "", False),
        ("https", "192.0.2.1", "", True),
        ("http", "10.0.0.1", "https", True),  # the trusted proxy
        ("http", "10.0.0.1", "http", False),
        ("http", "192.0.2.1", "https", False),  # any other host
    ],
)
def test_with_tls_it_belongs_to_this_host_alone(scheme: str, host: str, proto: str, secure: bool) -> None:
    cookies, way = Cookies(KEY, 30), {"scheme": scheme, "host": host, "X_Forwarded_Proto": proto}
    [(name, morsel)] = given(cookies, Login(TOKEN, "d"), request_with(**way)).items()
    assert (name.startswith("__Host-"), bool(morsel["secure"])) == (secure, secure)
    assert cookies.read(request_with(f"{name}={morsel.value}", **way)) is not None
    planted = request_with(f"{name.removeprefix('__Host-')}={morsel.value}", scheme="https")
    assert cookies.read(planted) is None  # set by an attacker on the network, without TLS


def test_two_servers_of_a_host_do_not_sign_each_other_out() -> None:
    names = {name for key in (KEY, b"o" * 32) for name in given(Cookies(key, 30), Login(TOKEN, "d"), request_with())}
    assert len(names) == 2


def test_a_cookie_expires() -> None:
    cookies = Cookies(KEY, 30)
    [(name, morsel)] = given(cookies, Login(TOKEN, "d"), request_with()).items()
    request = request_with(f"{name}={morsel.value}")
    assert cookies.read(request) is not None
    with pytest.raises(SignatureExpired):
        Cookies(KEY, -1 / 86_400).read(request)


def test_the_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "signing-key"
    key = signing_key(path)
    assert len(key) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert signing_key(path) == key
    path.chmod(0o644)  # it may be known to others
    assert signing_key(path) != key
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(b"short")
    assert len(signing_key(path)) == 32
    with pytest.raises(StorageError, match="cannot write"):
        signing_key(tmp_path / "nowhere" / "signing-key")


# --- with a server ---


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    started = Process(make_data(tmp_path_factory.mktemp("cookie") / "data"))
    yield started
    assert started.end() == 0


class Browser:
    """A token, and the cookie that the server would give for it."""

    def __init__(self, server: Process, session: requests.Session) -> None:
        self.server, self.session = server, session
        self.tokens = TokenFile(server.data.tokens)
        self.token, text = self.tokens.create(projects=["web"], actor="human:ana", act_as=[])
        cookies = Cookies(server.data.signing_key.read_bytes(), 30)
        [(self.name, morsel)] = given(cookies, Login(self.token, digest_of_text(text)), request_with()).items()
        self.value = morsel.value

    def ask(self, method: str = "GET", *, cookie: str | None = None, **headers: str) -> requests.Response:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        sent["Cookie"] = f"{self.name}={self.value if cookie is None else cookie}"
        url, body = f"http://127.0.0.1:{self.server.port}/projects/web", None
        if method == "POST":
            url, body = f"{url}/tasks", {"title": "Written in a browser"}
        return self.session.request(method, url, headers=sent, timeout=10, json=body)


@pytest.fixture
def browser(server: Process) -> Iterator[Browser]:
    with requests.Session() as session:
        yield Browser(server, session)


def test_a_cookie_grants_the_rights_of_its_token(browser: Browser) -> None:
    described = browser.ask()
    assert described.status_code == 200, described.text
    assert described.json()["actor"] == "human:ana"


def test_a_token_in_the_request_precedes_the_cookie(browser: Browser) -> None:
    _, other = browser.tokens.create(projects=["web"], actor="human:ben", act_as=[])
    assert browser.ask(Authorization=f"Bearer {other}").json()["actor"] == "human:ben"
    assert browser.ask(Authorization="Bearer wrong").status_code == 401
    assert browser.ask(Authorization="Basic cHJveHk6cGFzc3dvcmQ=").json()["actor"] == "human:ana"  # a proxy's own


def test_a_cookie_ends_with_its_token(browser: Browser) -> None:
    browser.tokens.rotate(browser.token.id, grace=timedelta(hours=1))
    assert browser.ask().status_code == 200
    browser.tokens.rotate(browser.token.id)
    assert "rotated" in browser.ask().json()["error"]["message"]
    browser.tokens.revoke(browser.token.id)
    ended = browser.ask()
    assert (ended.status_code, ended.json()["error"]["code"]) == (401, "REMOTE_UNAUTHORIZED")
    assert "revoked" in ended.json()["error"]["message"]


def test_a_polling_page_does_not_count_as_guessing_but_a_forged_cookie_does(server: Process, browser: Browser) -> None:
    browser.session = session_from("127.0.0.7")  # failures counted here must not count against the other tests
    with browser.session:
        honest, good = Browser(server, browser.session), browser.value
        browser.tokens.revoke(browser.token.id)
        assert {browser.ask().status_code for _ in range(40)} == {401}
        forged = [browser.ask(cookie=text).status_code for text in [f"{good}x", "a.b.c", "x" * 5000, "."] * 10]
        assert forged[0] == 401
        assert forged[-1] == 429
        assert honest.ask().status_code == 200  # and no valid user is locked out


FETCH = {"Sec_Fetch_Mode": "cors", "Sec_Fetch_Dest": "empty"}
LINK = {"Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
FRAME = {"Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "iframe"}
SCRIPT = {"Sec_Fetch_Mode": "no-cors", "Sec_Fetch_Dest": "script"}


@pytest.mark.parametrize(
    ("method", "said", "welcome"),
    [
        ("GET", {**FETCH, "Sec_Fetch_Site": "same-origin"}, True),
        ("GET", {**LINK, "Sec_Fetch_Site": "none"}, True),  # typed, or a bookmark
        ("GET", {**LINK, "Sec_Fetch_Site": "same-site"}, True),
        ("GET", {**LINK, "Sec_Fetch_Site": "cross-site"}, True),
        ("GET", {}, True),  # a browser that says nothing
        ("GET", {**FETCH, "Sec_Fetch_Site": "same-site"}, False),  # another port, another subdomain
        ("GET", {**FETCH, "Sec_Fetch_Site": "cross-site"}, False),
        ("GET", {**FRAME, "Sec_Fetch_Site": "same-site"}, False),
        ("GET", {**SCRIPT, "Sec_Fetch_Site": "cross-site"}, False),
        ("GET", {"Origin": "http://evil.example"}, False),
        ("POST", {**FETCH, "Sec_Fetch_Site": "same-origin"}, True),
        ("POST", {"Origin": "HERE"}, True),
        ("POST", {**FETCH, "Sec_Fetch_Site": "same-site", "Origin": "HERE"}, False),
        ("POST", {**FETCH, "Sec_Fetch_Site": "cross-site"}, False),
        ("POST", {**LINK, "Sec_Fetch_Site": "cross-site"}, False),  # a form
        ("POST", {**LINK, "Sec_Fetch_Site": "none"}, False),
        ("POST", {**FETCH, "Sec_Fetch_Site": "anything"}, False),
        ("POST", {}, False),
        ("POST", {"Origin": "null"}, False),
        ("POST", {"Origin": "http://evil.example"}, False),
        ("POST", {"Origin": "HERE0"}, False),  # another port
        ("POST", {"Origin": "ftp://[bad"}, False),
    ],
)
def test_only_pages_of_the_server_use_the_cookie(
    browser: Browser, method: str, said: dict[str, str], welcome: bool
) -> None:
    here = f"http://127.0.0.1:{browser.server.port}"
    answer = browser.ask(method, **{name: value.replace("HERE", here) for name, value in said.items()})
    if welcome:
        assert answer.status_code in (200, 201), answer.text
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "REMOTE_FORBIDDEN")


def test_every_answer_forbids_content_sniffing_and_frames(browser: Browser) -> None:
    base = f"http://127.0.0.1:{browser.server.port}"
    for answer in (browser.ask(), browser.ask(cookie="bad"), requests.get(f"{base}/nothing", timeout=10)):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["Cache-Control"] == "no-store"
        assert "Strict-Transport-Security" not in answer.headers


@pytest.mark.parametrize(
    ("scheme", "host", "promised"),
    [
        ("https", "board.example", True),
        ("https", "board.example:8443", True),
        ("https", "localhost:8443", False),  # many servers share that name
        ("http", "board.example", False),  # TLS, if any, is a proxy's
    ],
)
async def test_strict_transport_security_is_sent_for_tls_of_the_server(scheme: str, host: str, promised: bool) -> None:
    said: list[Message] = []

    async def send(message: Message) -> None:
        said.append(message)

    async def receive() -> Message:
        return {"type": "http.request"}

    scope = {"type": "http", "scheme": scheme, "method": "GET", "headers": [(b"host", host.encode())]}
    await with_security_headers(Response("x", headers={"Cache-Control": "private"}))(scope, receive, send)
    headers = dict(said[0]["headers"])
    assert (b"strict-transport-security" in headers) == promised
    assert headers[b"cache-control"] == b"private"  # what a handler has said stays


def test_a_text_longer_than_any_cookie_is_not_checked() -> None:
    cookies = Cookies(KEY, 30)
    [(name, _)] = given(cookies, Login(TOKEN, "d"), request_with()).items()
    with pytest.raises(BadSignature, match="too long"):
        cookies.read(request_with(f"{name}={'x' * 1025}"))


class Admitting:
    """What ``authenticated`` asks of a connection: ``objection`` is the answer to the token."""

    from_proxy = False

    def __init__(self, objection: ApiError | None) -> None:
        self.objection = objection
        self.admitted: list[str] = []

    def admit(self, token_id: str) -> ApiError | None:
        self.admitted.append(token_id)
        return self.objection


@pytest.mark.parametrize("objection", [None, ApiError(HTTPStatus.TOO_MANY_REQUESTS, "REMOTE_LIMIT", "too many")])
def test_a_token_with_too_many_connections_is_refused_and_logged(
    objection: ApiError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_with(authorization="Bearer x")
    quota, entry, login = Admitting(objection), SimpleNamespace(login=None), Login(TOKEN, "d")
    request.scope["state"] = {"quota": quota, "share": SimpleNamespace(token_id="")}
    monkeypatch.setattr(auth, "registry_of", lambda _: SimpleNamespace(auth=SimpleNamespace(identify=lambda *_: login)))
    monkeypatch.setattr(auth, "log_entry_of", lambda _: entry)
    if objection is None:
        assert auth.authenticated(request) is login
    else:
        with pytest.raises(ApiError) as refused:
            auth.authenticated(request)
        assert refused.value is objection
    assert quota.admitted == ["tok_1"] and entry.login is login
