"""File contents according to the journal, and snapshots according to their event logs."""

import json
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from lattice_remote.protocol.messages import Change, decode_server_frame
from lattice_remote.protocol.operations import (
    AnnounceFile,
    AppendBytes,
    DeleteFile,
    MergeJson,
    MoveFile,
    Operation,
    PutFile,
    canonical_json,
    digest_of,
    merge_patch,
)
from lattice_remote.server.journal.segment import Record
from lattice_remote.server.tree.tree import FileState

__all__ = ["Contents", "Read", "change_of", "counterpart", "derive", "is_snapshot", "log_of", "name_of_resource"]


Read = Callable[[str], bytes]
"""Returns the content of a path of the tree, empty if there is none."""


@dataclass
class _Known:
    """A file's content: that of ``base`` (None: nothing) up to ``offset``, then ``data``, with ``patches`` applied."""

    base: str | None
    offset: int = 0
    data: bytearray = field(default_factory=bytearray)
    patches: list[MergeJson] = field(default_factory=list)


class Contents:
    """File contents according to the journal, for ``paths`` if given. Pass records to ``learn``, oldest first."""

    def __init__(self, paths: Iterable[str] | None = None) -> None:
        self._names = {os.path.basename(path) for path in paths} if paths is not None else None
        self._known: dict[str, _Known | None] = {}  # None: the file is gone
        self._digests: dict[str, set[bytes]] = {}
        self._texts: dict[str, list[bytes]] = {}

    def learn(self, record: Record) -> None:
        """Add a record's change, the states after it, and the contents that it holds whole."""
        for path, state in record.files.items():
            self.learn_state(path, state)
        if record.change is None:
            for path, data in record.moved.items():  # its state before an operation that may have been interrupted
                if self._is_wanted(path):
                    self._put(path, data)
            return
        for operation in change_of(record).ops:
            if self._is_wanted(operation.path):
                self._learn(operation, record)

    def learn_state(self, path: str, state: FileState | None) -> None:
        if state is not None and self._is_wanted(path):
            self._digests.setdefault(path, set()).add(state.digest)

    def was(self, path: str, data: bytes) -> bool:
        """Return whether the file once had this content, or the start of one that the journal has whole."""
        return digest_of(data) in self._digests.get(path, ()) or any(
            text.startswith(data) for text in self._texts.get(path, ())
        )

    def is_gone(self, path: str) -> bool:
        return path in self._known and self._known[path] is None

    def _is_wanted(self, path: str) -> bool:
        return self._names is None or os.path.basename(path) in self._names

    def _put(self, path: str, data: bytes) -> None:
        self._known[path] = _Known(None, data=bytearray(data))
        self._texts.setdefault(path, []).append(data)

    def _learn(self, operation: Operation, record: Record) -> None:
        known, path = self._known, operation.path
        match operation:
            case PutFile():
                self._put(path, operation.data)
            case AppendBytes():
                known[path] = _grown(known.get(path) or _Known(path, operation.offset), operation)
            case MergeJson():
                (known.get(path) or known.setdefault(path, _Known(path)) or _Known(path)).patches.append(operation)
            case MoveFile():
                if operation.to in record.moved:
                    self._put(operation.to, record.moved[operation.to])
                else:
                    known[operation.to] = known.get(path) or _Known(path)
                known[path] = None
            case DeleteFile():
                known[path] = None
            case AnnounceFile():
                known[path] = _Known(path)  # the file itself was made durable

    def find(self, path: str, size: int, digest: bytes, read: Read, kept: bytes | None = None) -> bytes | None:
        """Return the content of this size and digest, also if it is ``kept``; None if it cannot be reconstructed."""
        known = self._known.get(path) or _Known(path)
        on_disk = read(known.base or path)
        candidates = [on_disk[:size]]
        if known.base is None or len(on_disk) >= known.offset:
            candidates.append((on_disk[: known.offset] if known.base is not None else b"") + known.data)
        for candidate in candidates:
            for data in (candidate, _patched(candidate, known.patches)):
                if digest_of(data) == digest:
                    return data
        return kept if kept is not None and digest_of(kept) == digest else None


def change_of(record: Record) -> Change:
    assert record.change is not None, "the caller has looked"
    frame = decode_server_frame(record.change, max_bytes=len(record.change))
    assert isinstance(frame, Change), "the journal holds what this package has encoded"
    return frame


def _grown(known: _Known, operation: AppendBytes) -> _Known:
    if not known.data and known.base is not None:
        known.offset = operation.offset
    del known.data[operation.offset - known.offset :]
    known.data += operation.data
    return known


def _patched(data: bytes, patches: list[MergeJson]) -> bytes:
    """Apply the patches after the last one whose outcome ``data`` is: the disk may have any version."""
    if not patches:
        return data
    outcomes = [patch.digest for patch in patches]
    digest = digest_of(data)
    last = len(outcomes) - outcomes[::-1].index(digest) if digest in outcomes else 0
    try:
        value = json.loads(data)
        for patch in patches[last:]:
            value = merge_patch(value, json.loads(patch.patch))
        return canonical_json(value)
    except (ValueError, RecursionError):
        return data


def counterpart(path: str) -> str:
    """Return the path of a task's file once the task is archived, or before that."""
    return path.removeprefix("archive/") if path.startswith("archive/") else f"archive/{path}"


def is_snapshot(path: str) -> bool:
    folder, name = os.path.split(path)
    return folder in ("tasks", "archive/tasks") or (folder.startswith("resources/") and name == "resource.json")


def log_of(path: str, read: Read) -> str | None:
    folder, name = os.path.split(path)
    if folder in ("tasks", "archive/tasks"):
        return f"{folder.removesuffix('tasks')}events/{name.removesuffix('.json')}.jsonl"
    if folder.startswith("resources/") and name == "resource.json":
        try:
            return f"events/{json.loads(read(path))['id']}.jsonl"
        except (ValueError, KeyError, TypeError):
            return None
    return None


def derive(path: str, read: Read, logs: Collection[str] = ()) -> bytes:
    """Return a snapshot as lattice derives it; empty if impossible. ``logs`` of resources are searched if it names
    none.
    """
    log = log_of(path, read)
    if log is None and path.startswith("resources/"):
        name = path.split("/")[1]
        log = next((log for log in logs if name_of_resource(read(log)) == name), None)
    if log is None:
        return b""
    from lattice.core.resources import apply_resource_event_to_snapshot, serialize_resource_snapshot
    from lattice.core.tasks import apply_event_to_snapshot, serialize_snapshot

    is_task = not path.startswith("resources/")
    apply = apply_event_to_snapshot if is_task else apply_resource_event_to_snapshot
    snapshot = None
    try:
        for line in read(log).splitlines():
            snapshot = apply(snapshot, json.loads(line))
        return (serialize_snapshot if is_task else serialize_resource_snapshot)(snapshot).encode() if snapshot else b""
    except (ValueError, KeyError, TypeError):
        return b""


def name_of_resource(log: bytes) -> str | None:
    try:
        name = json.loads(log.split(b"\n", 1)[0])["data"]["name"]
    except (ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None
