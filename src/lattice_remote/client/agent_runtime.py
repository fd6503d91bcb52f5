"""Location of the agent that serves a command: same user, package version and environment. Standard library only.

The environment is all that an agent cannot take from a request: configuration directory, namespaces, sandbox, and the
variables that say how to reach a server. A digest of it names the agent's files, so a command finds only an agent that
behaves like the command itself (I13).
"""

import contextlib
import hashlib
import os
import stat
import time

from lattice_remote import __version__
from lattice_remote.client import credentials
from lattice_remote.errors import StorageError

__all__ = [
    "DIRECTORY_ENV",
    "Runtime",
    "absolute_paths",
    "boot_time",
    "check",
    "check_socket",
    "configuration",
    "locate",
    "namespaces",
    "new_request_id",
    "others",
    "prepare",
    "reset_signals",
    "short_directories",
    "temporary_directory",
]

DIRECTORY_ENV = "LATTICE_REMOTE_RUNTIME_DIR"
_LANGUAGE = 6
"""Incremented when requests or answers between commands and agents change within a version."""
_OTHERS_MAY_WRITE = 0o022
_MAX_SOCKET_PATH_BYTES = 103
"""The kernel takes 108 bytes on Linux, 104 on macOS, each with a NUL at the end."""
_PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "SOCKS_PROXY", "WSS_PROXY", "WS_PROXY")
_PATHS = ("SSL_CERT_FILE", "SSL_CERT_DIR", "OPENSSL_CONF", "SSLKEYLOGFILE")
_PRELOADED = ("LD_PRELOAD", "DYLD_INSERT_LIBRARIES")
"""A library such as torsocks replaces the network of a process."""
_VARIABLES = (*_PROXIES, *(name.lower() for name in _PROXIES), *_PATHS, *_PRELOADED)
_NAMESPACES = ("mnt", "net", "user")


class Runtime:
    """The agent's files; ``name`` is a digest of package version and environment."""

    def __init__(self, directory: str, name: str) -> None:
        self.directory = directory
        self.name = name
        path = os.path.join(directory, name)
        self.socket = path + ".sock"
        self.lock = path + ".lock"
        self.log = path + ".log"
        self.pid = path + ".pid"


def boot_time() -> float:
    """Return seconds on a clock that all processes share, and that runs during sleep."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def new_request_id() -> str:
    """Return 128 random bits in hexadecimal: a retry under the same id runs once (I6)."""
    return os.urandom(16).hex()


def locate() -> Runtime:
    """Return the files of this process's agent; nothing is created. Raises StorageError."""
    name = f"agent-{_digest()}"
    given, session = os.environ.get(DIRECTORY_ENV), os.environ.get("XDG_RUNTIME_DIR", "")
    if given:
        directory = os.path.abspath(given)
    elif _is_own(session):
        directory = os.path.join(session, "lattice-remote")
    else:
        directory = os.path.join(temporary_directory(), f"lattice-remote-{_user()}")
    if not _fits(directory, name):
        short = f"{_short_prefix()}{hashlib.sha256(os.fsencode(directory)).hexdigest()[:12]}"
        directory = os.path.join(temporary_directory(), short)
        if not _fits(directory, name):
            directory = f"/tmp/{short}"  # noqa: S108 - it is checked to be ours alone
    return Runtime(directory, name)


def _short_prefix() -> str:
    return f"lattice-remote-{_user()}-"


def short_directories() -> list[str]:
    found = []
    for parent in {os.environ.get("TMPDIR") or "/tmp", "/tmp"}:  # noqa: S108 - only this user's are returned
        with contextlib.suppress(OSError), os.scandir(parent) as entries:
            ours = (each for each in entries if each.name.startswith(_short_prefix()))
            found += [each.path for each in ours if each.stat(follow_symlinks=False).st_uid == _user()]
    return found


def others(place: Runtime) -> list[Runtime]:
    try:
        names = sorted(os.listdir(place.directory))
    except OSError:
        return []
    found = [name.removesuffix(".sock") for name in names if name.startswith("agent-") and name.endswith(".sock")]
    return [Runtime(place.directory, name) for name in found if name != place.name]


