"""``StorageBackend``: one test suite for local and remote projects."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from boards import ANA, added, beginning, event, made, made_resource, of_resource, require_sound
from lattice.core.ids import generate_resource_id, generate_task_id  # type: ignore[import-untyped]
from lattice.storage.locks import multi_lock  # type: ignore[import-untyped]

from lattice_remote import RemoteStorage, RemoteWarning, resolve_backend
from lattice_remote.errors import ConnectionFailed, Misuse, Rejected, StorageError
from lattice_remote.storage.events import Conflict, Merged, Snapshot, StorageBackend, Written
from lattice_remote.storage.local import LocalStorage
from preloaded_programs import warm
from sandbox import Client, Server

type Command = Callable[..., str]


class Place:
    """A project and its command line. ``truth`` is the directory in which its files are written."""

    def __init__(self, board: StorageBackend, truth: Path, command: Command) -> None:
        self.board = board
        self.truth = truth
        self.command = command


@pytest.fixture(scope="module")
def local_place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("local")
    env = {"HOME": str(root), "PATH": "/usr/bin:/bin"}

    def command(*argv: str) -> str:
        done = warm().run("lattice", argv, cwd=root, env=env)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    command("init", "--project-code", "LAT", "--actor", ANA, "--no-setup-claude", "--no-setup-agents", "--no-seed")
    return Place(LocalStorage(root), root / ".lattice", command)


@pytest.fixture(scope="module")
def remote_place(shared_board: tuple[Server, Client, Client]) -> Iterator[Place]:
    """Make this process run on Ana's machine with her agent and token."""
    server, ana, _ben = shared_board
    with pytest.MonkeyPatch.context() as environment:
        for name in ("HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "LATTICE_REMOTE_RUNTIME_DIR"):
            environment.setenv(name, ana.env[name])
        yield Place(resolve_backend(ana.dir), server.lattice_dir(), ana.ok)


@pytest.fixture(scope="module", params=["local", "remote"])
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(f"{request.param}_place")
    return found


@pytest.fixture
def board(place: Place, tmp_path: Path) -> Iterator[StorageBackend]:
    """Yield the board. Afterwards check that the project is sound."""
    yield place.board
    require_sound(place.truth, tmp_path)


# --- reading ---


def test_both_are_storage_backends(board: StorageBackend) -> None:
    assert isinstance(board, StorageBackend)
    assert (board.root_path / ".lattice" / "config.json").is_file()


def test_writes_of_commands_are_read(place: Place, board: StorageBackend) -> None:
    place.command("create", "By a command", "--actor", ANA)
    listed = board.list_tasks()[-1]
    assert listed["title"] == "By a command"
    by_short_id = board.get_task(listed["short_id"].lower())
    assert by_short_id == board.get_task(listed["id"]) == listed
    assert [one["type"] for one in board.get_task_events(listed["short_id"])] == ["task_created"]
    place.command("archive", listed["short_id"], "--actor", ANA)
    assert listed["id"] not in [one["id"] for one in board.list_tasks()]
    assert listed["id"] in [one["id"] for one in board.list_tasks(archived=True)]
    archived = board.get_task(listed["id"])
    assert archived is not None
    assert archived["last_event_id"] == board.get_task_events(listed["id"])[-1]["id"]


@pytest.mark.parametrize("task", ["LAT-9999", "no task", "../config", "task_../../config", "", "task_" + "0" * 26])
def test_a_missing_entry_is_none(forge_on: tuple[StorageBackend, Snapshot], task: str) -> None:
    board, _ = forge_on
    assert board.get_task(task) is None
    assert board.get_task_events(task) == []
    assert board.read_plan(task) is None
    assert board.read_notes(task) is None
    assert board.get_resource(task) is None


# --- writing a task ---


def test_a_task_is_created_as_by_the_command(place: Place, board: StorageBackend) -> None:
    task = made(board, "By a program", description="With words", tags=["a"])
    assert board.get_task(task["short_id"]) == task
    assert board.read_plan(task["id"]) == f"# {task['short_id']}: By a program\n\nWith words\n"
    assert f'"{task["title"]}"' in place.command("show", task["short_id"])
    place.command("comment", task["short_id"], "a command goes on where a program ended", "--actor", ANA)
    assert [one["type"] for one in board.get_task_events(task["id"])] == ["task_created", "comment_added"]


def test_every_kind_of_event_is_written_and_derived_by_lattice(place: Place, board: StorageBackend) -> None:
    other = made(board, "Another")
    task = made(board, "With everything", custom_fields={"size": 3}, assigned_to="agent:x", urgency="high")
    task = added(board, task, "field_updated", {"field": "title", "from": "With everything", "to": "Renamed"})
    task = added(board, task, "field_updated", {"field": "custom_fields.size", "from": 3, "to": {"deep": [1.5, None]}})
    task = added(board, task, "field_updated", {"field": "tags", "from": [], "to": ["a", "b"]})
    task = added(board, task, "assignment_changed", {"from": "agent:x", "to": None})
    task = added(board, task, "comment_added", {"body": "first"}, model="m", session="s", reason="why")
    comment = task["last_event_id"]
    task = added(board, task, "comment_added", {"body": "reviewed", "role": "review", "parent_id": comment})
    task = added(board, task, "reaction_added", {"comment_id": comment, "emoji": "heart"})
    task = added(board, task, "reaction_removed", {"comment_id": comment, "emoji": "heart"})
    edited = {"comment_id": comment, "body": "second", "previous_body": "first"}
    task = added(board, task, "comment_edited", edited)
    task = added(board, task, "comment_deleted", {"comment_id": comment})
    task = added(board, task, "relationship_added", {"type": "blocks", "target_task_id": other["id"], "note": "n"})
    task = added(board, task, "relationship_removed", {"type": "blocks", "target_task_id": other["id"]})
    task = added(board, task, "branch_linked", {"branch": "feat/x"})
    task = added(board, task, "branch_unlinked", {"branch": "feat/x"})
    task = added(board, task, "git_event", {"commit": "abc"})
    task = added(board, task, "x_deployed", {"where": ["here", {"at": 1}]})
    task = added(board, task, "status_changed", {"from": "backlog", "to": "in_planning"})
    task = added(board, task, "status_changed", {"from": "in_planning", "to": "planned"})
    assert isinstance(board.write_plan(task["id"], "# Plan\n\n- do it\n", board.read_plan(task["id"])), Written)
    task = added(board, task, "status_changed", {"from": "planned", "to": "in_progress"})
    back = {"from": "in_progress", "to": "in_planning", "force": True, "reason": "wrong"}
    task = added(board, task, "status_changed", back, reason="wrong")
    assert "## Reset" in (board.read_plan(task["id"]) or "")
    place.command("attach", task["short_id"], "--inline", "text", "--actor", ANA)
    attached = board.get_task(task["id"])
    assert attached is not None
    artifact = attached["evidence_refs"][-1]["id"]
    task = added(board, attached, "artifact_attached", {"artifact_id": artifact})
    assert (task["title"], task["status"], task["comment_count"]) == ("Renamed", "in_planning", 1)
    assert (task["custom_fields"], task["reopened_count"]) == ({"size": {"deep": [1.5, None]}}, 1)
    assert board.get_task(task["id"]) == task


def test_several_events_are_one_write(board: StorageBackend) -> None:
    first = beginning("At once")
    moved = event("status_changed", first["task_id"], {"from": "backlog", "to": "planned"})
    said = event("comment_added", first["task_id"], {"body": "and said"})
    replied = event("comment_added", first["task_id"], {"body": "and replied", "parent_id": said["id"]})
    written = board.write_task(first["task_id"], [first, moved, said, replied], None)
    assert isinstance(written, Written)
    assert (written.content["status"], written.content["comment_count"]) == ("planned", 2)


def test_one_invalid_event_among_valid_ones_prevents_the_write(board: StorageBackend) -> None:
    task = made(board)
    good = event("comment_added", task, {"body": "good"})
    bad = event("status_changed", task, {"from": "done", "to": "planned"})
    with pytest.raises(Rejected):
        board.write_task(task["id"], [good, bad], task["last_event_id"])
    assert board.get_task(task["id"]) == task


def test_times_and_creation_order_are_the_writers(board: StorageBackend) -> None:
    """A program may have a wrong clock or send false times."""
    first = beginning("From 1970")
    first |= {"ts": "1970-01-01T00:00:00Z", "id": "ev_" + "0" * 26}
    written = board.write_task(first["task_id"], [first], None)
    assert isinstance(written, Written)
    assert written.content["created_at"] > "2020"
    assert written.content["last_event_id"] > "ev_01"


def test_a_session_may_write(place: Place, board: StorageBackend) -> None:
    place.command("session", "start", "--name", "Argus", "--model", "m", "--framework", "f", "--json")
    task = made(board)
    place.command("comment", task["short_id"], "as a session", "--name", "Argus-1")
    actor = board.get_task_events(task["id"])[-1]["actor"]
    now = board.get_task(task["id"])
    assert now is not None
    assert added(board, now, "comment_added", {"body": "too"}, actor=actor)["comment_count"] == 2
    place.command("session", "end", "Argus-1")
    with pytest.raises(Rejected, match="session"):
        added(board, board.get_task(task["id"]) or {}, "comment_added", {"body": "late"}, actor=actor)


# --- conflicts ---


def test_an_outdated_base_returns_a_conflict(board: StorageBackend) -> None:
    task = made(board)
    newer = added(board, task, "comment_added", {"body": "meanwhile"})
    late = event("status_changed", task, {"from": "backlog", "to": "planned"})
    expected = Conflict(task["last_event_id"], newer["last_event_id"])
    assert board.write_task(task["id"], [late], task["last_event_id"]) == expected
    assert board.write_task(task["id"], [late], None) == Conflict(None, newer["last_event_id"])
    assert isinstance(board.write_task(task["id"], [late], newer["last_event_id"]), Written)


def test_a_removed_task_is_a_conflict(place: Place, board: StorageBackend) -> None:
    task = made(board)
    place.command("archive", task["short_id"], "--actor", ANA)
    late = event("comment_added", task, {"body": "late"})
    assert board.write_task(task["id"], [late], task["last_event_id"]) == Conflict(task["last_event_id"], None)
    with pytest.raises(Rejected, match="unarchive"):
        board.write_task(task["id"], [event("task_created", task, {})], None)


def test_one_of_several_writers_on_one_base_wins(board: StorageBackend) -> None:
    """Each thread writes a claim based on the same event. Exactly one is written."""
    task, ready = made(board), threading.Barrier(6)

    def claim(number: int) -> object:
        ready.wait()
        to = {"from": None, "to": f"agent:racer-{number}"}
        return board.write_task(task["id"], [event("assignment_changed", task, to)], task["last_event_id"])

    with ThreadPoolExecutor(6) as racers:
        outcomes = list(racers.map(claim, range(6)))
    assert sorted(type(one).__name__ for one in outcomes) == ["Conflict"] * 5 + ["Written"]
    now = board.get_task(task["id"])
    assert now is not None
    assert {one.found for one in outcomes if isinstance(one, Conflict)} == {now["last_event_id"]}


# --- refusals ---

_FORGED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("another task", {"task_id": "task_" + "1" * 26}, {}),
    ("a resource", {"resource_id": "res_" + "1" * 26}, {}),
    ("an id with separators", {"id": "ev_../../../../config.json"}, {}),
    ("an id in small letters", {"id": "ev_" + "a" * 26}, {}),
    ("no id", {"id": None}, {}),
    ("a field of a snapshot", {"last_event_id": "ev_" + "1" * 26}, {}),
    ("another schema", {"schema_version": 2}, {}),
    ("a type of nobody", {"type": "task_blessed"}, {}),
    ("a type that moves files", {"type": "task_archived", "data": {}}, {}),
    ("a short id of its own", {"type": "task_short_id_assigned", "data": {"short_id": "LAT-1"}}, {}),
    ("a second beginning", {"type": "task_created"}, {}),
    ("an event of a resource", {"type": "resource_acquired", "data": {"holder": ANA}}, {}),
    ("nobody", {"actor": "nobody"}, {}),
    ("an actor with a line", {"actor": "human:ana\nhuman:ben"}, {}),
    ("an actor of no session", {"actor": {"name": "Zeus-1", "base_name": "Zeus", "serial": 1}}, {}),
    ("an actor that names a file", {"actor": {"name": "../config"}}, {}),
    ("a field that data has not", {}, {"body": "x", "author": "human:ben"}),
    ("no data", {"data": None}, {}),
    ("a body that is none", {}, {"body": ["x"]}),
    ("an empty body", {}, {"body": "  "}),
    ("a reply to nothing", {}, {"body": "x", "parent_id": "ev_" + "1" * 26}),
    ("a protected field", {"type": "field_updated"}, {"field": "last_event_id", "from": None, "to": "x"}),
    ("a field of nobody", {"type": "field_updated"}, {"field": "colour", "from": None, "to": "red"}),
    ("a title that is none", {"type": "field_updated"}, {"field": "title", "from": "A task", "to": {"a": 1}}),
    ("a status of nobody", {"type": "status_changed"}, {"from": "backlog", "to": "nowhere"}),
    ("a step too far", {"type": "status_changed"}, {"from": "backlog", "to": "done"}),
    ("a plan that is missing", {"type": "status_changed"}, {"from": "backlog", "to": "in_progress", "force": True}),
    ("a link to nothing", {"type": "relationship_added"}, {"type": "blocks", "target_task_id": "task_" + "1" * 26}),
    ("a link to a file", {"type": "relationship_added"}, {"type": "blocks", "target_task_id": "../config"}),
    ("an artifact that is not there", {"type": "artifact_attached"}, {"artifact_id": "art_" + "1" * 26}),
    ("an artifact that is a file", {"type": "artifact_attached"}, {"artifact_id": "../../config"}),
    ("no number", {"type": "x_odd"}, {"n": float("nan")}),
    ("an infinite number", {"type": "x_odd"}, {"n": float("inf")}),
    ("a huge number", {"type": "x_odd"}, {"n": 10**400}),
    ("a number of more than 64 bits", {"type": "x_odd"}, {"n": 2**63}),
    ("half a character", {"type": "x_odd"}, {"n": "\ud800"}),
    ("a NUL", {"type": "x_odd"}, {"n": "a\0b"}),
    ("a megabyte", {"type": "x_odd"}, {"n": "x" * (1 << 20)}),
    ("a provenance of its own", {"provenance": {"by": "me"}}, {}),
    ("on behalf of nobody", {"provenance": {"on_behalf_of": "nobody"}}, {}),
]


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"d": value}
    return value


