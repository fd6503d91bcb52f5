"""``lattice remote add``, ``clone``, ``show``, ``set-url``, ``route`` and ``remove``: the remote of this directory."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Annotated

import typer

from lattice_remote.client import credentials, trusted_servers
from lattice_remote.client.agent_client import ask
from lattice_remote.client.cli import add as adding
from lattice_remote.client.cli import common, push
from lattice_remote.client.cli import remove as leaving
from lattice_remote.client.cli.common import (
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
    show_unpushed,
    unpushed,
    warn_of_tracking,
)
from lattice_remote.client.cli.tokens import ask_for_token
from lattice_remote.client.config import UNPUSHED_FILE, Remote, check_command, parse_url, write_remote
from lattice_remote.errors import Misuse, RemoteError, one_line

__all__ = ["app"]

app = typer.Typer()


Token = Annotated[
    str | None, typer.Option(help="Stored for this user; - prompts for it. Else LATTICE_TOKEN or a login.")
]


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Its name, usually origin.")],
    url: Annotated[str, typer.Argument(help="http://HOST:PORT or https://HOST, also with /SLUG.")],
    *,
    project: Annotated[str | None, typer.Option(help="The project's slug on the server.")] = None,
    token: Token = None,
    ca_file: CaFile = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Make this directory a cache of a project on a server.

    If the directory has tasks and the server's project has none, continue with: lattice remote push.

    Example: lattice remote add origin https://board.example.org --project web
    """
    root = project_directory()
    server, slug = _named_server(url, project, ca_file=ca_file, insecure=insecure)
    own = adding.own_project(os.path.join(root, ".lattice"))
    with _given(token, server) as given:
        if own is not None:
            remote = asyncio.run(push.await_push(os.path.join(root, ".lattice"), name, server, slug, given, own=own))
            _print_unpushed(remote, own, as_json=as_json)
            warn_of_tracking(os.path.join(root, ".lattice"))
            return
        with _signals_interrupt(), progress("fetching") as show:
            added = asyncio.run(adding.add_remote(root, name, server, project=slug, token=given, show=show))
        _print_added(added, f"Added remote {added.remote.name}", as_json=as_json)


