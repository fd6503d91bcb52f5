"""Who may use the running server, at this moment: the tokens of ``tokens.json``, and what has become of them since.

Every way in asks the same two questions: ``find()`` once, then ``objection()`` for as long as the client stays.
"""

import hmac
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from lattice_remote.errors import StorageError
from lattice_remote.protocol.messages import Bye
from lattice_remote.server.data.expiry import shown
from lattice_remote.server.data.tokens import Token, TokenFile, digest_of_text

__all__ = ["Login", "Logins"]


class Login(msgspec.Struct, frozen=True):
    """A client that has shown a token: the token as it was then, and the digest of the text that was shown."""

    token: Token
    sha256: str


def _now() -> datetime:
    return datetime.now(UTC)


class Logins:
    """The tokens as the running server knows them. ``refresh()`` must be called now and then."""

    def __init__(self, path: Path, *, now: Callable[[], datetime] = _now) -> None:
        self._file = TokenFile(path)
        self._path = path
        self._now = now
        self._signature: tuple[int, int, int] | None = None
        self._by_id: dict[str, Token] = {}
        self._by_digest: dict[str, Token] = {}
        self._next_end: datetime | None = None  # when the next of them, or of their old texts, ends

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
        """Return whose text this is, None when it is nobody's. Whether it is still valid ``objection()`` says.

        It costs one digest and one look into a table, however many tokens there are. The time that the look takes
        tells nothing: nobody can choose the digest of what he sends.
        """
        digest = digest_of_text(text)
        token = self._by_digest.get(digest)
        return None if token is None else Login(token, digest)

    def recall(self, token_id: str, sha256: str) -> Login | None:
        """Return the login of whoever has shown the text with this digest before; None when the token is gone."""
        token = self._by_id.get(token_id)
        return None if token is None else Login(token, sha256)

    def objection(self, login: Login) -> Bye | None:
        """Return why this client may not stay, None when it may."""
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

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


def _in_grace(token: Token, digest: str, now: datetime) -> bool:
    until = token.old_until
    return until is not None and now < until and hmac.compare_digest(digest, token.old_sha256)


def _bye(reason: str, *, retry_after_s: float | None = None) -> Bye:
    return Bye("REMOTE_UNAUTHORIZED", reason, retry_after_s)
