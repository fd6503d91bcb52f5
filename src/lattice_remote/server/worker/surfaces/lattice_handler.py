"""The request handler of lattice's own dashboard, without its socket."""

import io
from functools import cache
from pathlib import Path
from typing import Any

from lattice_remote.server.worker.surfaces.surface import Answer

__all__ = ["handler_class"]


@cache
def handler_class(lattice_dir: Path) -> Any:
    """Return lattice's request handler for this project: made with a path and a body, it answers one request.

    ``get()`` and ``post()`` return the answer; its ``content_type`` and ``etag`` are there afterwards.
    """
    from lattice.dashboard.server import _make_handler_class

    lattices: Any = _make_handler_class(lattice_dir)

    class Handler(lattices):  # type: ignore[misc] # made at run time
        def __init__(self, path: str, body: bytes) -> None:
            self.path, self.headers = path, {"Content-Length": str(len(body))}
            self.rfile, self.wfile = io.BytesIO(body), io.BytesIO()
            self.status, self.content_type, self.etag = 500, "", ""

        def get(self) -> Answer:
            self.do_GET()
            return Answer(self.status, self.wfile.getvalue())

        def post(self) -> Answer:
            self.do_POST()
            return Answer(self.status, self.wfile.getvalue())

        def send_response(self, code: int, message: str | None = None) -> None:  # noqa: ARG002 - the base's signature
            self.status = int(code)

        def send_header(self, keyword: str, value: str) -> None:
            match keyword.lower():
                case "content-type":
                    self.content_type = value
                case "etag":
                    self.etag = value

        def end_headers(self) -> None:
            """There are no others that anybody reads."""

    return Handler
