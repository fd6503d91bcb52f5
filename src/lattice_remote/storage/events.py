"""The shape of an event, its bounds, and in whose name it is: what is checked before anybody looks at what it says.

What passes is plain JSON that lattice writes and reads back as it was, so that a snapshot made of it is the one that
``lattice rebuild`` makes.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import msgspec
from msgspec import UNSET, UnsetType

from lattice_remote.errors import Rejected

__all__ = [
    "MAX_EVENTS",
    "Conflict",
    "Event",
    "MayActAs",
    "Merged",
    "Sessions",
    "Shaped",
    "Snapshot",
    "StorageBackend",
    "Written",
    "invalid",
    "plain",
    "require_actor",
    "shape",
    "shaped",
]

type Event = Mapping[str, Any]
"""One event of lattice, as ``lattice.core.events.create_event`` makes it."""
type Snapshot = dict[str, Any]
"""A task or resource as its events have made it, as in lattice's JSON files."""


@dataclass(frozen=True, slots=True)
class Written[T]:
    """It is done, and durable. ``content`` is what is there now: a snapshot, or a text."""

    content: T


@dataclass(frozen=True, slots=True)
class Merged:
    """A text was merged by line with what others have written since its base; ``content`` is the whole text now."""

    content: str


@dataclass(frozen=True, slots=True)
class Conflict:
    """Nothing was written: the base has moved. Read again, decide again, write again.

    Attributes:
        expected: what the write was built on: the id of the last event, or the text; None for nothing yet.
        found: what is there in its place; None for nothing any more.
    """

    expected: str | None
    found: str | None


MAX_EVENTS = 100
"""The most events of one write."""
_MAX_BYTES, _MAX_BYTES_TOGETHER = 1024 * 1024, 3 * 1024 * 1024
_MAX_DEPTH = 60
"""A request around it may be nested to 64."""
_MAX_INT = 2**63
_MAX_ACTOR_CHARS = 256
_EVENT_ID = re.compile(r"ev_[0-9A-HJKMNP-TV-Z]{26}")

type Shaped = dict[str, Any]
"""An event of our own, whose envelope is as it must be."""


class MayActAs(Protocol):
    """Does nothing if a write may be in this name; raises ``Rejected`` otherwise."""

    def __call__(self, actor: str, *, session: Mapping[str, Any] | None = None) -> None:
        """Look at an actor in words, and at the session that it stands for if it is one's."""


class Sessions(Protocol):
    """What is known of sessions."""

    def actor_of(self, session_name: str) -> Mapping[str, Any] | None:
        """Return the actor that events of this active session carry; None when there is no such session."""


class _Meta(msgspec.Struct, forbid_unknown_fields=True):
    model: str | None = None
    session: str | None = None


class _Provenance(msgspec.Struct, forbid_unknown_fields=True):
    triggered_by: str | UnsetType = UNSET
    on_behalf_of: str | UnsetType = UNSET
    reason: str | UnsetType = UNSET


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    schema_version: Literal[1]
    id: str
    ts: str
    type: str
    actor: str | dict[str, Any]
    data: dict[str, Any]
    task_id: str | UnsetType = UNSET
    resource_id: str | UnsetType = UNSET
    agent_meta: _Meta | UnsetType = UNSET
    provenance: _Provenance | UnsetType = UNSET


def invalid(message: str) -> Rejected:
    """Return the refusal of what can't be written, here as there; nothing was changed."""
    return Rejected(message, code="REMOTE_INVALID")


def shape[T](kind: type[T], value: object, what: str) -> T:
    """Return ``value`` as a ``kind``.

    Raises:
        Rejected: it is none; ``what`` names it in the message.
    """
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        raise invalid(f"{what}: {error}") from None


def plain(events: Sequence[Event]) -> list[Shaped]:
    """Return the events as they will be read from their log: JSON of our own, which nobody else can change.

    Raises:
        Rejected: they are too many or too large, or hold what not every program reads alike.
    """
    if not 0 < len(events) <= MAX_EVENTS:
        raise invalid(f"a write has 1 to {MAX_EVENTS} events, not {len(events)}")
    texts = [_encoded(event) for event in events]
    if sum(map(len, texts)) > _MAX_BYTES_TOGETHER:
        raise invalid(f"the events of a write are over {_MAX_BYTES_TOGETHER >> 20} MiB")
    return [json.loads(text) for text in texts]


def shaped(events: list[Shaped], owner: Mapping[str, str], known: Sequence[Event]) -> list[Shaped]:
    """Return the events if they have the form of lattice's.

    Args:
        events: plain ones.
        owner: ``task_id`` or ``resource_id`` with the id that each event must name, and no other.
        known: the events that are there already.

    Raises:
        Rejected: they are no events, of another owner, or with an id that is taken.
    """
    ids = {event.get("id") for event in known}
    for event in events:
        envelope = shape(_Envelope, event, "not an event")
        named = {key: event[key] for key in ("task_id", "resource_id") if key in event}
        if named != owner:
            raise invalid(f"the event {envelope.id[:60]!r} is not of {next(iter(owner.values()))}")
        if not _EVENT_ID.fullmatch(envelope.id):
            raise invalid(f"{envelope.id[:60]!r} is not an event's id: ev_ and 26 capitals and digits")
        if envelope.id in ids:
            raise invalid(f"there is an event {envelope.id} already")
        ids.add(envelope.id)
    return events


