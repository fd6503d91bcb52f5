"""``lattice dashboard`` in a remote project: lattice's own server and page, whose writes run on the project's server.

Lattice's handlers answer reads from the cache, and run each POST on the server; its change is then in the cache. Only
requests that start a program, such as an editor, run on this machine. Cross-site requests are refused: they would act
in the user's name on a shared project.
"""

import json
import os
import re
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import HTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from lattice.dashboard import server as lattices

from lattice_remote import livepage
from lattice_remote.client.agent_client import agent_enabled, call, request, send_request
from lattice_remote.client.guard import allow_writes
from lattice_remote.errors import RemoteError
from lattice_remote.files import Signature, signature_of

__all__ = ["CacheWatcher", "State", "remote_dashboard"]

_LOOK_S = 0.1
_ASK_S = 2.0
_ASK_WITHOUT_AGENT_S = 5.0
"""Interval of status requests without an agent: each connects and updates the cache."""

State = tuple[str, str]
"""A text that differs after each change, and the reason why the cache may be behind ("" if current)."""


class CacheWatcher:
    """Watcher of one cache, for any threads; a context manager."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._file = os.path.join(directory, "cache_state.json")
        self._changed = threading.Condition()
        self._waiting = 0
        self._state: State = ("", "")
        self._seen: Signature | None = None  # the state file's signature at the last read
        self._position_text = ""  # its content then
        self._started = False
        self._closed = False

    def __enter__(self) -> Self:
        with self._changed:
            self._waiting += 1
            self._set((self._version(), self._state[1]))
            if not self._started:
                self._started = True
                for work in (self._look, self._ask):
                    threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._waiting -= 1

    def close(self) -> None:
        """Wake every waiter; from now on they get None."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait(self, known: State | None, timeout_s: float) -> State | None:
        """Return the state once it differs from ``known``, or after the timeout; None once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._state != known, timeout_s)
            return None if self._closed else self._state

    def _goes_on(self, delay_s: float) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed, delay_s)
            self._changed.wait_for(lambda: self._closed or self._waiting)
            return not self._closed

    def _look(self) -> None:
        while self._goes_on(_LOOK_S):
            version = self._version()
            with self._changed:
                self._set((version, self._state[1]))

    def _version(self) -> str:
        """Return the position: the state file is also rewritten without a change."""
        try:
            if (signature := signature_of(os.stat(self._file))) != self._seen:
                with open(self._file, "rb") as file:
                    state = json.loads(file.read())
                self._seen, self._position_text = signature, f"{state['mark']}-{state['seq']}-{len(state['missing'])}"
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        return self._position_text

    def _ask(self) -> None:
        delay_s = 0.0
        while self._goes_on(delay_s):
            delay_s = _ASK_S if agent_enabled() else _ASK_WITHOUT_AGENT_S
            trouble = self._trouble()
            with self._changed:
                self._set((self._state[0], trouble))

    def _set(self, state: State) -> None:
        if state != self._state:
            self._state = state
            self._changed.notify_all()

    def _trouble(self) -> str:
        """Return why the cache may be behind, and keep an agent running."""
        try:
            answer = send_request(request("status" if agent_enabled() else "pull", self._directory))
        except RemoteError as failure:
            return failure.message
        except OSError as failure:
            return f"cannot reach the background agent: {failure}"
        error, age_s = answer.get("error"), answer.get("age_s")
        why = f"cannot reach the server ({error})" if error else answer.get("trouble")
        if not why or age_s is None:
            return why or ""
        return f"{why}; this is the state of {time.strftime('%H:%M', time.localtime(time.time() - age_s))}"


_HERE = re.compile(r"/api/tasks/[^/]+/open-(?:notes|plans)")
"""Starts an editor on a file of the cache; the save is an ordinary edit."""
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_MAX_STREAMS = 64
_KEEP_ALIVE_S = 10.0
_PATIENCE_S = 60.0
"""A request that stalls for longer is aborted."""
_STATUSES = {
    "REMOTE_FORBIDDEN": 403,
    "REMOTE_UNAUTHORIZED": 403,
    "REMOTE_UNTRUSTED": 403,
    "REMOTE_UNSUPPORTED": 400,
    "REMOTE_PROTOCOL": 400,
    "REMOTE_TOO_LARGE": 413,
    "REMOTE_NOT_FOUND": 404,
    "REMOTE_UNREACHABLE": 503,
    "REMOTE_SHUTDOWN": 503,
    "REMOTE_BUSY": 503,
    "REMOTE_STORAGE": 503,
    "REMOTE_UNKNOWN_OUTCOME": 504,
}
"""HTTP status by error code; 502 for any other."""


@contextmanager
def remote_dashboard(directory: str) -> Iterator[None]:
    """Make ``lattice dashboard`` serve the cache at ``directory`` within this context."""

    def create_server(lattice_dir: Path, host: str, port: int, *, readonly: bool = False) -> HTTPServer:
        return _Server((host, port), _handler(lattice_dir, readonly=readonly), directory)

    before = lattices.create_server
    lattices.create_server = create_server
    try:
        yield
    finally:
        lattices.create_server = before


class _Server(socketserver.ThreadingMixIn, HTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: Any, directory: str) -> None:
        self.directory = directory
        self.watcher = CacheWatcher(directory)
        self.streams = 0
        super().__init__(address, handler)  # last: it closes the server if the port is taken

    def server_close(self) -> None:
        """End the streams too: pages reconnect."""
        self.watcher.close()
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def _handler(lattice_dir: Path, *, readonly: bool) -> Any:
    base: Any = lattices._make_handler_class(lattice_dir, readonly=readonly)

    class RemoteHandler(base):  # type: ignore[misc] # made at run time
        server: _Server
        timeout = _PATIENCE_S

        def do_GET(self) -> None:  # noqa: N802 - the base's own name
            path = urlsplit(self.path).path
            if not self._is_from_here():
                return
            if path == f"/{livepage.SCRIPT}":
                self._send(200, "application/javascript", livepage.script())
            elif path == f"/{livepage.STYLE}":
                self._send(200, "text/css", livepage.style())
            elif path == f"/{livepage.EVENTS}":
                self._stream()
            else:
                super().do_GET()

        def do_POST(self) -> None:  # noqa: N802 - the base's own name
            path = urlsplit(self.path).path.rstrip("/")
            if not self._is_from_here() or not self._is_from_our_page():
                return
            if self._readonly:
                super().do_POST()
            elif _HERE.fullmatch(path):
                with allow_writes("plans"):  # a missing plan is created from lattice's template
                    super().do_POST()
            else:
                self._forward(path)

        def _is_from_here(self) -> bool:
            """Refuse other host names, as after DNS rebinding."""
            bound, port = self.server.server_address[:2]
            if bound not in _LOOPBACK or _host(self.headers.get("Host", "")) in _LOOPBACK:
                return True
            self._deny(f"this dashboard is at http://127.0.0.1:{port}/ and under no other name")
            return False

        def _is_from_our_page(self) -> bool:
            """Refuse cross-site requests: only our page can send JSON."""
            origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "same-origin")
            kind = self.headers.get_content_type()
            is_ours = origin in (None, f"http://{self.headers.get('Host')}") and site in ("same-origin", "none")
            if is_ours and kind == "application/json":
                return True
            self._deny("only this dashboard's own page may write, with Content-Type: application/json")
            return False

        def _deny(self, why: str) -> None:
            self.close_connection = True
            self._send_json(403, lattices._err("FORBIDDEN", why))

        def _forward(self, path: str) -> None:
            length = self.headers.get("Content-Length", "0")
            if not length.isdecimal():
                self.headers.replace_header("Content-Length", "")  # a negative length would block the read
            if not length.isdecimal() or int(length) > lattices.MAX_REQUEST_BODY_BYTES:
                self._read_request_body()  # which reports the error
                return
            body = self.rfile.read(int(length)).decode(errors="surrogateescape")
            try:
                answer = call(self.server.directory, "dashboard", path or "/", body)
            except RemoteError as error:
                self._send_json(_STATUSES.get(error.code, 502), lattices._err(error.code, error.message))
                return
            self._send(answer.status, "application/json", answer.payload.encode())

        def _serve_static(self, filename: str, content_type: str) -> None:
            if filename == "index.html":
                self._send(200, content_type, livepage.with_script((lattices.STATIC_DIR / filename).read_bytes()))
            else:
                super()._serve_static(filename, content_type)

        def _send(self, status: int, content_type: str, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", f"{content_type}; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-cache")
            self.end_headers()
            self.wfile.write(data)

        def _stream(self) -> None:
            if self.server.streams >= _MAX_STREAMS:
                self._send_json(503, lattices._err("BUSY", "too many pages are open"))
                return
            self.server.streams += 1
            try:
                self._send_events()
            finally:
                self.server.streams -= 1

        def _send_events(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            known = None
            with self.server.watcher as watcher:
                while (state := watcher.wait(known, _KEEP_ALIVE_S)) is not None:
                    self.wfile.write(livepage.event(*state))
                    known = state

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's own word
            if self.command != "GET":
                super().log_message(format, *args)

    return RemoteHandler


def _host(header: str) -> str | None:
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None
