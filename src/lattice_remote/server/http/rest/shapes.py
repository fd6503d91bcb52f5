"""What lattice prints, as far as it can be promised: for the description, and never to check what lattice says.

Further fields may be there, of this lattice or a later one. Who acts is a text, or a map for a session.
"""

from typing import Any

import msgspec

__all__ = ["Comment", "Event", "NextTask", "Resource", "Resources", "Task", "TaskInFull"]

_Actor = str | dict[str, Any]


class Task(msgspec.Struct, kw_only=True):
    """A task's snapshot. With ``compact`` it has counts in place of its lists."""

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
    assigned_to: _Actor | None = None
    created_by: _Actor | None = None
    created_at: str | None = None
    updated_at: str | None = None
    done_at: str | None = None
    last_event_id: str | None = None
    comment_count: int | None = None
    custom_fields: dict[str, Any] | None = None
    archived: bool | None = None


class NextTask(Task):
    """A task that was claimed, with its plan unless nobody has written one."""

    plan_content: str | None = None


class Event(msgspec.Struct, kw_only=True):
    """One event of a task's log."""

    id: str
    type: str
    task_id: str
    ts: str
    actor: _Actor
    data: dict[str, Any] | None = None


class TaskInFull(Task):
    """A task with its log, its relationships, and what its status may become."""

    events: list[Event] | None = None
    valid_transitions: list[str] | None = None
    relationships_enriched: list[dict[str, Any]] | None = None
    relationships_in: list[dict[str, Any]] | None = None
    plan_path: str | None = None
    notes_path: str | None = None


class Comment(msgspec.Struct, kw_only=True):
    """A comment, with the replies to it."""

    id: str
    body: str
    author: _Actor
    created_at: str
    role: str | None = None
    edited: bool = False
    deleted: bool = False
    parent_id: str | None = None
    reactions: dict[str, list[Any]] | None = None
    replies: list[dict[str, Any]] | None = None


class Holder(msgspec.Struct, kw_only=True):
    """Who holds a resource, and until when."""

    actor: _Actor
    acquired_at: str | None = None
    expires_at: str | None = None
    task_id: str | None = None


class Resource(msgspec.Struct, kw_only=True):
    """A resource. One that only ``config.json`` names has no id until it is acquired for the first time."""

    name: str
    id: str | None = None
    description: str | None = None
    max_holders: int | None = None
    ttl_seconds: int | None = None
    holders: list[Holder] = []


class Resources(msgspec.Struct):
    """All resources, by name."""

    resources: list[Resource]
