"""Malformed and hostile HTTP requests against a running server, without a token."""

import re
import zlib
from collections.abc import Iterator
from urllib.parse import quote

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from target import EXAMPLES, Target, attackable, frame, read_all, upgrade_request

from lattice_remote.protocol.messages import Hello, encode

GOOD = [
    b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /projects/board HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ltr_wrong\r\n\r\n",
    b"POST /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\nhello",
    upgrade_request("ltr_wrong"),
]
REFUSALS = {400, 401, 404, 405, 413, 414, 426, 429, 431}

fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with attackable() as target:
        yield target


def statuses(answer: bytes) -> list[int]:
    """Return the statuses of all responses; other content is an error."""
    assert answer == b"" or answer.startswith(b"HTTP/1.1 "), answer[:100]
    return [int(status) for status in re.findall(rb"(?:^|(?<=[}\n]))HTTP/1\.1 (\d{3}) ", answer)]


def mutations() -> st.SearchStrategy[bytes]:
    """A request with a few bytes removed, inserted or repeated."""

    def mutated(parts: tuple[bytes, list[tuple[int, int, bytes]]]) -> bytes:
        data, edits = parts
        for place, length, inserted in edits:
            at = place % (len(data) + 1)
            data = data[:at] + inserted + data[max(at + length, 0) :]
        return data

    junk = st.one_of(
        st.binary(max_size=8), st.sampled_from([b"\r\n", b"\n", b"\r", b"\0", b": ", b" ", b"\x1b[2J", b"\xff"])
    )
    edit = st.tuples(st.integers(0, 400), st.integers(-20, 20), junk)
    return st.tuples(st.sampled_from(GOOD), st.lists(edit, min_size=1, max_size=4)).map(mutated)


NAMES = ["Host", "Content-Length", "Transfer-Encoding", "Connection", "Upgrade", "Authorization", "X-Forwarded-For"]
VALUES = [
    "",
    "x",
    "0",
    "5",
    "-1",
    "+5",
    "0x5",
    "1e9",
    "99999999999999999999",
    "chunked",
    "identity, chunked",
    "xchunked",
]
VALUES += ["close", "keep-alive", "Upgrade", "websocket", "h2c", "Bearer ", "Bearer a b", "Basic eDp4", "1.2.3.4, ::1"]
LINE_ENDS = st.sampled_from(["\r\n", "\r\n", "\n", "\r", "\r\n ", "\r\n\t"])


def structured() -> st.SearchStrategy[bytes]:
    """A request of ordinary parts in unusual order."""
    path = st.sampled_from(
        ["/", "/healthz", "/projects/board", "/projects/board/ws", "*", "http://x/healthz", "/%00", "/%2e%2e/"]
    )
    first = st.tuples(
        st.sampled_from(["GET", "POST", "HEAD", "CONNECT", "PRI", "get"]), path, st.sampled_from(["1.1", "1.0", "2.0"])
    )
    name = st.one_of(st.sampled_from(NAMES), st.text("abcXYZ-_ :\t", min_size=1, max_size=6))
    value = st.one_of(st.sampled_from(VALUES), st.text(st.characters(max_codepoint=255), max_size=20))
    header = st.tuples(name, value, LINE_ENDS).map(lambda h: f"{h[0]}: {h[1]}{h[2]}")
    return st.tuples(first, st.lists(header, max_size=8), st.binary(max_size=40)).map(
        lambda r: (f"{r[0][0]} {r[0][1]} HTTP/{r[0][2]}\r\n{''.join(r[1])}\r\n").encode("latin-1") + r[2]
    )


@fuzz
@given(st.one_of(st.binary(max_size=300), mutations(), structured()))
def test_every_request_but_a_health_check_is_refused(target: Target, data: bytes) -> None:
    for status in statuses(target.send(data)):
        assert status in REFUSALS | {100, 200}
        assert status != 200 or b"/healthz" in data or b"HEAD" in data


def test_the_server_is_healthy_afterwards(target: Target) -> None:
    target.check("garbage over HTTP")


