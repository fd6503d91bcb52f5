"""How much a server may make a cache take on the disk."""

import os
from collections.abc import Callable

from lattice_remote.errors import StorageError

__all__ = ["MIB", "Quota"]

MIB = 1024 * 1024
_STEP_BYTES = 64 * MIB
"""How much may be written without a look at what there is; the bound is kept up to so much."""


class Quota:
    """Ask ``take`` before each write. Looking at the whole directory is left to when enough was written to matter."""

    def __init__(self, root: str, limit: Callable[[], int], whose: str) -> None:
        self._root = root
        self._limit = limit
        self._whose = whose
        self._unseen = 0  # bytes written since the last look

    def require(self, size: int) -> None:
        """Make sure that ``size`` bytes in all are within the bound.

        Raises:
            StorageError: they are not; the message says how to allow more.
        """
        if size > (limit := self._limit()):
            raise StorageError(
                f"this copy would take more than the {limit // MIB} MiB that you let {self._whose} use; allow more "
                f"with: lattice remote trust {self._whose} --max-cache MIB"
            )

    def require_room(self, size: int) -> None:
        """Make sure that ``size`` bytes more are within the bound; looks at every file. Raises StorageError."""
        self.require(_bytes_below(self._root) + size)

    def take(self, size: int) -> None:
        """Make sure that ``size`` bytes more are within the bound, give or take a step.

        Raises:
            StorageError: they are not.
        """
        self._unseen += size
        if self._unseen > min(_STEP_BYTES, self._limit()):
            self.require(_bytes_below(self._root) + size)
            self._unseen = 0


def _bytes_below(root: str) -> int:
    total = 0
    pending = [root]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue  # removed meanwhile
    return total
