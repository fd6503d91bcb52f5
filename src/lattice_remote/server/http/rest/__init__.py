"""REST endpoints: values for routes and the OpenAPI description, and lattice's commands behind them."""

import base64
import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from inspect import getdoc
from typing import Annotated, Any, get_args, get_type_hints

import msgspec
from msgspec import UNSET, Meta, UnsetType, structs
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lattice_remote.errors import Rejected, StorageError
from lattice_remote.protocol.messages import Position, Returned
from lattice_remote.server.http.auth import RequestContext, request_context
from lattice_remote.server.http.middleware import read_body
from lattice_remote.server.http.writes import IdempotencyKey, call, header_of, idempotency_key, run
from lattice_remote.server.ipc import ReadCommand, ReadResult
from lattice_remote.server.transport.api_error import ApiError

__all__ = [
    "Actor",
    "Author",
    "Endpoint",
    "EndpointRequest",
    "Json",
    "Nothing",
    "PageQuery",
    "Provenance",
    "Query",
    "envelope_response",
    "options",
    "output_response",
    "page_of",
    "read",
    "read_output",
    "routes_of",
    "validated_request",
    "with_position",
    "write",
    "write_together",
]


MAX_JSON_BYTES = 1024 * 1024


class Query(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Query parameters, each at most once."""


class Json(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A JSON body."""


class Nothing(Query, frozen=True):
    """No query, or no body."""


@dataclass(frozen=True)
class EndpointRequest[Q: Query, B: Json | Nothing | bytes]:
    """A validated request to a project.

    Attributes:
        query, body: of the types that the handler declares.
        once: id and fingerprint of a write.
    """

    context: RequestContext
    path: dict[str, str]
    query: Q
    body: B
    once: IdempotencyKey
    http: Request


async def validated_request(request: Request, query: type[Any], body: type[Any]) -> EndpointRequest[Any, Any]:
    """Return a request, checked. Raises ApiError or Rejected."""
    context = await request_context(request)
    if not all(part.isprintable() for part in request.path_params.values()):
        raise Rejected("not found: the name has characters that are not allowed", code="REMOTE_NOT_FOUND")
    found = _query(request, query)
    content = b""
    if body is not Nothing:
        most = context.registry.config.limits.text_bytes if body is bytes else MAX_JSON_BYTES
        if header_of(request, "Content-Encoding").lower() not in ("", "identity"):
            why = "send the body without Content-Encoding"
            raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "REMOTE_PROTOCOL", why)
        content = await read_body(request, most)
    parsed = content if body is bytes else _json(request, content, body)
    return EndpointRequest(
        context, dict(request.path_params), found, parsed, idempotency_key(request, context, content), request
    )


def _query(request: Request, kind: type[Query]) -> Query:
    given = request.query_params.multi_items()
    for name, times in Counter(name for name, _ in given).items():
        if times > 1:
            raise Rejected(f"{name!r} occurs {times} times in the query", code="REMOTE_INVALID")
    try:
        return msgspec.convert(dict(given), kind, strict=False)
    except msgspec.ValidationError as error:
        raise Rejected(f"the query: {error}", code="REMOTE_INVALID") from None


def _json(request: Request, content: bytes, kind: type[Any]) -> Any:
    """Return a decoded body, or an empty object."""
    media_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if content and media_type != "application/json":
        why = "send the body with Content-Type: application/json"
        raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "REMOTE_PROTOCOL", why)
    try:
        found = msgspec.json.decode(content or b"{}", type=kind)
        json.loads(content or b"{}", object_pairs_hook=_named_once)  # its depth is bounded by its type
    except msgspec.ValidationError as error:
        raise Rejected(f"the request's body: {error}", code="REMOTE_INVALID") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Rejected(f"the request's body is not JSON: {error}", code="REMOTE_PROTOCOL") from None
    return found


def _named_once(pairs: list[tuple[str, Any]]) -> None:
    for name, times in Counter(name for name, _ in pairs).items():
        if times > 1:
            raise Rejected(f"the request's body: {name[:60]!r} is given {times} times", code="REMOTE_INVALID")


