"""Ids that a worker makes or remembers: of changes (I7), of lattice's events and tasks, and of requests (I6)."""

import base64
import hashlib
import hmac
import logging
import os
import secrets
import struct
import time
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from lattice_remote.files import write_all, write_atomically
from lattice_remote.server.journal.segment import Outline
from lattice_remote.server.tree.tree import SyncFailed, sync, sync_directory

__all__ = ["Answered", "ChangeIds", "RequestIds", "is_own_id", "make_id", "token_digest"]

_log = logging.getLogger(__name__)


class ChangeIds:
    """Change ids of one journal, made with a key beside the segments that every copy of them shares (I7).

    A change id is 8 random bytes, then 8 bytes of an HMAC of these, the epoch and the number. So an invented id is
    recognized, and a genuine one that the journal lacks proves a rollback.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "key"
        self._key: bytes | None = None

    def make(self, epoch: str, seq: int) -> bytes:
        """Return an id for change ``seq``; create the key if there is none. Raises OSError."""
        if self._key is None:
            self._key = self._read() or self._create()
        random = secrets.token_bytes(8)
        return random + _code(self._key, epoch, seq, random)

    def is_genuine(self, epoch: str, seq: int, mark: bytes) -> bool:
        """Return whether this id was made for change ``seq``, by this project or a copy. Blocking; raises OSError."""
        key = self._read()
        return key is not None and hmac.compare_digest(_code(key, epoch, seq, mark[:8]), mark[8:])

    def _read(self) -> bytes | None:
        try:
            return self._path.read_bytes() or None
        except FileNotFoundError:
            return None

    def _create(self) -> bytes:
        key = secrets.token_bytes(32)
        write_atomically(self._path, key, mode=0o600, temporary=self._path.with_suffix(".new"), sync=sync)
        return key


def _code(key: bytes, epoch: str, seq: int, random: bytes) -> bytes:
    return hmac.digest(key, f"{epoch}-{seq}-{random.hex()}".encode(), "sha256")[:8]


_CROCKFORD = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", "0123456789ABCDEFGHJKMNPQRSTVWXYZ")
_FROM_CROCKFORD = {target: chr(source) for source, target in _CROCKFORD.items()}


def make_id(epoch: str) -> str:
    """Return a new ULID that ``is_own_id`` recognizes in this epoch: its last part is a digest of the rest."""
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


_ENTRY = struct.Struct(">16s16s8sQ")
_NO_KEY = 1 << 63
_REWRITE_AFTER = 65_536
"""New entries before the file is rewritten, plus as many as it had then."""


class Answered(NamedTuple):
    fingerprint: bytes
    """16 bytes, zeros if the record had none."""
    token: bytes
    """``token_digest`` of its token."""


def token_digest(token_id: str) -> bytes:
    return hashlib.sha256(token_id.encode()).digest()[:8]


class RequestIds:
    """Index of request ids whose records have left the journal, so that no request runs twice (I6).

    The journal is bounded by size, but an idempotency key is valid for the retention's age. Before a segment is
    removed, and when an epoch starts, its ids are appended here and fsynced, in order of time. Entries expire by age
    when the file is rewritten.

    A repeated request without a key says when it was first sent, which alone shows that it may have run. So beyond a
    number per token, the oldest ids without a key are forgotten. Keys are not: beyond their number, new ones are
    refused.

        id (16 bytes)  fingerprint (16)  digest of the token's id (8)  time of the answer in ms (8, big endian)

    The highest bit of the time is set for an id without a key.

    Args:
        directory: the journal's.
        max_age_s: time for which an id is remembered.
        per_token: most ids without a key of one token, the newest ones.
        keys_per_token: number of keys of one token from which on it may use no new one.
    """

    def __init__(
        self, directory: Path, max_age_s: float, *, per_token: int = 100_000, keys_per_token: int = 1_000_000
    ) -> None:
        self._path = directory / "request-ids"
        self._max_age_s = max_age_s
        self._per_token = per_token
        self._keys_per_token = keys_per_token
        self._keys: Counter[bytes] = Counter()  # by digest of the token's id
        self._sorted: array[int] = array("Q")
        self._new: set[int] = set()
        self._oldest_ms: int | None = None
        self._load()

    def __contains__(self, request_id: bytes) -> bool:
        """Look up the first 64 bits; reads no file."""
        key = _key(request_id)
        at = bisect_left(self._sorted, key)
        return key in self._new or (at < len(self._sorted) and self._sorted[at] == key)

    def find(self, request_id: str) -> Answered | None:
        """Return the entry of a request, None if it is not in the index. Raises OSError."""
        wanted = bytes.fromhex(request_id)
        if wanted not in self:
            return None
        for id_, fingerprint, token, _ in self._entries():
            if id_ == wanted:
                return Answered(fingerprint, token)
        return None

    def objection(self, token_id: str) -> str | None:
        """Return why a token may use no new key; None if it may."""
        if self._keys[token_digest(token_id)] < self._keys_per_token:
            return None
        return (
            f"this token has used {self._keys_per_token} idempotency keys in {self._max_age_s / 86400:g} days, and the "
            "server remembers no more: send the request without a key, or with another token"
        )

    def add(self, answered: Iterable[Outline], now: float) -> None:
        """Add these answers; durable once this returns. Skips known and expired ones, and records without an id.

        Raises OSError if nothing was added.
        """
        recent = (record for record in answered if record.id and now - record.time <= self._max_age_s)
        entries = {id_: record for record in recent if (id_ := bytes.fromhex(record.id)) not in self}
        if entries:
            self._append(b"".join(_packed(id_, record) for id_, record in entries.items()))
            self._new.update(map(_key, entries))
            self._keys.update(token_digest(record.token_id) for record in entries.values() if record.is_keyed)
            if self._oldest_ms is None:
                self._oldest_ms = _milliseconds(next(iter(entries.values())).time)
        is_old = self._oldest_ms is not None and now - self._oldest_ms / 1000 > self._max_age_s * 9 / 8
        if is_old or len(self._new) > len(self._sorted) + _REWRITE_AFTER:
            self._try_to_rewrite(now)

    def _append(self, data: bytes) -> None:
        is_new = not self._path.exists()
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            end = os.lseek(descriptor, 0, os.SEEK_END)
            end -= end % _ENTRY.size  # half an entry, left by a killed process
            write_all(descriptor, data, end)
            sync(descriptor)
        finally:
            os.close(descriptor)
        if is_new:
            sync_directory(self._path.parent)

    def _try_to_rewrite(self, now: float) -> None:
        try:
            self._rewrite(now)
        except SyncFailed:
            raise
        except OSError as error:  # full disk: the longer file serves as well
            _log.warning("the request ids cannot be rewritten: %s", error)

    def _rewrite(self, now: float) -> None:
        since = _milliseconds(now - self._max_age_s)
        surplus = Counter(token for _, _, token, time_ms in self._entries() if time_ms >= since | _NO_KEY)
        surplus.subtract(dict.fromkeys(surplus, self._per_token))
        data = bytearray()
        for id_, fingerprint, token, time_ms in self._entries():
            if time_ms & ~_NO_KEY < since:
                continue
            if time_ms & _NO_KEY and surplus[token] > 0:
                surplus[token] -= 1
                continue
            data += _ENTRY.pack(id_, fingerprint, token, time_ms)
        write_atomically(self._path, bytes(data), mode=0o666, temporary=self._path.with_suffix(".new"), sync=sync)
        self._load()

    def _load(self) -> None:
        self._sorted, self._new, self._keys, self._oldest_ms = array("Q"), set(), Counter(), None
        for id_, _, token, time_ms in self._entries():
            self._sorted.append(_key(id_))
            self._keys[token] += not time_ms & _NO_KEY
            if self._oldest_ms is None:
                self._oldest_ms = time_ms & ~_NO_KEY
        self._sorted = array("Q", sorted(self._sorted))

    def _entries(self) -> Iterator[tuple[bytes, bytes, bytes, int]]:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return iter(())
        return _ENTRY.iter_unpack(data[: len(data) - len(data) % _ENTRY.size])


def _key(request_id: bytes) -> int:
    return int.from_bytes(request_id[:8]) ^ int.from_bytes(request_id[8:])


def _milliseconds(seconds: float) -> int:
    return max(0, int(seconds * 1000))


def _packed(id_: bytes, record: Outline) -> bytes:
    time_ms = _milliseconds(record.time) | (0 if record.is_keyed else _NO_KEY)
    return _ENTRY.pack(id_, record.fingerprint[:16], token_digest(record.token_id), time_ms)
