"""``lattice remote agent`` and ``launcher``: the processes in the background."""

import contextlib
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from lattice_remote.client import agent_runtime
from lattice_remote.client.agent_client import agent_enabled, describe_age, send_if_running, send_to_agent
from lattice_remote.client.cli.common import Json, print_result
from lattice_remote.client.launcher import install as launcher
from lattice_remote.errors import ConnectionFailed, StorageError
from lattice_remote.output import counted

__all__ = ["agent_app", "launcher_app"]


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
    for warm in launcher.stop_warm(every=every):
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
    return f"{counted(len(others), 'more agent')} of this user {'runs' if len(others) == 1 else 'run'}"


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
    """Return the answers of this user's other agents; a silent one gives its error."""
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


launcher_app = typer.Typer(
    name="launcher",
    help="Run commands in a warm process: about five times faster.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Directory = Annotated[Path | None, typer.Option("--dir", metavar="DIR", help="Directory of the launcher.")]
_MIB = 1024 * 1024


@launcher_app.command()
def install(directory: Directory = None, as_json: Json = False) -> None:
    """Install an executable 'lattice' that uses a warm process.

    It hands commands in a cache to that process and runs every other command with the real lattice. Put its directory
    first on the PATH.

    Example: lattice remote launcher install --dir ~/.local/lattice/bin
    """
    path = launcher.install(directory or launcher.default_directory())
    place = _place(path)
    if as_json:
        print_result({"launcher": str(path), "lattice": launcher.real_lattice(), **place})
        return
    typer.echo(f"Installed {path}.")
    _advise(path, place)


@launcher_app.command()
def status(directory: Directory = None, as_json: Json = False) -> None:
    """Show the launcher, its place on the PATH, and the warm process.

    Exits with 1 if it is not in use.

    Example: lattice remote launcher status --json
    """
    path = (directory or launcher.default_directory()) / launcher.NAME
    first = launcher.first_on_path()
    if directory is None and first is not None and launcher.is_ours(first):
        path = first
    is_installed = launcher.is_ours(path)
    place = _place(path)
    warm = launcher.find_warm()
    if as_json:
        running = (
            None
            if warm is None
            else {"pid": warm.pid, "memory_bytes": warm.memory_bytes, "uptime_s": round(warm.uptime_s, 1)}
        )
        print_result(
            {
                "installed": is_installed,
                "launcher": str(path),
                "lattice": launcher.real_lattice(),
                **place,
                "warm": running,
            }
        )
    elif not is_installed:
        typer.echo("No launcher is installed; to install it: lattice remote launcher install")
    else:
        typer.echo(f"launcher {path}, for {launcher.real_lattice()}")
        _advise(path, place)
        if warm is None:
            typer.echo("The warm process is not running; a command in a cache starts it.")
        else:
            memory = f"{warm.memory_bytes / _MIB:.0f} MiB of its own"
            typer.echo(f"warm process: pid {warm.pid}, up {describe_age(warm.uptime_s)}, {memory}")
    if not is_installed or not place["first"]:
        raise typer.Exit(1)


@launcher_app.command()
def remove(directory: Directory = None, as_json: Json = False) -> None:
    """Remove the launcher and stop its warm process.

    Commands then run as before.

    Example: lattice remote launcher remove
    """
    path = launcher.remove(directory or launcher.default_directory())
    stopped = launcher.stop_warm()
    if as_json:
        print_result({"removed": None if path is None else str(path), "stopped": stopped})
        return
    typer.echo("No launcher is installed." if path is None else f"Removed {path}.")
    for pid in stopped:
        typer.echo(f"Stopped the warm process (pid {pid}).")
    if path is not None:
        typer.echo("A shell that is open remembers its path; in bash: hash -r")


def _place(path: Path) -> dict[str, Any]:
    first = launcher.first_on_path()
    is_first = first is not None and _same(first, path)
    return {"first": is_first, "before": None if is_first or first is None else str(first)}


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _advise(path: Path, place: dict[str, Any]) -> None:
    if place["first"]:
        typer.echo("It is the first lattice on the PATH.")
        return
    if str(path.parent) in os.environ.get("PATH", "").split(os.pathsep):
        typer.echo(f"Another lattice comes first on the PATH: {place['before']}")
    typer.echo("Add this line at the end of your shell's profile, for example ~/.bashrc:")
    typer.echo(f"  {launcher.path_line(path.parent)}")
