"""Direct writing of received files into a new cache, which its later rename makes visible as a whole (I8)."""

import hashlib
import os

from lattice_remote.client.cache.cache import BASE_DIRECTORY, Cache, storage_errors
from lattice_remote.files import SAFE, signature_of, write_all
from lattice_remote.protocol.messages import Part
from lattice_remote.protocol.paths import is_editable

__all__ = ["FirstFill"]


class FirstFill:
    """Writer of the files of one new cache, before any other program knows its directory.

    A file is written once, without a temporary one and without a search for edits. After a crash the directory is
    incomplete, and its creator removes it.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._directories: dict[str, int] = {}  # path -> descriptor
        self._mode = os.stat(cache.directory).st_mode & 0o666
        self._texts: dict[str, os.stat_result] = {}  # plans and notes

    def write(self, part: Part) -> bool:
        """Write a file that arrived in one part; return False if it must be written the usual way.

        Raises StorageError.
        """
        path = part.path
        if "/" not in path or len(part.data) != part.size or hashlib.sha256(part.data).digest() != part.digest:
            return False
        with storage_errors(path):
            self._cache.quota.take(part.size)
            status = self._create(path, part.data)
            if status is None:
                return False
            if is_editable(path):
                self._create(f"{BASE_DIRECTORY}/{path}", part.data)
                self._texts[path] = status
        self._cache.known.note(path, signature_of(status))
        return True

    def close(self) -> None:
        """End the fill: the texts equal their bases."""
        while self._directories:
            os.close(self._directories.popitem()[1])
        for path, status in self._texts.items():
            self._cache.known.settle_text(path, signature_of(status))
        self._texts.clear()

    def _create(self, path: str, data: bytes) -> os.stat_result | None:
        """Create a file; return None if there is one."""
        parent, _, name = path.rpartition("/")
        directory = self._directories.get(parent)
        if directory is None:
            directory = self._directories[parent] = self._cache.open_directory(parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | SAFE
        try:
            handle = os.open(name, flags, self._mode, dir_fd=directory)
        except FileExistsError:
            return None
        try:
            write_all(handle, data)
            status = os.fstat(handle)
            if status.st_mode & 0o777 != self._mode:  # the umask
                os.fchmod(handle, self._mode)
                status = os.fstat(handle)
            return status
        finally:
            os.close(handle)
