"""Lattice's commands as requests: what a command prints with ``--json`` is what is answered."""

import msgspec
from starlette.responses import Response

from lattice_remote.errors import Rejected
from lattice_remote.server.data.read_ipc import ReadCommand
from lattice_remote.server.web.asking import run
from lattice_remote.server.web.gate import Guest

__all__ = ["read", "write"]

_STATUSES = {"NOT_FOUND": 404, "CONFLICT": 409, "VALIDATION_ERROR": 422, "REMOTE_FAILED": 500}
"""As which HTTP status each of lattice's error codes is answered; 422 for any other."""


class _Error(msgspec.Struct, frozen=True):
    code: str = ""


class _Envelope(msgspec.Struct, frozen=True):
    ok: bool = False
    error: _Error = _Error()


async def read(guest: Guest, path: str, *options: str) -> Response:
    """Answer with what a command prints that only reads; ``path`` are its words, as ``resource list``."""
    argv = (*path.split(), "--json", *options)
    found = await guest.project.reader.read(ReadCommand(path, argv))
    return _answer(found.status, found.body, found.message)


async def write(guest: Guest, path: str, *options: str, success: int = 200) -> Response:
    """Run a command in the guest's name, and answer with what it prints."""
    done = await run(guest, [*path.split(), "--json", *options])
    return _answer(done.exit_code, done.stdout, done.stderr.decode(errors="replace"), success)


def _answer(exit_code: int, body: bytes, message: str, success: int = 200) -> Response:
    if exit_code == 0:
        return Response(body, success, media_type="application/json")
    try:
        envelope = msgspec.json.decode(body, type=_Envelope)
    except msgspec.DecodeError:
        raise Rejected(message.strip().removeprefix("Error: ") or "the command failed", code="REMOTE_INVALID") from None
    return Response(body, _STATUSES.get(envelope.error.code, 422), media_type="application/json")
