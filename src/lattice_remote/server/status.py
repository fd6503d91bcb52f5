"""Server status: projects with their positions, and clients with their lag.

``lattice-remote status --json`` prints these fields; names are only added.
"""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections import Counter as Tally
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

import lattice_remote
from lattice_remote.errors import StorageError, printable
from lattice_remote.output import columns
from lattice_remote.server.datadir import DataDir
from lattice_remote.server.journal.segment import header_of, read_segment, segment_paths
from lattice_remote.server.project.connection import ClientConnection
from lattice_remote.server.project.project import Project
from lattice_remote.server.registry import ProjectRegistry

__all__ = [
    "CLUSTER_METRICS",
    "ClientStatus",
    "Gauges",
    "ProjectStatus",
    "ServerStatus",
    "answer",
    "ask",
    "journal_bytes",
    "listen",
    "present_status",
    "remove",
    "status_lines",
    "status_of",
    "stopped_status",
]


class ClientStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A connected client.

    Attributes:
        kind: ``cache``: has a cache; ``writer``: only writes; ``stream``: an HTTP stream.
        applied, behind: the last change in its cache, as it reports, and the number still missing; null for the others.
    """

    kind: str
    actor: str
    token: str
    address: str
    since: datetime
    applied: int | None = None
    behind: int | None = None
    waiting_bytes: int = 0
    client_version: str = ""
    lattice_version: str = ""


class ProjectStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One project.

    Attributes:
        state: ``ready``, ``starting``, ``closed`` (an administrator's command has it), ``failed``; ``idle`` without a
            request since the server's start; ``stopped`` if no server runs.
        why: of a project that has failed, or that this node of a cluster cannot serve now.
        head, oldest: the last and the first change in its journal; null if it never had one.
        writes_per_minute: changes within the last minute.
        queued, with_worker, waiting: requests in its queue, with its worker, and waiting for a resource.
        reads_waiting: HTTP reads that wait for an earlier one.
        role: on a node of a cluster: ``owner`` or ``follower``; "" on a server alone.
        owner, term: the node that owns it, as far as this one knows.
        unapplied: messages of the cluster that are not in this node's files yet.
    """

    slug: str
    state: str
    why: str = ""
    epoch: str = ""
    head: int | None = None
    oldest: int | None = None
    journal_bytes: int = 0
    writes_per_minute: int = 0
    queued: int = 0
    with_worker: int = 0
    waiting: int = 0
    reads_waiting: int = 0
    worker_pid: int | None = None
    lattice_version: str = ""
    clients: list[ClientStatus] = []
    role: str = ""
    owner: str = ""
    term: int = 0
    unapplied: int = 0


class ServerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A server; without one ``running`` is false, and the projects are read from their files."""

    running: bool
    data: str
    projects: list[ProjectStatus]
    version: str = lattice_remote.__version__
    pid: int | None = None
    address: str = ""
    started: datetime | None = None


async def status_of(registry: ProjectRegistry, started: datetime) -> ServerStatus:
    slugs = await asyncio.to_thread(registry.data.slugs)
    on_disk = await asyncio.to_thread(lambda: {slug: _from_files(registry.data, slug, "idle") for slug in slugs})
    streams = _streams(registry)
    projects = []
    for slug, files in on_disk.items():
        running = registry.projects.get(slug)
        if running is None:
            projects.append(files)
            continue
        clients = [_of_peer(peer) for peer in registry.peers if peer.project is running] + streams.get(slug, [])
        projects.append(_of_project(running, registry.state_of(slug), files, clients))
    return ServerStatus(
        running=True,
        data=str(registry.data.path.absolute()),
        projects=projects,
        pid=os.getpid(),
        address=registry.address,
        started=started,
    )


def stopped_status(data: DataDir) -> ServerStatus:
    projects = [_from_files(data, slug, "stopped") for slug in data.slugs()]
    return ServerStatus(running=False, data=str(data.path.absolute()), projects=projects)


def journal_bytes(journal: Path) -> int:
    total = 0
    try:
        for entry in os.scandir(journal):
            with contextlib.suppress(FileNotFoundError):  # expired since
                total += entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else 0
    except FileNotFoundError:  # the project was never opened
        return 0
    return total


def _of_project(project: Project, state: str, files: ProjectStatus, clients: list[ClientStatus]) -> ProjectStatus:
    history, load = project.history, project.load
    is_known = bool(history.epoch)
    order = project.order
    return msgspec.structs.replace(
        files,
        role="" if not order.is_shared else "owner" if order.is_owner else "follower",
        owner=order.owner,
        term=order.term,
        unapplied=order.figures.get("cluster_unapplied", 0),
        state=state,
        why=project.failure.message if project.failure is not None else order.unavailable,
        epoch=history.epoch or files.epoch,
        head=history.head if is_known else files.head,
        oldest=history.oldest if is_known else files.oldest,
        writes_per_minute=project.commit_times.per_minute(time.monotonic()),
        queued=load.queued,
        with_worker=load.with_worker,
        waiting=load.waiting,
        reads_waiting=load.reads_waiting,
        worker_pid=load.worker_pid,
        lattice_version=project.lattice_version,
        clients=sorted(clients, key=lambda client: client.since),
    )


def _of_peer(peer: ClientConnection) -> ClientStatus:
    replication = peer.replication
    return ClientStatus(
        kind="writer" if replication.applied is None else "cache",
        actor=peer.token.actor,
        token=peer.token.id,
        address=peer.address,
        since=replication.since,
        applied=replication.applied,
        behind=peer.behind,
        waiting_bytes=peer.waiting_bytes,
        client_version=replication.client_version,
        lattice_version=replication.lattice_version,
    )


def _streams(registry: ProjectRegistry) -> dict[str, list[ClientStatus]]:
    found: dict[str, list[ClientStatus]] = {}
    for request in registry.ongoing:
        if request.is_stream and request.login is not None:
            token, since = request.login.token, datetime.fromtimestamp(request.since, UTC)
            stream = ClientStatus(
                kind="stream", actor=token.actor, token=token.id, address=request.address, since=since
            )
            found.setdefault(request.project, []).append(stream)
    return found


def _from_files(data: DataDir, slug: str, state: str) -> ProjectStatus:
    journal = data.project(slug).journal
    epoch, oldest, head = _journal_on_disk(journal)
    return ProjectStatus(
        slug=slug, state=state, epoch=epoch, head=head, oldest=oldest, journal_bytes=journal_bytes(journal)
    )


def _journal_on_disk(journal: Path) -> tuple[str, int | None, int | None]:
    try:
        paths = segment_paths(journal)
        newest = read_segment(paths[-1]) if paths else None
        if newest is None:
            return "", None, None
        kept, items = newest
        first = kept.header
        for path in reversed(paths[:-1]):
            header = header_of(path)
            if header is None or header.epoch != first.epoch:
                break
            first = header
    except OSError:
        return "", None, None
    return first.epoch, first.head + 1, items[-1][1].seq if items else kept.header.head


_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_SPANS = ((86_400, "d"), (3600, "h"), (60, "min"))


def status_lines(status: ServerStatus) -> list[str]:
    now = datetime.now(UTC)
    if status.running:
        assert status.started is not None, "a running server knows its beginning"
        head = f"lattice-remote {status.version}, pid {status.pid}, for {_span(now - status.started)}, {status.address}"
    else:
        head = f"No server runs on {status.data}."
    lines = [printable(head)]
    if not status.projects:
        return [*lines, "No projects; create one with: lattice-remote project create SLUG --code CODE"]
    is_node = any(project.role for project in status.projects)
    rows = [_PROJECT_HEAD, *map(_project_row, status.projects)]
    if is_node:
        rows = [
            (*row, *cells) for row, cells in zip(rows, [_ROLE_HEAD, *map(_role_cells, status.projects)], strict=True)
        ]
    lines += ["", *columns(rows)]
    lines += [printable(f"{project.slug}: {project.why}") for project in status.projects if project.why]
    clients = [_client_row(p.slug, client, now) for p in status.projects for client in p.clients]
    if clients:
        lines += ["", *columns([_CLIENT_HEAD, *clients])]
    return lines


_PROJECT_HEAD = ("PROJECT", "STATE", "CHANGE", "A MINUTE", "JOURNAL", "QUEUED", "CLIENTS", "BEHIND")
_ROLE_HEAD = ("ROLE", "OWNER", "TERM", "UNAPPLIED")
_CLIENT_HEAD = ("PROJECT", "CLIENT", "TOKEN", "ADDRESS", "FOR", "BEHIND", "RUNS")


def _project_row(project: ProjectStatus) -> tuple[str, ...]:
    behind = [client.behind for client in project.clients if client.behind is not None]
    waiting = f"+{project.waiting}" if project.waiting else ""
    return (
        project.slug,
        project.state,
        "-" if project.head is None else str(project.head),
        str(project.writes_per_minute),
        _size(project.journal_bytes),
        f"{project.queued + project.with_worker}{waiting}",
        str(len(project.clients)),
        str(max(behind)) if behind else "-",
    )


def _role_cells(project: ProjectStatus) -> tuple[str, ...]:
    return project.role or "-", printable(project.owner or "-"), str(project.term), str(project.unapplied)


def _client_row(slug: str, client: ClientStatus, now: datetime) -> tuple[str, ...]:
    behind = "-" if client.behind is None else str(client.behind)
    if client.waiting_bytes:
        behind += f" ({_size(client.waiting_bytes)})"
    runs = client.client_version if client.kind != "stream" else "(stream)"
    cells = (slug, client.actor, client.token, client.address, _span(now - client.since), behind, runs or "-")
    return tuple(map(printable, cells))


def _size(number: int) -> str:
    for unit, name in _UNITS:
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number} B"


def _span(time: timedelta) -> str:
    seconds = max(0, int(time.total_seconds()))
    for unit, name in _SPANS:
        if seconds >= unit:
            return f"{seconds // unit} {name}"
    return f"{seconds} s"


_NAME = "status.sock"
_MAX_PATH_BYTES = 100
"""A socket's path may have 103 bytes on some systems."""
_TIMEOUT_S = 5.0
_PAUSE_S = 1.0
"""Before accepting again after the system refused."""
_MAX_BYTES = 64 * 1024 * 1024
_END = b"}"

