"""Validation of a resource's events: the rules of ``lattice resource``, from lattice's core."""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from lattice.core import resources
from msgspec import UNSET, Meta, UnsetType

from lattice_remote.protocol.paths import is_resource_name
from lattice_remote.storage.events import Shaped, Snapshot, invalid, shape

__all__ = ["ResourceContext", "add_to_resource", "require_name"]

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_Holders = Annotated[int, Meta(ge=1, le=1_000_000)]
_Seconds = Annotated[int, Meta(ge=1, le=100 * 366 * 24 * 3600)]


@dataclass(frozen=True, slots=True)
class ResourceContext:
    name: str
    is_task: Callable[[str], bool]


def require_name(name: str, others: Sequence[str]) -> None:
    """Raise Rejected unless a resource's name can be a directory on every machine."""
    plain = name.isprintable() and unicodedata.is_normalized("NFC", name)
    if not is_resource_name(name) or not plain:
        raise invalid(f"{name[:60]!r} cannot be a resource's name: it must be a directory name on every system")
    for other in others:
        if name != other and name.casefold() == other.casefold():
            raise invalid(f"{name!r} differs from {other!r} only in case: choose another name")


def add_to_resource(snapshot: Snapshot | None, events: Sequence[Shaped], around: ResourceContext) -> Snapshot:
    """Return the resource with these events added in order; sets their ``expires_at``. Raises Rejected."""
    for event in events:
        kind = event["type"]
        rule = _RULES.get(kind)
        if rule is None:
            raise invalid(f"{kind[:60]!r} is not a type of event of a resource")
        if (snapshot is None) != (kind == "resource_created"):
            raise invalid("a resource begins with resource_created, and only once" if snapshot else "no such resource")
        fields, check = rule
        check(shape(fields, event["data"], kind), _Place(event, snapshot or {}, around))
        if "expires_at" in fields.__struct_fields__:
            assert snapshot is not None, "only an existing resource can be held"
            event["data"]["expires_at"] = resources.compute_expires_at(snapshot["ttl_seconds"], event["ts"])
        snapshot = resources.apply_resource_event_to_snapshot(snapshot, event)
    assert snapshot is not None, "there was a resource, or the first event made one"
    return snapshot


@dataclass(frozen=True, slots=True)
class _Place:
    event: Shaped
    resource: Snapshot
    around: ResourceContext


class _Data(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _Created(_Data):
    name: str
    max_holders: _Holders
    ttl_seconds: _Seconds
    description: str | UnsetType = UNSET


def _created(data: _Created, place: _Place) -> None:
    if data.name != place.around.name:
        raise invalid(f"the event makes {data.name[:60]!r}, not {place.around.name!r}")


class _Held(_Data):
    holder: str | dict[str, Any]
    expires_at: str | UnsetType | None = UNSET


class _Acquired(_Held):
    task_id: str | UnsetType = UNSET
    reason: str | UnsetType = UNSET


def _acquired(data: _Acquired, place: _Place) -> None:
    now = place.event["ts"]
    _require_own(data.holder, place)
    if _find(data.holder, place) is not None:
        raise invalid("this actor already holds it; resource_heartbeat renews the lease, resource_expired ends it")
    if not resources.is_resource_available(place.resource, now):
        raise invalid("the resource is held by others; wait, or end their lease with resource_expired")
    if data.task_id is not UNSET and not place.around.is_task(data.task_id):
        raise invalid(f"there is no task {data.task_id[:60]!r}")


def _heartbeat(data: _Held, place: _Place) -> None:
    _require_own(data.holder, place)
    if resources.is_holder_stale(_holder(data.holder, place), place.event["ts"]):
        raise invalid("this actor's lease has expired; acquire it again")


class _Released(_Data):
    holder: str | dict[str, Any]
    task_id: str | UnsetType = UNSET
    reason: str | UnsetType = UNSET


def _released(data: _Released, place: _Place) -> None:
    _require_own(data.holder, place)
    _holder(data.holder, place)


class _Expired(_Data):
    holder: str | dict[str, Any]
    expired_at: str
    reclaimed_by: str | dict[str, Any]


def _expired(data: _Expired, place: _Place) -> None:
    _holder(data.holder, place)
    if data.reclaimed_by != place.event["actor"]:
        raise invalid("'reclaimed_by' must be the event's actor")
    if not _TIME.fullmatch(data.expired_at):
        raise invalid(f"not a time: {data.expired_at[:60]!r}")


class _Updated(_Data):
    field: str
    new_value: Any
    old_value: Any = UNSET


_UPDATABLE: Mapping[str, Any] = {"description": str | None, "max_holders": _Holders, "ttl_seconds": _Seconds}


def _updated(data: _Updated, place: _Place) -> None:
    if data.field not in _UPDATABLE:
        raise invalid(f"{data.field[:60]!r} cannot be updated; {', '.join(_UPDATABLE)} can")
    shape(_UPDATABLE[data.field], data.new_value, data.field)
    if data.old_value is not UNSET and data.old_value != place.resource.get(data.field):
        raise invalid("the event's 'old_value' is not the resource's value")


def _require_own(holder: str | dict[str, Any], place: _Place) -> None:
    if holder != place.event["actor"]:
        raise invalid("the holder must be the event's actor")


def _holder(holder: str | dict[str, Any], place: _Place) -> dict[str, Any]:
    found = _find(holder, place)
    if found is None:
        raise invalid("that actor does not hold it")
    return found


def _find(holder: str | dict[str, Any], place: _Place) -> dict[str, Any] | None:
    return next((held for held in place.resource.get("holders", []) if held.get("actor") == holder), None)


_RULES: Mapping[str, tuple[Any, Callable[[Any, _Place], None]]] = {
    "resource_acquired": (_Acquired, _acquired),
    "resource_created": (_Created, _created),
    "resource_expired": (_Expired, _expired),
    "resource_heartbeat": (_Held, _heartbeat),
    "resource_released": (_Released, _released),
    "resource_updated": (_Updated, _updated),
}
"""Type of an event's data, and its check."""
