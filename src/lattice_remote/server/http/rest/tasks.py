"""``/projects/:slug/tasks``, ``/projects/:slug/tasks/:id`` and ``/projects/:slug/next``: tasks and comments."""

from http import HTTPStatus
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.responses import RedirectResponse, Response

from lattice_remote.errors import Rejected
from lattice_remote.server.http.middleware import ok, wants_page
from lattice_remote.server.http.rest import (
    Actor,
    Author,
    Endpoint,
    EndpointRequest,
    Nothing,
    PageQuery,
    Provenance,
    options,
    output_response,
    page_of,
    read,
    read_output,
    write,
    write_together,
)
from lattice_remote.server.transport.api_error import ApiError

__all__ = ["endpoints"]

_TASKS = "/projects/{slug}/tasks"
_TASK = f"{_TASKS}/{{id}}"

_Text = Annotated[str, Meta(min_length=1)]
_Item = Annotated[str, Meta(pattern=r"^[^,]+$", description="without a comma, which separates items in lattice")]
_CustomField = Annotated[str, Meta(pattern=r"^[^=]+$")]

# The types below describe what lattice prints, which may have more fields.


class Task(msgspec.Struct, kw_only=True):
    """A task's snapshot. With ``compact`` it has counts instead of its lists."""

    id: str
    short_id: str | None = None
    title: str | None = None
    status: str | None = None
    priority: str | None = None
    urgency: str | None = None
    complexity: str | None = None
    type: str | None = None
    description: str | None = None
    tags: list[str] | None = None
    assigned_to: Actor | None = None
    created_by: Actor | None = None
    created_at: str | None = None
    updated_at: str | None = None
    done_at: str | None = None
    last_event_id: str | None = None
    comment_count: int | None = None
    custom_fields: dict[str, Any] | None = None
    archived: bool | None = None


class _Shown(msgspec.Struct):
    data: Task


class NextTask(Task):
    """A claimed task, with its plan if it has one."""

    plan_content: str | None = None


class Event(msgspec.Struct, kw_only=True):
    """One event of a task's log."""

    id: str
    type: str
    task_id: str
    ts: str
    actor: Actor
    data: dict[str, Any] | None = None


class TaskInFull(Task):
    """A task with its log, its relationships and its possible next statuses."""

    events: list[Event] | None = None
    valid_transitions: list[str] | None = None
    relationships_enriched: list[dict[str, Any]] | None = None
    relationships_in: list[dict[str, Any]] | None = None
    plan_path: str | None = None
    notes_path: str | None = None


class Comment(msgspec.Struct, kw_only=True):
    """A comment with its replies."""

    id: str
    body: str
    author: Actor
    created_at: str
    role: str | None = None
    edited: bool = False
    deleted: bool = False
    parent_id: str | None = None
    reactions: dict[str, list[Any]] | None = None
    replies: list[dict[str, Any]] | None = None


class Filters(PageQuery, frozen=True, kw_only=True):
    """Conditions for listed tasks, as of ``lattice list``; all must hold."""

    status: str | UnsetType = UNSET
    assigned: str | UnsetType = UNSET
    tag: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    priority: str | UnsetType = UNSET
    include_archived: bool = False
    compact: bool = False


class NewTask(Provenance, frozen=True, kw_only=True):
    """A new task, as with ``lattice create``. Lattice sets omitted fields."""

    title: _Text
    description: str | None = None
    type: str | None = None
    priority: str | None = None
    urgency: str | None = None
    complexity: str | None = None
    status: str | None = None
    tags: list[_Item] | None = None
    assigned_to: str | None = None
    id: Annotated[str, Meta(extra_json_schema={"pattern": "^task_[0-9A-HJKMNP-TV-Z]{26}$"})] | None = None
    """Checked by lattice, whose refusal is answered."""


class TaskChanges(Provenance, frozen=True, kw_only=True):
    """Changes of a task, applied together or not at all.

    Fields are changed as by ``lattice update``, then ``assigned_to`` as by ``lattice assign`` (null: unassigned), then
    ``status`` as by ``lattice status``. ``force`` allows a status that the workflow or a policy forbids, and needs a
    ``reason``.
    """

    title: _Text | UnsetType = UNSET
    description: str | UnsetType = UNSET
    priority: str | UnsetType = UNSET
    urgency: str | UnsetType = UNSET
    complexity: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    tags: list[_Item] | UnsetType = UNSET
    custom_fields: dict[_CustomField, str] | UnsetType = UNSET
    assigned_to: str | UnsetType | None = UNSET
    status: str | UnsetType = UNSET
    force: bool = False


