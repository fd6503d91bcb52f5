"""The endpoints as an OpenAPI 3.1 description, made from the same values that they are routed by."""

import re
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import Any

import msgspec

import lattice_remote
from lattice_remote.server.web.keys import KEY_HEADER, MAX_KEY_CHARS
from lattice_remote.server.web.rest.asked import Nothing
from lattice_remote.server.web.rest.elsewhere import Elsewhere
from lattice_remote.server.web.rest.endpoint import Endpoint

__all__ = ["description"]

_ABOUT = (
    "Tasks of a project, in the envelopes of `lattice --json`. Every write is one numbered change, in the name of the "
    "token's actor or of another that it may act as."
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
    """Why a request was not carried out: lattice's own code and words, or a code that begins with ``REMOTE_``."""

    code: str
    message: str


class Refused(msgspec.Struct):
    """The envelope of every answer of status 400 or more."""

    ok: bool
    error: Problem


def description(endpoints: Sequence[Endpoint], elsewhere: Sequence[Elsewhere]) -> bytes:
    """Return the description, JSON, of the endpoints and of what is served elsewhere."""
    schemas, components = _schemas(endpoints, elsewhere)
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, schemas)
    for other in elsewhere:
        paths.setdefault(other.path, {})["get"] = _other(other, schemas)
    whole = {
        "openapi": "3.1.0",
        "info": {"title": "lattice-remote", "version": lattice_remote.__version__, "description": _ABOUT},
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }
    return msgspec.json.encode(whole)


def _schemas(
    endpoints: Sequence[Endpoint], elsewhere: Sequence[Elsewhere]
) -> tuple[dict[Any, dict[str, Any]], dict[str, Any]]:
    """Return the schema of each type that is taken or answered with, by its name, and what they refer to."""
    kinds = [kind for endpoint in endpoints for kind in (*endpoint.takes, endpoint.data) if kind is not bytes]
    kinds += [Refused, *(other.data for other in elsewhere if other.data is not None)]
    found, components = msgspec.json.schema_components(kinds, ref_template=_REF)
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


def _other(other: Elsewhere, schemas: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    schema = {} if other.data is None else {"schema": schemas[str(other.data)]}
    answer = {"content": {other.media_type: schema}}
    refused = {"application/json": {"schema": schemas[str(Refused)]}}
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
            **{str(status.value): {"description": status.phrase, "content": refused} for status in _MAY_FAIL},
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
    for field in msgspec.structs.fields(endpoint.takes[0]):
        schema = msgspec.json.schema(field.type)
        yield {"name": field.encode_name, "in": "query", "required": field.required, "schema": schema}
    for header, meaning in endpoint.headers.items():
        yield {"name": header, "in": "header", "description": meaning, "schema": _WORD}
    if endpoint.method != "GET":
        meaning = "The same request with the same key is carried out once, and answered each time as the first time."
        schema = {"type": "string", "minLength": 1, "maxLength": MAX_KEY_CHARS, "pattern": "^[ -~]+$"}
        yield {"name": KEY_HEADER, "in": "header", "description": meaning, "schema": schema}


def _responses(endpoint: Endpoint, schemas: dict[Any, dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    yield str(endpoint.success.value), {"description": endpoint.success.phrase, "content": _content(endpoint, schemas)}
    refused = {"application/json": {"schema": schemas[str(Refused)]}}
    for status in sorted({*endpoint.others, *_MAY_FAIL}):
        said: dict[str, Any] = {"description": status.phrase}
        yield str(status.value), said if status in _WITHOUT_BODY else {**said, "content": refused}


def _content(endpoint: Endpoint, schemas: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    if endpoint.data is bytes:
        return _TEXT
    properties = {"ok": {"const": True}, "data": schemas[str(endpoint.data)]}
    if "cursor" in {field.name for field in msgspec.structs.fields(endpoint.takes[0])}:
        properties["next"] = {"type": "string"}
    envelope = {"type": "object", "properties": properties, "required": ["ok", "data"]}
    return {"application/json": {"schema": envelope}}