@pytest.mark.parametrize(("envelope", "data"), [case[1:] for case in _FORGED], ids=[case[0] for case in _FORGED])
def test_a_forged_event_is_refused(forge_on: tuple[StorageBackend, Snapshot], envelope: dict, data: dict) -> None:  # type: ignore[type-arg]
    board, task = forge_on
    forged = {**event("comment_added", task, data or {"body": "x"}), **envelope}
    with pytest.raises(Rejected) as refused:
        board.write_task(task["id"], [forged], task["last_event_id"])
    assert refused.value.code == "REMOTE_INVALID"
    assert "\n" not in refused.value.message
    assert board.get_task(task["id"]) == task


@pytest.mark.parametrize("levels", [70, 5000])
def test_deep_nesting_is_refused(forge_on: tuple[StorageBackend, Snapshot], levels: int) -> None:
    board, task = forge_on
    with pytest.raises(Rejected, match="deeper"):
        added(board, task, "x_odd", deep(levels))


def test_too_many_no_and_duplicate_events_are_refused(forge_on: tuple[StorageBackend, Snapshot]) -> None:
    board, task = forge_on
    one = event("x_odd", task, {})
    for events in ([], [one] * 100_000, [one, one], [board.get_task_events(task["id"])[0]]):
        with pytest.raises(Rejected):
            board.write_task(task["id"], events, task["last_event_id"])
    assert len(board.get_task_events(task["id"])) == 1


