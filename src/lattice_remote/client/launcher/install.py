"""Installation of the launcher, and the state of its warm process."""

import glob
import os
import shlex
import shutil
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from lattice_remote.client.launcher import script
from lattice_remote.errors import Misuse, StorageError
from lattice_remote.files import write_atomically

__all__ = [
    "NAME",
    "WarmProcess",
    "default_directory",
    "find_warm",
    "first_on_path",
    "install",
    "is_ours",
    "path_line",
    "real_lattice",
    "remove",
    "stop_warm",
]

NAME = "lattice"
_MARK = "# Launcher of lattice-remote."
_MAX_SHEBANG_BYTES = 250
_TEMPLATE = """\
#!{python} -IS
{mark} Manage it with: lattice remote launcher
import sys

sys.path.insert(0, {folder!r})
try:
    from script import main
except ImportError:
    import posix

    posix.execv({lattice!r}, [{lattice!r}, *sys.argv[1:]])
del sys.path[0]
main({lattice!r}, {python!r})
"""


@dataclass(frozen=True, slots=True)
class WarmProcess:
    pid: int
    memory_bytes: int
    """Pages that it shares with no other process."""
    uptime_s: float


def default_directory() -> Path:
    return Path(platformdirs.user_data_dir("lattice-remote")) / "bin"


def real_lattice() -> str:
    return str(Path(sys.executable).parent / NAME)


def install(directory: Path) -> Path:
    """Write the launcher, perhaps over an earlier one, into ``directory``, which is created; return its path.

    Raises:
        Misuse: the platform lacks what a launcher needs, or the directory has another ``lattice``.
        StorageError: it cannot be written.
    """
    if not sys.platform.startswith("linux") or not hasattr(os, "pidfd_open"):
        raise Misuse("the launcher needs Linux 5.3 or newer")
    python = sys.executable
    if len(os.fsencode(python)) > _MAX_SHEBANG_BYTES or any(map(str.isspace, python)):
        raise Misuse(f"the path of this Python is too long, or has a space, for a script's first line: {python}")
    if not os.access(real_lattice(), os.X_OK):
        raise Misuse(f"lattice is not installed beside this Python: {real_lattice()} does not exist")
    path = Path(os.path.abspath(directory)) / NAME
    if path.exists() and not is_ours(path):
        raise Misuse(f"{path} is another program; choose another directory: lattice remote launcher install --dir DIR")
    text = _TEMPLATE.format(python=python, mark=_MARK, folder=str(Path(script.__file__).parent), lattice=real_lattice())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(str(path), text.encode(), mode=0o755)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
    return path


def remove(directory: Path) -> Path | None:
    """Remove the launcher from ``directory``; return its path, or None if there is none.

    Raises:
        Misuse: the ``lattice`` there is another program.
        StorageError: it cannot be removed.
    """
    path = Path(os.path.abspath(directory)) / NAME
    if not os.path.lexists(path):
        return None
    if not is_ours(path):
        raise Misuse(f"{path} is not a launcher of lattice-remote: it is left alone")
    try:
        path.unlink()
    except OSError as error:
        raise StorageError(f"cannot remove {path}: {error.strerror}") from error
    return path


def is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _MARK.encode() in file.read(1024)
    except OSError:
        return False


def first_on_path() -> Path | None:
    found = shutil.which(NAME)
    return None if found is None else Path(found)


def path_line(directory: Path) -> str:
    return f"export PATH={shlex.quote(str(directory))}:$PATH"


def find_warm() -> WarmProcess | None:
    path = _socket_path()
    pid = None if path is None else _listener_of(path)
    if pid is None:
        return None
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            # Also what is shared with the command that runs at this moment, which was forked.
            kib = sum(int(line.split()[1]) for line in file if line.startswith("Anonymous:"))
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            started = int(file.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return None
    return WarmProcess(pid, kib * 1024, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


def stop_warm(*, every: bool = False) -> list[int]:
    """Stop the warm process of this environment, or all of this user's, after its commands; return the process ids."""
    own = _socket_path()
    if own is None:
        return []
    directory = os.path.dirname(own)
    paths = sorted(glob.glob(os.path.join(glob.escape(directory), b"warm-*.sock"))) if every else [own]
    return [pid for pid in map(_stop, paths) if pid is not None]


def _stop(path: bytes) -> int | None:
    pid = _listener_of(path)
    if pid is None:
        return None
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        signal.pidfd_send_signal(process, signal.SIGTERM)
    except ProcessLookupError:
        return None
    finally:
        os.close(process)
    return pid


def _socket_path() -> bytes | None:
    environ = dict(os.environb)
    try:
        return script.socket_path(environ, script.world(environ))
    except (OSError, AttributeError):  # no Linux
        return None


def _listener_of(path: bytes) -> int | None:
    with socket.socket(socket.AF_UNIX) as stream:
        try:
            stream.connect(path)
        except OSError:
            return None
        pid, uid, _ = struct.unpack("3i", stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid) if uid == os.getuid() else None
