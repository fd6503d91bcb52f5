"""A node that owns a project, in this process or as its own, and a node that forwards its clients' requests to it."""

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
from harness import FAKE_WORKER

from lattice_remote.protocol.messages import Bye, Change, Refused, Reply, decode_server_frame
from lattice_remote.server.cluster.forward import Forwarder
from lattice_remote.server.cluster.peer_access import PeerAccess, Reached
from lattice_remote.server.cluster.peer_copy import copy_from
from lattice_remote.server.cluster.peer_server import PeerServer
from lattice_remote.server.datadir import DataDir, ProjectPaths
from lattice_remote.server.ipc import Edit, PathState, Ready, RunCall, RunCommand
from lattice_remote.server.project.order import EmbeddedOrder, Order
from lattice_remote.server.project.project import Project
from lattice_remote.server.project.queue import QueueLimits
from lattice_remote.server.registry import ProjectRegistry
from lattice_remote.server.server import bind, make_server
from lattice_remote.server.transport.api_error import ApiError
from lattice_remote.server.transport.websocket import payload_of

SECRET = b"s" * 32


class Requester:
    """A requester that keeps its answers in order."""

    def __init__(self, name: str = "client") -> None:
        self.fairness_key = name
        self.answers: dict[str, Reply | Refused] = {}
        self.byes: list[Bye] = []

    def answer(self, request_id: str, reply: bytes) -> None:
        frame = decode_server_frame(reply)
        assert isinstance(frame, Reply | Refused)
        assert request_id not in self.answers, "every request is answered once"
        self.answers[request_id] = frame

    def end(self, bye: Bye) -> None:
        self.byes.append(bye)


def command(*argv: str, holder: str = "t") -> RunCommand:
    return RunCommand(secrets.token_hex(16), list(argv), [], holder, "human:ana", [])


def serve_cluster(registry: ProjectRegistry, *, secret: bytes = SECRET) -> set[str]:
    """Have a server serve other nodes; return the projects that it owns, which the caller may change."""
    owned = {"web"}

    def project(slug: str) -> Project | None:
        return registry.project(slug) if registry.data.has_project(slug) else None

    registry.cluster = OwningNode(PeerServer(PeerAccess("a", secret), project, owned.__contains__, lambda _: Reached()))
    return owned


class OwningNode:
    """A node that serves others, and orders the changes of its projects alone."""

    def __init__(self, peers: PeerServer) -> None:
        self.admit = peers.admit

    def refusal_of(self, slug: str) -> ApiError | None:
        del slug
        return None

    def order_of(self, slug: str) -> Order:
        del slug
        return EmbeddedOrder()


class Follower:
    """A node's project whose history follows another's, at the test's pace, and its forwarder."""

    def __init__(self, root: Path, *, bounds: QueueLimits | None = None, patience_s: float = 60.0) -> None:
        (root / "journal").mkdir(parents=True)
        (root / ".lattice").mkdir()
        self.project = Project("web", ProjectPaths(root), hooks=None, bounds=bounds)
        self.forwarder = Forwarder(self.project, PeerAccess("b", SECRET), patience_s=patience_s)
        self._waiting: list[bytes] = []
        self.is_held = False

    def follow(self, owner: Project) -> None:
        """Follow the project of a node in this process, from its head on."""
        history = owner.history
        files = [PathState(path, size, digest) for path, (size, digest) in history.files.items()]
        self.begin(Ready(history.epoch, history.head, history.mark, history.oldest, "fake", files))
        history.join(self)

    def begin(self, ready: Ready) -> None:
        self.project.history.begin(ready, "test")

    def change_committed(self, seq: int, frame: bytes) -> None:
        del seq
        self._waiting.append(payload_of(frame))
        if not self.is_held:
            self.catch_up()

    def end(self, bye: Bye) -> None: ...

    def catch_up(self) -> None:
        while self._waiting:
            data = self._waiting.pop(0)
            change = msgspec.msgpack.decode(data, type=Change)
            self.project.history.publish(change.seq, change.mark, data, [], oldest=0)

    async def run(self, message: RunCommand | RunCall | Edit, requester: Requester) -> Reply | Refused:
        self.forwarder.submit(message, requester)
        async with asyncio.timeout(60):
            while message.id not in requester.answers:  # noqa: ASYNC110 - answers come without an event
                await asyncio.sleep(0.005)
        return requester.answers[message.id]


class OwnerProcess:
    """A separate server that owns the project ``web``, with the tests' worker."""

    def __init__(self, data: DataDir, port: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--data", data.path, "--port", str(port)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().removeprefix("Listening on ").strip()
        assert self.url.startswith("http"), self.url
        self.port = int(self.url.rsplit(":", 1)[1])

    def epoch(self, token: str) -> str:
        """Return the project's epoch, once it is open."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            while True:
                connection.request("GET", "/projects/web", headers={"Authorization": f"Bearer {token}"})
                if epoch := json.loads(connection.getresponse().read())["epoch"]:
                    return str(epoch)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()


class CopyProcess:
    """A process that copies the project ``web`` from another node."""

    def __init__(self, url: str, data: DataDir) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--data", data.path, "--copy-from", url],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )

    def __enter__(self) -> "CopyProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)


@contextlib.contextmanager
def owner_process(data: DataDir, port: int = 0) -> Iterator[OwnerProcess]:
    owner = OwnerProcess(data, port)
    try:
        yield owner
    finally:
        owner.kill()


@contextlib.asynccontextmanager
async def following(root: Path, **options: object) -> AsyncIterator[Follower]:
    follower = Follower(root, **options)  # type: ignore[arg-type] # its options
    try:
        yield follower
    finally:
        await follower.forwarder.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    parser.add_argument("--port", type=int)
    parser.add_argument("--copy-from")
    options = parser.parse_args()
    if options.copy_from:
        paths = DataDir(options.data).project("web")
        asyncio.run(copy_from(options.copy_from, "web", paths, PeerAccess("b", SECRET)))
        return

    async def serve() -> None:
        registry = ProjectRegistry(DataDir(options.data), worker_command=FAKE_WORKER)
        registry.start()
        serve_cluster(registry)
        await make_server(registry).serve(sockets=[bind("127.0.0.1", options.port)])

    asyncio.run(serve())


if __name__ == "__main__":
    main()
