"""A request's caller: the actors and sessions that its token may use, and the files attached to it (I9)."""

import json
import os
import re
import secrets
import shutil
import stat
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

import click
import msgspec

from lattice_remote.errors import Rejected
from lattice_remote.files import write_atomically
from lattice_remote.protocol.messages import Attachment
from lattice_remote.protocol.operations import Operation, PutFile
from lattice_remote.server.tree.tree import TrustedDigest

__all__ = ["OWNERS_FILE", "Attached", "Identity", "Owner", "SessionOwners", "check_actor", "is_plain", "unsupported"]


OWNERS_FILE = "session_owners.json"


class Owner(msgspec.Struct, frozen=True):
    """Token that started a session."""

    session: str
    """Its own unique id."""
    token_id: str
    actor: str


class _Session(msgspec.Struct):
    session: str = ""


class SessionOwners:
    """Owners of one project's sessions; empty without a path."""

    def __init__(self, project: Path | None = None) -> None:
        self._path = project / OWNERS_FILE if project is not None else None
        self._sessions = project / ".lattice" / "sessions" if project is not None else None
        self._known: dict[str, Owner] | None = None

    def of(self, name: str, session: str) -> Owner | None:
        """Return a session's owner; None if it was not started through this server. Raises Rejected."""
        owner = self._read().get(name)
        return owner if owner is not None and owner.session == session else None

    def note(self, operations: Iterable[Operation], token_id: str, actor: str) -> None:
        """Record the owner of the sessions that these operations start, durably. Raises Rejected or OSError: nothing
        changed.
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
            f"cannot read the owners of sessions ({OWNERS_FILE}); its administrator can repair it, or remove "
            "it, which leaves every session without an owner",
            code="REMOTE_STORAGE",
        ) from error


def _is_session(operation: Operation) -> bool:
    folder, _, name = operation.path.rpartition("/")
    return isinstance(operation, PutFile) and folder == "sessions" and name != "index.json"


@dataclass(frozen=True)
class Identity:
    """A requester: its token's actor, and patterns (``*`` matches anything) of other allowed actors."""

    actor: str
    act_as: Sequence[str] = ()
    token_id: str = ""
    owners: SessionOwners = field(default_factory=SessionOwners)

    def may_act_as(self, actor: str, *, ignore_case: bool = False) -> bool:
        if actor == self.actor:
            return True
        # Not IGNORECASE, which equates more letters than lower().
        fold = str.lower if ignore_case else str
        patterns = [re.escape(fold(self.actor)), *(_as_regex(fold(pattern)) for pattern in self.act_as)]
        return any(re.fullmatch(pattern, fold(actor), re.DOTALL) for pattern in patterns)

    def require(self, actor: str, *, ignore_case: bool = False) -> None:
        """Raise Rejected unless this token may act as ``actor``."""
        if not self.may_act_as(actor, ignore_case=ignore_case):
            allowed = ", ".join((self.actor, *self.act_as))
            raise Rejected(f"token may act as {allowed}; not as {actor}", code="REMOTE_FORBIDDEN")

    def require_session(self, name: str, session: str, *, to_end: bool) -> None:
        """Raise Rejected unless this token may act as a session, or end it: any token of its actor may end it."""
        owner = self.owners.of(name, session)
        if owner is None or owner.token_id == self.token_id or (to_end and owner.actor == self.actor):
            return
        if to_end:
            advice = f"a token of {owner.actor} can end it"
        elif owner.actor == self.actor:
            advice = f"start one with this token, and end the other with: lattice session end {name}"
        else:
            advice = "start your own with: lattice session start"
        raise Rejected(f"session {name} belongs to another token, of {owner.actor}: {advice}", code="REMOTE_FORBIDDEN")


def _as_regex(pattern: str) -> str:
    """Return a pattern of actors as a regular expression that never backtracks past a star.

    Without the atomic groups a few stars could occupy the worker for hours.
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
    """Return the actor that the command names, checked, in every way in which lattice takes one.

    A malformed name is left to lattice if the command ``is_lattices``.
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
    # Lattice checks the form of every actor, except of the one command with a default.
    if given is not None and (validate_actor(given) or not is_lattices or path == "backfill-ids"):
        identity.require(given)
    return actor or given


@cache
def _default_actor(cli: click.Group, path: str) -> str | None:
    command: click.Command = cli
    for word in path.split():
        assert isinstance(command, click.Group), "the words were found in it"
        command = command.commands[word]
    defaults = [option.get_default(click.Context(command)) for option in command.params if option.name == "actor"]
    return next((default for default in defaults if isinstance(default, str)), None)


