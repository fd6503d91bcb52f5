"""Conflicts: stored once, reported until resolved, and resolved by an ordinary edit (I4)."""

import base64
import json
from pathlib import Path

import pytest
from client_kit import MINE, PLAN, TASK, ask, ready, run, until
from fake_server import FakeServer
from websockets.asyncio.server import ServerConnection

from lattice_remote.client.agent.service import Service
from lattice_remote.errors import Misuse, Rejected
from lattice_remote.protocol.messages import ClientFrame, Put
from lattice_remote.protocol.operations import MoveFile, digest_of

NOTES = f"notes/{TASK}.md"
SNAPSHOT = f"tasks/{TASK}.json"


async def resolve(service: Service, choice: str | None, task: str = "LAT-42", **fields: object) -> dict[str, object]:
    request: dict[str, object] = {"task": task, "what": None, "choice": choice, "text": None, **fields}
    return await ask(service, "resolve", **request)


@pytest.fixture
async def place(server: FakeServer, service: Service, directory: Path) -> Path:
    """A cache with a conflict in the plan between Ana's text, in a conflict copy, and the server's."""
    server.files |= {PLAN: b"# Plan\n", SNAPSHOT: json.dumps({"id": TASK, "short_id": "LAT-42"}).encode()}
    await ready(service)
    await conflict(server, service, directory, PLAN)
    return directory


async def conflict(
    server: FakeServer, service: Service, directory: Path, path: str, theirs: bytes = b"theirs\n"
) -> None:
    (directory / path).write_bytes(b"mine\n")
    server.put(path, theirs)
    await until(lambda: service._replicator.replica.position.seq == server.seq)
    await ask(service, "push")
    await until(lambda: (directory / path).read_bytes() == theirs)


def conflict_lines(answer: dict[str, object]) -> list[str]:
    return [notice for notice in answer["notices"] if "conflict" in notice]  # type: ignore[attr-defined]


async def test_every_command_reports_it_in_one_line_until_it_is_resolved(
    server: FakeServer, service: Service, place: Path
) -> None:
    for _ in range(2):
        for answer in (await ask(service, "ready"), await run(service, "x"), await ask(service, "push")):
            assert conflict_lines(answer) == [
                f"conflict: your text of the plan of LAT-42 was not sent, it is in .lattice/{MINE}; "
                "see: lattice remote resolve LAT-42"
            ]
    (found,) = (await ask(service, "status"))["conflicts"]  # type: ignore[misc]
    assert (found["short_id"], found["what"], found["copies"]) == ("LAT-42", "plan", [MINE])
    await resolve(service, "theirs")
    assert not conflict_lines(await ask(service, "ready"))


@pytest.mark.parametrize("name", ["LAT-42", "lat-42", TASK, PLAN, MINE, f"/somewhere/.lattice/{PLAN}"])
async def test_a_conflict_is_found_by_each_name_of_its_task(service: Service, place: Path, name: str) -> None:
    (found,) = (await resolve(service, None, name))["conflicts"]  # type: ignore[misc]
    assert found["path"] == PLAN
    assert (place / MINE).exists(), "only told of"


@pytest.mark.parametrize(
    ("choice", "text", "kept"),
    [("mine", None, b"mine\n"), ("theirs", None, b"theirs\n"), ("edited", b"both\n", b"both\n")],
)
async def test_a_conflict_is_resolved_with_the_chosen_text(
    server: FakeServer, service: Service, place: Path, choice: str, text: bytes | None, kept: bytes
) -> None:
    encoded = None if text is None else base64.b64encode(text).decode()
    answer = await resolve(service, choice, text=encoded)
    assert answer["resolved"] == [{"path": PLAN, "outcome": choice}]
    assert (server.files[PLAN], (place / PLAN).read_bytes()) == (kept, kept)
    assert not (place / MINE).exists()
    puts = [frame for frame in server.frames if isinstance(frame, Put)]
    assert [put.base for put in puts[1:]] == ([b"theirs\n"] if choice != "theirs" else [])
    assert (await ask(service, "verify"))["edited"] == ()


async def test_a_text_edited_in_place_resolves_the_conflict(server: FakeServer, service: Service, place: Path) -> None:
    (place / PLAN).write_bytes(b"theirs\nand mine\n")
    await resolve(service, "edited")
    assert server.files[PLAN] == b"theirs\nand mine\n"
    assert not (place / MINE).exists()


async def test_a_concurrent_change_leaves_the_conflict_unresolved(
    server: FakeServer, service: Service, place: Path
) -> None:
    async def others_are_faster(_: ServerConnection, frame: ClientFrame) -> bool:
        if isinstance(frame, Put):
            server.misbehave = None
            server.put(PLAN, b"theirs again\n")
        return False

    server.misbehave = others_are_faster  # type: ignore[assignment]
    with pytest.raises(Rejected, match="others have just changed the same lines"):
        await resolve(service, "mine")
    await until(lambda: (place / PLAN).read_bytes() == b"theirs again\n")
    assert (place / MINE).read_bytes() == b"mine\n"
    await resolve(service, "mine")
    assert server.files[PLAN] == b"mine\n"


