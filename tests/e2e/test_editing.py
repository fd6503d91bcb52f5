"""Plans and notes edited in two caches: a save reaches the other cache without a command (I4)."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from programs import program
from sandbox import Client, Sandbox, Server, wait_for

pytestmark = pytest.mark.e2e

Board = tuple[Server, Client, Client]
Files = tuple[Path, Path]
OFF = {"LATTICE_REMOTE_AGENT": "off"}


def task_id(client: Client, short_id: str) -> str:
    return str(json.loads(client.ok("show", short_id, "--json"))["data"]["id"])


def new_task(client: Client, title: str) -> str:
    return client.ok("create", title, "--actor", "human:ana", "--quiet").strip()


def text_files(one: Client, other: Client, short_id: str, folder: str = "plans") -> Files:
    """Return the same plan or notes in two caches; plans exist in both."""
    name = f"{task_id(one, short_id)}.md"
    files = one.lattice_dir / folder / name, other.lattice_dir / folder / name
    if folder == "plans":
        wait_for(lambda: all(file.exists() for file in files), "the plan in both copies")
    return files


def same(files: Files, text: str | bytes) -> None:
    """Wait until both caches contain this text."""
    wanted = text.encode() if isinstance(text, str) else text
    wait_for(lambda: all(file.exists() and file.read_bytes() == wanted for file in files), f"{wanted[:200]!r} in both")


def status(client: Client) -> dict:
    return json.loads(client.ok("remote", "status", "--json"))["data"]


def test_a_save_in_one_cache_reaches_the_other(shared_board: Board) -> None:
    _server, ana, ben = shared_board
    plan = text_files(ana, ben, new_task(ana, "Live"))
    for n, (mine, _theirs) in enumerate([plan, plan[::-1], plan, plan[::-1]]):
        text = mine.read_text() + f"\nline {n}\n"
        mine.write_text(text)
        same(plan, text)
    changes = json.loads(ana.ok("remote", "log", "-n", "2", "--json"))["data"]["entries"]
    assert [change["actor"] for change in changes] == ["human:ben", "human:ana"]


def test_new_notes_reach_the_other_cache(shared_board: Board) -> None:
    _server, ana, ben = shared_board
    notes = text_files(ana, ben, new_task(ana, "Notes"), "notes")
    notes[1].write_text("# Found\n")
    same(notes, "# Found\n")


def test_a_file_written_in_pieces_is_sent_once_and_complete(shared_board: Board) -> None:
    _server, ana, ben = shared_board
    plan = text_files(ana, ben, new_task(ana, "In pieces"))
    pieces = [f"part {n}\n" for n in range(4)]
    before = status(ana)["server_seq"]
    with plan[0].open("w") as file:
        for piece in pieces:
            file.write(piece)
            file.flush()
            time.sleep(0.2)  # longer than a pause that looks like the end
    same(plan, "".join(pieces))
    assert status(ana)["server_seq"] == before + 1


def test_a_briefly_emptied_file_is_no_edit_but_one_that_stays_empty_is(shared_board: Board) -> None:
    _server, ana, ben = shared_board
    plan = text_files(ana, ben, new_task(ana, "Emptied"))
    before = status(ana)["server_seq"]
    plan[0].write_text("")
    plan[0].write_text("and then the text\n")
    same(plan, "and then the text\n")
    assert status(ana)["server_seq"] == before + 1
    plan[0].write_text("")
    same(plan, "")


def test_edits_during_an_outage_are_counted_kept_and_sent(sandbox: Sandbox) -> None:
    server = sandbox.started_server()
    ana, ben = sandbox.client("ana"), sandbox.client("ben")
    for client in (ana, ben):
        client.add_remote(server, server.token("human:ana"))
    plans = [text_files(ana, ben, new_task(ana, title)) for title in ("One", "Two")]
    server.stop()
    for plan in plans:
        plan[0].write_text("# Written on a train\n")
    assert sorted(status(ana)["unsent_edits"]) == sorted(f"plans/{plan[0].name}" for plan in plans)
    shown = ana.ok("remote", "status")
    assert all(f"plans/{plan[0].name}: waits for " in shown for plan in plans), shown
    server.start()
    for plan in plans:
        same(plan, "# Written on a train\n")


def test_edits_made_without_an_agent_are_sent_by_the_next_one(shared_board: Board) -> None:
    _server, ana, ben = shared_board
    plan = text_files(ana, ben, new_task(ana, "At night"))
    ana.ok("remote", "agent", "stop")
    plan[0].write_text("# Saved while nothing ran\n")
    ana.ok("list")
    same(plan, "# Saved while nothing ran\n")


# --- actors of edits ---


@pytest.fixture
def two_names(sandbox: Sandbox) -> Iterator[tuple[Server, Client, Client, dict[str, str]]]:
    """Ana's cache, and a second one whose commands all use an agent's token."""
    server = sandbox.started_server()
    ana = sandbox.client("ana")
    ana.add_remote(server, server.token("human:ana"))
    work = ana.elsewhere(ana.dir.parent / "work")
    work.lattice_dir.mkdir()
    shutil.copy(ana.lattice_dir / "remote.json", work.lattice_dir)
    yield server, ana, work, {"LATTICE_TOKEN": server.token("agent:x")}


def last_actor(client: Client) -> str:
    return str(json.loads(client.ok("remote", "log", "-n", "1", "--json"))["data"]["entries"][0]["actor"])


def test_an_edit_is_sent_in_the_name_of_the_caches_commands(
    two_names: tuple[Server, Client, Client, dict[str, str]],
) -> None:
    _server, ana, work, token = two_names
    short_id = new_task(ana, "Whose")
    assert work.run("list", env=token).returncode == 0
    plan = text_files(ana, work, short_id)
    plan[1].write_text("# By the agent\n")
    same(plan, "# By the agent\n")
    assert last_actor(ana) == "agent:x"
    plan[0].write_text("# By Ana\n")
    same(plan, "# By Ana\n")
    assert last_actor(ana) == "human:ana"


def test_an_edit_in_a_cache_of_several_names_waits_for_the_next_command(
    two_names: tuple[Server, Client, Client, dict[str, str]],
) -> None:
    _server, ana, work, token = two_names
    short_id = new_task(ana, "Whose")
    assert work.run("list", env=token).returncode == 0
    work.ok("list")
    plan = text_files(ana, work, short_id)
    seq = status(work)["server_seq"]
    plan[1].write_text("# By one of them\n")
    recorded = work.lattice_dir / ".remote/edits.json"  # the agent records a save that it does not send by itself
    wait_for(lambda: recorded.exists() and plan[1].name in recorded.read_text(), "the save to be recorded")
    found = status(work)
    assert found["server_seq"] == seq and len(found["unsent_edits"]) == 1
    assert "several tokens" in work.ok("remote", "status")
    assert work.run("comment", short_id, "done", "--actor", "agent:x", env=token).returncode == 0
    same(plan, "# By one of them\n")
    log = json.loads(ana.ok("remote", "log", "-n", "2", "--json"))["data"]["entries"]
    assert {change["actor"] for change in log} == {"agent:x"}


# --- conflicts ---


def conflicting(ana: Client, ben: Client, title: str) -> tuple[str, Files]:
    """Create a task whose plan Ana and Ben changed in the same line; a conflict file has Ben's text."""
    short_id = new_task(ana, title)
    plan = text_files(ana, ben, short_id)
    ben.ok("remote", "agent", "stop")
    plan[1].write_text("# Ben's\n")
    plan[0].write_text("# Ana's\n")
    wait_for(lambda: not status(ana)["unsent_edits"], "ana's edit to be sent")
    ben.ok("list")
    same(plan, "# Ana's\n")
    return short_id, plan


