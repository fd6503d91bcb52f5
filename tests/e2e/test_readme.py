"""The README's first try works as printed."""

import re
import socket
import subprocess
from pathlib import Path

import pytest

from sandbox import Sandbox

pytestmark = pytest.mark.e2e

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_first_try_ends_with_the_task_in_the_other_cache() -> None:
    [script] = re.findall(r"^```sh\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    assert script.count(":8443") == 3
    with socket.socket() as free, Sandbox() as sandbox:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        script = script.replace(":8443", f":{port}").replace("start &", f"start --port {port} &")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{script}\nkill %1\nwait"],
            cwd=sandbox.client("ana").dir,
            env=sandbox.environment("ana"),
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == 'LAT-1  backlog  medium  task  "Write the parser"  unassigned'
