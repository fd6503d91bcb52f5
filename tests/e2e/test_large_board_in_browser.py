"""The board of a large project in a real browser: drawn in pieces, updated card by card."""

import asyncio
import re
from collections.abc import Iterator

import pytest
from board_pages import Board, card, column, panel, state
from playwright.sync_api import Page, expect

from browser import chromium
from load_scenarios import BY, fill
from preloaded_programs import warm
from request_client import Light
from sandbox import Sandbox, Server

pytestmark = pytest.mark.e2e
TASKS = 600


@pytest.fixture(scope="module")
def it() -> Iterator[Board]:
    with Sandbox(warm()) as sandbox:
        server = sandbox.started_server()
        token = server.token("human:ben", "agent:*")
        asyncio.run(_run(server, token, "create", "One"))
        server.stop()
        fill(server.lattice_dir(), TASKS)
        server.start()
        asyncio.run(_run(server, token, "comment", "LAT-1", "The new files are taken in"))
        ben = sandbox.client("ben")
        ben.add_remote(server, token)
        with chromium() as browser:
            yield Board(server, ben, browser)


async def _run(server: Server, token: str, *argv: str) -> None:
    async with Light(server.url, token) as client:
        await client.ok(*argv, *BY)


def cards(page: Page) -> int:
    return page.locator("#app .card").count()


def test_all_cards_are_drawn_in_order_and_keep_their_elements(it: Board) -> None:
    with it.person() as person:
        page = it.open(person)
        expect(page.locator("#app .card")).to_have_count(TASKS)
        shown = page.eval_on_selector_all("#app .card", "all => all.map(card => card.dataset.taskId)")
        assert shown == sorted(shown), "in lattice's order"
        page.evaluate("document.querySelectorAll('#app .card').forEach(card => { card.isOld = true; })")
        task = it.made("Added to many")
        expect(card(page, task)).to_be_attached()
        assert page.evaluate("document.querySelectorAll('#app .card').length") == TASKS + 1
        assert page.evaluate("[...document.querySelectorAll('#app .card')].filter(card => !card.isOld).length") == 1
        expect(column(page, "backlog").locator(".count")).to_have_text(str(TASKS + 1))


def test_one_change_transfers_little(it: Board) -> None:
    task = it.made("Changed among many")
    with it.person() as person:
        page = it.open(person)
        expect(card(page, task)).to_be_attached()
        received: list[int] = []
        session = person.context.new_cdp_session(page)
        session.send("Network.enable")
        session.on("Network.dataReceived", lambda event: received.append(event["encodedDataLength"]))
        it.does("status", task, "in_planning")
        expect(column(page, "in_planning").locator(f'[data-task-id="{task}"]')).to_be_attached()
        expect(card(page, task)).to_have_count(1)
        assert sum(received) < 20_000


def test_every_card_opens_its_task_once(it: Board) -> None:
    task = it.made("Opened among many")
    with it.person() as person:
        page = it.open(person)
        expect(page.locator("#app .card").nth(TASKS)).to_be_attached()
        it.does("create", "Drawn a second time")
        expect(page.get_by_text("Drawn a second time")).to_be_attached()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        card(page, task).scroll_into_view_if_needed()
        card(page, task).click()
        expect(panel(page)).to_contain_text("Opened among many")
        assert sum(url.endswith(f"/api/tasks/{task}") for url in asked) == 1


def test_another_view_stops_the_drawing_and_returning_draws_all(it: Board) -> None:
    with it.person() as person:
        page = it.open(person)
        for _ in range(3):
            page.evaluate("location.hash = '#/stats'")
            expect(page.locator("#app .board")).to_have_count(0)
            page.evaluate("location.hash = '#/board'")
            expect(page.locator("#app .card").first).to_be_attached()
        expect(page.locator("#app .card").nth(TASKS)).to_be_attached()
        expect(state(page)).to_have_text(re.compile("Live|Waiting"))


def test_the_list_has_every_row_in_order_and_a_filter_adds_none(it: Board) -> None:
    with it.person() as person:
        page = it.open(person, "list")
        rows = page.locator("#list-table tbody tr")
        tasks = len(list((it.server.lattice_dir() / "tasks").glob("*.json")))
        expect(rows).to_have_count(tasks)
        shown = page.eval_on_selector_all("#list-table td.id-cell", "all => all.map(cell => cell.title)")
        assert shown == sorted(shown)
        page.locator("#f-search").fill("number 77 of")
        expect(rows).to_have_count(1)
        page.locator("#f-search").fill("")
        page.locator("#f-search").fill("number 78 of")  # before all rows are back
        expect(rows).to_have_count(1)
        expect(rows).to_contain_text("number 78 of")
        page.locator("#f-search").fill("")
        expect(rows).to_have_count(tasks)


def test_a_redrawn_list_keeps_its_position(it: Board) -> None:
    with it.person() as person:
        page = it.open(person, "list")
        rows = page.locator("#list-table tbody tr")
        row = rows.nth(450)
        row.scroll_into_view_if_needed()
        place = page.evaluate("window.scrollY")
        assert place > 5000
        it.does("create", "Made below")
        expect(page.get_by_text("Made below")).to_be_attached()
        assert page.evaluate("window.scrollY") == place


def test_a_row_of_the_list_opens_its_task(it: Board) -> None:
    task = it.made("Opened from the list")
    with it.person() as person:
        page = it.open(person, "list")
        page.locator("#f-search").fill("Opened from the list")
        page.locator("#list-table tbody tr").click()
        page.wait_for_url(f"**#/task/{task}")
