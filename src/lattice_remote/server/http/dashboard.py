"""Hosted dashboard: lattice's own page with live updates, its requests, and its plan and notes editor.

The page comes from the installed lattice; requests are forwarded by the form of their path, so other versions of the
page work too.
"""

import asyncio
import base64
import gzip
import hashlib
import re
from functools import lru_cache
from html.parser import HTMLParser
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import msgspec
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from lattice_remote import livepage
from lattice_remote.errors import Rejected, StorageError
from lattice_remote.protocol.paths import is_editable
from lattice_remote.server.http.auth import RequestContext, request_context
from lattice_remote.server.http.middleware import ok, read_body
from lattice_remote.server.http.rest.texts import MAX_VERSIONS, TEXT_KINDS, list_versions, version_text
from lattice_remote.server.http.sse import page_events
from lattice_remote.server.http.writes import call, edit, idempotency_key
from lattice_remote.server.ipc import ReadPage, ReadResult
from lattice_remote.server.project.file_reader import text_at_head
from lattice_remote.server.tokens import READ_ONLY
from lattice_remote.server.transport.api_error import ApiError

__all__ = ["policy_for", "read", "read_version", "routes", "versions", "write"]

_PARTS = ("config", "tasks", "stats")


class _Envelope(msgspec.Struct, frozen=True):
    data: msgspec.Raw


class _Configuration(msgspec.Struct, frozen=True):
    project_name: str | None = None


class _Named(msgspec.Struct, frozen=True):
    data: _Configuration


async def _data(request: Request) -> Response:
    """Return the project's data, and its position for ``events/stream?since=``.

    Unless ``exact`` it may include later changes, which the events then repeat.
    """
    context = await request_context(request)
    project = context.project
    history = project.history
    before = history.position
    pages = [ReadPage(f"/api/{part}") for part in _PARTS]
    found, is_exact = await project.reader.read_together(pages, context.share)
    at = history.position if is_exact else before
    board = {part: _data_of(each) for part, each in zip(_PARTS, found, strict=True)}
    where = {"epoch": at.epoch, "head": at.seq, "position": str(at), "exact": is_exact}
    return ok({"project": project.slug, **where, **board})


def _data_of(found: ReadResult) -> msgspec.Raw:
    if found.status != 200:
        raise StorageError("the server cannot read this project's board; see its log")
    return msgspec.json.decode(found.body, type=_Envelope).data


_OTHER_BYTES = 64 * 1024


class _Text(msgspec.Struct, frozen=True):
    """A plan or notes on the server; None if missing. Not editable, for ``reason``, in the archive and if not UTF-8."""

    text: str | None
    editable: bool = True
    reason: str = ""


class _Edit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: str
    base: str | None


class _Saved(msgspec.Struct, frozen=True):
    outcome: str
    now: _Text


async def read(request: Request) -> Response:
    context = await request_context(request)
    return ok(await _text(context, _text_path(request)))


async def write(request: Request) -> Response:
    """Merge an edit into the text; a conflict changes nothing and returns the present text."""
    context, path = await request_context(request), _text_path(request)
    most = context.registry.config.limits.text_bytes
    body = await read_body(request, 4 * most + _OTHER_BYTES)  # every byte of both texts may be escaped
    try:
        edited = msgspec.json.decode(body, type=_Edit)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Rejected(f"the request's body: {error}", code="REMOTE_PROTOCOL") from error
    text, base = edited.text.encode(), None if edited.base is None else edited.base.encode()
    if max(len(text), len(base or b"")) > most:
        raise Rejected(f"{path} is longer than {most} bytes", code="REMOTE_TOO_LARGE")
    stored = await edit(context, path, text, base=base, once=idempotency_key(request, context, body))
    return ok(_Saved(stored.outcome, await _text(context, path)))


