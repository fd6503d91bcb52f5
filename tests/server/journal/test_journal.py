"""Journal: appended records survive reopening, torn tails, damage and rotation."""

import os
from pathlib import Path

import pytest

from lattice_remote.server.journal.journal import Journal, Retention
from lattice_remote.server.journal.segment import JournalReader, Record
from lattice_remote.server.tree.tree import FileState

NOW = 1_000_000.0
DAY_S = 24 * 3600.0
SMALL_SEGMENTS = Retention(max_bytes=4_000, segment_bytes=500)


def request_id(number: int) -> str:
    return f"{number:032x}"


def record(seq: int, *, change: bool = True, id_: int | None = None) -> Record:
    files = {f"tasks/{seq}.json": FileState(seq, b"d" * 32, 0, 0)} if change else {}
    return Record(
        seq=seq,
        mark=bytes([seq % 256]) * 8,
        time=1_000_000.0,
        id=request_id(seq if id_ is None else id_),
        token_id="tok",
        change=b"change %d" % seq if change else None,
        reply=b"reply %d" % seq,
        files=files,
    )


def fill(journal: Journal, count: int, *, start: int = 1) -> None:
    for seq in range(start, start + count):
        journal.append(record(seq))
        if journal.is_rotation_due(NOW):
            os.close(journal.rotate())


def reopen(directory: Path, retention: Retention | None = None) -> Journal:
    journal = Journal.open(directory, retention)
    assert journal is not None
    return journal


def test_appended_records_survive_reopening(tmp_path: Path) -> None:
    fill(Journal.create(tmp_path, "e", SMALL_SEGMENTS), 20)
    journal = reopen(tmp_path, SMALL_SEGMENTS)
    assert (journal.epoch, journal.head, journal.mark, journal.oldest) == ("e", 20, bytes([20]) * 8, 1)
    assert len(list(tmp_path.glob("*.log"))) > 2
    found = journal.find(request_id(7))
    assert found == record(7)
    assert journal.find(request_id(99)) is None
    assert [path for states in journal.states_after(18) for path in states] == ["tasks/19.json", "tasks/20.json"]
    fill(journal, 5, start=21)
    assert reopen(tmp_path).head == 25


def test_a_reply_without_a_change_keeps_the_number(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "e")
    journal.append(record(1))
    journal.append(record(1, change=False, id_=50))
    journal = reopen(tmp_path)
    assert journal.head == 1
    assert journal.find(request_id(50)) == record(1, change=False, id_=50)


@pytest.mark.parametrize("surplus", [b"\0\0\0", b"\0" * 100, b"\0\0\0\x05abcd", b"\xff" * 50, b"\0\0\0\x01\0\0\0\0x"])
def test_a_torn_tail_is_cut_and_writing_goes_on(tmp_path: Path, surplus: bytes) -> None:
    fill(Journal.create(tmp_path, "e"), 3)
    with next(tmp_path.glob("*.log")).open("ab") as file:
        file.write(surplus)
    journal = reopen(tmp_path)
    assert journal.head == 3
    assert "cut" in journal.notes[0]
    fill(journal, 1, start=4)
    journal = reopen(tmp_path)
    assert (journal.head, journal.notes) == (4, [])


def test_every_cut_of_the_last_record_leaves_the_ones_before(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "e")
    fill(journal, 2)
    path = next(tmp_path.glob("*.log"))
    whole = path.read_bytes()
    fill(journal, 1, start=3)
    for size in range(len(whole), path.stat().st_size, 7):
        content = path.read_bytes()
        path.write_bytes(content[:size])
        assert reopen(tmp_path).head == 2
        path.write_bytes(content)


def test_no_journal_or_one_that_is_not_readable_is_none(tmp_path: Path) -> None:
    assert Journal.open(tmp_path) is None
    (tmp_path / f"{0:020d}.log").write_bytes(b"garbage")
    assert Journal.open(tmp_path) is None


def test_an_incomplete_segment_is_removed(tmp_path: Path) -> None:
    fill(Journal.create(tmp_path, "e"), 3)
    (tmp_path / f"{3:020d}.new").write_bytes(b"\0\0")
    assert reopen(tmp_path).head == 3
    assert len(list(tmp_path.iterdir())) == 1