def test_a_conflict_is_shown_and_resolved(shared_board: Board) -> None:
    _server, ana, ben = shared_board
    short_id, plan = conflicting(ana, ben, "Conflict")
    shown = ben.ok("remote", "resolve", short_id)
    assert (
        "    -# Ana's" in shown
        and "    +# Ben's" in shown
        and f".lattice/.remote/conflicts/plans/{plan[1].name}" in shown
    )
    assert "conflict" in ben.run("list").stderr
    ben.ok("remote", "resolve", short_id, "--edited", "-", stdin="# Ours\n")
    same(plan, "# Ours\n")
    assert ben.ok("remote", "resolve") == "No conflicts.\n"
    assert ben.run("list").stderr == ""
    again = ben.run("remote", "resolve", short_id, "--mine", "--json")
    assert again.returncode == 1 and json.loads(again.stdout)["error"]["code"] == "REMOTE_NOT_FOUND"


def test_a_stale_editor_reverts_nothing(shared_board: Board) -> None:
    _server, ana, ben = shared_board
    plan = text_files(ana, ben, new_task(ana, "Behind"))
    opened = "# Plan\n\n- write the parser\n- test the parser\n- write the printer\n"
    plan[0].write_text(opened)
    same(plan, opened)
    plan[1].write_text(opened + "- ask Ben about Unicode\n")
    same(plan, opened + "- ask Ben about Unicode\n")
    for saved in (opened.replace("# Plan", "# My plan"), opened.replace("# Plan", "# My very own plan")):
        plan[0].write_text(saved)
        same(plan, saved + "- ask Ben about Unicode\n")
    assert "reload it in your editor" in ana.run("list").stderr