async def versions(request: Request) -> Response:
    context, kind = await request_context(request), TEXT_KINDS[_text_path(request).partition("/")[0]]
    found, _ = await list_versions(context.project, request.path_params["task_id"], kind, limit=MAX_VERSIONS)
    return ok(found)


async def read_version(request: Request) -> Response:
    context, kind = await request_context(request), TEXT_KINDS[_text_path(request).partition("/")[0]]
    async with context.share.making():
        found = await version_text(context.project, request.path_params["task_id"], kind, request.path_params["change"])
        context.share.hold(found.data)
    try:
        return ok(_Text(found.data.decode()))
    except UnicodeDecodeError:
        return ok(_Text(found.data.decode(errors="replace"), editable=False, reason="it is not UTF-8 text"))


def _text_path(request: Request) -> str:
    path = f"{request.path_params['kind']}/{request.path_params['task_id']}.md"
    if not is_editable(path):
        raise Rejected(f"{path!r} is not a plan or notes of a task", code="REMOTE_NOT_FOUND")
    return path


async def _text(context: RequestContext, path: str) -> _Text:
    """Return the text, also from the archive. Raises Rejected."""
    files = context.project.history.files
    task = f"tasks/{Path(path).stem}.json"
    if task not in files and f"archive/{task}" not in files:
        raise Rejected(f"there is no task {Path(path).stem}", code="REMOTE_NOT_FOUND")
    archived = task not in files
    data = await text_at_head(context.project, f"archive/{path}" if archived else path, context.share)
    try:
        text = None if data is None else data.decode()
    except UnicodeDecodeError:
        return _Text(data.decode(errors="replace") if data else "", editable=False, reason="it is not UTF-8 text")
    if context.login.token.read_only:
        return _Text(text, editable=False, reason=READ_ONLY)
    return _Text(text, not archived, "the task is in the archive" if archived else "")


