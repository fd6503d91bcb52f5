"""Tasks in the files of a cache: completion in a shell, short ids. No network, no agent."""

import copy
import json
import os
from typing import TYPE_CHECKING, Any

from lattice_remote.errors import one_line

if TYPE_CHECKING:
    import click
    from click.shell_completion import CompletionItem

__all__ = ["Values", "completing", "read_object", "short_ids", "task_of", "tasks_of"]

Values = list[tuple[str, str]]
"""Each value with its help."""

_MAX_TASKS = 500
_MAX_TITLES = 50
"""With more matches the titles, each in a file of its own, are omitted."""
_MAX_TITLE_CHARS = 80
_OF_TASKS = frozenset({"source_id", "target_task_id", "task_id", "task_ids"})
"""Names of lattice's arguments that are tasks."""


def completing(command: "click.Command", directory: str) -> "click.Command":
    twin = copy.copy(command)
    twin.params = [_completing(parameter, directory) for parameter in command.params]
    return twin


def _completing(parameter: "click.Parameter", directory: str) -> "click.Parameter":
    if parameter.name not in _OF_TASKS:
        return parameter

    def complete(_: "click.Context", __: "click.Parameter", incomplete: str) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem

        return [CompletionItem(value, help=title) for value, title in tasks_of(directory, incomplete)]

    twin = copy.copy(parameter)
    twin._custom_shell_complete = complete
    return twin


def tasks_of(directory: str, incomplete: str) -> Values:
    """Return the short ids of a cache's tasks that begin so, in any case, with their titles."""
    wanted = incomplete.upper()
    found = [(short_id, task) for short_id, task in short_ids(directory).items() if short_id.startswith(wanted)]
    found.sort(key=lambda each: (len(each[0]), each[0]))
    has_titles = len(found) <= _MAX_TITLES
    return [(short_id, _title(directory, task) if has_titles else "") for short_id, task in found[:_MAX_TASKS]]


def _title(directory: str, task: str) -> str:
    """Return an active task's title for a terminal; "" if it is archived."""
    title = read_object(directory, f"tasks/{os.path.basename(task)}.json").get("title")
    return one_line(title[:_MAX_TITLE_CHARS]) if isinstance(title, str) else ""


def task_of(directory: str, name: str) -> str:
    """Return the id of the task with this id or short id; ``name`` if there is none."""
    return short_ids(directory).get(name.upper(), name)


def short_ids(directory: str) -> dict[str, str]:
    known = read_object(directory, "ids.json").get("map")
    if not isinstance(known, dict):
        return {}
    return {short_id: task for short_id, task in known.items() if isinstance(task, str)}


def read_object(directory: str, path: str) -> dict[str, Any]:
    """Return the JSON object in a file of a cache; empty without one."""
    try:
        with open(os.path.join(directory, path), "rb") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
