"""OpenAPI 3.1 description of the server, from the values that also make its routes; see ``protocol_files.py``."""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import msgspec

import lattice_remote
from lattice_remote.server.http.app import ENDPOINTS, Health, ProjectDescription, Readiness
from lattice_remote.server.http.pages import Listed
from lattice_remote.server.http.rest import Endpoint, Nothing
from lattice_remote.server.http.writes import KEY_HEADER, MAX_KEY_CHARS


class Listing(msgspec.Struct):
    """The projects of a token."""

    ok: bool
    data: list[Listed]


@dataclass(frozen=True)
class DocumentedRoute:
    """A GET route outside ``rest``.

    Attributes:
        path, name, text: the same as of an ``Endpoint``.
        data: type of the whole response; None if the media type is sufficient.
        media_type: of the response.
        is_open: no token is needed.
        others: further statuses with the same body.
        headers, query: accepted ones: name and meaning.
    """

    path: str
    name: str
    text: str
    data: Any = None
    media_type: str = "application/json"
    is_open: bool = False
    others: Sequence[HTTPStatus] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)


_SINCE = "the id of the last event received, as epoch-number"

DOCUMENTED_ROUTES = (
    DocumentedRoute("/healthz", "health", "Report that the server responds.", Health, is_open=True),
    DocumentedRoute(
        "/readyz",
        "readiness",
        "Report whether every project is usable.",
        Readiness,
        is_open=True,
        others=[HTTPStatus.SERVICE_UNAVAILABLE],
    ),
    DocumentedRoute("/metrics", "metrics", "Return the server's figures, for Prometheus.", media_type="text/plain"),
    DocumentedRoute("/projects", "list_projects", "List the token's projects, with counts and last activity.", Listing),
    DocumentedRoute(
        "/projects/{slug}",
        "show_project",
        "Return the token's rights and the project's position.",
        ProjectDescription,
    ),
    DocumentedRoute(
        "/projects/{slug}/dashboard/data", "board", "Return the whole board, and the position from which to listen."
    ),
    DocumentedRoute(
        "/projects/{slug}/events/stream",
        "stream_events",
        "Stream every change as it happens.",
        media_type="text/event-stream",
        headers={"Last-Event-ID": _SINCE},
        query={"since": _SINCE},
    ),
)


_ABOUT = (
    "Tasks of a project, in the envelopes of `lattice --json`. Every write is one numbered change, by the "
    "token's actor or another that it may act as."
)
_MAY_FAIL = (
    *(HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND),
    *(HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    *(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, HTTPStatus.UNPROCESSABLE_ENTITY, HTTPStatus.TOO_MANY_REQUESTS),
    *(HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.SERVICE_UNAVAILABLE),
)
_WITHOUT_BODY = {HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED}
_WORD = {"type": "string"}
_REF = "#/components/schemas/{name}"
_TEXT = {"text/markdown": {"schema": {"type": "string"}}}


class Problem(msgspec.Struct):
    """The error of a refused request: lattice's code and message, or a code that begins with ``REMOTE_``."""

    code: str
    message: str


class ErrorEnvelope(msgspec.Struct):
    """The envelope of every response with status 400 or higher."""

    ok: bool
    error: Problem


def description() -> dict[str, Any]:
    """Return the whole description."""
    schemas, components = _schemas(ENDPOINTS, DOCUMENTED_ROUTES)
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, schemas)
    for other in DOCUMENTED_ROUTES:
        paths.setdefault(other.path, {})["get"] = _other(other, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "lattice-remote", "version": lattice_remote.__version__, "description": _ABOUT},
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": {str(status.value): _refused(status, schemas) for status in _MAY_FAIL},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _schemas(
    endpoints: Sequence[Endpoint], elsewhere: Sequence[DocumentedRoute]
) -> tuple[dict[Any, dict[str, Any]], dict[str, Any]]:
    """Return the schema of each type in requests and responses by name, with the types they refer to."""
    kinds = [kind for endpoint in endpoints for kind in (*endpoint.takes, endpoint.data) if kind is not bytes]
    kinds += [ErrorEnvelope, *(other.data for other in elsewhere if other.data is not None)]
    found, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    for component in components.values():
        # Python 3.13 takes the indentation out of docstrings, 3.12 leaves it in.
        component["description"] = inspect.cleandoc(component["description"])
    return {str(kind): schema for kind, schema in zip(kinds, found, strict=True)}, components


