"""Transfer of a caller's files to the server: small ones within the command, large ones before it.

A large file is read in place, once for its digest and once for the parts that the server lacks. It is never held in
memory.
"""

import base64
import contextlib
import os
import stat
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from lattice_remote.client.attachments import identity
from lattice_remote.client.connection.connection import Connection
from lattice_remote.client.connection.upload import Source, upload
from lattice_remote.errors import ConnectionFailed, Misuse, StorageError
from lattice_remote.protocol.messages import MAX_ARGV, MAX_PAYLOAD_BYTES, Attachment, Call, Refused, Response, Run

__all__ = ["OpenFile", "Unreadable", "call_frame", "opened_files", "run_frame", "send_files"]

_ATTEMPTS = 3
_MIB = 1024 * 1024

ProgressCallback = Callable[[dict[str, Any]], None]


class Unreadable(Exception):
    """A file of the caller cannot be opened here, or is not the same file."""


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A caller's file: its place in the argv, and its content as bytes or source; neither: there is none."""

    index: int
    name: str
    data: bytes | None
    descriptor: int | None


@contextlib.contextmanager
def opened_files(described: list[dict[str, Any]]) -> Iterator[list[OpenFile]]:
    """Open the files described by ``CallersFiles``, and close them afterwards.

    Raises:
        Unreadable: a file is not the one that the caller saw; nothing was sent.
    """
    with contextlib.ExitStack() as stack:
        files: list[OpenFile] = []
        for file in described:
            data, descriptor = None, None
            if file.get("path") is not None:
                descriptor = _open(file["path"], file["identity"])
                stack.callback(os.close, descriptor)
            elif file["data"] is not None:
                data = base64.b64decode(file["data"])
            files.append(OpenFile(file["index"], file["name"].encode(errors="replace").decode(), data, descriptor))
        yield files


def _open(path: str, expected: list[int]) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Unreadable(path) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or identity(status) != expected:
        os.close(descriptor)
        raise Unreadable(path)
    return descriptor


async def send_files(
    files: list[OpenFile],
    bulk: Callable[[], AbstractAsyncContextManager[Connection]],
    run: Callable[[list[Attachment]], Awaitable[Response]],
    report: ProgressCallback,
) -> tuple[Response, list[Source]]:
    """Upload large files, then ``run`` with attachments that refer to them; return the answer and the uploads.

    An upload may be gone when it is needed, because another command with the same file has used it. It is then
    repeated.

    Raises:
        Rejected, ConnectionFailed, StorageError: see ``upload``; nothing was run.
    """
    for attempts_left in reversed(range(_ATTEMPTS)):
        attachments, sources = await _upload_all(files, bulk, report)
        answer = await run(attachments)
        if not (isinstance(answer, Refused) and answer.code == "REMOTE_NOT_UPLOADED" and attempts_left):
            return answer, sources
    raise AssertionError("the last attempt returns")


async def _upload_all(
    files: list[OpenFile], bulk: Callable[[], AbstractAsyncContextManager[Connection]], report: ProgressCallback
) -> tuple[list[Attachment], list[Source]]:
    attachments: list[Attachment] = []
    sources: list[Source] = []
    for file in files:
        if file.descriptor is None:
            attachments.append(Attachment(file.index, file.name, file.data))
            continue
        try:
            source = await Source.of(file.descriptor)
        except OSError as error:
            raise StorageError(f"cannot read {file.name}: {error.strerror}") from error
        async with bulk() as link:
            await _upload(link, source, file.name, report)
        attachments.append(Attachment(file.index, file.name, digest=source.digest, size=source.size))
        sources.append(source)
    return attachments, sources


async def _upload(link: Connection, source: Source, name: str, report: ProgressCallback) -> None:
    there = 0

    def show(have: int, size: int) -> None:
        nonlocal there
        there = have
        report({"what": f"{name[:40]}, MiB sent:", "done": round(have / _MIB, 1), "total": round(size / _MIB, 1)})

    try:
        await upload(link, source, on_progress=show)
    except ConnectionFailed as error:
        kept = f"; the server has {there} of {source.size} bytes of {name}: repeat the command to resume"
        raise ConnectionFailed(error.message + (kept if there else ""), code=error.code) from error


_MAX_NAME_CHARS = 256


def run_frame(request: dict[str, Any]) -> Run:
    """Return the frame for a ``run``.

    Raises:
        Misuse: the command line cannot be sent.
    """
    argv = request["argv"]
    if not 0 < len(argv) <= MAX_ARGV:
        raise Misuse(f"too many arguments: at most {MAX_ARGV}")
    try:
        "\0".join(argv).encode()
    except UnicodeEncodeError:
        raise Misuse("an argument is not valid UTF-8") from None
    return Run(id=request["id"], argv=argv)


def call_frame(request: dict[str, Any]) -> Call:
    """Return the frame for a ``call``.

    Raises:
        Misuse: the values cannot be sent.
    """
    try:
        request["name"].encode()
        payload = request["payload"].encode()
    except UnicodeEncodeError:
        raise Misuse("the request is not valid UTF-8") from None
    if len(payload) > MAX_PAYLOAD_BYTES or len(request["name"]) > _MAX_NAME_CHARS:
        raise Misuse(f"the request is over {MAX_PAYLOAD_BYTES >> 20} MiB", code="REMOTE_TOO_LARGE")
    surface, name = request["surface"], request["name"]
    return Call(id=request["id"], surface=surface, name=name, payload=payload)
