"""HTTP error responses, for plain HTTP and refused upgrades (SPEC 2.2)."""

from http import HTTPStatus

import msgspec

from lattice_remote.errors import RemoteError

__all__ = ["ApiError"]

_STATUSES = {
    "REMOTE_UNAUTHORIZED": HTTPStatus.UNAUTHORIZED,
    "REMOTE_FORBIDDEN": HTTPStatus.FORBIDDEN,
    "REMOTE_NOT_FOUND": HTTPStatus.NOT_FOUND,
    "REMOTE_GONE": HTTPStatus.GONE,
    "REMOTE_UNSUPPORTED": HTTPStatus.UNPROCESSABLE_ENTITY,
    "REMOTE_INVALID": HTTPStatus.UNPROCESSABLE_ENTITY,
    "REMOTE_STALE_BASE": HTTPStatus.PRECONDITION_FAILED,
    "REMOTE_PROTOCOL": HTTPStatus.BAD_REQUEST,
    "REMOTE_TOO_LARGE": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "REMOTE_BUSY": HTTPStatus.SERVICE_UNAVAILABLE,
    "REMOTE_SHUTDOWN": HTTPStatus.SERVICE_UNAVAILABLE,
    "REMOTE_STORAGE": HTTPStatus.SERVICE_UNAVAILABLE,
    "REMOTE_UNKNOWN_OUTCOME": HTTPStatus.SERVICE_UNAVAILABLE,
    "REMOTE_FAILED": HTTPStatus.INTERNAL_SERVER_ERROR,
}
"""500 for any other."""
_RETRYABLE = {"REMOTE_BUSY", "REMOTE_SHUTDOWN", "REMOTE_STORAGE"}


class ApiError(Exception):
    """A request that ends with an error response, returned as a value or raised in a handler.

    Make a new one for each request: a raised exception keeps its traceback.

    Attributes:
        code: one of ``errors.CODES``, or a code of lattice.
        closes: whether the response ends the connection.
    """

    def __init__(
        self, status: HTTPStatus, code: str, message: str, retry_after_s: int | None = None, *, closes: bool = True
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.closes = closes

    @classmethod
    def from_remote_error(cls, error: RemoteError) -> "ApiError":
        status = _STATUSES.get(error.code, HTTPStatus.INTERNAL_SERVER_ERROR)
        return cls(status, error.code, error.message, 1 if error.code in _RETRYABLE else None, closes=False)

    @property
    def body(self) -> bytes:
        return msgspec.json.encode({"ok": False, "error": {"code": self.code, "message": self.message}})

    @property
    def headers(self) -> dict[str, str]:
        """Without ``Content-Length``."""
        headers = {"Content-Type": "application/json"}
        if self.closes:
            headers["Connection"] = "close"
        if self.status is HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status is HTTPStatus.UPGRADE_REQUIRED:
            headers["Upgrade"] = "websocket"
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        return headers

    @property
    def raw(self) -> bytes:
        """In HTTP/1.1."""
        headers = {**self.headers, "Content-Length": str(len(self.body))}
        lines = [f"HTTP/1.1 {self.status.value} {self.status.phrase}", *(f"{k}: {v}" for k, v in headers.items())]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + self.body
