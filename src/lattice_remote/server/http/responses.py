"""What is answered in JSON: lattice's own envelopes, of ``"ok": true`` with data or ``"ok": false`` with an error."""

from http import HTTPStatus
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from lattice_remote.errors import RemoteError
from lattice_remote.server.transport.refusal import Refusal

__all__ = ["STATUSES", "TurnedAway", "failed", "ok", "refused", "wants_page"]

STATUSES = {
    "REMOTE_UNAUTHORIZED": HTTPStatus.UNAUTHORIZED,
    "REMOTE_FORBIDDEN": HTTPStatus.FORBIDDEN,
    "REMOTE_NOT_FOUND": HTTPStatus.NOT_FOUND,
    "REMOTE_GONE": HTTPStatus.GONE,
    "REMOTE_UNSUPPORTED": HTTPStatus.UNPROCESSABLE_ENTITY,
    "REMOTE_INVALID": HTTPStatus.UNPROCESSABLE_ENTITY,
    "REMOTE_STALE_BASE": HTTPStatus.PRECONDITION_FAILED,
    "REMOTE_PROTOCOL": HTTPStatus.BAD_REQUEST,
    "REMOTE_TOO_LARGE": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "REMOTE_BUSY": HTTPStatus.SERVICE_UNAVAILABLE,
    "REMOTE_SHUTDOWN": HTTPStatus.SERVICE_UNAVAILABLE,
    "REMOTE_STORAGE": HTTPStatus.SERVICE_UNAVAILABLE,
    "REMOTE_UNKNOWN_OUTCOME": HTTPStatus.SERVICE_UNAVAILABLE,
    "REMOTE_FAILED": HTTPStatus.INTERNAL_SERVER_ERROR,
}
"""As which HTTP status each code of ours is answered; 500 for any other."""
_COME_BACK = {"REMOTE_BUSY", "REMOTE_SHUTDOWN", "REMOTE_STORAGE"}


class TurnedAway(Exception):
    """A request ends here: raised by a handler, answered by the app."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def wants_page(request: Request) -> bool:
    """Tell whether it is somebody with a browser who asks for a page, and not a program, nor a script of a page."""
    return "text/html" in request.headers.get("Accept", "")


def ok(data: Any, status: HTTPStatus = HTTPStatus.OK) -> Response:
    """Answer with data."""
    return Response(msgspec.json.encode({"ok": True, "data": data}), status, media_type="application/json")


def refused(refusal: Refusal) -> Response:
    """Answer a request that is turned away."""
    return Response(refusal.body, refusal.status, refusal.headers)


def failed(error: RemoteError) -> Refusal:
    """Return an error of ours as the refusal that it comes to."""
    status = STATUSES.get(error.code, HTTPStatus.INTERNAL_SERVER_ERROR)
    return Refusal(status, error.code, error.message, retry_after_s=1 if error.code in _COME_BACK else None)
