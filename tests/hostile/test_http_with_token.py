"""Hostile HTTP requests with a token: none causes a 500, a hang, or growing memory."""

import contextlib
import json
import re
import socket
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from target import EXAMPLES, WRITE_BOUND_S, Target, attackable, read_all

STREAM = "/projects/board/events/stream"
ANSWERS = {200, 201, 204, 304, 400, 403, 404, 405, 409, 411, 412, 413, 414, 415, 422, 426, 429, 431}

fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with attackable(connections_per_token=120) as target:
        yield target


def ask(
    target: Target, method: str, path: str, headers: list[tuple[str, str]], body: bytes = b"", *, ends: bool = False
) -> bytes:
    """Send one request with the token and return the response, or the start of a stream; fail without one.

    With ``ends`` the client sends no further data.
    """
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", f"Authorization: Bearer {target.token}"]
    head = "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers)])
    with target.open() as raw:
        raw.settimeout(20)
        with contextlib.suppress(ConnectionError):  # answered and already cut
            raw.sendall(head.encode("latin-1") + b"\r\n\r\n" + body)
        if ends:
            with contextlib.suppress(OSError):
                raw.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := raw.recv(65536):
                answer += piece
                if b"content-type: text/event-stream" in answer and b"id: " in answer:
                    break
        return answer


def statuses(answer: bytes) -> list[int]:
    assert answer == b"" or answer.startswith(b"HTTP/1.1 "), answer[:100]
    return [int(status) for status in re.findall(rb"(?:^|(?<=[}\n]))HTTP/1\.1 (\d{3}) ", answer)]


PATHS = [
    *("/projects", "/projects/board", "/projects/board/tasks", "/projects/board/tasks/LAT-1", "/projects/board/next"),
    *("/projects/board/tasks/LAT-1/comments", "/projects/board/tasks/LAT-1/events", "/projects/board/resources"),
    *("/projects/board/resources/db", "/projects/board/resources/db/acquire", "/projects/board/plans/LAT-1"),
    *("/projects/board/notes/LAT-1", "/projects/board/dashboard/data", "/projects/board/dashboard/", "/readyz"),
    *("/projects/board/dashboard/api/tasks", "/projects/board/dashboard/api/tasks/../..", "/openapi.json", STREAM),
    *(
        "/projects/../tokens.json",
        "/projects/%2e%2e/tasks",
        "/projects/board/tasks/..%2f..",
        "/projects/board/plans/%00",
    ),
    *(
        "/projects/board/tasks/--help",
        "/projects/board/resources/-x/acquire",
        "/projects/board/notes/../../config.json",
    ),
]
POSITIONS = ["", "0", "-1", "1.1", "999999999999999999", "e" * 5000, "a-1.2", "1\t", "\x80\xff", "null", "0-0.0", "%00"]
KEYS = ["", "k", "k" * 255, "k" * 256, "k" * 9000, "\x80", "a\tb", "../../x", "0" * 32, '"', "%0d%0a"]
BODIES = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b"{",
    b'{"title": "a", "title": "b"}',
    b'{"title": "\\ud800"}',
    b'{"title": "\\u0000"}',
    b'{"title": "' + b"a" * 70_000 + b'"}',
    b'{"title": 1e999}',
    b'{"body": "x", "actor": "human:root"}',
    b'{"status": "done", "force": true}',
    b"[" * 50_000,
    b'{"a":' * 20_000,
    b"\xff\xfe",
    b"# a plan\n\0\xff",
]
TYPES = [
    "application/json",
    "application/json; charset=utf-16",
    "text/markdown",
    "text/plain",
    "multipart/form-data",
    "",
]

requests_of_bad_will = st.tuples(
    st.sampled_from(["GET", "POST", "PUT", "PATCH", "HEAD", "DELETE", "OPTIONS"]),
    st.sampled_from(PATHS),
    st.sampled_from(
        ["", "?since=0", "?since=x&since=y", "?limit=-1", "?limit=99999999", "?%00", "?cursor=../..", "?a=b"]
    ),
    st.lists(
        st.one_of(
            st.tuples(st.just("Last-Event-ID"), st.sampled_from(POSITIONS)),
            st.tuples(st.just("Idempotency-Key"), st.sampled_from(KEYS)),
            st.tuples(st.just("Content-Type"), st.sampled_from(TYPES)),
            st.tuples(
                st.sampled_from(["If-Match", "If-None-Match"]), st.sampled_from(["*", '"x"', "x", "W/", "," * 999])
            ),
            st.tuples(st.just("Accept"), st.sampled_from(["text/html", "text/event-stream", "*/*;q=x"])),
            st.tuples(st.just("Origin"), st.sampled_from(["null", "http://x", "http://evil.example"])),
            st.tuples(st.just("Cookie"), st.sampled_from(["a=b", "lattice=x; lattice=y", "=", ";" * 999])),
        ),
        max_size=5,
    ),
    st.sampled_from(BODIES),
    st.sampled_from(["length", "chunked", "short", "long", "none"]),
)


