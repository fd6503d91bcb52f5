"""How the server is, for monitors and whoever balances load; without a token, so without a project's name."""

import asyncio
from collections import Counter

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import lattice_remote
from lattice_remote.server.hub import State
from lattice_remote.server.web.gate import hub_of

__all__ = ["routes"]

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


routes = [Route("/healthz", _healthz, methods=["GET"]), Route("/readyz", _readyz, methods=["GET"])]