@pytest.mark.parametrize(
    "hiding",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
        b"Content-Length: 0\r\nContent-Length: 27\r\n\r\n",
        b"Content-Length: 0, 27\r\n\r\n",
        b"Content-Length: +0\r\n\r\n",
        b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"X: y\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n0;\nx\r\n\r\n",
    ],
    ids=range(11),
)
def test_no_request_can_hide_behind_another(target: Target, hiding: bytes) -> None:
    hidden = b"GET /projects/hidden HTTP/1.1\r\nHost: x\r\n\r\n"
    answered = statuses(target.send(b"POST /healthz HTTP/1.1\r\nHost: x\r\n" + hiding + hidden))
    assert len(answered) <= 1
    assert set(answered) <= {400, 405, 413, 501}


OVERSIZED = {
    "a long line": b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\n\r\n",
    "a long header": b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
    "many headers": b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
    "a long token": upgrade_request("ltr_" + "a" * 12_000),
    "a large body": b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 20000000\r\n\r\n" + b"a" * 20_000_000,
    "a large chunk": b"POST /healthz HTTP/1.1\r\nTransfer-Encoding: chunked\r\nHost: x\r\n\r\n1312D00\r\n"
    + b"a" * 20_000_000,
    "many chunks": b"POST /healthz HTTP/1.1\r\nTransfer-Encoding: chunked\r\nHost: x\r\n\r\n"
    + b"1\r\na\r\n" * 1_000_000,
    "a chunk's long name": b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nHost: x\r\n\r\n1;" + b"a" * 5_000_000,
    "a bomb": b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: 99999\r\n\r\n"
    + zlib.compress(bytes(50_000_000), wbits=31),
    "an upgrade with a body": upgrade_request("ltr_wrong")[:-2] + b"Content-Length: 9999999\r\n\r\n" + b"a" * 9_999_999,
    "thousands of requests": b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 5_000,
}


@pytest.mark.parametrize("data", OVERSIZED.values(), ids=OVERSIZED.keys())
def test_an_oversized_body_is_refused_before_it_is_read(
    target: Target, data: bytes, request: pytest.FixtureRequest
) -> None:
    answered = statuses(target.send(data))
    assert set(answered) <= REFUSALS | {200}
    assert 200 not in answered or b"Host: x\r\n\r\nGET" in data
    target.check(request.node.callspec.id)


def test_a_token_never_reaches_the_log(target: Target) -> None:
    target.new_log_lines()
    target.send(upgrade_request("ltr_secret"))
    target.send(b"GET /projects/ltr_secret/ws?t=ltr_secret HTTP/1.1\r\nHost: x\r\nAuthorization: ltr_secret\r\n\r\n")
    target.send(b"ltr_secret\r\n\r\n")
    with target.upgraded() as raw:
        raw.sendall(frame(b"junk"))
        read_all(raw)
    lines = target.new_log_lines()
    assert any("REMOTE_PROTOCOL" in line for line in lines)
    assert not any("ltr_secret" in line or target.token in line for line in lines)


def test_no_client_writes_lines_or_control_characters_to_the_log(target: Target) -> None:
    target.new_log_lines()
    evil = "\x1b[2J\r\n2030-01-01 00:00:00,000 INFO root: all is well\x9b\u202e"
    target.send(b"GET /projects/\x1b[2J/ws HTTP/1.1\r\nHost: x\r\n\r\n")
    target.send(
        f"GET /projects/{quote(evil)} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {target.token}\r\n\r\n".encode()
    )
    with target.upgraded() as raw:
        raw.sendall(frame(encode(Hello(versions=[1], client_version=evil, lattice_version=evil, follow=False))))
        raw.sendall(frame(msgspec.msgpack.encode({"type": evil})))
        read_all(raw)
    lines = target.new_log_lines()
    assert any("all is well" in line for line in lines)
    assert all(line.isprintable() and re.match(r"2\d{3}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", line) for line in lines)
    assert not any(line.startswith("2030-01-01") for line in lines)