def _operation(endpoint: Endpoint, schemas: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    summary, _, text = endpoint.text.partition("\n\n")
    operation = {
        "operationId": endpoint.name,
        "summary": " ".join(summary.split()),
        "tags": [endpoint.path.split("/")[3]],
        "parameters": list(_parameters(endpoint)),
        "responses": dict(_responses(endpoint, schemas)),
    }
    if text:
        operation["description"] = " ".join(text.split())
    body = endpoint.takes[1]
    if body is bytes:
        operation["requestBody"] = {"required": True, "content": _TEXT}
    elif body is not Nothing:
        is_required = any(field.required for field in msgspec.structs.fields(body))
        operation["requestBody"] = {
            "required": is_required,
            "content": {"application/json": {"schema": schemas[str(body)]}},
        }
    return operation


def _other(other: DocumentedRoute, schemas: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    schema = {} if other.data is None else {"schema": schemas[str(other.data)]}
    answer = {"content": {other.media_type: schema}}
    named = [("query", *one) for one in other.query.items()] + [("header", *one) for one in other.headers.items()]
    return {
        "operationId": other.name,
        "summary": other.text,
        "tags": ["server" if "{slug}" not in other.path else "project"],
        "security": [{}] if other.is_open else [{"token": []}],
        "parameters": [
            *_in_path(other.path),
            *({"name": name, "in": place, "description": text, "schema": _WORD} for place, name, text in named),
        ],
        "responses": {
            **{str(status.value): _reference(status) for status in _MAY_FAIL},
            **{
                str(status.value): {"description": status.phrase, **answer} for status in (HTTPStatus.OK, *other.others)
            },
        },
    }


def _in_path(path: str) -> Iterator[dict[str, Any]]:
    for name in re.findall(r"{(\w+)}", path):
        yield {"name": name, "in": "path", "required": True, "schema": {**_WORD, "minLength": 1}}


def _parameters(endpoint: Endpoint) -> Iterator[dict[str, Any]]:
    yield from _in_path(endpoint.path)
    for option in msgspec.structs.fields(endpoint.takes[0]):
        schema = msgspec.json.schema(option.type)
        yield {"name": option.encode_name, "in": "query", "required": option.required, "schema": schema}
    for header, meaning in endpoint.headers.items():
        yield {"name": header, "in": "header", "description": meaning, "schema": _WORD}
    if endpoint.method != "GET":
        meaning = "A request repeated with the same key runs once and gets the first response again."
        schema = {"type": "string", "minLength": 1, "maxLength": MAX_KEY_CHARS, "pattern": "^[ -~]+$"}
        yield {"name": KEY_HEADER, "in": "header", "description": meaning, "schema": schema}


def _responses(endpoint: Endpoint, schemas: dict[Any, dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    yield str(endpoint.success.value), {"description": endpoint.success.phrase, "content": _content(endpoint, schemas)}
    for status in sorted({*endpoint.others, *_MAY_FAIL}):
        if status in _WITHOUT_BODY:
            yield str(status.value), {"description": status.phrase}
        else:
            yield str(status.value), _reference(status) if status in _MAY_FAIL else _refused(status, schemas)


def _refused(status: HTTPStatus, schemas: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    content = {"application/json": {"schema": schemas[str(ErrorEnvelope)]}}
    return {"description": status.phrase, "content": content}


def _reference(status: HTTPStatus) -> dict[str, Any]:
    return {"$ref": f"#/components/responses/{status.value}"}


def _content(endpoint: Endpoint, schemas: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    if endpoint.data is bytes:
        return _TEXT
    properties = {"ok": {"const": True}, "data": schemas[str(endpoint.data)]}
    if "cursor" in {field.name for field in msgspec.structs.fields(endpoint.takes[0])}:
        properties["next"] = {"type": "string"}
    envelope = {"type": "object", "properties": properties, "required": ["ok", "data"]}
    return {"application/json": {"schema": envelope}}
