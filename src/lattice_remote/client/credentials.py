"""The tokens of this user: ``LATTICE_TOKEN``, or ``tokens.json`` in the user's configuration. Standard library only.

The file is ``{"tokens": {URL: {SLUG or "*": TOKEN}}}``, mode 0600 (``private_files.py``). A token never enters a
project directory. Where one may be sent is for ``servers.py`` to say.
"""

import os
from typing import Any

from lattice_remote.client import private_files
from lattice_remote.errors import Misuse, StorageError

__all__ = [
    "ANY_PROJECT",
    "TOKEN_ENV",
    "check_token",
    "forget",
    "from_environment",
    "is_known",
    "projects",
    "store",
    "stored",
    "tokens_path",
]

TOKEN_ENV = "LATTICE_TOKEN"  # noqa: S105 - the name of a variable, no token
ANY_PROJECT = "*"
_WHAT = "tokens"
_Tokens = dict[str, dict[str, str]]


def tokens_path() -> str:
    """Return where this user's tokens are kept."""
    return private_files.path_of("tokens.json")


def from_environment() -> str | None:
    """Return the token of ``LATTICE_TOKEN``, None when unset or empty.

    Raises:
        Misuse: it holds something that can't be a token.
    """
    given = os.environ.get(TOKEN_ENV, "").strip()
    return check_token(given) if given else None


def check_token(token: str) -> str:
    """Return ``token`` if it can travel in a header: printable ASCII without spaces, at most 512 characters.

    Raises:
        Misuse: it can't. The token itself is not in the message.
    """
    if not token or len(token) > 512 or not token.isascii() or not token.isprintable() or " " in token:
        raise Misuse("that is not a token: it must be one word of printable ASCII", code="REMOTE_UNAUTHORIZED")
    return token


def stored(url: str, project: str) -> str | None:
    """Return the token kept for a project of a server, else the one for the whole server, else None."""
    of_server = _load().get(url, {})
    return of_server.get(project) or of_server.get(ANY_PROJECT)


def projects(url: str) -> list[str]:
    """Return the projects of a server for which a token of their own is kept; it goes before the server's."""
    return sorted(slug for slug in _load().get(url, {}) if slug != ANY_PROJECT)


def is_known(url: str) -> bool:
    """Whether this user keeps any token for a server."""
    return bool(_load().get(url))


def store(url: str, project: str, token: str) -> None:
    """Keep a token. Once this returns it is in the file, which nobody else can read.

    Raises:
        Misuse: not a token.
        StorageError: the file can't be read or written.
    """
    check_token(token)

    def with_it(found: dict[str, Any]) -> _Tokens:
        tokens = _checked(found)
        tokens.setdefault(url, {})[project] = token
        return tokens

    private_files.change(tokens_path(), _WHAT, with_it)


def forget(url: str, project: str | None = None) -> int:
    """Remove the tokens of a server, or those that serve one of its projects; return how many there were."""
    gone: list[str] = []

    def without(found: dict[str, Any]) -> _Tokens | None:
        tokens = _checked(found)
        of_server = tokens.get(url, {})
        gone.extend(slug for slug in of_server if project is None or slug in (project, ANY_PROJECT))
        for slug in gone:
            del of_server[slug]
        return {server: kept for server, kept in tokens.items() if kept} if gone else None

    private_files.change(tokens_path(), _WHAT, without)
    return len(gone)


def _load() -> _Tokens:
    return _checked(private_files.read(tokens_path(), _WHAT))


def _checked(found: dict[str, Any]) -> _Tokens:
    try:
        return {str(url): {str(slug): str(token) for slug, token in kept.items()} for url, kept in found.items()}
    except AttributeError:
        raise StorageError(f"{tokens_path()} is not valid; mend it, or remove it and log in again") from None
