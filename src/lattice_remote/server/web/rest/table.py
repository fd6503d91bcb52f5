"""All endpoints of a project, routed, and described at ``/openapi.json``."""

from functools import cache

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lattice_remote.server.web.rest import activity, resources, tasks, texts
from lattice_remote.server.web.rest.elsewhere import ELSEWHERE
from lattice_remote.server.web.rest.endpoint import routes_of
from lattice_remote.server.web.rest.openapi import description

__all__ = ["ENDPOINTS", "routes"]

ENDPOINTS = (*tasks.endpoints, *activity.endpoints, *resources.endpoints, *texts.endpoints)


async def _openapi(_: Request) -> Response:
    """Describe the endpoints to whoever asks: it says nothing of this server's projects."""
    return Response(_description(), media_type="application/json")


@cache
def _description() -> bytes:
    return description(ENDPOINTS, ELSEWHERE)


routes = [*routes_of(ENDPOINTS), Route("/openapi.json", _openapi)]
