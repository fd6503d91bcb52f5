"""Plans and notes as they are at the head: for those who want the very bytes, and know nothing of the tree."""

import asyncio
import os
from pathlib import Path

from lattice_remote.errors import Rejected, StorageError
from lattice_remote.protocol.operations import digest_of
from lattice_remote.server.network.response_budget import ResponseShare
from lattice_remote.server.project.project import Project

__all__ = ["text_at_head"]

_SETTLE_S = 5.0
_LOOK_AGAIN_S = 0.02
_MAX_BYTES = 64 * 1024 * 1024
"""No client may send a text as large as this; somebody at the server may have put it there."""


async def text_at_head(project: Project, path: str, share: ResponseShare) -> bytes | None:
    """Return the content of a plan or notes; None when there is none. Belongs to the event loop's thread.

    It is counted as a part of the response that has this ``share``.

    The disk is ahead of the head by what is being written: what was read counts once it is what the head says.

    Raises:
        Rejected: REMOTE_TOO_LARGE, over 64 MiB; REMOTE_BUSY, the token has too many answers outstanding.
        StorageError: it can't be read, or was different from the head's for seconds.
    """
    try:
        async with share.making(), asyncio.timeout(_SETTLE_S):
            text = await _settled(project, path)
            share.hold(text or b"")
            return text
    except TimeoutError:
        raise StorageError(f"{path} is changing all the time; try again") from None
    except OSError as error:
        raise StorageError(f"the server can't read {path}: {error.strerror}") from error


async def _settled(project: Project, path: str) -> bytes | None:
    while (content := project.history.files.get(path)) is not None:
        if content[0] > _MAX_BYTES:
            raise Rejected(f"{path} has {content[0]} bytes, too many to be sent at once", code="REMOTE_TOO_LARGE")
        data = await asyncio.to_thread(_read, project.paths.lattice / path, content[0])
        if data is not None and digest_of(data) == content[1]:
            return data
        if project.history.files.get(path) == content:
            project.files_touched({path})  # perhaps somebody has edited it here
            await asyncio.sleep(_LOOK_AGAIN_S)
    return None


def _read(path: Path, size: int) -> bytes | None:
    """Return a plain file's content, or one byte more than ``size`` when it is longer; None when there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read(size + 1)
