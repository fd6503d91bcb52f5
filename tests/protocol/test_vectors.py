"""Agreement of protocol/ with the code: vectors, schema and SPEC.md."""

import base64
import json
import re
import runpy
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from lattice_remote.errors import CODES, ProtocolError
from lattice_remote.protocol import messages, operations
from lattice_remote.protocol.bundle import Unpacker
from lattice_remote.protocol.operations import MemoryTree

PUBLISHED = Path(__file__).parents[2] / "protocol"


def load(name: str) -> Any:
    return json.loads((PUBLISHED / name).read_text())


FRAMES, OPERATIONS, REJECTED = (load(f"vectors/{name}.json") for name in ("frames", "operations", "rejected"))
ACCEPTED, PACKS = (load(f"vectors/{name}.json") for name in ("accepted", "packs"))
DECODE = {"client": messages.decode_client_frame, "server": messages.decode_server_frame}
KINDS = {"client": messages.ClientFrame, "server": messages.ServerFrame}


def named(cases: list[dict[str, Any]]) -> Any:
    return pytest.mark.parametrize("vector", cases, ids=[case["name"] for case in cases])


@named(FRAMES)
def test_frame_has_the_published_bytes_and_meaning(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["msgpack"])
    frame = DECODE[vector["from"]](data)
    assert messages.encode(frame) == data
    assert frame == msgspec.convert(vector["frame"], KINDS[vector["from"]])
    assert msgspec.to_builtins(frame) == vector["frame"]


@named(FRAMES)
def test_part_of_a_frame_is_refused(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["msgpack"])
    for end in range(len(data)):
        with pytest.raises(ProtocolError):
            DECODE[vector["from"]](data[:end])
    with pytest.raises(ProtocolError):
        DECODE[vector["from"]](data + b"\xc0")


@named(FRAMES)
def test_frame_may_have_unknown_fields(vector: dict[str, Any]) -> None:
    fields = msgspec.msgpack.decode(bytes.fromhex(vector["msgpack"]))
    longer = msgspec.msgpack.encode({"later": {"a": [1, None]}, **fields, "even_later": 1.5})
    assert DECODE[vector["from"]](longer) == DECODE[vector["from"]](bytes.fromhex(vector["msgpack"]))


@named(REJECTED)
def test_frame_that_breaks_the_rules_is_refused(vector: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        DECODE[vector["from"]](bytes.fromhex(vector["msgpack"]))


@named(ACCEPTED)
def test_frame_in_another_encoding_has_the_published_meaning(vector: dict[str, Any]) -> None:
    frame = DECODE[vector["from"]](bytes.fromhex(vector["msgpack"]))
    assert msgspec.to_builtins(frame) == vector["frame"]


@named(PACKS)
def test_pack_has_the_published_files_or_is_refused(vector: dict[str, Any]) -> None:
    pack = bytes.fromhex(vector["pack"])
    for step in (1, 7, max(1, len(pack))):
        files = unpacked(pack, step)
        assert files is None if vector["files"] is None else files is not None
        if files is not None:
            assert {path: base64.b64encode(data).decode() for path, data in files.items()} == vector["files"]


def unpacked(pack: bytes, step: int) -> dict[str, bytes] | None:
    """Return the files of a pack read in parts of ``step`` bytes; None if the pack is invalid or incomplete."""
    unpacker, files = Unpacker(), dict[str, bytes]()
    try:
        for start in range(0, len(pack), step):
            for item in unpacker.receive(pack[start : start + step]):
                if isinstance(item, messages.Entry):
                    files[item.path] = b""
                else:
                    files[list(files)[-1]] += item
    except ProtocolError:
        return None
    return files if unpacker.is_complete else None


@named(OPERATIONS)
def test_operation_has_the_published_bytes_and_effect(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["msgpack"])
    operation = msgspec.msgpack.decode(data, type=operations.Operation)
    assert msgspec.msgpack.encode(operation) == data
    assert msgspec.to_builtins(operation) == vector["operation"]
    tree = MemoryTree({path: base64.b64decode(text) for path, text in vector["before"].items()})
    for _ in range(2):
        assert sorted(operations.apply(operation, tree)) == vector["drifted"]
        assert {path: base64.b64encode(text).decode() for path, text in tree.files.items()} == vector["after"]


def test_every_frame_and_operation_has_a_vector() -> None:
    def tags(union: Any) -> set[str]:
        return {kind.__struct_config__.tag for kind in get_args(union)}

    for side, kinds in KINDS.items():
        assert {vector["frame"]["type"] for vector in FRAMES if vector["from"] == side} == tags(kinds)
    assert {vector["operation"]["op"] for vector in OPERATIONS} == tags(operations.Operation)


def test_published_files_are_generated_from_the_code() -> None:
    script = runpy.run_path(str(PUBLISHED.parent / "scripts" / "protocol_files.py"))
    assert {path: path.read_bytes() for path in script["files"]()} == script["files"]()


def test_specification_has_every_frame_field_operation_and_code() -> None:
    text = (PUBLISHED / "SPEC.md").read_text()
    words = set(re.findall(r"[A-Za-z_]+", text))
    kinds = [*get_args(messages.ClientFrame), *get_args(messages.ServerFrame), *get_args(operations.Operation)]
    kinds += [messages.Attachment, messages.Limits, messages.Entry]
    expected = {kind.__name__ for kind in kinds} | {field for kind in kinds for field in kind.__struct_fields__}
    assert expected | set(CODES) <= words
    assert all(f"`{capability}`" in text for capability in messages.CAPABILITIES)
