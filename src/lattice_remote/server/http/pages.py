"""``/``: the projects that somebody may see, with counts and last activity."""

import asyncio
import hashlib
import re
from collections.abc import Mapping
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
from lattice_remote.protocol.messages import LogEntry
from lattice_remote.server.auth import Login
from lattice_remote.server.http.auth import cookies_of, hub_of, identified, is_from_elsewhere, refuse_foreign, signed_in
from lattice_remote.server.http.middleware import OUR_PAGES, body_of
from lattice_remote.server.http.responses import ok, wants_page
from lattice_remote.server.registry import ProjectRegistry, State
from lattice_remote.server.transport.admission import ConnectionQuota
from lattice_remote.server.transport.api_error import ApiError

__all__ = [
    "LastChange",
    "Listed",
    "ago",
    "asset",
    "asset_routes",
    "come_again",
    "did",
    "error_response",
    "listed",
    "local_path",
    "page",
    "project_list_routes",
    "routes",
    "sign_in_path",
    "sign_in_routes",
    "slices",
    "wanted_path",
]

_TYPES = {"pages.css": "text/css", "icon.svg": "image/svg+xml"}


def asset(name: str) -> str:
    """Return the address of one of our files."""
    return f"/pages/{hashlib.sha256(_content(name)).hexdigest()[:12]}/{name}"


@cache
def _content(name: str) -> bytes:
    return files(__package__).joinpath("static", name).read_bytes()


