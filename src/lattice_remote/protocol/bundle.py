"""Whole project as one byte stream, the pack of a push (SPEC 3.6). A project has exactly one pack."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator

import msgspec

from lattice_remote.errors import HostilePath, Misuse, ProtocolError
from lattice_remote.protocol.messages import Entry
from lattice_remote.protocol.paths import check_path

__all__ = [
    "END",
    "MAGIC",
    "MAX_PROJECT_FILES",
    "MAX_TEXT_FILE_BYTES",
    "Layout",
    "Unpacker",
    "first_sign_of_use",
    "head_of",
]

MAGIC = b"lattice-pack 1\n"
END = bytes(4)
_MAX_HEAD_BYTES = 1024

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Entry)


def head_of(entry: Entry) -> bytes:
    encoded = _encoder.encode(entry)
    return len(encoded).to_bytes(4) + encoded


class Unpacker:
    """Incremental decoder of a pack, for pieces of any length.

    Checks order, sizes, digests and the end, but not the paths' meaning.
    """

    def __init__(self) -> None:
        self.is_complete = False
        self._received = bytearray()
        self._started = False
        self._last = ""
        self._entry: Entry | None = None
        self._left = 0
        self._hasher = hashlib.sha256()

    def receive(self, data: bytes) -> Iterator[Entry | bytes]:
        """Yield an ``Entry`` where a file begins, then its content in pieces. Raises ProtocolError."""
        self._received += data
        if not self._started:
            if not MAGIC.startswith(self._received[: len(MAGIC)]):
                raise ProtocolError("not a pack of a project")
            if len(self._received) < len(MAGIC):
                return
            del self._received[: len(MAGIC)]
            self._started = True
        while True:
            if self._entry is not None:
                if self._left and not self._received:
                    return
                if piece := bytes(self._received[: self._left]):
                    del self._received[: len(piece)]
                    self._left -= len(piece)
                    self._hasher.update(piece)
                    yield piece
                if self._left:
                    return
                self._end_file(self._entry)
            elif (entry := self._next_head()) is not None:
                yield entry
            else:
                return

    def _next_head(self) -> Entry | None:
        if self.is_complete:
            if self._received:
                raise ProtocolError("the pack has data after its end")
            return None
        if len(self._received) < 4:
            return None
        length = int.from_bytes(self._received[:4])
        if not length:
            self.is_complete = True
            del self._received[:4]
            return self._next_head()
        if length > _MAX_HEAD_BYTES:
            raise ProtocolError(f"a head of {length} bytes in the pack")
        if len(self._received) < 4 + length:
            return None
        entry = self._decoded(bytes(self._received[4 : 4 + length]))
        del self._received[: 4 + length]
        self._entry, self._left, self._hasher, self._last = entry, entry.size, hashlib.sha256(), entry.path
        return entry

    def _decoded(self, head: bytes) -> Entry:
        try:
            entry = _decoder.decode(head)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"a malformed head in the pack: {error}") from error
        if _encoder.encode(entry) != head:
            raise ProtocolError(f"the head of {entry.path!r} in the pack is not canonical")
        if self._last >= entry.path:
            raise ProtocolError(f"{entry.path!r} is out of order in the pack")
        return entry

    def _end_file(self, entry: Entry) -> None:
        if self._hasher.digest() != entry.digest:
            raise ProtocolError(f"the content of {entry.path!r} in the pack does not match its digest")
        self._entry = None


MAX_PROJECT_FILES = 500_000
MAX_TEXT_FILE_BYTES = 64 * 1024 * 1024
"""Maximum size of a file that lattice reads whole; payloads of artifacts may be larger."""

_ID = "[0-9A-HJKMNP-TV-Z]{26}"
_NAMES = {
    "tasks": rf"task_{_ID}\.json",
    "events": rf"_lifecycle\.jsonl|(?:task|res)_{_ID}\.jsonl",
    "archive/tasks": rf"task_{_ID}\.json",
    "archive/events": rf"task_{_ID}\.jsonl",
    "archive/plans": r".+\.md",
    "archive/notes": r".+\.md",
    "artifacts/meta": rf"art_{_ID}\.json",
    "artifacts/payload": rf"art_{_ID}[^/]*",
}
_IN_ORDER = {directory: re.compile(names) for directory, names in _NAMES.items()}
_OF_AN_EMPTY_PROJECT = frozenset({"config.json", "context.md", "ids.json"})
_LIFECYCLE = "events/_lifecycle.jsonl"
_PAYLOADS = "artifacts/payload/"


class Layout:
    def __init__(self, *, max_bytes: int) -> None:
        self.files = 0
        self.bytes = 0
        self.max_bytes = max_bytes
        self._spellings: dict[str, str] = {}  # folded file or directory -> its first spelling
        self._files: set[str] = set()
        self._directories: set[str] = set()

    def add(self, path: str, size: int) -> None:
        """Add a file. Raises Misuse: a project cannot have it."""
        try:
            check_path(path)
        except HostilePath as error:
            raise Misuse(f"{error.message}; move it away") from error
        directory, _, name = path.rpartition("/")
        expected = _IN_ORDER.get(directory)
        if expected is not None and expected.fullmatch(name) is None:
            raise Misuse(f"{path} is not a file name of lattice in {directory}/: move it away")
        if size > MAX_TEXT_FILE_BYTES and not path.startswith(_PAYLOADS):
            raise Misuse(
                f"{path} has {size} bytes; files other than artifacts can have {MAX_TEXT_FILE_BYTES >> 20} MiB"
            )
        self._add_place(path)
        self.files += 1
        self.bytes += size
        if self.files > MAX_PROJECT_FILES:
            raise Misuse(f"a project can have at most {MAX_PROJECT_FILES} files")
        if self.bytes > self.max_bytes:
            raise Misuse(f"the project exceeds the server's limit of {self.max_bytes >> 20} MiB")

    def _add_place(self, path: str) -> None:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            directory = "/".join(parts[:depth])
            if directory in self._directories:
                continue
            self._spell(directory)
            self._directories.add(directory)
        self._spell(path)
        self._files.add(path)

    def _spell(self, place: str) -> None:
        folded = unicodedata.normalize("NFC", place.casefold())
        if (other := self._spellings.setdefault(folded, place)) != place:
            raise Misuse(f"some file systems do not distinguish {place!r} and {other!r}: rename one")
        if place in self._files or place in self._directories:
            raise Misuse(f"{place!r} occurs twice")


def first_sign_of_use(files: Iterable[tuple[str, int]]) -> str | None:
    """Return a description of the first content that no empty project has; None if the project is empty.

    ``files`` has path and size of each replicated file.
    """
    tasks, first = 0, None
    for path, size in files:
        if path not in _OF_AN_EMPTY_PROJECT and (path != _LIFECYCLE or size):
            tasks += path.startswith(("tasks/", "archive/tasks/"))
            first = path if first is None else min(first, path)
    return f"{tasks} task{'s' * (tasks != 1)}" if tasks else first
