"""``lattice remote status``, ``show``, ``pull``, ``sync``, ``verify``, ``fetch``, ``config``, ``log`` and ``agent``."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from lattice_remote.client import agent_runtime
from lattice_remote.client.agent import journal_log
from lattice_remote.client.agent_client import agent_enabled, describe_age, send_if_running, send_to_agent
from lattice_remote.client.cli.common import (
    Json,
    Name,
    complete_settings,
    complete_tasks,
    count,
    here,
    notify,
    print_result,
    progress,
    send_request,
    show_unpushed,
    unpushed,
)
from lattice_remote.client.config import Remote, read_settings
from lattice_remote.client.launcher.install import stop_warm
from lattice_remote.errors import REFUSALS, ConnectionFailed, Misuse, StorageError, one_line

__all__ = ["agent_app", "app"]

app = typer.Typer()

_MIB = 1024 * 1024
_MAX_EDITS = 10
"""Edits that ``status`` names."""


# --- the cache ---


@app.command()
def status(
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 1 unless the cache is current and nothing is pending.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the state of the connection and the cache.

    Exits with 1 if the server refuses this cache or user.

    Example: lattice remote status --exit-code
    """
    if (waiting := unpushed()) is not None:
        show_unpushed(waiting[1], as_json=as_json)
        return
    directory, found = here()
    answer = send_request("status", directory)
    try:
        answer["agent"] = send_if_running({"do": "agent-status"})
    except ConnectionFailed as silent:
        answer["agent"] = {"error": silent.message}
    if as_json:
        print_result(answer)
    else:
        _show_status(found, answer)
    pending = any(answer[what] for what in ("unsent_edits", "withheld_edits", "conflicts", "rescued"))
    if (not answer["connected"] and answer["code"] in REFUSALS) or (exit_code and (pending or not answer["current"])):
        raise typer.Exit(1)


def _show_status(found: Remote, answer: dict[str, Any]) -> None:
    versions, (first_edit, *edits) = answer["versions"], _edits(answer)
    rows = [
        ("remote", f"{found.name} {found.url} project {found.project}"),
        ("connection", _connection(answer)),
        ("cache", _cache(answer)),
        ("large files", _payloads(answer["payloads"])),
        ("acting as", _acting(answer)),
        ("unsent edits", first_edit),
        *(("", line) for line in edits),
        ("conflicts", _conflicts(answer["conflicts"])),
        ("set aside", ", ".join(answer["set_aside"]) or "none"),
        ("rescued", _rescued(answer["rescued"])),
        ("repaired", _repaired(answer["repaired"])),
        ("agent", _agent(answer["agent"])),
        ("versions here", _versions(versions["here"])),
        ("versions there", _versions(versions["server"]) if versions["server"] else "unknown: not connected"),
    ]
    rows += [("note", f"{name} {advice}") for name, advice in (versions["differences"] or {}).items()]
    for label, text in rows:
        typer.echo(f"{label and label + ':':16}{one_line(text)}")


@app.command()
def show(name: Name = "", as_json: Json = False) -> None:
    """Show the remote and the state of the cache.

    Example: lattice remote show
    """
    if (waiting := unpushed(name)) is not None:
        show_unpushed(waiting[1], as_json=as_json)
        return
    directory, found = here(name)
    answer = send_request("status", directory)
    if as_json:
        print_result(answer)
        return
    typer.echo(f"* remote {found.name}\n  URL: {found.url}\n  Project: {found.project}")
    for label, text in (
        ("Acting as", _acting(answer)),
        ("Connection", _connection(answer)),
        ("Cache", _cache(answer)),
    ):
        typer.echo(f"  {label}: {one_line(text)}")


def _connection(answer: dict[str, Any]) -> str:
    heard = answer["last_heard_s"]
    if answer["connected"]:
        return f"connected (last frame {heard} s ago)"
    ago = "no frame from the server yet" if heard is None else f"last frame {describe_age(heard)} ago"
    return f"not connected: {answer['error'] or 'connecting'} ({ago})"


def _cache(answer: dict[str, Any]) -> str:
    here, there = answer["seq"], answer["server_seq"]
    if answer["trouble"]:
        return f"stuck at change {here}: {answer['trouble']}"
    if answer["current"]:
        return f"current (change {here} here, {there} on the server)"
    if there is None:
        age = "never filled" if answer["age_s"] is None else f"{describe_age(answer['age_s'])} old"
        return f"{age} (change {here} here, unknown on the server)"
    return f"catching up (change {here} here, {there} on the server, {count(answer['missing'], 'file')} to fetch)"


def _payloads(found: dict[str, Any]) -> str:
    how = "fetched in the background" if found["mode"] == "background" else "fetched on demand"
    if not found["deferred"]:
        return f"all here ({how})"
    text = f"{count(found['deferred'], 'file')} of {found['deferred_bytes'] / _MIB:.1f} MiB not here ({how})"
    if (now := found["fetching"]) is not None:
        text += f"; fetching {now['path']}, {now['done'] / _MIB:.1f} of {now['total'] / _MIB:.1f} MiB"
    return text + (f"; {found['trouble']}" if found["trouble"] else "")


def _acting(answer: dict[str, Any]) -> str:
    if answer["actor"] is not None:
        return ", ".join([answer["actor"], *answer["act_as"]])
    if answer["has_token"]:
        return f"unknown: {answer['actor_error'] or 'not connected'}"
    return "none: no token; log in with: lattice remote login"


