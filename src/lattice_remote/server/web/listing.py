"""The projects that somebody may see, with counts and last activity: as JSON at ``/projects``, as a page at ``/``."""

import asyncio

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lattice_remote.errors import StorageError
from lattice_remote.protocol.messages import LogEntry
from lattice_remote.server.data.logins import Login
from lattice_remote.server.hub import Hub, State
from lattice_remote.server.web.answers import ok
from lattice_remote.server.web.gate import hub_of, identified

__all__ = ["LastChange", "Listed", "listed", "routes"]


class LastChange(msgspec.Struct, frozen=True):
    """The newest change of a project: when, whose, what, and which tasks it touched (their ids)."""

    seq: int
    time: str
    actor: str
    command: str
    tasks: list[str]


class Listed(msgspec.Struct, frozen=True):
    """One project of the list.

    Attributes:
        name, code: as its ``config.json`` has them; None where it has none.
        state: whether it can be used.
        tasks, archived: how many there are.
        statuses: how many of ``tasks`` are in each status, the most first.
        last: the newest change; None when none is kept.
    """

    slug: str
    name: str | None
    code: str | None
    state: State
    tasks: int
    archived: int
    statuses: dict[str, int]
    last: LastChange | None


async def listed(hub: Hub, login: Login) -> list[Listed]:
    """Return the projects that a token is for, those that are there, by their names.

    Raises:
        StorageError: the files of one can't be read.
    """
    slugs = [slug for slug in sorted(login.token.projects) if hub.data.has_project(slug)]
    return list(await asyncio.gather(*(_one(hub, slug) for slug in slugs)))


async def _one(hub: Hub, slug: str) -> Listed:
    try:
        seen = await hub.overviews.of(slug)
    except OSError as error:
        raise StorageError(f"the files of project {slug!r} can't be read: {error.strerror or error}") from error
    counts = (seen.tasks, seen.archived, seen.statuses)
    return Listed(slug, seen.name, seen.code, hub.state_of(slug), *counts, _last(seen.last))


def _last(entry: LogEntry | None) -> LastChange | None:
    return None if entry is None else LastChange(entry.seq, entry.time, entry.actor, entry.command, entry.tasks)


async def _projects(request: Request) -> Response:
    return ok(await listed(hub_of(request), identified(request)))


routes = [Route("/projects", _projects, methods=["GET"])]
