"""``lattice remote fetch``, ``config``, ``agent``, ``status``, ``pull``, ``sync``, ``verify`` and ``log``."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from lattice_remote.client import agent_runtime
from lattice_remote.client import config as preferences
from lattice_remote.client.agent import audit_log
from lattice_remote.client.agent_client import agent_enabled, ask, ask_agent, ask_running_agent, describe_age
from lattice_remote.client.cli import common
from lattice_remote.client.cli.common import Json, count, here, print_result, progress, request, show_unpushed, unpushed
from lattice_remote.client.launcher.install import stop_warm
from lattice_remote.errors import ConnectionFailed, Misuse, StorageError, one_line

__all__ = ["agent_app", "app", "running_agent"]

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
    """Fetch large contents of artifacts that are not here, all or the named ones, and wait for them.

    An interrupted fetch is resumed by the next.

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
    """List the settings of this cache, show one, or change it. Stored beside the cache, outside any repository.

    payloads: background fetches large contents of artifacts as soon as they are announced, on-demand only on request.

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
    """Yield the contents of artifacts that a name stands for, present or not.

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
        raise Misuse(f"{name!r} is not a task, artifact or file in {_PAYLOADS}")
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


agent_app = typer.Typer(
    name="agent", help="The background agent of this user.", no_args_is_help=True, rich_markup_mode=None
)
All = Annotated[bool, typer.Option("--all", help="Also agents of this user in other environments.")]


@agent_app.command(name="status")
def agent_status(*, every: All = False, as_json: Json = False) -> None:
    """Show whether the agent runs, and its caches.

    An agent serves the commands with one configuration directory, network, set of mounts, proxy and CA settings.

    Example: lattice remote agent status --all
    """
    answer, others = running_agent(), _others()
    if as_json:
        listed = {"agents": others} if every else {}
        print_result({"running": answer is not None, **(answer or {}), "others": len(others), **listed})
        return
    if answer is None:
        typer.echo(f"The agent is not running ({_why_not()}).")
    else:
        _show(answer)
    for other in others if every else ():
        typer.echo("")
        _show(other)
    if others and not every:
        typer.echo(f"{_count(others)} in other environments; see: lattice remote agent status --all")


@agent_app.command(name="stop")
def agent_stop(*, every: All = False) -> None:
    """Stop the agent and the launcher's warm process; the next command starts new ones.

    Example: lattice remote agent stop --all
    """
    answer = ask_running_agent({"do": "agent-stop"})
    typer.echo(f"Stopped the agent (pid {answer['pid']})." if answer else "The agent is not running.")
    for warm in stop_warm(every=every):
        typer.echo(f"Stopped the warm process (pid {warm}).")
    if every:
        for other in _ask_others("agent-stop"):
            typer.echo(other.get("error") or f"Stopped the agent (pid {other['pid']}) of another environment.")
    elif others := _others():
        typer.echo(f"{_count(others)} in other environments; to stop all: lattice remote agent stop --all")


def _show(agent: dict[str, Any]) -> None:
    if "error" in agent:
        typer.echo(agent["error"])
        return
    typer.echo(f"pid {agent['pid']}, version {agent['version']}, up {describe_age(agent['uptime_s'])}")
    typer.echo(f"configuration {agent['configuration']}")
    typer.echo(f"socket {agent['socket']}, log {agent['log']}")
    for cache in agent["caches"]:
        how = "connected" if cache["connected"] else "not connected"
        typer.echo(f"{cache['directory']}: {cache['url']} {cache['project']}, {how}, at change {cache['seq']}")


def _count(others: list[dict[str, Any]]) -> str:
    return f"{count(len(others), 'more agent')} of this user {'runs' if len(others) == 1 else 'run'}"


def _why_not() -> str:
    if not agent_enabled():
        return "switched off"
    try:
        place = agent_runtime.locate()
        agent_runtime.prepare(place)
    except StorageError as error:
        return f"there is no place for it: {error.message}"
    return f"it starts with the next command; log: {place.log}"


def running_agent() -> dict[str, Any] | None:
    return ask_running_agent({"do": "agent-status"})


def _others() -> list[dict[str, Any]]:
    return _ask_others("agent-status")


def _ask_others(do: str) -> list[dict[str, Any]]:
    """Return the answers of this user's other agents in the same directory; a silent one is marked so."""
    answers: list[dict[str, Any]] = []
    places = []
    with contextlib.suppress(StorageError):
        places = agent_runtime.others(agent_runtime.locate()) if agent_enabled() else []
    for place in places:
        try:
            answer = ask_agent(place, {"do": do})
        except ConnectionFailed as silent:
            answer = {"error": silent.message, "socket": place.socket}
        if answer is not None:
            answers.append(answer)
    return answers


