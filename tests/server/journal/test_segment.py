"""One segment: which records are read of a damaged one, and which are salvaged from the rest."""

from pathlib import Path

import msgspec
import pytest
from test_journal import fill, record

from lattice_remote.files import frame, frames
from lattice_remote.server.journal.journal import Journal
from lattice_remote.server.journal.segment import read_segment, readable_records, salvaged


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
