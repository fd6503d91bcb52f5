"""Malformed frames against a running server, with a token."""

import contextlib
import secrets
import socket
import struct
import time
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from target import BINARY, EXAMPLES, WRITE_BOUND_S, Target, attackable, frame, read_all, upgrade_request

from lattice_remote.protocol.messages import (
    CAPABILITIES,
    Applied,
    Bye,
    Call,
    Download,
    Fetch,
    Hello,
    Log,
    Manifest,
    Push,
    Put,
    Replay,
    Run,
    Upload,
    Welcome,
    decode_server_frame,
    encode,
)

HELLO = encode(Hello(versions=[1], client_version="t", lattice_version="t", capabilities=list(CAPABILITIES)))
ID = secrets.token_hex(16)
VALID = [
    HELLO,
    encode(Run(ID, ["comment", "LAT-1", "x", "--actor", "human:ana"])),
    encode(Put(ID, "plans/task_01M8173J64RGGH4YR2NPR23QWA.md", None, b"text")),
    encode(Put(ID, "plans/task_01M8173J64RGGH4YR2NPR23QWA.md", b"\xff\r\n", b"\0" * 99, base_digest=bytes(32))),
    encode(Fetch(["config.json", "ids.json"])),
    encode(Manifest()),
    encode(Applied(1)),
    encode(Log(ID)),
    encode(Upload(ID, bytes(32), 9000, 0, bytes(5000))),
    encode(Push(ID, bytes(32), 9000)),
    encode(Download(ID, "ids.json")),
    encode(Replay("9" * 32)),
    encode(Call(ID, "dashboard", "/api/tasks", b'{"title": "x"}')),
]
TEXT, CONTINUED, CLOSE, PING, PONG = 1, 0, 8, 9, 10

fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with attackable(messages_per_second=500) as target:
        yield target


def frames_of(answer: bytes) -> Iterator[tuple[int, bytes]]:
    """Return opcode and payload of each complete frame of the server; each must be unmasked and final."""
    while len(answer) >= 2:
        first, size = answer[0], answer[1]
        start = 2
        if size == 126:
            size, start = struct.unpack(">H", answer[2:4])[0], 4
        elif size == 127:
            size, start = struct.unpack(">Q", answer[2:10])[0], 10
        assert first & 0x80
        assert not answer[1] & 0x80
        if len(answer) < start + size:
            return
        yield first & 0x7F, answer[start : start + size]
        answer = answer[start + size :]


def attack(target: Target, data: bytes) -> list[object]:
    """Send these bytes after the upgrade; return the server's frames; each must be valid."""
    with target.upgraded() as raw:
        with contextlib.suppress(OSError):  # already cut
            raw.sendall(data)
            raw.shutdown(socket.SHUT_WR)
        return [decode_server_frame(payload) for opcode, payload in frames_of(read_all(raw)) if opcode == BINARY]


INTEGERS = st.integers(-(2**63), 2**64 - 1)
"""The range of MessagePack."""
PAYLOADS = st.one_of(
    st.sampled_from(VALID),
    st.binary(max_size=200),
    st.tuples(st.sampled_from(VALID), st.integers(0, 200), st.binary(max_size=6)).map(
        lambda p: p[0][: p[1]] + p[2] + p[0][p[1] + len(p[2]) :]
    ),
    st.sampled_from([b"\x91" * 60_000, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]),
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(
                [
                    "hello",
                    "run",
                    "put",
                    "fetch",
                    "manifest",
                    "applied",
                    "log",
                    "upload",
                    "follow",
                    "call",
                    "change",
                    "bye",
                    "\x1b\n",
                ]
            )
        },
        optional={
            "id": st.one_of(st.just(ID), INTEGERS, st.text(max_size=40)),
            "argv": st.one_of(st.lists(st.text(max_size=10), max_size=5), INTEGERS),
            "path": st.text(max_size=30),
            "surface": st.sampled_from(["dashboard", "mcp", "storage", "../mcp", "", "x" * 40]),
            "name": st.one_of(st.just("/api/tasks"), st.text(max_size=300)),
            "payload": st.one_of(st.sampled_from([b"{}", b'{"title": "x"}', b"[" * 999]), st.binary(max_size=50)),
            "paths": st.lists(st.text(max_size=30), max_size=5),
            "seq": INTEGERS,
            "size": INTEGERS,
            "offset": INTEGERS,
            "digest": st.sampled_from([bytes(32), bytes(31), b"x" * 32]),
            "data": st.binary(max_size=20),
            "purpose": st.sampled_from(["attachment", "project", "../x"]),
            "limit": INTEGERS,
            "versions": st.lists(st.integers(-5, 5), max_size=3),
        },
    ).map(msgspec.msgpack.encode),
)
FRAMES = st.builds(
    frame,
    PAYLOADS,
    st.sampled_from([BINARY] * 6 + [TEXT, CONTINUED, CLOSE, PING, PONG, 3, 11, 15]),
    first=st.sampled_from([0x80] * 6 + [0x00, 0xC0, 0xA0, 0x90, 0x40]),
    masked=st.sampled_from([True] * 8 + [False]),
    declared=st.sampled_from([-1] * 8 + [0, 125, 126, 65_535, 2**31, 2**63 - 1, 2**64 - 1]),
)


