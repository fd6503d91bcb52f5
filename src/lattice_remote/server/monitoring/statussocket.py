"""``status.sock`` in the data directory: whoever may open it is told how the server is, as one JSON document.

Nothing that is sent to it is read, so there is nothing to say wrong. It is its owner's alone (mode 0600), and goes with
the server. One that was killed leaves it behind; the next one takes its place.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from lattice_remote.errors import StorageError

__all__ = ["ask", "listen", "remove", "tell"]

_NAME = "status.sock"
_MAX_PATH_BYTES = 100
"""A socket's path may have 103 bytes on some systems."""
_TIMEOUT_S = 5.0
_PAUSE_S = 1.0
"""Before the next look at who asks, when the system lets nobody in."""
_MAX_BYTES = 64 * 1024 * 1024
_END = b"}"
"""With what a document ends that is whole: it is one object."""

_log = logging.getLogger(__name__)


def listen(directory: Path) -> socket.socket | None:
    """Return the listening socket of a data directory whose lock the caller holds; None where there can be none.

    Call it while nothing else runs in this process: a long path makes it change the current directory for a moment.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o177)
    try:
        with _address(directory) as address:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address)
            listener.bind(address)
        listener.listen(16)
    except OSError as error:  # some file systems have no sockets; the board is served all the same
        listener.close()
        _log.warning("lattice-remote status will know nothing of this server: %s: %s", directory / _NAME, error)
        return None
    finally:
        os.umask(umask)
    listener.setblocking(False)
    return listener


async def tell(listener: socket.socket, document: Callable[[], Awaitable[bytes]]) -> None:
    """Answer whoever connects, one after the other, until this is cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            connection, _ = await loop.sock_accept(listener)
        except OSError:  # no more files can be opened, for now
            await asyncio.sleep(_PAUSE_S)
            continue
        with connection:
            connection.setblocking(False)
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    await loop.sock_sendall(connection, await document())
            except OSError:  # it has left, or does not read
                continue
            except Exception:  # noqa: BLE001 - who asks next may be luckier
                _log.exception("the status could not be told")


def remove(directory: Path) -> None:
    """Take the socket away; whoever asks from now on is told that no server runs."""
    with contextlib.suppress(OSError):
        (directory / _NAME).unlink()


def ask(directory: Path) -> bytes | None:
    """Return what the server of a data directory says; None when none runs.

    One that ends just now is asked once more, which tells whether it has ended.

    Raises:
        StorageError: one is there and does not answer, or may not be asked.
    """
    answer = _answer_of(directory)
    if answer is not None and not answer.endswith(_END):
        answer = _answer_of(directory)
        if answer is not None and not answer.endswith(_END):
            raise StorageError(f"the server on {directory} could not answer; look at its log")
    return answer


def _answer_of(directory: Path) -> bytes | None:
    """Return what it says, perhaps not to its end; None when nobody is there."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, _address(directory) as address:
            connection.settimeout(_TIMEOUT_S)
            connection.connect(address)
            return _all_of(connection)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except ConnectionResetError:
        return b""
    except TimeoutError:
        raise StorageError(f"the server on {directory} does not answer; look at its log") from None
    except OSError as error:
        raise StorageError(f"cannot ask the server through {directory / _NAME}: {error.strerror}") from error


def _all_of(connection: socket.socket) -> bytes:
    received = bytearray()
    while piece := connection.recv(1 << 16):
        received += piece
        if len(received) > _MAX_BYTES:
            raise StorageError("the server's answer has no end; look at its log")
    return bytes(received)


@contextlib.contextmanager
def _address(directory: Path) -> Iterator[str]:
    """Within this, what it yields leads to the socket, however long the directory's path is."""
    path = str(directory.absolute() / _NAME)
    if len(os.fsencode(path)) <= _MAX_PATH_BYTES:
        yield path
    else:
        with contextlib.chdir(directory):
            yield _NAME
