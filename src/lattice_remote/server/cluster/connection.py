"""NATS client that leaves a server that is silent at once, as this library's own does not."""

from typing import Any

from nats.aio.client import Client, Srv
from nats.aio.transport import TcpTransport

__all__ = ["Connection"]


class _Transport(TcpTransport):
    """Transport that ends with its last unsent bytes, instead of waiting for a silent server to take them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    async def connect(self, *args: Any, **options: Any) -> None:
        self.close()  # of an attempt that failed after it was connected
        await super().connect(*args, **options)

    def close(self) -> None:
        if self._io_writer is not None:
            self._io_writer.transport.abort()

    def __bool__(self) -> bool:
        return True  # else the client makes its own


class Connection(Client):
    """The client over this transport; for ``nats://`` and ``tls://`` only."""

    async def _connect_to_server(self, s: Srv) -> None:
        if self._transport is None:
            self._transport = _Transport()
        await super()._connect_to_server(s)
