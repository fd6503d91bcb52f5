"""Commands, streams and requests through TLS, behind nginx and Caddy set up as in ``examples/deploy/``."""

import contextlib
import http.client
import json
import re
import secrets
import ssl
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import requests
from playwright.sync_api import Browser, expect
from proxies import DEPLOY, NGINX_DEFAULT_S, Caddy, Nginx, Proxy

from browser import Person, chromium
from lattice_remote.server.config import LimitSettings
from lattice_remote.server.http.sse import KEEP_ALIVE_S
from preloaded_programs import warm
from programs import find, program
from sandbox import Client, Sandbox, Server, differences, wait_for
from sse import Listening
from watch_command import Watcher

pytestmark = pytest.mark.e2e

COMMAND_S = 600
"""A server's time limit for a command."""
ANA = ("--actor", "human:ana")
LOGINS = 3
"""Failed logins of an address before it is slowed down."""


class Place:
    """A proxy in front of a server, and the cache of a client that knows only the proxy."""

    def __init__(self, server: Server, token: str, proxy: Proxy, ana: Client, first_address: int) -> None:
        self.server, self.token, self.proxy, self.ana = server, token, proxy, ana
        self.quiet: Listening
        """An event stream of an idle project, open from the start."""
        self.first_address = first_address
        """The first of ten addresses of this machine, 127.0.0.N, that no other test uses."""

    def add(self) -> None:
        where = (self.proxy.url, "--project", "board", "--ca-file", str(self.proxy.ca_file))
        self.ana.ok("remote", "add", "origin", *where, "--token", self.token)

    def request(self, method: str, path: str, **options: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.token}", **options.pop("headers", {})}
        url = f"{self.proxy.url}{path}"
        return requests.request(method, url, headers=headers, verify=str(self.proxy.ca_file), timeout=30, **options)

    def trusting(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.proxy.ca_file))

    def listening(self, slug: str = "board") -> Listening:
        return Listening(self.proxy.port, self.token, slug, trusting=self.trusting())

    def status_from(self, number: int, claims: str | None = None) -> int:
        """Return the status of a request with a wrong token from one of the ten addresses."""
        address = f"127.0.0.{self.first_address + number}"
        connection = http.client.HTTPSConnection(
            "localhost", self.proxy.port, timeout=10, source_address=(address, 0), context=self.trusting()
        )
        headers = {"Authorization": "Bearer wrong", **({"X-Forwarded-For": claims} if claims else {})}
        try:
            connection.request("GET", "/projects/board/tasks", headers=headers)
            return connection.getresponse().status
        finally:
            connection.close()


@pytest.fixture(scope="module")
def places() -> Iterator[list[Place]]:
    with Sandbox(warm()) as sandbox, contextlib.ExitStack() as started:
        server = sandbox.server()
        server.project()
        server.project("quiet", "QUI")
        settings = {"trusted_proxies": ["127.0.0.1"], "limits": {"failed_logins_per_minute": LOGINS}}
        (server.data / "config.json").write_text(json.dumps(settings))
        token = server.admin("token", "create", "--actor", "human:ana", "--project", "board", "--project", "quiet")
        server.start()
        made = []
        kinds = [kind for kind in (Nginx, Caddy) if find(kind.name)] or [Nginx]
        for number, kind in enumerate(kinds, start=1):
            proxy = kind(sandbox.root, server.port)
            proxy.start()
            started.callback(proxy.stop)
            made.append(Place(server, token, proxy, sandbox.client(kind.name), number * 10))
            made[-1].add()
            made[-1].quiet = started.enter_context(made[-1].listening("quiet"))
        yield made


@pytest.fixture(params=["nginx", "caddy"])
def place(request: pytest.FixtureRequest) -> Place:
    program(request.param)
    places: list[Place] = request.getfixturevalue("places")
    return next(place for place in places if place.proxy.name == request.param)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def test_commands_run_and_caches_equal_the_server(place: Place) -> None:
    place.ana.ok("create", "Through a proxy", *ANA)
    assert "Through a proxy" in place.ana.ok("list")
    assert differences(place.ana.lattice_dir, place.server.lattice_dir()) == []
    assert "connected" in place.ana.ok("remote", "status")


def test_a_watch_receives_a_change_after_silence_beyond_nginx_defaults(place: Place) -> None:
    place.ana.ok("create", "Before", *ANA)
    with Watcher(place.ana) as watcher:
        wait_for(lambda: "Before" in str(watcher.records), "the watch to be there")
        time.sleep(NGINX_DEFAULT_S + 1)  # the silence of the test's name
        assert "timed out" not in place.proxy.log(), "it would be connected again, and nobody would notice"
        created = place.request("POST", "/projects/board/tasks", json={"title": "Seen"})
        assert created.status_code == 201, created.text
        wait_for(lambda: created.json()["data"]["id"] in str(watcher.records), "the change")


def test_events_arrive_one_by_one_and_survive_silence_beyond_nginx_defaults(place: Place) -> None:
    with place.listening() as listening, pytest.raises(TimeoutError):
        assert listening.status == 200
        listening.socket.settimeout(NGINX_DEFAULT_S + 1)
        next(listening)
    with place.listening() as listening:
        for title in ("first", "second"):
            place.ana.ok("create", title, *ANA)
            assert title in str(listening.take(3))


