"""The page as the installed lattice brings it, with a script of ours; and what it asks, answered by lattice's handlers.

Reads go to the project's reader, writes to its worker. Nothing of the page is here, so that a later version comes along
as it is: its own files and requests are passed on by the forms of their paths, whatever they are called.
"""

import asyncio
import re
from functools import lru_cache
from hashlib import sha256
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from lattice_remote import livepage
from lattice_remote.errors import Rejected
from lattice_remote.server.data.read_ipc import Found, ReadPage
from lattice_remote.server.network.refusal import Refusal
from lattice_remote.server.web.answers import TurnedAway
from lattice_remote.server.web.asking import call
from lattice_remote.server.web.board import changes, texts
from lattice_remote.server.web.bodies import body_of
from lattice_remote.server.web.gate import Guest, guest
from lattice_remote.server.web.keys import once_of
from lattice_remote.server.web.policy import policy_for

__all__ = ["routes"]

_MAX_BODY = 1024 * 1024
"""Lattice's own bound on what its page may send."""
_STATIC = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(?:/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
"""Files of lattice's package have such names; with these no path leads out of their directory."""
_OWN_SCRIPT = re.compile(rb"""<script\b[^>]*\ssrc="(/static/[\w./-]+)\"""")
_BASE = "/projects/{slug}/dashboard"


async def _with_slash(request: Request) -> Response:
    """All that the page names is relative to it: a proxy may serve it below a path that nobody here knows."""
    return RedirectResponse(f"{quote(request.url.path.rpartition('/')[2])}/", HTTPStatus.PERMANENT_REDIRECT)


class _Made(NamedTuple):
    """Lattice's page with what is added on the way."""

    page: bytes
    scripts: tuple[bytes, ...]
    """Its own, as they are installed."""
    policy: str
    """The policy under which it works."""
    quiet: bool
    """Whether it has no handlers any more, so that its scripts must make none either."""


async def _page(request: Request) -> Response:
    made = await _dashboard(await guest(request))
    return _file(request, made.page, "text/html; charset=utf-8", {"Content-Security-Policy": made.policy})


async def _dashboard(visitor: Guest) -> _Made:
    page = await _read_file(visitor, "/")
    scripts = [await _read_file(visitor, path.decode()) for path in _OWN_SCRIPT.findall(page.body)]
    # Some 80 ms for a new version of the page: not on the loop, which has every client's changes to send (I10).
    return await asyncio.to_thread(_made_live, page.body, tuple(script.body for script in scripts))


@lru_cache(maxsize=2)
def _made_live(page: bytes, scripts: tuple[bytes, ...]) -> _Made:
    page = livepage.with_script(livepage.with_relative_paths(page))
    quiet = livepage.with_listeners(page, scripts)
    if quiet is None:
        return _Made(page, scripts, policy_for(page), quiet=False)
    return _Made(quiet, scripts, policy_for(quiet, has_handlers=False), quiet=True)


async def _static(request: Request) -> Response:
    visitor = await guest(request)
    name = request.path_params["name"]
    if not _STATIC.fullmatch(name):
        raise Rejected(f"{name!r} is no file of the dashboard", code="REMOTE_NOT_FOUND")
    found = await _read_file(visitor, f"/static/{name}")
    if name.endswith(".js") and found.body in (made := await _dashboard(visitor)).scripts and made.quiet:
        return _file(request, livepage.without_handlers(found.body), found.content_type)
    return _file(request, found.body, found.content_type)


async def _read_file(visitor: Guest, path: str) -> Found:
    """Return a file of lattice's package, as its dashboard answers with it.

    Raises:
        Rejected: there is none.
    """
    found = await visitor.project.reader.read(ReadPage(path), visitor.share)
    if found.status != HTTPStatus.OK:
        raise Rejected(f"there is no {path} in this version of the dashboard", code="REMOTE_NOT_FOUND")
    return found


async def _script(request: Request) -> Response:
    await guest(request)
    return _file(request, livepage.script(hosted=True), "text/javascript; charset=utf-8")


async def _style(request: Request) -> Response:
    await guest(request)
    return _file(request, livepage.style(), "text/css; charset=utf-8")


async def _read(request: Request) -> Response:
    visitor = await guest(request)
    query = f"?{request.url.query}" if request.url.query else ""
    found = await visitor.project.reader.read(ReadPage(_path(request) + query), visitor.share)
    if not found.body:  # the handler broke down, or tried what no reader may
        raise Rejected(found.message or "the dashboard failed at this; the log says more", code="REMOTE_FAILED")
    if found.etag:
        return _tagged(request, found.body, found.etag, found.content_type)
    return Response(found.body, found.status, media_type=found.content_type)


async def _write(request: Request) -> Response:
    """Carry out a request of the page in the guest's name; it is numbered and journalled like a command."""
    visitor = await guest(request)
    try:
        body = await body_of(request, _MAX_BODY)
    except TurnedAway as error:
        raise _in_lattices_words(error) from error
    done = await call(visitor, "dashboard", _path(request), body, once=once_of(request, visitor, body))
    return Response(done.payload, done.status, media_type="application/json")


def _in_lattices_words(error: TurnedAway) -> TurnedAway:
    """Return what lattice's own handler says of a body that is too large; anything else as it is."""
    if error.refusal.status is not HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return error
    why = f"Request body exceeds {_MAX_BODY} bytes"
    return TurnedAway(Refusal(error.refusal.status, "PAYLOAD_TOO_LARGE", why))


def _path(request: Request) -> str:
    return "/api/" + quote(request.path_params["path"])


def _file(request: Request, body: bytes, content_type: str, headers: dict[str, str] | None = None) -> Response:
    """Answer with a file that a browser may keep, and asks for each time: another version is there at once."""
    return _tagged(request, body, f'"{sha256(body).hexdigest()[:32]}"', content_type, headers)


def _tagged(
    request: Request, body: bytes, tag: str, content_type: str, headers: dict[str, str] | None = None
) -> Response:
    kept = {"ETag": tag, "Cache-Control": "private, no-cache", **(headers or {})}
    if tag in request.headers.get("If-None-Match", ""):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=kept)
    return Response(body, headers=kept, media_type=content_type)


routes = [
    Route(_BASE, _with_slash, methods=["GET"]),
    Route(f"{_BASE}/", _page, methods=["GET"]),
    Route(f"{_BASE}/static/{{name:path}}", _static, methods=["GET"]),
    Route(f"{_BASE}/{livepage.SCRIPT}", _script, methods=["GET"]),
    Route(f"{_BASE}/{livepage.STYLE}", _style, methods=["GET"]),
    Route(f"{_BASE}/{livepage.EVENTS}", changes.stream, methods=["GET"]),
    Route(f"{_BASE}/remote/{{kind:str}}/{{task_id:str}}", texts.read, methods=["GET"]),
    Route(f"{_BASE}/remote/{{kind:str}}/{{task_id:str}}", texts.write, methods=["POST"]),
    Route(f"{_BASE}/remote/{{kind:str}}/{{task_id:str}}/versions", texts.versions, methods=["GET"]),
    Route(f"{_BASE}/remote/{{kind:str}}/{{task_id:str}}/versions/{{change:str}}", texts.read_version, methods=["GET"]),
    Route(f"{_BASE}/api/{{path:path}}", _read, methods=["GET"]),
    Route(f"{_BASE}/api/{{path:path}}", _write, methods=["POST"]),
]
