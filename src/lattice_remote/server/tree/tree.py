"""Replicated files of a project, and the operations from their known state to the disk.

The tree on disk is the truth; ``ProjectTree.files`` is the clients' state. Operations have the order of the command's
writes: event logs before snapshots (I8).
"""

import contextlib
import ctypes
import hashlib
import json
import os
import re
import stat
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import batched
from pathlib import Path
from typing import Any

import msgspec

from lattice_remote import files
from lattice_remote.protocol.file_table import FileTable, compacted
from lattice_remote.protocol.operations import (
    TAIL_BYTES,
    AnnounceFile,
    AppendBytes,
    DeleteFile,
    MergeJson,
    MoveFile,
    Operation,
    PutFile,
    canonical_json,
    digest_of,
    flat_value,
    merge_patch,
)
from lattice_remote.protocol.paths import is_replicated
from lattice_remote.server.tree.capture import AccessLog, Move

__all__ = [
    "EDITED_BY_HAND",
    "INLINE_BYTES",
    "MERGE_FROM_BYTES",
    "FileState",
    "ManifestFile",
    "ProjectTree",
    "SyncFailed",
    "TreeDiff",
    "TrustedDigest",
    "encode_manifest",
    "has_signature",
    "is_same_file",
    "load_manifest",
    "patch_between",
    "save_manifest",
    "state_of",
    "sync",
    "sync_directory",
    "sync_file_systems",
    "sync_files",
]


def patch_between(before: bytes, after: bytes) -> bytes | None:
    """Return a patch between two canonical JSON texts that yields exactly ``after``.

    None if there is none, or it is not under half the size of ``after``.
    """
    try:
        flat = flat_value(before), flat_value(after)
        old, new = flat if all(flat) else (json.loads(before), json.loads(after))
        if not isinstance(old, dict) or not isinstance(new, dict):
            return None
        patch = _difference(old, new)
        encoded = json.dumps(patch, separators=(",", ":")).encode()
        if len(encoded) * 2 >= len(after):
            return None
        outcome = merge_patch(old, patch)
        if all(flat):  # the bytes of both are those of their values, so equal values are enough
            return encoded if outcome == new else None
        # A patch can't set null, and Python takes 1 for true: compare the resulting bytes.
        return encoded if canonical_json(outcome) == after else None
    except (ValueError, RecursionError):
        return None


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    patch: dict[str, Any] = {key: None for key in old if key not in new}
    missing = object()
    # Nearly all values are the same object if both come from recent contents of ids.json.
    for key, value in [(key, value) for key, value in new.items() if old.get(key, missing) is not value]:
        before = old.get(key, missing)
        if isinstance(value, dict) and isinstance(before, dict):
            if inner := _difference(before, value):
                patch[key] = inner
        elif before != value or type(before) is not type(value):
            patch[key] = value
    return patch


class SyncFailed(OSError):
    """The disk lost written data: nothing may be acknowledged. Other storage errors come before a promise."""


class FileState(msgspec.Struct, frozen=True, array_like=True, gc=False):
    size: int
    digest: bytes
    mtime_ns: int
    inode: int
    settled: bool = True
    """False if another write could leave the same modification time."""


class ManifestFile(msgspec.Struct, frozen=True):
    """All files at (``epoch``, ``seq``). ``clean``: the worker stopped in order and nothing ran after it.

    ``place`` identifies the journal directory, see ``journal.repair.place_of``.
    """

    epoch: str
    seq: int
    mark: bytes
    boot_id: str
    clean: bool
    files: dict[str, FileState]
    place: list[int] = []


_decoder = msgspec.msgpack.Decoder(ManifestFile)
_encoder = msgspec.msgpack.Encoder()


def load_manifest(path: Path) -> ManifestFile | None:
    try:
        return _decoder.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def encode_manifest(manifest: ManifestFile) -> bytes:
    """Return the content of the manifest. Its ``files`` may be a ``FileTable``."""
    return msgspec.msgpack.encode(manifest, enc_hook=_encoded_in_pieces)


def _encoded_in_pieces(files: object) -> msgspec.Raw:
    """Encode a table without a dict of all its files."""
    assert isinstance(files, FileTable), "all else is encoded by msgspec"
    data = bytearray(b"\xdf" + len(files).to_bytes(4))  # a map of so many pairs
    for pairs in batched(files.items(), 1000):
        piece = _encoder.encode(dict(pairs))
        data += piece[1 if len(pairs) < 16 else 3 :]
    return msgspec.Raw(bytes(data))


