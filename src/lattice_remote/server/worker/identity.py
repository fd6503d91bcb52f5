"""Who a command says it is, and whether its token may say so (I9)."""

import json
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import click
import msgspec

from lattice_remote.errors import Rejected
from lattice_remote.files import write_atomically
from lattice_remote.protocol.operations import Operation, PutFile
from lattice_remote.server.worker.arguments import is_plain, unsupported

__all__ = ["OWNERS_FILE", "Identity", "Owner", "SessionOwners", "check_actor"]

OWNERS_FILE = "session_owners.json"


class Owner(msgspec.Struct, frozen=True):
    """Whose a session is."""

    session: str
    """The session's own id, which no other ever has."""
    token_id: str
    actor: str
    """The token's."""


class _Session(msgspec.Struct):
    session: str = ""


class SessionOwners:
    """The owners of one project's sessions. With no path: of none."""

    def __init__(self, project: Path | None = None) -> None:
        self._path = project / OWNERS_FILE if project is not None else None
        self._sessions = project / ".lattice" / "sessions" if project is not None else None
        self._known: dict[str, Owner] | None = None

    def of(self, name: str, session: str) -> Owner | None:
        """Return whose the session ``name`` is, whose own id is ``session``; None when it is nobody's.

        Nobody's is one that was not started through this server: with plain lattice, or before it came here.

        Raises:
            Rejected: what is known of owners can't be read.
        """
        owner = self._read().get(name)
        return owner if owner is not None and owner.session == session else None

    def note(self, operations: Iterable[Operation], token_id: str, actor: str) -> None:
        """Note whose the sessions are that these operations start; durable once this returns.

        Raises:
            Rejected: what is known of owners can't be read.
            OSError: it can't be written; nothing has changed.
        """
        assert self._path is not None and self._sessions is not None, "only a project has sessions that start"
        started = {Path(each.path).stem: each.data for each in operations if _is_session(each)}  # type: ignore[union-attr]
        if not started:
            return
        known = {name: owner for name, owner in self._read().items() if os.path.exists(self._sessions / f"{name}.json")}
        for name, data in started.items():
            known[name] = Owner(msgspec.json.decode(data, type=_Session).session, token_id, actor)
        write_atomically(self._path, msgspec.json.format(msgspec.json.encode(known)) + b"\n", mode=0o600)
        self._known = known

    def _read(self) -> dict[str, Owner]:
        """Return what is known, read once: nobody else writes it."""
        if self._known is None:
            self._known = _load(self._path) if self._path is not None else {}
        return self._known


def _load(path: Path) -> dict[str, Owner]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Owner])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Rejected(
            f"the server can't read whose sessions are whose ({OWNERS_FILE}); its administrator can mend it, or remove "
            "it, which makes every session nobody's",
            code="REMOTE_STORAGE",
        ) from error


def _is_session(operation: Operation) -> bool:
    folder, _, name = operation.path.rpartition("/")
    return isinstance(operation, PutFile) and folder == "sessions" and name != "index.json"


@dataclass(frozen=True)
class Identity:
    """Who asks: the token's actor, and the patterns (``*`` stands for anything) of others it may act as."""

    actor: str
    act_as: Sequence[str] = ()
    token_id: str = ""
    owners: SessionOwners = field(default_factory=SessionOwners)
    """Of the project's sessions."""

    def may_act_as(self, actor: str, *, ignore_case: bool = False) -> bool:
        """Tell whether a command of this token may say that it is ``actor``."""
        # lower() and not IGNORECASE, for which more letters are the same than people think.
        fold = str.lower if ignore_case else str
        patterns = [re.escape(fold(self.actor)), *(_as_regex(fold(pattern)) for pattern in self.act_as)]
        return any(re.fullmatch(pattern, fold(actor), re.DOTALL) for pattern in patterns)

    def require(self, actor: str, *, ignore_case: bool = False) -> None:
        """Do nothing if a command of this token may say that it is ``actor``.

        Raises:
            Rejected: it may not; the message names what is allowed.
        """
        if not self.may_act_as(actor, ignore_case=ignore_case):
            allowed = ", ".join((self.actor, *self.act_as))
            raise Rejected(f"token may act as {allowed}; not as {actor}", code="REMOTE_FORBIDDEN")

    def require_session(self, name: str, session: str, *, to_end: bool) -> None:
        """Do nothing if a command of this token may act as this session, or end it.

        A session belongs to the token that started it. To end one a token of the same actor will do: a person whose
        other machine, or whose former token, has left one behind.

        Raises:
            Rejected: it is another token's.
        """
        owner = self.owners.of(name, session)
        if owner is None or owner.token_id == self.token_id or (to_end and owner.actor == self.actor):
            return
        if to_end:
            advice = f"a token of {owner.actor} can end it"
        elif owner.actor == self.actor:
            advice = f"start one with this token, and end that one with: lattice session end {name}"
        else:
            advice = "start your own with: lattice session start"
        raise Rejected(f"session {name} belongs to another token, of {owner.actor}: {advice}", code="REMOTE_FORBIDDEN")


