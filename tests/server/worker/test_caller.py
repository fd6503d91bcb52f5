"""Actor of a command: lattice refuses invalid ones with its own message."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from worker_process import ANA, WorkerProcess, make_project


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerProcess]:
    with WorkerProcess(make_project(tmp_path / "web")) as started:
        started.ok("create", "x", *ANA)
        yield started


def test_an_actor_of_a_wrong_form_is_refused_by_lattice(worker: WorkerProcess) -> None:
    reply = worker.reply("comment", "LAT-1", "x", "--actor", "nonsense", "--json")
    assert reply.exit_code == 1 and json.loads(reply.stdout)["error"]["code"] == "INVALID_ACTOR"


@pytest.mark.parametrize("given", [[], ["--actor", "nonsense"], ["--actor", "human:ben"]])
def test_the_command_whose_actor_lattice_does_not_check_writes_in_no_other_name(
    worker: WorkerProcess, given: list[str]
) -> None:
    assert worker.refused("backfill-ids", *given, act_as=[]).code == "REMOTE_FORBIDDEN"
