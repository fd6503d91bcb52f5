"""HTTP application: its routes, admission, error responses and health checks."""

import asyncio
import logging
from collections import Counter
from functools import cache
from http import HTTPStatus
from importlib.resources import files

import msgspec
from itsdangerous import BadData
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import lattice_remote
from lattice_remote.errors import RemoteError
from lattice_remote.server.http import dashboard, pages, sse
from lattice_remote.server.http.auth import Cookies, authenticated, registry_of, request_context
from lattice_remote.server.http.middleware import (
    closing_after_unread_body,
    log_entry_of,
    refuse_body,
    with_access_log,
    with_paced_bodies,
    with_security_headers,
)
from lattice_remote.server.http.pages import error_response
from lattice_remote.server.http.rest import resources, routes_of, tasks, texts
from lattice_remote.server.http.sse import Feeds
from lattice_remote.server.registry import ProjectRegistry, State
from lattice_remote.server.status import Gauges
from lattice_remote.server.transport.admission import ConnectionQuota
from lattice_remote.server.transport.api_error import ApiError

__all__ = ["ENDPOINTS", "Health", "ProjectDescription", "Readiness", "http_app", "metrics_app"]


_WHY: dict[State, str] = {
    "starting": "starting: the worker of the project is not ready",
    "closed": "closed: the project is in use by an administrator's command",
    "failed": "failed: the project is not usable; see the server's log",
}


class Health(msgspec.Struct):
    """A sign that the server responds."""

    status: str
    version: str
    projects: int


async def _healthz(request: Request) -> Response:
    projects = await asyncio.to_thread(registry_of(request).data.slugs)
    return _json(Health("ok", lattice_remote.__version__, len(projects)))


class Readiness(msgspec.Struct):
    """State of the projects, with the reasons for those that are not usable."""

    status: str
    projects: int
    reasons: list[str]


async def _readyz(request: Request) -> Response:
    """Report whether every project is usable: 200, or 503 with the reasons and the number of projects for each."""
    registry = registry_of(request)
    slugs = await asyncio.to_thread(registry.data.slugs)
    states = Counter(registry.state_of(slug) for slug in slugs)
    reasons = [f"{_WHY[state]} ({states[state]} of {len(slugs)})" for state in _WHY if states[state]]
    if registry.stopping:
        reasons.insert(0, "stopping: the server is shutting down")
    status = "ready" if not reasons else "not ready"
    headers = {"Cache-Control": "no-store"} | ({"Retry-After": "1"} if reasons else {})
    return _json(Readiness(status, len(slugs), reasons), 503 if reasons else 200, headers)


def _json(content: msgspec.Struct, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


async def _metrics_with_token(request: Request) -> Response:
    if not authenticated(request).token.metrics:
        why = "this token is not for metrics; make one with: lattice-remote token create --metrics"
        raise ApiError(HTTPStatus.FORBIDDEN, "REMOTE_FORBIDDEN", why)
    return await _metrics(request)


async def _metrics(request: Request) -> Response:
    gauges: Gauges = request.app.state.gauges
    figures, content_type = await gauges.scraped(request.headers.get("Accept", ""))
    return Response(figures, headers={"Content-Type": content_type, "Cache-Control": "no-store"})


def metrics_app(gauges: Gauges) -> ASGIApp:
    app = Starlette(routes=[Route("/metrics", _metrics, methods=["GET"])])
    app.state.gauges = gauges
    return app


_log = logging.getLogger(__name__)


def http_app(registry: ProjectRegistry, gauges: Gauges) -> ASGIApp:
    """Return the application for a started registry; ``scope["state"]["quota"]`` is the ``ConnectionQuota``."""
    routes = [
        *pages.routes,
        *pages.sign_in_routes,
        *pages.asset_routes,
        Route("/healthz", _healthz, methods=["GET"]),
        Route("/readyz", _readyz, methods=["GET"]),
        Route("/metrics", _metrics_with_token, methods=["GET"]),
        *pages.project_list_routes,
        Route("/projects/{slug}", _describe),
        *routes_of(ENDPOINTS),
        Route("/openapi.json", _openapi),
        *sse.routes,
        *dashboard.routes,
    ]
    handlers = {404: _not_found, 405: _not_found, ApiError: _refuse, RemoteError: _refuse, Exception: _crashed}
    app = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type] # each takes its own error
    app.state.registry = registry
    app.state.gauges = gauges
    app.state.feeds = Feeds()
    app.state.overviews = pages.Overviews(registry.data)
    app.state.cookies = Cookies(registry.auth.signing_key, registry.config.sign_in_days)
    bounded = closing_after_unread_body(with_paced_bodies(app, registry.responses))
    admitted = with_security_headers(_behind_admission(bounded, registry, app.state.cookies))
    return with_access_log(admitted, registry, routes)


