"""Several commands as one call in a worker: atomic, each checked like a single command."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from worker_process import ANA, WorkerProcess, change_of, make_project, tree_of

from lattice_remote.protocol.messages import Refused, Returned

JSON_ANA = ["--json", *ANA]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with WorkerProcess(make_project(tmp_path_factory.mktemp("commands") / "web")) as started:
        yield started


@pytest.fixture
def task(worker: WorkerProcess) -> str:
    return str(json.loads(worker.ok("create", "x", *JSON_ANA))["data"]["id"])


def together(worker: WorkerProcess, *lines: list[str]) -> tuple[Any, Returned | Refused]:
    done, answer = worker.call("commands", "together", {"lines": list(lines)})
    assert isinstance(answer, Returned | Refused)
    return done, answer


def test_all_of_them_are_one_change_with_what_each_has_printed(worker: WorkerProcess, task: str) -> None:
    done, answer = together(
        worker, ["update", task, "title=y", *JSON_ANA], ["assign", task, "agent:z", "--json", "--actor=agent:b"]
    )
    assert isinstance(answer, Returned) and answer.status == 200, answer
    printed = json.loads(answer.payload)
    assert printed["ok"] and [data["assigned_to"] for data in printed["data"]] == [None, "agent:z"]
    change = change_of(done)
    assert change is not None
    assert (change.actor, change.command) == ("human:ana", "commands: update, assign")


@pytest.mark.parametrize(
    "last",
    [
        ["status", "done", "--json", *ANA],  # lattice refuses it
        ["comment", "", "--json", *ANA],
        ["update", "--json", *ANA],
    ],
)
def test_commands_before_a_refused_one_are_undone(worker: WorkerProcess, task: str, last: list[str]) -> None:
    before = tree_of(worker.project / ".lattice")
    done, answer = together(worker, ["update", task, "title=y", *JSON_ANA], [last[0], task, *last[1:]])
    assert isinstance(answer, Returned) and answer.status == 422, answer
    assert json.loads(answer.payload)["ok"] is False
    assert done.change is None and done.hooks == []
    assert tree_of(worker.project / ".lattice") == before
    assert worker.reconcile().change is None


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (["update", "TASK", "title=z", "--json", "--actor=human:bob"], "REMOTE_FORBIDDEN"),
        (["update", "TASK", "title=z", *ANA], "REMOTE_UNSUPPORTED"),  # no JSON
        (["--help"], "REMOTE_UNSUPPORTED"),
        (["update", "--nonsense", "--json"], "REMOTE_UNSUPPORTED"),
        (["dashboard", "--json"], "REMOTE_UNSUPPORTED"),
        (["comment", "TASK", "--file", "/etc/passwd", "--json", *ANA], "REMOTE_UNSUPPORTED"),
        ([], "REMOTE_PROTOCOL"),
        ([7], "REMOTE_PROTOCOL"),
    ],
)
def test_a_line_that_may_not_run_keeps_the_others_from_running(
    worker: WorkerProcess, task: str, line: list[str], code: str
) -> None:
    before = tree_of(worker.project / ".lattice")
    done, answer = together(
        worker, ["update", task, "title=y", *JSON_ANA], [task if word == "TASK" else word for word in line]
    )
    assert isinstance(answer, Refused) and answer.code == code, answer
    assert done.change is None
    assert tree_of(worker.project / ".lattice") == before


def test_a_claim_is_a_line_of_next(worker: WorkerProcess, task: str) -> None:
    line = ["next", "--claim", "--json", "--actor=agent:z"]
    for payload, code in (
        ({"task": task, "line": ["next", "--json", "--actor=agent:z"]}, "REMOTE_UNSUPPORTED"),
        ({"task": task, "line": ["archive", task, *JSON_ANA]}, "REMOTE_UNSUPPORTED"),
        ({"task": task}, "REMOTE_PROTOCOL"),
    ):
        answer = worker.call("commands", "claim", payload)[1]
        assert isinstance(answer, Refused) and answer.code == code, payload
    answer = worker.call("commands", "claim", {"task": "../x", "line": line})[1]
    assert isinstance(answer, Returned) and answer.status == 422 and b"INVALID_ID" in answer.payload
    path = worker.project / ".lattice" / "plans" / f"{task}.md"
    path.write_text("# x\n\n- y\n")
    answer = worker.call("commands", "claim", {"task": task, "line": line})[1]
    assert isinstance(answer, Returned) and answer.status == 200, answer
    assert json.loads(answer.payload)["data"][0]["id"] == task
    picked = json.loads(worker.ok("next", "--json", "--actor", "agent:q"))["data"]
    assert picked["id"] != task, "next picks as before"
