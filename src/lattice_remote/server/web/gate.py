"""Who asks, and for which project: the first line of every handler of a project's path (I9)."""

from dataclasses import dataclass
from http import HTTPStatus

from itsdangerous import BadSignature, SignatureExpired
from starlette.requests import Request

from lattice_remote.server.data.logins import Login
from lattice_remote.server.hub import Hub, bearer
from lattice_remote.server.network.door import Visit
from lattice_remote.server.network.refusal import Refusal
from lattice_remote.server.network.response_budget import ResponseShare
from lattice_remote.server.project.accounts import Told
from lattice_remote.server.project.project import Project
from lattice_remote.server.web.answers import TurnedAway, wants_page
from lattice_remote.server.web.cookie import Cookies
from lattice_remote.server.web.origin import foreign
from lattice_remote.server.web.record import record_of

__all__ = ["Guest", "cookies_of", "guest", "hub_of", "identified", "refuse_foreign", "signed_in"]


def _unauthorized(why: str) -> Refusal:
    return Refusal(HTTPStatus.UNAUTHORIZED, "REMOTE_UNAUTHORIZED", why)


_NOBODY = _unauthorized("sign in first")


@dataclass(frozen=True)
class Guest:
    """Somebody who may use a project, which is open."""

    hub: Hub
    login: Login
    project: Project
    share: ResponseShare
    """What the response holds in memory."""
    told: Told | None = None
    """Takes the account of a write that it asks for, so that its one line in the log has the change's number."""


def hub_of(request: Request) -> Hub:
    """Return the hub that a request has come to."""
    hub: Hub = request.app.state.hub
    return hub


def cookies_of(request: Request) -> Cookies:
    """Return what makes and reads the cookies of this server."""
    cookies: Cookies = request.app.state.cookies
    return cookies


def identified(request: Request) -> Login:
    """Return who asks: by the token in its ``Authorization`` header, else by the cookie of a browser that is signed in.

    A cookie counts only for what a page of ours asks.

    Raises:
        TurnedAway: nobody known, or with too many connections, or with a cookie from another site's page.
    """
    visit: Visit = request.state.visit
    authorization = request.headers.getlist("Authorization")
    login = None if _has_token(authorization) else signed_in(request)
    if login is None and wants_page(request) and not authorization:
        login = _NOBODY  # people who look in are no guessers: they are shown where to sign in
    if login is None:
        login = hub_of(request).identify(visit, bearer(authorization))
    if isinstance(login, Refusal):
        raise TurnedAway(login)
    record_of(request).login = login
    share: ResponseShare = request.state.share
    share.token_id = login.token.id
    if (refusal := visit.admit(login.token.id)) is not None:
        raise TurnedAway(refusal)
    return login


def _has_token(authorization: list[str]) -> bool:
    """Tell whether it is a token that is shown. A proxy in front may ask browsers for a password, which is none."""
    return any(value.lower().startswith("bearer") for value in authorization)


def signed_in(request: Request) -> Login | Refusal | None:
    """Return who has signed in with this browser, or why that has ended; None when it brings no cookie.

    A cookie of ours that is good no more is no failed login: pages that are still open go on asking.

    Raises:
        TurnedAway: a page of another site has made the request.
    """
    try:
        shown = cookies_of(request).read(request)
    except SignatureExpired:
        return _unauthorized("you have signed in too long ago; sign in again")
    except BadSignature:
        visit: Visit = request.state.visit
        return visit.failed() or _unauthorized("the cookie is not one of this server; sign in again")
    if shown is None:
        return None
    refuse_foreign(request)
    return hub_of(request).identify_again(shown.token_id, shown.sha256)


def refuse_foreign(request: Request) -> None:
    """Do nothing if a request comes from a page of ours.

    Raises:
        TurnedAway: it was made by a page of another site.
    """
    if why := foreign(request):
        raise TurnedAway(Refusal(HTTPStatus.FORBIDDEN, "REMOTE_FORBIDDEN", why))


async def guest(request: Request) -> Guest:
    """Return who asks, and the project that the path names, once it is open.

    Raises:
        TurnedAway: nobody who may.
        Rejected: the token has more answers outstanding than it may.
        StorageError: the project can't be used.
    """
    slug = request.path_params["slug"]
    login, project = identified(request), _entered(request, slug, None)
    share: ResponseShare = request.state.share
    await share.room()
    await project.opened()
    # Opening may have taken its time, in which the token or the project was taken away.
    return Guest(hub_of(request), login, _entered(request, slug, project), share, record_of(request).take)


def _entered(request: Request, slug: str, project: Project | None) -> Project:
    found = hub_of(request).enter(identified(request), slug)
    if isinstance(found, Refusal):
        raise TurnedAway(found)
    record_of(request).project = found.slug
    return found if project is None else project
