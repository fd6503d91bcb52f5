"""Where the agent of this user and this package version is to be found. Standard library only."""

import hashlib
import os
import stat
import tempfile
import time

from lattice_remote import __version__
from lattice_remote.errors import StorageError

__all__ = ["Runtime", "boot_time", "check", "check_socket", "locate", "prepare"]

DIRECTORY_ENV = "LATTICE_REMOTE_RUNTIME_DIR"
_LANGUAGE = 4
"""Counted up when what commands and agents say to each other changes between releases: an agent of the same version
that was started before does not understand, and is left alone until it leaves."""
_OTHERS_MAY_WRITE = 0o022
_MAX_SOCKET_PATH_BYTES = 100
"""The kernel takes 108 bytes on Linux, 104 on macOS."""


class Runtime:
    """The agent's files: ``directory``, and in it the paths of its ``socket``, ``lock``, ``log`` and ``pid``."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        name = os.path.join(directory, f"agent-{__version__}-{_LANGUAGE}")
        self.socket = name + ".sock"
        self.lock = name + ".lock"
        self.log = name + ".log"
        self.pid = name + ".pid"


def boot_time() -> float:
    """Return seconds on a clock that, unlike the monotonic one of Linux, goes on while the machine sleeps.

    It is the same for all processes of a machine until that is started again.
    """
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def locate() -> Runtime:
    """Return where the agent's files are; nothing is created.

    The versioned name lets an upgraded package start its own agent, while the old one leaves by itself.
    """
    given = os.environ.get(DIRECTORY_ENV)
    if given:
        directory = os.path.abspath(given)
    elif session := os.environ.get("XDG_RUNTIME_DIR"):
        directory = os.path.join(session, "lattice-remote")
    else:
        directory = os.path.join(tempfile.gettempdir(), f"lattice-remote-{_user()}")
    if len(os.fsencode(Runtime(directory).socket)) > _MAX_SOCKET_PATH_BYTES:
        short = hashlib.sha256(os.fsencode(directory)).hexdigest()[:12]
        directory = os.path.join(tempfile.gettempdir(), f"lattice-remote-{_user()}-{short}")
        if len(os.fsencode(Runtime(directory).socket)) > _MAX_SOCKET_PATH_BYTES:
            directory = f"/tmp/lattice-remote-{_user()}-{short}"  # noqa: S108 - it is checked to be ours alone
    return Runtime(directory)


def prepare(runtime: Runtime) -> None:
    """Make the directory, for this user alone.

    Raises:
        StorageError: it can't be made, or is somebody else's, or is a link: a socket there is not to be trusted.
    """
    try:
        os.makedirs(runtime.directory, mode=0o700, exist_ok=True)
        mode = stat.S_IMODE(_check_owner(runtime).st_mode)
        os.chmod(runtime.directory, 0o700)
        if mode & _OTHERS_MAY_WRITE:
            _remove_what_others_left(runtime.directory)
    except OSError as error:
        raise StorageError(f"cannot make {runtime.directory} for the agent: {error.strerror}") from error


def check(runtime: Runtime) -> None:
    """Make sure, before anything is said to a socket in it, that the directory is this user's own.

    Raises:
        StorageError: it is somebody else's, or a link, or others may write to it.
        OSError: there is none, or it can't be looked at.
    """
    if _check_owner(runtime).st_mode & _OTHERS_MAY_WRITE:
        raise StorageError(f"others may write to {runtime.directory}")


def check_socket(runtime: Runtime) -> None:
    """Make sure that the socket was made by this user.

    Raises:
        StorageError: it is somebody else's, or no socket.
        OSError: there is none, or it can't be looked at.
    """
    found = os.lstat(runtime.socket)
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != _user():
        raise StorageError(f"{runtime.socket} is not a socket of this user")


def _check_owner(runtime: Runtime) -> os.stat_result:
    found = os.lstat(runtime.directory)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != _user():
        raise StorageError(f"{runtime.directory} is not a directory of this user; remove it, or set {DIRECTORY_ENV}")
    return found


def _remove_what_others_left(directory: str) -> None:
    """Others could write here until now: what is not plainly ours must not be opened, written through or talked to."""
    for entry in os.scandir(directory):
        if entry.is_symlink() or entry.stat(follow_symlinks=False).st_uid != _user():
            os.unlink(entry.path)


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0