_log = logging.getLogger(__name__)


def listen(directory: Path) -> socket.socket | None:
    """Return the listening socket of a locked data directory, if there can be one.

    A long path makes it change the current directory for a moment.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o177)
    try:
        with _address(directory) as address:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address)
            listener.bind(address)
        listener.listen(16)
    except OSError as error:  # some file systems have no sockets; the projects are served all the same
        listener.close()
        _log.warning("lattice-remote status cannot reach this server: %s: %s", directory / _NAME, error)
        return None
    finally:
        os.umask(umask)
    listener.setblocking(False)
    return listener


async def answer(listener: socket.socket, document: Callable[[], Awaitable[bytes]]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        try:
            connection, _ = await loop.sock_accept(listener)
        except OSError:  # out of file descriptors, for now
            await asyncio.sleep(_PAUSE_S)
            continue
        with connection:
            connection.setblocking(False)
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    await loop.sock_sendall(connection, await document())
            except OSError:  # it has left, or does not read
                continue
            except Exception:  # noqa: BLE001 - the next request may succeed
                _log.exception("cannot send the status")


def remove(directory: Path) -> None:
    with contextlib.suppress(OSError):
        (directory / _NAME).unlink()


def ask(directory: Path) -> bytes | None:
    """Return the answer of a data directory's server; None if none runs.

    A stopping server is asked again, to see whether it has ended. Raises StorageError: it does not answer, or the
    permission is missing.
    """
    answer = _answer_of(directory)
    if answer is not None and not answer.endswith(_END):
        answer = _answer_of(directory)
        if answer is not None and not answer.endswith(_END):
            raise StorageError(f"the server on {directory} could not answer; look at its log")
    return answer


def _answer_of(directory: Path) -> bytes | None:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, _address(directory) as address:
            connection.settimeout(_TIMEOUT_S)
            connection.connect(address)
            return _all_of(connection)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except ConnectionResetError:
        return b""
    except TimeoutError:
        raise StorageError(f"the server on {directory} does not answer; look at its log") from None
    except OSError as error:
        raise StorageError(f"cannot ask the server through {directory / _NAME}: {error.strerror}") from error


def _all_of(connection: socket.socket) -> bytes:
    received = bytearray()
    while piece := connection.recv(1 << 16):
        received += piece
        if len(received) > _MAX_BYTES:
            raise StorageError("the server's answer is too large; look at its log")
    return bytes(received)


@contextlib.contextmanager
def _address(directory: Path) -> Iterator[str]:
    """Yield a path to the socket, valid within the block, however long the directory's is."""
    path = str(directory.absolute() / _NAME)
    if len(os.fsencode(path)) <= _MAX_PATH_BYTES:
        yield path
    else:
        with contextlib.chdir(directory):
            yield _NAME


def present_status(data: DataDir) -> ServerStatus:
    """Return the status of a data directory's server; without one, that of the files.

    Raises StorageError as ``ask``, or if the answer is incomplete or incompatible.
    """
    document = ask(data.path)
    if document is None:
        return stopped_status(data)
    try:
        return msgspec.json.decode(document, type=ServerStatus)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise StorageError("unexpected response from the server; look at its log, or upgrade it") from None


