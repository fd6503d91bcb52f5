"""A request that is turned away before it is anything more: one HTTP answer, the same on every way in (SPEC 2.2)."""

from http import HTTPStatus

import msgspec

__all__ = ["Refusal"]


class Refusal(msgspec.Struct, frozen=True):
    """Why, as a status, one of ``errors.CODES`` and a line for people; and in how many seconds to come back."""

    status: HTTPStatus
    code: str
    message: str
    retry_after_s: int | None = None

    @property
    def body(self) -> bytes:
        """The answer's body, JSON."""
        return msgspec.json.encode({"ok": False, "error": {"code": self.code, "message": self.message}})

    @property
    def headers(self) -> dict[str, str]:
        """The answer's headers, but for the body's length. The connection ends with the answer."""
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self.status is HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status is HTTPStatus.UPGRADE_REQUIRED:
            headers["Upgrade"] = "websocket"
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        return headers

    @property
    def raw(self) -> bytes:
        """The whole answer, as it goes on the wire."""
        headers = {**self.headers, "Content-Length": str(len(self.body))}
        lines = [f"HTTP/1.1 {self.status.value} {self.status.phrase}", *(f"{k}: {v}" for k, v in headers.items())]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + self.body
