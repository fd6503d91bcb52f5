"""What a client's command line may do: one table, checked before lattice sees the command (I9).

Lattice's own Click objects take the command line apart, so what is checked is what will run. The values are checked as
given, before Click converts them: converting a path already looks at the disk.
"""

import json
import re
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import click

from lattice_remote.errors import Rejected

__all__ = ["ROUTED", "Command", "Identity", "Kind", "parse"]

MAX_TEXT_BYTES = 1024 * 1024
_MAX_NAME_BYTES = 150


class Kind(Enum):
    """What an argument is."""

    TEXT = "text"
    ID = "id"
    """Lattice checks its form itself, but its ``$`` lets a final newline pass, and ids become file names."""
    IDS = "ids"
    NAME = "name"
    """Becomes a file's or directory's name unchecked."""
    LOG = "task's log"
    """As NAME, but not one of lattice's own logs, which begin with an underscore."""
    SESSION = "session name"
    """The name of a session's file, which is Name-Serial: nothing else in that directory."""
    ACTOR = "actor"
    FILE = "file"
    """A file of the caller, which must have been attached."""


_NAME = re.compile(r"\w[\w-]{0,99}")
_SESSION = re.compile(r"\w[\w-]{0,99}-[0-9]{1,18}")
_ID = re.compile(r"[^\x00-\x1f\x7f/\\]*")

_IDENTITY = {"actor": Kind.ACTOR, "session_name": Kind.SESSION}
_TASK = {"task_id": Kind.ID, **_IDENTITY}
_RESOURCE = {"name": Kind.NAME, "task_id": Kind.ID, "resource_id": Kind.ID, **_IDENTITY}

ROUTED: Mapping[str, Mapping[str, Kind]] = {
    "create": _TASK,
    "update": _TASK,
    "status": _TASK,
    "assign": _TASK,
    "comment": {**_TASK, "file_path": Kind.FILE},
    "comment-edit": _TASK,
    "comment-delete": _TASK,
    "react": _TASK,
    "unreact": _TASK,
    "complete": _TASK,
    "attach": {**_TASK, "source": Kind.FILE, "art_id": Kind.ID},
    "event": {**_TASK, "ev_id": Kind.ID},
    "link": {**_TASK, "target_task_id": Kind.ID},
    "unlink": {**_TASK, "target_task_id": Kind.ID},
    "branch-link": _TASK,
    "branch-unlink": _TASK,
    "archive": {**_TASK, "task_ids": Kind.IDS},
    "unarchive": {**_TASK, "task_ids": Kind.IDS},
    "backfill-ids": {"actor": Kind.ACTOR, "code": Kind.ID},
    "set-project-code": {"code": Kind.ID},
    "set-subproject-code": {"code": Kind.ID},
    "next": _IDENTITY,
    "resource create": _RESOURCE,
    "resource acquire": _RESOURCE,
    "resource release": _RESOURCE,
    "resource heartbeat": _RESOURCE,
    "session start": {"base_name": Kind.NAME, "agent_type": Kind.NAME},
    "session end": {"name": Kind.SESSION},
    "doctor": {},
    "rebuild": {"task_id": Kind.LOG},
}
"""The commands that a client may run here, with the parameters (by their names in lattice's Click commands) that are
more than text."""


@dataclass(frozen=True)
class Identity:
    """Who asks: the token's actor, and the patterns (``*`` stands for anything) of others it may act as."""

    actor: str
    act_as: Sequence[str] = ()

    def may_act_as(self, actor: str, *, ignore_case: bool = False) -> bool:
        """Tell whether a command of this token may say that it is ``actor``."""
        flags = re.DOTALL | (re.IGNORECASE if ignore_case else re.NOFLAG)
        patterns = [re.escape(self.actor), *(_as_regex(pattern) for pattern in self.act_as)]
        return any(re.fullmatch(pattern, actor, flags) for pattern in patterns)

    def require(self, actor: str, *, ignore_case: bool = False) -> None:
        """Do nothing if a command of this token may say that it is ``actor``.

        Raises:
            Rejected: it may not; the message names what is allowed.
        """
        if not self.may_act_as(actor, ignore_case=ignore_case):
            allowed = ", ".join((self.actor, *self.act_as))
            raise Rejected(f"token may act as {allowed}; not as {actor}", code="REMOTE_FORBIDDEN")


def _as_regex(pattern: str) -> str:
    """Return a pattern of actors as a regular expression, which never goes back to a star that it has passed.

    Taking the first place at which a piece fits loses nothing, because the next star takes what is skipped.
    Without the atomic groups a few stars would keep the worker busy for hours.
    """
    first, *pieces = (re.escape(piece) for piece in pattern.split("*"))
    if not pieces:
        return first
    return first + "".join(f"(?>.*?{piece})" for piece in pieces[:-1]) + ".*" + pieces[-1]


@dataclass(frozen=True)
class Command:
    """A command line that may run.

    Attributes:
        path: the command's words, as ``resource acquire``; empty when the line only prints help or an error of usage.
        values: parameters as given, by name: a text, True for a flag, or a tuple.
        actor: who the command says it is, None when it does not say.
    """

    path: str
    values: Mapping[str, Any]
    actor: str | None = None

    @property
    def is_json(self) -> bool:
        """Tell whether the command prints JSON."""
        return bool(self.values.get("output_json"))


