"""Which path is served by what, over HTTP: everything past the door, with bounded bodies, refused in JSON or as a page.

Each part of the house brings its own routes; here they are put together.
"""

import logging
from http import HTTPStatus

from itsdangerous import BadData
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import lattice_remote
from lattice_remote.errors import RemoteError
from lattice_remote.server.hub import Hub
from lattice_remote.server.monitoring.gauges import Gauges
from lattice_remote.server.network.door import Visit
from lattice_remote.server.network.refusal import Refusal
from lattice_remote.server.web import health, listing, scrape
from lattice_remote.server.web.answers import TurnedAway, failed
from lattice_remote.server.web.board import data as board_data
from lattice_remote.server.web.board import page as board
from lattice_remote.server.web.bodies import ending_where_unread, refused_body, sent_in_pieces
from lattice_remote.server.web.cookie import Cookies
from lattice_remote.server.web.events import stream
from lattice_remote.server.web.events.feed import Feeds
from lattice_remote.server.web.gate import guest
from lattice_remote.server.web.headers import with_headers
from lattice_remote.server.web.pages import assets, home, signing_in
from lattice_remote.server.web.pages.refusing import say
from lattice_remote.server.web.record import record_of, with_records
from lattice_remote.server.web.rest import table

__all__ = ["http_app"]

_log = logging.getLogger(__name__)


def http_app(hub: Hub, gauges: Gauges) -> ASGIApp:
    """Return the whole of HTTP for a hub that was started. It wants a ``Visit`` in ``scope["state"]``."""
    routes = [
        *home.routes,
        *signing_in.routes,
        *assets.routes,
        *health.routes,
        *scrape.routes,
        *listing.routes,
        Route("/projects/{slug}", _describe),
        *table.routes,
        *stream.routes,
        *board_data.routes,
        *board.routes,
    ]
    handlers = {404: _nothing_here, 405: _nothing_here, TurnedAway: _turn_away, RemoteError: _fail, Exception: _break}
    app = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type] # each takes its own error
    app.state.hub = hub
    app.state.gauges = gauges
    app.state.feeds = Feeds()
    app.state.cookies = Cookies(hub.signing_key, hub.config.sign_in_days)
    bounded = ending_where_unread(sent_in_pieces(app, hub.responses))
    return with_records(with_headers(_past_the_door(bounded, hub, app.state.cookies)), hub, routes)


def _past_the_door(app: ASGIApp, hub: Hub, cookies: Cookies) -> ASGIApp:
    """Return the app for those requests only that the door lets pass."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        visit: Visit = scope["state"]["visit"]
        headers = Headers(scope=scope)
        token_id = hub.shown(headers.getlist("Authorization")) or _shown_by_cookie(hub, cookies, scope)
        refusal = visit.enter(headers.getlist("X-Forwarded-For"), token_id) or refused_body(scope["method"], headers)
        await (app if refusal is None else say(Request(scope), refusal))(scope, receive, send)

    return guarded


def _shown_by_cookie(hub: Hub, cookies: Cookies, scope: Scope) -> str:
    """Return the id of the valid token with which a browser has signed in, "" for none; whether it may is not said."""
    try:
        shown = cookies.read(Request(scope))
    except BadData:
        return ""
    return "" if shown is None else hub.shown_before(shown.token_id, shown.sha256)


# --- what ends otherwise than a handler wants ---


async def _nothing_here(request: Request, error: Exception) -> Response:
    if request.url.path.endswith("/ws"):
        why = "this is a WebSocket endpoint: upgrade the request"
        return say(request, Refusal(HTTPStatus.UPGRADE_REQUIRED, "REMOTE_PROTOCOL", why))
    status = HTTPStatus(getattr(error, "status_code", 500))
    headers = getattr(error, "headers", None) or {}
    code, why = "REMOTE_NOT_FOUND", "there is nothing here"
    if status is not HTTPStatus.NOT_FOUND:
        code, why = "REMOTE_PROTOCOL", f"this path takes {headers.get('Allow', 'other methods')} only"
    response = say(request, Refusal(status, code, f"{request.method} {request.url.path}: {why}"))
    response.headers.update(headers)
    return response


async def _turn_away(request: Request, error: TurnedAway) -> Response:
    return say(request, error.refusal)


async def _fail(request: Request, error: RemoteError) -> Response:
    response = say(request, failed(error))
    del response.headers["Connection"]  # who was let in may go on asking
    return response


async def _break(request: Request, error: Exception) -> Response:
    _log.error("%s %s broke down", record_of(request).method, record_of(request).route, exc_info=error)
    why = "the server failed at this; its log says more"
    return say(request, Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "REMOTE_FAILED", why))


# --- what is not worth a file ---


async def _describe(request: Request) -> Response:
    """Say what a token may do in a project, and where the project stands. A client asks before it adds a remote."""
    visitor = await guest(request)
    token, project = visitor.login.token, visitor.project
    return JSONResponse(
        {
            "project": project.slug,
            "actor": token.actor,
            "act_as": token.act_as,
            "epoch": project.history.epoch,
            "head": project.history.head,
            "position": str(project.history.position),
            "server_version": lattice_remote.__version__,
            "lattice_version": project.lattice_version,
        }
    )
