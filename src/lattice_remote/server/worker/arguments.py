"""Kinds of command-line arguments and the checks of their values (I9).

Values are checked before Click converts them, because converting a path already accesses the disk.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from enum import Enum

from lattice_remote.errors import Rejected
from lattice_remote.protocol.paths import is_component, is_resource_name, is_session_name

__all__ = ["Kind", "check", "is_plain", "shown", "unsupported"]

_MAX_ACTOR_CHARS = 256
_MAX_JSON_DEPTH = 64


class Kind(Enum):
    """Kind of an argument."""

    TEXT = "text"
    """Also a flag or a number; Click converts it without accessing the disk."""
    JSON = "JSON"
    """Stored in an event log as given, so every reader must be able to parse it."""
    ID = "id"
    """Lattice refuses a malformed id, but ignores case and a final newline, and ids become file names."""
    IDS = "ids"
    """Several ids, separated by commas."""
    NEW_ID = "new id"
    """The id of a new item, in lattice's own spelling: it becomes a file name."""
    NAME = "name"
    """Of a resource: becomes a file or directory name unchecked."""
    LOG = "task's log"
    """Becomes a file name unchecked; not one of lattice's own logs, which start with an underscore."""
    SESSION = "session name"
    """The name of a session's file, not the index in that directory."""
    ACTOR = "actor"
    FILE = "file"
    """An attached file of the caller."""


_WORDS = re.compile(r"[\w-]*\n?")
"""Superset of the ids that lattice accepts, ignoring case as in Unicode, and a final newline."""
_ID = re.compile(r"[A-Za-z0-9_-]*")
_NEW_ID = re.compile(r"[a-z]{1,5}_[0-9A-HJKMNP-TV-Z]{26}")
_PREFIXES = {"task_id": "task", "art_id": "art", "ev_id": "ev", "resource_id": "res"}
_NESTING = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def check(kind: Kind, name: str, value: str) -> None:
    """Check ``value`` for the parameter ``name``.

    Raises:
        Rejected: it is not allowed; the message gives the reason in one line.
    """
    _CHECKS[kind](name, value)


def _check_text(name: str, value: str) -> None:
    """Accept any text; the size of the line was checked before."""


def _check_json(name: str, value: str) -> None:
    """Refuse JSON that Python reads but other programs may not; malformed JSON is left to lattice."""
    if _depth(value) > _MAX_JSON_DEPTH:
        raise unsupported(f"{name} is nested deeper than {_MAX_JSON_DEPTH}")
    try:
        json.dumps(json.loads(value), ensure_ascii=False, allow_nan=False).encode()
    except json.JSONDecodeError:
        return
    except ValueError as error:  # NaN, Infinity, half of a surrogate pair, a number of thousands of digits
        raise unsupported(f"{name} contains a value that not every program can read") from error


def _depth(value: str) -> int:
    depth = deepest = 0
    for match in _NESTING.finditer(value):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match.group(), 0)
        deepest = max(deepest, depth)
    return deepest


def _check_name(name: str, value: str) -> None:
    if not is_resource_name(value):
        raise unsupported(f"{shown(value)} can't be used as {name}: it becomes a directory's name on every machine")


def _check_log(name: str, value: str) -> None:
    if value.startswith("_") or not is_component(f"{value}.jsonl"):
        raise unsupported(f"{shown(value)} can't be used as {name}: it is not the id of a task")


def _check_session(name: str, value: str) -> None:
    del name
    if not is_session_name(value):
        raise unsupported(f"{shown(value)} can't be the name of a session, which is like Argus-3")


def _check_id(name: str, value: str) -> None:
    """Refuse a misspelt id that lattice would accept; other malformed ids are left to lattice."""
    if _WORDS.fullmatch(value) and not _ID.fullmatch(value):
        raise unsupported(f"{shown(value)} can't be used as {name}: ASCII letters, digits, _ and - only")


def _check_ids(name: str, value: str) -> None:
    for part in value.split(","):
        _check_id(name, part.strip())


def _check_new_id(name: str, value: str) -> None:
    from lattice.core.ids import validate_id

    if not _NEW_ID.fullmatch(value) and (name not in _PREFIXES or validate_id(value, _PREFIXES[name])):
        raise unsupported(f"{shown(value)} can't be used as {name}: write its letters as capitals, in ASCII")


def _check_actor_text(name: str, value: str) -> None:
    if len(value) > _MAX_ACTOR_CHARS or not value.isprintable() or value != value.strip():
        raise unsupported(f"{shown(value)} can't be used as {name}: printable characters only, at most 256")


_CHECKS: Mapping[Kind, Callable[[str, str], None]] = {
    Kind.TEXT: _check_text,
    Kind.JSON: _check_json,
    Kind.ID: _check_id,
    Kind.IDS: _check_ids,
    Kind.NEW_ID: _check_new_id,
    Kind.NAME: _check_name,
    Kind.LOG: _check_log,
    Kind.SESSION: _check_session,
    Kind.ACTOR: _check_actor_text,
    Kind.FILE: _check_text,
}


def is_plain(value: str) -> bool:
    """Return whether a text is printable and in NFC."""
    return value.isprintable() and unicodedata.is_normalized("NFC", value)


def shown(value: str) -> str:
    """Return a text from a peer, quoted and cut to fit one line of a message."""
    return repr(value if len(value) <= 60 else value[:60] + "...")


def unsupported(message: str) -> Rejected:
    """Return the refusal (REMOTE_UNSUPPORTED) of an argument not allowed in a remote project."""
    return Rejected(message, code="REMOTE_UNSUPPORTED")