_MAX_BODY = 1024 * 1024
"""Lattice's own bound."""
_STATIC = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(?:/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
"""No such name leads out of lattice's package."""
_OWN_SCRIPT = re.compile(rb"""<script\b[^>]*\ssrc="(/static/[\w./-]+)\"""")
_BASE = "/projects/{slug}/dashboard"


async def _with_slash(request: Request) -> Response:
    """Redirect: the page's paths are relative."""
    return RedirectResponse(f"{quote(request.url.path.rpartition('/')[2])}/", HTTPStatus.PERMANENT_REDIRECT)


class _PreparedPage(NamedTuple):
    """Lattice's page with the additions.

    Attributes:
        scripts: the page's installed script files.
        quiet: its handlers were replaced, so its scripts must have theirs replaced too.
    """

    page: bytes
    scripts: tuple[bytes, ...]
    policy: str
    quiet: bool


async def _page(request: Request) -> Response:
    context = await request_context(request)
    made, name, token = await _dashboard(context), await _project_name(context), context.login.token
    page = livepage.with_identity(made.page, name, token.actor, reads_only=token.read_only)
    return await _file(request, page, "text/html; charset=utf-8", {"Content-Security-Policy": made.policy})


async def _project_name(context: RequestContext) -> str:
    found = await context.project.reader.read(ReadPage("/api/config"), context.share)
    try:
        name = msgspec.json.decode(found.body, type=_Named).data.project_name
    except msgspec.MsgspecError:  # a broken configuration, which the page reports
        name = None
    return name or context.project.slug


async def _dashboard(context: RequestContext) -> _PreparedPage:
    page = await _read_file(context, "/")
    scripts = [await _read_file(context, path.decode()) for path in _OWN_SCRIPT.findall(page.body)]
    # Takes about 80 ms for a new version of the page: not in the event loop (I10).
    return await asyncio.to_thread(_prepare_page, page.body, tuple(script.body for script in scripts))


@lru_cache(maxsize=2)
def _prepare_page(page: bytes, scripts: tuple[bytes, ...]) -> _PreparedPage:
    page = livepage.with_script(livepage.with_relative_paths(page))
    quiet = livepage.with_listeners(page, scripts)
    if quiet is None:
        return _PreparedPage(page, scripts, policy_for(page), quiet=False)
    return _PreparedPage(quiet, scripts, policy_for(quiet, has_handlers=False), quiet=True)


async def _static(request: Request) -> Response:
    context = await request_context(request)
    name = request.path_params["name"]
    if not _STATIC.fullmatch(name):
        raise Rejected(f"{name!r} is not a file of the dashboard", code="REMOTE_NOT_FOUND")
    found = await _read_file(context, f"/static/{name}")
    if name.endswith(".js") and found.body in (made := await _dashboard(context)).scripts and made.quiet:
        return await _file(request, livepage.without_handlers(found.body), found.content_type)
    return await _file(request, found.body, found.content_type)


async def _read_file(context: RequestContext, path: str) -> ReadResult:
    """Return a file of lattice's package. Raises Rejected: there is none."""
    found = await context.project.reader.read(ReadPage(path), context.share)
    if found.status != HTTPStatus.OK:
        raise Rejected(f"there is no {path} in this version of the dashboard", code="REMOTE_NOT_FOUND")
    return found


async def _script(request: Request) -> Response:
    await request_context(request)
    return await _file(request, livepage.script(hosted=True), "text/javascript; charset=utf-8")


async def _style(request: Request) -> Response:
    await request_context(request)
    return await _file(request, livepage.style(), "text/css; charset=utf-8")


_TAG = re.compile(r'"[0-9a-f]{32}"')
_DIFFERENCE = "lattice-ranges"
"""Instance manipulation (RFC 3229): a list of steps, each a list of ranges of the earlier text and new texts."""


async def _read(request: Request) -> Response:
    context = await request_context(request)
    query = f"?{request.url.query}" if request.url.query else ""
    base = request.headers.get("If-None-Match", "")
    base = base if _TAG.fullmatch(base) else ""
    takes_difference = _DIFFERENCE in request.headers.get("A-IM", "")
    page = ReadPage(_path(request) + query, base, takes_difference, _takes_gzip(request))
    found = await context.project.reader.read(page, context.share)
    if found.status == HTTPStatus.NOT_MODIFIED:
        return Response(status_code=found.status, headers={"ETag": found.etag, **_BY_ENCODING})
    if not found.body:  # the handler crashed, or tried to write
        raise Rejected(found.message or "the dashboard failed; see the server's log", code="REMOTE_FAILED")
    headers = {"ETag": found.etag, **_BY_ENCODING} if found.etag else {}
    if found.status == HTTPStatus.IM_USED:
        headers |= {"IM": _DIFFERENCE, "Delta-Base": base}
    if found.is_gzip:
        headers["Content-Encoding"] = "gzip"
    return Response(found.body, found.status, headers, media_type=found.content_type)


def _takes_gzip(request: Request) -> bool:
    return (
        re.search(r"\bgzip\b(?!\s*;\s*q=0(?:\.0*)?\s*(?:,|$))", request.headers.get("Accept-Encoding", "")) is not None
    )


_BY_ENCODING = {"Vary": "Accept-Encoding, A-IM"}


async def _write(request: Request) -> Response:
    context = await request_context(request)
    try:
        body = await read_body(request, _MAX_BODY)
    except ApiError as error:
        if error.status is not HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            raise
        why = f"Request body exceeds {_MAX_BODY} bytes"  # as lattice's own handler words it
        raise ApiError(error.status, "PAYLOAD_TOO_LARGE", why) from error
    done = await call(context, "dashboard", _path(request), body, once=idempotency_key(request, context, body))
    return Response(done.payload, done.status, media_type="application/json")


def _path(request: Request) -> str:
    return "/api/" + quote(request.path_params["path"])


async def _file(request: Request, body: bytes, content_type: str, headers: dict[str, str] | None = None) -> Response:
    """Return a file that browsers cache and revalidate, so that a new version is loaded at once."""
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    kept = {"ETag": tag, "Cache-Control": "private, no-cache", **_BY_ENCODING, **(headers or {})}
    if tag in request.headers.get("If-None-Match", ""):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=kept)
    if _takes_gzip(request):
        body = await asyncio.to_thread(_compressed, body)  # 10 ms for the page
        kept["Content-Encoding"] = "gzip"
    return Response(body, headers=kept, media_type=content_type)