def test_nginx_waits_for_the_longest_command_and_for_many_keepalives() -> None:
    [minutes] = re.findall(r"^ *proxy_read_timeout +(\d+)m;", (DEPLOY / "nginx.conf").read_text(), re.MULTILINE)
    assert int(minutes) * 60 > max(COMMAND_S, 10 * KEEP_ALIVE_S)
    msgspec.json.decode(f'{{"command_seconds": {COMMAND_S}}}', type=LimitSettings)
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(f'{{"command_seconds": {COMMAND_S + 1}}}', type=LimitSettings)


def test_a_large_file_is_sent_in_parts(place: Place) -> None:
    place.ana.ok("create", "With a file", *ANA)
    path = place.ana.dir / "large.bin"
    path.write_bytes(secrets.token_bytes(1024 * 1024) * 50)
    task = json.loads(place.ana.ok("list", "--json"))["data"][0]["id"]
    artifact = place.ana.ok("attach", task, str(path), *ANA, "--quiet").strip()
    [payload] = (place.server.lattice_dir() / "artifacts" / "payload").glob(f"{artifact}*")
    assert payload.read_bytes() == path.read_bytes()


def test_errors_have_the_servers_own_text(place: Place) -> None:
    tasks = place.request("GET", "/projects/board/tasks")
    assert (tasks.status_code, tasks.json()["ok"]) == (200, True)
    nobody = place.request("GET", "/projects/board/tasks", headers={"Authorization": "Bearer wrong"})
    assert (nobody.status_code, nobody.json()["error"]["code"]) == (401, "REMOTE_UNAUTHORIZED")
    long = place.request("POST", "/projects/board/tasks", data=b" " * 1_100_000)
    assert (long.status_code, long.json()["error"]["code"]) == (413, "REMOTE_TOO_LARGE")


def test_client_addresses_are_distinguished_and_forged_ones_ignored(place: Place) -> None:
    assert [place.status_from(1) for _ in range(LOGINS + 1)] == [401] * LOGINS + [429]
    assert place.status_from(2) == 401, "another address is nobody's fault"
    claims = [place.status_from(3, f"203.0.113.{n}") for n in range(LOGINS + 1)]
    assert claims == [401] * LOGINS + [429], "each claimed another address, and was counted for its own"
    assert place.status_from(4, f"127.0.0.{place.first_address + 1}") == 401, (
        "nor is somebody else's anger drawn on him"
    )


def test_a_browser_signs_in_and_its_board_is_live(place: Place, browser: Browser) -> None:
    with Person(browser, place.proxy.url, ignore_https_errors=True) as person:
        person.context.route(lambda url: "//localhost" not in url, lambda route: route.fulfill(body=""))
        page = person.sign_in(place.token, "/projects/board/dashboard/")
        [cookie] = person.context.cookies()
        assert cookie["secure"], "the server knows that the browser speaks TLS"
        assert page.evaluate("performance.getEntriesByType('navigation')[0].nextHopProtocol") == "h2"
        expect(page.locator("#remote-state")).to_have_text("Live")
        title = f"Seen through {place.proxy.name}"
        place.ana.ok("create", title, *ANA)
        expect(page.locator(".card", has_text=title)).to_be_visible()
        page.goto("/")
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_label("Token")).to_be_visible()


def test_a_form_of_another_site_is_refused_and_our_own_is_accepted(place: Place) -> None:
    def signs_in(origin: str) -> int:
        headers = {"Origin": origin, "Authorization": ""}
        form = {"token": place.token, "next": "/"}
        return place.request("POST", "/sign-in", headers=headers, data=form, allow_redirects=False).status_code

    assert signs_in(place.proxy.url) == 303
    assert signs_in("https://elsewhere.example") == 403
    assert signs_in("https://localhost") == 403, "another port is another site"


def test_plain_http_is_redirected_to_tls(place: Place) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", place.proxy.plain_port, timeout=10)
    connection.request("GET", "/projects?x=1", headers={"Host": "localhost"})
    answer = connection.getresponse()
    assert answer.status in {301, 308}
    assert (answer.getheader("Location") or "").endswith("/projects?x=1")
    assert (answer.getheader("Location") or "").startswith("https://localhost")
    connection.close()


def test_keepalives_of_a_quiet_stream_pass_through(place: Place) -> None:
    lines = iter(place.quiet.response.readline, b"")
    positions = (line for line in lines if line.rstrip() == b"event: position")
    assert next(positions, None) and next(positions, None), "the second follows a silence, or it was cut off"


def test_a_stopped_server_is_reported_unreachable_and_clients_reconnect(places: list[Place]) -> None:
    server = places[0].server
    streams = [place.listening() for place in places]
    server.stop()
    for stream in streams:
        assert stream.status == 200
        assert list(stream) == [], "it has come to its end"
        stream.close()
    commands = [place.ana.popen("create", "Lost", *ANA) for place in places]
    for place, command in zip(places, commands, strict=True):
        assert place.request("GET", "/healthz").status_code == 502
        _, said = command.communicate(timeout=60)
        assert command.returncode == 1
        assert "cannot reach server" in said and "nothing was written" in said
        assert "HTTP 502: the server is stopped or starting" in said
        assert place.ana.run("list").returncode == 0, "reads go on"
    server.start()
    for place in places:
        wait_for(lambda place=place: place.ana.run("create", "Back", *ANA).returncode == 0, "the copy to be back")
        assert "Back" in place.ana.ok("list")
