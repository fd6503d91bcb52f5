"""``tokens.json``: tokens, each for some projects and one actor, stored as digests.

The file is replaced atomically, mode 0600, under a lock: the command line can change it while a server runs.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import EllipsisType
from typing import Annotated, Protocol

import filelock
import msgspec
from msgspec import Meta

from lattice_remote.errors import Misuse, StorageError
from lattice_remote.files import write_atomically
from lattice_remote.protocol import mark_of_server

__all__ = [
    "METRICS_ACTOR",
    "READ_ONLY",
    "SharedTokens",
    "Token",
    "TokenFile",
    "check_actor",
    "decode_tokens",
    "digest_of_text",
    "duration",
    "encode_tokens",
    "expiry",
    "locked",
    "read_last_uses",
    "shown",
    "with_projects",
]

_ACTOR = re.compile(r"[^\s:*]+:[^\s*]{1,100}")
_PATTERN = re.compile(r"(?=\S*[:*])[a-z*][a-z0-9_*-]*(?::\S{1,100})?")
_SERVER = re.compile(r"https?://[A-Za-z0-9.:\[\]_-]{1,255}(/[\w./-]{0,200})?", re.ASCII | re.IGNORECASE)
_LOCK_TIMEOUT_S = 10
READ_ONLY = "this token may only read; for a token that may write, ask the administrator"
METRICS_ACTOR = "service:metrics"
"""It cannot write."""

Moment = Annotated[datetime, Meta(tz=True)]


class Token(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One token, without its text. A misspelt field, for example an expiry, is an error."""

    id: str
    sha256: str
    projects: list[str]
    actor: str
    act_as: list[str] = []
    """Further actors; ``*`` matches anything."""
    created: str = ""
    expires: Moment | None = None
    """None: never."""
    old_sha256: str = ""
    """Of the text before the rotation, valid until ``old_until``."""
    old_until: Moment | None = None
    metrics: bool = False
    """For ``/metrics`` alone."""
    read_only: bool = False
    """Every write is refused."""
    server: str = ""
    """URL of the only server to which clients send it unasked. See ``protocol.mark_of_server``."""
    revoked: Moment | None = None
    """It stays listed."""

    @property
    def rights(self) -> tuple[object, ...]:
        """Return the rights that a connection depends on."""
        return (self.projects, self.actor, self.act_as, self.read_only)


