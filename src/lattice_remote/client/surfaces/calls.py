"""One operation of a surface, sent to the server through the agent (``Call``)."""

import os
import sys
from dataclasses import dataclass
from typing import Any

from lattice_remote.client.agent_client import ask, ask_here, request
from lattice_remote.errors import one_line

__all__ = ["SurfaceResponse", "call"]


@dataclass(frozen=True)
class SurfaceResponse:
    """Result of an operation: ``status`` as in HTTP, ``payload`` a JSON text."""

    status: int
    payload: str


def call(
    directory: str, surface: str, name: str, payload: str, files: list[dict[str, Any]] | None = None
) -> SurfaceResponse:
    """Run an operation on the server; return once its change is in the files of ``directory``.

    ``files`` are as in ``CallersFiles``. Notices for the user are written to stderr. Thread-safe.

    Raises:
        RemoteError: it was refused, or the server is unreachable; the message says whether it may have taken effect.
    """
    # The id is created here, so that it runs once even if the agent is killed and asked again (I6).
    asked = request("call", directory, id=os.urandom(16).hex(), surface=surface, name=name, payload=payload)
    asked["files"] = files or []
    answer = ask(asked)
    if answer.get("unreadable"):  # the agent has other rights, or sees other directories
        answer = ask_here(asked)
    for notice in answer["notices"]:
        sys.stderr.write(f"lattice-remote: {one_line(notice)}\n")
    return SurfaceResponse(answer["status"], answer["payload"])
