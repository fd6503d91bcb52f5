"""A program that writes over HTTP with a key, and repeats the request until it knows the outcome.

Unlike a client it has no cache and no agent.
"""

import json
import secrets
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

import requests

from sandbox import Client, wait_for

__all__ = ["NOTHING", "call"]

NOTHING = "204: there was nothing to do"
"""What it says it printed when a request succeeded and did nothing."""
_PATIENCE_S = 45.0
_TIMEOUT_S = (5.0, 10.0)
"""To connect, and for an answer: on a connection that is half open none comes."""
_AGAIN_S = 0.1
_UNKNOWN = "the request may have taken effect"


@cache
def _remote_of(lattice_dir: Path) -> dict[str, str]:
    """Return the project of a cache; read once: a fault may take the file away for a moment."""
    wait_for((lattice_dir / "remote.json").exists, "remote.json")
    return dict(json.loads((lattice_dir / "remote.json").read_text()))


def call(
    client: Client, method: str, path: str, body: dict[str, Any], *, key: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Write to a client's project; return the outcome as that of a command."""
    remote = _remote_of(client.lattice_dir)
    url = f"{remote['url']}/projects/{remote['project']}{path}"
    headers = {"Authorization": f"Bearer {client.env['LATTICE_TOKEN']}", "Idempotency-Key": key or secrets.token_hex(8)}
    argv = [method, path, json.dumps(body)]
    end, said = time.monotonic() + _PATIENCE_S, ""
    while time.monotonic() < end:
        try:
            answer = requests.request(method, url, json=body, headers=headers, timeout=_TIMEOUT_S)
        except requests.RequestException as error:
            said = type(error).__name__
        else:
            if answer.ok:
                return subprocess.CompletedProcess(argv, 0, NOTHING if answer.status_code == 204 else answer.text, "")
            error = answer.json()["error"]  # whatever is wrong, it is said in an envelope
            said = f"{answer.status_code} {error['code']}: {error['message']}"
            if answer.status_code != 503:
                return subprocess.CompletedProcess(argv, 1, "", f"Error: {said}\n")
        time.sleep(_AGAIN_S)
    return subprocess.CompletedProcess(argv, 1, "", f"Error: {_UNKNOWN}: {said}\n")
