"""What an argument of a client's command line is, and what it may hold (I9).

The values are checked as given, before Click converts them: converting a path already looks at the disk.
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
    """What an argument is."""

    TEXT = "text"
    """Also a flag, or a number: Click converts it without looking at the disk."""
    JSON = "JSON"
    """Goes into an event log as it is, which everybody must be able to read again."""
    ID = "id"
    """Lattice refuses a wrong form, but its check ignores case and a final newline, and ids become file names."""
    IDS = "ids"
    """The same, several between commas."""
    NEW_ID = "new id"
    """The id of something that is to be made, in lattice's own spelling: it becomes a file's name."""
    NAME = "name"
    """Of a resource: becomes a file's or directory's name unchecked."""
    LOG = "task's log"
    """Becomes a file's name unchecked; not one of lattice's own logs, which begin with an underscore."""
    SESSION = "session name"
    """The name of a session's file: not the index in that directory."""
    ACTOR = "actor"
    FILE = "file"
    """A file of the caller, which must have been attached."""


_WORDS = re.compile(r"[\w-]*\n?")
"""Contains all that lattice's own checks of an id let pass: they ignore case as Unicode has it, and a final newline."""
_ID = re.compile(r"[A-Za-z0-9_-]*")
_NEW_ID = re.compile(r"[a-z]{1,5}_[0-9A-HJKMNP-TV-Z]{26}")
_PREFIXES = {"task_id": "task", "art_id": "art", "ev_id": "ev", "resource_id": "res"}
_NESTING = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def check(kind: Kind, name: str, value: str) -> None:
    """Do nothing if ``value`` may be given for the parameter called ``name``.

    Raises:
        Rejected: it may not; the message says why in one line.
    """
    _CHECKS[kind](name, value)


def _check_text(name: str, value: str) -> None:
    """Any text will do; its size was checked with the whole line."""


def _check_json(name: str, value: str) -> None:
    """Text that is no JSON is left to lattice; what Python reads, but not everybody else, or not always, is refused."""
    if _depth(value) > _MAX_JSON_DEPTH:
        raise unsupported(f"{name} is nested deeper than {_MAX_JSON_DEPTH}")
    try:
        json.dumps(json.loads(value), ensure_ascii=False, allow_nan=False).encode()
    except json.JSONDecodeError:
        return
    except ValueError as error:  # NaN, Infinity, half of a surrogate pair, a number of thousands of digits
        raise unsupported(f"{name} holds a value that not every program can read") from error


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
    """Refuse what lattice would take for an id and is spelt differently; all that is no id lattice refuses itself."""
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
    """Tell whether a text has one spelling only, and shows all that it holds."""
    return value.isprintable() and unicodedata.is_normalized("NFC", value)


def shown(value: str) -> str:
    """Return a text from a peer so that it fits into one line of a message."""
    return repr(value if len(value) <= 60 else value[:60] + "...")


def unsupported(message: str) -> Rejected:
    """Return the refusal of what can't be used in a remote project."""
    return Rejected(message, code="REMOTE_UNSUPPORTED")
