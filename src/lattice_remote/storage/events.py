"""Storage interface, and validation of an event's form, bounds and actor before its content.

A valid event is plain JSON that lattice writes and reads back unchanged, so ``lattice rebuild`` makes the same
snapshot.
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
"""An event of lattice, as made by ``lattice.core.events.create_event``."""
type Snapshot = dict[str, Any]
"""A task or resource, as in lattice's JSON files."""


@dataclass(frozen=True, slots=True)
class Written[T]:
    """A durable write. ``content`` is the snapshot or text now."""

    content: T


@dataclass(frozen=True, slots=True)
class Merged:
    """A text merged by line with later edits; ``content`` is the whole text now."""

    content: str


@dataclass(frozen=True, slots=True)
class Conflict:
    """A write refused because its base has changed. Read again and retry.

    Attributes:
        expected: the write's base: the id of the last event, or the text; None for nothing yet.
        found: the present one; None if it was removed.
    """

    expected: str | None
    found: str | None


MAX_EVENTS = 100
_MAX_BYTES, _MAX_BYTES_TOGETHER = 1024 * 1024, 3 * 1024 * 1024
_MAX_DEPTH = 60
"""The enclosing request may be nested to 64."""
_MAX_INT = 2**63
_MAX_ACTOR_CHARS = 256
_EVENT_ID = re.compile(r"ev_[0-9A-HJKMNP-TV-Z]{26}")

type Shaped = dict[str, Any]
"""A plain event with a valid envelope."""


class MayActAs(Protocol):
    def __call__(self, actor: str, *, session: Mapping[str, Any] | None = None) -> None: ...


class Sessions(Protocol):
    def actor_of(self, session_name: str) -> Mapping[str, Any] | None: ...


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
    return Rejected(message, code="REMOTE_INVALID")


def shape[T](kind: type[T], value: object, what: str) -> T:
    """Return ``value`` as a ``kind``. Raises Rejected: the message names it ``what``."""
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        raise invalid(f"{what}: {error}") from None


def plain(events: Sequence[Event]) -> list[Shaped]:
    """Return a copy of the events as they will be read back from the log.

    Raises:
        Rejected: too many, too large, or with values that not every program reads alike.
    """
    if not 0 < len(events) <= MAX_EVENTS:
        raise invalid(f"a write must have 1 to {MAX_EVENTS} events, not {len(events)}")
    texts = [_encoded(event) for event in events]
    if sum(map(len, texts)) > _MAX_BYTES_TOGETHER:
        raise invalid(f"the events of a write are over {_MAX_BYTES_TOGETHER >> 20} MiB")
    return [json.loads(text) for text in texts]


def shaped(events: list[Shaped], owner: Mapping[str, str], known: Sequence[Event]) -> list[Shaped]:
    """Return the events if they have lattice's form.

    Args:
        events: plain ones.
        owner: ``task_id`` or ``resource_id`` with the id that every event must have.
        known: the present events.

    Raises:
        Rejected: malformed, of another owner, or with an id that is taken.
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
            raise invalid(f"event {envelope.id} already exists")
        ids.add(envelope.id)
    return events


def _encoded(event: Event) -> bytes:
    if not isinstance(event, Mapping):
        raise invalid("an event must be a mapping, as made by lattice.core.events.create_event")
    _require_bounded(event)
    try:
        text = json.dumps(event, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError) as error:  # NaN, Infinity, a lone surrogate, a value without a JSON form
        raise invalid("an event has a value that not every program can read") from error
    if len(text) > _MAX_BYTES:
        raise invalid("an event is over 1 MiB")
    return text


def _require_bounded(value: object) -> None:
    """Raise unless ``value`` has bounded depth and numbers that every program reads alike; not recursive."""
    waiting: list[tuple[object, int]] = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise invalid(f"an event is nested deeper than {_MAX_DEPTH}")
        if isinstance(item, int) and not -_MAX_INT <= item < _MAX_INT:
            raise invalid("an event has a number of more than 64 bits")
        if isinstance(item, str) and "\0" in item:
            raise invalid("an event has a NUL character")
        if isinstance(item, Mapping):
            if not all(isinstance(key, str) for key in item):
                raise invalid("an event has a key that is not text")
            waiting += [(part, depth + 1) for part in (*item, *item.values())]
        elif isinstance(item, list | tuple):
            waiting += [(part, depth + 1) for part in item]


def require_actor(event: Shaped, may_act_as: MayActAs, sessions: Sessions) -> str:
    """Return the actor of an event: named, or of an active session.

    Raises:
        Rejected: there is none, or the writer may not use it.
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
        raise invalid("the actor has no active session; start one with: lattice session start")
    spoken: str = ActorIdentity.from_dict(actor).to_legacy_actor()
    may_act_as(spoken, session=known)
    return spoken


def _is_name(actor: str) -> bool:
    return len(actor) <= _MAX_ACTOR_CHARS and actor.isprintable() and actor == actor.strip()


@runtime_checkable
class StorageBackend(Protocol):
    """A project. A task is named by id (``task_...``) or short id (``LAT-42``), a resource by name or id.

    Reads use local files. A write is atomic, and durable once it returns. Methods are thread-safe.

    Raises, in every method:
        StorageError: a file cannot be read or written, or a write was interrupted; the message names the repair.
        RemoteError: a remote project cannot be reached; see ``errors``.
    """

    @property
    def root_path(self) -> Path:
        """The directory that holds ``.lattice``."""

    def list_tasks(self, *, archived: bool = False) -> list[Snapshot]:
        """Return the active tasks in order of creation, or with ``archived`` the archived ones."""

    def get_task(self, task: str) -> Snapshot | None:
        """Return a task, archived or not; None if there is none."""

    def get_task_events(self, task: str) -> list[Snapshot]:
        """Return a task's events in order; empty if there is no such task."""

    def write_task(self, task: str, events: Sequence[Event], base: str | None) -> Written[Snapshot] | Conflict:
        """Add events to a task, or create it with ``task_created`` as the first.

        Lattice's own rules apply, as in its commands. The writer sets ``ts`` of each event, the ``id`` of
        ``task_created``, and the short id of a new task.

        Args:
            base: the task's ``last_event_id`` on which the events are based; None for a new task.

        Raises:
            Rejected: ``REMOTE_INVALID`` for an event that may not be added, ``REMOTE_FORBIDDEN`` for an actor that this
                token may not use. Nothing was written.
        """

    def list_resources(self) -> list[Snapshot]:
        """Return the resources, by name."""

    def get_resource(self, resource: str) -> Snapshot | None:
        """Return a resource; None if there is none."""

    def write_resource(self, resource: str, events: Sequence[Event], base: str | None) -> Written[Snapshot] | Conflict:
        """Add events to a resource, or create it with ``resource_created`` as the first.

        Works like ``write_task``; the writer also sets ``expires_at``, from the resource's own time to live.
        """

    def read_plan(self, task: str) -> str | None:
        """Return a task's plan; None if it has none."""

    def write_plan(self, task: str, text: str, base: str | None) -> Written[str] | Merged | Conflict:
        """Replace a task's plan.

        Args:
            base: the text that was edited, as read; None if there was none.

        Raises:
            Rejected: ``REMOTE_INVALID`` if there is no such active task, ``REMOTE_TOO_LARGE`` over 1 MiB.
        """

    def read_notes(self, task: str) -> str | None:
        """Return a task's notes; None if it has none."""

    def write_notes(self, task: str, text: str, base: str | None) -> Written[str] | Merged | Conflict:
        """Replace a task's notes, like ``write_plan``."""
