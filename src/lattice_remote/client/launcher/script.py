"""Executable ``lattice``: passes its command line to the warm process, or executes the real ``lattice``.

The installed script starts ``python -IS`` and imports this file alone. It uses modules in C only: each further import
would be a part of every command's time. ``warm`` imports this file for the names that they share.

Conversation on the warm process's socket:

1. The warm process forks, and sends ``READY`` with a pidfd of the child.
2. The launcher sends a request: its length (4 bytes, little endian), ``encode_request``; with it descriptors 0, 1, 2
   and the current directory.
3. The child sends ``LEAVE`` and a zero byte if the command needs a process of its own; nothing has happened then.
   Otherwise the warm process sends ``EXITED`` or ``KILLED``, and the exit code or the signal.

After a connection without an answer the real ``lattice`` runs the command again, under the same request id (I6).
"""

import _imp
import _signal  # type: ignore[import-not-found]  # ``signal`` loads ``enum``
import posix
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from typing import NoReturn

REQUEST_ENV = "LATTICE_REMOTE_REQUEST"
"""``ID`` or ``ID:SECONDS``: request id of the next routed command, and boot time of its first attempt."""
LANGUAGE = 1
"""Incremented when the conversation changes."""
READY, LEAVE, EXITED, KILLED = b"R", b"L", b"E", b"K"
MAX_REQUEST_BYTES = 16 * 1024 * 1024
FAILED_S = 60.0
"""A warm process that failed to start is started again after this time."""
_READY_TIMEOUT_S = 1.0
_OWN_PROCESS = frozenset((b"attach", b"dashboard", b"demo", b"init", b"plugins", b"remote", b"restart"))
"""Frequent commands that never run in a warm process."""
_FORWARDED = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP, _signal.SIGQUIT)
_INTERPRETER = (b"PYTHON", b"LC_", b"LANG", b"LD_", b"GLIBC_", b"MALLOC_")
"""Prefixes of variables that an interpreter reads when it starts."""
_KEPT = frozenset(
    (b"HOME", b"PATH", b"TMPDIR", b"XDG_RUNTIME_DIR", b"LATTICE_REMOTE_RUNTIME_DIR", b"LATTICE_REMOTE_AGENT_IDLE_S")
)
_CONFINEMENT = (b"Uid:", b"Gid:", b"Groups:", b"CapEff:", b"CapBnd:", b"NoNewPrivs:", b"Seccomp")
_S_IFMT, _S_IFDIR, _S_IFSOCK = 0o170000, 0o040000, 0o140000
_OTHERS_MAY_WRITE = 0o022
_MAX_SOCKET_PATH_BYTES = 107

Environment = dict[bytes, bytes]


def read(path: bytes) -> bytes:
    """Return a small file of ``/proc``; empty if it cannot be read."""
    try:
        file = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return posix.read(file, 65536)
    except OSError:
        return b""
    finally:
        posix.close(file)


def world(environ: Environment, process: bytes = b"self") -> bytes:
    """Describe the environment that a warm process cannot take from a request (I13).

    These are namespaces, root directory, rights and confinement, and the variables that the interpreter has read.

    Raises:
        OSError: the process is gone, or belongs to another user or PID namespace.
    """
    proc = b"/proc/" + process
    parts = [posix.readlink(proc + b"/ns/" + name) for name in (b"mnt", b"net", b"user", b"pid", b"uts", b"ipc")]
    root = posix.stat(proc + b"/root")
    parts.append(b"%d:%d" % (root.st_dev, root.st_ino))
    parts += [line for line in read(proc + b"/status").split(b"\n") if line.startswith(_CONFINEMENT)]
    parts.append(read(proc + b"/attr/current"))
    parts += sorted(name + b"=" + value for name, value in environ.items() if name.startswith(_INTERPRETER))
    return b"\n".join(parts)


def socket_path(environ: Environment, description: bytes) -> bytes | None:
    """Return the warm process's socket for an environment; None without a directory of this user's.

    The name need not be unforgeable: the warm process compares the whole description.
    """
    session = environ.get(b"XDG_RUNTIME_DIR", b"")
    if given := environ.get(b"LATTICE_REMOTE_RUNTIME_DIR"):
        directory = given
    elif session.startswith(b"/") and _is_own(session):
        directory = session + b"/lattice-remote"
    else:
        directory = (environ.get(b"TMPDIR") or b"/tmp") + b"/lattice-remote-%d" % posix.getuid()
    key = _imp.source_hash(LANGUAGE, __file__.encode("utf-8", "surrogateescape") + b"\n" + description)
    path = directory + b"/warm-" + key.hex().encode() + b".sock"
    return path if path.startswith(b"/") and len(path) <= _MAX_SOCKET_PATH_BYTES else None


