"""Authentication: the tokens of ``tokens.json`` as the running server knows them, and the clients that use them."""

import asyncio
import contextlib
import hmac
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path

import msgspec

from lattice_remote.errors import RemoteError, StorageError
from lattice_remote.files import Signature, signature_of, write_atomically
from lattice_remote.protocol.messages import Bye
from lattice_remote.server.datadir import DataDir
from lattice_remote.server.tokens import Token, TokenFile, digest_of_text, read_last_uses, shown
from lattice_remote.server.transport.admission import ConnectionQuota
from lattice_remote.server.transport.api_error import ApiError

__all__ = [
    "UNKNOWN_TOKEN",
    "Authenticator",
    "LastUse",
    "Login",
    "Logins",
    "bearer",
    "signing_key",
    "unauthorized",
]

UNKNOWN_TOKEN = "missing or unknown token"  # noqa: S105 - a message
"""Of the refusal; the sign-in page has its own text for it."""
_CHECK_S = 0.25
"""Connections of a revoked, rotated or expired token end within a second."""
_SAVE_S = 60.0
_KEY_BYTES = 32

_log = logging.getLogger(__name__)


class Login(msgspec.Struct, frozen=True):
    token: Token
    sha256: str


def _now() -> datetime:
    return datetime.now(UTC)


class Logins:
    """Tokens by id and digest. Call ``refresh()`` regularly."""

    def __init__(self, path: Path, *, now: Callable[[], datetime] = _now) -> None:
        self._file = TokenFile(path)
        self._path = path
        self._now = now
        self._signature: Signature | None = None
        self._by_id: dict[str, Token] = {}
        self._by_digest: dict[str, Token] = {}
        self._next_end: datetime | None = None  # when the next token, or old text of one, expires

    def refresh(self) -> bool:
        """Read the file again if it has changed; return whether an ``objection()`` may have arisen.

        Raises StorageError if it cannot be read; the tokens read before stay valid.
        """
        ended = self._next_end is not None and self._next_end <= self._now()
        if ended:
            self._next_end = self._earliest_end()
        try:
            signature = signature_of(os.stat(self._path))
        except FileNotFoundError:
            signature = None
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
        """Return the login of a token's text; ``objection()`` checks whether it is still valid.

        The lookup's time reveals nothing: a client cannot choose the digest of its text.
        """
        digest = digest_of_text(text)
        token = self._by_digest.get(digest)
        return None if token is None else Login(token, digest)

    def recall(self, token_id: str, sha256: str) -> Login | None:
        token = self._by_id.get(token_id)
        return None if token is None else Login(token, sha256)

    def objection(self, login: Login) -> Bye | None:
        was, now = login.token, self._now()
        token = self._by_id.get(was.id)
        if token is None:
            return _bye(f"token {was.id} was revoked")
        if token.expires is not None and token.expires <= now:
            return _bye(f"token {token.id} expired at {shown(token.expires, '')}; ask for another")
        is_in_grace = token.old_until is not None and now < token.old_until
        valid = [token.sha256, *([token.old_sha256] if is_in_grace else [])]
        if not any(hmac.compare_digest(login.sha256, digest) for digest in valid):
            return _bye(f"token {token.id} was rotated; use its new text")
        if token.rights != was.rights:
            return _bye(f"token {token.id} was changed; connect again", retry_after_s=1.0)
        return None

    def ids(self) -> set[str]:
        return set(self._by_id)

    def _earliest_end(self) -> datetime | None:
        ends = (end for token in self._by_id.values() for end in (token.expires, token.old_until))
        now = self._now()
        return min((end for end in ends if end is not None and end > now), default=None)


def _bye(reason: str, *, retry_after_s: float | None = None) -> Bye:
    return Bye("REMOTE_UNAUTHORIZED", reason, retry_after_s)


class LastUse:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._uses = read_last_uses(path)
        self._changed = False

    def used(self, token_ids: Iterable[str]) -> None:
        now = datetime.now(UTC).replace(microsecond=0)
        for token_id in token_ids:
            self._uses[token_id] = now
            self._changed = True

    async def save(self, known: set[str]) -> None:
        """Write changes, without tokens that are no longer ``known``; only log a failure."""
        if not self._changed:
            return
        self._changed = False
        self._uses = {token_id: at for token_id, at in self._uses.items() if token_id in known}
        data = msgspec.json.format(msgspec.json.encode(self._uses)) + b"\n"
        try:
            await asyncio.to_thread(write_atomically, self._path, data, mode=0o600)
        except OSError as error:
            _log.warning("cannot write %s: %s", self._path, error.strerror)