class _Tokens(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file; without its one name it is damaged rather than empty."""

    tokens: list[Token]


def decode_tokens(content: bytes) -> list[Token]:
    """Return the tokens of a file's content. Raises StorageError."""
    try:
        return msgspec.json.decode(content, type=_Tokens).tokens
    except msgspec.DecodeError as error:
        raise StorageError(f"the tokens are damaged: {error}") from error


def encode_tokens(tokens: list[Token]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(_Tokens(tokens))) + b"\n"


def locked(path: Path) -> filelock.BaseFileLock:
    """Return the acquired lock of ``tokens.json``; any thread may release it. Raises StorageError."""
    lock = filelock.FileLock(path.with_name(".tokens.lock"), timeout=_LOCK_TIMEOUT_S, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise StorageError(f"{path} is locked by another command; try again") from error
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
    return lock


class SharedTokens(Protocol):
    def load(self) -> list[Token]: ...

    def store(self, tokens: list[Token]) -> bool:
        """Replace the tokens of the last ``load()``; return False if another server has changed them since."""


class TokenFile:
    """``tokens.json`` for the command line. A change is made in ``shared`` first, if given.

    Every method raises StorageError if the file cannot be read or written, or these tokens are out of reach.
    """

    def __init__(self, path: Path, shared: Callable[[], AbstractContextManager[SharedTokens]] | None = None) -> None:
        self._path = path
        self._shared = shared

    def read(self) -> list[Token]:
        return [token for token in self.read_all() if token.revoked is None]

    def read_all(self) -> list[Token]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Tokens).tokens
        except FileNotFoundError:
            return []
        except (OSError, msgspec.DecodeError) as error:
            raise StorageError(f"{self._path}: {error}") from error

    def create(
        self,
        *,
        projects: list[str],
        actor: str,
        act_as: list[str],
        expires: datetime | None = None,
        read_only: bool = False,
        server: str = "",
    ) -> tuple[Token, str]:
        """Create a token; return it and its text, which is not stored.

        Raises Misuse if the actor, a pattern or the server's URL is malformed, or no project is named.
        """
        check_actor(actor, act_as)
        if not projects:
            raise Misuse("a token needs at least one project; name it with --project")
        if server and _SERVER.fullmatch(server) is None:
            raise Misuse(f"bad --for {server!r}: expected the address that clients use, for example https://HOST")
        return self._add(sorted(set(projects)), actor, act_as, expires, read_only=read_only, server=server)

    def create_for_metrics(self, *, expires: datetime | None = None) -> tuple[Token, str]:
        return self._add([], METRICS_ACTOR, [], expires, metrics=True)

    def _add(
        self,
        projects: list[str],
        actor: str,
        act_as: list[str],
        expires: datetime | None,
        *,
        metrics: bool = False,
        read_only: bool = False,
        server: str = "",
    ) -> tuple[Token, str]:
        text = _new_text(server)
        token = Token(
            id="tok_" + secrets.token_hex(6),
            sha256=digest_of_text(text),
            projects=projects,
            actor=actor,
            act_as=act_as,
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            expires=expires,
            metrics=metrics,
            read_only=read_only,
            server=server,
        )
        self._change(lambda tokens: [*tokens, token])
        return token, text

    def rotate(self, id_or_text: str, *, grace: timedelta = timedelta()) -> tuple[Token, str]:
        """Give a token a new text and return both; the old text stays valid for ``grace``.

        Raises Misuse if there is no such token, it has expired, or the grace ends after the year 9999.
        """
        text, now = "", datetime.now(UTC)
        try:
            until = now + grace
        except OverflowError as error:
            raise Misuse("this grace is too long; name a shorter one") from error

        def renewed(token: Token) -> Token:
            nonlocal text
            if token.expires is not None and token.expires <= now:
                raise Misuse(f"token {token.id} has expired; make another with: lattice-remote token create")
            text = _new_text(token.server)
            return msgspec.structs.replace(token, sha256=digest_of_text(text), old_sha256=token.sha256, old_until=until)

        token = self._replace(id_or_text, renewed)
        return token, text

    def edit(
        self,
        id_or_text: str,
        *,
        add_projects: Sequence[str] = (),
        remove_projects: Sequence[str] = (),
        act_as: list[str] | None = None,
        read_only: bool | None = None,
        expires: datetime | EllipsisType | None = ...,
    ) -> Token:
        """Change a token's rights and return it. Its live connections end and come back.

        Raises Misuse if there is no such token, a pattern is malformed, or no project would remain.
        """

        def edited(token: Token) -> Token:
            if token.metrics and (add_projects or remove_projects or act_as is not None or read_only is not None):
                raise Misuse(f"token {token.id} is for metrics; only its expiry can change")
            if missing := sorted(set(remove_projects) - set(token.projects)):
                raise Misuse(f"token {token.id} is not for project {missing[0]!r}")
            projects = sorted({*token.projects, *add_projects} - set(remove_projects))
            if not projects and not token.metrics:
                raise Misuse(f"token {token.id} would have no project left; revoke it instead")
            check_actor(token.actor, act_as or []) if not token.metrics else None
            return msgspec.structs.replace(
                token,
                projects=projects,
                act_as=token.act_as if act_as is None else act_as,
                read_only=token.read_only if read_only is None else read_only,
                expires=token.expires if expires is ... else expires,
            )

        return self._replace(id_or_text, edited)

    def revoke(self, id_or_text: str) -> Token:
        """Revoke a token. Raises Misuse if there is none."""
        return self._replace(id_or_text, _revoked)

    def _replace(self, id_or_text: str, edit: Callable[[Token], Token]) -> Token:
        changed: list[Token] = []

        def replaced(tokens: list[Token]) -> list[Token]:
            old = _find(tokens, id_or_text)
            changed.append(edit(old))
            return [changed[-1] if token is old else token for token in tokens]

        self._change(replaced)
        return changed[-1]

    def rename_projects(self, renamed: Mapping[str, str]) -> int:
        if not any(slug in renamed for token in self.read() for slug in token.projects):
            return 0
        return self._change_projects(lambda projects: {renamed.get(slug, slug) for slug in projects})

    def forget_project(self, slug: str) -> int:
        """Remove a project, and revoke tokens without another; return the number of changed tokens."""
        return self._change_projects(lambda projects: projects - {slug})

    def _change_projects(self, edit: Callable[[set[str]], set[str]]) -> int:
        changed = 0

        def edited(tokens: list[Token]) -> list[Token]:
            nonlocal changed
            after = [with_projects(token, edit(set(token.projects))) for token in tokens]
            changed = sum(new is not old for old, new in zip(tokens, after, strict=True))
            return [token if token.projects or token.metrics or token.revoked else _revoked(token) for token in after]

        self._change(edited)
        return changed

    def _change(self, edit: Callable[[list[Token]], list[Token]]) -> None:
        """Replace the tokens by ``edit`` of them, which may be called again."""
        lock = locked(self._path)
        try:
            tokens = edit(self.read_all()) if self._shared is None else _change_shared(self._shared, edit)
            write_atomically(self._path, encode_tokens(tokens), mode=0o600)
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error.strerror}") from error
        finally:
            lock.release()


