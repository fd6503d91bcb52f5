"""What a project's server side and its reader process say to each other, framed as with the worker (``ipc.py``).

One ``Read`` at a time, each answered by one ``Found``, in order.
"""

import msgspec

__all__ = ["Found", "Items", "Read", "ReadCommand", "ReadPage"]


class ReadCommand(msgspec.Struct, frozen=True, tag_field="type", tag="command"):
    """Run this command line, which only reads; ``path`` are the command's words, as ``resource list``.

    Where ``list_at`` says at what names the envelope has a list, that list is answered with as its data, and its items.
    """

    path: str
    argv: tuple[str, ...]
    list_at: tuple[str, ...] = ()


class ReadPage(msgspec.Struct, frozen=True, tag_field="type", tag="page"):
    """Have the dashboard's own handlers answer a GET of this path."""

    path: str


Read = ReadCommand | ReadPage


class Items(msgspec.Struct, frozen=True):
    """The items of a list, each between commas in a body that ends with them and ``]}``.

    Attributes:
        start: where the first one begins.
        ids: of each; "" for one that has none.
        ends: where each ends.
    """

    start: int
    ids: list[str]
    ends: list[int]


class Found(msgspec.Struct, frozen=True):
    """What came of it.

    Attributes:
        status: a command's exit code; of a page, as in HTTP.
        body: what the command printed to its standard output, or the page's body.
        content_type, etag: of a page; "" for none.
        message: what the command printed to its standard error.
        items: of the list that was asked for; None when it could not be read.
    """

    status: int
    body: bytes
    content_type: str = ""
    etag: str = ""
    message: str = ""
    items: Items | None = None
