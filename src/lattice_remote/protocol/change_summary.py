"""Summary of a change, from its operations: the tasks it touches and the events it adds."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lattice_remote.protocol.messages import Change
from lattice_remote.protocol.operations import AnnounceFile, AppendBytes, MoveFile, PutFile, paths_of

__all__ = ["ChangeSummary", "is_log", "snapshot_of", "summarize", "summary_json", "tasks_in", "texts_of"]

_TASK = r"task_[0-9A-HJKMNP-TV-Z]{26}"
_TASK_FILE = re.compile(rf"(?:archive/)?(?:tasks|events|plans|notes)/({_TASK})\.[a-z]+")
_TEXT = re.compile(rf"(?:archive/)?(plans|notes)/({_TASK})\.md")
_SNAPSHOT = re.compile(rf"(?:archive/)?tasks/({_TASK})\.json")
_LOG = re.compile(r"(?:archive/)?events/[^_/][^/]*\.jsonl")
_RESOURCE = re.compile(r"resources/([^/]+)/resource\.json")
_SESSION = re.compile(r"sessions/(?:archive/)?([^/]+?-[0-9]+)(?:_sess_[^/]+)?\.json")
_NOT_BY_COMMAND = ("edit", "recovery")


@dataclass
class ChangeSummary:
    tasks: list[str] = field(default_factory=list)
    """With a changed snapshot, log, plan or notes. All lists are sorted, but ``events``."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """New events of tasks and resources, in order."""
    is_complete: bool = True
    """False if a log was replaced, for example by an editor: ``events`` lacks some."""
    resources: list[str] = field(default_factory=list)
    sessions: list[str] = field(default_factory=list)
    plans: list[str] = field(default_factory=list)
    """Tasks whose plan it writes or removes, except by archiving."""
    notes: list[str] = field(default_factory=list)
    """The same of notes."""
    snapshots: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Whole snapshots of tasks, by id."""


def tasks_in(paths: Iterable[str]) -> list[str]:
    return sorted({found[1] for path in paths if (found := _TASK_FILE.fullmatch(path))})


def is_log(path: str) -> bool:
    return _LOG.fullmatch(path) is not None


def snapshot_of(path: str) -> str | None:
    match = _SNAPSHOT.fullmatch(path)
    return match[1] if match else None


def texts_of(change: Change) -> list[tuple[str, str, str]]:
    """Return path, ``plans`` or ``notes``, and task of the texts that a change writes or removes, not by archiving."""
    paths = dict.fromkeys(_written(change))
    return [(path, match[1], match[2]) for path in paths if (match := _TEXT.fullmatch(path))]


def summarize(change: Change) -> ChangeSummary:
    paths = [path for operation in change.ops for path in paths_of(operation)]
    found = ChangeSummary(tasks=tasks_in(paths))
    found.resources = sorted({match[1] for path in paths if (match := _RESOURCE.fullmatch(path))})
    found.sessions = sorted({match[1] for path in paths if (match := _SESSION.fullmatch(path))})
    texts = {(kind, task) for _, kind, task in texts_of(change)}
    found.plans = sorted(task for kind, task in texts if kind == "plans")
    found.notes = sorted(task for kind, task in texts if kind == "notes")
    found.snapshots = dict(_snapshots(change))
    for operation in change.ops:
        if not is_log(operation.path):
            continue
        match operation:
            case AppendBytes():
                found.events += _events(operation.data)
            case PutFile() if change.cause not in _NOT_BY_COMMAND:
                found.events += _events(operation.data)
            case PutFile() | AnnounceFile():
                found.is_complete = False
            case _:
                pass
    return found


def summary_json(change: Change, found: ChangeSummary) -> dict[str, Any]:
    return {
        "seq": change.seq,
        "time": change.time,
        "actor": change.actor,
        "token_actor": change.token_actor or (change.actor if change.token_id else ""),
        "token_id": change.token_id,
        "cause": change.cause,
        "command": change.command,
        "tasks": found.tasks,
        "resources": found.resources,
        "sessions": found.sessions,
        "plans": found.plans,
        "notes": found.notes,
    }


def _written(change: Change) -> Iterable[str]:
    moved = {path for operation in change.ops if isinstance(operation, MoveFile) for path in paths_of(operation)}
    return (operation.path for operation in change.ops if operation.path not in moved)


def _snapshots(change: Change) -> Iterable[tuple[str, Mapping[str, Any]]]:
    for operation in change.ops:
        task = snapshot_of(operation.path)
        if task and isinstance(operation, PutFile):
            yield from ((task, snapshot) for snapshot in _events(operation.data, whole=True))


def _events(data: bytes, *, whole: bool = False) -> list[dict[str, Any]]:
    objects = []
    for line in [data] if whole else data.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            objects.append(value)
    return objects
