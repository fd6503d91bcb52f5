"""Floods of connections from many addresses without a token."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from target import WRITE_BOUND_S, Target, attackable, read_all

WAITING, PER_ADDRESS = 300, 40


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with attackable(
        waiting_connections=WAITING, waiting_connections_per_address=PER_ADDRESS, new_connections_per_second=10
    ) as target:
        yield target


@pytest.fixture
def opened() -> Iterator[list[socket.socket]]:
    """A test's sockets, closed at its end."""
    sockets: list[socket.socket] = []
    yield sockets
    for raw in sockets:
        raw.close()


def wait_until_quiet(target: Target, files: int) -> None:
    end = time.monotonic() + 20
    while target.open_files() > files:
        assert time.monotonic() < end, f"{target.open_files()} files are open still, {files} before"
        time.sleep(0.01)


def test_silent_connections_are_bounded_and_block_no_client(target: Target, opened: list[socket.socket]) -> None:
    files = target.open_files()
    for number in range(1_500):
        opened.append(target.open(address=f"127.2.{number % 120}.1"))
        if number % 250 == 249:
            assert target.write() < WRITE_BOUND_S
            with target.upgraded():
                pass
    assert target.open_files() <= files + WAITING + 20
    target.check("1,500 silent connections from 120 addresses")
    for raw in opened:
        raw.close()
    wait_until_quiet(target, files)


def test_an_address_over_its_limit_is_refused_with_a_message(target: Target, opened: list[socket.socket]) -> None:
    opened += [target.open(address="127.3.0.1") for _ in range(PER_ADDRESS)]
    with target.open(address="127.3.0.1") as raw:
        assert read_all(raw).startswith(b"HTTP/1.1 429 Too Many Requests\r\n")
    with target.open(address="127.3.0.2") as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert read_all(raw).startswith(b"HTTP/1.1 200 ")
    target.check("one address with too many")


def test_a_storm_from_one_address_is_rate_limited(target: Target) -> None:
    request = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answers: list[bytes] = []
    for _ in range(20):  # 400, far above the rate of 10 a second and the 100 at once, on a slow machine too
        with contextlib.ExitStack() as stack:
            storm = [stack.enter_context(target.open(address="127.4.0.1")) for _ in range(20)]
            for raw in storm:
                with contextlib.suppress(ConnectionError):  # refused before it sent its request
                    raw.sendall(request)
            for raw in storm:
                with contextlib.suppress(ConnectionError):
                    answers.append(read_all(raw)[9:12])
    assert answers.count(b"200") >= 100
    assert answers.count(b"429") >= 20, "one in a tenth of a second is let in, perhaps the last"
    target.check("400 connections in a row")


def test_a_storm_without_a_token_delays_no_authenticated_request_of_its_address(target: Target) -> None:
    address, stop = "127.4.1.1", threading.Event()
    refused = threading.Event()

    def storm() -> None:
        while not stop.is_set():
            with target.open(address=address) as raw, contextlib.suppress(OSError):
                raw.sendall(b"GET /projects/board/tasks HTTP/1.1\r\nHost: x\r\n\r\n")
                if read_all(raw).startswith(b"HTTP/1.1 429 "):
                    refused.set()

    attackers = [threading.Thread(target=storm) for _ in range(4)]
    for attacker in attackers:
        attacker.start()
    try:
        assert refused.wait(60), "the storm is over the rate of its address"
        asking = f"GET /projects/board HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {target.token}\r\n".encode()
        for _ in range(40):
            with target.open(address=address) as raw:
                raw.sendall(asking + b"\r\n" + asking + b"Connection: close\r\n\r\n")
                assert read_all(raw).count(b"HTTP/1.1 200 ") == 2, "the first on a connection, and the next"
        with target.upgraded(address=address):
            pass
    finally:
        stop.set()
        for attacker in attackers:
            attacker.join()
    target.check("a storm beside requests with a token")


def test_silent_connections_of_an_address_give_way_to_its_token(target: Target, opened: list[socket.socket]) -> None:
    address = "127.3.1.1"
    opened += [target.open(address=address) for _ in range(PER_ADDRESS)]
    end = time.monotonic() + 10
    answer = b""
    while not answer.startswith(b"HTTP/1.1 200 "):  # silent connections are cut once they are a second old
        assert time.monotonic() < end
        with target.open(address=address) as raw, contextlib.suppress(ConnectionError):
            asking = f"GET /projects/board HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {target.token}\r\n"
            raw.sendall(f"{asking}Connection: close\r\n\r\n".encode())
            answer = read_all(raw)
    target.check("silent connections beside a request with a token")


def test_heads_sent_byte_by_byte_are_bounded(target: Target, opened: list[socket.socket]) -> None:
    files = target.open_files()
    slow = [target.open(address=f"127.5.{number % 30}.1") for number in range(400)]
    opened += slow
    stop = threading.Event()

    def trickle() -> None:
        for byte in b"GET /healthz HTTP/1.1\r\nX-Slow: yes":
            for raw in slow:
                with contextlib.suppress(OSError):
                    raw.send(bytes([byte]))
            if stop.wait(0.02):
                return

    attacker = threading.Thread(target=trickle)
    attacker.start()
    try:
        assert max(target.write() for _ in range(10)) < WRITE_BOUND_S
        with target.upgraded():
            pass
        assert target.open_files() <= files + WAITING + 20
    finally:
        stop.set()
        attacker.join()
    target.check("400 heads that come byte by byte")


def test_endless_tls_handshakes_are_bounded_and_block_no_client(opened: list[socket.socket]) -> None:
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"  # the start of a handshake
    with attackable(tls=True, waiting_connections=WAITING, waiting_connections_per_address=PER_ADDRESS) as target:
        files = target.open_files()
        for number in range(800):
            raw = target.open(address=f"127.6.{number % 100}.1")
            opened.append(raw)
            if number % 2:
                raw.sendall(hello)
            if number % 200 == 199:
                assert target.write() < WRITE_BOUND_S
        assert target.open_files() <= files + WAITING + 20
        target.check("800 TLS handshakes that never end")
        for raw in opened:
            raw.close()
        wait_until_quiet(target, files)
