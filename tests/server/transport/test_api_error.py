"""Error responses over plain HTTP: status, headers that clients obey, and a body in our form (SPEC 2.2)."""

import json
from http import HTTPStatus

import pytest

from lattice_remote.errors import RemoteError
from lattice_remote.server.transport.api_error import ApiError


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (ApiError(HTTPStatus.UNAUTHORIZED, "REMOTE_UNAUTHORIZED", "m"), {"WWW-Authenticate": "Bearer"}),
        (ApiError(HTTPStatus.UPGRADE_REQUIRED, "REMOTE_PROTOCOL", "m"), {"Upgrade": "websocket"}),
        (ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "REMOTE_BUSY", "m", retry_after_s=0), {"Retry-After": "0"}),
        (ApiError(HTTPStatus.NOT_FOUND, "REMOTE_NOT_FOUND", "m"), {}),
    ],
)
def test_an_error_has_the_headers_of_its_kind(error: ApiError, headers: dict[str, str]) -> None:
    assert error.headers == {"Content-Type": "application/json", "Connection": "close", **headers}
    head, _, body = error.raw.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    assert first.split()[:2] == ["HTTP/1.1", str(error.status.value)]
    assert dict(line.split(": ") for line in lines) == {**error.headers, "Content-Length": str(len(body))}
    assert json.loads(body) == {"ok": False, "error": {"code": error.code, "message": "m"}}


@pytest.mark.parametrize(
    ("code", "status", "retry_after_s"),
    [
        ("REMOTE_BUSY", 503, 1),
        ("REMOTE_STORAGE", 503, 1),
        ("REMOTE_FORBIDDEN", 403, None),
        ("REMOTE_UNREACHABLE", 500, None),
    ],
)
def test_an_error_of_an_admitted_request_keeps_its_connection(
    code: str, status: int, retry_after_s: int | None
) -> None:
    error = ApiError.from_remote_error(RemoteError("m", code=code))
    assert (error.status, error.code, error.retry_after_s) == (status, code, retry_after_s)
    assert "Connection" not in error.headers and ("Retry-After" in error.headers) == (retry_after_s is not None)
