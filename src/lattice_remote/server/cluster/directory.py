"""Directory of a cluster, in the engine: its projects, the reports of its nodes, and the wishes of administrators.

The catalogue of the projects is one value. A project is created, renamed, archived or deleted by one write of it, so
a crash leaves the old state or the new one, and two nodes never give one name to two projects.
"""

import hashlib
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import msgspec

from lattice_remote.errors import Misuse
from lattice_remote.server.cluster.engine import Bucket, BucketEntry, Engine

__all__ = [
    "Catalogue",
    "ClusterDirectory",
    "DirectoryContent",
    "NodeReport",
    "ProjectEntry",
    "ProjectReport",
    "Wish",
    "identity_of",
]

_BUCKET = "lattice-directory"
_CATALOGUE = "catalogue"
_SILENT_S = 5.0
_FORGOTTEN_S = 24 * 3600.0


class ProjectEntry(msgspec.Struct, frozen=True):
    """A project of the cluster.

    Attributes:
        id: never changes; each node has it beside its journal.
        epoch, stream: name the stream of its changes. ``stream`` is the project's name at the start of the epoch.
        is_archived: no node serves it.
    """

    id: str
    epoch: str
    stream: str
    is_archived: bool = False


class Catalogue(msgspec.Struct, frozen=True):
    """All projects.

    Attributes:
        projects: by name.
        renamed: current names by former ones.
        deleted: last names of deleted projects by id, for nodes that were away.
    """

    projects: dict[str, ProjectEntry] = {}
    renamed: dict[str, str] = {}
    deleted: dict[str, str] = {}

    def require(self, slug: str) -> ProjectEntry:
        """Return a project. Raises Misuse if there is none."""
        if slug not in self.projects:
            names = ", ".join(sorted(self.projects)) or "none"
            raise Misuse(f"the cluster has no project {slug!r}; it has: {names}")
        return self.projects[slug]

    def name_of(self, id_: str) -> str | None:
        return next((slug for slug, entry in self.projects.items() if entry.id == id_), None)

    def with_entry(self, slug: str, entry: ProjectEntry) -> "Catalogue":
        return msgspec.structs.replace(self, projects={**self.projects, slug: entry})


class ProjectReport(msgspec.Struct, frozen=True):
    """A project on a node.

    Attributes:
        seq: the stream's last message in the node's files.
        head: the last change there.
        is_owner, term: whether the node owns it, and the last known owner's term.
        in_doubt: appends, since the start, whose answer was late or missing.
        problem: one line; "" for none.
        epoch: of the project there.
        has_lost_order: the node has seen another stream of this epoch than there is now, or more of it.
    """

    seq: int
    head: int
    is_owner: bool
    term: int
    in_doubt: int = 0
    problem: str = ""
    epoch: str = ""
    has_lost_order: bool = False


class NodeReport(msgspec.Struct, frozen=True):
    """A node's own report; ``at`` is in seconds since the epoch, ``directory`` the identity of its data directory."""

    name: str
    url: str
    version: str
    at: float
    projects: dict[str, ProjectReport] = {}
    directory: str = ""

    @property
    def is_silent(self) -> bool:
        return time.time() - self.at > _SILENT_S


class Wish(msgspec.Struct, frozen=True):
    """An administrator's wish for a project: that ``node`` owns it, or begins a new epoch with its files."""

    action: Literal["move", "rebuild"]
    node: str


class DirectoryContent(NamedTuple):
    """The directory at about one moment: projects, nodes seen within a day, and wishes for projects.

    ``revision`` is the catalogue's, 0 if there is none.
    """

    catalogue: Catalogue
    revision: int
    nodes: dict[str, NodeReport]
    wishes: dict[str, Wish]


