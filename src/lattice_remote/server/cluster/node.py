"""This server as a node of a cluster: the members of its projects, its reports, and the wishes of administrators.

A project enters the cluster, with its epoch and numbers, when a node that has it starts. From then on every node has
it.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Protocol, Self

import msgspec

import lattice_remote
from lattice_remote.errors import Misuse, RemoteError
from lattice_remote.server.cluster.directory import (
    Catalogue,
    ClusterDirectory,
    NodeReport,
    ProjectEntry,
    ProjectReport,
    Wish,
    identity_of,
)
from lattice_remote.server.cluster.engine import Engine, EngineUnavailable
from lattice_remote.server.cluster.lease import Lease
from lattice_remote.server.cluster.member import Cursor, Member, NodeIdentity, id_of, load_cursors, save_cursor
from lattice_remote.server.cluster.order import JetStreamOrder
from lattice_remote.server.cluster.peer_access import PeerAccess, Reached
from lattice_remote.server.cluster.peer_copy import copy_from, finish_copies
from lattice_remote.server.cluster.peer_server import PeerServer
from lattice_remote.server.cluster.places import Place, enter, local_ids, moves_of, park, place_parked
from lattice_remote.server.cluster.settings import ClusterSettings, load_settings
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
_CLOCKS_S = 3.0

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
        engine, directory, shared, access, settings: of the cluster and this node.
        is_new: the data directory joins the cluster now.
    """

    def __init__(
        self,
        data: DataDir,
        engine: Engine,
        *,
        directory: ClusterDirectory,
        shared: SharedState,
        access: PeerAccess,
        settings: ClusterSettings,
        is_new: bool,
    ) -> None:
        self.settings = settings
        """To be stored in the data directory after ``start()``."""
        self._is_new = is_new
        self._shared = shared
        self._data = data
        self._directory = directory
        self._engine = engine
        self._access = access
        self._identity = NodeIdentity(settings.node, settings.advertise)
        self._lease = Lease(engine)
        self._catalogue, self._revision = Catalogue(), 0
        self._local: dict[Place, str] = {}  # ids of the projects here
        self._renamed: dict[str, str] | None = None  # former names that all tokens follow
        self._members: dict[str, Member] = {}
        self._opening: dict[str, asyncio.Task[None]] = {}
        self._rebuilding: set[str] = set()
        self._refused: dict[str, str] = {}  # local projects that cannot enter the cluster, with the logged reason
        self._nodes: Mapping[str, NodeReport] = {}
        self._registry: Projects | None = None
        self._peers = PeerServer(access, self._project, self._is_owner, self._reached)

    @classmethod
    async def join(cls, data: DataDir, settings: ClusterSettings) -> Self:
        """Connect to the cluster's engine.

        Raises:
            Misuse: a setting is unusable, or the engine may lose acknowledged changes in a power cut.
            EngineUnavailable: no server of the engine answers.
        """
        settings.check()
        known = load_settings(data.path)
        directory_id = known.directory if known is not None else ""
        settings = msgspec.structs.replace(settings, directory=directory_id or secrets.token_hex(8))
        engine = await connect(settings)
        try:
            for warning in await engine.check_durability(settings.monitors):
                _log.warning("%s", warning)
            directory, shared = await ClusterDirectory.open(engine), await SharedState.open(engine)
            secret = await directory.secret()
            settings = msgspec.structs.replace(settings, cluster=identity_of(secret))
            await directory.require_member(known.cluster if known is not None else "")
            _require_own_name(settings, await directory.nodes())
            authorities = Path(settings.ca) if settings.ca else None
            access = PeerAccess(settings.node, secret, authorities=authorities)
        except BaseException:
            await engine.close()
            raise
        return cls(
            data, engine, directory=directory, shared=shared, access=access, settings=settings, is_new=known is None
        )

    @property
    def registry(self) -> Projects:
        assert self._registry is not None, "start() comes first"
        return self._registry

    # --- what the registry asks ---

    def admit(self, connection: Handoff, request: Request) -> Callable[[], Awaitable[None]] | ApiError:
        return self._peers.admit(connection, request)

    def refusal_of(self, slug: str) -> ApiError | None:
        """Return the refusal of a project that the catalogue does not have here; None if it is served."""
        entry = self._catalogue.projects.get(slug)
        busy = HTTPStatus.SERVICE_UNAVAILABLE, "REMOTE_BUSY"
        missing = HTTPStatus.NOT_FOUND, "REMOTE_NOT_FOUND"
        if entry is None:
            if (now := self._catalogue.renamed.get(slug)) in self._catalogue.projects:
                why = f"project {slug!r} is now called {now!r}: lattice remote set-url origin URL --project {now}"
                return ApiError(*missing, why)
            if Place(slug, False) not in self._local:
                return ApiError(*missing, f"there is no project {slug!r} on this server")
            why = self._refused.get(slug) or f"project {slug!r} is entering the cluster; try again in a moment"
            return ApiError(*busy, why, retry_after_s=1)
        if entry.is_archived:
            return ApiError(*missing, f"project {slug!r} is archived; ask its administrator")
        if slug in self._rebuilding:
            return ApiError(*busy, "the project starts a new history; try again in a moment", retry_after_s=1)
        if self._local.get(Place(slug, False)) != entry.id:
            return ApiError(*busy, "this node does not have the project yet; try again in a moment", retry_after_s=1)
        return None

    def order_of(self, slug: str) -> Order:
        member = Member(
            slug,
            self._data.project(slug),
            entry=self._catalogue.projects[slug],
            engine=self._engine,
            lease=self._lease,
            access=self._access,
            identity=self._identity,
            others=self._other_urls,
            ask_to_own=partial(self._directory.wish, slug, Wish("move", self._identity.name)),
        )
        self._members[slug] = member
        return member

    def _project(self, slug: str) -> Project | None:
        return self.registry.project(slug) if self.refusal_of(slug) is None else None

    def _is_owner(self, slug: str) -> bool:
        member = self._members.get(slug)
        return member is not None and member.is_owner

    def _reached(self, slug: str) -> Reached:
        """Return how far this node has seen a project's order."""
        if (member := self._members.get(slug)) is not None:
            return member.reached
        cursors = load_cursors(self._data.project(slug).journal)
        return Reached(cursors[-1].epoch, cursors[-1].seq) if cursors else Reached()

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
        await asyncio.to_thread(finish_copies, self._data.projects)
        if self._is_new:
            await self._bring_former_names()
        self._catalogue, self._revision, self._nodes, _ = await self._directory.read()
        await self._arrange()
        for slug in self._strangers():
            await self._enter(slug)
        report = await self._report()
        difference = await self._directory.clock_difference(report)
        if abs(difference) > _CLOCKS_S:
            _log.warning("this machine's clock is %.0f s off that of NATS; nodes must agree to a second", difference)

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
        self._nodes = found.nodes
        self._hear_reports()
        # An older one is of a server that was the leader; a missing one was deleted, and the projects go on.
        if found.revision >= self._revision:
            self._revision = found.revision
            await self._follow_catalogue(found.catalogue)
        await self._fulfil(found.wishes)  # changes the directory: last
        for slug, entry in self._catalogue.projects.items():
            opening = self._opening.get(slug)
            if slug not in self.registry.projects and not entry.is_archived and (opening is None or opening.done()):
                self._opening[slug] = asyncio.create_task(self._open(slug, entry), name=f"open {slug}")

    def _hear_reports(self) -> None:
        """Have each project stop here whose order another node has lost. A silent node's last report counts too."""
        others = [node for name, node in self._nodes.items() if name != self._identity.name]
        for slug, member in self._members.items():
            reports = ((node.name, node.projects[slug]) for node in others if slug in node.projects)
            member.lost_on_other = next(
                (
                    f"node {name} reports: {report.problem.partition(';')[0]}"
                    for name, report in reports
                    if report.has_lost_order and report.epoch == member.epoch
                ),
                "",
            )

    async def close(self) -> None:
        """End the connection to the engine, after the projects."""
        await self._engine.close()

    async def _follow_catalogue(self, catalogue: Catalogue) -> None:
        """Take over what commands and other nodes have changed: names, archived and new projects, new epochs."""
        former, self._catalogue = self._catalogue, catalogue
        for slug, entry in catalogue.projects.items():
            known = former.projects.get(slug)
            if known is not None and known.id == entry.id and known.epoch != entry.epoch:
                _log.warning("%s: the cluster has begun a new epoch", slug)
                await self.registry.release(slug, "the project has started a new history; reconnect at once")
        await self._arrange()
        for slug in self._strangers():
            try:
                await self._enter(slug)
            except Misuse as error:  # the others go on
                if self._refused.get(slug) != error.message:
                    self._refused[slug] = error.message
                    _log.error("%s: %s", slug, error.message)

    async def _arrange(self) -> None:
        """Move this node's projects where the catalogue has them, and take over their former names."""
        data, catalogue = self._data, self._catalogue
        self._local = await asyncio.to_thread(local_ids, data)
        for place, wanted in moves_of(self._local, catalogue).items():
            if not place.is_archived:
                await self._let_go(place.slug, wanted)
            await asyncio.to_thread(park, data, place, self._local[place])
        for place in await asyncio.to_thread(place_parked, data, catalogue):
            _log.info("%s: %s", place.slug or "a deleted project", "is archived" if place.is_archived else "is here")
        self._local = await asyncio.to_thread(local_ids, data)
        if self._renamed != catalogue.renamed:
            names = catalogue.renamed.items()
            await asyncio.to_thread(data.save_renamed, dict(names))
            await self._shared.rename_projects(
                {old: new for old, new in names if new in catalogue.projects and old not in catalogue.projects}
            )
            self._renamed = catalogue.renamed

    async def _let_go(self, slug: str, wanted: Place) -> None:
        """Close a project that moves from its active place."""
        if not wanted.slug:
            why = f"project {slug!r} was deleted"
        elif wanted.is_archived:
            why = f"project {slug!r} is archived; ask its administrator"
            if slug in self.registry.projects and slug in self._members:
                await self._members[slug].retire()
        else:
            why = f"project {slug!r} is now called {wanted.slug!r}"
        await self.registry.release(slug, why)

    def _strangers(self) -> list[str]:
        """Return the active projects here that are not the cluster's."""
        projects = self._catalogue.projects
        return [
            place.slug
            for place, id_ in self._local.items()
            if not place.is_archived and (place.slug not in projects or projects[place.slug].id != id_)
        ]

    async def _bring_former_names(self) -> None:
        """Add the former names of a data directory that joins the cluster."""
        own = {old: new for old, new in self._data.renamed().items() if self._data.has_project(new)}

        def add(catalogue: Catalogue) -> Catalogue:
            return msgspec.structs.replace(catalogue, renamed=own | catalogue.renamed)

        await self._directory.change(add)

    async def _enter(self, slug: str) -> None:
        """Put a local project into the cluster. Raises Misuse."""
        root = self._data.project(slug).root
        if slug in self._catalogue.projects:
            raise Misuse(
                f"the cluster has another project {slug!r}; move {root} away, or give the directory another name"
            )
        if any(cursor.seq for cursor in load_cursors(root / "journal")):
            raise Misuse(
                f"another node has taken project {slug!r} out of the cluster, or this is another cluster, and this "
                f"copy may lack changes; move {root} away"
            )
        epoch = await self._open_alone(slug)
        self._catalogue = await enter(
            self._engine, self._directory, slug, root / "journal", epoch=epoch, node=self._identity.name
        )
        self._local[Place(slug, False)] = id_of(root / "journal")
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

    async def _open(self, slug: str, entry: ProjectEntry) -> None:
        """Open a project of the cluster, copied from another node if it is not here."""
        place = Place(slug, False)
        while not self._data.has_project(slug):
            if self._catalogue.projects.get(slug) != entry:
                return
            for url in self._other_urls():
                try:
                    await copy_from(url, slug, self._data.project(slug), self._access)
                    break
                except RemoteError as error:
                    _log.warning("%s: no copy from %s: %s", slug, url, error)
            else:
                await asyncio.sleep(_STEP_S)
        if place not in self._local:
            self._local[place] = id_of(self._data.project(slug).journal)
        if self.refusal_of(slug) is None:
            self.registry.project(slug)

    async def _report(self) -> NodeReport:
        projects = {
            slug: ProjectReport(
                member.position,
                member.project.history.head,
                member.is_owner,
                member.term,
                member.in_doubt,
                problem,
                member.epoch,
                member.has_lost_order,
            )
            for slug, member in self._members.items()
            if slug in self.registry.projects
            for problem in [member.project.failure.message if member.project.failure else member.unavailable]
        }
        version = lattice_remote.__version__
        name, url = self._identity.name, self._identity.url
        report = NodeReport(name, url, version, time.time(), projects, self.settings.directory)
        await self._directory.report(report)
        return report

    # --- wishes ---

    async def _fulfil(self, wishes: Mapping[str, Wish]) -> None:
        for slug, wish in wishes.items():
            member = self._members.get(slug)
            if wish.action == "move" and member is not None and member.is_owner:
                if wish.node == self._identity.name or wish.node not in self._nodes or self._nodes[wish.node].is_silent:
                    await self._directory.fulfilled(slug)
                else:
                    member.move_to(wish.node)
            elif wish.action == "rebuild" and wish.node == self._identity.name and self.refusal_of(slug) is None:
                await self._rebuild(slug)

    async def _rebuild(self, slug: str) -> None:
        """Begin a new epoch from this node's files; nothing may open the project with the old one in between."""
        self._rebuilding.add(slug)
        try:
            await self._begin_epoch(slug)
        finally:
            self._rebuilding.discard(slug)

    async def _begin_epoch(self, slug: str) -> None:
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
        epoch, former = project.history.epoch, self._catalogue.projects[slug]
        entry = ProjectEntry(former.id, epoch, slug)
        await JetStreamOrder(self._engine, slug, epoch).create()
        save_cursor(paths.journal, Cursor(epoch, 0, next_number(paths.journal), self._identity.name, 0, former.id))

        def replace(catalogue: Catalogue) -> Catalogue:
            if catalogue.require(slug).epoch != former.epoch:
                raise Misuse(f"project {slug!r} was rebuilt by another node at the same time")
            return catalogue.with_entry(slug, entry)

        self._catalogue = await self._directory.change(replace)
        await self._directory.fulfilled(slug)
        await JetStreamOrder(self._engine, former.stream, former.epoch).delete()
        _log.warning("%s: a new epoch begins with this node's files", slug)


def _require_own_name(settings: ClusterSettings, nodes: Mapping[str, NodeReport]) -> None:
    """Raise Misuse if a server on another data directory runs under this node's name."""
    found = nodes.get(settings.node)
    if found is not None and not found.is_silent and found.directory != settings.directory:
        raise Misuse(f"node {settings.node!r} runs already, at {found.url}; choose another name with --node")