@app.command()
def clone(
    url: Annotated[str, typer.Argument(help="The project: https://HOST/SLUG.")],
    directory: Annotated[str, typer.Argument(metavar="[DIR]", help="A new or empty one; SLUG by default.")] = "",
    *,
    name: Annotated[str, typer.Option(help="Name of the remote.")] = "origin",
    token: Token = None,
    ca_file: CaFile = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Create a new directory with a cache of a project.

    Example: lattice remote clone https://board.example.org/web
    """
    server, slug = _named_server(url, None, ca_file=ca_file, insecure=insecure)
    target = os.path.abspath(directory or slug)
    with _given(token, server) as given:
        with _signals_interrupt(), progress("fetching") as show:
            added = asyncio.run(adding.clone(target, name, server, project=slug, token=given, show=show))
        _print_added(added, f"Cloned into {one_line(directory or slug)}", as_json=as_json)


def _named_server(
    url: str, project: str | None, *, ca_file: str | None, insecure: bool
) -> tuple[trusted_servers.Server, str]:
    """Return the server and project of a command line; the token may be sent there."""
    server_url, slug = parse_url(url, project)
    if slug is None:
        raise Misuse("which project? Give --project SLUG, or a URL that ends in /SLUG")
    server = trusted_servers.name(server_url, insecure=insecure, ca_file=ca_file)
    trusted_servers.admit(server_url, server)  # before any prompt
    return server, slug


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Handle a closing terminal or ``kill`` like Ctrl-C while a directory is filled, so that nothing is left behind.

    Ignored signals (``nohup``) stay ignored. Outside the main thread nothing changes.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(_number: int, frame: FrameType | None) -> None:
    handler = signal.getsignal(signal.SIGINT)  # a running loop's own, which cancels its task
    if not callable(handler):  # ignored, as for a script's background job
        raise KeyboardInterrupt
    handler(signal.SIGINT, frame)


@contextlib.contextmanager
def _given(token: str | None, server: trusted_servers.Server) -> Iterator[str | None]:
    """Yield the token of a command line, prompting if requested; warn if others can see it."""
    yield ask_for_token(server.url) if token == "-" else token  # noqa: S105 - no token
    if token not in (None, "-"):
        typer.echo(
            "lattice-remote: others on this machine can see a token in a command line; --token - prompts for it",
            err=True,
        )


def _print_added(added: adding.Added, what: str, *, as_json: bool) -> None:
    with contextlib.suppress(RemoteError):
        ask(request("ready", added.directory))  # the agent follows from here on
    if as_json:
        print_result({**fields_of(added.remote), "tasks": added.tasks, "files": added.files, "seq": added.seq})
    else:
        typer.echo(
            f"{what} ({added.remote.url}, project {added.remote.project}): "
            f"{count(added.tasks, 'task')}, {count(added.files, 'file')}, at change {added.seq}."
        )
    warn_of_tracking(added.directory)


def _print_unpushed(remote: Remote, own: str, *, as_json: bool) -> None:
    if as_json:
        print_result({**fields_of(remote), "pushed": False})
        return
    typer.echo(f"Added remote {remote.name} ({remote.url}, project {remote.project}), which is empty.")
    typer.echo(
        f"This directory's project ({own}) is not pushed yet. Next: lattice remote push; "
        "--dry-run shows what would be sent."
    )


@app.command()
def show(name: Annotated[str, typer.Argument()] = "", as_json: Json = False) -> None:
    """Show the remote and the state of the cache.

    Example: lattice remote show
    """
    if (waiting := unpushed(name)) is not None:
        show_unpushed(waiting[1], as_json=as_json)
        return
    directory, found = here(name)
    status = ask(request("status", directory))
    if as_json:
        print_result(status)
        return
    typer.echo(f"* remote {found.name}")
    typer.echo(f"  URL: {found.url}")
    typer.echo(f"  Project: {found.project}")
    typer.echo(f"  Acting as: {one_line(common.acting(status))}")
    typer.echo(f"  Connection: {one_line(common.connection(status))}")
    typer.echo(f"  Cache: {one_line(common.cache(status))}")


@app.command(name="set-url")
def set_url(
    name: str,
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
    typer.echo(f"{found.name} is now {new_url} {slug or found.project}; the cache is compared with it at the next use.")


def _reuse_token(old: Remote, new: Remote) -> None:
    """Reuse the token of a renamed project; never on another server."""
    if old.url == new.url and old.project in credentials.projects(old.url):
        token = credentials.stored(old.url, old.project)
        if token is not None and new.project not in credentials.projects(new.url):
            credentials.store(new.url, new.project, token)


@app.command()
def route(
    words: Annotated[list[str] | None, typer.Argument(metavar="COMMAND", help="A plugin's command: its words.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Run it here again.")] = False,
    as_json: Json = False,
) -> None:
    """Run a command of a lattice plugin on the server, which must have the plugin too. Without arguments: list them.

    Stored in .lattice/remote.json, for all users of this directory. The server's administrator allows the command under
    "plugin_commands" in its config.json.

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
def remove(
    name: str,
    keep_local: Annotated[
        bool, typer.Option("--keep-local", help="Keep the files: the directory is a plain local project again.")
    ] = False,
    hooks: Annotated[
        bool | None,
        typer.Option("--keep-hooks/--no-hooks", help="With --keep-local: keep the server's hooks, or leave them out."),
    ] = None,
) -> None:
    """Remove the remote and its cache from this directory. Refused while something exists only here.

    Example: lattice remote remove origin --keep-local
    """
    if (waiting := unpushed(name)) is not None:
        push.stay_local(waiting[0])
        typer.echo(f"Removed remote {name}; the project was not pushed, and stays here as it is.")
        return
    directory, found = here(name)
    if keep_local:
        _keep_local(directory, found, hooks=hooks)
        return
    _require_nothing_else_of_ours(directory)
    leaving.remove_remote(directory, found)
    typer.echo(f"Removed remote {found.name} and the cache of {found.project}; nothing changes on the server.")


def _keep_local(directory: str, found: Remote, *, hooks: bool | None) -> None:
    """Complete the project's files, update them if the server is reachable, and make the directory a local project."""
    try:
        number = f"change {ask(request('pull', directory))['seq']}"
    except RemoteError as error:
        if error.code == "REMOTE_STORAGE":
            raise
        typer.echo(f"lattice-remote: {one_line(error.message)}; the files stay as last received", err=True)
        number = "the last received change"
    else:
        _require_nothing_else_of_ours(directory)
    left = asyncio.run(leaving.keep_local(directory, found, hooks=hooks))
    typer.echo(f"Removed remote {found.name}; this is a local project now, as it was at {number}.")
    if left:
        typer.echo(f"Kept besides: {', '.join(map(one_line, left[:5]))}", err=True)


def _require_nothing_else_of_ours(directory: str) -> None:
    """Raise ``Misuse`` if a reachable server has different texts, or lacks those here."""
    try:
        answer = ask(request("verify", directory))
    except RemoteError:
        return  # edited plans and notes are known without the server
    if own := [*answer["differing"], *answer["surplus"]]:
        raise Misuse(f"not as on the server: {', '.join(own[:5])}; save your own texts, then: lattice remote sync")
