"""``lattice remote list``, ``get-url``, ``set-url``, ``rename``, ``route`` and ``remove``."""

import asyncio
import contextlib
import json
import os
import uuid
from typing import Annotated, Any

import typer

from lattice_remote.client import credentials, trusted_servers
from lattice_remote.client.cache.cache import GITIGNORE, LOCKS_FILE, STATE_FILE, Cache
from lattice_remote.client.cache.edits import CONFLICTS_DIRECTORY, Edits, TextConflicts
from lattice_remote.client.cache.rescued_files import RESCUED_DIRECTORY, RescuedFiles
from lattice_remote.client.cache.safe_directory import remove_tree
from lattice_remote.client.cli import push
from lattice_remote.client.cli.common import (
    CaFile,
    Insecure,
    Json,
    Name,
    complete_remotes,
    fields_of,
    here,
    notify,
    print_remotes,
    print_result,
    send_request,
    unpushed,
)
from lattice_remote.client.config import (
    PRIVATE_DIRECTORY,
    REMOTE_FILE,
    UNPUSHED_FILE,
    Remote,
    check_command,
    check_name,
    parse_url,
    write_remote,
)
from lattice_remote.errors import Misuse, RemoteError, StorageError, one_line

__all__ = ["app"]

app = typer.Typer()


@app.command(name="list")
def list_remotes(as_json: Json = False) -> None:
    """List the project's remote, with its URL.

    Example: lattice remote list --json
    """
    print_remotes(with_url=True, as_json=as_json)


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
    old: Annotated[str, typer.Argument(metavar="OLD", help="The remote's name.", autocompletion=complete_remotes)],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Its new name.")],
    as_json: Json = False,
) -> None:
    """Rename the remote. Its URL, its project and the cache stay.

    Example: lattice remote rename origin team
    """
    waiting = unpushed(old)
    directory, found = waiting or here(old)
    remote = found._replace(name=check_name(new))
    write_remote(directory, remote, UNPUSHED_FILE if waiting else REMOTE_FILE)
    if as_json:
        print_result(fields_of(remote))
    else:
        typer.echo(f"{old} is now called {new}.")


