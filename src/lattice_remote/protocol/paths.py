"""Paths of the replicated tree, and of the texts that users edit in place (I9).

A path is relative to ``.lattice/``, with ``/`` between components. Never replicated: components that start with a dot
(temporary files, a cache's ``.remote/``), ``locks/``, the files that make a directory a cache, and editors' backups in
``plans/`` and ``notes/``.
"""

import re

from lattice_remote.errors import HostilePath

__all__ = [
    "DIRECTORIES",
    "MAX_DEPTH",
    "MAX_PATH_BYTES",
    "check_path",
    "is_component",
    "is_editable",
    "is_payload",
    "is_replicated",
    "is_resource_name",
    "is_session_name",
    "parse_path",
]

DIRECTORIES = (
    "archive/events",
    "archive/notes",
    "archive/plans",
    "archive/tasks",
    "artifacts/meta",
    "artifacts/payload",
    "events",
    "locks",
    "notes",
    "plans",
    "resources",
    "sessions/archive",
    "tasks",
)
"""Directories of ``lattice init``; they exist even when empty."""

MAX_PATH_BYTES = 512
MAX_DEPTH = 8
_MAX_COMPONENT_BYTES = 255

_MAX_RESOURCE_BYTES = 240
"""Maximum length of a resource's name: its lock is ``resources_NAME.lock``."""
_MAX_SESSION_BYTES = 218
"""Maximum length of a session's name: its file in the archive is ``NAME_ID.json``."""

_LOCAL_TOP_LEVEL = frozenset({"remote.json", "cache_state.json", "locks"})
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\\:\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
"""Separators of other systems, control and invisible characters. Some file systems ignore the invisible ones, so that a
path with one becomes ``remote.json``; some terminals obey control characters.
"""
_EDITABLE = re.compile(r"(?:plans|notes)/task_[0-9A-HJKMNP-TV-Za-hjkmnp-tv-z]{26}\.md")
_EDITED_BY_HAND = ("plans/", "notes/")
_OF_TASK = re.compile(
    r"(?:archive/)?(?:(?:events|tasks)/task_[0-9A-Z]{26}\.jsonl?|(?:plans|notes)/task_[0-9A-Z]{26}\.md)", re.ASCII
)
"""Nearly all files: recognized in a fifth of the time."""


def parse_path(path: str) -> tuple[str, ...]:
    """Return the components of a well-formed path.

    Raises HostilePath: empty, absolute, with ``..`` or a component that starts with a dot, with a backslash, colon,
    control or invisible character, over ``MAX_PATH_BYTES`` or ``MAX_DEPTH``, or not encodable as UTF-8.
    """
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        raise HostilePath(f"path is not valid Unicode: {path!r}") from None
    if not 0 < size <= MAX_PATH_BYTES:
        raise HostilePath(f"path is empty or longer than {MAX_PATH_BYTES} bytes")
    if _FORBIDDEN.search(path):
        raise HostilePath(f"path holds a character that is not allowed: {path!r}")
    components = tuple(path.split("/"))
    if len(components) > MAX_DEPTH:
        raise HostilePath(f"path is nested deeper than {MAX_DEPTH}: {path!r}")
    for component in components:
        is_long = size > _MAX_COMPONENT_BYTES and len(component.encode()) > _MAX_COMPONENT_BYTES
        if not component or component.startswith(".") or is_long:
            raise HostilePath(f"path has a component that is not allowed: {path!r}")
    return components


def is_component(name: str, max_bytes: int = _MAX_COMPONENT_BYTES) -> bool:
    try:
        return parse_path(name) == (name,) and len(name.encode()) <= max_bytes
    except HostilePath:
        return False


def is_resource_name(name: str) -> bool:
    """Return whether a resource of this name can be shared: lattice makes a directory with the name."""
    return is_component(name, _MAX_RESOURCE_BYTES)


def is_session_name(name: str) -> bool:
    """Return whether a session of this name can be shared: lattice makes a file with the name."""
    return name.casefold() != "index" and is_component(name, _MAX_SESSION_BYTES)


def is_replicated(path: str) -> bool:
    if _OF_TASK.fullmatch(path):
        return True
    if path.startswith(".") or "/." in path:  # as parse_path() finds, without an exception for each temporary file
        return False
    try:
        components = parse_path(path)
    except HostilePath:
        return False
    if components[0].casefold() in _LOCAL_TOP_LEVEL:  # some file systems don't distinguish Locks/ and locks/
        return False
    # Files that an editor creates beside a plan (x.md~, #x.md#, x.md.swp) are local.
    return not path.startswith(_EDITED_BY_HAND) or path.endswith(".md")


def check_path(path: str) -> str:
    """Return a peer's path unchanged. Raises HostilePath unless it is replicated (I9)."""
    if not is_replicated(path):
        parse_path(path)  # names the reason if the path is malformed
        raise HostilePath(f"path is outside the replicated tree: {path!r}")
    return path


def is_editable(path: str) -> bool:
    return _EDITABLE.fullmatch(path) is not None


def is_payload(path: str) -> bool:
    """Return whether this is an artifact's content, which no lattice command needs."""
    return path.startswith("artifacts/payload/")
