"""Which path is served by what, over HTTP: everything past the door, with bounded bodies, refused in JSON or as a page.

Each part of the house brings its own routes; here they are put together.
"""

import asyncio
import logging
from collections import Counter
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
from lattice_remote.server.http import dashboard, pages, sse
from lattice_remote.server.http.access_log import record_of, with_records
from lattice_remote.server.http.auth import Cookies, guest, hub_of, identified
from lattice_remote.server.http.middleware import ending_where_unread, refused_body, sent_in_pieces, with_headers
from lattice_remote.server.http.pages import error_response
from lattice_remote.server.http.rest import openapi
from lattice_remote.server.http.sse import Feeds
from lattice_remote.server.registry import ProjectRegistry, State
from lattice_remote.server.status import Gauges
from lattice_remote.server.transport.admission import ConnectionQuota
from lattice_remote.server.transport.api_error import ApiError

__all__ = ["health_routes", "http_app", "metrics_app", "metrics_routes"]

_WHY: dict[State, str] = {
    "starting": "starting: the worker of the project is not ready",
    "closed": "closed: an administrator's command has the project",
    "failed": "failed: the project can't be used; see the server's log",
}


async def _healthz(request: Request) -> Response:
    """Say that the server answers."""
    projects = await asyncio.to_thread(hub_of(request).data.slugs)
    return JSONResponse({"status": "ok", "version": lattice_remote.__version__, "projects": len(projects)})


async def _readyz(request: Request) -> Response:
    """Say whether every project can be used: 200, or 503 with the reasons and how many projects each is of."""
    hub = hub_of(request)
    slugs = await asyncio.to_thread(hub.data.slugs)
    states = Counter(hub.state_of(slug) for slug in slugs)
    reasons = [f"{_WHY[state]} ({states[state]} of {len(slugs)})" for state in _WHY if states[state]]
    if hub.stopping:
        reasons.insert(0, "stopping: the server is shutting down")
    status = "ready" if not reasons else "not ready"
    headers = {"Cache-Control": "no-store"} | ({"Retry-After": "1"} if reasons else {})
    body = {"status": status, "projects": len(slugs), "reasons": reasons}
    return JSONResponse(body, 503 if reasons else 200, headers)


health_routes = [Route("/healthz", _healthz, methods=["GET"]), Route("/readyz", _readyz, methods=["GET"])]


async def _guarded(request: Request) -> Response:
    if not identified(request).token.metrics:
        why = "this token is not for metrics; make one with: lattice-remote token create --metrics"
        raise ApiError(HTTPStatus.FORBIDDEN, "REMOTE_FORBIDDEN", why)
    return await _scraped(request)


async def _scraped(request: Request) -> Response:
    gauges: Gauges = request.app.state.gauges
    figures, content_type = await gauges.scraped(request.headers.get("Accept", ""))
    return Response(figures, headers={"Content-Type": content_type, "Cache-Control": "no-store"})


metrics_routes = [Route("/metrics", _guarded, methods=["GET"])]


def metrics_app(gauges: Gauges) -> ASGIApp:
    """Return what is served on an address of its own: the figures, to whoever can reach it, and nothing else."""
    app = Starlette(routes=[Route("/metrics", _scraped, methods=["GET"])])
    app.state.gauges = gauges
    return app


_log = logging.getLogger(__name__)


def http_app(hub: ProjectRegistry, gauges: Gauges) -> ASGIApp:
    """Return the whole of HTTP for a hub that was started. It wants a ``Visit`` in ``scope["state"]``."""
    routes = [
        *pages.routes,
        *pages.sign_in_routes,
        *pages.asset_routes,
        *health_routes,
        *metrics_routes,
        *pages.project_list_routes,
        Route("/projects/{slug}", _describe),
        *openapi.routes,
        *sse.routes,
        *dashboard.data_routes,
        *dashboard.routes,
    ]
    handlers = {404: _nothing_here, 405: _nothing_here, ApiError: _refuse, RemoteError: _refuse, Exception: _break}
    app = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type] # each takes its own error
    app.state.hub = hub
    app.state.gauges = gauges
    app.state.feeds = Feeds()
    app.state.cookies = Cookies(hub.signing_key, hub.config.sign_in_days)
    bounded = ending_where_unread(sent_in_pieces(app, hub.responses))
    return with_records(with_headers(_past_the_door(bounded, hub, app.state.cookies)), hub, routes)


def _past_the_door(app: ASGIApp, hub: ProjectRegistry, cookies: Cookies) -> ASGIApp:
    """Return the app for those requests only that the door lets pass."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        visit: ConnectionQuota = scope["state"]["visit"]
        headers = Headers(scope=scope)
        token_id = hub.shown(headers.getlist("Authorization")) or _shown_by_cookie(hub, cookies, scope)
        refusal = visit.enter(headers.getlist("X-Forwarded-For"), token_id) or refused_body(scope["method"], headers)
        await (app if refusal is None else error_response(Request(scope), refusal))(scope, receive, send)

    return guarded


def _shown_by_cookie(hub: ProjectRegistry, cookies: Cookies, scope: Scope) -> str:
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
        return error_response(request, ApiError(HTTPStatus.UPGRADE_REQUIRED, "REMOTE_PROTOCOL", why))
    status = HTTPStatus(getattr(error, "status_code", 500))
    headers = getattr(error, "headers", None) or {}
    code, why = "REMOTE_NOT_FOUND", "there is nothing here"
    if status is not HTTPStatus.NOT_FOUND:
        code, why = "REMOTE_PROTOCOL", f"this path takes {headers.get('Allow', 'other methods')} only"
    response = error_response(request, ApiError(status, code, f"{request.method} {request.url.path}: {why}"))
    response.headers.update(headers)
    return response


async def _refuse(request: Request, error: ApiError | RemoteError) -> Response:
    return error_response(request, error if isinstance(error, ApiError) else ApiError.from_remote_error(error))


async def _break(request: Request, error: Exception) -> Response:
    _log.error("%s %s broke down", record_of(request).method, record_of(request).route, exc_info=error)
    why = "the server failed at this; its log says more"
    return error_response(request, ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "REMOTE_FAILED", why))


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
