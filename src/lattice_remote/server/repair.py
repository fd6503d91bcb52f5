"""After a power cut: what the journal says was written, and the disk has lost, is written again (I2).

The worker leaves out lattice's own fsyncs, because each change is in the journal, which is fsynced before anybody is
told. So after a power cut a file may be older than the journal, empty, or newer: touched by a command whose record
never reached the disk. Each file is brought back to what it was at the journal's head, and is checked by its digest.
"""

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

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
from lattice_remote.server.manifest import FileState, sync_directory
from lattice_remote.server.tree import Tree

__all__ = ["booted_at", "repair"]


@dataclass
class _Known:
    """What the journal tells of a file's content: ``data`` from ``offset`` on, where the file at ``base`` ends.

    ``patches`` were applied to it since; ``base`` is None when the journal has all of it.
    """

    base: str | None
    offset: int = 0
    data: bytes = b""
    patches: list[MergeJson] = field(default_factory=list)


def booted_at() -> float:
    """Return when this run of the machine began, in seconds since the epoch."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def repair(tree: Tree, changes: Iterable[Change], *, boot_time: float, lost: Path) -> list[str]:
    """Bring back the files that a power cut damaged; return one line for each, for the log.

    What was changed since the machine started again is somebody's edit, and is left alone. What can't be brought back
    is left as it is too: it becomes a change like any other difference.

    Args:
        tree: its ``files`` are those of the journal's head.
        changes: all that the journal has, oldest first.
        boot_time: when the machine started again, in seconds since the epoch.
        lost: a directory for files that nobody knows of: they were written by commands that never were.

    Raises:
        OSError: a file can't be read or written.
    """
    known: dict[str, _Known | None] = {}
    for change in changes:
        for operation in change.ops:
            _learn(known, operation)
    notes: list[str] = []
    damaged = _damaged(tree, boot_time)
    # Logs first: a snapshot may be rebuilt from its log. What is to go last: a lost rename may be repeated from it.
    for path in sorted(damaged, key=lambda path: (path not in tree.files, "events/" not in path)):
        state = tree.files.get(path)
        if state is None and path in known and known[path] is None:
            os.unlink(tree.absolute(path))
            notes.append(f"{path}: removed again")
        elif state is None:
            notes.append(_set_aside(tree, path, lost))
        elif (data := _content(tree, path, state, known)) is not None:
            _write(tree.absolute(path), data)
            notes.append(f"{path}: brought back from the journal")
        else:
            notes.append(f"{path}: could not be brought back")
    return notes


def _learn(known: dict[str, _Known | None], operation: Operation) -> None:
    """Take in one operation; None in ``known`` stands for a file that is gone."""
    path = operation.path
    match operation:
        case PutFile():
            known[path] = _Known(None, data=operation.data)
        case AppendBytes():
            known[path] = _grown(known.get(path) or _Known(path, operation.offset), operation)
        case MergeJson():
            (known.get(path) or known.setdefault(path, _Known(path)) or _Known(path)).patches.append(operation)
        case MoveFile():
            known[operation.to] = known.get(path) or _Known(path)
            known[path] = None
        case DeleteFile():
            known[path] = None
        case AnnounceFile():
            known[path] = _Known(path)  # the file itself was made durable


def _grown(known: _Known, operation: AppendBytes) -> _Known:
    if not known.data and known.base is not None:
        known.offset = operation.offset
    known.data = known.data[: operation.offset - known.offset] + operation.data
    return known


def _damaged(tree: Tree, boot_time: float) -> list[str]:
    """Return the files that are not as at the head, and have not been touched since the machine started again."""
    damaged, seen = [], set()
    for path, status in tree.scan():
        seen.add(path)
        if status.st_ctime < boot_time and _digest(tree, path) != _digest_in(tree.files, path):
            damaged.append(path)
    return damaged + [path for path in tree.files if path not in seen]


def _digest(tree: Tree, path: str) -> bytes | None:
    content = tree.read(path, None)
    return content.state.digest if content is not None else None


def _digest_in(files: Mapping[str, FileState], path: str) -> bytes | None:
    return files[path].digest if path in files else None


def _content(tree: Tree, path: str, state: FileState, known: Mapping[str, _Known | None]) -> bytes | None:
    """Return the file's content at the head, None where nothing leads there."""
    told = known.get(path) or _Known(path)
    on_disk = _read(tree.absolute(told.base or path))
    candidates = [on_disk[: state.size]]
    if told.base is None or len(on_disk) >= told.offset:
        candidates.append((on_disk[: told.offset] if told.base is not None else b"") + told.data)
    for candidate in candidates:
        for data in (candidate, _patched(candidate, told.patches)):
            if digest_of(data) == state.digest:
                return data
    data = _rebuilt(tree, path)
    return data if digest_of(data) == state.digest else None


def _patched(data: bytes, patches: Iterable[MergeJson]) -> bytes:
    """Apply the patches that fit, in order: the disk may have any version, and have some of them already."""
    for patch in patches:
        try:
            patched = canonical_json(merge_patch(json.loads(data), json.loads(patch.patch)))
        except (ValueError, RecursionError):
            return data
        if digest_of(patched) == patch.digest:
            data = patched
    return data


def _rebuilt(tree: Tree, path: str) -> bytes:
    """Return a task's snapshot as lattice derives it from the task's log; empty where that is not possible."""
    folder, name = os.path.split(path)
    if folder not in ("tasks", "archive/tasks"):
        return b""
    from lattice.core.tasks import apply_event_to_snapshot, serialize_snapshot

    log = _read(tree.absolute(f"{folder.removesuffix('tasks')}events/{name.removesuffix('.json')}.jsonl"))
    snapshot = None
    try:
        for line in log.splitlines():
            snapshot = apply_event_to_snapshot(snapshot, json.loads(line))
    except (ValueError, KeyError, TypeError):
        return b""
    return serialize_snapshot(snapshot).encode() if snapshot is not None else b""


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return b""


def _set_aside(tree: Tree, path: str, lost: Path) -> str:
    target = lost / path
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(tree.absolute(path), target)
    return f"{path}: of a command that was never finished; now in {lost.name}/"


def _write(path: str, data: bytes) -> None:
    directory, name = os.path.split(path)
    os.makedirs(directory, exist_ok=True)
    scratch = os.path.join(directory, f".tmp.repair.{name}")
    with open(scratch, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
    sync_directory(Path(directory))