def test_history_before_a_damaged_segment_is_given_up(tmp_path: Path) -> None:
    fill(Journal.create(tmp_path, "e", SMALL_SEGMENTS), 20)
    paths = sorted(tmp_path.glob("*.log"))
    content = bytearray(paths[1].read_bytes())
    content[-3] ^= 1
    paths[1].write_bytes(content)
    journal = reopen(tmp_path, SMALL_SEGMENTS)
    assert journal.head == 20
    assert journal.oldest > 3
    assert journal.find(request_id(1)) is None
    assert journal.find(request_id(20)) == record(20)
    assert journal.since > 1_000_000.0, "nothing is sure of answers before that"
    assert JournalReader(tmp_path).read(journal.oldest - 2, 20, 1000) is None
    assert [seq for seq, _ in JournalReader(tmp_path).read(journal.oldest - 1, 20, 10_000) or []][-1] == 20
    assert paths[:2] == journal.expire(NOW + 31 * DAY_S)[:2], "what can't be reached expires too"


def test_history_is_bounded_by_size_and_age_in_whole_segments(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "e", SMALL_SEGMENTS)
    fill(journal, 60)
    expired = journal.expire(1_000_000.0)
    assert expired
    for path in expired:
        path.unlink()
    assert sum(path.stat().st_size for path in tmp_path.glob("*.log")) <= 4_500
    assert 1 < journal.oldest < 60
    assert journal.find(request_id(1)) is None
    assert reopen(tmp_path, SMALL_SEGMENTS).oldest == journal.oldest
    assert len(journal.expire(NOW + 31 * DAY_S)) > 2
    assert journal.find(request_id(60)) is not None or journal.oldest == 61


def test_a_reader_follows_while_the_writer_appends(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "e", SMALL_SEGMENTS)
    reader = JournalReader(tmp_path)
    assert reader.read(0, 0, 1000) == []
    assert reader.mark_at(0) == b""
    fill(journal, 30)
    journal.append(record(30, change=False, id_=99))
    position, seen = 0, []
    while position < 30:
        batch = reader.read(position, 30, 50)
        assert batch
        assert len(batch) <= 7
        seen += batch
        position = batch[-1][0]
    assert seen == [(seq, b"change %d" % seq) for seq in range(1, 31)]
    assert reader.read(30, 30, 50) == []
    sizes = [len(reader.read(0, 30, max_bytes) or []) for max_bytes in (1, 8, 9, 16, 17)]  # of "change 1", "change 2"
    assert sizes == [1, 1, 2, 2, 3]
    assert reader.read(10, 12, 10_000) == [(11, b"change 11"), (12, b"change 12")]
    assert [reader.mark_at(seq) for seq in (0, 1, 17, 30)] == [b"", b"\1" * 8, b"\x11" * 8, b"\x1e" * 8]
    assert reader.mark_at(31) is None


def test_a_reader_says_when_history_is_gone(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "e", SMALL_SEGMENTS)
    fill(journal, 60)
    for path in journal.expire(1_000_000.0):
        path.unlink()
    reader, oldest = JournalReader(tmp_path), journal.oldest
    assert reader.read(oldest - 2, 60, 1000) is None
    assert reader.mark_at(oldest - 2) is None
    changes = reader.read(oldest - 1, 60, 10)
    assert changes is not None
    assert changes[0][0] == oldest
    assert reader.mark_at(oldest - 1) == bytes([oldest - 1]) * 8


def test_a_new_history_forgets_the_old_one(tmp_path: Path) -> None:
    fill(Journal.create(tmp_path, "old"), 5)
    Journal.create(tmp_path, "new")
    journal = reopen(tmp_path)
    assert (journal.epoch, journal.head, journal.oldest, journal.find(request_id(1))) == ("new", 0, 1, None)
    assert journal.notes == []
    reader = JournalReader(tmp_path)
    assert list(reader.records()) == [] and reader.mark_at(3) is None
    fill(journal, 2)
    assert [(seq, change) for seq, change in reader.read(0, 2, 1000) or []] == [(1, b"change 1"), (2, b"change 2")]
    assert reopen(tmp_path).head == 2


