"""Creation of caches: ``lattice remote add`` and ``clone``.

The cache is filled beside its final place and renamed at the end: after a failure or interruption nothing is left
behind and nothing existing has changed.
"""

import contextlib
import json
import os
import uuid
from dataclasses import dataclass
from typing import Any

from lattice_remote.client import credentials, trusted_servers
from lattice_remote.client.agent.service import Service
from lattice_remote.client.agent_client import Progress
from lattice_remote.client.cache.cache import Cache
from lattice_remote.client.cache.replicator import RequestOnlySession
from lattice_remote.client.cache.safe_directory import remove_tree
from lattice_remote.client.config import (
    REMOTE_FILE,
    Remote,
    check_name,
    detachment,
    is_unpushed,
    lost_remote,
    write_remote,
)
from lattice_remote.client.connection.connection import Connection
from lattice_remote.client.trusted_servers import Server
from lattice_remote.errors import Misuse, StorageError

__all__ = ["Added", "add_remote", "check_token", "clone", "own_project"]

_CHECK_TIMEOUT_S = 10.0
_PLAIN_FILES = {"config.json", "ids.json"}
_CONTEXT = "context.md"
_ASKED_BY_INIT = {
    "instance_id",
    "default_actor",
    "project_code",
    "subproject_code",
    "instance_name",
    "project_name",
    "model",
    "heartbeat",
}


@dataclass(frozen=True, slots=True)
class Added:
    """Contents of a new cache."""

    directory: str
    remote: Remote
    tasks: int
    files: int
    seq: int


async def add_remote(
    root: str,
    name: str,
    server: Server,
    *,
    project: str | None,
    token: str | None,
    show: Progress | None,
) -> Added:
    """Fill a new ``.lattice`` in the directory ``root``, an absolute path, from a project on a server.

    Trusts the server, and stores the token if one is given.

    Raises:
        Misuse: the directory has its own tasks or a remote, or no project is named.
        RemoteError: the server is unreachable or refuses. Nothing is left behind in any case.
    """
    if project is None:
        raise Misuse("which project? Give --project SLUG, or a URL that ends in /SLUG")
    remote = Remote(check_name(name), server.url, project)
    target = os.path.join(root, ".lattice")
    if (used := own_project(target)) is not None:
        raise Misuse(f"this directory has its own project ({used}), which a cache would replace")
    if token is not None:
        credentials.check_token(token)
    if detachment(target) is not None:
        return _attach_again(target, remote, token=token, server=server)
    staging = f"{target}.new-{uuid.uuid4().hex[:8]}"
    try:
        added = await _fill(
            staging, target, remote, token=token or credentials.from_environment(), server=server, show=show
        )
        trusted_servers.record(server)
        if token is not None:
            credentials.store(server.url, project, token)
        _put_in_place(staging, target)
    except OSError as error:
        raise StorageError(f"cannot create {target}: {error.strerror}") from error
    finally:
        remove_tree(staging)
    return added


def _attach_again(target: str, remote: Remote, *, token: str | None, server: Server) -> Added:
    """Restore a cache's ``remote.json``; its files and edits are compared with the server at the next use.

    Raises:
        Misuse: it is a cache of another project.
    """
    lost = lost_remote(target)
    if lost is not None and (lost.url, lost.project) != (remote.url, remote.project):
        raise Misuse(
            f"this directory is a cache of {lost.place}: add that first; if the server has moved, "
            f"continue with: lattice remote set-url {remote.name}"
        )
    trusted_servers.record(server)
    if token is not None:
        credentials.store(server.url, remote.project, token)
    write_remote(target, remote)
    cache = Cache(target, remote)
    paths = list(cache.paths())
    tasks = sum(path.startswith("tasks/") and path.endswith(".json") for path in paths)
    return Added(target, remote, tasks, len(paths), cache.load_state().position.seq)


async def clone(
    directory: str, name: str, server: Server, *, project: str, token: str | None, show: Progress | None
) -> Added:
    """Create a directory with a cache of a project; it must not exist, or be empty.

    Raises:
        Misuse: it is not empty.
        RemoteError: as for ``add_remote``. Nothing is left behind in any case.
    """
    made = _make_directories(directory)
    try:
        return await add_remote(directory, name, server, project=project, token=token, show=show)
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # another program has put a file there
                os.rmdir(path)
        raise


def _make_directories(directory: str) -> list[str]:
    """Create an empty directory and its parents; return those created, outermost first.

    Raises:
        Misuse: it exists and is not empty.
        StorageError: it cannot be created.
    """
    made: list[str] = []
    try:
        if os.path.lexists(directory) and (not os.path.isdir(directory) or os.listdir(directory)):
            raise Misuse(f"{directory} exists, and is not an empty directory")
        path, missing = directory, list[str]()
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        for each in reversed(missing):
            os.mkdir(each)
            made.append(each)
    except OSError as error:
        raise StorageError(f"cannot create {directory}: {error.strerror}") from error
    return made


