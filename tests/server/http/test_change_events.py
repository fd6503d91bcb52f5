"""Events of a change, and positions in the stream of events."""

import json
from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_remote.protocol.messages import Change, Position
from lattice_remote.protocol.operations import (
    AnnounceFile,
    AppendBytes,
    DeleteFile,
    MergeJson,
    MoveFile,
    Operation,
    PutFile,
)
from lattice_remote.server.http.change_events import ChangeEvent, EventId, Wanted, block, blocks, events_of

TASK, OTHER, RES = f"task_{'0' * 26}", f"task_{'1' * 26}", f"res_{'2' * 26}"
LOG, SNAPSHOT, ARCHIVED = f"events/{TASK}.jsonl", f"tasks/{TASK}.json", f"archive/tasks/{TASK}.json"
LINE = b'{"id":"ev_1","type":"x"}\n'
ONE, TWO = b"1" * 32, b"2" * 32
AT = Position("e0", 7, b"\xab")


def change(*ops: Operation, cause: str = "0" * 32) -> Change:
    return Change(7, b"m", "2030-01-01T00:00:00.000Z", "human:ana", "tok_1", cause, "x", list(ops))


def append(path: str, data: bytes = LINE) -> AppendBytes:
    return AppendBytes(path, 0, bytes(32), data)


def told(*ops: Operation, cause: str = "0" * 32, **contents: bytes) -> list[tuple[str, dict]]:
    """Return kind and data of each event except the last, as a client parses them.

    ``contents`` are keyed by the digest's first digit.
    """
    events = events_of(change(*ops, cause=cause))
    found = {e.wanted: contents[f"d{e.wanted.digest[:1].decode()}"] for e in events if e.wanted and contents}
    read = _read(*events, contents=found)
    assert [kind for kind, _ in read].index("change") == len(read) - 1
    for kind, data in read:
        assert data.pop("type") == data.get("event", {"type": kind})["type"]
        assert data.pop("task_id", None) == data.get("task")
    return read[:-1]


def _read(*events: ChangeEvent, contents: Mapping[Wanted, bytes] | None = None) -> list[tuple[str, dict]]:
    sent = b"".join(blocks(AT, events, contents or {})).decode()
    return [
        (text.split("\n")[0].removeprefix("event: "), json.loads(text.split("\n")[2].removeprefix("data: ")))
        for text in sent.removesuffix("\n\n").split("\n\n")
    ]


