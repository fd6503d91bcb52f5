"""``lattice remote fetch``, ``config``: large contents of artifacts, and how this copy is kept."""

import json
import os
import re
from collections.abc import Iterator
from typing import Annotated

import typer

from lattice_remote.client import preferences
from lattice_remote.client.agent_client import ask
from lattice_remote.client.commands.shared import Json, count, here, print_result, progress, request
from lattice_remote.errors import Misuse, one_line

__all__ = ["app"]

app = typer.Typer()

_PAYLOADS = "artifacts/payload"
_ARTIFACT = re.compile(r"art_[0-9A-Z]{26}")
_MIB = 1024 * 1024


@app.command()
def fetch(
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH|ARTIFACT|TASK]...", help="A file, an artifact (art_...), or all of a task's."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch large contents of artifacts that are not here, all of them or those that are named, and wait for them.

    Cut off or interrupted, the next fetch goes on from there.

    Example: lattice remote fetch LAT-42
    """
    directory, _ = here()
    paths = None if not what else sorted({path for name in what for path in _paths_of(directory, name)})
    with progress("fetching") as show:
        answer = ask({**request("fetch", directory), "paths": paths}, show)
    if as_json:
        print_result(answer)
    elif not answer["fetched"]:
        typer.echo("Nothing to fetch: it is here." if what else "Nothing to fetch: everything is here.")
    else:
        for path in answer["fetched"]:
            typer.echo(f"fetched: {one_line(path)}")
        typer.echo(f"Fetched {count(len(answer['fetched']), 'file')}, {answer['bytes'] / _MIB:.1f} MiB.")


@app.command()
def config(
    name: Annotated[str, typer.Argument(help="A setting: payloads.")] = "",
    value: Annotated[str, typer.Argument(help="background or on-demand.")] = "",
    as_json: Json = False,
) -> None:
    """List how this copy is kept, show one setting, or change it. Kept beside the copy, in no repository.

    payloads: background fetches large contents of artifacts as soon as they are announced, on-demand only when asked.

    Example: lattice remote config payloads on-demand
    """
    directory, _ = here()
    if value:
        ask({**request("configure", directory), "name": name, "value": value})
    settings = preferences.read(directory)
    if name and name not in settings:
        raise Misuse(f"there is no setting {name!r}; there is {', '.join(settings)}")
    shown = {name: settings[name]} if name else settings
    if as_json:
        print_result({"settings": shown})
        return
    for key, text in shown.items():
        typer.echo(text if name and not value else f"{key} = {text}")


def _paths_of(directory: str, name: str) -> Iterator[str]:
    """Yield the contents of artifacts that a name stands for, here or not.

    Raises:
        Misuse: it stands for none.
    """
    if _ARTIFACT.fullmatch(name):
        yield from _of_artifact(directory, name)
        return
    relative = os.path.relpath(os.path.realpath(name), os.path.realpath(directory)).replace(os.sep, "/")
    for path in (name, relative):
        if path.startswith(f"{_PAYLOADS}/"):
            yield path
            return
    artifacts = _artifacts_of_task(directory, name)
    if artifacts is None:
        raise Misuse(f"{name!r} is no task, no artifact, and no file in {_PAYLOADS}")
    for artifact in artifacts:
        yield from _of_artifact(directory, artifact)


def _of_artifact(directory: str, artifact: str) -> Iterator[str]:
    found = _read(directory, f"artifacts/meta/{artifact}.json")
    if not found:
        raise Misuse(f"there is no artifact {artifact} in this project")
    payload = found.get("payload")
    file = payload.get("file") if isinstance(payload, dict) else None
    if isinstance(file, str) and "/" not in file:
        yield f"{_PAYLOADS}/{file}"


def _artifacts_of_task(directory: str, name: str) -> list[str] | None:
    """Return a task's artifacts; None when there is no such task."""
    known = _read(directory, "ids.json").get("map")
    task = known.get(name.upper(), name) if isinstance(known, dict) else name
    if not isinstance(task, str) or not re.fullmatch(r"task_[0-9A-Z]{26}", task):
        return None
    found = _read(directory, f"tasks/{task}.json") or _read(directory, f"archive/tasks/{task}.json")
    if not found:
        return None
    from lattice.core.tasks import get_artifact_roles

    return [artifact for artifact in get_artifact_roles(found) if _ARTIFACT.fullmatch(artifact)]


def _read(directory: str, path: str) -> dict[str, object]:
    try:
        with open(os.path.join(directory, path), encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
