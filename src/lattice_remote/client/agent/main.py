"""Agent process: one per user, package version and environment, for all of that user's caches there.

Commands start it with ``python -m lattice_remote.client.agent.main``. It listens on a Unix socket in a private
directory (``agent_runtime``) for requests, one JSON object a line (``service``). During a request it sends
``{"progress": ...}`` lines: one at once, then one every two seconds. It refuses requests from another environment, or
for another cache than the one at that path. It exits when it is idle, when its environment is gone, and when its
package is replaced: the next command starts the new version.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from typing import Any

from filelock import FileLock, Timeout

import lattice_remote
from lattice_remote import __version__
from lattice_remote.client import agent_runtime, credentials, trusted_servers
from lattice_remote.client.agent.service import Service, answered
from lattice_remote.errors import RemoteError, unknown_if_sent
from lattice_remote.file_watcher import FileWatcher
from lattice_remote.files import Signature, signature_of
from lattice_remote.memory import return_large_buffers

__all__ = ["Agent", "main"]

IDLE_ENV = "LATTICE_REMOTE_AGENT_IDLE_S"
DEFAULT_IDLE_S = 1800.0
MAX_REQUEST_BYTES = 64 * 1024 * 1024
_HEARTBEAT_S = 2.0
_SWEEP_INTERVAL_S = 1.0
_UNUSED_S = 30.0
"""An agent that never had a request exits sooner: it lost a race to one that has ended."""
_ALONE_S = 60.0
"""An agent alone in its namespaces, left behind by a sandbox, exits sooner."""
_TAKE_OVER_S, _TAKE_OVER_POLL_S = 8.0, 0.05
_LEFT_OVER_S = 3600.0
"""The files of a dead agent are kept for this long: its log may say why."""
_UMASK = 0o022
"""Fixed, not inherited from the command that starts the agent. ``safe_directory`` sets the modes in a cache."""
_MAX_LOG_BYTES, _KEPT_LOG_BYTES = 1024 * 1024, 64 * 1024
_log = logging.getLogger(__name__)


class Agent:
    def __init__(self, place: agent_runtime.Runtime, idle_s: float) -> None:
        self._place = place
        self._idle_s = idle_s
        self._services: dict[str, Service] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._connections: set[asyncio.Task[None]] = set()
        self._used_at = time.monotonic()
        self._was_used = False
        self._started_at = time.time()
        self._stopping = asyncio.Event()
        self._package = _package_signature()
        self._configuration = agent_runtime.configuration()
        self._looked_around_at = time.monotonic()
        self._watching = FileWatcher()
        self._turn = asyncio.Semaphore(1)

    async def run(self) -> None:
        """Serve until stopped, idle, or the socket is removed. The caller holds the lock."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._place.socket)
        server = await asyncio.start_unix_server(self._connected, self._place.socket, limit=MAX_REQUEST_BYTES)
        os.chmod(self._place.socket, 0o600)
        identity = os.stat(self._place.socket).st_ino
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stopping.set)
        try:
            while self._should_stay() and self._owns_socket(identity):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_SWEEP_INTERVAL_S):
                        await self._stopping.wait()
                self._sweep()
                _trim(self._place.log)
        finally:
            if self._owns_socket(identity):
                os.unlink(self._place.socket)  # first: later commands start a new agent
            server.close()
            await self._leave()

    async def _leave(self) -> None:
        if self._connections:
            await asyncio.wait(self._connections, timeout=1.0)
        for task in list(self._connections):
            task.cancel()
        self._watching.close()
        closing = [service.close() for service in self._services.values()]
        await asyncio.gather(*closing, *self._closing, *self._connections, return_exceptions=True)

    def _should_stay(self) -> bool:
        if _package_signature() != self._package:
            _log.info("the package was upgraded or removed; the next command starts another agent")
            return False
        if not self._is_at_home():
            _log.info(
                "the configuration directory was created, removed or replaced; the next command starts another agent"
            )
            return False
        return not self._stopping.is_set() and not self._is_idle()

    def _is_at_home(self) -> bool:
        return agent_runtime.configuration() == self._configuration

    def _is_idle(self) -> bool:
        if self._connections:
            self._used_at = time.monotonic()
        limit_s = self._idle_s if self._was_used else min(self._idle_s, _UNUSED_S)
        now = time.monotonic()
        if now - self._used_at > _ALONE_S and now - self._looked_around_at > _ALONE_S:
            self._looked_around_at = now
            if _is_alone():
                _log.info("no other process of this user is left in this sandbox")
                return True
        return now - self._used_at > limit_s

    def _owns_socket(self, identity: int) -> bool:
        try:
            return os.stat(self._place.socket).st_ino == identity
        except OSError:
            return False

    def _sweep(self) -> None:
        for directory, service in list(self._services.items()):
            unused = not self._connections and time.monotonic() - service.used_at > self._idle_s
            if service.is_stale() or unused:
                self._drop(directory)

    def _drop(self, directory: str) -> None:
        task = asyncio.get_running_loop().create_task(self._services.pop(directory).close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    # --- one connection ---

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "asyncio runs this as a task"
        self._connections.add(task)
        self._was_used = True
        try:
            # A client that disconnects or is interrupted is no error here.
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                while line := await reader.readline():
                    await self._serve(line, reader, writer)
        except ValueError:
            _log.warning("a request over %d bytes was refused", MAX_REQUEST_BYTES)
        finally:
            self._connections.discard(task)
            self._used_at = time.monotonic()
            writer.close()

    async def _serve(self, line: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def report(progress: dict[str, Any] | None) -> None:
            writer.write(json.dumps({"progress": progress}).encode() + b"\n")

        if (ready := self._ready_now(line)) is not None:
            writer.write(json.dumps(ready).encode() + b"\n")
            return
        report(None)  # at once, as a sign of life
        work = asyncio.ensure_future(answered(self._handle(line, report)))
        gone = asyncio.ensure_future(reader.read(1))
        try:
            while not work.done() and not gone.done():
                await asyncio.wait([work, gone], timeout=_HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    report(None)
            if work.done():
                writer.write(json.dumps(work.result()).encode() + b"\n")
                await writer.drain()
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    def _ready_now(self, line: bytes) -> dict[str, Any] | None:
        """Answer a read of a current cache without a task."""
        if not line.startswith(b'{"do": "ready"'):
            return None
        try:
            request = json.loads(line)
            service = self._services.get(request["directory"])
        except (ValueError, KeyError, TypeError):
            return None  # refused where all requests are handled
        if service is None or not self._is_mine(request) or service.is_stale() or not service.is_meant_by(request):
            return None
        answer = service.ready_now(request)
        return None if answer is None else {"ok": True, **answer}

    def _is_mine(self, request: dict[str, Any]) -> bool:
        return bool(request["agent"] == self._place.name) and self._is_at_home()

    async def _handle(self, line: bytes, report: Any) -> dict[str, Any]:
        try:
            request: dict[str, Any] = json.loads(line)
            if request["do"] == "agent-status":
                return self._status()
            if request["do"] == "agent-stop":
                self._stopping.set()
                return {"pid": os.getpid()}
            with unknown_if_sent("first_sent_at" in request):
                service = self._service(request) if self._is_mine(request) else None
            if service is None or not service.is_meant_by(request):
                return {"not_mine": True}
            return await service.handle(request, report)
        except RemoteError:
            raise
        except Exception as error:
            # A defect must be answered too, or the command would take the agent for dead.
            _log.exception("a request failed")
            raise RemoteError(f"the agent could not handle this request ({error!r}); see {self._place.log}") from error

    def _service(self, request: dict[str, Any]) -> Service:
        directory = os.path.realpath(request["directory"])
        service = self._services.get(directory)
        if service is not None and service.is_stale():
            self._drop(directory)
            service = None
        if service is None:
            service = Service(directory)
            service.start(request.get("token"), named=trusted_servers.from_environment(request.get("named")))
            service.look_after(self._watching, self._turn)
            self._services[directory] = service
        return service

    def _status(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "version": __version__,
            "configuration": credentials.directory(),
            "socket": self._place.socket,
            "log": self._place.log,
            "uptime_s": time.time() - self._started_at,
            "idle_exit_s": self._idle_s,
            "caches": [{"directory": d, **service.summary()} for d, service in sorted(self._services.items())],
        }


def _package_signature() -> Signature | None:
    """Return a signature that changes with an upgrade; None if the package is gone."""
    try:
        found = os.stat(str(lattice_remote.__file__))
    except OSError:
        return None
    return signature_of(found)


def _is_alone() -> bool:
    """Return whether only agents of this user are seen in these namespaces."""
    try:
        own = agent_runtime.namespaces()
        processes = [name for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]
    except OSError:
        return False
    for process in processes:
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if agent_runtime.namespaces(process) == own and not _is_agent(process):
                return False
    return True


def _is_agent(process: str) -> bool:
    with open(f"/proc/{process}/cmdline", "rb") as file:
        return f"\0{__spec__.name}\0".encode() in file.read()


def _remove_left_overs(place: agent_runtime.Runtime) -> None:
    """Remove what agents that ended long ago have left."""
    for directory in (place.directory, *agent_runtime.short_directories()):
        with contextlib.suppress(OSError):
            names = {name.rpartition(".")[0] for name in os.listdir(directory) if name.startswith("agent-")}
            for name in names - ({place.name} if directory == place.directory else set()):
                other = agent_runtime.Runtime(directory, name)
                lock = FileLock(other.lock, mode=0o600)
                with contextlib.suppress(OSError, Timeout), lock.acquire(timeout=0):
                    _remove_if_old(other)
            if directory != place.directory:
                os.rmdir(directory)  # fails unless it is empty


def _remove_if_old(other: agent_runtime.Runtime) -> None:
    paths = [path for path in (other.socket, other.pid, other.log) if os.path.lexists(path)]
    if all(time.time() - os.lstat(path).st_mtime > _LEFT_OVER_S for path in paths):
        for path in (*paths, other.lock):
            os.unlink(path)


def _trim(log: str) -> None:
    with contextlib.suppress(OSError):
        if os.path.getsize(log) > _MAX_LOG_BYTES:
            with open(log, "rb+") as file:
                file.seek(-_KEPT_LOG_BYTES, os.SEEK_END)
                kept = file.read().partition(b"\n")[2]
                file.truncate(0)
            with open(log, "ab") as file:
                file.write(kept)


def _take_over(lock: FileLock, place: agent_runtime.Runtime) -> bool:
    """Take the agent's lock; return False if it belongs to a serving agent.

    One that is exiting has no socket, but may hold the lock for a moment.
    """
    deadline = time.monotonic() + _TAKE_OVER_S
    while True:
        try:
            lock.acquire(timeout=_TAKE_OVER_POLL_S)
        except Timeout:
            if os.path.exists(place.socket) or time.monotonic() > deadline:
                return False
        else:
            return True


def main() -> int:
    return_large_buffers()
    place = agent_runtime.locate()
    agent_runtime.prepare(place)
    os.umask(_UMASK)
    agent_runtime.reset_signals()
    lock = FileLock(place.lock, mode=0o600)
    if not _take_over(lock, place):
        return 0  # another one was started at the same time
    with open(place.pid, "w", encoding="ascii") as file:
        file.write(f"{os.getpid()}\n")
    threading.Thread(target=_remove_left_overs, args=(place,), daemon=True).start()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for library in ("websockets", "watchfiles"):
        logging.getLogger(library).setLevel(logging.ERROR)
    idle_s = float(os.environ.get(IDLE_ENV) or DEFAULT_IDLE_S)
    try:
        asyncio.run(Agent(place, idle_s).run())
    finally:
        with contextlib.suppress(OSError):
            os.unlink(place.pid)
        lock.release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
