"""Plans and notes edited in the hosted dashboard, in a real browser: saved, merged, in conflict, never lost."""

import json
from collections.abc import Iterator

import pytest
from board_pages import Board, card, panel
from playwright.sync_api import Dialog, Locator, Page, expect

from browser import chromium, screenshot
from preloaded_programs import warm
from sandbox import board

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def it() -> Iterator[Board]:
    with board("ben", programs=warm()) as (server, [ben]), chromium() as browser:
        yield Board(server, ben, browser)


def editor(page: Page) -> Locator:
    return page.locator("#remote-editor")


def field(page: Page) -> Locator:
    return editor(page).locator("textarea")


def said(page: Page) -> Locator:
    return editor(page).locator(".remote-said")


def opened(it: Board, page: Page, task: str) -> None:
    """Open the plan of a task from the board."""
    card(page, task).click()
    panel(page).get_by_role("button", name="Show Plan").click()
    expect(field(page)).to_be_editable()


def planned(it: Board, title: str, text: str) -> str:
    """Create a task with this plan."""
    task = it.made(title)
    it.text(task).write_bytes(text.encode())
    return task


def press_save(page: Page) -> None:
    field(page).press("Control+s")


def refuse(dialog: Dialog) -> None:
    dialog.dismiss()


def test_a_plan_is_edited_and_notes_are_started_in_the_page(it: Board) -> None:
    task = planned(it, "Planned in the page", "# Plan\r\n\r\none\r\n")
    with it.person("human:planner") as person:
        page = it.open(person)
        opened(it, page, task)
        expect(field(page)).to_have_value("# Plan\n\none\n")
        field(page).press("Control+End")
        field(page).press_sequentially("two")
        expect(said(page)).to_have_text("Unsaved changes.")
        screenshot(page, "editor", whole=False)
        press_save(page)
        expect(said(page)).to_have_text("Saved.")
        assert it.text(task).read_bytes() == b"# Plan\r\n\r\none\r\ntwo", "lines end as they did"
        editor(page).get_by_role("button", name="Notes").click()
        field(page).fill("Noted\n")
        editor(page).get_by_role("button", name="Save").click()
        expect(said(page)).to_have_text("Saved.")
        assert it.text(task, "notes").read_text() == "Noted\n"
        field(page).press("Escape")
        expect(editor(page)).to_be_hidden()
    log = json.loads(it.server.admin("log", "board", "--json", "-n", "4"))["entries"]
    assert {entry["actor"] for entry in log if "edit" in entry["command"]} == {"human:planner"}


def test_different_lines_are_merged_and_the_same_line_is_a_visible_conflict(it: Board) -> None:
    task = planned(it, "Planned by two", "one\ntwo\nthree\nfour\nfive\n")
    with it.person() as person:
        page = it.open(person)
        opened(it, page, task)
        field(page).fill("one\ntwo\nthree\nfour\nFIVE\n")
        it.text(task).write_text("ONE\ntwo\nthree\nfour\nfive\n")
        expect(said(page)).to_contain_text("Another user has changed this text")
        press_save(page)
        expect(said(page)).to_contain_text("Saved and merged with another user")
        expect(field(page)).to_have_value("ONE\ntwo\nthree\nfour\nFIVE\n")
        assert it.text(task).read_text() == "ONE\ntwo\nthree\nfour\nFIVE\n"

        field(page).fill("ONE\nmine\nthree\nfour\nFIVE\n")
        it.text(task).write_text("ONE\ntheirs\nthree\nfour\nFIVE\n")
        expect(said(page)).to_contain_text("Another user has changed this text")
        press_save(page)
        expect(said(page)).to_have_text("Another user has changed the same lines.")
        expect(editor(page).locator("mark")).to_have_text("theirs\n")
        screenshot(page, "conflict", whole=False)
        page.set_viewport_size({"width": 375, "height": 700})
        screenshot(page, "conflict-narrow", whole=False)
        assert it.text(task).read_text() == "ONE\ntheirs\nthree\nfour\nFIVE\n", "nothing was put over it"
        editor(page).get_by_role("button", name="Use the server").click()
        expect(field(page)).to_have_value("ONE\ntheirs\nthree\nfour\nFIVE\n")
        editor(page).get_by_role("button", name="Restore my text").click()
        expect(field(page)).to_have_value("ONE\nmine\nthree\nfour\nFIVE\n")
        field(page).fill("ONE\ntheirs and mine\nthree\nfour\nFIVE\n")
        press_save(page)
        expect(said(page)).to_have_text("Saved.")
        assert it.text(task).read_text() == "ONE\ntheirs and mine\nthree\nfour\nFIVE\n"


