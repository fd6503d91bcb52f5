"""``lattice remote remove``: removal of a cache, or its conversion to a local project."""

import asyncio
import contextlib
import json
import os
import uuid
from typing import Annotated, Any

import typer

from lattice_remote.client.cache.cache import GITIGNORE, LOCKS_FILE, STATE_FILE, Cache
from lattice_remote.client.cache.edits import CONFLICTS_DIRECTORY, Edits, TextConflicts
from lattice_remote.client.cache.rescued_files import RESCUED_DIRECTORY, RescuedFiles
from lattice_remote.client.cache.safe_directory import remove_tree
from lattice_remote.client.cli import push
from lattice_remote.client.cli.common import (
    complete_remotes,
    here,
    notify,
    send_request,
    unpushed,
)
from lattice_remote.client.config import PRIVATE_DIRECTORY, REMOTE_FILE, Remote
from lattice_remote.errors import Misuse, RemoteError, StorageError, one_line

__all__ = ["app"]

app = typer.Typer()


@app.command(name="rm", hidden=True, help="As remove. Example: lattice remote rm origin")
@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="The remote's name.", autocompletion=complete_remotes)],
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
    """Complete and update the files, and make the directory a local project."""
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

    The removal of ``remote.json`` is the commit. After a crash before it, the directory is a cache without a state,
    which the next command completes.

    Args:
        directory: the ``.lattice``.
        remote: the cache's remote.
        hooks: keep or omit the server's hooks; None: there must be none. Plain lattice would run them here.

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
    """Remove our files except directories with ``others``."""
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
    """Raise ``Misuse`` unless the files are complete as of the server's last report."""
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
    """Return the new ``config.json``, None if it is unchanged."""
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
    """Return files that are neither the server's nor bookkeeping."""
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
