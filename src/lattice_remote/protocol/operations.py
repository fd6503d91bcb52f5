"""File operations of a change, and their application to a tree (SPEC section 4).

Every operation states the file's content before or after it. Applying is therefore idempotent and detects drift:
``apply`` returns a path on which the operation does not fit, and the client fetches its whole content.
"""

import hashlib
import json
from typing import Annotated, Any, Protocol, cast

import msgspec
from msgspec import Meta

__all__ = [
    "MIN_MEMO_BYTES",
    "TAIL_BYTES",
    "AnnounceFile",
    "AppendBytes",
    "Content",
    "DeleteFile",
    "Digest",
    "FlatObject",
    "MemoryTree",
    "MergeJson",
    "MoveFile",
    "Operation",
    "PutFile",
    "Tree",
    "apply",
    "canonical_json",
    "digest_of",
    "flat_json",
    "flat_value",
    "merge_patch",
    "paths_of",
    "remember_flat",
    "weight_of",
]

TAIL_BYTES = 4096
"""Number of bytes before the end of a file that an append verifies."""

Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Content = tuple[int, bytes]
"""Size in bytes and digest."""
_Path = Annotated[str, Meta(min_length=1, max_length=512)]
_Size = Annotated[int, Meta(ge=0)]


class _Operation(msgspec.Struct, frozen=True, tag_field="op"):
    path: _Path


class PutFile(_Operation, frozen=True, tag="put"):
    """Replace the whole file with ``data``, atomically."""

    data: bytes


class AppendBytes(_Operation, frozen=True, tag="append"):
    """Append ``data`` at ``offset``, the file's size before. ``tail`` is the digest of the 4096 bytes before it."""

    offset: _Size
    tail: Digest
    data: Annotated[bytes, Meta(min_length=1)]


class MergeJson(_Operation, frozen=True, tag="merge"):
    """Apply an RFC 7396 patch to a canonical JSON file; ``digest`` is that of the canonical result."""

    patch: bytes
    digest: Digest


class MoveFile(_Operation, frozen=True, tag="move"):
    """Rename the file at ``path``, whose content has ``digest``, to ``to``."""

    to: _Path
    digest: Digest


class DeleteFile(_Operation, frozen=True, tag="delete"):
    """Delete the file at ``path``."""


class AnnounceFile(_Operation, frozen=True, tag="announce"):
    """Size and digest of a large file, whose content each client fetches in pieces."""

    size: _Size
    digest: Digest


Operation = PutFile | AppendBytes | MergeJson | MoveFile | DeleteFile | AnnounceFile


class Tree(Protocol):
    """Files of a cache, on disk or in memory. Callers check paths first."""

    def size(self, path: str) -> int | None: ...

    def read(self, path: str, offset: int = 0) -> bytes: ...

    def replace(self, path: str, data: bytes) -> None: ...

    def append(self, path: str, data: bytes) -> None:
        """Append in one write; create the file if it is missing."""

    def move(self, path: str, to: str) -> None: ...

    def delete(self, path: str) -> None: ...


def digest_of(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def canonical_json(value: object) -> bytes:
    """Return JSON as Lattice writes it: sorted keys, two spaces, ASCII, a final newline."""
    return flat_json(value) or (json.dumps(value, sort_keys=True, indent=2) + "\n").encode()


FlatObject = dict[str, str | int | bool | dict[str, str | int | bool | None] | None]
"""An object of scalars and of objects of scalars, such as ``ids.json`` with its thousands of tasks."""
_flat_encoder = msgspec.json.Encoder()


def flat_json(value: object) -> bytes | None:
    """Return what ``canonical_json`` returns, in a sixth of the time; None if ``value`` is not a simple flat object.

    Not for floats, and texts that need an escape: msgspec writes these in another way.
    """
    try:
        flat = _sorted({key: _sorted(each) for key, each in msgspec.convert(value, FlatObject).items()})
        data = msgspec.json.format(_flat_encoder.encode(flat), indent=2)
    except (msgspec.MsgspecError, UnicodeError, OverflowError):
        return None
    return data + b"\n" if data.isascii() and b"\\" not in data else None


def _sorted(value: Any) -> Any:
    """Sort an object's keys. Not left to msgspec, which takes 13 s for 100,000 sorted keys and a new one."""
    return {key: value[key] for key in sorted(value)} if isinstance(value, dict) else value


MIN_MEMO_BYTES = 4096
_MAX_MEMO_BYTES = 2 * 1024 * 1024
_MAX_RECENT_FLAT = 2
_flat_decoder = msgspec.json.Decoder(FlatObject)
_recent_flat: list[tuple[bytes, FlatObject]] = []
"""With their values, the newest last."""


def flat_value(data: bytes) -> FlatObject | None:
    """Return the value of a flat object in canonical form, None for any other content. It must not be changed."""
    for known, value in _recent_flat:
        if known == data:
            return value
    try:
        value = _flat_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeError):
        return None
    if flat_json(value) != data:
        return None
    remember_flat(data, value)
    return value


