"""A token with many requests and slow reads: bounded cost for the server and for other tokens (I10)."""

import contextlib
import http.client
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from lattice.core.events import create_event, serialize_event
from lattice.core.tasks import apply_event_to_snapshot, serialize_snapshot
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from lattice_remote.protocol.messages import (
    CAPABILITIES,
    Fetch,
    Hello,
    ReadVersion,
    Welcome,
    decode_server_frame,
    encode,
)
from lattice_remote.server.transport.websocket import MAX_UNSENT_BYTES_PER_TOKEN
from preloaded_programs import warm
from sandbox import Sandbox, Server, wait_for

TASKS, DESCRIPTION_BYTES = 240, 100_000
LIST_MIB = TASKS * DESCRIPTION_BYTES / 2**20
"""The size of the list, 23 MiB."""
PLANNED, PLAN_BYTES = "task_01M8173J64RGGH4YR2NPR00000", 7_000_000
LARGE, LARGE_BYTES = "task_01M8173J64RGGH4YR2NPR99999", 3_900_000
"""A task that each command about it prints."""
BOUND_MIB = 32 + 2 * LIST_MIB + 32 + 24
"""Unread responses of one token and the last of them, one on its way from the reader, the responses shared while
nothing changes, and 192 KiB for each of 100 connections.
"""
UNSENT_MIB = MAX_UNSENT_BYTES_PER_TOKEN / 2**20


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Sandbox(warm()) as sandbox:
        made = sandbox.server()
        made.project()
        for number in range(TASKS):
            _add_task(made.lattice_dir(), f"task_01M8173J64RGGH4YR2NPR{number:05d}")
        (made.lattice_dir() / f"plans/{PLANNED}.md").write_text("x" * PLAN_BYTES)
        _add_task(made.lattice_dir(), LARGE, custom_fields={"x": "x" * LARGE_BYTES})
        (made.data / "config.json").write_text(json.dumps({"limits": {"unfinished_bytes_per_token": 32 << 20}}))
        made.start()
        yield made
        assert made.stop() == 0


def _add_task(lattice: Path, id_: str, **more: object) -> None:
    data = {
        "title": id_,
        "status": "backlog",
        "type": "task",
        "priority": "medium",
        "description": "x" * 100_000,
        **more,
    }
    event = create_event("task_created", id_, "human:ana", data)
    (lattice / f"events/{id_}.jsonl").write_text(serialize_event(event))
    (lattice / f"tasks/{id_}.json").write_text(serialize_snapshot(apply_event_to_snapshot(None, event)))


@pytest.fixture(scope="module")
def greedy(server: Server) -> str:
    return server.token("human:ana", "agent:*")


@pytest.fixture(scope="module")
def other(server: Server) -> str:
    return server.token("human:ben")


