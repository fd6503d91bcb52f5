"""Who asks, and for which project: the first line of every handler of a project's path (I9)."""

from dataclasses import dataclass

from starlette.requests import Request

from lattice_remote.server.data.logins import Login
from lattice_remote.server.hub import Hub, bearer
from lattice_remote.server.network.door import Visit
from lattice_remote.server.network.refusal import Refusal
from lattice_remote.server.project.project import Project
from lattice_remote.server.web.answers import TurnedAway

__all__ = ["Guest", "guest", "hub_of", "identified"]


@dataclass(frozen=True)
class Guest:
    """Somebody who may use a project, which is open."""

    hub: Hub
    login: Login
    project: Project


def hub_of(request: Request) -> Hub:
    """Return the hub that a request has come to."""
    hub: Hub = request.app.state.hub
    return hub


def identified(request: Request) -> Login:
    """Return who asks.

    Raises:
        TurnedAway: nobody known, or with too many connections.
    """
    visit: Visit = request.state.visit
    login = hub_of(request).identify(visit, bearer(request.headers.getlist("Authorization")))
    if isinstance(login, Refusal):
        raise TurnedAway(login)
    if (refusal := visit.admit(login.token.id)) is not None:
        raise TurnedAway(refusal)
    return login


async def guest(request: Request) -> Guest:
    """Return who asks, and the project that the path names, once it is open.

    Raises:
        TurnedAway: nobody who may.
        StorageError: the project can't be used.
    """
    slug = request.path_params["slug"]
    login, project = identified(request), _entered(request, slug, None)
    await project.opened()
    # Opening may have taken its time, in which the token or the project was taken away.
    return Guest(hub_of(request), login, _entered(request, slug, project))


def _entered(request: Request, slug: str, project: Project | None) -> Project:
    found = hub_of(request).enter(identified(request), slug)
    if isinstance(found, Refusal):
        raise TurnedAway(found)
    return found if project is None else project
