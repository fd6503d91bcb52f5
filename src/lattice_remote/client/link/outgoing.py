"""What a server has said it does not take is refused here: sent, it would end the connection, or be refused there."""

from lattice_remote.errors import one_line
from lattice_remote.protocol.codec import MAX_FRAME_BYTES, encode
from lattice_remote.protocol.messages import Call, Put, Refused, Request, Run, Welcome, needed_capability

__all__ = ["refusal_of"]

_CAN_NOT = {
    "downloads": "sends no parts of files: upgrade the server",
    "put-text": "takes no edited plans and notes: upgrade the server",
    "put-base": "takes no base by its digest: upgrade the server",
    "log": "can't tell who changed what: upgrade the server",
    "uploads": "takes no large files: upgrade the server",
    "push": "takes no whole projects: upgrade the server",
    "call:dashboard": "takes no requests of the dashboard: upgrade the server",
    "call:mcp": "can't run MCP tools: install lattice-remote[mcp] on the server",
}


def refusal_of(frame: Request, welcome: Welcome) -> Refused | None:
    """Return the refusal of a request that this server can't answer, None when it can (SPEC V3 and 2.4)."""
    return _not_offered(frame, welcome) or _too_large(frame, welcome)


def _not_offered(frame: Request, welcome: Welcome) -> Refused | None:
    needed = needed_capability(frame)
    if needed is None or needed in welcome.capabilities:
        return None
    server = one_line(f"the server (lattice-remote {welcome.server_version})")
    return Refused(frame.id, "REMOTE_VERSION", f"{server} {_CAN_NOT[needed]}")


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