def test_overwrite_saves_the_users_text_over_a_conflict(it: Board) -> None:
    task = planned(it, "Put over", "one\n")
    with it.person() as person:
        page = it.open(person)
        opened(it, page, task)
        field(page).fill("mine\n")
        it.text(task).write_text("theirs\n")
        expect(said(page)).to_contain_text("Another user")
        press_save(page)
        editor(page).get_by_role("button", name="Overwrite with mine").click()
        expect(said(page)).to_have_text("Saved.")
        assert it.text(task).read_text() == "mine\n"


def test_typed_text_is_not_lost(it: Board) -> None:
    """It survives Escape, a stopped server, and a reload of the page."""
    task = planned(it, "Typed in", "one\n")
    with it.person() as person:
        page = it.open(person)
        opened(it, page, task)
        field(page).fill("one\ntyped\n")
        page.once("dialog", refuse)
        field(page).press("Escape")
        expect(field(page)).to_have_value("one\ntyped\n")
        it.server.stop()
        press_save(page)
        expect(said(page)).to_contain_text("The server cannot be reached. Your text is still here.")
        it.server.start()
        page.once("dialog", lambda dialog: dialog.accept())  # leave anyway
        page.reload()
        opened(it, page, task)
        expect(field(page)).to_have_value("one\ntyped\n")
        expect(said(page)).to_contain_text("This is your unsaved text")
        press_save(page)
        expect(said(page)).to_have_text("Saved.")
        field(page).press("Escape")
        expect(editor(page)).to_be_hidden()
        person.complaints.clear()
    assert it.text(task).read_text() == "one\ntyped\n"


def test_a_text_that_cannot_be_edited_is_shown(it: Board) -> None:
    task = planned(it, "Archived with its plan", "kept\n")
    with it.person() as person:
        page = it.open(person)
        opened(it, page, task)
        field(page).fill("kept and typed\n")
        it.does("archive", task)
        expect(said(page)).to_contain_text("Read-only: the task is in the archive")
        expect(field(page)).to_have_value("kept and typed\n")
        expect(field(page)).not_to_be_editable()
        page.once("dialog", lambda dialog: dialog.accept())
        page.reload()
        page.evaluate("task => fetch(`/api/tasks/${task}/open-plans`, {method: 'POST', body: '{}'})", task)
        expect(field(page)).to_have_value("kept and typed\n")
        expect(field(page)).not_to_be_editable()


def test_an_earlier_version_is_shown_and_saved_again(it: Board) -> None:
    task = planned(it, "Restored in the page", "# First\n")
    with it.person("human:restorer") as person:
        page = it.open(person)
        opened(it, page, task)
        field(page).fill("# Second\n")
        press_save(page)
        expect(said(page)).to_have_text("Saved.")
        field(page).fill("# Typed, not saved\n")
        editor(page).get_by_role("button", name="History").click()
        versions = editor(page).get_by_role("option")
        expect(versions.first).to_contain_text("human:restorer")
        screenshot(page, "history", whole=False)
        versions.nth(1).click()
        expect(field(page)).to_have_value("# First\n")
        expect(said(page)).to_contain_text("Save to restore it.")
        editor(page).get_by_role("button", name="Restore my text").click()
        expect(field(page)).to_have_value("# Typed, not saved\n")
        versions.nth(1).click()
        expect(field(page)).to_have_value("# First\n")
        press_save(page)
        expect(said(page)).to_have_text("Saved.")
        assert it.text(task).read_text() == "# First\n"
        field(page).press("Escape")
        expect(editor(page)).to_be_hidden()
