"""Repair of a tree's files to their state at one number of the journal (I2).

After a power cut a file may be older than the journal, empty, or newer: the worker omits lattice's fsyncs, because
each change is in the journal, which is fsynced before any reply. A newer file was touched by a command whose record
never reached the disk. In a copy of a live directory every file may be of another moment.

People may have edited the files before the server starts. Only content distinguishes an edit from a lost write; a time
stamp may come from ``chown -R`` or ``rsync``:

- a file that is missing, empty, filled with NULs, as at an earlier number, or the start of such a content was lost;
- a line of an event log is an outside change if the journal's log does not have it and no worker of this history made
its id: it is added to the journal's log;
- snapshots and indexes follow from the logs;
- any other unknown content is an outside change, and stays.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lattice_remote.files import write_atomically
from lattice_remote.protocol.operations import digest_of
from lattice_remote.server.journal.contents import Contents, counterpart, derive, is_snapshot, log_of, name_of_resource
from lattice_remote.server.journal.ids import is_own_id
from lattice_remote.server.journal.journal import Journal
from lattice_remote.server.journal.segment import JournalReader, Record, list_beside, segment_paths
from lattice_remote.server.tree.tree import FileState, ManifestFile, ProjectTree, TreeDiff, load_manifest, sync

__all__ = [
    "Repair",
    "differing",
    "files_at_head",
    "files_of_task",
    "grown_tasks",
    "is_copied",
    "parsed",
    "place_of",
    "repair_copy",
    "repair_task",
]

_IDS = "ids.json"
_LIFECYCLE = "_lifecycle.jsonl"
_SESSION_INDEX = "sessions/index.json"
_LOG_FOLDERS = ("events", "archive/events")
_BY_RECOVERY = "agent:lattice-remote"


def differing(tree: ProjectTree, doubtful: Collection[str] | None = None) -> list[str]:
    """Return the files that differ from ``tree.files`` by content.

    With ``doubtful`` paths every other file is durable: it is read only if its signature differs.
    """
    found, seen = [], set()
    for path, status in tree.scan():
        seen.add(path)
        if doubtful is not None and path not in doubtful and tree.is_unchanged(path, status):
            continue
        if _digest(tree, path) != _digest_in(tree, path):
            found.append(path)
    return found + [path for path in tree.files if path not in seen]


@dataclass(frozen=True)
class _Line:
    data: bytes
    event: dict[str, Any]


class Repair:
    """A plan that brings ``damaged`` files to their state in ``tree.files``; ``perform`` writes it. Raises OSError.

    Attributes:
        failed: lost files that cannot be reconstructed; they stay.
        edits: outside changes, which stay. Both become changes like any other difference.

    Args:
        tree: its ``files`` are those of the target number.
        contents: has learned every record up to that number.
        damaged: paths of files that differ.
        kept: returns another candidate for the content of a path; the digest decides.
        epoch: of the workers' ids; empty if commands must not be undone.
        has_edits: whether unknown content may be an outside change; otherwise it is damage.
    """

    def __init__(
        self,
        tree: ProjectTree,
        contents: Contents,
        damaged: Iterable[str],
        kept: Callable[[str], bytes | None] = lambda _: None,
        *,
        epoch: str = "",
        has_edits: bool = True,
    ) -> None:
        self.failed: list[str] = []
        self.edits: list[str] = []
        self._tree = tree
        self._contents = contents
        self._kept = kept
        self._epoch = epoch
        self._has_edits = has_edits
        self._restored: dict[str, bytes] = {}
        self._surplus: list[str] = []
        self._added: dict[str, list[_Line]] = {}  # by path
        damaged = set(damaged)
        logs = {path for path in damaged if _is_log(path)}
        for name in sorted({os.path.basename(path) for path in logs}):
            self._repair_log(name)
        self._complete_lifecycle()
        self._repair_index_of_ids(damaged)
        snapshots = {path for path in damaged - logs if is_snapshot(path)} | set(self._snapshots_of_added())
        for path in sorted(snapshots):
            self._repair_snapshot(path)
        # Deletions go last: a lost rename may be repeated from these files.
        for path in sorted(damaged - logs - snapshots - {_IDS}, key=lambda path: (path not in tree.files, path)):
            self._repair_other(path)
        if _SESSION_INDEX in tree.files and any(path.startswith("sessions/") for path in damaged):
            self._repair_index_of_sessions()

    @property
    def is_needed(self) -> bool:
        return bool(self.failed or self._restored or self._surplus)

    # --- event logs ---

    def _repair_log(self, name: str) -> None:
        """Restore a log to the journal's content, followed by the lines that other programs have added."""
        paths = [f"{folder}/{name}" for folder in _LOG_FOLDERS]
        at = next((path for path in paths if path in self._tree.files), None)
        copies = [path for path in paths if self._tree.status(path) is not None]
        log = b""
        if at is not None:
            found = self._find(at)
            if found is None:
                self.failed.append(at)
                return
            log = found
        lines = list(self._added_lines(log, [self._read(path) for path in copies])) if self._has_edits else []
        if at is None and not lines:
            self._surplus += copies
            return
        at = at or copies[0]
        self._added[at] = lines
        self._restore(at, _extended(log, lines))
        self._surplus += [path for path in copies if path != at]

    def _added_lines(self, log: bytes, copies: list[bytes]) -> Iterator[_Line]:
        known_lines = set(log.split(b"\n"))
        known = {_id_of(line) for line in known_lines}
        for line in (line for copy in copies for line in copy.replace(b"\0", b"\n").split(b"\n")):
            if line in known_lines or (found := _line_in(line)) is None:
                continue
            id_ = found.event["id"]
            if id_ not in known and not is_own_id(id_, self._epoch):
                known.add(id_)
                yield found

    def _complete_lifecycle(self) -> None:
        """Copy lines added to a task's log to the log of all tasks, as lattice does."""
        from lattice.core.events import LIFECYCLE_EVENT_TYPES

        path = f"events/{_LIFECYCLE}"
        lines = [
            line
            for log, lines in self._added.items()
            for line in lines
            if os.path.basename(log) not in (_LIFECYCLE,) and line.event.get("type") in LIFECYCLE_EVENT_TYPES
        ]
        log = self._read(path)
        known = {_id_of(line) for line in log.split(b"\n")}
        if missing := [line for line in lines if line.event["id"] not in known]:
            self._restore(path, _extended(log, missing))

    # --- what follows from the logs ---

    def _snapshots_of_added(self) -> Iterator[str]:
        for log, lines in self._added.items():
            stem = os.path.basename(log).removesuffix(".jsonl")
            if not lines or stem == "_lifecycle":
                continue
            if not stem.startswith("res_"):
                yield f"{log.removesuffix(os.path.basename(log)).replace('events/', 'tasks/')}{stem}.json"
            elif name := name_of_resource(self._read(log)):
                yield f"resources/{name}/resource.json"

    def _repair_snapshot(self, path: str) -> None:
        state, data = self._tree.files.get(path), None
        log = log_of(path, self._read)
        if state is not None and not self._added.get(log or ""):
            data = self._find(path)
        if data is None:
            data = derive(path, self._read, self._resource_logs())
        if data and log in self._surplus:
            data = b""
        if data:
            self._restore(path, data)
        elif state is not None:
            self.failed.append(path)
        elif self._tree.status(path) is not None:
            self._surplus.append(path)

    def _resource_logs(self) -> list[str]:
        on_disk = (path for path, _ in self._tree.scan())
        return sorted(path for path in {*self._restored, *on_disk} if path.startswith("events/res_"))

    def _repair_index_of_ids(self, damaged: set[str]) -> None:
        """Restore ``ids.json`` with the tasks of other programs; a task whose id is taken gets a new one."""
        data: bytes | None = self._read(_IDS)
        if _IDS in damaged:
            data = self._find(_IDS) if _IDS in self._tree.files else None
            if data is None and _IDS in self._tree.files:
                data = self._index_of_ids()
        made = [
            (log, line.event)
            for log, lines in self._added.items()
            if os.path.basename(log) != _LIFECYCLE
            for line in lines
            if isinstance(line.event.get("data"), dict) and line.event["data"].get("short_id")
        ]
        if made:
            index = json.loads(data or b'{"schema_version": 2}')
            ids, following = index.setdefault("map", {}), index.setdefault("next_seqs", {})
            for log, event in made:
                self._register(log, event, ids, following)
            data = _serialized(index)
        if data:
            self._restore(_IDS, data)
        elif _IDS in damaged and self._tree.status(_IDS) is not None:
            self._surplus.append(_IDS)

    def _register(self, log: str, event: dict[str, Any], ids: dict[str, str], following: dict[str, int]) -> None:
        from lattice.core.events import create_event, serialize_event

        short_id, task = event["data"]["short_id"], event["task_id"]
        prefix, _, number = short_id.rpartition("-")
        if ids.get(short_id, task) != task:  # it was given to another task, whose change was acknowledged
            number = following.get(prefix, 1)
            short_id = f"{prefix}-{number}"
            given = create_event(
                type="task_short_id_assigned", task_id=task, actor=_BY_RECOVERY, data={"short_id": short_id}
            )
            self._restore(log, self._read(log) + serialize_event(given).encode())
        ids[short_id] = task
        following[prefix] = max(following.get(prefix, 1), int(number) + 1)

    def _index_of_ids(self) -> bytes:
        ids: dict[str, str] = {}
        following: dict[str, int] = {}
        for path in {*self._tree.files, *self._restored}:
            if not _is_log(path) or not os.path.basename(path).startswith("task_"):
                continue
            for line in self._read(path).split(b"\n"):
                event = parsed(line) or {}
                data = event.get("data")
                if isinstance(data, dict) and event.get("type") in ("task_created", "task_short_id_assigned"):
                    short_id = data.get("short_id")
                    prefix, _, number = str(short_id or "").rpartition("-")
                    if number.isdecimal():
                        ids[str(short_id)] = os.path.basename(path).removesuffix(".jsonl")
                        following[prefix] = max(following.get(prefix, 1), int(number) + 1)
        return _serialized({"schema_version": 2, "map": ids, "next_seqs": following})

    def _repair_index_of_sessions(self) -> None:
        paths = {path for path, _ in self._tree.scan()} - set(self._surplus) | self._restored.keys()
        files = [path for path in paths if os.path.dirname(path) == "sessions" and path != _SESSION_INDEX]
        index = parsed(self._read(_SESSION_INDEX)) or {}
        before = _serialized(index)
        active, counters = {}, index.setdefault("serial_counters", {})
        for path in files:
            session = parsed(self._read(path)) or {}
            if "session" in session:
                active[os.path.basename(path).removesuffix(".json")] = session["session"]
                base, serial = session.get("base_name"), session.get("serial")
                if isinstance(base, str) and isinstance(serial, int):
                    counters[base] = max(counters.get(base, 0), serial)
        index["active_sessions"] = active
        if _serialized(index) != before:
            self._restore(_SESSION_INDEX, _serialized(index))

    # --- all other files ---

    def _repair_other(self, path: str) -> None:
        data = self._read(path) if self._tree.status(path) is not None else None
        if path in self._tree.files:
            if not self._is_lost(path, data):
                self.edits.append(path)
            elif (found := self._find(path)) is None:
                self.failed.append(path)
            else:
                self._restore(path, found)
        elif self._is_lost(path, data) or self._contents.is_gone(path) or self._is_of_a_command(path):
            self._surplus.append(path)
        else:
            self.edits.append(path)

    def _is_lost(self, path: str, data: bytes | None) -> bool:
        if not self._has_edits or data is None or not data.strip(b"\0") or self._contents.was(path, data):
            return True
        if path.startswith("artifacts/"):
            return path in self._tree.files  # an archived session never changes
        if path == _SESSION_INDEX or (b"\0" in data and path.endswith((".md", ".json"))):
            return True
        found = self._find(path) if path in self._tree.files else None
        return found is not None and found.startswith(data)

    def _is_of_a_command(self, path: str) -> bool:
        """Return whether an unknown file was made by a command that never finished."""
        name = os.path.basename(path).partition(".")[0]
        session = (parsed(self._read(path)) or {}).get("session") if path.startswith("sessions/") else None
        return is_own_id(name, self._epoch) or is_own_id(session, self._epoch)

    # --- content ---

    def _find(self, path: str) -> bytes | None:
        state = self._tree.files[path]
        data = self._contents.find(path, state.size, state.digest, self._read, self._kept(path))
        if data is None and is_snapshot(path):
            derived = derive(path, self._read, self._resource_logs())
            return derived if digest_of(derived) == state.digest else None
        if data is None and (moved := self._read(counterpart(path))[: state.size]):
            return moved if digest_of(moved) == state.digest else None
        return data

    def _restore(self, path: str, data: bytes) -> None:
        self._restored.pop(path, None)
        if self._tree.status(path) is None or self._read(path) != data:
            self._restored[path] = data

    def _read(self, path: str) -> bytes:
        if path in self._restored:
            return self._restored[path]
        try:
            return Path(self._tree.absolute(path)).read_bytes()
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return b""

    def perform(self, lost: Path) -> list[str]:
        """Write the files, those of unfinished commands to ``lost``; return a line for each. Repeatable; raises
        OSError.
        """
        notes = [f"{path}: could not be restored" for path in self.failed]
        for path, data in self._restored.items():
            _write(self._tree.absolute(path), data)
            lines = len(self._added.get(path, ()))
            more = f", and lines added outside the server: {lines}" if lines else ""
            notes.append(f"{path}: restored from the journal{more}")
        for path in self._surplus:
            if self._contents.is_gone(path) and self._is_known(path):
                os.unlink(self._tree.absolute(path))
                notes.append(f"{path}: removed again")
            else:
                notes.append(_move_to_lost(self._tree, path, lost))
        return notes

    def _is_known(self, path: str) -> bool:
        data = self._read(path)
        return _is_log(path) or is_snapshot(path) or self._is_lost(path, data)