def rss_mib(server: Server) -> float:
    assert server.process is not None
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def ask(server: Server, token: str, path: str, method: str = "GET", body: object = None) -> tuple[int, bytes]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        connection.request(method, f"/projects/board{path}", None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


def send_get(server: Server, token: str, path: str, *, buffer_bytes: int = 4096) -> socket.socket:
    """Send a request and read nothing. A small buffer makes the kernel drop segments and retransmit them ever later."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    raw.connect(("127.0.0.1", server.port))
    raw.sendall(f"GET /projects/board{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
    return raw


@pytest.fixture
def stalled() -> Iterator[list[socket.socket]]:
    sockets: list[socket.socket] = []
    yield sockets
    for raw in sockets:
        raw.close()


def is_over(raw: socket.socket) -> bool:
    """Report whether the server has cut a connection with an unread response."""
    raw.setblocking(False)
    try:
        while raw.recv(1 << 20):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return True


@pytest.mark.parametrize("path", [f"/plans/{PLANNED}", "/tasks", "/dashboard/data"])
def test_a_hundred_unread_responses_take_no_more_memory_than_a_few(
    server: Server, greedy: str, other: str, stalled: list[socket.socket], path: str
) -> None:
    """It holds also while the project changes, so that no two responses are equal."""
    assert len(ask(server, greedy, path)[1]) > LIST_MIB * 2**20 * (path == "/tasks")
    before, most = rss_mib(server), 0.0
    for number in range(100):
        stalled.append(send_get(server, greedy, path))
        if number % 10 == 9:
            assert ask(server, other, f"/tasks/{_first(server, other)}/comments", "POST", {"body": "still"})[0] == 201
        most = max(most, rss_mib(server) - before)
    began = time.monotonic()
    while time.monotonic() < began + 3:  # requests in time
        most = max(most, rss_mib(server) - before)
        assert ask(server, other, "")[0] == 200
    print(f"{path}: {most:+.0f} MiB at most")
    assert most < BOUND_MIB
    wait_for(lambda: is_over(stalled[0]), "the first that reads nothing to be cut", timeout_s=30)


def send_write(server: Server, token: str, method: str, path: str, body: bytes, *, missing: int = 0) -> socket.socket:
    """Send a write and read nothing; omit the last ``missing`` bytes of the body."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", server.port))
    head = (
        f"{method} /projects/board{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nIf-Match: *\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    raw.settimeout(2)
    with contextlib.suppress(ConnectionError, TimeoutError):  # the server may refuse the rest
        raw.sendall(head.encode() + body[: len(body) - missing])
    return raw


def most_mib(server: Server, token: str, before: float, seconds: float) -> float:
    """Return the peak memory in these seconds beyond ``before``, while another token's requests succeed."""
    most, end = 0.0, time.monotonic() + seconds
    while time.monotonic() < end:
        most = max(most, rss_mib(server) - before)
        assert ask(server, token, "")[0] == 200
    return most


def test_unread_replies_to_writes_take_bounded_memory(
    server: Server, greedy: str, other: str, stalled: list[socket.socket]
) -> None:
    reply_mib = len(ask(server, greedy, f"/tasks/{LARGE}")[1]) / 2**20
    before, most = rss_mib(server), 0.0
    for number in range(60):
        body = json.dumps({"title": f"title {number}"}).encode()
        stalled.append(send_write(server, greedy, "PATCH", f"/tasks/{LARGE}", body))
        most = max(most, rss_mib(server) - before)
    most = max(most, most_mib(server, other, before, 9))
    print(f"replies of {reply_mib:.1f} MiB: {most:+.0f} MiB at most")
    assert most < 32 + 4 * reply_mib + 24


def test_unfinished_bodies_take_bounded_memory(
    server: Server, greedy: str, other: str, stalled: list[socket.socket]
) -> None:
    before, most = rss_mib(server), 0.0
    for _ in range(60):
        stalled.append(send_write(server, greedy, "PUT", f"/plans/{PLANNED}", b"x" * PLAN_BYTES, missing=1))
        most = max(most, rss_mib(server) - before)
    most = max(most, most_mib(server, other, before, 3))
    print(f"bodies: {most:+.0f} MiB at most")
    assert most < 32 + 24


def _first(server: Server, token: str) -> str:
    return str(json.loads(ask(server, token, "/tasks?compact=true&limit=1")[1])["data"][0]["id"])


def test_a_token_with_hundreds_of_reads_delays_another_by_one_turn(server: Server, greedy: str, other: str) -> None:
    """Each read has another filter, so that no response serves two."""
    first, done = threading.Event(), list[int]()

    def read(number: int) -> None:
        for turn in range(6):
            assert ask(server, greedy, f"/tasks?tag=n{number}t{turn}&compact=true")[0] == 200
            done.append(number)
            first.set()

    readers = [threading.Thread(target=read, args=(number,)) for number in range(40)]
    for reader in readers:
        reader.start()
    assert first.wait(60)
    ahead = []
    for number in range(5):
        before = len(done)
        assert ask(server, other, f"/tasks?tag=other{number}&compact=true")[0] == 200
        ahead.append(len(done) - before)
    left = sum(reader.is_alive() for reader in readers)
    for reader in readers:
        reader.join()
    assert left > 30, "the other token asked while most of the reads still waited"
    print(f"reads of the other token that went ahead: {ahead}")
    assert sorted(ahead)[2] <= 10, "in order of arrival, 40 would go ahead"


def test_a_slow_reader_gets_all_of_a_long_response(server: Server, greedy: str) -> None:
    """It takes longer than the deadline, which applies to clients that read nothing."""
    want = ask(server, greedy, "/tasks")[1]
    with send_get(server, greedy, "/tasks", buffer_bytes=128 * 1024) as raw:
        got = bytearray()
        began = time.monotonic()
        while time.monotonic() < began + 12:
            got += raw.recv(16384)  # 82 kB/s
            time.sleep(0.2)
        while b"\r\n\r\n" not in got or len(got.partition(b"\r\n\r\n")[2]) < len(want):
            piece = raw.recv(1 << 20)
            assert piece, f"cut after {len(got)} of {len(want)} bytes"
            got += piece
    assert got.partition(b"\r\n\r\n")[2] == want


@contextlib.contextmanager
def websocket(server: Server, token: str) -> Iterator[ClientConnection]:
    """Connect and send the hello; the kernel buffers little unread data."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", server.port))
    headers = {"Authorization": f"Bearer {token}"}
    url = f"ws://127.0.0.1:{server.port}/projects/board/ws"
    options: dict[str, Any] = {"max_size": None, "max_queue": 1, "compression": None, "ping_interval": None}
    with connect(
        url, sock=raw, additional_headers=headers, subprotocols=[Subprotocol("lattice.v1")], **options
    ) as client:
        hello = Hello([1], client_version="t", lattice_version="t", capabilities=list(CAPABILITIES), follow=False)
        client.send(encode(hello))
        assert isinstance(decode_server_frame(bytes(client.recv())), Welcome)
        yield client


@pytest.mark.parametrize("kind", ["versions", "files"])
def test_websocket_clients_that_do_not_read_take_bounded_memory(
    server: Server, greedy: str, other: str, kind: str
) -> None:
    url = f"/plans/{PLANNED}"
    plan = "y" * PLAN_BYTES
    headers = {"Authorization": f"Bearer {greedy}", "If-Match": "*"}
    requested = requests.put(f"{server.url}/projects/board{url}", plan, headers=headers, timeout=30)
    assert requested.status_code == 200, requested.text
    head = int(requested.headers["Lattice-Change"].split("-")[1])
    before, most = rss_mib(server), 0.0
    frames = {
        "versions": lambda: [ReadVersion(secrets.token_hex(16), PLANNED, "plan", head)],
        "files": lambda: [Fetch([f"plans/{PLANNED}.md"])],
    }[kind]
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(websocket(server, greedy)) for _ in range(80)]
        opened = rss_mib(server) - before
        for client in clients:
            for frame in frames():
                with contextlib.suppress(ConnectionClosed):
                    client.send(encode(frame))
            most = max(most, rss_mib(server) - before)
        began = time.monotonic()
        while time.monotonic() < began + 5:
            most = max(most, rss_mib(server) - before)
            assert ask(server, other, "")[0] == 200
            time.sleep(0.05)
        for client in clients:
            client.socket.shutdown(socket.SHUT_RDWR)
    print(f"{kind}: {opened:+.0f} MiB for the connections, {most:+.0f} MiB at most")
    assert most - opened < UNSENT_MIB + 64
