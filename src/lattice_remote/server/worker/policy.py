"""Policy: the commands and parameters that a client may use, and the checks of their values (I9).

Lattice's own Click objects parse the line, so the checked values are the ones that run. They are checked before Click
converts them: converting a path accesses the disk.
"""

import json
import os
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import click

from lattice_remote.protocol.paths import is_component, is_resource_name, is_session_name
from lattice_remote.server.logging import masked
from lattice_remote.server.worker.caller import Identity, check_actor, is_plain, unsupported

__all__ = [
    "MAX_CHARS",
    "MAX_TEXT_BYTES",
    "ROUTED",
    "Command",
    "Kind",
    "check",
    "check_new_task",
    "command_words",
    "describe_call",
    "describe_command",
    "describe_edit",
    "describe_paths",
    "not_of_plugins",
    "parse",
    "shown",
]

_MAX_ACTOR_CHARS = 256
_MAX_JSON_DEPTH = 64


class Kind(Enum):
    TEXT = "text"
    """Also a flag or a number; Click converts it without accessing the disk."""
    JSON = "JSON"
    """Stored in an event log as given: every reader must be able to parse it."""
    ID = "id"
    """Lattice refuses a malformed id, but ignores case and a final newline, and ids become file names."""
    IDS = "ids"
    NEW_ID = "new id"
    """Becomes a file name in lattice's own spelling."""
    NAME = "name"
    """Becomes a file or directory name unchecked."""
    LOG = "task's log"
    """Becomes a file name unchecked; not one of lattice's own logs, which start with an underscore."""
    SESSION = "session name"
    """A session's file, not the index in that directory."""
    ACTOR = "actor"
    FILE = "file"


_WORDS = re.compile(r"[\w-]*\n?")
"""Superset of the ids that lattice accepts, ignoring case as in Unicode, and a final newline."""
_ID = re.compile(r"[A-Za-z0-9_-]*")
_NEW_ID = re.compile(r"[a-z]{1,5}_[0-9A-HJKMNP-TV-Z]{26}")
_PREFIXES = {"task_id": "task", "art_id": "art", "ev_id": "ev", "resource_id": "res"}
_NESTING = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def check(kind: Kind, name: str, value: str) -> None:
    """Check a parameter's value. Raises Rejected."""
    _CHECKS[kind](name, value)


def _check_text(name: str, value: str) -> None:
    """Accept any text."""


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
        raise unsupported(f"{shown(value)} cannot be used as {name}: it becomes a directory name on every machine")


def _check_log(name: str, value: str) -> None:
    if value.startswith("_") or not is_component(f"{value}.jsonl"):
        raise unsupported(f"{shown(value)} cannot be used as {name}: it is not the id of a task")


def _check_session(name: str, value: str) -> None:
    del name
    if not is_session_name(value):
        raise unsupported(f"{shown(value)} cannot be the name of a session, which is like Argus-3")


def _check_id(name: str, value: str) -> None:
    """Refuse a misspelt id that lattice would accept; other malformed ids are left to lattice."""
    if _WORDS.fullmatch(value) and not _ID.fullmatch(value):
        raise unsupported(f"{shown(value)} cannot be used as {name}: ASCII letters, digits, _ and - only")


def _check_ids(name: str, value: str) -> None:
    for part in value.split(","):
        _check_id(name, part.strip())


def _check_new_id(name: str, value: str) -> None:
    from lattice.core.ids import validate_id

    if not _NEW_ID.fullmatch(value) and (name not in _PREFIXES or validate_id(value, _PREFIXES[name])):
        raise unsupported(f"{shown(value)} cannot be used as {name}: write its letters as capitals, in ASCII")


def _check_actor_text(name: str, value: str) -> None:
    if len(value) > _MAX_ACTOR_CHARS or not value.isprintable() or value != value.strip():
        raise unsupported(f"{shown(value)} cannot be used as {name}: printable characters only, at most 256")


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


def shown(value: str) -> str:
    """Return a peer's text, quoted and cut for one line."""
    return repr(value if len(value) <= 60 else value[:60] + "...")


# --- commands ---

MAX_TEXT_BYTES = 1024 * 1024
_MISPLACED = "a file was attached to an argument that takes none"