def framed(body: bytes, how: str) -> tuple[list[tuple[str, str]], bytes]:
    """Return a body in one of the possible framings, some of them false."""
    match how:
        case "length":
            return [("Content-Length", str(len(body)))], body
        case "chunked":
            pieces = [body[at : at + 7] for at in range(0, min(len(body), 700), 7)]
            return [("Transfer-Encoding", "chunked")], b"".join(
                b"%x\r\n%b\r\n" % (len(p), p) for p in pieces
            ) + b"0\r\n\r\n"
        case "short":
            return [("Content-Length", str(len(body) + 10))], body
        case "long":
            return [("Content-Length", str(max(0, len(body) - 1)))], body
        case _:
            return [], b""


@fuzz
@given(requests_of_bad_will)
def test_every_request_is_answered_and_none_with_500(
    target: Target, asked: tuple[str, str, str, list[tuple[str, str]], bytes, str]
) -> None:
    method, path, query, headers, body, how = asked
    more, sent = framed(body, how)
    answer = ask(target, method, path + query, headers + more, sent, ends=how == "short")
    assert answer or how == "short"
    for status in statuses(answer):
        assert status in ANSWERS, (asked, answer[:500])
    head, _, content = answer.partition(b"\r\n\r\n")
    if b"\r\ncontent-type: application/json" in head.lower() and b"content-length" in head.lower() and method != "HEAD":
        assert json.loads(content) is not None


def test_the_server_is_healthy_afterwards(target: Target) -> None:
    target.check("requests of bad will with a token")


def test_a_resume_position_may_be_any_text(target: Target) -> None:
    for position in POSITIONS:
        by_header = ask(target, "GET", STREAM, [("Last-Event-ID", position)])
        assert statuses(by_header) in ([200], [400]), position  # 400: not a valid header
        assert b"event: " in by_header or b"id: " in by_header or statuses(by_header) == [400]
    target.check("hostile positions")


def test_an_idempotency_key_is_single_and_valid_or_refused(target: Target) -> None:
    body = b'{"title": "a task"}'
    typed = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    for key in KEYS:
        answer = ask(target, "POST", "/projects/board/tasks", [("Idempotency-Key", key), *typed], body)
        assert statuses(answer) in ([201], [400], [431]), (key, answer)
    assert statuses(
        ask(target, "POST", "/projects/board/tasks", [("Idempotency-Key", "a"), ("Idempotency-Key", "b"), *typed], body)
    ) == [400]
    target.check("hostile keys")


def test_a_flood_of_streams_is_bounded_and_delays_no_other_client(target: Target) -> None:
    """They read nothing while many events are sent; the backlog of each and their number are bounded."""
    request = f"GET {STREAM} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {target.token}\r\n\r\n".encode()
    streams: list[socket.socket] = []
    try:
        for _ in range(110):
            raw = target.open(buffer_bytes=4096)
            raw.sendall(request)
            streams.append(raw)
        body = json.dumps({"title": "large", "description": "x" * 200_000}).encode()
        typed = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        for _ in range(12):
            assert statuses(ask(target, "POST", "/projects/board/tasks", typed, body)) == [201]
        assert max(target.write() for _ in range(10)) < WRITE_BOUND_S
        target.check("110 streams of which nothing is taken")
        for _ in range(130):  # earlier ones may have been cut by now
            raw = target.open()
            raw.sendall(request)
            streams.append(raw)
        answers = [raw.recv(12) for raw in streams[-130:]]
        assert b"HTTP/1.1 429" in answers
    finally:
        for raw in streams:
            raw.close()
    target.check("more streams than a token may have")


def test_bodies_that_never_arrive_block_no_other_request(target: Target) -> None:
    slow = []
    for _ in range(60):
        raw = target.open()
        raw.sendall(
            f"POST /projects/board/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {target.token}\r\n"
            "Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n{".encode()
        )
        slow.append(raw)
    assert max(target.write() for _ in range(10)) < WRITE_BOUND_S
    target.check("60 bodies that never come")
    for raw in slow:
        raw.shutdown(socket.SHUT_WR)
        assert statuses(read_all(raw)) in ([], [400])
        raw.close()
