"""Fork server for ``preloaded_programs.py``: a process with everything imported that forks for each program.

A request is one message on the control socket, a JSON object (``program``, ``argv``, ``cwd``, ``env``,
``new_session``), with four descriptors: standard input, output and error, and a socket for the process id and, at its
end, the exit status. The fork goes through the program's own entry point. Nothing that reads the
environment has run by then: lattice's plugins, which do so when they are loaded, are loaded in the fork.
"""

import contextlib
import faulthandler
import gc
import json
import os
import selectors
import signal
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path

BIN = Path(sys.executable).parent
MAX_REQUEST_BYTES = 1 << 20


def preload() -> None:
    """Import what the programs import; lattice without its plugins."""
    import lattice.plugins

    load = lattice.plugins.load_cli_plugins
    lattice.plugins.load_cli_plugins = lambda _group: None
    import lattice.cli.main

    lattice.plugins.load_cli_plugins = load
    import lattice_remote.client.agent.main
    import lattice_remote.client.plugin
    import lattice_remote.client.routing
    import lattice_remote.client.storage
    import lattice_remote.server.cli
    import lattice_remote.server.project.bundle_check
    import lattice_remote.server.server
    import lattice_remote.server.worker.main  # noqa: F401
    from lattice_remote.client.cli.app import app_with

    app_with()
    lattice.plugins.discover_cli_plugins()  # its findings on the disk are cached
    gc.freeze()


def _lattice() -> object:
    from lattice.cli.main import cli
    from lattice.plugins import load_cli_plugins

    load_cli_plugins(cli)
    return cli()


def _lattice_remote() -> object:
    from lattice_remote.server.cli import main

    return main()


def _agent() -> object:
    from lattice_remote.client.agent.main import main

    return main()


def _worker() -> object:
    """Run a project's worker, whose connection to its server is given as standard input."""
    from lattice_remote.server.worker.main import main

    connection = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    del sys.path[0]  # as with -P
    return main([*sys.argv[1:], "--fd", str(connection)])


def _intake() -> object:
    """Check a project that was brought whole."""
    from lattice_remote.server.project.bundle_check import main

    del sys.path[0]  # as with -P
    return main()


def _board_writer() -> object:
    from python_api_program import main

    return main()


def _surface_caller() -> object:
    from call_program import main

    return main()


PROGRAMS: dict[str, Callable[[], object]] = {
    "lattice": _lattice,
    "lattice-remote": _lattice_remote,
    "agent": _agent,
    "worker": _worker,
    "intake": _intake,
    "board_writer": _board_writer,
    "surface_caller": _surface_caller,
}


OF_TESTS = ("board_writer", "surface_caller")
"""Those that are found beside this file."""


class Forks:
    """Server of requests and exit statuses, until the control socket is closed."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)

    def serve(self) -> Callable[[], object] | None:
        """Return the program to run in each fork; None at the end of the requests."""
        while True:
            for key, _ in self._selector.select():
                if key.data is not None:
                    self._tell_end(key.fd, *key.data)
                    continue
                message, fds, _, _ = socket.recv_fds(
                    self._control, MAX_REQUEST_BYTES, 4, getattr(socket, "MSG_CMSG_CLOEXEC", 0)
                )
                if not message:
                    return None
                program = self._fork(json.loads(message), fds)
                if program is not None:
                    return program

    def _fork(self, request: dict, fds: list[int]) -> Callable[[], object] | None:
        ended, life = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._leave_to_the_parent(ended, fds[3])
            os.set_inheritable(life, False)
            _become(request, fds[:3])
            return PROGRAMS[request["program"]]
        for fd in (*fds[:3], life):
            os.close(fd)
        status = socket.socket(fileno=fds[3])
        status.send(struct.pack("i", pid))
        # The other end of the pipe is closed by the end of the process, however it ends.
        self._selector.register(ended, selectors.EVENT_READ, (pid, status))
        return None

    def _leave_to_the_parent(self, *fds: int) -> None:
        """In a fork: close what belongs to the process that forks."""
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                os.close(key.fd)
                key.data[1].close()
        self._selector.close()
        self._control.close()
        for fd in fds:
            os.close(fd)

    def _tell_end(self, ended: int, pid: int, status: socket.socket) -> None:
        self._selector.unregister(ended)
        os.close(ended)
        _, code = os.waitpid(pid, 0)
        with contextlib.suppress(OSError):  # its parent may not wait for it
            status.send(struct.pack("i", os.waitstatus_to_exitcode(code)))
        status.close()


def _become(request: dict, stdio: list[int]) -> None:
    """Make this fork equal to a process that has just been started."""
    for number, fd in enumerate(stdio):
        os.dup2(fd, number)
        os.close(fd)
    faulthandler.enable(file=2)  # ended for being too slow (SIGABRT), it says where it was
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    if request["new_session"]:
        os.setsid()
    sys.path[0] = str(BIN if request["program"] not in OF_TESTS else Path(__file__).parent)
    sys.argv = [str(BIN / request["program"]), *request["argv"]]


def main() -> object:
    control = socket.socket(fileno=int(sys.argv[1]))
    preload()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python has it
    program = Forks(control).serve()
    return None if program is None else program()


if __name__ == "__main__":
    sys.exit(main())