class Authenticator:
    """Logins of a running server, and the end of clients whose token ends. Belongs to the event loop's thread."""

    def __init__(self, data: DataDir) -> None:
        self.stopping = False
        self.signing_key = b""
        """Of browsers' cookies; known after ``start()``."""
        self._key_path = data.signing_key
        self._logins = Logins(data.tokens)
        self._last_use = LastUse(data.tokens_used)
        self._staying: dict[Callable[[Bye], None], Login] = {}
        self._error = ""  # the last logged error, to log it once

    def start(self) -> None:
        """Read the tokens and the key. Raises StorageError."""
        self.signing_key = signing_key(self._key_path)
        self._logins.refresh()

    def identify(self, quota: ConnectionQuota, token_text: str) -> Login | ApiError:
        """Return the login of a token's text; "" belongs to no token (I9). A failed login is counted."""
        if self.stopping:
            return _stopping()
        self.refresh()  # a new token works at once
        login = self._logins.find(token_text)
        found = unauthorized(UNKNOWN_TOKEN) if login is None else self._admitted(login)
        return (quota.failed() or found) if isinstance(found, ApiError) else found

    def identify_again(self, token_id: str, sha256: str) -> Login | ApiError:
        """Return the login of a token shown before; an ended one is no failed login."""
        if self.stopping:
            return _stopping()
        self.refresh()
        login = self._logins.recall(token_id, sha256)
        return unauthorized(f"token {token_id} was revoked") if login is None else self._admitted(login)

    def _admitted(self, login: Login) -> Login | ApiError:
        if (objection := self._logins.objection(login)) is not None:
            return unauthorized(objection.reason)
        self._last_use.used([login.token.id])
        return login

    def shown(self, authorization: Sequence[str]) -> str:
        """Return the id of the valid token in Authorization headers, "" for none; nothing is counted."""
        return self._valid_id(self._logins.find(bearer(authorization)))

    def shown_before(self, token_id: str, sha256: str) -> str:
        return self._valid_id(self._logins.recall(token_id, sha256))

    def _valid_id(self, login: Login | None) -> str:
        return "" if login is None or self._logins.objection(login) is not None else login.token.id

    def ended(self, login: Login) -> ApiError | None:
        self.refresh()
        objection = self._logins.objection(login)
        return None if objection is None else unauthorized(objection.reason)

    @contextlib.contextmanager
    def staying(self, login: Login, end: Callable[[Bye], None]) -> Iterator[None]:
        """Call ``end``, at once or later, when the client may not stay any longer."""
        self._staying[end] = login
        try:
            if (objection := self._logins.objection(login)) is not None:  # it may have arisen since the admission
                end(objection)
            yield
        finally:
            del self._staying[end]

    def refresh(self) -> None:
        try:
            changed = self._logins.refresh()
        except RemoteError as error:
            if error.message != self._error:
                _log.error("keeping the previous tokens: %s", error.message)
            self._error = error.message
            changed = True  # the earlier tokens continue to expire
        else:
            self._error = ""
        for end, login in tuple(self._staying.items()) if changed else ():
            if (objection := self._logins.objection(login)) is not None:
                end(objection)

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_S)
            self.refresh()

    async def note_uses(self) -> None:
        while True:
            await asyncio.sleep(_SAVE_S)
            self._last_use.used({login.token.id for login in self._staying.values()})
            await self.save_uses()

    async def save_uses(self) -> None:
        await self._last_use.save(self._logins.ids())

    def end_all(self, bye: Bye) -> None:
        for end in tuple(self._staying):
            end(bye)


def bearer(values: Sequence[str]) -> str:
    scheme, _, text = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    return text.strip() if scheme.lower() == "bearer" else ""


def unauthorized(why: str) -> ApiError:
    return ApiError(HTTPStatus.UNAUTHORIZED, "REMOTE_UNAUTHORIZED", why)


def _stopping() -> ApiError:
    why = "the server is stopping; try again"
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "REMOTE_SHUTDOWN", why, retry_after_s=1)


def signing_key(path: Path) -> bytes:
    """Return the server's key, created if missing. The caller holds the data directory's lock.

    An invalid key is replaced: browsers must sign in again. Raises StorageError.
    """
    try:
        key, is_private = path.read_bytes(), not path.stat().st_mode & 0o077
    except FileNotFoundError:
        key, is_private = b"", True
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    if is_private and len(key) == _KEY_BYTES:
        return key
    key = secrets.token_bytes(_KEY_BYTES)
    try:
        write_atomically(path, key, mode=0o600)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
    return key
