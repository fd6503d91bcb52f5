"""Published vectors against examples/standalone_client.py, which was written from SPEC.md."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from standalone_client import FRAMES, Violation, apply, decode

VECTORS = Path(__file__).parents[2] / "protocol/vectors"


def vectors(name: str) -> list[dict[str, Any]]:
    return list(json.loads((VECTORS / f"{name}.json").read_text()))


def load(name: str, **fields: str) -> Any:
    chosen = [vector for vector in vectors(name) if fields.items() <= vector.items()]
    return pytest.mark.parametrize("vector", chosen, ids=[vector["name"] for vector in chosen])


def text_of(value: Any) -> Any:
    """Return a value in the form of the vectors, with binary values as base64."""
    match value:
        case bytes():
            return base64.b64encode(value).decode()
        case dict():
            return {name: text_of(each) for name, each in value.items()}
        case list():
            return [text_of(each) for each in value]
    return value


@load("frames", **{"from": "server"})
def test_frame_is_decoded_as_published(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["msgpack"])
    if vector["frame"]["type"] in FRAMES:
        assert text_of(decode(data)) == vector["frame"]
    else:
        with pytest.raises(Violation):  # it is the reply to a request that this client never sends
            decode(data)


@load("accepted", **{"from": "server"})
def test_frame_in_another_encoding_is_decoded_as_published(vector: dict[str, Any]) -> None:
    assert text_of(decode(bytes.fromhex(vector["msgpack"]))) == vector["frame"]


@load("rejected", **{"from": "server"})
def test_frame_that_breaks_the_rules_is_a_violation(vector: dict[str, Any]) -> None:
    with pytest.raises(Violation):
        decode(bytes.fromhex(vector["msgpack"]))


@load("operations")
def test_operation_has_the_published_effect(vector: dict[str, Any]) -> None:
    operation = {name: binary(name, value) for name, value in vector["operation"].items()}
    tree = {path: base64.b64decode(text) for path, text in vector["before"].items()}
    for _ in range(2):
        assert sorted(apply(operation, tree)) == vector["drifted"]
        assert text_of(tree) == vector["after"]


def binary(name: str, value: Any) -> Any:
    return base64.b64decode(value) if name in {"data", "tail", "patch", "digest"} else value
