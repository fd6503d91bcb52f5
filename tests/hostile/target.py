"""A server to attack, as a process of its own, and the conditions that must hold after every attack.

A well-behaved client stays connected. Attackers come from other loopback addresses than its own.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import trustme
from websockets.sync.client import ClientConnection, connect

from lattice_remote.protocol.messages import Hello, Reply, Run, Welcome, decode_server_frame, encode
from preloaded_programs import warm
from sandbox import Sandbox, Server

__all__ = ["BINARY", "EXAMPLES", "WRITE_BOUND_S", "Target", "attackable", "frame", "read_all", "upgrade_request"]

BINARY = 2
"""The opcode of a binary frame."""

EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", "60"))
"""Number of examples of each property; ``make hostile`` uses more."""
WRITE_BOUND_S = 8.0
"""Maximum duration of a write of the well-behaved client, on a machine that may be busy with other tests."""
_GROWTH_MIB = 64
_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING) [\w.]+: [ -~]{1,400}")
_WORKER_LINE = re.compile(r"worker board: INFO [ -~]{1,400}")


class Target:
    """The server, the well-behaved client, and the state of both before the attacks."""

    def __init__(
        self, server: Server, token: str, client: ClientConnection, trusting: ssl.SSLContext | None = None
    ) -> None:
        self.token = token
        self._trusting = trusting
        self._server = server
        assert server.process is not None
        self._pid = server.process.pid
        self._attackers = 0
        self._client = client
        client.send(encode(Hello(versions=[1], client_version="t", lattice_version="t", follow=False)))
        assert isinstance(decode_server_frame(client.recv(10)), Welcome)  # type: ignore[arg-type]
        self._run("create", "a task", "--actor", "human:ana")
        self.usual_write_s = sorted(self.write() for _ in range(15))[7]
        self._rss_mib = self.rss_mib()
        self._log_read = server.log.stat().st_size

    # --- attackers ---

    def open(self, *, address: str | None = None, buffer_bytes: int | None = None) -> socket.socket:
        """Return a connection from an address of its own; with ``buffer_bytes`` it receives only a little of the data
        sent.
        """
        raw = socket.socket()
        if buffer_bytes is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        self._attackers += 1
        raw.bind((address or f"127.1.{self._attackers % 250}.1", 0))
        raw.settimeout(5)
        raw.connect(("127.0.0.1", self._server.port))
        return raw

    def send(self, data: bytes) -> bytes:
        """Send all of an attacker's data and return the response; fail if nothing ends the connection."""
        with self.open() as raw:
            with contextlib.suppress(OSError):  # already cut
                raw.sendall(data)
                raw.shutdown(socket.SHUT_WR)
            return read_all(raw)

    def upgraded(self, **options: int) -> socket.socket:
        """Return a WebSocket connection with a token, before its first frame."""
        raw = self.open(**options)  # type: ignore[arg-type]
        raw.sendall(upgrade_request(self.token))
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += raw.recv(1)
        assert answer.startswith(b"HTTP/1.1 101 ")
        return raw

    # --- conditions ---

    def write(self) -> float:
        """Write with the well-behaved client; return the duration in seconds."""
        began = time.monotonic()
        self._run("comment", "LAT-1", "still here", "--actor", "human:ana")
        return time.monotonic() - began

    def rss_mib(self) -> float:
        """Return the memory of the server's process."""
        [line] = [
            line for line in Path(f"/proc/{self._pid}/status").read_text().splitlines() if line.startswith("VmRSS")
        ]
        return int(line.split()[1]) / 1024

    def open_files(self) -> int:
        """Return the number of files and sockets that the server's process has open."""
        return len(os.listdir(f"/proc/{self._pid}/fd"))

    def check(self, what: str) -> None:
        """Fail unless the server is as healthy as before; print the cost of ``what``."""
        status, body = self.healthz()
        assert (status, body["status"]) == (200, "ok"), (status, body)
        write_s = min(self.write() for _ in range(3))
        grown = self.rss_mib() - self._rss_mib
        lines = self.new_log_lines()
        pace = f"write {write_s * 1e3:.0f} ms (usual {self.usual_write_s * 1e3:.0f})"
        print(f"{what}: {pace}, {grown:+.1f} MiB, {len(lines)} lines of log")
        assert write_s < WRITE_BOUND_S
        assert grown < _GROWTH_MIB
        for line in lines:
            assert _LINE.fullmatch(line) or _WORKER_LINE.fullmatch(line), "\n".join(lines)
            assert self.token not in line

    def healthz(self) -> tuple[int, dict[str, object]]:
        """Request the health check, as a monitor does."""
        with contextlib.ExitStack() as opened:
            raw = opened.enter_context(socket.create_connection(("127.0.0.1", self._server.port), timeout=5))
            if self._trusting is not None:
                raw = opened.enter_context(self._trusting.wrap_socket(raw, server_hostname="127.0.0.1"))
            raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            head, _, body = read_all(raw).partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)

    def new_log_lines(self) -> list[str]:
        """Return the lines logged since the last call."""
        with self._server.log.open("rb") as log:
            log.seek(self._log_read)
            text = log.read()
        self._log_read += len(text)
        return text.decode("ascii").split("\n")[:-1]

    def _run(self, *argv: str) -> None:
        request = Run(secrets.token_hex(16), list(argv))
        self._client.send(encode(request))
        reply = decode_server_frame(self._client.recv(30))  # type: ignore[arg-type]
        assert isinstance(reply, Reply), reply
        assert (reply.id, reply.exit_code) == (request.id, 0), reply.stderr


