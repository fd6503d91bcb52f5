"""What a server has said it does not take is refused here: sent, it would end the connection, or be refused there."""

from lattice_remote.errors import one_line
from lattice_remote.protocol.codec import MAX_FRAME_BYTES, encode
from lattice_remote.protocol.messages import CAPABILITY_OF, Put, Refused, Request, Run, Welcome

__all__ = ["refusal_of"]

_CAN_NOT = {
    "put-text": "takes no edited plans and notes",
    "log": "can't tell who changed what",
    "uploads": "takes no large files",
}


def refusal_of(frame: Request, welcome: Welcome) -> Refused | None:
    """Return the refusal of a request that this server can't answer, None when it can (SPEC V3 and 2.4)."""
    return _not_offered(frame, welcome) or _too_large(frame, welcome)


def _not_offered(frame: Request, welcome: Welcome) -> Refused | None:
    needed = CAPABILITY_OF.get(type(frame))
    if needed is None or needed in welcome.capabilities:
        return None
    server = one_line(f"the server (lattice-remote {welcome.server_version})")
    return Refused(frame.id, "REMOTE_VERSION", f"{server} {_CAN_NOT[needed]}: upgrade the server")


def _too_large(frame: Request, welcome: Welcome) -> Refused | None:
    limits = welcome.limits
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
        case Run():
            return max((len(file.data or b"") for file in frame.files), default=0)
        case Put():
            return len(frame.text)
        case _:
            return 0