def _encoded(event: Event) -> bytes:
    if not isinstance(event, Mapping):
        raise invalid("an event is a mapping, as lattice.core.events.create_event makes it")
    _require_bounded(event)
    try:
        text = json.dumps(event, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError) as error:  # NaN, Infinity, half of a surrogate pair, what is no JSON at all
        raise invalid("an event holds a value that not every program can read") from error
    if len(text) > _MAX_BYTES:
        raise invalid("an event is over 1 MiB")
    return text


def _require_bounded(value: object) -> None:
    """Do nothing if ``value`` is not nested too deep and its numbers are such that every program reads alike.

    No recursion: the depth is what is looked for.
    """
    waiting: list[tuple[object, int]] = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise invalid(f"an event is nested deeper than {_MAX_DEPTH}")
        if isinstance(item, int) and not -_MAX_INT <= item < _MAX_INT:
            raise invalid("an event holds a number of more than 64 bits")
        if isinstance(item, str) and "\0" in item:
            raise invalid("an event holds a NUL character")
        if isinstance(item, Mapping):
            if not all(isinstance(key, str) for key in item):
                raise invalid("an event holds a key that is no text")
            waiting += [(part, depth + 1) for part in (*item, *item.values())]
        elif isinstance(item, list | tuple):
            waiting += [(part, depth + 1) for part in item]


def require_actor(event: Shaped, may_act_as: MayActAs, sessions: Sessions) -> str:
    """Return who an event says it is by: an actor in words, or one of an active session.

    Raises:
        Rejected: it is nobody, or somebody whom the writer may not name.
    """
    from lattice.core.actors import ActorIdentity
    from lattice.core.ids import validate_actor

    envelope = shape(_Envelope, event, "not an event")
    actor, provenance = envelope.actor, envelope.provenance
    behalf = None if provenance is UNSET or provenance.on_behalf_of is UNSET else provenance.on_behalf_of
    if behalf is not None and not validate_actor(behalf):
        raise invalid(f"not an actor: {behalf[:60]!r}; it looks like human:ana or agent:claude")
    if isinstance(actor, str):
        if not validate_actor(actor) or not _is_name(actor):
            raise invalid(f"not an actor: {actor[:60]!r}; it looks like human:ana or agent:claude")
        may_act_as(actor)
        return actor
    name = actor.get("name")
    known = sessions.actor_of(name) if isinstance(name, str) else None
    if known is None or dict(known) != actor:
        raise invalid("the actor is no active session's; start one with: lattice session start")
    spoken: str = ActorIdentity.from_dict(actor).to_legacy_actor()
    may_act_as(spoken, session=known)
    return spoken


def _is_name(actor: str) -> bool:
    return len(actor) <= _MAX_ACTOR_CHARS and actor.isprintable() and actor == actor.strip()


@runtime_checkable
class StorageBackend(Protocol):
    """A board. A task is named by its id (``task_...``) or its short id (``LAT-42``), a resource by its name or id.

    Reads are reads of local files. A write is one step: all of it, durable once it returns, or nothing. Calls may come
    from several threads.

    Raises, in every method:
        StorageError: a file can't be read or written, or an earlier write was cut off; the message says what mends it.
        RemoteError: of a remote board, what keeps it from being reached; see ``errors``.
    """

    @property
    def root_path(self) -> Path:
        """The directory that holds ``.lattice``."""

    def list_tasks(self, *, archived: bool = False) -> list[Snapshot]:
        """Return the active tasks, in the order in which they were made; with ``archived`` those instead."""

    def get_task(self, task: str) -> Snapshot | None:
        """Return a task, archived or not; None when there is none."""

    def get_task_events(self, task: str) -> list[Snapshot]:
        """Return a task's events in their order; empty when there is no such task."""

    def write_task(self, task: str, events: Sequence[Event], base: str | None) -> Written[Snapshot] | Conflict:
        """Add events to a task, or with ``task_created`` as the first one make it.

        The events are checked by lattice's own rules, as its commands do. Whoever writes sets ``ts`` of each event, the
        ``id`` of ``task_created``, and the short id of a new task.

        Args:
            base: the id of the task's last event (``last_event_id``) when the events were made; None for a new task.

        Raises:
            Rejected: ``REMOTE_INVALID`` when an event is none that may be added here, ``REMOTE_FORBIDDEN`` when it is
                in a name that this token may not use. Nothing was written.
        """

    def list_resources(self) -> list[Snapshot]:
        """Return the resources, by name."""

    def get_resource(self, resource: str) -> Snapshot | None:
        """Return a resource; None when there is none."""

    def write_resource(self, resource: str, events: Sequence[Event], base: str | None) -> Written[Snapshot] | Conflict:
        """Add events to a resource, or with ``resource_created`` as the first one make it.

        As ``write_task``; whoever writes also sets ``expires_at``, from the resource's own time to live.
        """

    def read_plan(self, task: str) -> str | None:
        """Return the text of a task's plan; None when it has none."""

    def write_plan(self, task: str, text: str, base: str | None) -> Written[str] | Merged | Conflict:
        """Replace a task's plan.

        Args:
            base: the text that it was made from, as it was read; None when there was none.

        Raises:
            Rejected: ``REMOTE_INVALID`` when there is no such active task, ``REMOTE_TOO_LARGE`` over 1 MiB.
        """

    def read_notes(self, task: str) -> str | None:
        """Return the text of a task's notes; None when it has none."""

    def write_notes(self, task: str, text: str, base: str | None) -> Written[str] | Merged | Conflict:
        """Replace a task's notes, as ``write_plan`` does its plan."""
