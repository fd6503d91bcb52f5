"""``make system`` installs missing packages or names them, and starts no service."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "system.sh"
PACKAGES = "chromium nginx caddy systemd rsync vim ed bubblewrap"
NEEDED = ("chromium", "nginx", "caddy", "systemd-analyze", "rsync", "vim", "ed", "bwrap")


def run(path: Path, script: Path = SCRIPT) -> tuple[int, str, str]:
    done = subprocess.run([script], env={"PATH": str(path)}, capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, done.stdout, done.stderr


def program(directory: Path, name: str, text: str = "") -> None:
    (directory / name).write_text(f"#!/bin/sh\n{text}\n")
    (directory / name).chmod(0o755)


def test_a_complete_system_is_left_unchanged(tmp_path: Path) -> None:
    for name in NEEDED:
        program(tmp_path, name)
    assert run(tmp_path) == (0, "", "")


def test_without_apt_get_the_missing_packages_are_named(tmp_path: Path) -> None:
    code, out, err = run(tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("Missing: chromium ")
    assert err.endswith("There is no apt-get here: install them as your system does, then run this again.\n")


def test_neither_root_nor_sudo_is_one_line_of_error(tmp_path: Path) -> None:
    program(tmp_path, "apt-get")
    program(tmp_path, "id", "echo 1000")
    code, out, err = run(tmp_path)
    assert (code, out) == (1, "")
    assert err.endswith("Run this as root, or install sudo.\n")
    assert err.count("\n") == 1


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine without the packages, on which root installs; its policy file is ``tmp_path/policy``."""
    for name in ("mktemp", "rm", "cat", "chmod"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    program(tmp_path, "id", "echo 0")
    program(tmp_path, "systemctl", f'echo "$@" >> {tmp_path}/disabled')
    script = SCRIPT.read_text().replace("/usr/sbin/policy-rc.d", str(tmp_path / "policy"))
    (tmp_path / "system.sh").write_text(script.replace(":/usr/sbin:/sbin", ""))
    (tmp_path / "system.sh").chmod(0o755)
    return tmp_path


def test_no_installed_service_starts_now_or_later(machine: Path) -> None:
    program(machine, "apt-get", f'echo "$@" >> {machine}/asked; {machine}/policy; echo $? >> {machine}/asked')
    assert run(machine, machine / "system.sh") == (
        0,
        f"Installing {PACKAGES}\n",
        "",
    )
    update, code, install, code_again = (machine / "asked").read_text().splitlines()
    assert update.endswith(" update")
    assert install.endswith(f" install --yes --no-install-recommends {PACKAGES}")
    assert (code, code_again) == ("101", "101"), "the policy forbids to start anything"
    assert not (machine / "policy").exists()
    assert (machine / "disabled").read_text() == "--quiet disable nginx\n--quiet disable caddy\n"


def test_a_failure_shows_the_output_of_apt_get_and_removes_the_policy(machine: Path) -> None:
    program(machine, "apt-get", "echo E: no space; exit 100")
    code, _, err = run(machine, machine / "system.sh")
    assert code == 1
    assert err == f"E: no space\nMissing: {PACKAGES}. apt-get update failed, see above.\n"
    assert not (machine / "policy").exists()


def test_an_existing_policy_is_kept(machine: Path) -> None:
    program(machine, "apt-get")
    program(machine, "policy", "exit 101")
    assert run(machine, machine / "system.sh")[0] == 0
    assert (machine / "policy").exists()


@pytest.mark.parametrize("ci", [False, True])
def test_a_test_without_its_program_is_skipped_by_name_but_fails_in_ci(tmp_path: Path, *, ci: bool) -> None:
    (tmp_path / "test_it.py").write_text("from programs import program\n\ndef test_it():\n    program('no-such')\n")
    root = Path(__file__).parents[2]
    argv = [sys.executable, "-m", "pytest", "-p", "conftest", "-n", "1", "-c", root / "pyproject.toml", tmp_path]
    environment = {name: value for name, value in os.environ.items() if name != "CI" and not name.startswith("PYTEST")}
    environment |= {"CI": "true"} if ci else {}
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "tests"), str(root / "examples")])
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False)
    if ci:
        assert done.returncode == 1 and "not installed: no-such; install it with: make system" in done.stdout
    else:
        line = "1 test was skipped without no-such; to run all: install them (make system), then make test"
        assert done.returncode == 0 and line in done.stdout.splitlines()[-2:], done.stdout + done.stderr
