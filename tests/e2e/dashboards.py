"""A running ``lattice dashboard`` and HTTP requests to it: support for the dashboard's tests."""

import contextlib
import http.client
import json
import signal
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sandbox import Client, wait_for

__all__ = ["Dashboard", "free_port", "serving"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@dataclass
class Dashboard:
    """The dashboard's process, and requests to it."""

    process: subprocess.Popen[str]
    host: str
    port: int

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
        """Return status and body of the response; ``Content_Type`` becomes ``Content-Type``."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(http.client.HTTPConnection(self.host, self.port, timeout=30)) as connection:
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def get(self, path: str) -> tuple[int, str]:
        return self.ask("GET", path)

    def post(self, path: str, body: object, **headers: str) -> tuple[int, str]:
        """Post as the page does; a body other than bytes is sent as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, data, **{"Content_Type": "application/json", **headers})

    @contextlib.contextmanager
    def events(self) -> Iterator[Iterator[dict[str, Any]]]:
        """Listen as the page does; yield the id and data of each event."""
        with contextlib.closing(http.client.HTTPConnection(self.host, self.port, timeout=30)) as connection:
            connection.request("GET", "/remote/events")
            answer = connection.getresponse()
            assert answer.headers["Content-Type"] == "text/event-stream"
            yield _read(answer)

    def interrupt(self) -> tuple[int, str]:
        """Press Ctrl-C; return the exit code and stderr."""
        self.process.send_signal(signal.SIGINT)
        _, stderr = self.process.communicate(timeout=20)
        return self.process.returncode, stderr


def _read(stream: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    version = ""
    for line in stream:
        field, _, value = line.decode().rstrip("\n").partition(": ")
        if field == "id":
            version = value
        elif field == "data":
            yield {"version": version, **json.loads(value)}


@contextlib.contextmanager
def serving(client: Client, *, host: str = "127.0.0.1", env: Mapping[str, str] | None = None) -> Iterator[Dashboard]:
    """Run ``lattice dashboard`` in a client's directory for the duration of the block."""
    port = free_port()
    process = client.popen("dashboard", "--host", host, "--port", str(port), "--json", env=env)
    dashboard = Dashboard(process, host, port)

    def answers() -> bool:
        assert process.poll() is None, process.communicate()
        with contextlib.suppress(OSError):
            socket.create_connection((host, port), 1).close()
            return True
        return False

    try:
        wait_for(answers, "the dashboard to listen")
        yield dashboard
    finally:
        if process.poll() is None:
            dashboard.interrupt()
