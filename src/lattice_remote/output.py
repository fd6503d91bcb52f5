"""Text output: the tables of ``lattice remote log`` and ``lattice-remote log``, counts, times, version advice.

Untrusted text in a table is escaped (``errors.printable``).
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from lattice_remote.errors import printable

if TYPE_CHECKING:
    from lattice_remote.protocol.messages import LogEntry  # slow to load

__all__ = [
    "as_lines",
    "as_records",
    "columns",
    "counted",
    "describe_difference",
    "local_time",
    "strict_json",
]

_MAX_TASKS_SHOWN = 3


def as_records(entries: "Sequence[LogEntry]", short_ids: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the entries for ``--json``, tasks with short ids (or null)."""
    import msgspec

    from lattice_remote.protocol.messages import Position

    records = []
    for entry in entries:
        record = msgspec.to_builtins(entry)
        record["position"] = str(Position(entry.epoch, entry.seq, entry.mark))
        del record["mark"]
        record["token_actor"] = entry.token_actor or (entry.actor if entry.token_id else "")
        record["tasks"] = [{"id": task, "short_id": short_ids.get(task)} for task in entry.tasks]
        records.append(record)
    return records


def as_lines(entries: "Sequence[LogEntry]", short_ids: Mapping[str, str], epoch: str = "") -> list[str]:
    """Return a table for a terminal, empty without entries. A heading separates epochs.

    ``epoch``: the current one if known, which may have no entry yet.
    """
    if not entries:
        return []
    rows = [("CHANGE", "TIME", "ACTOR", "TOKEN", "TASKS", "COMMAND")]
    rows += [_row(entry, short_ids) for entry in entries]
    head, *lines = columns(rows)
    shown = [head]
    newer = epoch or entries[0].epoch
    for entry, line in zip(entries, lines, strict=True):
        if entry.epoch != newer:
            shown.append(f"--- epoch {printable(newer)} begins: the history was restored or replaced ---")
        shown.append(line)
        newer = entry.epoch
    return shown


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def counted(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def _row(entry: "LogEntry", short_ids: Mapping[str, str]) -> tuple[str, str, str, str, str, str]:
    actor = f"{entry.actor} (token of {entry.token_actor})" if entry.token_actor else entry.actor
    tasks = [short_ids.get(task, task) for task in entry.tasks]
    more = len(tasks) + entry.more_tasks - _MAX_TASKS_SHOWN
    shown = ",".join(tasks[:_MAX_TASKS_SHOWN]) + (f",+{more}" if more > 0 else "")
    what = f"{entry.cause}: {entry.command}" if entry.cause in ("edit", "recovery") else entry.command
    cells = (str(entry.seq), local_time(entry.time), actor, entry.token_id or "-", shown or "-", what)
    number, time, who, token, touched, command = map(printable, cells)
    return number, time, who, token, touched, command


def local_time(time: str, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    try:
        return datetime.fromisoformat(time).astimezone().strftime(form)
    except (ValueError, OverflowError, OSError):
        return time


def describe_difference(here: str, there: str, *, here_is: str, there_is: str) -> str | None:
    """Return advice on two different versions of one program; None if they are equal.

    ``here_is`` and ``there_is`` name the places, for example ``this machine``.
    """
    if here == there:
        return None
    ours, theirs = _numbers(here), _numbers(there)
    if ours == theirs:
        return f"{here} and {there} differ"
    return f"{here if ours < theirs else there} is older: upgrade {here_is if ours < theirs else there_is}"


def _numbers(version: str) -> list[int]:
    """Return the leading numbers of a version, bounded: a peer may have sent it."""
    found = re.match(r"\d{1,9}(?:\.\d{1,9}){0,7}", version)
    return [int(number) for number in found[0].split(".")] if found else []


def strict_json(value: object, indent: int | None = None) -> str:
    """Return JSON with sorted keys that strict parsers read: half a surrogate pair becomes ``\\udcff`` in its text.

    Names of files that are not UTF-8 have them.
    """
    return json.dumps(_whole(value), sort_keys=True, indent=indent)


def _whole(value: Any) -> Any:
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case dict():
            return {_whole(key): _whole(each) for key, each in value.items()}
        case list() | tuple():
            return [_whole(each) for each in value]
    return value
