"""Changes of a tree as operations that reproduce them on any cache."""

import ctypes
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worker_process import Copy, tree_of

from lattice_remote.protocol.operations import (
    AnnounceFile,
    AppendBytes,
    DeleteFile,
    MemoryTree,
    MergeJson,
    MoveFile,
    PutFile,
    canonical_json,
    digest_of,
    merge_patch,
)
from lattice_remote.server.tree import tree as tree_module
from lattice_remote.server.tree.capture import AccessLog, Move
from lattice_remote.server.tree.tree import (
    INLINE_BYTES,
    ProjectTree,
    SyncFailed,
    TreeDiff,
    TrustedDigest,
    patch_between,
    sync_files,
)


@pytest.fixture
def tree(tmp_path: Path) -> ProjectTree:
    root = tmp_path / ".lattice"
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    tree = ProjectTree(root, {})
    tree.accept(tree.reconcile())
    return tree


TASK = "task_01ARZ3NDEKTSV4RRFFQ69G5FAV"
FILES = {
    "config.json": b"{}\n",
    "events/a.jsonl": b"1\n2\n",
    "events/_lifecycle.jsonl": b"",
    "tasks/a.json": b'{"a": 1}\n',
    "plans/a.md": b"# A\n",
}


def touched(*steps: str | Move, tree: ProjectTree | None = None, appended: str = "") -> AccessLog:
    made = AccessLog(list(steps))
    if tree is not None:
        made.appended[appended] = tree.status(appended)
    return made


def compare(tree: ProjectTree, what: AccessLog, before: dict[str, bytes] | None = None) -> TreeDiff:
    known = {tree.absolute(path): content for path, content in (before or {}).items()}
    return tree.after_command(what, known.get)


def check_leads_there(tree: ProjectTree, difference: TreeDiff, old: dict[str, bytes]) -> None:
    copy = Copy(tree.root, dict(old))
    from lattice_remote.protocol.messages import Change

    copy.follow(Change(1, b"", "", "", "", "", "", difference.operations))
    assert copy.files == tree_of(tree.root)
    tree.accept(difference)
    assert {path: state.size for path, state in tree.files.items()} == {p: len(c) for p, c in copy.files.items()}


def test_a_file_altered_under_its_old_time_is_found_where_times_are_not_trusted(tree: ProjectTree) -> None:
    place = tree.root / "tasks/a.json"
    os.utime(place, (1, 1))
    tree.accept(tree.reconcile())
    place.write_bytes(b'{"a": 2}\n')
    os.utime(place, (1, 1))
    assert tree.reconcile().operations == []
    difference = tree.reconcile(trust_signatures=False)
    check_leads_there(tree, difference, FILES)
    assert difference.operations


def test_operations_come_in_the_order_of_writing(tree: ProjectTree) -> None:
    what = touched("events/a.jsonl", "tasks/a.json", "plans/b.md", tree=tree, appended="events/a.jsonl")
    with (tree.root / "events/a.jsonl").open("ab") as file:
        file.write(b"3\n")
    (tree.root / "tasks/a.json").unlink()
    (tree.root / "plans/b.md").write_bytes(b"# B\n")
    difference = compare(tree, what)
    append, delete, put = difference.operations
    assert isinstance(append, AppendBytes)
    assert (append.offset, append.data) == (4, b"3\n")
    assert (delete, put) == (DeleteFile("tasks/a.json"), PutFile("plans/b.md", b"# B\n"))
    check_leads_there(tree, difference, FILES)


def test_growth_is_an_append_however_it_was_written(tree: ProjectTree) -> None:
    (tree.root / "plans/a.md").write_bytes(b"# A\nmore\n")
    difference = compare(tree, touched("plans/a.md"))
    assert isinstance(difference.operations[0], AppendBytes)
    check_leads_there(tree, difference, FILES)


LOG, SNAPSHOT = "events/a.jsonl", "tasks/a.json"


def publish(tree: ProjectTree, line: bytes, snapshot: bytes) -> AccessLog:
    """Append a line and replace a snapshot, as the worker does with known contents."""
    what = touched(LOG, SNAPSHOT, tree=tree, appended=LOG)
    with (tree.root / LOG).open("ab", buffering=0) as log:
        log.write(line)
        what.written[LOG] = os.fstat(log.fileno()), line
    scratch = tree.root / "tasks/.tmp.new"
    scratch.write_bytes(snapshot)
    what.written[SNAPSHOT] = scratch.stat(), snapshot
    scratch.replace(tree.root / SNAPSHOT)
    return what


