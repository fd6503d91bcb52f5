"""Earlier versions of a plan or notes over HTTP, for programs and the page's editor."""

import os
import re
from typing import Annotated

import msgspec
from msgspec import Meta

from lattice_remote.errors import Rejected
from lattice_remote.protocol.messages import MAX_LOG_ENTRIES, Log, LogPage, ReadVersion, Refused, Version
from lattice_remote.server.project.audit_log import TextKind
from lattice_remote.server.project.project import Project

__all__ = ["MAX_VERSIONS", "TextChange", "list_versions", "version_text"]

MAX_VERSIONS = MAX_LOG_ENTRIES
_CHANGE = re.compile(r"(?:([A-Za-z0-9_.~-]{1,64})-)?([0-9]{1,18})")


class TextChange(msgspec.Struct, frozen=True):
    """A change that wrote a plan or notes.

    Attributes:
        change: ``EPOCH-NUMBER``, the form of ``Lattice-Change`` and of event ids.
        time: UTC, RFC 3339.
        actor: the author.
        token_actor: the token's actor.
        command: the command line, or the edit.
        bytes: the length of the text after it; null: it was removed.
    """

    change: str
    time: str
    actor: str
    token_actor: str
    command: str
    bytes: Annotated[int, Meta(ge=0)] | None


async def list_versions(
    project: Project, task: str, kind: TextKind, *, limit: int = MAX_VERSIONS, before: int | None = None
) -> tuple[list[TextChange], int | None]:
    """Return the newest changes of a text, and ``before`` for the next page (None: the last page).

    Raises:
        Rejected: there is no such task, or the journal cannot be read.
    """
    found: list[TextChange] = []
    while len(found) < limit:
        entries, before = await _page(project, task, kind, limit - len(found), before)
        found += entries
        if before is None:
            return found, None
    following = before
    while following is not None:  # a next page may turn out to be empty
        entries, following = await _page(project, task, kind, 1, following)
        if entries:
            return found, before
    return found, None


async def _page(
    project: Project, task: str, kind: TextKind, limit: int, before: int | None
) -> tuple[list[TextChange], int | None]:
    page = await _send(project, Log(_new_id(), task, min(limit, MAX_LOG_ENTRIES), before, kind))
    assert isinstance(page, LogPage), "the answer to Log"
    return [
        TextChange(
            f"{entry.epoch}-{entry.seq}",
            *(entry.time, entry.actor, entry.token_actor or entry.actor, entry.command, entry.text_bytes),
        )
        for entry in page.entries
    ], page.before


async def version_text(project: Project, task: str, kind: TextKind, change: str) -> Version:
    """Return a text after a change: ``EPOCH-NUMBER``, or a number, meaning the newest change with it.

    Raises:
        Rejected: the version is not kept, or too large.
    """
    named = _CHANGE.fullmatch(change)
    if named is None:
        raise Rejected(f"{change[:80]!r} is not a change", code="REMOTE_NOT_FOUND")
    found = await _send(project, ReadVersion(_new_id(), task, kind, int(named[2]), named[1] or ""))
    assert isinstance(found, Version), "the answer to ReadVersion"
    return found


async def _send(project: Project, frame: Log | ReadVersion) -> LogPage | Version:
    history = project.history
    answer = await project.log.answer(frame, epoch=history.epoch, head=history.head)
    if isinstance(answer, Refused):
        raise Rejected(answer.message, code=answer.code)
    return answer


def _new_id() -> str:
    return os.urandom(16).hex()
