"""How one copy is kept: ``.lattice/.settings.json``, beside the cache and in no repository. Standard library only.

payloads    background: large contents of artifacts are fetched as soon as they are announced
            on-demand: only when somebody asks, with lattice remote fetch
"""

import contextlib
import json
import os

from lattice_remote.errors import Misuse, StorageError

__all__ = ["CHOICES", "FILE", "change", "read"]

FILE = ".settings.json"
CHOICES = {"payloads": ("background", "on-demand")}
"""Every setting with its values, the first of which is the default."""
_MAX_BYTES = 64 * 1024


def read(directory: str) -> dict[str, str]:
    """Return every setting; what the file does not say, or says wrongly, has its default."""
    found: object = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        handle = os.open(os.path.join(directory, FILE), os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with open(handle, "rb") as file:
            found = json.loads(file.read(_MAX_BYTES))
    given = found if isinstance(found, dict) else {}
    return {name: given[name] if given.get(name) in values else values[0] for name, values in CHOICES.items()}


def change(directory: str, name: str, value: str) -> None:
    """Set one setting, atomically.

    Raises:
        Misuse: there is no such setting, or it can't have this value.
        StorageError: it can't be written.
    """
    if name not in CHOICES:
        raise Misuse(f"there is no setting {name!r}; there is {', '.join(CHOICES)}")
    if value not in CHOICES[name]:
        raise Misuse(f"{name} is one of {', '.join(CHOICES[name])}; not {value!r}")
    settings = {**read(directory), name: value}
    temporary = os.path.join(directory, f"{FILE}.{os.getpid()}")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
        with open(os.open(temporary, flags, 0o644), "w", encoding="utf-8") as file:
            json.dump(settings, file, indent=2, sort_keys=True)
            file.write("\n")
        os.replace(temporary, os.path.join(directory, FILE))
    except OSError as error:
        raise StorageError(f"cannot write {os.path.join(directory, FILE)}: {error.strerror}") from error