def test_a_crash_between_two_histories_loses_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I6: the old history is removed only after the new one, with the pending answers, is complete."""
    fill(Journal.create(tmp_path, "old"), 5)
    steps = ["write", "fsync", "rename"]
    for step in steps:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(os, step, _killed)
            Journal.create(tmp_path, "new", answered=[record(0, change=False, id_=3)])
        journal = reopen(tmp_path)
        assert (journal.epoch, journal.head, journal.find(request_id(3))) == ("old", 5, record(3)), step
    Journal.create(tmp_path, "new", answered=[record(0, change=False, id_=3)])
    journal = reopen(tmp_path)
    assert (journal.epoch, journal.head) == ("new", 0)
    assert journal.find(request_id(3)) == record(0, change=False, id_=3)


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_former_histories_count_and_expire(tmp_path: Path) -> None:
    for epoch in ("one", "two", "three"):
        fill(Journal.create(tmp_path, epoch, SMALL_SEGMENTS), 10)
    journal = reopen(tmp_path, SMALL_SEGMENTS)
    assert (journal.epoch, journal.head) == ("three", 10)
    for path in journal.expire(NOW):
        path.unlink()
    assert sum(path.stat().st_size for path in tmp_path.glob("*.log")) <= 4_500
    assert reopen(tmp_path, SMALL_SEGMENTS).head == 10
    assert len(journal.expire(NOW + 31 * DAY_S)) == len(list(tmp_path.glob("*.log"))) - 1


def test_a_segment_that_is_old_is_closed_though_it_is_small(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "e", Retention(max_age_s=8 * DAY_S), since=NOW)
    assert not journal.is_rotation_due(NOW + 100 * DAY_S), "there is nothing in it"
    journal.append(record(1))
    assert not journal.is_rotation_due(NOW + DAY_S)
    assert journal.is_rotation_due(NOW + DAY_S + 1)
    os.close(journal.rotate())
    assert journal.expire(NOW + 8 * DAY_S) == []
    assert len(journal.expire(NOW + 8 * DAY_S + 1)) == 1
    assert (journal.head, journal.oldest) == (1, 2)


def test_a_torn_record_is_set_aside(tmp_path: Path) -> None:
    fill(Journal.create(tmp_path / "journal", "e"), 3)
    (segment,) = (tmp_path / "journal").glob("*.log")
    with segment.open("ab") as file:
        file.write(b"torn")
    reopen(tmp_path / "journal")
    assert [path.read_bytes() for path in (tmp_path / "set-aside").iterdir()] == [b"torn"]


def test_files_of_a_killed_writer_are_made_durable_before_they_are_reported(tmp_path: Path, synced: list[str]) -> None:
    fill(Journal.create(tmp_path, "e", SMALL_SEGMENTS), 20)
    synced.clear()
    reopen(tmp_path)
    assert {path.name for path in tmp_path.glob("*.log")} | {tmp_path.name} <= set(synced)


def test_a_segment_is_durable_before_the_next_says_where_it_ended(tmp_path: Path, synced: list[str]) -> None:
    journal = Journal.create(tmp_path, "e")
    fill(journal, 1)
    synced.clear()
    os.close(journal.rotate())
    assert synced == [f"{0:020d}.log", f"{1:020d}.new", tmp_path.name]


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the synced files, in order."""
    names: list[str] = []

    def note(descriptor: int) -> None:
        names.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "fdatasync", note)
    return names


def test_answers_outlive_their_history(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "old", SMALL_SEGMENTS)
    fill(journal, 20)
    answered = list(journal.answered_since(1_000_000.0))
    assert [answer.seq for answer in answered] == list(range(1, 21))
    assert list(journal.answered_since(1_000_001.0)) == []
    Journal.create(tmp_path, "new", answered=[record(0, change=False, id_=answer.seq) for answer in answered])
    journal = reopen(tmp_path)
    assert (journal.epoch, journal.head, journal.oldest) == ("new", 0, 1)
    assert journal.find(request_id(7)) == record(0, change=False, id_=7)
    assert JournalReader(tmp_path).read(0, 0, 1000) == []
