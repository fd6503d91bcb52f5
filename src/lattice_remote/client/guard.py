"""Write guard: refuses writes of local commands into the cache (I4). Standard library only.

An audit hook sees each file before any library opens it for writing, renames or removes it.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from lattice_remote.errors import RemoteError

__all__ = ["Guard", "WriteRefused", "allow_writes"]

_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_TOUCHING = {  # event -> positions of the paths that it changes
    "os.chmod": (0,),
    "os.chown": (0,),
    "os.link": (1,),
    "os.mkdir": (0,),
    "os.remove": (0,),
    "os.rename": (0, 1),
    "os.rmdir": (0,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.utime": (0,),
    "shutil.rmtree": (0,),
}


_let: ContextVar[str | None] = ContextVar("_let", default=None)


@contextmanager
def allow_writes(folder: str) -> Iterator[None]:
    """Allow writes to a folder of the cache ("": all) in this context."""
    before = _let.set(folder and folder + os.sep)
    try:
        yield
    finally:
        _let.reset(before)


class WriteRefused(RemoteError, PermissionError):
    """A write of a local command into the cache. Also a ``PermissionError``, as for a read-only directory."""

    code = "REMOTE_GUARD"


class Guard:
    """Guard of one ``.lattice`` directory between ``start()`` and ``stop()``; ``refused`` keeps the first refusal."""

    def __init__(self, directory: str, *, plugins: str = "") -> None:
        self._directory = directory
        self._plugins = plugins
        self._inside = tuple({os.path.abspath(directory) + os.sep, os.path.realpath(directory) + os.sep})
        self._on = False
        self.refused: WriteRefused | None = None

    def start(self) -> None:
        """Start to refuse writes."""
        self._on = True
        sys.addaudithook(self._hook)

    def stop(self) -> None:
        self._on = False

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event == "open":
            path, mode, flags = args
            if flags & _WRITE_FLAGS if isinstance(flags, int) else mode and mode != "r":
                self._check(path)
        elif event in _TOUCHING:
            for position in _TOUCHING[event]:
                self._check(args[position])

    def _check(self, path: object) -> None:
        if not isinstance(path, str | bytes):
            return  # a descriptor: its file was checked when it was opened
        name = os.fsdecode(path)
        parent, leaf = os.path.split(os.path.abspath(name))
        for form in (os.path.join(parent, leaf), os.path.join(os.path.realpath(parent), leaf)):
            place = form + os.sep
            if place.startswith(self._inside) and not self._is_let(place):
                self._refuse(name)

    def _is_let(self, place: str) -> bool:
        folder = _let.get()
        return folder is not None and place.startswith(tuple(prefix + folder for prefix in self._inside))

    def _refuse(self, name: str) -> None:
        where = os.path.relpath(os.path.abspath(name), os.path.abspath(self._directory))
        if where.split(os.sep)[0] == "locks":  # lattice's first step of any write
            where = "the project's files"
        if self._plugins:
            refusal = WriteRefused(
                f"'lattice {self._plugins}' is a plugin's and would write {where}, but the files here are a cache "
                f"of the server's; if the server has the plugin too: lattice remote route {self._plugins}"
            )
        else:
            refusal = WriteRefused(
                f"this command writes {name}, but the project's files belong to its remote; "
                "it cannot run here (lattice remote show says where the remote is)"
            )
        self.refused = self.refused or refusal
        raise refusal