# --- unusual texts ---

LONG = b"".join(
    b"- step %d, which says what is to be done, and by whom, in about eighty letters\n" % n for n in range(64_000)
)


@pytest.mark.parametrize(
    "text",
    [
        b"# Plan\r\n\r\n- one\r\n",
        b"# Plan\n\r\n- mixed\rends\n",
        b"# Plan, and no line end",
        b"\xef\xbb\xbf# With a byte order mark\n",
        b"# NUL \0 bytes\n",
        b"x" * 1_500_000,
        LONG,
        b"",
    ],
    ids=["crlf", "mixed", "no-end", "bom", "nul", "one-line", "5-mib", "empty"],
)
def test_every_text_arrives_unchanged(shared_board: Board, text: bytes) -> None:
    server, ana, ben = shared_board
    plan = text_files(ana, ben, new_task(ana, "Odd"))
    plan[0].write_bytes(text)
    same((*plan, server.lattice_dir() / "plans" / plan[0].name), text)


def test_two_edits_of_five_mib_are_merged(shared_board: Board) -> None:
    _server, ana, ben = shared_board
    plan = text_files(ana, ben, new_task(ana, "Large"))
    plan[0].write_bytes(LONG)
    same(plan, LONG)
    plan[0].write_bytes(LONG.replace(b"step 7,", b"step 7, by ana,"))
    plan[1].write_bytes(LONG.replace(b"step 63000,", b"step 63000, by ben,"))
    same(plan, LONG.replace(b"step 7,", b"step 7, by ana,").replace(b"step 63000,", b"step 63000, by ben,"))


def test_a_text_that_is_not_utf8_stays_local_and_delays_no_other(shared_board: Board) -> None:
    _server, ana, ben = shared_board
    short_id = new_task(ana, "Latin")
    plan, notes = text_files(ana, ben, short_id), text_files(ana, ben, short_id, "notes")
    plan[0].write_bytes(b"# Caf\xe9\n")
    notes[0].write_text("# Notes\n")
    same(notes, "# Notes\n")
    wait_for(lambda: status(ana)["refused_edits"], "the refusal")
    said = [ana.run("comment", short_id, "hello", "--actor", "human:ana").stderr for _ in range(2)]
    assert "not UTF-8 text: save it as UTF-8" in said[0] and said[1] == ""
    assert f"plans/{plan[0].name}: refused: " in ana.ok("remote", "status")
    assert plan[0].read_bytes() == b"# Caf\xe9\n" != plan[1].read_bytes()
    plan[0].write_text("# Café\n")
    same(plan, "# Café\n")


