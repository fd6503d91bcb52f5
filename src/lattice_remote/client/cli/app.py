"""``lattice remote ...``: a Typer app over the requests of ``agent/service.py``.

Results go to stdout, everything else to stderr; colours and progress only on a terminal.
"""

import io
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, NoReturn

import typer
from typer._completion_classes import BashComplete
from typer.main import get_command

from lattice_remote.client.cli import add, agent, doctor, push, remotes, resolve, status, sync, tokens, watch
from lattice_remote.client.cli.common import Json, print_json
from lattice_remote.errors import Misuse, RemoteError

__all__ = ["app", "completions", "main"]

app = typer.Typer(
    add_completion=False,
    help="Share this project through a server.",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_own = typer.Typer()


def main(args: Sequence[str], prog_name: str) -> NoReturn:
    """Run ``lattice remote`` with these arguments and exit; an error is one line, or an envelope with ``--json``."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a directory's name may be undecodable: shown as it is
    try:
        app(args=list(args), prog_name=prog_name)
    except RemoteError as error:
        if "--json" in args:
            print_json({"ok": False, "error": {"code": error.code, "message": error.message}})
        else:
            typer.echo(f"Error: {error.message}", err=True)
        raise SystemExit(1) from None
    raise SystemExit(0)


@app.callback(invoke_without_command=True)
def remote(
    context: typer.Context,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the URL too.")] = False,
    as_json: Json = False,
) -> None:
    """Share this project through a server. Without a subcommand: list the project's remote."""
    if context.invoked_subcommand is None:
        remotes.print_remotes(with_url=verbose, as_json=as_json)


def completions(before: Sequence[str], incomplete: str) -> Iterator[tuple[str, str, str | None]]:
    """Yield each possible value of ``incomplete``, its kind in Click's terms, and its help."""
    # Any shell's class does: each formats the same completions.
    asked = BashComplete(get_command(app), {}, "lattice remote", "_LATTICE_REMOTE_COMPLETE")
    for item in asked.get_completions(list(before), incomplete):
        yield item.value, item.type, item.help


@_own.command()
def mcp() -> None:
    """Serve lattice's MCP tools and resources over stdio.

    They are those of lattice-mcp; in a project with a remote their writes run on its server. Use this command instead
    of lattice-mcp in the settings of your MCP client.

    Example: claude mcp add lattice -- lattice remote mcp
    """
    try:
        from lattice_remote.client.mcp import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "mcp":
            raise
        raise Misuse("the MCP server needs another package: pip install 'lattice-remote[mcp]'") from None
    serve()


# In the order of ``lattice remote --help``.
for _app in (
    add.app,
    push.app,
    status.app,
    sync.app,
    doctor.app,
    watch.app,
    watch.history_app,
    resolve.app,
    resolve.rescued_app,
    tokens.app,
):
    app.add_typer(_app)
for _app in (remotes.app, _own, agent.agent_app, agent.launcher_app):
    app.add_typer(_app)
