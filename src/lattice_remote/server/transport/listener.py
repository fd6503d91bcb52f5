"""Listening socket: TLS certificate, admission before the handshake, reports to the service manager.

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
from functools import partial
from http import HTTPStatus
from pathlib import Path

from lattice_remote.errors import Misuse
from lattice_remote.files import signature_of
from lattice_remote.server.transport.admission import AdmissionControl, ConnectionQuota
from lattice_remote.server.transport.api_error import ApiError

__all__ = ["TLS_TIMEOUT_S", "Acceptor", "Certificate", "notify", "service_manager"]

_log = logging.getLogger(__name__)


class _Encrypted(Exception): ...


class Certificate:
    """A certificate, its key, and their TLS context: TLS 1.2 or newer.

    Raises Misuse if a file is unreadable, any user can read the key, it has a password, or they do not match.
    """

    def __init__(self, cert: Path, key: Path) -> None:
        self._cert, self._key = cert, key
        self._signature = self._stat()
        self.context = self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))

    def refresh(self) -> None:
        """Use changed files for new connections; log why if they are unusable.

        A pair that does not match, half renewed, is tried again at the next call.
        """
        try:
            signature = self._stat()
            if signature == self._signature:
                return
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # a mismatched pair would leave the context unusable
            self._load(self.context)
        except Misuse as error:
            _log.warning("keeping the previous certificate: %s", error.message)
            return
        self._signature = signature
        _log.info("reloaded the certificate %s", self._cert)

    def _load(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self._cert, self._key, password=_no_password)
        except _Encrypted:
            raise Misuse(f"the key {self._key} has a password; store it without, readable by its owner alone") from None
        except ssl.SSLError as error:
            raise Misuse(_reason(error, self._cert, self._key)) from error
        except OSError as error:  # it existed a moment ago
            raise Misuse(f"cannot read {self._cert} or {self._key}: {error.strerror}") from error
        return context

    def _stat(self) -> tuple[int, ...]:
        """Return the signature of both files. Raises Misuse."""
        numbers: list[int] = []
        for path in (self._cert, self._key):
            try:
                with path.open("rb") as file:
                    status = os.fstat(file.fileno())
            except OSError as error:
                raise Misuse(f"cannot read {path}: {error.strerror}") from error
            numbers += signature_of(status)
        if status.st_mode & 0o007:
            raise Misuse(f"the key {self._key} can be read by any user on this machine; run: chmod o= {self._key}")
        return tuple(numbers)


def _no_password() -> str:
    raise _Encrypted


def _reason(error: ssl.SSLError, cert: Path, key: Path) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"the key {key} is not that of the certificate {cert}; name a matching pair"
    return f"cannot use {cert} with {key}: both must be PEM files, the certificate first ({error.reason or error})"


TLS_TIMEOUT_S = 10.0
_TLS_GOODBYE_S = 0.6
_RETRY_S = 0.2
_UNSENT_BYTES = 128 * 1024
"""Kernel buffer of one connection beyond what it can send, to bound clients that do not read."""
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_NO_ROOM = ApiError(
    HTTPStatus.TOO_MANY_REQUESTS, "REMOTE_BUSY", "too many connections without a token from your address; wait", 1
)


class Acceptor:
    def __init__(
        self,
        listener: socket.socket,
        admission: AdmissionControl,
        make_protocol: Callable[[ConnectionQuota], asyncio.Protocol],
        context: ssl.SSLContext | None,
    ) -> None:
        self._listener = listener
        self._admission = admission
        self._make_protocol = make_protocol
        self._context = context
        self._opening: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._listener.setblocking(False)
        self._accepting = asyncio.get_running_loop().create_task(self._accept(), name="accept")

    def close(self) -> None:
        for task in (self._accepting, *self._opening):
            if task is not None:
                task.cancel()

    async def wait_closed(self) -> None:
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
                    self._admission.log(
                        f"cannot accept a connection ({error.strerror}); raise the limit on open files", "?"
                    )
                    await asyncio.sleep(_RETRY_S)
                continue
            self._take(connection, address[0])
            await asyncio.sleep(0)  # asyncio's own loop runs no other task while connections wait to be accepted

    def _take(self, connection: socket.socket, host: str) -> None:
        with contextlib.suppress(OSError, AttributeError):  # not every system has it
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        quota = self._admission.arrive(host)
        if quota is None:
            with contextlib.suppress(OSError):
                if self._context is None:  # with TLS a response would cost a handshake
                    connection.send(_NO_ROOM.raw)
            connection.close()
            return
        task = asyncio.get_running_loop().create_task(self._open(connection, quota))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        quota.cut = task.cancel

    async def _open(self, connection: socket.socket, quota: ConnectionQuota) -> None:
        tls = self._context is not None
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: self._make_protocol(quota),
                connection,
                ssl=self._context,
                ssl_handshake_timeout=TLS_TIMEOUT_S if tls else None,
                ssl_shutdown_timeout=_TLS_GOODBYE_S if tls else None,
            )
        except OSError:  # no TLS, or timed out, or gone
            quota.leave()
        except asyncio.CancelledError:
            quota.leave()
            raise


def service_manager() -> Callable[[str], None]:
    """Return a function that reports to the service manager in ``NOTIFY_SOCKET``, which it unsets."""
    return partial(notify, os.environ.pop("NOTIFY_SOCKET", ""))


def notify(address: str, state: str) -> None:
    """Report ``READY=1`` or ``STOPPING=1``; only log a failure."""
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.setblocking(False)
            manager.connect(f"\0{address[1:]}" if address.startswith("@") else address)
            manager.send(state.encode())
    except OSError as error:
        _log.warning("cannot report %s to the service manager %s: %s", state, address, error.strerror or error)
