"""Audit hook that records the files a command touches and enforces its limits (I9).

The hook watches one thread while ``watch()`` is open, and sees every open, rename and removal before it happens. A
command may read ``.lattice/``, the private directory and Python, and write the first two, never through a symbolic
link.

Everything else raises ``AccessDenied``, which is remembered if a command swallows it. Python has no event for ``stat``,
nor for another process's actions between a check and the open.
"""

import os
import stat
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn, Protocol, runtime_checkable

from lattice_remote.protocol.paths import is_replicated

__all__ = [
    "HARMLESS",
    "REFUSED",
    "WATCHED",
    "AccessDenied",
    "AccessLog",
    "Announced",
    "Capture",
    "Move",
    "PreImages",
    "Replacement",
]

WATCHED = frozenset(
    {
        "open",  # io.open, os.open
        "os.rename",  # and os.replace
        "os.remove",  # and os.unlink
        "os.mkdir",
        "os.rmdir",
        "os.truncate",  # and os.ftruncate
        "os.link",
        "os.symlink",
        "os.listdir",
        "os.scandir",
        "os.chmod",
        "os.chown",
        "os.utime",
        "os.getxattr",
        "os.listxattr",
        "os.setxattr",
        "os.removexattr",
    }
)

HARMLESS = frozenset(
    {
        # Python itself, importing and running code in its own directories: reading those is watched.
        *("import", "compile", "exec", "code.__new__", "function.__new__", "marshal.load", "marshal.loads"),
        *("marshal.dumps", "sys._getframe", "sys._getframemodulename", "sys.unraisablehook", "sys.excepthook"),
        *("object.__getattr__", "object.__setattr__", "object.__delattr__", "builtins.id", "array.__new__"),
        # Announcements of an operation whose steps each have their own event.
        *("shutil.copyfile", "shutil.copymode", "shutil.copystat", "shutil.copytree", "shutil.move", "shutil.rmtree"),
        *("tempfile.mkstemp", "tempfile.mkdtemp", "os.walk", "os.fwalk", "glob.glob", "glob.glob/2"),
        *("pathlib.Path.glob", "pathlib.Path.rglob", "pathlib.Path.walk"),
        # Operations on descriptors.
        *("fcntl.flock", "fcntl.lockf", "fcntl.fcntl", "os.lockf"),
        # Lattice's locks block.
        "time.sleep",
    }
)

REFUSED = frozenset(
    {
        # Processes and threads: the capture would not see their actions.
        *("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn"),
        *("os.startfile", "os.startfile/2", "os.kill", "os.killpg", "signal.pthread_kill", "pty.spawn"),
        *("webbrowser.open", "_thread.start_new_thread", "_thread.start_joinable_thread"),
        # The network.
        *("socket.__new__", "socket.bind", "socket.connect", "socket.getaddrinfo", "socket.gethostbyaddr"),
        *("socket.gethostbyname", "socket.gethostname", "socket.getnameinfo", "socket.getservbyname"),
        *("socket.getservbyport", "socket.sendmsg", "socket.sendto", "socket.sethostname", "urllib.Request"),
        *("http.client.connect", "http.client.send", "ftplib.connect", "ftplib.sendcmd", "imaplib.open"),
        *("imaplib.send", "nntplib.connect", "nntplib.putline", "poplib.connect", "poplib.putline"),
        *("smtplib.connect", "smtplib.send", "telnetlib.Telnet.open", "telnetlib.Telnet.write"),
        # Other ways to reach files, and changes of where paths lead.
        *("sqlite3.connect", "sqlite3.connect/handle", "sqlite3.enable_load_extension", "sqlite3.load_extension"),
        *("mmap.__new__", "os.chdir", "os.fchdir", "os.chroot", "os.chflags", "os.lchflags", "os.lchmod"),
        *("os.add_dll_directory", "os.listdrives", "os.listmounts", "os.listvolumes", "shutil.chown"),
        *("shutil.make_archive", "shutil.unpack_archive", "fcntl.ioctl"),
        # The process: its environment goes to hooks, its memory and its hooks are the server's.
        *("os.putenv", "os.unsetenv", "resource.setrlimit", "resource.prlimit", "syslog.openlog", "syslog.closelog"),
        *("syslog.setlogmask", "syslog.syslog", "sys.addaudithook", "sys.setprofile", "sys.settrace"),
        *("sys.set_asyncgen_hook_firstiter", "sys.set_asyncgen_hook_finalizer", "sys.set_asyncgen_hooks_firstiter"),
        *("sys.set_asyncgen_hooks_finalizer", "sys._current_frames", "sys._current_exceptions"),
        *("sys.monitoring.register_callback", "sys.remote_exec", "gc.get_objects", "gc.get_referrers"),
        *("gc.get_referents", "setopencodehook", "cpython._PySys_ClearAuditHooks", "cpython.PyInterpreterState_New"),
        *("cpython.PyInterpreterState_Clear", "cpython.run_command", "cpython.run_file", "cpython.run_module"),
        *("cpython.run_interactivehook", "cpython.run_startup", "cpython.run_stdin", "ensurepip.bootstrap"),
        *("pdb.Pdb", "pickle.find_class", "builtins.breakpoint", "builtins.input", "builtins.input/result"),
        # Foreign code.
        *("ctypes.dlopen", "ctypes.dlsym", "ctypes.dlsym/handle", "ctypes.call_function", "ctypes.addressof"),
        *("ctypes.cdata", "ctypes.cdata/buffer", "ctypes.create_string_buffer", "ctypes.create_unicode_buffer"),
        *("ctypes.get_errno", "ctypes.set_errno", "ctypes.get_last_error", "ctypes.set_last_error"),
        *(
            "ctypes.seh_exception",
            "ctypes.set_exception",
            "ctypes.string_at",
            "ctypes.wstring_at",
            "ctypes.PyObj_FromPtr",
        ),
        *("ctypes.memoryview_at",),
    }
)
"""For the reader; every event outside the other two tables is refused."""


