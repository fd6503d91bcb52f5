"""One operation of a surface, asked of the server through the agent (``Call``)."""

import os
import sys
from dataclasses import dataclass
from typing import Any

from lattice_remote.client.agent_client import ask, ask_here, request
from lattice_remote.errors import one_line

__all__ = ["SurfaceResponse", "call"]


@dataclass(frozen=True)
class SurfaceResponse:
    """What an operation returned: ``status`` as in HTTP, ``payload`` a JSON text."""

    status: int
    payload: str


def call(
    directory: str, surface: str, name: str, payload: str, files: list[dict[str, Any]] | None = None
) -> SurfaceResponse:
    """Have an operation carried out on the server; return once what it changed is in the files of ``directory``.

    ``files`` are as ``CallersFiles`` describes them. What the user should know besides is written to stderr. Safe to
    be called from several threads.

    Raises:
        RemoteError: it was refused, or the server is out of reach; the message says whether it may have taken effect.
    """
    # The id is made here, so that it is carried out once even if the agent is killed and asked again (I6).
    asked = request("call", directory, id=os.urandom(16).hex(), surface=surface, name=name, payload=payload)
    asked["files"] = files or []
    answer = ask(asked)
    if answer.get("unreadable"):  # the agent has other rights, or sees other directories
        answer = ask_here(asked)
    for notice in answer["notices"]:
        sys.stderr.write(f"lattice-remote: {one_line(notice)}\n")
    return SurfaceResponse(answer["status"], answer["payload"])