def remember_flat(data: bytes, value: FlatObject) -> None:
    if MIN_MEMO_BYTES <= len(data) <= _MAX_MEMO_BYTES:
        _recent_flat.append((data, value))
        del _recent_flat[:-_MAX_RECENT_FLAT]


def merge_patch(target: object, patch: object) -> object:
    """Return ``target`` with an RFC 7396 merge patch applied; the arguments stay unchanged."""
    if not isinstance(patch, dict):
        return patch
    result: dict[str, Any] = dict(cast("dict[str, Any]", target)) if isinstance(target, dict) else {}
    for key, value in cast("dict[str, Any]", patch).items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


def paths_of(operation: Operation) -> tuple[str, ...]:
    return (operation.path, operation.to) if isinstance(operation, MoveFile) else (operation.path,)


def apply(operation: Operation, tree: Tree) -> frozenset[str]:
    """Apply one operation; return the paths that drifted and must be fetched. Idempotent."""
    match operation:
        case PutFile():
            tree.replace(operation.path, operation.data)
            return frozenset()
        case AppendBytes():
            applied = _append(operation, tree)
        case MergeJson():
            applied = _merge(operation, tree)
        case MoveFile():
            return _move(operation, tree)
        case DeleteFile():
            tree.delete(operation.path)
            return frozenset()
        case AnnounceFile():
            size = tree.size(operation.path)
            applied = size == operation.size and digest_of(tree.read(operation.path)) == operation.digest
    return frozenset() if applied else frozenset({operation.path})


def _append(operation: AppendBytes, tree: Tree) -> bool:
    size = tree.size(operation.path) or 0
    end = operation.offset + len(operation.data)
    if not operation.offset <= size <= end:
        return False
    start = max(0, operation.offset - TAIL_BYTES)
    present = tree.read(operation.path, start) if size else b""
    tail, written = present[: operation.offset - start], present[operation.offset - start :]
    if digest_of(tail) != operation.tail or not operation.data.startswith(written):
        return False
    if rest := operation.data[len(written) :]:
        tree.append(operation.path, rest)
    return True


def _merge(operation: MergeJson, tree: Tree) -> bool:
    if tree.size(operation.path) is None:
        return False
    before = tree.read(operation.path)
    if digest_of(before) == operation.digest:
        return True
    try:
        after = canonical_json(merge_patch(json.loads(before), json.loads(operation.patch)))
    except (ValueError, RecursionError):
        return False
    if digest_of(after) != operation.digest:
        return False
    tree.replace(operation.path, after)
    return True


def _move(operation: MoveFile, tree: Tree) -> frozenset[str]:
    if tree.size(operation.path) is None:
        there = tree.size(operation.to) is not None and digest_of(tree.read(operation.to)) == operation.digest
        return frozenset() if there else frozenset({operation.to})
    if digest_of(tree.read(operation.path)) == operation.digest:
        tree.move(operation.path, operation.to)
        return frozenset()
    tree.delete(operation.path)
    return frozenset({operation.to})


def weight_of(operation: Operation) -> int:
    return 200 + len(getattr(operation, "data", b"")) + len(getattr(operation, "patch", b""))


class MemoryTree:
    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.files: dict[str, bytes] = {} if files is None else files

    def size(self, path: str) -> int | None:
        return len(self.files[path]) if path in self.files else None

    def read(self, path: str, offset: int = 0) -> bytes:
        return self.files[path][offset:]

    def replace(self, path: str, data: bytes) -> None:
        self.files[path] = data

    def append(self, path: str, data: bytes) -> None:
        self.files[path] = self.files.get(path, b"") + data

    def move(self, path: str, to: str) -> None:
        self.files[to] = self.files.pop(path)

    def delete(self, path: str) -> None:
        self.files.pop(path, None)
