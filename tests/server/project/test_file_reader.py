"""Files sent to a client: open descriptors, and errors of single files."""

import asyncio
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from harness import until

from lattice_remote.protocol.messages import Part, Parts
from lattice_remote.server.project import file_reader
from lattice_remote.server.project.file_reader import PIECE_BYTES, FileSender, Snapshot
from lattice_remote.server.project.history import Content
from lattice_remote.server.project.project import Project
from lattice_remote.server.transport.websocket import SendQueue


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def content_of(data: bytes) -> Content:
    return len(data), hashlib.sha256(data).digest()


@pytest.mark.parametrize("expected", [0, 3, 6, 9])
def test_a_small_file_is_read_whole_and_not_held_open(tmp_path: Path, expected: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abcdef")
    before = open_files()
    snapshot = Snapshot.open(path, expected)
    assert snapshot is not None
    assert open_files() == before
    path.write_bytes(b"another text")
    assert snapshot.piece(0, 6) == b"abcdef"
    assert (snapshot.size, snapshot.digest) == content_of(b"abcdef")
    first = None if expected > 6 else content_of(b"abcdef"[:expected])[1]
    assert snapshot.digest_at(expected) == first
    snapshot.close()


def test_a_large_file_is_held_open_until_it_is_closed(tmp_path: Path) -> None:
    data = os.urandom(PIECE_BYTES + 5)
    (tmp_path / "file").write_bytes(data)
    before = open_files()
    snapshot = Snapshot.open(tmp_path / "file", len(data))
    assert snapshot is not None
    assert (snapshot.size, snapshot.digest) == content_of(data)
    (tmp_path / "file").unlink()
    assert snapshot.piece(0, len(data)) + snapshot.piece(PIECE_BYTES, len(data)) == data
    snapshot.close()
    snapshot.close()
    assert open_files() == before


def test_a_log_that_grew_since_it_was_read_is_known_at_what_it_has_now(tmp_path: Path) -> None:
    data = os.urandom(PIECE_BYTES + 5)
    path = tmp_path / "log"
    path.write_bytes(data)
    snapshot = Snapshot.open(path, len(data) - 9)
    assert snapshot is not None
    with path.open("ab") as file:
        file.write(b"more")
    for content in (data[:-9], data[:-3], data, data + b"more"):
        assert snapshot.digest_at(len(content)) == content_of(content)[1]
    assert snapshot.digest_at(len(data) + 5) is None
    assert snapshot.digest_at(len(data) - 10) is None
    snapshot.close()


class OneFile:
    """A project as a sender sees it: one file, which is newer on disk than at the head."""

    def __init__(self, root: Path) -> None:
        self.paths = SimpleNamespace(lattice=root)
        self.history = SimpleNamespace(head=1, files={"f": content_of(b"old")}, expect=self.expect)
        self.committed: list[Callable[[], None]] = []

    def expect(self, path: str, content: Content, call: Callable[[], None]) -> Callable[[], None]:
        self.committed.append(call)
        return lambda: None

    def files_touched(self, paths: set[str]) -> None:
        pass


class Outbox:
    async def room(self) -> None:
        pass


async def test_small_files_are_sent_together_and_one_that_changes_meanwhile_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {name: name.encode() * 100 for name in ("a", "b", "c")}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    files = {name: content_of(data) for name, data in contents.items()}
    project = SimpleNamespace(paths=SimpleNamespace(lattice=tmp_path), history=SimpleNamespace(head=1, files=files))
    sent = list[Part | Parts]()
    sender = FileSender(cast("Project", project), cast("SendQueue", Outbox()), sent.append, compresses=True)
    assert await sender.send(["a", "gone", "b", "c"]) == []
    together, gone = sent
    assert isinstance(together, Parts) and gone == Part("gone", 1, gone=True)
    assert {part.path: part.data for part in together.parts} == contents
    assert {(part.seq, part.size) for part in together.parts} == {(1, 100)}

    def committed_while_reading(*_: Any) -> Any:
        found = compressed(*_)
        (tmp_path / "b").write_bytes(b"new")
        project.history.files, project.history.head = {**files, "b": content_of(b"new")}, 2
        return found

    compressed = file_reader._compressed
    monkeypatch.setattr(file_reader, "_compressed", committed_while_reading)
    sent.clear()
    assert await sender.send(["a", "b", "c"]) == []
    assert {part.path: (part.seq, part.data) for part in sent if isinstance(part, Part)} == {
        "a": (2, contents["a"]),
        "b": (2, b"new"),
        "c": (2, contents["c"]),
    }


async def test_an_unreadable_file_does_not_disturb_the_publisher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: Any) -> bytes:
        raise OSError("the disk is gone")

    (tmp_path / "f").write_bytes(b"new")
    monkeypatch.setattr(Snapshot, "piece", unreadable)
    project, sent = OneFile(tmp_path), list[Part]()
    sender = FileSender(cast("Project", project), cast("SendQueue", None), sent.append)
    sending = asyncio.create_task(sender.send(["f"]))
    await until(lambda: project.committed)
    project.committed[0]()
    with pytest.raises(OSError, match="the disk is gone"):
        await sending
    assert sent == []
