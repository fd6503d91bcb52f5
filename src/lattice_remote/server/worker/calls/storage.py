"""Storage surface: writes of programs (``RemoteStorage``) to the project's files, as a ``LocalStorage`` does them.

``name`` is a key of ``_WRITES``, ``payload`` its arguments. The response is status 200 with ``{"outcome": "written" or
"merged", "content": ...}``, 409 with ``{"outcome": "conflict", "found": ...}``, or 422 with lattice's error envelope
for a refused write.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from lattice_remote.errors import Rejected
from lattice_remote.protocol.operations import canonical_json
from lattice_remote.server.worker.caller import Identity, unsupported
from lattice_remote.server.worker.calls import CallRequest, CallResponse, Operation, payload_of
from lattice_remote.server.worker.policy import shown
from lattice_remote.storage.events import Conflict, Merged, Written, plain
from lattice_remote.storage.local import LocalStorage

__all__ = ["load", "prepare"]

_Outcome = Written[Any] | Merged | Conflict


class _Arguments(msgspec.Struct, forbid_unknown_fields=True):
    base: str | None


class _Events(_Arguments):
    events: list[dict[str, Any]]


class _OfTask(_Events):
    task: str


class _OfResource(_Events):
    resource: str


class _Text(_Arguments):
    task: str
    text: str


def load() -> None: ...


def prepare(request: CallRequest) -> Operation:
    """Check the actor and the form of a write; its content is checked when it is written, against the current state."""
    takes = _WRITES.get(request.name)
    if takes is None:
        raise unsupported(f"the server does not know a write {shown(request.name)} of programs")
    kind, write = takes
    given = payload_of(request, kind)
    storage = LocalStorage(request.lattice_dir.parent, may_act_as=partial(_require, request.identity))
    actor = request.identity.actor
    if isinstance(given, _Events):
        actor = _actor(storage, given.events, request.identity)
    return Operation(
        f"storage: {request.name}", actor, partial(_answer, storage, partial(write, given), request.lattice_dir)
    )


def _require(identity: Identity, actor: str, *, session: Mapping[str, Any] | None = None) -> None:
    identity.require(actor, ignore_case=session is not None)
    if session is not None:
        identity.require_session(session["name"], session["session"], to_end=False)


def _actor(storage: LocalStorage, events: list[dict[str, Any]], identity: Identity) -> str:
    actors = [storage.require_actor(event) for event in plain(events)]
    return actors[0] if actors else identity.actor


def _answer(storage: LocalStorage, write: Callable[[LocalStorage], _Outcome], lattice_dir: Path) -> CallResponse:
    try:
        outcome = write(storage)
    except Rejected as rejected:
        message = rejected.message.replace(str(lattice_dir), ".lattice")
        return CallResponse(422, canonical_json({"ok": False, "error": {"code": rejected.code, "message": message}}))
    if isinstance(outcome, Conflict):
        return CallResponse(409, json.dumps({"outcome": "conflict", "found": outcome.found}).encode())
    word = "merged" if isinstance(outcome, Merged) else "written"
    return CallResponse(200, json.dumps({"outcome": word, "content": outcome.content}).encode())


def _write_task(given: _OfTask, storage: LocalStorage) -> _Outcome:
    return storage.write_task(given.task, given.events, given.base)


def _write_resource(given: _OfResource, storage: LocalStorage) -> _Outcome:
    return storage.write_resource(given.resource, given.events, given.base)


def _write_plan(given: _Text, storage: LocalStorage) -> _Outcome:
    return storage.write_plan(given.task, given.text, given.base)


def _write_notes(given: _Text, storage: LocalStorage) -> _Outcome:
    return storage.write_notes(given.task, given.text, given.base)


_WRITES: Mapping[str, tuple[type[Any], Callable[[Any, LocalStorage], _Outcome]]] = {
    "write-task": (_OfTask, _write_task),
    "write-resource": (_OfResource, _write_resource),
    "write-plan": (_Text, _write_plan),
    "write-notes": (_Text, _write_notes),
}
"""With the type of their arguments."""
