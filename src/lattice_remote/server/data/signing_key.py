"""``signing-key``: with what the server signs the cookies of browsers that are signed in."""

import secrets
from pathlib import Path

from lattice_remote.errors import StorageError
from lattice_remote.server.data.datadir import write_atomically

__all__ = ["signing_key"]

_KEY_BYTES = 32


def signing_key(path: Path) -> bytes:
    """Return the server's key, made when there is none yet. The caller holds the data directory's lock.

    One that is no key, or that others could read, is replaced: all it costs is that everybody signs in again.

    Raises:
        StorageError: the file can't be read, or the new one can't be written.
    """
    return _kept(path) or _made(path)


def _kept(path: Path) -> bytes:
    """Return the key; nothing when it is none, or not its owner's alone."""
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
