"""Which files a whole project may be made of, when it is brought in from elsewhere (I9, SPEC 3.6).

A replicated path alone is not enough: a name that lattice takes for an id and that is none, or two names that some file
system takes for one, would break the project for everybody.
"""

import re
import unicodedata
from collections.abc import Iterable

from lattice_remote.errors import HostilePath, Misuse
from lattice_remote.protocol.paths import check_path

__all__ = ["MAX_PROJECT_FILES", "MAX_TEXT_FILE_BYTES", "Layout", "first_sign_of_use"]

MAX_PROJECT_FILES = 200_000
MAX_TEXT_FILE_BYTES = 64 * 1024 * 1024
"""What lattice reads as a whole; payloads of artifacts may be larger."""

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
"""What a file in each of these directories must be called."""
_IN_ORDER = {directory: re.compile(names) for directory, names in _NAMES.items()}
_OF_AN_EMPTY_PROJECT = frozenset({"config.json", "context.md", "ids.json"})
_LIFECYCLE = "events/_lifecycle.jsonl"
_PAYLOADS = "artifacts/payload/"


class Layout:
    """The files of one project, added one by one; what does not fit is refused with its reason."""

    def __init__(self, *, max_bytes: int) -> None:
        self.files = 0
        self.bytes = 0
        self.max_bytes = max_bytes
        self._spellings: dict[str, str] = {}  # folded file or directory -> as it was first spelt
        self._files: set[str] = set()
        self._directories: set[str] = set()

    def add(self, path: str, size: int) -> None:
        """Take one file of ``size`` bytes.

        Raises:
            Misuse: the project can't have it; the message is for the person whose project it is.
        """
        try:
            check_path(path)
        except HostilePath as error:
            raise Misuse(f"{error.message}; move it away") from error
        directory, _, name = path.rpartition("/")
        expected = _IN_ORDER.get(directory)
        if expected is not None and expected.fullmatch(name) is None:
            raise Misuse(f"{path} has no name that lattice gives to files in {directory}/: move it away")
        if size > MAX_TEXT_FILE_BYTES and not path.startswith(_PAYLOADS):
            raise Misuse(f"{path} has {size} bytes; what is no artifact may have {MAX_TEXT_FILE_BYTES >> 20} MiB")
        self._add_place(path)
        self.files += 1
        self.bytes += size
        if self.files > MAX_PROJECT_FILES:
            raise Misuse(f"a project may have {MAX_PROJECT_FILES} files")
        if self.bytes > self.max_bytes:
            raise Misuse(f"the project has more than the {self.max_bytes >> 20} MiB that the server takes")

    def _add_place(self, path: str) -> None:
        """Note a file and its directories; each place has one spelling, and is one of the two."""
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
            raise Misuse(f"{place!r} and {other!r} are one name to some file systems: rename one")
        if place in self._files or place in self._directories:
            raise Misuse(f"{place!r} comes twice")


def first_sign_of_use(files: Iterable[tuple[str, int]]) -> str | None:
    """Return what an empty project does not have, in words; None when it is empty.

    A project is empty when nothing was ever done in it: it has its settings, its context, its table of short ids and
    the empty log of its beginning, as ``lattice init`` leaves them, and no other file.

    Args:
        files: path and size in bytes of each replicated file.
    """
    used = sorted(path for path, size in files if path not in _OF_AN_EMPTY_PROJECT and (path != _LIFECYCLE or size))
    tasks = sum(path.startswith(("tasks/", "archive/tasks/")) for path in used)
    if tasks:
        return f"{tasks} task{'s' * (tasks != 1)}"
    return used[0] if used else None
