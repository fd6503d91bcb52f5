"""Tokens of this user: ``LATTICE_TOKEN``, or ``tokens.json`` in the user's configuration. Standard library only.

The file is ``{"tokens": {URL: {SLUG or "*": TOKEN}}}``, mode 0600; written by hand also ``{URL: TOKEN}``. A token never
enters a project directory. ``trusted_servers`` decides where it may be sent.
"""

import json
import os
import stat
from collections.abc import Callable
from typing import Any

from lattice_remote.errors import Misuse, StorageError
from lattice_remote.files import READ, Signature, signature_of, write_atomically

__all__ = [
    "ANY_PROJECT",
    "TOKEN_ENV",
    "change",
    "check_token",
    "directory",
    "forget",
    "from_environment",
    "is_known",
    "path_of",
    "projects",
    "read",
    "signature",
    "store",
    "stored",
    "tokens_path",
]

MAX_BYTES = 1024 * 1024
_LOCK_TIMEOUT_S = 10.0


def directory() -> str:
    base = os.environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(base):  # a relative one is ignored, as its specification says
        base = os.path.abspath(os.path.join(os.path.expanduser("~"), ".config"))
    return os.path.join(base, "lattice")


def path_of(name: str) -> str:
    return os.path.join(directory(), name)


def signature(path: str) -> Signature | None:
    try:
        return signature_of(os.lstat(path))
    except OSError:
        return None


def read(path: str, what: str) -> dict[str, Any]:
    """Return the object under the key ``what`` of a file, empty without a file.

    A file written by hand may be that object itself, whose keys are URLs.

    Raises:
        StorageError: it cannot be read, is no plain file of this user alone, or is invalid.
    """
    try:
        handle = os.open(path, READ)
        with open(handle, "rb") as file:
            _require_private(path, os.fstat(handle))
            content = json.loads(file.read(MAX_BYTES + 1))
        found = content if what not in content and all(map(_is_url, content)) else content[what]
        return dict(found.items())
    except (FileNotFoundError, NotADirectoryError):
        return {}  # a home may also be /dev/null
    except OSError as error:
        if os.path.islink(path):
            raise StorageError(f"{path} is a link; replace it with the file itself") from None
        raise StorageError(f"cannot read {path}: {error.strerror}; XDG_CONFIG_HOME can name another place") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise StorageError(f"{path} is not valid; repair it, or remove it and name your servers again") from None


def _is_url(key: str) -> bool:
    return key.startswith(("http://", "https://"))


def change(path: str, what: str, edit: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Replace the object under ``what`` with the result of ``edit``, unless that is None.

    Atomic, serialized with other commands, durable on return. Raises StorageError.
    """
    from filelock import FileLock, Timeout

    parent, name = os.path.split(path)
    try:
        os.makedirs(parent, mode=0o700, exist_ok=True)
        with FileLock(os.path.join(parent, f".{name}.lock"), timeout=_LOCK_TIMEOUT_S, mode=0o600):
            edited = edit(read(path, what))
            if edited is not None:
                text = json.dumps({what: edited}, indent=2, sort_keys=True) + "\n"
                write_atomically(path, text.encode(), mode=0o600, is_parent_synced=False)
    except Timeout:
        raise StorageError(f"{path} is locked by another command; try again") from None
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}; XDG_CONFIG_HOME can name another place, and LATTICE_TOKEN with "
            "LATTICE_REMOTE_URL do without one"
        ) from error


def _require_private(path: str, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise StorageError(f"{path} is not a plain file; remove it")
    if hasattr(os, "geteuid") and found.st_uid not in (os.geteuid(), 0):
        raise StorageError(f"{path} belongs to another user; remove it, and name your servers again")
    if found.st_mode & 0o077:
        raise StorageError(f"{path} can be read or changed by others; if that did no harm yet: chmod 600 {path}")


TOKEN_ENV = "LATTICE_TOKEN"  # noqa: S105 - the name of a variable, no token
ANY_PROJECT = "*"
_WHAT = "tokens"
_Tokens = dict[str, dict[str, str]]


def tokens_path() -> str:
    return path_of("tokens.json")


def from_environment() -> str | None:
    """Return the token of ``LATTICE_TOKEN``. Raises Misuse."""
    given = os.environ.get(TOKEN_ENV, "").strip()
    return check_token(given) if given else None


def check_token(token: str) -> str:
    """Return ``token`` if it is printable ASCII without spaces, at most 512 characters. Raises Misuse."""
    if not token or len(token) > 512 or not token.isascii() or not token.isprintable() or " " in token:
        raise Misuse("that is not a token: it must be one word of printable ASCII", code="REMOTE_UNAUTHORIZED")
    return token


def stored(url: str, project: str) -> str | None:
    of_server = _load().get(url, {})
    return of_server.get(project) or of_server.get(ANY_PROJECT)


def projects(url: str) -> list[str]:
    return sorted(slug for slug in _load().get(url, {}) if slug != ANY_PROJECT)


def is_known(url: str) -> bool:
    return bool(_load().get(url))


def store(url: str, project: str, token: str) -> None:
    """Store a token, readable by this user only; durable on return. Raises Misuse, StorageError."""
    check_token(token)

    def with_it(found: dict[str, Any]) -> _Tokens:
        tokens = _checked(found)
        tokens.setdefault(url, {})[project] = token
        return tokens

    change(tokens_path(), _WHAT, with_it)


def forget(url: str, project: str | None = None) -> int:
    """Remove a server's tokens, or one project's; return their number."""
    gone: list[str] = []

    def without(found: dict[str, Any]) -> _Tokens | None:
        tokens = _checked(found)
        of_server = tokens.get(url, {})
        gone.extend(slug for slug in of_server if project is None or slug in (project, ANY_PROJECT))
        for slug in gone:
            del of_server[slug]
        return {server: kept for server, kept in tokens.items() if kept} if gone else None

    change(tokens_path(), _WHAT, without)
    return len(gone)


def _load() -> _Tokens:
    return _checked(read(tokens_path(), _WHAT))


def _normal(url: str) -> str:
    """Return a URL written by hand as ``parse_url`` does: only below a path it ends in a slash."""
    bare = url.rstrip("/")
    return f"{bare}/" if "/" in bare.partition("://")[2] else bare


def _checked(found: dict[str, Any]) -> _Tokens:
    try:
        return {
            _normal(str(url)): {ANY_PROJECT: kept}
            if isinstance(kept, str)
            else {str(slug): str(token) for slug, token in kept.items()}
            for url, kept in found.items()
        }
    except AttributeError:
        raise StorageError(f"{tokens_path()} is not valid; repair it, or remove it and log in again") from None
