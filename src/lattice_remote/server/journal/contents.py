"""What the journal tells of the content of files: enough to bring back most, whichever earlier version is there.

A change holds what a file became, or what was added to it, or a patch. From that, from the file as it lies on the
disk, and for some files from the logs that they are derived from, its content at a number follows. The digest decides.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lattice_remote.protocol.messages import Change
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

__all__ = ["Contents"]

Read = Callable[[str], bytes]
"""Returns the content of a path of the tree, empty when there is none."""


@dataclass
class _Known:
    """What the journal tells of a file's content: ``data`` from ``offset`` on, where the file at ``base`` ends.

    ``patches`` were applied to it since; ``base`` is None when the journal has all of it.
    """

    base: str | None
    offset: int = 0
    data: bytearray = field(default_factory=bytearray)
    patches: list[MergeJson] = field(default_factory=list)


class Contents:
    """Feed it changes with ``learn``, oldest first; then ask for content."""

    def __init__(self) -> None:
        self._known: dict[str, _Known | None] = {}  # None: the file is gone

    def learn(self, change: Change, moved: Mapping[str, bytes]) -> None:
        """Take in one change, and the content of files that it only moved."""
        for operation in change.ops:
            self._learn(operation, moved)

    def is_gone(self, path: str) -> bool:
        """Whether the last that the journal tells of this file is that it was removed."""
        return path in self._known and self._known[path] is None

    def _learn(self, operation: Operation, moved: Mapping[str, bytes]) -> None:
        known, path = self._known, operation.path
        match operation:
            case PutFile():
                known[path] = _Known(None, data=bytearray(operation.data))
            case AppendBytes():
                known[path] = _grown(known.get(path) or _Known(path, operation.offset), operation)
            case MergeJson():
                (known.get(path) or known.setdefault(path, _Known(path)) or _Known(path)).patches.append(operation)
            case MoveFile():
                whole = _Known(None, data=bytearray(moved[operation.to])) if operation.to in moved else None
                known[operation.to] = whole or known.get(path) or _Known(path)
                known[path] = None
            case DeleteFile():
                known[path] = None
            case AnnounceFile():
                known[path] = _Known(path)  # the file itself was made durable

    def find(self, path: str, size: int, digest: bytes, read: Read, kept: bytes | None = None) -> bytes | None:
        """Return the file's content of this size and digest, None where nothing leads there; ``kept`` is tried too."""
        told = self._known.get(path) or _Known(path)
        on_disk = read(told.base or path)
        candidates = [on_disk[:size]]
        if told.base is None or len(on_disk) >= told.offset:
            candidates.append((on_disk[: told.offset] if told.base is not None else b"") + told.data)
        for candidate in candidates:
            for data in (candidate, _patched(candidate, told.patches)):
                if digest_of(data) == digest:
                    return data
        for data in (kept or b"", _rebuilt(path, read)):
            if digest_of(data) == digest:
                return data
        return None


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


def _rebuilt(path: str, read: Read) -> bytes:
    """Return a task's snapshot as lattice derives it from the task's log; empty where that is not possible."""
    folder, name = os.path.split(path)
    if folder not in ("tasks", "archive/tasks"):
        return b""
    from lattice.core.tasks import apply_event_to_snapshot, serialize_snapshot

    events = read(f"{folder.removesuffix('tasks')}events/{name.removesuffix('.json')}.jsonl")
    snapshot = None
    try:
        for line in events.splitlines():
            snapshot = apply_event_to_snapshot(snapshot, json.loads(line))
    except (ValueError, KeyError, TypeError):
        return b""
    return serialize_snapshot(snapshot).encode() if snapshot is not None else b""
