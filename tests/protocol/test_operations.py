"""Operations lead from one tree to the next, are idempotent, and never guess (I3)."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_remote.conformance.scripted_server import Files, announce, append_to, delta, merge_into
from lattice_remote.protocol.operations import (
    TAIL_BYTES,
    AppendBytes,
    DeleteFile,
    MemoryTree,
    MergeJson,
    MoveFile,
    Operation,
    PutFile,
    apply,
    canonical_json,
    digest_of,
    merge_patch,
    paths_of,
)

LONG = b"line\n" * 2000
IDS = canonical_json({"next": 3, "ids": {"LAT-1": "a", "LAT-2": "b"}})
MERGE, MERGED = merge_into("ids.json", IDS, {"next": 4, "ids": {"LAT-2": None, "LAT-3": "c"}})

DONE: list[tuple[str, Operation, Files, Files]] = [
    ("a new file", PutFile("a", b"1"), {}, {"a": b"1"}),
    ("another content", PutFile("a", b"1"), {"a": b"0"}, {"a": b"1"}),
    ("an empty file", PutFile("a", b""), {"a": b"0"}, {"a": b""}),
    ("a first line", append_to("a", b"", b"1"), {}, {"a": b"1"}),
    ("a next line", append_to("a", b"0", b"1"), {"a": b"0"}, {"a": b"01"}),
    ("a line at the end of a long file", append_to("a", LONG, b"1"), {"a": LONG}, {"a": LONG + b"1"}),
    ("the rest of a torn line", append_to("a", b"0", b"123"), {"a": b"01"}, {"a": b"0123"}),
    ("a patch", MERGE, {"ids.json": IDS}, {"ids.json": MERGED}),
    ("a move", MoveFile("a", to="b", digest=digest_of(b"1")), {"a": b"1"}, {"b": b"1"}),
    ("a move onto a file", MoveFile("a", to="b", digest=digest_of(b"1")), {"a": b"1", "b": b"2"}, {"b": b"1"}),
    ("a deletion", DeleteFile("a"), {"a": b"1", "b": b"2"}, {"b": b"2"}),
    ("a deletion of nothing", DeleteFile("a"), {"b": b"2"}, {"b": b"2"}),
    ("a large file that is here", announce("a", LONG), {"a": LONG}, {"a": LONG}),
]
DRIFTED: list[tuple[str, Operation, Files, Files, set[str]]] = [
    ("append to a shorter file", append_to("a", b"00", b"1"), {"a": b"0"}, {"a": b"0"}, {"a"}),
    ("append to a longer file", append_to("a", b"0", b"1"), {"a": b"012"}, {"a": b"012"}, {"a"}),
    ("append to another tail", append_to("a", b"0", b"1"), {"a": b"x"}, {"a": b"x"}, {"a"}),
    ("append where something else begins", append_to("a", b"0", b"12"), {"a": b"0x"}, {"a": b"0x"}, {"a"}),
    ("append to a missing file", append_to("a", b"0", b"1"), {}, {}, {"a"}),
    ("patch of another content", MERGE, {"ids.json": b'{"x": 1}\n'}, {"ids.json": b'{"x": 1}\n'}, {"ids.json"}),
    ("patch of a missing file", MERGE, {}, {}, {"ids.json"}),
    ("patch of no JSON", MERGE, {"ids.json": b"\xff"}, {"ids.json": b"\xff"}, {"ids.json"}),
    ("move of another content", MoveFile("a", to="b", digest=digest_of(b"1")), {"a": b"x"}, {}, {"b"}),
    ("move of a missing file", MoveFile("a", to="b", digest=digest_of(b"1")), {"b": b"x"}, {"b": b"x"}, {"b"}),
    ("a large file of another content", announce("a", b"1"), {"a": b"x"}, {"a": b"x"}, {"a"}),
    ("a large file that is missing", announce("a", b"1"), {}, {}, {"a"}),
]


@pytest.mark.parametrize(("operation", "before", "after"), [case[1:] for case in DONE], ids=[case[0] for case in DONE])
def test_operation_yields_the_next_tree_and_is_idempotent(operation: Operation, before: Files, after: Files) -> None:
    tree = MemoryTree(dict(before))
    for _ in range(2):
        assert apply(operation, tree) == frozenset()
        assert tree.files == after


@pytest.mark.parametrize(
    ("operation", "before", "after", "drifted"), [case[1:] for case in DRIFTED], ids=[case[0] for case in DRIFTED]
)
def test_operation_on_an_unexpected_file_names_the_file_to_fetch(
    operation: Operation, before: Files, after: Files, drifted: set[str]
) -> None:
    tree = MemoryTree(dict(before))
    for _ in range(2):
        assert apply(operation, tree) == drifted
        assert tree.files == after


def test_append_is_one_write_of_the_missing_bytes() -> None:
    writes: list[bytes] = []

    class Recording(MemoryTree):
        def append(self, path: str, data: bytes) -> None:
            writes.append(data)
            super().append(path, data)

    tree = Recording({"a": b"01"})
    apply(append_to("a", b"0", b"123"), tree)
    apply(append_to("a", b"0", b"123"), tree)
    assert writes == [b"23"]


def test_append_reads_only_the_tail() -> None:
    class Tail(MemoryTree):
        def read(self, path: str, offset: int = 0) -> bytes:
            assert offset >= len(LONG) - TAIL_BYTES
            return super().read(path, offset)

    assert apply(append_to("a", LONG, b"1"), Tail({"a": LONG})) == frozenset()


# RFC 7396, appendix A
@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_patches_follow_the_rfc(target: object, patch: object, result: object) -> None:
    before = json.dumps(target)
    assert merge_patch(target, patch) == result
    assert json.dumps(target) == before


def test_paths_of_a_move_are_source_and_target() -> None:
    assert paths_of(MoveFile("a", to="b", digest=bytes(32))) == ("a", "b")
    assert paths_of(DeleteFile("a")) == ("a",)


PATHS = st.sampled_from("abcd")
FILES = st.dictionaries(PATHS, st.binary(max_size=6))


@given(FILES, FILES)
def test_operations_from_two_trees_lead_from_one_to_the_other(before: Files, after: Files) -> None:
    tree = MemoryTree(dict(before))
    for operation in delta(before, after):
        assert apply(operation, tree) == frozenset()
        once = dict(tree.files)
        assert apply(operation, tree) == frozenset()
        assert tree.files == once
    assert tree.files == after


@given(FILES, FILES, FILES)
def test_drift_is_reported_or_harmless(before: Files, after: Files, found: Files) -> None:
    """From any tree, each file that differs afterwards was reported or is not part of an operation."""
    tree = MemoryTree(dict(found))
    named: set[str] = set()
    operations = delta(before, after)
    for operation in operations:
        named |= apply(operation, tree)
    touched = {path for operation in operations for path in paths_of(operation)}
    for path in touched - named:
        assert tree.files.get(path) == after.get(path)


OPERATIONS = st.one_of(
    st.builds(PutFile, PATHS, st.binary(max_size=9)),
    st.builds(
        AppendBytes,
        PATHS,
        offset=st.integers(0, 2**64),
        tail=st.binary(min_size=32, max_size=32) | st.just(digest_of(b"")),
        data=st.binary(max_size=9),
    ),
    st.builds(
        MergeJson,
        PATHS,
        patch=st.binary(max_size=9) | st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"1e999", b'{"a": NaN}']),
        digest=st.binary(min_size=32, max_size=32),
    ),
    st.builds(MoveFile, PATHS, to=PATHS, digest=st.sampled_from([digest_of(b""), digest_of(b"{}")])),
    st.builds(DeleteFile, PATHS),
    st.builds(announce, PATHS, st.binary(max_size=3)),
)


@given(st.lists(OPERATIONS, max_size=5), st.dictionaries(PATHS, st.sampled_from([b"", b"{}", b"[" * 100_000, b"\xff"])))
def test_hostile_operations_raise_nothing_and_report_only_their_own_paths(
    operations: list[Operation], files: Files
) -> None:
    tree = MemoryTree(files)
    for operation in operations:
        assert apply(operation, tree) <= set(paths_of(operation))
        apply(operation, tree)


def test_a_patch_that_is_already_applied_writes_nothing() -> None:
    class Kept(MemoryTree):
        def replace(self, path: str, data: bytes) -> None:
            pytest.fail(f"{path} was written again")

    tree = Kept({"ids.json": MERGED})
    assert apply(MERGE, tree) == set()
