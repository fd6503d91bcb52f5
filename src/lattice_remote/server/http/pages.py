"""The server's own pages: project list, sign-in, errors, and their assets.

A project's summary is read from its files alone, so that no worker starts for an idle project, and again only if they
have changed.
"""

import asyncio
import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from http import HTTPStatus
from importlib.resources import files
from itertools import takewhile
from typing import Any
from urllib.parse import parse_qs, quote

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from lattice_remote.errors import StorageError
from lattice_remote.files import READ, Signature, signature_of
from lattice_remote.server.auth import UNKNOWN_TOKEN, Login
from lattice_remote.server.datadir import DataDir, ProjectPaths
from lattice_remote.server.http.auth import (
    authenticated,
    cookies_for,
    is_cross_site_link,
    refuse_cross_site,
    registry_of,
    signed_in,
)
from lattice_remote.server.http.middleware import OUR_PAGES, ok, read_body, wants_page
from lattice_remote.server.ipc import TreeState
from lattice_remote.server.journal.segment import segment_paths
from lattice_remote.server.project.journal_log import read_page
from lattice_remote.server.registry import ProjectRegistry, State
from lattice_remote.server.transport.admission import ConnectionQuota
from lattice_remote.server.transport.api_error import ApiError

__all__ = [
    "LastChange",
    "Listed",
    "Overview",
    "Overviews",
    "ago",
    "asset",
    "asset_routes",
    "did",
    "error_response",
    "listed",
    "local_path",
    "page",
    "project_list_routes",
    "retry_page",
    "routes",
    "sign_in_path",
    "sign_in_routes",
    "slices",
    "wanted_path",
]

_TYPES = {"pages.css": "text/css", "icon.svg": "image/svg+xml"}


def asset(name: str) -> str:
    return f"/pages/{hashlib.sha256(_content(name)).hexdigest()[:12]}/{name}"


@cache
def _content(name: str) -> bytes:
    return files(__package__).joinpath("static", name).read_bytes()