@fuzz
@given(st.booleans(), st.lists(FRAMES, min_size=1, max_size=5), st.binary(max_size=10))
def test_every_input_ends_in_at_most_one_clear_error(
    target: Target, greets: bool, frames: list[bytes], rest: bytes
) -> None:
    answers = attack(target, (frame(HELLO) if greets else b"") + b"".join(frames) + rest)
    assert not any(isinstance(answer, Bye) for answer in answers[:-1])
    if greets and answers:
        assert isinstance(answers[0], Welcome | Bye)


def test_the_server_is_healthy_afterwards(target: Target) -> None:
    target.check("garbage in frames")


@fuzz
@given(st.lists(FRAMES, min_size=1, max_size=5))
def test_without_a_token_no_frame_is_read(target: Target, frames: list[bytes]) -> None:
    answer = target.send(upgrade_request("ltr_wrong") + b"".join(frames))
    assert answer == b"" or answer.split()[1] in (b"401", b"429")
    assert answer.count(b"HTTP/1.1") <= 1


def code_after(target: Target, data: bytes, *, greets: bool = True) -> int:
    """Return the close code that these bytes cause, or 0 without one."""
    with target.upgraded() as raw:
        with contextlib.suppress(OSError):
            raw.sendall((frame(HELLO) if greets else b"") + data)
        closes = [payload for opcode, payload in frames_of(read_all(raw)) if opcode == CLOSE]
    return struct.unpack(">H", closes[0][:2])[0] if closes else 0


@pytest.mark.parametrize(
    ("data", "greets", "code"),
    [
        (frame(b"x", declared=2**40), True, 1009),
        (frame(b"x", declared=70_000), False, 1009),
        (frame(b"x" * 40_000, first=0) + frame(b"x" * 40_000, CONTINUED), False, 1009),
        (frame(b"\x91" * 60_000), False, 1002),
        (frame(b"\xff\xfe", TEXT), True, 1007),
        (frame(b"x", masked=False), True, 1002),
        (frame(b"x", first=0xC0), True, 1002),  # as with negotiated compression
        (frame(b"x", CONTINUED), True, 1002),
        (frame(b"x" * 126, PING), True, 1002),
        (frame(b"x", PING, first=0), True, 1002),
        (frame(b"\x03\xe7", CLOSE), True, 1002),
        (frame(HELLO), True, 1002),
    ],
)
def test_each_violation_has_its_code(target: Target, data: bytes, greets: bool, code: int) -> None:
    assert code_after(target, data, greets=greets) == code


def test_compression_is_not_negotiated(target: Target) -> None:
    with target.open() as raw:
        offer = b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n\r\n"
        raw.sendall(upgrade_request(target.token)[:-2] + offer)
        answer = raw.recv(4096)
    assert answer.startswith(b"HTTP/1.1 101 ")
    assert b"extensions" not in answer.lower()


FLOODS = {
    "pings": frame(b"", PING) * 200_000,
    "pongs": frame(b"", PONG) * 200_000,
    "empty messages": frame(b"") * 200_000,
    "empty fragments": frame(HELLO) + frame(b"x", first=0) + frame(b"", CONTINUED, first=0) * 200_000,
    "tiny requests": frame(HELLO) + frame(encode(Applied(1))) * 60_000,
    "tiny uploads": frame(HELLO) + frame(encode(Upload(ID, bytes(32), 9000, 0, b"x"))) * 60_000,
    "manifests": frame(HELLO) + frame(encode(Manifest())) * 60_000,
}


@pytest.mark.parametrize("data", FLOODS.values(), ids=FLOODS.keys())
def test_a_flood_of_frames_is_ended_and_slows_no_other_client(
    target: Target, data: bytes, request: pytest.FixtureRequest
) -> None:
    with target.upgraded() as raw:
        raw.settimeout(20)
        with contextlib.suppress(OSError):
            raw.sendall(data)
        assert target.write() < WRITE_BOUND_S
        with contextlib.suppress(OSError):
            read_all(raw)
    target.check(request.node.callspec.id)


def test_unread_pongs_are_not_kept_indefinitely(target: Target) -> None:
    with target.upgraded(buffer_bytes=4096) as raw:
        with contextlib.suppress(OSError):
            for _ in range(200):
                raw.sendall(frame(b"x" * 125, PING) * 1_000)
        target.check("pongs that nobody reads")


def test_a_client_that_sends_no_hello_costs_other_clients_nothing(target: Target) -> None:
    silent = [target.upgraded() for _ in range(200)]
    began = time.monotonic()
    target.check("200 connections that never greet")
    assert time.monotonic() - began < 10
    for raw in silent:
        raw.close()
