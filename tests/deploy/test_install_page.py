"""``docs/run/install.md``: every command runs in its order, as a reader would type it.

A block runs on the machine that the word after ``sh`` names, by default the server. A ``text`` block shows the output
of the block before it; ``...`` stands for anything. A client that logs in reads the last printed token from stdin.
``ID`` is the id of the only token, ``DAY`` the date of the only backup.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import Machine

from programs import program
from sandbox import Client, Sandbox, differences, tree_of

pytestmark = pytest.mark.e2e

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "run" / "install.md").read_text()
BLOCKS = re.findall(r"^```(\w+) ?(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
FUNCTION = re.compile(r"^lattice-remote\(\) \{.*\}$", re.MULTILINE)
HOSTS = {"server": "https://board.example.com", "new": "https://new.example.com"}


class Company:
    """The page's machines: the server, its successor, a container, and Ana's."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.machines = {name: Machine(sandbox, name) for name in ("server", "new", "container")}
        self.ana: Client = sandbox.client("ana")
        [self.function] = FUNCTION.findall(PAGE)
        self.token = ""

    def run(self, where: str, script: str) -> str:
        """Run a block, which must succeed, and return its output."""
        done = self._on_the_client(script) if where == "client" else self._on(self.machines[where], script)
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
        for line in done.stdout.splitlines():
            if re.fullmatch(r"ltr_\S+", line):
                self.token = line
        return done.stdout

    def _on(self, machine: Machine, script: str) -> subprocess.CompletedProcess[str]:
        if re.search(r"\bID\b", script):
            listed = machine.run(f"{self.function}\nlattice-remote token list --json")
            [token] = json.loads(listed.stdout)
            script = re.sub(r"\bID\b", token["id"], script)
        if "DAY" in script:
            [day] = machine.path("/backup").iterdir()
            script = script.replace("DAY", day.name)
        return machine.run(f"{self.function}\n{script}")

    def _on_the_client(self, script: str) -> subprocess.CompletedProcess[str]:
        for name, url in HOSTS.items():
            script = script.replace(url, f"http://127.0.0.1:{self.machines[name].port}")
        machine = self.machines["container"]  # any machine's stand-in for ``lattice`` will do
        env = {**self.ana.env, **{name: machine.environment[name] for name in ("MACHINE_ROOT", "MACHINE_PYTHON")}}
        env["PATH"] = f"{machine.environment['MACHINE_BIN']}:{env['PATH']}"
        argv = ["bash", "-euo", "pipefail", "-c", script]
        return subprocess.run(
            argv,
            cwd=self.ana.dir,
            env=env,
            input=f"{self.token}\n" if "login" in script else "",
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@pytest.fixture
def company() -> Iterator[Company]:
    program("rsync")
    with Sandbox() as sandbox:
        made = Company(sandbox)
        try:
            yield made
        finally:
            for machine in made.machines.values():
                machine.end()


def arrive(company: Company) -> None:
    """Do the steps that the page leaves to the reader: set up the new server and copy the project's directory to it."""
    new, old = company.machines["new"], company.machines["server"]
    install = [script for kind, where, script in BLOCKS if kind == "sh" and not where]
    for script in install[: next(i for i, script in enumerate(install) if "enable --now" in script) + 1]:
        company.run("new", script)
    leaving = old.path("/var/lib/lattice-remote/leaving")
    shutil.copytree(leaving, new.path("/var/lib/lattice-remote/arriving"))


def test_every_command_of_the_page_works_in_order(company: Company) -> None:
    printed, ran = "", 0
    for kind, where, script in BLOCKS:
        if kind == "text":
            shown = company.machines["server"].here(script).replace("\n...\n", "\n...")
            pattern = ".*".join(re.escape(part) for part in shown.split("..."))
            assert re.fullmatch(pattern, printed, re.DOTALL), f"the page says\n{script}\nand it is\n{printed}"
            continue
        assert kind == "sh", "other blocks are no commands"
        if where == "new":
            arrive(company)
        printed = company.run(where or "server", script)
        ran += 1
    assert ran >= 20
    here, there = (
        company.ana.lattice_dir,
        company.machines["new"].path("/var/lib/lattice-remote/projects/board/.lattice"),
    )
    assert differences(here, there) == []
    notes = b"".join(tree_of(there).values())
    assert b"With the new token" in notes and b"From the new server" in notes, "nothing was lost on the way"


def test_no_command_of_the_page_deletes() -> None:
    for _, _, script in BLOCKS:
        assert not re.search(r"(?<!-)\brm\b|--delete|token revoke|project delete", script)
