"""Reader process of a project: reads for HTTP, so that they delay neither writes nor the network.

    python -m lattice_remote.server.worker.reader --fd 5 --project-dir DATA/projects/web --slug web

It changes nothing and holds no lock, so it may be killed at any moment. It exits when the server is gone (end of file).

The dashboard's large lists are read again at the cost of what changed. Lattice's handlers run unchanged, on the parsed
values of unchanged files; their response is encoded faster, to the same text. A client that has an earlier response
gets the difference to it.
"""

import gc
import gzip
import json
import os
import re
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from http import HTTPStatus
from itertools import accumulate
from operator import itemgetter
from pathlib import Path, PosixPath
from typing import Any, NoReturn

import msgspec
from msgspec import structs

from lattice_remote.files import Signature, signature_of
from lattice_remote.server.ipc import ListIndex, Read, ReadCommand, ReadPage, ReadResult, ReceivedFrames, encode_frames
from lattice_remote.server.tree.capture import AccessDenied, Capture
from lattice_remote.server.worker.calls.dashboard import handler_class
from lattice_remote.server.worker.executor import Executor
from lattice_remote.server.worker.main import begin, code_directories, parser_of

__all__ = [
    "LISTS",
    "CachedTasks",
    "Differences",
    "NoWrites",
    "Part",
    "Reads",
    "difference",
    "encode_json",
    "installed",
    "laid_out",
    "main",
    "tag_of",
]


class _Identified(msgspec.Struct, frozen=True):
    id: str = ""


def laid_out(envelope: bytes, place: Sequence[str]) -> tuple[bytes, ListIndex]:
    """Return an envelope whose data is the list at ``place``, put last, and the index of its items.

    Raises:
        Raises ValueError: there is no list.
    """
    try:
        return _laid_out(envelope, place)
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError) as error:
        raise ValueError(f"there is no list at {'.'.join(place)} in the command's output") from error


def _laid_out(envelope: bytes, place: Sequence[str]) -> tuple[bytes, ListIndex]:
    whole = msgspec.json.decode(envelope, type=dict[str, msgspec.Raw])
    listed = whole.pop("data")
    for name in place[1:]:
        listed = msgspec.json.decode(listed, type=dict[str, msgspec.Raw])[name]
    items = msgspec.json.decode(listed, type=list[msgspec.Raw])
    ids = [item.id for item in msgspec.json.decode(listed, type=list[_Identified])]
    head = msgspec.json.encode(whole)[:-1] + b',"data":['
    ends = [end - 1 for end in accumulate((len(bytes(item)) + 1 for item in items), initial=len(head))][1:]
    return b"".join((head, b",".join(items), b"]}")), ListIndex(len(head), ids, ends)


class NoWrites:
    """Pre-image recorder that refuses every change before it is made; see ``tree.capture.PreImages``."""

    def keep_for_append(self, path: str, status: object = None) -> NoReturn:  # noqa: ARG002 - the protocol's signature
        raise AccessDenied("write a file")

    keep_for_rewrite = keep_for_replace = keep_for_move = keep_directory = keep_for_append