def _actor_of_session(lattice_dir: Path, session: str) -> tuple[str | None, str]:
    """Return a session's actor and own id; None if it does not exist, which lattice reports.

    Lattice trusts the file, so a file that contradicts its name is refused.
    """
    from lattice.core.actors import ActorIdentity

    path = lattice_dir / "sessions" / f"{session}.json"
    try:
        if not stat.S_ISDIR(path.parent.lstat().st_mode) or not stat.S_ISREG(path.lstat().st_mode):
            raise unsupported(f"the session {session} is not a regular file on the server")
        identity = ActorIdentity.from_dict(json.loads(path.read_text("utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None, ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise unsupported(f"the session {session} cannot be read: it names no actor") from error
    actor = str(identity.to_legacy_actor())
    if identity.name != session or f"{identity.base_name}-{identity.serial}" != session or not is_plain(actor):
        raise unsupported(f"the session {session} cannot be used: its file belongs to another session")
    return actor, str(identity.session)


def _actor_to_be(values: Mapping[str, Any]) -> str:
    prefix = "human" if values.get("model") == "human" else "agent"
    name = values.get("base_name")
    if name is None:
        # Without either, lattice picks any name.
        name = values.get("agent_type", "*").capitalize()
    return f"{prefix}:{name}"


def is_plain(value: str) -> bool:
    return value.isprintable() and unicodedata.is_normalized("NFC", value)


def unsupported(message: str) -> Rejected:
    return Rejected(message, code="REMOTE_UNSUPPORTED")


# Python's repr and JSON both double a backslash: the output shows how a path was quoted, and the caller's own argument
# is quoted alike.
_DIRECTORY_MARK = "\\"


class Attached:
    """Attachments of one request: private paths for the command, and the caller's own names in its output.

    A file that the caller does not have is missing at its private path too. Uploaded content is hard-linked: nothing is
    copied, and the verified digest is reused.

    Attributes:
        argv: the command line with the private paths.
        paths: the private paths; no other path may be read as a caller's file.
        vouched: verified digests of uploaded files, by inode.
    """

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv
        self.paths: frozenset[str] = frozenset()
        self.vouched: dict[int, TrustedDigest] = {}
        self._given: dict[str, str] = {}

    @classmethod
    def write(
        cls,
        argv: Sequence[str],
        files: Sequence[Attachment],
        directory: Path,
        uploaded: Callable[[bytes], Path],
        *,
        is_argv: bool = True,
    ) -> Self:
        """Put the files below ``directory``, which the caller empties after the command.

        ``uploaded`` returns the path of uploaded content by its digest. Without ``is_argv`` an argument that looks like
        an option is not split.

        Raises:
            Rejected: an invalid index or name; REMOTE_NOT_UPLOADED for missing content.
            OSError: the disk is full.
        """
        attached = cls(list(argv))
        indexes = [file.index for file in files]
        if len(set(indexes)) != len(indexes) or any(index >= len(argv) for index in indexes):
            raise Rejected("an attached file belongs to no argument of the command", code="REMOTE_PROTOCOL")
        for file in files:
            option, given = _split(attached.argv[file.index]) if is_argv else ("", attached.argv[file.index])
            path = attached._write_one(file, directory, uploaded)
            attached._given[str(path)] = given
            attached.argv[file.index] = f"{option}{path}"
        attached.paths = frozenset(attached._given)
        return attached

    def _write_one(self, file: Attachment, directory: Path, uploaded: Callable[[bytes], Path]) -> Path:
        folder = directory / (secrets.token_hex(16) + _DIRECTORY_MARK)
        folder.mkdir(mode=0o700)
        if file.data is None and file.digest is None:
            path = folder / "missing"
        else:
            path = folder / _checked_name(file.name)
            if file.data is not None:
                path.write_bytes(file.data)
            elif file.digest is not None:
                self._link(uploaded(file.digest), path, file.size, file.digest)
        return path

    def _link(self, content: Path, path: Path, size: int, digest: bytes) -> None:
        try:
            os.link(content, path, follow_symlinks=False)
        except FileNotFoundError:
            raise _not_uploaded() from None
        except OSError:
            shutil.copyfile(content, path, follow_symlinks=False)
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            raise _not_uploaded()
        self.vouched[status.st_ino] = TrustedDigest(size, status.st_mtime_ns, digest)

    def restore_names(self, output: bytes, *, is_json: bool) -> bytes:
        for path, given in self._given.items():
            if is_json:
                output = output.replace(_in_json(path), _in_json(given))
            else:
                output = output.replace(repr(path).encode(), repr(given).encode("utf-8", "backslashreplace"))
                output = output.replace(path.encode(), given.encode())
        return output


def _not_uploaded() -> Rejected:
    return Rejected("a file of this command was not uploaded; send it again", code="REMOTE_NOT_UPLOADED")


def _split(argument: str) -> tuple[str, str]:
    if not argument.startswith("--"):
        return "", argument
    option, equals, given = argument.partition("=")
    return (option + equals, given) if equals else ("", argument)


def _checked_name(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\0" in name or len(os.fsencode(name)) > 255:
        raise Rejected(f"{name!r} cannot be the name of an attached file", code="REMOTE_UNSUPPORTED")
    return name


def _in_json(text: str) -> bytes:
    return json.dumps(text)[1:-1].encode()
