"""``/``: the projects that somebody may see, with counts and last activity."""

from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lattice_remote.server.web.gate import hub_of, identified
from lattice_remote.server.web.listing import Listed, listed
from lattice_remote.server.web.pages.rendering import page

__all__ = ["ago", "did", "routes", "slices"]

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