def _behind_admission(app: ASGIApp, registry: ProjectRegistry, cookies: Cookies) -> ASGIApp:

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        quota: ConnectionQuota = scope["state"]["quota"]
        headers = Headers(scope=scope)
        token_id = registry.auth.shown(headers.getlist("Authorization")) or _shown_by_cookie(registry, cookies, scope)
        refusal = quota.enter(headers.getlist("X-Forwarded-For"), token_id) or refuse_body(scope["method"], headers)
        await (app if refusal is None else error_response(Request(scope), refusal))(scope, receive, send)

    return guarded


def _shown_by_cookie(registry: ProjectRegistry, cookies: Cookies, scope: Scope) -> str:
    """Return the id of the valid token of the browser's cookie, "" for none; its rights are not checked."""
    try:
        shown = cookies.read(Request(scope))
    except BadData:
        return ""
    return "" if shown is None else registry.auth.shown_before(*shown)


# --- errors ---


async def _not_found(request: Request, error: Exception) -> Response:
    if request.url.path.endswith("/ws"):
        why = "this is a WebSocket endpoint: upgrade the request"
        return error_response(request, ApiError(HTTPStatus.UPGRADE_REQUIRED, "REMOTE_PROTOCOL", why))
    status = HTTPStatus(getattr(error, "status_code", 500))
    headers = getattr(error, "headers", None) or {}
    code, why = "REMOTE_NOT_FOUND", "not found"
    if status is not HTTPStatus.NOT_FOUND:
        code, why = "REMOTE_PROTOCOL", f"this path allows {headers.get('Allow', 'other methods')} only"
    response = error_response(request, ApiError(status, code, f"{request.method} {request.url.path}: {why}"))
    response.headers.update(headers)
    return response


async def _refuse(request: Request, error: ApiError | RemoteError) -> Response:
    return error_response(request, error if isinstance(error, ApiError) else ApiError.from_remote_error(error))


async def _crashed(request: Request, error: Exception) -> Response:
    _log.error("%s %s crashed", log_entry_of(request).method, log_entry_of(request).route, exc_info=error)
    why = "the server failed; see its log"
    return error_response(request, ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "REMOTE_FAILED", why))


class ProjectDescription(msgspec.Struct):
    """Rights of a token in a project, and the project's position."""

    project: str
    actor: str
    act_as: list[str]
    epoch: str
    head: int
    position: str
    server_version: str
    lattice_version: str


async def _describe(request: Request) -> Response:
    context = await request_context(request)
    token, project, history = context.login.token, context.project, context.project.history
    where = (history.epoch, history.head, str(history.position))
    versions = (lattice_remote.__version__, project.lattice_version)
    return _json(ProjectDescription(project.slug, token.actor, token.act_as, *where, *versions))


ENDPOINTS = (*tasks.endpoints, *resources.endpoints, *texts.endpoints)


@cache
def _openapi_json() -> bytes:
    return files(texts.__package__).joinpath("openapi.json").read_bytes()


async def _openapi(_: Request) -> Response:
    """Return the OpenAPI description, to clients without a token too."""
    return Response(_openapi_json(), media_type="application/json")
