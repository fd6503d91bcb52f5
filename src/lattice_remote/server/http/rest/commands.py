"""Lattice's commands as requests; the response is the command's output with ``--json``."""

import json
from collections.abc import Collection
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

__all__ = [
    "Author",
    "Provenance",
    "envelope_response",
    "options",
    "output_response",
    "read",
    "read_output",
    "with_position",
    "write",
    "write_together",
]

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
"""422 for any other."""
_MESSAGE_CHARS = 2000


class Author(Json, frozen=True, kw_only=True):
    """The author: ``actor``, by default the token's, which must be allowed to act as it.

    ``name`` is a session of this token, for example ``Argus-3``, which stands for an actor.
    """

    actor: str | None = None
    name: str | None = None


class Provenance(Author, frozen=True, kw_only=True):
    """Author and reason: the options that lattice's commands share."""

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


def options(body: Author, asked: EndpointRequest[Any, Any], *, without: Collection[str] = ()) -> list[str]:
    """Return a body's fields as options of a command, one argument each, so that no value is taken for another.

    None and False omit the option, True makes a flag, and commas separate the items of a list.
    """
    given = {name: getattr(body, name) for name in body.__struct_fields__ if name not in without}
    if body.actor is None and body.name is None:
        given["actor"] = asked.context.login.token.actor
    return [option for name, value in given.items() for option in _option(name.replace("_", "-"), value)]


def _option(name: str, value: object) -> list[str]:
    match value:
        case None | False:
            return []
        case True:
            return [f"--{name}"]
        case list():
            return [f"--{name}={','.join(value)}"]
        case _:
            return [f"--{name}={value}"]


async def read(asked: EndpointRequest[Any, Any], path: str, *arguments: str) -> Response:
    """Return the output of a read-only command, for example ``resource list``."""
    return output_response(await read_output(asked, path, *arguments))


def output_response(printed: ReadResult) -> Response:
    """Return a response with ``printed``; a very long text is passed on unchanged."""
    return envelope_response(printed.body) if printed.status else _in_json(printed.body, HTTPStatus.OK)


async def read_output(
    asked: EndpointRequest[Any, Any], path: str, *arguments: str, list_at: tuple[str, ...] = ()
) -> ReadResult:
    """Return the output of a read-only command; ``list_at`` as in ``ReadCommand``. Raises StorageError: it crashed."""
    asking = ReadCommand(path, (*path.split(), "--json", *arguments), list_at)
    printed = await asked.context.project.reader.read(asking, asked.context.share)
    if not printed.body:
        raise StorageError(f"the server cannot run 'lattice {path}': {_error_message(printed.message)}")
    return printed


async def write(
    asked: EndpointRequest[Any, Any], path: str, *arguments: str, success: HTTPStatus = HTTPStatus.OK
) -> Response:
    """Run a command for the request's actor; return its output."""
    done = await run(asked.context, [*path.split(), "--json", *arguments], once=asked.once)
    if not done.stdout:
        raise Rejected(_error_message(done.stderr.decode(errors="replace")), code="REMOTE_INVALID")
    return await with_position(asked, done.seq, envelope_response(done.stdout, success))


async def write_together(
    asked: EndpointRequest[Any, Any], name: str, payload: dict[str, object]
) -> tuple[Returned, Response]:
    """Run commands that take effect together or not at all."""
    done = await call(asked.context, "commands", name, json.dumps(payload).encode(), once=asked.once)
    return done, await with_position(asked, done.seq, envelope_response(done.payload))


async def with_position(asked: EndpointRequest[Any, Any], seq: int, response: Response) -> Response:
    """Add the position up to which a response is true."""
    history = asked.context.project.history
    epoch, mark = history.epoch, (await history.mark_at(seq) if seq <= history.head else None)
    response.headers["Lattice-Change"] = str(Position(epoch, seq, mark or b""))
    return response


def envelope_response(printed: bytes, success: HTTPStatus = HTTPStatus.OK) -> Response:
    """Return an envelope of lattice's unchanged, with the matching status."""
    try:
        envelope = msgspec.json.decode(printed, type=_Envelope)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StorageError("the output of lattice is not JSON; it may exceed the limit") from error
    status = success if envelope.ok else _STATUSES.get(envelope.error.code, HTTPStatus.UNPROCESSABLE_ENTITY)
    return _in_json(printed.rstrip() + b"\n", status)


def _in_json(content: bytes, status: HTTPStatus) -> Response:
    return Response(content, status, media_type="application/json")


def _error_message(message: str) -> str:
    """Return the message of a command without JSON output."""
    lines = [line for line in message.splitlines() if line.strip()]
    return (lines[-1].removeprefix("Error: ") if lines else "the command printed nothing")[:_MESSAGE_CHARS]
