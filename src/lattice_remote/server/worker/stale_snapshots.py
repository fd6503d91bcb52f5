"""Tasks that plain lattice has overwritten with an older state (I12).

Plain lattice reads a snapshot before it takes the lock, and writes it with its own event added. Events that others
committed in between stay in the log, but their effect is gone from the snapshot. If the task was archived in between,
it is there twice: archived, and active with a log of one event.
"""

import os
import re
import stat
from pathlib import Path

from lattice_remote.files import write_atomically
from lattice_remote.protocol.operations import digest_of
from lattice_remote.server.journal.contents import counterpart, derive
from lattice_remote.server.tree.tree import FileState, ProjectTree, TreeDiff

__all__ = ["files_of_task", "grown_tasks", "repair_task"]

_LOG = re.compile(r"(?:archive/)?events/(task_[^/]+)\.jsonl")
_MAX_LOG_BYTES = 4 * 1024 * 1024
"""Size up to which a log is replayed; that takes about 0.1 s per megabyte."""


def files_of_task(path: str) -> set[str]:
    """Return the path and, if it belongs to a task, its event log, snapshot, plan and notes, active or archived."""
    task = os.path.basename(path).partition(".")[0]
    if not task.startswith("task_"):
        return {path}
    active = [f"events/{task}.jsonl", f"tasks/{task}.json", f"plans/{task}.md", f"notes/{task}.md"]
    return {path, *active, *map(counterpart, active)}


def grown_tasks(tree: ProjectTree, found: TreeDiff) -> list[str]:
    """Return the ids of the known tasks whose logs are among the differences ``found``."""
    logs = (match for path in found.states if (match := _LOG.fullmatch(path)) and _known(tree, path))
    return list(dict.fromkeys(match[1] for match in logs))


def repair_task(tree: ProjectTree, task: str) -> None:
    """Archive a revived task again, and derive a stale snapshot from its log. Lattice's locks of it must be held.

    A snapshot is stale if it agreed with its log at the last number, the log has grown, and they no longer agree. A
    snapshot that a person has edited did not agree, and stays.

    Raises:
        OSError: a file cannot be read or written.
    """
    _archive_again(tree, task)
    for folder in ("", "archive/"):
        path, log = f"{folder}tasks/{task}.json", _log_since(tree, f"{folder}events/{task}.jsonl")
        status, known = tree.status(path), _known(tree, path)
        if log is None or status is None or known is None:
            continue
        place, (earlier, now) = tree.absolute(path), log
        right = _derived(path, now)
        if right and Path(place).read_bytes() != right and digest_of(_derived(path, earlier)) == known.digest:
            scratch = os.path.join(os.path.dirname(place), f".tmp.stale.{task}")
            write_atomically(place, right, mode=stat.S_IMODE(status.st_mode), temporary=scratch)


def _archive_again(tree: ProjectTree, task: str) -> None:
    """Move the events of an active log to the archived one, if only that is known; each is there once."""
    active, archived = f"events/{task}.jsonl", f"archive/events/{task}.jsonl"
    if active in tree.files or tree.status(active) is None or tree.status(archived) is None:
        return
    place = Path(tree.absolute(archived))
    known = place.read_bytes()
    lines = Path(tree.absolute(active)).read_bytes().splitlines(keepends=True)
    with place.open("ab") as log:
        log.writelines(line for line in lines if line not in known)
    for path in (active, f"tasks/{task}.json"):
        Path(tree.absolute(path)).unlink(missing_ok=True)


def _derived(snapshot: str, log: bytes) -> bytes:
    return derive(snapshot, lambda _: log)


def _log_since(tree: ProjectTree, path: str) -> tuple[bytes, bytes] | None:
    """Return a log at the last number and now; None if it has not grown, has changed otherwise, or is too large."""
    known, status = _known(tree, path), tree.status(path)
    if known is None or status is None or not known.size < status.st_size <= _MAX_LOG_BYTES:
        return None
    now = Path(tree.absolute(path)).read_bytes()
    earlier = now[: known.size]
    return (earlier, now) if digest_of(earlier) == known.digest else None


def _known(tree: ProjectTree, path: str) -> FileState | None:
    """Return the last numbered state of a file, also if it was archived since, or before."""
    return tree.files.get(path) or tree.files.get(counterpart(path))