def test_known_contents_are_not_read_again(tree: ProjectTree, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = dict(FILES)
    for number in range(8):
        what = publish(tree, b"line %d\n" % number * 300, b'{"a": %d}\n' % number)
        with monkeypatch.context() as patch:
            if number:
                patch.setattr("builtins.open", None)
            difference = compare(tree, what)
        assert [type(operation) for operation in difference.operations] == [AppendBytes, PutFile]
        check_leads_there(tree, difference, copy)
        copy = tree_of(tree.root)
    assert tree.reconcile(trust_signatures=False).operations == []


def grow(place: Path) -> None:
    with place.open("ab") as file:
        file.write(b"theirs\n")


def overwrite(place: Path) -> None:
    with place.open("r+b") as file:
        file.write(b"?")
    os.utime(place, (1, 1))


def put_another(place: Path) -> None:
    data = place.read_bytes().replace(b"1", b"7")
    place.unlink()
    place.write_bytes(data)


@pytest.mark.parametrize("path", [LOG, SNAPSHOT])
@pytest.mark.parametrize("change", [grow, overwrite, put_another, Path.unlink])
def test_known_contents_that_another_process_changed_are_read(
    tree: ProjectTree, path: str, change: Callable[[Path], None]
) -> None:
    check_leads_there(tree, compare(tree, publish(tree, b"line\n", b'{"a": 1}\n')), FILES)
    before = tree_of(tree.root)
    what = publish(tree, b"line 2\n", b'{"a": 2}\n')
    change(tree.root / path)
    difference = compare(tree, what)
    check_leads_there(tree, difference, before)
    assert {path: state.digest for path, state in tree.files.items()} == {
        path: digest_of(content) for path, content in tree_of(tree.root).items()
    }


def test_a_log_that_grows_is_read_only_where_it_grew(tree: ProjectTree, monkeypatch: pytest.MonkeyPatch) -> None:
    path = "events/_lifecycle.jsonl"
    copy = Copy(tree.root, dict(FILES))
    for number in range(20):
        what = touched(path, tree=tree, appended=path)
        with (tree.root / path).open("ab") as file:
            file.write(b"%d " % number * 1000)
        if number == 2:
            monkeypatch.setattr(ProjectTree, "_read_whole", None)
        difference = compare(tree, what)
        tree.accept(difference)
        for operation in difference.operations:
            assert isinstance(operation, AppendBytes)
            MemoryTree(copy.files).append(path, operation.data)
    assert copy.files[path] == (tree.root / path).read_bytes()


@pytest.mark.parametrize("is_trusted", [False, True])
def test_a_log_that_grows_after_it_was_replaced_has_the_digest_of_its_new_content(
    tree: ProjectTree, is_trusted: bool
) -> None:
    lines = b"x\n" * INLINE_BYTES
    for line in (lines, b"1\n"):
        tree.accept(compare(tree, publish(tree, line, b"{}\n")))
    place, snapshot = tree.root / LOG, b'{"a": 2}\n'
    size = place.stat().st_size
    place.unlink()
    place.write_bytes(b"y" * size)
    status = place.stat()
    trusted = {status.st_ino: TrustedDigest(size, status.st_mtime_ns, digest_of(b"y" * size))} if is_trusted else {}
    tree.accept(tree.after_command(touched(LOG), lambda _: None, trusted))
    tree.accept(compare(tree, publish(tree, b"2\n", snapshot)))
    assert tree.files[LOG].digest == digest_of(b"y" * size + b"2\n")


def test_a_log_that_was_changed_before_it_grew_is_replaced(tree: ProjectTree) -> None:
    path = tree.root / "events/a.jsonl"
    path.write_bytes(b"9\n9\n")
    os.utime(path, ns=(1, 1))
    what = touched("events/a.jsonl", tree=tree, appended="events/a.jsonl")
    with path.open("ab") as file:
        file.write(b"3\n")
    difference = compare(tree, what)
    assert difference.operations == [PutFile("events/a.jsonl", b"9\n9\n3\n")]


def test_a_rename_is_a_move_after_what_was_written_before_it(tree: ProjectTree) -> None:
    what = touched(
        "events/a.jsonl", Move("events/a.jsonl", "archive/events/a.jsonl"), tree=tree, appended="events/a.jsonl"
    )
    (tree.root / "archive/events").mkdir(parents=True)
    with (tree.root / "events/a.jsonl").open("ab") as file:
        file.write(b"3\n")
    (tree.root / "events/a.jsonl").rename(tree.root / "archive/events/a.jsonl")
    difference = compare(tree, what)
    assert [type(operation) for operation in difference.operations] == [AppendBytes, MoveFile]
    check_leads_there(tree, difference, FILES)


def test_a_write_after_a_rename_follows_it(tree: ProjectTree) -> None:
    (tree.root / "plans/a.md").rename(tree.root / "plans/b.md")
    (tree.root / "plans/b.md").write_bytes(b"other")
    difference = compare(tree, touched(Move("plans/a.md", "plans/b.md"), "plans/b.md"))
    assert [type(operation) for operation in difference.operations] == [MoveFile, PutFile]
    check_leads_there(tree, difference, FILES)


def test_a_write_of_another_process_after_a_rename_gets_a_separate_change(tree: ProjectTree) -> None:
    (tree.root / "plans/a.md").rename(tree.root / "plans/b.md")
    (tree.root / "plans/b.md").write_bytes(b"other")
    difference = compare(tree, touched(Move("plans/a.md", "plans/b.md")))
    assert [type(operation) for operation in difference.operations] == [MoveFile]
    tree.accept(difference)
    assert [type(operation) for operation in tree.reconcile().operations] == [PutFile]


@pytest.mark.parametrize(("path", "is_known"), [(f"plans/{TASK}.md", False), (f"events/{TASK}.jsonl", True)])
def test_the_content_of_a_young_file_decides_if_people_edit_it(tree: ProjectTree, path: str, is_known: bool) -> None:
    """A second write in place may leave size and modification time as they were."""
    place = tree.root / path
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(b"one")
    tree.accept(tree.reconcile())
    tree.files[path] = msgspec.structs.replace(tree.files[path], settled=False)
    assert tree.is_as_known(path, tree.status(path))
    times = place.stat()
    place.write_bytes(b"two")
    os.utime(place, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert tree.is_as_known(path, tree.status(path)) == is_known
    assert not tree.is_as_known(path, None)
    assert not tree.is_as_known("plans/none.md", place.stat())
    assert tree.is_as_known("plans/none.md", None)


def test_renames_that_did_not_last_are_compared_as_files(tree: ProjectTree) -> None:
    a, b, c = (tree.root / "plans" / name for name in ("a.md", "b.md", "c.md"))
    a.rename(b)
    b.rename(c)
    a.write_bytes(b"again")
    difference = compare(
        tree, touched(Move("plans/a.md", "plans/b.md"), Move("plans/b.md", "plans/c.md"), "plans/a.md")
    )
    check_leads_there(tree, difference, FILES)


def test_two_renames_are_one_move(tree: ProjectTree) -> None:
    a, b, c = (tree.root / "plans" / name for name in ("a.md", "b.md", "c.md"))
    a.rename(b)
    b.rename(c)
    difference = compare(tree, touched(Move("plans/a.md", "plans/b.md"), Move("plans/b.md", "plans/c.md")))
    assert [type(operation) for operation in difference.operations] == [MoveFile]
    check_leads_there(tree, difference, FILES)


def test_a_large_json_file_with_a_small_change_is_patched(tree: ProjectTree) -> None:
    before = canonical_json({"map": {f"LAT-{n}": f"task_{n}" for n in range(500)}, "next": 1})
    after = canonical_json({"map": {f"LAT-{n}": f"task_{n}" for n in range(1, 501)}, "next": 2})
    (tree.root / "ids.json").write_bytes(before)
    tree.accept(tree.reconcile())
    (tree.root / "ids.json").write_bytes(after)
    difference = compare(tree, touched("ids.json"), {"ids.json": before})
    assert isinstance(difference.operations[0], MergeJson)
    assert len(difference.operations[0].patch) < 100
    check_leads_there(tree, difference, {**FILES, "ids.json": before})


def test_a_large_file_is_announced_and_so_is_what_is_too_much_for_one_change(tree: ProjectTree) -> None:
    (tree.root / "artifacts").mkdir()
    names = [f"artifacts/{number:02}" for number in range(20)]
    for name in names:
        (tree.root / name).write_bytes(os.urandom(INLINE_BYTES - 1))
    (tree.root / "artifacts/large").write_bytes(os.urandom(INLINE_BYTES + 1))
    difference = compare(tree, touched("artifacts/large", *names))
    kinds = [type(operation) for operation in difference.operations]
    assert kinds[0] is AnnounceFile
    assert kinds.count(PutFile) == 16
    check_leads_there(tree, difference, FILES)


def test_a_file_larger_than_memory_allows_is_announced_with_its_digest(tree: ProjectTree) -> None:
    with (tree.root / "huge").open("wb") as file:
        file.truncate(9 * 1024 * 1024)
    difference = tree.reconcile()
    assert isinstance(difference.operations[0], AnnounceFile)
    check_leads_there(tree, difference, FILES)


@pytest.mark.parametrize(("size", "kind"), [(INLINE_BYTES, PutFile), (INLINE_BYTES + 1, AnnounceFile)])
def test_a_file_whose_digest_is_trusted_is_read_only_to_travel_within_the_change(
    tree: ProjectTree, size: int, kind: type
) -> None:
    path, data = tree.root / "artifacts/payload/a", os.urandom(size)
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    status = path.stat()
    trusted = {status.st_ino: TrustedDigest(size, status.st_mtime_ns, digest_of(data))}
    difference = tree.after_command(touched("artifacts/payload/a"), lambda _: None, trusted)
    assert [type(operation) for operation in difference.operations] == [kind]
    check_leads_there(tree, difference, FILES)


def test_an_empty_file_that_is_filled_is_sent_whole(tree: ProjectTree) -> None:
    (tree.root / "events/_lifecycle.jsonl").write_bytes(b"1\n")
    assert tree.reconcile().operations == [PutFile("events/_lifecycle.jsonl", b"1\n")]


def test_a_settled_file_is_unchanged_until_its_signature_changes(tree: ProjectTree) -> None:
    path = tree.root / "tasks/a.json"
    os.utime(path, (1, 1))
    tree.accept(tree.reconcile())
    assert tree.is_unchanged("tasks/a.json", path.stat())
    os.utime(path, (2, 2))
    assert not tree.is_unchanged("tasks/a.json", path.stat())
    assert not tree.is_unchanged("tasks/b.json", path.stat())


def test_an_error_while_the_whole_file_system_is_synced_is_an_error(
    tree: ProjectTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = SimpleNamespace(syncfs=lambda _: ctypes.set_errno(errno.EIO) or -1)
    monkeypatch.setattr(tree_module, "_MANY_FILES", 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)
    with pytest.raises(SyncFailed) as error:
        sync_files([tree.absolute("tasks/a.json"), tree.absolute("tasks/b.json")])
    assert error.value.errno == errno.EIO


def test_files_written_with_the_same_content_are_no_change(tree: ProjectTree) -> None:
    (tree.root / "tasks/a.json").unlink()
    (tree.root / "tasks/a.json").write_bytes(FILES["tasks/a.json"])
    difference = tree.reconcile()
    assert difference.operations == []
    tree.accept(difference)


def test_reconciling_finds_outside_changes_event_logs_first(tree: ProjectTree) -> None:
    (tree.root / "config.json").write_bytes(b'{"x": 1}\n')
    (tree.root / "events/b.jsonl").write_bytes(b"1\n")
    (tree.root / "plans/a.md").unlink()
    (tree.root / "locks").mkdir()
    (tree.root / "locks/x.lock").write_bytes(b"")
    (tree.root / "plans/a.md~").write_bytes(b"an editor's")
    (tree.root / "tasks/.tmp.x").write_bytes(b"")
    assert tree.reconcile(["plans/a.md", "../x", "nope"]).operations == [DeleteFile("plans/a.md")]
    difference = tree.reconcile()
    assert [operation.path for operation in difference.operations] == ["events/b.jsonl", "config.json", "plans/a.md"]
    check_leads_there(tree, difference, FILES)
    assert tree.reconcile().operations == []


def test_a_young_file_is_looked_at_again(tree: ProjectTree) -> None:
    path = tree.root / "plans/a.md"
    status = path.stat()
    path.write_bytes(b"# B\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as within one tick of the file system's clock
    assert tree.reconcile().operations == [PutFile("plans/a.md", b"# B\n")]


def test_symbolic_links_and_special_files_are_no_part_of_the_tree(tree: ProjectTree, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/x.json").write_bytes(b"secret")
    (tree.root / "notes").symlink_to(tmp_path / "secret")
    assert tree.read("notes/x.json", None) is None
    (tree.root / "tasks/x.json").symlink_to(tmp_path / "secret/x.json")
    os.mkfifo(tree.root / "tasks/fifo.json")
    assert tree.reconcile().operations == []
    assert tree.reconcile(["notes/x.json", "tasks/x.json", "tasks/fifo.json"]).operations == []
    (tree.root / "plans/a.md").unlink()
    (tree.root / "plans/a.md").symlink_to(tmp_path / "secret/x.json")
    assert tree.reconcile().operations == [DeleteFile("plans/a.md")]


_json = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.sampled_from(["", "a", "é"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from("abcdefgh"), _json), st.dictionaries(st.sampled_from("abcdefgh"), _json))
def test_a_patch_produces_exactly_the_bytes(before: dict[str, object], after: dict[str, object]) -> None:
    import json

    from lattice_remote.protocol.operations import merge_patch

    patch = patch_between(canonical_json(before), canonical_json(after))
    if patch is not None:
        assert canonical_json(merge_patch(before, json.loads(patch))) == canonical_json(after)


@pytest.mark.parametrize("before", [b"not json", b"[]\n", b'{"a":1}', b"\xff"])
def test_no_patch_where_there_is_no_object(before: bytes) -> None:
    assert patch_between(before, b'{"b":1}') is None


def test_a_patch_between_two_kinds_of_json_produces_exactly_the_bytes() -> None:
    """Contents that msgspec writes as lattice does are compared in another way."""
    names = {f"LAT-{n}": f"task_{n}" for n in range(300)}
    flat, nested = canonical_json({**names, "x": 1}), canonical_json({**names, "x": [1, 2.5]})
    for before, after in ((flat, nested), (nested, flat)):
        patch = patch_between(before, after)
        assert patch is not None and len(patch) < 20
        assert canonical_json(merge_patch(json.loads(before), json.loads(patch))) == after
    assert patch_between(canonical_json(names), flat.replace(b": ", b":")) is None, "not as lattice writes it"


def test_no_patch_where_json_is_nested_too_deep_to_compare() -> None:
    before = b'{"a":' * 1200 + b"1" + b"}" * 1200
    assert patch_between(before, before.replace(b"1", b"2")) is None


def test_a_file_that_the_server_may_not_read_counts_as_none(tree: ProjectTree, monkeypatch: pytest.MonkeyPatch) -> None:
    real = open

    def guarded(path: str, *args: str, **options: int) -> object:
        if path.endswith("a.md"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **options)  # type: ignore[call-overload]

    (tree.root / "plans/a.md").write_bytes(b"# Secret\n")
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", guarded)
        difference = tree.reconcile()
    assert difference.operations == [DeleteFile("plans/a.md")]
    tree.accept(difference)
    assert tree.reconcile().operations == [PutFile("plans/a.md", b"# Secret\n")]


def test_a_log_truncated_while_it_is_read_is_not_an_empty_append(
    tree: ProjectTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = touched("events/a.jsonl", tree=tree, appended="events/a.jsonl")
    with (tree.root / "events/a.jsonl").open("ab") as file:
        file.write(b"3\n")
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, size, offset)[: max(0, 3 - offset)])
    assert not any(isinstance(operation, AppendBytes) for operation in compare(tree, what).operations)


def test_a_scan_that_finds_too_much_is_continued_where_it_stopped(tree: ProjectTree) -> None:
    for number in range(7):
        (tree.root / f"plans/{number}.md").write_bytes(b"new\n")
    found = tree.reconcile(limit=3)
    assert [operation.path for operation in found.operations] == [f"plans/{number}.md" for number in range(3)]
    tree.accept(found)
    (tree.root / "plans/0.md").write_bytes(b"later\n")
    (tree.root / "plans/4.md").unlink()
    found = tree.reconcile(limit=3, rest=found.rest)
    assert [operation.path for operation in found.operations] == ["plans/3.md", "plans/5.md", "plans/6.md"]
    tree.accept(found)
    assert tree.reconcile(limit=3, rest=[*found.rest, "plans/6.md"]).operations == []
    assert tree.reconcile(limit=3).operations == [PutFile("plans/0.md", b"later\n")]
