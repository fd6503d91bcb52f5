"""Which token a session belongs to: the one that started it (decision 0062).

Kept in ``session_owners.json`` in the project's directory, beside the journal, which forgets. It is written before
the session's change is committed, so that no session is ever anybody's; an entry of a session that never came to be,
or that is no more, does nothing, because it names the session by its own random id.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from lattice_remote.errors import Rejected
from lattice_remote.protocol.operations import Operation, PutFile
from lattice_remote.server.data.datadir import write_atomically

__all__ = ["OWNERS_FILE", "Owner", "Owners"]

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


class Owners:
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
