"""The compact table of files behaves like a dict for any sequence of changes."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_remote.protocol import file_table
from lattice_remote.protocol.file_table import COMPACT_FROM, FileTable, contents_by_path

PATHS = st.text(max_size=12) | st.sampled_from([f"tasks/task_{n}.json" for n in range(40)])
STEPS = st.lists(st.tuples(PATHS, st.none() | st.integers(0, 2**64 - 1)), max_size=200)


def table() -> FileTable[int]:
    return FileTable("<Q", lambda value: (value,), int)


@given(STEPS)
def test_the_table_equals_a_dict_after_any_changes(steps: list[tuple[str, int | None]]) -> None:
    ours, model = table(), dict[str, int]()
    for path, value in steps:
        if value is not None:
            ours[path] = model[path] = value
        else:
            assert ours.pop(path, None) == model.pop(path, None)
        assert ours.get(path) == model.get(path) and (path in ours) == (path in model)
    assert ours == model and dict(ours.items()) == model and set(ours) == model.keys() and len(ours) == len(model)


@given(STEPS)
def test_many_removals_keep_the_other_files(steps: list[tuple[str, int | None]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_table, "_MIN_GARBAGE_BYTES", 0)
        test_the_table_equals_a_dict_after_any_changes.hypothesis.inner_test(steps)  # type: ignore[attr-defined]


def test_added_and_removed_files_leave_no_memory_in_use() -> None:
    ours = table()
    ours["stays"] = 1
    for number in range(20_000):
        ours[f"attachments/{number}"] = number
        del ours[f"attachments/{number}"]
    assert dict(ours.items()) == {"stays": 1} and len(ours._records) < 200_000 and len(ours._slots) < 1000
    with pytest.raises(KeyError):
        del ours["attachments/1"]
    with pytest.raises(KeyError):
        ours["attachments/1"]


def test_a_large_project_gets_a_table_and_a_small_one_a_dict() -> None:
    contents = {f"tasks/{n}": (n, hashlib.sha256(b"%d" % n).digest()) for n in range(COMPACT_FROM)}
    many = contents_by_path(contents.items(), len(contents))
    assert isinstance(many, FileTable) and many == contents and list(many) == list(contents)
    assert isinstance(contents_by_path([], 0), dict)
