"""``make system``: says what is missing where it can't install it, and does nothing where nothing is."""

import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "system.sh"


def run(path: str) -> tuple[int, str, str]:
    done = subprocess.run([SCRIPT], env={"PATH": path}, capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, done.stdout, done.stderr


def program(directory: Path, name: str, prints: str = "") -> None:
    (directory / name).write_text(f"#!/bin/sh\necho {prints}\n")
    (directory / name).chmod(0o755)


def test_with_everything_there_nothing_is_done(tmp_path):
    for name in ("chromium", "nginx", "caddy", "systemd-analyze"):
        program(tmp_path, name)
    assert run(str(tmp_path)) == (0, "", "")


def test_without_apt_get_it_names_what_to_install(tmp_path):
    code, out, err = run(str(tmp_path))
    assert (code, out) == (1, "")
    assert err.startswith("Missing: chromium ")
    assert err.endswith("There is no apt-get here: install them as your system does, then run this again.\n")


def test_neither_root_nor_sudo_is_one_line(tmp_path):
    program(tmp_path, "apt-get")
    program(tmp_path, "id", prints="1000")
    code, out, err = run(str(tmp_path))
    assert (code, out) == (1, "")
    assert err.endswith("Run this as root, or install sudo.\n")
    assert err.count("\n") == 1
