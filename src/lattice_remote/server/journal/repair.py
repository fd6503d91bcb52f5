"""Repair of a tree's files to their state at one number of the journal (I2).

After a power cut a file may be older than the journal, empty, or newer. The worker omits lattice's own fsyncs, because
each change is in the journal, which is fsynced before any reply. A newer file was touched by a command whose record
never reached the disk. In a copy of a live data directory every file may be of another moment.

People may have edited the files with plain lattice or an editor before the server starts. Only content distinguishes
such an edit from a lost write; a time stamp may come from ``chown -R`` or ``rsync``:

- a file that is missing, empty, filled with NULs, as at an earlier number, or the start of such a content was lost;
- a line of an event log is an outside change if the journal's log does not have it and no worker of this history made
its id (``make_id``): it is added to the journal's log;
- snapshots and indexes follow from the logs;
- any other content that no number has is an outside change, and stays.
"""

import base64
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lattice_remote.files import write_atomically
from lattice_remote.protocol.codec import decode_server_frame
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
from lattice_remote.server.journal.journal import Journal
from lattice_remote.server.journal.segment import JournalReader, Record, list_beside, segment_paths
from lattice_remote.server.tree.tree import FileState, ManifestFile, ProjectTree, load_manifest, sync

__all__ = [
    "Contents",
    "Repair",
    "change_of",
    "counterpart",
    "derive",
    "differing",
    "is_copied",
    "is_own_id",
    "is_snapshot",
    "log_of",
    "make_id",
    "place_of",
    "repair_copy",
]

Read = Callable[[str], bytes]
"""Returns the content of a path of the tree, empty if there is none."""


@dataclass
class _Known:
    """The journal's knowledge of a file's content: ``data`` from ``offset`` on, after the end of the file at ``base``.

    ``patches`` were applied to it since; ``base`` is None if the journal has all of it.
    """

    base: str | None
    offset: int = 0
    data: bytearray = field(default_factory=bytearray)
    patches: list[MergeJson] = field(default_factory=list)


class Contents:
    """File contents according to the journal. Pass records to ``learn``, oldest first; then ask for content.

    Args:
        paths: the files that will be asked for, None for all. Saves memory: a journal has tens of megabytes.
    """

    def __init__(self, paths: Iterable[str] | None = None) -> None:
        self._names = {os.path.basename(path) for path in paths} if paths is not None else None
        self._known: dict[str, _Known | None] = {}  # None: the file is gone
        self._digests: dict[str, set[bytes]] = {}
        self._texts: dict[str, list[bytes]] = {}

    def learn(self, record: Record) -> None:
        """Add one record: its change, the states after it, and the contents that it holds whole."""
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
        """Note that a file had this content at some number."""
        if state is not None and self._is_wanted(path):
            self._digests.setdefault(path, set()).add(state.digest)

    def was(self, path: str, data: bytes) -> bool:
        """Return whether the file once had this content, or the start of one that the journal has whole."""
        return digest_of(data) in self._digests.get(path, ()) or any(
            text.startswith(data) for text in self._texts.get(path, ())
        )

    def is_gone(self, path: str) -> bool:
        """Return whether the newest record of this file removed it."""
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
        """Return the file's content of this size and digest, None if it cannot be reconstructed; ``kept`` is tried
        too.
        """
        told = self._known.get(path) or _Known(path)
        on_disk = read(told.base or path)
        candidates = [on_disk[:size]]
        if told.base is None or len(on_disk) >= told.offset:
            candidates.append((on_disk[: told.offset] if told.base is not None else b"") + told.data)
        for candidate in candidates:
            for data in (candidate, _patched(candidate, told.patches)):
                if digest_of(data) == digest:
                    return data
        return kept if kept is not None and digest_of(kept) == digest else None


def change_of(record: Record) -> Change:
    """Return the change that a record holds."""
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


# --- what lattice derives from its logs ---


def counterpart(path: str) -> str:
    """Return the path of a file once its task is archived, or before that."""
    return path.removeprefix("archive/") if path.startswith("archive/") else f"archive/{path}"


def is_snapshot(path: str) -> bool:
    """Return whether a file is a snapshot of a task or a resource."""
    folder, name = os.path.split(path)
    return folder in ("tasks", "archive/tasks") or (folder.startswith("resources/") and name == "resource.json")


def log_of(path: str, read: Read) -> str | None:
    """Return the event log that a snapshot of a task or a resource is derived from; None for any other file."""
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
    """Return a snapshot as lattice derives it from its log; empty if that is not possible.

    Args:
        path: of the snapshot.
        read: see ``Read``.
        logs: of resources, to search if the snapshot does not name its own.
    """
    log = log_of(path, read)
    if log is None and path.startswith("resources/"):
        name = path.split("/")[1]
        log = next((log for log in logs if _name_of_resource(read(log)) == name), None)
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