_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_HARMLESS_FILES = frozenset({"/dev/null", "/dev/urandom", "/dev/random"})
_HARMLESS_TREES = ("/usr/share/zoneinfo/", "/usr/lib/locale/", "/usr/share/locale/")


class AccessDenied(BaseException):
    """Forbidden operation. No ``Exception``, so it passes a command's own error handling."""


@dataclass(frozen=True)
class Move:
    source: str
    target: str


@dataclass
class AccessLog:
    """A command's actions on the tree, by relative path.

    Attributes:
        steps: first touches and renames, in order; a file that is written after its rename has both.
        appended: the file before its first touch, if only opened for appending.
        written: status and content (appended bytes, or all) after the newest write, if known.
        unshared: written names that no cache would accept.
        veto: the first refused operation.
    """

    steps: list[str | Move] = field(default_factory=list)
    appended: dict[str, os.stat_result | None] = field(default_factory=dict)
    written: dict[str, tuple[os.stat_result, bytes]] = field(default_factory=dict)
    unshared: list[str] = field(default_factory=list)
    veto: str | None = None
    private: bool = False


class PreImages(Protocol):
    """Receiver of each change before it is made, by absolute path."""

    def keep_for_append(self, path: str, status: os.stat_result | None) -> None: ...

    def keep_for_rewrite(self, path: str, status: os.stat_result | None) -> None: ...

    def keep_for_replace(self, path: str, status: os.stat_result | None) -> None:
        """The name will be removed, or given to another file."""

    def keep_for_move(self, path: str, status: os.stat_result | None) -> None: ...

    def keep_directory(self, path: str) -> None: ...


@dataclass(frozen=True)
class Replacement:
    """Replacing file; ``digest`` is needed only if users edit the file in place.

    ``before`` is the content of the replaced file, if known.
    """

    inode: int
    digest: bytes | None = None
    before: bytes | None = None


@runtime_checkable
class Announced(Protocol):
    """Pre-images that distinguish a transaction's changes from another process's."""

    def expect(self, statuses: Mapping[str, os.stat_result | None]) -> None: ...

    def announce(self, path: str, after: bytes | Replacement) -> None:
        """The file's next change appends these bytes, or replaces it by this file."""


