"""Group commit: one fsync makes a batch durable, and no durable work waits for later work (I2, I10)."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from lattice_remote.server.ipc import ReceivedFrames, RequestDone, ToServer
from lattice_remote.server.journal import journal
from lattice_remote.server.journal.journal import CommitJob, Committer

_decoder: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)


class Place:
    def __init__(self, directory: Path) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(20)
        self.connection, self.committer = ours, Committer(theirs)
        self._frames = iter(ReceivedFrames(ours))
        self._theirs = theirs
        self.journal = os.open(directory / "journal", os.O_WRONLY | os.O_CREAT)

    def submit(self, seq: int) -> None:
        self.committer.submit(CommitJob(RequestDone(f"{seq:032x}", seq), self.journal))

    def receive(self) -> RequestDone:
        message = _decoder.decode(next(self._frames))
        assert isinstance(message, RequestDone)
        return message

    def close(self) -> None:
        self.committer.finish()
        self._theirs.close()
        self.connection.close()
        os.close(self.journal)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.close()


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    done: list[int] = []
    monkeypatch.setattr(journal, "sync", done.append)
    return done


def test_a_batch_costs_one_fsync_and_is_sent_in_order(place: Place, syncs: list[int]) -> None:
    for seq in range(1, 6):
        place.submit(seq)
    assert not syncs
    place.committer.flush()
    received = [place.receive() for _ in range(5)]
    assert [done.seq for done in received] == [1, 2, 3, 4, 5]
    assert syncs == [place.journal]
    assert [done.synced_s is not None for done in received] == [True, False, False, False, False]


def test_a_finished_command_is_committed_beside_a_long_one(place: Place, syncs: list[int]) -> None:
    for seq in (1, 2):
        place.submit(seq)
        place.committer.flush_soon()
        assert place.receive().seq == seq
    assert len(syncs) == 2


def test_a_flush_does_not_wait_for_the_delay(place: Place, syncs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_MAX_DELAY_S", 3600.0)
    for seq in (1, 2):
        place.submit(seq)
        place.committer.flush_soon()
    place.committer.flush()
    assert [place.receive().seq for _ in range(2)] == [1, 2]
    assert len(syncs) == 1


def test_the_end_commits_everything(place: Place, syncs: list[int]) -> None:
    for seq in (1, 2, 3):
        place.submit(seq)
    place.committer.wait()
    assert [place.receive().seq for _ in range(3)] == [1, 2, 3]
    place.submit(4)
    place.committer.finish()
    assert place.receive().seq == 4
    assert len(syncs) == 2
