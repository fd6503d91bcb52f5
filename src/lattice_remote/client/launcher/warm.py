"""Warm process: has lattice loaded, and forks a child for each command of a launcher.

Launchers start it with ``python -m lattice_remote.client.launcher.warm``, one per installation and environment
(``script.world``). It is single-threaded. A child runs one command with the caller's directory, descriptors, variables,
umask, limits and signal dispositions. It serves only reads of a cache and routed writes; ``routing`` leaves any other
command to a process of its own. The process exits when it is idle, when its socket is gone, and when a package changes.
"""

import fcntl
import gc
import importlib
import io
import os
import pkgutil
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn

from lattice_remote.client import agent_client
from lattice_remote.client.launcher import script

__all__ = ["main"]

DEFAULT_IDLE_S = 1800.0
IDLE_ENV = "LATTICE_REMOTE_AGENT_IDLE_S"
_LOOK_S = 5.0
"""Interval of the checks whether the process is still needed."""
_MAX_COMMANDS = 64
"""Launchers beyond wait a second, then execute the real ``lattice``."""
_REQUEST_TIMEOUT_S = 10.0
_PR_SET_PDEATHSIG = 1
_SO_PEERPIDFD = 77
_PYTHONS_OWN = (signal.SIGPIPE, signal.SIGXFSZ)
"""Signals that every interpreter ignores."""
Signature = tuple[tuple[int, int], ...]
_LIMITS = tuple(value for name, value in vars(resource).items() if name.startswith("RLIMIT_"))


class _Refused(Exception):
    """The caller's environment is another one, or not available here."""


