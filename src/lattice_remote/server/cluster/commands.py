"""``lattice-remote cluster``: status of a cluster, and changes of who owns a project or belongs to the cluster."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import msgspec

from lattice_remote.errors import Misuse, StorageError
from lattice_remote.server.cluster.directory import (
    Catalogue,
    ClusterDirectory,
    NodeReport,
    ProjectEntry,
    Wish,
    identity_of,
)
from lattice_remote.server.cluster.engine import Engine, EngineUnavailable
from lattice_remote.server.cluster.jetstream import server_problems
from lattice_remote.server.cluster.lease import Lease
from lattice_remote.server.cluster.member import CURSOR_FILE, id_of, load_cursors
from lattice_remote.server.cluster.order import JetStreamOrder, StreamLost
from lattice_remote.server.cluster.places import Place, local_ids, root_of
from lattice_remote.server.cluster.settings import ClusterSettings, load_settings, settings_file
from lattice_remote.server.cluster.shared_state import connect
from lattice_remote.server.datadir import DataDir, ProjectPaths
from lattice_remote.server.journal.segment import JournalReader

__all__ = [
    "ClusterStatus",
    "cluster_status",
    "leave",
    "move",
    "rebuild",
    "require_newest",
    "run_in_cluster",
    "settings_of",
    "status_lines",
    "until",
]

_WAIT_S = 60.0
_ANSWER_S = 15.0
"""For the engine; an election there takes 1 to 5 s."""
_NOT_ENABLED = "JetStream not enabled"
_SWITCHED_OFF = "a server whose disk is full switches JetStream off: make room there and restart it"
_CHECK_S = 0.25


class ClusterNodeStatus(msgspec.Struct, frozen=True):
    """A node; ``seen_s`` is the time since its last report."""

    name: str
    url: str
    version: str
    seen_s: float
    is_up: bool
    owns: list[str]


class ClusterProjectStatus(msgspec.Struct, frozen=True):
    """A project of the cluster.

    Attributes:
        owner: name of the node; None: no node owns it at the moment.
        stream: number of the last message; None: the stream is lost.
        lag: messages that each node lacks.
        in_doubt: appends of the present owner, since its start, whose answer was late or missing.
        problems: of each node that has one.
        heads: the last change on each node.
    """

    slug: str
    epoch: str
    owner: str | None
    term: int
    head: int
    stream: int | None
    lag: dict[str, int]
    in_doubt: int
    problems: dict[str, str]
    heads: dict[str, int]


class NatsServerStatus(msgspec.Struct, frozen=True):
    """A NATS server; ``is_sync_always`` is None if its setting cannot be known. ``problem`` is its own report."""

    name: str
    is_up: bool
    is_sync_always: bool | None
    problem: str = ""


class ClusterStatus(msgspec.Struct, frozen=True):
    """Status of a cluster, as printed by ``--json``; ``warnings`` are about the settings of NATS.

    ``nats`` are the servers with the cluster's directory; a majority of them must be up. ``is_member`` is false if the
    data directory belongs to another cluster.
    """

    node: str
    servers: list[str]
    replicas: int
    nodes: list[ClusterNodeStatus]
    projects: list[ClusterProjectStatus]
    warnings: list[str]
    nats: list[NatsServerStatus] = []
    is_member: bool = True

    @property
    def is_whole(self) -> bool:
        """Whether every project has an owner, and every node and NATS server is up and has no problem."""
        engine = all(server.is_up and server.is_sync_always is not False for server in self.nats)
        return (
            self.is_member
            and engine
            and all(node.is_up for node in self.nodes)
            and all(
                project.owner is not None and project.stream is not None and not project.problems
                for project in self.projects
            )
        )


def settings_of(data: DataDir) -> ClusterSettings:
    """Return the settings of a directory of a cluster. Raises Misuse if it belongs to none."""
    settings = load_settings(data.path)
    if settings is None:
        raise Misuse(
            f"{data.path} belongs to no cluster; join one: lattice-remote start --cluster nats://HOST:4222,..."
        )
    return settings


def run_in_cluster[T](
    settings: ClusterSettings, work: Callable[[Engine, ClusterDirectory], Awaitable[T]], *, is_member: bool = True
) -> T:
    """Run a command's work with a connection to the engine. ``is_member``: only in the cluster of the data directory.

    Raises EngineUnavailable, Misuse, and as ``work``.
    """

    async def run() -> T:
        engine = await connect(settings)
        try:
            try:
                async with asyncio.timeout(_ANSWER_S):
                    directory = await ClusterDirectory.open(engine)
            except TimeoutError:
                raise await _silence(settings) from None
            if is_member:
                await directory.require_member(settings.cluster)
            return await work(engine, directory)
        finally:
            await engine.close()

    return asyncio.run(run())


def cluster_status(settings: ClusterSettings) -> ClusterStatus:
    """Return the status, as the engine has it. Raises EngineUnavailable."""

    async def read(engine: Engine, directory: ClusterDirectory) -> ClusterStatus:
        try:
            warnings = await engine.check_durability(settings.monitors)
        except Misuse as error:
            warnings = [error.message]
        is_member = settings.cluster in ("", identity_of(await directory.secret()))
        if not is_member:
            warnings.append("the data directory belongs to another cluster than these NATS servers have")
        reports, lease = await directory.nodes(), Lease(engine)
        projects = []
        catalogue = await directory.catalogue()
        for slug, entry in sorted(catalogue.projects.items()):
            if not entry.is_archived:
                holder = await lease.holder(slug)
                owner = holder.node if holder is not None and holder.node else None
                projects.append(await _project(engine, slug, entry, owner, reports))
        nodes = [
            ClusterNodeStatus(
                *(report.name, report.url, report.version, round(time.time() - report.at, 1), not report.is_silent),
                [project.slug for project in projects if project.owner == report.name],
            )
            for _, report in sorted(reports.items())
        ]
        nats = await _nats_servers(engine, directory, settings)
        if advice := _advice({server.name: server.problem for server in nats}):
            warnings.append(advice.removeprefix("; "))
        return ClusterStatus(
            settings.node, settings.servers, settings.replicas, nodes, projects, warnings, nats, is_member=is_member
        )

    return run_in_cluster(settings, read, is_member=False)


async def _nats_servers(
    engine: Engine, directory: ClusterDirectory, settings: ClusterSettings
) -> list[NatsServerStatus]:
    known, _ = await engine.sync_settings(settings.monitors)
    problems = await server_problems(settings.monitors)
    up = await directory.servers()
    names = sorted(up.keys() | known.keys())
    return [NatsServerStatus(name, up.get(name, True), known.get(name), problems.get(name, "")) for name in names]


async def _silence(settings: ClusterSettings) -> EngineUnavailable:
    """Return the error of an engine that does not answer, with the reports of its servers."""
    problems = await server_problems(settings.monitors)
    reports = "".join(f"; {name}: {problem}" for name, problem in problems.items())
    return EngineUnavailable(f"NATS does not answer; a majority of its servers must run{reports}{_advice(problems)}")


def _advice(problems: Mapping[str, str]) -> str:
    return f"; {_SWITCHED_OFF}" if any(_NOT_ENABLED in problem for problem in problems.values()) else ""


async def _project(
    engine: Engine, slug: str, entry: ProjectEntry, owner: str | None, nodes: dict[str, NodeReport]
) -> ClusterProjectStatus:
    try:
        order = JetStreamOrder(engine, entry.stream, entry.epoch, lost_s=1.0)
        await order.open()
        last: int | None = (await order.bounds())[1]
    except StreamLost:
        last = None
    reports = {name: node.projects[slug] for name, node in nodes.items() if slug in node.projects}
    of_owner = reports.get(owner or "")
    return ClusterProjectStatus(
        slug,
        entry.epoch,
        owner,
        max((report.term for report in reports.values()), default=0),
        max((report.head for report in reports.values()), default=0),
        last,
        {name: max(0, (last or 0) - report.seq) for name, report in sorted(reports.items())},
        of_owner.in_doubt if of_owner is not None else 0,
        {name: report.problem for name, report in reports.items() if report.problem and not nodes[name].is_silent},
        {name: report.head for name, report in sorted(reports.items())},
    )


def status_lines(status: ClusterStatus) -> list[str]:
    """Return the status for people."""
    copies = "one copy" if status.replicas == 1 else f"{status.replicas} copies"
    lines = [f"NATS at {', '.join(status.servers)}; {copies} of each change"]
    sync = {True: "syncs always", False: "DOES NOT SYNC before it acknowledges", None: "sync setting unknown"}
    lines += [
        f"  {server.name:<12} {'up' if server.is_up else 'down':<18} {sync[server.is_sync_always]}"
        f"{f'; {server.problem}' if server.problem else ''}"
        for server in status.nats
    ]
    lines.append(f"Nodes: {len(status.nodes)}; this is {status.node}")
    for node in status.nodes:
        state = "up" if node.is_up else f"silent for {node.seen_s:.0f} s"
        owns = ", ".join(node.owns) or "none"
        lines.append(f"  {node.name:<12} {state:<18} {node.url:<32} owns: {owns}")
    lines.append(f"Projects: {len(status.projects)}")
    for project in status.projects:
        behind = ", ".join(f"{name} {lag}" for name, lag in project.lag.items() if lag) or "none"
        owner = f"owner {project.owner}, term {project.term}" if project.owner else "no owner at the moment"
        lost = "; its stream is lost, see: lattice-remote cluster rebuild --help" if project.stream is None else ""
        lines.append(f"  {project.slug:<20} change {project.head}; {owner}; behind: {behind}{lost}")
        lines += [f"    {name}, change {project.heads[name]}: {problem}" for name, problem in project.problems.items()]
    return lines + [f"Warning: {warning}" for warning in status.warnings]


def move(settings: ClusterSettings, slug: str, node: str) -> None:
    """Have a node own a project; return once it does.

    Raises Misuse: there is no such node or project; StorageError: it did not happen in time.
    """

    async def ask(engine: Engine, directory: ClusterDirectory) -> None:
        _require_active(await directory.catalogue(), slug)
        nodes = await directory.nodes()
        if node not in nodes or nodes[node].is_silent:
            running = ", ".join(name for name, report in sorted(nodes.items()) if not report.is_silent)
            raise Misuse(f"no node {node!r} runs in this cluster; these do: {running}")
        await directory.wish(slug, Wish("move", node))

        async def is_done() -> bool:
            holder = await Lease(engine).holder(slug)
            return holder is not None and holder.node == node

        await until(is_done, f"node {node} does not own {slug} yet; see: lattice-remote cluster status")

    run_in_cluster(settings, ask)


def rebuild(settings: ClusterSettings, slug: str) -> str:
    """Begin a new epoch of a project with the files of this node, whose server runs; return the epoch.

    Raises as ``move``.
    """

    async def ask(engine: Engine, directory: ClusterDirectory) -> str:
        del engine
        before = _require_active(await directory.catalogue(), slug).epoch
        reports = await directory.nodes()
        if settings.node not in reports or reports[settings.node].is_silent:
            raise Misuse(f"node {settings.node} does not run; start it: it rebuilds the project from its files")
        await directory.wish(slug, Wish("rebuild", settings.node))

        async def is_done() -> bool:
            return (await directory.catalogue()).require(slug).epoch != before

        await until(is_done, f"{slug} is not rebuilt yet; see the log of node {settings.node}")
        return (await directory.catalogue()).require(slug).epoch

    return run_in_cluster(settings, ask)


def leave(data: DataDir, settings: ClusterSettings, *, keeps_projects: bool) -> list[str]:
    """Take a stopped node out of its cluster; return its projects, which keep epoch and numbers.

    Args:
        keeps_projects: the projects leave with this node, which must be the last one; else they stay in the cluster,
            and their copies here are moved to ``DATA/left/``.

    Raises:
        Misuse: other nodes run, or this one lacks changes.
        EngineUnavailable: nothing was changed.
    """

    async def ask(engine: Engine, directory: ClusterDirectory) -> list[str]:
        if settings.cluster not in ("", identity_of(await directory.secret())):
            return data.slugs()  # the cluster that it belonged to is lost
        nodes = await directory.nodes()
        others = sorted(name for name, node in nodes.items() if name != settings.node and not node.is_silent)
        catalogue = await directory.catalogue()
        if keeps_projects and others:
            raise Misuse(
                f"other nodes run: {', '.join(others)}; stop them to take the projects out of the cluster, "
                "or use --without-projects to leave the projects with them"
            )
        if keeps_projects:
            for slug, entry in catalogue.projects.items():
                await require_newest(engine, _paths_of(data, slug, entry), slug, entry)
            # First, so that a crash leaves streams without a project, which the next attempt deletes.
            await directory.change(lambda former: msgspec.structs.replace(former, projects={}))
            streams = {(entry.stream, entry.epoch) for entry in catalogue.projects.values()}
            local = {
                (slug, cursor.epoch) for slug in data.slugs() for cursor in load_cursors(data.project(slug).journal)
            }
            for stream, epoch in streams | local:
                await JetStreamOrder(engine, stream, epoch).delete()
        await directory.remove_node(settings.node)
        return sorted(catalogue.projects)

    slugs = run_in_cluster(settings, ask, is_member=False)
    roots = {place.slug: root_of(data, place) for place, id_ in local_ids(data).items() if id_}
    for slug, root in roots.items():
        if keeps_projects:  # also of those that an interrupted attempt has taken out
            (root / "journal" / CURSOR_FILE).unlink(missing_ok=True)
        elif slug in slugs:
            _set_aside(data, slug, root)
    settings_file(data.path).unlink()
    return slugs


def _set_aside(data: DataDir, slug: str, root: Path) -> None:
    target = data.path / "left" / slug
    target.parent.mkdir(mode=0o700, exist_ok=True)
    number = 1
    while target.exists():
        number += 1
        target = target.with_name(f"{slug}-{number}")
    root.rename(target)


def _paths_of(data: DataDir, slug: str, entry: ProjectEntry) -> ProjectPaths:
    return ProjectPaths(root_of(data, Place(slug, entry.is_archived)))


def _require_active(catalogue: Catalogue, slug: str) -> ProjectEntry:
    entry = catalogue.require(slug)
    if entry.is_archived:
        raise Misuse(f"project {slug!r} is archived; restore it with: lattice-remote project unarchive {slug}")
    return entry


async def require_newest(engine: Engine, paths: ProjectPaths, slug: str, entry: ProjectEntry) -> None:
    """Raise Misuse unless this node's files of a closed project reach the end of its stream, and not further."""
    advice = "start this node until it has caught up, and stop it"
    if entry.is_archived:
        advice = "unarchive it, wait until 'cluster status' shows no node behind, archive it again; or use another node"
    if id_of(paths.journal) != entry.id:
        raise Misuse(f"this node does not have project {slug!r}; {advice}")
    order = JetStreamOrder(engine, entry.stream, entry.epoch)
    await order.open()
    last = (await order.bounds())[1]
    cursors = [cursor for cursor in load_cursors(paths.journal) if cursor.epoch == entry.epoch]
    if not cursors or cursors[-1].seq != last or list(JournalReader(paths.journal).payloads(cursors[-1].number)):
        raise Misuse(f"this node does not have the last changes of project {slug!r}; {advice}")


async def until(condition: Callable[[], Awaitable[bool]], otherwise: str) -> None:
    """Wait for a node to do something. Raises StorageError: it did not happen in time."""
    try:
        async with asyncio.timeout(_WAIT_S):
            while not await condition():  # noqa: ASYNC110 - another process makes it true
                await asyncio.sleep(_CHECK_S)
    except TimeoutError:
        raise StorageError(otherwise) from None
