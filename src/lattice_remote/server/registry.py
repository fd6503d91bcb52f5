"""Project registry of a running server: its projects, their clients and the background work."""

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import Literal, Protocol

import msgspec

from lattice_remote.file_watcher import FileWatcher
from lattice_remote.protocol.messages import SUBPROTOCOL, Bye
from lattice_remote.protocol.paths import is_replicated
from lattice_remote.server.auth import Authenticator, Login, bearer
from lattice_remote.server.config import Config
from lattice_remote.server.datadir import DataDir, closed_because
from lattice_remote.server.maintenance.project_commands import finish_renames
from lattice_remote.server.project.child_process import Template
from lattice_remote.server.project.connection import ClientConnection
from lattice_remote.server.project.hooks import HookRunner
from lattice_remote.server.project.metrics import Metrics
from lattice_remote.server.project.order import Order
from lattice_remote.server.project.project import Project
from lattice_remote.server.project.queue import QueueLimits
from lattice_remote.server.project.worker_process import WORKER_COMMAND
from lattice_remote.server.transport.admission import AdmissionControl, ResponseBudget
from lattice_remote.server.transport.api_error import ApiError
from lattice_remote.server.transport.websocket import Handoff, Request, Response, SendBudget, http_answer

__all__ = ["STOP_S", "ProjectRegistry", "State"]

State = Literal["ready", "starting", "closed", "failed"]
"""``closed``: an administrator's command holds it for a moment."""

_CLOSING_CHECK_S = 0.25
RESCAN_S = 300.0
"""For edits that the system did not report."""
STOP_S = 1.5
"""With all its waits. The process then needs some 0.2 s to end: under 2 s in all."""
_DRAIN_S = 0.7
_WORKER_STOP_S = 0.3
_TASKS_STOP_S = 0.2
_WATCH_DEBOUNCE_MS = 500  # maximum delay while changes keep coming
_WATCH_STEP_MS = 100  # quiet time after which changes are reported

_SOCKET_PATH = re.compile(r"/projects/([^/?#]+)/ws(?:\?.*)?")

_log = logging.getLogger(__name__)


class Ongoing(Protocol):
    login: Login | None
    project: str
    since: float
    is_stream: bool

    @property
    def route(self) -> str: ...

    @property
    def address(self) -> str: ...


class ClusterNode(Protocol):
    """This server as a node of a cluster."""

    def admit(self, connection: Handoff, request: Request) -> Callable[[], Awaitable[None]] | ApiError:
        """Return the function that serves another node's connection, or its refusal."""

    def refusal_of(self, slug: str) -> ApiError | None:
        """Return the refusal of a project that the cluster does not have here; None if it is served."""

    def order_of(self, slug: str) -> Order:
        """Return the order of a project, for one start of it."""


