"""Frames between the server and its processes, however the bytes arrive."""

import socket
import threading
from collections.abc import Iterator

import pytest

from lattice_remote.errors import StorageError
from lattice_remote.server.ipc import FrameBuffer, ReceivedFrames, encode_frames

CONTENTS = ["", "one", "x" * 300, {"a": [1, 2]}]
FRAMES = [bytes(encode_frames(content)[4:]) for content in CONTENTS]
DATA = bytes(encode_frames(*CONTENTS))


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize("piece", [1, 3, 4, 5, 300, len(DATA)])
def test_frames_are_whole_however_they_are_cut(piece: int) -> None:
    buffer = FrameBuffer()
    pieces = [DATA[start : start + piece] for start in range(0, len(DATA), piece)]
    assert [frame for data in pieces for frame in buffer.receive(data)] == FRAMES


def test_a_frame_that_is_too_large_is_refused_before_it_arrives() -> None:
    with pytest.raises(StorageError):
        list(FrameBuffer(max_bytes=10).receive((11).to_bytes(4)))


def test_frames_are_counted_without_waiting_and_none_is_lost(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    received = ReceivedFrames(ours)
    assert received.arrived() == 0
    theirs.sendall(DATA[:-1])
    assert received.arrived() == len(received) == len(FRAMES) - 1
    frames = iter(received)
    assert next(frames) == FRAMES[0]
    assert received.arrived() == len(FRAMES) - 2
    theirs.sendall(DATA[-1:])
    assert received.arrived() == len(FRAMES) - 1
    theirs.close()
    assert received.arrived() == len(FRAMES) - 1, "what came before the end is there"
    assert list(frames) == FRAMES[1:]


def test_large_frames_arrive_in_many_pieces(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    content = "x" * 3_000_000

    def send() -> None:
        theirs.sendall(encode_frames(content, "end"))
        theirs.close()

    sender = threading.Thread(target=send)
    sender.start()
    assert list(ReceivedFrames(ours)) == [bytes(encode_frames(part)[4:]) for part in (content, "end")]
    sender.join()