def _takes(*texts: str, **others: Kind) -> Mapping[str, Kind]:
    return {**dict.fromkeys(("output_json", *texts), Kind.TEXT), **others}


def _writes(*texts: str, **others: Kind) -> Mapping[str, Kind]:
    common = ("quiet", "session", "model", "triggered_by", "on_behalf_of", "provenance_reason")
    return _takes(*common, *texts, session_name=Kind.SESSION, actor=Kind.ACTOR, **others)


_ID_ONLY = {"task_id": Kind.ID}
_LINK = {**_ID_ONLY, "target_task_id": Kind.ID}

ROUTED: Mapping[str, Mapping[str, Kind]] = {
    "create": _writes(
        *("title", "task_type", "priority", "urgency", "complexity", "status", "description", "tags", "assigned_to"),
        task_id=Kind.NEW_ID,
    ),
    "update": _writes("pairs", **_ID_ONLY),
    "status": _writes("new_status", "force", **_ID_ONLY),
    "assign": _writes("actor_id", **_ID_ONLY),
    "comment": _writes("text", "reply_to", "role", file_path=Kind.FILE, **_ID_ONLY),
    "comment-edit": _writes("comment_id", "new_text", "role", **_ID_ONLY),
    "comment-delete": _writes("comment_id", **_ID_ONLY),
    "react": _writes("comment_id", "emoji", **_ID_ONLY),
    "unreact": _writes("comment_id", "emoji", **_ID_ONLY),
    "complete": _writes("review_text", **_ID_ONLY),
    "attach": _writes(
        *("art_type", "title", "summary", "sensitive", "role", "inline_text"),
        source=Kind.FILE,
        art_id=Kind.NEW_ID,
        **_ID_ONLY,
    ),
    "event": _writes("event_type", data_str=Kind.JSON, ev_id=Kind.NEW_ID, **_ID_ONLY),
    "link": _writes("rel_type", "note", **_LINK),
    "unlink": _writes("rel_type", **_LINK),
    "branch-link": _writes("branch", "repo", **_ID_ONLY),
    "branch-unlink": _writes("branch", "repo", **_ID_ONLY),
    "archive": _writes("stale", task_ids=Kind.IDS),
    "unarchive": _writes(task_ids=Kind.IDS),
    "backfill-ids": _takes("force", actor=Kind.ACTOR, code=Kind.ID),
    "set-project-code": {"code": Kind.ID, "force": Kind.TEXT},
    "set-subproject-code": {"code": Kind.ID, "force": Kind.TEXT},
    "next": _takes("status_csv", "claim", "quiet", session_name=Kind.SESSION, actor=Kind.ACTOR),
    "resource create": _writes("description", "max_holders", "ttl", name=Kind.NAME, resource_id=Kind.NEW_ID),
    "resource acquire": _writes("force", "do_wait", "timeout", name=Kind.NAME, **_ID_ONLY),
    "resource release": _writes(name=Kind.NAME),
    "resource heartbeat": _writes(name=Kind.NAME),
    "session start": _takes(*("model", "framework", "prompt", "parent", "quiet", "base_name", "agent_type")),
    "session end": _takes("reason", name=Kind.SESSION),
    "doctor": _takes("fix"),
    "rebuild": _takes("rebuild_all", task_id=Kind.LOG),
}
"""The commands that a client may run, with all their parameters, by their names in lattice's Click commands. Others are
refused: a command or option of a newer lattice may do anything.
"""


@dataclass(frozen=True)
class Command:
    """Command line that may run.

    Attributes:
        path: the command's words; empty if the line only prints help or a usage error.
        values: given parameters by name: a text, True for a flag, or a tuple.
    """

    path: str
    values: Mapping[str, Any]
    actor: str | None = None

    @property
    def is_json(self) -> bool:
        return bool(self.values.get("output_json"))


