"""``/projects/:slug/resources``: locks that actors acquire and release, like ``lattice resource``.

A resource is created and acquired by name; afterwards it also has an id.
"""

import json
from http import HTTPStatus
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.responses import Response

from lattice_remote.errors import Rejected
from lattice_remote.server.http.middleware import cancel_on_disconnect, ok
from lattice_remote.server.http.rest import (
    Actor,
    Endpoint,
    EndpointRequest,
    Nothing,
    Provenance,
    envelope_response,
    options,
    output_response,
    read,
    read_output,
    with_position,
    write,
)
from lattice_remote.server.http.writes import call
from lattice_remote.server.ipc import ReadResult

__all__ = ["endpoints"]

_ALL = "/projects/{slug}/resources"
_NAMED = f"{_ALL}/{{name}}"
_WITH_ID = f"{_NAMED}/{{id}}"
MAX_WAIT_S = 300
_FIELDS = ("description", "max_holders", "ttl_seconds")


# The types below describe lattice's output, which may have more fields.


class Holder(msgspec.Struct, kw_only=True):
    """A holder of a resource, and the end of the lease."""

    actor: Actor
    acquired_at: str | None = None
    expires_at: str | None = None
    task_id: str | None = None


class Resource(msgspec.Struct, kw_only=True):
    """A resource. One that is only in ``config.json`` has no id until it is first acquired."""

    name: str
    id: str | None = None
    description: str | None = None
    max_holders: int | None = None
    ttl_seconds: int | None = None
    holders: list[Holder] = []


class Resources(msgspec.Struct):
    """All resources, by name."""

    resources: list[Resource]


_MaxHolders = Annotated[int, Meta(ge=1, le=1_000_000)]
_Ttl = Annotated[int, Meta(ge=1, le=1_000_000_000)]


class NewResource(Provenance, frozen=True, kw_only=True):
    """A new resource, as with ``lattice resource create``. Lattice sets omitted fields."""

    description: str | None = None
    max_holders: _MaxHolders | None = None
    ttl_seconds: _Ttl | None = None
    id: Annotated[str, Meta(extra_json_schema={"pattern": "^res_[0-9A-HJKMNP-TV-Z]{26}$"})] | None = None
    """Checked by lattice, whose refusal is answered."""


class Acquisition(Provenance, frozen=True, kw_only=True):
    """Conditions for acquiring a resource: for a task, by ``force``, or with ``wait`` once it is free."""

    task: str | None = None
    force: bool = False
    wait: bool = False
    timeout: Annotated[int, Meta(ge=0, le=MAX_WAIT_S, description="how many seconds to wait")] = 60


class ResourceChanges(Provenance, frozen=True, kw_only=True):
    """New values of fields; or ``held``: whether the actor holds it. Repeating a hold renews the lease."""

    description: str | UnsetType | None = UNSET
    max_holders: _MaxHolders | UnsetType = UNSET
    ttl_seconds: _Ttl | UnsetType = UNSET
    held: bool | None = None
    task: str | None = None
    force: bool = False


async def list_resources(request: EndpointRequest[Nothing, Nothing]) -> Response:
    """List the resources and their holders."""
    return await read(request, "resource list")


async def show_resource(request: EndpointRequest[Nothing, Nothing]) -> Response:
    """Return a resource and its holders."""
    return await read(request, "resource status", "--", request.path["name"])


async def create_resource(request: EndpointRequest[Nothing, NewResource]) -> Response:
    """Create a resource."""
    ttl = [] if request.body.ttl_seconds is None else [f"--ttl={request.body.ttl_seconds}"]
    given = [*options(request.body, request, without=["ttl_seconds"]), *ttl]
    return await write(request, "resource create", *given, "--", request.path["name"], success=HTTPStatus.CREATED)


async def acquire_resource(request: EndpointRequest[Nothing, Acquisition]) -> Response:
    """Acquire a resource or renew its lease; create one that is only in the project's settings.

    Status 409 if others hold it, with ``wait`` until ``timeout`` has passed. Disconnecting ends the wait.
    """
    given = options(request.body, request, without=[] if request.body.wait else ["timeout"])
    return await cancel_on_disconnect(
        request.http, write(request, "resource acquire", *given, "--", request.path["name"])
    )


async def release_resource(request: EndpointRequest[Nothing, Provenance]) -> Response:
    """Release a resource."""
    return await write(request, "resource release", *options(request.body, request), "--", request.path["name"])


