"""Sends a piece of a file, named by its content: what a client asks for that fetches large files in its own time.

Nothing is remembered from one piece to the next. Who asks for the pieces of one digest gets pieces of one content,
or is told that the file has another by now; whether they make up that digest the client sees in the end.
"""

import asyncio
import os
from pathlib import Path

from lattice_remote.protocol.messages import Download, Downloaded, Refused
from lattice_remote.server.data.datadir import ProjectPaths
from lattice_remote.server.project.history import History

__all__ = ["download"]


async def download(asked: Download, history: History, paths: ProjectPaths) -> Downloaded | Refused:
    """Return the piece that is asked for, as of the head. Reads in a thread."""
    content = history.files.get(asked.path)
    if content is None:
        return Refused(asked.id, "REMOTE_NOT_FOUND", f"there is no file {asked.path!r} in this project")
    size, digest = content
    if asked.digest not in (None, digest):
        return Refused(asked.id, "REMOTE_NOT_FOUND", f"{asked.path!r} has another content by now")
    if asked.offset > size:
        return Refused(asked.id, "REMOTE_PROTOCOL", f"{asked.path!r} has {size} bytes")
    seq, wanted = history.head, min(asked.limit, size - asked.offset)
    try:
        data = await asyncio.to_thread(_read, paths.lattice / asked.path, asked.offset, wanted)
    except OSError as error:
        return Refused(asked.id, "REMOTE_STORAGE", f"the server can't read {asked.path!r}: {error.strerror}")
    if len(data) != wanted:  # somebody is changing it; the change that tells of it is on its way
        return Refused(asked.id, "REMOTE_BUSY", f"{asked.path!r} is changing; try again")
    return Downloaded(asked.id, seq, size, digest, data)


def _read(path: Path, offset: int, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)