class Reads:
    def __init__(self, executor: Executor, capture: Capture, lattice_dir: Path) -> None:
        self._executor = executor
        self._capture = capture
        self._lattice_dir = lattice_dir
        self._tasks = CachedTasks(lattice_dir)
        self._differences = Differences()

    def answer(self, request: Read) -> ReadResult:
        """Return the result of a read; never raises an ``Exception``. A crash or a forbidden access has status 500."""
        try:
            with self._capture.watch():
                return self._command(request) if isinstance(request, ReadCommand) else self._page(request)
        except AccessDenied as veto:
            return ReadResult(500, b"", message=f"the command tried to {veto}, which the server does not allow")

    def _command(self, request: ReadCommand) -> ReadResult:
        outcome = self._executor.run(request.argv, request.path, last_try=True)
        if outcome.failure is not None:
            return ReadResult(500, b"", message=outcome.failure)
        message = outcome.stderr.decode(errors="replace")
        if request.list_at and not outcome.exit_code:
            try:
                body, items = laid_out(outcome.stdout, request.list_at)
            except ValueError as error:
                return ReadResult(500, b"", message=str(error))
            return ReadResult(0, body, message=message, items=items)
        return ReadResult(outcome.exit_code, outcome.stdout, message=message)

    def _page(self, request: ReadPage) -> ReadResult:
        page = handler_class(self._lattice_dir)(request.path, b"")
        if request.path in LISTS:
            page._lattice_dir = self._tasks
            with installed(), self._tasks.at(request.state):
                outcome = self._executor.call(page.get, "dashboard: GET")
        else:
            outcome = self._executor.call(page.get, "dashboard: GET")
        if outcome.failure is not None:
            return ReadResult(500, b"", message=outcome.failure)
        found = ReadResult(page.status, page.wfile.getvalue(), content_type=page.content_type)
        if found.status == HTTPStatus.OK:
            found = self._shortened(request, structs.replace(found, etag=tag_of(found.body)))
        if request.gzip and len(found.body) >= _GZIP_BYTES:
            found = structs.replace(found, body=gzip.compress(found.body, _GZIP_LEVEL, mtime=0), is_gzip=True)
        return found

    def _shortened(self, request: ReadPage, found: ReadResult) -> ReadResult:
        steps = None
        if request.path in LISTS:
            steps = self._differences.since(request.base, request.path, found.etag, found.body)
        if request.base == found.etag:
            return structs.replace(found, status=HTTPStatus.NOT_MODIFIED, body=b"")
        if steps is not None and request.takes_difference:
            return structs.replace(found, status=HTTPStatus.IM_USED, body=steps)
        return found


_GZIP_BYTES, _GZIP_LEVEL = 2048, 4
"""Shorter bodies are not compressed; the level costs 2 ms for each megabyte of a list."""


# --- lists ---

LISTS = frozenset({"/api/tasks", "/api/graph"})
"""Requests of the dashboard that read every task, and nothing else."""
_MAX_TEXT_BYTES = 32 * 1024 * 1024
"""Of parsed files; further files are read every time."""
_SCAN_S = 1.0
"""Age up to which a scan of the same state serves another list."""
_SETTLED_NS = 100_000_000
"""A file that changed within this time is read again: another change could leave its times and size as they are."""


# --- files that are parsed once ---


class _Text(str):
    __slots__ = ("value",)
    value: Any


class _TaskFile(PosixPath):
    signature: Signature | None = None
    """None if it is read every time."""
    text: _Text | None = None

    def __lt__(self, other: Any) -> bool:
        return self.order < other.order if isinstance(other, _TaskFile) else super().__lt__(other)

    @cached_property
    def order(self) -> str:
        return self.name

    def read_text(self, *arguments: Any, **options: Any) -> str:
        if self.text is not None:
            return self.text
        text = super().read_text(*arguments, **options)
        if self.signature is None:
            return text
        parsed = _Text(text)
        parsed.value = _loads(text)
        self.text = parsed
        return parsed


def _loads(text: str) -> Any:
    try:
        return msgspec.json.decode(text)  # the names of fields are shared among files
    except msgspec.MsgspecError:
        return json.loads(text)


class CachedTasks:
    """A ``.lattice`` directory for lattice's handlers, whose ``tasks`` are parsed once for each version."""

    def __init__(self, lattice_dir: Path) -> None:
        self._path = lattice_dir
        self._tasks = _TaskDirectory(lattice_dir / "tasks")

    @contextmanager
    def at(self, state: str) -> Iterator[None]:
        """Read within this context; a scan of the same ``state`` is not repeated for a moment."""
        self._tasks.state = state
        yield

    def __truediv__(self, name: str) -> Any:
        return self._tasks if name == "tasks" else self._path / name


