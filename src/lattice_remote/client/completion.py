"""Completion of tasks in a shell, from the files of a cache: no network, no agent."""

import copy
import json
import os
from typing import TYPE_CHECKING

from lattice_remote.errors import one_line

if TYPE_CHECKING:
    import click
    from click.shell_completion import CompletionItem

__all__ = ["Values", "completing", "tasks_of"]

Values = list[tuple[str, str]]
"""Each value with its help."""

_MAX_TASKS = 500
_MAX_TITLES = 50
"""With more matches the titles, each in a file of its own, are omitted."""
_MAX_TITLE_CHARS = 80
_OF_TASKS = frozenset({"source_id", "target_task_id", "task_id", "task_ids"})
"""Names of lattice's arguments that are tasks."""


def completing(command: "click.Command", directory: str) -> "click.Command":
    """Return a copy of one of lattice's commands that completes its tasks."""
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
    try:
        with open(os.path.join(directory, "ids.json"), "rb") as file:
            known = json.load(file)["map"].items()
        wanted = incomplete.upper()
        found = [(short_id, task) for short_id, task in known if short_id.startswith(wanted)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    found.sort(key=lambda each: (len(each[0]), each[0]))
    has_titles = len(found) <= _MAX_TITLES
    return [(short_id, _title(directory, task) if has_titles else "") for short_id, task in found[:_MAX_TASKS]]


def _title(directory: str, task: str) -> str:
    """Return an active task's title for a terminal; "" if it is archived."""
    try:
        with open(os.path.join(directory, "tasks", f"{os.path.basename(task)}.json"), "rb") as file:
            title = json.load(file)["title"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return one_line(title[:_MAX_TITLE_CHARS]) if isinstance(title, str) else ""
