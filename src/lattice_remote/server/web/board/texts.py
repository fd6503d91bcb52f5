"""Plans and notes, for the editor in the page: read with what is needed to edit them, and stored by a merge."""

from pathlib import Path

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from lattice_remote.errors import Rejected
from lattice_remote.protocol.paths import is_editable
from lattice_remote.server.project.text_versions import TextKind
from lattice_remote.server.project.texts import text_at_head
from lattice_remote.server.web.answers import ok
from lattice_remote.server.web.asking import edit
from lattice_remote.server.web.bodies import body_of
from lattice_remote.server.web.gate import Guest, guest
from lattice_remote.server.web.keys import once_of
from lattice_remote.server.web.versions import MAX_VERSIONS, list_versions, version_text

__all__ = ["read", "read_version", "versions", "write"]

_OTHER_BYTES = 64 * 1024
_KINDS: dict[str, TextKind] = {"plans": "plan", "notes": "notes"}


class _Text(msgspec.Struct, frozen=True):
    """A plan or notes as they are on the server.

    Attributes:
        text: None when there are none.
        editable: whether they can be edited: not in the archive, not where the file is no text in UTF-8.
        reason: why not.
    """

    text: str | None
    editable: bool = True
    reason: str = ""


class _Edit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``text``, made from ``base``, which is None where there was no file."""

    text: str
    base: str | None


class _Saved(msgspec.Struct, frozen=True):
    """What came of an edit, as ``textmerge`` has it, and the text that is on the server now."""

    outcome: str
    now: _Text


async def read(request: Request) -> Response:
    """Answer with the text as it is."""
    visitor = await guest(request)
    return ok(await _text(visitor, _path(request)))


async def write(request: Request) -> Response:
    """Merge an edit into the text; a conflict changes nothing, and is answered with what is there."""
    visitor, path = await guest(request), _path(request)
    most = visitor.hub.config.limits.text_bytes
    body = await body_of(request, 4 * most + _OTHER_BYTES)  # every byte of both may come with a backslash
    try:
        asked = msgspec.json.decode(body, type=_Edit)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Rejected(f"the request's body: {error}", code="REMOTE_PROTOCOL") from error
    text, base = asked.text.encode(), None if asked.base is None else asked.base.encode()
    if max(len(text), len(base or b"")) > most:
        raise Rejected(f"{path} is longer than {most} bytes", code="REMOTE_TOO_LARGE")
    stored = await edit(visitor, path, text, base=base, once=once_of(request, visitor, body))
    return ok(_Saved(stored.outcome, await _text(visitor, path)))


async def versions(request: Request) -> Response:
    """Answer with the newest changes of the text."""
    visitor, kind = await guest(request), _KINDS[_path(request).partition("/")[0]]
    found, _ = await list_versions(visitor.project, request.path_params["task_id"], kind, limit=MAX_VERSIONS)
    return ok(found)


async def read_version(request: Request) -> Response:
    """Answer with the text as of a change."""
    visitor, kind = await guest(request), _KINDS[_path(request).partition("/")[0]]
    async with visitor.share.making():
        found = await version_text(visitor.project, request.path_params["task_id"], kind, request.path_params["change"])
        visitor.share.hold(found.data)
    try:
        return ok(_Text(found.data.decode()))
    except UnicodeDecodeError:
        return ok(_Text(found.data.decode(errors="replace"), editable=False, reason="it is no text in UTF-8"))


def _path(request: Request) -> str:
    path = f"{request.path_params['kind']}/{request.path_params['task_id']}.md"
    if not is_editable(path):
        raise Rejected(f"{path!r} is not a plan or notes of a task", code="REMOTE_NOT_FOUND")
    return path


async def _text(visitor: Guest, path: str) -> _Text:
    """Return what the file holds, from the archive if the task is there.

    Raises:
        Rejected: there is no such task.
    """
    files = visitor.project.history.files
    task = f"tasks/{Path(path).stem}.json"
    if task not in files and f"archive/{task}" not in files:
        raise Rejected(f"there is no task {Path(path).stem}", code="REMOTE_NOT_FOUND")
    archived = task not in files
    data = await text_at_head(visitor.project, f"archive/{path}" if archived else path, visitor.share)
    try:
        text = None if data is None else data.decode()
    except UnicodeDecodeError:
        return _Text(data.decode(errors="replace") if data else "", editable=False, reason="it is no text in UTF-8")
    return _Text(text, not archived, "the task is in the archive" if archived else "")
