"""Storage on a local project: lattice's own files, written under its locks.

The server uses it for the writes of a ``RemoteStorage``; there one write is one transaction.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lattice.core import tasks
from lattice.core.events import serialize_event, utc_now
from lattice.core.ids import generate_event_id, is_short_id
from lattice.storage import fs, operations, sessions
from lattice.storage.hooks import execute_hooks
from lattice.storage.locks import LockTimeout, multi_lock
from lattice.storage.short_ids import allocate_short_id, load_id_index

from lattice_remote.errors import Misuse, Rejected, StorageError
from lattice_remote.protocol.paths import is_session_name
from lattice_remote.storage import resource_rules, task_rules
from lattice_remote.storage.events import (
    Conflict,
    Event,
    MayActAs,
    Merged,
    Shaped,
    Snapshot,
    Written,
    invalid,
    plain,
    require_actor,
    shaped,
)
from lattice_remote.textmerge import merge_text

__all__ = ["LocalStorage", "encoded"]

_MAX_TEXT_BYTES = 1024 * 1024
_TASK_ID = re.compile(r"task_[0-9A-HJKMNP-TV-Z]{26}")
_RESOURCE_ID = re.compile(r"res_[0-9A-HJKMNP-TV-Z]{26}")
_ARTIFACT_ID = re.compile(r"art_[0-9A-HJKMNP-TV-Z]{26}")


def _anybody(actor: str, *, session: Mapping[str, Any] | None = None) -> None: ...


class LocalStorage:
    """A ``StorageBackend`` on a local project; a cache of a remote project is read-only.

    Holds nothing open; threads and processes may share a project.

    Args:
        root: the directory that holds ``.lattice``.
        may_act_as: check of the actors of writes; by default all are allowed.

    Raises:
        Misuse: there is no project.
    """

    def __init__(self, root: Path | str, *, may_act_as: MayActAs = _anybody) -> None:
        self._root = Path(root).absolute()
        self._dir = self._root / fs.LATTICE_DIR
        self._may_act_as = may_act_as
        if not (self._dir / "config.json").is_file():
            raise Misuse(f"there is no lattice project in {root}; create one with: lattice init")

    @property
    def root_path(self) -> Path:
        return self._root

    def list_tasks(self, *, archived: bool = False) -> list[Snapshot]:
        paths = sorted((self._dir / "archive" / "tasks" if archived else self._dir / "tasks").glob("*.json"))
        return [found for path in paths if (found := _read_json(path)) is not None]

    def get_task(self, task: str) -> Snapshot | None:
        task_id = self._task_id(task)
        return None if task_id is None else self._active(task_id) or self._archived(task_id)

    def get_task_events(self, task: str) -> list[Snapshot]:
        task_id = self._task_id(task)
        if task_id is None:
            return []
        name = f"events/{task_id}.jsonl"
        return self._log_now(self._dir / name) or self._log_now(self._dir / "archive" / name)

    def write_task(self, task: str, events: Sequence[Event], base: str | None) -> Written[Snapshot] | Conflict:
        task_id = self._task_id(task)
        if task_id is None:
            raise invalid(f"there is no task {task[:60]!r}")
        given = plain(events)
        keys = [f"events_{task_id}", f"tasks_{task_id}", *(["events__lifecycle"] if base is None else [])]
        with self._writing(), self._locked(keys):
            before = self._active(task_id)
            found = before["last_event_id"] if before else None
            if found != base:
                return Conflict(base, found)
            if before is None and self._archived(task_id) is not None:
                raise invalid(f"{task_id} is archived; restore it with: lattice unarchive {task_id}")
            log = self._whole_log(task_id, before)
            own = self._stamped(shaped(given, {"task_id": task_id}, log))
            after = task_rules.add_to_task(before, own, self._around(task_id, log))
            if before is None:
                after = self._with_short_id(own, after)
            self._keep_task(task_id, own, after)
        self._run_hooks(task_id, own)
        return Written(after)

    def _around(self, task_id: str, log: list[Snapshot]) -> task_rules.TaskContext:
        return task_rules.TaskContext(
            config=self._config(),
            log=log,
            is_active=lambda other: bool(_TASK_ID.fullmatch(other)) and self._active(other) is not None,
            has_artifact=lambda artifact: (
                bool(_ARTIFACT_ID.fullmatch(artifact))
                and (self._dir / "artifacts" / "meta" / f"{artifact}.json").is_file()
            ),
            plan=lambda: _read_text(self._dir / "plans" / f"{task_id}.md"),
        )

    def _stamped(self, events: list[Shaped]) -> list[Shaped]:
        """Set time and actor of the events.

        ``_lifecycle.jsonl`` is ordered by times and ids, so they come from the writer's clock and not another
        machine's.
        """
        now = utc_now()
        for event in events:
            self.require_actor(event)
            if isinstance(event["actor"], dict):
                sessions.touch_session(self._dir, event["actor"]["name"])
            event["ts"] = now
            if event["type"] == "task_created":
                event["id"] = generate_event_id()
        return events

    def _with_short_id(self, events: list[Shaped], task: Snapshot) -> Snapshot:
        """Give a new task its short id as ``lattice create`` does, after all checks."""
        config = self._config()
        codes = [code for code in (config.get("project_code"), config.get("subproject_code")) if code]
        if not config.get("project_code"):
            return task
        short_id, _ = allocate_short_id(self._dir, "-".join(codes), task_ulid=task["id"])
        events[0]["data"]["short_id"] = short_id
        return {**task, "short_id": short_id}

    def _keep_task(self, task_id: str, events: list[Shaped], after: Snapshot) -> None:
        """Write like ``operations.write_task_event``, with its locks held; then as the command."""
        for event in events:
            fs.jsonl_append(self._dir / "events" / f"{task_id}.jsonl", serialize_event(event))
            if event["type"] == "task_created":
                fs.jsonl_append(self._dir / "events" / "_lifecycle.jsonl", serialize_event(event))
        fs.atomic_write(self._dir / "tasks" / f"{task_id}.json", tasks.serialize_snapshot(after))
        for event in events:
            if event["type"] == "task_created":
                title, description = event["data"]["title"], event["data"].get("description")
                operations.scaffold_plan(self._dir, task_id, title, after.get("short_id"), description)
            elif event["type"] == "status_changed":
                self._note_way_back(task_id, event)

    def _note_way_back(self, task_id: str, event: Shaped) -> None:
        from lattice.cli.task_cmds import _append_plan_reset_section, _status_rank_from_config

        rank = _status_rank_from_config(self._config())
        if tasks.is_backward_status_transition(event["data"]["from"], event["data"]["to"], rank):
            _append_plan_reset_section(self._dir, task_id, event["actor"], event["ts"])

    def _run_hooks(self, task_id: str, events: list[Shaped]) -> None:
        config = self._config()
        for event in events:
            execute_hooks(config, self._dir, task_id, event)

    def list_resources(self) -> list[Snapshot]:
        paths = sorted((self._dir / "resources").glob("*/resource.json"))
        return [found for path in paths if (found := _read_json(path)) is not None]

    def get_resource(self, resource: str) -> Snapshot | None:
        found = self.list_resources()
        return next((one for one in found if resource in (one.get("name"), one.get("id"))), None)

    def write_resource(self, resource: str, events: Sequence[Event], base: str | None) -> Written[Snapshot] | Conflict:
        given, there = plain(events), self.get_resource(resource)
        name = resource if there is None else str(there["name"])
        if there is None:
            resource_rules.require_name(name, [str(one.get("name")) for one in self.list_resources()])
        with self._writing(), operations.resource_write_context(self._dir, name):
            before = self.get_resource(name)
            found = before["last_event_id"] if before else None
            if found != base:
                return Conflict(base, found)
            resource_id = before["id"] if before else self._new_resource_id(given)
            log = self._whole_log(resource_id, before)
            own = self._stamped(shaped(given, {"resource_id": resource_id}, log))
            after = resource_rules.add_to_resource(before, own, resource_rules.ResourceContext(name, self._is_task))
            operations.write_resource_event(
                self._dir, resource_id, name, own, after, self._config(), _caller_holds_lock=True
            )
        return Written(after)

    def _new_resource_id(self, events: list[Shaped]) -> str:
        """Return the id that the first event gives to a new resource. Raises Rejected: malformed, or taken."""
        found = events[0].get("resource_id")
        if not isinstance(found, str) or not _RESOURCE_ID.fullmatch(found):
            raise invalid("a new resource's events name its id: res_ and 26 capitals and digits")
        if (self._dir / "events" / f"{found}.jsonl").exists():
            raise invalid(f"{found} is the id of another resource")
        return found

    def read_plan(self, task: str) -> str | None:
        return self._read_beside("plans", task)

    def write_plan(self, task: str, text: str, base: str | None) -> Written[str] | Merged | Conflict:
        return self._write_beside("plans", task, text, base)

    def read_notes(self, task: str) -> str | None:
        return self._read_beside("notes", task)

    def write_notes(self, task: str, text: str, base: str | None) -> Written[str] | Merged | Conflict:
        return self._write_beside("notes", task, text, base)

    def _read_beside(self, kind: Literal["plans", "notes"], task: str) -> str | None:
        task_id = self._task_id(task)
        if task_id is None:
            return None
        name = f"{kind}/{task_id}.md"
        found = _read_text(self._dir / name)
        return found if found is not None else _read_text(self._dir / "archive" / name)

    def _write_beside(
        self, kind: Literal["plans", "notes"], task: str, text: str, base: str | None
    ) -> Written[str] | Merged | Conflict:
        task_id = self._task_id(task)
        if task_id is None:
            raise invalid(f"there is no active task {task[:60]!r}")
        mine, path = encoded(text), self._dir / kind / f"{task_id}.md"
        with self._writing(), self._locked([f"tasks_{task_id}"]):  # archiving takes this lock too, and moves the text
            if self._active(task_id) is None:
                raise invalid(f"there is no active task {task[:60]!r}")
            there = _read_text(path)
            theirs = None if there is None else there.encode()
            outcome, merged = merge_text(None if base is None else encoded(base), mine, theirs)
            if outcome == "conflict" or merged is None:  # None: the text is the base, which is gone
                return Conflict(base, there)
            if outcome != "unchanged":
                path.parent.mkdir(exist_ok=True)
                fs.atomic_write(path, merged)
        return Written(text) if merged == mine else Merged(merged.decode())

    def require_actor(self, event: Shaped) -> str:
        """Return the actor of a plain event by name.

        Raises:
            Rejected: there is none, or the writer may not use it.
        """
        return require_actor(event, self._may_act_as, self)

    def actor_of(self, session_name: str) -> Mapping[str, Any] | None:
        from lattice.cli.helpers import _build_actor_dict

        if not is_session_name(session_name):
            return None
        found = _read_json(self._dir / "sessions" / f"{session_name}.json")
        try:
            actor: dict[str, Any] | None = None if found is None else _build_actor_dict(found)
        except KeyError:
            return None  # not a session's file
        return actor

    def _config(self) -> dict[str, Any]:
        return _read_json(self._dir / "config.json") or {}

    def _task_id(self, task: str) -> str | None:
        if _TASK_ID.fullmatch(task):
            return task
        found = load_id_index(self._dir).get("map", {}).get(task.upper()) if is_short_id(task) else None
        return found if isinstance(found, str) and _TASK_ID.fullmatch(found) else None

    def _is_task(self, task_id: str) -> bool:
        return bool(_TASK_ID.fullmatch(task_id)) and (self._active(task_id) or self._archived(task_id)) is not None

    def _active(self, task_id: str) -> Snapshot | None:
        return _read_json(self._dir / "tasks" / f"{task_id}.json")

    def _archived(self, task_id: str) -> Snapshot | None:
        return _read_json(self._dir / "archive" / "tasks" / f"{task_id}.json")

    def _log_now(self, path: Path) -> list[Snapshot]:
        """Return the events of a log that may be growing, without an incomplete last line."""
        text = _read_text(path) or ""
        return _events(path, text[: text.rfind("\n") + 1])

    def _whole_log(self, owner: str, snapshot: Snapshot | None) -> list[Snapshot]:
        """Return the events of a locked task or resource.

        Raises:
            StorageError: they do not match the snapshot, because a writer was killed.
        """
        path = self._dir / "events" / f"{owner}.jsonl"
        events = _events(path, _read_text(path) or "")
        last, made_of = events[-1].get("id") if events else None, snapshot["last_event_id"] if snapshot else None
        if last != made_of:
            raise StorageError(
                f"a write to {owner} was interrupted, and its log is ahead of its snapshot; rebuild it with: "
                "lattice rebuild --all"
            )
        return events

    @contextmanager
    def _locked(self, keys: list[str]) -> Iterator[None]:
        locks = self._dir / "locks"
        locks.mkdir(exist_ok=True)
        with multi_lock(locks, keys):
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        if any((self._dir / name).exists() for name in ("remote.json", "cache_state.json")):
            raise Misuse(
                f"the files in {self._dir} belong to a remote; write with resolve_backend()", code="REMOTE_GUARD"
            )
        try:
            yield
        except LockTimeout as error:
            raise StorageError(f"{self._dir} is locked by another process: {error}; nothing was written") from error
        except OSError as error:
            raise StorageError(f"cannot write in {self._dir}: {error.strerror}") from error


def _read_json(path: Path) -> Snapshot | None:
    """Return the object in a file of lattice's; None if there is no file. Raises StorageError."""
    text = _read_text(path)
    try:
        found = None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} is damaged; look at it with: lattice doctor") from error
    if found is not None and not isinstance(found, dict):
        raise StorageError(f"{path} is damaged; look at it with: lattice doctor")
    return found


def _events(path: Path, lines: str) -> list[Snapshot]:
    try:
        return [json.loads(line) for line in lines.split("\n") if line.strip()]
    except ValueError as error:
        raise StorageError(f"{path} is damaged; look at it with: lattice doctor") from error


def _read_text(path: Path) -> str | None:
    """Return a text with its line ends; None if there is no file. Raises StorageError, also unless it is UTF-8."""
    try:
        return path.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise StorageError(f"{path} is no UTF-8 text") from error


def encoded(text: str) -> bytes:
    """Return a plan or notes as stored bytes. Raises Rejected: not UTF-8, or too long."""
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise invalid("the text has a lone surrogate, which is not UTF-8") from None
    if len(data) > _MAX_TEXT_BYTES:
        raise Rejected("the text is longer than 1 MiB", code="REMOTE_TOO_LARGE")
    return data
