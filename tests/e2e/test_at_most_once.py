"""At-most-once execution under crashes at any point; unfinished requests are reported (I6)."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from account import check_numbers, effects_in
from faultproxy import FaultProxy
from faults import inject
from sandbox import Client, Sandbox, Server, differences, wait_for

pytestmark = pytest.mark.e2e


@pytest.fixture
def limits() -> dict[str, float]:
    """The server's default limits, unless a test sets others."""
    return {}


@pytest.fixture
def injected(sandbox: Sandbox, limits: dict[str, float]) -> Iterator[tuple[Server, Client, Path]]:
    """A server with an injectable worker failure, and a client."""
    server = sandbox.server()
    (server.data / "config.json").write_text(json.dumps({"limits": limits}))
    faults = inject(server)
    server.project()
    server.start()
    ana = sandbox.client("ana")
    ana.add_remote(server, server.token("human:ana", "agent:*"))
    ana.ok("create", "One", "--actor", "human:ana")
    yield server, ana, faults


_MAX_POINTS = 60


def worker_pid(server: Server) -> int:
    wait_for(lambda: len(server.worker_pids()) == 1, "the worker")
    return server.worker_pids()[0]


def check_points(server: Server, client: Client, points: int) -> None:
    """Check that each comment exists once and that the cache converges to the server."""
    assert 5 < points < _MAX_POINTS
    found = effects_in(server.lattice_dir())
    assert {point: found[f"p{point}", "comment_added"] for point in range(points)} == dict.fromkeys(range(points), 1)
    wait_for(lambda: not differences(client.lattice_dir, server.lattice_dir()), "the cache to equal the server")
    check_numbers(server)


def test_a_worker_killed_at_any_point_runs_a_command_once(injected: tuple[Server, Client, Path]) -> None:
    server, ana, faults = injected
    for point in range(_MAX_POINTS):
        pid = worker_pid(server)
        (faults / f"worker-dies-{pid}").write_text("." * point)
        ana.ok("comment", "LAT-1", f"point {point}", "--actor", f"agent:p{point}")
        if server.worker_pids() == [pid]:
            break  # the command has no further points
    check_points(server, ana, point + 1)


def test_a_server_killed_at_any_point_runs_a_command_once(injected: tuple[Server, Client, Path]) -> None:
    server, ana, faults = injected
    for point in range(_MAX_POINTS):
        (faults / f"server-dies-{worker_pid(server)}").write_text("." * point)
        running = ana.popen("comment", "LAT-1", f"point {point}", "--actor", f"agent:p{point}")
        process = server.process
        assert process is not None
        wait_for(lambda: process.poll() is not None or running.poll() is not None, "the end of one of them")  # noqa: B023
        is_over = process.poll() is None
        if not is_over:
            server.kill()  # it has exited; collect it
            server.start()
        out, err = running.communicate(timeout=60)
        assert running.returncode == 0, out + err
        if is_over:
            break
        ana.ok("list")  # reconnected: the new worker runs
    check_points(server, ana, point + 1)


def test_after_a_failed_fsync_no_write_is_acknowledged_until_a_restart(injected: tuple[Server, Client, Path]) -> None:
    server, ana, faults = injected
    (faults / "fsync-fails").touch()
    first = ana.run("comment", "LAT-1", "into the void", "--actor", "agent:f1", "--json")
    assert first.returncode == 1
    assert "may have taken effect" in json.loads(first.stdout)["error"]["message"]
    (faults / "fsync-fails").unlink()
    second = ana.run("comment", "LAT-1", "still closed", "--actor", "agent:f2")
    assert second.returncode == 1
    assert "nothing was written" in second.stderr
    assert "restart the server" in second.stderr
    server.stop()
    server.start()
    wait_for(lambda: ana.run("remote", "pull").returncode == 0, "the project to be open again")
    ana.ok("comment", "LAT-1", "open again", "--actor", "agent:f3")
    found = effects_in(server.lattice_dir())
    assert found["f1", "comment_added"] <= 1
    assert found["f2", "comment_added"] == 0
    assert found["f3", "comment_added"] == 1


@pytest.mark.parametrize("limits", [{"command_seconds": 4}])
def test_a_hanging_worker_is_replaced_and_reported_to_the_caller(injected: tuple[Server, Client, Path]) -> None:
    server, ana, _ = injected
    pid = worker_pid(server)
    os.kill(pid, signal.SIGSTOP)
    hanging = ana.popen("comment", "LAT-1", "hangs", "--actor", "agent:h1")
    others = [ana.popen("comment", "LAT-1", f"other {n}", "--actor", f"agent:o{n}") for n in range(3)]
    for process in (hanging, *others):
        process.communicate(timeout=100)
    found = effects_in(server.lattice_dir())
    for process, who in [(hanging, "h1"), *zip(others, ("o0", "o1", "o2"), strict=True)]:
        assert found[who, "comment_added"] == (1 if process.returncode == 0 else 0)
    assert sum(process.returncode != 0 for process in (hanging, *others)) <= 1
    assert server.worker_pids() != [pid]


def test_a_replaced_lattice_directory_is_detected(injected: tuple[Server, Client, Path]) -> None:
    server, ana, _ = injected
    project = server.lattice_dir().parent
    copy = project.parent.parent / "copy"
    shutil.copytree(server.lattice_dir(), copy)
    plan = next((copy / "plans").glob("*.md"))
    plan.write_text("written into the copy\n")
    server.lattice_dir().rename(project / "away")
    copy.rename(server.lattice_dir())
    wait_for(lambda: not differences(ana.lattice_dir, server.lattice_dir()), "the cache to equal the server")
    assert (ana.lattice_dir / "plans" / plan.name).read_text() == "written into the copy\n"
    ana.ok("comment", "LAT-1", "still at work", "--actor", "agent:after")
    assert effects_in(server.lattice_dir())["after", "comment_added"] == 1


def test_a_command_that_ran_before_remote_json_disappeared_is_reported_as_unknown(sandbox: Sandbox) -> None:
    """I6: git may remove the file while the command waits for its reply."""
    server = sandbox.started_server()
    token = server.token("human:ana", "agent:*")
    ana = sandbox.client("ana")
    remote = ana.lattice_dir / "remote.json"
    with FaultProxy(server.port) as proxy:
        ana.ok("remote", "add", "origin", proxy.url, "--project", "board", "--token", token)
        ana.ok("create", "One", "--actor", "human:ana")
        proxy.swallow_answers()
        command = ana.popen("comment", "LAT-1", "point 1", "--actor", "agent:p1")
        wait_for(lambda: effects_in(server.lattice_dir())["p1", "comment_added"], "the comment to be on the server")
        content = remote.read_bytes()
        remote.unlink()
        _, error = command.communicate(timeout=60)
        remote.write_bytes(content)
    assert command.returncode == 1
    assert error.startswith("Error: the command may have taken effect, look before you repeat it: "), error
