"""The cookie of a browser that is signed in: which token it has shown, signed, and never the token itself.

It holds the token's id and the digest of the text that was shown. So it ends when the token does: revoked, expired, or
rotated past its grace. It also ends by its age. Nothing is kept on the server but the key that it is signed with.
"""

from dataclasses import dataclass
from hashlib import sha256

from itsdangerous import BadSignature, URLSafeTimedSerializer
from starlette.requests import Request
from starlette.responses import Response

from lattice_remote.server.data.logins import Login
from lattice_remote.server.web.origin import is_https

__all__ = ["Cookies", "Shown"]

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
