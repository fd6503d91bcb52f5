"""Fast JSON: equal to the standard library for any value."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lattice_remote.protocol.operations import canonical_json, flat_json, flat_value
from lattice_remote.server.tree.tree import patch_between
from lattice_remote.server.worker.patches import FlatJson, IndentedJson

TEXTS = st.text(st.characters(codec="utf-8"), max_size=5) | st.text("abcXYZ-019 /,.:{}", max_size=9)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=4))
OBJECTS = st.dictionaries(TEXTS, VALUES | st.dictionaries(TEXTS, SCALARS), max_size=6)


def index(tasks: int) -> dict[str, Any]:
    return {
        "map": {f"LAT-{n}": f"task_{n:026}" for n in range(tasks)},
        "next_seqs": {"LAT": tasks},
        "schema_version": 2,
    }


@settings(max_examples=300)
@given(OBJECTS | VALUES)
@example({"a": 2**64, "b": -(2**70)})
@example({"a": "\x7f", "b": "\x08", "c": "é", "d": "\ud800"})
@example({"a": {"b": 1.0, "c": 1e22}, "d": {}})
def test_the_encoder_agrees_with_json(value: object) -> None:
    expected = json.dumps(value, sort_keys=True, indent=2)
    assert canonical_json(value) == (expected + "\n").encode()
    assert FlatJson().dumps(value, sort_keys=True, indent=2) == expected
    assert FlatJson().loads(expected + "\n") == json.loads(expected) or "NaN" in expected
    assert IndentedJson().dumps(value, sort_keys=True, indent=2) == expected


@pytest.mark.parametrize("options", [{}, {"indent": 2}, {"sort_keys": True}, {"sort_keys": True, "indent": 4}])
def test_other_forms_are_written_as_asked(options: dict[str, Any]) -> None:
    for replacement in (FlatJson(), IndentedJson()):
        assert replacement.dumps(index(3), **options) == json.dumps(index(3), **options)


def test_an_index_of_many_tasks_is_written_and_read_the_fast_way() -> None:
    assert flat_json(index(1000)) is not None
    assert flat_value(canonical_json(index(1000))) == index(1000)


def test_a_sorted_index_with_a_new_id_is_written_like_any_other() -> None:
    """An encoder that sorts by itself takes 13 s for these keys."""
    value = json.loads(canonical_json(index(100_000)))
    value["map"]["LAT-100000"] = "task_new"
    assert flat_json(value) == (json.dumps(value, sort_keys=True, indent=2) + "\n").encode()


@pytest.mark.parametrize(
    "text",
    [
        canonical_json(index(200)).decode(),
        json.dumps(index(200)),
        canonical_json({**index(200), "é": "é"}).decode(),
        '{"a": 1, "a": 2, "b": "' + "x" * 5000 + '"}',
        '{"a": 1e400, "b": NaN, "c": "' + "x" * 5000 + '"}',
        '{"a": 123456789012345678901234567890, "b": "' + "x" * 5000 + '"}',
    ],
)
def test_the_parser_agrees_with_json(text: str) -> None:
    for _ in range(2):
        read = FlatJson().loads(text)
        assert repr(read) == repr(json.loads(text))


@pytest.mark.parametrize("text", ["", "{", "x" * 5000, '{"a": ' + "1" * 5000])
def test_invalid_json_raises_the_error_of_json(text: str) -> None:
    with pytest.raises(ValueError) as expected:
        json.loads(text)
    with pytest.raises(ValueError) as raised:
        FlatJson().loads(text)
    assert (type(raised.value), str(raised.value)) == (type(expected.value), str(expected.value))
    assert FlatJson().JSONDecodeError is json.JSONDecodeError


def test_a_change_of_what_was_read_or_written_does_not_show_in_later_reads() -> None:
    """As of a command that registers a task and then fails."""
    text = FlatJson().dumps(index(500), sort_keys=True, indent=2) + "\n"
    for _ in range(2):
        value = FlatJson().loads(text)
        value["map"]["LAT-9999"] = "task_lost"
        value["next_seqs"]["LAT"] = 9999
        value["other"] = 1
    written = index(500)
    text = FlatJson().dumps(written, sort_keys=True, indent=2) + "\n"
    written["map"].clear()
    assert FlatJson().loads(text) == index(500)


def test_a_new_task_is_a_small_patch_of_a_large_index() -> None:
    patch = patch_between(canonical_json(index(10_000)), canonical_json(index(10_001)))
    assert patch is not None
    assert len(patch) < 200


def test_numbers_and_truth_values_are_not_confused() -> None:
    """Python takes them for equal."""
    before, after = {**index(200), "a": 1, "b": {"c": True}}, {**index(200), "a": True, "b": {"c": 1}}
    patch = patch_between(canonical_json(before), canonical_json(after))
    assert patch is not None
    assert json.dumps(json.loads(patch), sort_keys=True) == '{"a": true, "b": {"c": 1}}'


@pytest.mark.parametrize("value", [None, {"c": None}])
def test_a_null_can_not_be_sent_as_a_patch(value: object) -> None:
    before = canonical_json({**index(200), "a": 1})
    assert patch_between(before, canonical_json({**index(200), "a": value})) is None