def save_manifest(path: Path, content: bytes) -> None:
    """Replace the manifest atomically and durably. Raises OSError; the old one stays."""
    files.write_atomically(path, content, mode=0o600, temporary=path.with_name(path.name + ".new"), sync=sync)


def sync(descriptor: int) -> None:
    """Fsync a file. Raises SyncFailed."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise SyncFailed(error.errno, error.strerror) from error


def sync_files(paths: Iterable[str]) -> None:
    """Make contents and names of files durable; for missing ones, their absence. Raises SyncFailed."""
    paths = list(paths)
    directories = {os.path.dirname(path) for path in paths}
    if len(paths) > _MANY_FILES and sync_file_systems(directories):
        return
    for path in paths:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            descriptor = os.open(path, files.READ)
            try:
                sync(descriptor)
            finally:
                os.close(descriptor)
    directories |= {os.path.dirname(directory) for directory in directories}  # a directory may be new itself
    for directory in directories:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            sync_directory(Path(directory))


def sync_file_systems(directories: Iterable[str]) -> bool:
    """Make whole file systems durable; return False where that reports no errors (Linux before 5.8). Raises
    SyncFailed.
    """
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if sys.platform != "linux" or release is None or tuple(map(int, release.groups())) < (5, 8):
        return False
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs is None:
        return False
    synced = set()
    for directory in directories:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            descriptor = os.open(directory, files.READ)
            try:
                if (device := os.fstat(descriptor).st_dev) not in synced and syncfs(descriptor):
                    number = ctypes.get_errno()
                    raise SyncFailed(number, os.strerror(number))
                synced.add(device)
            finally:
                os.close(descriptor)
    return True


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable. Raises SyncFailed."""
    files.sync_directory(path, sync)


_MANY_FILES = 500
"""From here on one sync of the file system is faster."""
EDITED_BY_HAND = (".md", "config.json")
"""Path ends of files that people may edit in place; lattice replaces all others, or appends to them."""
INLINE_BYTES = 256 * 1024
"""Larger files and additions are announced; clients fetch them in parts."""
MAX_CHANGE_BYTES = 4 * 1024 * 1024
"""Of contents in one change; further files are announced."""
MAX_FOUND = 20_000
"""Files reported by one scan: with the longest names they fit in one frame."""
MERGE_FROM_BYTES = 4096
"""Smallest JSON file sent as a patch."""
_IN_MEMORY_BYTES = 8 * 1024 * 1024
_MAX_LOGS = 1024
RACY_NS = 50_000_000
"""A younger file may change again under the same modification time."""


@dataclass
class TreeDiff:
    """Operations from ``ProjectTree.files`` to the disk, and the states after them (None: gone), by path.

    States without operations only refresh signatures.
    """

    operations: list[Operation] = field(default_factory=list)
    volatile: list[str] = field(default_factory=list)
    """Files that the journal does not cover, to be fsynced: rewritten in place, or only announced."""
    states: dict[str, FileState | None] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)
    """Files that were not compared any more: compare them once this is accepted."""

    @property
    def is_partial(self) -> bool:
        return bool(self.rest)

    def without(self, paths: Collection[str]) -> "TreeDiff":
        """Return the differences of all other files; only without renames."""
        if not paths:
            return self
        operations = [operation for operation in self.operations if operation.path not in paths]
        volatile = [path for path in self.volatile if path not in paths]
        states = {path: state for path, state in self.states.items() if path not in paths}
        return TreeDiff(operations, volatile, states, self.rest)


@dataclass(frozen=True, slots=True)
class TrustedDigest:
    """A file whose digest is known without reading it, until it is written to."""

    size: int
    mtime_ns: int
    digest: bytes


@dataclass(frozen=True)
class _Content:
    """File as read at one moment; ``data`` is None if it is too large to hold."""

    state: FileState
    data: bytes | None
    grown: bytes | None
    """Bytes after the first ``old.size`` if these are unchanged."""
    tail: bytes = b""
    """Digest of the last ``TAIL_BYTES`` before ``grown``."""


@dataclass(frozen=True, slots=True)
class _Log:
    size: int
    hasher: "hashlib._Hash"
    tail: bytes


def _state_table() -> FileTable[FileState]:
    return FileTable("<Q32sqQ?", _packed_state, FileState)


def _packed_state(state: FileState) -> tuple[int, bytes, int, int, bool]:
    # A time outside of 64 bits, after 2262, never equals the file's: that is read at each start.
    mtime_ns = max(-(2**63), min(state.mtime_ns, 2**63 - 1))
    return state.size, state.digest, mtime_ns, state.inode, state.settled


