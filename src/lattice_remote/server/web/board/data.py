"""``GET /projects/:slug/dashboard/data``: what the board shows first, in one request, and from where to listen on.

What is in it is what the dashboard's own handlers answer, put together: so that later versions of lattice come along.
"""

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lattice_remote.errors import StorageError
from lattice_remote.server.data.read_ipc import Found, ReadPage
from lattice_remote.server.web.answers import ok
from lattice_remote.server.web.gate import guest

__all__ = ["routes"]

_PARTS = ("config", "tasks", "stats")


class _Envelope(msgspec.Struct, frozen=True):
    data: msgspec.Raw


async def _data(request: Request) -> Response:
    """Answer with the board, and with the position up to which it is, for ``events/stream?since=``.

    ``exact`` says that it is what the project was at that position. Without it, while writes follow one on the other,
    it may hold some of what came next, which the events then tell again.
    """
    visitor = await guest(request)
    project = visitor.project
    history = project.history
    before = history.position
    pages = [ReadPage(f"/api/{part}") for part in _PARTS]
    found, is_exact = await project.reader.read_together(pages, visitor.share)
    at = history.position if is_exact else before
    board = {part: _data_of(each) for part, each in zip(_PARTS, found, strict=True)}
    where = {"epoch": at.epoch, "head": at.seq, "position": str(at), "exact": is_exact}
    return ok({"project": project.slug, **where, **board})


def _data_of(found: Found) -> msgspec.Raw:
    if found.status != 200:
        raise StorageError("the server can't read this project's board; see its log")
    return msgspec.json.decode(found.body, type=_Envelope).data


routes = [Route("/projects/{slug}/dashboard/data", _data, methods=["GET"])]