@pytest.fixture(scope="module")
def forge_on(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StorageBackend, Snapshot]]:
    """Yield a task that no test may change. Afterwards check that the project is sound."""
    yield place.board, made(place.board)
    require_sound(place.truth, tmp_path_factory.mktemp("forged"))


@pytest.mark.parametrize("task_id", ["task_../../config", "task_" + "a" * 26, "LAT-77777", "", "../x"])
def test_a_task_is_created_only_under_a_valid_id(forge_on: tuple[StorageBackend, Snapshot], task_id: str) -> None:
    board, _ = forge_on
    with pytest.raises(Rejected):
        board.write_task(task_id, [event("task_created", task_id, beginning()["data"])], None)


def test_a_new_task_with_a_short_id_is_refused(board: StorageBackend) -> None:
    with pytest.raises(Rejected, match="short_id"):
        made(board, short_id="LAT-1")


# --- resources ---


def test_a_resource_is_created_held_and_released(place: Place, board: StorageBackend) -> None:
    browser = made_resource(board, "browser", description="one at a time", ttl_seconds=100)
    assert board.get_resource("browser") == board.get_resource(browser["id"]) == browser

    def then(kind: str, data: dict[str, Any], actor: str = ANA) -> Snapshot:
        now = board.get_resource("browser")
        assert now is not None
        written = board.write_resource("browser", [of_resource(kind, now, data, actor=actor)], now["last_event_id"])
        assert isinstance(written, Written)
        assert board.get_resource("browser") == written.content
        return written.content

    held = then("resource_acquired", {"holder": ANA, "expires_at": "9999-01-01T00:00:00Z"})
    assert held["holders"][0]["expires_at"] < "2999", "the time to live is the resource's own"
    assert "HELD by human:ana" in place.command("resource", "list")
    then("resource_heartbeat", {"holder": ANA})
    then("resource_expired", {"holder": ANA, "expired_at": held["updated_at"], "reclaimed_by": "agent:x"}, "agent:x")
    then("resource_acquired", {"holder": "agent:x"}, "agent:x")
    then("resource_released", {"holder": "agent:x"}, "agent:x")
    assert then("resource_updated", {"field": "max_holders", "new_value": 2})["max_holders"] == 2
    assert "browser" in [one["name"] for one in board.list_resources()]


