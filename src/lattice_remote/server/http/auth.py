"""Authentication of HTTP requests by token or cookie, and access to the project in the path (I9)."""

from dataclasses import dataclass
from hashlib import sha256
from http import HTTPStatus
from urllib.parse import urlsplit

from itsdangerous import BadSignature, SignatureExpired, URLSafeTimedSerializer
from starlette.requests import Request
from starlette.responses import Response

from lattice_remote.server.auth import Login, bearer, unauthorized
from lattice_remote.server.http.middleware import log_entry_of, wants_page
from lattice_remote.server.project.metrics import OutcomeListener
from lattice_remote.server.project.project import Project
from lattice_remote.server.registry import ProjectRegistry
from lattice_remote.server.transport.admission import ConnectionQuota, ResponseShare
from lattice_remote.server.transport.api_error import ApiError

__all__ = [
    "Cookies",
    "RequestContext",
    "authenticated",
    "cookies_for",
    "cross_site_objection",
    "is_cross_site_link",
    "is_https",
    "refuse_cross_site",
    "registry_of",
    "request_context",
    "signed_in",
]

_READING = {"GET", "HEAD"}


def is_https(request: Request) -> bool:
    quota: ConnectionQuota = request.state.quota
    by_proxy = quota.from_proxy and request.headers.get("X-Forwarded-Proto", "").split(",")[0].strip() == "https"
    return by_proxy or request.url.scheme == "https"


def cross_site_objection(request: Request) -> str:
    """Return why a request with a cookie is refused as cross-site; "" for links that open a tab, and reads without an
    origin.
    """
    reads, headers = request.method in _READING, request.headers
    site = headers.get("Sec-Fetch-Site")
    if site is not None:
        shown = (headers.get("Sec-Fetch-Mode"), headers.get("Sec-Fetch-Dest")) == ("navigate", "document")
        if site == "same-origin" or (reads and (site == "none" or shown)):
            return ""
        return "the request comes from a page of another site"
    origin = headers.get("Origin")
    if origin is None:
        return "" if reads else "the request has no Origin header"
    if not _is_ours(request, origin):
        return "the request comes from a page of another site, or a proxy did not forward the Host header"
    return ""


def is_cross_site_link(request: Request) -> bool:
    """Return whether a link on another site was followed, for which a browser withholds the cookie."""
    return request.headers.get("Sec-Fetch-Site") == "cross-site" and request.headers.get("Sec-Fetch-Mode") == "navigate"


def _is_ours(request: Request, origin: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    scheme = {"https"} if is_https(request) else {"http", "https"}  # an untrusted proxy may use TLS
    return parts.scheme in scheme and parts.netloc.lower() == request.headers.get("Host", "").lower() != ""


_MAX_CHARS = 1024
"""A valid cookie has about 200."""


class Cookies:
    def __init__(self, key: bytes, max_age_days: float) -> None:
        self._max_age_s = int(max_age_days * 86_400)
        self._signer = URLSafeTimedSerializer(key, salt="browser", signer_kwargs={"digest_method": sha256})
        # Browsers send cookies to all ports of a host; servers on one host must not sign each other out.
        self._name = f"lattice-{sha256(b'name' + key).hexdigest()[:8]}"

    def read(self, request: Request) -> tuple[str, str] | None:
        """Return id and digest of the token in a request's cookie; None without a cookie.

        Raises SignatureExpired, or BadSignature if the cookie is forged, or of another server.
        """
        text = request.cookies.get(self._name_for(request), "")
        if not text:
            return None
        if len(text) > _MAX_CHARS:
            raise BadSignature("too long")
        token_id, digest = self._signer.loads(text, max_age=self._max_age_s)
        return token_id, digest

    def give(self, request: Request, response: Response, login: Login) -> None:
        """Set the cookie for this server's own pages, invisible to scripts."""
        value = self._signer.dumps((login.token.id, login.sha256))
        self._set(request, response, value, self._max_age_s)

    def take_back(self, request: Request, response: Response) -> None:
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
        return f"__Host-{self._name}" if is_https(request) else self._name


@dataclass(frozen=True)
class RequestContext:
    registry: ProjectRegistry
    login: Login
    project: Project
    share: ResponseShare
    """Memory of the response."""
    on_result: OutcomeListener | None = None
    """For the number of the change in the request's log line."""


def registry_of(request: Request) -> ProjectRegistry:
    registry: ProjectRegistry = request.app.state.registry
    return registry


def cookies_for(request: Request) -> Cookies:
    cookies: Cookies = request.app.state.cookies
    return cookies


def authenticated(request: Request) -> Login:
    """Return the login of the ``Authorization`` header, else of the browser's cookie if our own page sent the request.

    Raises ApiError for an unknown token, too many connections, or a cookie from another site's page.
    """
    quota: ConnectionQuota = request.state.quota
    authorization = request.headers.getlist("Authorization")
    has_token = any(value.lower().startswith("bearer") for value in authorization)  # or a password for a proxy
    login = None if has_token else signed_in(request)
    if login is None and wants_page(request) and not authorization:
        login = unauthorized("sign in first")  # the sign-in form, and no failed login
    if login is None:
        login = registry_of(request).auth.identify(quota, bearer(authorization))
    if isinstance(login, ApiError):
        raise login
    log_entry_of(request).login = login
    share: ResponseShare = request.state.share
    share.token_id = login.token.id
    if (refusal := quota.admit(login.token.id)) is not None:
        raise refusal
    return login


def signed_in(request: Request) -> Login | ApiError | None:
    """Return the login of the browser's cookie, or why it has ended; None without a cookie.

    An expired cookie is no failed login: open pages keep sending it. Raises ApiError for another site's page.
    """
    try:
        shown = cookies_for(request).read(request)
    except SignatureExpired:
        return unauthorized("the sign-in has expired; sign in again")
    except BadSignature:
        quota: ConnectionQuota = request.state.quota
        return quota.failed() or unauthorized("the cookie is not from this server; sign in again")
    if shown is None:
        return None
    refuse_cross_site(request)
    return registry_of(request).auth.identify_again(*shown)


def refuse_cross_site(request: Request) -> None:
    if why := cross_site_objection(request):
        raise ApiError(HTTPStatus.FORBIDDEN, "REMOTE_FORBIDDEN", why)


async def request_context(request: Request) -> RequestContext:
    """Return the authenticated client and the project in the path, once it is open.

    Raises ApiError: not authorized; Rejected: the token has too many responses outstanding; StorageError.
    """
    slug = request.path_params["slug"]
    login, project = authenticated(request), _entered(request, slug, None)
    share: ResponseShare = request.state.share
    await share.room()
    await project.opened()
    # Opening may take long enough for the token or the project to be removed.
    return RequestContext(
        registry_of(request), login, _entered(request, slug, project), share, log_entry_of(request).take
    )


def _entered(request: Request, slug: str, project: Project | None) -> Project:
    found = registry_of(request).enter(authenticated(request), slug)
    if isinstance(found, ApiError):
        raise found
    log_entry_of(request).project = found.slug
    return found if project is None else project
