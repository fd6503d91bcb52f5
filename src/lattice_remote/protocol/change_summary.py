"""What a change is about, from its operations alone: which tasks it touches, and what it adds to their logs."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lattice_remote.protocol.messages import Change
from lattice_remote.protocol.operations import AnnounceFile, AppendBytes, MoveFile, PutFile, paths_of

__all__ = ["About", "about", "is_log", "snapshot_of", "tasks_in", "texts_of"]

_TASK = r"task_[0-9A-HJKMNP-TV-Z]{26}"
_TASK_FILE = re.compile(rf"(?:archive/)?(?:tasks|events|plans|notes)/({_TASK})\.[a-z]+")
_TEXT = re.compile(rf"(?:archive/)?(plans|notes)/({_TASK})\.md")
_SNAPSHOT = re.compile(rf"(?:archive/)?tasks/({_TASK})\.json")
_LOG = re.compile(r"(?:archive/)?events/[^_/][^/]*\.jsonl")
_RESOURCE = re.compile(r"resources/([^/]+)/resource\.json")
_SESSION = re.compile(r"sessions/(?:archive/)?([^/]+?-[0-9]+)(?:_sess_[^/]+)?\.json")
_NOT_BY_COMMAND = ("edit", "recovery")


@dataclass
class About:
    """What one change is about."""

    tasks: list[str] = field(default_factory=list)
    """Ids of the tasks of which it touches a snapshot, log, plan or notes; sorted."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """What it adds to the event logs of tasks and resources, in order, as the logs have it."""
    is_complete: bool = True
    """Whether ``events`` are all: they are not when a log was replaced as a whole, by hand say."""
    resources: list[str] = field(default_factory=list)
    """Names of the resources that it creates or changes; sorted."""
    sessions: list[str] = field(default_factory=list)
    """Names of the sessions that it starts, touches or ends; sorted."""
    plans: list[str] = field(default_factory=list)
    """Ids of the tasks whose plan it writes or removes; sorted. A plan that goes to the archive is not written."""
    notes: list[str] = field(default_factory=list)
    """The same of their notes."""
    snapshots: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Snapshots of tasks that came whole with it, by id."""


def tasks_in(paths: Iterable[str]) -> list[str]:
    """Return the ids of the tasks to which files belong, sorted."""
    return sorted({found[1] for path in paths if (found := _TASK_FILE.fullmatch(path))})


def is_log(path: str) -> bool:
    """Tell whether this is the event log of a task or of a resource."""
    return _LOG.fullmatch(path) is not None


def snapshot_of(path: str) -> str | None:
    """Return the id of the task whose snapshot this file is, archived or not; None when it is no snapshot."""
    match = _SNAPSHOT.fullmatch(path)
    return match[1] if match else None


def texts_of(change: Change) -> list[tuple[str, str, str]]:
    """Return path, ``plans`` or ``notes``, and task of each text that a change writes or removes, in its order.

    A text that goes to the archive with its task is not written.
    """
    paths = dict.fromkeys(_written(change))
    return [(path, match[1], match[2]) for path in paths if (match := _TEXT.fullmatch(path))]


def about(change: Change) -> About:
    """Return what a change is about. Never raises: what is no JSON, or not as lattice writes it, is left out."""
    paths = [path for operation in change.ops for path in paths_of(operation)]
    found = About(tasks=tasks_in(paths))
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
                found.events += _events(operation.data)  # a new log
            case PutFile() | AnnounceFile():
                found.is_complete = False
            case _:
                pass
    return found


def _written(change: Change) -> Iterable[str]:
    moved = {path for operation in change.ops if isinstance(operation, MoveFile) for path in paths_of(operation)}
    return (operation.path for operation in change.ops if operation.path not in moved)


def _snapshots(change: Change) -> Iterable[tuple[str, Mapping[str, Any]]]:
    for operation in change.ops:
        task = snapshot_of(operation.path)
        if task and isinstance(operation, PutFile):
            yield from ((task, snapshot) for snapshot in _events(operation.data, whole=True))


def _events(data: bytes, *, whole: bool = False) -> list[dict[str, Any]]:
    """Return the JSON objects in ``data``: one a line, or all of it as one."""
    objects = []
    for line in [data] if whole else data.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            objects.append(value)
    return objects