def test_an_outdated_base_of_a_resource_is_a_conflict(board: StorageBackend) -> None:
    camera = made_resource(board, "camera")
    taken = board.write_resource(
        "camera", [of_resource("resource_acquired", camera, {"holder": ANA})], camera["last_event_id"]
    )
    assert isinstance(taken, Written)
    late = of_resource("resource_acquired", camera, {"holder": "agent:x"}, actor="agent:x")
    now = taken.content["last_event_id"]
    assert board.write_resource("camera", [late], camera["last_event_id"]) == Conflict(camera["last_event_id"], now)
    assert board.write_resource("camera", [late], None) == Conflict(None, now)
    with pytest.raises(Rejected, match="held by others"):
        board.write_resource("camera", [late], now)
    free = of_resource("resource_released", camera, {"holder": ANA})
    assert isinstance(board.write_resource("camera", [free], now), Written)


_NO_RESOURCES: list[tuple[str, dict[str, Any]]] = [
    ("../sessions", {}),
    ("a:b", {}),
    (".hidden", {}),
    ("x" * 241, {}),
    ("e\u0301", {}),
    ("fine", {"called": "other"}),
    ("fine", {"max_holders": 0}),
    ("fine", {"ttl_seconds": 10**15}),
    ("fine", {"holders": [{"actor": ANA}]}),
]


