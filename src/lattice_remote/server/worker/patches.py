"""Patches of lattice inside the worker, installed by ``Executor``. Each states how it differs from the original."""

import copy
import errno
import fcntl
import io
import json
import os
import shutil
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path, PosixPath
from typing import IO, Any, NamedTuple, NoReturn

import click
import msgspec

from lattice_remote.files import SAFE, write_all
from lattice_remote.protocol.operations import (
    MIN_MEMO_BYTES,
    FlatObject,
    digest_of,
    flat_json,
    flat_value,
    remember_flat,
)
from lattice_remote.protocol.paths import is_editable
from lattice_remote.server.tree.capture import Capture, Replacement
from lattice_remote.server.tree.tree import EDITED_BY_HAND, INLINE_BYTES, RACY_NS, is_same_file

__all__ = [
    "LOCK_PREFIX",
    "Clock",
    "Copier",
    "Disk",
    "FlatJson",
    "IndentedJson",
    "Lock",
    "LockBusy",
    "LockTable",
    "Mover",
    "WriteSet",
    "parse_faster",
    "root_finder",
]

LOCK_PREFIX = "locks/"
"""Prefix of lock names (``locks/tasks_...``) among resource names, which have no slash."""

_MAX_OPEN_LOCKS = 128
_MAX_KEPT_CHARS = 16 * 1024
"""Of a parsed line: an argument may have a megabyte."""
_OFTEN_READ = ("/.lattice/config.json", "/.lattice/ids.json")
"""Read by almost every command."""
_SNAPSHOTS = "/.lattice/tasks/"
_MAX_RECENT_FILES, _MAX_RECENT_BYTES = 128, 16 * 1024
_USUAL_ENTRIES = {".lattice", "config.json", "ids.json", "events", "locks", "notes", "plans", "resources", "tasks"}
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class Clock:
    """Replacement of ``time`` in resource commands: calls ``pause``, which does not return, instead of sleeping."""

    def __init__(self, pause: Callable[[], NoReturn]) -> None:
        self._pause = pause
        self.is_over = False
        self._asked = 0

    def restart(self, *, is_over: bool) -> None:
        """With ``is_over`` the command's timeout expires after the first attempt."""
        self.is_over, self._asked = is_over, 0

    def monotonic(self) -> float:
        self._asked += 1
        return float("inf") if self.is_over and self._asked > 1 else 0.0

    def sleep(self, seconds: float) -> NoReturn:
        del seconds
        self._pause()

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class Mover:
    """Replacement of ``shutil`` in ``attach``: moves an attached file instead of copying it again."""

    def __init__(self) -> None:
        self.own_copies: Collection[str] = ()

    def copy2(self, source: str, target: str) -> str:
        if source in self.own_copies:
            with suppress(OSError):  # another file system, for example: copy
                os.replace(source, target)
                return target
        return shutil.copy2(source, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(shutil, name)


def parse_faster(command: click.Command) -> None:
    """Make a command build its parameters, parser and defaults once; Click does it several times for each line."""
    _CommandParser(command)


class _CommandParser:
    """Replacement of a command's own parsing.

    The policy and Click parse each line, one after the other: the second time gets the first one's result. Options that
    are not given get their default without being processed again.
    """

    def __init__(self, command: click.Command) -> None:
        context = click.Context(command, info_name=command.name, **command.context_settings)
        self._parameters = self._processed = command.get_params(context)
        self._defaults = _fixed_defaults(command, self._parameters)
        self._printing = [name for name, (_, _, is_exposed) in self._defaults.items() if not is_exposed]
        self._parser = command.make_parser(context)
        self._parse, self._process = self._parser.parse_args, command.parse_args
        self._line: list[str] = []
        self._parsed: Any = None
        setattr(self._parser, "parse_args", self._parse_once)  # noqa: B010 - a method
        setattr(command, "get_params", lambda _: self._processed)  # noqa: B010 - likewise
        setattr(command, "make_parser", self._make_parser)  # noqa: B010 - likewise
        setattr(command, "parse_args", self._parse_args)  # noqa: B010 - likewise

    def _make_parser(self, ctx: click.Context) -> Any:
        self._parser.ctx = ctx
        return self._parser

    def _parse_once(self, args: list[str]) -> tuple[dict[str, Any], list[str], list[Any]]:
        if self._parsed is None or args != self._line:
            line = list(args) if sum(map(len, args)) <= _MAX_KEPT_CHARS else []
            parsed = self._parse(args)  # changes the list
            self._line, self._parsed = line, parsed if line else None
        else:
            parsed = self._parsed
        given, rest, order = parsed
        return dict(given), list(rest), list(order)

    def _parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given, _, _ = self._make_parser(ctx).parse_args(list(args))
        prints_help = not args or not given.keys().isdisjoint(self._printing)
        if prints_help or ctx.default_map or ctx.auto_envvar_prefix or ctx.resilient_parsing:
            return self._process(ctx, args)
        for name, (value, source, is_exposed) in self._defaults.items():
            if name not in given:
                ctx.set_parameter_source(name, source)
                if is_exposed:
                    ctx.params[name] = value
        self._processed = [each for each in self._parameters if each.name in given or each.name not in self._defaults]
        try:
            return self._process(ctx, args)
        finally:
            self._processed = self._parameters


def _fixed_defaults(command: click.Command, parameters: list[click.Parameter]) -> dict[str, tuple[Any, Any, bool]]:
    """Return value, source and exposure by name, of the options that are always the same unless given."""
    uses = Counter(parameter.name for parameter in parameters)
    defaults = {}
    for option in parameters:
        if isinstance(option, click.Option) and uses[option.name] == 1 and _has_fixed_default(option):
            assert option.name is not None, "each option has one"
            probe = click.Context(command)
            option.handle_parse_result(probe, {}, [])
            value, source = probe.params.get(option.name), probe.get_parameter_source(option.name)
            if isinstance(value, Hashable):  # a command could change another one
                defaults[option.name] = value, source, option.expose_value
    return defaults


def _has_fixed_default(option: click.Option) -> bool:
    if not option.expose_value:  # the callback of --help or --version does nothing unless that is given
        return getattr(option.callback, "__module__", "") == "click.decorators"
    may_vary = option.callback or option.required or option.envvar or option.prompt or callable(option.default)
    return type(option) is click.Option and not may_vary


def root_finder(root: Path, find_root: Callable[[Path | None], Path | None]) -> Callable[..., Path | None]:
    """Return a replacement of ``find_root`` for the project at ``root``: one look at the disk."""
    known = _Directory(root)
    directory = str(root / ".lattice")
    return lambda start=None: known if os.path.isdir(directory) else find_root(start)


class _Directory(PosixPath):
    """A path that makes those of its usual entries once: a command makes each several times."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._entries: dict[str, Path] = {}

    def __truediv__(self, name: Any) -> Any:
        if name not in _USUAL_ENTRIES:
            return Path(self, name)
        if (entry := self._entries.get(name)) is None:
            entry = self._entries[name] = _Directory(Path(f"{self}/{name}"))
        return entry

    def with_segments(self, *segments: Any) -> Any:
        return Path(*segments)


# --- locks ---


class LockBusy(BaseException):
    """Another process holds a lock. No ``Exception``, so it passes a command's own error handling."""

    def __init__(self, key: str, timeout_s: float) -> None:
        super().__init__(f"Could not acquire lock '{key}' within {timeout_s:g}s")
        self.key = key
        self.timeout_s = timeout_s


class LockTable:
    """Lattice's locks, held from first use until ``release_all``, so plain ``lattice`` never reads files that may be
    undone.

    Does not wait for a lock of another process. Files of recent locks stay open.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._taken: dict[str, _LockFile] = {}
        self._open: dict[str, _LockFile] = {}  # free, newest last
        self._behind: Collection[str] = ()

    def begin(self, behind: Collection[str] = ()) -> None:
        """Start a command that must not take the locks in ``behind``: earlier requests wait for them."""
        self._behind = behind

    def acquire(self, path: Path, timeout_s: float) -> None:
        """Take a lock, unless already held.

        Raises LockBusy, also if an earlier request waits for it; OSError as raised by ``filelock``.
        """
        name = str(path)
        if name in self._taken:
            return
        key = os.path.basename(name).removesuffix(".lock")
        if LOCK_PREFIX + key in self._behind or (file := self._try_lock(name)) is None:
            raise LockBusy(key, timeout_s)
        self._taken[name] = file

    def _try_lock(self, path: str) -> "_LockFile | None":
        for known in (self._open.pop(path, None), None):
            file = known or _open_lock(path)
            if file is None or not _lock(file.descriptor):
                return None
            if file.identity == _identity_at(path):
                return file
            os.close(file.descriptor)  # a lock on a removed file excludes no other process
        return None

    @contextmanager
    def trying(self, *keys: str) -> Iterator[bool]:
        """Hold locks for the block (those already held for longer); yield False if one is busy."""
        held = set(self._taken)
        try:
            for key in keys:
                self.acquire(self._directory / f"{key}.lock", 0.0)
            yield True
        except LockBusy:
            yield False
        finally:
            self._release(self._taken.keys() - held)

    def release_all(self) -> None:
        self._behind = ()
        self._release(tuple(self._taken))

    def _release(self, paths: Collection[str]) -> None:
        for path in paths:
            file = self._taken.pop(path)
            fcntl.flock(file.descriptor, fcntl.LOCK_UN)
            self._open[path] = file
        while len(self._open) > _MAX_OPEN_LOCKS:
            os.close(self._open.pop(next(iter(self._open))).descriptor)


class _LockFile(NamedTuple):
    descriptor: int
    identity: tuple[int, int]


class Lock:
    """Replacement of ``FileLock``: the same flock on the same file, at a tenth of the cost."""

    def __init__(self, take: Callable[[Path, float], None], path: Path, timeout: float) -> None:
        self._take, self._path, self._timeout_s = take, path, timeout

    def acquire(self) -> None:
        self._take(self._path, self._timeout_s)

    def release(self) -> None: ...


def _open_lock(path: str) -> _LockFile | None:
    """Open a lock's file as ``filelock`` does; return None if that would wait for a lease of another process."""
    flags = os.O_RDWR | os.O_CREAT | SAFE
    try:
        descriptor = os.open(path, flags, 0o666)
    except BlockingIOError:
        return None
    except (FileNotFoundError, NotADirectoryError):
        # A project from git or a zip file has no empty directory.
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor = os.open(path, flags, 0o666)
    return _LockFile(descriptor, _identity(os.fstat(descriptor)))


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in {errno.EACCES, errno.EAGAIN}:
            return False
        raise
    return True


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _identity_at(path: str) -> tuple[int, int] | None:
    try:
        return _identity(os.lstat(path))
    except OSError:
        return None


# --- writes ---


class WriteSet:
    """Pending writes of the running command to existing files, published when it succeeds.

    Deferred are ``atomic_write`` to a file, ``jsonl_append`` to a log, and ``write_text`` to a plan or notes, if it
    exists. Any other write first publishes these, the event log before the snapshot (I8).

    Args:
        sync_directory: makes a rename durable; None if lattice's fsyncs are omitted.
        capture: notes each write before it is published.
    """

    def __init__(self, sync_directory: Callable[[Path], None] | None, capture: Capture | None = None) -> None:
        self._sync_directory = sync_directory
        self._capture = capture
        self._open: Callable[..., IO[Any]] = io.open
        self._often_read: dict[str, tuple[tuple[int, ...], bytes]] = {}  # by path: signature and content
        self._recent: dict[str, tuple[tuple[int, ...], bytes]] = {}  # by path: replacing files, the newest last
        self._waiting: dict[str, str | list[str]] = {}  # by target: the replacing file, or the lines to append
        self._made: dict[int, str] = {}  # new files, by descriptor
        self._written: dict[str, tuple[os.stat_result, bytes]] = {}  # status and whole content of new files
        if capture is not None:
            capture.pending, capture.before_change = self._waiting, self.publish

    def forget(self) -> None:
        self._waiting.clear()
        self._made.clear()
        self._written.clear()

    def publish(self) -> None:
        """Perform the pending writes in order. Raises OSError; the transaction must then be rolled back."""
        if not self._waiting:
            return
        waiting = self._waiting.copy()
        self._waiting.clear()
        if self._capture is None:
            self._publish(waiting, None, {})
        else:
            with self._capture.unwatched():
                self._publish(waiting, self._capture, self._capture.expect(waiting))

    def _publish(
        self,
        waiting: dict[str, str | list[str]],
        capture: Capture | None,
        statuses: Mapping[str, os.stat_result | None],
    ) -> None:
        for target, content in waiting.items():
            if isinstance(content, str):
                self._publish_file(content, target, capture, statuses.get(target))
            else:
                self._publish_lines("".join(content).encode(), target, capture, statuses.get(target))
            if self._sync_directory is not None:
                self._sync_directory(Path(target).parent)

    def _publish_file(self, source: str, target: str, capture: Capture | None, status: os.stat_result | None) -> None:
        if capture is None:
            _replace(source, target)
            return
        made, data = self._written.get(source) or (os.stat(source), None)
        digest = digest_of(data or Path(source).read_bytes()) if target.endswith(EDITED_BY_HAND) else None
        before = self._recent_content(target, status)
        capture.note_replace(source, target, status, Replacement(made.st_ino, digest, before))
        self._recent.pop(target, None)
        _replace(source, target)
        if data is not None:
            capture.note_written(target, made, data)
            if _SNAPSHOTS in target and len(data) <= _MAX_RECENT_BYTES:
                self._keep_recent(target, made, data)

    def _keep_recent(self, path: str, made: os.stat_result, data: bytes) -> None:
        with suppress(OSError):
            now = os.lstat(path)  # the rename has changed its status change time
            if is_same_file(made, now):
                self._recent[path] = _signature(now), data
                if len(self._recent) > _MAX_RECENT_FILES:
                    del self._recent[next(iter(self._recent))]

    def _recent_content(self, path: str, status: os.stat_result | None) -> bytes | None:
        """Return the content of a file that this process wrote and no other has changed since.

        An edit in place may keep the size and restore the modification time, but not the status change time.
        """
        signature, data = self._recent.get(path, (None, None))
        return data if status is not None and signature == _signature(status) else None

    def _publish_lines(self, data: bytes, target: str, capture: Capture | None, status: os.stat_result | None) -> None:
        if capture is not None:
            capture.note_append(target, status, data)
        with self._open(target, "ab", buffering=0) as log:
            write_all(log.fileno(), data)
            if self._sync_directory is not None:
                os.fsync(log.fileno())
            if capture is not None:
                capture.note_written(target, os.fstat(log.fileno()), data)

    # --- replaced functions ---

    def mkstemp(self, *, dir: str | Path, prefix: str) -> tuple[int, str]:  # noqa: A002 - the original's name
        """Create a file like that of ``tempfile``, without the search for a free name."""
        path = f"{dir}/{prefix}{os.urandom(8).hex()}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        self._made[descriptor] = path
        return descriptor, path

    def write(self, descriptor: int, data: bytes | memoryview) -> int:
        size = os.write(descriptor, data)
        path = self._made.pop(descriptor, None)
        if path is None:  # one of several writes
            self._written.clear()
        elif size == len(data) <= INLINE_BYTES:
            self._written[path] = os.fstat(descriptor), bytes(data)
        return size

    def replace(self, source: str, target: str | Path) -> None:
        name = os.fspath(target)
        if not os.path.isfile(name):
            os.replace(source, name)
            return
        before = self._waiting.get(name)
        self._waiting[name] = source
        if isinstance(before, str):
            os.unlink(before)

    def open_log(self, file: str | Path, mode: str = "r", **options: Any) -> IO[Any]:
        name = os.fspath(file)
        if mode != "a" or not os.path.isfile(name):
            return self.open(file, mode, **options)
        before = self._waiting.get(name)
        if isinstance(before, str):
            return self._open(before, mode, **options)
        return _Deferred(partial(self.append, name))

    def append(self, path: str, text: str) -> None:
        if not text:
            return
        text.encode()  # a file would raise the same error
        lines = self._waiting.setdefault(path, [])
        assert isinstance(lines, list), "open_log() adds to a file that waits itself"
        lines.append(text)

    def rewrite(self, path: str, text: str) -> None:
        """Write to a new file, which replaces the text with its mode."""
        data = text.encode()
        descriptor, scratch = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".tmp.")
        try:
            os.fchmod(descriptor, stat.S_IMODE(os.stat(path).st_mode))
            write_all(descriptor, data)
            if self._sync_directory is not None:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.replace(scratch, path)

    def open(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> IO[Any]:
        if mode == "w" and isinstance(file, Path) and is_editable("/".join(file.parts[-2:])) and file.is_file():
            return _Deferred(partial(self.rewrite, str(file)))
        if mode not in {"r", "rb"} or isinstance(file, int):
            return self._open(file, mode, *arguments, **options)
        name = os.fspath(file)
        content = self._waiting.get(name)
        if isinstance(content, list) and os.path.lexists(name):
            with self._open(name, "rb") as log:
                whole = log.read() + "".join(content).encode()
            return _reader(whole, mode, *arguments, **options)
        known = self._known_content(name) if content is None else None
        if known is not None:
            return _reader(known, mode, *arguments, **options)
        is_replaced = content is not None and os.path.lexists(name)
        return self._open(content if is_replaced else file, mode, *arguments, **options)

    def _known_content(self, path: str) -> bytes | None:
        if path in self._recent:
            with suppress(OSError):
                return self._recent_content(path, os.lstat(path))
        return self._read_often(path) if path.endswith(_OFTEN_READ) else None

    def _read_often(self, path: str) -> bytes | None:
        with suppress(OSError):
            signature = _signature(os.stat(path))
            known = self._often_read.get(path)
            if known is not None and known[0] == signature:
                return known[1]
            with self._open(path, "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    return None
                data = bytes(file.read())
                signature = _signature(os.fstat(file.fileno()))
            is_settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > RACY_NS
            if is_settled and signature == _signature(status) and len(data) == status.st_size:
                self._often_read[path] = signature, data
            return data
        return None


def _signature(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _replace(source: str, target: str) -> None:
    """Exchange the two names, then remove the old file.

    A rename over a file makes ext4 write the content at once (``auto_da_alloc``), which takes longer than all the rest.
    """
    if _exchange(source, target):
        os.unlink(source)
    else:
        os.replace(source, target)


@cache
def _renameat2() -> Callable[[int, bytes, int, bytes, int], int] | None:
    import ctypes

    function = getattr(ctypes.CDLL(None), "renameat2", None)
    if function is not None:
        path = ctypes.c_char_p
        function.argtypes = [ctypes.c_int, path, ctypes.c_int, path, ctypes.c_uint]
    return function


def _exchange(one: str, other: str) -> bool:
    """Exchange two names atomically; return False if the system cannot."""
    call = _renameat2()
    return call is not None and call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _reader(  # noqa: PLR0917 - in the order of open()
    data: bytes,
    mode: str,
    buffering: int = -1,  # noqa: ARG001 - likewise
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
) -> IO[Any]:
    raw = io.BytesIO(data)
    return raw if mode == "rb" else io.TextIOWrapper(raw, encoding=encoding, errors=errors, newline=newline)


class _Deferred(io.StringIO):
    """A text file that passes its content to ``take`` when closed."""

    def __init__(self, take: Callable[[str], None]) -> None:
        super().__init__()
        self._take = take

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        if not self.closed:
            text = self.getvalue()
            super().close()
            self._take(text)


class Disk:
    """Replacement of ``os`` in lattice's file functions, with deferred ``writes`` and without fsyncs if ``lazy``."""

    def __init__(self, writes: WriteSet | None, *, lazy: bool) -> None:
        self._lazy = lazy
        if writes is not None:
            self.replace, self.write = writes.replace, writes.write

    def fsync(self, descriptor: int) -> None:
        if descriptor >= 0 and not self._lazy:  # publish() fsyncs pending lines
            os.fsync(descriptor)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


# --- JSON ---


class Copier:
    """Replacement of ``copy`` for snapshots: equal copies of JSON, at a tenth of the cost.

    A value that occurs twice is copied twice, which JSON cannot tell.
    """

    def deepcopy(self, value: Any) -> Any:
        return _json_copy(value)

    def __getattr__(self, name: str) -> Any:
        return getattr(copy, name)


def _json_copy(value: Any) -> Any:
    kind = type(value)
    if kind is dict:
        return {key: _json_copy(inner) for key, inner in value.items()}
    if kind is list:
        return [_json_copy(inner) for inner in value]
    return value if kind in _JSON_ATOMS else copy.deepcopy(value)


_JSON_ATOMS = frozenset({str, int, float, bool, type(None)})


class FlatJson:
    """Replacement of ``json`` in the index of short ids: equal results, faster for large flat objects."""

    def loads(self, text: str) -> Any:
        value = flat_value(text.encode()) if len(text) >= MIN_MEMO_BYTES and text.isascii() else None
        return _copied(value) if value is not None else json.loads(text)

    def dumps(self, value: Any, **options: Any) -> str:
        data = flat_json(value) if options == {"sort_keys": True, "indent": 2} else None
        if data is None:
            return json.dumps(value, **options)
        remember_flat(data, _copied(value))
        return data[:-1].decode()

    def __getattr__(self, name: str) -> Any:
        return getattr(json, name)


class IndentedJson:
    """Replacement of ``json`` in snapshots: an equal text, by the original's fast encoder, which cannot indent."""

    def dumps(self, value: Any, **options: Any) -> str:
        if options == {"sort_keys": True, "indent": 2}:
            with suppress(msgspec.MsgspecError):  # NaN, for example
                return msgspec.json.format(_encode_sorted(value), indent=2)
        return json.dumps(value, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(json, name)


_encode_sorted = json.JSONEncoder(sort_keys=True).encode


def _copied(value: FlatObject) -> FlatObject:
    return {key: dict(inner) if isinstance(inner, dict) else inner for key, inner in value.items()}
