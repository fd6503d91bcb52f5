"""``/projects/:slug/tasks`` and what lies below it."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lattice_remote.errors import Rejected
from lattice_remote.server.web.bodies import body_of
from lattice_remote.server.web.gate import guest
from lattice_remote.server.web.rest.commands import read, write

__all__ = ["routes"]

_MAX_BODY = 1024 * 1024


class _NewTask(msgspec.Struct, forbid_unknown_fields=True):
    title: str
    description: str | None = None


async def _list(request: Request) -> Response:
    return await read(await guest(request), "list")


async def _create(request: Request) -> Response:
    visitor = await guest(request)
    try:
        new = msgspec.json.decode(await body_of(request, _MAX_BODY), type=_NewTask)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Rejected(f"the request's body: {error}", code="REMOTE_PROTOCOL") from error
    options = [f"--actor={visitor.login.token.actor}"]
    if new.description is not None:
        options.append(f"--description={new.description}")
    return await write(visitor, "create", *options, "--", new.title, success=201)


routes = [
    Route("/projects/{slug}/tasks", _list, methods=["GET"]),
    Route("/projects/{slug}/tasks", _create, methods=["POST"]),
]
