"""Requests without an answer yet, checks of answers, and refusals that need no server."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from lattice_remote.client.agent_runtime import boot_time
from lattice_remote.errors import ConnectionFailed, Rejected, one_line
from lattice_remote.protocol.messages import (
    MAX_FRAME_BYTES,
    Call,
    Log,
    Put,
    Refused,
    Request,
    Response,
    Run,
    Welcome,
    Write,
    encode,
    needed_capability,
)

__all__ = ["MAX_SENDS", "UNSENT_PATIENCE_S", "PendingRequest", "RequestSender", "expect", "refusal_of"]

UNSENT_PATIENCE_S = 3.0
SENT_PATIENCE_S = 10.0
"""Longest wait of a request for a lost connection: before it was sent, and after."""
MAX_SENDS = 8
"""Most sends of a request over connections that do not last."""


class RequestSender(Protocol):
    """A connection that carries requests."""

    async def send_request(self, frame: Request) -> Response: ...


def expect[T: Response](answer: Response, kind: type[T], *, sent: bool = False) -> T:
    """Return an answer of the expected kind.

    Raises:
        Rejected: the server refused the request.
        ConnectionFailed: another kind; ``sent``: the request may have taken effect.
    """
    if isinstance(answer, Refused):
        raise Rejected(answer.message, code=answer.code)
    if not isinstance(answer, kind):
        raise ConnectionFailed("unexpected response from the server", sent=sent)
    return answer


@dataclass(slots=True, eq=False)
class PendingRequest:
    frame: Request
    answer: "asyncio.Future[Response]"
    asked_at: float = field(default_factory=time.monotonic)
    sends: int = 0
    """Sends since a connection last lasted."""
    first_sent_at: float | None = None
    """Time of the first send (``boot_time()``), perhaps by an earlier agent."""

    @property
    def is_write(self) -> bool:
        return isinstance(self.frame, Write)

    @property
    def patience_s(self) -> float:
        is_under_way = self.first_sent_at is not None and not isinstance(self.frame, Log)
        return SENT_PATIENCE_S if is_under_way else UNSENT_PATIENCE_S

    @property
    def sent(self) -> bool:
        """Return whether it may have taken effect."""
        return self.is_write and self.first_sent_at is not None

    def to_send(self) -> Request:
        """Return the frame to send now; a resent one carries its age (SPEC section 3.4)."""
        self.sends += 1
        if self.first_sent_at is None:
            self.first_sent_at = boot_time()
        elif isinstance(self.frame, Write):
            return msgspec.structs.replace(self.frame, age_s=max(0.0, boot_time() - self.first_sent_at))
        return self.frame


def refusal_of(frame: Request, welcome: Welcome) -> Refused | None:
    """Return the refusal of a request that this server does not support (SPEC V3 and 2.4)."""
    return _not_offered(frame, welcome) or _too_large(frame, welcome)


def _not_offered(frame: Request, welcome: Welcome) -> Refused | None:
    needed = needed_capability(frame)
    if needed is None or needed in welcome.capabilities:
        return None
    server = one_line(f"the server (lattice-remote {welcome.server_version})")
    surface = needed.removeprefix("call:")
    why = f"{server} does not offer {surface}: install lattice-remote[{surface}] on the server"
    return Refused(frame.id, "REMOTE_VERSION", why)


def _too_large(frame: Request, welcome: Welcome) -> Refused | None:
    limits = welcome.limits
    if isinstance(frame, Put) and len(frame.text) > limits.max_text_bytes:
        takes = f"it has {len(frame.text)} bytes, the server takes at most {limits.max_text_bytes}"
        return Refused(frame.id, "REMOTE_TOO_LARGE", takes)
    size, limit = len(encode(frame)), min(limits.max_frame_bytes, MAX_FRAME_BYTES)
    largest = _largest_file(frame)
    if largest <= limits.max_file_bytes and size <= limit:
        return None
    return Refused(
        frame.id,
        "REMOTE_TOO_LARGE",
        f"this takes {size} bytes, {largest} of them one file; the server takes at most {limit}, and "
        f"{limits.max_file_bytes} of a file",
    )


def _largest_file(frame: Request) -> int:
    match frame:
        case Run() | Call():
            return max((len(file.data or b"") for file in frame.files), default=0)
        case Put():
            return len(frame.text)
        case _:
            return 0