# --- created and removed files and tasks ---


def test_a_removed_plan_is_restored(shared_board: Board) -> None:
    _server, ana, ben = shared_board
    plan = text_files(ana, ben, new_task(ana, "Removed"))
    text = plan[1].read_text()
    plan[0].unlink()
    same(plan, text)
    assert status(ana)["unsent_edits"] == []


def test_archiving_a_task_keeps_its_unsent_edit(shared_board: Board) -> None:
    _server, ana, ben = shared_board
    short_id = new_task(ana, "Archived")
    plan = text_files(ana, ben, short_id)
    ben.ok("remote", "agent", "stop")
    plan[1].write_text("# Ben's\n")
    ana.ok("archive", short_id, "--actor", "human:ana")
    ben.ok("list")
    kept = ben.lattice_dir / ".remote/conflicts/plans" / plan[1].name
    wait_for(lambda: kept.exists() and not plan[1].exists(), "ben's text to be copied")
    assert kept.read_text() == "# Ben's\n"
    assert "archived or gone" in ben.ok("remote", "resolve", short_id)
    refused = ben.run("remote", "resolve", short_id, "--mine")
    assert refused.returncode == 1 and "restore it first" in refused.stderr
    ana.ok("unarchive", short_id, "--actor", "human:ana")
    wait_for(plan[1].exists, "the plan to be back")
    ben.ok("remote", "resolve", short_id, "--mine")
    same(plan, "# Ben's\n")


def test_an_append_by_lattice_is_merged_with_an_edit(shared_board: Board) -> None:
    _server, ana, ben = shared_board
    short_id = new_task(ana, "Sent back")
    plan = text_files(ana, ben, short_id)
    text = "# Plan\n\n- first\n- second\n\n## Notes\n\nnothing yet\n"
    plan[0].write_text(text)
    same(plan, text)
    for column in ("in_planning", "planned"):
        ana.ok("status", short_id, column, "--actor", "human:ana")
    ben.ok("remote", "agent", "stop")
    plan[1].write_text(text.replace("- first", "- first, by ben"))
    ana.ok("status", short_id, "in_planning", "--force", "--reason", "not yet", "--actor", "human:ana")
    grown = plan[0].read_text()
    assert grown.startswith(text) and len(grown) > len(text)
    ben.ok("list")
    same(plan, grown.replace("- first", "- first, by ben"))


def test_a_plan_without_a_task_is_rescued(shared_board: Board) -> None:
    """A program that creates tasks offline without lattice leaves such a plan."""
    _server, ana, _ben = shared_board
    plan = ana.lattice_dir / "plans" / "task_01M81V60BHQAM1W2RK0HTW19WB.md"
    plan.write_text("# A task of its own\n")
    wait_for(lambda: not plan.exists(), "the plan to be rescued")
    (kept,) = ana.lattice_dir.glob(f".remote/rescued/*/files/plans/{plan.name}")
    assert kept.read_text() == "# A task of its own\n"
    ana.ok("remote", "rescued", "drop", "--all")


@pytest.mark.parametrize("editor", ["vim", "ed"])
def test_a_real_editor_saves_an_edit(shared_board: Board, editor: str) -> None:
    editor_path = program(editor)
    _server, ana, ben = shared_board
    plan = text_files(ana, ben, new_task(ana, f"By {editor}"))
    argv = [
        editor_path,
        "-es",
        "-u",
        "NONE",
        plan[0].name,
        "-c",
        "%d",
        "-c",
        "0put ='# By hand'",
        "-c",
        "$d",
        "-c",
        "wq",
    ]
    script = "" if editor == "vim" else "1,$c\n# By hand\n.\nw\nq\n"
    command = argv if editor == "vim" else [editor_path, "-s", plan[0].name]
    subprocess.run(command, cwd=plan[0].parent, input=script, text=True, check=True, capture_output=True, timeout=30)
    same(plan, "# By hand\n")
