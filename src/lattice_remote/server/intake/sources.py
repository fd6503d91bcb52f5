"""Where a project's files come from: a pack that a client sent, or a directory on this machine. Neither is trusted."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lattice_remote.errors import Misuse, ProtocolError
from lattice_remote.protocol.layout import MAX_PROJECT_FILES, Layout
from lattice_remote.protocol.messages import Entry
from lattice_remote.protocol.pack import Unpacker
from lattice_remote.protocol.paths import is_replicated
from lattice_remote.server.intake.candidate import Candidate

__all__ = ["add_directory", "add_pack"]

_PIECE_BYTES = 1 << 20
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_MAX_LEFT_OUT = 1000
_BOOKKEEPING = frozenset(
    {"locks", "remote.json", "cache_state.json", ".gitignore", ".base", ".tmp", ".cache.lock", ".written", ".remote"}
    | {".fetch", ".fetch.lock", ".away", ".settings.json"}
)
"""Lattice's locks, and what makes a directory a cache: nobody misses them."""


def add_pack(candidate: Candidate, pack: Path) -> None:
    """Put a pack's files into a candidate. All of it is read once before the first file is made.

    Raises:
        ProtocolError: it is no pack.
        Misuse: a project can't have one of its files.
    """
    layout = Layout(max_bytes=candidate.layout.max_bytes)
    for item in _items(pack):
        if isinstance(item, Entry):
            layout.add(item.path, item.size)
    items = _items(pack)
    pending = next(items, None)
    while isinstance(pending, Entry):
        content = _Content(items)
        candidate.add(pending.path, pending.size, content)
        pending = content.following


def _items(pack: Path) -> Iterator[Entry | bytes]:
    unpacker = Unpacker()
    with pack.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield from unpacker.receive(piece)
    if not unpacker.is_complete:
        raise ProtocolError("the pack is cut short")


class _Content:
    """The pieces of one file; what comes after the last is in ``following``."""

    def __init__(self, items: Iterator[Entry | bytes]) -> None:
        self._items = items
        self.following: Entry | bytes | None = None

    def __iter__(self) -> Iterator[bytes]:
        for item in self._items:
            if isinstance(item, Entry):
                self.following = item
                return
            yield item


def add_directory(candidate: Candidate, directory: Path) -> list[str]:
    """Put the replicated files below ``directory`` (a ``.lattice``) into a candidate; return what was left out.

    Links and whatever is no plain file are left out, never followed.

    Raises:
        Misuse: a project can't have one of its files, or one was cut short meanwhile.
        OSError: one can't be read.
    """
    left_out: list[str] = []
    for path in _walk(directory, left_out):
        with open(os.open(directory / path, _READ), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Misuse(f"{path} is no plain file any more; somebody works in {directory}: try again")
            candidate.add(path, status.st_size, _first(status.st_size, file, path))
    return sorted(left_out)


def _first(size: int, file: BinaryIO, path: str) -> Iterator[bytes]:
    """Yield the first ``size`` bytes: a log that is being added to ends with what it had when it was opened."""
    while size:
        piece = file.read(min(size, _PIECE_BYTES))
        if not piece:
            raise Misuse(f"{path} was cut short while it was read; somebody works there: try again")
        size -= len(piece)
        yield piece


def _walk(directory: Path, left_out: list[str]) -> Iterator[str]:
    """Yield the replicated plain files, relative, in order."""
    pending = [""]
    found: list[str] = []
    while pending:
        folder = pending.pop()
        for entry in os.scandir(directory / folder):
            path = folder + entry.name
            if entry.is_dir(follow_symlinks=False) and is_replicated(path + "/x.md"):
                pending.append(path + "/")
            elif entry.is_file(follow_symlinks=False) and is_replicated(path):
                found.append(path)
            elif path not in _BOOKKEEPING and len(left_out) < _MAX_LEFT_OUT:
                left_out.append(path)
        if len(found) > MAX_PROJECT_FILES:
            raise Misuse(f"{directory} has more than {MAX_PROJECT_FILES} files")
    yield from sorted(found)
