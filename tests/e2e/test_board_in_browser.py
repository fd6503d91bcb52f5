"""The hosted dashboard in a real browser: views, edits, live updates, lost connections."""

import json
import re
from collections.abc import Iterator

import pytest
from board_pages import WITHOUT_ITS_LIBRARY, Board, card, column, panel, state, without_libraries
from dashboards import serving
from playwright.sync_api import Route, expect

from browser import Person, chromium, screenshot
from faultproxy import FaultProxy
from preloaded_programs import warm
from sandbox import board, wait_for

pytestmark = pytest.mark.e2e

NOTE_A_LATE_TASK = """new MutationObserver(function () {
  if (document.querySelector("#app .detail")) document.body.dataset.drawnLate = "yes";
}).observe(document.getElementById("app"), { childList: true, subtree: true })"""


@pytest.fixture(scope="module")
def it() -> Iterator[Board]:
    with board("ben", programs=warm()) as (server, [ben]), chromium() as browser:
        yield Board(server, ben, browser)


# --- views ---


def test_a_user_signs_in_and_sees_the_board(it: Board) -> None:
    task = it.made("Seen in a browser")
    with Person(it.browser, it.server.url) as person:
        person.context.route(lambda url: "//127.0.0.1" not in url, without_libraries)
        page = person.sign_in(it.server.token("human:web"), it.path.rstrip("/"))
        expect(card(page, task)).to_contain_text("Seen in a browser")
        assert page.url == it.server.url + it.path
        expect(state(page)).to_have_text("Live")
        page.locator("#remote-home").click()
        page.wait_for_url(f"{it.server.url}/")
        assert [said for said in person.complaints if WITHOUT_ITS_LIBRARY not in said] == []


def test_every_view_shows_its_content_in_dark_and_light_wide_and_narrow(it: Board) -> None:
    task = it.made("Looked at from all sides", "--priority", "high", "--description", "It is long.\n" * 3)
    it.does("comment", task, "A comment")
    with it.person() as person:
        for theme in ("carbon", "linear"):
            page = it.open(person)
            page.locator("#settings-btn").click()
            page.locator("#theme-select").select_option(theme)
            expect(page.locator("html")).to_have_attribute("data-theme", theme)
            page.locator("#settings-close").click()
            for view in ("board", "list", "activity", "stats", "web", "cube", f"task/{task}"):
                page.evaluate("view => { location.hash = '#/' + view; }", view)
                shown = {"web": "unavailable", "cube": "unavailable", "activity": "comment"}.get(view.split("/")[0])
                expect(page.locator("#app")).to_contain_text(re.compile(shown or "Looked at from all sides"))
                screenshot(page, f"{theme}-{view.split('/')[0]}", whole=False)
            page.evaluate("location.hash = '#/board'")
            card(page, task).click()
            expect(panel(page)).to_contain_text("A comment")
            screenshot(page, f"{theme}-panel", whole=False)
            page.set_viewport_size({"width": 375, "height": 700})
            page.reload()
            expect(state(page)).to_have_text("Live")
            for button in ("#new-task-btn", "#settings-btn", "#help-btn", "#refresh-btn", "#remote-state"):
                box = page.locator(button).bounding_box()
                assert box is not None
                assert box["x"] >= 0
                assert box["x"] + box["width"] <= 375, f"{button} is out of reach"
            screenshot(page, f"{theme}-narrow", whole=False)
            page.close()


