"""A token writes in its own name only: no command, option, session or edit changes the actor (I9)."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from values import ACTORS, ALL, Known, Lines
from worker_process import WorkerProcess, answer_of, make_project

from lattice_remote.protocol.messages import Refused, Reply
from lattice_remote.server.worker.policy import ROUTED

OWN = "agent:x"


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerProcess]:
    """A worker on a project that has events and sessions of another actor."""
    with WorkerProcess(make_project(tmp_path / "web")) as started:
        ana = ("--actor", "human:ana")
        for argv in (
            ["create", "one", *ana],
            ["create", "two", *ana],
            ["comment", "LAT-1", "hello", *ana],
            ["resource", "create", "gpu", *ana],
            ["session", "start", "--name", "Ana", "--model", "human"],
            ["session", "start", "--name", "Other", "--model", "m", "--framework", "f"],
            ["session", "start", "--name", "X", "--model", "human"],
            ["session", "start", "--name", "X", "--model", "m", "--framework", "f"],
        ):
            started.ok(*argv, act_as=["*"])
        yield started


def actors(project: Path) -> dict[str, object]:
    """Return the actor of each event of a project, by event id and log."""
    found = {}
    for path in (project / ".lattice").rglob("*.jsonl"):
        for line in path.read_text().splitlines():
            event = json.loads(line)
            found[f"{path.stem} {event['id']}"] = event["actor"]
    return found


def is_own(actor: object) -> bool:
    if isinstance(actor, dict):
        return bool(actor["base_name"].lower() == "x" and actor["model"] != "human" and actor["name"].startswith("X-"))
    return actor == OWN


def run(worker: WorkerProcess, *argv: str) -> Reply | Refused:
    answer = answer_of(worker.run(*argv, actor=OWN, act_as=[]))
    assert isinstance(answer, Reply | Refused)
    return answer


def is_refused(answer: Reply | Refused) -> bool:
    """Report whether the policy or lattice refused a command."""
    return isinstance(answer, Refused) or answer.exit_code != 0


def test_every_routed_command_refuses_every_other_actor_and_session(worker: WorkerProcess) -> None:
    before = actors(worker.project)
    refused = 0
    for path in ROUTED:
        names = {option for parameter in ALL[path].params for option in parameter.opts}
        values = [parameter.name for parameter in ALL[path].params if parameter.param_type_name == "argument"]
        line = [*path.split(), *("LAT-1" if "id" in str(value) else "gpu" for value in values)]
        if "--actor" in names:
            for actor in ACTORS:
                answer = run(worker, *line, "--actor", actor)
                assert is_refused(answer) or actor == OWN, (path, actor)
                refused += is_refused(answer)
            assert isinstance(run(worker, *line, "--actor", OWN, "--actor", "human:ana"), Refused)
        if "--name" in names and path != "session start":
            for session in ("Ana-1", "Other-1", "X-1"):
                assert isinstance(run(worker, *line, "--name", session), Refused), (path, session)
                assert isinstance(run(worker, *line, "--name", session, "--actor", OWN), Refused)
    assert refused > 400
    for session in ("Ana-1", "Other-1", "X-1"):
        assert isinstance(run(worker, "session", "end", session), Refused)
    new = {key: actor for key, actor in actors(worker.project).items() if key not in before}
    assert all(map(is_own, new.values())), new


def test_a_session_starts_in_the_tokens_own_name_only(worker: WorkerProcess) -> None:
    start = ("session", "start", "--model", "m", "--framework", "f")
    for more in (
        [],
        ["--name", "Ana"],
        ["--agent-type", "ana"],
        ["--name", "y", "--agent-type", "x"],
        ["--name", "XX"],
    ):
        assert isinstance(run(worker, *start, *more), Refused), more
    assert isinstance(run(worker, "session", "start", "--model", "human", "--name", "X"), Refused)
    assert isinstance(run(worker, *start, "--model", "human", "--name", "X"), Refused)
    assert isinstance(run(worker, *start, "--name", "X"), Reply)
    assert isinstance(run(worker, "comment", "LAT-1", "mine", "--name", "X-2"), Reply)


def test_commands_with_an_actor_of_their_own_are_refused(worker: WorkerProcess) -> None:
    """``backfill-ids`` writes as another actor if it does not get the client's."""
    assert isinstance(run(worker, "backfill-ids"), Refused)
    assert isinstance(run(worker, "backfill-ids", "--actor", OWN), Reply)


def test_an_actor_in_the_configuration_is_ignored(worker: WorkerProcess) -> None:
    path = worker.project / ".lattice/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "default_actor": "human:ana"}))
    worker.reconcile()
    answer = run(worker, "create", "x")
    assert isinstance(answer, Reply)
    assert answer.exit_code == 1


@pytest.mark.parametrize("name", ["Ana-1", "X-2"])
def test_a_modified_session_file_is_not_trusted(worker: WorkerProcess, name: str) -> None:
    path = worker.project / f".lattice/sessions/{name}.json"
    session, before = json.loads(path.read_text()), actors(worker.project)
    for forged in (
        {"base_name": "x", "model": "m"},
        {"base_name": "X", "model": "m", "name": "Boss-1"},
        {"base_name": ["x"], "model": "m"},
        {"name": {"x": 1}},
    ):
        path.write_text(json.dumps({**session, **forged}))
        worker.reconcile()
        answer = run(worker, "comment", "LAT-1", "x", "--name", name)
        assert isinstance(answer, Refused), (forged, answer)
    assert actors(worker.project) == before


def test_no_line_of_many_writes_in_another_name(worker: WorkerProcess) -> None:
    before = actors(worker.project)
    lines = Lines(random.Random(5), Known(shorts=["LAT-1", "LAT-2"], sessions=["Ana-1", "Other-1", "X-1", "X-2"]))
    for _ in range(500):
        line = lines.line()
        worker.run(*line.argv, files=line.files, actor=OWN, act_as=[])
    new = {key: actor for key, actor in actors(worker.project).items() if key not in before}
    assert len(new) > 20
    assert all(map(is_own, new.values())), [actor for actor in new.values() if not is_own(actor)]
