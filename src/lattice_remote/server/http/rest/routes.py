"""Routes of the REST endpoints, and their OpenAPI description, which ``make protocol`` generates."""

from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lattice_remote.server.http.rest import documents, resources, tasks
from lattice_remote.server.http.rest.endpoint import routes_of

__all__ = ["ENDPOINTS", "routes"]

ENDPOINTS = (*tasks.endpoints, *resources.endpoints, *documents.endpoints)


@cache
def _description() -> bytes:
    return files(__package__).joinpath("openapi.json").read_bytes()


async def _openapi(_: Request) -> Response:
    """Return the OpenAPI description, without a token: it has no data of this server."""
    return Response(_description(), media_type="application/json")


routes = [*routes_of(ENDPOINTS), Route("/openapi.json", _openapi)]
