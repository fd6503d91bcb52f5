"""``lattice remote launcher``: an executable ``lattice`` that needs no new interpreter for each command."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from lattice_remote.client.agent_client import describe_age
from lattice_remote.client.cli.common import Json, print_result
from lattice_remote.client.launcher import install as launcher

__all__ = ["app"]

app = typer.Typer(
    name="launcher",
    help="Run commands in a warm process: about five times faster.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Directory = Annotated[Path | None, typer.Option("--dir", metavar="DIR", help="Directory of the launcher.")]
_MIB = 1024 * 1024


@app.command()
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


@app.command()
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


@app.command()
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
    """Return whether a shell runs the launcher, and the ``lattice`` that it runs instead."""
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