class _TaskDirectory:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.state = ""
        self._files: dict[str, _TaskFile] = {}
        self._scanned: tuple[str, float] = "", 0.0  # the state, and when

    def is_dir(self) -> bool:
        return self._path.is_dir()

    def glob(self, pattern: str) -> Iterator[Path]:
        assert pattern == "*.json", "the dashboard lists all tasks"
        state, since = self._scanned
        if not self.state or self.state != state or time.monotonic() - since > _SCAN_S:
            self._scanned = self.state, time.monotonic()
            self._scan()
        return iter(self._files.values())

    def _scan(self) -> None:
        now_ns, text_bytes, files = time.time_ns(), 0, {}
        with os.scandir(self._path) as entries:
            for entry in entries:
                if not entry.name.endswith(".json"):
                    continue
                try:
                    signature = signature_of(entry.stat(follow_symlinks=False))
                except FileNotFoundError:
                    continue  # archived just now
                file = self._files.get(entry.name)
                if file is None or file.signature != signature:
                    file = _TaskFile(entry.path)
                    is_settled = now_ns - max(signature[0], signature[3]) > _SETTLED_NS
                    if is_settled and text_bytes < _MAX_TEXT_BYTES and entry.is_file(follow_symlinks=False):
                        file.signature = signature
                files[entry.name] = file
                text_bytes += signature[1]
        self._files = dict(sorted(files.items(), key=itemgetter(0)))


# --- encoding ---

_encoder = msgspec.json.Encoder(order="deterministic")
_ESCAPED = re.compile(r"[^\x00-\x7e]")
"""Characters that lattice's encoder escapes, and this one does not."""


def encode_json(data: Any) -> str:
    """Return ``json.dumps(data, sort_keys=True, indent=2)``, with the same values."""
    try:
        text = msgspec.json.format(_encoder.encode(data), indent=2).decode()
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError):
        return json.dumps(data, sort_keys=True, indent=2)
    return text if text.isascii() and "\x7f" not in text else _ESCAPED.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return json.dumps(found[0])[1:-1]


class _Json:
    def __getattr__(self, name: str) -> Any:
        return getattr(json, name)

    def loads(self, text: str) -> Any:
        return text.value if isinstance(text, _Text) else json.loads(text)


def _ok(data: Any) -> str:
    return encode_json({"ok": True, "data": data}) + "\n"


@contextmanager
def installed() -> Iterator[None]:
    """Let lattice's dashboard parse and encode as above, without garbage collection: the lists have no cycles."""
    from lattice.dashboard import server

    before = {name: server.__dict__[name] for name in ("json", "_ok")}
    server.__dict__.update(json=_Json(), _ok=_ok)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        server.__dict__.update(before)


# --- differences ---

Part = tuple[int, int] | str
"""A range of the earlier text, or new text."""
_ITEM_END = re.compile(rb"\n {4,6}\},?")
"""Of an item of a list, in lattice's form."""
_MAX_LISTS, _MAX_STEPS, _MAX_STEP_SHARE = 4, 32, 4


def tag_of(body: bytes) -> str:
    return f'"{sha256(body).hexdigest()[:32]}"'


def difference(old: bytes, new: bytes) -> list[Part]:
    """Return the parts that make ``new``; both are ASCII."""
    head = _common_start(old, new)
    tail = min(_common_end(old, new), min(len(old), len(new)) - head)
    if not head + tail:
        return _parts(old, new)
    middle = _parts(old[head : len(old) - tail], new[head : len(new) - tail])
    moved = [part if isinstance(part, str) else (part[0] + head, part[1] + head) for part in middle]
    return [*([(0, head)] if head else []), *moved, *([(len(old) - tail, len(old))] if tail else [])]


def _common_start(old: bytes, new: bytes) -> int:
    return _longest(min(len(old), len(new)), lambda size, from_: old[from_:size] == new[from_:size])


def _common_end(old: bytes, new: bytes) -> int:
    ends = len(old), len(new)
    return _longest(
        min(ends), lambda size, from_: old[ends[0] - size : ends[0] - from_] == new[ends[1] - size : ends[1] - from_]
    )


def _longest(most: int, is_same: Callable[[int, int], bool]) -> int:
    """Return the largest size up to which all is the same; ``is_same(size, from)`` compares the part after ``from``."""
    least = 0
    while least < most:
        size = (least + most + 1) // 2
        if is_same(size, least):
            least = size
        else:
            most = size - 1
    return least