class ClusterDirectory:
    """The directory. All methods raise EngineUnavailable."""

    def __init__(self, bucket: Bucket, max_bytes: int) -> None:
        self._bucket = bucket
        self._max_bytes = max_bytes

    @classmethod
    async def open(cls, engine: Engine) -> "ClusterDirectory":
        return cls(await engine.kv(_BUCKET), engine.max_message_bytes)

    async def secret(self) -> bytes:
        """Return the secret of all nodes, made once."""
        while (found := await self._bucket.get("secret")) is None:
            # Refused while that of another node is on its way: then it is not there yet.
            await self._bucket.create("secret", secrets.token_bytes(32))
        return found.value

    async def require_member(self, cluster: str) -> None:
        """Raise Misuse if a data directory belongs to another cluster, by the identity in its settings, if any."""
        if cluster not in ("", identity_of(await self.secret())):
            raise Misuse(
                "this data directory belongs to another cluster than these NATS servers have, or they have lost it; to "
                "take its projects out: lattice-remote cluster leave"
            )

    async def servers(self) -> dict[str, bool]:
        """Return the names of the servers with a copy of the directory, and whether they are up."""
        return await self._bucket.servers()

    async def read(self) -> DirectoryContent:
        entries = await self._bucket.entries()
        nodes = _of_kind(entries, "node", NodeReport)
        recent = {name: node for name, node in nodes.items() if time.time() - node.at < _FORGOTTEN_S}
        entry = entries.get(_CATALOGUE)
        revision = entry.revision if entry is not None else 0
        return DirectoryContent(_catalogue_in(entry), revision, recent, _of_kind(entries, "wish", Wish))

    async def catalogue(self) -> Catalogue:
        return _catalogue_in(await self._bucket.get(_CATALOGUE))

    async def change(self, edit: Callable[[Catalogue], Catalogue]) -> Catalogue:
        """Replace the catalogue by ``edit`` of it, which may be called again; return the new one.

        After EngineUnavailable it is unknown whether it was replaced. Raises Misuse if it is too large for the engine.
        """
        while True:
            entry = await self._bucket.get(_CATALOGUE)
            before = _catalogue_in(entry)
            after = edit(before)
            if after == before:
                return before
            content = msgspec.json.encode(after)
            if len(content) > self._max_bytes:
                raise Misuse("the cluster has too many projects for one message of its engine; nothing was changed")
            if entry is None:
                revision = await self._bucket.create(_CATALOGUE, content)
            else:
                revision = await self._bucket.update(_CATALOGUE, content, entry.revision)
            if revision is not None:
                return after

    async def nodes(self) -> dict[str, NodeReport]:
        return (await self.read()).nodes

    async def report(self, report: NodeReport) -> None:
        await self._bucket.put(f"node.{report.name}", msgspec.json.encode(report))

    async def clock_difference(self, report: NodeReport) -> float:
        """Return by how many seconds the engine's clock is ahead of that of the node that has stored this report."""
        return await self._bucket.changed_at(f"node.{report.name}") - report.at

    async def remove_node(self, name: str) -> None:
        await self._bucket.delete(f"node.{name}")

    async def wish(self, slug: str, wish: Wish) -> None:
        await self._bucket.put(f"wish.{slug}", msgspec.json.encode(wish))

    async def fulfilled(self, slug: str) -> None:
        await self._bucket.delete(f"wish.{slug}")


def identity_of(secret: bytes) -> str:
    """Return a name of the cluster that does not reveal its secret."""
    return hashlib.sha256(b"lattice-remote cluster " + secret).hexdigest()[:16]


def _catalogue_in(entry: BucketEntry | None) -> Catalogue:
    return Catalogue() if entry is None else msgspec.json.decode(entry.value, type=Catalogue)


def _of_kind[T](entries: Mapping[str, BucketEntry], kind: str, type_: type[T]) -> dict[str, T]:
    prefix = f"{kind}."
    return {
        key.removeprefix(prefix): msgspec.json.decode(entry.value, type=type_)
        for key, entry in entries.items()
        if key.startswith(prefix)
    }
