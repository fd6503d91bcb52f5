"""Reading and salvaging records of a damaged segment."""

import os
from pathlib import Path

import msgspec
import pytest
from test_journal import NOW, fill, record

from lattice_remote.files import frame, frames
from lattice_remote.server.journal.journal import Journal, Retention, encode_record
from lattice_remote.server.journal.segment import JournalReader, Record, read_segment, readable_records, salvaged


@pytest.fixture
def segment(tmp_path: Path) -> Path:
    """A segment of three records."""
    fill(Journal.create(tmp_path, "e"), 3)
    (path,) = tmp_path.glob("*.log")
    return path


def split(path: Path) -> tuple[bytes, list[bytes]]:
    """Return the frame of a segment's header, and those of its records."""
    header, *records = (frame(payload) for _, payload in frames(path.read_bytes()))
    return header, records


def numbers(path: Path) -> list[int]:
    found = read_segment(path)
    assert found is not None
    return [item.seq for _, item in found[1]]


def test_nothing_is_read_behind_a_frame_that_is_no_record(segment: Path) -> None:
    """Its checksum is right, so a later version may have written it; a repeated record would be applied twice."""
    header, (first, second, third) = split(segment)
    segment.write_bytes(header + first + frame(b"\xc1") + second + third)
    assert numbers(segment) == [1]
    assert [item.seq for item in readable_records(segment)] == [1, 2, 3]


def test_nothing_is_read_behind_a_second_header(segment: Path) -> None:
    header, (first, second, third) = split(segment)
    segment.write_bytes(header + first + header.replace(b"\xa1e", b"\xa1f") + second + third)
    found = read_segment(segment)
    assert found is not None and found[0].header.epoch == "e"
    assert numbers(segment) == [1] and found[0].size == len(header + first)


def test_a_segment_begins_with_its_header(segment: Path) -> None:
    header, records = split(segment)
    segment.write_bytes(records[0] + header + records[1])
    assert read_segment(segment) is None
    assert [item.seq for item in readable_records(segment)] == [1, 2]


@pytest.mark.parametrize("cut", range(24))
def test_records_behind_the_rest_of_another_are_salvaged(cut: int) -> None:
    """Wherever that one is cut off, also right before what all records have in common."""
    whole = _frame_of(1)
    assert [item.seq for item in salvaged(whole[cut:] + _frame_of(2) + b"\0" * 9 + _frame_of(3))][-2:] == [2, 3]


def _frame_of(seq: int) -> bytes:
    return frame(msgspec.msgpack.encode(record(seq)))


def test_the_last_shared_records_before_a_number_are_found_across_private_ones_and_segments(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "e", Retention(segment_bytes=300))
    shared: list[tuple[int, bytes]] = []
    for seq in range(1, 9):
        if seq % 2:  # a content kept before a command is this journal's alone
            journal.append(Record(seq - 1, b"m", 0.0, moved={"tasks/a.json": b"content"}))
        number, each = journal.next_number, record(seq)
        journal.append(each)
        shared.append((number, encode_record(each)))
        if journal.is_rotation_due(NOW):
            os.close(journal.rotate())
    reader = JournalReader(tmp_path)
    assert len(list(tmp_path.glob("*.log"))) > 2
    for upto in range(journal.next_number + 1):
        before = [payload for number, payload in shared if number < upto]
        for count in range(len(before) + 1):
            assert reader.payloads_before(upto, count) == before[len(before) - count :]
        assert reader.payloads_before(upto, len(before) + 1) is None
