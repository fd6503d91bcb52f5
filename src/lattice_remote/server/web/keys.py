"""``Idempotency-Key``: a request over HTTP that is sent again, by a program or by a browser itself, runs once (I6)."""

import hashlib

import msgspec
from starlette.requests import Request

from lattice_remote.errors import Rejected
from lattice_remote.server.web.asking import Once, once_only
from lattice_remote.server.web.gate import Guest

__all__ = ["KEY_HEADER", "MAX_KEY_CHARS", "once_of"]

KEY_HEADER = "Idempotency-Key"
MAX_KEY_CHARS = 255
_CONDITIONS = ("If-Match", "If-None-Match")


def once_of(request: Request, visitor: Guest, content: bytes) -> Once:
    """Return under which id a request with this body runs: that of its key, which is its token's own, or a new one.

    Raises:
        Rejected: its key is none.
    """
    keys = request.headers.getlist(KEY_HEADER)
    if not keys:
        return once_only()
    key = keys[0]
    if len(keys) > 1 or not 0 < len(key) <= MAX_KEY_CHARS or not key.isascii() or not key.isprintable():
        raise Rejected(
            f"{KEY_HEADER} must be one, of 1 to {MAX_KEY_CHARS} printable characters", code="REMOTE_PROTOCOL"
        )
    return Once(
        _digest("key", visitor.login.token.id, key).hex(),
        _digest(
            *(request.method, request.url.path, request.url.query, hashlib.sha256(content).hexdigest()),
            *(", ".join(request.headers.getlist(name)).strip() for name in _CONDITIONS),
        ),
    )


def _digest(*parts: str) -> bytes:
    """Return 16 bytes that no other parts have."""
    return hashlib.sha256(msgspec.json.encode(parts)).digest()[:16]
