"""Who may use the server: tokens, each for some projects and one actor, kept only as digests.

``tokens.json`` is replaced atomically, mode 0600, under a lock, so that the command line can change it while a
server runs. The server re-reads it when it changes.
"""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import filelock
import msgspec

from lattice_remote.errors import Misuse, StorageError
from lattice_remote.server.datadir import write_atomically

__all__ = ["Token", "TokenFile", "TokenStore"]

_ACTOR = re.compile(r"[^\s:*]+:[^\s*]{1,100}")
_PATTERN = re.compile(r"[a-z*][a-z0-9_*-]*(?::\S{1,100})?")
_LOCK_TIMEOUT_S = 10


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """One token, without its text. ``act_as`` are patterns of further actors, in which ``*`` stands for anything."""

    id: str
    sha256: str
    projects: list[str]
    actor: str
    act_as: list[str] = []
    created: str = ""


class _Tokens(msgspec.Struct, frozen=True):
    tokens: list[Token] = []


class TokenFile:
    """``tokens.json`` as the command line changes it: each call reads, changes and replaces it under a lock."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[Token]:
        """Return all tokens, in the order in which they were made.

        Raises:
            StorageError: the file cannot be read, or is not what it must be.
        """
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Tokens).tokens
        except FileNotFoundError:
            return []
        except (OSError, msgspec.DecodeError) as error:
            raise StorageError(f"{self._path}: {error}") from error

    def create(self, *, projects: list[str], actor: str, act_as: list[str]) -> tuple[Token, str]:
        """Make a token; return it and its text, which is kept nowhere and can't be shown again.

        Raises:
            Misuse: the actor or a pattern is malformed, or no project is named.
            StorageError: the file cannot be written.
        """
        _check_actor(actor, act_as)
        if not projects:
            raise Misuse("a token is for at least one project; name it with --project")
        text = "ltr_" + secrets.token_urlsafe(32)
        token = Token(
            id="tok_" + secrets.token_hex(6),
            sha256=_digest(text),
            projects=sorted(set(projects)),
            actor=actor,
            act_as=act_as,
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )
        self._change(lambda tokens: [*tokens, token])
        return token, text

    def revoke(self, id_or_text: str) -> Token:
        """Forget a token, named by its id or by its own text, and return it.

        Raises:
            Misuse: there is no such token.
            StorageError: the file cannot be written.
        """
        digest = _digest(id_or_text)
        gone: list[Token] = []

        def without(tokens: list[Token]) -> list[Token]:
            gone.extend(t for t in tokens if t.id == id_or_text or hmac.compare_digest(t.sha256, digest))
            if not gone:
                raise Misuse("there is no such token; see: lattice-remote token list")
            return [token for token in tokens if token not in gone]

        self._change(without)
        return gone[0]

    def _change(self, edit: Callable[[list[Token]], list[Token]]) -> None:
        try:
            with filelock.FileLock(self._path.with_name(".tokens.lock"), timeout=_LOCK_TIMEOUT_S):
                tokens = edit(self.read())
                data = msgspec.json.format(msgspec.json.encode(_Tokens(tokens))) + b"\n"
                write_atomically(self._path, data, mode=0o600)
        except filelock.Timeout as error:
            raise StorageError(f"{self._path} is locked by another command; try again") from error
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error.strerror}") from error


class TokenStore:
    """The tokens as the running server knows them. ``refresh()`` must be called now and then."""

    def __init__(self, path: Path) -> None:
        self._file = TokenFile(path)
        self._path = path
        self._signature: tuple[int, int, int] | None = None
        self._by_id: dict[str, Token] = {}

    def refresh(self) -> bool:
        """Read the file again if it has changed since; return whether it had.

        Raises:
            StorageError: the file cannot be read; the tokens read before stay valid, and the next call tries again.
        """
        try:
            signature = self._stat()
        except OSError as error:
            raise StorageError(f"cannot read {self._path}: {error.strerror}") from error
        if signature == self._signature:
            return False
        self._by_id = {token.id: token for token in self._file.read()}
        self._signature = signature
        return True

    def is_valid(self, token: Token) -> bool:
        """Tell whether this token still stands, unchanged."""
        return self._by_id.get(token.id) == token

    def authenticate(self, text: str) -> Token | None:
        """Return the token of this text. Every stored digest is compared, each in constant time."""
        digest = _digest(text)
        found = None
        for token in self._by_id.values():
            if hmac.compare_digest(token.sha256, digest):
                found = token
        return found

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _check_actor(actor: str, act_as: list[str]) -> None:
    from lattice.core.ids import validate_actor

    if _ACTOR.fullmatch(actor) is None or not validate_actor(actor):
        raise Misuse(f"bad actor {actor!r}: expected prefix:name, for example human:ana or agent:claude")
    for pattern in act_as:
        if _PATTERN.fullmatch(pattern) is None:
            raise Misuse(f"bad --act-as {pattern!r}: expected an actor, or a pattern such as 'agent:*'")
