"""Where somebody wanted to go who had to sign in first. The link may have been made by anybody."""

import re
from urllib.parse import quote

from starlette.requests import Request

__all__ = ["local_path", "sign_in_path", "wanted_path"]

_MAX_CHARS = 2000
_LOCAL = re.compile(r"/(?![/\\])[^\x00-\x20\\\x7f-\x9f]*")
"""A path of this server, as every browser reads it: ``//`` and ``/\\`` begin another host, and tabs and line ends are
left out before that is looked at."""


def local_path(wanted: str) -> str:
    """Return a path to send a browser to, quoted; ``/`` when what is wanted is no path of this server."""
    if len(wanted) > _MAX_CHARS or _LOCAL.fullmatch(wanted) is None or wanted.startswith(("/sign-in", "/sign-out")):
        return "/"
    return quote(wanted, safe="/?#&=%:@+,;~!$'()*[]")


def wanted_path(request: Request) -> str:
    """Return the path and query that a request asks for, as they were sent."""
    raw: bytes = request.scope["raw_path"] + (b"?" + query if (query := request.scope["query_string"]) else b"")
    return raw.decode("latin-1")


def sign_in_path(request: Request) -> str:
    """Return the sign-in page's address, from which one gets back to what was asked for."""
    wanted = local_path(wanted_path(request))
    return "/sign-in" if wanted == "/" else f"/sign-in?next={quote(wanted, safe='/')}"
