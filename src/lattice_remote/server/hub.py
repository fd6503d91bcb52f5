"""Everything that a running server holds: its tokens, its projects, its clients, and what goes on in the background."""

import asyncio
import contextlib
import logging
import re
from collections.abc import Coroutine, Sequence
from http import HTTPStatus

import msgspec

from lattice_remote.errors import RemoteError
from lattice_remote.protocol.messages import SUBPROTOCOL, Bye
from lattice_remote.server.datadir import DataDir
from lattice_remote.server.handoff import Handoff, Request, Response, http_answer
from lattice_remote.server.hooks import HookRunner
from lattice_remote.server.peer import Peer
from lattice_remote.server.project import Bounds, Project
from lattice_remote.server.tokens import Token, TokenStore
from lattice_remote.server.watch import watch_tree
from lattice_remote.server.writer import WORKER_COMMAND

__all__ = ["Hub", "error_body"]

TOKEN_CHECK_S = 0.25
"""How often to look whether ``tokens.json`` has changed: a revoked token's connections end within a second."""
RESCAN_S = 300.0
"""How often to look at all files of a project, for edits that the system did not report."""
_DRAIN_S = 1.0
_STOP_S = 0.5

_SOCKET_PATH = re.compile(r"/projects/([^/?#]+)/ws(?:\?.*)?")

_log = logging.getLogger(__name__)


def error_body(code: str, message: str) -> bytes:
    """Return the JSON body of an HTTP answer that refuses."""
    return msgspec.json.encode({"error": {"code": code, "message": message}})


class Hub:
    """See the module's text. Made inside a running loop; ``start()``, then ``stop()`` once."""

    def __init__(
        self, data: DataDir, *, bounds: Bounds | None = None, worker_command: Sequence[str] = WORKER_COMMAND
    ) -> None:
        self.data = data
        self.stopping = False
        """Set while the server stops: nobody is let in any more."""
        self._config = data.config()
        self._bounds = bounds
        self._worker_command = worker_command
        self._tokens = TokenStore(data.tokens)
        self._tokens_error = ""  # what was logged last, so that it is logged once
        self._projects: dict[str, Project] = {}
        self._peers: set[Peer] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watching_ends = asyncio.Event()
        self._alone = asyncio.Event()

    def start(self) -> None:
        """Read the tokens and begin the work in the background. Projects start when they are first asked for.

        Raises:
            StorageError: ``tokens.json`` cannot be read.
        """
        self._tokens.refresh()
        self._keep("tokens", self._watch_tokens())
        self._keep("rescan", self._rescan())

    async def stop(self) -> None:
        """Finish what runs, tell the clients when to come back, end the workers; takes about 1.5 s at the most."""
        self.stopping = True
        projects = self._projects.values()
        await asyncio.gather(*(project.drain(_DRAIN_S) for project in projects))
        for peer in tuple(self._peers):
            peer.end(Bye("REMOTE_SHUTDOWN", "the server is stopping", 1.0))
        self._watching_ends.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(project.stop(_STOP_S) for project in projects))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_STOP_S)

    # --- clients ---

    async def wait_until_alone(self, timeout_s: float) -> None:
        """Wait until every client is gone, or the time is over."""
        if self._peers:
            self._alone.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._alone.wait(), timeout_s)

    def check(self, connection: Handoff, request: Request) -> Response | None:
        """Decide on a request for a WebSocket: return a refusal, or None and leave token and slug on the connection."""
        matched = _SOCKET_PATH.fullmatch(request.path)
        if matched is None:
            return _refusal(HTTPStatus.NOT_FOUND, "REMOTE_NOT_FOUND", "there is nothing at this path")
        if self.stopping:
            return _refusal(HTTPStatus.SERVICE_UNAVAILABLE, "REMOTE_SHUTDOWN", "the server is stopping; try again")
        self._refresh_tokens()  # so that a token works as soon as it is made
        token = self._tokens.authenticate(_bearer(request))
        if token is None:
            return _refusal(HTTPStatus.UNAUTHORIZED, "REMOTE_UNAUTHORIZED", "no token, or one that is not known here")
        slug = matched[1]
        if not self.data.has_project(slug):
            return _refusal(HTTPStatus.NOT_FOUND, "REMOTE_NOT_FOUND", f"there is no project {slug!r} on this server")
        if slug not in token.projects:
            mine = ", ".join(token.projects)
            return _refusal(HTTPStatus.FORBIDDEN, "REMOTE_FORBIDDEN", f"this token is for {mine}; not for {slug}")
        if SUBPROTOCOL not in ",".join(request.headers.get_all("Sec-WebSocket-Protocol")).replace(" ", "").split(","):
            return _refusal(
                HTTPStatus.UPGRADE_REQUIRED, "REMOTE_VERSION", f"this server speaks {SUBPROTOCOL}; upgrade the client"
            )
        project = self.project(slug)
        if project.failure is not None:
            return _refusal(HTTPStatus.SERVICE_UNAVAILABLE, "REMOTE_STORAGE", project.failure.message)
        connection.who = (token, project)
        return None

    async def serve(self, connection: Handoff) -> None:
        """Serve one client, that ``check()`` has let in, to its end."""
        token, project = connection.who
        peer = Peer(connection, token, project)
        self._peers.add(peer)
        try:
            if self._tokens.is_valid(token):  # it may have been revoked since the check
                await peer.run()
            else:
                peer.end(_revoked(token))
        finally:
            self._peers.discard(peer)
            if not self._peers:
                self._alone.set()

    def project(self, slug: str) -> Project:
        """Return a project that exists on disk, started if it was not yet."""
        project = self._projects.get(slug)
        if project is None:
            paths = self.data.project(slug)
            hooks = HookRunner(slug, paths.root) if self._config.hooks else None
            project = Project(slug, paths, hooks=hooks, bounds=self._bounds, worker_command=self._worker_command)
            self._projects[slug] = project
            project.start()
            self._keep(f"watch {slug}", watch_tree(paths.lattice, project.files_touched, self._watching_ends))
        return project

    # --- in the background ---

    async def _watch_tokens(self) -> None:
        while True:
            await asyncio.sleep(TOKEN_CHECK_S)
            self._refresh_tokens()

    def _refresh_tokens(self) -> None:
        """Read the tokens if their file has changed, and send away whose token is no more what it was."""
        try:
            changed = self._tokens.refresh()
        except RemoteError as error:
            if error.message != self._tokens_error:
                _log.error("the tokens stay as they were: %s", error.message)
            self._tokens_error = error.message
            return
        self._tokens_error = ""
        for peer in tuple(self._peers) if changed else ():
            if not self._tokens.is_valid(peer.token):
                peer.end(_revoked(peer.token))

    async def _rescan(self) -> None:
        while True:
            await asyncio.sleep(RESCAN_S)
            for project in self._projects.values():
                project.files_touched(None)

    def _keep(self, name: str, work: Coroutine[None, None, None]) -> None:
        """Run work in the background, keep a reference to it, and log its failure."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._forget_task)

    def _forget_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("background work %r ended", task.get_name(), exc_info=error)


def _bearer(request: Request) -> str:
    """Return the token's text, "" when there is none or more than one."""
    values = request.headers.get_all("Authorization")
    scheme, _, text = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    return text.strip() if scheme.lower() == "bearer" else ""


def _refusal(status: HTTPStatus, code: str, message: str) -> Response:
    return http_answer(status, status.phrase, error_body(code, message))


def _revoked(token: Token) -> Bye:
    return Bye("REMOTE_UNAUTHORIZED", f"token {token.id} was revoked or changed")