def test_a_view_with_late_responses_does_not_replace_the_next(it: Board) -> None:
    task = it.made("Answered late")
    with it.person() as person:
        page = it.open(person)
        held: list[Route] = []
        page.route(f"**/api/tasks/{task}/events", lambda route: held.append(route))  # noqa: PLW0108 - Playwright marks it
        with page.expect_request(f"**/api/tasks/{task}/events"):
            page.evaluate("task => { location.hash = '#/task/' + task; }", task)
        page.evaluate("location.hash = '#/board'")
        expect(card(page, task)).to_be_visible()
        page.evaluate(NOTE_A_LATE_TASK)
        wait_for(lambda: held or page.wait_for_timeout(20), "the question to be held")
        for route in held:
            route.continue_()
        expect(page.locator("body")).to_have_attribute("data-drawn-late", "yes")
        expect(card(page, task)).to_be_visible()
        expect(page.locator("#app .detail")).to_have_count(0)


SLOW_STATS = """() => {
  const json = Response.prototype.json;
  Response.prototype.json = async function () {
    if (this.url.endsWith("/api/stats")) await new Promise(done => { window.release = done; });
    return json.call(this);
  };
}"""


@pytest.mark.parametrize("view", ["board", "list"])
def test_a_view_drawn_late_during_a_poll_does_not_replace_the_next(it: Board, view: str) -> None:
    it.made(f"Shown in the {view}")
    with it.person() as person:
        page = it.open(person)
        page.evaluate(SLOW_STATS)
        page.evaluate("location.hash = '#/stats'")
        wait_for(lambda: page.evaluate("window.release !== undefined"), "the statistics to arrive")
        held: list[Route] = []
        page.route("**/api/tasks", lambda route: held.append(route))  # noqa: PLW0108 - Playwright marks it
        page.evaluate("view => { location.hash = '#/' + view; }", view)
        wait_for(lambda: held or page.wait_for_timeout(20), "the poll")
        page.evaluate("window.release()")
        expect(page.locator("#app .stats-view")).to_be_attached()
        page.unroute("**/api/tasks")  # the poll continues
        expect(page.locator("#app .stats-view")).to_have_count(0)
        expect(page.get_by_text(f"Shown in the {view}").first).to_be_attached()


@pytest.mark.parametrize("address", ["#task/{}", "#//task/{}", "#/task/{}"])
def test_a_view_is_not_redrawn_for_any_address_that_the_page_accepts(it: Board, address: str) -> None:
    task = it.made("At an unusual address")
    with it.person() as person:
        page = it.open(person)
        page.evaluate("hash => { location.hash = hash; }", address.format(task))
        expect(page.locator("#app .detail")).to_contain_text("At an unusual address")
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.wait_for_timeout(1500)  # observes for seven times the minimum gap between two draws
        assert len([url for url in asked if "/api/" in url]) < 6, asked
    it.does("archive", task)  # the board of the tests below fits into the window


def test_a_panel_opened_during_a_poll_stays_open(it: Board) -> None:
    task = it.made("Opened meanwhile")
    with it.person() as person:
        page = it.open(person)
        held: list[Route] = []
        page.route("**/api/tasks", lambda route: held.append(route))  # noqa: PLW0108 - Playwright marks it
        with page.expect_request("**/api/tasks"):
            later = it.made("Made while it looks")
        card(page, task).click()
        expect(panel(page)).to_contain_text("Opened meanwhile")
        page.wait_for_timeout(500)  # a click counts as input for 300 ms; the response must come later
        wait_for(lambda: held or page.wait_for_timeout(20), "the question to be held")
        for route in held:
            route.continue_()
        expect(card(page, later)).to_be_visible()
        expect(panel(page)).to_contain_text("Opened meanwhile")


# --- edits ---


