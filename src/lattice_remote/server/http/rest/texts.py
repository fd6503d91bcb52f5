"""``/projects/:slug/plans/:id`` and ``/projects/:slug/notes/:id``: a task's plan and notes, and their versions.

A write may name the text that it replaces by ETag; then it cannot overwrite a newer one unseen. Without a condition it
is a save: it replaces the text that was there when the request arrived, merged by line with later changes.
"""

import os
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from http import HTTPStatus
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta
from starlette.responses import Response

from lattice_remote.errors import Rejected
from lattice_remote.protocol.messages import MAX_LOG_ENTRIES, Log, LogPage, ReadVersion, Refused, Stored, Version
from lattice_remote.protocol.operations import digest_of
from lattice_remote.server.http.middleware import ok
from lattice_remote.server.http.rest import (
    Endpoint,
    EndpointRequest,
    Nothing,
    PageQuery,
    Query,
    envelope_response,
    read_output,
    with_position,
)
from lattice_remote.server.http.writes import edit, header_of
from lattice_remote.server.project.file_reader import text_at_head
from lattice_remote.server.project.journal_log import TextKind
from lattice_remote.server.project.project import Project
from lattice_remote.server.transport.api_error import ApiError

__all__ = ["MAX_VERSIONS", "TEXT_KINDS", "Text", "TextChange", "endpoints", "list_versions", "version_text"]


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
    """Return the newest changes of a text, and ``before`` for the next page. Raises Rejected."""
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
    """Return a text after a change: ``EPOCH-NUMBER``, or a number, the newest one with it. Raises Rejected."""
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


_ETAG = re.compile(r'(W/)?"([^"]*)"')
_UNSPECIFIC = ("application/octet-stream", "application/x-www-form-urlencoded")
"""Sent unasked by programs such as curl."""
_OF_NO_TEXT = bytes(32)
_TRIES = 5
TEXT_KINDS: dict[str, TextKind] = {"plans": "plan", "notes": "notes"}


class Text(msgspec.Struct):
    """Result of a write; ``etag`` is the text's new ETag."""

    task: str
    etag: str
    outcome: Literal["stored", "merged", "unchanged"]


@dataclass(frozen=True)
class _Place:
    task: str
    kind: str
    is_archived: bool

    @property
    def active(self) -> str:
        return f"{self.kind}/{self.task}.md"

    @property
    def path(self) -> str:
        return f"archive/{self.active}" if self.is_archived else self.active


async def read_plan(request: EndpointRequest[Nothing, Nothing]) -> Response:
    """Return a task's plan, archived or not; 304 if ``If-None-Match`` matches."""
    return await _with_place(request, "plans", _get)


async def read_notes(request: EndpointRequest[Nothing, Nothing]) -> Response:
    """Return a task's notes, archived or not; 304 if ``If-None-Match`` matches."""
    return await _with_place(request, "notes", _get)


async def write_plan(request: EndpointRequest[Nothing, bytes]) -> Response:
    """Replace a task's plan, or create it.

    With ``If-Match`` or ``If-None-Match: *`` the answer is 412 if that does not match.
    """
    return await _with_place(request, "plans", _put)


async def write_notes(request: EndpointRequest[Nothing, bytes]) -> Response:
    """Replace a task's notes, or create them.

    With ``If-Match`` or ``If-None-Match: *`` the answer is 412 if that does not match. A task has a plan
    from its creation; notes exist once they are written.
    """
    return await _with_place(request, "notes", _put)


async def list_plan_versions(request: EndpointRequest[PageQuery, Nothing]) -> Response:
    """List the changes of a task's plan, newest first, as far back as the journal reaches."""
    return await _with_place(request, "plans", _versions)


async def list_notes_versions(request: EndpointRequest[PageQuery, Nothing]) -> Response:
    """List the changes of a task's notes, newest first, as far back as the journal reaches."""
    return await _with_place(request, "notes", _versions)


async def read_plan_version(request: EndpointRequest[Nothing, Nothing]) -> Response:
    """Return a task's plan after a change: ``EPOCH-NUMBER``, or a number."""
    return await _with_place(request, "plans", _version)


