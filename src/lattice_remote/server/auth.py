"""Authentication: the tokens of ``tokens.json`` as the running server knows them, their last use, the signing key.

A request calls ``find()`` once, then ``objection()`` for as long as the client stays.
"""

import asyncio
import hmac
import logging
import os
import secrets
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from lattice_remote.errors import StorageError
from lattice_remote.files import Signature, signature_of, write_atomically
from lattice_remote.protocol.messages import Bye
from lattice_remote.server.tokens import Token, TokenFile, digest_of_text, shown

__all__ = ["SAVE_EVERY_S", "LastUse", "Login", "Logins", "read_last_uses", "signing_key"]


class Login(msgspec.Struct, frozen=True):
    """An authenticated client: the token at that time, and the digest of the text it showed."""

    token: Token
    sha256: str


def _now() -> datetime:
    return datetime.now(UTC)


class Logins:
    """The tokens as the running server knows them. Call ``refresh()`` regularly."""

    def __init__(self, path: Path, *, now: Callable[[], datetime] = _now) -> None:
        self._file = TokenFile(path)
        self._path = path
        self._now = now
        self._signature: Signature | None = None
        self._by_id: dict[str, Token] = {}
        self._by_digest: dict[str, Token] = {}
        self._next_end: datetime | None = None  # when the next token, or old text of one, expires

    def refresh(self) -> bool:
        """Read the file again if it has changed; return whether an ``objection()`` may have arisen since the last call.

        Raises:
            StorageError: the file cannot be read; the tokens read before stay valid, and the next call tries again.
        """
        ended = self._next_end is not None and self._next_end <= self._now()
        if ended:
            self._next_end = self._earliest_end()
        try:
            signature = self._stat()
        except OSError as error:
            raise StorageError(f"cannot read {self._path}: {error.strerror}") from error
        if signature == self._signature:
            return ended
        tokens = self._file.read()
        self._by_id = {token.id: token for token in tokens}
        self._by_digest = {t.old_sha256: t for t in tokens if t.old_sha256} | {t.sha256: t for t in tokens}
        self._next_end = self._earliest_end()
        self._signature = signature
        return True

    def find(self, text: str) -> Login | None:
        """Return the login of a token's text, None if it is unknown. ``objection()`` checks whether it is still valid.

        Takes one digest and one table lookup, however many tokens there are. The lookup's time reveals nothing: a
        client cannot choose the digest of its text.
        """
        digest = digest_of_text(text)
        token = self._by_digest.get(digest)
        return None if token is None else Login(token, digest)

    def recall(self, token_id: str, sha256: str) -> Login | None:
        """Return the login of a text shown before, by its digest; None if the token is gone."""
        token = self._by_id.get(token_id)
        return None if token is None else Login(token, sha256)

    def objection(self, login: Login) -> Bye | None:
        """Return why this client may not stay, None if it may."""
        was, now = login.token, self._now()
        token = self._by_id.get(was.id)
        if token is None:
            return _bye(f"token {was.id} was revoked")
        if token.expires is not None and token.expires <= now:
            return _bye(f"token {token.id} expired at {shown(token.expires, '')}; ask for another")
        if not hmac.compare_digest(login.sha256, token.sha256) and not _in_grace(token, login.sha256, now):
            return _bye(f"token {token.id} was rotated; use its new text")
        if (token.projects, token.actor, token.act_as) != (was.projects, was.actor, was.act_as):
            return _bye(f"token {token.id} was changed; connect again", retry_after_s=1.0)
        return None

    def ids(self) -> set[str]:
        """Return the ids of all tokens."""
        return set(self._by_id)

    def _earliest_end(self) -> datetime | None:
        ends = (end for token in self._by_id.values() for end in (token.expires, token.old_until))
        now = self._now()
        return min((end for end in ends if end is not None and end > now), default=None)

    def _stat(self) -> Signature | None:
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return None
        return signature_of(status)


def _in_grace(token: Token, digest: str, now: datetime) -> bool:
    until = token.old_until
    return until is not None and now < until and hmac.compare_digest(digest, token.old_sha256)


def _bye(reason: str, *, retry_after_s: float | None = None) -> Bye:
    return Bye("REMOTE_UNAUTHORIZED", reason, retry_after_s)


SAVE_EVERY_S = 60.0
"""Interval at which a running server writes changes."""

_log = logging.getLogger(__name__)


def read_last_uses(path: Path) -> dict[str, datetime]:
    """Return the last use of each token, by its id; empty if unknown."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Annotated[datetime, Meta(tz=True)]])
    except (OSError, msgspec.DecodeError):
        return {}


class LastUse:
    """The file of last uses, for its single writer. All methods belong to the event loop's thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._uses = read_last_uses(path)
        self._changed = False

    def used(self, token_ids: Iterable[str]) -> None:
        """Note that these tokens are in use now."""
        now = datetime.now(UTC).replace(microsecond=0)
        for token_id in token_ids:
            self._uses[token_id] = now
            self._changed = True

    async def save(self, known: set[str]) -> None:
        """Write changes, without tokens that are no longer ``known``. A failure is logged."""
        if not self._changed:
            return
        self._changed = False
        self._uses = {token_id: at for token_id, at in self._uses.items() if token_id in known}
        data = msgspec.json.format(msgspec.json.encode(self._uses)) + b"\n"
        try:
            await asyncio.to_thread(write_atomically, self._path, data, mode=0o600)
        except OSError as error:
            _log.warning("cannot write %s: %s", self._path, error.strerror)


_KEY_BYTES = 32


def signing_key(path: Path) -> bytes:
    """Return the server's key, created if missing. The caller holds the data directory's lock.

    An invalid key, or one that others could read, is replaced: browsers must sign in again.

    Raises:
        StorageError: the file cannot be read, or the new one cannot be written.
    """
    return _kept(path) or _made(path)


def _kept(path: Path) -> bytes:
    """Return the key; None if it is invalid or not its owner's alone."""
    try:
        key = path.read_bytes()
        private = not path.stat().st_mode & 0o077
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    return key if private and len(key) == _KEY_BYTES else b""


def _made(path: Path) -> bytes:
    key = secrets.token_bytes(_KEY_BYTES)
    try:
        write_atomically(path, key, mode=0o600)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
    return key
