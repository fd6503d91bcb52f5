"""Pre-images: restoring brings back a file's bytes after any change."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from worker_process import closing, file_at

from lattice_remote.protocol.operations import digest_of
from lattice_remote.server.ipc import TreeState
from lattice_remote.server.tree.capture import Replacement
from lattice_remote.server.tree.undo import SMALL_BYTES, Begin, UndoLog

SMALL, LARGE = b"small\n", os.urandom(SMALL_BYTES + 10)
HERE = Begin("epoch", 7, "boot")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[UndoLog]:
    (tmp_path / "journal").mkdir()
    with closing():
        opened = UndoLog.open(tmp_path / "journal")
        opened.begin(HERE)
        yield opened


def append(log: UndoLog, path: Path) -> None:
    log.keep_for_append(*file_at(path))
    with path.open("ab") as file:
        file.write(b"more")


def rewrite(log: UndoLog, path: Path) -> None:
    log.keep_for_rewrite(*file_at(path))
    path.write_bytes(b"rewritten")


def replace(log: UndoLog, path: Path) -> None:
    scratch = path.with_name(".tmp.new")
    log.keep_for_rewrite(*file_at(scratch))
    scratch.write_bytes(b"replaced")
    log.keep_for_replace(*file_at(scratch))
    log.keep_for_replace(*file_at(path))
    scratch.replace(path)


def replace_with_known_content(log: UndoLog, path: Path) -> None:
    scratch = path.with_name(".tmp.new")
    scratch.write_bytes(b"replaced")
    before = path.read_bytes() if path.exists() else None
    log.announce(str(path), Replacement(scratch.stat().st_ino, before=before))
    log.keep_for_replace(*file_at(path))
    scratch.replace(path)


def remove(log: UndoLog, path: Path) -> None:
    log.keep_for_replace(*file_at(path))
    path.unlink()


def move_away_and_rewrite(log: UndoLog, path: Path) -> None:
    target = path.with_name("moved")
    log.keep_for_replace(*file_at(path))
    log.keep_for_replace(*file_at(target))
    path.replace(target)
    log.keep_for_append(*file_at(target))
    with target.open("ab") as file:
        file.write(b"more")
    log.keep_for_rewrite(*file_at(target))
    target.write_bytes(b"x")


Deed = Callable[[UndoLog, Path], None]


@pytest.mark.parametrize("content", [SMALL, LARGE, b"", None], ids=["small", "large", "empty", "absent"])
@pytest.mark.parametrize(
    "deeds",
    [
        [append],
        [rewrite],
        [replace],
        [append, append, rewrite],
        [append, replace],
        [replace_with_known_content],
        [append, replace_with_known_content],
        [append, move_away_and_rewrite],
        [replace, rewrite],
        [replace, append, replace],
        [rewrite, remove],
        [append, remove, append],
        [replace, remove, rewrite],
    ],
    ids=lambda deeds: "-".join(deed.__name__ for deed in deeds),
)
def test_restoring_brings_back_the_bytes(
    tmp_path: Path, log: UndoLog, content: bytes | None, deeds: list[Deed]
) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    for deed in deeds:
        deed(log, path)
    reopened = UndoLog.open(tmp_path / "journal")  # as after the death of the process
    assert reopened.pending == HERE
    reopened.restore()
    assert (path.read_bytes() if path.exists() else None) == content
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("file", "journal")] == []
    assert UndoLog.open(tmp_path / "journal").pending is None
    assert list((tmp_path / "journal" / "undo.d").iterdir()) == []


def test_restoring_can_be_cut_off_and_done_again(tmp_path: Path, log: UndoLog) -> None:
    path = tmp_path / "file"
    path.write_bytes(LARGE)
    replace(log, path)
    copy = (tmp_path / "journal" / "undo").read_bytes()
    first = UndoLog.open(tmp_path / "journal")
    first._restore_one(first._images[str(path)])  # killed here, before the log was cleared
    assert (tmp_path / "journal" / "undo").read_bytes() == copy
    UndoLog.open(tmp_path / "journal").restore()
    assert path.read_bytes() == LARGE


def test_a_torn_log_restores_what_it_holds(tmp_path: Path, log: UndoLog) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(SMALL)
    second.write_bytes(SMALL)
    rewrite(log, first)
    log.keep_for_rewrite(*file_at(second))  # and killed before it was touched
    os.truncate(tmp_path / "journal" / "undo", (tmp_path / "journal" / "undo").stat().st_size - 3)
    UndoLog.open(tmp_path / "journal").restore()
    assert first.read_bytes() == second.read_bytes() == SMALL


def test_a_log_torn_within_its_first_record_hides_none_that_follow(tmp_path: Path, log: UndoLog) -> None:
    path, undo = tmp_path / "file", tmp_path / "journal" / "undo"
    path.write_bytes(SMALL)
    log.keep_for_rewrite(*file_at(path))
    os.truncate(undo, 5)
    log = UndoLog.open(tmp_path / "journal")
    assert log.pending is None
    log.begin(HERE)
    rewrite(log, path)
    UndoLog.open(tmp_path / "journal").restore()
    assert path.read_bytes() == SMALL


def test_a_cleared_log_restores_nothing(tmp_path: Path, log: UndoLog) -> None:
    path = tmp_path / "file"
    path.write_bytes(LARGE)
    replace(log, path)
    log.clear()
    assert UndoLog.open(tmp_path / "journal").pending is None
    assert path.read_bytes() == b"replaced"


def test_nothing_is_written_for_a_transaction_that_changes_nothing(tmp_path: Path, log: UndoLog) -> None:
    assert (tmp_path / "journal" / "undo").stat().st_size == 0
    assert log.pending is None


@pytest.mark.parametrize("is_killed", [False, True])
def test_no_link_to_a_content_stays(tmp_path: Path, log: UndoLog, is_killed: bool) -> None:
    paths = [tmp_path / name for name in "abc"]
    for number in range(3):
        for path in paths:
            path.write_bytes(LARGE)
            replace(log, path)
        assert len(list((tmp_path / "journal/undo.d").iterdir())) == 3
        if is_killed:
            log = UndoLog.open(tmp_path / "journal")
            log.restore()
        else:
            log.clear()
        assert list((tmp_path / "journal/undo.d").iterdir()) == []
        assert [path.read_bytes() == LARGE for path in paths] == [is_killed] * 3
        log.begin(Begin("e", number, "boot"))


def test_directories_that_were_made_go_again_unless_something_lies_there(tmp_path: Path, log: UndoLog) -> None:
    for name in ("empty", "used"):
        log.keep_directory(str(tmp_path / name))
        (tmp_path / name).mkdir()
    (tmp_path / "used" / "foreign").write_bytes(b"")
    UndoLog.open(tmp_path / "journal").restore()
    assert not (tmp_path / "empty").exists()
    assert (tmp_path / "used" / "foreign").exists()


def test_the_content_before_is_known_where_it_was_kept(tmp_path: Path, log: UndoLog) -> None:
    for name, content in (("small", SMALL), ("large", LARGE)):
        path = tmp_path / name
        path.write_bytes(content)
        replace(log, path)
        assert log.before(str(path)) == content
    append(log, tmp_path / "new")
    assert log.before(str(tmp_path / "new")) is None


def test_a_record_that_the_full_disk_cut_off_hides_none_that_follow(
    tmp_path: Path, log: UndoLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = tmp_path / "file", os.write
    path.write_bytes(SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:-1]))
        with pytest.raises(OSError, match="short write"):
            log.keep_for_rewrite(*file_at(path))
    log.restore()
    log.begin(HERE)
    rewrite(log, path)
    found = UndoLog.open(tmp_path / "journal")
    assert found.pending == HERE
    found.restore()
    assert path.read_bytes() == SMALL


def test_a_directory_where_a_file_is_expected_stays(tmp_path: Path, log: UndoLog) -> None:
    (tmp_path / "directory").mkdir()
    log.keep_for_append(*file_at(tmp_path / "directory"))
    log.keep_for_replace(*file_at(tmp_path / "directory"))
    UndoLog.open(tmp_path / "journal").restore()
    assert (tmp_path / "directory").is_dir()


def test_a_copy_of_the_project_restores_itself_and_not_the_original(tmp_path: Path) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    (original / "journal").mkdir(parents=True)
    (original / "file").write_bytes(SMALL)
    log = UndoLog.open(original / "journal")
    log.begin(HERE)
    append(log, original / "file")
    shutil.copytree(original, copy)
    UndoLog.open(copy / "journal").restore()
    assert (original / "file").read_bytes() == SMALL + b"more"
    assert (copy / "file").read_bytes() == SMALL


# --- beside another process ---


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (b"old\nours\n", b"old\n"),
        (b"old\nou", b"old\n"),  # killed, or the disk full, half way
        (b"old\n", b"old\n"),
        (b"old\nours\ntheirs\n", b"old\ntheirs\n"),
        (b"old\ntheirs\n", b"old\ntheirs\n"),  # killed before the first byte
        (b"ol", b"ol"),  # cut by another process
    ],
)
def test_appends_of_other_programs_after_a_crash_are_kept(
    tmp_path: Path, log: UndoLog, after: bytes, expected: bytes
) -> None:
    path = tmp_path / ".lattice/log.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"old\n")
    path.chmod(0o640)
    log.announce(str(path), b"ours\n")
    log.keep_for_append(*file_at(path))
    path.write_bytes(after)
    reopened = UndoLog.open(tmp_path / "journal")
    assert reopened.restore() == [str(path)]
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (expected, 0o640)
    assert reopened.of_others == ([str(path)] if b"theirs" in after else [])


def announced_replace(log: UndoLog, path: Path, data: bytes) -> None:
    scratch = path.with_name(".tmp.x")
    scratch.write_bytes(data)
    log.announce(str(path), Replacement(scratch.stat().st_ino, digest_of(data)))
    log.keep_for_move(*file_at(scratch))  # as a rename is seen
    log.keep_for_replace(*file_at(path))
    os.replace(scratch, path)


@pytest.mark.parametrize("size", [3, SMALL_BYTES + 1])
@pytest.mark.parametrize("theirs", [b"", b"theirs"])
@pytest.mark.parametrize("times", [1, 2])
def test_replacements_by_other_programs_after_a_crash_are_kept(
    tmp_path: Path, log: UndoLog, size: int, theirs: bytes, times: int
) -> None:
    path = tmp_path / ".lattice/ids.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"o" * size)
    for number in range(times):
        announced_replace(log, path, b"ours %d" % number)
    if theirs:
        scratch = path.with_name("theirs")
        scratch.write_bytes(theirs)
        os.replace(scratch, path)
    UndoLog.open(tmp_path / "journal").restore()
    assert path.read_bytes() == (theirs or b"o" * size)


def test_an_announcement_holds_for_one_change(tmp_path: Path, log: UndoLog) -> None:
    """A later unannounced change of the same file is undone."""
    path = tmp_path / ".lattice/ids.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"old")
    announced_replace(log, path, b"ours")
    replace(log, path)
    log.restore()
    assert path.read_bytes() == b"old"
    events = tmp_path / ".lattice/log.jsonl"
    events.write_bytes(b"old\n")
    log.begin(Begin("e", 2, "boot"))
    for announced in (b"ours\n", b""):
        if announced:
            log.announce(str(events), announced)
        log.keep_for_append(*file_at(events))
        with events.open("ab") as file:
            file.write(announced or b"more\n")
    log.restore()
    assert events.read_bytes() == b"old\n"


@pytest.mark.parametrize("is_new", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_writes_of_other_programs_over_a_replacement_are_kept(
    tmp_path: Path, log: UndoLog, is_new: bool, in_place: bool
) -> None:
    path = tmp_path / ".lattice/plans/x.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_new:
        path.write_bytes(b"old")
    announced_replace(log, path, b"ours")
    assert log.replaced == {str(path): Replacement(path.stat().st_ino, digest_of(b"ours"))}
    scratch = path if in_place else path.with_name("theirs")
    scratch.write_bytes(b"both")
    os.replace(scratch, path)
    log.restore()
    assert (path.read_bytes(), log.of_others, log.replaced) == (b"both", [str(path)], {})


def test_a_replacement_that_others_remove_is_taken_back(tmp_path: Path, log: UndoLog) -> None:
    path = tmp_path / ".lattice/plans/x.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"old")
    announced_replace(log, path, b"ours")
    path.unlink()
    log.restore()
    assert (path.read_bytes(), log.of_others) == (b"old", [])


def test_a_replacement_without_a_digest_is_taken_back(tmp_path: Path, log: UndoLog) -> None:
    path = tmp_path / ".lattice/ids.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"old")
    scratch = path.with_name(".tmp.x")
    scratch.write_bytes(b"ours")
    log.announce(str(path), Replacement(scratch.stat().st_ino))
    log.keep_for_replace(*file_at(path))
    os.replace(scratch, path)
    log.restore()
    assert (path.read_bytes(), log.of_others) == (b"old", [])


@pytest.mark.parametrize("deed", [append, rewrite, replace, remove])
def test_a_replacement_that_the_transaction_changes_again_is_none(tmp_path: Path, log: UndoLog, deed: Deed) -> None:
    path = tmp_path / ".lattice/plans/x.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"old")
    announced_replace(log, path, b"ours")
    deed(log, path)
    assert log.replaced == {}


def test_a_touched_replacement_is_taken_back(tmp_path: Path, log: UndoLog) -> None:
    path = tmp_path / ".lattice/plans/x.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"old")
    announced_replace(log, path, b"ours")
    os.utime(path)
    log.restore()
    assert path.read_bytes() == b"old"


def test_the_first_change_of_a_file_is_reported_before_it_is_kept(tmp_path: Path, log: UndoLog) -> None:
    seen: list[tuple[str, int | None]] = []

    def note(statuses: Mapping[str, os.stat_result | None]) -> None:
        seen.extend((path, status.st_size if status else None) for path, status in statuses.items())

    log.before_first_changes = note
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"old")
    log.keep_for_append(*file_at(old))
    log.keep_for_replace(*file_at(old))
    log.keep_for_rewrite(*file_at(old))
    log.keep_for_move(*file_at(new))
    log.keep_for_append(*file_at(new))
    other, removed, rewritten = (tmp_path / name for name in ("other", "removed", "rewritten"))
    log.expect(dict([file_at(new), file_at(other)]))
    log.keep_for_append(*file_at(other))
    log.keep_for_replace(*file_at(removed))
    log.keep_for_rewrite(*file_at(rewritten))
    assert seen == [(str(old), 3), *((str(path), None) for path in (new, other, removed, rewritten))]


def test_an_announcement_ends_with_its_transaction(tmp_path: Path, log: UndoLog) -> None:
    path = tmp_path / "file"
    path.write_bytes(SMALL)
    log.announce(str(path), b"never written")
    log.clear()
    log.begin(HERE)
    append(log, path)
    log.restore()
    assert (path.read_bytes(), log.of_others) == (SMALL, [])


def test_readers_see_when_files_are_not_as_committed(tmp_path: Path, log: UndoLog) -> None:
    journal, path = tmp_path / "journal", tmp_path / "file"
    log.keep_for_rewrite(*file_at(tmp_path / ".tmp.file"))
    assert TreeState.read(journal) == TreeState(), "no reader sees a temporary file"
    append(log, path)
    assert TreeState.read(journal) == TreeState(is_open=True)
    log.clear(8)
    assert TreeState.read(journal) == TreeState(ended=1, seq=8)
    log.begin(HERE)
    append(log, path)
    append(log, path)
    log.restore()
    assert TreeState.read(journal) == TreeState(ended=2, rolled_back=1, seq=8)
    log.begin(HERE)
    log.clear()
    assert TreeState.read(journal) == TreeState(ended=2, rolled_back=1, seq=8), "nothing was changed"
    log.begin(HERE)
    append(log, path)
    assert (UndoLog.open(journal).restore(), TreeState.read(journal).rolled_back) == ([str(path)], 2)


def test_the_paths_of_a_transaction_are_those_that_it_changed(tmp_path: Path, log: UndoLog) -> None:
    append(log, tmp_path / "one")
    rewrite(log, tmp_path / "two")
    assert log.paths == [str(tmp_path / "one"), str(tmp_path / "two")]
    log.clear()
    assert log.paths == []


def test_a_content_is_reported_before_it_is_lost(tmp_path: Path, log: UndoLog) -> None:
    seen: list[tuple[str, int]] = []
    log.before_overwrite = lambda path, size: seen.append((path, size))
    rewritten, replaced, removed, moved, grown = (tmp_path / name for name in ("a", "bb", "ccc", "dddd", "eeeee"))
    for path in (rewritten, replaced, removed, moved, grown):
        path.write_bytes(path.name.encode())
    rewrite(log, rewritten)
    replace(log, replaced)
    remove(log, removed)
    log.keep_for_move(*file_at(moved))
    append(log, grown)
    append(log, tmp_path / "new")
    of_temporary = [each for each in seen if "/.tmp." in each[0]]
    assert [each for each in seen if each not in of_temporary] == [
        (str(rewritten), 1),
        (str(replaced), 2),
        (str(removed), 3),
    ]


def test_without_hard_links_a_large_content_is_copied(
    tmp_path: Path, log: UndoLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    path = tmp_path / "file"
    path.write_bytes(LARGE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        replace(log, path)
    assert list((tmp_path / "journal/undo.d").iterdir()) == []
    UndoLog.open(tmp_path / "journal").restore()
    assert path.read_bytes() == LARGE


def test_leftovers_of_a_killed_restore_are_removed(tmp_path: Path, log: UndoLog) -> None:
    path = tmp_path / "file"
    path.write_bytes(LARGE)
    replace(log, path)
    (tmp_path / ".tmp.undo.file").write_bytes(b"half")
    UndoLog.open(tmp_path / "journal").restore()
    assert path.read_bytes() == LARGE
    assert not (tmp_path / ".tmp.undo.file").exists()


def test_a_directory_that_replaces_a_removed_file_hides_no_content(tmp_path: Path, log: UndoLog) -> None:
    path = tmp_path / "file"
    path.write_bytes(SMALL)
    remove(log, path)
    log.keep_directory(str(path))
    UndoLog.open(tmp_path / "journal").restore()
    assert path.read_bytes() == SMALL
