"""Validation of a task's events: the rules of lattice's commands, from lattice's core.

After a valid event ``lattice doctor`` reports no problem. Events that lattice's commands refuse are refused, and so are
those that change nothing, such as the present status.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from lattice.core import comments, config, relationships, tasks
from lattice.core.events import count_review_rework_cycles, validate_custom_event_type
from lattice.core.ids import validate_actor
from msgspec import UNSET, UnsetType

from lattice_remote.storage.events import Shaped, Snapshot, invalid, shape

__all__ = ["TaskContext", "add_to_task"]


@dataclass(frozen=True, slots=True)
class TaskContext:
    """The rules' view of the project."""

    config: dict[str, Any]
    log: list[Snapshot]
    is_active: Callable[[str], bool]
    has_artifact: Callable[[str], bool]
    plan: Callable[[], str | None]


def add_to_task(snapshot: Snapshot | None, events: Sequence[Shaped], around: TaskContext) -> Snapshot:
    """Return a copy of the task with these events added in order. Raises Rejected."""
    log = list(around.log)
    for event in events:
        kind = event["type"]
        if kind in _BY_COMMANDS:
            raise invalid(f"{kind!r} changes more than the log; use: {_BY_COMMANDS[kind]}")
        if (snapshot is None) != (kind == "task_created"):
            raise invalid("a task begins with task_created, and only once" if snapshot else "there is no such task")
        _check(kind, event["data"], _Place(event, snapshot or {}, log, around))
        snapshot = tasks.apply_event_to_snapshot(snapshot, event)
        log.append(event)
    assert snapshot is not None, "there was a task, or the first event made one"
    return snapshot


@dataclass(frozen=True, slots=True)
class _Place:
    event: Shaped
    task: Snapshot
    log: list[Snapshot]
    around: TaskContext


def _check(kind: str, data: dict[str, Any], place: _Place) -> None:
    rule = _RULES.get(kind)
    if rule is not None:
        fields, check = rule
        try:
            check(shape(fields, data, kind), place)
        except ValueError as error:  # lattice's own message
            raise invalid(str(error)) from None
    elif kind != "git_event" and not validate_custom_event_type(kind):
        raise invalid(f"{kind[:60]!r} is not a type of event; your own types begin with x_")


class _Data(msgspec.Struct, forbid_unknown_fields=True):
    pass


# --- the task itself ---


class _Created(_Data):
    title: str
    status: str
    type: str
    priority: str
    urgency: str | UnsetType = UNSET
    complexity: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    tags: list[str] | UnsetType = UNSET
    assigned_to: str | UnsetType = UNSET
    custom_fields: dict[str, Any] | UnsetType = UNSET


def _created(data: _Created, place: _Place) -> None:
    _require_status(data.status, place)
    for field in ("type", "priority", "urgency", "complexity"):
        if (value := getattr(data, field)) is not UNSET:
            _require_field(field, value, place)
    if data.assigned_to is not UNSET:
        _require_actor(data.assigned_to)


class _FieldUpdated(_Data):
    field: str
    to: Any
    from_: Any = msgspec.field(name="from")


_TEXTS = ("title", "description", "priority", "urgency", "complexity", "type")


def _field_updated(data: _FieldUpdated, place: _Place) -> None:
    custom, dot, key = data.field.partition(".")
    if custom == "custom_fields" and dot and key:
        _require_from(data.from_, (place.task.get(custom) or {}).get(key), data.to)
        return
    if data.field == "tags":
        shape(list[str], data.to, "tags")
    elif data.field in _TEXTS:
        shape(str, data.to, data.field)
        _require_field(data.field, data.to, place)
    else:
        raise invalid(f"{data.field[:60]!r} cannot be updated; {', '.join(_TEXTS)}, tags and custom_fields.KEY can")
    before = place.task.get(data.field)
    _require_from(data.from_, before or [] if data.field == "tags" else before, data.to)


def _require_field(field: str, value: str, place: _Place) -> None:
    allowed: Mapping[str, Sequence[str]] = {
        "type": place.around.config.get("task_types", []),
        "priority": config.VALID_PRIORITIES,
        "urgency": config.VALID_URGENCIES,
        "complexity": config.VALID_COMPLEXITIES,
    }
    if value not in allowed.get(field, [value]):
        raise invalid(f"Invalid {field}: {value[:60]!r}. Valid: {', '.join(allowed[field])}.")