async def test_a_save_during_the_transfer_is_kept(server: FakeServer, service: Service, place: Path) -> None:
    async def somebody_saves(_: ServerConnection, frame: ClientFrame) -> bool:
        if isinstance(frame, Put):
            (place / MINE).write_bytes(b"mine, with one more thought\n")
        return False

    server.misbehave = somebody_saves  # type: ignore[assignment]
    await resolve(service, "mine")
    assert server.files[PLAN] == b"mine\n"
    assert (place / MINE).read_bytes() == b"mine, with one more thought\n"
    assert conflict_lines(await ask(service, "ready"))


async def test_a_conflict_is_kept_if_the_server_is_unreachable(
    server: FakeServer, service: Service, place: Path
) -> None:
    await server.stop()
    await until(lambda: not service._connection.is_open)
    with pytest.raises(Exception, match="cannot reach"):
        await resolve(service, "mine")
    assert (place / MINE).read_bytes() == b"mine\n"
    await resolve(service, "theirs")


async def test_plan_and_notes_are_resolved_together_or_separately(
    server: FakeServer, service: Service, place: Path
) -> None:
    server.put(NOTES, b"# Notes\n")
    await until((place / NOTES).exists)
    await conflict(server, service, place, NOTES)
    assert "2 conflicts: your texts for LAT-42 were not sent" in conflict_lines(await ask(service, "ready"))[0]
    with pytest.raises(Misuse, match="name one of them"):
        await resolve(service, "edited", text=base64.b64encode(b"x").decode())
    await resolve(service, "theirs", what="notes")
    assert (place / MINE).exists() and not (place / f".remote/conflicts/{NOTES}").exists()
    await conflict(server, service, place, NOTES, b"theirs once more\n")
    await resolve(service, "mine")
    assert (server.files[PLAN], server.files[NOTES]) == (b"mine\n", b"mine\n")
    with pytest.raises(Misuse, match="no conflict in the plan or notes of LAT-42"):
        await resolve(service, "mine")


async def test_one_of_several_conflicts_must_be_named(server: FakeServer, service: Service, place: Path) -> None:
    (place / PLAN).write_bytes(b"mine once more\n")
    server.put(PLAN, b"theirs once more\n")
    await until(lambda: service._replicator.replica.position.seq == server.seq)
    await ask(service, "push")
    await until((place / MINE.replace(".md", ".2.md")).exists)
    with pytest.raises(Misuse, match="several texts of yours"):
        await resolve(service, "mine")
    text = base64.b64encode((place / MINE.replace(".md", ".2.md")).read_bytes()).decode()
    await resolve(service, "edited", text=text)
    assert server.files[PLAN] == b"mine once more\n" and not list((place / MINE).parent.iterdir())


async def test_for_an_archived_task_only_the_servers_text_can_be_kept(
    server: FakeServer, service: Service, place: Path
) -> None:
    server.change(
        MoveFile(PLAN, f"archive/{PLAN}", digest_of(server.files[PLAN])),
        MoveFile(SNAPSHOT, f"archive/{SNAPSHOT}", digest_of(server.files[SNAPSHOT])),
    )
    await until(lambda: not (place / SNAPSHOT).exists())
    with pytest.raises(Misuse, match="LAT-42 is archived"):
        await resolve(service, "mine")
    assert (place / MINE).read_bytes() == b"mine\n"
    await resolve(service, "theirs")
    assert not (place / MINE).exists()


