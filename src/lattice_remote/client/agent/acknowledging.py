"""Tells the server how far the files of one cache are: for its status and its figures, nothing hangs on it.

At once after a quiet second, then at most once a second, however many changes come.
"""

import asyncio
import time

from lattice_remote.client.cache.follower import Follower
from lattice_remote.client.link.link import Link
from lattice_remote.protocol.messages import Applied, Welcome

__all__ = ["Acknowledging"]

_INTERVAL_S = 1.0


class Acknowledging:
    """``run()`` it as long as the cache is followed."""

    def __init__(self, follower: Follower, link: Link) -> None:
        self._follower = follower
        self._link = link
        self._told: tuple[Welcome | None, int] = (None, 0)

    async def run(self) -> None:
        """Tell, whenever the files have got further."""
        while True:
            await self._follower.advanced.wait()
            self._follower.advanced.clear()
            await self._tell()
            await asyncio.sleep(_INTERVAL_S)

    async def _tell(self) -> None:
        reached = (self._link.welcome, self._follower.state.position.seq)
        if reached[0] is not None and reached != self._told:
            self._told = reached
            since = self._follower.advanced_at
            await self._link.send(Applied(reached[1], None if since is None else time.monotonic() - since))
