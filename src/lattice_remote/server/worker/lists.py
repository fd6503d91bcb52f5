"""Large lists of lattice's dashboard, read again at the cost of what changed.

Lattice's handlers run unchanged, on the parsed values of unchanged files; their response is encoded faster, to the same
text. A client that has an earlier response gets the difference to it.
"""

import gc
import json
import os
import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from operator import itemgetter
from pathlib import Path, PosixPath
from typing import Any

import msgspec

from lattice_remote.files import Signature, signature_of

__all__ = ["LISTS", "CachedTasks", "Differences", "Part", "difference", "encode_json", "installed", "tag_of"]

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
