"""Reader process of a project: reads for HTTP, so that they delay neither writes nor the network.

    python -m lattice_remote.server.worker.reader --fd 5 --project-dir DATA/projects/web --slug web

It changes nothing and holds no lock, so it may be killed at any moment. It exits when the server is gone (end of file).
"""

import argparse
import gc
import gzip
import os
import signal
import socket
import sys
from collections.abc import Sequence
from http import HTTPStatus
from itertools import accumulate
from pathlib import Path
from typing import NoReturn

import msgspec
from msgspec import structs

from lattice_remote.server.ipc import ListIndex, Read, ReadCommand, ReadPage, ReadResult, ReceivedFrames, encode_frames
from lattice_remote.server.logging import log_to_stderr
from lattice_remote.server.tree.capture import AccessDenied, Capture
from lattice_remote.server.worker import lists
from lattice_remote.server.worker.calls.dashboard import handler_class
from lattice_remote.server.worker.executor import Executor
from lattice_remote.server.worker.main import code_directories

__all__ = ["NoWrites", "Reads", "laid_out", "main"]


class _Identified(msgspec.Struct, frozen=True):
    id: str = ""


def laid_out(envelope: bytes, place: Sequence[str]) -> tuple[bytes, ListIndex]:
    """Return an envelope whose data is the list at ``place``, put last, and the index of its items.

    Raises:
        Raises ValueError: there is no list.
    """
    try:
        return _laid_out(envelope, place)
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError) as error:
        raise ValueError(f"there is no list at {'.'.join(place)} in the command's output") from error


def _laid_out(envelope: bytes, place: Sequence[str]) -> tuple[bytes, ListIndex]:
    whole = msgspec.json.decode(envelope, type=dict[str, msgspec.Raw])
    listed = whole.pop("data")
    for name in place[1:]:
        listed = msgspec.json.decode(listed, type=dict[str, msgspec.Raw])[name]
    items = msgspec.json.decode(listed, type=list[msgspec.Raw])
    ids = [item.id for item in msgspec.json.decode(listed, type=list[_Identified])]
    head = msgspec.json.encode(whole)[:-1] + b',"data":['
    ends = [end - 1 for end in accumulate((len(bytes(item)) + 1 for item in items), initial=len(head))][1:]
    return b"".join((head, b",".join(items), b"]}")), ListIndex(len(head), ids, ends)


class NoWrites:
    """Pre-image recorder that refuses every change before it is made; see ``tree.capture.PreImages``."""

    def keep_for_append(self, path: str, status: object = None) -> NoReturn:  # noqa: ARG002 - the protocol's signature
        raise AccessDenied("write a file")

    keep_for_rewrite = keep_for_replace = keep_for_move = keep_directory = keep_for_append


class Reads:
    def __init__(self, executor: Executor, capture: Capture, lattice_dir: Path) -> None:
        self._executor = executor
        self._capture = capture
        self._lattice_dir = lattice_dir
        self._tasks = lists.CachedTasks(lattice_dir)
        self._differences = lists.Differences()

    def answer(self, request: Read) -> ReadResult:
        """Return the result of a read; never raises an ``Exception``. A crash or a forbidden access has status 500."""
        try:
            with self._capture.watch():
                return self._command(request) if isinstance(request, ReadCommand) else self._page(request)
        except AccessDenied as veto:
            return ReadResult(500, b"", message=f"the command tried to {veto}, which the server does not allow")

    def _command(self, request: ReadCommand) -> ReadResult:
        outcome = self._executor.run(request.argv, request.path, last_try=True)
        if outcome.failure is not None:
            return ReadResult(500, b"", message=outcome.failure)
        message = outcome.stderr.decode(errors="replace")
        if request.list_at and not outcome.exit_code:
            try:
                body, items = laid_out(outcome.stdout, request.list_at)
            except ValueError as error:
                return ReadResult(500, b"", message=str(error))
            return ReadResult(0, body, message=message, items=items)
        return ReadResult(outcome.exit_code, outcome.stdout, message=message)

    def _page(self, request: ReadPage) -> ReadResult:
        page = handler_class(self._lattice_dir)(request.path, b"")
        if request.path in lists.LISTS:
            page._lattice_dir = self._tasks
            with lists.installed(), self._tasks.at(request.state):
                outcome = self._executor.call(page.get, "dashboard: GET")
        else:
            outcome = self._executor.call(page.get, "dashboard: GET")
        if outcome.failure is not None:
            return ReadResult(500, b"", message=outcome.failure)
        found = ReadResult(page.status, page.wfile.getvalue(), content_type=page.content_type)
        if found.status == HTTPStatus.OK:
            found = self._shortened(request, structs.replace(found, etag=lists.tag_of(found.body)))
        if request.gzip and len(found.body) >= _GZIP_BYTES:
            found = structs.replace(found, body=gzip.compress(found.body, _GZIP_LEVEL, mtime=0), is_gzip=True)
        return found

    def _shortened(self, request: ReadPage, found: ReadResult) -> ReadResult:
        steps = None
        if request.path in lists.LISTS:
            steps = self._differences.since(request.base, request.path, found.etag, found.body)
        if request.base == found.etag:
            return structs.replace(found, status=HTTPStatus.NOT_MODIFIED, body=b"")
        if steps is not None and request.takes_difference:
            return structs.replace(found, status=HTTPStatus.IM_USED, body=steps)
        return found


_GZIP_BYTES, _GZIP_LEVEL = 2048, 4
"""Shorter bodies are not compressed; the level costs 2 ms for each megabyte of a list."""

_decoder: msgspec.msgpack.Decoder[Read] = msgspec.msgpack.Decoder(Read)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lattice-remote-reader")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--project-dir", type=Path, required=True)
    parser.add_argument("--slug", required=True)
    options = parser.parse_args(arguments)
    # The server ends this process; a signal to the whole process group must not.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.dont_write_bytecode = True
    log_to_stderr(f"reader {options.slug}: %(levelname)s %(message)s", {"process": "reader", "project": options.slug})
    connection = socket.socket(fileno=options.fd)
    reads = _prepare(options.project_dir.resolve())
    for request in map(_decoder.decode, ReceivedFrames(connection)):
        found = encode_frames(reads.answer(request))
        try:
            connection.sendall(found)
        except ConnectionError:
            break
    return 0


def _prepare(project: Path) -> Reads:
    code = code_directories(project)
    os.chdir("/")
    os.environ["PATH"] = ""  # lattice must not find git: the server has none of its users' branches
    executor = Executor(project, lazy=False)
    import lattice.dashboard.git_reader
    import lattice.dashboard.server  # before the audit hook, which permits no imports

    # A project on a server is in none of its users' repositories, even if the data directory is in a repository.
    lattice.dashboard.git_reader.git_available = lambda: True  # as on a client's machine; starts no program
    lattice.dashboard.git_reader.find_git_root = lambda *_: None
    lattice_dir = project / ".lattice"
    capture = Capture(str(lattice_dir), str(lattice_dir), NoWrites(), [*code, str(lattice.dashboard.server.STATIC_DIR)])
    gc.collect()
    gc.freeze()
    return Reads(executor, capture, lattice_dir)


if __name__ == "__main__":
    sys.exit(main())