async def extend_resource(request: EndpointRequest[Nothing, Provenance]) -> Response:
    """Renew the lease of a resource, like ``lattice resource heartbeat``."""
    return await write(request, "resource heartbeat", *options(request.body, request), "--", request.path["name"])


async def show_resource_with_id(request: EndpointRequest[Nothing, Nothing]) -> Response:
    """Return the resource with this name and id."""
    return output_response(await _with_id(request))


async def change_resource(request: EndpointRequest[Nothing, ResourceChanges]) -> Response:
    """Change fields of a resource in one change; or acquire or release it, with ``held``."""
    return await _change(request, await read_output(request, "resource status", "--", request.path["name"]))


async def change_resource_with_id(request: EndpointRequest[Nothing, ResourceChanges]) -> Response:
    """Change fields of the resource with this name and id; or acquire or release it, with ``held``."""
    return await _change(request, await _with_id(request))


async def _change(request: EndpointRequest[Nothing, ResourceChanges], found: ReadResult) -> Response:
    if found.status:
        return output_response(found)
    body, resource = request.body, msgspec.json.decode(found.body, type=dict[str, Any])["data"]
    given = {name: getattr(body, name) for name in _FIELDS}
    values = {name: value for name, value in given.items() if value is not UNSET}
    if bool(values) == (body.held is not None):
        why = (
            "name either new values of fields, or held"
            if values
            else "there is nothing to change in the request's body"
        )
        raise Rejected(why, code="REMOTE_INVALID")
    if not values:
        command, without = ("acquire", []) if body.held else ("release", ["task", "force"])
        options_ = options(body, request, without=[*_FIELDS, "held", *without])
        return await write(request, f"resource {command}", *options_, "--", resource.get("id") or resource["name"])
    if body.name is not None or body.task is not None or body.force:
        raise Rejected("'name', 'task' and 'force' belong to 'held'", code="REMOTE_INVALID")
    return await _update(request, resource, values)


async def _update(
    request: EndpointRequest[Nothing, ResourceChanges], resource: dict[str, Any], values: Any
) -> Response:
    """Write an event for each field; lattice has no command."""
    from lattice.core.events import create_resource_event

    if resource.get("id") is None:
        why = f"resource {resource['name']!r} is only in the project's settings; create it first"
        raise Rejected(why, code="REMOTE_INVALID")
    body, actor = request.body, request.body.actor or request.context.login.token.actor
    about = {name: getattr(body, name) for name in ("reason", "on_behalf_of", "triggered_by", "model", "session")}
    events = [
        create_resource_event("resource_updated", resource["id"], actor, {"field": name, "new_value": value}, **about)
        for name, value in values.items()
    ]
    payload = {"resource": resource["name"], "events": events, "base": resource.get("last_event_id")}
    done = await call(request.context, "storage", "write-resource", json.dumps(payload).encode(), once=request.once)
    if done.status == HTTPStatus.CONFLICT:
        raise Rejected(f"resource {resource['name']!r} has just changed; try again", code="REMOTE_BUSY")
    if done.status != HTTPStatus.OK:
        return envelope_response(done.payload)
    return await with_position(request, done.seq, ok(msgspec.json.decode(done.payload)["content"]))


async def _with_id(request: EndpointRequest[Any, Any]) -> ReadResult:
    """Return lattice's output for a resource. Raises Rejected: it has another id."""
    name, id_ = request.path["name"], request.path["id"]
    printed = await read_output(request, "resource status", "--", name)
    resource = {} if printed.status else msgspec.json.decode(printed.body, type=dict[str, Any])["data"]
    if (resource.get("name"), resource.get("id")) != (name, id_):
        raise Rejected(f"no resource {name!r} has the id {id_!r}", code="REMOTE_NOT_FOUND")
    return printed


endpoints = [
    Endpoint("GET", _ALL, list_resources, Resources),
    Endpoint("GET", _NAMED, show_resource, Resource),
    Endpoint("POST", _NAMED, create_resource, Resource, HTTPStatus.CREATED),
    Endpoint("PATCH", _NAMED, change_resource, Resource),
    Endpoint("POST", f"{_NAMED}/acquire", acquire_resource, Resource),
    Endpoint("POST", f"{_NAMED}/release", release_resource, Resource),
    Endpoint("POST", f"{_NAMED}/heartbeat", extend_resource, Resource),
    Endpoint("GET", _WITH_ID, show_resource_with_id, Resource),
    Endpoint("PATCH", _WITH_ID, change_resource_with_id, Resource),
]