def _require_from(said: object, found: object, to: object) -> None:
    if said != found:
        raise invalid("the event's 'from' is not the task's value")
    if to == found:
        raise invalid("the event changes nothing")


def _require_actor(actor: str) -> None:
    if not validate_actor(actor):
        raise invalid(f"not an actor: {actor[:60]!r}; it looks like human:ana or agent:claude")


class _AssignmentChanged(_Data):
    to: str | None
    from_: str | None = msgspec.field(name="from")


def _assignment_changed(data: _AssignmentChanged, place: _Place) -> None:
    _require_from(data.from_, place.task.get("assigned_to"), data.to)
    if data.to is not None:
        _require_actor(data.to)


# --- status ---


class _StatusChanged(_Data):
    to: str
    from_: str = msgspec.field(name="from")
    force: bool | UnsetType = UNSET
    reason: str | UnsetType = UNSET


def _status_changed(data: _StatusChanged, place: _Place) -> None:
    settings = place.around.config
    _require_from(data.from_, place.task["status"], data.to)
    _require_status(data.to, place)
    if data.force is True:
        if not data.reason or not place.event.get("provenance", {}).get("reason"):
            raise invalid("a forced status needs a reason, in its data and in its provenance")
        return
    if not config.validate_transition(settings, data.from_, data.to):
        valid = ", ".join(config.get_valid_transitions(settings, data.from_)) or "(none)"
        raise invalid(f"Invalid transition from {data.from_} to {data.to}. Valid transitions: {valid}.")
    met, failures = config.validate_completion_policy(settings, place.task, data.to)
    if not met:
        raise invalid(f"Completion policy not satisfied: {'; '.join(failures)}.")
    if data.from_ == "review" and data.to in ("in_progress", "in_planning"):
        _require_cycles_left(place)
    if data.to == "in_progress":
        _require_plan(place)


def _require_status(status: str, place: _Place) -> None:
    if not config.validate_status(place.around.config, status):
        valid = ", ".join(place.around.config.get("workflow", {}).get("statuses", []))
        raise invalid(f"Invalid status: {status[:60]!r}. Valid statuses: {valid}.")


def _require_cycles_left(place: _Place) -> None:
    cycles, limit = count_review_rework_cycles(place.log), config.get_review_cycle_limit(place.around.config)
    if cycles >= limit:
        raise invalid(f"Review cycle limit reached ({cycles}/{limit}); move to needs_human instead")


def _require_plan(place: _Place) -> None:
    from lattice.cli.helpers import is_scaffold_plan

    plan = place.around.plan()
    if plan is None or is_scaffold_plan(plan, description=place.task.get("description")):
        raise invalid("the plan is still scaffold; write it (even one line) before moving to in_progress")


# --- comments ---


class _CommentAdded(_Data):
    body: str
    parent_id: str | UnsetType = UNSET
    role: str | UnsetType = UNSET


def _comment_added(data: _CommentAdded, place: _Place) -> None:
    _require_body(data.body)
    if data.parent_id is not UNSET:
        comments.validate_comment_for_reply(place.log, data.parent_id)
    _require_role(data.role, place)


class _CommentEdited(_Data):
    comment_id: str
    body: str
    previous_body: str
    role: str | UnsetType = UNSET
    previous_role: str | UnsetType | None = UNSET


def _comment_edited(data: _CommentEdited, place: _Place) -> None:
    _require_body(data.body)
    body, role = comments.validate_comment_for_edit(place.log, data.comment_id)
    if data.previous_body != body or (data.previous_role is not UNSET and data.previous_role != role):
        raise invalid("the comment does not have the event's previous content")
    _require_role(data.role, place)


class _CommentDeleted(_Data):
    comment_id: str


def _comment_deleted(data: _CommentDeleted, place: _Place) -> None:
    comments.validate_comment_for_delete(place.log, data.comment_id)


def _require_body(body: str) -> None:
    if comments.validate_comment_body(body) != body:
        raise invalid("a comment's body must not begin or end with white space")


def _require_role(role: str | UnsetType, place: _Place) -> None:
    roles = config.get_configured_roles(cast(config.LatticeConfig, place.around.config))
    if role is not UNSET and roles and role not in roles:
        raise invalid(f"Unknown role: {role[:60]!r}. Valid roles: {', '.join(sorted(roles))}.")


class _Reaction(_Data):
    comment_id: str
    emoji: str


def _reaction_added(data: _Reaction, place: _Place) -> None:
    if place.event["actor"] in _reactions(data, place):
        raise invalid("the event changes nothing")