CASES: dict[str, tuple[list[Operation], list[tuple[str, dict]]]] = {
    "a new task": (
        [
            PutFile(LOG, LINE),
            append("events/_lifecycle.jsonl"),
            PutFile(SNAPSHOT, b'{\n  "title": "T"\n}\n'),
            PutFile(f"plans/{TASK}.md", b"#"),
            MergeJson("ids.json", b"{}", ONE),
        ],
        [
            ("task_event", {"task": TASK, "event": {"id": "ev_1", "type": "x"}}),
            ("task_snapshot", {"task": TASK, "archived": False, "gone": False, "snapshot": {"title": "T"}}),
            ("text", {"task": TASK, "text": "plan"}),
        ],
    ),
    "a patch of a large snapshot": (
        [append(LOG), MergeJson(SNAPSHOT, b'{"title":"U"}', ONE)],
        [
            ("task_event", {"task": TASK, "event": {"id": "ev_1", "type": "x"}}),
            ("task_snapshot", {"task": TASK, "archived": False, "gone": False, "snapshot": {"one": 1}}),
        ],
    ),
    "a task that goes to the archive": (
        [
            append(LOG),
            PutFile(ARCHIVED, b'{"title": "T"}'),
            DeleteFile(SNAPSHOT),
            MoveFile(LOG, f"archive/{LOG}", ONE),
            MoveFile(f"plans/{TASK}.md", f"archive/plans/{TASK}.md", ONE),
        ],
        [
            ("task_event", {"task": TASK, "event": {"id": "ev_1", "type": "x"}}),
            ("task_snapshot", {"task": TASK, "archived": True, "gone": False, "snapshot": {"title": "T"}}),
        ],
    ),
    "a snapshot that is moved as it is": (
        [MoveFile(SNAPSHOT, ARCHIVED, TWO)],
        [("task_snapshot", {"task": TASK, "archived": True, "gone": False, "snapshot": {"two": 2}})],
    ),
    "a snapshot that is written, then moved": (
        [PutFile(SNAPSHOT, b'{"n": 1}'), MoveFile(SNAPSHOT, ARCHIVED, TWO)],
        [("task_snapshot", {"task": TASK, "archived": True, "gone": False, "snapshot": {"n": 1}})],
    ),
    "a task that is removed": (
        [DeleteFile(SNAPSHOT), DeleteFile(LOG)],
        [
            ("task_snapshot", {"task": TASK, "archived": False, "gone": True, "snapshot": None}),
            ("files", {"paths": [LOG], "more": 0}),
        ],
    ),
    "a resource": (
        [append(f"events/{RES}.jsonl"), PutFile("resources/gpu/resource.json", b"{}")],
        [("resource_event", {"resource": RES, "name": "gpu", "event": {"id": "ev_1", "type": "x"}})],
    ),
    "notes that are removed": ([DeleteFile(f"notes/{TASK}.md")], [("text", {"task": TASK, "text": "notes"})]),
    "settings and a session": (
        [PutFile("config.json", b"{}"), PutFile("sessions/A-1.json", b"{}")],
        [("files", {"paths": ["config.json", "sessions/A-1.json"], "more": 0})],
    ),
    "what follows from others, alone": (
        [PutFile("ids.json", b"{}")],
        [("files", {"paths": ["ids.json"], "more": 0})],
    ),
    "a log that is not sent": (
        [AnnounceFile(LOG, 9, ONE)],
        [("files", {"paths": [LOG], "more": 0})],
    ),
    "a log with a line that is no JSON": (
        [append(LOG, LINE + b'{"a":\xff}\n')],
        [("files", {"paths": [LOG], "more": 0})],
    ),
    "a snapshot that is no object": (
        [PutFile(SNAPSHOT, b"[1]")],
        [("files", {"paths": [SNAPSHOT], "more": 0})],
    ),
    "two tasks": (
        [PutFile(SNAPSHOT, b'{"n": 1}'), PutFile(f"tasks/{OTHER}.json", b'{"n": 2}'), PutFile(SNAPSHOT, b'{"n": 3}')],
        [
            ("task_snapshot", {"task": TASK, "archived": False, "gone": False, "snapshot": {"n": 3}}),
            ("task_snapshot", {"task": OTHER, "archived": False, "gone": False, "snapshot": {"n": 2}}),
        ],
    ),
    "very many files": (
        [PutFile(f"artifacts/meta/{n}.json", b"{}") for n in range(130)],
        [("files", {"paths": [f"artifacts/meta/{n}.json" for n in range(100)], "more": 30})],
    ),
}


@pytest.mark.parametrize(("ops", "expected"), CASES.values(), ids=CASES)
def test_the_events_of_a_change(ops: list[Operation], expected: list[tuple[str, dict]]) -> None:
    assert told(*ops, d1=b'{"one": 1}', d2=b'{\n "two":\n 2}') == expected


@pytest.mark.parametrize(
    ("kind", "data", "fields"),
    [
        ("status_changed", {"from": "backlog", "to": "done"}, {"status": "done"}),
        ("assignment_changed", {"from": "human:a", "to": None}, {"assigned_to": None}),
        ("field_updated", {"field": "custom_fields.team", "from": None, "to": "web"}, {"custom_fields.team": "web"}),
        ("resource_updated", {"field": "max_holders", "new_value": 2}, {"max_holders": 2}),
        ("comment_added", {"body": "Ünï"}, {"body": "Ünï"}),
        ("task_created", {"title": "T", "type": "bug", "task": "mine"}, {"title": "T"}),
        ("comment_added", {"body": "x" * 100_000}, {}),
        ("status_changed", "odd", None),
        ("field_updated", {"field": 1, "to": 2}, None),
        (["odd"], {}, None),
    ],
)
def test_the_changed_fields_are_at_the_top(kind: object, data: object, fields: dict | None) -> None:
    event = {"id": "ev_1", "type": kind, "data": data}
    [(sent, content), _] = _read(*events_of(change(append(LOG, json.dumps(event).encode() + b"\n"))))
    own = {"task": TASK, "task_id": TASK, "event": event}
    assert (sent, content) == (
        "task_event",
        own | ({"type": "task_event"} if fields is None else {**fields, "type": kind}),
    )


def test_a_file_replaced_by_hand_is_only_named() -> None:
    assert told(PutFile(LOG, LINE), cause="edit") == [("files", {"paths": [LOG], "more": 0})]


def test_a_snapshot_that_is_another_by_now_is_null() -> None:
    [(kind, data)] = told(MergeJson(SNAPSHOT, b"{}", ONE))
    assert (kind, data["snapshot"], data["gone"]) == ("task_snapshot", None, False)


