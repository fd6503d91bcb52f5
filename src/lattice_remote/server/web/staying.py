"""Work that is worth something only as long as whoever asked for it waits."""

import asyncio
from collections.abc import Coroutine
from http import HTTPStatus
from typing import Any

from starlette.requests import Request

from lattice_remote.server.network.refusal import Refusal
from lattice_remote.server.web.answers import TurnedAway

__all__ = ["while_there"]


async def while_there[T](request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do work, unless the client leaves before it is done: then it is cancelled. Read the request's body before.

    Raises:
        TurnedAway: the client has left.
    """
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_leaving(request))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return await doing
    finally:
        doing.cancel()
        leaving.cancel()
        await asyncio.wait({doing, leaving})
    raise TurnedAway(Refusal(HTTPStatus.BAD_REQUEST, "REMOTE_PROTOCOL", "the client has left"))


async def _leaving(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