CLUSTER_METRICS = {
    "cluster_owner": "Whether this node owns the project.",
    "cluster_available": "Whether this node has caught up and reaches the cluster.",
    "cluster_term": "Term of the last known owner; it grows with each change of owner.",
    "cluster_unapplied": "Messages of the order that are not in this node's files yet.",
    "cluster_in_doubt": "Appends since the start whose answer was late or missing.",
}


class Gauges(Collector):
    """Metrics of a registry, counted and looked up."""

    def __init__(self, registry: ProjectRegistry) -> None:
        self._registry = registry
        self._journals: dict[str, int] = {}
        registry.metrics.registry.register(self)

    async def scraped(self, accept: str) -> tuple[bytes, str]:
        journals = {slug: project.paths.journal for slug, project in self._registry.projects.items()}
        self._journals = await asyncio.to_thread(lambda: {slug: journal_bytes(at) for slug, at in journals.items()})
        for peer in self._registry.peers:
            peer.count_sent()
        encode, content_type = choose_encoder(accept)
        return encode(self._registry.metrics.registry), content_type

    def describe(self) -> list[Metric]:
        """Look nothing up before a scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the current values, in the event loop's thread."""
        info = GaugeMetricFamily("lattice_remote_info", "The version of this server; always 1.", labels=["version"])
        info.add_metric([lattice_remote.__version__], 1)
        yield info
        yield from self._of_projects()
        yield from self._of_clients()
        ongoing = Tally(request.route for request in self._registry.ongoing)
        yield _gauge("http_in_progress", "HTTP requests being answered, streams included.", ongoing, "route")

    def _of_projects(self) -> Iterator[Metric]:
        projects = self._registry.projects
        up = {slug: int(self._registry.state_of(slug) == "ready") for slug in projects}
        yield _gauge("project_up", "Whether a started project is available.", up)
        yield _gauge("head", "Sequence number of the last change.", {s: p.history.head for s, p in projects.items()})
        yield _gauge("journal_bytes", "Size of the journal on disk.", self._journals)
        queue = GaugeMetricFamily(
            "lattice_remote_queue_requests", "Unanswered writes, by place.", labels=["project", "where"]
        )
        for slug, project in projects.items():
            load = project.load
            queue.add_metric([slug, "queued"], load.queued)
            queue.add_metric([slug, "worker"], load.with_worker)
            queue.add_metric([slug, "resource"], load.waiting)
            queue.add_metric([slug, "read"], load.reads_waiting)
        yield queue
        held = {slug: project.load.in_flight_bytes for slug, project in projects.items()}
        yield _gauge("queue_bytes", "What these writes weigh.", held)
        for name, text in CLUSTER_METRICS.items():
            if of_projects := {s: p.order.figures[name] for s, p in projects.items() if name in p.order.figures}:
                yield _gauge(name, text, of_projects)

    def _of_clients(self) -> Iterator[Metric]:
        slugs = self._registry.projects
        clients = GaugeMetricFamily("lattice_remote_clients", "Connected clients, by kind.", labels=["project", "kind"])
        counted: Tally[tuple[str, str]] = Tally()
        behind, outboxes, fullest = Tally[str](), Tally[str](), dict.fromkeys(slugs, 0)
        for peer in self._registry.peers:
            slug, pending = peer.project.slug, peer.waiting_bytes
            counted[slug, "cache" if peer.replication.applied is not None else "writer"] += 1
            behind[slug] = max(behind[slug], peer.behind or 0)
            outboxes[slug] += pending
            fullest[slug] = max(fullest.get(slug, 0), pending)
        for request in self._registry.ongoing:
            counted[request.project, "stream"] += request.is_stream and request.login is not None
        for slug in slugs:
            for kind in ("cache", "writer", "stream"):
                clients.add_metric([slug, kind], counted[slug, kind])
        yield clients
        yield _gauge("most_behind", "Changes missing on the client furthest behind.", {s: behind[s] for s in slugs})
        yield _gauge("outbox_bytes", "Bytes sent to clients and not read yet.", {s: outboxes[s] for s in slugs})
        yield _gauge("outbox_max_bytes", "The same of the client with the most.", fullest)


def _gauge(name: str, text: str, values: dict[str, int] | Tally[str], label: str = "project") -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"lattice_remote_{name}", text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family
