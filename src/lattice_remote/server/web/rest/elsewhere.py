"""What programs may ask for that is not served from this folder: for the description."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import msgspec

from lattice_remote.server.web.listing import Listed

__all__ = ["ELSEWHERE", "Elsewhere"]


class Project(msgspec.Struct):
    """What a token may do in a project, and where the project stands."""

    project: str
    actor: str
    act_as: list[str]
    epoch: str
    head: int
    server_version: str
    lattice_version: str


class Health(msgspec.Struct):
    """That the server answers."""

    status: str
    version: str
    projects: int


class Readiness(msgspec.Struct):
    """Whether every project can be used, and what keeps those that can't."""

    status: str
    projects: int
    reasons: list[str]


class Listing(msgspec.Struct):
    """The projects of a token."""

    ok: bool
    data: list[Listed]


@dataclass(frozen=True)
class Elsewhere:
    """A GET of a path.

    Attributes:
        path, name, text: as of an ``Endpoint``.
        data: of what type the whole answer is; None where the media type says all.
        media_type: of the answer.
        is_open: nobody need show a token.
        others: further statuses which answer the same.
        headers, query: what it takes: name and meaning.
    """

    path: str
    name: str
    text: str
    data: Any = None
    media_type: str = "application/json"
    is_open: bool = False
    others: Sequence[HTTPStatus] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)


_SINCE = "the id of the last event that was seen, as epoch-number"

ELSEWHERE = (
    Elsewhere("/healthz", "health", "Say that the server answers.", Health, is_open=True),
    Elsewhere(
        "/readyz",
        "readiness",
        "Say whether every project can be used.",
        Readiness,
        is_open=True,
        others=[HTTPStatus.SERVICE_UNAVAILABLE],
    ),
    Elsewhere("/metrics", "metrics", "Return the server's figures, for Prometheus.", media_type="text/plain"),
    Elsewhere("/projects", "list_projects", "List the token's projects, with counts and last activity.", Listing),
    Elsewhere("/projects/{slug}", "show_project", "Say what the token may do, and where the project stands.", Project),
    Elsewhere(
        "/projects/{slug}/dashboard/data", "board", "Return the whole board, and from which change on to listen."
    ),
    Elsewhere(
        "/projects/{slug}/events/stream",
        "stream_events",
        "Tell every change as it happens.",
        media_type="text/event-stream",
        headers={"Last-Event-ID": _SINCE},
        query={"since": _SINCE},
    ),
)
