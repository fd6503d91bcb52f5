"""What a project's server side and its reader process say to each other, framed as with the worker (``ipc.py``).

One ``Read`` at a time, each answered by one ``Found``, in order.
"""

import msgspec

__all__ = ["Found", "Read", "ReadCommand", "ReadPage"]


class ReadCommand(msgspec.Struct, frozen=True, tag_field="type", tag="command"):
    """Run this command line, which only reads; ``path`` are the command's words, as ``resource list``."""

    path: str
    argv: tuple[str, ...]


class ReadPage(msgspec.Struct, frozen=True, tag_field="type", tag="page"):
    """Have the dashboard's own handlers answer a GET of this path."""

    path: str


Read = ReadCommand | ReadPage


class Found(msgspec.Struct, frozen=True):
    """What came of it.

    Attributes:
        status: a command's exit code; of a page, as in HTTP.
        body: what the command printed to its standard output, or the page's body.
        content_type: of a page.
        message: what the command printed to its standard error.
    """

    status: int
    body: bytes
    content_type: str = ""
    message: str = ""
