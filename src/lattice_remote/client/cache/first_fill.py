"""Direct writing of received files into a new cache, which its later rename makes visible as a whole (I8)."""

import asyncio
import hashlib
import os
from collections.abc import Sequence

from lattice_remote.client.cache.cache import BASE_DIRECTORY, Cache, storage_errors
from lattice_remote.files import SAFE, signature_of, write_all
from lattice_remote.protocol.messages import Part
from lattice_remote.protocol.paths import is_editable

__all__ = ["FirstFill", "go_on"]


def go_on(cache: Cache) -> None:
    """Prepare the cache of an interrupted fill: remove files that may be incomplete, so that none looks edited.

    Files are not fsynced one by one: after a power cut all are removed. Call under the cache's lock. Raises
    StorageError.
    """
    state = cache.load_state()
    for path in state.missing if state.position.epoch else list(cache.paths()):
        for each in (path, f"{BASE_DIRECTORY}/{path}") if is_editable(path) else (path,):
            if os.path.lexists(cache.absolute(each)):
                cache.delete(each)


class FirstFill:
    """Writer of the files of one new cache, before any other program knows its directory.

    After a crash the last files may be incomplete: see ``go_on``.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._directories: dict[str, int] = {}  # path -> descriptor
        self._mode = os.stat(cache.directory).st_mode & 0o666
        self._texts: dict[str, os.stat_result] = {}  # plans and notes

    async def write(self, parts: Sequence[Part]) -> list[Part]:
        """Write those files that arrived in one part, in a thread; return the parts to write the usual way.

        Not to be cancelled. Raises StorageError.
        """
        whole = [part for part in parts if "/" in part.path and len(part.data) == part.size]
        self._cache.quota.take(sum(part.size for part in whole))
        for parent in {part.path.rpartition("/")[0] for part in whole}:
            self._open(parent)
            if parent in ("plans", "notes"):
                self._open(f"{BASE_DIRECTORY}/{parent}")
        written: dict[str, os.stat_result] = {}
        try:
            await asyncio.to_thread(self._write_all, whole, written)
        finally:
            for path, status in written.items():
                self._cache.known.note(path, signature_of(status))
                if is_editable(path):
                    self._texts[path] = status
        return [part for part in parts if part.path not in written]

    def add_base(self, path: str, text: bytes) -> None:
        """Write the base of a plan or notes. Raises StorageError."""
        base = f"{BASE_DIRECTORY}/{path}"
        self._open(base.rpartition("/")[0])
        with storage_errors(base):
            if self._create(base, text) is None:  # that of an interrupted attempt
                self._cache.replace(base, text)

    def close(self) -> None:
        while self._directories:
            os.close(self._directories.popitem()[1])
        for path, status in self._texts.items():
            self._cache.known.settle_text(path, signature_of(status))
        self._texts.clear()

    def _open(self, directory: str) -> None:
        if directory not in self._directories:
            with storage_errors(directory):
                self._directories[directory] = self._cache.open_directory(directory)

    def _write_all(self, parts: Sequence[Part], written: dict[str, os.stat_result]) -> None:
        """Write whole files, except those that exist or have another digest; add the others to ``written``."""
        for part in parts:
            path = part.path
            if hashlib.sha256(part.data).digest() != part.digest:
                continue
            with storage_errors(path):
                if (status := self._create(path, part.data)) is None:
                    continue
                if is_editable(path):
                    self._create(f"{BASE_DIRECTORY}/{path}", part.data)
            written[path] = status

    def _create(self, path: str, data: bytes) -> os.stat_result | None:
        parent, _, name = path.rpartition("/")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | SAFE
        try:
            handle = os.open(name, flags, self._mode, dir_fd=self._directories[parent])
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
