"""Everything that can go wrong, by whose fault it is.

    RemoteError
    |-- ProtocolError       the peer broke the protocol: the connection ends, nothing else does
    |   `-- HostilePath     a path that would leave the replicated tree (I9)
    |-- ConnectionFailed    the server could not be reached, or was lost half way
    |-- Rejected            the server answered, and said no
    |-- Misuse              this command can't be done here, and nothing was touched
    `-- StorageError        a file or the journal could not be read or written

Every error carries ``code``, one of ``CODES``, and a message of one line that says what to do next. Expected
outcomes (a merge conflict, a task that lattice refuses) are return values, not errors.
"""

__all__ = [
    "CODES",
    "ConnectionFailed",
    "HostilePath",
    "Misuse",
    "ProtocolError",
    "Rejected",
    "RemoteError",
    "StorageError",
    "as_told",
    "one_line",
]

CODES = {
    "REMOTE_UNREACHABLE": "the server is out of reach",
    "REMOTE_UNKNOWN_OUTCOME": "the connection was lost after the request was sent; it may have taken effect",
    "REMOTE_UNAUTHORIZED": "no token, or one the server does not know",
    "REMOTE_UNTRUSTED": "this user has not named that server, or nobody known vouches for it: no token was sent",
    "REMOTE_FORBIDDEN": "the token is not for this project or this actor",
    "REMOTE_NOT_FOUND": "the server has no such project",
    "REMOTE_GONE": "the changes that were asked for are not kept any more, or never were there",
    "REMOTE_VERSION": "the two sides speak different versions; the message says which to upgrade",
    "REMOTE_UNSUPPORTED": "this command, or one of its arguments, can't be used in a remote project",
    "REMOTE_NOT_UPLOADED": "what a request refers to was not uploaded, or is gone: upload it again",
    "REMOTE_STALE_BASE": "the server's text is not the one that was named by its digest: send that whole",
    "REMOTE_INVALID": "what a program wanted to write is not valid; nothing was changed",
    "REMOTE_TOO_LARGE": "a frame or file over the server's limit",
    "REMOTE_PROTOCOL": "the peer sent something that the protocol does not allow",
    "REMOTE_BUSY": "the server can't take the request now; retry later",
    "REMOTE_FAILED": "the command failed on the server; the message says whether it took effect",
    "REMOTE_STORAGE": "a file could not be read or written",
    "REMOTE_GUARD": "a local command tried to write into the cache",
    "REMOTE_SHUTDOWN": "the server is stopping; retry after the time it names",
}
"""Every code that travels in ``Refused`` and ``Bye`` frames or is shown to a user, with its meaning."""


_MAX_MESSAGE = 2000


def one_line(text: str) -> str:
    """Return ``text``, which a peer may have written, as one bounded line that does nothing to a terminal."""
    return "".join(c if c.isprintable() else " " for c in text[:_MAX_MESSAGE]).strip()


class RemoteError(Exception):
    """The root: ``code`` is one of ``CODES``, ``message`` is one printable line for a person."""

    code = "REMOTE_FAILED"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        self.message = one_line(message)
        super().__init__(self.message)
        if code is not None:
            self.code = code


class ProtocolError(RemoteError):
    """The peer sent what the protocol does not allow; the connection can't go on."""

    code = "REMOTE_PROTOCOL"


class HostilePath(ProtocolError):
    """A path from a peer that is not a plain relative path inside the replicated tree (I9)."""


class ConnectionFailed(RemoteError):
    """The server could not be reached. ``sent`` tells whether a request may have taken effect."""

    code = "REMOTE_UNREACHABLE"

    def __init__(self, message: str, *, sent: bool = False, code: str | None = None) -> None:
        super().__init__(message, code=code or ("REMOTE_UNKNOWN_OUTCOME" if sent else None))
        self.sent = sent


class Rejected(RemoteError):
    """The server's own no: ``code`` and message come from its ``Refused``, ``Bye`` or HTTP answer."""


class Misuse(RemoteError):
    """This can't be done here; nothing was touched."""

    code = "REMOTE_UNSUPPORTED"


class StorageError(RemoteError):
    """A file, or the journal, could not be read or written."""

    code = "REMOTE_STORAGE"


def as_told(message: str, code: object) -> RemoteError:
    """Return an error that another process tells of by its code; an unknown code counts as ``REMOTE_FAILED``."""
    if code in ("REMOTE_UNREACHABLE", "REMOTE_UNKNOWN_OUTCOME"):
        return ConnectionFailed(message, sent=code == "REMOTE_UNKNOWN_OUTCOME")
    if code == "REMOTE_STORAGE":
        return StorageError(message)
    return Rejected(message, code=code if isinstance(code, str) and code in CODES else "REMOTE_FAILED")
