"""A part of a list, and where the next one begins.

A cursor names the last thing that was seen, not a place in the list: whatever is added or taken away meanwhile, nothing
is left out or shown twice.
"""

import base64
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from lattice_remote.errors import Rejected
from lattice_remote.server.web.rest.asked import Query

__all__ = ["Page", "page_of"]

MAX_LIMIT = 1000


class Page(Query, frozen=True, kw_only=True):
    """Which part of a list. Without ``limit`` it is all of it; ``cursor`` is the ``next`` of the part before."""

    limit: Annotated[int, Meta(ge=1, le=MAX_LIMIT)] | UnsetType = UNSET
    cursor: Annotated[str, Meta(min_length=1, max_length=400, pattern="^[A-Za-z0-9_=-]+$")] | UnsetType = UNSET


class _Identified(msgspec.Struct, frozen=True):
    id: str = ""


def page_of(envelope: bytes, page: Page, *, by_id: bool) -> bytes:
    """Return an envelope with a part of the list that is the ``data`` of another; an error's is returned as it is.

    Args:
        envelope: as lattice prints it.
        page: which part.
        by_id: the list is in the order of its ids, and things may disappear from it.

    Raises:
        Rejected: the cursor is none of this list.
    """
    if page.limit is UNSET and page.cursor is UNSET:
        return envelope
    whole = msgspec.json.decode(envelope, type=dict[str, msgspec.Raw])
    if whole.get("ok") != msgspec.Raw(b"true"):
        return envelope
    items = msgspec.json.decode(whole["data"], type=list[msgspec.Raw])
    ids = [item.id for item in msgspec.json.decode(whole["data"], type=list[_Identified])]
    first = 0 if page.cursor is UNSET else _place_after(_decoded(page.cursor), ids, by_id=by_id)
    end = len(items) if page.limit is UNSET else first + page.limit
    part: dict[str, Any] = {**whole, "data": items[first:end]}
    if end < len(items):
        part["next"] = _encoded(ids[end - 1])
    return msgspec.json.encode(part)


def _place_after(last: str, ids: list[str], *, by_id: bool) -> int:
    if by_id:
        return sum(id_ <= last for id_ in ids)
    try:
        return ids.index(last) + 1
    except ValueError:
        raise Rejected("the cursor is none of this list: begin anew without it", code="REMOTE_INVALID") from None


def _encoded(id_: str) -> str:
    return base64.urlsafe_b64encode(id_.encode()).decode()


def _decoded(cursor: str) -> str:
    try:
        return base64.urlsafe_b64decode(cursor).decode()
    except ValueError:
        raise Rejected("the cursor is none of this server: begin anew without it", code="REMOTE_INVALID") from None
