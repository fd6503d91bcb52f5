"""A request to an endpoint, checked: everything in it has the form that the endpoint's description promises."""

import json
from collections import Counter
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.requests import Request

from lattice_remote.errors import Rejected
from lattice_remote.server.network.refusal import Refusal
from lattice_remote.server.web.answers import TurnedAway
from lattice_remote.server.web.asking import Once
from lattice_remote.server.web.bodies import body_of
from lattice_remote.server.web.gate import Guest, guest
from lattice_remote.server.web.keys import once_of

__all__ = ["Asked", "Json", "Nothing", "Query", "asked_of", "header_of"]

MAX_JSON_BYTES = 1024 * 1024


class Query(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What may stand behind the ``?`` of a path; each at most once."""


class Json(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A body of JSON."""


class Nothing(Query, frozen=True):
    """No query, or no body."""


@dataclass(frozen=True)
class Asked[Q: Query, B: Json | Nothing | bytes]:
    """A request of somebody who may use the project.

    Attributes:
        guest: who, and which project.
        path: the parts of the path that are in braces in the endpoint's.
        query, body: as the endpoint's handler declares them.
        once: under which id a write runs, and which request that is.
        request: for its headers.
    """

    guest: Guest
    path: dict[str, str]
    query: Q
    body: B
    once: Once
    request: Request


def header_of(request: Request, name: str) -> str:
    """Return a header that is a list, of which each part may come in a line of its own; "" when there is none."""
    return ", ".join(request.headers.getlist(name)).strip()


async def asked_of(request: Request, query: type[Any], body: type[Any]) -> Asked[Any, Any]:
    """Return a request, checked.

    Raises:
        TurnedAway: nobody who may, or a body that is too long or of another media type.
        Rejected: 400, 404 or 422: not what the endpoint takes.
    """
    visitor = await guest(request)
    if not all(part.isprintable() for part in request.path_params.values()):
        raise Rejected("there is nothing of a name with such characters", code="REMOTE_NOT_FOUND")
    found = _query(request, query)
    content = b""
    if body is not Nothing:
        most = visitor.hub.config.limits.text_bytes if body is bytes else MAX_JSON_BYTES
        _refuse_encoded(request)
        content = await body_of(request, most)
    parsed = content if body is bytes else _json(request, content, body)
    return Asked(visitor, dict(request.path_params), found, parsed, once_of(request, visitor, content), request)


def _refuse_encoded(request: Request) -> None:
    if header_of(request, "Content-Encoding").lower() not in ("", "identity"):
        why = "send the body as it is, without Content-Encoding"
        raise TurnedAway(Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "REMOTE_PROTOCOL", why))


def _query(request: Request, kind: type[Query]) -> Query:
    given = request.query_params.multi_items()
    for name, times in Counter(name for name, _ in given).items():
        if times > 1:
            raise Rejected(f"{name!r} is given {times} times in the query", code="REMOTE_INVALID")
    try:
        return msgspec.convert(dict(given), kind, strict=False)
    except msgspec.ValidationError as error:
        raise Rejected(f"the query: {error}", code="REMOTE_INVALID") from None


def _json(request: Request, content: bytes, kind: type[Any]) -> Any:
    """Return what is in a body; an empty one is an empty object."""
    media_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if content and media_type != "application/json":
        why = "send the body with Content-Type: application/json"
        raise TurnedAway(Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "REMOTE_PROTOCOL", why))
    try:
        found = msgspec.json.decode(content or b"{}", type=kind)
        json.loads(content or b"{}", object_pairs_hook=_named_once)  # it is no deeper than its type
    except msgspec.ValidationError as error:
        raise Rejected(f"the request's body: {error}", code="REMOTE_INVALID") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Rejected(f"the request's body is no JSON: {error}", code="REMOTE_PROTOCOL") from None
    return found


def _named_once(pairs: list[tuple[str, Any]]) -> None:
    for name, times in Counter(name for name, _ in pairs).items():
        if times > 1:
            raise Rejected(f"the request's body: {name[:60]!r} is given {times} times", code="REMOTE_INVALID")
