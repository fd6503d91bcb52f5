"""Documentation of the Python interface: run the example as a program and the page block by block."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from preloaded_programs import warm
from sandbox import Client, Server

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "python_api.py"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

type Run = Callable[..., str]


@pytest.fixture(params=["local", "remote"])
def run(request: pytest.FixtureRequest, shared_board: tuple[Server, Client, Client], tmp_path: Path) -> Run:
    """Run a Python program in a project, or a command if there is no program."""
    ana = shared_board[1]
    client = ana if request.param == "remote" else ana.elsewhere(tmp_path)
    if request.param == "local":
        done = warm().run(
            "lattice", ("init", "--project-code", "LAT", "--actor", "human:ana"), cwd=tmp_path, env=ana.env
        )
        assert done.returncode == 0, done.stderr

    def run(*argv: str) -> str:
        if not argv[0].endswith(".py"):
            return client.ok(*argv)
        done = subprocess.run(
            [sys.executable, "-W", "error", *argv],
            cwd=client.dir,
            env=client.env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout

    return run


def test_the_example_has_its_documented_output(run: Run) -> None:
    first = run(str(EXAMPLE), "agent:first")
    assert ": plan written\n1 comments on LAT-" in first
    second = run(str(EXAMPLE), "agent:second")
    assert ": plan written\n1 comments on LAT-" in second
    assert first.split()[0] != second.split()[0], "each has claimed a task of its own"
    assert "agent:second" in run("show", second.split()[0])


def test_the_page_has_its_documented_output(run: Run, tmp_path: Path) -> None:
    run("create", "A task to comment on", "--actor", "human:ana")
    script = tmp_path / "page.py"
    script.write_text("\n".join(_BLOCK.findall((ROOT / "docs" / "use" / "python.md").read_text())))
    said = run(str(script))
    assert re.search(r"^\d+ comments$", said, re.MULTILINE), said
    assert "Written(content=" in said


def test_outside_a_project_the_example_suggests_a_command(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "LATTICE_ROOT"}
    argv = [sys.executable, str(EXAMPLE)]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: there is no lattice project in") and done.stderr.count("\n") == 1
