"""Listening socket: admission before TLS, and reports to the service manager.

uvicorn's own listener would start the TLS handshake of every connection first.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import ssl
from collections.abc import Callable
from http import HTTPStatus

from lattice_remote.server.transport.admission import AdmissionControl, ConnectionQuota
from lattice_remote.server.transport.api_error import ApiError

__all__ = ["TLS_TIMEOUT_S", "Acceptor", "ServiceManager"]

TLS_TIMEOUT_S = 10.0
"""Time limit of the TLS handshake."""
_TLS_GOODBYE_S = 0.6
_RETRY_S = 0.2
_UNSENT_BYTES = 128 * 1024
"""Kernel buffer of one connection beyond what it can send, to bound clients that do not read."""
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_NO_ROOM = ApiError(
    HTTPStatus.TOO_MANY_REQUESTS, "REMOTE_BUSY", "too many connections without a token from your address; wait", 1
)


class Acceptor:
    """One listening socket. ``start()`` it; ``close()`` and ``wait_closed()`` are those of an ``asyncio.Server``."""

    def __init__(
        self,
        listener: socket.socket,
        door: AdmissionControl,
        make_protocol: Callable[[ConnectionQuota], asyncio.Protocol],
        context: ssl.SSLContext | None,
    ) -> None:
        self._listener = listener
        self._door = door
        self._make_protocol = make_protocol
        self._context = context
        self._opening: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start accepting."""
        self._listener.setblocking(False)
        self._accepting = asyncio.get_running_loop().create_task(self._accept(), name="accept")

    def close(self) -> None:
        """Stop accepting, and abort the connections in their TLS handshake."""
        for task in (self._accepting, *self._opening):
            if task is not None:
                task.cancel()

    async def wait_closed(self) -> None:
        """Wait until all its tasks have ended."""
        tasks = {task for task in (self._accepting, *self._opening) if task is not None}
        if tasks:
            await asyncio.wait(tasks)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(self._listener)
            except OSError as error:  # an error of this connection, or of all
                if error.errno in _EXHAUSTED:
                    self._door.log(f"cannot accept a connection ({error.strerror}); raise the limit on open files", "?")
                    await asyncio.sleep(_RETRY_S)
                continue
            self._take(connection, address[0])
            await asyncio.sleep(0)  # asyncio's own loop runs no other task while connections wait to be accepted

    def _take(self, connection: socket.socket, host: str) -> None:
        with contextlib.suppress(OSError, AttributeError):  # not every system has it
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        visit = self._door.arrive(host)
        if visit is None:
            self._turn_away(connection)
            return
        task = asyncio.get_running_loop().create_task(self._open(connection, visit))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        visit.cut = lambda: _cancel(task)

    def _turn_away(self, connection: socket.socket) -> None:
        """Close it, with a response if that costs nothing."""
        with contextlib.suppress(OSError):
            if self._context is None:
                connection.send(_NO_ROOM.raw)
        connection.close()

    async def _open(self, connection: socket.socket, visit: ConnectionQuota) -> None:
        """Do the TLS handshake, if any, and give the connection to its protocol."""
        tls = self._context is not None
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: self._make_protocol(visit),
                connection,
                ssl=self._context,
                ssl_handshake_timeout=TLS_TIMEOUT_S if tls else None,
                ssl_shutdown_timeout=_TLS_GOODBYE_S if tls else None,
            )
        except OSError:  # no TLS, or timed out, or gone
            visit.leave()
        except asyncio.CancelledError:
            visit.leave()
            raise


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()


_log = logging.getLogger(__name__)


class ServiceManager:
    """Notifications to a service manager; without an address none are sent."""

    def __init__(self, address: str = "") -> None:
        self._address = address

    @classmethod
    def from_environment(cls) -> "ServiceManager":
        """Return the one that ``NOTIFY_SOCKET`` names, and unset the variable for workers and hooks."""
        return cls(os.environ.pop("NOTIFY_SOCKET", ""))

    def serving(self) -> None:
        """Report that requests are answered from now on."""
        self._tell("READY=1")

    def stopping(self) -> None:
        """Report that the server is stopping."""
        self._tell("STOPPING=1")

    def _tell(self, state: str) -> None:
        if not self._address:
            return
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
                manager.setblocking(False)
                manager.connect(address)
                manager.send(state.encode())
        except OSError as error:
            _log.warning(
                "cannot report %s to the service manager %s: %s", state, self._address, error.strerror or error
            )