def _reaction_removed(data: _Reaction, place: _Place) -> None:
    if place.event["actor"] not in _reactions(data, place):
        raise invalid(f"there is no such reaction of this actor to {data.comment_id}")


def _reactions(data: _Reaction, place: _Place) -> list[Any]:
    if not comments.validate_emoji(data.emoji):
        raise invalid(f"Invalid emoji: {data.emoji[:60]!r}")
    comments.validate_comment_for_react(place.log, data.comment_id)
    found = comments._build_comments_map(place.log)[data.comment_id]
    reactors: list[Any] = found["reactions"].get(data.emoji, [])
    return reactors


# --- references ---


class _Relationship(_Data):
    type: str
    target_task_id: str


class _RelationshipAdded(_Relationship):
    note: str | UnsetType = UNSET


def _relationship_added(data: _RelationshipAdded, place: _Place) -> None:
    if not relationships.validate_relationship_type(data.type):
        valid = ", ".join(sorted(relationships.RELATIONSHIP_TYPES))
        raise invalid(f"Invalid relationship type: {data.type[:60]!r}. Valid types: {valid}.")
    if data.target_task_id == place.task["id"]:
        raise invalid("Cannot create a relationship from a task to itself.")
    if not place.around.is_active(data.target_task_id):
        raise invalid(f"there is no active task {data.target_task_id[:60]!r} to point to")
    if _is_related(data, place):
        raise invalid(f"Duplicate: {data.type} relationship to {data.target_task_id} already exists.")


def _relationship_removed(data: _Relationship, place: _Place) -> None:
    if not _is_related(data, place):
        raise invalid(f"No {data.type[:60]} relationship to {data.target_task_id[:60]}.")


def _is_related(data: _Relationship, place: _Place) -> bool:
    there = ((found["type"], found["target_task_id"]) for found in place.task.get("relationships_out", []))
    return (data.type, data.target_task_id) in there


class _Branch(_Data):
    branch: str
    repo: str | UnsetType = UNSET


def _branch_linked(data: _Branch, place: _Place) -> None:
    if not data.branch.strip() or data.branch.startswith("-") or any(ord(c) < 32 for c in data.branch):
        raise invalid("a branch's name must not be empty, begin with a dash or have control characters")
    if _is_linked(data, place):
        raise invalid(f"the branch {data.branch[:60]!r} is already linked")


def _branch_unlinked(data: _Branch, place: _Place) -> None:
    if not _is_linked(data, place):
        raise invalid(f"the branch {data.branch[:60]!r} is not linked")


def _is_linked(data: _Branch, place: _Place) -> bool:
    repo = None if data.repo is UNSET else data.repo
    return (data.branch, repo) in ((link["branch"], link.get("repo")) for link in place.task.get("branch_links", []))


class _ArtifactAttached(_Data):
    artifact_id: str
    role: str | UnsetType | None = UNSET


def _artifact_attached(data: _ArtifactAttached, place: _Place) -> None:
    if not place.around.has_artifact(data.artifact_id):
        raise invalid(f"there is no artifact {data.artifact_id[:60]!r}; attach one with: lattice attach")
    _require_role(data.role or UNSET, place)


_BY_COMMANDS = {
    "task_archived": "lattice archive",
    "task_unarchived": "lattice unarchive",
    "task_short_id_assigned": "lattice backfill-ids",
}
"""Events that accompany moved files, or an entry in ``ids.json``."""

_RULES: Mapping[str, tuple[type[Any], Callable[[Any, _Place], None]]] = {
    "artifact_attached": (_ArtifactAttached, _artifact_attached),
    "assignment_changed": (_AssignmentChanged, _assignment_changed),
    "branch_linked": (_Branch, _branch_linked),
    "branch_unlinked": (_Branch, _branch_unlinked),
    "comment_added": (_CommentAdded, _comment_added),
    "comment_deleted": (_CommentDeleted, _comment_deleted),
    "comment_edited": (_CommentEdited, _comment_edited),
    "field_updated": (_FieldUpdated, _field_updated),
    "reaction_added": (_Reaction, _reaction_added),
    "reaction_removed": (_Reaction, _reaction_removed),
    "relationship_added": (_RelationshipAdded, _relationship_added),
    "relationship_removed": (_Relationship, _relationship_removed),
    "status_changed": (_StatusChanged, _status_changed),
    "task_created": (_Created, _created),
}
"""Type of an event's data, and its check.

Other types are refused, except ``x_...`` and ``git_event``, which may hold any data and change nothing.
"""
