"""Texts of others are shown in the log, never interpreted."""

import re
from datetime import datetime
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from lattice_remote.errors import printable
from lattice_remote.output import as_lines, as_records, strict_json
from lattice_remote.protocol.messages import LogEntry

TASK = "task_01ARZ3NDEKTSV4RRFFQ69G5FAV"
TIME = "2026-01-02T03:04:05.678Z"


def entry(**fields: Any) -> LogEntry:
    given = {"actor": "human:ana", "token_id": "tok_1", "token_actor": "", "cause": "0" * 32, "command": "x", **fields}
    return LogEntry(seq=7, time=TIME, **{"epoch": "e", "tasks": [TASK], **given})


def test_a_line_says_who_what_when_through_which_token_on_which_task() -> None:
    head, line = as_lines([entry(command="comment LAT-1 hello")], {TASK: "LAT-1"})
    assert head.split() == ["CHANGE", "TIME", "ACTOR", "TOKEN", "TASKS", "COMMAND"]
    local = f"{datetime.fromisoformat(TIME).astimezone():%Y-%m-%d %H:%M:%S}"
    assert re.split(r" {2,}", line) == ["7", local, "human:ana", "tok_1", "LAT-1", "comment LAT-1 hello"]


def test_a_token_of_another_actor_is_shown_beside_the_actor() -> None:
    assert "agent:bot (token of human:ana)" in as_lines([entry(actor="agent:bot", token_actor="human:ana")], {})[1]


def test_an_unrequested_change_has_its_reason() -> None:
    found = entry(actor="server", token_id="", cause="edit", command="changed plans/x.md", tasks=[])
    assert as_lines([found], {})[1].split()[3:] == ["server", "-", "-", "edit:", "changed", "plans/x.md"]


def test_many_tasks_are_counted() -> None:
    line = as_lines([entry(tasks=[f"t{n}" for n in range(5)], more_tasks=10)], {})[1]
    assert " t0,t1,t2,+12 " in line


def test_no_entries_are_no_lines() -> None:
    assert as_lines([], {}) == []


def test_a_line_shows_where_an_epoch_begins() -> None:
    entries = [entry(epoch=epoch, command=f"in {epoch}") for epoch in ("new", "new", "old")]
    shown = as_lines(entries, {}, "new")
    assert [line.split()[-1] for line in shown] == ["COMMAND", "new", "new", "---", "old"]
    assert shown[3] == "--- epoch new begins: the history was restored or replaced ---"
    assert as_lines(entries, {}, "newest")[1].startswith("--- epoch newest begins"), "it may have no entry yet"
    assert as_lines(entries, {}) == shown, "an epoch that is not known is not shown"


def test_records_keep_every_field_and_the_time_as_it_came() -> None:
    (record,) = as_records([entry()], {TASK: "LAT-1"})
    assert record["time"] == TIME and record["tasks"] == [{"id": TASK, "short_id": "LAT-1"}]
    assert (record["actor"], record["token_actor"], record["token_id"]) == ("human:ana", "human:ana", "tok_1")
    assert as_records([entry()], {})[0]["tasks"] == [{"id": TASK, "short_id": None}]


def test_terminal_controls_of_other_people_are_shown_not_obeyed() -> None:
    attack = "\x1b]0;owned\x07 \x1b[2J \r\n \x9b31m \u202e \u2066 \x7f \ud800"
    line = as_lines([entry(command=attack, actor=f"human:{attack}", tasks=[attack], token_id=attack)], {TASK: attack})[
        1
    ]
    assert line.isprintable()
    assert r"\x1b]0;owned\x07" in line and r"\u202e" in line
    assert printable("größer ✓ 漢字") == "größer ✓ 漢字"


@given(st.text())
def test_every_shown_text_is_printable(text: str) -> None:
    assert printable(text).isprintable()
    assert as_lines([entry(command=text, cause=text)], {TASK: text})[1].isprintable()


def test_json_with_half_a_surrogate_pair_is_read_by_strict_parsers() -> None:
    written = strict_json({"path\udcff": ["größe \ud83d", ("🙂", 1, None)]})
    assert msgspec.json.decode(written) == {"path\\udcff": ["größe \\ud83d", ["🙂", 1, None]]}
