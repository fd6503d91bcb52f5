"""Paths that a peer may name (I9)."""

import posixpath
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_remote.errors import HostilePath
from lattice_remote.protocol.paths import (
    MAX_DEPTH,
    MAX_PATH_BYTES,
    check_path,
    is_component,
    is_editable,
    is_replicated,
    is_resource_name,
    is_session_name,
    parse_path,
)

TASK = "task_01ARZ3NDEKTSV4RRFFQ69G5FAV"

SHARED = [
    "config.json",
    "ids.json",
    f"tasks/{TASK}.json",
    f"events/{TASK}.jsonl",
    "events/_lifecycle.jsonl",
    f"plans/{TASK}.md",
    f"archive/plans/{TASK}.md",
    f"archive/tasks/{TASK}.json",
    f"archive/events/{TASK}.jsonl",
    "artifacts/payload/art_01.tar.gz",
    "sessions/größe-1.json",
    "resources/staging db/resource.json",
    "a/b/c/d/e/f/g/h",
    "x" * 255,
    "/".join(["x" * 128, *["x" * 127] * 3]),
]
LOCAL = [
    "remote.json",
    "Remote.JSON",
    "cache_state.json",
    "locks",
    "locks/tasks",
    "LOCKS/tasks",
    f"plans/{TASK}.md~",
    f"plans/{TASK}.json",
    f"plans/{TASK}.md.x",
    f"notes/#{TASK}.md#",
    "notes/4913",
]
HOSTILE = [
    f"tasks/{TASK}.json\n",
    f"plans/{TASK}.md/",
    f"archive/../tasks/{TASK}.json",
    "",
    ".",
    "..",
    "/",
    "/etc/passwd",
    "../config.json",
    "tasks/../../x",
    "tasks/..",
    "tasks//x",
    "tasks/",
    "./tasks/x",
    ".remote/base/plans/x.md",
    "tasks/.tmp.123",
    "tasks\\..\\x",
    "C:/x",
    "tasks/x\x00.json",
    "tasks/x\n",
    "tasks/\x7f",
    "tasks/\udcff",
    "x" * (MAX_PATH_BYTES + 1),
    "ü" * 200,
    "x" * 256,
    "/".join(["x" * 200] * 3),
    "/".join("x" * (MAX_DEPTH + 1)),
]


@pytest.mark.parametrize("path", SHARED)
def test_files_of_a_project_are_shared(path: str) -> None:
    assert check_path(path) == path
    assert is_replicated(path)
    assert "/".join(parse_path(path)) == path


@pytest.mark.parametrize("path", LOCAL)
def test_local_files_are_neither_shared_nor_accepted_from_a_peer(path: str) -> None:
    assert not is_replicated(path)
    with pytest.raises(HostilePath):
        check_path(path)


@pytest.mark.parametrize("path", HOSTILE)
def test_paths_that_are_not_plain_are_refused(path: str) -> None:
    assert not is_replicated(path)
    for check in (check_path, parse_path):
        with pytest.raises(HostilePath):
            check(path)


def test_a_refused_path_is_reported_with_the_reason() -> None:
    deep, long = "/".join("x" * (MAX_DEPTH + 1)), "/".join(["x" * 200] * 3)
    for path, reason in (
        (deep, "nested deeper"),
        (long, "longer than 512 bytes"),
        ("x\0", "character"),
        ("..", "component"),
    ):
        with pytest.raises(HostilePath, match=reason):
            check_path(path)


@pytest.mark.parametrize(("is_name", "longest"), [(is_component, 255), (is_resource_name, 240), (is_session_name, 218)])
def test_a_name_is_one_component_short_enough_for_lattices_suffixes(
    is_name: Callable[[str], bool], longest: int
) -> None:
    for name in ("gpu.0", "Argus.1", "größe", "x" * longest):
        assert is_name(name), name
    for name in ("", ".", "..", ".x", "a/b", "a\\b", "a:b", "x\n", "\udcff", "x" * (longest + 1)):
        assert not is_name(name), name


def test_a_session_cannot_have_the_name_of_the_session_index() -> None:
    assert [name for name in ("index", "INDEX", "index1") if is_session_name(name)] == ["index1"]


@given(st.text() | st.lists(st.sampled_from(["..", ".", "", "a", "/", "\\", "tasks"])).map("/".join))
def test_every_accepted_path_is_inside_the_directory(path: str) -> None:
    try:
        check_path(path)
    except HostilePath:
        assert not is_replicated(path)
    else:
        assert is_replicated(path)
        assert posixpath.normpath(path) == path
        assert posixpath.normpath(posixpath.join("/tree", path)).startswith("/tree/")


@pytest.mark.parametrize(
    ("path", "editable"),
    [
        (f"plans/{TASK}.md", True),
        (f"notes/{TASK}.md", True),
        (f"plans/{TASK}.md\n", False),
        (f"plans/{TASK}.txt", False),
        (f"archive/plans/{TASK}.md", False),
        (f"tasks/{TASK}.md", False),
        (f"plans/x/{TASK}.md", False),
        ("plans/task_1.md", False),
    ],
)
def test_only_plans_and_notes_of_tasks_can_be_edited(path: str, editable: bool) -> None:
    assert is_editable(path) is editable
