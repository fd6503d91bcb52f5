"""Edits of plans and notes: the edited files, their bases, edits without an answer, and conflicts (I4).

``.remote/base/`` keeps the server's text on which each such file is based. A file that differs from its base is an
edit: it is sent with that base, and the server merges. The base is always written after the file, so that a crash in
between looks like an edit that the server already has, never like a reversal.
"""

import contextlib
import difflib
import errno
import fcntl
import itertools
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from lattice_remote.client.agent_runtime import boot_time
from lattice_remote.client.cache.cache import BASE_DIRECTORY, Cache
from lattice_remote.client.cache.evidence import Blobs, Evidence, Judgement
from lattice_remote.client.config import PRIVATE_DIRECTORY
from lattice_remote.errors import StorageError, one_line
from lattice_remote.files import READ, Signature, signature_of
from lattice_remote.protocol.messages import Put
from lattice_remote.protocol.operations import AnnounceFile, AppendBytes, MoveFile, Operation, PutFile, digest_of
from lattice_remote.protocol.paths import is_editable

if TYPE_CHECKING:
    from lattice_remote.client.cache.verify import Reading

__all__ = [
    "CONFLICTS_DIRECTORY",
    "KEPT_S",
    "Edits",
    "PendingEdits",
    "Sent",
    "StaleEditDetector",
    "TextConflict",
    "TextConflicts",
    "base_of",
    "is_being_written",
]


KEPT_S = 900.0
"""Period in which an editor may still hold a replaced text."""
_MAX_TEXTS = 4
"""Most older texts of one file."""
_MAX_BYTES = 8 * 1024 * 1024
"""Larger texts are not kept."""
_MAX_PAIRS = 2000
_MAX_COMPARED = 400
"""Longest compared beginning of a line, in bytes."""
_LIKE = 0.6
"""From this ratio on a line is a rewording of another."""


class StaleEditDetector:
    """The older texts of one cache's plans and notes. Call writing methods under the cache's lock."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def remember(self, path: str, text: bytes | None) -> None:
        """Record a server's text that another client's change will replace."""
        if text is None or len(text) > _MAX_BYTES:
            return
        self._cache.replace(f"{_directory(path)}/{time.time_ns():020d}", text)
        for name in self._names(path)[_MAX_TEXTS:]:
            self._cache.delete(f"{_directory(path)}/{name}")

    def base_of(
        self, path: str, text: bytes, current: bytes | None, *, is_known: Callable[[bytes], bool] = lambda _older: False
    ) -> bytes | None:
        """Return the base of a saved text: ``current``, or an older one that ``is_known``."""
        if current is None:
            return None
        older = [self._cache.read(f"{_directory(path)}/{name}") for name in self._names(path)]
        base = next(filter(is_known, older), None) or base_of(text, current, older)
        return current if base == text else base

    def forget(self, path: str) -> None:
        for name in self._names(path, all_ages=True):
            self._cache.delete(f"{_directory(path)}/{name}")

    def _names(self, path: str, *, all_ages: bool = False) -> list[str]:
        try:
            names = os.listdir(os.path.join(self._cache.directory, _directory(path)))
        except OSError:
            return []
        oldest = 0 if all_ages else time.time_ns() - int(KEPT_S * 1e9)
        return sorted((name for name in names if name.isdigit() and int(name) >= oldest), reverse=True)


def _directory(path: str) -> str:
    return f"{PRIVATE_DIRECTORY}/older/{path}"


def base_of(text: bytes, current: bytes, older: Iterable[bytes]) -> bytes:
    """Return the closest of ``current`` and ``older`` (newest first) after which only changes came that ``text`` does
    not show.
    """
    behind = [before for before in older if _shows_nothing_of(text, before, current)]
    return min(behind, key=lambda before: _distance(text, before), default=current)


def _distance(one: bytes, other: bytes) -> int:
    a, b = _lines(one), _lines(other)
    return (a - b).total() + (b - a).total()


def _shows_nothing_of(text: bytes, before: bytes, after: bytes) -> bool:
    """Return whether a text has no added line, and most removed lines, of a change.

    False if it has little in common with either, or rewords added lines.
    """
    has, had, has_now = _lines(text), _lines(before), _lines(after)
    added, removed = has_now - had, had - has_now
    if not (added or removed) or (has & had).total() * 2 < had.total():
        return False
    if any(has[line] > had[line] for line in added):
        return False
    if (removed & has).total() * 2 < removed.total():
        return False
    return not _are_reworded(added, has - had, removed)


def _are_reworded(added: Counter[bytes], own: Counter[bytes], removed: Counter[bytes]) -> bool:
    """Return whether half of the added lines are reworded. Assumed for very many lines."""
    if len(own) * (len(added) + len(removed)) > _MAX_PAIRS:
        return True
    likest = {line: max((_likeness(line, other) for other in removed), default=0.0) for line in own}
    reworded = sum(any(_likeness(line, other) >= max(_LIKE, likest[line]) for line in own) for other in added)
    return 0 < len(added) <= 2 * reworded


def _likeness(one: bytes, other: bytes) -> float:
    matcher = difflib.SequenceMatcher(None, one[:_MAX_COMPARED], other[:_MAX_COMPARED], autojunk=False)
    return matcher.ratio() if matcher.quick_ratio() >= _LIKE else 0.0


def _lines(text: bytes) -> Counter[bytes]:
    return Counter(line for line in (line.strip() for line in text.splitlines()) if line)


_MAX_KEPT_BYTES = 1024 * 1024
"""A larger edit is kept only in memory."""


class Sent(msgspec.Struct, frozen=True):
    put: Put
    """With its whole base."""
    frame: Put
    """As sent."""
    base: bytes | None
    """Base of the local file."""
    at: float
    """Time of sending (seconds since 1970)."""

    def first_sent_at(self) -> float:
        return boot_time() - max(0.0, time.time() - self.at)


_decoder = msgspec.msgpack.Decoder(Sent)


class PendingEdits:
    """One cache's edits without an answer, at most one a file."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._sent: dict[str, Sent] = {}

    def remember(self, sent: Sent) -> None:
        self._sent[sent.put.path] = sent
        data = msgspec.msgpack.encode(sent)
        if len(data) <= _MAX_KEPT_BYTES:
            self._cache.replace(_place(sent.put.path), data)

    def forget(self, path: str) -> None:
        self._sent.pop(path, None)
        self._cache.delete(_place(path))

    def may_replace(self, path: str, base: bytes | None) -> bool:
        sent = self.get(path)
        return sent is not None and sent.base == base

    def get(self, path: str) -> Sent | None:
        """Return a file's unanswered edit, of any process."""
        if path not in self._sent and os.path.exists(self._cache.absolute(_place(path))):
            try:
                sent = _decoder.decode(self._cache.read(_place(path)))
            except (msgspec.DecodeError, StorageError, OSError):
                return None
            if sent.put.path == path:
                self._sent[path] = sent
        return self._sent.get(path)