def encode_request(argv: list[bytes], environ: Environment) -> bytes:
    """Return ``COUNT NUL ARGUMENT NUL ... NAME=VALUE NUL ...``; neither can hold a NUL byte."""
    variables = [name + b"=" + value for name, value in environ.items()]
    return b"\0".join([b"%d" % len(argv), *argv, *variables])


def decode_request(data: bytes) -> tuple[list[bytes], Environment]:
    """Return command line and variables of a request. Raises ValueError."""
    count, *rest = data.split(b"\0")
    number = int(count)
    if not 0 <= number <= len(rest):
        raise ValueError("a count beyond the request")
    environ = {}
    for variable in rest[number:]:
        name, separator, value = variable.partition(b"=")
        if not separator:
            raise ValueError("a variable without a value")
        environ[name] = value
    return rest[:number], environ


def _is_own(directory: bytes) -> bool:
    try:
        found = posix.lstat(directory)
    except OSError:
        return False
    is_directory = found.st_mode & _S_IFMT == _S_IFDIR
    return is_directory and found.st_uid == posix.getuid() and not found.st_mode & _OTHERS_MAY_WRITE


def main(lattice: str, python: str) -> "NoReturn":
    """Run this process's command line."""
    _reset_signals()
    environ: Environment = posix.environ
    argv = [argument.encode(sys.getfilesystemencoding(), "surrogateescape") for argument in sys.argv[1:]]
    environ.pop(REQUEST_ENV.encode(), None)
    if _may_be_warm(argv, environ):
        _run(argv, environ, python)
        _reset_signals()  # from here on they are for this process
    _execute(lattice, argv, environ)


def _reset_signals() -> None:
    for number in (*_FORWARDED, _signal.SIGTSTP):
        if _signal.getsignal(number) != _signal.SIG_IGN:
            _signal.signal(number, _signal.SIG_DFL)


def _may_be_warm(argv: list[bytes], environ: Environment) -> bool:
    """Return whether this is a command in a cache, with all standard descriptors open; ``routing`` decides again."""
    if not argv or argv[0] in _OWN_PROCESS or b"_LATTICE_COMPLETE" in environ:
        return False
    if sys.stdin is None or sys.stdout is None or sys.stderr is None:
        return False
    if environ.get(b"LATTICE_REMOTE_LAUNCHER", b"").lower() in (b"off", b"no", b"0", b"false"):
        return False
    lattice = _find_project(environ)
    return lattice is not None and all(_exists(lattice + name) for name in (b"/remote.json", b"/cache_state.json"))


def _find_project(environ: Environment) -> bytes | None:
    """Return the surrounding ``.lattice``, as lattice finds it."""
    root = environ.get(b"LATTICE_ROOT")
    if root is not None:
        return root + b"/.lattice" if root else None
    try:
        current = posix.getcwdb()
    except OSError:
        return None
    while True:
        candidate = current.rstrip(b"/") + b"/.lattice"
        try:
            if posix.stat(candidate).st_mode & _S_IFMT == _S_IFDIR:
                return candidate
        except OSError:
            pass
        if current in (b"/", b""):
            return None
        current = current[: current.rindex(b"/")] or b"/"


def _exists(path: bytes) -> bool:
    try:
        posix.stat(path)
    except OSError:
        return False
    return True