def _change_shared(
    shared: Callable[[], AbstractContextManager[SharedTokens]], edit: Callable[[list[Token]], list[Token]]
) -> list[Token]:
    with shared() as there:
        while True:
            tokens = edit(there.load())
            if there.store(tokens):
                return tokens


def with_projects(token: Token, projects: set[str]) -> Token:
    """Return the token for these projects; the same one if nothing changes."""
    return token if projects == set(token.projects) else msgspec.structs.replace(token, projects=sorted(projects))


def _revoked(token: Token) -> Token:
    return msgspec.structs.replace(token, revoked=datetime.now(UTC).replace(microsecond=0))


def digest_of_text(text: str) -> str:
    """Return the stored digest; a text is 256 random bits, so it cannot be reversed."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _new_text(server: str) -> str:
    return "ltr_" + secrets.token_urlsafe(32) + (f".{mark_of_server(server)}" if server else "")


def _find(tokens: list[Token], id_or_text: str) -> Token:
    digest = digest_of_text(id_or_text)
    for token in tokens:
        if token.revoked is None and (token.id == id_or_text or hmac.compare_digest(token.sha256, digest)):
            return token
    raise Misuse("token not found; see: lattice-remote token list")


def check_actor(actor: str, act_as: list[str]) -> None:
    """Raise Misuse unless a token may have this actor and these patterns."""
    from lattice.core.ids import validate_actor

    if _ACTOR.fullmatch(actor) is None or not validate_actor(actor):
        raise Misuse(f"bad actor {actor!r}: expected prefix:name, for example human:ana or agent:claude")
    for pattern in act_as:
        if _PATTERN.fullmatch(pattern) is None:
            raise Misuse(f"bad --act-as {pattern!r}: expected an actor, or a pattern such as 'agent:*'")


_DURATION = re.compile(r"([1-9][0-9]{0,5})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DATE = re.compile(r"\d{4}-\d\d-\d\d([Tt ]\d\d:\d\d:\d\d(\.\d{1,6})?([Zz]|[+-]\d\d:\d\d))?", re.ASCII)


def duration(text: str) -> timedelta:
    """Return the duration of ``45s``, ``30m``, ``12h``, ``90d`` or ``52w``. Raises Misuse."""
    matched = _DURATION.fullmatch(text)
    if matched is None:
        raise Misuse(f"bad time {text!r}: expected a number and s, m, h, d or w, for example 90d")
    return timedelta(**{_UNITS[matched[2]]: int(matched[1])})


def expiry(text: str, now: datetime) -> datetime | None:
    """Return the moment that ``text`` names, None for ``never``. A date alone is its start in UTC.

    Raises Misuse if it is neither a duration nor a date nor ``never``, or has passed, or is past the year 9999.
    """
    if text == "never":
        return None
    try:
        if _DATE.fullmatch(text) is None:
            moment = now + duration(text)
        else:
            date = datetime.fromisoformat(text.upper().replace(" ", "T"))
            moment = date.replace(tzinfo=UTC) if date.tzinfo is None else date.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise Misuse(f"bad date {text!r}: {error}") from error
    except Misuse as error:
        raise Misuse(f"bad --expires {text!r}: expected for example 90d, 2030-12-31, or never") from error
    if moment <= now:
        raise Misuse(f"{text} is in the past; name a later time")
    return moment


def shown(moment: datetime | None, otherwise: str) -> str:
    return otherwise if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def read_last_uses(path: Path) -> dict[str, datetime]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Moment])
    except (OSError, msgspec.DecodeError):
        return {}
