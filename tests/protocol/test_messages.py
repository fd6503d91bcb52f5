"""Decoding: any bytes from a peer become a frame or a ``ProtocolError``."""

import json
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_remote.errors import HostilePath, ProtocolError
from lattice_remote.protocol import messages
from lattice_remote.protocol.messages import (
    Change,
    ClientFrame,
    Entries,
    Entry,
    Fetch,
    Hello,
    Part,
    Parts,
    Put,
    Run,
    ServerFrame,
    WholeFile,
)
from lattice_remote.protocol.operations import DeleteFile

DECODERS = [messages.decode_client_frame, messages.decode_server_frame]
ID = "0" * 32

TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | TEXT | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


PUBLISHED = json.loads((Path(__file__).parents[2] / "protocol/vectors/frames.json").read_text())
FRAMES = [msgspec.msgpack.decode(bytes.fromhex(vector["msgpack"])) for vector in PUBLISHED]


@st.composite
def spoiled_frames(draw: st.DrawFn) -> bytes:
    """Draw the bytes of a frame with some fields replaced by junk."""
    frame = draw(st.sampled_from(FRAMES))
    return msgspec.msgpack.encode(frame | draw(st.dictionaries(st.sampled_from(sorted(frame)), JUNK, max_size=2)))


@pytest.mark.parametrize("decode", DECODERS)
@given(data=st.binary() | JUNK.map(msgspec.msgpack.encode))
def test_random_bytes_raise_only_protocol_errors(decode: Any, data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


@given(data=spoiled_frames())
def test_spoiled_frames_raise_only_protocol_errors(data: bytes) -> None:
    for decode in DECODERS:
        try:
            frame = decode(data)
        except ProtocolError:
            continue
        assert decode(messages.encode(frame)) == frame


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x91" * 100_000 + b"\xc0", id="arrays"),
        pytest.param(b"\x81\xa1a" * 100_000 + b"\xc0", id="maps"),
        pytest.param(b"\x82\xa1x" + b"\x91" * 100_000 + b"\xc0\xa4type\xa8manifest", id="in a field nobody knows"),
        pytest.param(b"\xdd\xff\xff\xff\xff", id="an array that says it is huge"),
        pytest.param(b"\xc6\xff\xff\xff\xff", id="a binary that says it is huge"),
        pytest.param(b"\x81\xa4type\xa4\xff\xfe\xfd\xfc", id="a kind that is not UTF-8"),
        pytest.param(b"\x81\x90\xc0", id="a key that is an array"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_hostile_structures_are_refused(decode: Any, data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


@pytest.mark.parametrize("decode", DECODERS)
def test_frame_over_the_limit_is_not_decoded(decode: Any) -> None:
    data = messages.encode(Hello([1], "1", "1"))
    with pytest.raises(ProtocolError) as caught:
        decode(data, max_bytes=len(data) - 1)
    assert caught.value.code == "REMOTE_TOO_LARGE"


def test_frame_at_the_limit_is_accepted() -> None:
    hello = Hello([1], "1", "1")
    data = messages.encode(hello)
    assert messages.decode_client_frame(data, max_bytes=len(data)) == hello


@pytest.mark.parametrize(
    "frame", [Fetch(["config.json", "../x"]), Put(ID, ".remote/base/plans/x.md", None, b""), Fetch(["remote.json"])]
)
def test_paths_are_checked_while_decoding(frame: ClientFrame) -> None:
    with pytest.raises(HostilePath):
        messages.decode_client_frame(messages.encode(frame))


@pytest.mark.parametrize("argv", [[], ["x"] * 1025])
def test_the_size_of_argv_is_bounded(argv: list[str]) -> None:
    with pytest.raises(ProtocolError):
        messages.decode_client_frame(messages.encode(Run(ID, argv)))


def test_the_number_of_compressed_files_is_bounded() -> None:
    for count in (0, messages.MAX_FETCH_PATHS + 1):
        packed = messages.pack_files([WholeFile(f"tasks/{number}", bytes(32), b"") for number in range(count)])
        with pytest.raises(ProtocolError):
            messages.decode_server_frame(messages.encode(Parts(1, *packed)))


def test_compressed_files_are_not_decompressed_beyond_their_bound() -> None:
    bomb = zlib.compress(bytes(64 << 20), 1)
    data = messages.encode(Parts(1, messages.MAX_PARTS_BYTES, bomb))
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="another size"):
            messages.decode_server_frame(data)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("path", ["../x", "remote.json", "/etc/passwd"])
def test_paths_of_server_frames_are_checked_while_decoding(path: str) -> None:
    mark, digest = bytes(16), bytes(32)
    frames: list[ServerFrame] = [
        Entries(1, mark, [Entry("config.json", 1, digest), Entry(path, 1, digest)], last=True),
        Part(path, 1),
        Parts(1, *messages.pack_files([WholeFile("a", digest, b""), WholeFile(path, digest, b"x")])),
        Change(1, mark, "2030-01-01T00:00:00.000Z", "human:a", "tok", ID, "x", [DeleteFile(path)]),
    ]
    for frame in frames:
        with pytest.raises(HostilePath):
            messages.decode_server_frame(messages.encode(frame))