@pytest.mark.parametrize(("name", "data"), _NO_RESOURCES)
def test_a_forged_resource_is_refused(
    forge_on: tuple[StorageBackend, Snapshot], name: str, data: dict[str, Any]
) -> None:
    board, _ = forge_on
    with pytest.raises(Rejected):
        made_resource(board, name, **data)
    assert board.get_resource(name) is None


def test_forged_events_of_a_resource_are_refused(board: StorageBackend) -> None:
    lamp = made_resource(board, "lamp")
    with pytest.raises(Rejected, match="case"):
        made_resource(board, "Lamp")
    forged = [
        of_resource("resource_acquired", lamp, {"holder": "human:ben"}),
        of_resource("resource_acquired", lamp, {"holder": ANA, "task_id": "task_../x"}),
        of_resource("resource_released", lamp, {"holder": ANA}),
        of_resource("resource_heartbeat", lamp, {"holder": ANA}),
        of_resource("resource_updated", lamp, {"field": "id", "new_value": "res_" + "1" * 26}),
        of_resource("resource_updated", lamp, {"field": "max_holders", "new_value": True}),
        of_resource("resource_acquired", generate_resource_id(), {"holder": ANA}),
        event("task_created", generate_task_id(), beginning()["data"]),
        of_resource("x_custom", lamp, {}),
    ]
    for one in forged:
        with pytest.raises(Rejected):
            board.write_resource("lamp", [one], lamp["last_event_id"])
    assert board.get_resource("lamp") == lamp


