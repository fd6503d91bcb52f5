"""A warm program is the installed one: same output, same exit code, its own environment, and it can be killed."""

import signal
import subprocess

import pytest

from preloaded_programs import warm
from sandbox import Client, Programs, Sandbox

pytestmark = pytest.mark.e2e


@pytest.fixture
def project(sandbox: Sandbox) -> Client:
    client = sandbox.client("local")
    client.ok("init", "--project-code", "OWN", "--actor", "human:me", "--no-setup-agents", "--no-setup-claude")
    client.ok("create", "Ünïcode", "--actor", "human:me")
    return client


@pytest.mark.parametrize(
    "argv",
    [("--version",), ("list",), ("show", "OWN-1", "--json"), ("nonsense",), ("show", "OWN-9"), ("remote", "status")],
    ids=" ".join,
)
def test_it_prints_and_exits_as_the_installed_program_does(project: Client, argv: tuple[str, ...]) -> None:
    anew = project.run(*argv, programs=Programs())
    forked = project.run(*argv, programs=warm())
    assert (forked.stdout, forked.stderr, forked.returncode) == (anew.stdout, anew.stderr, anew.returncode)


def test_its_environment_is_there_before_plugins_are_loaded(project: Client) -> None:
    assert project.run("remote", "--help").returncode == 0
    inside_the_server = project.run("remote", "--help", env={"LATTICE_REMOTE_SERVER": "1"})
    assert "No such command 'remote'" in inside_the_server.stderr


def test_it_can_be_killed(sandbox: Sandbox) -> None:
    server = sandbox.server()
    server.start()
    process = server.process
    assert process is not None
    assert process.poll() is None
    server.kill()
    assert process.wait(20) == -signal.SIGKILL


def test_one_that_takes_too_long_is_named_and_says_where_it_was(project: Client) -> None:
    with pytest.raises(subprocess.TimeoutExpired, match="'dashboard'") as late:
        warm().run("lattice", ["dashboard", "--port", "0"], cwd=project.dir, env=project.env, timeout_s=8)
    assert "serve_forever" in late.value.__notes__[0]
