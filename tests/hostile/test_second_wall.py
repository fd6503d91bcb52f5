"""The audit hook alone: command lines that the policy would refuse, and planted symlinks (I9)."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from place import Place
from worker_process import ANA, WorkerProcess, answer_of

from lattice_remote.protocol.messages import Attachment, Refused, Reply, Stored


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("wall"))


@pytest.fixture(scope="module")
def unguarded(place: Place) -> Iterator[WorkerProcess]:
    """A worker whose policy permits everything, with one task in its project."""
    with place.worker(unguarded=True) as worker:
        worker.ok("create", "x", *ANA)
        yield worker


OUT = "../../../../../desk/out"
AWAY = "../../../other/.lattice"
READ = "tried to read a file of the server"
WRITE = "tried to write a file outside the project"

LINES: list[tuple[list[str], str]] = [
    (["attach", "LAT-1", "{root}/home/.ssh/id", *ANA], READ),
    (["attach", "LAT-1", "/etc/passwd", *ANA], READ),
    (["attach", "LAT-1", "/proc/self/environ", *ANA], READ),
    (["comment", "LAT-1", "--file", "{root}/data/tokens.json", *ANA], READ),
    (["comment", "LAT-1", "--file", "/dev/../etc/passwd", *ANA], READ),
    (["comment", "LAT-1", "x", "--name", f"{AWAY}/sessions/Ana-1"], READ),
    (["comment", "LAT-1", "x", "--name", "../../config"], READ),
    (["session", "end", f"{AWAY}/config"], "tried to "),
    (["rebuild", "../../../other/.lattice/config"], ""),
    (["resource", "create", OUT, *ANA], WRITE),
    (["resource", "create", f"{AWAY}/resources/x", *ANA], "tried to use a path that goes up again"),
    (["resource", "create", "{root}/desk/x", *ANA], WRITE),
    (["session", "start", "--agent-type", "../../../../../desk/x", "--model", "m", "--framework", "f"], ""),
    (["init", "--path", "{root}/desk", "--actor", "human:ana", "--project-code", "X"], WRITE),
    (["setup-claude", "--path", "{root}/desk"], WRITE),
    (["setup-openclaw", "--path", "{root}/desk"], WRITE),
    (["setup-openclaw", "--global"], WRITE),
    (["setup-claude-skill"], WRITE),
    (["setup-codex"], WRITE),
    (["demo", "init", "--path", "{root}/desk/demo"], WRITE),
    (["dashboard", "--port", "0"], "tried to do what Python calls socket"),
    (["restart"], ""),
    (["plan", "LAT-1", "--open"], ""),
]


@pytest.mark.parametrize(("argv", "why"), LINES, ids=[" ".join(argv)[:60] for argv, _ in LINES])
def test_a_line_that_accesses_outside_paths_is_stopped_at_the_access(
    place: Place, unguarded: WorkerProcess, argv: list[str], why: str
) -> None:
    answer = answer_of(unguarded.run(*(word.replace("{root}", str(place.root)) for word in argv)))
    if why:
        assert isinstance(answer, Refused)
        assert why in answer.message
    else:
        assert isinstance(answer, Refused) or (isinstance(answer, Reply) and answer.exit_code != 0)
    place.check()
    unguarded.ok("comment", "LAT-1", "goes on", *ANA)


# --- planted symlinks ---

LINKS = {
    "plans/{task}.md": "home/.ssh/id",
    "plans": "desk",
    "notes": "desk",
    "tasks/{task}.json": "data/projects/other/.lattice/tasks/task_01M8173J64RGGH4YR2NPR2ZZZZ.json",
    "tasks": "data/projects/other/.lattice/tasks",
    "events/{task}.jsonl": "desk/notes.md",
    "events/_lifecycle.jsonl": "home/.ssh/id",
    "events": "desk",
    "ids.json": "data/tokens.json",
    "config.json": "data/config.json",
    "artifacts/payload": "desk",
    "artifacts/meta": "home/.ssh",
    "sessions": "data/projects/other/.lattice/sessions",
    "sessions/index.json": "data/tokens.json",
    "sessions/Ana-1.json": "data/projects/other/.lattice/sessions/Ana-1.json",
    "resources": "desk",
    "resources/gpu": "desk",
    "locks": "desk",
    "archive": "data/projects/other/.lattice/archive",
    "archive/tasks": "home",
}
"""Paths replaced by a symlink, and the symlink's target."""


def test_symlinks_are_not_followed_out_of_the_tree(tmp_path: Path) -> None:
    place = Place(tmp_path)
    with place.worker() as worker:
        task = json.loads(worker.ok("create", "x", *ANA, "--json"))["data"]["id"]
        worker.ok("session", "start", "--name", "Ana", "--model", "human")
        worker.ok("resource", "create", "gpu", *ANA)
        plan = f"plans/{task}.md"
        base = (place.lattice / plan).read_bytes()
        for name, target in LINKS.items():
            path = place.lattice / name.replace("{task}", task)
            aside = tmp_path / "data/projects/web/aside"
            path.rename(aside)
            path.symlink_to(tmp_path / target)
            refused = 0
            for argv in (
                ["comment", "LAT-1", "x", *ANA],
                ["comment", task, "x", "--name", "Ana-1"],
                ["status", task, "cancelled", "--force", "--reason", "so", *ANA],
                ["create", "y", *ANA],
                ["attach", task, "given", *ANA],
                ["complete", task, "--review", "x", *ANA],
                ["resource", "acquire", "gpu", *ANA],
                ["resource", "create", "db", *ANA],
                ["session", "start", "--name", "Ana", "--model", "human"],
                ["archive", task, *ANA],
                ["doctor", "--fix"],
                ["rebuild", "--all"],
            ):
                files = [Attachment(2, "given", b"content")] if argv[0] == "attach" else []
                answer = answer_of(worker.run(*argv, files=files))
                refused += isinstance(answer, Refused)
                assert not isinstance(answer, Refused) or answer.message.isprintable()
                if argv[0] == "archive":
                    worker.run("unarchive", task, *ANA)
            for edited, its_base in ((plan, base), (f"notes/{task}.md", None)):
                refused += isinstance(worker.edit(edited, its_base, b"mine\n")[1], Refused)
            assert refused, f"{name} was used as if it were no link"
            path.unlink()
            if path.exists():
                shutil.rmtree(path)
            aside.rename(path)
            worker.reconcile()
            place.check()
        assert worker.reconcile().change is None


def test_a_pipe_instead_of_a_file_does_not_block_the_worker(tmp_path: Path) -> None:
    place = Place(tmp_path)
    with place.worker() as worker:
        task = json.loads(worker.ok("create", "x", *ANA, "--json"))["data"]["id"]
        for name, used in ((f"plans/{task}.md", False), (f"events/{task}.jsonl", True), ("ids.json", True)):
            path = place.lattice / name
            path.unlink()
            os.mkfifo(path)
            answer = answer_of(worker.run("comment", "LAT-1", "x", *ANA))
            assert isinstance(answer, Refused) is used
            worker.run("rebuild", "--all")
            assert isinstance(worker.edit(f"plans/{task}.md", None, b"x")[1], Refused | Stored)
            path.unlink()
        place.check()


def test_an_undecodable_name_is_reported_without_harm(tmp_path: Path) -> None:
    place = Place(tmp_path)
    with place.worker() as worker:
        link = place.lattice / "tasks/task_\udcff.json"
        link.symlink_to("/etc/passwd")
        assert "symbolic link" in worker.refused("doctor").message
        link.unlink()
        worker.ok("create", "x", *ANA)
