"""Directory of a cluster, in the engine: its projects, the reports of its nodes, and the wishes of administrators."""

import secrets
import time
from collections.abc import Mapping
from typing import Literal, NamedTuple

import msgspec

from lattice_remote.server.cluster.engine import Bucket, BucketEntry, Engine

__all__ = ["ClusterDirectory", "DirectoryContent", "NodeReport", "ProjectEntry", "ProjectReport", "Wish"]

_BUCKET = "lattice-directory"
_SILENT_S = 5.0
_FORGOTTEN_S = 24 * 3600.0


class ProjectEntry(msgspec.Struct, frozen=True):
    """A project of the cluster; ``epoch`` names its stream."""

    epoch: str


class ProjectReport(msgspec.Struct, frozen=True):
    """A project on a node.

    Attributes:
        seq: the stream's last message in the node's files.
        head: the last change there.
        is_owner, term: whether the node owns it, and the last known owner's term.
        in_doubt: appends, since the start, whose answer was late or missing.
        problem: one line; "" for none.
    """

    seq: int
    head: int
    is_owner: bool
    term: int
    in_doubt: int = 0
    problem: str = ""


class NodeReport(msgspec.Struct, frozen=True):
    """A node's own report; ``at`` is in seconds since the epoch."""

    name: str
    url: str
    version: str
    at: float
    projects: dict[str, ProjectReport] = {}

    @property
    def is_silent(self) -> bool:
        return time.time() - self.at > _SILENT_S


class Wish(msgspec.Struct, frozen=True):
    """An administrator's wish for a project: that ``node`` owns it, or begins a new epoch with its files."""

    action: Literal["move", "rebuild"]
    node: str


class DirectoryContent(NamedTuple):
    """The directory at about one moment: projects, nodes seen within a day, and wishes for projects."""

    projects: dict[str, ProjectEntry]
    nodes: dict[str, NodeReport]
    wishes: dict[str, Wish]


class ClusterDirectory:
    """The directory. All methods raise EngineUnavailable."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    @classmethod
    async def open(cls, engine: Engine) -> "ClusterDirectory":
        return cls(await engine.kv(_BUCKET))

    async def secret(self) -> bytes:
        """Return the secret of all nodes, made once."""
        found = await self._bucket.get("secret")
        if found is None:
            await self._bucket.create("secret", secrets.token_bytes(32))
            found = await self._bucket.get("secret")
        assert found is not None, "it is never removed"
        return found.value

    async def read(self) -> DirectoryContent:
        entries = await self._bucket.entries()
        nodes = _of_kind(entries, "node", NodeReport)
        recent = {name: node for name, node in nodes.items() if time.time() - node.at < _FORGOTTEN_S}
        return DirectoryContent(_of_kind(entries, "project", ProjectEntry), recent, _of_kind(entries, "wish", Wish))

    async def projects(self) -> dict[str, ProjectEntry]:
        return (await self.read()).projects

    async def add_project(self, slug: str, entry: ProjectEntry) -> bool:
        """Add a project; return False if there is one of this name."""
        return await self._bucket.create(f"project.{slug}", msgspec.json.encode(entry)) is not None

    async def set_project(self, slug: str, entry: ProjectEntry) -> None:
        await self._bucket.put(f"project.{slug}", msgspec.json.encode(entry))

    async def remove_project(self, slug: str) -> None:
        await self._bucket.delete(f"project.{slug}")

    async def nodes(self) -> dict[str, NodeReport]:
        return (await self.read()).nodes

    async def report(self, report: NodeReport) -> None:
        await self._bucket.put(f"node.{report.name}", msgspec.json.encode(report))

    async def remove_node(self, name: str) -> None:
        await self._bucket.delete(f"node.{name}")

    async def wish(self, slug: str, wish: Wish) -> None:
        await self._bucket.put(f"wish.{slug}", msgspec.json.encode(wish))

    async def fulfilled(self, slug: str) -> None:
        await self._bucket.delete(f"wish.{slug}")


def _of_kind[T](entries: Mapping[str, BucketEntry], kind: str, type_: type[T]) -> dict[str, T]:
    prefix = f"{kind}."
    return {
        key.removeprefix(prefix): msgspec.json.decode(entry.value, type=type_)
        for key, entry in entries.items()
        if key.startswith(prefix)
    }
