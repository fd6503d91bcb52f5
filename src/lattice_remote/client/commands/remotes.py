"""``lattice remote add``, ``show``, ``set-url``, ``remove``: which server this directory is a copy of."""

import asyncio
import contextlib
import dataclasses
from typing import Annotated

import typer

from lattice_remote.client import servers
from lattice_remote.client.agent_client import ask
from lattice_remote.client.commands import adding, describe
from lattice_remote.client.commands.shared import (
    CaFile,
    Insecure,
    Json,
    count,
    fields_of,
    here,
    print_result,
    progress,
    project_directory,
    request,
)
from lattice_remote.client.commands.tokens import ask_for_token
from lattice_remote.client.settings import check_command, parse_url, write_remote
from lattice_remote.errors import Misuse, RemoteError, one_line

__all__ = ["app"]

app = typer.Typer()


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="What to call it: origin, by habit.")],
    url: Annotated[str, typer.Argument(help="http://HOST:PORT or https://HOST, also with /SLUG.")],
    *,
    project: Annotated[str | None, typer.Option(help="The project's slug on the server.")] = None,
    token: Annotated[
        str | None, typer.Option(help="Kept for this user; - asks for it. Else LATTICE_TOKEN or a login.")
    ] = None,
    ca_file: CaFile = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Make this directory a copy of a project on a server.

    Example: lattice remote add origin https://board.example.org --project web
    """
    root = project_directory()
    server_url, slug = parse_url(url, project)
    server = servers.name(server_url, insecure=insecure, ca_file=ca_file)
    servers.admit(server_url, server)  # before anything is asked for
    is_visible = token not in (None, "-")
    if token == "-":  # noqa: S105 - no token
        token = ask_for_token(server_url)
    with progress("fetching") as show:
        added = asyncio.run(adding.add_remote(root, name, server, project=slug, token=token, show=show))
    with contextlib.suppress(RemoteError):
        ask(request("ready", added.directory))  # from here on the agent follows
    if as_json:
        print_result({**fields_of(added.remote), "tasks": added.tasks, "files": added.files, "seq": added.seq})
    else:
        typer.echo(
            f"Added remote {added.remote.name} ({added.remote.url}, project {added.remote.project}): "
            f"{count(added.tasks, 'task')}, {count(added.files, 'file')}, at change {added.seq}."
        )
    if is_visible:
        typer.echo(
            "lattice-remote: others on this machine can see a token in a command line; --token - asks for it", err=True
        )


@app.command()
def show(name: Annotated[str, typer.Argument()] = "", as_json: Json = False) -> None:
    """Show where the remote is and how the copy stands.

    Example: lattice remote show
    """
    directory, found = here(name)
    status = ask(request("status", directory))
    if as_json:
        print_result(status)
        return
    typer.echo(f"* remote {found.name}")
    typer.echo(f"  URL: {found.url}")
    typer.echo(f"  Project: {found.project}")
    typer.echo(f"  Acting as: {one_line(describe.acting(status))}")
    typer.echo(f"  Connection: {one_line(describe.connection(status))}")
    typer.echo(f"  Copy: {one_line(describe.copy(status))}")


@app.command(name="set-url")
def set_url(
    name: str,
    url: str,
    project: Annotated[str | None, typer.Option(help="The project's slug there, if it is another.")] = None,
    ca_file: CaFile = None,
    insecure: Insecure = False,
) -> None:
    """Change where the remote is, after its server has moved.

    Example: lattice remote set-url origin https://new.example.org
    """
    directory, found = here(name)
    new_url, slug = parse_url(url, project)
    servers.record(servers.name(new_url, insecure=insecure, ca_file=ca_file))
    write_remote(directory, dataclasses.replace(found, url=new_url, project=slug or found.project))
    typer.echo(
        f"{found.name} is now {new_url} {slug or found.project}; the copy is compared with it when it is next used."
    )


@app.command()
def route(
    words: Annotated[list[str] | None, typer.Argument(metavar="COMMAND", help="A plugin's command: its words.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Run it here again.")] = False,
    as_json: Json = False,
) -> None:
    """Run a command of a lattice plugin on the server, which must have the plugin too. Without one: list them.

    Kept in .lattice/remote.json, for everybody who has this directory. The server's administrator allows the command
    under "plugin_commands" in its config.json.

    Example: lattice remote route deploy note
    """
    directory, found = here()
    if words:
        command = check_command(" ".join(words))
        others = tuple(known for known in found.commands if known != command)
        found = dataclasses.replace(found, commands=others if local else (*others, command))
        write_remote(directory, found)
    if as_json:
        print_result({"commands": list(found.commands)})
    elif words:
        typer.echo(f"lattice {command} runs {'here' if local else 'on the server'} from now on.")
    else:
        for command in found.commands:
            typer.echo(command)


@app.command()
def remove(name: str) -> None:
    """Take the remote and its copy out of this directory. Refused while something is only here.

    Example: lattice remote remove origin
    """
    directory, found = here(name)
    _require_nothing_else_of_ours(directory)
    adding.remove_remote(directory, found)
    typer.echo(f"Removed remote {found.name} and the copy of {found.project}; nothing changes on the server.")


def _require_nothing_else_of_ours(directory: str) -> None:
    """Raise ``Misuse`` if the server, where it is in reach, has other texts than are here, or none."""
    try:
        answer = ask(request("verify", directory))
    except RemoteError:
        return  # nobody can tell; edited plans and notes are known without it
    if own := [*answer["differing"], *answer["surplus"]]:
        raise Misuse(
            f"not as on the server: {', '.join(own[:5])}; keep a copy of what is yours, then: lattice remote sync"
        )
