"""A part of a list, and where the next one begins.

A cursor names the last thing that was seen, not a place in the list: whatever is added or taken away meanwhile, nothing
is left out or shown twice.
"""

import base64
from bisect import bisect_right
from typing import Annotated

from msgspec import UNSET, Meta, UnsetType, structs

from lattice_remote.errors import Rejected
from lattice_remote.server.data.read_ipc import Found
from lattice_remote.server.web.rest.asked import Query

__all__ = ["Page", "page_of"]

MAX_LIMIT = 1000


class Page(Query, frozen=True, kw_only=True):
    """Which part of a list. Without ``limit`` it is all of it; ``cursor`` is the ``next`` of the part before."""

    limit: Annotated[int, Meta(ge=1, le=MAX_LIMIT)] | UnsetType = UNSET
    cursor: Annotated[str, Meta(min_length=1, max_length=400, pattern="^[A-Za-z0-9_=-]+$")] | UnsetType = UNSET


def page_of(found: Found, page: Page, *, by_id: bool) -> Found:
    """Return what was found with a part of its list; an error is returned as it is. Takes no longer for a long list.

    Args:
        found: a list, with its items.
        page: which part.
        by_id: the list is in the order of its ids, and things may disappear from it.

    Raises:
        Rejected: the cursor is none of this list.
    """
    items = found.items
    if items is None or (page.limit is UNSET and page.cursor is UNSET):
        return found
    first = 0 if page.cursor is UNSET else _place_after(_decoded(page.cursor), items.ids, by_id=by_id)
    count = len(items.ids)
    end = count if page.limit is UNSET else min(first + page.limit, count)
    part = found.body[items.ends[first - 1] + 1 if first else items.start : items.ends[end - 1]] if first < end else b""
    following = b',"next":"%s"' % _encoded(items.ids[end - 1]) if end < count else b""
    return structs.replace(found, body=b"".join((found.body[: items.start], part, b"]", following, b"}")))


def _place_after(last: str, ids: list[str], *, by_id: bool) -> int:
    if by_id:
        return bisect_right(ids, last)
    try:
        return ids.index(last) + 1
    except ValueError:
        raise Rejected("the cursor is none of this list: begin anew without it", code="REMOTE_INVALID") from None


def _encoded(id_: str) -> bytes:
    return base64.urlsafe_b64encode(id_.encode())


def _decoded(cursor: str) -> str:
    try:
        return base64.urlsafe_b64decode(cursor).decode()
    except ValueError:
        raise Rejected("the cursor is none of this server: begin anew without it", code="REMOTE_INVALID") from None
