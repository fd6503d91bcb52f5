"""``lattice remote resolve`` and ``rescued``: conflicts, withheld edits, and contents that were restored or removed."""

import base64
import difflib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from lattice_remote.client.agent_client import describe_age
from lattice_remote.client.cache.cache import BASE_DIRECTORY
from lattice_remote.client.cli.common import Json, complete_tasks, here, print_result, send_request
from lattice_remote.errors import Misuse, one_line
from lattice_remote.output import counted

__all__ = ["app", "rescued_app"]

app = typer.Typer()

_MAX_FILE_BYTES = 31 * 1024 * 1024
_MAX_SHOWN_BYTES = 512 * 1024
_MAX_SHOWN_LINES = 200
_MAX_SHOWN_CHARACTERS = 300
_RESOLVED = {
    "mine": "your text is the server's now",
    "theirs": "the server's text stays, yours is gone",
    "rescued": "the server's text is restored, yours is kept; see: lattice remote rescued",
    "edited": "the text you chose is the server's now",
}

Task = Annotated[
    str,
    typer.Argument(
        metavar="TASK", help="LAT-42, a task's id, or a path; default: every conflict.", autocompletion=complete_tasks
    ),
]
File = Annotated[str, typer.Argument(metavar="FILE", help="With --edited: the text to keep; - reads stdin.")]
Mine = Annotated[bool, typer.Option("--mine", help="Keep my text instead of the server's.")]
Theirs = Annotated[bool, typer.Option("--theirs", help="Keep the server's text; mine is removed.")]
Edited = Annotated[bool, typer.Option("--edited", help="Keep FILE, or without one the plan or notes as they are now.")]
Plan = Annotated[bool, typer.Option("--plan", help="Only the plan's conflict.")]
Notes = Annotated[bool, typer.Option("--notes", help="Only the notes' conflict.")]


@app.command()
def resolve(
    task: Task = "",
    file: File = "",
    *,
    mine: Mine = False,
    theirs: Theirs = False,
    edited: Edited = False,
    plan: Plan = False,
    notes: Notes = False,
    every: Annotated[bool, typer.Option("--all", help="With --mine or --theirs: all shown conflicts.")] = False,
    as_json: Json = False,
) -> None:
    """Show or resolve conflicts and withheld edits of plans and notes.

    A conflict is between your text and the server's. The chosen text is sent as an edit of the server's. If others
    change the same lines at that moment, nothing happens, and the command can be repeated.

    Example: lattice remote resolve LAT-42 --edited merged.md
    """
    choice = _choice(mine=mine, theirs=theirs, edited=edited)
    if file and choice != "edited":
        raise Misuse("FILE requires --edited")
    if choice is not None and not task and (not every or file):
        raise Misuse("name a TASK, or --all; without them the conflicts are only shown")
    directory, _ = here()
    what = None if plan == notes else "plan" if plan else "notes"
    text = base64.b64encode(_read(file)).decode("ascii") if file else None
    answer = send_request("resolve", directory, task=task, what=what, choice=choice, text=text)
    if as_json:
        print_result({key: answer[key] for key in ("conflicts", "resolved")})
        return
    for each in answer["resolved"]:
        typer.echo(f"{one_line(each['path'])}: {_RESOLVED[each['outcome']]}")
    if not choice or not answer["resolved"]:
        for line in _shown(answer["conflicts"], directory):
            typer.echo(line)


def _choice(**given: bool) -> str | None:
    chosen = [name for name, is_given in given.items() if is_given]
    if len(chosen) > 1:
        raise Misuse(f"--{chosen[0]} and --{chosen[1]} exclude each other")
    return chosen[0] if chosen else None


def _read(file: str) -> bytes:
    try:
        if file == "-":
            text = sys.stdin.buffer.read(_MAX_FILE_BYTES + 1)
        else:
            with open(file, "rb") as source:
                text = source.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise Misuse(f"cannot read {file}: {error.strerror}", code="REMOTE_STORAGE") from error
    if len(text) > _MAX_FILE_BYTES:
        raise Misuse(f"{file} is over {_MAX_FILE_BYTES >> 20} MiB", code="REMOTE_TOO_LARGE")
    return text


def _shown(conflicts: list[dict[str, Any]], directory: str) -> Iterator[str]:
    for conflict in conflicts:
        why = "others changed the same lines" if conflict["is_active"] else "the task is archived or gone"
        why = f"not sent: {conflict['reason']}" if conflict["reason"] else why
        yield f"{one_line(conflict['short_id'])}, {conflict['what']}: {one_line(why)}."
        if not conflict["copies"]:
            yield f"  your text:         .lattice/{one_line(conflict['path'])}"
            yield from _difference(directory, f"{BASE_DIRECTORY}/{conflict['path']}", conflict["path"])
            continue
        yield f"  the server's text: .lattice/{one_line(conflict['path'])}"
        for copy in conflict["copies"]:
            yield f"  your text:         .lattice/{one_line(copy)}"
            yield from _difference(directory, conflict["path"], copy)
    name = one_line(conflicts[0]["short_id"]) if conflicts else ""
    yield f"Next: lattice remote resolve {name} with --mine, --theirs, or --edited [FILE]" if name else "No conflicts."