def _name_of_resource(log: bytes) -> str | None:
    try:
        first = json.loads(log.split(b"\n", 1)[0])
        return str(first["data"]["name"])
    except (ValueError, KeyError, TypeError):
        return None


_IDS = "ids.json"
_LIFECYCLE = "_lifecycle.jsonl"
_SESSION_INDEX = "sessions/index.json"
_LOG_FOLDERS = ("events", "archive/events")
_CROCKFORD = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", "0123456789ABCDEFGHJKMNPQRSTVWXYZ")
_FROM_CROCKFORD = {target: chr(source) for source, target in _CROCKFORD.items()}
_BY_RECOVERY = "agent:lattice-remote"


# --- ids that a worker made ---


def make_id(epoch: str) -> str:
    """Return a new ULID that ``is_own_id`` recognizes as made by a worker in this epoch.

    Half of its random part is random, the other half a digest of the rest.
    """
    head = int(time.time() * 1000).to_bytes(6) + secrets.token_bytes(5)
    return _encode(head + _seal(head, epoch))


def is_own_id(id_: object, epoch: str) -> bool:
    """Return whether a worker made an id such as ``ev_01...`` in this epoch; False for any other text."""
    if not isinstance(id_, str) or not epoch:
        return False
    try:
        data = _decode(id_.rpartition("_")[2])
    except ValueError:
        return False
    return len(data) == 16 and data[11:] == _seal(data[:11], epoch)


def _seal(head: bytes, epoch: str) -> bytes:
    return hashlib.blake2b(head, digest_size=5, key=epoch.encode()[:64]).digest()


def _encode(data: bytes) -> str:
    # 130 bits in 26 characters, the first two of them 0: Base32 of 20 bytes has the 128 bits at its end.
    return base64.b32encode(bytes(4) + data).decode().translate(_CROCKFORD)[6:]


def _decode(ulid: str) -> bytes:
    return base64.b32decode("AAAAAA" + ulid.translate(_FROM_CROCKFORD))[4:]


# --- files ---


