"""``/projects/:slug/tasks/:id/comments`` and ``.../events``: what was said of a task, and what was done."""

from http import HTTPStatus
from typing import Annotated

from msgspec import Meta
from starlette.responses import Response

from lattice_remote.server.web.rest.asked import Asked, Nothing
from lattice_remote.server.web.rest.commands import Provenance, found, options, shown, write
from lattice_remote.server.web.rest.endpoint import Endpoint
from lattice_remote.server.web.rest.paging import Page, page_of
from lattice_remote.server.web.rest.shapes import Comment, Event, Task
from lattice_remote.server.web.rest.tasks import TASK

__all__ = ["endpoints"]


class NewComment(Provenance, frozen=True, kw_only=True):
    """A comment, or with ``reply_to`` a reply. ``role`` is what a completion policy asks for, as ``review``."""

    body: Annotated[str, Meta(min_length=1)]
    reply_to: str | None = None
    role: str | None = None


async def list_comments(asked: Asked[Page, Nothing]) -> Response:
    """List the comments on a task, oldest first, each with its replies; a page counts comments, not replies."""
    comments = await found(asked, "comments", "--", asked.path["id"], list_at=("data",))
    return shown(page_of(comments, asked.query, by_id=False))


async def add_comment(asked: Asked[Nothing, NewComment]) -> Response:
    """Comment on a task; the answer is the task."""
    new = asked.body
    given = options(new, asked, reply_to=new.reply_to, role=new.role)
    return await write(asked, "comment", *given, "--", asked.path["id"], new.body, success=HTTPStatus.CREATED)


async def list_events(asked: Asked[Page, Nothing]) -> Response:
    """List a task's events, oldest first."""
    events = await found(asked, "show", "--", asked.path["id"], list_at=("data", "events"))
    return shown(page_of(events, asked.query, by_id=False))


endpoints = [
    Endpoint("GET", f"{TASK}/comments", list_comments, list[Comment]),
    Endpoint("POST", f"{TASK}/comments", add_comment, Task, HTTPStatus.CREATED),
    Endpoint("GET", f"{TASK}/events", list_events, list[Event]),
]
