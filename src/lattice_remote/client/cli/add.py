"""``lattice remote add`` and ``clone``: creation of caches.

A cache is filled beside its final place and renamed at the end: after a failure nothing is left behind, and nothing
existing has changed. After an interruption the same command goes on with the files that have arrived.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from lattice_remote.client import credentials, trusted_servers
from lattice_remote.client.agent_client import Progress
from lattice_remote.client.cache.cache import Cache
from lattice_remote.client.cache.first_fill import go_on
from lattice_remote.client.cache.safe_directory import remove_tree
from lattice_remote.client.cli import push
from lattice_remote.client.cli.common import (
    CaFile,
    Insecure,
    Json,
    fields_of,
    notify,
    print_result,
    progress,
    project_directory,
    send_request,
    warn_of_tracking,
)
from lattice_remote.client.cli.tokens import ask_for_token, hint_of_slash, listed_projects
from lattice_remote.client.config import (
    REMOTE_FILE,
    Remote,
    below,
    check_name,
    detachment,
    is_unpushed,
    lost_remote,
    parse_url,
    write_remote,
)
from lattice_remote.client.trusted_servers import Server
from lattice_remote.errors import ConnectionFailed, Misuse, RemoteError, StorageError, one_line
from lattice_remote.output import counted
from lattice_remote.protocol.bundle import first_sign_of_use

if TYPE_CHECKING:
    from lattice_remote.client.agent.service import Service  # slow to load

__all__ = ["app"]

app = typer.Typer()

Token = Annotated[
    str | None,
    typer.Option(metavar="TOKEN", help="Stored for this user; - prompts for it. Else LATTICE_TOKEN or a login."),
]


@app.command()
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name, usually origin.")],
    url: Annotated[str, typer.Argument(metavar="URL", help="http://HOST:PORT or https://HOST, also with /SLUG.")],
    *,
    project: Annotated[str | None, typer.Option(metavar="SLUG", help="The project's slug on the server.")] = None,
    token: Token = None,
    ca_file: CaFile = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Make this directory a cache of a project on a server.

    If the directory has tasks and the server's project has none, continue with: lattice remote push.

    Example: lattice remote add origin https://board.example.org --project web
    """
    target = os.path.join(project_directory(), ".lattice")
    server, slug = _named_server(url, project, ca_file=ca_file, insecure=insecure)
    own = _own_project(target)
    given = _given(token, server)
    if own is not None:
        remote = asyncio.run(push.await_push(target, name, server, slug, given, own=own))
        if as_json:
            print_result({**fields_of(remote), "pushed": False})
        else:
            typer.echo(f"Added remote {remote.name} ({remote.url}, project {remote.project}), which is empty.")
            typer.echo(
                f"This directory's project ({own}) is not pushed yet. Next: lattice remote push; "
                "--dry-run shows what would be sent."
            )
        _warn(target, token)
        return
    with _signals_interrupt(), progress("fetching") as show:
        added = asyncio.run(_add(target, name, server, project=slug, token=given, show=show))
    _print(added, f"Added remote {added.remote.name}", as_json=as_json)
    _warn(target, token)