# --- plans and notes ---

_ODD_TEXTS = ["", "no final line end", "windows\r\nlines\r\n", "naïve ☃\u2028\n", "a\n" * 2000]


@pytest.mark.parametrize("text", _ODD_TEXTS)
def test_a_text_is_read_as_it_was_written(board: StorageBackend, text: str) -> None:
    task = made(board)
    base = board.read_plan(task["short_id"])
    assert board.write_plan(task["short_id"], text, base) == Written(text)
    assert board.read_plan(task["id"]) == text
    assert board.read_notes(task["id"]) is None
    assert board.write_notes(task["id"], text, None) == Written(text)
    assert board.write_notes(task["id"], text, None) == Written(text), "nothing more to do"
    assert board.read_notes(task["id"]) == text


def test_texts_are_merged_by_line_and_changes_of_the_same_lines_conflict(board: StorageBackend) -> None:
    task = made(board)
    base = "one\ntwo\nthree\nfour\n"
    assert isinstance(board.write_notes(task["id"], base, None), Written)
    assert board.write_notes(task["id"], "ONE\ntwo\nthree\nfour\n", base) == Written("ONE\ntwo\nthree\nfour\n")
    both = "ONE\ntwo\nthree\nFOUR\n"
    assert board.write_notes(task["id"], "one\ntwo\nthree\nFOUR\n", base) == Merged(both)
    assert board.write_notes(task["id"], "eins\ntwo\nthree\nfour\n", base) == Conflict(base, both)
    assert board.write_notes(task["id"], "begun apart", None) == Conflict(None, both)
    assert board.write_notes(task["id"], base, base) == Merged(both), "nothing of one's own"
    assert board.write_plan(task["id"], "mine", "a plan that never was") == Conflict(
        "a plan that never was", board.read_plan(task["id"])
    )
    assert board.write_notes(made(board)["id"], base, base) == Conflict(base, None), "they are gone"
    assert board.read_notes(task["id"]) == both


def test_a_text_without_a_task_or_too_long_is_refused(board: StorageBackend) -> None:
    task = made(board)
    for where, text in ((task["id"], "x" * (1 << 20) + "x"), (task["id"], "\ud800"), ("LAT-9999", "x"), ("../x", "x")):
        with pytest.raises(Rejected):
            board.write_plan(where, text, board.read_plan(task["id"]))


# --- local only: concurrent lattice commands, and kills ---


def _log_of(place: Place, task: Snapshot) -> Path:
    return place.truth / "events" / f"{task['id']}.jsonl"


def test_an_incomplete_line_is_not_read(local_place: Place) -> None:
    task = made(local_place.board)
    log = _log_of(local_place, task)
    before = log.read_bytes()
    log.write_bytes(before + b'{"actor":"human:ana","da')
    assert [one["type"] for one in local_place.board.get_task_events(task["id"])] == ["task_created"]
    log.write_bytes(before)


def test_a_repeated_write_after_a_kill_writes_nothing_twice(local_place: Place, tmp_path: Path) -> None:
    """A program killed between log and snapshot must not append its events again when it retries."""
    board, task = local_place.board, made(local_place.board)
    said = event("comment_added", task, {"body": "once"})
    with _log_of(local_place, task).open("a") as log:
        log.write(json.dumps(said, sort_keys=True, separators=(",", ":")) + "\n")
    with pytest.raises(StorageError, match="lattice rebuild"):
        added(board, task, "comment_added", {"body": "once"})
    local_place.command("rebuild", "--all")
    found = board.write_task(task["id"], [event("comment_added", task, {"body": "once"})], task["last_event_id"])
    assert found == Conflict(task["last_event_id"], said["id"])
    require_sound(local_place.truth, tmp_path)


