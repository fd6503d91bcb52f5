"""A project that is being put together in a directory of its own, which nobody else knows of."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from lattice_remote.protocol.layout import Layout
from lattice_remote.protocol.paths import DIRECTORIES

__all__ = ["Candidate"]

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


class Candidate:
    """The project in ``place``, a real path to an empty directory.

    Each file is made anew, under a name that was checked, in directories that were made here: there is no link that
    could lead elsewhere, and no mode or owner of anybody's choice.
    """

    def __init__(self, place: Path, layout: Layout) -> None:
        self.place = place
        self.lattice = place / ".lattice"
        self.layout = layout
        self.digests: dict[str, bytes] = {}
        """Of each file as it came."""
        for directory in DIRECTORIES:
            (self.lattice / directory).mkdir(parents=True, exist_ok=True)

    def add(self, path: str, size: int, pieces: Iterable[bytes]) -> None:
        """Add a file with this content.

        Raises:
            Misuse: a project can't have it.
            OSError: it can't be written.
        """
        self.layout.add(path, size)
        target = self.lattice / path
        target.parent.mkdir(parents=True, exist_ok=True)
        hasher = hashlib.sha256()
        with open(os.open(target, _NEW, 0o644), "wb") as file:
            for piece in pieces:
                hasher.update(piece)
                file.write(piece)
        self.digests[path] = hasher.digest()
