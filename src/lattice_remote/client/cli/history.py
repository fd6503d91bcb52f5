"""``lattice remote history``: earlier versions of a task's plan or notes, shown or restored."""

import base64
import sys
from typing import Annotated, Any

import msgspec
import typer

from lattice_remote import text as logtext
from lattice_remote.client.agent.audit_log import MAX_ENTRIES
from lattice_remote.client.agent_client import ask
from lattice_remote.client.cli.common import Json, count, here, print_result, request
from lattice_remote.errors import Misuse, one_line
from lattice_remote.protocol.messages import LogEntry

__all__ = ["app"]

app = typer.Typer()

Plan = Annotated[bool, typer.Option("--plan", help="The plan; the default.")]
Notes = Annotated[bool, typer.Option("--notes", help="The notes.")]
Show = Annotated[str, typer.Option("--show", metavar="N", help="Print the text as of change N.")]
Restore = Annotated[
    str, typer.Option("--restore", metavar="N", help="Make the text of change N the newest, as an edit.")
]


@app.command()
def history(
    task: Annotated[str, typer.Argument(help="LAT-42, or a task's id.")],
    *,
    plan: Plan = False,
    notes: Notes = False,
    show: Show = "",
    restore: Restore = "",
    number: Annotated[int, typer.Option("-n", min=1, max=MAX_ENTRIES, help="Number of versions.")] = 20,
    as_json: Json = False,
) -> None:
    """List the versions of a task's plan or notes, newest first, or show or restore one.

    The server keeps versions for as long as its journal reaches back. A number that two epochs share means the newer
    one; EPOCH-N names the other.

    Example: lattice remote history LAT-42 --restore 17
    """
    if plan and notes:
        raise Misuse("--plan and --notes exclude each other")
    if show and restore:
        raise Misuse("--show and --restore exclude each other")
    directory, _ = here()
    asked = {**request("log", directory), "task": task, "text": "notes" if notes else "plan"}
    if restore:
        _restored(ask({**asked, "do": "restore", "version": restore}), restore, as_json=as_json)
    elif show:
        _shown(ask({**asked, "do": "version", "version": show}), as_json=as_json)
    else:
        _listed(ask({**asked, "limit": number}), task, asked["text"], as_json=as_json)


def _restored(answer: dict[str, Any], version: str, *, as_json: bool) -> None:
    for notice in answer["notices"]:
        typer.echo(f"lattice-remote: {one_line(notice)}", err=True)
    if as_json:
        print_result({"path": answer["path"], "outcome": answer["outcome"]})
    elif answer["outcome"] == "unchanged":
        typer.echo(f"{answer['path']} already has the text of change {version}.")
    else:
        typer.echo(f"Restored {answer['path']} to change {version}.")


def _shown(answer: dict[str, Any], *, as_json: bool) -> None:
    text = base64.b64decode(answer["text"])
    if as_json:
        print_result({"change": _name(answer), "text": text.decode(errors="replace")})
        return
    sys.stdout.flush()
    sys.stdout.buffer.write(text)


def _listed(answer: dict[str, Any], task: str, text: str, *, as_json: bool) -> None:
    entries = msgspec.convert(answer["entries"], list[LogEntry])
    if as_json:
        versions = [
            {
                "change": _name({"epoch": entry.epoch, "seq": entry.seq}),
                **{name: getattr(entry, name) for name in ("seq", "epoch", "time", "actor", "command")},
                "token_actor": entry.token_actor or entry.actor,
                "bytes": entry.text_bytes,
            }
            for entry in entries
        ]
        print_result({"versions": versions, "more": answer["more"]})
        return
    if not entries:
        typer.echo(f"No versions of the {text} of {task} are kept.")
        return
    rows = [("CHANGE", "TIME", "ACTOR", "SIZE", "COMMAND"), *map(_row, entries)]
    for line in logtext.columns(rows):
        typer.echo(line)


def _row(entry: LogEntry) -> tuple[str, ...]:
    size = "removed" if entry.text_bytes is None else count(entry.text_bytes, "byte")
    cells = (str(entry.seq), logtext.local_time(entry.time), entry.actor, size, entry.command)
    return tuple(map(logtext.printable, cells))


def _name(fields: dict[str, Any]) -> str:
    return f"{fields['epoch']}-{fields['seq']}"
