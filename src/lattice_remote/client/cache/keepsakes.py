"""What another program or a person put into a place that only the server changes: rescued before that is restored.

Plans and notes are edited in place, and edits of them are sent (see ``edits.py``). Every other file is restored when
anything else changes it (I4); the content that it had goes to the rescued files first (``rescued.py``).
"""

from collections.abc import Iterable, Mapping

from lattice_remote.client.cache.cache import BASE_DIRECTORY, Cache
from lattice_remote.client.cache.rescued import RescuedFiles
from lattice_remote.protocol.effects import Content
from lattice_remote.protocol.messages import MAX_PIECE_BYTES
from lattice_remote.protocol.operations import digest_of
from lattice_remote.protocol.paths import is_editable

__all__ = ["RESTORED", "Keepsakes", "is_event_log", "may_be_by_hand"]

LOST = "the server was restored to an earlier state that lacks it; the content is kept"
RESTORED = "changed here by another program, and restored to the server's version; what it wrote is kept"
_MAX_READ_BYTES = 32 * 1024 * 1024
"""What is larger is moved, not copied: the file is missing until the server's comes."""
_BLANK = b" \t\r\n\v\f\0"
_WRITTEN_BY_PROGRAMS = frozenset({"artifacts", "events", "ids.json", "resources", "sessions", "tasks"})


def is_event_log(path: str) -> bool:
    """Whether this file holds events, which are never changed or removed once they are written."""
    return path.startswith(("events/", "archive/events/"))


def may_be_by_hand(path: str) -> bool:
    """Whether a person may have written this file, though it is neither a plan nor notes of a task."""
    top, _, rest = path.partition("/")
    if top == "archive":
        return rest.startswith(("plans/", "notes/"))
    return top not in _WRITTEN_BY_PROGRAMS and not is_editable(path)


class Keepsakes:
    """Decides which contents of one cache are rescued. Methods must be called under the cache's lock."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.rescued = RescuedFiles(cache)
        self.reason = RESTORED
        """Why files are replaced at present, for what is rescued."""
        self.notices: list[str] = []
        """What the next command should say."""

    def remember(self, path: str) -> None:
        """The file is the server's now: what differs from it later is somebody's text, also if nobody watched."""
        if "/" in path or not may_be_by_hand(path):
            return
        if self._cache.size(path) is None:
            self._cache.delete(_base_path(path))
        elif (text := self._cache.read(path)) != self._base(path):
            self._cache.replace(_base_path(path), text)

    def keep(self, path: str, *, is_strange: bool, after: bytes | None = None) -> None:
        """Rescue the file's content if it is not the server's; call before the file is replaced or removed.

        Args:
            path: the file.
            is_strange: another program is known to have changed it. Otherwise only a text that differs from what was
                remembered counts, and an event that the server does not have.
            after: the server's content if it is known.
        """
        size, base = self._cache.size(path), self._base(path)
        if not size or path.endswith("~"):
            return
        has_events = after is not None and is_event_log(path)
        if not (is_strange or base is not None or has_events):
            return
        content = self._cache.read(path) if size <= _MAX_READ_BYTES else None
        if content is not None and (content in (base, after) or not content.strip()):
            return
        if has_events and content is not None and after is not None and _lacks_nothing(after, content):
            return
        self.rescued.add(path, content, self.reason)

    def keep_text(self, path: str, reason: str) -> bool:
        """Rescue the text of a plan or notes that is not to be sent; return whether it has any."""
        size = self._cache.size(path)
        content = self._cache.read(path) if size is not None and size <= _MAX_READ_BYTES else None
        if size is None or (content is not None and not content.strip(_BLANK)):
            return False
        self.rescued.add(path, content, reason)
        return True

    def keep_lost(self, differing: Iterable[str], surplus: Iterable[str], entries: Mapping[str, Content]) -> None:
        """Rescue what the server had when it was last seen, and lacks since it was restored (I7).

        Files that lattice makes of events are not worth it where the server has them too. Of an event log only the
        server's digest is known here: one that was continued in another way is compared when it arrives.

        Args:
            differing, surplus: files that the server has with another content, and those that it does not have.
            entries: the server's files.
        """
        self.reason = LOST
        for path in surplus:
            self._keep_lost(path)
        for path in differing:
            if is_event_log(path):
                size = entries[path][0]
                if size > MAX_PIECE_BYTES or self._begins_with(path, entries[path]):
                    self._keep_lost(path)
            elif is_editable(path) or may_be_by_hand(path):
                self._keep_lost(path)

    def _keep_lost(self, path: str) -> None:
        if size := self._cache.size(path):
            self.rescued.add(path, self._cache.read(path) if size <= _MAX_READ_BYTES else None, LOST)

    def _begins_with(self, path: str, content: Content) -> bool:
        size, digest = content
        return digest_of(self._cache.read(path)[:size]) == digest

    def _base(self, path: str) -> bytes | None:
        place = _base_path(path)
        return None if self._cache.size(place) is None else self._cache.read(place)


def _lacks_nothing(log: bytes, other: bytes) -> bool:
    """Whether an event log has every event of another one."""
    return log.startswith(other) or not set(other.splitlines()) - set(log.splitlines())


def _base_path(path: str) -> str:
    return f"{BASE_DIRECTORY}/{path}"