@app.command()
def clone(
    url: Annotated[str, typer.Argument(metavar="URL", help="The project: https://HOST/SLUG.")],
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A new or empty one; SLUG by default.")] = "",
    *,
    name: Annotated[str, typer.Option(metavar="NAME", help="Name of the remote.")] = "origin",
    token: Token = None,
    ca_file: CaFile = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Create a new directory with a cache of a project.

    Example: lattice remote clone https://board.example.org/web
    """
    server, slug = _named_server(url, None, ca_file=ca_file, insecure=insecure)
    given = _given(token, server)
    place = os.path.abspath(directory or slug)
    target = os.path.join(place, ".lattice")
    begun = os.path.basename(_staging(target, Remote(name, server.url, slug)))
    with _signals_interrupt(), _new_directory(place, begun), progress("fetching") as show:
        added = asyncio.run(_add(target, name, server, project=slug, token=given, show=show))
    _print(added, f"Cloned into {one_line(directory or slug)}", as_json=as_json)
    _warn(added.directory, token)


def _named_server(url: str, project: str | None, *, ca_file: str | None, insecure: bool) -> tuple[Server, str]:
    server_url, slug = parse_url(url, project)
    if slug is None and server_url.endswith("/") and not _is_known(server_url):
        host_url, last = parse_url(url.strip().rstrip("/"))  # a project with a slash that a shell or browser added
        if _is_known(host_url):
            server_url, slug = host_url, last
    if slug is None:
        raise Misuse(_which_project(server_url))
    server = trusted_servers.name(server_url, insecure=insecure, ca_file=ca_file)
    trusted_servers.admit(server_url, server)  # before any prompt
    return server, slug


def _is_known(url: str) -> bool:
    return credentials.is_known(url) or any(server.url == url for server in trusted_servers.known())


def _which_project(url: str) -> str:
    """Return the message about a missing project, with those that the token may use."""
    try:
        slugs = [str(project["slug"]) for project in listed_projects(url)]
    except RemoteError:
        slugs = []
    if not slugs:
        return "no project is named; use --project SLUG, or a URL that ends in /SLUG" + hint_of_slash(url)
    return f"no project is named, and your token is for {', '.join(slugs)}; for example: {below(url, slugs[0])}"


def _given(token: str | None, server: Server) -> str | None:
    if token == "-":  # noqa: S105 - no token
        return ask_for_token(server.url)
    return None if token is None else credentials.check_token(token)


def _warn(directory: str, token: str | None) -> None:
    if token not in (None, "-"):
        notify("others on this machine can see a token in a command line; --token - prompts for it")
    warn_of_tracking(directory)


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Handle a closing terminal or ``kill`` like Ctrl-C, so that nothing is left behind.

    Ignored signals (``nohup``) stay ignored.
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


@dataclass(frozen=True, slots=True)
class _Added:
    directory: str
    remote: Remote
    tasks: int
    files: int
    seq: int


def _print(added: _Added, what: str, *, as_json: bool) -> None:
    with contextlib.suppress(RemoteError):
        send_request("ready", added.directory)  # the agent follows from here on
    if as_json:
        print_result({**fields_of(added.remote), "tasks": added.tasks, "files": added.files, "seq": added.seq})
    else:
        typer.echo(
            f"{what} ({added.remote.url}, project {added.remote.project}): "
            f"{counted(added.tasks, 'task')}, {counted(added.files, 'file')}, at change {added.seq}."
        )


_OTHER_FILL_S = 1.0
"""Longest wait for another command that fills the same directory."""


async def _add(
    target: str, name: str, server: Server, *, project: str, token: str | None, show: Progress | None
) -> _Added:
    """Fill a new ``.lattice`` from a project.

    Raises:
        Misuse: the directory has its own tasks or a remote.
        RemoteError: the server is unreachable or refuses; nothing is left behind, except after an interruption.
    """
    remote = Remote(check_name(name), server.url, project)
    if (used := _own_project(target)) is not None:
        raise Misuse(f"this directory has its own project ({used}), which a cache would replace")
    if detachment(target) is not None:
        return _attach_again(target, remote, token=token, server=server)
    from lattice_remote.client.agent.service import Service

    staging = _staging(target, remote)
    try:
        os.makedirs(staging, exist_ok=True)
        write_remote(staging, remote)
        service = Service(staging, is_new=True)
        async with service.cache.locked(_OTHER_FILL_S):
            try:
                go_on(service.cache)
                seq = await _fill(service, token=token or credentials.from_environment(), server=server, show=show)
                added = _described(target, service.cache, seq)
                _trust(server, project, token)
                _put_in_place(staging, target)
            except BaseException as error:
                _keep_or_remove(service.cache, error)
                raise
    except OSError as error:
        raise StorageError(f"cannot create {target}: {error.strerror}") from error
    return added


def _staging(target: str, remote: Remote) -> str:
    """Return the directory in which ``target`` is filled, the same after an interruption."""
    return f"{target}.new-{hashlib.sha256(f'{remote.url} {remote.project}'.encode()).hexdigest()[:8]}"


def _keep_or_remove(cache: Cache, error: BaseException) -> None:
    """After an interruption keep the files that have arrived; else remove them all."""
    if isinstance(error, asyncio.CancelledError | ConnectionFailed) and (state := cache.load_state()).position.epoch:
        waiting = f"{counted(len(state.missing), 'file')} of the project {'is' if len(state.missing) == 1 else 'are'}"
        place = f"the others are kept in {cache.directory}"
        notify(f"{waiting} still to be fetched, {place}: repeat the command to continue")
    else:
        remove_tree(cache.directory)


async def _fill(service: "Service", *, token: str | None, server: Server, show: Progress | None) -> int:
    request = {"do": "pull", "directory": service.cache.directory, "token": token}
    service.start(token, named=server, prefer_given=True)
    try:
        answer = await service.handle(request, show or (lambda _: None))
    finally:
        await service.close()
    return int(answer["seq"])


def _attach_again(target: str, remote: Remote, *, token: str | None, server: Server) -> _Added:
    """Restore a cache's ``remote.json``; its files are compared at the next use.

    Raises:
        Misuse: it is a cache of another project.
    """
    lost = lost_remote(target)
    if lost is not None and (lost.url, lost.project) != (remote.url, remote.project):
        raise Misuse(
            f"this directory is a cache of {lost.place}: add that first; if the server has moved, "
            f"continue with: lattice remote set-url {remote.name}"
        )
    _trust(server, remote.project, token)
    write_remote(target, remote)
    cache = Cache(target, remote)
    return _described(target, cache, cache.load_state().position.seq)


def _trust(server: Server, project: str, token: str | None) -> None:
    trusted_servers.record(server)
    if token is not None:
        credentials.store(server.url, project, token)


def _described(target: str, cache: Cache, seq: int) -> _Added:
    paths = list(cache.paths())
    tasks = sum(path.startswith("tasks/") and path.endswith(".json") for path in paths)
    return _Added(target, cache.remote, tasks, len(paths), seq)


def _put_in_place(staging: str, target: str) -> None:
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


@contextlib.contextmanager
def _new_directory(directory: str, begun: str) -> Iterator[None]:
    """Create a directory and its parents, or take an empty one; after an error remove those created.

    One with only ``begun``, the files of an interrupted clone, counts as empty.

    Raises:
        Misuse: it exists and is not empty.
        StorageError: it cannot be created.
    """
    made: list[str] = []
    try:
        try:
            if os.path.lexists(directory) and (not os.path.isdir(directory) or set(os.listdir(directory)) - {begun}):
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
        yield
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # another program has put a file there
                os.rmdir(path)
        raise


_ASKED_BY_INIT = {"instance_id", "default_actor", "project_code", "subproject_code", "instance_name", "project_name"}
_ASKED_BY_INIT |= {"model", "heartbeat"}


def _own_project(target: str) -> str | None:
    """Return the evidence, in words, that a ``.lattice`` is in use.

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
    """Return something that a freshly initialised project lacks, in words."""
    files = [os.path.join(directory, name) for directory, _, names in os.walk(target) for name in names]
    sizes = {os.path.relpath(file, target): os.lstat(file).st_size for file in files}
    found = first_sign_of_use((path, size) for path, size in sizes.items() if not path.startswith("locks" + os.sep))
    edited = {"a changed config.json": _is_plain_config, "an edited context.md": _is_plain_context}
    edited["ids.json"] = lambda text: not json.loads(text).get("map")
    return found or next((sign for sign, is_plain in edited.items() if _is_edited(target, sign, is_plain)), None)


def _is_edited(target: str, sign: str, is_plain: Callable[[str], bool]) -> bool:
    try:
        with open(os.path.join(target, sign.rpartition(" ")[2]), encoding="utf-8") as file:
            return not is_plain(file.read())
    except FileNotFoundError:
        return False
    except (OSError, ValueError, AttributeError):
        return True  # unreadable: assume so


def _is_plain_config(text: str) -> bool:
    """Return whether only what ``lattice init`` asks for was changed."""
    from lattice.core.config import default_config

    made = {key: value for key, value in json.loads(text).items() if key not in _ASKED_BY_INIT}
    return any(made == dict(default_config(preset=preset)) for preset in ("classic", "opinionated"))


def _is_plain_context(text: str) -> bool:
    from lattice.cli.main import _CONTEXT_MD_TEMPLATE

    return bool(text.partition("\n")[2] == _CONTEXT_MD_TEMPLATE.partition("\n")[2])