async def read_notes_version(request: EndpointRequest[Nothing, Nothing]) -> Response:
    """Return a task's notes after a change: ``EPOCH-NUMBER``, or a number."""
    return await _with_place(request, "notes", _version)


async def _with_place[B: Nothing | bytes, Q: Query](
    request: EndpointRequest[Q, B], kind: str, work: Callable[[EndpointRequest[Q, B], _Place], Awaitable[Response]]
) -> Response:
    printed = await read_output(request, "show", "--compact", "--", request.path["id"])
    if printed.status:
        return envelope_response(printed.body)
    data = msgspec.json.decode(printed.body, type=dict[str, Any])["data"]
    return await work(request, _Place(data["id"], kind, bool(data.get("archived"))))


async def _versions(request: EndpointRequest[PageQuery, Nothing], place: _Place) -> Response:
    page = request.query
    limit = MAX_VERSIONS if page.limit is UNSET else page.limit
    if page.cursor is not UNSET and not re.fullmatch("[0-9]{1,18}", page.cursor):
        raise Rejected("the cursor belongs to another list; restart without it", code="REMOTE_INVALID")
    before = None if page.cursor is UNSET else int(page.cursor)
    found, following = await list_versions(
        request.context.project, place.task, TEXT_KINDS[place.kind], limit=limit, before=before
    )
    envelope = {"ok": True, "data": found} | ({} if following is None else {"next": str(following)})
    return Response(msgspec.json.encode(envelope), media_type="application/json")


async def _version(request: EndpointRequest[Nothing, Nothing], place: _Place) -> Response:
    async with request.context.share.making():
        found = await version_text(request.context.project, place.task, TEXT_KINDS[place.kind], request.path["change"])
        request.context.share.hold(found.data)
    headers = {"ETag": _etag(found.data), "Lattice-Change": f"{found.epoch}-{found.seq}"}
    return Response(found.data, headers=headers, media_type="text/markdown; charset=utf-8")


async def _get(request: EndpointRequest[Nothing, Nothing], place: _Place) -> Response:
    project = request.context.project
    text = await text_at_head(project, place.path, request.context.share)
    if text is None and await project.order.catch_up():
        text = await text_at_head(project, place.path, request.context.share)
    if text is None:
        raise Rejected(f"task {place.task} has no {TEXT_KINDS[place.kind]}", code="REMOTE_NOT_FOUND")
    etag = _etag(text)
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    named = header_of(request.http, "If-None-Match")
    if named == "*" or etag in {f'"{tag}"' for _, tag in _ETAG.findall(named)}:
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return Response(text, headers=headers, media_type="text/markdown; charset=utf-8")


async def _put(request: EndpointRequest[Nothing, bytes], place: _Place) -> Response:
    media_type = request.http.headers.get("Content-Type", "text/markdown").partition(";")[0].strip().lower()
    if not media_type.startswith("text/") and media_type not in _UNSPECIFIC:
        why = "send the text with Content-Type: text/markdown"
        raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "REMOTE_PROTOCOL", why)
    done, text = await _store(request, place)
    etag = _etag(text)
    assert done.outcome != "conflict", "a conflict was raised or tried again"
    response = ok(Text(place.task, etag, done.outcome))
    response.headers["ETag"] = etag
    return await with_position(request, done.seq, response)


async def _store(request: EndpointRequest[Nothing, bytes], place: _Place) -> tuple[Stored, bytes]:
    wanted = header_of(request.http, "If-Match")
    if wanted:
        return await _replace(request, place, wanted), request.body
    condition = header_of(request.http, "If-None-Match")
    if not condition:
        return await _save(request, place)
    if condition != "*":
        raise Rejected("a write takes If-None-Match with * alone, to create a text", code="REMOTE_INVALID")
    return await _edit(request, place, b""), request.body


