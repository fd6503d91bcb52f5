"""``lattice remote list``, ``get-url``, ``set-url``, ``rename`` and ``route``: this directory's ``remote.json``."""

import dataclasses
from typing import Annotated

import typer

from lattice_remote.client import credentials, trusted_servers
from lattice_remote.client.cli import push
from lattice_remote.client.cli.common import (
    CaFile,
    Insecure,
    Json,
    Name,
    complete_remotes,
    fields_of,
    here,
    lattice_directory,
    print_result,
    unpushed,
)
from lattice_remote.client.config import (
    REMOTE_FILE,
    UNPUSHED_FILE,
    Remote,
    check_command,
    check_name,
    is_cache,
    parse_url,
    read_remote,
    write_remote,
)

__all__ = ["app", "print_remotes"]

app = typer.Typer()


@app.command(name="list")
def list_remotes(as_json: Json = False) -> None:
    """List the project's remote, with its URL.

    Example: lattice remote list --json
    """
    print_remotes(with_url=True, as_json=as_json)


def print_remotes(*, with_url: bool, as_json: bool) -> None:
    directory, waiting = lattice_directory(), unpushed()
    found = waiting[1] if waiting else read_remote(directory) if directory and is_cache(directory) else None
    if as_json:
        print_result({"remotes": [fields_of(found) | ({"pushed": False} if waiting else {})] if found else []})
    elif found is not None:
        typer.echo(f"{found.name}\t{found.place}" if with_url else found.name)


@app.command(name="get-url")
def get_url(name: Name = "", as_json: Json = False) -> None:
    """Print the remote's URL, as clone accepts it.

    Example: lattice remote get-url origin
    """
    _, found = unpushed(name) or here(name)
    if as_json:
        print_result(fields_of(found))
    else:
        typer.echo(found.place)


@app.command()
def rename(
    old: Annotated[str, typer.Argument(help="The remote's name.", autocompletion=complete_remotes)],
    new: Annotated[str, typer.Argument(help="Its new name.")],
) -> None:
    """Rename the remote. Its URL, its project and the cache stay.

    Example: lattice remote rename origin team
    """
    waiting = unpushed(old)
    directory, found = waiting or here(old)
    remote = dataclasses.replace(found, name=check_name(new))
    write_remote(directory, remote, UNPUSHED_FILE if waiting else REMOTE_FILE)
    typer.echo(f"{old} is now called {new}.")


@app.command(name="set-url")
def set_url(
    name: Annotated[str, typer.Argument(help="The remote's name.", autocompletion=complete_remotes)],
    url: str,
    project: Annotated[str | None, typer.Option(help="The project's slug there, if different.")] = None,
    ca_file: CaFile = None,
    insecure: Insecure = False,
) -> None:
    """Change the remote's URL, after its server has moved.

    Example: lattice remote set-url origin https://new.example.org
    """
    waiting = unpushed(name)
    directory, found = waiting or here(name)
    new_url, slug = parse_url(url, project)
    trusted_servers.record(trusted_servers.name(new_url, insecure=insecure, ca_file=ca_file))
    remote = dataclasses.replace(found, url=new_url, project=slug or found.project)
    _reuse_token(found, remote)
    if waiting is not None:
        push.stay_local(directory)  # a request to the old server is void
        write_remote(directory, remote, UNPUSHED_FILE)
        typer.echo(f"{found.name} is now {new_url} {remote.project}; next: lattice remote push")
        return
    write_remote(directory, remote)
    typer.echo(f"{found.name} is now {new_url} {remote.project}; the cache is compared with it at the next use.")


def _reuse_token(old: Remote, new: Remote) -> None:
    """Reuse the token of a renamed project; never on another server."""
    known, token = credentials.projects(old.url), credentials.stored(old.url, old.project)
    if old.url == new.url and old.project in known and new.project not in known and token is not None:
        credentials.store(new.url, new.project, token)


@app.command()
def route(
    words: Annotated[list[str] | None, typer.Argument(metavar="COMMAND", help="A plugin's command: its words.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Run it here again.")] = False,
    as_json: Json = False,
) -> None:
    """Run a plugin's command on the server, or list those that do.

    The server must have the plugin too, and its administrator allows the command under "plugin_commands" in its
    config.json. Stored in .lattice/remote.json, for all users of this directory.

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
