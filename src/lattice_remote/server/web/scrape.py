"""``/metrics``: the figures for Prometheus, with a token that is for nothing else, or on an address of their own."""

from http import HTTPStatus

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from lattice_remote.server.monitoring.gauges import Gauges
from lattice_remote.server.network.refusal import Refusal
from lattice_remote.server.web.answers import TurnedAway
from lattice_remote.server.web.gate import identified

__all__ = ["metrics_app", "routes"]


async def _guarded(request: Request) -> Response:
    if not identified(request).token.metrics:
        why = "this token is not for metrics; make one with: lattice-remote token create --metrics"
        raise TurnedAway(Refusal(HTTPStatus.FORBIDDEN, "REMOTE_FORBIDDEN", why))
    return await _scraped(request)


async def _scraped(request: Request) -> Response:
    gauges: Gauges = request.app.state.gauges
    figures, content_type = await gauges.scraped(request.headers.get("Accept", ""))
    return Response(figures, headers={"Content-Type": content_type, "Cache-Control": "no-store"})


routes = [Route("/metrics", _guarded, methods=["GET"])]


def metrics_app(gauges: Gauges) -> ASGIApp:
    """Return what is served on an address of its own: the figures, to whoever can reach it, and nothing else."""
    app = Starlette(routes=[Route("/metrics", _scraped, methods=["GET"])])
    app.state.gauges = gauges
    return app
