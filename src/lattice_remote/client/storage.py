"""Storage of a remote project: reads come from the cache, a write is one ``Call`` of the surface ``storage``."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lattice.storage.fs import LATTICE_DIR, LatticeRootError, find_root

from lattice_remote.client.agent_client import request, send_request
from lattice_remote.client.agent_runtime import new_request_id
from lattice_remote.client.config import detachment, is_cache, read_remote
from lattice_remote.errors import ConnectionFailed, Misuse, error_from_code
from lattice_remote.storage.events import Conflict, Event, Merged, Snapshot, Written, plain
from lattice_remote.storage.local import LocalStorage, encoded

if TYPE_CHECKING:
    from lattice_remote.storage.events import StorageBackend

__all__ = ["Freshness", "RemoteStorage", "RemoteWarning", "resolve_backend"]


class RemoteWarning(UserWarning):
    """Warning that a command would print, for example that the data is not current."""


@dataclass(frozen=True, slots=True)
class Freshness:
    """State of the cache."""

    is_current: bool
    seq: int
    age_s: float | None
    """Seconds for which it may have been behind; None if unknown."""
    message: str
    """The reason why it is not current."""


class RemoteStorage:
    """A ``StorageBackend`` on a project with a remote. Holds nothing open; threads and processes may share a project.

    Before each read the cache is brought up to date. If the server is unreachable, a read returns the local data with a
    ``RemoteWarning``; a write raises ``ConnectionFailed``, and nothing is queued. When a write returns, its change is
    in the local files. The methods block: from a coroutine, call them in a thread (``asyncio.to_thread``).

    Raises:
        Misuse: the directory has no remote.
        StorageError: its ``remote.json`` cannot be read.
    """

    def __init__(self, root: Path | str) -> None:
        self._root = Path(root).absolute()
        self._directory = str(self._root / ".lattice")
        if detachment(self._directory) is None:  # without its remote.json a cache is read-only
            read_remote(self._directory)

    @property
    def root_path(self) -> Path:
        return self._root

    def freshness(self) -> Freshness:
        answer = self._ready()
        message = "" if answer["current"] else answer["message"]
        return Freshness(answer["current"], answer["seq"], 0.0 if answer["current"] else answer["age_s"], message)

    def list_tasks(self, *, archived: bool = False) -> list[Snapshot]:
        return self._copy().list_tasks(archived=archived)

    def get_task(self, task: str) -> Snapshot | None:
        return self._copy().get_task(task)

    def get_task_events(self, task: str) -> list[Snapshot]:
        return self._copy().get_task_events(task)

    def write_task(self, task: str, events: Sequence[Event], base: str | None) -> Written[Snapshot] | Conflict:
        return self._write_events("write-task", {"task": task}, events, base)

    def list_resources(self) -> list[Snapshot]:
        return self._copy().list_resources()

    def get_resource(self, resource: str) -> Snapshot | None:
        return self._copy().get_resource(resource)

    def write_resource(self, resource: str, events: Sequence[Event], base: str | None) -> Written[Snapshot] | Conflict:
        return self._write_events("write-resource", {"resource": resource}, events, base)

    def read_plan(self, task: str) -> str | None:
        return self._copy().read_plan(task)

    def write_plan(self, task: str, text: str, base: str | None) -> Written[str] | Merged | Conflict:
        return self._write_text("write-plan", task, text, base)

    def read_notes(self, task: str) -> str | None:
        return self._copy().read_notes(task)

    def write_notes(self, task: str, text: str, base: str | None) -> Written[str] | Merged | Conflict:
        return self._write_text("write-notes", task, text, base)

    def _copy(self) -> LocalStorage:
        """Return the cache for reading, current if possible. Raises RemoteError."""
        if (why := detachment(self._directory)) is not None:
            _warn(why)
            return LocalStorage(self._root)
        answer = self._ready()
        if not answer["current"]:
            if not answer["filled"]:
                raise error_from_code(answer["message"], answer["code"])
            age = "of unknown age" if answer["age_s"] is None else f"{answer['age_s']:.0f} s old"
            _warn(f"{answer['message']}; the data is {age} (change {answer['seq']})")
        return LocalStorage(self._root)

    def _ready(self) -> dict[str, Any]:
        answer = send_request(request("ready", self._directory))
        for notice in answer["notices"]:
            _warn(notice)
        return answer

    def _write_events(
        self, name: str, of: Mapping[str, str], events: Sequence[Event], base: str | None
    ) -> Written[Snapshot] | Conflict:
        answer = self._call(name, {**of, "events": plain(events), "base": base})
        if answer["outcome"] == "conflict":
            return Conflict(base, answer["found"])
        return Written(answer["content"])

    def _write_text(self, name: str, task: str, text: str, base: str | None) -> Written[str] | Merged | Conflict:
        for given in (text, base or ""):
            encoded(given)
        answer = self._call(name, {"task": task, "text": text, "base": base})
        if answer["outcome"] == "conflict":
            return Conflict(base, answer["found"])
        return Merged(answer["content"]) if answer["outcome"] == "merged" else Written(answer["content"])

    def _call(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        """Run a write on the server, at most once (I6). Raises RemoteError."""
        payload = json.dumps(values, ensure_ascii=False)
        fields = {"surface": "storage", "name": name, "payload": payload, "files": []}
        # The id is created here: if the agent ends half way, the next one is asked, and the server runs it once.
        returned = send_request(request("call", self._directory, id=new_request_id(), **fields))
        for notice in returned["notices"]:
            _warn(notice)
        try:
            answer: dict[str, Any] = json.loads(returned["payload"])
            error = answer.get("error")
            if error is not None:
                raise error_from_code(str(error["message"]), error["code"])
            if answer["outcome"] not in ("written", "merged", "conflict"):
                raise ValueError(answer["outcome"])  # noqa: TRY301 - handled like any other unexpected response
        except (ValueError, KeyError, TypeError, AttributeError) as wrong:
            raise ConnectionFailed("unexpected response from the server", sent=True) from wrong
        return answer


def _warn(message: str) -> None:
    warnings.warn(message, RemoteWarning, stacklevel=2, skip_file_prefixes=(os.path.dirname(__file__),))


def resolve_backend(start: Path | str | None = None) -> "StorageBackend":
    """Return the storage of the project that a ``lattice`` command in the directory ``start`` would use.

    Args:
        start: where to search, including the directories above; None for the current directory or ``LATTICE_ROOT``.

    Raises:
        Misuse: there is no project.
        StorageError: its ``remote.json`` cannot be read.
    """
    root = _root_at(None if start is None else Path(start).absolute())
    if root is None:
        raise Misuse(f"there is no lattice project in {start or Path.cwd()} or above; make one with: lattice init")
    if is_cache(str(root / LATTICE_DIR)):
        return RemoteStorage(root)
    from lattice_remote.storage.local import LocalStorage

    return LocalStorage(root)


def _root_at(start: Path | None) -> Path | None:
    if start is None:
        try:
            found = find_root()
        except LatticeRootError as error:
            raise Misuse(str(error)) from error
        return None if found is None else found.absolute()
    for directory in (start.resolve(), *start.resolve().parents):
        if (directory / LATTICE_DIR).is_dir():
            return directory
    return None
