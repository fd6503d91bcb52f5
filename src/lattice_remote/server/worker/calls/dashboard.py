"""Dashboard surface: POST requests served by the handlers of lattice's own dashboard, without a socket.

``name`` is the request's path, ``payload`` its body; the response is the handler's status and body.
"""

import io
import json
import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from lattice_remote.errors import Rejected
from lattice_remote.server.worker.caller import Identity, unsupported
from lattice_remote.server.worker.calls import CallRequest, CallResponse, Operation, check_fields, json_object
from lattice_remote.server.worker.policy import Kind, check, shown

__all__ = ["handler_class", "load", "prepare"]


@cache
def handler_class(lattice_dir: Path) -> Any:
    """Return lattice's request handler for this project; an instance, made from a path and a body, serves one request.

    ``get()`` and ``post()`` return the response and set ``content_type`` and ``etag``.
    """
    from lattice.dashboard.server import _make_handler_class

    lattices: Any = _make_handler_class(lattice_dir)

    class CapturedHandler(lattices):  # type: ignore[misc] # made at run time
        def __init__(self, path: str, body: bytes) -> None:
            self.path, self.headers = path, {"Content-Length": str(len(body))}
            self.rfile, self.wfile = io.BytesIO(body), io.BytesIO()
            self.status, self.content_type, self.etag = 500, "", ""

        def get(self) -> CallResponse:
            self.do_GET()
            return CallResponse(self.status, self.wfile.getvalue())

        def post(self) -> CallResponse:
            self.do_POST()
            return CallResponse(self.status, self.wfile.getvalue())

        def send_response(self, code: int, message: str | None = None) -> None:  # noqa: ARG002 - the base's signature
            self.status = int(code)

        def send_header(self, keyword: str, value: str) -> None:
            match keyword.lower():
                case "content-type":
                    self.content_type = value
                case "etag":
                    self.etag = value

        def end_headers(self) -> None:
            """Send none: no client reads them."""

    return CapturedHandler


_REFUSED, _UNSUPPORTED = 400, 422
_SETTINGS = "/api/config/dashboard"
_UNKNOWN = "the server does not know this value of POST {}: {}"
_PAGE_ACTOR = "dashboard:web"
"""The page does not know its user; replaced by the token's actor."""


def _takes(*values: str, **others: Kind) -> Mapping[str, Kind]:
    return {**dict.fromkeys(values, Kind.JSON), **others}


_ROUTES: Mapping[str, Mapping[str, Kind]] = {
    "/api/tasks": _takes(
        *("title", "status", "priority", "type", "description", "tags", "assigned_to", "urgency"), actor=Kind.ACTOR
    ),
    _SETTINGS: _takes(
        *("background_image", "column_width", "font_size", "heat_map_enabled", "lane_colors", "theme", "voice")
    ),
    "/api/tasks/…/status": _takes("status", "force", "reason", actor=Kind.ACTOR),
    "/api/tasks/…/assign": _takes("assigned_to", actor=Kind.ACTOR),
    "/api/tasks/…/comment": _takes("body", parent_id=Kind.ID, actor=Kind.ACTOR),
    "/api/tasks/…/update": _takes("fields", actor=Kind.ACTOR),
    "/api/tasks/…/archive": _takes(actor=Kind.ACTOR),
    "/api/tasks/…/comment-edit": _takes("body", comment_id=Kind.ID, actor=Kind.ACTOR),
    "/api/tasks/…/comment-delete": _takes(comment_id=Kind.ID, actor=Kind.ACTOR),
    "/api/tasks/…/react": _takes("emoji", comment_id=Kind.ID, actor=Kind.ACTOR),
    "/api/tasks/…/unreact": _takes("emoji", comment_id=Kind.ID, actor=Kind.ACTOR),
}
"""Requests that may write, with all fields of their bodies; ``…`` stands for a task's id."""
_OF_A_TASK = re.compile(r"/api/tasks/.+/(?P<what>[^/]+)")
_PATH = re.compile(r"/[!-~]*")
"""Characters for which the handlers' own check of task ids is strict."""


def load() -> None:
    import_module("lattice.dashboard.server")


