"""Brings a content from the server in pieces, from wherever it was cut off. Use a link of its own (``Links.bulk``)."""

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator
from typing import Protocol

from lattice_remote.errors import ConnectionFailed, Rejected
from lattice_remote.protocol.effects import Content
from lattice_remote.protocol.messages import Download, Downloaded, Refused, Request, Response

__all__ = ["Asks", "ask_what_it_is", "pieces"]

_PIECE_BYTES = 256 * 1024
_WINDOW = 8
"""Pieces asked for at once: enough to fill a line, little enough for others on it to be served soon."""


class Asks(Protocol):
    """What carries requests: a ``Link``."""

    async def ask(self, frame: Request) -> Response:
        """Send a request and return its answer."""


async def ask_what_it_is(link: Asks, path: str) -> tuple[Content, int]:
    """Return what a file is on the server, and at which number.

    Raises:
        Rejected: REMOTE_NOT_FOUND when there is none.
        ConnectionFailed: the server is out of reach.
    """
    answer = await _ask(link, Download(os.urandom(16).hex(), path, limit=1))
    return (answer.size, answer.digest), answer.seq


async def pieces(link: Asks, path: str, content: Content, offset: int) -> AsyncGenerator[bytes]:
    """Yield a content from ``offset`` to its end, in order. That it has its digest is for the caller to check.

    Raises:
        Rejected: REMOTE_NOT_FOUND when the file has another content by now.
        ConnectionFailed: the server is out of reach; go on later from what has come.
    """
    size, digest = content
    under_way: deque[asyncio.Task[Downloaded]] = deque()
    asked = offset
    try:
        while offset < size:
            while asked < size and len(under_way) < _WINDOW:
                wanted = min(_PIECE_BYTES, size - asked)
                frame = Download(os.urandom(16).hex(), path, digest, asked, wanted)
                under_way.append(asyncio.create_task(_ask(link, frame)))
                asked += wanted
            answer = await under_way.popleft()
            expected = min(_PIECE_BYTES, size - offset)
            if len(answer.data) != expected or (answer.size, answer.digest) != content:
                raise ConnectionFailed(f"the server sent something else than was asked for of {path}")
            offset += expected
            yield answer.data
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


async def _ask(link: Asks, frame: Download) -> Downloaded:
    answer = await link.ask(frame)
    if isinstance(answer, Refused):
        raise Rejected(answer.message, code=answer.code)
    if not isinstance(answer, Downloaded):
        raise ConnectionFailed("the server answered something else")
    return answer
