"""The background process: one per user, package version and environment, for all caches of that user there.

It listens on a Unix socket in a directory of the user's own (see ``runtime.py``) for requests, one JSON object a
line (see ``service.py``), and while it works on one it sends ``{"progress": ...}`` lines, the first at once, then
one every two seconds. Two requests are its own: ``agent-status`` and ``agent-stop``. It refuses a request of another
environment, or for another cache than the one at that path. It leaves when it was not used for a while, when its
environment is gone, and when the package that it was started from is replaced: the next command starts one of the new
version. Start it with ``python -m lattice_remote.client.agent.main``; commands do so by themselves.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from typing import Any

from filelock import FileLock, Timeout

import lattice_remote
from lattice_remote import __version__
from lattice_remote.client import agent_runtime, credentials, trusted_servers
from lattice_remote.client.agent.file_watcher import Watching
from lattice_remote.client.agent.service import Service, answered
from lattice_remote.errors import RemoteError

__all__ = ["Agent", "main"]

IDLE_ENV = "LATTICE_REMOTE_AGENT_IDLE_S"
DEFAULT_IDLE_S = 1800.0
MAX_REQUEST_BYTES = 64 * 1024 * 1024
_HEARTBEAT_S = 2.0
_SWEEP_INTERVAL_S = 1.0
_UNUSED_S = 30.0
"""An agent that nobody has ever asked lost a race to one that has already ended: it leaves sooner."""
_ALONE_S = 60.0
"""An agent whose namespaces hold no other process of this user, which a sandbox has left behind, leaves sooner."""
_TAKE_OVER_S, _TAKE_OVER_POLL_S = 8.0, 0.05
_LEFT_OVER_S = 3600.0
"""The files of an agent that ended are kept for so long: its log may say why."""
_UMASK = 0o022
"""Not that of the command which happens to start the agent. The modes of files in a cache are for ``directory.py``."""
_MAX_LOG_BYTES, _KEPT_LOG_BYTES = 1024 * 1024, 64 * 1024
_log = logging.getLogger(__name__)


class Agent:
    """Serves requests from ``run()`` until it is stopped, idle, or its socket is taken away."""

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
        self._watching = Watching()
        self._turn = asyncio.Semaphore(1)

    async def run(self) -> None:
        """Serve. The caller holds the agent's lock, so that a socket that is already there is a dead one's."""
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
                os.unlink(self._place.socket)  # first: whoever comes now starts a new agent
            server.close()
            await self._leave()

    async def _leave(self) -> None:
        """Let what runs come to its end for a moment, then close everything."""
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
                "the configuration directory was made, removed or replaced; the next command starts another agent"
            )
            return False
        return not self._stopping.is_set() and not self._is_idle()

    def _is_at_home(self) -> bool:
        """Whether the environment is still that of the agent's name: of all its parts only this one can change."""
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
        """Drop caches whose directory is gone or has another remote now, and those that nobody has used for long."""
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
            # A client that leaves, or is interrupted, is none of our trouble.
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
        """Answer one request; give it up when the command that asked goes away."""

        def report(progress: dict[str, Any] | None) -> None:
            writer.write(json.dumps({"progress": progress}).encode() + b"\n")

        if (ready := self._ready_now(line)) is not None:
            writer.write(json.dumps(ready).encode() + b"\n")
            return
        report(None)  # it is heard: whoever asks knows that there is life here
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
        """Answer a read of a cache that is current at once, without a task of its own."""
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
        """Whether a request comes from this agent's environment; its command then does the steps itself if not."""
        return bool(request["agent"] == self._place.name) and self._is_at_home()

    async def _handle(self, line: bytes, report: Any) -> dict[str, Any]:
        try:
            request: dict[str, Any] = json.loads(line)
            if request["do"] == "agent-status":
                return self._status()
            if request["do"] == "agent-stop":
                self._stopping.set()
                return {"pid": os.getpid()}
            service = self._service(request) if self._is_mine(request) else None
            if service is None or not service.is_meant_by(request):
                return {"not_mine": True}
            return await service.handle(request, report)
        except RemoteError:
            raise
        except Exception as error:
            # A defect of ours, or of who asks: it must be answered, or the command would take the agent for dead.
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


def _package_signature() -> tuple[int, int] | None:
    """Return what changes when this package is upgraded; None when it is gone."""
    try:
        found = os.stat(str(lattice_remote.__file__))
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def _is_alone() -> bool:
    """Whether no process of this user but agents is in the namespaces of this one, as far as can be seen."""
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
    """Remove the files of other environments' agents that ended long ago, by a crash or otherwise."""
    with contextlib.suppress(OSError):
        names = {name.rpartition(".")[0] for name in os.listdir(place.directory) if name.startswith("agent-")}
        for name in names - {place.name}:
            other = agent_runtime.Runtime(place.directory, name)
            lock = FileLock(other.lock, mode=0o600)
            with contextlib.suppress(OSError, Timeout), lock.acquire(timeout=0):
                _remove_if_old(other)


def _remove_if_old(other: agent_runtime.Runtime) -> None:
    paths = [path for path in (other.socket, other.pid, other.log) if os.path.lexists(path)]
    if all(time.time() - os.lstat(path).st_mtime > _LEFT_OVER_S for path in paths):
        for path in (*paths, other.lock):
            os.unlink(path)


def _trim(log: str) -> None:
    """Keep only the end of a log that has become long. Whoever writes to it appends."""
    with contextlib.suppress(OSError):
        if os.path.getsize(log) > _MAX_LOG_BYTES:
            with open(log, "rb+") as file:
                file.seek(-_KEPT_LOG_BYTES, os.SEEK_END)
                kept = file.read().partition(b"\n")[2]
                file.truncate(0)
            with open(log, "ab") as file:
                file.write(kept)


def _take_over(lock: FileLock, place: agent_runtime.Runtime) -> bool:
    """Take the agent's lock; return whether it is ours now, or belongs to an agent that serves.

    One that is leaving has no socket any more, but may hold the lock for a moment yet.
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
    """Run the agent unless one runs already. Returns the exit code."""
    place = agent_runtime.locate()
    agent_runtime.prepare(place)
    os.umask(_UMASK)
    lock = FileLock(place.lock, mode=0o600)
    if not _take_over(lock, place):
        return 0  # somebody else has started one at the same time
    with open(place.pid, "w", encoding="ascii") as file:
        file.write(f"{os.getpid()}\n")
    _remove_left_overs(place)
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