def parse(
    cli: click.Group, argv: Sequence[str], identity: Identity, *, files: Collection[str], lattice_dir: Path
) -> Command:
    """Take a command line apart and check all of it; nothing is run, nothing but a session's file is read.

    Args:
        cli: lattice's top-level command.
        argv: without the program's name.
        identity: who asks.
        files: the private paths at which the caller's files were put.
        lattice_dir: the project's ``.lattice``.

    Raises:
        Rejected: REMOTE_UNSUPPORTED for a command or an argument that can't be used in a remote project,
            REMOTE_FORBIDDEN for an actor that this token may not use.
    """
    for argument in argv:
        if "\0" in argument or len(argument.encode("utf-8", "surrogatepass")) > MAX_TEXT_BYTES:
            raise _unsupported("an argument holds a NUL character or is longer than 1 MiB")
    try:
        path, values = _take_apart(cli, list(argv))
    except click.UsageError:
        # Click stops here too when it runs the line, with its own words, before any command is called.
        return Command("", {})
    if path is None:
        return Command("", {})
    kinds = ROUTED.get(path)
    if kinds is None:
        raise _unsupported(f"'lattice {path}' can't run on the server")
    used = set()
    for name, kind in kinds.items():
        for value in _as_tuple(values.get(name)):
            _CHECKS[kind](name, value)
            if kind is Kind.FILE and value in files:
                used.add(value)
            elif kind is Kind.FILE and not _is_url(path, value):
                raise _unsupported(f"the file {value!r} did not travel with the command")
    if set(files) - used:
        raise _unsupported("a file was attached to an argument that takes none")
    return Command(path, values, _check_actor(path, values, identity, lattice_dir))


def _take_apart(cli: click.Group, argv: list[str]) -> tuple[str | None, dict[str, Any]]:
    """Return the command's words and its raw parameters; None for a line that only prints help or a version.

    Raises:
        click.UsageError: as Click itself would.
    """
    command: click.Command = cli
    words: list[str] = []
    while True:
        context, parser = _parser_of(command)
        values, rest, _ = parser.parse_args(list(argv))
        if not isinstance(command, click.Group):
            help_option = command.get_help_option(context)
            if help_option is not None and values.get(help_option.name or ""):
                return None, {}
            # What was not given is missing here, or stands as a marker of Click's own.
            return " ".join(words), {k: v for k, v in values.items() if isinstance(v, str | bool | tuple)}
        if values or not rest:
            return None, {}
        if command.get_command(context, rest[0]) is None:
            raise _unsupported(f"the server's lattice has no command {' '.join([*words, rest[0]])!r}")
        word, found, argv = command.resolve_command(context, rest)
        assert word is not None and found is not None, "resolve_command raises when there is no such command"
        words.append(word)
        command = found


@cache
def _parser_of(command: click.Command) -> tuple[click.Context, Any]:
    """Return Click's parser for one command; making it takes longer than parsing. Its errors are nobody's to see."""
    context = click.Context(command)
    return context, command.make_parser(context)


def _check_actor(path: str, values: Mapping[str, Any], identity: Identity, lattice_dir: Path) -> str | None:
    session = values.get("name") if path == "session end" else values.get("session_name")
    if session is not None:
        actor = _actor_of_session(lattice_dir / "sessions" / f"{session}.json")
        if actor is not None:
            identity.require(actor, ignore_case=True)
    elif path == "session start":
        actor = _actor_to_be(values)
        identity.require(actor, ignore_case=True)
    else:
        actor = None
    given = values.get("actor")
    if given is not None:
        identity.require(given)
    return actor or given


def _actor_of_session(path: Path) -> str | None:
    """Return the actor that a session stands for; None when there is no such session: lattice will say so."""
    from lattice.core.actors import ActorIdentity

    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise _unsupported(f"the session {path.stem} is no plain file on the server")
        return str(ActorIdentity.from_dict(json.loads(path.read_text())).to_legacy_actor())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unsupported(f"the session {path.stem} can't be read: it names no actor") from error


def _actor_to_be(values: Mapping[str, Any]) -> str:
    """Return the actor of a session that is about to start."""
    prefix = "human" if values.get("model") == "human" else "agent"
    # Without a name lattice picks one of its own: only a token that may use every name can take it.
    return f"{prefix}:{values.get('base_name') or values.get('agent_type') or '*'}"


# --- kinds ---


def _check_name(name: str, value: str) -> None:
    if not _NAME.fullmatch(value) or len(value.encode()) > _MAX_NAME_BYTES:
        raise _unsupported(f"{_shown(value)} can't be used as {name}: letters, digits, _ and - only, at most 100")


def _check_log(name: str, value: str) -> None:
    _check_name(name, value)
    if value.startswith("_"):
        raise _unsupported(f"{_shown(value)} is not the id of a task")


def _check_session(name: str, value: str) -> None:
    del name
    if not _SESSION.fullmatch(value) or len(value.encode()) > _MAX_NAME_BYTES:
        raise _unsupported(f"{_shown(value)} is not the name of a session, which ends in a number, as Argus-3")


def _check_id(name: str, value: str) -> None:
    if not _ID.fullmatch(value) or value.startswith("."):
        raise _unsupported(f"{_shown(value)} can't be used as {name}")


def _check_text(name: str, value: str) -> None:
    """Any text will do; its size was checked with the whole line."""


_CHECKS: Mapping[Kind, Callable[[str, str], None]] = {
    Kind.TEXT: _check_text,
    Kind.ID: _check_id,
    Kind.IDS: _check_id,
    Kind.NAME: _check_name,
    Kind.LOG: _check_log,
    Kind.SESSION: _check_session,
    Kind.ACTOR: _check_text,
    Kind.FILE: _check_text,
}


def _is_url(path: str, value: str) -> bool:
    return path == "attach" and value.startswith(("http://", "https://"))


def _as_tuple(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    return tuple(map(str, value)) if isinstance(value, tuple | list) else (str(value),)


def _shown(value: str) -> str:
    return repr(value if len(value) <= 60 else value[:60] + "...")


def _unsupported(message: str) -> Rejected:
    return Rejected(message, code="REMOTE_UNSUPPORTED")
