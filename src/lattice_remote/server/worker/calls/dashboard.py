"""The dashboard's POSTs, carried out by the request handlers of lattice's own dashboard, without a socket.

``name`` is the request's path, ``payload`` its body; the answer is the handler's status and body. Where the request was
received does not matter: a page of a client's machine and one that the server itself shows are served alike.
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
from lattice_remote.server.worker.arguments import Kind, check, shown, unsupported
from lattice_remote.server.worker.calls.base import CallRequest, CallResponse, Operation, check_fields, json_object
from lattice_remote.server.worker.identity import Identity

__all__ = ["handler_class", "load", "prepare"]


@cache
def handler_class(lattice_dir: Path) -> Any:
    """Return lattice's request handler for this project: made with a path and a body, it answers one request.

    ``get()`` and ``post()`` return the answer; its ``content_type`` and ``etag`` are there afterwards.
    """
    from lattice.dashboard.server import _make_handler_class

    lattices: Any = _make_handler_class(lattice_dir)

    class Handler(lattices):  # type: ignore[misc] # made at run time
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
            """There are no others that anybody reads."""

    return Handler


_REFUSED, _UNSUPPORTED = 400, 422
_SETTINGS = "/api/config/dashboard"
_UNKNOWN = "the server does not know this value of POST {}: {}"
_NOBODY = "dashboard:web"
"""Whom the page names because it does not know who looks at it. Here that is known: the token's actor."""


def _takes(*values: str, **others: Kind) -> Mapping[str, Kind]:
    """Return what a body may hold. Values of any type go into an event or ``config.json``, as the handlers check."""
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
"""The requests that may write, and all that their bodies may hold; ``…`` stands for a task's id."""
_OF_A_TASK = re.compile(r"/api/tasks/.+/(?P<what>[^/]+)")
_PATH = re.compile(r"/[!-~]*")
"""With such characters, the handlers' own check of a task's id lets nothing pass that is none."""


def load() -> None:
    """Import lattice's dashboard."""
    import_module("lattice.dashboard.server")


def prepare(asked: CallRequest) -> Operation:
    """Check a POST; see ``Surface``.

    A path that is not in the table gets the dashboard's own "not found"; if the dashboard knows it, it is refused.
    """
    if not _PATH.fullmatch(asked.name):
        raise unsupported(f"{shown(asked.name)} is not a path of the dashboard")
    route = _route(asked.name)
    takes = _ROUTES.get(route)
    if takes is None:
        answer = _not_found(asked.lattice_dir, asked.name)
        return Operation("dashboard: POST", asked.identity.actor, lambda: answer)
    actor, body, objection = asked.identity.actor, asked.payload, ""
    if not _is_left_to_the_handler(body):
        values = json_object(body)
        actor = _check(route, values, takes, asked.identity)
        objection = _objection(route, values, takes)
        body = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
    post = partial(_post, handler_class(asked.lattice_dir), asked.name, body)
    return Operation(f"dashboard: POST {route}", actor, partial(_unless, objection, post))


def _route(path: str) -> str:
    """Return the path as it stands in the table, with ``…`` for a task's id."""
    path = path.partition("?")[0].rstrip("/")
    found = _OF_A_TASK.fullmatch(path)
    return path if found is None else f"/api/tasks/…/{found['what']}"


def _is_left_to_the_handler(body: bytes) -> bool:
    """Tell whether a body is so large, or so little JSON, that the handler refuses it in its own words."""
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
    """Check what a body holds, put in the actor where it names none, and return that.

    Raises:
        Rejected: a value that the table does not list or its kind does not allow, or an actor of somebody else.
    """
    from lattice.core.ids import validate_actor

    for name, value in values.items():
        if name in takes:
            if isinstance(value, str) and takes[name] is not Kind.JSON:
                check(takes[name], name, value)
        elif route != _SETTINGS:  # whose handler refuses names that it does not know
            raise unsupported(_UNKNOWN.format(route, shown(name)))
    if "actor" not in takes:
        return identity.actor
    if values.get("actor", _NOBODY) == _NOBODY:
        values["actor"] = identity.actor
    actor = values["actor"]
    if not validate_actor(actor):
        return identity.actor  # the handler refuses it
    identity.require(actor)
    return str(actor)


def _objection(route: str, values: dict[str, Any], takes: Mapping[str, Kind]) -> str:
    """Return what the server has against values that the handler may have refused before; "" for nothing."""
    unknown = sorted(values.keys() - takes.keys())
    if unknown:
        return _UNKNOWN.format(route, shown(unknown[0]))
    try:
        check_fields(values)
        check_fields(values.get("fields"))
    except Rejected as rejected:
        return rejected.message
    return ""


def _unless(objection: str, post: Callable[[], CallResponse]) -> CallResponse:
    """Return the handler's answer; where that accepts what the server objects to, a refusal, which undoes it."""
    answer = post()
    if not objection or answer.status >= _REFUSED:
        return answer
    envelope = {"ok": False, "error": {"code": "REMOTE_UNSUPPORTED", "message": objection}}
    return CallResponse(_UNSUPPORTED, json.dumps(envelope).encode())


class _Known(Exception):
    """The dashboard has a handler for a path."""


def _not_found(lattice_dir: Path, path: str) -> CallResponse:
    """Return what the dashboard says of a path that it does not know; only its routing runs, none of its handlers.

    Raises:
        Rejected: it knows the path. A program of this machine would be started, say, or it is newer than the table.
    """
    try:
        return _post(_routing(lattice_dir), path, b"")
    except _Known:
        raise unsupported(f"the server does not carry out this request of the dashboard: {shown(path)}") from None


def _post(handler: Any, path: str, body: bytes) -> CallResponse:
    answer: CallResponse = handler(path, body).post()
    return answer


@cache
def _routing(lattice_dir: Path) -> Any:
    """Return the request handler without its handlers of requests: instead of running one, it raises ``_Known``."""

    def refuse(*_: object) -> None:
        raise _Known

    handler = handler_class(lattice_dir)
    names = [name for name in dir(handler) if name.startswith("_handle_")]
    return type("Routing", (handler,), dict.fromkeys(names, refuse))
