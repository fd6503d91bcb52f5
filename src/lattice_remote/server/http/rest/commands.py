"""Lattice's commands as requests: what a command prints with ``--json`` is what is answered."""

import json
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.responses import Response

from lattice_remote.errors import Rejected, StorageError
from lattice_remote.protocol.effects import Position
from lattice_remote.protocol.messages import Returned
from lattice_remote.server.http.rest.endpoint import EndpointRequest, Json
from lattice_remote.server.http.writes import call, run
from lattice_remote.server.ipc import ReadCommand, ReadResult

__all__ = ["Provenance", "answer", "as_one", "at_change", "found", "options", "read", "shown", "write"]

_STATUSES = {
    "NOT_FOUND": HTTPStatus.NOT_FOUND,
    "CONFLICT": HTTPStatus.CONFLICT,
    "ALREADY_CLAIMED": HTTPStatus.CONFLICT,
    "RESOURCE_HELD": HTTPStatus.CONFLICT,
    "NOT_HELD": HTTPStatus.CONFLICT,
    "EXPIRED": HTTPStatus.CONFLICT,
    "TIMEOUT": HTTPStatus.CONFLICT,
    "REMOTE_FAILED": HTTPStatus.INTERNAL_SERVER_ERROR,
}
"""As which status each of lattice's error codes is answered; 422 for any other: lattice refuses it."""
_MESSAGE_CHARS = 2000


class Provenance(Json, frozen=True, kw_only=True):
    """Who writes, and why: the options that lattice's commands have in common.

    ``actor`` is the token's unless it is given; the token must be one that may act as it. ``name`` is that of a session
    of this token, as ``Argus-3``, which stands for an actor.
    """

    actor: str | None = None
    name: str | None = None
    reason: str | None = None
    on_behalf_of: str | None = None
    triggered_by: str | None = None
    model: str | None = None
    session: str | None = None


class _Error(msgspec.Struct, frozen=True):
    code: str = ""


class _Envelope(msgspec.Struct, frozen=True):
    ok: bool = False
    data: msgspec.Raw = msgspec.Raw(b"null")
    error: _Error = _Error()


def options(body: Provenance, asked: EndpointRequest[Any, Any], **others: object) -> list[str]:
    """Return what a body says as options of a command, each in one argument so that no value can be taken for another.

    None and False stand for an option that is not given, True for a flag.
    """
    given: dict[str, object] = {
        "name": body.name,
        "actor": body.actor,
        "reason": body.reason,
        "on-behalf-of": body.on_behalf_of,
    }
    given |= {"triggered-by": body.triggered_by, "model": body.model, "session": body.session}
    if body.actor is None and body.name is None:
        given["actor"] = asked.guest.login.token.actor
    given |= {name.replace("_", "-"): value for name, value in others.items()}
    return [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in given.items()
        if value is not None and value is not False
    ]


async def read(asked: EndpointRequest[Any, Any], path: str, *arguments: str) -> Response:
    """Answer with what a command prints that only reads; ``path`` are its words, as ``resource list``."""
    return shown(await found(asked, path, *arguments))


def shown(printed: ReadResult) -> Response:
    """Answer with what was found; what may be very long is passed on as it is."""
    return answer(printed.body) if printed.status else _in_json(printed.body, HTTPStatus.OK)


async def found(
    asked: EndpointRequest[Any, Any], path: str, *arguments: str, list_at: tuple[str, ...] = ()
) -> ReadResult:
    """Return what a command prints that only reads: an envelope, or that of its error.

    With ``list_at``, the list that is there instead, as in ``ReadCommand``.

    Raises:
        StorageError: it broke down.
    """
    asking = ReadCommand(path, (*path.split(), "--json", *arguments), list_at)
    printed = await asked.guest.project.reader.read(asking, asked.guest.share)
    if not printed.body:
        raise StorageError(f"'lattice {path}' can't be read on the server: {_said(printed.message)}")
    return printed


async def write(
    asked: EndpointRequest[Any, Any], path: str, *arguments: str, success: HTTPStatus = HTTPStatus.OK
) -> Response:
    """Run a command in the guest's name, and answer with what it prints."""
    done = await run(asked.guest, [*path.split(), "--json", *arguments], once=asked.once)
    if not done.stdout:
        raise Rejected(_said(done.stderr.decode(errors="replace")), code="REMOTE_INVALID")
    return await at_change(asked, done.seq, answer(done.stdout, success))


async def as_one(asked: EndpointRequest[Any, Any], name: str, payload: dict[str, object]) -> tuple[Returned, Response]:
    """Carry out an operation of the surface ``commands``: several commands of which all take effect, or none."""
    done = await call(asked.guest, "commands", name, json.dumps(payload).encode(), once=asked.once)
    return done, await at_change(asked, done.seq, answer(done.payload))


async def at_change(asked: EndpointRequest[Any, Any], seq: int, response: Response) -> Response:
    """Add the position up to which an answer is true, in the form in which streams of events give it."""
    history = asked.guest.project.history
    epoch, mark = history.epoch, (await history.mark_at(seq) if seq <= history.head else None)
    response.headers["Lattice-Change"] = str(Position(epoch, seq, mark or b""))
    return response


def answer(printed: bytes, success: HTTPStatus = HTTPStatus.OK) -> Response:
    """Answer with an envelope of lattice's, as it is, and the status that fits what it says."""
    try:
        envelope = msgspec.json.decode(printed, type=_Envelope)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StorageError("what lattice printed is no JSON: it may be longer than can be sent") from error
    status = success if envelope.ok else _STATUSES.get(envelope.error.code, HTTPStatus.UNPROCESSABLE_ENTITY)
    return _in_json(printed.rstrip() + b"\n", status)


def _in_json(content: bytes, status: HTTPStatus) -> Response:
    return Response(content, status, media_type="application/json")


def _said(message: str) -> str:
    """Return what a command that prints no JSON has said: Click's own words on how it is used, say."""
    lines = [line for line in message.splitlines() if line.strip()]
    return (lines[-1].removeprefix("Error: ") if lines else "the command printed nothing")[:_MESSAGE_CHARS]