_CHANGED = frozenset(TaskChanges.__struct_fields__) - frozenset(Provenance.__struct_fields__)


class ClaimNext(Author, frozen=True, kw_only=True):
    """The claimant, and the statuses of the tasks to choose from, by default ``backlog`` and ``planned``."""

    status: list[_Item] | None = None


class Completion(Provenance, frozen=True, kw_only=True):
    """The review that completes a task."""

    review: _Text


# --- the list ---


async def list_tasks(request: EndpointRequest[Filters, Nothing]) -> Response:
    """List tasks in order of creation, filtered like ``lattice list``."""
    query = request.query
    values = {name: getattr(query, name) for name in ("status", "assigned", "tag", "type", "priority")}
    given = [f"--{name}={value}" for name, value in values.items() if value is not UNSET]
    flags = {"--include-archived": query.include_archived, "--compact": query.compact}
    given += [name for name, is_set in flags.items() if is_set]
    return output_response(page_of(await read_output(request, "list", *given, list_at=("data",)), query, by_id=True))


async def create_task(request: EndpointRequest[Nothing, NewTask]) -> Response:
    """Create a task."""
    given = options(request.body, request, without=["title"])
    return await write(request, "create", *given, "--", request.body.title, success=HTTPStatus.CREATED)


async def claim_next_task(request: EndpointRequest[Nothing, ClaimNext]) -> Response:
    """Claim the next task, like ``lattice next --claim``: the actor's current one, or the most important that is ready.

    Status 204 if there is none.
    """
    response = await write(request, "next", "--claim", *options(request.body, request))
    is_none = response.status_code == HTTPStatus.OK and _data_of(bytes(response.body)) == msgspec.Raw(b"null")
    if not is_none:
        return response
    return Response(status_code=HTTPStatus.NO_CONTENT, headers={"Lattice-Change": response.headers["Lattice-Change"]})


# --- one task ---


async def show_task(request: EndpointRequest[Nothing, Nothing]) -> Response:
    """Return a task with its events and its relationships, archived or not."""
    if wants_page(request.http):
        return await _task_on_board(request)
    return await read(request, "show", "--", request.path["id"])


async def _task_on_board(request: EndpointRequest[Nothing, Nothing]) -> Response:
    found = await read_output(request, "show", "--", request.path["id"])
    if found.status:
        raise Rejected(f"there is no task {request.path['id']} in this project", code="REMOTE_NOT_FOUND")
    task = msgspec.json.decode(found.body, type=_Shown).data.id
    return RedirectResponse(f"../dashboard/#/task/{quote(task)}", HTTPStatus.SEE_OTHER)


async def change_task(request: EndpointRequest[Nothing, TaskChanges]) -> Response:
    """Change status, assignment and fields of a task in one change, all or nothing."""
    lines = list(_lines(request, request.body))
    if not lines:
        raise Rejected("there is nothing to change in the request's body", code="REMOTE_INVALID")
    # If nothing had to change, lattice prints no task, so read it.
    done, response = await write_together(request, "together", {"lines": lines, "task": request.path["id"]})
    if response.status_code != HTTPStatus.OK:
        return response
    return _with_data(response, msgspec.json.decode(_data_of(done.payload), type=list[msgspec.Raw])[-1])


def _lines(request: EndpointRequest[Any, Any], changes: TaskChanges) -> list[list[str]]:
    common, task = ["--json", *options(changes, request, without=_CHANGED)], request.path["id"]
    lines = []
    if pairs := list(_pairs(changes)):
        lines.append(["update", *common, "--", task, *pairs])
    if changes.assigned_to is not UNSET:
        lines.append(["assign", *common, "--", task, "none" if changes.assigned_to is None else changes.assigned_to])
    if changes.status is not UNSET:
        lines.append(["status", *common, *(["--force"] if changes.force else []), "--", task, changes.status])
    return lines


