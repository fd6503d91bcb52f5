"""``lattice remote agent``: the background process of this user."""

from typing import Any

import typer

from lattice_remote.client import runtime
from lattice_remote.client.agent_client import agent_enabled, ask_running_agent
from lattice_remote.client.commands.shared import Json, print_result
from lattice_remote.client.freshness import describe_age
from lattice_remote.errors import StorageError

__all__ = ["app", "running_agent"]

app = typer.Typer(name="agent", help="The background agent of this user.", no_args_is_help=True, rich_markup_mode=None)


@app.command(name="status")
def agent_status(as_json: Json = False) -> None:
    """Say whether the agent runs, and which copies it looks after.

    Example: lattice remote agent status
    """
    answer = running_agent()
    if as_json:
        print_result({"running": answer is not None, **(answer or {})})
    elif answer is None:
        typer.echo(f"The agent is not running ({_why_not()}).")
    else:
        typer.echo(f"pid {answer['pid']}, version {answer['version']}, up {describe_age(answer['uptime_s'])}")
        typer.echo(f"socket {answer['socket']}, log {answer['log']}")
        for cache in answer["caches"]:
            how = "connected" if cache["connected"] else "not connected"
            typer.echo(f"{cache['directory']}: {cache['url']} {cache['project']}, {how}, at change {cache['seq']}")


@app.command(name="stop")
def agent_stop() -> None:
    """End the agent; the next command starts a new one.

    Example: lattice remote agent stop
    """
    answer = ask_running_agent({"do": "agent-stop"})
    typer.echo(f"Stopped the agent (pid {answer['pid']})." if answer else "The agent is not running.")


def _why_not() -> str:
    if not agent_enabled():
        return "switched off"
    place = runtime.locate()
    try:
        runtime.prepare(place)
    except StorageError as error:
        return f"there is no place for it: {error.message}"
    return f"it starts with the next command; log: {place.log}"


def running_agent() -> dict[str, Any] | None:
    return ask_running_agent({"do": "agent-status"})