def _place(path: str) -> str:
    return f"{PRIVATE_DIRECTORY}/sent/{path}"


def is_being_written(place: str) -> bool:
    """Return whether the file is open for writing; False where unknown. About 20 microseconds."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        handle = os.open(place, READ)
    except OSError:
        return False
    try:
        # A program that opens the file for writing now waits for the end of the lease, and we get a signal: SIGURG,
        # ignored by default, instead of SIGIO, which would end the process.
        fcntl.fcntl(handle, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    else:
        with contextlib.suppress(OSError):
            fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return False
    finally:
        os.close(handle)


_EDITED_DIRECTORIES = ("plans", "notes")


class Edits:
    """The edited files of one cache."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.older = StaleEditDetector(cache)
        self.unanswered = PendingEdits(cache)
        self.evidence = Evidence(cache)
        self.is_own = False
        """Whether the change being applied results from a request of this cache."""
        self._given_up: set[str] = set()  # files whose base is not the server's text, until they are replaced

    def scan(self, readings: "Mapping[str, Reading] | None" = None) -> list[str]:
        """Return the paths of all edited files, at one ``stat`` each; does not read those in ``readings`` again."""
        read = readings or {}
        return sorted(path for path in self._unsettled() if is_editable(path) and self.is_edited(path, read.get(path)))

    def is_edited(self, path: str, reading: "Reading | None" = None) -> bool:
        """Return whether a file differs from its base, or may. A removed file is no edit."""
        signature = self._cache.signature(path)
        if signature is None or self._cache.known.is_settled(path, signature):
            return False
        base = self.base(path)
        if reading is not None and reading.settled and reading.signature == signature:
            is_base = base is not None and reading.digest == digest_of(base)
        else:
            is_base = self._cache.read(path) == base
        if not is_base or self.unanswered.may_replace(path, base):
            return True
        self._cache.known.settle_text(path, signature)
        return False

    def is_in_use(self, path: str) -> bool:
        """Return whether the file is edited or open for writing, so that it must not be replaced."""
        return self.is_edited(path) or is_being_written(self._cache.absolute(path))

    def base(self, path: str) -> bytes | None:
        place = _base_path(path)
        return None if self._cache.size(place) is None else self._cache.read(place)

    def is_orphan(self, path: str, files: Container[str]) -> bool:
        if path in files or self.base(path) is not None:
            return False
        task = path.rpartition("/")[2].removesuffix(".md")
        return f"tasks/{task}.json" not in files and f"archive/tasks/{task}.json" not in files

    def base_entry(self, path: str) -> tuple[int, bytes] | None:
        base = self.base(path)
        return None if base is None else (len(base), digest_of(base))

    def rebase(self, path: str) -> None:
        if self._cache.size(path) is None:
            self._cache.known.settle_text(path, None)
            self._cache.delete(_base_path(path))
            self.older.forget(path)
            self.evidence.forget_versions(path)
        elif (text := self._cache.read(path)) != self.base(path):
            self._replace_base(path, text)

    def sent(self, path: str, text: bytes) -> None:
        self._cache.known.settle_text(path, None)
        self._cache.replace(_base_path(path), text)

    def give_up(self, path: str, text: bytes) -> None:
        """Count ``text`` as the base until the server's text replaces both."""
        self.sent(path, text)
        self._given_up.add(path)

    def _replace_base(self, path: str, text: bytes) -> None:
        if path in self._given_up:
            self._given_up.discard(path)
        elif not self.is_own and (base := self.base(path)) is not None:
            self.older.remember(path, base)
            self.evidence.replaced(path, base)
        self.sent(path, text)

    def base_of(self, path: str, text: bytes) -> bytes | None:
        def was_withheld(older: bytes) -> bool:
            return self.evidence.is_last_withheld(path, older)

        return self.older.base_of(path, text, self.base(path), is_known=was_withheld)

    def judge(self, path: str, text: bytes, found: Signature, blobs: Blobs | None) -> Judgement:
        is_watched = self._cache.known.was_settled(path)
        return self.evidence.judge(path, text, self.base(path), found, is_watched=is_watched, blobs=blobs)

    def take(self, path: str, text: bytes) -> bool:
        """Put the server's text in place unless the file is edited; return whether it was put."""
        found = self._cache.signature(path)
        if self.is_in_use(path) or not self._cache.replace_if(path, text, found):
            return False
        if text != self.base(path):
            self._replace_base(path, text)
        return True

    def absorb(self, operation: Operation) -> bool:
        """Return whether an operation only brings our own edit back."""
        after = self.text_after(operation)
        if after is None:
            return isinstance(operation, AnnounceFile) and self._absorb_announced(operation)
        if self._cache.read(operation.path) != after:
            return False
        self.sent(operation.path, after)
        self._cache.note(operation.path)
        return True

    def _absorb_announced(self, operation: AnnounceFile) -> bool:
        """Do the same for a text too large for its change."""
        if not is_editable(operation.path) or self._cache.size(operation.path) != operation.size:
            return False
        text = self._cache.read(operation.path)
        if digest_of(text) != operation.digest:
            return False
        self.sent(operation.path, text)
        self._cache.note(operation.path)
        return True

    def text_after(self, operation: Operation) -> bytes | None:
        if not is_editable(operation.path):
            return None
        match operation:
            case PutFile():
                return operation.data
            case AppendBytes() if (base := self.base(operation.path)) is not None and len(base) == operation.offset:
                return base + operation.data
            case _:
                return None

    def edited_by(self, operation: Operation) -> list[str]:
        paths = (operation.path, operation.to) if isinstance(operation, MoveFile) else (operation.path,)
        return [path for path in paths if is_editable(path) and self.is_in_use(path)]

    def _unsettled(self) -> Iterator[str]:
        for directory in _EDITED_DIRECTORIES:
            with contextlib.suppress(OSError), os.scandir(os.path.join(self._cache.directory, directory)) as entries:
                for entry in entries:
                    path = f"{directory}/{entry.name}"
                    if not self._is_settled(path, entry):
                        yield path

    def _is_settled(self, path: str, entry: os.DirEntry[str]) -> bool:
        try:
            found = entry.stat(follow_symlinks=False)
        except OSError:
            return False  # removed just now
        return self._cache.known.is_settled(path, signature_of(found))


