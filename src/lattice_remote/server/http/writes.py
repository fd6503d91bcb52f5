"""Writes over HTTP, run by the project's worker and journalled like a client's commands."""

import asyncio
import hashlib
import secrets
from collections.abc import Hashable
from dataclasses import dataclass

import msgspec
from starlette.requests import Request

from lattice_remote.errors import Rejected
from lattice_remote.protocol.messages import (
    Attachment,
    Bye,
    Refused,
    Reply,
    Returned,
    ServerFrame,
    Stored,
    decode_server_frame,
)
from lattice_remote.server.http.auth import RequestContext
from lattice_remote.server.ipc import Edit, RunCall, RunCommand
from lattice_remote.server.project.project import stopping
from lattice_remote.server.tokens import READ_ONLY

__all__ = [
    "KEY_HEADER",
    "MAX_KEY_CHARS",
    "IdempotencyKey",
    "call",
    "edit",
    "header_of",
    "idempotency_key",
    "run",
    "unique_key",
]

_DROPPED = (
    "the request was carried out, and its reply dropped, because responses to this token are unread: read them, then "
    "check, or repeat the request with the same key"
)
_UNKNOWN = "it is unknown whether the request took effect: check before you repeat it, or repeat it with the same key"


@dataclass(frozen=True)
class IdempotencyKey:
    """The id, 32 hexadecimal digits, under which a request of one ``fingerprint`` runs at most once (I6)."""

    id: str
    fingerprint: bytes = b""


def unique_key() -> IdempotencyKey:
    return IdempotencyKey(secrets.token_hex(16))


class _Requester:
    def __init__(self, context: RequestContext, request_id: str) -> None:
        self._project, self._request_id = context.project, request_id
        self._fairness_key = ("http", context.login.token.id)
        self.answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    @property
    def fairness_key(self) -> Hashable:
        return self._fairness_key

    def answer(self, request_id: str, reply: bytes) -> None:  # noqa: ARG002 - it has asked once
        if not self.answered.done():
            self.answered.set_result(reply)

    def end(self, bye: Bye) -> None:
        if self.answered.done():
            return
        ended = bye.code == "REMOTE_UNAUTHORIZED"
        if ended and self._project.withdraw(self, self._request_id, bye.code):
            error = Rejected(f"{bye.reason}; nothing was changed", code=bye.code)
        else:
            error = Rejected(f"{bye.reason}; {_UNKNOWN}", code=bye.code if ended else "REMOTE_UNKNOWN_OUTCOME")
        self.answered.set_exception(error)


async def run(
    context: RequestContext,
    argv: list[str],
    *,
    once: IdempotencyKey | None = None,
    files: list[Attachment] | None = None,
) -> Reply:
    """Run a command line once for its id; return its output and exit code. Cancelling only ends waiting for a resource.

    Raises ApiError: the token was revoked since it was checked; RemoteError: refused, or the outcome is unknown.
    """
    token, once = context.login.token, once or unique_key()
    message = RunCommand(once.id, argv, files or [], token.id, token.actor, token.act_as, fingerprint=once.fingerprint)
    return await _send(context, message, Reply)


async def call(
    context: RequestContext, surface: str, name: str, payload: bytes, *, once: IdempotencyKey | None = None
) -> Returned:
    token, once = context.login.token, once or unique_key()
    message = RunCall(
        *(once.id, surface, name, payload, [], token.id, token.actor, token.act_as), fingerprint=once.fingerprint
    )
    return await _send(context, message, Returned)


async def edit(
    context: RequestContext,
    path: str,
    text: bytes,
    *,
    base: bytes | None = None,
    base_digest: bytes = b"",
    once: IdempotencyKey | None = None,
) -> Stored:
    """Store a text edited from ``base``, or from the server's text of this digest, like ``run``."""
    token, once = context.login.token, once or unique_key()
    message = Edit(
        *(once.id, path, base, text, token.id, token.actor), base_digest=base_digest, fingerprint=once.fingerprint
    )
    return await _send(context, message, Stored)


async def _send[T: ServerFrame](context: RequestContext, message: RunCommand | RunCall | Edit, kind: type[T]) -> T:
    if context.login.token.read_only:
        raise Rejected(READ_ONLY, code="REMOTE_FORBIDDEN")
    project, requester = context.project, _Requester(context, message.id)
    if project.failure is not None:
        raise project.failure
    if project.stopping:
        raise stopping()
    if (refusal := context.registry.auth.ended(context.login)) is not None:  # the body may have arrived slowly
        raise refusal
    try:
        with context.registry.auth.staying(context.login, requester.end):
            project.submit(message, requester, context.on_result)
            reply = await requester.answered
    finally:
        project.forget(requester, {message.id})
    if not context.share.hold_if_room(reply):
        raise Rejected(_DROPPED, code="REMOTE_UNKNOWN_OUTCOME")
    frame = decode_server_frame(reply)
    if isinstance(frame, Refused):
        raise Rejected(frame.message, code=frame.code)
    assert isinstance(frame, kind), "each kind of request has one kind of reply"
    return frame


KEY_HEADER = "Idempotency-Key"
MAX_KEY_CHARS = 255
_CONDITIONS = ("If-Match", "If-None-Match")


def idempotency_key(request: Request, context: RequestContext, content: bytes) -> IdempotencyKey:
    """Return the id of the request's key, scoped to the token, or a new one. Raises Rejected."""
    keys = request.headers.getlist(KEY_HEADER)
    if not keys:
        return unique_key()
    key = keys[0]
    if len(keys) > 1 or not 0 < len(key) <= MAX_KEY_CHARS or not key.isascii() or not key.isprintable():
        raise Rejected(
            f"{KEY_HEADER} must occur once, with 1 to {MAX_KEY_CHARS} printable characters", code="REMOTE_PROTOCOL"
        )
    return IdempotencyKey(
        _digest("key", context.login.token.id, key).hex(),
        _digest(
            *(request.method, request.url.path, request.url.query, hashlib.sha256(content).hexdigest()),
            *(header_of(request, name) for name in _CONDITIONS),
        ),
    )


def header_of(request: Request, name: str) -> str:
    return ", ".join(request.headers.getlist(name)).strip()


def _digest(*parts: str) -> bytes:
    return hashlib.sha256(msgspec.json.encode(parts)).digest()[:16]
