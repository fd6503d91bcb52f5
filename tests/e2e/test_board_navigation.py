"""Board navigation in a real browser: addresses, header, signing out, keyboard."""

import json
from collections.abc import Iterator

import pytest
from board_pages import Board, card, panel, state
from playwright.sync_api import Page, expect

from browser import Person, chromium, screenshot
from preloaded_programs import warm
from sandbox import board

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def it() -> Iterator[Board]:
    with board("ben", programs=warm()) as (server, [ben]), chromium() as browser:
        server.project("other", "OTH")
        yield Board(server, ben, browser)


# --- addresses ---


def test_dashboard_redirects_to_the_only_project(it: Board) -> None:
    with Person(it.browser, it.server.url) as person:
        page = person.sign_in(it.server.token("human:one"), "/dashboard/")
        page.wait_for_url(f"{it.server.url}{it.path}")
        page.goto("/dashboard")
        page.wait_for_url(f"{it.server.url}{it.path}")


def test_dashboard_redirects_to_the_list_of_several_projects(it: Board) -> None:
    token = it.server.admin("token", "create", "--project", "board", "--project", "other", "--actor", "human:two")
    with Person(it.browser, it.server.url) as person:
        page = person.sign_in(token, "/dashboard/")
        page.wait_for_url(f"{it.server.url}/")
        expect(page.get_by_role("link", name="other")).to_be_visible()


def test_a_link_by_short_id_opens_the_task_after_signing_in(it: Board) -> None:
    task = it.made("Linked by its short id")
    short = it.snapshot(task)["short_id"]
    with Person(it.browser, it.server.url) as person:
        page = person.sign_in(it.server.token("human:link"), f"/projects/board/tasks/{short}")
        page.wait_for_url(f"{it.server.url}{it.path}#/task/{task}")
        expect(page.locator("#app")).to_contain_text("Linked by its short id")
        page.goto("/projects/board/tasks/LAT-4711")
        expect(page.locator("main")).to_contain_text("there is no task LAT-4711 in this project")
        answer = person.context.request.get(f"/projects/board/tasks/{short}")
        assert json.loads(answer.text())["data"]["id"] == task, "programs get the task"


# --- header ---


def test_title_and_header_name_the_project_and_the_user(it: Board) -> None:
    config = it.server.lattice_dir() / "config.json"
    with it.person("human:ann") as person:
        page = it.open(person)
        name = json.loads(config.read_text()).get("project_name") or "board"
        expect(page).to_have_title(f"{name} · Lattice")
        expect(page.locator("#remote-project")).to_have_text(name)
        expect(page.locator("#remote-person")).to_have_text("human:ann")
        screenshot(page, "header", whole=False)
        page.set_viewport_size({"width": 375, "height": 700})
        for part in ("#remote-project", "#remote-person", "#remote-sign-out-button", "#refresh-btn"):
            box = page.locator(part).bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 375, f"{part} is out of reach"
        screenshot(page, "header-narrow", whole=False)


def test_signing_out_on_the_board_ends_the_session(it: Board) -> None:
    with it.person("human:leaving") as person:
        page = it.open(person)
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_label("Token")).to_be_visible()
        page.goto(it.path)
        expect(page.get_by_label("Token")).to_be_visible()


# --- keyboard ---


def _focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.dataset.taskId || document.activeElement.dataset.view || ''"))


def _press_until(page: Page, key: str, wanted: str) -> None:
    for _ in range(40):
        page.keyboard.press(key)
        if _focused(page) == wanted:
            return
    raise AssertionError(f"{key} does not reach {wanted!r}")


def test_the_keyboard_reaches_tabs_and_cards(it: Board) -> None:
    first, second = it.made("Reached by keys"), it.made("Reached by keys next")
    it.does("status", second, "in_planning")
    with it.person() as person:
        page = it.open(person)
        _press_until(page, "Tab", "list")
        page.keyboard.press("Enter")
        page.wait_for_url("**#/list")
        _press_until(page, "Shift+Tab", "board")
        page.keyboard.press("Enter")
        page.wait_for_url("**#/board")
        expect(card(page, first)).to_be_visible()
        column = page.locator('.board-col[data-status="backlog"] .card')
        _press_until(page, "Tab", str(column.first.get_attribute("data-task-id")))
        for _ in range(column.count()):
            if _focused(page) == first:
                break
            page.keyboard.press("ArrowDown")
        assert _focused(page) == first
        page.keyboard.press("ArrowRight")
        assert _focused(page) == second
        it.does("create", "Made beside the focus")
        expect(page.get_by_text("Made beside the focus")).to_be_visible()
        expect(card(page, second)).to_be_focused()
        page.keyboard.press("Enter")
        expect(panel(page)).to_contain_text("Reached by keys next")
        expect(state(page)).to_have_text("Live")