def test_every_event_has_the_position_behind_it() -> None:
    events = events_of(change(append(LOG, LINE * 3)))
    ids = [sent.split(b"\n")[1] for sent in blocks(AT, events, {})]
    assert ids == [b"id: e0-7-ab.1", b"id: e0-7-ab.2", b"id: e0-7-ab.3", b"id: e0-7-ab"]


def test_the_last_event_is_the_change_itself() -> None:
    made = msgspec.structs.replace(change(append(LOG), PutFile(f"plans/{TASK}.md", b"#")), actor="agent:bot")
    made = msgspec.structs.replace(made, token_actor="human:ana")
    last = events_of(made)[-1]
    author = {"actor": "agent:bot", "token_actor": "human:ana", "token_id": "tok_1"}
    when = {"seq": 7, "time": "2030-01-01T00:00:00.000Z", "cause": "0" * 32, "command": "x"}
    assert last.data == author | when | {"tasks": [TASK], "plans": [TASK], "notes": [], "resources": [], "sessions": []}
    assert [event.kind for event in events_of(change())] == ["change"], "a change without operations has a position too"
    by_server = events_of(msgspec.structs.replace(made, actor="server", token_id="", token_actor=""))
    assert by_server[-1].data["token_actor"] == ""
    own = events_of(msgspec.structs.replace(made, token_actor=""))
    assert own[-1].data["token_actor"] == "agent:bot"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "append", "delete", "move", "merge"]),
            st.sampled_from([LOG, SNAPSHOT, ARCHIVED, f"plans/{TASK}.md", "config.json"]),
            st.binary(min_size=1, max_size=60),
        ),
        max_size=6,
    )
)
def test_events_of_any_change_are_reproducible_lines(ops: list[tuple[str, str, bytes]]) -> None:
    makers = {
        "put": PutFile,
        "append": append,
        "delete": lambda path, _: DeleteFile(path),
        "move": lambda path, _: MoveFile(path, ARCHIVED, ONE),
        "merge": lambda path, data: MergeJson(path, data, ONE),
    }
    made = change(*(makers[kind](path, data) for kind, path, data in ops))
    events = events_of(made)
    assert events == events_of(made)
    wanted = {event.wanted: b'{"a":\r1}' for event in events if event.wanted}
    for sent in blocks(AT, events, wanted):
        assert sent.endswith(b"\n\n") and b"\r" not in sent
        lines = sent[:-2].split(b"\n")
        assert [line.partition(b": ")[0] for line in lines] == [b"event", b"id", b"data"]
    # Each path is named by an event, so that a program with a cache knows what to request.
    assert bool(events[:-1]) == bool(ops)


def test_a_position_is_what_its_text_says() -> None:
    assert EventId.parse("12") == EventId(Position("", 12, b""))
    assert EventId.parse("ab12-7-0f") == EventId(Position("ab12", 7, b"\x0f"))
    assert EventId.parse("ab-7-0f.2") == EventId(Position("ab", 7, b"\x0f"), 2)
    assert EventId.parse("ab-0") == EventId(Position("ab", 0, b""))
    assert str(EventId(AT, 2)) == "e0-7-ab.2" and str(Position("e0", 0, b"")) == "e0-0"
    assert (EventId(AT).whole, EventId(AT, 2).whole) == (7, 6)


@pytest.mark.parametrize(
    "text",
    (
        "-|a-|-1|x|1.|a-0.1|1.-2|1e3|٣|1111111111111111111|a b-1-00|1\n|%00-1|a-1|a-1-|a-1-0|a-1-0G|a-0-00|1.2"
        "|a-1-00\n|a-1-00.1\n|a-1-00.|-1-00|" + "a" * 65 + "-1-00|a-1-" + "0" * 66
    ).split("|"),
)
def test_an_invalid_position_is_none(text: str) -> None:
    assert EventId.parse(text) is None


@given(st.text(max_size=40) | st.from_regex(r"[a-f0-9-]{1,30}(\.[0-9]+)?", fullmatch=True))
def test_any_text_is_a_position_or_none(text: str) -> None:
    found = EventId.parse(text)
    assert found is None or str(found) == text or found.position.epoch == "" or text.split("-")[1][0] == "0"


def test_an_event_of_hostile_names_is_three_lines() -> None:
    sent = block("files", EventId(AT), {"paths": ["a\u2028\x85b"]})
    assert sent.count(b"\n") == 4 and Wanted("a", ONE).path == "a"