def parse(
    cli: click.Group,
    argv: Sequence[str],
    identity: Identity,
    *,
    files: Collection[str],
    lattice_dir: Path,
    plugin_commands: Collection[str] = (),
) -> Command:
    """Parse and check a command line.

    Args:
        files: the private paths of attached files.
        plugin_commands: those of the server's plugins that the administrator allows.

    Raises:
        Rejected: REMOTE_UNSUPPORTED, or REMOTE_FORBIDDEN for an actor that this token may not use.
    """
    for argument in argv:
        if "\0" in argument or len(argument.encode("utf-8", "surrogatepass")) > MAX_TEXT_BYTES:
            raise unsupported("an argument holds a NUL character or is longer than 1 MiB")
    try:
        path, values = _split_line(cli, list(argv), files)
    except click.UsageError:
        # Click stops at the same error when it runs the line; the executor ensures that no command runs.
        return Command("", {})
    if path is None:
        return Command("", {})
    is_allowed = path in plugin_commands and _is_plugins(cli, path)
    kinds = ROUTED.get(path) or (_kinds_of_plugins(cli, path) if is_allowed else None)
    if kinds is None:
        raise unsupported(_refusal_reason(cli, path))
    _check_files(path, values, kinds, files)
    for name, given in values.items():
        kind = kinds.get(name)
        if kind is None:
            raise unsupported(f"the server does not know this parameter of 'lattice {path}': {name}")
        for value in _as_tuple(given):
            check(kind, name, value)
    _check_new(path, values, lattice_dir)
    return Command(path, values, check_actor(cli, path, values, identity, lattice_dir, is_lattices=path in ROUTED))


def _split_line(cli: click.Group, argv: list[str], files: Collection[str]) -> tuple[str | None, dict[str, Any]]:
    """Return the command's words and raw parameters; None for a line that only prints. Raises UsageError."""
    command: click.Command = cli
    words: list[str] = []
    while True:
        context = _context_of(command)
        parsed, rest, _ = command.make_parser(context).parse_args(list(argv))
        # A parameter that was not given is absent, or one of Click's markers.
        values = {name: v for name, v in parsed.items() if isinstance(v, str | bool | int | float | tuple | list)}
        help_option = command.get_help_option(context)
        if help_option is not None and values.get(help_option.name or ""):
            return None, {}
        if not isinstance(command, click.Group):
            return " ".join(words), values
        if not words and values.get("version"):
            return None, {}
        if values:
            raise unsupported(f"the server does not know this option of {context.info_name!r}: {next(iter(values))}")
        if not rest:
            return None, {}
        if rest[0] in files:
            raise unsupported(_MISPLACED)
        if command.get_command(context, rest[0]) is None:
            missing = shown(" ".join([*words, rest[0]]))
            raise unsupported(f"the server's lattice has no command {missing}: a plugin must be installed there too")
        word, found, argv = command.resolve_command(context, rest)
        assert word is not None and found is not None, "resolve_command raises when there is no such command"
        words.append(word)
        command = found


# --- commands of plugins ---


def not_of_plugins(cli: click.Group, paths: Iterable[str]) -> list[str]:
    return [path for path in paths if not _is_plugins(cli, path)]


def _is_plugins(cli: click.Group, path: str) -> bool:
    command = _command_at(cli, path)
    return command is not None and not getattr(command.callback, "__module__", "").startswith("lattice.")


def _refusal_reason(cli: click.Group, path: str) -> str:
    if not _is_plugins(cli, path):
        return f"'lattice {path}' cannot run on the server"
    return (
        f"'lattice {path}' cannot run on the server: the administrator must allow this plugin command, with "
        f'"plugin_commands": ["{path}"] in config.json'
    )


@cache
def _kinds_of_plugins(cli: click.Group, path: str) -> Mapping[str, Kind]:
    """Return the parameters of a plugin's command. Raises Rejected if one is a file, which would be the server's."""
    known = {"actor": Kind.ACTOR, "session_name": Kind.SESSION}
    kinds: dict[str, Kind] = {}
    command = _command_at(cli, path)
    assert command is not None, "the caller found this command"
    for parameter in command.params:
        if any(isinstance(part, click.Path | click.File) for part in _parts(parameter.type)):
            raise unsupported(
                f"'lattice {path}' cannot run on the server: this plugin command takes a file, {parameter.name}"
            )
        kinds[parameter.name or ""] = known.get(parameter.name or "", Kind.TEXT)
    return kinds


def _parts(kind: Any) -> Sequence[Any]:
    return kind.types if isinstance(kind, click.Tuple) else (kind,)


def _command_at(cli: click.Group, path: str) -> click.Command | None:
    command: click.Command | None = cli
    for word in path.split():
        command = command.commands.get(word) if isinstance(command, click.Group) else None
    return None if isinstance(command, click.Group) else command