async def _serve(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _TYPES or request.url.path != asset(name):
        raise ApiError(HTTPStatus.NOT_FOUND, "REMOTE_NOT_FOUND", "not found")
    headers = {"Cache-Control": "public, max-age=31536000, immutable"}
    return Response(_content(name), headers=headers, media_type=_TYPES[name])


async def _icon(_: Request) -> Response:
    return Response(
        _content("icon.svg"), headers={"Cache-Control": "public, max-age=86400"}, media_type="image/svg+xml"
    )


asset_routes = [
    Route("/pages/{digest}/{name}", _serve, methods=["GET"]),
    Route("/favicon.ico", _icon, methods=["GET"]),
]


_MAX_CHARS = 2000
_LOCAL = re.compile(r"/(?![/\\])[^\x00-\x20\\\x7f-\x9f]*")
r"""A path of this server in every browser. ``//`` and ``/\`` start a host; browsers first drop tabs and line ends."""


def local_path(wanted: str) -> str:
    """Return a quoted path to redirect to; ``/`` instead of another server's."""
    if len(wanted) > _MAX_CHARS or _LOCAL.fullmatch(wanted) is None or wanted.startswith(("/sign-in", "/sign-out")):
        return "/"
    return quote(wanted, safe="/?#&=%:@+,;~!$'()*[]")


def wanted_path(request: Request) -> str:
    raw: bytes = request.scope["raw_path"] + (b"?" + query if (query := request.scope["query_string"]) else b"")
    return raw.decode("latin-1")


def from_here(request: Request, path: str) -> str:
    """Return a path relative to the requested one, since a proxy may serve this server below any path."""
    depth = request.scope["raw_path"].count(b"/") - 1
    return ("../" * depth or "./") + path.removeprefix("/")


def sign_in_path(request: Request) -> str:
    wanted = local_path(wanted_path(request))
    return from_here(request, "/sign-in" if wanted == "/" else f"/sign-in?next={quote(wanted, safe='/')}")


_templates = Environment(
    loader=PackageLoader("lattice_remote.server.http"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    auto_reload=False,
)


def page(
    request: Request,
    name: str,
    status: HTTPStatus = HTTPStatus.OK,
    headers: Mapping[str, str] | None = None,
    **values: Any,
) -> Response:
    """Return a page from its template, in which ``root`` leads to this server's ``/``."""
    root = from_here(request, "/")
    html = _templates.get_template(f"{name}.html").render(
        values, root=root, asset=lambda name: root + asset(name).removeprefix("/")
    )
    given = {**(headers or {}), "Content-Security-Policy": OUR_PAGES}
    return Response(html, status, given, media_type="text/html")


def error_response(request: Request, error: ApiError) -> Response:
    if not wants_page(request):
        return Response(error.body, error.status, error.headers)
    if error.status is HTTPStatus.UNAUTHORIZED and request.method in ("GET", "HEAD"):
        if is_cross_site_link(request):
            return retry_page(request, local_path(wanted_path(request)))
        return RedirectResponse(sign_in_path(request), HTTPStatus.SEE_OTHER)
    headers = {name: value for name, value in error.headers.items() if name != "Content-Type"}
    return page(request, "refused", error.status, headers, error=error, phrase=error.status.phrase)


def retry_page(request: Request, path: str) -> Response:
    """Return a page that repeats a request from another site, so that the browser sends its cookie."""
    return page(request, "onward", path=from_here(request, path))


_MAX_FORM_BYTES = 8 * 1024
_FORM_S = 10.0
_FIELDS = {"token", "next"}
_NOT_KNOWN = "Unknown token. Check that it was pasted completely, or ask your administrator for another."


async def _sign_in_form(request: Request) -> Response:
    following = local_path(request.query_params.get("next", "/"))
    who = signed_in(request)
    if who is None and is_cross_site_link(request):
        return retry_page(request, wanted_path(request))
    if isinstance(who, Login):
        return RedirectResponse(from_here(request, following), HTTPStatus.SEE_OTHER)
    if who is None:
        return page(request, "sign_in", following=following, error="")
    shown = page(request, "sign_in", following=following, error=f"You are signed out: {who.message}.")
    cookies_for(request).take_back(request, shown)
    return shown


async def _sign_in(request: Request) -> Response:
    refuse_cross_site(request)
    form = await _form(request)
    following, token = local_path(form.get("next", "/")), form.get("token", "").strip()
    quota: ConnectionQuota = request.state.quota
    login = registry_of(request).auth.identify(quota, token)
    if not isinstance(login, ApiError):
        login = quota.admit(login.token.id) or login
    if isinstance(login, ApiError):
        return _retry_form(request, login, following)
    answer = RedirectResponse(from_here(request, following), HTTPStatus.SEE_OTHER)
    cookies_for(request).give(request, answer, login)
    return answer


def _retry_form(request: Request, refusal: ApiError, following: str) -> Response:
    unknown = refusal.status is HTTPStatus.UNAUTHORIZED and refusal.message == UNKNOWN_TOKEN
    error = _NOT_KNOWN if unknown else f"{refusal.message[:1].upper()}{refusal.message[1:]}."
    headers = {} if refusal.retry_after_s is None else {"Retry-After": str(refusal.retry_after_s)}
    return page(request, "sign_in", refusal.status, headers, following=following, error=error)


async def _form(request: Request) -> dict[str, str]:
    """Return the form's fields. Raises ApiError."""
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise _not_ours(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
    text = (await read_body(request, _MAX_FORM_BYTES, within_s=_FORM_S)).decode("ascii", errors="replace")
    try:
        fields = parse_qs(text, keep_blank_values=True, max_num_fields=len(_FIELDS))
    except ValueError:
        raise _not_ours(HTTPStatus.BAD_REQUEST) from None
    if not fields.keys() <= _FIELDS or any(len(values) > 1 for values in fields.values()):
        raise _not_ours(HTTPStatus.BAD_REQUEST)
    return {name: value for name, [value] in fields.items()}


def _not_ours(status: HTTPStatus) -> ApiError:
    return ApiError(status, "REMOTE_PROTOCOL", "not a form of the sign-in page")


async def _sign_out(request: Request) -> Response:
    refuse_cross_site(request)
    answer = RedirectResponse(from_here(request, "/sign-in"), HTTPStatus.SEE_OTHER)
    cookies_for(request).take_back(request, answer)
    return answer


sign_in_routes = [
    Route("/sign-in", _sign_in_form, methods=["GET"]),
    Route("/sign-in", _sign_in, methods=["POST"]),
    Route("/sign-out", _sign_out, methods=["POST"]),
]


_FRESH_S = 0.5
"""Many requests at once get the same summary."""
_MAX_LOOKS, _LOOK_AGAIN_S = 100, 0.005
"""A write takes some ms. After half a second the project may have no worker that ends one."""
_UNREADABLE = "unknown"


class LastChange(msgspec.Struct, frozen=True):
    """The newest change of a project; ``tasks`` are ids."""

    seq: int
    time: str
    actor: str
    command: str
    tasks: list[str]


class Overview(msgspec.Struct, frozen=True):
    """Summary of one project.

    Attributes:
        name, code: from ``config.json``; None if absent.
        tasks, archived: numbers of tasks.
        statuses: number of ``tasks`` per status, in descending order.
        last: the newest change; None if none is kept.
    """

    slug: str
    name: str | None
    code: str | None
    tasks: int
    archived: int
    statuses: dict[str, int]
    last: LastChange | None


class _Task(msgspec.Struct):
    status: str = _UNREADABLE


_task_decoder = msgspec.json.Decoder(_Task)


class Overviews:
    """Summaries of the projects of a data directory. Belongs to the event loop's thread."""

    def __init__(self, data: DataDir) -> None:
        self._data = data
        self._known: dict[str, _Known] = {}

    async def of(self, slug: str) -> Overview:
        """Return a summary at most ``_FRESH_S`` old. Raises OSError."""
        known = self._known.setdefault(slug, _Known(self._data, slug))
        async with known.turn:
            if known.overview is None or time.monotonic() - known.taken_at >= _FRESH_S:
                known.overview = await asyncio.to_thread(known.take)
                known.taken_at = time.monotonic()
            return known.overview


class _Known:
    def __init__(self, data: DataDir, slug: str) -> None:
        self.turn = asyncio.Lock()
        self.overview: Overview | None = None
        self.taken_at = 0.0
        self._data, self._slug = data, slug
        self._statuses: dict[str, tuple[Signature, str]] = {}  # by file name
        self._last: tuple[tuple[str, Signature] | None, LastChange | None] = (None, None)

    def take(self) -> Overview:
        """Read the files. Blocking."""
        summary = self._data.summary(self._slug)
        paths = self._data.project(self._slug)
        self._statuses = self._committed_statuses(paths)
        statuses = Counter(status for _, status in self._statuses.values())
        return Overview(
            self._slug,
            summary.name,
            summary.code,
            sum(statuses.values()),
            summary.archived,
            dict(statuses.most_common()),
            self._last_change(paths),
        )

    def _committed_statuses(self, paths: ProjectPaths) -> dict[str, tuple[Signature, str]]:
        """Read the statuses; repeat if a write in them was rolled back, or may be (I2)."""
        for _ in range(_MAX_LOOKS):
            before = TreeState.read(paths.journal)
            statuses = dict(self._read_statuses(paths))
            after = TreeState.read(paths.journal)
            if not after.is_open and after.rolled_back == before.rolled_back:
                break
            time.sleep(_LOOK_AGAIN_S)
        return statuses

    def _read_statuses(self, paths: ProjectPaths) -> Iterator[tuple[str, tuple[Signature, str]]]:
        try:
            entries = [
                entry
                for entry in os.scandir(paths.lattice / "tasks")
                if entry.name.endswith(".json") and not entry.name.startswith(".")
            ]
        except FileNotFoundError:
            return
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
                signature = signature_of(status)
                before = self._statuses.get(entry.name)
                yield entry.name, before if before and before[0] == signature else (signature, _status_of(entry.path))
            except FileNotFoundError:
                continue  # archived just now

    def _last_change(self, paths: ProjectPaths) -> LastChange | None:
        newest = max(segment_paths(paths.journal), default=None)
        if newest is None:
            return None
        try:
            state = (newest.name, signature_of(newest.stat()))
        except FileNotFoundError:  # expired since: another is the newest, and the next call sees it
            return self._last[1]
        if self._last[0] != state:
            newest_of = [
                LastChange(entry.seq, entry.time, entry.actor, entry.command, entry.tasks)
                for entry in read_page(paths.journal, limit=1).entries
            ]
            self._last = state, newest_of[0] if newest_of else None
        return self._last[1]


def _status_of(path: str) -> str:
    try:
        with open(os.open(path, READ), "rb") as file:
            return _task_decoder.decode(file.read()).status
    except FileNotFoundError:
        raise
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _UNREADABLE  # one odd file must not hide all projects


class Listed(Overview, frozen=True):
    """One project of the list; ``state`` says whether it is usable."""

    state: State


async def listed(request: Request, login: Login) -> list[Listed]:
    """Return the projects of a token, by slug. Raises StorageError."""
    registry = registry_of(request)
    slugs = [slug for slug in sorted(login.token.projects) if registry.data.has_project(slug)]
    return list(await asyncio.gather(*(_list_project(registry, request.app.state.overviews, slug) for slug in slugs)))


async def _list_project(registry: ProjectRegistry, overviews: Overviews, slug: str) -> Listed:
    try:
        seen = await overviews.of(slug)
    except OSError as error:
        raise StorageError(f"cannot read the files of project {slug!r}: {error.strerror or error}") from error
    return Listed(**msgspec.structs.asdict(seen), state=registry.state_of(slug))


async def _projects(request: Request) -> Response:
    return ok(await listed(request, authenticated(request)))


project_list_routes = [Route("/projects", _projects, methods=["GET"])]


_KNOWN = {"backlog", "in_planning", "planned", "in_progress", "review", "done", "blocked", "needs_human", "cancelled"}
"""Standard statuses, which have colours."""
_UNITS = ((86_400, "day"), (3_600, "hour"), (60, "minute"))


@dataclass(frozen=True)
class Slice:
    """A status's part of the bar, in percent from the left."""

    status: str
    kind: str
    count: int
    start: float
    width: float


def slices(statuses: dict[str, int]) -> list[Slice]:
    total, start, found = sum(statuses.values()), 0.0, []
    for status, count in statuses.items():
        kind = status if status in _KNOWN else "other"
        found.append(Slice(status.replace("_", " "), kind.replace("_", "-"), count, start, 100 * count / total))
        start += found[-1].width
    return found


def ago(time: str, now: datetime) -> str:
    """Return the time since ``time`` in words, or a date."""
    try:
        passed_s = (now - datetime.fromisoformat(time)).total_seconds()
    except (ValueError, TypeError):
        return time
    if passed_s > 30 * 86_400:
        return f"on {time[:10]}"
    for seconds, unit in _UNITS:
        if (number := int(passed_s // seconds)) >= 1:
            return f"{number} {unit}{'s' if number > 1 else ''} ago"
    return "just now"


def did(command: str) -> str:
    return " ".join(takewhile(lambda word: not word.startswith("-"), command.split())) or command


def _line(project: Listed, now: datetime) -> dict[str, Any]:
    called = [project.code or ""] if project.name in (None, project.slug) else [project.slug, project.code or ""]
    last = project.last
    return {
        "project": project,
        "called": " · ".join(filter(None, called)),
        "slices": slices(project.statuses),
        "when": "" if last is None else ago(last.time, now),
        "did": "" if last is None else did(last.command),
    }


async def _home(request: Request) -> Response:
    login = authenticated(request)
    now = datetime.now(UTC)
    lines = [_line(project, now) for project in await listed(request, login)]
    return page(request, "home", token=login.token, lines=lines)


async def _board(request: Request) -> Response:
    slugs = [project.slug for project in await listed(request, authenticated(request))]
    target = from_here(request, f"/projects/{slugs[0]}/dashboard/" if len(slugs) == 1 else "/")
    return RedirectResponse(target, HTTPStatus.SEE_OTHER)


async def _with_slash(_: Request) -> Response:
    return RedirectResponse("dashboard/", HTTPStatus.PERMANENT_REDIRECT)


routes = [
    Route("/", _home, methods=["GET"]),
    Route("/dashboard", _with_slash, methods=["GET"]),
    Route("/dashboard/", _board, methods=["GET"]),
]
