"""``lattice-remote start`` as a process of its own."""

import contextlib
import http.client
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

from lattice_remote.server.datadir import DataDir
from sandbox import descendants

COMMAND = [sys.executable, "-c", "from lattice_remote.server.cli import main; main()"]


class Process:
    """``lattice-remote start`` on a free port, and its output."""

    def __init__(self, data: DataDir, *options: str | Path) -> None:
        self.data = data
        self.log = (data.path.parent / "log").open("ab")
        self.process = subprocess.Popen(
            [*COMMAND, "--data", data.path, "start", "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        assert self.line.startswith("Listening on http"), (self.line, (data.path.parent / "log").read_text()[-2000:])
        self.port = int(self.line.rsplit(":", 1)[1])

    def get(self, path: str, method: str = "GET") -> tuple[int, dict[str, object]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        with contextlib.closing(connection):
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    @contextlib.asynccontextmanager
    async def connected(self, token: str, **options: Any) -> AsyncIterator[ClientConnection]:
        scheme = "wss" if "ssl" in options else "ws"
        url = f"{scheme}://127.0.0.1:{self.port}/projects/web/ws"
        headers = {"Authorization": f"Bearer {token}"}
        async with connect(
            url,
            additional_headers=headers,
            subprotocols=["lattice.v1"],
            max_size=None,
            max_queue=None,  # type: ignore[list-item]
            **options,
        ) as client:
            yield client

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(60)
        assert self.process.stdout is not None
        assert self.process.stdout.read() == ""
        self.process.stdout.close()
        self.log.close()
        return code


def children_of(server: Process, what: bytes) -> list[int]:
    """Return the processes that a server has started with these words in their command lines."""
    return [pid for pid in descendants(server.process.pid) if what in Path(f"/proc/{pid}/cmdline").read_bytes()]


def is_gone(pid: int) -> bool:
    """Return whether a process has ended."""
    return not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
