"""The systemd unit: valid, confined, and failing when its start fails."""

import re
import subprocess
from pathlib import Path

import pytest
from machine import Machine
from proxies import DEPLOY, with_places

from programs import program
from sandbox import BIN, Sandbox

UNIT = (DEPLOY / "lattice-remote.service").read_text()
EXPOSED = 2.0
"""Maximum of the exposure that ``systemd-analyze security`` reports, of 10; most of Debian's services have 9 or more.
"""


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    path = tmp_path / "lattice-remote.service"
    path.write_text(with_places(UNIT, {"/opt/lattice-remote/bin/": f"{BIN}/"}))
    return path


def analysed(*argv: str) -> str:
    done = subprocess.run([program("systemd-analyze"), *argv], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_systemd_verify_accepts_the_unit(unit: Path) -> None:
    assert analysed("verify", "--man=no", str(unit)) == ""


def test_the_unit_has_few_privileges(unit: Path) -> None:
    said = analysed("security", "--offline=true", str(unit))
    [level] = re.findall(r"Overall exposure level for lattice-remote.service: ([\d.]+)", said)
    assert float(level) <= EXPOSED


def test_a_failed_start_is_reported(tmp_path: Path) -> None:
    with Sandbox() as sandbox:
        machine = Machine(sandbox, "server")
        machine.copy(DEPLOY / "lattice-remote.service", "/etc/systemd/system/lattice-remote.service")
        machine.run("python3 -m venv /opt/lattice-remote && /opt/lattice-remote/bin/pip install lattice-remote")
        done = machine.run("sudo systemctl enable --now lattice-remote")
        machine.end()
    assert done.returncode == 1
    assert "is not a data directory; create it with: lattice-remote init" in done.stderr