class ProjectTree:
    """The files below ``root`` (a ``.lattice`` directory). Methods raise OSError as the disk does."""

    def __init__(self, root: Path, files: dict[str, FileState]) -> None:
        self.root = root
        self.files = compacted(files, _state_table)
        self._prefix = f"{root}/"
        self._logs: OrderedDict[str, _Log] = OrderedDict()

    def accept(self, difference: TreeDiff) -> None:
        for path, state in difference.states.items():
            if state is None:
                self.files.pop(path, None)
            else:
                self.files[path] = state
        self.files = compacted(self.files, _state_table)

    def distrust(self, paths: Iterable[str]) -> None:
        """Read these files at the next ``reconcile``."""
        for path in paths:
            if (state := self.files.get(path)) is not None:
                self.files[path] = msgspec.structs.replace(state, settled=False)

    # --- what a command did ---

    def after_command(
        self,
        touched: AccessLog,
        before: Callable[[str], bytes | None],
        vouched: Mapping[int, TrustedDigest] | None = None,
    ) -> TreeDiff:
        """Compare the files that a command touched with their states before.

        Args:
            vouched: trusted digests by inode; large files among them are not read.
        """
        return _Comparison(self, touched, before, None, vouched or {}).run()

    # --- changes by other programs ---

    def reconcile(
        self,
        paths: Iterable[str] | None = None,
        *,
        trust_signatures: bool = True,
        limit: int | None = MAX_FOUND,
        rest: Sequence[str] = (),
    ) -> TreeDiff:
        """Compare these paths (None: the whole tree; or the ``rest`` of an earlier scan) with their known states.

        With ``trust_signatures``, files with an unchanged signature are not read. Stops after ``limit`` operations,
        which fit in a frame. If the directory is missing, nothing is found: no file was deleted.
        """
        touched = AccessLog()
        if not os.path.isdir(self._prefix):
            return TreeDiff()
        if rest:
            touched.steps.extend(rest)
            return _Comparison(self, touched, lambda _: None, limit, {}).run()
        if paths is None:
            changed = self._changed(trust_signatures=trust_signatures)
        else:
            replicated = {path for path in paths if is_replicated(path)}
            changed = [
                path
                for path in replicated
                if not trust_signatures or (status := self.status(path)) is None or not self.is_unchanged(path, status)
            ]
        changed.sort(key=_reading_order)
        touched.steps.extend(changed)
        return _Comparison(self, touched, lambda _: None, limit, {}).run()

    def _changed(self, *, trust_signatures: bool) -> list[str]:
        """Return the files on disk that may differ from their known state, and the known ones that are not there."""
        changed, known = [], 0
        for path, status in self.scan():
            state = self.files.get(path)
            known += state is not None
            if state is None or not trust_signatures or not state.settled or not has_signature(state, status):
                changed.append(path)
        if known == len(self.files):
            return changed
        present = {path for path, _ in self.scan()}
        return changed + [path for path in self.files if path not in present]

    def scan(self) -> Iterator[tuple[str, os.stat_result]]:
        """Yield every replicated regular file on disk."""
        pending = [""]
        while pending:
            directory = pending.pop()
            try:
                entries = list(os.scandir(self._prefix + directory))
            except FileNotFoundError:
                continue
            for entry in entries:
                path = directory + entry.name
                if entry.is_dir(follow_symlinks=False):
                    if is_replicated(path + "/x.md"):
                        pending.append(path + "/")
                elif entry.is_file(follow_symlinks=False) and is_replicated(path):
                    try:
                        yield path, entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue

    def is_unchanged(self, path: str, status: os.stat_result) -> bool:
        state = self.files.get(path)
        return state is not None and state.settled and has_signature(state, status)

    def is_as_known(self, path: str, status: os.stat_result | None) -> bool:
        """Compare signatures, and contents if an edit in place may have kept the signature of a young file."""
        state = self.files.get(path)
        if state is None or status is None:
            return state is None and status is None
        if not has_signature(state, status):
            return False
        if state.settled or not path.endswith(EDITED_BY_HAND):
            return True
        content = self.read(path, None)
        return content is not None and content.state.digest == state.digest

    def has_content(self, path: str, data: bytes | None) -> bool:
        state = self.files.get(path)
        return (state.digest if state is not None else None) == (digest_of(data) if data is not None else None)

    def status(self, path: str) -> os.stat_result | None:
        """Return the status of a file; None if it is missing or behind a symbolic link."""
        status = _lstat(self._prefix + path)
        return status if status is not None and not self._leads_through_link(path) else None

    def _leads_through_link(self, path: str) -> bool:
        parts = path.split("/")[:-1]
        return any(os.path.islink(self._prefix + "/".join(parts[: depth + 1])) for depth in range(len(parts)))

    # --- content ---

    def read(
        self,
        path: str,
        old: FileState | None,
        appended: os.stat_result | None = None,
        vouched: Mapping[int, TrustedDigest] | None = None,
        written: tuple[os.stat_result, bytes] | None = None,
    ) -> _Content | None:
        """Return the content of a file; None if there is none or the server may not read it.

        Args:
            ``old`` is its previous state, or that of the file renamed to it; the others as in ``after_command``.
        """
        status = self.status(path) if written is None else _lstat(self._prefix + path)  # the capture checked the path
        if status is None:
            return None
        known = vouched.get(status.st_ino) if vouched else None
        if known and (known.size, known.mtime_ns) == (status.st_size, status.st_mtime_ns) and known.size > INLINE_BYTES:
            self._logs.pop(path, None)
            return _Content(state_of(status, known.size, known.digest), None, None)
        try:
            if written is None:
                return self._read(path, old, status, appended, None)
            if is_same_file(written[0], status):
                return self._read(path, old, status, appended, written[1])
            return self._read_whole(path, old, status, None)  # another process has written to it since
        except (FileNotFoundError, PermissionError):
            return None

    def _read(
        self,
        path: str,
        old: FileState | None,
        status: os.stat_result,
        appended: os.stat_result | None,
        written: bytes | None,
    ) -> _Content:
        untouched = old is not None and appended is not None and has_signature(old, appended)
        if old is not None and untouched and status.st_ino == old.inode and status.st_size > old.size:
            return self._read_growth(path, old, status, written)
        return self._read_whole(path, old, status, written)

    def _read_growth(self, path: str, old: FileState, status: os.stat_result, written: bytes | None) -> _Content:
        """Read only the added bytes; the earlier ones cannot have changed."""
        known = self._logs.pop(path, None)
        if known is not None and known.size == old.size and written and status.st_size == old.size + len(written):
            hasher, tail, grown = known.hasher, known.tail, written
        else:
            start = max(0, old.size - TAIL_BYTES)
            with open(self._prefix + path, "rb", buffering=0) as file:
                _, hasher = files.hash_descriptor(file.fileno(), old.size)
                data = os.pread(file.fileno(), status.st_size - start, start)
            tail, grown = data[: old.size - start], data[old.size - start :]
        hasher.update(grown)
        state = state_of(status, old.size + len(grown), hasher.digest())
        self._logs[path] = _Log(state.size, hasher, (tail + grown)[-TAIL_BYTES:])
        if len(self._logs) > _MAX_LOGS:
            self._logs.popitem(last=False)
        return _Content(state, None, grown, digest_of(tail))

    def _read_whole(self, path: str, old: FileState | None, status: os.stat_result, written: bytes | None) -> _Content:
        self._logs.pop(path, None)
        if written is not None and len(written) == status.st_size:
            data = written
        else:
            with open(self._prefix + path, "rb", buffering=0) as file:
                if status.st_size > _IN_MEMORY_BYTES:
                    size, hasher = files.hash_descriptor(file.fileno())
                    return _Content(state_of(status, size, hasher.digest()), None, None)
                data = file.readall()
        state = state_of(status, len(data), digest_of(data))
        may_have_grown = old is not None and 0 < old.size < len(data) and not path.endswith(".json")
        if old is None or not may_have_grown or digest_of(data[: old.size]) != old.digest:
            return _Content(state, data, None)
        return _Content(state, data, data[old.size :], digest_of(data[max(0, old.size - TAIL_BYTES) : old.size]))

    def absolute(self, path: str) -> str:
        return self._prefix + path


