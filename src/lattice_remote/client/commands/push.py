"""``lattice remote push``: edited plans and notes, or a whole project that waits for it."""

import asyncio
import contextlib
from typing import Annotated

import typer

from lattice_remote.client.agent_client import ask
from lattice_remote.client.commands import pushing
from lattice_remote.client.commands.shared import (
    Json,
    count,
    here,
    print_result,
    progress,
    request,
    unpushed,
    warn_of_tracking,
)
from lattice_remote.errors import RemoteError, one_line

__all__ = ["app"]

app = typer.Typer()
_COUNTED = {
    "tasks": "tasks",
    "archived_tasks": "archive/tasks",
    "event_logs": "events",
    "plans": "plans",
    "notes": "notes",
    "artifacts": "artifacts/meta",
    "sessions": "sessions",
}
"""What a push names of a project, and the directories in which it lies."""


@app.command()
def push(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be sent; send and change nothing.")
    ] = False,
    confirm: Annotated[
        bool, typer.Option("--confirm", help="Send also the edits that wait for a decision, see lattice remote status.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Send edited plans and notes now; or, after lattice remote add, this directory's whole project.

    Example: lattice remote push --dry-run
    """
    if (waiting := unpushed()) is not None:
        warn_of_tracking(waiting[0])
        (_plan_project if dry_run else _push_project)(waiting[0], as_json=as_json)
        return
    if dry_run:
        _plan_edits(as_json=as_json)
        return
    directory, _ = here()
    warn_of_tracking(directory)
    answer = ask({**request("push", directory), "confirm": confirm})
    if as_json:
        print_result(answer)
    else:
        for sent in answer["sent"]:
            typer.echo(f"{one_line(sent['path'])}: {sent['outcome']}")
        for notice in answer["notices"]:
            typer.echo(f"lattice-remote: {one_line(notice)}", err=True)
        if not answer["sent"]:
            typer.echo("Nothing to send.")
    if any(sent["outcome"] in ("conflict", "refused") for sent in answer["sent"]):
        raise typer.Exit(1)


def _plan_edits(*, as_json: bool) -> None:
    directory, _ = here()
    unsent = ask(request("status", directory))["unsent_edits"]
    if as_json:
        print_result({"dry_run": True, "unsent_edits": unsent})
        return
    for path in unsent or ["Nothing to send."]:
        typer.echo(one_line(path))


def _plan_project(directory: str, *, as_json: bool) -> None:
    plan = asyncio.run(pushing.plan_push(directory))
    counts = {label: plan.found.count(place) for label, place in _COUNTED.items()}
    if as_json:
        data = {"dry_run": True, **counts, "files": len(plan.found.files), "bytes": plan.found.bytes}
        left = {"left_out": plan.found.left_out, "hooks": plan.found.has_hooks, "trouble": plan.trouble or None}
        print_result({**data, **left})
    else:
        typer.echo(f"Would push to {plan.remote.url}, project {plan.remote.project}:")
        nouns = {label: label.replace("_", " ").removesuffix("s") for label in counts}
        parts = [count(number, nouns[label]) for label, number in counts.items() if number]
        typer.echo(f"  {', '.join([*parts, count(len(plan.found.files), 'file')])}, {plan.found.bytes} bytes")
        if plan.found.has_hooks:
            typer.echo("  left out: the hooks of config.json, unless the server's administrator allows them")
        if plan.found.left_out:
            typer.echo(f"  left out, no part of a project: {', '.join(map(one_line, plan.found.left_out[:10]))}")
        typer.echo(
            f"  {one_line(plan.trouble)}" if plan.trouble else "  the server would take it: its project is empty"
        )
    if plan.trouble:
        raise typer.Exit(1)


def _push_project(directory: str, *, as_json: bool) -> None:
    with progress("pushing") as show:
        done = asyncio.run(pushing.push_project(directory, show))
    answer = done.answer
    with contextlib.suppress(RemoteError):
        ask(request("pull", directory))  # from here on the agent follows; what the server left out or mended, comes
    if as_json:
        data = {"tasks": answer.tasks, "archived": answer.archived, "files": answer.files, "seq": answer.seq}
        print_result({**data, "notes": answer.notes, "kept": done.kept})
        return
    typer.echo(
        f"Pushed {count(answer.tasks, 'task')}, {answer.archived} archived, {count(answer.files, 'file')} to "
        f"{done.remote.url}, project {done.remote.project}; this directory is a copy of it now, at change {answer.seq}."
    )
    for note in answer.notes:
        typer.echo(f"lattice-remote: {one_line(note)}", err=True)
    for path in done.kept:
        notice = f"{one_line(path)} was changed here after it was sent; see: lattice remote rescued"
        typer.echo(f"lattice-remote: {notice}", err=True)