def _is_log(path: str) -> bool:
    folder, name = os.path.split(path)
    return folder in _LOG_FOLDERS and name.endswith(".jsonl")


def parsed(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _id_of(line: bytes) -> object:
    event = parsed(line)
    return event.get("id") if event is not None else None


def _line_in(data: bytes) -> _Line | None:
    """Return the event at the end of a line; a torn event may precede it."""
    start = data.find(b"{")
    while start >= 0:
        event = parsed(data[start:])
        if event is not None and isinstance(event.get("id"), str) and "type" in event:
            return _Line(data[start:], event)
        start = data.find(b'{"', start + 1)
    return None


def _extended(log: bytes, lines: list[_Line]) -> bytes:
    separator = b"\n" if lines and log and not log.endswith(b"\n") else b""
    return log + separator + b"".join(line.data + b"\n" for line in lines)


def _serialized(index: dict[str, Any]) -> bytes:
    return (json.dumps(index, sort_keys=True, indent=2) + "\n").encode()


def _digest(tree: ProjectTree, path: str) -> bytes | None:
    content = tree.read(path, None)
    return content.state.digest if content is not None else None


def _digest_in(tree: ProjectTree, path: str) -> bytes | None:
    return tree.files[path].digest if path in tree.files else None


def _move_to_lost(tree: ProjectTree, path: str, lost: Path) -> str:
    target = lost / path
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(tree.absolute(path), target)
    return f"{path}: no change has it; now in journal/{lost.name}/"


def _write(path: str, data: bytes) -> None:
    directory, name = os.path.split(path)
    os.makedirs(directory, exist_ok=True)
    write_atomically(path, data, mode=0o666, temporary=os.path.join(directory, f".tmp.repair.{name}"), sync=sync)


# --- tasks that plain lattice has overwritten with an older state (I12) ---
#
# Plain lattice reads a snapshot before it takes the lock, and writes it with its own event added. Events that others
# committed in between stay in the log, but their effect is gone from the snapshot. If the task was archived in between,
# it is there twice: archived, and active with a log of one event.

_LOG = re.compile(r"(?:archive/)?events/(task_[^/]+)\.jsonl")
_MAX_LOG_BYTES = 4 * 1024 * 1024
"""A longer log is not replayed; that takes about 0.1 s per megabyte."""


def files_of_task(path: str) -> set[str]:
    """Return a path and, of a task, its log, snapshot, plan and notes, active or archived."""
    task = os.path.basename(path).partition(".")[0]
    if not task.startswith("task_"):
        return {path}
    active = [f"events/{task}.jsonl", f"tasks/{task}.json", f"plans/{task}.md", f"notes/{task}.md"]
    return {path, *active, *map(counterpart, active)}


def grown_tasks(tree: ProjectTree, found: TreeDiff) -> list[str]:
    logs = (match for path in found.states if (match := _LOG.fullmatch(path)) and _known(tree, path))
    return list(dict.fromkeys(match[1] for match in logs))


def repair_task(tree: ProjectTree, task: str) -> None:
    """Archive a revived task again, and derive a stale snapshot from its log.

    A snapshot is stale if it agreed with its log at the last number, the log has grown, and they no longer agree. A
    snapshot that a person has edited did not agree, and stays.
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
    """Return a log at the last number and now; None if it has not simply grown."""
    known, status = _known(tree, path), tree.status(path)
    if known is None or status is None or not known.size < status.st_size <= _MAX_LOG_BYTES:
        return None
    now = Path(tree.absolute(path)).read_bytes()
    earlier = now[: known.size]
    return (earlier, now) if digest_of(earlier) == known.digest else None


def _known(tree: ProjectTree, path: str) -> FileState | None:
    """Return the last numbered state of a file, also if it was archived since, or before."""
    return tree.files.get(path) or tree.files.get(counterpart(path))


# --- a copy of a data directory, made while the server ran (I7) ---


def place_of(directory: Path) -> list[int]:
    """Return an identity that a copy of this directory does not share; empty before its undo log exists."""
    try:
        return [os.stat(directory).st_ino, os.stat(directory / "undo").st_ino]
    except FileNotFoundError:
        return []


def is_copied(directory: Path, listed: ManifestFile | None) -> bool:
    """Return whether the manifest was written in another directory."""
    return listed is not None and bool(listed.place) and listed.place != place_of(directory)


def repair_copy(
    tree: ProjectTree, journal: Journal, listed: ManifestFile, *, kept: Callable[[str], bytes | None]
) -> list[str]:
    """Bring the tree to the last change that all of it can reach; return lines for the log. Repeatable after a crash.

    Empty if nothing is repaired: the files fit, or some were written after the server had stopped in order. Other
    outside changes stay, see ``Repair``. Raises OSError.

    Args:
        kept: returns the copied undo log's content of an absolute path.
    """
    states = _EarlierTrees(journal, listed, tree)
    target = journal.head
    while True:
        tree.files = states.at(target)
        damaged = differing(tree)
        epoch = "" if journal.is_damaged else journal.epoch
        repair = Repair(tree, states.contents, damaged, lambda path: kept(tree.absolute(path)), epoch=epoch)
        is_whole = not repair.is_needed or (listed.clean and _is_edited(tree, journal.newest))
        if is_whole and target == journal.head:
            return []
        late = [states.changed_at[path] for path in repair.failed if path in states.changed_at]
        if not late:
            break
        target = min(late) - 1
    notes = repair.perform(journal.directory / "lost")
    first = (
        f"this is a copy of a running server: {len(notes)} files were restored to change {target}; a new epoch starts"
    )
    return [first, *notes]


def files_at_head(journal: Journal, listed: ManifestFile, lattice: Path) -> dict[str, FileState]:
    return _EarlierTrees(journal, listed, ProjectTree(lattice, {})).at(journal.head)


def _is_edited(tree: ProjectTree, after: float) -> bool:
    return any(status.st_mtime > after for _, status in tree.scan())


class _EarlierTrees:
    """The files at any number that the journal reaches."""

    def __init__(self, journal: Journal, listed: ManifestFile, tree: ProjectTree) -> None:
        self.contents = Contents()
        """Up to the number last asked for."""
        self.changed_at: dict[str, int] = {}
        """The last change of each file up to that number that can be undone."""
        self._journal = journal
        oldest = _oldest_list(journal, listed)
        self._has_list = oldest is not None
        self._first = oldest.seq if oldest is not None else journal.oldest - 1
        # Without a manifest: files that the journal does not name have not changed since it began, so the disk has
        # them.
        self._files = oldest.files if oldest is not None else _on_disk(tree)

    def at(self, seq: int) -> dict[str, FileState]:
        """Return the files at this number, and learn the contents up to it."""
        files = dict(self._files)
        self.contents, self.changed_at = Contents(), {}
        for path, state in self._files.items():
            self.contents.learn_state(path, state)
        for record in JournalReader(self._journal.directory).records():
            if record.seq > seq:
                break
            self.contents.learn(record)
            if record.seq > self._first:
                self._apply(files, record)
        return files

    def _apply(self, files: dict[str, FileState], record: Record) -> None:
        for path, state in record.files.items():
            if state is None:
                files.pop(path, None)
            else:
                files[path] = state
            if self._has_list:
                self.changed_at[path] = record.seq


def _oldest_list(journal: Journal, listed: ManifestFile) -> ManifestFile | None:
    """Return the oldest manifest from which the journal continues."""
    beside = map(load_manifest, map(list_beside, segment_paths(journal.directory)))
    lists = [found for found in (listed, *beside) if found is not None and found.epoch == journal.epoch]
    reached = range(journal.oldest - 1, journal.head + 1)
    return min((found for found in lists if found.seq in reached), key=lambda found: found.seq, default=None)


def _on_disk(tree: ProjectTree) -> dict[str, FileState]:
    read = {path: tree.read(path, None) for path, _ in tree.scan()}
    return {path: content.state for path, content in read.items() if content is not None}
