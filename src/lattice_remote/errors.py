"""Error tree, by cause.

    RemoteError
    |-- ProtocolError       the peer violated the protocol; only its connection ends
    |   `-- HostilePath     a path outside the replicated tree (I9)
    |-- ConnectionFailed    the server could not be reached, or the connection was lost
    |-- Rejected            the server refused the request
    |-- Misuse              this command is not possible here; nothing was changed
    `-- StorageError        a file or the journal could not be read or written

Every error has a ``code`` of ``CODES`` and a message of one line that ends with the next step. Expected outcomes (a
merge conflict, a command that lattice refuses) are return values, not errors.
"""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "CODES",
    "REFUSALS",
    "ConnectionFailed",
    "HostilePath",
    "Misuse",
    "ProtocolError",
    "Rejected",
    "RemoteError",
    "StorageError",
    "error_from_code",
    "one_line",
    "printable",
    "unknown_if_sent",
]

CODES = {
    "REMOTE_UNREACHABLE": "the server cannot be reached",
    "REMOTE_UNKNOWN_OUTCOME": "the connection was lost after the request was sent; it may have taken effect",
    "REMOTE_UNAUTHORIZED": "no token, or an unknown one",
    "REMOTE_UNTRUSTED": "the user has not named this server, or its certificate cannot be verified; no token was sent",
    "REMOTE_FORBIDDEN": "the token is not for this project or this actor",
    "REMOTE_NOT_FOUND": "the server has no such project",
    "REMOTE_GONE": "the requested changes are no longer kept, or never existed",
    "REMOTE_VERSION": "the two sides speak different versions; the message says which to upgrade",
    "REMOTE_UNSUPPORTED": "the command, or one of its arguments, is not supported in a remote project",
    "REMOTE_NOT_UPLOADED": "the content that a request refers to is not on the server; upload it again",
    "REMOTE_STALE_BASE": "the server's text does not have the digest of the base; send the whole base",
    "REMOTE_INVALID": "the data to write is not valid; nothing was changed",
    "REMOTE_TOO_LARGE": "a frame or file over the server's limit",
    "REMOTE_PROTOCOL": "the peer violated the protocol",
    "REMOTE_BUSY": "the server cannot take the request now; retry later",
    "REMOTE_FAILED": "the command failed on the server; the message says whether it took effect",
    "REMOTE_STORAGE": "a file could not be read or written",
    "REMOTE_GUARD": "a local command tried to write into the cache",
    "REMOTE_SHUTDOWN": "the server is stopping; retry after the time it names",
}
"""Codes of ``Refused`` and ``Bye`` frames and of messages to users, with their meaning."""
REFUSALS = {
    "REMOTE_UNAUTHORIZED",
    "REMOTE_UNTRUSTED",
    "REMOTE_FORBIDDEN",
    "REMOTE_NOT_FOUND",
    "REMOTE_VERSION",
}
"""Codes after which a retry is pointless until something changes."""
_MAX_MESSAGE = 2000


def one_line(text: str) -> str:
    """Return untrusted ``text`` as one line of bounded length without control characters."""
    return "".join(c if c.isprintable() else " " for c in text[:_MAX_MESSAGE]).strip()


def printable(text: str) -> str:
    """Return untrusted ``text`` with every character escaped (``\\x1b``) that is not printable or a space."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class RemoteError(Exception):
    """Root of all errors: ``code`` is one of ``CODES``, ``message`` one printable line."""

    code = "REMOTE_FAILED"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        self.message = one_line(message)
        super().__init__(self.message)
        if code is not None:
            self.code = code


class ProtocolError(RemoteError):
    """Violation by the peer; the connection must be closed."""

    code = "REMOTE_PROTOCOL"


class HostilePath(ProtocolError):
    """A path from a peer that is not a plain relative path inside the replicated tree (I9)."""


class ConnectionFailed(RemoteError):
    """Unreachable server or lost connection; with ``sent`` a request may have taken effect."""

    code = "REMOTE_UNREACHABLE"

    def __init__(self, message: str, *, sent: bool = False, code: str | None = None) -> None:
        super().__init__(message, code=code or ("REMOTE_UNKNOWN_OUTCOME" if sent else None))
        self.sent = sent


class Rejected(RemoteError):
    """Code and message of a ``Refused``, ``Bye`` or HTTP response."""


class Misuse(RemoteError):
    code = "REMOTE_UNSUPPORTED"


class StorageError(RemoteError):
    code = "REMOTE_STORAGE"


@contextmanager
def unknown_if_sent(was_sent: bool) -> Iterator[None]:
    """Turn an error before sending into an unknown outcome if an earlier attempt may have sent the request (I6)."""
    try:
        yield
    except RemoteError as error:
        if not was_sent:
            raise
        message = f"the command may have taken effect, look before you repeat it: {error.message}"
        raise ConnectionFailed(message, sent=True) from error


def error_from_code(message: str, code: object) -> RemoteError:
    """Return the error that another process reported by code; an unknown code becomes ``REMOTE_FAILED``."""
    if code in ("REMOTE_UNREACHABLE", "REMOTE_UNKNOWN_OUTCOME"):
        return ConnectionFailed(message, sent=code == "REMOTE_UNKNOWN_OUTCOME")
    if code == "REMOTE_STORAGE":
        return StorageError(message)
    return Rejected(message, code=code if isinstance(code, str) and code in CODES else "REMOTE_FAILED")