async def _serve(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _TYPES or request.url.path != asset(name):
        raise ApiError(HTTPStatus.NOT_FOUND, "REMOTE_NOT_FOUND", "there is nothing here")
    headers = {"Cache-Control": "public, max-age=31536000, immutable"}
    return Response(_content(name), headers=headers, media_type=_TYPES[name])


async def _icon(_: Request) -> Response:
    """Answer what browsers ask for of every server, also for pages that name no icon."""
    return Response(
        _content("icon.svg"), headers={"Cache-Control": "public, max-age=86400"}, media_type="image/svg+xml"
    )


asset_routes = [
    Route("/pages/{digest}/{name}", _serve, methods=["GET"]),
    Route("/favicon.ico", _icon, methods=["GET"]),
]


_MAX_CHARS = 2000
_LOCAL = re.compile(r"/(?![/\\])[^\x00-\x20\\\x7f-\x9f]*")
"""A path of this server, as every browser reads it: ``//`` and ``/\\`` begin another host, and tabs and line ends are
left out before that is looked at."""


def local_path(wanted: str) -> str:
    """Return a path to send a browser to, quoted; ``/`` when what is wanted is no path of this server."""
    if len(wanted) > _MAX_CHARS or _LOCAL.fullmatch(wanted) is None or wanted.startswith(("/sign-in", "/sign-out")):
        return "/"
    return quote(wanted, safe="/?#&=%:@+,;~!$'()*[]")


def wanted_path(request: Request) -> str:
    """Return the path and query that a request asks for, as they were sent."""
    raw: bytes = request.scope["raw_path"] + (b"?" + query if (query := request.scope["query_string"]) else b"")
    return raw.decode("latin-1")


def sign_in_path(request: Request) -> str:
    """Return the sign-in page's address, from which one gets back to what was asked for."""
    wanted = local_path(wanted_path(request))
    return "/sign-in" if wanted == "/" else f"/sign-in?next={quote(wanted, safe='/')}"


_templates = Environment(
    loader=PackageLoader("lattice_remote.server.http"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    auto_reload=False,
)
_templates.globals["asset"] = asset


def page(
    name: str, status: HTTPStatus = HTTPStatus.OK, headers: Mapping[str, str] | None = None, **values: Any
) -> Response:
    """Answer with a template, filled in."""
    html = _templates.get_template(f"{name}.html").render(values)
    given = {**(headers or {}), "Content-Security-Policy": OUR_PAGES}
    return Response(html, status, given, media_type="text/html")


def error_response(request: Request, error: ApiError) -> Response:
    """Return a page or the sign-in form to a browser, JSON to a program."""
    if not wants_page(request):
        return Response(error.body, error.status, error.headers)
    if error.status is HTTPStatus.UNAUTHORIZED and request.method in ("GET", "HEAD"):
        if is_from_elsewhere(request):
            return come_again(local_path(wanted_path(request)))
        return RedirectResponse(sign_in_path(request), HTTPStatus.SEE_OTHER)
    headers = {name: value for name, value in error.headers.items() if name != "Content-Type"}
    return page("refused", error.status, headers, error=error, phrase=error.status.phrase)


def come_again(path: str) -> Response:
    """Let a browser that came from another site ask once more: from our own page it brings its cookie, if it has one.

    Somebody who follows a link in a mail to his board need not sign in again.
    """
    return page("onward", path=path)


_MAX_FORM_BYTES = 8 * 1024
_FORM_S = 10.0
_FIELDS = {"token", "next"}
_NOT_KNOWN = "This token is not known here. Was all of it pasted? Else ask your administrator for another."


async def _show(request: Request) -> Response:
    """Show the form; or go on at once, when somebody is signed in already."""
    following = local_path(request.query_params.get("next", "/"))
    who = signed_in(request)
    if who is None and is_from_elsewhere(request):
        return come_again(wanted_path(request))
    if isinstance(who, Login):
        return RedirectResponse(following, HTTPStatus.SEE_OTHER)
    if who is None:
        return page("sign_in", following=following, error="")
    shown = page("sign_in", following=following, error=f"You are signed out: {who.message}.")
    cookies_of(request).take_back(request, shown)
    return shown


async def _sign_in(request: Request) -> Response:
    refuse_foreign(request)
    form = await _form(request)
    following, token = local_path(form.get("next", "/")), form.get("token", "").strip()
    login = _admitted(request, token)
    if isinstance(login, ApiError):
        return _again(login, following)
    answer = RedirectResponse(following, HTTPStatus.SEE_OTHER)
    cookies_of(request).give(request, answer, login)
    return answer


def _admitted(request: Request, token: str) -> Login | ApiError:
    """Return whose token this is, if it may come in; a wrong one is counted."""
    visit: ConnectionQuota = request.state.visit
    login = hub_of(request).identify(visit, token)
    return login if isinstance(login, ApiError) else visit.admit(login.token.id) or login


def _again(refusal: ApiError, following: str) -> Response:
    """Show the form once more, with what was wrong."""
    unknown = refusal.status is HTTPStatus.UNAUTHORIZED and refusal.message.startswith("no token")
    error = _NOT_KNOWN if unknown else f"{refusal.message[:1].upper()}{refusal.message[1:]}."
    headers = {} if refusal.retry_after_s is None else {"Retry-After": str(refusal.retry_after_s)}
    return page("sign_in", refusal.status, headers, following=following, error=error)


async def _form(request: Request) -> dict[str, str]:
    """Return the fields of the form that was sent, each once.

    Raises:
        ApiError: it is none, or larger than ours, or with other fields.
    """
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise _not_ours(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
    text = (await body_of(request, _MAX_FORM_BYTES, within_s=_FORM_S)).decode("ascii", errors="replace")
    try:
        fields = parse_qs(text, keep_blank_values=True, max_num_fields=len(_FIELDS))
    except ValueError:
        raise _not_ours(HTTPStatus.BAD_REQUEST) from None
    if not fields.keys() <= _FIELDS or any(len(values) > 1 for values in fields.values()):
        raise _not_ours(HTTPStatus.BAD_REQUEST)
    return {name: value for name, [value] in fields.items()}


def _not_ours(status: HTTPStatus) -> ApiError:
    return ApiError(status, "REMOTE_PROTOCOL", "this is not what the sign-in page sends")


async def _sign_out(request: Request) -> Response:
    refuse_foreign(request)
    answer = RedirectResponse("/sign-in", HTTPStatus.SEE_OTHER)
    cookies_of(request).take_back(request, answer)
    return answer


sign_in_routes = [
    Route("/sign-in", _show, methods=["GET"]),
    Route("/sign-in", _sign_in, methods=["POST"]),
    Route("/sign-out", _sign_out, methods=["POST"]),
]


class LastChange(msgspec.Struct, frozen=True):
    """The newest change of a project: when, whose, what, and which tasks it touched (their ids)."""

    seq: int
    time: str
    actor: str
    command: str
    tasks: list[str]


class Listed(msgspec.Struct, frozen=True):
    """One project of the list.

    Attributes:
        name, code: as its ``config.json`` has them; None where it has none.
        state: whether it can be used.
        tasks, archived: how many there are.
        statuses: how many of ``tasks`` are in each status, the most first.
        last: the newest change; None when none is kept.
    """

    slug: str
    name: str | None
    code: str | None
    state: State
    tasks: int
    archived: int
    statuses: dict[str, int]
    last: LastChange | None


async def listed(hub: ProjectRegistry, login: Login) -> list[Listed]:
    """Return the projects that a token is for, those that are there, by their names.

    Raises:
        StorageError: the files of one can't be read.
    """
    slugs = [slug for slug in sorted(login.token.projects) if hub.data.has_project(slug)]
    return list(await asyncio.gather(*(_one(hub, slug) for slug in slugs)))


async def _one(hub: ProjectRegistry, slug: str) -> Listed:
    try:
        seen = await hub.overviews.of(slug)
    except OSError as error:
        raise StorageError(f"the files of project {slug!r} can't be read: {error.strerror or error}") from error
    counts = (seen.tasks, seen.archived, seen.statuses)
    return Listed(slug, seen.name, seen.code, hub.state_of(slug), *counts, _last(seen.last))


def _last(entry: LogEntry | None) -> LastChange | None:
    return None if entry is None else LastChange(entry.seq, entry.time, entry.actor, entry.command, entry.tasks)


async def _projects(request: Request) -> Response:
    return ok(await listed(hub_of(request), identified(request)))


project_list_routes = [Route("/projects", _projects, methods=["GET"])]


_KNOWN = {"backlog", "in_planning", "planned", "in_progress", "review", "done", "blocked", "needs_human", "cancelled"}
"""Lattice's own statuses, which have colours."""
_UNITS = ((86_400, "day"), (3_600, "hour"), (60, "minute"))


@dataclass(frozen=True)
class Slice:
    """One status's part of a project's bar, in percent from its left."""

    status: str
    kind: str
    count: int
    start: float
    width: float


def slices(statuses: dict[str, int]) -> list[Slice]:
    """Return the parts of a bar that shows how many tasks are in which status."""
    total, start, found = sum(statuses.values()), 0.0, []
    for status, count in statuses.items():
        kind = status if status in _KNOWN else "other"
        found.append(Slice(status.replace("_", " "), kind.replace("_", "-"), count, start, 100 * count / total))
        start += found[-1].width
    return found


def ago(time: str, now: datetime) -> str:
    """Return how long ago a time was, in words; a date when it was long ago, or is none."""
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
    """Return the words of a command line before its first option: what was done, and mostly to which task."""
    return " ".join(takewhile(lambda word: not word.startswith("-"), command.split())) or command


def _line(project: Listed, now: datetime) -> dict[str, Any]:
    """Return what a project's place on the page shows beside its counts."""
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
    login = identified(request)
    now = datetime.now(UTC)
    lines = [_line(project, now) for project in await listed(hub_of(request), login)]
    return page("home", token=login.token, lines=lines)


routes = [Route("/", _home, methods=["GET"])]