async def _fill(
    staging: str, target: str, remote: Remote, *, token: str | None, server: Server, show: Progress | None
) -> Added:
    os.mkdir(staging)
    write_remote(staging, remote)
    service = Service(staging)
    service.start(token, named=server, prefer_given=True)
    try:
        answer = await service.handle({"do": "pull", "directory": staging, "token": token}, show or _ignore)
    finally:
        await service.close()
    paths = list(Cache(staging, remote).paths())
    tasks = sum(path.startswith("tasks/") and path.endswith(".json") for path in paths)
    return Added(target, remote, tasks, len(paths), answer["seq"])


def _put_in_place(staging: str, target: str) -> None:
    """Rename the cache into place; an empty project there is moved away, and restored if that fails."""
    if not os.path.lexists(target):
        os.rename(staging, target)
        return
    aside = f"{target}.old-{uuid.uuid4().hex[:8]}"
    os.rename(target, aside)
    try:
        os.rename(staging, target)
    except OSError:
        os.rename(aside, target)
        raise
    remove_tree(aside)


def own_project(target: str) -> str | None:
    """Return the evidence, in words, that a ``.lattice`` is a project in use; None if it is new.

    Raises:
        Misuse: it is not a directory, or has a remote already.
    """
    if not os.path.lexists(target):
        return None
    if not os.path.isdir(target) or os.path.islink(target):
        raise Misuse(f"{target} is not a directory")
    if os.path.exists(os.path.join(target, REMOTE_FILE)):
        raise Misuse("this project has a remote already; change it with lattice remote set-url, or remove it first")
    if detachment(target) is not None:
        return None
    if is_unpushed(target):
        raise Misuse("this project waits to be pushed already: lattice remote push, or lattice remote remove NAME")
    return _first_sign_of_use(target)


def _first_sign_of_use(target: str) -> str | None:
    """Return something that a freshly initialised project lacks, in words; None if there is nothing."""
    if tasks := _count(target, "tasks", ".json"):
        return f"{tasks} task{'s' * (tasks != 1)}"
    if _is_configured(target):
        return "a changed config.json"
    if _is_described(target):
        return "an edited context.md"
    for directory, directories, names in os.walk(target):
        directories.sort()
        for name in sorted(names):
            path = os.path.relpath(os.path.join(directory, name), target)
            if path in _PLAIN_FILES and not _lists_tasks(os.path.join(target, path)):
                continue
            if (
                path == _CONTEXT
                or path.startswith("locks" + os.sep)
                or (name == "_lifecycle.jsonl" and not os.path.getsize(os.path.join(directory, name)))
            ):
                continue
            return path
    return None


def _count(target: str, directory: str, ending: str) -> int:
    with contextlib.suppress(OSError):
        return sum(name.endswith(ending) for name in os.listdir(os.path.join(target, directory)))
    return 0


def _is_configured(target: str) -> bool:
    """Return whether more of ``config.json`` was changed than ``lattice init`` asks for."""
    from lattice.core.config import default_config

    try:
        with open(os.path.join(target, "config.json"), encoding="utf-8") as file:
            config: dict[str, Any] = json.load(file)
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    made = {key: value for key, value in config.items() if key not in _ASKED_BY_INIT}
    return all(made != dict(default_config(preset=preset)) for preset in ("classic", "opinionated"))


def _is_described(target: str) -> bool:
    """Return whether ``context.md`` holds more than the text of ``lattice init``, below the heading."""
    from lattice.cli.main import _CONTEXT_MD_TEMPLATE

    try:
        with open(os.path.join(target, _CONTEXT), encoding="utf-8") as file:
            return file.read().partition("\n")[2] != _CONTEXT_MD_TEMPLATE.partition("\n")[2]
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True


def _lists_tasks(path: str) -> bool:
    """Return whether this is an ``ids.json`` that has assigned an id."""
    if os.path.basename(path) != "ids.json":
        return False
    try:
        with open(path, encoding="utf-8") as file:
            return bool(json.load(file).get("map"))
    except (OSError, ValueError, AttributeError):
        return True  # unreadable: assume so


async def check_token(server: Server, project: str, token: str) -> str:
    """Check a token with the server; return its answer, or that it is unreachable.

    Raises:
        Rejected: the server refuses it, or must not receive it.
    """
    link = Connection(Remote("origin", server.url, project), RequestOnlySession(), token, named=server)
    link.start()
    try:
        await link.changed.until(lambda: link.welcome is not None or link.failed_attempts > 0, _CHECK_TIMEOUT_S)
        if link.is_refused and link.error is not None:
            raise link.error
        return f"accepted, acting as {link.welcome.actor}" if link.welcome else "not checked: cannot reach the server"
    finally:
        await link.close()


def _ignore(_progress: dict[str, Any]) -> None:
    """Ignore progress."""
