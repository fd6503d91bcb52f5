"""``/projects/:slug/plans/:id`` and ``/projects/:slug/notes/:id``: a task's plan and notes, as texts.

Whoever replaces a text says which one he has seen, by its ETag: nothing newer is overwritten unseen.
"""

import re
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

import msgspec
from starlette.responses import Response

from lattice_remote.errors import Rejected
from lattice_remote.protocol.messages import Stored
from lattice_remote.protocol.operations import digest_of
from lattice_remote.server.network.refusal import Refusal
from lattice_remote.server.project.texts import text_at_head
from lattice_remote.server.web.answers import TurnedAway
from lattice_remote.server.web.asking import edit
from lattice_remote.server.web.rest.asked import Asked, Nothing
from lattice_remote.server.web.rest.commands import answer, at_change, found
from lattice_remote.server.web.rest.endpoint import Endpoint

__all__ = ["Text", "endpoints"]

_ETAG = re.compile(r'(W/)?"([^"]*)"')
_TRIES = 5


class Text(msgspec.Struct):
    """What became of a text; ``etag`` is its ETag from now on."""

    task: str
    etag: str
    outcome: Literal["stored", "unchanged"]


@dataclass(frozen=True)
class _Place:
    """Where a task's text is."""

    task: str
    path: str
    is_archived: bool


async def read_plan(asked: Asked[Nothing, Nothing]) -> Response:
    """Return a task's plan, archived or not; 304 when ``If-None-Match`` names it."""
    return await _get(asked, "plans")


async def read_notes(asked: Asked[Nothing, Nothing]) -> Response:
    """Return a task's notes, archived or not; 304 when ``If-None-Match`` names them."""
    return await _get(asked, "notes")


async def write_plan(asked: Asked[Nothing, bytes]) -> Response:
    """Replace a task's plan, or with ``If-None-Match: *`` make it; 412 when it is another than ``If-Match`` names."""
    return await _put(asked, "plans")


async def write_notes(asked: Asked[Nothing, bytes]) -> Response:
    """Replace a task's notes, or with ``If-None-Match: *`` make them; 412 when they are others than ``If-Match`` names.

    Notes are there when somebody has written them; a task has a plan from its beginning.
    """
    return await _put(asked, "notes")


async def _get(asked: Asked[Nothing, Nothing], kind: str) -> Response:
    place = await _place(asked, kind)
    if isinstance(place, Response):
        return place
    text = await text_at_head(asked.guest.project, place.path)
    if text is None:
        raise Rejected(f"task {place.task} has no {kind}", code="REMOTE_NOT_FOUND")
    etag = _etag(text)
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    named = asked.request.headers.get("If-None-Match", "")
    if named.strip() == "*" or etag in {f'"{tag}"' for _, tag in _ETAG.findall(named)}:
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return Response(text, headers=headers, media_type="text/markdown; charset=utf-8")


async def _put(asked: Asked[Nothing, bytes], kind: str) -> Response:
    media_type = asked.request.headers.get("Content-Type", "text/markdown").partition(";")[0].strip().lower()
    if not media_type.startswith("text/"):
        why = "send the text with Content-Type: text/markdown"
        raise TurnedAway(Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "REMOTE_PROTOCOL", why))
    place = await _place(asked, kind)
    if isinstance(place, Response):
        return place
    if place.is_archived:
        raise _conflict(f"task {place.task} is archived: unarchive it first")
    done = await _store(asked, place)
    etag = _etag(asked.body)
    content = msgspec.json.encode(
        {"ok": True, "data": Text(place.task, etag, "unchanged" if done.outcome == "unchanged" else "stored")}
    )
    return at_change(asked, done.seq, Response(content, headers={"ETag": etag}, media_type="application/json"))


