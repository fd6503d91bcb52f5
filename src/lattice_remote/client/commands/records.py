"""A change as ``watch`` tells it: as a JSON object (docs/watch.md), and as a line for people."""

import json
import os
from datetime import datetime
from typing import Any

from lattice_remote.logtext import printable
from lattice_remote.protocol.about import about
from lattice_remote.protocol.effects import Position
from lattice_remote.protocol.messages import Change

__all__ = ["Titles", "as_line", "record_of"]

_MAX_TASKS_SHOWN = 3
_MAX_TITLE_CHARS = 40
_MAX_TITLES = 10_000


class Titles:
    """Short ids and titles of tasks: from the changes themselves, else from the copy in ``directory``."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._known: dict[str, dict[str, Any]] = {}

    def learn(self, task: str, snapshot: Any) -> None:
        """Take in what a change says of a task."""
        if len(self._known) >= _MAX_TITLES:
            self._known.clear()  # a server may name any number
        self._known[task] = {"short_id": _text(snapshot.get("short_id")), "title": _text(snapshot.get("title"))}

    def of(self, task: str) -> dict[str, Any]:
        """Return ``id``, ``short_id`` and ``title``; null where it is not known."""
        if task not in self._known:
            self.learn(task, self._read(f"tasks/{task}.json") or self._read(f"archive/tasks/{task}.json"))
        return {"id": task, **self._known[task]}

    def find(self, name: str) -> str | None:
        """Return the id of the task with this id or short id, None when the copy has none such."""
        if name.startswith("task_"):
            return name
        known = self._read("ids.json").get("map")
        return _text(known.get(name.upper())) if isinstance(known, dict) else None

    def _read(self, path: str) -> dict[str, Any]:
        try:
            with open(os.path.join(self._directory, path), encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


def record_of(epoch: str, change: Change, titles: Titles) -> dict[str, Any]:
    """Return what ``--json`` prints of a change, and what ``--exec`` gets."""
    found = about(change)
    for task, snapshot in found.snapshots.items():
        titles.learn(task, snapshot)
    return {
        "seq": change.seq,
        "epoch": epoch,
        "position": str(Position(epoch, change.seq, change.mark)),
        "time": change.time,
        "actor": change.actor,
        "token_actor": change.token_actor or (change.actor if change.token_id else ""),
        "token_id": change.token_id,
        "cause": change.cause,
        "command": change.command,
        "tasks": [titles.of(task) for task in found.tasks],
        "events": found.events,
        "events_complete": found.is_complete,
        "resources": found.resources,
        "sessions": found.sessions,
        "plans": found.plans,
        "notes": found.notes,
    }


def as_line(record: dict[str, Any]) -> tuple[str, str, str, str, str]:
    """Return number, time, actor, tasks and what was done, without anything that a terminal would act on."""
    tasks = [_named(task) for task in record["tasks"][:_MAX_TASKS_SHOWN]]
    more = len(record["tasks"]) - _MAX_TASKS_SHOWN
    names = [*record["resources"], *record["sessions"]] if not tasks else []
    shown = ", ".join([*tasks, *names]) + (f", +{more}" if more > 0 else "")
    actor, owner = record["actor"], record["token_actor"]
    who = f"{actor} (token of {owner})" if owner not in ("", actor) else actor
    by_hand = record["cause"] in ("edit", "recovery")
    what = f"{record['cause']}: {record['command']}" if by_hand else record["command"]
    number, time, who, shown, what = map(printable, (str(record["seq"]), _clock(record["time"]), who, shown, what))
    return number, time, who, shown, what


def _named(task: dict[str, Any]) -> str:
    title = task["title"] or ""
    short = title if len(title) <= _MAX_TITLE_CHARS else title[: _MAX_TITLE_CHARS - 1] + "…"
    return f"{task['short_id'] or task['id']} {short}".strip()


def _clock(time: str) -> str:
    try:
        return f"{datetime.fromisoformat(time).astimezone():%H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        return time


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
