"""``lattice remote agent``: the background processes of this user, one in each environment in use."""

import contextlib
from typing import Annotated, Any

import typer

from lattice_remote.client import runtime
from lattice_remote.client.agent_client import agent_enabled, ask_agent, ask_running_agent
from lattice_remote.client.commands.shared import Json, count, print_result
from lattice_remote.client.freshness import describe_age
from lattice_remote.errors import ConnectionFailed, StorageError

__all__ = ["app", "running_agent"]

app = typer.Typer(name="agent", help="The background agent of this user.", no_args_is_help=True, rich_markup_mode=None)
All = Annotated[bool, typer.Option("--all", help="Also agents of this user in other environments.")]


@app.command(name="status")
def agent_status(*, every: All = False, as_json: Json = False) -> None:
    """Say whether the agent runs, and which caches it looks after.

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


@app.command(name="stop")
def agent_stop(*, every: All = False) -> None:
    """End the agent; the next command starts a new one.

    Example: lattice remote agent stop --all
    """
    answer = ask_running_agent({"do": "agent-stop"})
    typer.echo(f"Stopped the agent (pid {answer['pid']})." if answer else "The agent is not running.")
    if every:
        for other in _ask_others("agent-stop"):
            typer.echo(other.get("error") or f"Stopped the agent (pid {other['pid']}) of another environment.")
    elif others := _others():
        typer.echo(f"{_count(others)} in other environments; to end all: lattice remote agent stop --all")


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
        place = runtime.locate()
        runtime.prepare(place)
    except StorageError as error:
        return f"there is no place for it: {error.message}"
    return f"it starts with the next command; log: {place.log}"


def running_agent() -> dict[str, Any] | None:
    return ask_running_agent({"do": "agent-status"})


def _others() -> list[dict[str, Any]]:
    return _ask_others("agent-status")


def _ask_others(do: str) -> list[dict[str, Any]]:
    """Return the answers of this user's other agents in the same directory; of a silent one, that it is."""
    answers: list[dict[str, Any]] = []
    places = []
    with contextlib.suppress(StorageError):
        places = runtime.others(runtime.locate()) if agent_enabled() else []
    for place in places:
        try:
            answer = ask_agent(place, {"do": do})
        except ConnectionFailed as silent:
            answer = {"error": silent.message, "socket": place.socket}
        if answer is not None:
            answers.append(answer)
    return answers