def test_a_card_is_dragged(it: Board) -> None:
    task = it.made("To be dragged")
    with it.person("human:dora") as person:
        page, other = it.open(person), it.open(person)
        card(page, task).drag_to(column(page, "in_planning"))
        expect(column(other, "in_planning").locator(f'[data-task-id="{task}"]')).to_be_visible()
        assert it.snapshot(task)["status"] == "in_planning"
    log = (it.server.lattice_dir() / "events" / f"{task}.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["actor"] == "human:dora", "in the name of who is signed in"


def test_a_task_is_created_edited_and_commented_on(it: Board) -> None:
    with it.person() as person:
        page = it.open(person)
        page.locator("#new-task-btn").click()
        page.locator("#ct-title").fill("Made in the page")
        page.locator("#create-task-submit").click()
        page.wait_for_url(re.compile("#/task/"))
        task = page.url.rpartition("/")[2]
        page.locator("#app textarea").fill("Said in the page")
        page.locator("#detail-comment-submit").click()
        expect(page.locator(".comment-body")).to_have_text("Said in the page")
        page.evaluate("location.hash = '#/board'")
        card(page, task).click()
        page.locator("#dp-title-edit").click()
        page.locator(".inline-edit input").fill("Renamed in the page")
        page.locator(".inline-edit input").press("Enter")
        expect(card(page, task)).to_contain_text("Renamed in the page")
    assert it.snapshot(task)["title"] == "Renamed in the page"


def test_a_refusal_of_lattice_is_shown_by_the_page(it: Board) -> None:
    task = it.made("Assigned to nobody")
    with it.person() as person:
        page = it.open(person)
        card(page, task).click()
        page.locator("#dp-assigned").click()
        panel(page).locator(".inline-edit input").fill("nobody")
        panel(page).get_by_role("button", name="Save").click()
        expect(page.locator(".toast-error")).to_contain_text("nobody")
        assert any("400" in said for said in person.complaints), "the browser says it too"
        person.complaints.clear()
    assert it.snapshot(task)["assigned_to"] is None


# --- live updates ---


def test_every_change_reaches_every_tab_and_no_request_is_sent_without_one(
    it: Board,
) -> None:
    with it.person() as person, it.person("human:eve") as other:
        pages = [it.open(person), it.open(person, "list"), it.open(other)]
        it.does("create", "Told to all")
        for page in pages:
            expect(page.get_by_text("Told to all")).to_be_visible(timeout=60_000)
        asked: list[str] = []
        for page in pages:
            page.on("request", lambda request: asked.append(request.url))
        pages[0].wait_for_timeout(6000)  # longer than the page's own five seconds
        assert asked == []


def test_many_changes_at_once_cause_few_polls(it: Board) -> None:
    with it.person() as person:
        page = it.open(person)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        for number in range(20):
            it.does("create", f"One of many {number}")
        expect(page.get_by_text("One of many 19")).to_be_visible()
        looks = sum(url.endswith("/api/tasks") for url in asked)
        assert 1 <= looks <= 21


def test_another_tab_listens_when_the_listening_tab_is_closed(it: Board) -> None:
    with it.person() as person:
        pages = [it.open(person) for _ in range(3)]
        pages[0].close()
        it.does("create", "Heard by the next")
        for page in pages[1:]:
            expect(page.get_by_text("Heard by the next")).to_be_visible()
            expect(state(page)).to_have_text("Live")


def test_a_user_who_types_is_not_disturbed_and_sees_changes_afterwards(it: Board) -> None:
    task = it.made("Written about")
    with it.person() as person:
        page = it.open(person)
        card(page, task).click()
        field = panel(page).locator("textarea")
        field.press_sequentially("Half a sentence")
        it.does("comment", task, "Meanwhile")
        it.does("create", "Made meanwhile")
        expect(state(page)).to_have_text("Waiting")
        expect(panel(page)).to_be_visible()
        field.press_sequentially(" and the other half")
        expect(field).to_have_value("Half a sentence and the other half")
        panel(page).get_by_role("button", name="Post").click()
        expect(panel(page)).to_contain_text("Meanwhile")
        expect(panel(page)).to_contain_text("Half a sentence and the other half")
        expect(page.get_by_text("Made meanwhile")).to_be_visible()
        expect(state(page)).to_have_text("Live")
        page.evaluate("task => { location.hash = '#/task/' + task; }", task)
        field = page.locator("#detail-comment-text")
        field.press_sequentially("On its own page")
        it.does("comment", task, "Later")
        page.wait_for_timeout(700)
        expect(field).to_have_value("On its own page")
        field.fill("")
        page.locator(".nav-brand").click()
        expect(page.locator("#app")).to_contain_text("Later")


def test_an_open_panel_stays_open_and_shows_new_content(it: Board) -> None:
    task = it.made("Open beside the board")
    with it.person() as person:
        page = it.open(person)
        card(page, task).click()
        expect(panel(page)).to_contain_text("Open beside the board")
        it.does("comment", task, "New in the panel")
        expect(panel(page)).to_contain_text("New in the panel")
        expect(page.locator(".remote-curtain")).to_have_count(0)
        assert page.locator("#detail-panel").count() == 1


def test_a_card_being_dragged_is_not_dropped(it: Board) -> None:
    task = it.made("In the hand")
    with it.person() as person:
        page = it.open(person)
        page.set_viewport_size({"width": 1280, "height": 5000})  # no scrolling during the drag
        card(page, task).hover()
        page.mouse.down()
        column(page, "in_planning").hover()
        page.evaluate("task => { window.held = document.querySelector(`[data-task-id='${task}']`); }", task)
        it.does("create", "While something is dragged")
        page.wait_for_timeout(700)
        assert page.evaluate("window.held.isConnected"), "the board was not drawn anew under the hand"
        column(page, "in_planning").hover()
        page.mouse.up()
        expect(column(page, "in_planning").locator(f'[data-task-id="{task}"]')).to_be_visible()
        expect(page.get_by_text("While something is dragged")).to_be_visible()
    assert it.snapshot(task)["status"] == "in_planning"


def test_filters_are_kept(it: Board) -> None:
    it.made("Needle one")
    with it.person() as person:
        page = it.open(person, "list")
        page.locator("#f-search").press_sequentially("needle")
        page.locator("#f-priority").select_option("medium")
        page.locator("#f-search").focus()
        it.does("create", "Needle two")
        expect(page.locator("#list-table")).to_contain_text("Needle two")
        expect(page.locator("#list-table tbody tr")).to_have_count(2)
        expect(page.locator("#f-search")).to_be_focused()
        expect(page.locator("#f-search")).to_have_value("needle")
        page.locator("#f-search").press_sequentially(" two")
        expect(page.locator("#list-table tbody tr")).to_have_count(1)
        expect(page.locator("#f-priority")).to_have_value("medium")


# --- lost connections ---


def test_a_restarted_server_is_found_and_missed_changes_are_shown(it: Board) -> None:
    with it.person() as person:
        page, other = it.open(person), it.open(person)
        it.server.stop()
        expect(state(page)).to_have_text(re.compile("Reconnecting|Offline"))
        expect(state(page)).to_have_text("Offline")  # once the page has polled without a server
        expect(state(other)).to_have_text("Offline")
        screenshot(page, "offline", whole=False)
        it.server.start()
        it.does("create", "Made while nobody listened")
        for tab in (page, other):
            expect(state(tab)).to_have_text("Live")
            expect(tab.get_by_text("Made while nobody listened")).to_be_visible()
        person.complaints.clear()  # the browser logs each failed request


def test_a_user_with_a_revoked_token_is_sent_to_the_sign_in_page(it: Board) -> None:
    with Person(it.browser, it.server.url) as person:
        person.context.route(lambda url: "//127.0.0.1" not in url, without_libraries)
        token = it.server.token("human:gone")
        person.enter(token)
        page = it.open(person)
        listed = json.loads(it.server.admin("token", "list", "--json"))
        [gone] = [each["id"] for each in listed if each["actor"] == "human:gone"]
        it.server.admin("token", "revoke", gone)
        expect(state(page)).to_have_text("Signed out")
        screenshot(page, "signed-out", whole=False)
        page.get_by_role("link", name="Sign in").click()
        page.get_by_label("Token").fill(it.server.token("human:back"))
        page.get_by_role("button", name="Sign in").click()
        expect(state(page)).to_have_text("Live")
        assert page.url == f"{it.server.url}{it.path}#/board"


def test_a_failed_poll_is_repeated(it: Board) -> None:
    with it.person() as person:
        page = it.open(person)
        page.route("**/api/tasks", lambda route: route.fulfill(status=503, body="{}"), times=2)
        it.does("create", "Not seen at once")
        expect(page.get_by_text("Not seen at once")).to_be_visible()
        expect(state(page)).to_have_text("Live")
        assert sum("503" in said for said in person.complaints) == 2
        person.complaints.clear()


def test_signing_out_in_one_tab_reaches_the_others(it: Board) -> None:
    with it.person() as person:
        pages = [it.open(person), it.open(person)]
        home = person.open("/")
        home.get_by_role("button", name="Sign out").click()
        expect(home.get_by_label("Token")).to_be_visible()
        with person.context.expect_event("response", lambda answer: answer.url.endswith("remote/events")) as asked:
            it.does("create", "Not for who has signed out")
        assert asked.value.status == 401, "the stream of before is not listened to any more"
        for page in pages:
            expect(state(page)).to_have_text("Signed out")
        person.complaints.clear()


def test_a_dead_connection_is_detected_after_sleep(it: Board) -> None:
    with FaultProxy(it.server.port) as proxy, Person(it.browser, proxy.url) as person:
        person.context.route(lambda url: "//127.0.0.1" not in url, without_libraries)
        person.enter(it.server.token("human:web"))
        listening, other = it.open(person), it.open(person)
        other.clock.install()
        other.reload()
        expect(state(other)).to_have_text("Live")
        proxy.swallow()
        proxy.stall()  # and no new one can be opened
        other.clock.fast_forward("00:25")
        expect(state(other)).to_have_text(re.compile("Reconnecting|Offline"))
        expect(state(listening)).to_have_text(re.compile("Reconnecting|Offline"))
        proxy.flow()
        it.does("create", "Made while it slept")
        for page in (listening, other):
            expect(state(page)).to_have_text("Live")
            expect(page.get_by_text("Made while it slept")).to_be_visible()


def test_a_request_resent_by_the_browser_runs_once(it: Board) -> None:
    with FaultProxy(it.server.port) as proxy, Person(it.browser, proxy.url) as person:
        person.context.route(lambda url: "//127.0.0.1" not in url, without_libraries)
        person.enter(it.server.token("human:web"))
        page = it.open(person)
        page.locator("#new-task-btn").click()
        page.locator("#ct-title").fill("Made once over a bad line")
        proxy.swallow_answers()
        page.locator("#create-task-submit").click()

        def made() -> int:
            page.wait_for_timeout(10)
            return sum('"Made once over' in path.read_text() for path in it.server.lattice_dir().glob("tasks/*.json"))

        wait_for(made, "the task to be made", 20)
        sent = proxy.to_server
        proxy.cut()
        page.wait_for_url(re.compile("#/task/"))
        assert proxy.to_server > sent, "it was sent again"
        assert made() == 1


# --- the local dashboard ---


def test_the_local_dashboard_gets_live_updates(it: Board) -> None:
    with serving(it.ben) as dashboard, Person(it.browser, f"http://127.0.0.1:{dashboard.port}") as person:
        person.context.route(lambda url: "//127.0.0.1" not in url, without_libraries)
        page = person.open("/#/board")
        expect(state(page)).to_have_text("Live")
        task = it.made("Seen in a local page")
        card(page, task).click()
        it.does("comment", task, "Told to a local page")
        expect(panel(page)).to_contain_text("Told to a local page")
        assert page.locator("#remote-home").count() == 0
        assert [said for said in person.complaints if WITHOUT_ITS_LIBRARY not in said] == []
