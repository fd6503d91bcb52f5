"""Refused request bodies: the client can read the reason."""

import socket
from pathlib import Path

from harness import make_data
from server_process import Process

HEAD = "POST /projects/web/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Length: {}\r\n\r\n"
MANY = 8 * 1024 * 1024


def test_the_answer_reaches_a_client_that_sends_all_of_its_body_first(tmp_path: Path) -> None:
    data, token = make_data(tmp_path / "data")
    process = Process(data)
    try:
        for key, status in ((token, b"413"), ("nobody", b"401")):
            with socket.create_connection(("127.0.0.1", process.port), timeout=20) as raw:
                raw.sendall(HEAD.format(key, MANY).encode())
                raw.sendall(bytes(MANY))
                answer = b"".join(iter(lambda raw=raw: raw.recv(65536), b""))
            assert answer.startswith(b"HTTP/1.1 " + status), answer[:200]
            assert b"connection: close" in answer.lower()
    finally:
        assert process.end() == 0


def test_an_unfinished_body_is_abandoned(tmp_path: Path) -> None:
    data, _ = make_data(tmp_path / "data")
    process = Process(data)
    try:
        with socket.create_connection(("127.0.0.1", process.port), timeout=20) as raw:
            raw.sendall(HEAD.format("nobody", MANY).encode() + b"only this")
            answer = b"".join(iter(lambda: raw.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 401")
    finally:
        assert process.end() == 0
