"""Which board is meant: found as lattice finds it, local or remote."""

from pathlib import Path
from typing import TYPE_CHECKING

from lattice.storage.fs import LATTICE_DIR, LatticeRootError, find_root

from lattice_remote.client.settings import is_cache
from lattice_remote.errors import Misuse

if TYPE_CHECKING:
    from lattice_remote.storage.backend import StorageBackend

__all__ = ["resolve_backend"]


def resolve_backend(start: Path | str | None = None) -> "StorageBackend":
    """Return the board that a ``lattice`` command in the directory ``start`` would work on.

    Args:
        start: where to begin to look, there and in the directories above; None for the current directory, or for what
            ``LATTICE_ROOT`` names.

    Raises:
        Misuse: there is no project.
        StorageError: its ``remote.json`` can't be read.
    """
    root = _root_at(None if start is None else Path(start).absolute())
    if root is None:
        raise Misuse(f"there is no lattice project in {start or Path.cwd()} or above; make one with: lattice init")
    if is_cache(str(root / LATTICE_DIR)):
        from lattice_remote.client.storage import RemoteStorage

        return RemoteStorage(root)
    from lattice_remote.storage.local import LocalStorage

    return LocalStorage(root)


def _root_at(start: Path | None) -> Path | None:
    if start is None:
        try:
            found = find_root()
        except LatticeRootError as error:
            raise Misuse(str(error)) from error
        return None if found is None else found.absolute()
    for directory in (start.resolve(), *start.resolve().parents):
        if (directory / LATTICE_DIR).is_dir():
            return directory
    return None