def _parts(old: bytes, new: bytes) -> list[Part]:
    parts: list[Part] = []
    places: dict[bytes, int] | None = None
    start = at = 0  # the range of ``old`` that is being continued
    for chunk in _chunks(new):
        if old.startswith(chunk, at) and at > start:
            at += len(chunk)
            continue
        if places is None:
            places = _places(old)
        place = at if old.startswith(chunk, at) else places.get(chunk)
        if place is not None:
            if place != at or at == start:
                _add_range(parts, start, at)
                start = place
            at = place + len(chunk)
            continue
        _add_range(parts, start, at)
        start = at
        if parts and isinstance(parts[-1], str):
            parts[-1] += chunk.decode("ascii")
        else:
            parts.append(chunk.decode("ascii"))
    _add_range(parts, start, at)
    return parts


def _chunks(body: bytes) -> Iterator[bytes]:
    start = 0
    for found in _ITEM_END.finditer(body):
        yield body[start : found.end()]
        start = found.end()
    if start < len(body):
        yield body[start:]


def _places(body: bytes) -> dict[bytes, int]:
    places, start = {}, 0
    for chunk in _chunks(body):
        places[chunk] = start
        start += len(chunk)
    return places


def _add_range(parts: list[Part], start: int, end: int) -> None:
    if end > start:
        parts.append((start, end))


@dataclass
class _Versions:
    tag: str
    body: bytes
    steps: deque[tuple[str, bytes]] = field(default_factory=lambda: deque(maxlen=_MAX_STEPS))
    """Of each step: the tag of the body that it starts from, and its parts as JSON."""


class Differences:
    """Differences between versions of a list, by its path. Keeps one body and some steps of each."""

    def __init__(self) -> None:
        self._lists: OrderedDict[str, _Versions] = OrderedDict()

    def since(self, base: str, path: str, tag: str, body: bytes) -> bytes | None:
        """Return the steps from the body tagged ``base`` to this one, as JSON, if they are much shorter."""
        known = self._advance(path, tag, body)
        steps: list[bytes] = []
        for start, step in reversed(known.steps):
            steps.insert(0, step)
            if start == base:
                found = b"[" + b",".join(steps) + b"]"
                return found if len(found) * _MAX_STEP_SHARE < len(body) else None
        return None

    def _advance(self, path: str, tag: str, body: bytes) -> _Versions:
        known = self._lists.get(path)
        if known is None:
            known = self._lists[path] = _Versions(tag, body)
        elif known.tag != tag:
            if known.body.isascii() and body.isascii():
                known.steps.append((known.tag, msgspec.json.encode(difference(known.body, body))))
            else:
                known.steps.clear()
            known.tag, known.body = tag, body
        self._lists.move_to_end(path)
        if len(self._lists) > _MAX_LISTS:
            self._lists.popitem(last=False)
        return known


_decoder: msgspec.msgpack.Decoder[Read] = msgspec.msgpack.Decoder(Read)


_parser = parser_of("reader")


def main(arguments: list[str] | None = None) -> int:
    options = _parser.parse_args(arguments)
    connection = begin("reader", options)
    reads = _prepare(options.project_dir.resolve())
    for request in map(_decoder.decode, ReceivedFrames(connection)):
        found = encode_frames(reads.answer(request))
        try:
            connection.sendall(found)
        except ConnectionError:
            break
    return 0


def _prepare(project: Path) -> Reads:
    code = code_directories(project)
    os.chdir("/")
    os.environ["PATH"] = ""  # lattice must not find git: the server has none of its users' branches
    executor = Executor(project, lazy=False)
    import lattice.dashboard.git_reader
    import lattice.dashboard.server  # before the audit hook, which permits no imports

    # A project on a server is in none of its users' repositories, even if the data directory is in a repository.
    lattice.dashboard.git_reader.git_available = lambda: True  # as on a client's machine; starts no program
    lattice.dashboard.git_reader.find_git_root = lambda *_: None
    lattice_dir = project / ".lattice"
    capture = Capture(str(lattice_dir), str(lattice_dir), NoWrites(), [*code, str(lattice.dashboard.server.STATIC_DIR)])
    gc.collect()
    gc.freeze()
    return Reads(executor, capture, lattice_dir)


if __name__ == "__main__":
    sys.exit(main())
