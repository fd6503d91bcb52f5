"""JSON responses in lattice's envelopes: ``"ok": true`` with data, ``"ok": false`` with an error."""

from http import HTTPStatus
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

__all__ = ["ok", "wants_page"]


def wants_page(request: Request) -> bool:
    """Return whether a browser navigates, as opposed to a program or a script of a page."""
    return "text/html" in request.headers.get("Accept", "")


def ok(data: Any, status: HTTPStatus = HTTPStatus.OK) -> Response:
    """Return a response with data."""
    return Response(msgspec.json.encode({"ok": True, "data": data}), status, media_type="application/json")
