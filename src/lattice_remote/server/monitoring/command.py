"""``lattice-remote status``."""

import msgspec
import typer

from lattice_remote.errors import StorageError
from lattice_remote.server.admin.commands import DataOption, JsonOption
from lattice_remote.server.data.datadir import DataDir, default_location
from lattice_remote.server.monitoring.showing import as_lines
from lattice_remote.server.monitoring.status import ServerStatus, stopped_status
from lattice_remote.server.monitoring.statussocket import ask

__all__ = ["NOT_RUNNING", "app"]

app = typer.Typer()

NOT_RUNNING = 3
"""The exit code when no server runs, as with ``systemctl status``."""


@app.command()
def status(context: typer.Context, as_json: JsonOption = False, data: DataOption = None) -> None:
    """Show how the server is: its projects, and who is connected and how far behind.

    Asks the server that runs on the data directory, as the same user, and exits with 0.
    Where none runs it exits with 3, and the files tell of the projects.

    Example: lattice-remote --data ./board status --json
    """
    target = DataDir(data or context.find_root().obj or default_location())
    target.config()
    told = ask(target.path)
    found = stopped_status(target) if told is None else _decoded(told)
    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
    else:
        typer.echo("\n".join(as_lines(found)))
    raise typer.Exit(0 if found.running else NOT_RUNNING)


def _decoded(told: bytes) -> ServerStatus:
    """Raises StorageError: the server has broken off, or is of a version that tells less."""
    try:
        return msgspec.json.decode(told, type=ServerStatus)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise StorageError("the server did not say how it is; its log says why, unless it is older than this") from None
