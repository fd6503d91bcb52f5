"""The frames that a command's requests become (``Run``, ``Call``); their files come later, see ``sending.py``."""

from typing import Any

from lattice_remote.errors import Misuse
from lattice_remote.protocol.messages import MAX_ARGV, MAX_PAYLOAD_BYTES, Call, Run

__all__ = ["call_frame", "run_frame"]

_MAX_NAME_CHARS = 256


def run_frame(request: dict[str, Any]) -> Run:
    """Return the frame for a ``run``.

    Raises:
        Misuse: the command line can't travel.
    """
    argv = request["argv"]
    if not 0 < len(argv) <= MAX_ARGV:
        raise Misuse(f"too many arguments: at most {MAX_ARGV}")
    try:
        "\0".join(argv).encode()
    except UnicodeEncodeError:
        raise Misuse("an argument is not valid UTF-8") from None
    return Run(id=request["id"], argv=argv)


def call_frame(request: dict[str, Any]) -> Call:
    """Return the frame for a ``call``.

    Raises:
        Misuse: what it is given can't travel.
    """
    try:
        request["name"].encode()
        payload = request["payload"].encode()
    except UnicodeEncodeError:
        raise Misuse("the request is not valid UTF-8") from None
    if len(payload) > MAX_PAYLOAD_BYTES or len(request["name"]) > _MAX_NAME_CHARS:
        raise Misuse(f"the request is over {MAX_PAYLOAD_BYTES >> 20} MiB", code="REMOTE_TOO_LARGE")
    surface, name = request["surface"], request["name"]
    return Call(id=request["id"], surface=surface, name=name, payload=payload)
