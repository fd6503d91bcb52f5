"""``lattice remote ...``: a Typer app over the requests of ``agent/service.py``.

Results go to stdout, everything else to stderr; colours and progress only on a terminal.
"""

import io
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer

from lattice_remote.client.cli.common import Json, print_json, print_remotes
from lattice_remote.errors import Misuse, RemoteError

__all__ = ["FAMILIES", "app_with", "completions", "main"]

_HERE = "lattice_remote.client.cli"
FAMILIES: dict[str, tuple[str, ...]] = {
    "add:app": ("add", "clone"),
    "push:app": ("push",),
    "status:app": ("status", "show"),
    "sync:app": ("pull", "update", "sync", "verify", "log", "config", "fetch"),
    "doctor:app": ("doctor",),
    "watch:app": ("watch",),
    "watch:history_app": ("history",),
    "resolve:app": ("resolve",),
    "resolve:rescued_app": ("rescued",),
    "tokens:app": ("login", "projects", "trust", "logout"),
    "remotes:app": ("list", "get-url", "rename", "set-url", "route", "remove", "rm"),
    "app:mcp_app": ("mcp",),
    "agent:agent_app": ("agent",),
    "agent:launcher_app": ("launcher",),
}
"""Commands by the Typer app that has them, in the order of ``lattice remote --help``.

A command loads its own family only: all of them take as long as the rest of its start.
"""
mcp_app = typer.Typer()


def main(args: Sequence[str], prog_name: str) -> NoReturn:
    """Run ``lattice remote`` with these arguments and exit; an error is one line, or an envelope with ``--json``."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a directory's name may be undecodable: shown as it is
    try:
        app_with(_families_for(args))(args=list(args), prog_name=prog_name)
    except RemoteError as error:
        if "--json" in args:
            print_json({"ok": False, "error": {"code": error.code, "message": error.message}})
        else:
            typer.echo(f"Error: {error.message}", err=True)
        raise SystemExit(1) from None
    raise SystemExit(0)


def _families_for(args: Sequence[str]) -> Sequence[str]:
    """Return the families that a command line needs; all for help, and to suggest a name instead of an unknown one."""
    name = next((argument for argument in args if not argument.startswith("-")), None)
    if name is None and "--help" not in args:
        return ()
    return [family for family, names in FAMILIES.items() if name in names] or tuple(FAMILIES)


def app_with(families: Sequence[str] = tuple(FAMILIES)) -> typer.Typer:
    """Return ``lattice remote`` with the commands of these families."""
    # Without a value for --help, Typer would load Pydantic to convert it.
    of_command = {"help": False}
    defaults: dict[str, Any] = {**of_command, **{name: of_command for names in FAMILIES.values() for name in names}}
    app = typer.Typer(
        add_completion=False,
        context_settings={"default_map": defaults},
        help="Share this project through a server.",
        no_args_is_help=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback(invoke_without_command=True)(_remote)
    for family in families:
        module, _, name = family.partition(":")
        app.add_typer(getattr(import_module(f"{_HERE}.{module}"), name))
    return app


def _remote(
    context: typer.Context,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the URL too.")] = False,
    as_json: Json = False,
) -> None:
    """Share this project through a server. Without a subcommand: list the project's remote."""
    if context.invoked_subcommand is None:
        print_remotes(with_url=verbose, as_json=as_json)


def completions(before: Sequence[str], incomplete: str) -> Iterator[tuple[str, str, str | None]]:
    """Yield each possible value of ``incomplete``, its kind in Click's terms, and its help."""
    from typer._completion_classes import BashComplete
    from typer.main import get_command

    # Any shell's class does: each formats the same completions.
    asked = BashComplete(get_command(app_with()), {}, "lattice remote", "_LATTICE_REMOTE_COMPLETE")
    for item in asked.get_completions(list(before), incomplete):
        yield item.value, item.type, item.help


@mcp_app.command()
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
