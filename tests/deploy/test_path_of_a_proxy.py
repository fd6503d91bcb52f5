"""A server below a path of nginx that requires a header and a client certificate: commands, streams, the board."""

import json
import subprocess
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect
from proxies import GatedNginx

from browser import Person, chromium
from preloaded_programs import warm
from programs import program
from sandbox import Client, Sandbox, Server, differences, wait_for
from watch_command import Watcher

pytestmark = pytest.mark.e2e

NAME, SECRET = "CF-Access-Client-Secret", "let-me-through-5e1f"
ANA = ("--actor", "human:ana")


@pytest.fixture(scope="module")
def gated() -> Iterator[tuple[Server, GatedNginx, Sandbox]]:
    program("nginx")
    with Sandbox(warm()) as sandbox:
        server = sandbox.server()
        server.project("lattice")
        (server.data / "config.json").write_text(json.dumps({"trusted_proxies": ["127.0.0.1"]}))
        server.start()
        proxy = GatedNginx(sandbox.root, server.port, NAME, SECRET)
        proxy.start()
        try:
            yield server, proxy, sandbox
        finally:
            proxy.stop()


def _trusting(client: Client, proxy: GatedNginx) -> subprocess.CompletedProcess[str]:
    certificate = ("--client-cert", str(proxy.cert), "--client-key", str(proxy.key))
    trust = ("remote", "trust", f"{proxy.url}/", "--ca-file", str(proxy.ca_file), *certificate, "--header", "-")
    return client.run(*trust, stdin=f"{NAME}: {SECRET}\n")


def test_commands_pass_the_required_header_and_certificate_below_the_path(
    gated: tuple[Server, GatedNginx, Sandbox],
) -> None:
    server, proxy, sandbox = gated
    ana, url = sandbox.client("ana"), f"{proxy.url}/"
    token = server.token("human:ana", slug="lattice")
    outside = ana.run("remote", "login", url, "--ca-file", str(proxy.ca_file), stdin=f"{token}\n")
    assert (
        f"HTTP 400; check the URL and the proxy; for one that authenticates: lattice remote trust {url} --header"
        in (outside.stdout + outside.stderr)
    )
    trusting = _trusting(ana, proxy)
    assert trusting.returncode == 0, trusting.stderr
    login = ana.run("remote", "login", url, stdin=f"{token}\n")
    assert login.returncode == 0 and "accepted, acting as human:ana; for lattice" in login.stdout, login.stderr
    assert ana.ok("remote", "projects", url) == "lattice\tlattice\n"
    which = ana.run("remote", "clone", url)
    assert which.returncode == 1 and f"for example: {url}lattice" in which.stderr
    ana.ok("remote", "clone", f"{url}projects/lattice/dashboard/#/board", str(ana.dir / "pasted"))
    ana.ok("remote", "add", "origin", f"{url}lattice")
    assert json.loads((ana.lattice_dir / "remote.json").read_text())["url"] == url
    with Watcher(ana) as watcher:
        ana.ok("create", "Below a path", *ANA)
        wait_for(lambda: "Below a path" in str(watcher.records), "the change")
    assert differences(ana.lattice_dir, server.lattice_dir("lattice")) == []
    assert ana.ok("remote", "get-url").strip() == f"{url}lattice"

    for told in (trusting.stdout, ana.ok("remote", "trust", "--list"), ana.ok("remote", "trust", "--list", "--json")):
        assert NAME.lower() in told and str(proxy.cert) in told and SECRET not in told
    ana.ok("remote", "status")
    agent = json.loads(ana.ok("remote", "agent", "status", "--json"))["data"]
    logs = [path for path in sandbox.root.rglob("*.log") if path.is_file()]
    assert agent["pid"] and logs and not any(SECRET in log.read_text(errors="replace") for log in logs)

    ana.ok("remote", "trust", url, "--header", f"{NAME}:")
    ana.ok("remote", "agent", "stop")
    refused = ana.run("create", "Without the header", *ANA)
    assert refused.returncode == 1 and "HTTP 403" in refused.stderr and "--header" in refused.stderr
    proxy.key.write_text("no key")
    refused = ana.run("create", "Without a key", *ANA)
    assert refused.returncode == 1 and f"cannot use the client certificate {proxy.cert}" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_board_below_the_path_is_live_and_its_links_keep_the_path(gated: tuple[Server, GatedNginx, Sandbox]) -> None:
    server, proxy, sandbox = gated
    ben = sandbox.client("ben")
    token = server.token("human:ben", slug="lattice")
    proxy.stop()
    proxy.start()  # again, with a key
    assert _trusting(ben, proxy).returncode == 0
    ben.ok("remote", "add", "origin", f"{proxy.url}/lattice", "--token", token)
    origin = proxy.url.removesuffix("/lattice")
    certificate = {"origin": origin, "certPath": str(proxy.cert), "keyPath": str(proxy.key)}
    options = {"extra_http_headers": {NAME: SECRET}, "client_certificates": [certificate], "ignore_https_errors": True}
    with chromium() as browser, Person(browser, origin, **options) as person:
        person.context.route(lambda url: "//localhost" not in url, lambda route: route.fulfill(body=""))
        page = person.sign_in(token, "/lattice/projects/lattice/dashboard/")
        assert page.url == f"{proxy.url}/projects/lattice/dashboard/"
        expect(page.locator("#remote-state")).to_have_text("Live")
        ben.ok("create", "Seen below a path", "--actor", "human:ben")
        expect(page.locator(".card", has_text="Seen below a path")).to_be_visible()
        page.locator("#remote-home").click()
        expect(page.get_by_role("link", name="lattice", exact=True)).to_be_visible()
        assert page.url == f"{proxy.url}/"
        image = page.locator("img").first
        wait_for(lambda: image.evaluate("image => image.naturalWidth") > 0, "the logo to be shown")
        page.goto("/lattice/dashboard/")
        assert page.url == f"{proxy.url}/projects/lattice/dashboard/"
        page.goto("/lattice/nothing/here")
        page.get_by_role("link", name="All projects").click()
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_label("Token")).to_be_visible()
        assert page.url == f"{proxy.url}/sign-in"
