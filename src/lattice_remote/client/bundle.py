"""Bundle of a local project for a push (``protocol.bundle``): a copy of its files in an unnamed temporary file."""

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO

from lattice_remote.client.config import PRIVATE_DIRECTORY, REMOTE_FILE, STATE_FILE
from lattice_remote.errors import Misuse, StorageError
from lattice_remote.files import READ, Signature, hash_descriptor, signature_of
from lattice_remote.protocol.bundle import END, MAGIC, Layout, head_of
from lattice_remote.protocol.messages import Entry
from lattice_remote.protocol.paths import is_replicated

__all__ = ["Pack", "Survey", "survey"]

_PIECE_BYTES = 1 << 20
_BOOKKEEPING = frozenset({"locks", ".gitignore", REMOTE_FILE, STATE_FILE, PRIVATE_DIRECTORY})
"""Lattice's locks and our own files, which are not part of the project."""


@dataclass(frozen=True, slots=True)
class Survey:
    """Content of a project's directory, by relative path."""

    files: dict[str, Signature]
    """Files to send, with their signatures."""
    skipped: list[str]
    """Skipped entries: temporary and backup files, links."""
    bytes: int
    has_hooks: bool

    def count(self, directory: str) -> int:
        return sum(path.rpartition("/")[0] == directory for path in self.files)


def survey(directory: str) -> Survey:
    """List a project's files. Raises Misuse if the server would refuse it, StorageError."""
    files: dict[str, Signature] = {}
    skipped: list[str] = []
    layout = Layout(max_bytes=1 << 62)
    try:
        for path, status in _walk(directory, skipped):
            layout.add(path, status.st_size)
            files[path] = signature_of(status)
        has_hooks = _has_hooks(directory)
    except OSError as error:
        raise StorageError(f"cannot read {error.filename or directory}: {error.strerror}") from error
    if "config.json" not in files:
        raise Misuse("config.json not found: this is not a lattice project")
    return Survey(files, sorted(skipped), layout.bytes, has_hooks)


def _walk(directory: str, skipped: list[str]) -> Iterator[tuple[str, os.stat_result]]:
    pending, found = [""], list[str]()
    while pending:
        folder = pending.pop()
        for entry in os.scandir(os.path.join(directory, folder)):
            path = folder + entry.name
            if entry.is_dir(follow_symlinks=False) and is_replicated(path + "/x.md"):
                pending.append(path + "/")
            elif entry.is_file(follow_symlinks=False) and is_replicated(path):
                found.append(path)
            elif path not in _BOOKKEEPING:
                skipped.append(path)
    for path in sorted(found):
        yield path, os.lstat(os.path.join(directory, path))


def _has_hooks(directory: str) -> bool:
    try:
        with open(os.path.join(directory, "config.json"), "rb") as file:
            return bool(json.load(file).get("hooks"))
    except (FileNotFoundError, ValueError, AttributeError):
        return False  # the server reports the problem


@dataclass
class Pack:
    """A project's bundle, with the size and digest of the whole. A context manager, which removes the file."""

    file: IO[bytes]
    size: int = 0
    digest: bytes = b""
    entries: dict[str, Entry] = field(default_factory=dict)
    _offsets: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, directory: str, found: Survey, report: Callable[[int, int], None]) -> "Pack":
        """Read a project's files. ``report`` gets the bytes read and in total. Blocking.

        Raises:
            StorageError: a file cannot be read, or has changed since the survey.
        """
        try:  # beside the project: temporary directories in memory may lack the room
            pack = cls(tempfile.TemporaryFile(dir=directory))  # noqa: SIM115 - the caller's to close
        except OSError as error:
            raise StorageError(f"cannot write to {directory}: {error.strerror or error}") from error
        try:
            pack._fill(directory, found, report)
        except OSError as error:
            pack.close()
            raise StorageError(f"cannot read the project: {error.strerror or error}") from error
        except BaseException:
            pack.close()
            raise
        return pack

    def _fill(self, directory: str, found: Survey, report: Callable[[int, int], None]) -> None:
        hasher = hashlib.sha256()

        def write(data: bytes) -> None:
            self.file.write(data)
            hasher.update(data)
            self.size += len(data)

        write(MAGIC)
        done = 0
        for path in found.files:
            with open(os.open(os.path.join(directory, path), READ), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode) or signature_of(status) != found.files[path]:
                    raise _changed(path)
                entry = Entry(path, status.st_size, hash_descriptor(file.fileno())[1].digest())
                write(head_of(entry))
                self._offsets[path] = self.size
                for piece in iter(lambda: file.read(_PIECE_BYTES), b""):
                    write(piece)
            if self.size != self._offsets[path] + entry.size:
                raise _changed(path)
            self.entries[path] = entry
            done += entry.size
            report(done, found.bytes)
        write(END)
        self.file.flush()
        self.digest = hasher.digest()

    def content(self, path: str) -> bytes:
        return os.pread(self.file.fileno(), self.entries[path].size, self._offsets[path])

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "Pack":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _changed(path: str) -> StorageError:
    return StorageError(f"{path} changed while it was read; try again when no program changes the project")
