"""Dozens of projects on one server: memory, first writes, idle processes that leave and return, fairness between them.

``make load ARGS=projects`` prints the figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

from lattice_remote.server.datadir import DataDir
from lattice_remote.server.tokens import TokenFile
from load_scenarios import BY, server_mib
from request_client import Light
from sandbox import Sandbox, Server, descendants, wait_for

__all__ = ["Busy", "ManyProjects"]

IDLE_S = 20.0
"""Instead of the default of 5 minutes."""
_STATES = ("in_planning", "planned", "in_progress", "review", "in_progress")


@dataclass
class Busy:
    """Mixed work of several clients in each of many projects."""

    requests: list[int] = field(default_factory=list)
    """Of each project."""
    seconds: float = 0.0
    mib: list[float] = field(default_factory=list)
    """Memory of all processes, once a second."""

    @property
    def per_second(self) -> float:
        return sum(self.requests) / self.seconds

    @property
    def least_share(self) -> float:
        """Requests of the slowest project; 1 when all are equal."""
        return min(self.requests) / statistics.mean(self.requests)

    @property
    def growth_mib(self) -> float:
        """Growth of the memory in the second half."""
        half = len(self.mib) // 2
        return statistics.mean(self.mib[-3:]) - statistics.mean(self.mib[half : half + 3])


class ManyProjects:
    """A started server with ``count`` projects that were never opened, and a token for all of them."""

    def __init__(self, sandbox: Sandbox, count: int) -> None:
        self.server: Server = sandbox.server()
        self.slugs = [f"p{number}" for number in range(count)]
        data = DataDir(self.server.data)
        data.create_project(self.slugs[0], code="LAT", name=None, actor=None)
        for slug in self.slugs[1:]:
            shutil.copytree(data.projects / self.slugs[0], data.projects / slug)
        _, self.token = TokenFile(data.tokens).create(projects=self.slugs, actor="human:ana", act_as=["agent:*"])
        (data.path / "config.json").write_text(json.dumps({"idle_seconds": IDLE_S}))
        self.server.start()
        self._host = f"127.0.0.1:{self.server.port}"

    @property
    def processes(self) -> int:
        assert self.server.process is not None
        return 1 + len(descendants(self.server.process.pid))

    @property
    def mib(self) -> float:
        return server_mib(self.server)

    def wait_until_idle(self) -> None:
        wait_for(lambda: self.processes <= 2, "the workers and readers to leave", IDLE_S + 60)

    async def write(self, slug: str) -> float:
        """Create a task on a new connection; return the seconds that its command took."""
        async with Light(self.server.url, self.token, slug=slug) as client:
            began = time.monotonic()
            await client.ok("create", "One", *BY)
            return time.monotonic() - began

    async def read(self, slug: str) -> None:
        """Read the list of tasks over HTTP."""
        incoming, outgoing = await asyncio.open_connection("127.0.0.1", self.server.port)
        with contextlib.closing(outgoing):
            head = f"Host: {self._host}\r\nAuthorization: Bearer {self.token}\r\nConnection: close"
            outgoing.write(f"GET /projects/{slug}/tasks HTTP/1.1\r\n{head}\r\n\r\n".encode())
            answer = await incoming.read()
        assert answer.startswith(b"HTTP/1.1 200"), answer[:500]

    async def first_writes(self, slugs: Sequence[str]) -> float:
        """Write to projects that have no worker, all at once; return the seconds until all are done."""
        began = time.monotonic()
        await asyncio.gather(*map(self.write, slugs))
        return time.monotonic() - began

    async def returns(self, slugs: Sequence[str]) -> list[float]:
        """Return the seconds by which the first write to an idle project takes longer than the next, for each."""
        return [await self.write(slug) - await self.write(slug) for slug in slugs]

    async def work(self, slugs: Sequence[str], clients: int, seconds: float) -> Busy:
        """Have clients in each project read, comment, change and create tasks until the time is over."""
        busy, end = Busy([0] * len(slugs)), time.monotonic() + seconds

        async def one(number: int, client: Light) -> None:
            slug = slugs[number]
            for turn, state in islice(enumerate(cycle(_STATES)), secrets.randbelow(10), None):
                if time.monotonic() > end:
                    return
                match turn % 10:
                    case 0:
                        await client.ok("create", "Another", *BY)
                    case 1 | 2:
                        await self.read(slug)
                    case 3:
                        await client.ok("update", "LAT-1", f"title={state}", *BY)
                    case _:
                        await client.ok("comment", "LAT-1", "some words", *BY)
                busy.requests[number] += 1

        async def look() -> None:
            while time.monotonic() < end:
                busy.mib.append(await asyncio.to_thread(server_mib, self.server))
                await asyncio.sleep(1)

        async with contextlib.AsyncExitStack() as stack:
            connected = [
                (number, await stack.enter_async_context(Light(self.server.url, self.token, slug=slug)))
                for number, slug in enumerate(slugs)
                for _ in range(clients)
            ]
            end, began = time.monotonic() + seconds, time.monotonic()
            await asyncio.gather(look(), *(one(number, client) for number, client in connected))
            busy.seconds = time.monotonic() - began
        return busy

    def errors(self) -> Iterator[str]:
        """Yield the lines of the server's log that report a failure."""
        for line in self.server.log.read_text().splitlines():
            if " ERROR " in line or " WARNING " in line or " CRITICAL " in line:
                yield line
