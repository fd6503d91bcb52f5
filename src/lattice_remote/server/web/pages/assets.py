"""The files that our pages use. Their address changes with their content, so that browsers keep them for good."""

import hashlib
from functools import cache
from http import HTTPStatus
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lattice_remote.server.network.refusal import Refusal
from lattice_remote.server.web.answers import TurnedAway

__all__ = ["asset", "routes"]

_TYPES = {"pages.css": "text/css", "icon.svg": "image/svg+xml"}


def asset(name: str) -> str:
    """Return the address of one of our files."""
    return f"/pages/{hashlib.sha256(_content(name)).hexdigest()[:12]}/{name}"


@cache
def _content(name: str) -> bytes:
    return files(__package__).joinpath("static", name).read_bytes()


async def _serve(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _TYPES or request.url.path != asset(name):
        raise TurnedAway(Refusal(HTTPStatus.NOT_FOUND, "REMOTE_NOT_FOUND", "there is nothing here"))
    headers = {"Cache-Control": "public, max-age=31536000, immutable"}
    return Response(_content(name), headers=headers, media_type=_TYPES[name])


async def _icon(_: Request) -> Response:
    """Answer what browsers ask for of every server, also for pages that name no icon."""
    return Response(
        _content("icon.svg"), headers={"Cache-Control": "public, max-age=86400"}, media_type="image/svg+xml"
    )


routes = [
    Route("/pages/{digest}/{name}", _serve, methods=["GET"]),
    Route("/favicon.ico", _icon, methods=["GET"]),
]
