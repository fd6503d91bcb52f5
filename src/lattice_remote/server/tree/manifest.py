"""The list of a project's files as it was at one change, on disk.

It saves hashing the whole tree at every start: a file whose size, modification time and inode are those in the
list still has the digest in the list.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

__all__ = [
    "FileState",
    "ManifestFile",
    "SyncFailed",
    "load_manifest",
    "save_manifest",
    "sync",
    "sync_directory",
    "sync_files",
]


class SyncFailed(OSError):
    """The disk could not keep what was written to it: nobody knows what is on it now.

    Other errors of the storage come before anything was promised; after this one nothing may be acknowledged.
    """


class FileState(msgspec.Struct, frozen=True, array_like=True):
    """One file: its size in bytes, SHA-256, and the signature by which a change of it is noticed."""

    size: int
    digest: bytes
    mtime_ns: int
    inode: int
    settled: bool = True
    """False when the file was so young that another write could leave the same modification time."""


class ManifestFile(msgspec.Struct, frozen=True):
    """All files at (``epoch``, ``seq``). ``clean`` says that the worker ended in order and nothing ran after it.

    ``place`` names the journal directory that it was written in, see ``copied.py``.
    """

    epoch: str
    seq: int
    mark: bytes
    boot_id: str
    clean: bool
    files: dict[str, FileState]
    place: list[int] = []


_decoder = msgspec.msgpack.Decoder(ManifestFile)


def load_manifest(path: Path) -> ManifestFile | None:
    """Return the manifest, None when there is none or it can't be read."""
    try:
        return _decoder.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def save_manifest(path: Path, content: bytes) -> None:
    """Replace the manifest atomically with encoded ``content``; durable once this returns.

    Raises:
        OSError: it could not be written; the old one is still there.
    """
    scratch = path.with_name(path.name + ".new")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(content)
        sync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(scratch, path)
    sync_directory(path.parent)


def sync(descriptor: int) -> None:
    """Make what was written to an open file durable.

    Raises:
        SyncFailed: the storage failed.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise SyncFailed(error.errno, error.strerror) from error


def sync_files(paths: Iterable[str]) -> None:
    """Make the content and the names of these files durable; those that are gone, that they are gone.

    Raises:
        SyncFailed: the storage failed.
    """
    directories = set()
    for path in paths:
        directories.add(os.path.dirname(path))
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                sync(descriptor)
            finally:
                os.close(descriptor)
    directories |= {os.path.dirname(directory) for directory in directories}  # a directory may be new itself
    for directory in directories:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            sync_directory(Path(directory))


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable.

    Raises:
        SyncFailed: the storage failed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)