def _pairs(changes: TaskChanges) -> list[str]:
    names = ("title", "description", "priority", "urgency", "complexity", "type")
    values = {name: getattr(changes, name) for name in names}
    if changes.tags is not UNSET:
        values["tags"] = ",".join(changes.tags)
    if changes.custom_fields is not UNSET:
        values |= {f"custom_fields.{name}": value for name, value in changes.custom_fields.items()}
    return [f"{name}={value}" for name, value in values.items() if value is not UNSET]


async def claim_task(request: EndpointRequest[Nothing, Author]) -> Response:
    """Claim this task: assign and start it, like ``lattice next --claim`` does with the task it picks."""
    line = ["next", "--json", "--claim", *options(request.body, request)]
    done, response = await write_together(request, "claim", {"task": request.path["id"], "line": line})
    if response.status_code != HTTPStatus.OK:
        return response
    return _with_data(response, msgspec.json.decode(_data_of(done.payload), type=list[msgspec.Raw])[0])


async def complete_task(request: EndpointRequest[Nothing, Completion]) -> Response:
    """Complete a task with a review, like ``lattice complete``."""
    return await write(request, "complete", *options(request.body, request), "--", request.path["id"])


async def archive_task(request: EndpointRequest[Nothing, Provenance]) -> Response:
    """Archive a task."""
    return await write(request, "archive", *options(request.body, request), "--", _one(request.path["id"]))


async def unarchive_task(request: EndpointRequest[Nothing, Provenance]) -> Response:
    """Restore a task from the archive."""
    return await write(request, "unarchive", *options(request.body, request), "--", _one(request.path["id"]))


def _one(task: str) -> str:
    if "," in task or not task.strip():
        why = f"Invalid task ID format: {task[:60]!r}."
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "INVALID_ID", why)
    return task


def _data_of(envelope: bytes) -> msgspec.Raw:
    return msgspec.json.decode(envelope, type=dict[str, msgspec.Raw])["data"]


def _with_data(response: Response, data: object) -> Response:
    whole = ok(data)
    whole.headers["Lattice-Change"] = response.headers["Lattice-Change"]
    return whole


class NewComment(Provenance, frozen=True, kw_only=True):
    """A comment, or with ``reply_to`` a reply. ``role`` satisfies a completion policy, for example ``review``."""

    body: Annotated[str, Meta(min_length=1)]
    reply_to: str | None = None
    role: str | None = None


async def list_comments(request: EndpointRequest[PageQuery, Nothing]) -> Response:
    """List the comments on a task, oldest first, with replies; a page counts comments, not replies."""
    comments = await read_output(request, "comments", "--", request.path["id"], list_at=("data",))
    return output_response(page_of(comments, request.query, by_id=False))


async def add_comment(request: EndpointRequest[Nothing, NewComment]) -> Response:
    """Comment on a task; return the task."""
    given = options(request.body, request, without=["body"])
    return await write(
        request, "comment", *given, "--", request.path["id"], request.body.body, success=HTTPStatus.CREATED
    )


async def list_events(request: EndpointRequest[PageQuery, Nothing]) -> Response:
    """List a task's events, oldest first."""
    events = await read_output(request, "show", "--", request.path["id"], list_at=("data", "events"))
    return output_response(page_of(events, request.query, by_id=False))


endpoints = [
    Endpoint("GET", _TASKS, list_tasks, list[Task]),
    Endpoint("POST", _TASKS, create_task, Task, HTTPStatus.CREATED),
    Endpoint("POST", "/projects/{slug}/next", claim_next_task, NextTask, others=[HTTPStatus.NO_CONTENT]),
    Endpoint("GET", _TASK, show_task, TaskInFull),
    Endpoint("PATCH", _TASK, change_task, Task),
    Endpoint("POST", f"{_TASK}/claim", claim_task, NextTask),
    Endpoint("POST", f"{_TASK}/complete", complete_task, Task),
    Endpoint("POST", f"{_TASK}/archive", archive_task, Event),
    Endpoint("POST", f"{_TASK}/unarchive", unarchive_task, Event),
    Endpoint("GET", f"{_TASK}/comments", list_comments, list[Comment]),
    Endpoint("POST", f"{_TASK}/comments", add_comment, Task, HTTPStatus.CREATED),
    Endpoint("GET", f"{_TASK}/events", list_events, list[Event]),
]
