"""``lattice remote pull``, ``sync``, ``verify``, ``fetch``, ``config`` and ``log``."""

import os
import re
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
import typer

from lattice_remote import output
from lattice_remote.client.cli.common import (
    MAX_LISTED,
    Json,
    Name,
    complete_settings,
    complete_tasks,
    here,
    notify,
    print_result,
    progress,
    send_request,
)
from lattice_remote.client.config import read_settings
from lattice_remote.client.tasks import read_object, short_ids, task_of
from lattice_remote.errors import Misuse, one_line
from lattice_remote.output import counted
from lattice_remote.protocol.messages import LogEntry

__all__ = ["app"]

app = typer.Typer()

_MIB = 1024 * 1024


@app.command(name="update", hidden=True, help="As pull. Example: lattice remote update origin")
@app.command()
def pull(name: Name = "", as_json: Json = False) -> None:
    """Bring the cache up to date now.

    Example: lattice remote pull
    """
    directory, _ = here(name)
    with progress("fetching") as show:
        answer = send_request("pull", directory, show)
    if as_json:
        print_result(answer)
    else:
        typer.echo(f"Up to date at change {answer['seq']}.")


@app.command()
def sync(as_json: Json = False) -> None:
    """Compare every file with the server's and repair differences.

    Example: lattice remote sync
    """
    answer = _compared("sync")
    if as_json:
        print_result(answer)
        return
    _list(answer, {"fetched": "differing", "restored": "missing", "removed": "surplus", "kept edit": "edited"})
    notify(*answer["notices"])
    repaired = sum(len(answer[key]) for key in ("differing", "missing", "surplus"))
    what = f"repaired {counted(repaired, 'file')} of" if repaired else "nothing to repair in"
    typer.echo(f"Compared with the server at change {answer['seq']}: {what} {counted(answer['total'], 'file')}.")


@app.command()
def verify(as_json: Json = False) -> None:
    """Compare every file with the server's; change nothing. Exits with 1 if any differs.

    Example: lattice remote verify --json
    """
    answer = _compared("verify")
    labels = {"differs": "differing", "missing here": "missing", "not on the server": "surplus"}
    labels |= {"edited, not sent yet": "edited"}
    differences = sum(len(answer[key]) for key in labels.values())
    if as_json:
        print_result({**answer, "equal": not differences})
    else:
        _list(answer, labels)
        but = f", except {counted(len(answer['deferred']), 'file')} not here" if answer["deferred"] else ""
        outcome = f"{counted(differences, 'difference')} in" if differences else f"equal{but}, all"
        typer.echo(f"Compared with the server at change {answer['seq']}: {outcome} {counted(answer['total'], 'file')}.")
    if differences:
        raise typer.Exit(1)


def _compared(do: str) -> dict[str, Any]:
    directory, _ = here()
    with progress("comparing") as show:
        return send_request(do, directory, show)


def _list(answer: dict[str, Any], labels: dict[str, str]) -> None:
    for label, key in {**labels, "not here yet, see lattice remote fetch": "deferred"}.items():
        for path in answer[key]:
            typer.echo(f"{label}: {one_line(path)}")


@app.command()
def log(
    task: Annotated[
        str,
        typer.Option(metavar="ID", help="Only changes of this task: LAT-42 or task_...", autocompletion=complete_tasks),
    ] = "",
    number: Annotated[int, typer.Option("-n", metavar="N", min=1, max=MAX_LISTED, help="Number of changes.")] = 20,
    as_json: Json = False,
) -> None:
    """List the changes with author, time and token, newest first.

    Example: lattice remote log --task LAT-42 -n 5
    """
    directory, _ = here()
    answer = send_request("log", directory, task=task, limit=number)
    entries = msgspec.convert(answer["entries"], list[LogEntry])
    names = {task: short_id for short_id, task in short_ids(directory).items()}
    if as_json:
        print_result({**answer, "entries": output.as_records(entries, names)})
        return
    for line in output.as_lines(entries, names, answer["epoch"]) or ["No changes are kept."]:
        typer.echo(line)


@app.command()
def config(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A setting: payloads.", autocompletion=complete_settings)
    ] = "",
    value: Annotated[
        str, typer.Argument(metavar="VALUE", help="background or on-demand.", autocompletion=complete_settings)
    ] = "",
    as_json: Json = False,
) -> None:
    """List the settings of this cache, show one, or change it.

    payloads: background fetches large contents of artifacts as soon as they are announced, on-demand only on request.
    Settings are stored beside the cache, outside any repository.

    Example: lattice remote config payloads on-demand
    """
    directory, _ = here()
    if value:
        send_request("configure", directory, name=name, value=value)
    settings = read_settings(directory)
    if name and name not in settings:
        raise Misuse(f"there is no setting {name!r}; there is {', '.join(settings)}")
    shown = {name: settings[name]} if name else settings
    if as_json:
        print_result({"settings": shown})
        return
    for key, text in shown.items():
        typer.echo(text if name and not value else f"{key} = {text}")


_PAYLOADS = "artifacts/payload"
_ARTIFACT = re.compile(r"art_[0-9A-Z]{26}")


@app.command()
def fetch(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH|ARTIFACT|TASK",
            help="A file, an artifact (art_...), or all of a task's.",
            autocompletion=complete_tasks,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch large contents of artifacts and wait for them.

    All, or the named ones. An interrupted fetch is resumed by the next.

    Example: lattice remote fetch LAT-42
    """
    directory, found = here()
    named = [name for name in what or [] if name != found.name]  # as git names the remote first
    paths = None if not named else sorted({path for name in named for path in _paths_of(directory, name)})
    with progress("fetching") as show:
        answer = send_request("fetch", directory, show, paths=paths)
    if as_json:
        print_result(answer)
        return
    for path in answer["fetched"]:
        typer.echo(f"fetched: {one_line(path)}")
    if answer["fetched"]:
        typer.echo(f"Fetched {counted(len(answer['fetched']), 'file')}, {answer['bytes'] / _MIB:.1f} MiB.")
    else:
        typer.echo("Nothing to fetch: it is here." if named else "Nothing to fetch: everything is here.")


def _paths_of(directory: str, name: str) -> Iterator[str]:
    """Yield the contents that a file, artifact or task stands for, present or not.

    Raises:
        Misuse: it is none of these.
    """
    relative = os.path.relpath(os.path.realpath(name), os.path.realpath(directory)).replace(os.sep, "/")
    for path in (name, relative):
        if path.startswith(f"{_PAYLOADS}/"):
            yield path
            return
    artifacts = [name] if _ARTIFACT.fullmatch(name) else _artifacts_of_task(directory, name)
    if artifacts is None:
        raise Misuse(f"{name!r} is not a task, artifact or file in {_PAYLOADS}")
    for artifact in artifacts:
        found = read_object(directory, f"artifacts/meta/{artifact}.json")
        if not found:
            raise Misuse(f"there is no artifact {artifact} in this project")
        payload = found.get("payload")
        file = payload.get("file") if isinstance(payload, dict) else None
        if isinstance(file, str) and "/" not in file:
            yield f"{_PAYLOADS}/{file}"


def _artifacts_of_task(directory: str, name: str) -> list[str] | None:
    task = task_of(directory, name)
    if not re.fullmatch(r"task_[0-9A-Z]{26}", task):
        return None
    found = read_object(directory, f"tasks/{task}.json") or read_object(directory, f"archive/tasks/{task}.json")
    if not found:
        return None
    from lattice.core.tasks import get_artifact_roles

    return [artifact for artifact in get_artifact_roles(found) if _ARTIFACT.fullmatch(artifact)]
