"""This server as a node of a cluster: the members of its projects, its reports, and the wishes of administrators.

A project enters the cluster, with its epoch and numbers, when a node that has it starts. From then on every node has
it.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Protocol, Self

import lattice_remote
from lattice_remote.errors import Misuse, RemoteError
from lattice_remote.server.cluster.directory import (
    ClusterDirectory,
    DirectoryContent,
    NodeReport,
    ProjectEntry,
    ProjectReport,
    Wish,
)
from lattice_remote.server.cluster.engine import Engine, EngineUnavailable
from lattice_remote.server.cluster.lease import Lease
from lattice_remote.server.cluster.member import Cursor, Member, NodeIdentity, load_cursors, save_cursor
from lattice_remote.server.cluster.order import JetStreamOrder
from lattice_remote.server.cluster.peer_access import PeerAccess
from lattice_remote.server.cluster.peer_copy import copy_from, finish_copies
from lattice_remote.server.cluster.peer_server import PeerServer
from lattice_remote.server.cluster.settings import ClusterSettings
from lattice_remote.server.cluster.shared_state import SharedState, connect
from lattice_remote.server.datadir import DataDir
from lattice_remote.server.journal.segment import next_number
from lattice_remote.server.project.child_process import Template
from lattice_remote.server.project.order import Order
from lattice_remote.server.project.project import Project
from lattice_remote.server.transport.api_error import ApiError
from lattice_remote.server.transport.websocket import Handoff, Request

__all__ = ["Node"]

_STEP_S = 1.0
_STOP_S = 10.0

_log = logging.getLogger(__name__)


class Projects(Protocol):
    """The projects of this server: ``registry.ProjectRegistry``."""

    template: Template

    @property
    def projects(self) -> Mapping[str, Project]: ...

    def project(self, slug: str) -> Project: ...

    async def release(self, slug: str, why: str) -> None: ...


class Node:
    """A node; ``start()``, then ``run()`` with the registry whose ``cluster`` it is, then ``close()``.

    Args:
        data: of this server.
        engine, directory, shared, access, identity: of the cluster and this node.
    """

    def __init__(
        self,
        data: DataDir,
        engine: Engine,
        *,
        directory: ClusterDirectory,
        shared: SharedState,
        access: PeerAccess,
        identity: NodeIdentity,
    ) -> None:
        self._shared = shared
        self._data = data
        self._directory = directory
        self._engine = engine
        self._access = access
        self._identity = identity
        self._lease = Lease(engine)
        self._entries: dict[str, ProjectEntry] = {}
        self._members: dict[str, Member] = {}
        self._opening: dict[str, asyncio.Task[None]] = {}
        self._refused: dict[str, str] = {}  # local projects that cannot enter the cluster, with the logged reason
        self._nodes: Mapping[str, NodeReport] = {}
        self._registry: Projects | None = None
        self._peers = PeerServer(access, self._project, self._is_owner)

    @classmethod
    async def join(cls, data: DataDir, settings: ClusterSettings) -> Self:
        """Connect to the cluster's engine.

        Raises:
            Misuse: a setting is unusable, or the engine may lose acknowledged changes in a power cut.
            EngineUnavailable: no server of the engine answers.
        """
        settings.check()
        engine = await connect(settings)
        try:
            for warning in await engine.check_durability(settings.monitors):
                _log.warning("%s", warning)
            directory, shared = await ClusterDirectory.open(engine), await SharedState.open(engine)
            authorities = Path(settings.ca) if settings.ca else None
            access = PeerAccess(settings.node, await directory.secret(), authorities=authorities)
        except BaseException:
            await engine.close()
            raise
        identity = NodeIdentity(settings.node, settings.advertise)
        return cls(data, engine, directory=directory, shared=shared, access=access, identity=identity)

    @property
    def registry(self) -> Projects:
        assert self._registry is not None, "start() comes first"
        return self._registry

    # --- what the registry asks ---

    def admit(self, connection: Handoff, request: Request) -> Callable[[], Awaitable[None]] | ApiError:
        return self._peers.admit(connection, request)

    def order_of(self, slug: str) -> Order:
        member = Member(
            slug,
            self._data.project(slug),
            epoch=self._entries[slug].epoch,
            engine=self._engine,
            lease=self._lease,
            access=self._access,
            identity=self._identity,
            others=self._other_urls,
        )
        self._members[slug] = member
        return member

    def _project(self, slug: str) -> Project | None:
        is_here = slug in self._entries and self._data.has_project(slug)
        return self.registry.project(slug) if is_here else None

    def _is_owner(self, slug: str) -> bool:
        member = self._members.get(slug)
        return member is not None and member.is_owner

    def _other_urls(self) -> list[str]:
        others = [node for node in self._nodes.values() if node.name != self._identity.name]
        return [node.url for node in sorted(others, key=lambda node: node.is_silent)]

    # --- life ---

    async def start(self, registry: Projects) -> None:
        """Enter the cluster with this server's projects.

        Raises:
            Misuse: the cluster has another project of the same name.
            EngineUnavailable: the engine does not answer.
        """
        self._registry = registry
        await self._shared.enter(self._data)
        finish_copies(self._data.projects)
        self._entries, self._nodes, _ = await self._directory.read()
        for slug in self._data.slugs():
            await self._enter(slug)
        await self._report()

    async def run(self) -> None:
        """Keep the members, the shared files and the reports up to date, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep(lambda: self._shared.mirror(self._data)))
            group.create_task(self._keep(self._keep_members))

    async def _keep(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do work again and again: without it a revoked token would stay valid here."""
        while True:
            try:
                await work()
            except EngineUnavailable:
                pass
            except RemoteError as error:
                _log.error("%s", error)
            except Exception:  # noqa: BLE001 - the next attempt may succeed
                _log.exception("the node's background work failed")
            await asyncio.sleep(_STEP_S)

    async def _keep_members(self) -> None:
        await self._report()
        found = await self._directory.read()
        await self._follow_directory(found)
        await self._fulfil(found.wishes)  # changes the directory: last
        for slug in self._entries:
            opening = self._opening.get(slug)
            if slug not in self.registry.projects and (opening is None or opening.done()):
                self._opening[slug] = asyncio.create_task(self._open(slug), name=f"open {slug}")

    async def close(self) -> None:
        """End the connection to the engine, after the projects."""
        await self._engine.close()

    async def _follow_directory(self, found: DirectoryContent) -> None:
        """Take over what other nodes have added, and new epochs."""
        self._nodes = found.nodes
        for slug, entry in found.projects.items():
            known = self._entries.get(slug)
            self._entries[slug] = entry
            if known is not None and known != entry:
                _log.warning("%s: the cluster has begun a new epoch", slug)
                await self.registry.release(slug, "the project has started a new history; reconnect at once")
        for slug in set(self._data.slugs()) - self._entries.keys():
            try:
                await self._enter(slug)
            except Misuse as error:  # the others go on
                if self._refused.get(slug) != error.message:
                    self._refused[slug] = error.message
                    _log.error("%s: %s", slug, error.message)

    async def _enter(self, slug: str) -> None:
        """Put a local project into the cluster, unless it is there. Raises Misuse."""
        paths = self._data.project(slug)
        if slug in self._entries:
            if not load_cursors(paths.journal):
                raise Misuse(
                    f"the cluster has another project {slug!r}; rename this one first: lattice-remote project rename"
                )
            return
        if any(cursor.seq for cursor in load_cursors(paths.journal)):
            raise Misuse(
                f"another node has taken project {slug!r} out of the cluster, and this copy may lack changes; "
                f"move {paths.root} away"
            )
        epoch = await self._open_alone(slug)
        order = JetStreamOrder(self._engine, slug, epoch)
        await order.create()
        save_cursor(paths.journal, Cursor(epoch, 0, next_number(paths.journal), self._identity.name, 0))
        entry = ProjectEntry(epoch)
        if not await self._directory.add_project(slug, entry):
            raise Misuse(f"another node has just added a project {slug!r}")
        self._entries[slug] = entry
        _log.info("%s: entered the cluster", slug)

    async def _open_alone(self, slug: str) -> str:
        """Number what other programs have changed while no server ran; return the epoch."""
        project = Project(slug, self._data.project(slug), hooks=None, start_child=self.registry.template.start_child)
        project.start()
        try:
            await project.opened()
        finally:
            await project.drain(_STOP_S)
            await project.stop(_STOP_S)
        return project.history.epoch

    async def _open(self, slug: str) -> None:
        """Open a project of the cluster, copied from another node if it is not here."""
        while not self._data.has_project(slug):
            for url in self._other_urls():
                try:
                    await copy_from(url, slug, self._data.project(slug), self._access)
                    break
                except RemoteError as error:
                    _log.warning("%s: no copy from %s: %s", slug, url, error)
            else:
                await asyncio.sleep(_STEP_S)
        self.registry.project(slug)

    async def _report(self) -> None:
        projects = {
            slug: ProjectReport(
                member.position, member.project.history.head, member.is_owner, member.term, member.in_doubt, problem
            )
            for slug, member in self._members.items()
            if slug in self.registry.projects
            for problem in [member.project.failure.message if member.project.failure else member.unavailable]
        }
        version = lattice_remote.__version__
        report = NodeReport(self._identity.name, self._identity.url, version, time.time(), projects)
        await self._directory.report(report)

    # --- wishes ---

    async def _fulfil(self, wishes: Mapping[str, Wish]) -> None:
        for slug, wish in wishes.items():
            member = self._members.get(slug)
            if wish.action == "move" and member is not None and member.is_owner:
                if wish.node == self._identity.name:
                    await self._directory.fulfilled(slug)
                else:
                    member.move_to(wish.node)
            elif wish.action == "rebuild" and wish.node == self._identity.name and self._data.has_project(slug):
                await self._rebuild(slug)

    async def _rebuild(self, slug: str) -> None:
        """Begin a new epoch from this node's files."""
        await self.registry.release(slug, "the project has started a new history; reconnect at once")
        paths = self._data.project(slug)
        project = Project(slug, paths, hooks=None, start_child=self.registry.template.start_child)
        project.start()
        try:
            await project.opened()
            await project.rollback_proved(project.history.epoch, "an administrator rebuilds the cluster's record")
        finally:
            await project.drain(_STOP_S)
            await project.stop(_STOP_S)
        epoch, former = project.history.epoch, self._entries[slug].epoch
        await JetStreamOrder(self._engine, slug, epoch).create()
        save_cursor(paths.journal, Cursor(epoch, 0, next_number(paths.journal), self._identity.name, 0))
        self._entries[slug] = ProjectEntry(epoch)
        await self._directory.set_project(slug, self._entries[slug])
        await self._directory.fulfilled(slug)
        await JetStreamOrder(self._engine, slug, former).delete()
        _log.warning("%s: a new epoch begins with this node's files", slug)
