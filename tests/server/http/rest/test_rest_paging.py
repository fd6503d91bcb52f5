"""Paged lists: laid out by lattice's output, split at the requested position."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from lattice_remote.server.http.rest import PageQuery, page_of
from lattice_remote.server.ipc import ReadResult
from lattice_remote.server.worker.reader import laid_out

VALUES = st.recursive(
    st.none() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
ITEMS = st.lists(st.tuples(st.text('abé"\\,]}', min_size=1, max_size=3), VALUES), unique_by=lambda item: item[0])


def found(items: list[dict[str, Any]], place: tuple[str, ...] = ("data",), **other: object) -> ReadResult:
    """Return a list as the reader process finds it in lattice's output."""
    data = items if place == ("data",) else {"x": 1, place[1]: items}
    body, places = laid_out(json.dumps({"ok": True, "data": data, **other}, indent=2).encode(), place)
    return ReadResult(0, body, items=places)


@given(ITEMS, st.integers(1, 4), st.booleans(), st.booleans())
def test_the_parts_of_a_list_are_the_list(given: list[tuple[str, Any]], limit: int, by_id: bool, deep: bool) -> None:
    items = [{"id": id_, "of": value} for id_, value in sorted(given)]
    whole = found(items, ("data", "events") if deep else ("data",), warnings=["w"])
    assert json.loads(whole.body) == {"ok": True, "warnings": ["w"], "data": items}
    seen, page = [], PageQuery(limit=limit)
    while True:
        part = json.loads(page_of(whole, page, by_id=by_id).body)
        assert (part["ok"], part["warnings"], len(part["data"]) <= limit) == (True, ["w"], True)
        seen += part["data"]
        if "next" not in part:
            break
        page = PageQuery(limit=limit, cursor=part["next"])
    assert seen == items
    after_all = PageQuery(cursor=page.cursor) if page.cursor is not UNSET else PageQuery(limit=1000)
    assert json.loads(page_of(whole, after_all, by_id=by_id).body)["data"] == items[-len(part["data"]) :]


def test_a_part_after_the_end_is_empty() -> None:
    whole = found([{"id": "a"}])
    part = page_of(whole, PageQuery(cursor="eg==", limit=3), by_id=True)  # z
    assert json.loads(part.body) == {"ok": True, "data": []}


@pytest.mark.parametrize("printed", [b"", b"{", b"[]", b'{"ok": true}', b'{"data": {}}', b'{"data": [7]}', b"\xff"])
def test_output_without_a_list_is_an_error(printed: bytes) -> None:
    with pytest.raises(ValueError, match="no list at data"):
        laid_out(printed, ("data",))
