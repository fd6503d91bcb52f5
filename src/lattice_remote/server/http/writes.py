"""A write over HTTP: asked of the project's worker like a command of a client, numbered and journalled like it."""

import asyncio
import hashlib
import secrets
from collections.abc import Hashable
from dataclasses import dataclass

import msgspec
from starlette.requests import Request

from lattice_remote.errors import Rejected
from lattice_remote.protocol.codec import decode_server_frame
from lattice_remote.protocol.messages import Attachment, Bye, Refused, Reply, Returned, ServerFrame, Stored
from lattice_remote.server.http.auth import RequestContext
from lattice_remote.server.ipc import Edit, RunCall, RunCommand
from lattice_remote.server.project.project import stopping

__all__ = ["KEY_HEADER", "MAX_KEY_CHARS", "IdempotencyKey", "call", "edit", "once_of", "once_only", "run"]

_UNKNOWN = "whether the request took effect is not known: look before you repeat it, or repeat it with its own key"


@dataclass(frozen=True)
class IdempotencyKey:
    """Under which id a request runs, at most once (I6), and which request that is.

    ``id`` is 32 hexadecimal digits. The same id with another ``fingerprint`` is refused.
    """

    id: str
    fingerprint: bytes = b""


def once_only() -> IdempotencyKey:
    """Return an id that nobody else has: for a request that can't be asked again."""
    return IdempotencyKey(secrets.token_hex(16))


class _Asker:
    """Waits for one answer: a follower for whom no change is news."""

    def __init__(self, guest: RequestContext, request_id: str) -> None:
        self._project, self._request_id = guest.project, request_id
        self._lane = ("http", guest.login.token.id)
        self.answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    @property
    def fairness_key(self) -> Hashable:
        """That of all requests over HTTP with this token: many connections are not to be many turns."""
        return self._lane

    def change_committed(self, seq: int, frame: bytes) -> None:
        """It is not told of changes."""

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
    guest: RequestContext, argv: list[str], *, once: IdempotencyKey | None = None, files: list[Attachment] | None = None
) -> Reply:
    """Run a command line in the guest's name, once for its id; return what it printed, and its exit code.

    Whoever gives up waiting (is cancelled) takes nothing back, except that no resource is waited for any more.

    Raises:
        ApiError: the token has ended since it was shown.
        RemoteError: it was refused, or whether it was carried out is not known.
    """
    token, once = guest.login.token, once or once_only()
    message = RunCommand(once.id, argv, files or [], token.id, token.actor, token.act_as, fingerprint=once.fingerprint)
    reply = await _ask(guest, message)
    assert isinstance(reply, Reply), "so is a command answered"
    return reply


async def call(
    guest: RequestContext, surface: str, name: str, payload: bytes, *, once: IdempotencyKey | None = None
) -> Returned:
    """Carry out an operation of a surface in the guest's name; otherwise as ``run``."""
    token, once = guest.login.token, once or once_only()
    message = RunCall(
        *(once.id, surface, name, payload, [], token.id, token.actor, token.act_as), fingerprint=once.fingerprint
    )
    reply = await _ask(guest, message)
    assert isinstance(reply, Returned), "so is a call answered"
    return reply


async def edit(
    guest: RequestContext,
    path: str,
    text: bytes,
    *,
    base: bytes | None = None,
    base_digest: bytes = b"",
    once: IdempotencyKey | None = None,
) -> Stored:
    """Store a plan or notes that was made from ``base``, or from the server's text of this digest; as ``run``."""
    token, once = guest.login.token, once or once_only()
    message = Edit(
        *(once.id, path, base, text, token.id, token.actor), base_digest=base_digest, fingerprint=once.fingerprint
    )
    reply = await _ask(guest, message)
    assert isinstance(reply, Stored), "so is an edit answered"
    return reply


async def _ask(guest: RequestContext, message: RunCommand | RunCall | Edit) -> ServerFrame:
    project, asker = guest.project, _Asker(guest, message.id)
    if project.failure is not None:
        raise project.failure
    if project.stopping:
        raise stopping()
    if (refusal := guest.hub.ended(guest.login)) is not None:  # its body may have taken its time
        raise refusal
    project.history.join(asker)
    try:
        with guest.hub.staying(guest.login, asker.end):
            project.submit(message, asker, guest.told)
            frame = decode_server_frame(await asker.answered)
    finally:
        project.history.leave(asker)
        project.forget(asker, {message.id})
    if isinstance(frame, Refused):
        raise Rejected(frame.message, code=frame.code)
    return frame


KEY_HEADER = "Idempotency-Key"
MAX_KEY_CHARS = 255
_CONDITIONS = ("If-Match", "If-None-Match")


def once_of(request: Request, visitor: RequestContext, content: bytes) -> IdempotencyKey:
    """Return under which id a request with this body runs: that of its key, which is its token's own, or a new one.

    Raises:
        Rejected: its key is none.
    """
    keys = request.headers.getlist(KEY_HEADER)
    if not keys:
        return once_only()
    key = keys[0]
    if len(keys) > 1 or not 0 < len(key) <= MAX_KEY_CHARS or not key.isascii() or not key.isprintable():
        raise Rejected(
            f"{KEY_HEADER} must be one, of 1 to {MAX_KEY_CHARS} printable characters", code="REMOTE_PROTOCOL"
        )
    return IdempotencyKey(
        _digest("key", visitor.login.token.id, key).hex(),
        _digest(
            *(request.method, request.url.path, request.url.query, hashlib.sha256(content).hexdigest()),
            *(", ".join(request.headers.getlist(name)).strip() for name in _CONDITIONS),
        ),
    )


def _digest(*parts: str) -> bytes:
    """Return 16 bytes that no other parts have."""
    return hashlib.sha256(msgspec.json.encode(parts)).digest()[:16]
