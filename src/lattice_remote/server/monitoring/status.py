"""What a server says of itself: its projects, where each stands, and how far each of its clients is.

``lattice-remote status --json`` prints these fields; names are only added.
"""

import asyncio
import os
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec

import lattice_remote
from lattice_remote.server.data.datadir import DataDir
from lattice_remote.server.hub import Hub
from lattice_remote.server.journal.segments import header_of, read_segment, segment_paths
from lattice_remote.server.project.peer import Peer
from lattice_remote.server.project.project import Project

__all__ = ["ClientStatus", "ProjectStatus", "ServerStatus", "journal_bytes", "status_of", "stopped_status"]


class ClientStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody who is connected: a client with a copy, one that only writes, or a stream over HTTP.

    Attributes:
        kind: ``copy``, ``writer`` or ``stream``.
        actor, token: whose token it is, and its id.
        since: when it came.
        applied: the last change that its copy holds, as it says; null for the others.
        behind: how many changes it has still to apply; null for the others.
        waiting_bytes: what it was sent and has not taken yet.
        client_version, lattice_version: what it runs, as it says.
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
        state: ``ready``, ``starting``, ``closed`` (an administrator's command has it), ``failed``; ``idle`` when nobody
            has asked for it since the server's start; ``stopped`` when no server runs.
        why: of a project that has failed.
        head: the number of its last change; null when it never had a journal.
        oldest: the first change that its journal keeps.
        writes_per_minute: changes within the last minute.
        queued, with_worker, waiting: requests in its queue, with its worker, and waiting for a resource.
        reads_waiting: reads over HTTP that wait for the one before them.
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


class ServerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A server; without one ``running`` is false, and the projects are told of from their files."""

    running: bool
    data: str
    projects: list[ProjectStatus]
    version: str = lattice_remote.__version__
    pid: int | None = None
    address: str = ""
    started: datetime | None = None


async def status_of(hub: Hub, started: datetime) -> ServerStatus:
    """Return how a running server is at this moment."""
    slugs = await asyncio.to_thread(hub.data.slugs)
    on_disk = await asyncio.to_thread(lambda: {slug: _from_files(hub.data, slug, "idle") for slug in slugs})
    streams = _streams(hub)
    projects = []
    for slug, files in on_disk.items():
        running = hub.projects.get(slug)
        if running is None:
            projects.append(files)
            continue
        clients = [_of_peer(peer) for peer in hub.peers if peer.project is running] + streams.get(slug, [])
        projects.append(_of_project(running, hub.state_of(slug), files, clients))
    return ServerStatus(
        running=True,
        data=str(hub.data.path.absolute()),
        projects=projects,
        pid=os.getpid(),
        address=hub.address,
        started=started,
    )


def stopped_status(data: DataDir) -> ServerStatus:
    """Return what the files say while no server runs."""
    projects = [_from_files(data, slug, "stopped") for slug in data.slugs()]
    return ServerStatus(running=False, data=str(data.path.absolute()), projects=projects)


def journal_bytes(journal: Path) -> int:
    """Return how much a journal takes on the disk, the lists of files in it included."""
    total = 0
    try:
        for entry in os.scandir(journal):
            total += _size_of(entry)
    except FileNotFoundError:  # nothing was ever done here
        return 0
    return total


def _size_of(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else 0
    except FileNotFoundError:  # expired meanwhile
        return 0


def _of_project(project: Project, state: str, files: ProjectStatus, clients: list[ClientStatus]) -> ProjectStatus:
    """Return how a project is; until its worker has opened it, its files say where it stands."""
    history, load = project.history, project.load
    is_known = bool(history.epoch)
    return msgspec.structs.replace(
        files,
        state=state,
        why=project.failure.message if project.failure is not None else "",
        epoch=history.epoch or files.epoch,
        head=history.head if is_known else files.head,
        oldest=history.oldest if is_known else files.oldest,
        writes_per_minute=project.pace.per_minute(time.monotonic()),
        queued=load.queued,
        with_worker=load.with_worker,
        waiting=load.waiting,
        reads_waiting=load.reads_waiting,
        worker_pid=load.worker_pid,
        lattice_version=project.lattice_version,
        clients=sorted(clients, key=lambda client: client.since),
    )


def _of_peer(peer: Peer) -> ClientStatus:
    standing = peer.standing
    return ClientStatus(
        kind="writer" if standing.applied is None else "copy",
        actor=peer.token.actor,
        token=peer.token.id,
        address=peer.address,
        since=standing.since,
        applied=standing.applied,
        behind=peer.behind,
        waiting_bytes=peer.waiting_bytes,
        client_version=standing.client_version,
        lattice_version=standing.lattice_version,
    )


def _streams(hub: Hub) -> dict[str, list[ClientStatus]]:
    found: dict[str, list[ClientStatus]] = {}
    for request in hub.ongoing:
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
    """Return epoch, first and last change of a journal that nobody may be writing; what can't be read is not known."""
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
