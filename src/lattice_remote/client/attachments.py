"""Files of the caller in a command line, and their content for the agent. Standard library only.

A small file travels with the request. The agent reads a large one itself, and checks its identity. Content that cannot
be opened twice, such as a pipe, is spooled to a temporary file.
"""

import base64
import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from lattice_remote.client.agent_runtime import temporary_directory
from lattice_remote.errors import Misuse

if TYPE_CHECKING:
    import click  # not needed by the agent, which opens the described files

__all__ = ["INLINE_BYTES", "CallersFiles", "identity"]

INLINE_BYTES = 256 * 1024
"""A larger file does not travel within its command: it would delay others on the connection."""
MAX_SPOOLED_BYTES = 4 * 1024 * 1024 * 1024
"""Most bytes taken from a pipe."""
_READ_BYTES = 1024 * 1024
_PARAMETERS: dict[tuple[str, ...], str] = {("attach",): "source", ("comment",): "file_path"}
"""The parameter with a caller's file, whose content travels with the command."""
_REGULAR_FILE_ONLY = {("attach",)}
"""Commands that accept neither pipes nor directories."""


class CallersFiles:
    """The one file that a request may name. A context manager, which removes a spooled pipe.

    Attributes:
        argv: the command line, in which a file is an argument of its own.
        described: for each file ``index`` in the argv, its ``name``, and its content: ``data`` (base64; None: lattice
            sees no file), or ``path`` and ``identity``.
    """

    def __init__(self, argv: Sequence[str] = ()) -> None:
        self.argv = list(argv)
        self.described: list[dict[str, Any]] = []
        self._spooled: list[str] = []

    @classmethod
    def of_command(
        cls, command: "click.Command", path: tuple[str, ...], ctx: "click.Context", argv: Sequence[str]
    ) -> Self:
        """Return the file of a command line. Raises Misuse."""
        files = cls(argv)
        parameter = _PARAMETERS.get(path)
        source = ctx.params.get(parameter) if parameter else None
        if parameter is not None and isinstance(source, str) and not _is_url(source):
            files.argv, index = _locate(command, parameter, source, files.argv, depth=len(path))
            # A name that is not UTF-8 cannot travel, and need not.
            files.argv[index] = os.fsencode(source).decode(errors="replace")
            files._add(index, source, only_regular=path in _REGULAR_FILE_ONLY)
        return files

    @staticmethod
    def are_named(path: tuple[str, ...], ctx: "click.Context") -> bool:
        return ctx.params.get(_PARAMETERS.get(path, "")) is not None

    @classmethod
    def of_value(cls, source: str | None) -> Self:
        files = cls()
        if source is not None and not _is_url(source):
            files._add(0, source, only_regular=True)
        return files

    def _add(self, index: int, source: str, *, only_regular: bool) -> None:
        name = (os.path.basename(source.rstrip(os.sep)) or "file")[:200]
        try:
            content = self._content(source, only_regular=only_regular)
        except BaseException:
            self.close()
            raise
        self.described.append({"index": index, "name": name, **content})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for path in self._spooled:
            with contextlib.suppress(OSError):
                os.unlink(path)
        self._spooled.clear()

    def _content(self, source: str, *, only_regular: bool) -> dict[str, Any]:
        if only_regular and not os.path.isfile(source):
            return {"data": None}
        try:
            with open(source, "rb") as file:
                data = file.read(INLINE_BYTES + 1)
                if len(data) <= INLINE_BYTES:
                    return {"data": base64.b64encode(data).decode("ascii")}
                status = os.fstat(file.fileno())
                place = os.path.realpath(source)
                if not _is_at(place, status):
                    place, status = self._spool(data, file)
        except FileNotFoundError:
            return {"data": None}
        except OSError as error:
            raise Misuse(f"cannot read {source}: {error.strerror}", code="REMOTE_STORAGE") from error
        return {"path": place, "identity": identity(status)}

    def _spool(self, data: bytes, file: Any) -> tuple[str, os.stat_result]:
        import tempfile

        handle, place = tempfile.mkstemp(prefix="lattice-", dir=temporary_directory())
        self._spooled.append(place)
        size = 0
        with open(handle, "wb") as copy:
            while data:
                size += len(data)
                if size > MAX_SPOOLED_BYTES:
                    raise Misuse(f"more than {MAX_SPOOLED_BYTES >> 30} GiB in a pipe", code="REMOTE_TOO_LARGE")
                copy.write(data)
                data = file.read(_READ_BYTES)
            copy.flush()
            return place, os.fstat(copy.fileno())


def _is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def identity(status: os.stat_result) -> list[int]:
    """Return an identity, which changes when the file is written."""
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]


def _is_at(place: str, status: os.stat_result) -> bool:
    """Return whether this path opens the same file again; often not for descriptors."""
    if not stat.S_ISREG(status.st_mode):
        return False
    try:
        return identity(os.stat(place)) == identity(status)
    except OSError:
        return False


def _locate(
    command: "click.Command", parameter: str, value: str, argv: list[str], *, depth: int
) -> tuple[list[str], int]:
    """Find the argument of ``parameter``: changing it changes both. Splits ``--file=VALUE``."""
    for index in range(depth, len(argv)):
        for parts in _readings(argv[index], value):
            probe = [*argv[depth:index], *parts[:-1], value + "\x01", *argv[index + 1 :]]
            if _parse(command, probe).params.get(parameter) != value:
                return [*argv[:index], *parts, *argv[index + 1 :]], index + len(parts) - 1
    raise Misuse(f"cannot tell which argument is the file {value!r}")


def _readings(argument: str, value: str) -> Iterator[list[str]]:
    if argument == value:
        yield [argument]
    if argument.startswith("--") and argument.endswith("=" + value):
        yield [argument.removesuffix("=" + value), value]


def _parse(command: "click.Command", args: list[str]) -> "click.Context":
    return command.make_context(command.name, args, resilient_parsing=True)
