"""A write over HTTP: asked of the project's worker like a command of a client, numbered and journalled like it."""

import asyncio
import secrets
from collections.abc import Hashable
from dataclasses import dataclass

from lattice_remote.errors import Rejected
from lattice_remote.protocol.codec import decode_server_frame
from lattice_remote.protocol.messages import Attachment, Bye, Refused, Reply, Returned, ServerFrame, Stored
from lattice_remote.server.data.ipc import Edit, Execute, Invoke
from lattice_remote.server.project.project import stopping
from lattice_remote.server.web.answers import TurnedAway
from lattice_remote.server.web.gate import Guest

__all__ = ["Once", "call", "edit", "once_only", "run"]

_UNKNOWN = "whether the request took effect is not known: look before you repeat it, or repeat it with its own key"


@dataclass(frozen=True)
class Once:
    """Under which id a request runs, at most once (I6), and which request that is.

    ``id`` is 32 hexadecimal digits. The same id with another ``fingerprint`` is refused.
    """

    id: str
    fingerprint: bytes = b""


def once_only() -> Once:
    """Return an id that nobody else has: for a request that can't be asked again."""
    return Once(secrets.token_hex(16))


class _Asker:
    """Waits for one answer: a follower for whom no change is news."""

    def __init__(self, guest: Guest, request_id: str) -> None:
        self._project, self._request_id = guest.project, request_id
        self._lane = ("http", guest.login.token.id)
        self.answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    @property
    def lane(self) -> Hashable:
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
    guest: Guest, argv: list[str], *, once: Once | None = None, files: list[Attachment] | None = None
) -> Reply:
    """Run a command line in the guest's name, once for its id; return what it printed, and its exit code.

    Whoever gives up waiting (is cancelled) takes nothing back, except that no resource is waited for any more.

    Raises:
        TurnedAway: the token has ended since it was shown.
        RemoteError: it was refused, or whether it was carried out is not known.
    """
    token, once = guest.login.token, once or once_only()
    message = Execute(once.id, argv, files or [], token.id, token.actor, token.act_as, fingerprint=once.fingerprint)
    reply = await _ask(guest, message)
    assert isinstance(reply, Reply), "so is a command answered"
    return reply


async def call(guest: Guest, surface: str, name: str, payload: bytes, *, once: Once | None = None) -> Returned:
    """Carry out an operation of a surface in the guest's name; otherwise as ``run``."""
    token, once = guest.login.token, once or once_only()
    message = Invoke(
        *(once.id, surface, name, payload, [], token.id, token.actor, token.act_as), fingerprint=once.fingerprint
    )
    reply = await _ask(guest, message)
    assert isinstance(reply, Returned), "so is a call answered"
    return reply


async def edit(
    guest: Guest,
    path: str,
    text: bytes,
    *,
    base: bytes | None = None,
    base_digest: bytes = b"",
    once: Once | None = None,
) -> Stored:
    """Store a plan or notes that was made from ``base``, or from the server's text of this digest; as ``run``."""
    token, once = guest.login.token, once or once_only()
    message = Edit(
        *(once.id, path, base, text, token.id, token.actor), base_digest=base_digest, fingerprint=once.fingerprint
    )
    reply = await _ask(guest, message)
    assert isinstance(reply, Stored), "so is an edit answered"
    return reply


async def _ask(guest: Guest, message: Execute | Invoke | Edit) -> ServerFrame:
    project, asker = guest.project, _Asker(guest, message.id)
    if project.failure is not None:
        raise project.failure
    if project.stopping:
        raise stopping()
    if (refusal := guest.hub.ended(guest.login)) is not None:  # its body may have taken its time
        raise TurnedAway(refusal)
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