class ProjectRegistry:
    """The projects of one server. Made inside a running loop; ``start()``, then ``stop()`` once.

    Raises Misuse if ``config``, by default that of the directory, is invalid.
    """

    def __init__(
        self,
        data: DataDir,
        *,
        config: Config | None = None,
        worker_command: Sequence[str] = WORKER_COMMAND,
        template: Template | None = None,
    ) -> None:
        self.data = data
        self.auth = Authenticator(data)
        self.config = config or data.config()
        self.admission = AdmissionControl(self.config.limits, self.config.trusted_proxies)
        self.responses = ResponseBudget(self.config.limits)
        self.send_budget = SendBudget()
        self.metrics = Metrics()
        limits = self.config.limits
        self._bounds = QueueLimits(command_s=limits.command_seconds, per_token=limits.requests_per_token)
        settings = {"--journal": self.config.journal, "--plugin-commands": self.config.plugin_commands}
        given = (part for name, value in settings.items() for part in (name, msgspec.json.encode(value).decode()))
        self._worker_command = (*worker_command, *given)
        self.address = ""
        self.template = template or Template()
        self._projects: dict[str, Project] = {}
        self._watchers: dict[str, FileWatcher] = {}
        self._releasing: set[str] = set()
        self._peers: set[ClientConnection] = set()
        self.ongoing: set[Ongoing] = set()
        self.cluster: ClusterNode | None = None
        """None on a server of its own."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._alone = asyncio.Event()

    def start(self) -> None:
        """Read the tokens and start the background work. Raises StorageError."""
        if moved := finish_renames(self.data):
            _log.info("updated %d tokens to the new names of renamed projects", moved)
        self.auth.start()
        for path in self.data.writable_by_everybody():
            _log.warning("any user on this machine can change %s; run: chmod o-w %s", path, path)
        self._keep("tokens", self.auth.watch())
        self._keep("uses", self.auth.note_uses())
        self._keep("rescan", self._rescan())
        self._keep("closing", self._watch_closing())

    async def stop(self) -> None:
        """Finish running requests, send the clients a retry time, end the workers; takes 1.2 s at most.

        A request that is not done by then is undone when the project is next opened.
        """
        self.auth.stopping = True
        projects = self._projects.values()
        await asyncio.gather(*(project.drain(_DRAIN_S) for project in projects))
        self.auth.end_all(Bye("REMOTE_SHUTDOWN", "the server is stopping", 1.0))
        for watcher in self._watchers.values():
            watcher.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(project.stop(_WORKER_STOP_S) for project in projects))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_TASKS_STOP_S)
        self.template.close()
        await self.auth.save_uses()

    @property
    def stopping(self) -> bool:
        return self.auth.stopping

    @property
    def projects(self) -> Mapping[str, Project]:
        return self._projects

    @property
    def peers(self) -> Collection[ClientConnection]:
        return self._peers

    async def wait_until_alone(self, timeout_s: float) -> None:
        if self._peers:
            self._alone.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._alone.wait(), timeout_s)

    def check(self, connection: Handoff, request: Request) -> Response | None:
        """Return the refusal of a WebSocket, or None, with ``who`` set on the connection."""
        admitted: object
        if self.cluster is not None and request.path.startswith("/cluster/"):
            admitted = self.cluster.admit(connection, request)
        else:
            admitted = self._admit(connection, request)
        if isinstance(admitted, ApiError):
            self.metrics.connections_refused.labels(admitted.code).inc()
            return http_answer(admitted)
        connection.who = admitted
        return None

    def _admit(self, connection: Handoff, request: Request) -> tuple[Login, Project] | ApiError:
        matched = _SOCKET_PATH.fullmatch(request.path)
        if matched is None:
            return ApiError(HTTPStatus.NOT_FOUND, "REMOTE_NOT_FOUND", "not found")
        headers, quota = request.headers, connection.quota
        authorization = headers.get_all("Authorization")
        refusal = quota.enter(headers.get_all("X-Forwarded-For"), self.auth.shown(authorization))
        login = refusal or self.auth.identify(quota, bearer(authorization))
        if isinstance(login, ApiError):
            return login
        project = self.enter(login, matched[1])
        if isinstance(project, ApiError):
            return project
        if SUBPROTOCOL not in ",".join(headers.get_all("Sec-WebSocket-Protocol")).replace(" ", "").split(","):
            why = f"this server speaks {SUBPROTOCOL}; upgrade the client"
            return ApiError(HTTPStatus.UPGRADE_REQUIRED, "REMOTE_VERSION", why)
        return quota.admit(login.token.id) or (login, project)

    def enter(self, login: Login, slug: str) -> Project | ApiError:
        """Return a project that a client may use; ``slug`` may be any string (I9)."""
        if (refusal := self._refused_project(login, slug)) is not None:
            return refusal
        project = self.project(slug)
        if project.failure is not None:
            return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "REMOTE_STORAGE", project.failure.message)
        if why := project.order.unavailable:
            return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "REMOTE_BUSY", why, retry_after_s=1)
        return project

    def _refused_project(self, login: Login, slug: str) -> ApiError | None:
        """Return the refusal if the token does not cover a project, or it is not available; reveals no others."""
        missing = HTTPStatus.NOT_FOUND, "REMOTE_NOT_FOUND"
        if slug not in login.token.projects:
            now = self.data.renamed().get(slug)
            if now in login.token.projects:
                why = f"project {slug!r} is now called {now!r}: lattice remote set-url origin URL --project {now}"
                return ApiError(*missing, why)
            why = f"this token is for {', '.join(login.token.projects) or 'metrics'}, not for {slug!r}"
            return ApiError(HTTPStatus.FORBIDDEN, "REMOTE_FORBIDDEN", why)
        if self.cluster is not None and (refusal := self.cluster.refusal_of(slug)) is not None:
            return refusal
        if not self.data.has_project(slug):
            if self.data.is_archived(slug):
                return ApiError(*missing, f"project {slug!r} is archived; ask its administrator")
            return ApiError(*missing, f"there is no project {slug!r} on this server")
        closed = closed_because(self.data.project(slug).root)
        if closed is not None or slug in self._releasing:
            why = closed or "the project is being closed; try again in a moment"
            return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "REMOTE_BUSY", why, retry_after_s=1)
        return None

    def state_of(self, slug: str) -> State:
        if slug in self._releasing or closed_because(self.data.project(slug).root) is not None:
            return "closed"
        project = self._projects.get(slug)
        if project is None or (project.is_ready and project.failure is None):
            return "ready"
        return "starting" if project.failure is None else "failed"

    async def serve(self, connection: Handoff) -> None:
        if callable(connection.who):
            await connection.who()
            return
        login, project = connection.who
        peer = ClientConnection(connection, login.token, project, self.send_budget)
        self._peers.add(peer)
        try:
            with self.auth.staying(login, peer.end):
                await peer.run()
        finally:
            self._peers.discard(peer)
            if not self._peers:
                self._alone.set()

    def project(self, slug: str) -> Project:
        project = self._projects.get(slug)
        if project is None:
            paths = self.data.project(slug)
            hooks = HookRunner(slug, paths.root) if self.config.hooks else None
            project = Project(
                slug,
                paths,
                hooks=hooks,
                bounds=self._bounds,
                config=self.config,
                worker_command=self._worker_command,
                metrics=self.metrics.of(slug),
                start_child=self.template.start_child,
                order=self.cluster.order_of(slug) if self.cluster is not None else None,
            )
            self._projects[slug] = project
            project.start()
            watcher = FileWatcher(step_ms=_WATCH_STEP_MS, debounce_ms=_WATCH_DEBOUNCE_MS, is_scanned=True)
            watcher.add(str(paths.lattice), partial(_note_changes, project))
            self._watchers[slug] = watcher
        return project

    async def release(self, slug: str, why: str) -> None:
        project = self._projects.get(slug)
        if project is not None and slug not in self._releasing:
            self._releasing.add(slug)
            await self._release(slug, project, why)

    async def _watch_closing(self) -> None:
        """Release the projects that an administrator's command wants, see ``datadir``."""
        while True:
            await asyncio.sleep(_CLOSING_CHECK_S)
            for slug, project in tuple(self._projects.items()):
                if (why := closed_because(project.paths.root)) is not None and slug not in self._releasing:
                    self._releasing.add(slug)
                    self._keep(f"release {slug}", self._release(slug, project, why))

    async def _release(self, slug: str, project: Project, why: str) -> None:
        _log.info("%s: closed: %s", slug, why)
        try:
            await project.drain(_DRAIN_S)
            bye = Bye("REMOTE_BUSY", why, 1.0)
            for peer in tuple(self._peers):
                if peer.project is project:
                    peer.end(bye)
            project.dismiss(bye)  # and the HTTP clients
            self._watchers.pop(slug).close()
            await project.stop(_WORKER_STOP_S)
        finally:
            del self._projects[slug]
            self._releasing.discard(slug)

    async def _rescan(self) -> None:
        while True:
            await asyncio.sleep(RESCAN_S)
            for project in tuple(self._projects.values()):
                project.files_touched(None)
                project.uploads.sweep()

    def _keep(self, name: str, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._forget_task)

    def _forget_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("background work %r ended", task.get_name(), exc_info=error)


def _note_changes(project: Project, paths: set[str] | None) -> None:
    replicated = None if paths is None else set(filter(is_replicated, paths))
    if replicated is None or any((project.paths.lattice / path).is_dir() for path in replicated):
        project.files_touched(None)  # files moved in with a directory are not reported one by one
    elif replicated:
        project.files_touched(replicated)