def test_a_text_is_refused_if_its_task_is_archived_before_the_write(local_place: Place, tmp_path: Path) -> None:
    """`lattice archive` holds the task's lock while it moves its files."""
    board, task = local_place.board, made(local_place.board)
    base = board.read_plan(task["id"])
    with ThreadPoolExecutor(1) as writer, multi_lock(local_place.truth / "locks", [f"tasks_{task['id']}"]):
        late = writer.submit(board.write_plan, task["id"], "late\n", base)
        with pytest.raises(TimeoutError):
            late.result(0.5)  # it waits
        for name in (f"tasks/{task['id']}.json", f"plans/{task['id']}.md"):
            (local_place.truth / name).rename(tmp_path / Path(name).name)
    with pytest.raises(Rejected, match="no active task"):
        late.result(20)
    assert not (local_place.truth / f"plans/{task['id']}.md").exists()
    for name in (f"tasks/{task['id']}.json", f"plans/{task['id']}.md"):
        (tmp_path / Path(name).name).rename(local_place.truth / name)


# --- remote only ---


def test_a_token_writes_only_under_its_own_names_and_sessions(
    shared_board: tuple[Server, Client, Client], remote_place: Place, tmp_path: Path
) -> None:
    _server, _ana, ben = shared_board
    board = remote_place.board
    task = made(board)
    ben.ok("session", "start", "--name", "Hermes", "--model", "m", "--framework", "f")
    ben.ok("comment", task["short_id"], "as a session of Ben's", "--name", "Hermes-1")
    now = board.get_task(task["id"])
    assert now is not None
    hermes = board.get_task_events(task["id"])[-1]["actor"]
    for actor in ("human:ben", "team:core", hermes):
        with pytest.raises(Rejected) as refused:
            added(board, now, "comment_added", {"body": "forged"}, actor=actor)
        assert refused.value.code == "REMOTE_FORBIDDEN"
    assert board.get_task(task["id"]) == now
    require_sound(remote_place.truth, tmp_path)


def test_a_cache_is_never_written_as_a_local_project(remote_place: Place) -> None:
    """I4."""
    task = made(remote_place.board)
    copy = LocalStorage(remote_place.board.root_path)
    assert copy.get_task(task["id"]) == task
    for write in (
        lambda: made(copy),
        lambda: added(copy, task, "comment_added", {"body": "x"}),
        lambda: made_resource(copy, "lathe"),
        lambda: copy.write_notes(task["id"], "x", None),
    ):
        with pytest.raises(Misuse, match="resolve_backend"):
            write()


def test_the_log_has_the_author_of_a_write(shared_board: tuple[Server, Client, Client], remote_place: Place) -> None:
    made(remote_place.board)
    ana = shared_board[1]
    line = ana.ok("remote", "log", "-n", "1")
    assert "human:ana" in line and "storage: write-task" in line


def test_without_an_agent_an_unreachable_server_leaves_stale_reads(
    shared_board: tuple[Server, Client, Client], remote_place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ana, _ben = shared_board
    board = remote_place.board
    assert isinstance(board, RemoteStorage)
    monkeypatch.setenv("LATTICE_REMOTE_AGENT", "off")
    task = made(board, "Directly")
    assert board.get_task(task["id"]) == task
    assert board.freshness().is_current
    server.stop()
    try:
        with pytest.warns(RemoteWarning, match=r"cannot reach server .* the data is \d+ s old"):
            assert board.get_task(task["id"]) == task
        assert not board.freshness().is_current
        with pytest.raises(ConnectionFailed, match="cannot reach"):
            added(board, task, "comment_added", {"body": "offline"})
    finally:
        server.start()
    assert board.get_task(task["id"]) == task


@pytest.mark.parametrize("answer", ["{}", "[]", "no json", '{"outcome": "?"}', '{"error": {}}', '{"error": 1}'])
def test_an_invalid_answer_of_the_server_is_a_connection_error(
    remote_place: Place, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    def ask(_request: object) -> dict[str, Any]:
        return {"payload": answer, "notices": [], "status": 200}

    monkeypatch.setattr("lattice_remote.client.storage.send_request", ask)
    with pytest.raises(ConnectionFailed):
        made(remote_place.board)