@contextlib.contextmanager
def attackable(*, tls: bool = False, **limits: int) -> Iterator[Target]:
    """Start a server with a project ``board`` and these limits, then end it; it must be healthy to its end."""
    with Sandbox(warm()) as sandbox:
        server = sandbox.server()
        server.project()
        config: dict[str, object] = {"limits": limits}
        trusting = _certificate(server.data) if tls else None
        if tls:
            config["tls"] = {"cert": "cert.pem", "key": "server.key"}
        (server.data / "config.json").write_text(json.dumps(config))
        server.start()
        token = server.token("human:ana", "agent:*")
        with connect(
            f"{'wss' if tls else 'ws'}://127.0.0.1:{server.port}/projects/board/ws",
            additional_headers={"Authorization": f"Bearer {token}"},
            subprotocols=["lattice.v1"],  # type: ignore[list-item]
            compression=None,
            ssl=trusting,
        ) as client:
            yield Target(server, token, client, trusting)
        assert server.stop() == 0


def _certificate(directory: Path) -> ssl.SSLContext:
    """Put a certificate and its key into the directory, and return a context that trusts it."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    issued.private_key_pem.write_to_path(directory / "server.key")
    (directory / "server.key").chmod(0o600)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    return trusting


def read_all(raw: socket.socket) -> bytes:
    """Read the connection to its end."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := raw.recv(65536):
            data += piece
    return data


def upgrade_request(token: str) -> bytes:
    """Return a request for the project's WebSocket."""
    return (
        "GET /projects/board/ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Protocol: lattice.v1\r\nAuthorization: Bearer {token}\r\n\r\n"
    ).encode()


def frame(payload: bytes, opcode: int = BINARY, *, first: int = 0x80, masked: bool = True, declared: int = -1) -> bytes:
    """Return one WebSocket frame; ``first`` has its FIN and RSV bits, ``declared`` is its claimed length."""
    size = len(payload) if declared < 0 else declared
    head = bytes([first | opcode])
    bit = 0x80 if masked else 0
    if size < 126:
        head += bytes([bit | size])
    elif size < 1 << 16:
        head += struct.pack(">BH", bit | 126, size)
    else:
        head += struct.pack(">BQ", bit | 127, size)
    return head + (b"\0\0\0\0" if masked else b"") + payload