def temporary_directory() -> str:
    """Return a temporary directory, never the current one. Raises StorageError."""
    candidates = (os.environ.get("TMPDIR", ""), "/tmp", "/var/tmp")  # noqa: S108 - what is made there is checked
    for path in candidates:
        if os.path.isabs(path) and os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK):
            return path
    raise StorageError(f"no writable directory for temporary files; set {DIRECTORY_ENV} or TMPDIR")


def configuration() -> str:
    """Identify the configuration directory by device and inode, else by path."""
    path = credentials.directory()
    try:
        found = os.stat(path)
    except OSError:
        return path
    return f"{found.st_dev}:{found.st_ino}"


def namespaces(process: str = "self") -> tuple[str, ...]:
    """Return the namespaces that decide which files and hosts are reached. Raises OSError."""
    return tuple(os.readlink(f"/proc/{process}/ns/{name}") for name in _NAMESPACES)


def absolute_paths() -> dict[str, str]:
    """Return the variables that an agent needs, independent of the current directory."""
    return {name: os.path.abspath(os.environ[name]) for name in _PATHS if os.environ.get(name)}


def _digest() -> str:
    parts: list[str | None] = [__version__, str(_LANGUAGE), configuration(), _sandbox()]
    try:
        parts += namespaces()
        root = os.stat("/")
        parts.append(f"{root.st_dev}:{root.st_ino}")  # a chroot is not a namespace
    except OSError:
        parts.append("no namespaces")
    paths = absolute_paths()
    parts += [paths.get(name, os.environ.get(name)) for name in _VARIABLES]
    return hashlib.sha256(repr(parts).encode(errors="surrogateescape")).hexdigest()[:10]


def _sandbox() -> str:
    try:
        with open("/proc/self/status", "rb", buffering=0) as file:
            text = file.read(8192)
    except OSError:
        return ""
    return text.partition(b"NoNewPrivs:")[2].partition(b"Speculation")[0].decode("ascii", "replace")


def _is_own(session: str) -> bool:
    """Return whether ``XDG_RUNTIME_DIR`` is this user's: ``sudo`` and ``su`` keep another's."""
    try:
        found = os.stat(session)
    except OSError:
        return False
    is_own = os.path.isabs(session) and stat.S_ISDIR(found.st_mode) and found.st_uid == _user()
    return is_own and os.access(session, os.W_OK | os.X_OK)


def _fits(directory: str, name: str) -> bool:
    return len(os.fsencode(Runtime(directory, name).socket)) <= _MAX_SOCKET_PATH_BYTES


def reset_signals() -> None:
    """Handle signals as a new process does: the command that started this one may have ignored or blocked some."""
    import signal

    kept = {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ}  # Python itself ignores the last two
    for number in signal.valid_signals() - kept:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def prepare(runtime: Runtime) -> None:
    """Create the directory for this user alone. Raises StorageError, also for a link."""
    try:
        os.makedirs(runtime.directory, mode=0o700, exist_ok=True)
        mode = stat.S_IMODE(_check_owner(runtime).st_mode)
        os.chmod(runtime.directory, 0o700)
        if mode & _OTHERS_MAY_WRITE:
            _remove_what_others_left(runtime.directory)
    except OSError as error:
        raise StorageError(f"cannot create {runtime.directory} for the agent: {error.strerror}") from error


def check(runtime: Runtime) -> None:
    """Require that the directory is this user's alone. Raises StorageError, OSError."""
    if _check_owner(runtime).st_mode & _OTHERS_MAY_WRITE:
        raise StorageError(f"{runtime.directory} is writable by others")


def check_socket(runtime: Runtime) -> None:
    """Require that this user created the socket. Raises StorageError, OSError."""
    found = os.lstat(runtime.socket)
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != _user():
        raise StorageError(f"{runtime.socket} is not a socket of this user")


def _check_owner(runtime: Runtime) -> os.stat_result:
    found = os.lstat(runtime.directory)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != _user():
        raise StorageError(f"{runtime.directory} is not a directory of this user; remove it, or set {DIRECTORY_ENV}")
    return found


def _remove_what_others_left(directory: str) -> None:
    for entry in os.scandir(directory):
        if entry.is_symlink() or entry.stat(follow_symlinks=False).st_uid != _user():
            os.unlink(entry.path)


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0