@lru_cache(maxsize=8)
def _compressed(body: bytes) -> bytes:
    return gzip.compress(body, mtime=0)


routes = [
    Route(_BASE, _with_slash, methods=["GET"]),
    Route(f"{_BASE}/data", _data, methods=["GET"]),
    Route(f"{_BASE}/", _page, methods=["GET"]),
    Route(f"{_BASE}/static/{{name:path}}", _static, methods=["GET"]),
    Route(f"{_BASE}/{livepage.SCRIPT}", _script, methods=["GET"]),
    Route(f"{_BASE}/{livepage.STYLE}", _style, methods=["GET"]),
    Route(f"{_BASE}/{livepage.EVENTS}", page_events, methods=["GET"]),
    Route(f"{_BASE}/remote/{{kind:str}}/{{task_id:str}}", read, methods=["GET"]),
    Route(f"{_BASE}/remote/{{kind:str}}/{{task_id:str}}", write, methods=["POST"]),
    Route(f"{_BASE}/remote/{{kind:str}}/{{task_id:str}}/versions", versions, methods=["GET"]),
    Route(f"{_BASE}/remote/{{kind:str}}/{{task_id:str}}/versions/{{change:str}}", read_version, methods=["GET"]),
    Route(f"{_BASE}/api/{{path:path}}", _read, methods=["GET"]),
    Route(f"{_BASE}/api/{{path:path}}", _write, methods=["POST"]),
]


# Lattice's page is one file with inline scripts and styles, six libraries from a public server, ``style`` and ``on...``
# attributes, and a background picture of the user's choice. Allowed are therefore (decision 0032):
# - the page's inline scripts, each by its digest; no other inline script and no ``javascript:`` link
# - the libraries, each by its address
# - inline styles, pictures from any server, and ``on...`` attributes that were not replaced (decision 0032)


def policy_for(page: bytes, *, has_handlers: bool = True) -> str:
    """Return the Content-Security-Policy of the page: only scripts that the page itself brings.

    ``has_handlers``: the page needs ``on…`` attributes, which cannot be distinguished from injected ones.
    """
    scripts = _Scripts()
    scripts.feed(page.decode(errors="replace").replace("\r\n", "\n"))
    scripts.close()
    sources = " ".join(["'self'", *dict.fromkeys(scripts.sources)])
    directives = {
        "default-src": "'none'",
        "script-src": sources,
        "script-src-attr": "'unsafe-inline'" if has_handlers else "'none'",
        "style-src": "'self' 'unsafe-inline'",
        "img-src": "'self' data: https:",
        "connect-src": "'self'",
        "form-action": "'self'",
        "frame-ancestors": "'none'",
        "base-uri": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in directives.items())


class _Scripts(HTMLParser):
    """A page's scripts: digests of inline ones, addresses of others."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.sources: list[str] = []
        self._text: list[str] | None = None  # of the script being read

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "script":
            return
        given = dict(attrs)
        address = given.get("src") or given.get("data-remote-src")
        if address is None:
            self._text = []
        elif address.startswith("https://") and not set(address) & set(" \t\n;,'"):
            self.sources.append(address)

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "script" and self._text is not None:
            digest = hashlib.sha256("".join(self._text).encode()).digest()
            self.sources.append(f"'sha256-{base64.b64encode(digest).decode()}'")
            self._text = None