def _run(argv: list[bytes], environ: Environment, python: str) -> None:
    """Run the command in the warm process and exit as it did; return if the real ``lattice`` must run it."""
    import _socket

    stream = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        path = socket_path(environ, world(environ))
        stream.settimeout(_READY_TIMEOUT_S)  # first: it also bounds the connection to a process that accepts none
        if path is None or not _connect(stream, path):
            return _start_warm(path, environ, python) if path is not None else None
        answer, received, _, _ = stream.recvmsg(1, _socket.CMSG_SPACE(4))
        identity = posix.urandom(16).hex().encode()
        request = encode_request(argv, {**environ, REQUEST_ENV.encode(): identity})
        here = posix.open(b".", posix.O_RDONLY | posix.O_DIRECTORY | posix.O_CLOEXEC)
        stream.settimeout(None)
    except OSError:
        return None
    if answer != READY or not received or len(request) > MAX_REQUEST_BYTES:
        return None
    began = time.clock_gettime(time.CLOCK_BOOTTIME)
    _forward_signals(int.from_bytes(received[0][2][:4], sys.byteorder))
    message = len(request).to_bytes(4, "little") + request
    passed = b"".join(number.to_bytes(4, sys.byteorder) for number in (0, 1, 2, here))
    try:
        sent = stream.sendmsg([message], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, passed)])
        if sent < len(message):  # an empty send would fail if the command has already ended
            stream.sendall(message[sent:])
        answer = stream.recv(2, _socket.MSG_WAITALL)
    except OSError:
        answer = b""  # the warm process was killed
    if answer[:1] == EXITED and len(answer) == 2:
        posix._exit(answer[1])
    if answer[:1] == KILLED and len(answer) == 2:
        _die_of(answer[1])
    if answer[:1] != LEAVE:
        environ[REQUEST_ENV.encode()] = identity + b":%f" % began
    return None


def _connect(stream: "_socket.socket", path: bytes) -> bool:
    try:
        found = posix.lstat(path)
        if not _is_own(path[: path.rindex(b"/")]) or found.st_mode & _S_IFMT != _S_IFSOCK:
            return False
        stream.connect(path)
    except OSError:
        return False
    return found.st_uid == posix.getuid()


def _forward_signals(child: int) -> None:
    """Forward signals to the child, which is in another process group."""

    def forward(number: int, _: object) -> None:
        try:
            _signal.pidfd_send_signal(child, number)
        except OSError:
            return  # it has exited: its exit code is on the way

    def suspend(number: int, _: object) -> None:
        forward(_signal.SIGSTOP, None)
        _signal.signal(number, _signal.SIG_DFL)
        posix.kill(posix.getpid(), number)  # stops here until SIGCONT
        _signal.signal(number, suspend)
        forward(_signal.SIGCONT, None)

    for number in _FORWARDED:
        if _signal.getsignal(number) != _signal.SIG_IGN:
            _signal.signal(number, forward)
    if _signal.getsignal(_signal.SIGTSTP) != _signal.SIG_IGN:
        _signal.signal(_signal.SIGTSTP, suspend)


def _die_of(number: int) -> "NoReturn":
    _signal.signal(number, _signal.SIG_DFL) if number not in (_signal.SIGKILL, _signal.SIGSTOP) else None
    posix.kill(posix.getpid(), number)
    posix._exit(128 + number)


def _start_warm(socket: bytes, environ: Environment, python: str) -> None:
    """Start a warm process for the next command; of two, one exits."""
    try:
        if time.time() - posix.stat(socket + b".failed").st_mtime < FAILED_S:
            return
    except OSError:
        pass
    kept = {name: value for name, value in environ.items() if name in _KEPT or name.startswith(_INTERPRETER)}
    try:
        child = posix.fork()
    except OSError:
        return  # no memory, or too many processes
    if child:
        posix.waitpid(child, 0)
        return
    try:
        posix.setsid()
        if posix.fork() == 0:
            _close_all()  # a pipe or a lock that the caller's shell has passed would stay open for hours
            null = posix.open("/dev/null", posix.O_RDWR)
            posix.set_inheritable(null, True)
            for number in (1, 2):  # the first one is 0
                posix.dup2(null, number)
            posix.execve(python, [python, "-P", "-m", "lattice_remote.client.launcher.warm"], kept)
    finally:
        posix._exit(0)  # in any case: the command is the parent's


def _close_all() -> None:
    for name in posix.listdir("/proc/self/fd"):
        try:
            posix.close(int(name))
        except OSError:  # the descriptor of the listing itself
            continue


def _execute(lattice: str, argv: list[bytes], environ: Environment) -> "NoReturn":
    try:
        posix.execve(lattice, [lattice.encode(sys.getfilesystemencoding(), "surrogateescape"), *argv], environ)
    except OSError as error:
        sys.stderr.write(f"lattice: cannot execute {lattice}: {error.strerror}\n")
        sys.stderr.write("lattice: the package was moved or removed; remove this launcher, or install it again\n")
        posix._exit(127)