@cache
def _context_of(command: click.Command) -> click.Context:
    return click.Context(command, info_name=command.name, **command.context_settings)


def _check_files(path: str, values: Mapping[str, Any], kinds: Mapping[str, Kind], files: Collection[str]) -> None:
    """Check that only attached files are given, and only for file parameters.

    Comes first: later messages quote values, and must not reveal the server's paths.
    """
    given = {value for name in values if kinds.get(name) is Kind.FILE for value in _as_tuple(values[name])}
    if not given.issuperset(files):
        raise unsupported(_MISPLACED)
    for value in given.difference(files):
        if not _is_url(path, value):
            raise unsupported(f"the file {shown(value)} was not attached to the command")


# --- new names ---


def _check_new(path: str, values: Mapping[str, Any], lattice_dir: Path) -> None:
    """Refuse new names that would collide with existing ones, here or on a client's disk."""
    if path == "create":
        check_new_task(values.get("task_id"), lattice_dir)
    if path == "resource create":
        _check_spelling(values.get("name"), _names_in(lattice_dir / "resources"))
        _check_plain(values.get("name"))
    if path == "session start":
        _check_new_session(values.get("base_name", values.get("agent_type", "").capitalize()), lattice_dir)


def _check_new_session(base_name: str, lattice_dir: Path) -> None:
    from lattice.core.actors import validate_base_name

    if validate_base_name(base_name) is None:  # else lattice refuses it, or picks one itself
        check(Kind.SESSION, "base_name", f"{base_name}-1")
        _check_plain(base_name)
        _check_spelling(base_name, (name.rpartition("-")[0] for name in _names_in(lattice_dir / "sessions")))


def check_new_task(task_id: str | None, lattice_dir: Path) -> None:
    """Refuse the id of an archived task as that of a new one; None if lattice generates it."""
    if task_id and os.path.lexists(lattice_dir / f"archive/tasks/{task_id}.json"):
        raise unsupported(f"{task_id} is the id of an archived task: unarchive it, or make one without an id")


def _check_plain(name: str | None) -> None:
    if name and not is_plain(name):
        raise unsupported(f"{shown(name)} cannot be a name: it contains unprintable characters or is not in NFC")


def _check_spelling(name: str | None, others: Iterable[str]) -> None:
    """Refuse a name that differs from an existing one by case alone, for case-insensitive file systems."""
    for other in others:
        if name and name != other and name.casefold() == other.casefold():
            raise unsupported(f"{shown(name)} differs from {other!r} only in case: choose another name")


def _names_in(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _is_url(path: str, value: str) -> bool:
    return path == "attach" and value.startswith(("http://", "https://"))


def _as_tuple(value: object) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, tuple | list) else (str(value),)


# --- commands in the log ---

MAX_CHARS = 200
_MAX_PATHS = 5
_MAX_EXAMINED_CHARS = 8 * MAX_CHARS


def describe_command(argv: Sequence[str]) -> str:
    """Return a command line as typed, secrets masked, cut to ``MAX_CHARS``."""
    line = ""
    for argument in argv:
        line += (" " if line else "") + shlex.quote(argument[:_MAX_EXAMINED_CHARS])
        if len(line) > _MAX_EXAMINED_CHARS:  # an argument may have a megabyte
            break
    return _cut(masked(line[:_MAX_EXAMINED_CHARS]))


def command_words(cli: click.Group, argv: Sequence[str]) -> str:
    words: list[str] = []
    command: click.Command | None = cli
    for word in argv:
        command = command.commands.get(word) if isinstance(command, click.Group) else None
        if command is None:
            break
        words.append(word)
    return " ".join(words)


def describe_call(label: str) -> str:
    return _cut(masked(label))


def describe_edit(path: str) -> str:
    return f"edit {path}"


def describe_paths(paths: Collection[str]) -> str:
    shown = ", ".join(list(paths)[:_MAX_PATHS])
    more = len(paths) - _MAX_PATHS
    if more <= 0:
        return _cut(f"changed {shown}")
    tail = f", and {more} more"
    return f"changed {shown}"[: MAX_CHARS - len(tail)] + tail


def _cut(line: str) -> str:
    return line if len(line) <= MAX_CHARS else line[: MAX_CHARS - 1] + "…"
