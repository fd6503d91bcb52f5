"""Commands in the worker: same output, status and files as a local command."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from worker_process import ANA, WorkerProcess, answer_of, change_of, make_project, tree_of

from lattice_remote.protocol.messages import Attachment, Reply


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WorkerProcess, Path, Path]]:
    """A worker, an equal project for local commands, and a directory with the caller's files."""
    root = tmp_path_factory.mktemp("executor")
    local, given = make_project(root / "local"), root / "given"
    given.mkdir()
    (given / "text é.md").write_text("from a file\n")
    (given / "b'\"x.tar.gz").write_bytes(b"\0\1")
    with WorkerProcess(make_project(root / "remote")) as worker:
        yield worker, local, given


class Anonymous:
    """Normalizer of two runs: ids by order of appearance, times by a word."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}

    def __call__(self, output: bytes) -> str:
        text = re.sub(r"[a-z]+_[0-9A-HJKMNP-TV-Z]{26}", self._number, output.decode())
        return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME", text)

    def _number(self, match: re.Match[str]) -> str:
        return self._seen.setdefault(match.group(), f"id{len(self._seen)}")


LINES: list[tuple[list[str], int | None]] = [
    (["create", "Über", *ANA], None),
    (["create", "Second", *ANA, "--json"], None),
    (["create", "x", "--priority", "no", *ANA], None),
    (["create"], None),
    ([], None),
    (["--version"], None),
    (["--version", "create", "x"], None),
    (["attach", "--help"], None),
    (["resource"], None),
    (["comment", "LAT-1", "--nope"], None),
    (["comment", "LAT-1", "hello", *ANA], None),
    (["comment", "LAT-99", "hello", *ANA, "--json"], None),
    (["comment", "LAT-1", "--file", "text é.md", *ANA], 3),
    (["comment", "LAT-1", "--file=text é.md", *ANA], 2),
    (["comment", "LAT-1", "--file", "missing 'é\".md", *ANA], 3),
    (["attach", "LAT-1", "b'\"x.tar.gz", *ANA, "--json"], 2),
    (["attach", "LAT-1", "missing 'é\".md", *ANA], 2),
    (["attach", "LAT-1", "missing 'é\".md", *ANA, "--json"], 2),
    (["status", "LAT-1", "in_progress", *ANA, "--json"], None),
    (["archive", "LAT-1,LAT-99", "LAT-2", *ANA], None),
    (["session", "start", "--name", "Argus", "--model", "m", "--framework", "f"], None),
    (["comment", "LAT-3", "by session", "--name", "Argus-1", "--json"], None),
]


@pytest.mark.parametrize(("argv", "file"), LINES, ids=[" ".join(argv)[:50] for argv, _ in LINES])
def test_the_output_is_that_of_a_local_process(
    places: tuple[WorkerProcess, Path, Path], names: tuple[Anonymous, Anonymous], argv: list[str], file: int | None
) -> None:
    worker, project, directory = places
    files = []
    if file is not None:
        path = directory / argv[file].removeprefix("--file=")
        files.append(Attachment(file, path.name, path.read_bytes() if path.exists() else None))
    reply = worker.reply(*argv, files=files)
    command = [sys.executable, "-c", "from lattice.cli.main import cli; cli(prog_name='lattice')", *argv]
    environment = {**os.environ, "LATTICE_ROOT": str(project), "LATTICE_REMOTE_SERVER": "1"}
    local = subprocess.run(command, cwd=directory, env=environment, capture_output=True, check=False)
    remote, here = names
    assert reply.exit_code == local.returncode
    assert remote(reply.stdout) == here(local.stdout)
    assert remote(reply.stderr) == here(local.stderr)


@pytest.fixture(scope="module")
def names() -> tuple[Anonymous, Anonymous]:
    return Anonymous(), Anonymous()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerProcess]:
    with WorkerProcess(make_project(tmp_path / "web")) as started:
        yield started


def test_a_command_that_crashes_is_undone_and_reported(worker: WorkerProcess) -> None:
    worker.ok("create", "x", *ANA)
    before = tree_of(worker.project / ".lattice")
    binary = [Attachment(3, "x.bin", b"\xff\xfe")]
    reply = worker.reply("comment", "LAT-1", "--file", "x.bin", *ANA, files=binary)
    assert (reply.exit_code, reply.stdout) == (1, b"")
    assert reply.stderr.startswith(b"Error: the command failed on the server and was undone: UnicodeDecodeError")
    assert reply.stderr.count(b"\n") == 1
    reply = worker.reply("comment", "LAT-1", "--file", "x.bin", *ANA, "--json", files=binary)
    assert reply.stdout.startswith(b'{\n  "error": {\n    "code": "REMOTE_FAILED",\n    "message": "')
    assert reply.stdout.endswith(b'\n  },\n  "ok": false\n}\n\n')
    assert tree_of(worker.project / ".lattice") == before


def test_writes_of_a_broken_command_are_undone(worker: WorkerProcess) -> None:
    worker.ok("create", "x", *ANA)
    lattice = worker.project / ".lattice"
    (lattice / "events/_lifecycle.jsonl").unlink()
    (lattice / "events/_lifecycle.jsonl").mkdir()  # archive appends to the task's log first, then fails here
    worker.reconcile()
    before = tree_of(lattice)
    reply = worker.reply("archive", "LAT-1", *ANA)
    assert b"IsADirectoryError" in reply.stderr
    assert tree_of(lattice) == before
    assert worker.reconcile().change is None


def test_hooks_are_reported_and_not_run(worker: WorkerProcess) -> None:
    config = worker.project / ".lattice/config.json"
    config.write_text(config.read_text().replace("{", '{"hooks": {"post_event": "touch /nowhere; exit 3"},', 1))
    done = worker.run("create", "x", *ANA)
    assert [hook.command for hook in done.hooks] == ["touch /nowhere; exit 3"]
    assert done.hooks[0].env["LATTICE_EVENT_TYPE"] == "task_created"
    assert '"type":"task_created"' in done.hooks[0].stdin
    assert worker.run("create", *ANA).hooks == []


def test_waiting_for_a_resource_does_not_hold_the_writer(worker: WorkerProcess) -> None:
    worker.ok("resource", "create", "gpu", *ANA)
    worker.ok("resource", "acquire", "gpu", *ANA)
    wait = ["resource", "acquire", "gpu", "--wait", "--timeout", "7", "--actor", "agent:b"]
    done = worker.run(*wait, id="0" * 32)
    assert (done.waiting_for, done.wait_timeout_s, done.reply, done.change) == ("gpu", 7.0, None, None)
    assert done.retry_at is not None
    last = answer_of(worker.run(*wait, id="0" * 32, last_try=True))
    assert isinstance(last, Reply)
    assert last.stderr == b"Error: Timed out waiting for resource 'gpu' after 7s.\n"
    assert worker.reply(*wait, id="0" * 32) == last
    worker.ok("resource", "release", "gpu", *ANA)
    done = worker.run(*wait)
    assert (done.waiting_for, change_of(done) is not None) == (None, True)
    assert worker.reply(*wait[:3], "--actor", "agent:c").exit_code == 1


def test_an_eviction_while_waiting_is_a_change_without_an_answer(worker: WorkerProcess) -> None:
    worker.ok("resource", "create", "gpu", "--ttl", "300", "--max-holders", "2", *ANA)
    for holder in ("agent:a", "agent:b"):
        worker.ok("resource", "acquire", "gpu", "--actor", holder)
    snapshot = worker.project / ".lattice/resources/gpu/resource.json"
    snapshot.write_text(
        snapshot.read_text()
        .replace('"max_holders": 2', '"max_holders": 1')
        .replace('expires_at": "2', 'expires_at": "1', 1)
    )
    worker.reconcile()
    done = worker.run("resource", "acquire", "gpu", "--wait", "--actor", "agent:c")
    assert (done.waiting_for, done.reply) == ("gpu", None)
    assert change_of(done) is not None


def test_an_attached_file_whose_name_can_not_be_shared_is_refused(worker: WorkerProcess) -> None:
    worker.ok("create", "x", *ANA)
    before = tree_of(worker.project / ".lattice")
    refused = worker.refused("attach", "LAT-1", "a.b:c", *ANA, files=[Attachment(2, "a.b:c", b"x")])
    assert refused.code == "REMOTE_UNSUPPORTED"
    assert "cannot be shared" in refused.message
    assert tree_of(worker.project / ".lattice") == before
    assert not list((worker.project / ".lattice/artifacts/payload").iterdir())


def test_attachments_that_do_not_belong_are_refused(worker: WorkerProcess) -> None:
    for index, name in ((2, "../x"), (2, ".."), (2, "a\0b"), (9, "x"), (1, "x")):
        worker.refused("attach", "LAT-1", "x", *ANA, files=[Attachment(index, name, b"")])
        assert not list((worker.project / "tmp").iterdir())


def test_symbolic_links_in_the_project_lead_nowhere(worker: WorkerProcess, tmp_path: Path) -> None:
    worker.ok("create", "x", *ANA)
    lattice = worker.project / ".lattice"
    secret = tmp_path / "secret"
    secret.write_text("# secret\n\n- a plan\n")
    plan = next((lattice / "plans").iterdir())
    plan.unlink()
    plan.symlink_to(secret)
    assert "follow a symbolic link" in worker.refused("next", "--json").message
    _, refused = worker.edit(f"plans/{plan.name}", None, b"x")
    assert refused.code == "REMOTE_UNSUPPORTED"
    assert secret.read_text() == "# secret\n\n- a plan\n"


def test_a_waiter_does_not_overtake_longer_waiters(worker: WorkerProcess) -> None:
    worker.ok("resource", "create", "tpu", *ANA)
    acquire = ("resource", "acquire", "tpu", "--actor", "agent:b")
    done = worker.run(*acquire, "--wait", "--timeout", "7", ahead=["tpu"])
    assert (done.waiting_for, done.reply, done.change) == ("tpu", None, None), "it is free, but not for this one"
    last = answer_of(worker.run(*acquire, "--wait", "--timeout", "7", ahead=["tpu"], last_try=True))
    assert isinstance(last, Reply) and b"Timed out waiting" in last.stderr
    assert worker.run(*acquire, "--wait", ahead=["gpu"]).waiting_for is None
    worker.ok("resource", "release", "tpu", "--actor", "agent:b")
    assert worker.run(*acquire, ahead=["tpu"]).waiting_for is None, "who does not wait is not in line"
    forced = worker.run("resource", "acquire", "tpu", "--wait", "--force", "--actor", "agent:c", ahead=["tpu"])
    assert forced.waiting_for is None
