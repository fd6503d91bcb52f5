"""Commands of the README."""

import re
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

__all__ = ["ROOT", "install_commands", "run_trial", "trial"]

ROOT = Path(__file__).resolve().parents[1]
_TEXT = (ROOT / "README.md").read_text()


def install_commands() -> dict[str, tuple[str, str]]:
    """Return the installing commands by program: in a checkout, and from a registry."""
    rows = re.findall(r"^\| (\w+) \| `([^`]+)` \| `([^`]+)` \|$", _TEXT, re.MULTILINE)
    return {program: (checkout, registry) for program, checkout, registry in rows}


def trial() -> list[str]:
    """Return the blocks of commands that a reader tries."""
    return re.findall(r"^```sh\n(.*?)^```$", _TEXT, re.MULTILINE | re.DOTALL)


def run_trial(directory: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the trial in one shell, on a free port, and stop its server as the README does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = "".join(trial()).replace(":8443", f":{port}").replace("start ", f"start --port {port} ")
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{script}\nlattice remote agent stop >&2\nkill %1\nwait"],
        cwd=directory,
        env=env,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
