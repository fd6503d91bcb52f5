"""The board in a real browser under restrictions: no other servers, no connection, no write access."""

import re
from collections.abc import Iterator

import pytest
from board_pages import Board, card, column, panel, state
from dashboards import serving
from playwright.sync_api import Route, expect

from browser import Person, chromium, screenshot
from preloaded_programs import warm
from sandbox import board, wait_for

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def it() -> Iterator[Board]:
    with board("ben", programs=warm()) as (server, [ben]), chromium() as browser:
        yield Board(server, ben, browser)


# --- closed network ---


def is_elsewhere(url: str) -> bool:
    return "//127.0.0.1" not in url


def test_unresponsive_servers_do_not_delay_the_board(it: Board) -> None:
    task = it.made("On a closed network")
    held: list[Route] = []
    with Person(it.browser, it.server.url) as person:
        person.context.route(is_elsewhere, lambda route: held.append(route))  # noqa: PLW0108 - Playwright marks it
        person.enter(it.server.token("human:closed"))
        page = person.open(it.path)
        expect(card(page, task)).to_be_visible()
        expect(state(page)).to_have_text("Live")
        expect(page.locator("#remote-missing")).to_be_hidden()
        page.evaluate("location.hash = '#/cube'")
        expect(page.locator("#remote-missing")).to_contain_text("Loading the libraries of this view: https://unpkg.com")
        wait_for(lambda: len(held) >= 6 or page.wait_for_timeout(20), "the libraries to be requested")
        for route in held:
            route.abort()
        expect(page.locator("#remote-missing")).to_contain_text("could not load: https://unpkg.com/d3@7")
        screenshot(page, "cube-closed", whole=False)
        for view in ("cube", "web"):
            page.evaluate("view => { location.hash = '#/' + view; }", view)
            expect(page.locator("#app")).to_contain_text("unavailable")
            expect(page.locator("#remote-missing")).to_contain_text("three.min.js")
        page.evaluate("location.hash = '#/board'")
        expect(card(page, task)).to_be_visible()
        expect(page.locator("#remote-missing")).to_be_hidden()


def test_the_local_dashboard_does_not_wait_for_other_servers(it: Board) -> None:
    task = it.made("Local, on a closed network")
    with serving(it.ben) as dashboard, Person(it.browser, f"http://127.0.0.1:{dashboard.port}") as person:
        person.context.route(is_elsewhere, lambda route: None)  # never answered
        page = person.open("/#/board")
        expect(card(page, task)).to_be_visible()
        expect(state(page)).to_have_text("Live")


def test_libraries_run_in_page_order(it: Board) -> None:
    with Person(it.browser, it.server.url) as person:
        script = "(window.ran = window.ran || []).push(document.currentScript.src)"
        person.context.route(is_elsewhere, lambda route: route.fulfill(body=script, content_type="text/javascript"))
        person.enter(it.server.token("human:order"))
        page = person.open(it.path)
        wait_for(lambda: page.evaluate("(window.ran || []).length") > 5 or page.wait_for_timeout(20), "the libraries")
        ran = page.evaluate("window.ran")
        listed = re.findall(r'src="(https://[^"]+)"', person.context.request.get(it.path).text())
        assert ran == listed


# --- no connection ---


def test_a_drag_and_saves_without_a_connection_are_reported_and_keep_the_text(it: Board) -> None:
    task = it.made("Worked on offline")
    with it.person() as person:
        page = it.open(person)
        page.route(
            "**/dashboard/api/tasks/**",
            lambda route: route.abort() if route.request.method == "POST" else route.continue_(),
        )
        card(page, task).drag_to(column(page, "in_planning"))
        expect(page.locator(".toast-error")).to_contain_text("The server cannot be reached")
        expect(column(page, "backlog").locator(f'[data-task-id="{task}"]')).to_be_visible()
        card(page, task).click()
        page.locator("#dp-title-edit").click()
        field = page.locator(".inline-edit input")
        field.fill("Typed without a connection")
        field.press("Enter")
        expect(page.locator(".toast-error").last).to_contain_text("Your text is still here")
        expect(field).to_have_value("Typed without a connection")
        page.locator("#dp-comment-text").fill("Said without a connection")
        page.locator("#dp-comment-submit").click()
        expect(page.locator("#dp-comment-submit")).to_be_enabled()
        expect(page.locator("#dp-comment-text")).to_have_value("Said without a connection")
        page.unroute("**/dashboard/api/tasks/**")
        page.locator("#dp-comment-text").fill("")
        field.press("Enter")
        expect(card(page, task)).to_contain_text("Typed without a connection")
        person.complaints.clear()
    assert it.snapshot(task)["title"] == "Typed without a connection"


# --- plan and notes ---


def test_the_selected_text_has_focus(it: Board) -> None:
    task = it.made("With notes")
    with it.person() as person:
        page = it.open(person)
        page.evaluate("task => window.openPlans(task)", task)
        expect(page.locator("#remote-editor textarea")).to_be_focused()
        page.locator("#remote-editor").get_by_role("button", name="Notes").click()
        field = page.locator("#remote-editor textarea")
        expect(field).to_have_attribute("aria-label", "Notes")
        expect(field).to_be_focused()
        page.keyboard.type("Typed at once")
        page.keyboard.press("Control+s")
        expect(page.locator(".remote-said")).to_have_text("Saved.")
    assert it.text(task, "notes").read_text() == "Typed at once"


# --- read-only token ---


def test_a_read_only_token_has_a_board_without_edits(it: Board) -> None:
    task = it.made("Only to be read")
    it.does("comment", task, "To be read too")
    token = it.server.admin("token", "create", "--project", "board", "--actor", "human:reader", "--read-only")
    with Person(it.browser, it.server.url, viewport={"width": 1280, "height": 800}) as person:
        person.context.route(is_elsewhere, lambda route: route.fulfill(body="", content_type="text/javascript"))
        person.enter(token)
        page = it.open(person)
        expect(page.locator("#remote-person")).to_have_text("human:reader (read only)")
        for edit in ("#new-task-btn", "#settings-btn"):
            expect(page.locator(edit)).to_be_hidden()
        sent: list[str] = []
        page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
        card(page, task).hover()
        page.mouse.down()
        column(page, "in_planning").hover()
        page.mouse.up()
        card(page, task).click()
        expect(panel(page)).to_contain_text("To be read too")
        for edit in ("#dp-status", "#dp-comment-text", "#dp-comment-submit", "#dp-archive-btn"):
            expect(page.locator(edit)).to_be_hidden()
        screenshot(page, "read-only", whole=False)
        page.evaluate("task => { location.hash = '#/task/' + task; }", task)
        expect(page.locator("#app")).to_contain_text("Only to be read")
        for edit in ("#detail-status", "#detail-comment-text", "#detail-archive-btn"):
            expect(page.locator(edit)).to_be_hidden()
        page.locator("#app").get_by_role("button", name=re.compile("plan", re.IGNORECASE)).first.click()
        expect(page.locator(".remote-said")).to_contain_text("Read-only: this token may only read")
        expect(page.locator("#remote-editor textarea")).not_to_be_editable()
        assert sent == []
        it.does("status", task, "in_planning")
        page.keyboard.press("Escape")
        page.evaluate("location.hash = '#/board'")
        expect(column(page, "in_planning").locator(f'[data-task-id="{task}"]')).to_be_visible()
    assert it.snapshot(task)["status"] == "in_planning"