@app.command()
def status(as_json: Json = False) -> None:
    """Show whether the cache is connected and current, and the evidence for it.

    Example: lattice remote status --json
    """
    if (waiting := unpushed()) is not None:
        show_unpushed(waiting[1], as_json=as_json)
        return
    directory, found = here()
    answer = ask(request("status", directory))
    try:
        answer["agent"] = running_agent()
    except ConnectionFailed as silent:
        answer["agent"] = {"error": silent.message}
    if as_json:
        print_result(answer)
        return
    versions = answer["versions"]
    rows = [
        ("remote", f"{found.name} {found.url} project {found.project}"),
        ("connection", common.connection(answer)),
        ("cache", common.cache(answer)),
        ("large files", common.payloads(answer["payloads"])),
        ("acting as", common.acting(answer)),
        ("unsent edits", common.edits(answer)),
        ("conflicts", common.conflicts(answer["conflicts"])),
        ("set aside", ", ".join(answer["set_aside"]) or "none"),
        ("rescued", common.rescued(answer["rescued"])),
        ("repaired", common.healed(answer["healed"])),
        ("agent", common.agent(answer["agent"])),
        ("versions here", common.versions(versions["here"])),
        ("versions there", common.versions(versions["server"]) if versions["server"] else "unknown: not connected"),
    ]
    rows += [("note", f"{name} {advice}") for name, advice in (versions["differences"] or {}).items()]
    for label, text in rows:
        typer.echo(f"{label + ':':16}{one_line(text)}")


@app.command()
def pull(as_json: Json = False) -> None:
    """Bring the cache up to date now.

    Example: lattice remote pull
    """
    directory, _ = here()
    with progress("fetching") as show:
        answer = ask(request("pull", directory), show)
    if as_json:
        print_result(answer)
    else:
        typer.echo(f"Up to date at change {answer['seq']}.")


@app.command()
def sync(as_json: Json = False) -> None:
    """Compare every file with the server's and repair differences.

    Example: lattice remote sync
    """
    directory, _ = here()
    with progress("comparing") as show:
        answer = ask(request("sync", directory), show)
    if as_json:
        print_result(answer)
        return
    for label, key in (
        ("fetched", "differing"),
        ("restored", "missing"),
        ("removed", "surplus"),
        ("kept edit", "edited"),
    ):
        for path in answer[key]:
            typer.echo(f"{label}: {one_line(path)}")
    for notice in answer["notices"]:
        typer.echo(f"lattice-remote: {one_line(notice)}", err=True)
    _list_deferred(answer)
    repaired = sum(len(answer[key]) for key in ("differing", "missing", "surplus"))
    what = f"repaired {count(repaired, 'file')} of" if repaired else "nothing to repair in"
    typer.echo(f"Compared with the server at change {answer['seq']}: {what} {count(answer['total'], 'file')}.")


def _list_deferred(answer: dict[str, Any]) -> None:
    """List the deferred contents of artifacts, which are not differences."""
    for path in answer["away"]:
        typer.echo(f"not here yet, see lattice remote fetch: {one_line(path)}")


@app.command()
def verify(as_json: Json = False) -> None:
    """Compare every file with the server's; change nothing. Exits with 1 if any differs.

    Example: lattice remote verify --json
    """
    directory, _ = here()
    with progress("comparing") as show:
        answer = ask(request("verify", directory), show)
    differences = sum(len(answer[key]) for key in ("differing", "missing", "surplus", "edited"))
    if as_json:
        print_result({**answer, "equal": not differences})
    else:
        for label, key in (
            ("differs", "differing"),
            ("missing here", "missing"),
            ("not on the server", "surplus"),
            ("edited, not sent yet", "edited"),
        ):
            for path in answer[key]:
                typer.echo(f"{label}: {one_line(path)}")
        _list_deferred(answer)
        but = f", except {count(len(answer['away']), 'file')} not here" if answer["away"] else ""
        outcome = f"{count(differences, 'difference')} in" if differences else f"equal{but}, all"
        typer.echo(f"Compared with the server at change {answer['seq']}: {outcome} {count(answer['total'], 'file')}.")
    if differences:
        raise typer.Exit(1)


@app.command()
def log(
    task: Annotated[str, typer.Option(metavar="ID", help="Only changes of this task: LAT-42 or task_...")] = "",
    number: Annotated[int, typer.Option("-n", min=1, max=audit_log.MAX_ENTRIES, help="Number of changes.")] = 20,
    as_json: Json = False,
) -> None:
    """List the changes with author, time and token, newest first.

    Example: lattice remote log --task LAT-42 -n 5
    """
    directory, _ = here()
    answer = ask({**request("log", directory), "task": task, "limit": number})
    if as_json:
        print_result(audit_log.records(answer, directory))
        return
    for line in audit_log.lines(answer, directory) or ["No changes are kept."]:
        typer.echo(line)