def _as_regex(pattern: str) -> str:
    """Return a pattern of actors as a regular expression, which never goes back to a star that it has passed.

    Taking the first place at which a piece fits loses nothing, because the next star takes what is skipped.
    Without the atomic groups a few stars would keep the worker busy for hours.
    """
    first, *pieces = (re.escape(piece) for piece in pattern.split("*"))
    if not pieces:
        return first
    return first + "".join(f"(?>.*?{piece})" for piece in pieces[:-1]) + ".*" + pieces[-1]


def check_actor(
    cli: click.Group,
    path: str,
    values: Mapping[str, Any],
    identity: Identity,
    lattice_dir: Path,
    *,
    is_lattices: bool,
) -> str | None:
    """Return who the command says it is, checked; every way in which lattice takes an actor is one of these.

    A session, its own name for ``session end``, the session that starts, ``--actor``, and where that is left out the
    actor that a command takes instead. A name that lattice refuses is left to lattice, if the command ``is_lattices``.
    """
    from lattice.core.actors import validate_base_name
    from lattice.core.ids import validate_actor

    actor: str | None = None
    session = values.get("name") if path == "session end" else values.get("session_name")
    if session is not None:
        actor, own_id = _actor_of_session(lattice_dir, session)
        if actor is not None:
            identity.require(actor, ignore_case=True)
            identity.require_session(session, own_id, to_end=path == "session end")
    elif path == "session start":
        actor = _actor_to_be(values)
        if validate_base_name(actor.partition(":")[2]) is None:
            identity.require(actor, ignore_case=True)
    given = values.get("actor", _default_actor(cli, path))
    # Lattice checks the form of every actor but that of the one command which has a default.
    if given is not None and (validate_actor(given) or not is_lattices or path == "backfill-ids"):
        identity.require(given)
    return actor or given


@cache
def _default_actor(cli: click.Group, path: str) -> str | None:
    """Return the actor that a command takes when it is not told one, as ``backfill-ids`` does."""
    command: click.Command = cli
    for word in path.split():
        assert isinstance(command, click.Group), "the words were found in it"
        command = command.commands[word]
    defaults = [option.get_default(click.Context(command)) for option in command.params if option.name == "actor"]
    return next((default for default in defaults if isinstance(default, str)), None)


def _actor_of_session(lattice_dir: Path, session: str) -> tuple[str | None, str]:
    """Return the actor that a session stands for, and its own id; None when there is none: lattice will say so.

    Lattice believes whatever the file says, so a file that says something else than its name is refused.
    """
    from lattice.core.actors import ActorIdentity

    path = lattice_dir / "sessions" / f"{session}.json"
    try:
        if not stat.S_ISDIR(path.parent.lstat().st_mode) or not stat.S_ISREG(path.lstat().st_mode):
            raise unsupported(f"the session {session} is no plain file on the server")
        identity = ActorIdentity.from_dict(json.loads(path.read_text("utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None, ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise unsupported(f"the session {session} can't be read: it names no actor") from error
    actor = str(identity.to_legacy_actor())
    if identity.name != session or f"{identity.base_name}-{identity.serial}" != session or not is_plain(actor):
        raise unsupported(f"the session {session} can't be used: its file is that of another")
    return actor, str(identity.session)


def _actor_to_be(values: Mapping[str, Any]) -> str:
    """Return the actor of a session that is about to start."""
    prefix = "human" if values.get("model") == "human" else "agent"
    name = values.get("base_name")
    if name is None:
        # Without either lattice picks a name of its own: only a token that may use every name can take it.
        name = values.get("agent_type", "*").capitalize()
    return f"{prefix}:{name}"