async def _save(request: EndpointRequest[Nothing, bytes], place: _Place) -> tuple[Stored, bytes]:
    """Store the text as an editor that had read the present one; of two that change one line, the later wins."""
    project, once = request.context.project, request.once
    for number in range(_TRIES):
        base = await text_at_head(project, place.active, request.context.share)
        done = await edit(request.context, place.active, request.body, base=base, once=once)
        if done.outcome == "merged":
            merged = await version_text(project, place.task, TEXT_KINDS[place.kind], str(done.seq))
            return done, merged.data
        if done.outcome != "conflict":
            return done, request.body
        if f"tasks/{place.task}.json" not in project.history.files:
            raise _archived(place)
        await project.order.catch_up()
        once = replace(once, id=sha256(f"{request.once.id} {number}".encode()).hexdigest()[:32])  # of a repetition too
    raise Rejected(f"{place.active} keeps changing; try again", code="REMOTE_BUSY")


async def _replace(request: EndpointRequest[Nothing, bytes], place: _Place, wanted: str) -> Stored:
    for _ in range(_TRIES):
        _, current = request.context.project.history.files.get(place.active, (0, b""))
        try:
            return await _edit(request, place, _base(wanted, current))
        except Rejected as rejected:
            if rejected.code != "REMOTE_STALE_BASE":
                raise
            if place.is_archived:
                raise _archived(place) from rejected
            # With a star, a text that was written since the read is replaced too.
            await request.context.project.order.catch_up()
            if place.active not in request.context.project.history.files:
                why = f"task {place.task} has no such text yet; create it with If-None-Match: *"
                raise Rejected(why, code=rejected.code) from rejected
            if wanted != "*":
                raise
    raise Rejected(f"{place.active} keeps changing; try again", code="REMOTE_BUSY")


async def _edit(request: EndpointRequest[Nothing, bytes], place: _Place, base_digest: bytes) -> Stored:
    stored = await edit(request.context, place.active, request.body, base_digest=base_digest, once=request.once)
    if stored.outcome == "conflict" and not base_digest and not place.is_archived:
        why = f"{place.active} already exists; read it and send its ETag in If-Match"
        raise Rejected(why, code="REMOTE_STALE_BASE")
    if stored.outcome == "conflict":
        raise _archived(place)
    return stored


def _base(wanted: str, current: bytes) -> bytes:
    """Return the digest in If-Match of the text to replace.

    The worker compares it with the file: the request may be a repeated one. Raises Rejected (412).
    """
    if wanted == "*":
        return current or _OF_NO_TEXT
    named = [tag for weak, tag in _ETAG.findall(wanted) if not weak and re.fullmatch("[0-9a-f]{64}", tag)]
    if not named:
        why = "If-Match has no ETag of this server; send the text's ETag with its quotes"
        raise Rejected(why, code="REMOTE_STALE_BASE")
    return bytes.fromhex(current.hex() if current.hex() in named else named[0])


def _etag(text: bytes) -> str:
    return f'"{digest_of(text).hex()}"'


def _archived(place: _Place) -> ApiError:
    why = f"task {place.task} is archived; unarchive it first"
    return ApiError(HTTPStatus.CONFLICT, "REMOTE_INVALID", why)


_CHOICES = (HTTPStatus.PRECONDITION_FAILED,)
_CACHED = {"If-None-Match": "ETags of texts that the client has"}
_REPLACED = {
    "If-Match": "ETag of the text to replace, or * for any; without it the text is merged by line with later changes",
    "If-None-Match": "* to create it",
}
endpoints = [
    Endpoint("GET", "/projects/{slug}/plans/{id}", read_plan, bytes, others=[HTTPStatus.NOT_MODIFIED], headers=_CACHED),
    Endpoint("PUT", "/projects/{slug}/plans/{id}", write_plan, Text, others=_CHOICES, headers=_REPLACED),
    Endpoint(
        "GET", "/projects/{slug}/notes/{id}", read_notes, bytes, others=[HTTPStatus.NOT_MODIFIED], headers=_CACHED
    ),
    Endpoint("PUT", "/projects/{slug}/notes/{id}", write_notes, Text, others=_CHOICES, headers=_REPLACED),
    Endpoint("GET", "/projects/{slug}/plans/{id}/versions", list_plan_versions, list[TextChange]),
    Endpoint("GET", "/projects/{slug}/plans/{id}/versions/{change}", read_plan_version, bytes),
    Endpoint("GET", "/projects/{slug}/notes/{id}/versions", list_notes_versions, list[TextChange]),
    Endpoint("GET", "/projects/{slug}/notes/{id}/versions/{change}", read_notes_version, bytes),
]
