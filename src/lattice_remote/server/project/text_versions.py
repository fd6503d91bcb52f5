"""Earlier versions of a task's plan or notes, as far back as the journal reaches. Blocking; nothing is locked."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from lattice_remote.errors import Rejected
from lattice_remote.protocol.messages import MAX_VERSION_BYTES
from lattice_remote.server.data.datadir import ProjectPaths
from lattice_remote.server.data.framing import frames
from lattice_remote.server.journal.contents import Contents
from lattice_remote.server.journal.segments import Record, Segment, decoder, segment_paths
from lattice_remote.server.tree.manifest import FileState

__all__ = ["TextKind", "TextVersion", "paths_of_text", "read_version"]

TextKind = Literal["plan", "notes"]
_NOT_FOUND = "REMOTE_NOT_FOUND"


@dataclass(frozen=True)
class TextVersion:
    """A text as of one change."""

    epoch: str
    seq: int
    data: bytes


def paths_of_text(task: str, kind: TextKind) -> tuple[str, str]:
    """Return where a text is: among the active tasks, and in the archive."""
    path = f"{'plans' if kind == 'plan' else kind}/{task}.md"
    return path, f"archive/{path}"


def read_version(
    project: ProjectPaths, task: str, kind: TextKind, change: tuple[str, int], *, head: tuple[str, int]
) -> TextVersion:
    """Return a text as of one change.

    The content follows from the journal's operations and, where the first of these only appended, from the file on
    disk. The record's digest decides.

    Args:
        project: the project's directories.
        task: a task's id.
        kind: the text.
        change: epoch and number of a change that wrote it, in any epoch that is kept; an empty epoch stands for the
            newest with such a change.
        head: epoch and number of the last durable change; nothing after it is returned (I2).

    Raises:
        Rejected: REMOTE_NOT_FOUND, no such change of this text is kept, or not enough to restore the content;
            REMOTE_TOO_LARGE, over ``MAX_VERSION_BYTES``.
        OSError: a segment can't be read.
    """
    (epoch, seq), paths = change, paths_of_text(task, kind)
    contents = Contents(paths)
    found: tuple[str, FileState] | None = None  # its epoch, and the state of the file
    data: bytes | None = None

    def on_disk(_path: str) -> bytes:
        for path in paths:
            try:
                with (project.lattice / path).open("rb") as file:
                    return file.read(MAX_VERSION_BYTES + 1)
            except FileNotFoundError:
                continue
        return b""

    for its_epoch, record in _records(project.journal, paths, head):
        contents.learn(record)
        if record.seq != seq or epoch not in ("", its_epoch):
            continue
        for path in paths:
            state = record.files.get(path)
            if state is not None:
                found = (its_epoch, state)
                data = _content(contents, path, state, on_disk)
    if found is None:
        raise Rejected(f"no change {seq} of this text is kept", code=_NOT_FOUND)
    if found[1].size > MAX_VERSION_BYTES:
        raise Rejected(f"the text of change {seq} has {found[1].size} bytes, too many to send", code="REMOTE_TOO_LARGE")
    if data is None:
        raise Rejected(f"the text of change {seq} is not kept: the journal begins after it", code=_NOT_FOUND)
    return TextVersion(found[0], seq, data)


def _content(contents: Contents, path: str, state: FileState, on_disk: Callable[[str], bytes]) -> bytes | None:
    return None if state.size > MAX_VERSION_BYTES else contents.find(path, state.size, state.digest, on_disk)


def _records(journal: Path, paths: tuple[str, str], head: tuple[str, int]) -> Iterator[tuple[str, Record]]:
    """Yield the records that name one of ``paths``, oldest first, each with its epoch."""
    for segment in segment_paths(journal):
        try:
            data = segment.read_bytes()
        except FileNotFoundError:
            continue  # expired meanwhile
        if not any(path.encode() in data for path in paths):
            continue
        epoch = ""
        for _, payload in frames(data):
            try:
                item = decoder.decode(payload)
            except (msgspec.DecodeError, UnicodeDecodeError):
                break
            if isinstance(item, Segment):
                epoch = item.epoch
            elif epoch == head[0] and item.seq > head[1]:
                continue
            elif any(path.encode() in payload for path in paths):
                yield epoch, item
