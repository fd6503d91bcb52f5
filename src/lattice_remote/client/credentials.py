"""The tokens of this user: ``LATTICE_TOKEN``, or ``tokens.json`` in the user's configuration. Standard library only.

The file is ``{"tokens": {URL: {SLUG or "*": TOKEN}}}``, mode 0600. A token never enters a project directory.
"""

import json
import os
import tempfile

from lattice_remote.errors import Misuse, StorageError

__all__ = ["ANY_PROJECT", "TOKEN_ENV", "check_token", "forget", "from_environment", "store", "stored", "tokens_path"]

TOKEN_ENV = "LATTICE_TOKEN"  # noqa: S105 - the name of a variable, no token
ANY_PROJECT = "*"
_Tokens = dict[str, dict[str, str]]


def tokens_path() -> str:
    """Return where this user's tokens are kept."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return os.path.join(base, "lattice", "tokens.json")


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


def store(url: str, project: str, token: str) -> None:
    """Keep a token. Once this returns it is in the file, which nobody else can read.

    Raises:
        Misuse: not a token.
        StorageError: the file can't be read or written.
    """
    tokens = _load()
    tokens.setdefault(url, {})[project] = check_token(token)
    _save(tokens)


def forget(url: str, project: str | None = None) -> int:
    """Remove the tokens of a server, or those that serve one of its projects; return how many there were."""
    tokens = _load()
    of_server = tokens.get(url, {})
    gone = [slug for slug in of_server if project is None or slug in (project, ANY_PROJECT)]
    for slug in gone:
        del of_server[slug]
    if gone:
        _save({server: kept for server, kept in tokens.items() if kept})
    return len(gone)


def _load() -> _Tokens:
    path = tokens_path()
    try:
        with open(path, "rb") as file:
            tokens = json.loads(file.read())["tokens"]
        return {str(url): {str(slug): str(token) for slug, token in kept.items()} for url, kept in tokens.items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StorageError(f"{path} is not valid; mend it, or remove it and log in again") from error


def _save(tokens: _Tokens) -> None:
    path = tokens_path()
    directory = os.path.dirname(path)
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=directory, prefix=".tokens.")  # made with mode 0600
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump({"tokens": tokens}, file, indent=2, sort_keys=True)
                file.write("\n")
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