@app.command(name="set-url")
def set_url(  # noqa: PLR0917 - Typer calls it
    name: Annotated[str, typer.Argument(metavar="NAME", help="The remote's name.", autocompletion=complete_remotes)],
    url: Annotated[str, typer.Argument(metavar="URL", help="Its new address: http://HOST:PORT or https://HOST.")],
    project: Annotated[str | None, typer.Option(metavar="SLUG", help="The project's slug there, if different.")] = None,
    ca_file: CaFile = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Change the remote's URL, after its server has moved.

    Example: lattice remote set-url origin https://new.example.org
    """
    waiting = unpushed(name)
    directory, found = waiting or here(name)
    new_url, slug = parse_url(url, project)
    trusted_servers.record(trusted_servers.name(new_url, insecure=insecure, ca_file=ca_file))
    remote = found._replace(url=new_url, project=slug or found.project)
    _reuse_token(found, remote)
    if waiting is not None:
        push.stay_local(directory)  # a request to the old server is void
        write_remote(directory, remote, UNPUSHED_FILE)
        follows = "next: lattice remote push"
    else:
        write_remote(directory, remote)
        follows = "the cache is compared with it at the next use."
    if as_json:
        print_result(fields_of(remote))
    else:
        typer.echo(f"{found.name} is now {new_url} {remote.project}; {follows}")


def _reuse_token(old: Remote, new: Remote) -> None:
    """Reuse the token of a renamed project, never for another server."""
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
        if not local and _is_lattices(words):
            raise Misuse(f"lattice {command} is lattice's own command, not a plugin's; where it runs is fixed")
        others = tuple(known for known in found.commands if known != command)
        found = found._replace(commands=others if local else (*others, command))
        write_remote(directory, found)
    if as_json:
        print_result({"commands": list(found.commands)})
    elif words:
        typer.echo(f"lattice {command} runs {'here' if local else 'on the server'} from now on.")
    else:
        for command in found.commands:
            typer.echo(command)


def _is_lattices(words: list[str]) -> bool:
    from lattice.cli.main import cli

    from lattice_remote.client.routing import is_plugins

    command: Any = cli
    for word in words:
        command = getattr(command, "commands", {}).get(word)
    return command is not None and not is_plugins(command)


@app.command(name="rm", hidden=True, help="As remove. Example: lattice remote rm origin")
@app.command()
def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The remote's name.", autocompletion=complete_remotes)],
    keep_local: Annotated[
        bool, typer.Option("--keep-local", help="Keep the files: the directory is a plain local project again.")
    ] = False,
    hooks: Annotated[
        bool | None,
        typer.Option("--keep-hooks/--no-hooks", help="With --keep-local: keep or omit the server's hooks."),
    ] = None,
) -> None:
    """Remove the remote and its cache from this directory.

    Refused while something exists only here.

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
    _require_only_the_servers(directory)
    _remove(directory, found)
    typer.echo(f"Removed remote {found.name} and the cache of {found.project}; nothing changes on the server.")


def _require_only_the_servers(directory: str) -> None:
    """Raise ``Misuse`` if a reachable server lacks texts, or has others."""
    try:
        answer = send_request("verify", directory)
    except RemoteError:
        return  # edited plans and notes are known without the server
    if own := [*answer["differing"], *answer["surplus"]]:
        raise Misuse(f"not as on the server: {', '.join(own[:5])}; save your own texts, then: lattice remote sync")


def _keep_local(directory: str, found: Remote, *, hooks: bool | None) -> None:
    try:
        number = f"change {send_request('pull', directory)['seq']}"
    except RemoteError as error:
        if error.code == "REMOTE_STORAGE":
            raise
        notify(f"{error.message}; the files stay as last received")
        number = "the last received change"
    else:
        _require_only_the_servers(directory)
    left = asyncio.run(_convert(directory, found, hooks=hooks))
    typer.echo(f"Removed remote {found.name}; this is a local project now, as it was at {number}.")
    if left:
        typer.echo(f"Kept besides: {', '.join(map(one_line, left[:5]))}", err=True)


def _remove(directory: str, remote: Remote) -> None:
    """Remove a cache with its bookkeeping.

    Raises:
        Misuse: unsent edits or own files would be lost; nothing was touched.
    """
    cache = Cache(directory, remote)
    _require_nothing_unsent(cache)
    gone = f"{cache.directory}.gone-{uuid.uuid4().hex[:8]}"
    try:
        os.rename(cache.directory, gone)
        try:
            _require_nothing_unsent(Cache(gone, remote))  # an editor may have saved at the last moment
        except Misuse:
            os.rename(gone, cache.directory)
            raise
    except OSError as error:
        raise StorageError(f"cannot remove {directory}: {error.strerror}") from error
    if os.path.islink(directory):
        with contextlib.suppress(OSError):
            os.unlink(directory)
    remove_tree(gone)


async def _convert(directory: str, remote: Remote, *, hooks: bool | None) -> list[str]:
    """Convert a cache to a local project; return the names of other files in it.

    The removal of ``remote.json`` is the commit; after a crash before it, the directory is a cache without a state.

    ``hooks``: keep or omit the server's hooks, which plain lattice would run here; None: there must be none.

    Raises:
        Misuse: unsent edits, missing files, or hooks; nothing was changed.
        StorageError: a file cannot be removed.
    """
    cache = Cache(directory, remote)
    async with cache.locked():
        _require_whole(cache)
        config = _config_without_hooks(cache, hooks=hooks)
        try:
            if config is not None:
                cache.replace("config.json", config)
            cache.allow_plain_writes()
            for name in (STATE_FILE, REMOTE_FILE):  # the state alone would make it a cache
                os.unlink(os.path.join(directory, name))
            rescued = [f"{RESCUED_DIRECTORY}/{entry.number}" for entry in RescuedFiles(cache).entries()]
            others = [*rescued, *TextConflicts(cache, Edits(cache)).copies()]
            _remove_bookkeeping(directory, others)
        except OSError as error:
            raise StorageError(f"cannot change {directory}: {error.strerror}") from error
    return others + _own_files(cache)


def _remove_bookkeeping(directory: str, others: list[str]) -> None:
    if _is_ours(os.path.join(directory, ".gitignore")):
        os.unlink(os.path.join(directory, ".gitignore"))
    private = os.path.join(directory, PRIVATE_DIRECTORY)
    kept = [each for each in (RESCUED_DIRECTORY, CONFLICTS_DIRECTORY) if any(path.startswith(each) for path in others)]
    for name in os.listdir(private):
        if f"{PRIVATE_DIRECTORY}/{name}" not in kept:
            place = os.path.join(private, name)
            (remove_tree if os.path.isdir(place) else os.unlink)(place)
    if not kept:
        os.rmdir(private)


def _is_ours(gitignore: str) -> bool:
    try:
        with open(gitignore, "rb") as file:
            return file.readline() == GITIGNORE.splitlines(keepends=True)[0]
    except OSError:
        return False


def _require_whole(cache: Cache) -> None:
    """Raise ``Misuse`` unless the files are complete."""
    _require_sent(cache)
    state = cache.load_state()
    if not state.is_filled or not state.position.epoch:
        raise Misuse("the cache was not compared with the server since this machine started: lattice remote pull")
    if state.deferred:
        path = next(iter(state.deferred))
        raise Misuse(f"{len(state.deferred)} large files were not fetched, such as {path}: lattice remote fetch")
    if state.missing:
        raise Misuse(
            f"{len(state.missing)} files have not arrived yet, such as {state.missing[0]}: lattice remote pull"
        )


def _require_nothing_unsent(cache: Cache) -> None:
    _require_sent(cache)
    if RescuedFiles(cache).entries():
        raise Misuse("rescued files are only here: lattice remote rescued; apply or drop them first")
    if conflicts := TextConflicts(cache, Edits(cache)).copies():
        raise Misuse(f"unresolved texts are only here, such as {conflicts[0]}: lattice remote resolve")
    if own := _own_files(cache):
        raise Misuse(f"these files are only here: {', '.join(own[:5])}; move them away first")


def _require_sent(cache: Cache) -> None:
    if unsent := Edits(cache).scan():
        raise Misuse(f"not sent yet: {', '.join(unsent)}; send with: lattice remote push")


def _config_without_hooks(cache: Cache, *, hooks: bool | None) -> bytes | None:
    try:
        config: dict[str, Any] = json.loads(cache.read("config.json"))
        if hooks or not config.get("hooks"):
            return None
    except (ValueError, AttributeError):
        return None
    if hooks is None:
        raise Misuse(
            "config.json has hooks, shell commands from the server that lattice would run on this machine from now on: "
            "check them, then pass --keep-hooks or --no-hooks"
        )
    del config["hooks"]
    return json.dumps(config, sort_keys=True, indent=2).encode() + b"\n"


def _own_files(cache: Cache) -> list[str]:
    replicated = set(cache.paths())
    ours = {REMOTE_FILE, STATE_FILE, LOCKS_FILE, ".gitignore"}
    found: list[str] = []
    for directory, directories, names in os.walk(cache.directory):
        if directory == cache.directory:
            directories[:] = [name for name in directories if name not in (PRIVATE_DIRECTORY, LOCKS_FILE)]
        for name in names:
            path = os.path.relpath(os.path.join(directory, name), cache.directory)
            if path.replace(os.sep, "/") not in replicated and path not in ours:
                found.append(path)
    return sorted(found)
