"""Lattice's files: snapshots and the event logs that they follow from, and the ids that workers make."""

import base64
import hashlib
import json
import os
import secrets
import time
from collections.abc import Collection

from lattice_remote.server.journal.contents import Read

__all__ = ["counterpart", "derive", "is_own_id", "is_snapshot", "log_of", "make_id", "name_of_resource"]


def counterpart(path: str) -> str:
    """Return the path of a task's file once the task is archived, or before that."""
    return path.removeprefix("archive/") if path.startswith("archive/") else f"archive/{path}"


def is_snapshot(path: str) -> bool:
    """Return whether a file is a snapshot of a task or a resource."""
    folder, name = os.path.split(path)
    return folder in ("tasks", "archive/tasks") or (folder.startswith("resources/") and name == "resource.json")


def log_of(path: str, read: Read) -> str | None:
    """Return the event log that a snapshot follows from; None for any other file."""
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
    """Return the name in the first event of a resource's log; None if there is none."""
    try:
        name = json.loads(log.split(b"\n", 1)[0])["data"]["name"]
    except (ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


# --- ids ---

_CROCKFORD = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", "0123456789ABCDEFGHJKMNPQRSTVWXYZ")
_FROM_CROCKFORD = {target: chr(source) for source, target in _CROCKFORD.items()}


def make_id(epoch: str) -> str:
    """Return a new ULID that ``is_own_id`` recognizes in this epoch.

    Half of its random part is random, the other half a digest of the rest.
    """
    head = int(time.time() * 1000).to_bytes(6) + secrets.token_bytes(5)
    return _encode(head + _seal(head, epoch))


def is_own_id(id_: object, epoch: str) -> bool:
    """Return whether a worker made an id such as ``ev_01...`` in this epoch."""
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
