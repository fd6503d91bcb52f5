"""Lattice plugin, loaded at every start of ``lattice`` in every project: it must cost next to nothing.

The rest of this package is imported only when a command is about to run in a cache.
"""

import os
from typing import TYPE_CHECKING, Any

import click
from lattice.storage.fs import LATTICE_DIR, LatticeRootError, find_root

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["register", "remote_directory"]

_AS_IN_GIT = ("clone", "fetch", "log", "pull", "push")
SERVER_ENV = "LATTICE_REMOTE_SERVER"
"""Set in the server's own processes, whose commands must run in place."""


def register(cli_group: click.Group) -> None:
    """Add the ``remote`` command and a hook for all others."""
    if SERVER_ENV in os.environ:
        return
    cli_group.add_command(_RemoteCommand("remote", help="Share this project through a server.", add_help_option=False))
    resolve = cli_group.resolve_command

    def resolve_command(ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            name, command, rest = resolve(ctx, args)
        except click.UsageError as error:
            if args and args[0] in _AS_IN_GIT:
                hint = f"{error.message} Did you mean: lattice remote {args[0]}?"
                raise click.UsageError(hint, error.ctx) from None
            raise
        directory = remote_directory() if command is not None and name != "remote" else None
        if directory is not None and command is not None and ctx.resilient_parsing:  # for a shell's completion
            from lattice_remote.client.tasks import completing

            command = completing(command, directory)
        elif directory is not None and name is not None and command is not None:
            from lattice_remote.client.routing import hooked

            command = hooked(command, (name,), directory, args)
        return name, command, rest

    cli_group.resolve_command = resolve_command  # type: ignore[method-assign]


def remote_directory() -> str | None:
    """Return the surrounding ``.lattice``, found as lattice finds it, if it is a cache or waits for a push.

    Raises:
        ClickException: it is another user's.
    """
    try:
        root = find_root()
    except (LatticeRootError, OSError):
        return None  # lattice itself reports the error
    if root is None:
        return None
    # LATTICE_ROOT may be relative, and the agent has another directory.
    directory = os.path.abspath(os.path.join(root, LATTICE_DIR))
    # A project that waits to be pushed has another file, so that other programs see a local project.
    # ``cache_state.json`` alone is a cache whose remote.json git or the user has removed: no local project (I4).
    files = ("remote.json", ".remote/unpushed.json", "cache_state.json")
    if any(os.path.isfile(os.path.join(directory, name)) for name in files):
        return directory
    if not os.access(directory, os.R_OK | os.X_OK):
        raise click.ClickException(f"cannot read {directory}: permission denied; see: lattice remote doctor")
    return None


class _RemoteCommand(click.Command):
    """``lattice remote``: a Typer app, loaded on use."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:  # noqa: ARG002 - Click's signature
        """Return none: ``--help`` and every option belong to Typer."""
        return []

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return ctx.args

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem

        from lattice_remote.client.cli.app import completions

        return [
            CompletionItem(value, type=kind, help=help_) for value, kind, help_ in completions(ctx.args, incomplete)
        ]

    def invoke(self, ctx: click.Context) -> Any:
        from lattice_remote.client.cli.app import main

        main(ctx.args, prog_name=ctx.command_path)