def differing(tree: ProjectTree, doubtful: Collection[str] | None = None) -> list[str]:
    """Return the files that differ from ``tree.files`` by content.

    With ``doubtful`` paths every other file was made durable since it last changed: it is read only if its signature
    differs.
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
    """A line of an event log that is not in the journal."""

    data: bytes
    event: dict[str, Any]


class Repair:
    """A plan that brings ``damaged`` files to their state in ``tree.files``; ``perform`` writes it.

    Attributes:
        failed: lost files that cannot be reconstructed; they stay as they are.
        edits: paths of outside changes, which stay.

    Both become changes like any other difference.

    Args:
        tree: its ``files`` are those of the target number.
        contents: has learned every record up to that number that the journal has.
        damaged: paths of files that differ.
        kept: returns other candidates for the content of a path; the digest decides.
        epoch: of the workers' ids; empty if commands must not be undone.
        has_edits: whether unknown content may be an outside change; otherwise it is damage.

    Raises:
        OSError: a file cannot be read.
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
        self._added: dict[str, list[_Line]] = {}  # lines added to logs, by path
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
        """Whether anything was lost."""
        return bool(self.failed or self._restored or self._surplus)

    # --- event logs ---

    def _repair_log(self, name: str) -> None:
        """Restore a log to the journal's content, followed by the lines that other programs have added to it."""
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
            elif name := _name_of(self._read(log)):
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
        """Restore ``ids.json``, with the tasks created by other programs; a task whose id is taken gets a new one."""
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
        """Return the index according to the tasks' logs, if its content cannot be reconstructed."""
        ids: dict[str, str] = {}
        following: dict[str, int] = {}
        for path in {*self._tree.files, *self._restored}:
            if not _is_log(path) or not os.path.basename(path).startswith("task_"):
                continue
            for line in self._read(path).split(b"\n"):
                event = _parsed(line) or {}
                data = event.get("data")
                if isinstance(data, dict) and event.get("type") in ("task_created", "task_short_id_assigned"):
                    short_id = data.get("short_id")
                    prefix, _, number = str(short_id or "").rpartition("-")
                    if number.isdecimal():
                        ids[str(short_id)] = os.path.basename(path).removesuffix(".jsonl")
                        following[prefix] = max(following.get(prefix, 1), int(number) + 1)
        return _serialized({"schema_version": 2, "map": ids, "next_seqs": following})

    def _repair_index_of_sessions(self) -> None:
        """Make the index of sessions list the existing sessions."""
        paths = {path for path, _ in self._tree.scan()} - set(self._surplus) | self._restored.keys()
        files = [path for path in paths if os.path.dirname(path) == "sessions" and path != _SESSION_INDEX]
        index = _parsed(self._read(_SESSION_INDEX)) or {}
        before = _serialized(index)
        active, counters = {}, index.setdefault("serial_counters", {})
        for path in files:
            session = _parsed(self._read(path)) or {}
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
        session = (_parsed(self._read(path)) or {}).get("session") if path.startswith("sessions/") else None
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

    # --- writing ---

    def perform(self, lost: Path) -> list[str]:
        """Write the files; return one line for each, for the log. May be repeated after an error.

        Args:
            lost: a directory for files that no change has: unfinished commands wrote them.

        Raises:
            OSError: a file cannot be written.
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
                notes.append(_set_aside(self._tree, path, lost))
        return notes

    def _is_known(self, path: str) -> bool:
        data = self._read(path)
        return _is_log(path) or is_snapshot(path) or self._is_lost(path, data)


def _is_log(path: str) -> bool:
    folder, name = os.path.split(path)
    return folder in _LOG_FOLDERS and name.endswith(".jsonl")


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _id_of(line: bytes) -> object:
    event = _parsed(line)
    return event.get("id") if event is not None else None


def _line_in(data: bytes) -> _Line | None:
    """Return the event at the end of a line; a fragment of an event whose end was lost may precede it."""
    start = data.find(b"{")
    while start >= 0:
        event = _parsed(data[start:])
        if event is not None and isinstance(event.get("id"), str) and "type" in event:
            return _Line(data[start:], event)
        start = data.find(b'{"', start + 1)
    return None


def _extended(log: bytes, lines: list[_Line]) -> bytes:
    separator = b"\n" if lines and log and not log.endswith(b"\n") else b""
    return log + separator + b"".join(line.data + b"\n" for line in lines)


def _name_of(log: bytes) -> str | None:
    first = _parsed(log.split(b"\n", 1)[0]) or {}
    data = first.get("data")
    return data.get("name") if isinstance(data, dict) else None


def _serialized(index: dict[str, Any]) -> bytes:
    """Return an index as lattice writes it."""
    return (json.dumps(index, sort_keys=True, indent=2) + "\n").encode()


def _digest(tree: ProjectTree, path: str) -> bytes | None:
    content = tree.read(path, None)
    return content.state.digest if content is not None else None


def _digest_in(tree: ProjectTree, path: str) -> bytes | None:
    return tree.files[path].digest if path in tree.files else None


def _set_aside(tree: ProjectTree, path: str, lost: Path) -> str:
    target = lost / path
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(tree.absolute(path), target)
    return f"{path}: no change has it; now in journal/{lost.name}/"


def _write(path: str, data: bytes) -> None:
    directory, name = os.path.split(path)
    os.makedirs(directory, exist_ok=True)
    write_atomically(path, data, mode=0o666, temporary=os.path.join(directory, f".tmp.repair.{name}"), sync=sync)


def place_of(directory: Path) -> list[int]:
    """Return an identity of this journal directory that a copy does not share; empty before its undo log exists."""
    try:
        return [os.stat(directory).st_ino, os.stat(directory / "undo").st_ino]
    except FileNotFoundError:
        return []


def is_copied(directory: Path, listed: ManifestFile | None) -> bool:
    """Return whether the manifest was written in another directory than this."""
    return listed is not None and bool(listed.place) and listed.place != place_of(directory)


def repair_copy(
    tree: ProjectTree, journal: Journal, listed: ManifestFile, *, kept: Callable[[str], bytes | None]
) -> list[str]:
    """Bring the tree to the last change of the journal that all of it can reach; return lines for the log.

    Empty if there is nothing to repair. Outside changes made in the copy before its first start stay (``Repair``). So
    does the whole tree if files were written there after the server had stopped in order. May be repeated after a
    crash.

    Args:
        tree: of the copy; its ``files`` are of the reached number afterwards.
        journal: the copied one, open.
        listed: the copied manifest.
        kept: returns the copied undo log's content of a path, by its absolute path.

    Raises:
        OSError: a file cannot be read or written.
    """
    states = _States(journal, listed, tree)
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


def _is_edited(tree: ProjectTree, after: float) -> bool:
    """Return whether any file was written after this time, in seconds since the epoch."""
    return any(status.st_mtime > after for _, status in tree.scan())


class _States:
    """The files at any number that the journal reaches, as far as it and the manifest determine them."""

    def __init__(self, journal: Journal, listed: ManifestFile, tree: ProjectTree) -> None:
        self.contents = Contents()
        """Contents up to the number last asked for."""
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
    """Return the oldest manifest from which the journal continues.

    The copied ``manifest`` may be newer than the copied journal, or than the target change.
    """
    beside = map(load_manifest, map(list_beside, segment_paths(journal.directory)))
    lists = [found for found in (listed, *beside) if found is not None and found.epoch == journal.epoch]
    reached = range(journal.oldest - 1, journal.head + 1)
    return min((found for found in lists if found.seq in reached), key=lambda found: found.seq, default=None)


def _on_disk(tree: ProjectTree) -> dict[str, FileState]:
    read = {path: tree.read(path, None) for path, _ in tree.scan()}
    return {path: content.state for path, content in read.items() if content is not None}
