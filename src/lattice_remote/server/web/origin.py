"""Where a request comes from, as its browser says: from a page of ours, from a page of somebody else, over TLS or not.

A browser sends its cookies with whatever a page of another site makes it ask. ``SameSite=Strict`` keeps them to pages
of the same site, but every subdomain and every port belongs to that. So a request that brings a cookie must prove more.
Browsers say more in Fetch metadata (``Sec-Fetch-Site``), which no page can change, though only to servers that
they reach over TLS or on their own machine; otherwise there is the older ``Origin``, with every request that writes.
"""

from urllib.parse import urlsplit

from starlette.requests import Request

from lattice_remote.server.network.door import Visit

__all__ = ["foreign", "is_from_elsewhere", "is_https"]

_READING = {"GET", "HEAD"}


def is_https(request: Request) -> bool:
    """Tell whether the browser speaks TLS, with this server or with a trusted proxy in front of it."""
    visit: Visit = request.state.visit
    by_proxy = visit.from_proxy and request.headers.get("X-Forwarded-Proto", "").split(",")[0].strip() == "https"
    return by_proxy or request.url.scheme == "https"


def foreign(request: Request) -> str:
    """Return why a request that brings a cookie is not answered; "" when it comes from a page of ours.

    Whoever follows a link to here is welcome: a page that is shown in a tab of its own tells nothing to where the
    link was. What only reads and comes from nowhere (an address that was typed) is welcome too.
    """
    reads, headers = request.method in _READING, request.headers
    site = headers.get("Sec-Fetch-Site")
    if site is not None:
        shown = (headers.get("Sec-Fetch-Mode"), headers.get("Sec-Fetch-Dest")) == ("navigate", "document")
        if site == "same-origin" or (reads and (site == "none" or shown)):
            return ""
        return "this request was made by a page of another site"
    origin = headers.get("Origin")
    if origin is None:
        return "" if reads else "this request does not say which page made it (no Origin header)"
    if not _is_ours(request, origin):
        return "this request was made by a page of another site, or a proxy in front did not pass the Host header on"
    return ""


def is_from_elsewhere(request: Request) -> bool:
    """Tell whether somebody came here by a link on another site, so that his browser has held the cookie back."""
    return request.headers.get("Sec-Fetch-Site") == "cross-site" and request.headers.get("Sec-Fetch-Mode") == "navigate"


def _is_ours(request: Request, origin: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    scheme = {"https"} if is_https(request) else {"http", "https"}  # a proxy that is not trusted may speak TLS
    return parts.scheme in scheme and parts.netloc.lower() == request.headers.get("Host", "").lower() != ""