def prepare(request: CallRequest) -> Operation:
    """Check a POST; see ``Surface``.

    A path outside the table gets the dashboard's own "not found", and is refused if the dashboard knows it.
    """
    if not _PATH.fullmatch(request.name):
        raise unsupported(f"{shown(request.name)} is not a path of the dashboard")
    route = _route(request.name)
    takes = _ROUTES.get(route)
    if takes is None:
        answer = _not_found(request.lattice_dir, request.name)
        return Operation("dashboard: POST", request.identity.actor, lambda: answer)
    actor, body, objection = request.identity.actor, request.payload, ""
    if not _handler_refuses(body):
        values = json_object(body)
        actor = _check(route, values, takes, request.identity)
        objection = _objection(route, values, takes)
        body = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
    post = partial(_post, handler_class(request.lattice_dir), request.name, body)
    return Operation(f"dashboard: POST {route}", actor, partial(_refuse_if_accepted, objection, post))


def _route(path: str) -> str:
    path = path.partition("?")[0].rstrip("/")
    found = _OF_A_TASK.fullmatch(path)
    return path if found is None else f"/api/tasks/…/{found['what']}"


def _handler_refuses(body: bytes) -> bool:
    from lattice.dashboard.server import MAX_REQUEST_BODY_BYTES

    if len(body) > MAX_REQUEST_BODY_BYTES:
        return True
    try:
        json.loads(body)
    except json.JSONDecodeError:
        return True
    except (ValueError, RecursionError):
        return False
    return False


def _check(route: str, values: dict[str, Any], takes: Mapping[str, Kind], identity: Identity) -> str:
    """Check the fields of a body, set a missing actor, and return the actor. Raises Rejected."""
    from lattice.core.ids import validate_actor

    for name, value in values.items():
        if name in takes:
            if isinstance(value, str) and takes[name] is not Kind.JSON:
                check(takes[name], name, value)
        elif route != _SETTINGS:  # that handler refuses unknown names itself
            raise unsupported(_UNKNOWN.format(route, shown(name)))
    if "actor" not in takes:
        return identity.actor
    if values.get("actor", _PAGE_ACTOR) == _PAGE_ACTOR:
        values["actor"] = identity.actor
    actor = values["actor"]
    if not validate_actor(actor):
        return identity.actor  # the handler refuses it
    identity.require(actor)
    return str(actor)


def _objection(route: str, values: dict[str, Any], takes: Mapping[str, Kind]) -> str:
    """Return why the server refuses values that the handler might accept; "" for no reason."""
    unknown = sorted(values.keys() - takes.keys())
    if unknown:
        return _UNKNOWN.format(route, shown(unknown[0]))
    try:
        check_fields(values)
        check_fields(values.get("fields"))
    except Rejected as rejected:
        return rejected.message
    return ""


def _refuse_if_accepted(objection: str, post: Callable[[], CallResponse]) -> CallResponse:
    """Return the handler's response; if it accepts values the server objects to, return a refusal, which undoes it."""
    answer = post()
    if not objection or answer.status >= _REFUSED:
        return answer
    envelope = {"ok": False, "error": {"code": "REMOTE_UNSUPPORTED", "message": objection}}
    return CallResponse(_UNSUPPORTED, json.dumps(envelope).encode())


class _HandlerExists(Exception): ...


def _not_found(lattice_dir: Path, path: str) -> CallResponse:
    """Return the dashboard's response to an unknown path; runs only its routing.

    Raises Rejected: the dashboard knows the path, for example to start a program, or in a newer version.
    """
    try:
        return _post(_routing(lattice_dir), path, b"")
    except _HandlerExists:
        raise unsupported(f"the server does not serve this request of the dashboard: {shown(path)}") from None


def _post(handler: Any, path: str, body: bytes) -> CallResponse:
    answer: CallResponse = handler(path, body).post()
    return answer


@cache
def _routing(lattice_dir: Path) -> Any:
    def refuse(*_: object) -> None:
        raise _HandlerExists

    handler = handler_class(lattice_dir)
    names = [name for name in dir(handler) if name.startswith("_handle_")]
    return type("Routing", (handler,), dict.fromkeys(names, refuse))
