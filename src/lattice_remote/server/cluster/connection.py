"""NATS client that leaves a silent server at once, and a guard for cancellations that the library swallows."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from nats.aio.client import Client, Srv
from nats.aio.transport import TcpTransport

__all__ = ["NatsClient", "cancellable"]


class _Transport(TcpTransport):
    """Transport that ends with its last unsent bytes, instead of waiting for a silent server to take them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    async def connect(self, *args: Any, **options: Any) -> None:
        self.close()  # of an attempt that failed after it was connected
        await super().connect(*args, **options)

    async def connect_tls(self, *args: Any, **options: Any) -> None:
        await super().connect_tls(*args, **options)
        # The stream's protocol was made for plain TCP, and would ask for a half-closed connection, with a warning.
        assert self._io_writer is not None, "it is connected"
        cast("Any", self._io_writer.transport.get_protocol())._over_ssl = True

    def close(self) -> None:
        if self._io_writer is not None:
            self._io_writer.transport.abort()

    def __bool__(self) -> bool:
        return True  # else the client makes its own


class NatsClient(Client):
    """The client over this transport; for ``nats://`` and ``tls://`` only."""

    async def _connect_to_server(self, s: Srv) -> None:
        if self._transport is None:
            self._transport = _Transport()
        await super()._connect_to_server(s)


@contextmanager
def cancellable() -> Iterator[None]:
    """Raise CancelledError if the task was cancelled inside, also where the library hides that.

    The library swallows a cancellation while it flushes, and turns one into ConnectionClosedError while it closes.
    """
    task = asyncio.current_task()
    assert task is not None, "a coroutine of the cluster runs in a task"
    before = task.cancelling()
    try:
        yield
    except Exception as error:
        if task.cancelling() > before:
            raise asyncio.CancelledError from error
        raise
    if task.cancelling() > before:
        raise asyncio.CancelledError