def _difference(directory: str, path: str, copy: str) -> Iterator[str]:
    """Yield a ``diff -u`` of the local text; nothing if it would be too long to read."""
    texts = [_text(os.path.join(directory, name)) for name in (path, copy)]
    if sum(map(len, texts)) > _MAX_SHOWN_BYTES:
        return
    theirs, mine = (text.decode(errors="replace").splitlines() for text in texts)
    shown = list(difflib.unified_diff(theirs, mine, "server's", "yours", lineterm="", n=2))
    for line in shown[:_MAX_SHOWN_LINES]:
        yield "    " + "".join(c if c.isprintable() else " " for c in line[:_MAX_SHOWN_CHARACTERS])
    if len(shown) > _MAX_SHOWN_LINES:
        yield f"    ... and {len(shown) - _MAX_SHOWN_LINES} lines more"


def _text(place: str) -> bytes:
    try:
        with open(place, "rb") as file:
            return file.read(_MAX_SHOWN_BYTES + 1)
    except OSError:
        return b""


rescued_app = typer.Typer(
    name="rescued", help="List, apply or drop contents of files that were restored here.", rich_markup_mode=None
)
_MAX_DATA_CHARACTERS = 200
_NONE = "No rescued files."


def _numbers(incomplete: str) -> Iterator[tuple[str, str]]:
    for entry in _rescued("list", [])["entries"]:
        if str(entry["number"]).startswith(incomplete):
            yield str(entry["number"]), f"{counted(len(entry['files']), 'file')}, {_age(entry)} ago"


Numbers = Annotated[list[int] | None, typer.Argument(metavar="NUMBER", help="As listed.", autocompletion=_numbers)]
All = Annotated[bool, typer.Option("--all", help="All of them.")]


def _rescued(action: str, numbers: list[int]) -> dict[str, Any]:
    directory, _ = here()
    return send_request("rescued", directory, action=action, numbers=numbers)


@rescued_app.callback(invoke_without_command=True)
def rescued(context: typer.Context, as_json: Json = False) -> None:
    """List, apply or drop contents of files that were restored or removed here. Without a subcommand: list them."""
    if context.invoked_subcommand is None:
        list_(as_json=as_json)


@rescued_app.command(name="list")
def list_(as_json: Json = False) -> None:
    """List the rescued files.

    Example: lattice remote rescued list --json
    """
    answer = _rescued("list", [])
    if as_json:
        print_result({"entries": answer["entries"]})
        return
    for entry in answer["entries"]:
        typer.echo(_headline(entry))
    typer.echo("Next: lattice remote rescued show NUMBER, then apply or drop." if answer["entries"] else _NONE)


@rescued_app.command()
def show(numbers: Numbers = None, as_json: Json = False) -> None:
    """Show files, their location, and events that the server lacks.

    Example: lattice remote rescued show 1
    """
    entries = _rescued("show", numbers or [])["entries"]
    if as_json:
        print_result({"entries": entries})
        return
    for entry in entries:
        typer.echo(_headline(entry))
        for path, size in entry["files"].items():
            typer.echo(f"  .lattice/.remote/rescued/{entry['number']}/files/{one_line(path)}  {size} bytes")
        for event in entry["events"]:
            data = json.dumps(event["data"], ensure_ascii=False)[:_MAX_DATA_CHARACTERS]
            actor = event["actor"] if isinstance(event["actor"], str) else json.dumps(event["actor"])
            typer.echo(one_line(f"  not on the server: {event['ts']} {actor} {event['type']} {data}"))
    typer.echo("Next: lattice remote rescued apply NUMBER, or drop NUMBER." if entries else _NONE)


@rescued_app.command()
def apply(numbers: Numbers = None, every: All = False, as_json: Json = False) -> None:
    """Send the events and new plans that the server lacks.

    An event gets the server's time, and a new task its next number. Completely applied entries are dropped; for the
    others the server's reasons are shown, and the exit code is 1. Can be repeated.

    Example: lattice remote rescued apply 1
    """
    answer = _rescued("apply", _chosen(numbers, every=every))
    if as_json:
        print_result({key: answer[key] for key in ("applied", "refused", "dropped")})
    else:
        for each in answer["applied"]:
            typer.echo(one_line(f"applied: {each['type']} to {each['to']}"))
        for each in answer["refused"]:
            typer.echo(one_line(f"refused: {each['path']}: {each['why']}; it is in .lattice/{each['place']}"))
        typer.echo(f"Applied {len(answer['applied'])}, refused {len(answer['refused'])}.")
        if dropped := ", ".join(map(str, answer["dropped"])):
            typer.echo(f"Dropped {dropped}: the server lacks nothing of it.")
    if answer["refused"]:
        raise typer.Exit(1)


@rescued_app.command()
def drop(numbers: Numbers = None, every: All = False, as_json: Json = False) -> None:
    """Remove rescued files permanently.

    Example: lattice remote rescued drop 1
    """
    answer = _rescued("drop", _chosen(numbers, every=every))
    if as_json:
        print_result({"dropped": answer["dropped"]})
    else:
        typer.echo(f"Dropped {', '.join(map(str, answer['dropped'])) or 'nothing'}.")


def _chosen(numbers: list[int] | None, *, every: bool) -> list[int]:
    if bool(numbers) == every:
        raise Misuse("name NUMBERs listed by lattice remote rescued, or --all")
    return numbers or []


def _headline(entry: dict[str, Any]) -> str:
    return f"{entry['number']}: {counted(len(entry['files']), 'file')}, {_age(entry)} ago: {one_line(entry['reason'])}"


def _age(entry: dict[str, Any]) -> str:
    return describe_age(max(0.0, time.time() - entry["at"]))