EndpointHandler = Callable[[EndpointRequest[Any, Any]], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """A method on a path.

    Attributes:
        path: with variables in braces.
        handler: its argument's annotation declares the query and the body; its docstring's first line is the summary.
        data: type of the ``data`` in the response; ``bytes`` for a text without an envelope.
        others: further statuses, beside those of every endpoint.
        headers: of the request, beside the common ones: name and meaning.
    """

    method: str
    path: str
    handler: EndpointHandler
    data: Any
    success: HTTPStatus = HTTPStatus.OK
    others: Sequence[HTTPStatus] = ()
    headers: dict[str, str] = field(default_factory=dict)

    @cached_property
    def takes(self) -> tuple[type[Any], type[Any]]:
        query, body = get_args(get_type_hints(self.handler)["request"])
        return query, body

    @property
    def name(self) -> str:
        """Operation id, unique among all endpoints."""
        return self.handler.__name__.strip("_")

    @property
    def text(self) -> str:
        return getdoc(self.handler) or ""


def routes_of(endpoints: Sequence[Endpoint]) -> list[Route]:
    by_path: dict[str, dict[str, Endpoint]] = defaultdict(dict)
    for endpoint in endpoints:
        by_path[endpoint.path][endpoint.method] = endpoint
    return [Route(path, _serving(methods), methods=list(methods)) for path, methods in by_path.items()]


def _serving(methods: dict[str, Endpoint]) -> Callable[[Request], Awaitable[Response]]:
    async def serve(request: Request) -> Response:
        endpoint = methods["GET" if request.method == "HEAD" else request.method]
        return await endpoint.handler(await validated_request(request, *endpoint.takes))

    return serve


MAX_LIMIT = 1000


class PageQuery(Query, frozen=True, kw_only=True):
    """A page of a list. Without ``limit`` it is the whole list; ``cursor`` is the ``next`` of the previous page."""

    limit: Annotated[int, Meta(ge=1, le=MAX_LIMIT)] | UnsetType = UNSET
    cursor: Annotated[str, Meta(min_length=1, max_length=400, pattern="^[A-Za-z0-9_=-]+$")] | UnsetType = UNSET


def page_of(found: ReadResult, page: PageQuery, *, by_id: bool) -> ReadResult:
    """Return ``found`` with one page of its list; an error is unchanged.

    ``by_id``: the list is sorted by id, and its items may disappear. Raises Rejected: a cursor of another list.
    """
    items = found.items
    if items is None or (page.limit is UNSET and page.cursor is UNSET):
        return found
    first = 0 if page.cursor is UNSET else _place_after(page.cursor, items.ids, by_id=by_id)
    count = len(items.ids)
    end = count if page.limit is UNSET else min(first + page.limit, count)
    part = found.body[items.ends[first - 1] + 1 if first else items.start : items.ends[end - 1]] if first < end else b""
    last = base64.urlsafe_b64encode(items.ids[end - 1].encode()) if end < count else b""
    following = b',"next":"%s"' % last if last else b""
    return structs.replace(found, body=b"".join((found.body[: items.start], part, b"]", following, b"}")))


def _place_after(cursor: str, ids: list[str], *, by_id: bool) -> int:
    try:
        last = base64.urlsafe_b64decode(cursor).decode()
    except ValueError:
        raise Rejected("the cursor is malformed; restart without it", code="REMOTE_INVALID") from None
    if by_id:
        return bisect_right(ids, last)
    try:
        return ids.index(last) + 1
    except ValueError:
        raise Rejected("the cursor belongs to another list; restart without it", code="REMOTE_INVALID") from None


# --- lattice's commands as requests; the response is their output with --json ---

_STATUSES = {
    "NOT_FOUND": HTTPStatus.NOT_FOUND,
    "CONFLICT": HTTPStatus.CONFLICT,
    "ALREADY_CLAIMED": HTTPStatus.CONFLICT,
    "RESOURCE_HELD": HTTPStatus.CONFLICT,
    "NOT_HELD": HTTPStatus.CONFLICT,
    "EXPIRED": HTTPStatus.CONFLICT,
    "TIMEOUT": HTTPStatus.CONFLICT,
    "REMOTE_FAILED": HTTPStatus.INTERNAL_SERVER_ERROR,
}
"""422 for any other."""
_MESSAGE_CHARS = 2000


class Author(Json, frozen=True, kw_only=True):
    """The author: ``actor``, by default the token's, which must be allowed to act as it.

    ``name`` is a session of this token, for example ``Argus-3``, which stands for an actor.
    """

    actor: str | None = None
    name: str | None = None


class Provenance(Author, frozen=True, kw_only=True):
    """Author and reason: the options that lattice's commands share."""

    reason: str | None = None
    on_behalf_of: str | None = None
    triggered_by: str | None = None
    model: str | None = None
    session: str | None = None


Actor = str | dict[str, Any]
"""In lattice's output: an actor, or a session as a map."""


class _Error(msgspec.Struct, frozen=True):
    code: str = ""


class _Envelope(msgspec.Struct, frozen=True):
    ok: bool = False
    data: msgspec.Raw = msgspec.Raw(b"null")
    error: _Error = _Error()


def options(body: Author, request: EndpointRequest[Any, Any], *, without: Collection[str] = ()) -> list[str]:
    """Return a body's fields as options of a command, one argument each, so that no value is taken for another.

    None and False omit the option, True makes a flag, and commas separate the items of a list.
    """
    given = {name: getattr(body, name) for name in body.__struct_fields__ if name not in without}
    if body.actor is None and body.name is None:
        given["actor"] = request.context.login.token.actor
    return [option for name, value in given.items() for option in _option(name.replace("_", "-"), value)]


def _option(name: str, value: object) -> list[str]:
    match value:
        case None | False:
            return []
        case True:
            return [f"--{name}"]
        case list():
            return [f"--{name}={','.join(value)}"]
        case _:
            return [f"--{name}={value}"]


async def read(request: EndpointRequest[Any, Any], path: str, *arguments: str) -> Response:
    return output_response(await read_output(request, path, *arguments))


def output_response(printed: ReadResult) -> Response:
    return envelope_response(printed.body) if printed.status else _in_json(printed.body, HTTPStatus.OK)


async def read_output(
    request: EndpointRequest[Any, Any], path: str, *arguments: str, list_at: tuple[str, ...] = ()
) -> ReadResult:
    """Return the output of a read-only command. Raises StorageError: it crashed.

    A node of a cluster that lags behind does not refuse: another node may have acknowledged the task a moment ago.
    """
    asking, project = ReadCommand(path, (*path.split(), "--json", *arguments), list_at), request.context.project
    printed = await project.reader.read(asking, request.context.share)
    if printed.body and printed.status and await project.order.catch_up():
        printed = await project.reader.read(asking, request.context.share)
    if not printed.body:
        raise StorageError(f"the server cannot run 'lattice {path}': {_error_message(printed.message)}")
    return printed


async def write(
    request: EndpointRequest[Any, Any], path: str, *arguments: str, success: HTTPStatus = HTTPStatus.OK
) -> Response:
    done = await run(request.context, [*path.split(), "--json", *arguments], once=request.once)
    if not done.stdout:
        raise Rejected(_error_message(done.stderr.decode(errors="replace")), code="REMOTE_INVALID")
    return await with_position(request, done.seq, envelope_response(done.stdout, success))


async def write_together(
    request: EndpointRequest[Any, Any], name: str, payload: dict[str, object]
) -> tuple[Returned, Response]:
    done = await call(request.context, "commands", name, json.dumps(payload).encode(), once=request.once)
    return done, await with_position(request, done.seq, envelope_response(done.payload))


async def with_position(request: EndpointRequest[Any, Any], seq: int, response: Response) -> Response:
    history = request.context.project.history
    epoch, mark = history.epoch, (await history.mark_at(seq) if seq <= history.head else None)
    response.headers["Lattice-Change"] = str(Position(epoch, seq, mark or b""))
    return response


def envelope_response(printed: bytes, success: HTTPStatus = HTTPStatus.OK) -> Response:
    """Return an envelope of lattice's unchanged, with the matching status."""
    try:
        envelope = msgspec.json.decode(printed, type=_Envelope)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StorageError("the output of lattice is not JSON; it may exceed the limit") from error
    status = success if envelope.ok else _STATUSES.get(envelope.error.code, HTTPStatus.UNPROCESSABLE_ENTITY)
    return _in_json(printed.rstrip() + b"\n", status)


def _in_json(content: bytes, status: HTTPStatus) -> Response:
    return Response(content, status, media_type="application/json")


def _error_message(message: str) -> str:
    lines = [line for line in message.splitlines() if line.strip()]
    return (lines[-1].removeprefix("Error: ") if lines else "the command printed nothing")[:_MESSAGE_CHARS]
