"""Summary of a change: tasks, events and sessions."""

import json

from hypothesis import given
from hypothesis import strategies as st

from lattice_remote.protocol.change_summary import summarize, tasks_in
from lattice_remote.protocol.messages import Change
from lattice_remote.protocol.operations import AnnounceFile, AppendBytes, DeleteFile, MoveFile, Operation, PutFile

TASK, OTHER = f"task_{'0' * 26}", f"task_{'1' * 26}"
LINE = b'{"id":"ev_1","type":"x"}\n'


def change(*ops: Operation, cause: str = "0" * 32) -> Change:
    return Change(1, b"m", "2030-01-01T00:00:00.000Z", "human:ana", "tok_1", cause, "x", list(ops))


def append(path: str, data: bytes = LINE) -> AppendBytes:
    return AppendBytes(path, 0, bytes(32), data)


def test_events_are_those_appended_to_logs_without_the_lifecycle_log() -> None:
    found = summarize(
        change(
            PutFile(f"events/{TASK}.jsonl", LINE + LINE),
            append("events/_lifecycle.jsonl"),
            append(f"archive/events/{OTHER}.jsonl", b'{"id":"ev_2"}\nno json\n[1]\n'),
            append("events/res_1.jsonl"),
            PutFile("resources/gpu/resource.json", b"{}"),
            PutFile(f"tasks/{TASK}.json", b'{"title": "T"}'),
        )
    )
    assert [event["id"] for event in found.events] == ["ev_1", "ev_1", "ev_2", "ev_1"] and found.is_complete
    assert found.tasks == [TASK, OTHER] and found.resources == ["gpu"]
    assert found.snapshots == {TASK: {"title": "T"}}


def test_a_log_replaced_by_hand_or_not_sent_has_unknown_events() -> None:
    by_hand = summarize(change(PutFile(f"events/{TASK}.jsonl", LINE), cause="edit"))
    large = summarize(change(AnnounceFile(f"events/{TASK}.jsonl", 9, bytes(32))))
    assert (by_hand.events, by_hand.is_complete, large.is_complete) == ([], False, False)


def test_a_moved_text_is_not_written_and_archived_sessions_are_named() -> None:
    found = summarize(
        change(
            MoveFile(f"plans/{TASK}.md", f"archive/plans/{TASK}.md", bytes(32)),
            PutFile(f"notes/{OTHER}.md", b"x"),
            DeleteFile("sessions/Argus-3.json"),
            PutFile("sessions/archive/Argus-3_sess_01ABC.json", b"{}"),
            PutFile("sessions/index.json", b"{}"),
        )
    )
    assert (found.plans, found.notes, found.tasks) == ([], [OTHER], [TASK, OTHER])
    assert found.sessions == ["Argus-3"]


@given(st.binary(max_size=200), st.sampled_from([f"events/{TASK}.jsonl", f"tasks/{TASK}.json", "ids.json"]))
def test_any_content_is_accepted(data: bytes, path: str) -> None:
    json.dumps(summarize(change(PutFile(path, data))).events)


def test_deeply_nested_events_are_omitted() -> None:
    assert summarize(change(PutFile(f"events/{TASK}.jsonl", b"[" * 100_000))).events == []


def test_only_files_of_tasks_name_tasks() -> None:
    assert tasks_in([f"tasks/{TASK}.json", f"archive/notes/{OTHER}.md", f"artifacts/{TASK}.json"]) == [TASK, OTHER]