class Capture:
    """The hook and its rules. Create one per process: an audit hook cannot be removed.

    Args:
        tree, private: the ``.lattice`` and the scratch directory, as real paths.
        code: directories of Python and its packages.
    """

    def __init__(self, tree: str, private: str, undo: PreImages, code: Sequence[str]) -> None:
        self._tree = tree.rstrip("/") + "/"
        self._private = private.rstrip("/") + "/"
        self._locks = self._tree + "locks/"
        self._undo = undo
        self._readable = (*_HARMLESS_TREES, *(path.rstrip("/") + "/" for path in code))
        self.pending: Collection[str] = ()
        """Files with pending writes, which ``before_change`` makes before any other change."""
        self.before_change: Callable[[], None] = lambda: None
        self._thread = 0
        self._touched = AccessLog()
        self._seen: set[str] = set()
        self._moved: dict[str, str] = {}
        self._roots = {self._tree[:-1], self._private[:-1]}
        self._real: set[str] = set()  # paths of the project that are no links, pipes or devices
        sys.addaudithook(self._hook)

    @contextmanager
    def watch(self) -> Iterator[AccessLog]:
        """Watch this thread; the yielded log is complete at the end of the block."""
        self._touched = AccessLog()
        self._seen.clear()
        self._moved.clear()
        self._real = set(self._roots)
        self._thread = threading.get_ident()
        try:
            yield self._touched
        finally:
            self._thread = 0

    def expect(self, paths: Iterable[str]) -> dict[str, os.stat_result | None]:
        """Check and note files that will be changed next; return their statuses."""
        places = dict(place for path in paths if (place := self._writable(path)) is not None)
        if isinstance(self._undo, Announced):
            self._undo.expect({path: _regular(status) for path, status in places.items()})
        return places

    def note_replace(self, source: str, target: str, status: os.stat_result | None, made: Replacement) -> None:
        """Note that an expected file is replaced without an event."""
        self._announce(target, made)
        self._undo.keep_for_move(source, None)
        self._undo.keep_for_replace(target, _regular(status))
        self._touch(target, status)

    def note_append(self, path: str, status: os.stat_result | None, data: bytes) -> None:
        """Note that ``data`` is appended to an expected file without an event."""
        self._announce(path, data)
        self._change(path, status, appends=True)

    def note_written(self, path: str, status: os.stat_result, data: bytes) -> None:
        """Note a file's status after a noted change, and the appended bytes or the whole new content."""
        self._touched.written[path.removeprefix(self._tree)] = status, data

    def _announce(self, path: str, after: bytes | Replacement) -> None:
        if isinstance(self._undo, Announced):
            self._undo.announce(path, after)

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        thread, self._thread = self._thread, 0
        try:
            yield
        finally:
            self._thread = thread

    def _hook(self, event: str, args: tuple[object, ...]) -> None:
        # Runs a hundred times per command: ignored events must cost next to nothing.
        if self._thread == 0 or event in HARMLESS or threading.get_ident() != self._thread:
            return
        self._check(event, args)

    def _check(self, event: str, args: tuple[object, ...]) -> None:
        handler = _HANDLERS.get(event)
        if handler is None:
            self._refuse(f"do what Python calls {event}")
        if self.pending and self._is_change(event, args):
            self.before_change()
        thread, self._thread = self._thread, 0  # the handlers open files themselves
        try:
            handler(self, args)
        finally:
            self._thread = thread

    def _is_change(self, event: str, args: tuple[object, ...]) -> bool:
        if event == "open":
            return isinstance(args[2], int) and args[2] & _WRITES != 0 and self._is_visible(args[0])
        if event in {"os.remove", "os.truncate"}:
            return self._is_visible(args[0])
        return event == "os.rename" and (self._is_visible(args[0]) or self._is_visible(args[1]))

    def _is_visible(self, path: object) -> bool:
        return (
            isinstance(path, str)
            and path.startswith(self._tree)
            and not path.startswith(self._locks)
            and not _is_temporary(path)
        )

    def _refuse(self, what: str) -> NoReturn:
        if self._touched.veto is None:
            self._touched.veto = what
        raise AccessDenied(what)

    # --- where a path leads ---

    def _absolute(self, given: object) -> str:
        if isinstance(given, bytes):
            given = os.fsdecode(given)
        if not isinstance(given, str):
            self._refuse("use a file in an unknown way")
        if not given.startswith("/"):
            self._refuse("use a relative path")  # it may be relative to a descriptor, which not every event names
        path = os.path.normpath(given)
        if "/../" in given and f"{path}/".startswith((self._tree, self._private)):
            self._refuse("use a path that goes up again")  # behind a symbolic link that leads outside
        return path

    def _check_real(self, path: str) -> None:
        """Refuse a path that leads through a symbolic link, or to a pipe or a device."""
        if path not in self._real:
            self._examine(path)

    def _examine(self, path: str) -> os.stat_result | None:
        self._check_real(path[: path.rindex("/")])
        status = _status(path)
        if status is None:
            return None
        if stat.S_ISLNK(status.st_mode):
            self._refuse(f"follow a symbolic link at {self._name(path)}")
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            self._refuse(f"use what is no plain file at {self._name(path)}")  # a pipe would block the writer
        self._real.add(path)
        return status

    def _name(self, path: str) -> str:
        return repr(path.removeprefix(self._tree).removeprefix(self._private))  # it may be invalid Unicode

    def _read(self, given: object) -> None:
        path = self._absolute(given)
        if f"{path}/".startswith((self._tree, self._private)):
            self._check_real(path)
        elif path not in _HARMLESS_FILES and not f"{path}/".startswith(self._readable):
            self._refuse("read a file of the server")

    def _writable(self, given: object) -> tuple[str, os.stat_result | None] | None:
        """Return path and status of a tree file that needs a pre-image, None if it may be written without."""
        path = self._absolute(given)
        if path.startswith(self._locks):
            self._check_real(path)
            return None
        if path.startswith(self._tree):
            return path, self._examine(path)
        # tempfile opens the name of its directory, with an opener that chooses the file.
        if f"{path}/".startswith(self._private):
            self._check_real(path)
            self._touched.private = True
            return None
        if path != "/dev/null":
            self._refuse("write a file outside the project")
        return None

    # --- the events ---

    def _open(self, args: tuple[object, ...]) -> None:
        given, flags = args[0], args[2]
        if isinstance(given, int):
            return  # the opening of the descriptor was checked
        if not isinstance(flags, int) or not flags & _WRITES:
            self._read(given)
            return
        place = self._writable(given)
        if place is not None:
            self._change(*place, appends=flags & os.O_APPEND != 0 and not flags & os.O_TRUNC)

    def _change(self, path: str, status: os.stat_result | None, *, appends: bool = False) -> None:
        self._touch(path, status, appends=appends)
        if appends:
            self._undo.keep_for_append(path, _regular(status))
        else:
            self._undo.keep_for_rewrite(path, _regular(status))

    def _rename(self, args: tuple[object, ...]) -> None:
        source, target = self._writable(args[0]), self._writable(args[1])
        if source is not None:
            path, status = source
            if status is not None and stat.S_ISDIR(status.st_mode):
                self._refuse("rename a directory of the project")
            self._undo.keep_for_move(path, status)
            self._real.discard(path)
        if target is not None:
            self._undo.keep_for_replace(target[0], _regular(target[1]))
        if source is None or target is None:
            self._touch_both(source, target)
            return
        relative = Move(source[0].removeprefix(self._tree), target[0].removeprefix(self._tree))
        if is_replicated(relative.source) and is_replicated(relative.target):
            self._touched.steps.append(relative)
            self._seen.update((source[0], target[0]))
            self._touched.appended.pop(relative.target, None)
            self._moved[relative.target] = relative.source
        else:
            self._touch_both(source, target)

    def _touch_both(self, *places: tuple[str, os.stat_result | None] | None) -> None:
        for place in places:
            if place is not None:
                self._touch(*place)

    def _remove(self, args: tuple[object, ...]) -> None:
        if (place := self._writable(args[0])) is not None:
            path, status = place
            self._undo.keep_for_replace(path, _regular(status))
            self._touch(path, status)
            self._real.discard(path)

    def _make_directory(self, args: tuple[object, ...]) -> None:
        if (place := self._writable(args[0])) is not None:
            self._undo.keep_directory(place[0])

    def _remove_directory(self, args: tuple[object, ...]) -> None:
        if self._writable(args[0]) is not None:
            self._refuse("remove a directory of the project")

    def _change_mode(self, args: tuple[object, ...]) -> None:
        if not isinstance(args[0], int):
            self._writable(args[0])  # permissions and times are not replicated; only the path matters

    def _truncate(self, args: tuple[object, ...]) -> None:
        if isinstance(args[0], int):
            self._refuse("cut a file by its descriptor")
        if (place := self._writable(args[0])) is not None:
            self._change(*place)

    def _link(self, _: tuple[object, ...]) -> None:
        self._refuse("make a link")

    def _list(self, args: tuple[object, ...]) -> None:
        if not isinstance(args[0], int):
            self._read(args[0])

    def _touch(self, path: str, status: os.stat_result | None, *, appends: bool = False) -> None:
        relative = path.removeprefix(self._tree)
        self._touched.written.pop(relative, None)
        if path in self._seen:
            if relative in self._moved and relative not in self._touched.steps:
                self._touched.steps.append(relative)
            if not appends:
                self._touched.appended.pop(relative, None)
                self._touched.appended.pop(self._moved.get(relative, relative), None)
            return
        self._seen.add(path)
        if _is_temporary(path):
            return
        if not is_replicated(relative):
            self._touched.unshared.append(relative)
            return
        self._touched.steps.append(relative)
        if appends:
            self._touched.appended[relative] = status


def _is_temporary(path: str) -> bool:
    return path.startswith(".tmp.", path.rfind("/") + 1)


def _status(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:
        return None


def _regular(status: os.stat_result | None) -> os.stat_result | None:
    return status if status is not None and stat.S_ISREG(status.st_mode) else None


_HANDLERS = {
    "open": Capture._open,
    "os.rename": Capture._rename,
    "os.remove": Capture._remove,
    "os.mkdir": Capture._make_directory,
    "os.rmdir": Capture._remove_directory,
    "os.truncate": Capture._truncate,
    "os.link": Capture._link,
    "os.symlink": Capture._link,
    "os.listdir": Capture._list,
    "os.scandir": Capture._list,
    "os.chmod": Capture._change_mode,
    "os.chown": Capture._change_mode,
    "os.utime": Capture._change_mode,
    "os.setxattr": Capture._change_mode,
    "os.removexattr": Capture._change_mode,
    "os.getxattr": Capture._list,
    "os.listxattr": Capture._list,
}
assert _HANDLERS.keys() == WATCHED, "the table says which events are watched"