class Warm:
    def __init__(self, path: bytes, world: bytes, idle_s: float, lock: int, packages: Signature) -> None:
        self._path = path
        self._lock = lock
        """Locked file: one process serves at a time."""
        self._world = world
        self._idle_s = idle_s
        self._packages = packages
        """Signature of the packages before they were loaded."""
        self._poll = select.poll()
        self._commands: dict[int, _Command] = {}
        """By pidfd and by descriptor of the connection."""

    def run(self) -> None:
        """Serve while needed. The caller holds the lock."""
        listener = socket.socket(socket.AF_UNIX)
        with suppress(FileNotFoundError):
            os.unlink(self._path)
        listener.bind(self._path)
        os.chmod(self._path, 0o600)
        listener.listen(128)
        identity = _inode(self._path)
        woken, waking = socket.socketpair()
        waking.setblocking(False)
        signal.set_wakeup_fd(waking.fileno())
        signal.signal(signal.SIGTERM, lambda *_: None)
        self._poll.register(woken, select.POLLIN)
        used_at = time.monotonic()
        while True:
            self._poll.register(listener, select.POLLIN if len(self._commands) < 2 * _MAX_COMMANDS else 0)
            ready = {descriptor for descriptor, _ in self._poll.poll(min(_LOOK_S, self._idle_s) * 1000)}
            self._attend(ready)
            if self._commands:
                used_at = time.monotonic()
            is_idle = time.monotonic() - used_at > self._idle_s
            if is_idle or woken.fileno() in ready or not self._is_current() or _inode(self._path) != identity:
                break
            if listener.fileno() in ready:  # last: a new descriptor may have the number of a closed one
                used_at = time.monotonic()
                self._accept(listener, woken, waking)
        if _inode(self._path) == identity:
            os.unlink(self._path)  # first: the next launcher starts another process
        fcntl.flock(self._lock, fcntl.LOCK_UN)  # for it and for the running commands, which inherited the lock
        self._poll.unregister(listener)
        self._poll.unregister(woken)
        listener.close()
        while self._commands:
            self._attend({descriptor for descriptor, _ in self._poll.poll()})

    def _is_current(self) -> bool:
        return _signature() == self._packages

    def _accept(self, listener: socket.socket, woken: socket.socket, waking: socket.socket) -> None:
        stream, _ = listener.accept()
        try:
            child = os.fork()
        except OSError:  # no memory, or too many processes
            stream.close()
            return
        if child == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for unused in (listener, woken, waking, *(command.stream for command in self._commands.values())):
                unused.close()
            _run_child(stream, self._world)
        command = _Command(child, os.pidfd_open(child), stream)
        with suppress(OSError):  # the launcher has exited: its hang-up is noticed
            socket.send_fds(stream, [script.READY], [command.pidfd])
        for descriptor, event in ((command.pidfd, select.POLLIN), (stream.fileno(), 0)):  # 0: a hang-up only
            self._commands[descriptor] = command
            self._poll.register(descriptor, event)

    def _attend(self, ready: set[int]) -> None:
        for descriptor in ready & self._commands.keys():
            command = self._commands.get(descriptor)
            if command is None:
                continue  # its exit was reported
            if descriptor == command.pidfd:
                for number in (command.pidfd, command.stream.fileno()):
                    del self._commands[number]
                    with suppress(KeyError):
                        self._poll.unregister(number)
                command.report()
            else:
                self._poll.unregister(descriptor)
                signal.pidfd_send_signal(command.pidfd, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class _Command:
    pid: int
    pidfd: int
    stream: socket.socket

    def report(self) -> None:
        os.close(self.pidfd)
        _, status = os.waitpid(self.pid, 0)
        killed = os.WIFSIGNALED(status)
        value = os.WTERMSIG(status) if killed else os.WEXITSTATUS(status)
        with suppress(OSError), self.stream:
            self.stream.settimeout(0)
            self.stream.sendall((script.KILLED if killed else script.EXITED) + bytes((value,)))


def _inode(path: bytes) -> int | None:
    try:
        return os.stat(path).st_ino
    except OSError:
        return None


def _signature() -> Signature:
    """Identify the installed packages: an installation changes the directory's time."""
    import lattice

    import lattice_remote

    files = [str(package.__file__) for package in (lattice, lattice_remote)]
    paths = [*files, *(os.path.dirname(os.path.dirname(file)) for file in files)]
    found = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            found.append((0, 0))
        else:
            found.append((status.st_ino, status.st_mtime_ns))
    return tuple(found)


def _run_child(stream: socket.socket, world: bytes) -> NoReturn:
    """Run one command and exit as lattice would.

    Once the command has begun it is not left to another process, which would repeat it (I6).
    """
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _die_with_parent()
        try:
            argv = _become_caller(stream, world)
        except (_Refused, OSError, ValueError):
            _leave(stream)
        code = _run_lattice(argv)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except _needs_own_process():
        _leave(stream)
    except BaseException:  # noqa: BLE001 - nothing may return into the warm process's loop
        _print_error()
    finally:
        os._exit(code)


def _print_error() -> None:
    with suppress(OSError):  # a full device or a closed pipe
        traceback.print_exc()


def _needs_own_process() -> type[BaseException]:
    from lattice_remote.client.routing import NeedsOwnProcess

    return NeedsOwnProcess


def _leave(stream: socket.socket) -> NoReturn:
    with suppress(OSError):
        stream.sendall(script.LEAVE + b"\0")
    os._exit(0)


def _die_with_parent() -> None:
    """End this process with the warm process: the real ``lattice`` runs the command again."""
    import ctypes

    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent == 1 or os.getppid() != parent:
        os._exit(1)


def _become_caller(stream: socket.socket, world: bytes) -> list[str]:
    """Take over the caller's process attributes; return its command line.

    Raises:
        _Refused: the caller lives in another environment, or may do more.
    """
    peer, uid, _ = struct.unpack("3i", stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if peer <= 0 or uid != os.getuid():
        raise _Refused
    caller = _open_peer(stream, peer)
    argv, environ, descriptors = _receive(stream)
    if script.world(environ, b"%d" % peer) != world:
        raise _Refused
    if select.select([caller], [], [], 0)[0]:
        raise _Refused  # it has exited: another process may have its id
    for number, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.fchdir(descriptors[3])
    os.close(descriptors[3])
    os.environ.clear()
    os.environb.update(environ)
    agent_client.pass_request_id(os.environ.pop(script.REQUEST_ENV, ""))
    time.tzset()
    try:
        _take_limits(peer)
    except (OSError, ValueError):
        os.kill(os.getppid(), signal.SIGTERM)  # the next launcher starts a process with this one's rights
        raise _Refused from None
    _take_status(peer)
    _open_streams()
    return [os.fsdecode(argument) for argument in argv]


def _open_peer(stream: socket.socket, peer: int) -> int:
    try:
        data = stream.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
    except OSError:  # Linux before 6.5
        return os.pidfd_open(peer)
    return int.from_bytes(data, sys.byteorder)


def _receive(stream: socket.socket) -> tuple[list[bytes], script.Environment, list[int]]:
    stream.settimeout(_REQUEST_TIMEOUT_S)
    data, descriptors, _, _ = socket.recv_fds(stream, 65536, 4)
    if len(descriptors) != 4 or len(data) < 4:
        raise _Refused
    length = int.from_bytes(data[:4], "little")
    if length > script.MAX_REQUEST_BYTES:
        raise _Refused
    request = bytearray(data[4:])
    while len(request) < length:
        more = stream.recv(length - len(request))
        if not more:
            os._exit(1)  # the launcher was killed
        request += more
    argv, environ = script.decode_request(bytes(request))
    return argv, environ, descriptors


def _take_limits(peer: int) -> None:
    for limit in _LIMITS:
        theirs = resource.prlimit(peer, limit)
        if theirs != resource.getrlimit(limit):
            resource.setrlimit(limit, theirs)
    niceness = os.getpriority(os.PRIO_PROCESS, peer)
    if niceness != os.getpriority(os.PRIO_PROCESS, 0):
        os.setpriority(os.PRIO_PROCESS, 0, niceness)
    processors = os.sched_getaffinity(peer)
    if processors != os.sched_getaffinity(0):
        os.sched_setaffinity(0, processors)


def _take_status(peer: int) -> None:
    """Take over umask, and ignored and blocked signals. Python ignores SIGPIPE and SIGXFSZ."""
    fields = dict(
        line.split(b":\t", 1) for line in script.read(b"/proc/%d/status" % peer).splitlines() if b":\t" in line
    )
    os.umask(int(fields[b"Umask"], 8))
    ignored, blocked = int(fields[b"SigIgn"], 16), int(fields[b"SigBlk"], 16)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, *_PYTHONS_OWN, signal.SIGINT}:
        if ignored >> (number - 1) & 1:
            signal.signal(number, signal.SIG_IGN)
    is_ignored = ignored >> (signal.SIGINT - 1) & 1
    signal.signal(signal.SIGINT, signal.SIG_IGN if is_ignored else signal.default_int_handler)
    signal.pthread_sigmask(
        signal.SIG_SETMASK, {number for number in signal.valid_signals() if blocked >> (number - 1) & 1}
    )


def _open_streams() -> None:
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, f"__{name}__")
        raw = io.FileIO(number, "r" if number == 0 else "w", closefd=False)
        raw.name = f"<{name}>"  # shown in errors
        buffered = io.BufferedReader(raw) if number == 0 else io.BufferedWriter(raw)
        is_terminal = raw.isatty()
        new = io.TextIOWrapper(
            buffered,
            encoding=old.encoding,
            errors=old.errors,
            newline=None if number == 0 else "\n",
            line_buffering=is_terminal or number == 2,
            write_through=old.write_through,
        )
        new.mode = "r" if number == 0 else "w"  # type: ignore[misc]
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