class _Comparison:
    def __init__(
        self,
        tree: ProjectTree,
        touched: AccessLog,
        before: Callable[[str], bytes | None],
        limit: int | None,
        vouched: Mapping[int, TrustedDigest],
    ) -> None:
        self._limit = limit
        self._vouched = vouched
        self._tree = tree
        self._touched = touched
        self._before = before
        self._budget = MAX_CHANGE_BYTES
        self._result = TreeDiff()
        self._moves = self._lasting_moves()

    def _lasting_moves(self) -> dict[str, str]:
        moves: dict[str, str] = {}
        for step in self._touched.steps:
            if isinstance(step, Move):
                moves[step.target] = moves.pop(step.source, step.source)
        tree = self._tree
        return {
            target: source
            for target, source in moves.items()
            if source in tree.files and source != target and tree.status(source) is None and tree.status(target)
        }

    def run(self) -> TreeDiff:
        target_of = {source: target for target, source in self._moves.items()}
        done: set[str] = set()
        for number, step in enumerate(self._touched.steps):
            if self._limit is not None and len(self._result.operations) >= self._limit:
                self._result.rest = [each for each in self._touched.steps[number:] if isinstance(each, str)]
                break
            if isinstance(step, Move):
                source = self._moves.get(step.target)
                if source is None:
                    paths = [path for path in (step.source, step.target) if path not in target_of]
                elif step.target not in done:
                    self._move(source, step.target, written=source in done)
                    done.update((source, step.target))
                    continue
                else:
                    continue
            else:
                paths = [step]
            for path in paths:
                if path in done or path in self._moves:
                    continue
                done.add(path)
                if path in target_of:
                    self._write_before_move(path, target_of[path])
                else:
                    self._compare(path)
        return self._result

    def _compare(self, path: str) -> None:
        old = self._tree.files.get(path)
        touched = self._touched
        content = self._tree.read(path, old, touched.appended.get(path), self._vouched, touched.written.get(path))
        if content is not None:
            self._emit(path, path, old, content)
            self._result.states[path] = content.state
        elif old is not None:
            self._result.operations.append(DeleteFile(path))
            self._result.states[path] = None

    def _write_before_move(self, source: str, target: str) -> None:
        """Emit the write to ``source`` before its rename, in the command's order."""
        old = self._tree.files[source]
        content = self._tree.read(target, old, self._touched.appended.get(source))
        if content is not None:
            self._emit(source, source, old, content)

    def _move(self, source: str, target: str, *, written: bool) -> None:
        old = self._tree.files[source]
        content = self._tree.read(target, old)
        assert content is not None, "the rename's outcome was there a moment ago; only this process writes"
        self._result.operations.append(MoveFile(source, target, content.state.digest if written else old.digest))
        state = content.state
        if not written and target in self._touched.steps:
            self._emit(target, source, old, content)
        elif not written and state.digest != old.digest:
            state = msgspec.structs.replace(old, settled=False)  # another process wrote since: a change of its own
        self._result.states[source] = None
        self._result.states[target] = state

    def _emit(self, path: str, was: str, old: FileState | None, content: _Content) -> None:
        state = content.state
        if old is not None and old.digest == state.digest:
            return
        operation = self._operation(path, was, old, content)
        self._result.operations.append(operation)
        in_place = isinstance(operation, AppendBytes) and was not in self._touched.appended
        if in_place or isinstance(operation, AnnounceFile):
            self._result.volatile.append(path)

    def _operation(self, path: str, was: str, old: FileState | None, content: _Content) -> Operation:
        state = content.state
        if old is not None and content.grown and self._fits(len(content.grown)):
            return AppendBytes(path, old.size, content.tail, content.grown)
        if content.data is not None:
            if old is not None and path.endswith(".json") and state.size >= MERGE_FROM_BYTES:
                before = self._before(self._tree.absolute(was))
                patch = patch_between(before, content.data) if before and digest_of(before) == old.digest else None
                if patch is not None and self._fits(len(patch)):
                    return MergeJson(path, patch, state.digest)
            if self._fits(state.size):
                return PutFile(path, content.data)
        return AnnounceFile(path, state.size, state.digest)

    def _fits(self, size: int) -> bool:
        if size > min(INLINE_BYTES, self._budget):
            return False
        self._budget -= size
        return True


def has_signature(state: FileState, status: os.stat_result) -> bool:
    """Compare all but the status change time, which a hard link changes."""
    return (state.size, state.mtime_ns, state.inode) == (status.st_size, status.st_mtime_ns, status.st_ino)


def _lstat(path: str) -> os.stat_result | None:
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def is_same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """Compare as ``has_signature`` does."""
    return (one.st_size, one.st_mtime_ns, one.st_ino) == (other.st_size, other.st_mtime_ns, other.st_ino)


def state_of(status: os.stat_result, size: int, digest: bytes) -> FileState:
    settled = time.time_ns() - status.st_mtime_ns > RACY_NS and size == status.st_size
    return FileState(size, digest, status.st_mtime_ns, status.st_ino, settled)


def _reading_order(path: str) -> tuple[bool, str]:
    """Sort event logs first, as lattice writes them (I8)."""
    return "events/" not in path, path
