"""A directory that represents the machine of a server's administrator.

Absolute paths in typed commands lie below that directory. ``stand_ins/`` replaces programs that would change this
machine or download something: ``sudo`` runs its arguments, ``useradd`` does nothing, ``pip`` installs this project's
programs. These stand-ins and ``systemctl`` query the ``Machine``. It forks programs and services from a process that
has loaded them (``preloaded_programs.py``) and handles unit files as systemd would, as far as processes go. Everything
else is real.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from proxies import free_port

from preloaded_programs import warm
from sandbox import Process, Sandbox

__all__ = ["Machine"]

_STAND_INS = Path(__file__).resolve().parent / "stand_ins"
_ROOT = _STAND_INS.parents[2]
_DIRECTORIES = (
    "/opt",
    "/var/lib",
    "/etc/systemd/system",
    "/etc/nginx/conf.d",
    "/usr/local/bin",
    "/backup",
    "/data",
    "/src",
)
_START_S = 60


class Machine:
    """A machine; the caller must ``end()`` it.

    Attributes:
        port: port of the service, for the unit's port 8443.
        environment: environment of every command.
        places: further replacements in commands and units.
        said: stderr of the last command.
    """

    def __init__(self, sandbox: Sandbox, name: str) -> None:
        self.root = sandbox.root / f"{name}-root"
        self.root.mkdir()
        for directory in _DIRECTORIES:
            self.path(directory).mkdir(parents=True)
        self.port = free_port()
        self.places: dict[str, str] = {}
        self.said = ""
        self.environment = {
            **sandbox.environment(name),
            "MACHINE_ROOT": str(self.root),
            "MACHINE_BIN": str(_STAND_INS / "bin"),
            "MACHINE_PYTHON": sys.executable,
        }
        self.environment["PATH"] = (
            f"{_STAND_INS}{os.pathsep}{self.path('/usr/local/bin')}{os.pathsep}{os.environ['PATH']}"
        )
        self._services: dict[str, Process] = {}
        self._started: list[Process] = []
        self._asked = _Asked(self)

    def path(self, path: str) -> Path:
        """Return the location of one of the machine's absolute paths."""
        return self.root / path.lstrip("/")

    def copy(self, source: Path, path: str) -> None:
        """Copy a file or a directory to the machine."""
        self.path(path).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", source, self.path(path)], check=True)

    def here(self, text: str) -> str:
        """Return a text of commands, or of a unit, with the machine's paths."""
        for old, new in self.places.items():
            text = text.replace(old, new)
        directories = "|".join(re.escape(directory) for directory in _DIRECTORIES)
        text = re.sub(rf"(?<![\w/.-])({directories})(?=[/\s:;'\"]|$)", lambda found: str(self.path(found[0])), text)
        return re.sub(r"\b8443\b", str(self.port), text)

    def run(
        self, script: str, *, stdin: str = "", env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run shell commands in the repository's directory."""
        argv = ["bash", "-euo", "pipefail", "-c", self.here(script)]
        environment = {**self.environment, **(env or {})}
        done = subprocess.run(
            argv, cwd=_ROOT, env=environment, input=stdin, capture_output=True, text=True, timeout=120, check=False
        )
        self.said = done.stderr
        return done

    def start(self, command: str) -> Process:
        """Start a program without waiting for it."""
        self._started.append(self._start(command, self.environment))
        return self._started[-1]

    def _start(self, command: str, environment: Mapping[str, str]) -> Process:
        """Start this project's program that is installed at the path."""
        program, *arguments = shlex.split(self.here(command))
        assert Path(program).exists(), f"nothing was installed as {program}"
        with (self.root / "log").open("ab") as log:
            return warm().start(Path(program).name, arguments, cwd=_ROOT, env=environment, stdout=log, stderr=log)

    def end(self) -> None:
        """End all processes."""
        for name in list(self._services):
            self.stop_service(name)
        for process in self._started:
            process.send_signal(signal.SIGTERM)
            process.wait(20)
        self._asked.close()

    def answer(self, program: str, argv: list[str], cwd: str, env: dict[str, str], stdin: str) -> tuple[int, str, str]:
        """Perform a stand-in's request; return its exit code and output."""
        if program == "systemctl":
            why = self.systemctl(*argv)
            return int(bool(why)), "", why
        done = warm().run(program, argv, cwd=Path(cwd), env=env, stdin=stdin)
        return done.returncode, done.stdout, done.stderr

    # --- systemd ---

    def systemctl(self, verb: str, *arguments: str) -> str:
        """Perform a ``systemctl`` command; return the reason if it failed."""
        names = [argument for argument in arguments if not argument.startswith("-")]
        if verb == "daemon-reload":
            return ""
        if names == ["nginx"]:
            return "" if any(self.path("/etc/nginx/conf.d").iterdir()) else "nginx has no site"
        [name] = names
        match verb:
            case "enable":
                return self.start_service(name) if "--now" in arguments else ""
            case "start":
                return self.start_service(name)
            case "stop":
                return self.stop_service(name)
            case "restart":
                return self.stop_service(name) or self.start_service(name)
            case "reload":
                self._services[name].send_signal(signal.SIGHUP)
                return ""
        return f"no stand-in for systemctl {verb}"

    def start_service(self, name: str) -> str:
        """Run the unit's command with its environment, and wait until it reports that it serves."""
        unit = (self.path("/etc/systemd/system") / f"{name}.service").read_text()
        [command] = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
        variables = dict(
            line.split("=", 1) for line in re.findall(r"^Environment=(.*)$", self.here(unit), re.MULTILINE)
        )
        assert re.search(r"^Type=notify$", unit, re.MULTILINE)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
            address = self.root / "notify"
            address.unlink(missing_ok=True)
            told.bind(str(address))
            told.settimeout(0.05)
            environment = {"PATH": os.environ["PATH"], "NOTIFY_SOCKET": str(address), **variables}
            process = self._start(command, environment)
            for _ in range(round(_START_S / 0.05)):
                with contextlib.suppress(TimeoutError):
                    if told.recv(100) == b"READY=1":
                        self._services[name] = process
                        return ""
                if process.poll() is not None:
                    return f"{name} ended with {process.returncode}: {(self.root / 'log').read_text()[-500:]}"
        process.kill()
        process.wait()
        return f"{name} did not say that it serves"

    def stop_service(self, name: str) -> str:
        """End the service and wait for its exit."""
        process = self._services.pop(name, None)
        if process is None:
            return ""
        process.send_signal(signal.SIGTERM)
        return "" if process.wait(20) == 0 else f"{name} ended with {process.returncode}"


class _Asked:
    """Receives the requests of the stand-ins."""

    def __init__(self, machine: Machine) -> None:
        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.wfile.write(json.dumps(machine.answer(**json.loads(self.rfile.readline()))).encode())

        self._server = socketserver.UnixStreamServer(str(machine.root / "asked"), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop receiving."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
