"""The process that reads one project for whoever speaks HTTP: so that no read holds up a write, or the network.

    python -m lattice_remote.server.worker.reader_process --fd 5 --project-dir DATA/projects/web --slug web

It changes nothing and holds no lock, so it may be ended at any moment. It leaves when the server is gone (end of file).
"""

import argparse
import gc
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from lattice_remote.server.data.loglines import log_to_stderr
from lattice_remote.server.data.read_ipc import Read
from lattice_remote.server.tree.capture import Capture
from lattice_remote.server.worker.confinement import code_directories
from lattice_remote.server.worker.executor import Executor
from lattice_remote.server.worker.reads import NoWrites, Reads

__all__ = ["main"]

_decoder: msgspec.msgpack.Decoder[Read] = msgspec.msgpack.Decoder(Read)


def main(arguments: list[str] | None = None) -> int:
    """Read until the server is gone; return the exit code."""
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
    for asked in _messages(connection):
        found = msgspec.msgpack.encode(reads.answer(asked))
        try:
            connection.sendall(len(found).to_bytes(4) + found)
        except ConnectionError:
            break
    return 0


def _prepare(project: Path) -> Reads:
    code = code_directories(project)
    os.chdir("/")
    os.environ["PATH"] = ""  # lattice finds no git: that of the server knows nothing of its users' branches
    executor = Executor(project, lazy=False)
    import lattice.dashboard.git_reader
    import lattice.dashboard.server  # now: while it is watched nothing new is loaded

    # A project on a server is in no repository of its users; whatever lies around the data directory is not theirs.
    lattice.dashboard.git_reader.git_available = lambda: True  # as where the board is looked at; no program is started
    lattice.dashboard.git_reader.find_git_root = lambda *_: None
    lattice_dir = project / ".lattice"
    capture = Capture(str(lattice_dir), str(lattice_dir), NoWrites(), [*code, str(lattice.dashboard.server.STATIC_DIR)])
    gc.collect()
    gc.freeze()  # what was loaded so far stays: no collection need look at it again
    return Reads(executor, capture, lattice_dir)


def _messages(connection: socket.socket) -> Iterator[Read]:
    """Yield what the server asks, until it is gone."""
    with connection.makefile("rb") as incoming:
        while len(length := incoming.read(4)) == 4:
            yield _decoder.decode(incoming.read(int.from_bytes(length)))


if __name__ == "__main__":
    sys.exit(main())
