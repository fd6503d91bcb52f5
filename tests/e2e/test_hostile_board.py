"""Board texts run nothing in a reader's browser, and lattice's own handlers work."""

import json
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from browser import Person, chromium
from preloaded_programs import warm
from sandbox import Client, Sandbox, Server

MARKUP = """"'><img src=x onerror="window.ran='{0}'"><svg onload="window.ran='{0}'"><script>window.ran='{0}'</script>"""
QUOTES = "');window.ran='quotes';//"


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """A board full of hostile texts, shown in a browser."""
    with Sandbox(warm()) as sandbox:
        server = sandbox.started_server()
        token = server.token("human:ana")
        client = sandbox.client("ana")
        client.add_remote(server, token)
        fill(server, client)
        with chromium() as browser, Person(browser, server.url) as person:
            yield person.sign_in(token, "/projects/board/dashboard/")


def fill(server: Server, client: Client) -> None:
    def run(*argv: str) -> None:
        client.ok(*argv, "--actor", "human:ana")

    texts = ("--description", MARKUP.format("description"), "--tags", MARKUP.format("tag") + "," + QUOTES)
    run("create", MARKUP.format("title"), *texts, "--assigned-to", "human:<img/src=x/onerror=window.ran='assignee'>")
    run("create", QUOTES, "--description", "[a](javascript:window.ran='link')")
    run("create", "Move me")
    first, second = (task["id"] for task in tasks(client)[:2])
    run("comment", first, MARKUP.format("comment"))
    run("comment", first, QUOTES, "--on-behalf-of", "human:<img/src=x/onerror=window.ran='behalf'>")
    run("branch-link", first, "<img/src=x/onerror=window.ran='branch'>")
    run("link", first, "depends_on", second, "--note", MARKUP.format("note"))
    (client.lattice_dir / f"plans/{first}.md").write_text(f"# Plan\n{MARKUP.format('plan')}\n")
    run("status", first, "in_planning")


def tasks(client: Client) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(client.ok("list", "--json"))["data"]
    return sorted(found, key=lambda task: task["id"])


def ran(page: Page) -> object:
    return page.evaluate("window.ran || null")


def test_texts_run_nothing_in_any_view(page: Page) -> None:
    for view in ("#/board", "#/list", "#/activity", "#/stats", "#/web", "#/cube", "#/board"):
        page.evaluate("view => { location.hash = view }", view)
        page.wait_for_function("document.querySelector('#app').childElementCount > 0")
        page.wait_for_load_state("networkidle")
        assert ran(page) is None, view
    for identity in page.eval_on_selector_all(".card", "cards => cards.map(card => card.dataset.taskId)"):
        page.evaluate("id => { location.hash = '#/task/' + id }", identity)
        expect(page.locator("#app")).to_contain_text(identity[:12])
        assert ran(page) is None, identity


def test_injected_markup_runs_nothing(page: Page) -> None:
    """This simulates missing escapes in lattice."""
    page.evaluate(
        """markup => {
            const box = document.createElement("div");
            box.id = "hostile";
            box.style = "position: fixed; z-index: 100000; top: 0; left: 0; background: white";
            box.innerHTML = markup;
            document.body.append(box);
        }""",
        """<img src="x:" onerror="window.ran='error'"><b onclick="window.ran='click'">own</b>
        <b data-on-click="eval('window.ran=1')">eval</b> <b data-on-click="openPlans('x');window.ran='rest'">more</b>
        <b data-on-click="setTimeout('window.ran=1', '1')">later</b> <b data-on-click="window.ran='set'">set</b>
        <b data-on-mouseover="location.reload()">over</b> <a href="javascript:window.ran='link'">link</a>
        <iframe srcdoc="<script>parent.ran='frame'</script>"></iframe>""",
    )
    for text in ("own", "eval", "more", "later", "set", "over", "link"):
        page.locator("#hostile").get_by_text(text, exact=True).click()
    assert ran(page) is None
    assert page.locator("#hostile").count() == 1
    page.evaluate("document.querySelector('#hostile').remove()")


def test_the_pages_own_handlers_work(page: Page) -> None:
    page.evaluate("location.hash = '#/board'")
    card = page.locator(".card", has_text="Move me")
    expect(card).to_be_visible()
    column = page.locator(".board-col[data-status=in_planning]")
    card.drag_to(column)
    expect(column.locator(".card", has_text="Move me")).to_be_visible()
    page.locator("[data-on-click=\"location.hash='#/cube'\"]").click()
    page.wait_for_url("**/#/cube")
    assert ran(page) is None