def _edits(answer: dict[str, Any]) -> list[str]:
    """Return a line with the number of unsent edits, and one for each of the first ``_MAX_EDITS``."""
    waits_for, paths = answer["edits_wait_for"], answer["unsent_edits"]
    usual = f"waits for {waits_for}" if waits_for else "sent as soon as it is saved"
    if not paths:
        return [f"none ({f'an edit {usual}' if waits_for else 'each is sent as soon as it is saved'})"]
    why = {path: f"withheld: {reason}" for path, reason in answer["withheld_edits"].items()}
    why |= {path: f"refused: {reason}" for path, reason in answer["refused_edits"].items()}
    lines = [str(len(paths)), *(f"{path}: {why.get(path, usual)}" for path in paths[:_MAX_EDITS])]
    if (more := len(paths) - _MAX_EDITS) > 0:
        lines.append(f"and {more} more; all: lattice remote status --json")
    if answer["withheld_edits"]:
        lines.append("to send withheld edits: lattice remote push --confirm")
        lines.append("to restore the server's texts: lattice remote resolve --all --theirs")
    return lines


def _conflicts(conflicts: list[dict[str, Any]]) -> str:
    named = ", ".join(f"{each['what']} of {each['short_id']}" for each in conflicts)
    return f"{len(conflicts)}: {named}; see: lattice remote resolve" if conflicts else "none"


def _rescued(entries: list[dict[str, Any]]) -> str:
    files = count(sum(len(entry["files"]) for entry in entries), "file")
    return f"{files} in {count(len(entries), 'entry', 'entries')}; see: lattice remote rescued" if entries else "none"


def _repaired(repaired: dict[str, Any]) -> str:
    text = f"{count(repaired['count'], 'file')} since the agent started"
    if repaired["last_path"] is not None:
        text += f", last {repaired['last_path']} {describe_age(repaired['last_age_s'])} ago"
    if repaired["contested"]:
        text += f"; another process keeps writing {', '.join(repaired['contested'][:5])}"
    return f"{text} ({repaired['watched'] or 'not watched: no agent'})"


def _agent(agent: dict[str, Any] | None) -> str:
    if agent is None:
        return "not used"
    return str(agent.get("error") or f"pid {agent['pid']}, {count(len(agent['caches']), 'cache')}")


def _versions(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(found.items()))


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
    what = f"repaired {count(repaired, 'file')} of" if repaired else "nothing to repair in"
    typer.echo(f"Compared with the server at change {answer['seq']}: {what} {count(answer['total'], 'file')}.")


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
        but = f", except {count(len(answer['deferred']), 'file')} not here" if answer["deferred"] else ""
        outcome = f"{count(differences, 'difference')} in" if differences else f"equal{but}, all"
        typer.echo(f"Compared with the server at change {answer['seq']}: {outcome} {count(answer['total'], 'file')}.")
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
    number: Annotated[int, typer.Option("-n", min=1, max=journal_log.MAX_ENTRIES, help="Number of changes.")] = 20,
    as_json: Json = False,
) -> None:
    """List the changes with author, time and token, newest first.

    Example: lattice remote log --task LAT-42 -n 5
    """
    directory, _ = here()
    answer = send_request("log", directory, task=task, limit=number)
    if as_json:
        print_result(journal_log.records(answer, directory))
        return
    for line in journal_log.lines(answer, directory) or ["No changes are kept."]:
        typer.echo(line)


@app.command()
def config(
    name: Annotated[str, typer.Argument(help="A setting: payloads.", autocompletion=complete_settings)] = "",
    value: Annotated[str, typer.Argument(help="background or on-demand.", autocompletion=complete_settings)] = "",
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


# --- large contents ---

_PAYLOADS = "artifacts/payload"
_ARTIFACT = re.compile(r"art_[0-9A-Z]{26}")


@app.command()
def fetch(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH|ARTIFACT|TASK]...",
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
        typer.echo(f"Fetched {count(len(answer['fetched']), 'file')}, {answer['bytes'] / _MIB:.1f} MiB.")
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


# --- the agent ---

agent_app = typer.Typer(
    name="agent", help="Show or stop the background agent.", no_args_is_help=True, rich_markup_mode=None
)
All = Annotated[bool, typer.Option("--all", help="Also agents of this user in other environments.")]


@agent_app.command(name="status")
def agent_status(*, every: All = False, as_json: Json = False) -> None:
    """Show whether the agent runs, and its caches.

    An agent serves the commands with one configuration directory, network, set of mounts, proxy and CA settings.

    Example: lattice remote agent status --all
    """
    answer, others = send_if_running({"do": "agent-status"}), _ask_others("agent-status")
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
    """Stop the agent and the launcher's warm process.

    The next command starts new ones.

    Example: lattice remote agent stop --all
    """
    answer = send_if_running({"do": "agent-stop"})
    typer.echo(f"Stopped the agent (pid {answer['pid']})." if answer else "The agent is not running.")
    for warm in stop_warm(every=every):
        typer.echo(f"Stopped the warm process (pid {warm}).")
    if every:
        for other in _ask_others("agent-stop"):
            typer.echo(other.get("error") or f"Stopped the agent (pid {other['pid']}) of another environment.")
    elif others := _ask_others("agent-status"):
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


def _ask_others(do: str) -> list[dict[str, Any]]:
    """Return the answers of this user's other agents in the same directory; a silent one gives its error."""
    answers: list[dict[str, Any]] = []
    places = []
    with contextlib.suppress(StorageError):
        places = agent_runtime.others(agent_runtime.locate()) if agent_enabled() else []
    for place in places:
        try:
            answer = send_to_agent(place, {"do": do})
        except ConnectionFailed as silent:
            answer = {"error": silent.message, "socket": place.socket}
        if answer is not None:
            answers.append(answer)
    return answers