def _run_lattice(argv: list[str]) -> int:
    from lattice.cli.main import cli

    from lattice_remote.client import routing

    routing.in_warm_process = True
    resolve = cli.resolve_command

    def resolve_command(ctx: Any, args: list[str]) -> Any:
        name, command, rest = resolve(ctx, args)
        if command is not None and command is cli.commands.get(str(name)):
            raise routing.NeedsOwnProcess  # the plugin has not hooked it: no cache, or ``remote``
        return name, command, rest

    cli.resolve_command = resolve_command  # type: ignore[method-assign]
    sys.argv = [os.path.join(os.path.dirname(sys.executable), "lattice"), *argv]
    code: object = 0
    try:
        cli.main(args=argv, prog_name="lattice")
    except SystemExit as error:
        code = error.code
    except (routing.NeedsOwnProcess, KeyboardInterrupt):
        raise
    except BaseException:  # noqa: BLE001 - printed as the interpreter does
        _print_error()
        code = 1
    if code is not None and not isinstance(code, int):
        with suppress(OSError):
            print(code, file=sys.stderr)  # noqa: T201 - as the interpreter does
        code = 1
    return _finish(int(code or 0) & 0xFF)


def _finish(code: int) -> int:
    """Flush the standard streams; return the exit code."""
    try:
        sys.stdout.flush()
    except OSError as error:
        code = 120
        with suppress(OSError):
            sys.stderr.write(f"Exception ignored in: {sys.stdout!r}\n{type(error).__name__}: {error}\n")
    try:
        sys.stderr.flush()
    except OSError:
        code = 120
    return code


def _preload() -> None:
    """Import everything that a command uses, and the plugins.

    Raises:
        RuntimeError: a plugin has started a thread.
    """
    import ctypes  # noqa: F401
    import subprocess  # noqa: F401

    import lattice.cli.main
    import lattice.core
    import lattice.storage

    packages: tuple[ModuleType, ...] = (lattice.core, lattice.storage)
    for package in packages:
        for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            importlib.import_module(found.name)
    for name in ("routing", "agent_client", "attachments", "guard", "config", "credentials"):
        importlib.import_module(f"lattice_remote.client.{name}")
    if threading.active_count() > 1:
        raise RuntimeError("a plugin has started a thread: commands cannot be forked")


def main() -> None:
    """Become the warm process of this environment, unless there is one."""
    environ: script.Environment = dict(os.environb)
    world = script.world(environ)
    path = script.socket_path(environ, world)
    if path is None:
        return
    from lattice_remote.client import agent_runtime

    directory = os.path.dirname(os.fsdecode(path))
    agent_runtime.prepare(agent_runtime.Runtime(directory, "warm"))
    lock = os.open(path + b".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    os.truncate(lock, 0)
    os.write(lock, b"%d\n" % os.getpid())
    os.chdir("/")
    agent_runtime.reset_signals()
    packages = _signature()  # first: an upgrade during the preload must be noticed
    try:
        _preload()
    except BaseException as error:
        with open(path + b".failed", "w", encoding="utf-8") as file:
            file.write(f"{type(error).__name__}: {error}\n")
        raise
    with suppress(FileNotFoundError):
        os.unlink(path + b".failed")
    gc.collect()
    gc.freeze()
    Warm(path, world, float(os.environ.get(IDLE_ENV, "") or DEFAULT_IDLE_S), lock, packages).run()


if __name__ == "__main__":
    main()