def _base_path(path: str) -> str:
    return f"{BASE_DIRECTORY}/{path}"


CONFLICTS_DIRECTORY = f"{PRIVATE_DIRECTORY}/conflicts"
_FOLDERS = ("plans", "notes")
_MAX_NAMED = 3


@dataclass(frozen=True, slots=True)
class TextConflict:
    path: str
    copies: tuple[str, ...]
    task: str
    """The task's id."""
    short_id: str
    """The task's short id; its id if it has none."""
    is_active: bool
    """Whether the task is active, so that its plan and notes can be edited."""
    found: tuple[Signature | None, ...]
    """Signature of each copy when it was found."""

    @property
    def what(self) -> str:
        return "plan" if self.path.startswith("plans/") else "notes"

    def is_called(self, name: str) -> bool:
        path = name.replace(os.sep, "/").removeprefix("./")
        return name.upper() in (self.task.upper(), self.short_id.upper()) or any(
            path == known or path.endswith("/" + known) for known in (self.path, *self.copies)
        )


class TextConflicts:
    """Conflicts of one cache, until the user resolves them.

    Each has a *conflict copy* of the local text below ``.remote/conflicts/``, under the file's path (then
    ``task_....2.md``). The file itself holds the server's text.
    """

    def __init__(self, cache: Cache, edits: Edits) -> None:
        self._cache = cache
        self._edits = edits

    def begin(self, path: str) -> str:
        """Copy a conflicting edit, once for each text; return the copy's path."""
        text, stem = self._cache.read(path), f"{CONFLICTS_DIRECTORY}/{path.removesuffix('.md')}"
        for number in itertools.count(1):
            copy = f"{stem}.md" if number == 1 else f"{stem}.{number}.md"
            if self._cache.size(copy) is None or self._cache.read(copy) == text:
                break
        self._cache.replace(copy, text)
        self._edits.give_up(path, text)
        return copy

    def end(self, conflict: TextConflict) -> None:
        """Remove a conflict's copies, except one saved again since."""
        for copy, found in zip(conflict.copies, conflict.found, strict=True):
            if self._cache.signature(copy) == found:
                self._cache.delete(copy)

    def copies(self) -> list[str]:
        found: list[str] = []
        for folder in _FOLDERS:
            with contextlib.suppress(OSError):
                names = os.listdir(self._cache.absolute(f"{CONFLICTS_DIRECTORY}/{folder}"))
                found += [f"{CONFLICTS_DIRECTORY}/{folder}/{name}" for name in sorted(names, key=lambda n: (len(n), n))]
        return found

    def all(self) -> list[TextConflict]:
        files: dict[str, list[str]] = {}
        for copy in self.copies():
            folder, name = copy.split("/")[-2:]
            path = f"{folder}/{name.partition('.')[0]}.md"
            if is_editable(path):
                files.setdefault(path, []).append(copy)
        return [self._conflict(path, copies) for path, copies in files.items()]

    def notice(self) -> str | None:
        if not self.copies():
            return None
        found = self.all()
        if not found:
            return None
        tasks = list(dict.fromkeys(conflict.short_id for conflict in found))
        if len(found) == 1:
            one = found[0]
            return (
                f"conflict: your text of the {one.what} of {one.short_id} was not sent, it is in "
                f".lattice/{one.copies[0]}; see: lattice remote resolve {one.short_id}"
            )
        named = ", ".join(tasks[:_MAX_NAMED]) + (f" and {len(tasks) - _MAX_NAMED} more" * (len(tasks) > _MAX_NAMED))
        return f"{len(found)} conflicts: your texts for {named} were not sent; see: lattice remote resolve"

    def name_of(self, path: str) -> str:
        return self.waiting(path).short_id

    def waiting(self, path: str) -> TextConflict:
        """Return a withheld edit as a conflict without a copy."""
        return self._conflict(path, [])

    def _conflict(self, path: str, copies: list[str]) -> TextConflict:
        task = path.rpartition("/")[2].removesuffix(".md")
        active = f"tasks/{task}.json"
        is_active = self._cache.size(active) is not None
        short_id = self._short_id(active if is_active else f"archive/{active}")
        found = tuple(map(self._cache.signature, copies))
        return TextConflict(path, tuple(copies), task, short_id or task, is_active, found)

    def _short_id(self, snapshot: str) -> str | None:
        with contextlib.suppress(StorageError, OSError, ValueError, AttributeError):
            short_id = json.loads(self._cache.read(snapshot)).get("short_id")
            return one_line(short_id) if isinstance(short_id, str) else None
        return None