async def _store(asked: Asked[Nothing, bytes], place: _Place) -> Stored:
    """Put the text in the place of the one that the request names; return what came of it."""
    wanted = asked.request.headers.get("If-Match", "").strip()
    if not wanted:
        if asked.request.headers.get("If-None-Match", "").strip() != "*":
            why = 'say what this replaces: If-Match: "..." with the ETag of the text that you have read, or * for any'
            raise TurnedAway(Refusal(HTTPStatus.PRECONDITION_REQUIRED, "REMOTE_INVALID", f"{why}; or If-None-Match: *"))
        return await _edit(asked, place, b"")
    for _ in range(_TRIES):
        _, current = asked.guest.project.history.files.get(place.path, (0, b""))
        base = _base(wanted, current)
        try:
            return await _edit(asked, place, base)
        except Rejected as rejected:
            # With a star, another text that came in between is to be replaced as well.
            if rejected.code != "REMOTE_STALE_BASE" or wanted != "*":
                raise
    raise Rejected(f"{place.path} is changing all the time; try again", code="REMOTE_BUSY")


async def _edit(asked: Asked[Nothing, bytes], place: _Place, base_digest: bytes) -> Stored:
    stored = await edit(asked.guest, place.path, asked.body, base_digest=base_digest, once=asked.once)
    if stored.outcome == "conflict" and not base_digest:
        raise _stale(place.path)
    if stored.outcome == "conflict":
        raise _conflict(f"task {place.task} was archived meanwhile: unarchive it first")
    return stored


def _base(wanted: str, current: bytes) -> bytes:
    """Return the digest of the text that is to be replaced, of those that If-Match names.

    Whether the file has it is for the worker to say: it may know this request already, and what came of it.

    Raises:
        Rejected: 412: it names none that could be there.
    """
    if wanted == "*" and current:
        return current
    named = [tag for weak, tag in _ETAG.findall(wanted) if not weak and re.fullmatch("[0-9a-f]{64}", tag)]
    if not named:
        raise Rejected("there is no text yet, or If-Match names none of this server's", code="REMOTE_STALE_BASE")
    return bytes.fromhex(current.hex() if current.hex() in named else named[0])


async def _place(asked: Asked[Any, Any], kind: str) -> _Place | Response:
    """Return where a task's text is, or how lattice says that there is no such task."""
    printed = await found(asked, "show", "--compact", "--", asked.path["id"])
    shown = msgspec.json.decode(printed, type=dict[str, Any])
    if not shown["ok"]:
        return answer(printed)
    task, is_archived = shown["data"]["id"], bool(shown["data"].get("archived"))
    return _Place(task, f"{'archive/' if is_archived else ''}{kind}/{task}.md", is_archived)


def _etag(text: bytes) -> str:
    return f'"{digest_of(text).hex()}"'


def _stale(path: str) -> Rejected:
    return Rejected(f"{path} is there already: read it, and name its ETag in If-Match", code="REMOTE_STALE_BASE")


def _conflict(message: str) -> TurnedAway:
    return TurnedAway(Refusal(HTTPStatus.CONFLICT, "REMOTE_INVALID", message))


_CHOICES = (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.PRECONDITION_REQUIRED)
_CACHED = {"If-None-Match": "ETags of texts that need not be sent again"}
_REPLACED = {"If-Match": "the ETag of the text that this one replaces, or * for any", "If-None-Match": "* to make it"}
endpoints = [
    Endpoint("GET", "/projects/{slug}/plans/{id}", read_plan, bytes, others=[HTTPStatus.NOT_MODIFIED], headers=_CACHED),
    Endpoint("PUT", "/projects/{slug}/plans/{id}", write_plan, Text, others=_CHOICES, headers=_REPLACED),
    Endpoint(
        "GET", "/projects/{slug}/notes/{id}", read_notes, bytes, others=[HTTPStatus.NOT_MODIFIED], headers=_CACHED
    ),
    Endpoint("PUT", "/projects/{slug}/notes/{id}", write_notes, Text, others=_CHOICES, headers=_REPLACED),
]
