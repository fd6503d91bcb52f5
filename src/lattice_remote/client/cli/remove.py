"""``lattice remote remove``: removal of a cache, or its conversion to a local project."""

import contextlib
import json
import os
import uuid
from typing import Any

from lattice_remote.client.cache.cache import GITIGNORE, LOCKS_FILE, STATE_FILE, Cache
from lattice_remote.client.cache.conflicts import CONFLICTS_DIRECTORY, TextConflicts
from lattice_remote.client.cache.edits import Edits
from lattice_remote.client.cache.rescued_files import RESCUED_DIRECTORY, RescuedFiles
from lattice_remote.client.cache.safe_directory import remove_tree
from lattice_remote.client.config import PRIVATE_DIRECTORY, REMOTE_FILE, Remote
from lattice_remote.errors import Misuse, StorageError

__all__ = ["keep_local", "remove_remote"]


def remove_remote(directory: str, remote: Remote) -> None:
    """Remove a cache with its bookkeeping, unless it has unique content.

    Raises:
        Misuse: unsent edits or own files of the user would be lost; nothing was touched.
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


async def keep_local(directory: str, remote: Remote, *, hooks: bool | None) -> list[str]:
    """Convert a cache to a local project with all its files; return the names of other files in it.

    The removal of ``remote.json`` is the commit. After a crash before it, the directory is a cache without a state,
    which the next command completes; after it, a local project.

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
    """Remove all files of ours except the directories with the user's ``others``."""
    if _is_ours(os.path.join(directory, ".gitignore")):
        os.unlink(os.path.join(directory, ".gitignore"))
    kept = tuple(
        each for each in (RESCUED_DIRECTORY, CONFLICTS_DIRECTORY) if any(path.startswith(each) for path in others)
    )
    for name in os.listdir(os.path.join(directory, PRIVATE_DIRECTORY)):
        if f"{PRIVATE_DIRECTORY}/{name}" in kept:
            continue
        place = os.path.join(directory, PRIVATE_DIRECTORY, name)
        if os.path.isdir(place):
            remove_tree(place)
        else:
            os.unlink(place)
    if not kept:
        os.rmdir(os.path.join(directory, PRIVATE_DIRECTORY))


def _require_whole(cache: Cache) -> None:
    """Raise ``Misuse`` unless the files are complete as of the server's last report, without others."""
    if unsent := Edits(cache).scan():
        raise Misuse(f"not sent yet: {', '.join(unsent)}; send with: lattice remote push")
    state = cache.load_state()
    if not state.is_filled or not state.position.epoch:
        raise Misuse("the cache was not compared with the server since this machine started: lattice remote pull")
    if state.away:
        path = next(iter(state.away))
        raise Misuse(f"{len(state.away)} large files were not fetched, such as {path}: lattice remote fetch")
    if state.wanted:
        raise Misuse(f"{len(state.wanted)} files have not arrived yet, such as {state.wanted[0]}: lattice remote pull")


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


def _is_ours(gitignore: str) -> bool:
    """Return whether this or an earlier version of lattice-remote wrote this file."""
    try:
        with open(gitignore, "rb") as file:
            return file.readline() == GITIGNORE.splitlines(keepends=True)[0]
    except OSError:
        return False


def _require_nothing_unsent(cache: Cache) -> None:
    if unsent := Edits(cache).scan():
        raise Misuse(f"not sent yet: {', '.join(unsent)}; send with: lattice remote push")
    if RescuedFiles(cache).entries():
        raise Misuse("rescued files are only here: lattice remote rescued; apply or drop them first")
    if conflicts := TextConflicts(cache, Edits(cache)).copies():
        raise Misuse(f"unresolved texts are only here, such as {conflicts[0]}: lattice remote resolve")
    if own := _own_files(cache):
        raise Misuse(f"these files are only here: {', '.join(own[:5])}; move them away first")


def _own_files(cache: Cache) -> list[str]:
    """Return files that are neither the server's nor bookkeeping, such as an editor's backups."""
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
