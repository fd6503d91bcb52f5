"""``lattice remote rescued``: contents of files that were restored or removed here."""

import json
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from lattice_remote.client.agent_client import ask, describe_age
from lattice_remote.client.cli.common import Json, count, here, print_result, request
from lattice_remote.errors import Misuse, one_line

__all__ = ["app"]

app = typer.Typer(
    name="rescued",
    help="Files that were restored or removed here, and whose contents were kept.",
    rich_markup_mode=None,
)
_MAX_DATA_CHARACTERS = 200


def _numbers(incomplete: str) -> Iterator[tuple[str, str]]:
    """Complete an entry's number."""
    for entry in _ask("list", [])["entries"]:
        if str(entry["number"]).startswith(incomplete):
            yield str(entry["number"]), f"{count(len(entry['files']), 'file')}, {_age(entry)} ago"


Numbers = Annotated[list[int] | None, typer.Argument(metavar="[NUMBER]...", help="As listed.", autocompletion=_numbers)]
All = Annotated[bool, typer.Option("--all", help="All of them.")]


def _ask(action: str, numbers: list[int]) -> dict[str, Any]:
    directory, _ = here()
    return ask({**request("rescued", directory), "action": action, "numbers": numbers})


@app.callback(invoke_without_command=True)
def rescued(context: typer.Context, as_json: Json = False) -> None:
    """Contents of files that were restored or removed here. Without a subcommand: list them."""
    if context.invoked_subcommand is None:
        list_(as_json=as_json)


@app.command(name="list")
def list_(as_json: Json = False) -> None:
    """List the rescued files.

    Example: lattice remote rescued list --json
    """
    answer = _ask("list", [])
    if as_json:
        print_result({"entries": answer["entries"]})
        return
    for entry in answer["entries"]:
        typer.echo(_headline(entry))
    typer.echo(
        "Look with: lattice remote rescued show NUMBER; then apply or drop."
        if answer["entries"]
        else "No rescued files."
    )


@app.command()
def show(numbers: Numbers = None, as_json: Json = False) -> None:
    """Show the files, their location, and the events that the server lacks.

    Example: lattice remote rescued show 1
    """
    entries = _ask("show", numbers or [])["entries"]
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
    typer.echo("Next: lattice remote rescued apply NUMBER, or drop NUMBER." if entries else "No rescued files.")


@app.command()
def apply(numbers: Numbers = None, every: All = False, as_json: Json = False) -> None:
    """Send the events and new plans that the server lacks. Exits with 1 if any was refused.

    An event gets the server's time, and a new task its next number. Completely applied entries are dropped; for the
    others the server's reasons are shown. Can be repeated.

    Example: lattice remote rescued apply 1
    """
    answer = _ask("apply", _chosen(numbers, every=every))
    if as_json:
        print_result({key: answer[key] for key in ("applied", "refused", "dropped")})
    else:
        for each in answer["applied"]:
            typer.echo(one_line(f"applied: {each['type']} to {each['to']}"))
        for each in answer["refused"]:
            typer.echo(one_line(f"refused: {each['path']}: {each['why']}; it is in .lattice/{each['place']}"))
        typer.echo(f"Applied {len(answer['applied'])}, refused {len(answer['refused'])}.")
    if answer["refused"]:
        raise typer.Exit(1)


@app.command()
def drop(numbers: Numbers = None, every: All = False, as_json: Json = False) -> None:
    """Remove rescued files permanently.

    Example: lattice remote rescued drop 1
    """
    answer = _ask("drop", _chosen(numbers, every=every))
    if as_json:
        print_result({"dropped": answer["dropped"]})
    else:
        typer.echo(f"Dropped {', '.join(map(str, answer['dropped'])) or 'nothing'}.")


def _chosen(numbers: list[int] | None, *, every: bool) -> list[int]:
    if bool(numbers) == every:
        raise Misuse("name NUMBERs listed by lattice remote rescued, or --all")
    return numbers or []


def _headline(entry: dict[str, Any]) -> str:
    return f"{entry['number']}: {count(len(entry['files']), 'file')}, {_age(entry)} ago: {one_line(entry['reason'])}"


def _age(entry: dict[str, Any]) -> str:
    return describe_age(max(0.0, time.time() - entry["at"]))
