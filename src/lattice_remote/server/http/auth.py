"""Who asks, and for which project: the first line of every handler of a project's path (I9)."""

from dataclasses import dataclass
from hashlib import sha256
from http import HTTPStatus
from urllib.parse import urlsplit

from itsdangerous import BadSignature, SignatureExpired, URLSafeTimedSerializer
from starlette.requests import Request
from starlette.responses import Response

from lattice_remote.server.auth import Login
from lattice_remote.server.http.access_log import record_of
from lattice_remote.server.http.responses import wants_page
from lattice_remote.server.project.project import Project
from lattice_remote.server.project.request_log import OutcomeListener
from lattice_remote.server.registry import ProjectRegistry, bearer
from lattice_remote.server.transport.admission import ConnectionQuota
from lattice_remote.server.transport.api_error import ApiError
from lattice_remote.server.transport.response_budget import ResponseShare

__all__ = [
    "Cookies",
    "RequestContext",
    "Shown",
    "cookies_of",
    "foreign",
    "guest",
    "hub_of",
    "identified",
    "is_from_elsewhere",
    "is_https",
    "refuse_foreign",
    "signed_in",
]

_READING = {"GET", "HEAD"}


def is_https(request: Request) -> bool:
    """Tell whether the browser speaks TLS, with this server or with a trusted proxy in front of it."""
    visit: ConnectionQuota = request.state.visit
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


_MAX_CHARS = 1024
"""Ours has about 200."""


@dataclass(frozen=True)
class Shown:
    """What a cookie says of the token that was shown."""

    token_id: str
    sha256: str


class Cookies:
    """Makes the cookies of one server, and reads them."""

    def __init__(self, key: bytes, max_age_days: float) -> None:
        """Take the server's own key, and for how long a cookie is good."""
        self._max_age_s = int(max_age_days * 86_400)
        self._signer = URLSafeTimedSerializer(key, salt="browser", signer_kwargs={"digest_method": sha256})
        # A browser gives its cookies to every port of a host. Two servers there are not to sign each other out.
        self._name = f"lattice-{sha256(b'name' + key).hexdigest()[:8]}"

    def read(self, request: Request) -> Shown | None:
        """Return what a request's cookie says; None when it brings none.

        Raises:
            SignatureExpired: it was good once.
            BadSignature: it was never ours, so somebody may be guessing.
        """
        text = request.cookies.get(self._name_for(request), "")
        if not text:
            return None
        if len(text) > _MAX_CHARS:
            raise BadSignature("longer than any of ours")
        token_id, digest = self._signer.loads(text, max_age=self._max_age_s)
        return Shown(token_id, digest)

    def give(self, request: Request, response: Response, login: Login) -> None:
        """Let the browser keep who has signed in. Only this server gets it, from its own pages, and no script."""
        value = self._signer.dumps((login.token.id, login.sha256))
        self._set(request, response, value, self._max_age_s)

    def take_back(self, request: Request, response: Response) -> None:
        """Let the browser forget it."""
        self._set(request, response, "", 0)

    def _set(self, request: Request, response: Response, value: str, max_age_s: int) -> None:
        response.set_cookie(
            self._name_for(request),
            value,
            max_age=max_age_s,
            path="/",
            secure=is_https(request),
            httponly=True,
            samesite="strict",
        )

    def _name_for(self, request: Request) -> str:
        """With TLS it is a name that nobody can set but this very host, over TLS."""
        return f"__Host-{self._name}" if is_https(request) else self._name


def _unauthorized(why: str) -> ApiError:
    return ApiError(HTTPStatus.UNAUTHORIZED, "REMOTE_UNAUTHORIZED", why)


@dataclass(frozen=True)
class RequestContext:
    """Somebody who may use a project, which is open."""

    hub: ProjectRegistry
    login: Login
    project: Project
    share: ResponseShare
    """What the response holds in memory."""
    told: OutcomeListener | None = None
    """Takes the account of a write that it asks for, so that its one line in the log has the change's number."""


def hub_of(request: Request) -> ProjectRegistry:
    """Return the hub that a request has come to."""
    hub: ProjectRegistry = request.app.state.hub
    return hub


def cookies_of(request: Request) -> Cookies:
    """Return what makes and reads the cookies of this server."""
    cookies: Cookies = request.app.state.cookies
    return cookies


def identified(request: Request) -> Login:
    """Return who asks: by the token in its ``Authorization`` header, else by the cookie of a browser that is signed in.

    A cookie counts only for what a page of ours asks.

    Raises:
        ApiError: nobody known, or with too many connections, or with a cookie from another site's page.
    """
    visit: ConnectionQuota = request.state.visit
    authorization = request.headers.getlist("Authorization")
    login = None if _has_token(authorization) else signed_in(request)
    if login is None and wants_page(request) and not authorization:
        login = _unauthorized("sign in first")  # people who look in are no guessers: they are shown where to sign in
    if login is None:
        login = hub_of(request).identify(visit, bearer(authorization))
    if isinstance(login, ApiError):
        raise login
    record_of(request).login = login
    share: ResponseShare = request.state.share
    share.token_id = login.token.id
    if (refusal := visit.admit(login.token.id)) is not None:
        raise refusal
    return login


def _has_token(authorization: list[str]) -> bool:
    """Tell whether it is a token that is shown. A proxy in front may ask browsers for a password, which is none."""
    return any(value.lower().startswith("bearer") for value in authorization)


def signed_in(request: Request) -> Login | ApiError | None:
    """Return who has signed in with this browser, or why that has ended; None when it brings no cookie.

    A cookie of ours that is good no more is no failed login: pages that are still open go on asking.

    Raises:
        ApiError: a page of another site has made the request.
    """
    try:
        shown = cookies_of(request).read(request)
    except SignatureExpired:
        return _unauthorized("you have signed in too long ago; sign in again")
    except BadSignature:
        visit: ConnectionQuota = request.state.visit
        return visit.failed() or _unauthorized("the cookie is not one of this server; sign in again")
    if shown is None:
        return None
    refuse_foreign(request)
    return hub_of(request).identify_again(shown.token_id, shown.sha256)


def refuse_foreign(request: Request) -> None:
    """Do nothing if a request comes from a page of ours.

    Raises:
        ApiError: it was made by a page of another site.
    """
    if why := foreign(request):
        raise ApiError(HTTPStatus.FORBIDDEN, "REMOTE_FORBIDDEN", why)


async def guest(request: Request) -> RequestContext:
    """Return who asks, and the project that the path names, once it is open.

    Raises:
        ApiError: nobody who may.
        Rejected: the token has more answers outstanding than it may.
        StorageError: the project can't be used.
    """
    slug = request.path_params["slug"]
    login, project = identified(request), _entered(request, slug, None)
    share: ResponseShare = request.state.share
    await share.room()
    await project.opened()
    # Opening may have taken its time, in which the token or the project was taken away.
    return RequestContext(hub_of(request), login, _entered(request, slug, project), share, record_of(request).take)


def _entered(request: Request, slug: str, project: Project | None) -> Project:
    found = hub_of(request).enter(identified(request), slug)
    if isinstance(found, ApiError):
        raise found
    record_of(request).project = found.slug
    return found if project is None else project
