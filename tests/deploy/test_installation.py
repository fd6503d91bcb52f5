"""The README's installation commands, in clean environments of each supported Python, with the real programs.

Packages come from the registry that pip and uv are configured for. The wheel replaces the package until it is on a
registry.
"""

import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from programs import python
from readme import ROOT, install_commands, run_trial
from sandbox import Sandbox

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

TOOLS = ("uv==0.13.9", "pipx==1.18.4")
COMMANDS = install_commands()
TASK = 'BOA-1  backlog  medium  task  "Write the parser"  unassigned'


class Place:
    """A user's machine: a home directory, and the installers."""

    def __init__(self, sandbox: Sandbox, tools: Path, wheel: Path) -> None:
        self.home = sandbox.root / "installing"
        self.programs = self.home / ".local" / "bin"
        self.programs.mkdir(parents=True)
        self._wheel = wheel
        self.env = {
            **sandbox.environment("installing"),
            "HOME": str(self.home),
            "XDG_CONFIG_HOME": str(self.home / ".config"),
            "XDG_DATA_HOME": str(self.home / ".local" / "share"),
            "XDG_STATE_HOME": str(self.home / ".local" / "state"),
            "PATH": f"{self.programs}:{tools}:/usr/bin:/bin",
            "PIP_BUILD_CONSTRAINT": str(ROOT / "constraints.txt"),
            "PIP_CACHE_DIR": str(tools.parent / "pip-cache"),
            "UV_CACHE_DIR": str(tools.parent / "uv-cache"),
            "PIPX_HOME": str(self.home / "pipx"),
            "PIPX_BIN_DIR": str(self.programs),
        }
        self.offer_wheel(False)

    def offer_wheel(self, offered: bool = True) -> None:
        """Resolve ``lattice-remote`` to the wheel, as if it were on the registry; pin other packages to tested
        versions.
        """
        constraints = self.home / f"constraints-{offered}.txt"
        pinned = (ROOT / "constraints.txt").read_text()
        constraints.write_text(f"{pinned}lattice-remote @ {self._wheel.as_uri()}\n" if offered else pinned)
        self.env |= {"PIP_CONSTRAINT": str(constraints), "UV_CONSTRAINT": str(constraints)}

    def use(self, interpreter: Path) -> None:
        """Make uv and pipx use this interpreter."""
        self.env |= {"UV_PYTHON": str(interpreter), "PIPX_DEFAULT_PYTHON": str(interpreter)}

    def run(self, command: str, *, cwd: Path = ROOT) -> str:
        """Run a command line, which must succeed, and return its output."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=cwd,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def activate(self, interpreter: Path) -> None:
        """Create a clean environment of this interpreter, and put it first on the PATH."""
        directory = self.home / "environment"
        self.run(f"{interpreter} -m venv {directory}")
        self.env["PATH"] = f"{directory}/bin:{self.env['PATH']}"

    def try_it(self) -> None:
        """Follow the README's trial with the installed programs."""
        directory = self.home / "trial"
        directory.mkdir()
        done = run_trial(directory, self.env)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == TASK


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of uv and pipx, installed for these tests."""
    directory = tmp_path_factory.mktemp("tools")
    venv.create(directory, with_pip=True)
    subprocess.run([directory / "bin" / "pip", "install", "--quiet", *TOOLS], check=True, timeout=300)
    return directory / "bin"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel."""
    directory = tmp_path_factory.mktemp("wheel")
    argv = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", directory, ROOT]
    env = {**os.environ, "PIP_BUILD_CONSTRAINT": str(ROOT / "constraints.txt")}
    subprocess.run(argv, env=env, check=True, timeout=300)
    [built] = directory.iterdir()
    return built


@pytest.fixture
def place(tools: Path, wheel: Path) -> Iterator[Place]:
    with Sandbox() as sandbox:
        yield Place(sandbox, tools, wheel)


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_pip_installs_into_a_clean_environment(place: Place, version: str) -> None:
    checkout, registry = COMMANDS["pip"]
    place.activate(python(version))
    place.offer_wheel()
    place.run(registry)
    assert f"python{version}" in place.run("python -c 'import lattice_remote; print(lattice_remote.__file__)'")
    place.run("python -m pip check")
    place.try_it()
    place.offer_wheel(False)
    place.run(checkout)
    assert place.run("lattice-remote --version") and place.run("lattice remote --help")


def test_uv_and_pipx_install_a_checkout_beside_lattice(place: Place) -> None:
    place.use(python("3.12"))
    uv, _ = COMMANDS["uv"]
    place.run(uv)
    assert place.run("lattice remote --help")
    assert not (place.programs / "lattice-remote").exists()
    place.run("uv tool uninstall lattice-tracker")
    pipx, _ = COMMANDS["pipx"]
    place.run("pipx install lattice-tracker")
    place.run(pipx)
    assert place.run("lattice remote --help")
    assert not (place.programs / "lattice-remote").exists()


def test_uv_and_pipx_install_from_a_registry_with_the_servers_command(place: Place) -> None:
    place.use(python("3.12"))
    place.offer_wheel()
    _, uv = COMMANDS["uv"]
    place.run(f"{uv} {option_of('uv')}")
    place.try_it()
    place.run("uv tool uninstall lattice-tracker")
    _, pipx = COMMANDS["pipx"]
    place.run("pipx install lattice-tracker")
    place.run(f"{pipx} {option_of('pipx')}")
    assert place.run("lattice-remote --version") and place.run("lattice remote --help")


def option_of(program: str) -> str:
    """Return the README's option that adds ``lattice-remote`` to the PATH."""
    option = {"uv": "--with-executables-from lattice-remote", "pipx": "--include-apps"}[program]
    assert f"`{option}`" in (ROOT / "README.md").read_text()
    return option
