"""Packs: any project round-trips in parts of any size; other bytes raise only a violation."""

import hashlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_remote.errors import Misuse, ProtocolError
from lattice_remote.protocol.bundle import (
    END,
    MAGIC,
    MAX_PROJECT_FILES,
    MAX_TEXT_FILE_BYTES,
    Layout,
    Unpacker,
    first_sign_of_use,
    head_of,
)
from lattice_remote.protocol.messages import Entry

TASK = "task_01ARZ3NDEKTSV4RRFFQ69G5FAV"


def entry_of(path: str, data: bytes) -> Entry:
    return Entry(path, len(data), hashlib.sha256(data).digest())


NOTHING = hashlib.sha256(b"").digest()


def raw_head(head: object) -> bytes:
    encoded = msgspec.msgpack.encode(head)
    return len(encoded).to_bytes(4) + encoded


def pack(files: dict[str, bytes]) -> bytes:
    body = b"".join(head_of(entry_of(path, files[path])) + files[path] for path in sorted(files))
    return MAGIC + body + END


def unpacked(*pieces: bytes) -> dict[str, bytes]:
    unpacker, files, path = Unpacker(), {}, ""
    for piece in pieces:
        for item in unpacker.receive(piece):
            if isinstance(item, Entry):
                path = item.path
                files[path] = b""
            else:
                files[path] += item
    if not unpacker.is_complete:
        raise ProtocolError("cut short")
    return files


FILES = {"config.json": b"{}\n", "events/_lifecycle.jsonl": b"", f"plans/{TASK}.md": b"# P\n", "ö/x": b"\0" * 5000}


def test_a_project_round_trips_at_every_split_point() -> None:
    data = pack(FILES)
    for at in range(len(data) + 1):
        assert unpacked(data[:at], data[at:]) == FILES
    assert unpacked(*(data[i : i + 1] for i in range(len(data)))) == FILES


@given(st.dictionaries(st.text(min_size=1, max_size=20), st.binary(max_size=100)), st.integers(1, 50))
def test_any_files_round_trip_in_any_parts(files: dict[str, bytes], step: int) -> None:
    data = pack(files)
    assert unpacked(*(data[i : i + step] for i in range(0, len(data), step))) == files


@given(st.binary(max_size=300), st.integers(0, 300), st.booleans())
def test_hostile_bytes_raise_only_a_violation(noise: bytes, at: int, begins_well: bool) -> None:
    data = pack(FILES)
    at = min(at, len(data) - 1)
    damaged = (MAGIC if begins_well else b"") + noise if at % 2 else data[:at] + noise + data[at + 1 :]
    try:
        files = unpacked(damaged)
    except ProtocolError:
        return
    assert pack(files) == damaged, "a pack has one form"


@pytest.mark.parametrize(
    ("why", "data"),
    [
        ("twice", MAGIC + head_of(entry_of("a", b"")) * 2 + END),
        ("not in order", MAGIC + head_of(entry_of("b", b"")) + head_of(entry_of("a", b"")) + END),
        ("wrong digest", MAGIC + head_of(Entry("a", 1, bytes(32))) + b"x" + END),
        ("a head without end", MAGIC + b"\xff\xff\xff\xff"),
        ("a negative size", MAGIC + raw_head({"path": "a", "size": -1, "digest": bytes(32)})),
        ("more than a head holds", MAGIC + raw_head({"path": "a", "size": 0, "digest": NOTHING, "mode": 1}) + END),
        ("something after the end", pack({}) + b"x"),
        ("cut short", pack(FILES)[:-1]),
        ("a tar", b"config.json" + bytes(600)),
    ],
)  # fmt: skip
def test_an_invalid_pack_is_refused(why: str, data: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpacked(data)


@pytest.mark.parametrize(
    "path",
    [
        "../config.json",
        "/etc/passwd",
        "a/../b",
        "locks/x",
        "LOCKS/x",
        "remote.json",
        ".remote/base/plans/x.md",
        "tasks/foo.json",
        f"tasks/{TASK.lower()}.json",
        f"tasks/{TASK}.json.bak",
        f"events/{TASK}.json",
        f"archive/events/res_{TASK[5:]}.jsonl",
        "artifacts/meta/x.json",
        "artifacts/payload/x",
        "plans/x.md~",
        "a\x00b",
        "con:1",
        "a\\b",
        "\udcff",
    ],
)
def test_files_that_no_project_has_are_refused(path: str) -> None:
    with pytest.raises(Misuse):
        Layout(max_bytes=1 << 30).add(path, 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [("a/x", "A/y"), ("a", "a/b"), ("a/b", "a"), ("notes/é.md", "notes/e\u0301.md"), ("x", "x"), ("a/X", "a/x")],
)
def test_names_that_collide_on_another_file_system_are_refused(one: str, other: str) -> None:
    layout = Layout(max_bytes=1 << 30)
    layout.add(one, 1)
    with pytest.raises(Misuse):
        layout.add(other, 1)


def test_the_size_of_a_project_is_bounded() -> None:
    with pytest.raises(Misuse, match="64 MiB"):
        Layout(max_bytes=1 << 40).add("config.json", MAX_TEXT_FILE_BYTES + 1)
    Layout(max_bytes=1 << 40).add(f"artifacts/payload/art_{TASK[5:]}.bin", MAX_TEXT_FILE_BYTES + 1)
    with pytest.raises(Misuse, match="limit of 1 MiB"):
        Layout(max_bytes=1 << 20).add("config.json", (1 << 20) + 1)
    layout = Layout(max_bytes=1 << 40)
    layout.files = MAX_PROJECT_FILES
    with pytest.raises(Misuse, match=f"{MAX_PROJECT_FILES} files"):
        layout.add("config.json", 1)


def test_a_project_exactly_at_its_limits_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lattice_remote.protocol.bundle.MAX_PROJECT_FILES", 2)
    layout = Layout(max_bytes=100)
    layout.add("config.json", 60)
    layout.add("ids.json", 40)
    with pytest.raises(Misuse, match="2 files"):
        layout.add("context.md", 0)
    layout = Layout(max_bytes=100)
    with pytest.raises(Misuse, match="the server's limit"):
        layout.add("config.json", 101)
    layout = Layout(max_bytes=1 << 40)
    layout.add(f"plans/{TASK}.md", MAX_TEXT_FILE_BYTES)
    with pytest.raises(Misuse, match="64 MiB"):
        layout.add(f"notes/{TASK}.md", MAX_TEXT_FILE_BYTES + 1)


@pytest.mark.parametrize(
    ("files", "sign"),
    [
        ({}, None),
        ({"config.json": 900, "ids.json": 60, "context.md": 500, "events/_lifecycle.jsonl": 0}, None),
        ({"config.json": 9, "events/_lifecycle.jsonl": 1}, "events/_lifecycle.jsonl"),
        ({f"tasks/{TASK}.json": 1, f"archive/tasks/{TASK}.json": 1}, "2 tasks"),
        ({"sessions/index.json": 1}, "sessions/index.json"),
        ({"plans/README.md": 1}, "plans/README.md"),
    ],
)
def test_an_unused_project_counts_as_empty(files: dict[str, int], sign: str | None) -> None:
    assert first_sign_of_use(files.items()) == sign
