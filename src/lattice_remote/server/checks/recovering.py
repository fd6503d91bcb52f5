"""A project's recovery without a server: a worker opens it, does what it does at every start, and ends."""

import asyncio

import msgspec

from lattice_remote.errors import StorageError
from lattice_remote.server.data.datadir import ProjectPaths
from lattice_remote.server.data.ipc import Ready, Stop, ToServer
from lattice_remote.server.data.settings import Journal
from lattice_remote.server.project.writer import WORKER_COMMAND, Writer

__all__ = ["recover"]

_TIMEOUT_S = 600.0


async def recover(slug: str, paths: ProjectPaths, settings: Journal) -> list[str]:
    """Start a worker, which recovers the project as always, and end it; return its notes.

    Raises:
        StorageError: it can't open the project.
    """
    first: asyncio.Future[ToServer] = asyncio.get_running_loop().create_future()

    def heard(message: ToServer) -> None:
        if not first.done():
            first.set_result(message)

    def ended() -> None:
        if not first.done():
            first.set_exception(StorageError(f"the worker for project {slug} does not start"))

    command = (*WORKER_COMMAND, "--journal", msgspec.json.encode(settings).decode())
    writer = await Writer.start(slug, paths, on_message=heard, on_end=ended, command=command)
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            message = await first
        if not isinstance(message, Ready):
            raise StorageError(f"project {slug}: {getattr(message, 'message', message)}")
        writer.send(Stop())
        await writer.wait(_TIMEOUT_S)
    except TimeoutError:
        raise StorageError(f"the worker for project {slug} takes too long") from None
    finally:
        writer.kill()
        await writer.wait(5.0)
    return message.notes
