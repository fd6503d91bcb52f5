"""Earlier versions of plans and notes: listed with their authors, shown byte by byte, restored as a new edit."""

import json
from collections.abc import Iterator

import pytest

from preloaded_programs import warm
from sandbox import Client, Server, board, differences, wait_for

pytestmark = pytest.mark.e2e

FIRST, SECOND, THIRD = "# Plan\n\nÜne\n\nPadding.\n", "# Plan\n\nTwo\r\n\nPadding.\n", "gone wrong\n"


@pytest.fixture(scope="module")
def two() -> Iterator[tuple[Server, Client, Client]]:
    with board("ana", "ben", programs=warm()) as (server, [ana, ben]):
        yield server, ana, ben


def write(client: Client, path: str, text: str) -> None:
    """Save a text as an editor does, and send it."""
    (client.lattice_dir / path).write_bytes(text.encode())
    client.ok("remote", "push")


def text_of(client: Client, task: str, version: object, *options: str) -> str:
    """Return a version's text; text-mode pipes would change its line endings."""
    shown = client.ok("remote", "history", task, "--show", str(version), "--json", *options)
    text: str = json.loads(shown)["data"]["text"]
    return text


def planned(ana: Client, ben: Client) -> tuple[str, str]:
    """Return the short id of a task whose plan Ana and Ben wrote three times, and its path."""
    task = json.loads(ana.ok("create", "A task", "--actor", "human:ana", "--json"))["data"]
    path = f"plans/{task['id']}.md"
    write(ana, path, FIRST)
    ben.ok("remote", "pull")
    write(ben, path, SECOND)
    write(ben, path, THIRD)
    return task["short_id"], path


def versions(client: Client, task: str, *options: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(client.ok("remote", "history", task, "--json", *options))["data"][
        "versions"
    ]
    return found


def test_versions_are_listed_with_their_authors_and_shown_byte_by_byte(two: tuple[Server, Client, Client]) -> None:
    _, ana, ben = two
    task, _ = planned(ana, ben)
    found = versions(ana, task)
    assert [each["actor"] for each in found] == ["human:ben", "human:ben", "human:ana", "human:ana"]
    assert [each["bytes"] for each in found[:3]] == [len(text.encode()) for text in (THIRD, SECOND, FIRST)]
    for each, text in zip(found[:3], (THIRD, SECOND, FIRST), strict=True):
        assert text_of(ana, task, each["seq"]) == text_of(ana, task.lower(), each["change"]) == text
    assert ana.ok("remote", "history", task, "--show", str(found[2]["seq"])) == FIRST
    assert text_of(ana, task, found[3]["seq"]).startswith("# ")
    table = ana.ok("remote", "history", task, "-n", "2").splitlines()
    assert len(table) == 3 and table[0].split() == ["CHANGE", "TIME", "ACTOR", "SIZE", "COMMAND"]


def test_a_restored_version_is_a_new_edit_that_reaches_all_clients(two: tuple[Server, Client, Client]) -> None:
    server, ana, ben = two
    task, path = planned(ana, ben)
    first = versions(ana, task)[2]["seq"]
    said = ana.ok("remote", "history", task, "--restore", str(first))
    assert said == f"Restored {path} to change {first}.\n"
    assert (server.lattice_dir() / path).read_bytes() == FIRST.encode()
    assert (ana.lattice_dir / path).read_bytes() == FIRST.encode()
    assert versions(ana, task)[0]["actor"] == "human:ana"
    ben.ok("remote", "pull")
    assert differences(ana.lattice_dir, ben.lattice_dir) == []
    assert "already has the text" in ana.ok("remote", "history", task, "--restore", str(first))


def test_a_restore_sends_the_pending_edit_of_the_file_first(two: tuple[Server, Client, Client]) -> None:
    _, ana, ben = two
    task, path = planned(ana, ben)
    first = versions(ana, task)[2]["seq"]
    ana.ok("remote", "pull")
    (ana.lattice_dir / path).write_text("not sent yet\n")
    ana.ok("remote", "history", task, "--restore", str(first))
    assert [each["bytes"] for each in versions(ana, task)[:2]] == [len(FIRST.encode()), len("not sent yet\n")]


def test_notes_have_their_own_history_and_an_archived_task_keeps_it(two: tuple[Server, Client, Client]) -> None:
    _, ana, ben = two
    task, path = planned(ana, ben)
    notes = path.replace("plans/", "notes/")
    ana.ok("remote", "pull")
    write(ana, notes, "one\n")
    write(ana, notes, "one\ntwo\n")
    ana.ok("archive", task, "--actor", "human:ana")
    newest, oldest = versions(ana, task, "--notes")
    assert text_of(ana, task, oldest["seq"], "--notes") == "one\n"
    assert text_of(ana, task, newest["seq"], "--notes") == "one\ntwo\n"
    assert len(versions(ana, task)) == 4, "going to the archive is no version"
    refused = ana.run("remote", "history", task, "--notes", "--restore", str(oldest["seq"]))
    assert refused.returncode == 1 and "archived or gone" in refused.stderr


def test_wrong_names_are_refused_in_one_line(two: tuple[Server, Client, Client]) -> None:
    _, ana, ben = two
    task, _ = planned(ana, ben)
    for asked, said in (
        (("LAT-999",), "no task"),
        ((task, "--show", "999999"), "change 999999 of this text not found in the journal"),
        ((task, "--show", "../1"), "is not a change's number"),
        ((task, "--show", "1", "--restore", "2"), "exclude each other"),
    ):
        answer = ana.run("remote", "history", *asked)
        assert answer.returncode == 1 and said in answer.stderr and answer.stderr.count("\n") == 1, asked


def test_a_text_whose_start_is_not_retained_is_completed_from_the_file(two: tuple[Server, Client, Client]) -> None:
    """The journal may start with a change that only appended."""
    server, ana, ben = two
    task, path = planned(ana, ben)
    whole = "".join(f"line {number} {'x' * 200}\n" for number in range(40))
    ana.ok("remote", "pull")
    write(ana, path, whole)
    with server.lattice_dir().joinpath(path).open("a") as file:
        file.write("one more\n")
    wait_for(lambda: versions(ana, task)[0]["bytes"] == len(whole) + 9, "the line to be a change")
    grown, replaced = versions(ana, task)[:2]
    assert text_of(ana, task, grown["seq"]) == whole + "one more\n"
    assert text_of(ana, task, replaced["seq"]) == whole