@pytest.mark.parametrize("choice", ["mine", "edited"])
async def test_a_conflict_is_resolved_only_after_the_servers_text_arrived(
    server: FakeServer, service: Service, directory: Path, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file still holds the conflicting text. Sent with itself as base it would be no edit, and be lost."""
    monkeypatch.setattr("lattice_remote.client.agent.edit_sync.SAVING_S", 0.2)
    server.files |= {PLAN: b"# Plan\n", SNAPSHOT: json.dumps({"id": TASK, "short_id": "LAT-42"}).encode()}
    await ready(service)
    with (directory / PLAN).open("wb") as file:
        file.write(b"mine\n")
        file.flush()
        server.put(PLAN, b"theirs\n")
        await until(lambda: service._replicator.replica.position.seq == server.seq)
        await ask(service, "push")
        assert (directory / MINE).read_bytes() == b"mine\n"
        with pytest.raises(Rejected, match="has not arrived yet"):
            await resolve(service, choice)
    await ready(service)
    await until(lambda: (directory / PLAN).read_bytes() == b"theirs\n")
    await resolve(service, "mine")
    assert (server.files[PLAN], (directory / PLAN).read_bytes()) == (b"mine\n", b"mine\n")


@pytest.mark.parametrize("fields", [{"choice": "all"}, {"choice": "edited", "text": "no base64!"}])
async def test_an_invalid_request_changes_nothing(service: Service, place: Path, fields: dict[str, str]) -> None:
    with pytest.raises(Misuse):
        await resolve(service, **{"choice": None, **fields})  # type: ignore[arg-type]
    assert (place / MINE).exists()


async def test_a_save_from_an_outdated_editor_undoes_nothing(
    server: FakeServer, service: Service, directory: Path
) -> None:
    """The server receives the text that the editor had opened, and its merge replaces the save."""
    lines = b"# Plan\n\n- write the parser\n- test the parser\n"
    server.files |= {PLAN: lines, SNAPSHOT: b"{}\n"}
    await ready(service)
    server.put(PLAN, lines + b"- ask Ben about Unicode\n")
    await until(lambda: (directory / PLAN).read_bytes() == server.files[PLAN])
    (directory / PLAN).write_bytes(lines.replace(b"# Plan", b"# The plan"))
    server.put_outcome = "merged"
    answer = await ask(service, "push")
    (put,) = [frame for frame in server.frames if isinstance(frame, Put)]
    assert put.base == lines
    assert "reload it" in answer["notices"][0]  # type: ignore[index]
    await until(lambda: (directory / PLAN).read_bytes() == server.files[PLAN])
    assert (await ask(service, "status"))["unsent_edits"] == []


LINES = b"# Plan\n\n- write the parser\n- test the parser\n"


@pytest.mark.parametrize("choice", ["confirm", "mine", "theirs", "edited"])
async def test_an_earlier_version_waits_until_the_user_decides(
    server: FakeServer, service: Service, directory: Path, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Independent of its age and of repeated saves."""
    theirs = LINES + b"- ask Ben about Unicode\n"
    server.files |= {PLAN: LINES, SNAPSHOT: json.dumps({"short_id": "LAT-42"}).encode()}
    await ready(service)
    server.put(PLAN, theirs)
    await until(lambda: (directory / PLAN).read_bytes() == theirs)
    monkeypatch.setattr("lattice_remote.client.cache.edits.KEPT_S", 0.0)
    for _ in range(3):
        (directory / PLAN).write_bytes(LINES)
        answer = await ask(service, "push")
        assert answer["sent"] == [] and server.files[PLAN] == theirs
        (notice,) = (await run(service, "x"))["notices"]  # type: ignore[misc]
        assert "earlier version" in notice and "--confirm" in notice and "resolve LAT-42 --theirs" in notice
    status = await ask(service, "status")
    assert list(status["withheld_edits"]) == status["unsent_edits"] == [PLAN]  # type: ignore[call-overload]
    (shown,) = (await resolve(service, None))["conflicts"]  # type: ignore[misc]
    assert shown["copies"] == [] and "earlier version" in shown["reason"]
    if choice == "confirm":
        assert (await ask(service, "push", confirm=True))["sent"] == [{"path": PLAN, "outcome": "stored"}]
    else:
        text = base64.b64encode(b"# Both\n").decode() if choice == "edited" else None
        await resolve(service, choice, text=text)
    expected = {"theirs": theirs, "edited": b"# Both\n"}.get(choice, LINES)
    await until(lambda: (directory / PLAN).read_bytes() == server.files[PLAN] == expected)
    await until(lambda: not service._replicator.edits.scan())
    notices = (await ask(service, "ready"))["notices"]
    assert ["rescued" in notice for notice in notices] == [True] * (choice == "edited")  # type: ignore[attr-defined]
    assert (await resolve(service, None, ""))["conflicts"] == []


async def test_a_user_reverting_an_own_edit_is_an_edit(server: FakeServer, service: Service, directory: Path) -> None:
    """A checkbox is toggled twice without changes by others in between."""
    ticked = LINES.replace(b"- test", b"- [x] test")
    server.files |= {PLAN: LINES, SNAPSHOT: b"{}\n"}
    await ready(service)
    for text in (ticked, LINES, ticked, LINES):
        (directory / PLAN).write_bytes(text)
        await ask(service, "push")
        assert server.files[PLAN] == text


async def test_changes_of_the_users_own_commands_are_not_those_of_others(
    server: FakeServer, service: Service, directory: Path
) -> None:
    """An open editor overwrites text that the user's own ``lattice status`` appended, as it would locally."""
    server.files |= {PLAN: LINES, SNAPSHOT: b"{}\n"}
    await ready(service)
    await run(service, "append", PLAN, "## Sent back\n\nnot yet\n")
    assert (directory / PLAN).read_bytes() == LINES + b"## Sent back\n\nnot yet\n"
    for text in (LINES + b"- rewritten in the editor\n", LINES):
        (directory / PLAN).write_bytes(text)
        assert (await ask(service, "push"))["sent"] == [{"path": PLAN, "outcome": "stored"}]
        assert server.files[PLAN] == text
