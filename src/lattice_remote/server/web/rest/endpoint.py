"""One endpoint as a value, from which it is routed and described: what it takes and answers, and who carries it out."""

from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from inspect import getdoc
from typing import Any, get_args, get_type_hints

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lattice_remote.server.web.rest.asked import Asked, asked_of

__all__ = ["Endpoint", "routes_of"]

Handler = Callable[[Asked[Any, Any]], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """A method on a path.

    Attributes:
        method: as ``POST``.
        path: with what varies in braces.
        handler: carries it out. Its query and its body are what its one argument is annotated with, and the
            first line of its docstring is the summary.
        data: of what type the ``data`` is that it answers with; ``bytes`` for a text instead of an envelope.
        success: the status when it was carried out.
        others: further statuses, beside those that every endpoint may answer with.
        headers: of the request, beside the common ones: name and meaning.
    """

    method: str
    path: str
    handler: Handler
    data: Any
    success: HTTPStatus = HTTPStatus.OK
    others: Sequence[HTTPStatus] = ()
    headers: dict[str, str] = field(default_factory=dict)

    @cached_property
    def takes(self) -> tuple[type[Any], type[Any]]:
        """The types of its query and of its body."""
        query, body = get_args(get_type_hints(self.handler)["asked"])
        return query, body

    @property
    def name(self) -> str:
        """Of the operation, unique among all endpoints."""
        return self.handler.__name__.strip("_")

    @property
    def text(self) -> str:
        """What it does, for people."""
        return getdoc(self.handler) or ""


def routes_of(endpoints: Sequence[Endpoint]) -> list[Route]:
    """Return one route for each path, in the order in which the paths are first named."""
    by_path: dict[str, dict[str, Endpoint]] = defaultdict(dict)
    for endpoint in endpoints:
        by_path[endpoint.path][endpoint.method] = endpoint
    return [Route(path, _serving(methods), methods=list(methods)) for path, methods in by_path.items()]


def _serving(methods: dict[str, Endpoint]) -> Callable[[Request], Awaitable[Response]]:
    async def serve(request: Request) -> Response:
        endpoint = methods["GET" if request.method == "HEAD" else request.method]
        return await endpoint.handler(await asked_of(request, *endpoint.takes))

    return serve
