"""A server and its clients in a temporary directory, for the demo, the tests and the benchmarks.

Everything is real: processes, sockets, files. Home, configuration and runtime directories are the sandbox's own. Each
client is a "machine" with a background agent of its own.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol

from lattice_remote.protocol.paths import is_replicated

__all__ = [
    "Client",
    "Process",
    "Programs",
    "Sandbox",
    "Server",
    "board",
    "descendants",
    "differences",
    "tree_of",
    "wait_for",
]

BIN = Path(sys.executable).parent
COMMAND_TIMEOUT_S = 60.0


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
    """Wait until ``condition()`` is true, looking every 5 ms.

    Raises:
        TimeoutError: it did not become true; the message names ``what``.
    """
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout_s:.0f} s for: {what}")
        time.sleep(0.005)


def tree_of(lattice_dir: Path) -> dict[str, bytes]:
    """Return the replicated files below a ``.lattice`` directory: relative path to content."""
    tree = {}
    for path in lattice_dir.rglob("*"):
        relative = path.relative_to(lattice_dir).as_posix()
        if is_replicated(relative) and path.is_file():
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                tree[relative] = path.read_bytes()
    return tree


def differences(one: Path, other: Path) -> list[str]:
    """Return the paths on which two ``.lattice`` directories differ, byte for byte."""
    a, b = tree_of(one), tree_of(other)
    return sorted(path for path in a.keys() | b.keys() if a.get(path) != b.get(path))


def descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [found for child in map(int, children) for found in (child, *descendants(child))]


class Process(Protocol):
    """A running program: the used part of ``subprocess.Popen``."""

    pid: int
    stdout: IO[bytes] | None
    returncode: int | None

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int, /) -> None: ...
    def kill(self) -> None: ...


class Programs:
    """The installed ``lattice`` and ``lattice-remote``."""

    def path(self, program: str) -> Path:
        return BIN / program

    def run(
        self,
        program: str,
        argv: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdin: str = "",
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, with any exit code.

        Raises:
            subprocess.TimeoutExpired: it took longer, and was killed.
        """
        return subprocess.run(
            [self.path(program), *argv],
            cwd=cwd,
            env=env,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def start(
        self,
        program: str,
        argv: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdout: int | IO[bytes],
        stderr: int | IO[bytes],
    ) -> Process:
        return subprocess.Popen(
            [self.path(program), *argv], cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
        )


class Server:
    """One ``lattice-remote`` data directory, and the server on it while it is started."""

    def __init__(self, sandbox: Sandbox, name: str = "server") -> None:
        self.data = sandbox.root / name
        self.port = 0
        self.process: Process | None = None
        self.log = sandbox.root / f"{name}.log"
        self.env = {**sandbox.environment(name), "LATTICE_REMOTE_DATA": str(self.data)}
        self.programs = sandbox.programs
        if not self.data.exists():
            self.admin("init", str(self.data))

    @property
    def url(self) -> str:
        """Known once it was started."""
        return f"http://127.0.0.1:{self.port}"

    def admin(self, *args: str) -> str:
        """Run ``lattice-remote`` on this data directory; return its output."""
        done = self.programs.run("lattice-remote", args, cwd=self.log.parent, env=self.env)
        if done.returncode:
            raise RuntimeError(f"lattice-remote {' '.join(args)}: exit {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout.strip()

    def project(self, slug: str = "board", code: str = "LAT") -> Path:
        """Create a project and return its ``.lattice`` directory."""
        self.admin("project", "create", slug, "--code", code)
        return self.lattice_dir(slug)

    def lattice_dir(self, slug: str = "board") -> Path:
        return self.data / "projects" / slug / ".lattice"

    def token(self, actor: str, *act_as: str, slug: str = "board") -> str:
        patterns = [argument for pattern in act_as for argument in ("--act-as", pattern)]
        return self.admin("token", "create", "--project", slug, "--actor", actor, *patterns)

    def start(self, *options: str) -> Server:
        """Start the server, on its earlier port if any; return once it listens."""
        with self.log.open("ab") as log:
            argv = ("start", "--port", str(self.port), *options)
            self.process = self.programs.start(
                "lattice-remote", argv, cwd=self.log.parent, env=self.env, stdout=subprocess.PIPE, stderr=log
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        if not line.startswith("Listening on http"):
            self.process.kill()
            self.process.wait()
            raise RuntimeError(f"the server did not start: {line!r} {self.log.read_text()[-2000:]}")
        self.port = int(line.rsplit(":", 1)[1])
        return self

    def stop(self) -> int:
        """Ask it to stop; return its exit code."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a crash would; its workers notice and exit."""
        self._end(signal.SIGKILL)

    def worker_pids(self) -> list[int]:
        """Return the process ids of the project workers, without readers."""
        if self.process is None:
            return []
        found = []
        for pid in descendants(self.process.pid):
            with contextlib.suppress(OSError):
                if b".worker.main\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def _end(self, sign: signal.Signals) -> int:
        process, self.process = self.process, None
        if process is None:
            return 0
        process.send_signal(sign)
        code = process.wait(timeout=20)
        assert process.stdout is not None
        process.stdout.close()
        return code


class Client:
    """A working directory for ``lattice`` commands, on a machine of its own."""

    def __init__(self, sandbox: Sandbox, name: str, machine: str | None = None) -> None:
        self.dir = sandbox.root / "clients" / name
        self.dir.mkdir(parents=True, exist_ok=True)
        self.env = sandbox.environment(machine or name)
        self.programs = sandbox.programs

    def elsewhere(self, directory: Path) -> Client:
        """Return another directory on the same machine; it is created if missing."""
        directory.mkdir(parents=True, exist_ok=True)
        other = copy.copy(self)
        other.dir = directory
        return other

    @property
    def lattice_dir(self) -> Path:
        """The cache."""
        return self.dir / ".lattice"

    def popen(self, *argv: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [BIN / "lattice", *argv],
            cwd=self.dir,
            env={**self.env, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        *argv: str,
        stdin: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        programs: Programs | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``lattice`` with these arguments, with any exit code."""
        return (programs or self.programs).run(
            "lattice", argv, cwd=cwd or self.dir, env={**self.env, **(env or {})}, stdin=stdin or ""
        )

    def ok(self, *argv: str, stdin: str | None = None) -> str:
        """Run ``lattice`` with these arguments, require success, and return its output."""
        done = self.run(*argv, stdin=stdin)
        if done.returncode:
            raise RuntimeError(f"lattice {' '.join(argv)}: exit {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout

    def add_remote(self, server: Server, token: str, slug: str = "board") -> str:
        """Add the server's project as this directory's remote; return the output."""
        return self.ok("remote", "add", "origin", server.url, "--project", slug, "--token", token)


class Sandbox:
    """A temporary directory with servers and clients; on exit all of it is ended and removed."""

    def __init__(self, programs: Programs | None = None) -> None:
        self.programs = programs or Programs()
        self.root = Path(tempfile.mkdtemp(prefix="lattice-"))
        self._servers: list[Server] = []
        self._clients: list[Client] = []

    def environment(self, machine: str) -> dict[str, str]:
        """Return the environment of one machine: its own home, configuration and runtime directories."""
        home = self.root / "home" / machine
        runtime = self.root / "run" / machine
        for directory in (home, runtime):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("LATTICE_", "XDG_", "PYTHON"))}
        return {
            **kept,
            "PATH": f"{BIN}{os.pathsep}{kept.get('PATH', '')}",
            "HOME": str(home),
            "XDG_CONFIG_HOME": str(home / ".config"),
            "XDG_RUNTIME_DIR": str(runtime),
            "LATTICE_REMOTE_RUNTIME_DIR": str(runtime),
        }

    def server(self, name: str = "server") -> Server:
        """Create a server's data directory; start it separately."""
        self._servers.append(Server(self, name))
        return self._servers[-1]

    def started_server(self) -> Server:
        """Start a server with an empty project ``board``."""
        server = self.server()
        server.project()
        server.start()
        return server

    def client(self, name: str, machine: str | None = None) -> Client:
        """Create an empty directory; clients that name the same machine share its agent."""
        self._clients.append(Client(self, name, machine))
        return self._clients[-1]

    def close(self) -> None:
        """End the agents and servers, then remove the directory."""
        self.end()
        shutil.rmtree(self.root, ignore_errors=True)

    def end(self) -> None:
        """End the agents and servers; the directory stays."""
        for environment in {client.env["XDG_RUNTIME_DIR"]: client for client in self._clients}.values():
            environment.run("remote", "agent", "stop", "--all", cwd=self.root)
        for server in self._servers:
            server.stop()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def board(*people: str, programs: Programs | None = None) -> Iterator[tuple[Server, list[Client]]]:
    """Yield a started server with a project ``board``, and one connected client for each of ``people``.

    Each token acts as ``human:NAME`` and as any agent.
    """
    with Sandbox(programs) as sandbox:
        server = sandbox.started_server()
        clients = []
        for person in people:
            client = sandbox.client(person)
            client.add_remote(server, server.token(f"human:{person}", "agent:*"))
            clients.append(client)
        yield server, clients
