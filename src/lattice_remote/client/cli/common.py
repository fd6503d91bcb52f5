"""Shared parts of the commands: finding the cache, requests to the agent, text and JSON output, progress."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from lattice.storage.fs import LatticeRootError, find_root

from lattice_remote.client import agent_client, credentials
from lattice_remote.client.agent_client import Progress
from lattice_remote.client.config import (
    CHOICES,
    REMOTE_FILE,
    UNPUSHED_FILE,
    Remote,
    below,
    is_cache,
    is_unpushed,
    parse_url,
    read_remote,
)
from lattice_remote.client.tasks import Values, tasks_of
from lattice_remote.errors import Misuse, RemoteError, one_line
from lattice_remote.output import counted, strict_json

if TYPE_CHECKING:
    from lattice_remote.client.cache.evidence import Repository  # slow to load

__all__ = [
    "MAX_LISTED",
    "NO_PROJECT",
    "CaFile",
    "Insecure",
    "Json",
    "Name",
    "Url",
    "complete_remotes",
    "complete_settings",
    "complete_tasks",
    "fields_of",
    "here",
    "lattice_directory",
    "notify",
    "print_json",
    "print_remotes",
    "print_result",
    "progress",
    "project_directory",
    "request",
    "send_request",
    "show_unpushed",
    "tracking_problem",
    "unpushed",
    "warn_of_tracking",
]


def complete_tasks(incomplete: str) -> Values:
    try:
        directory = lattice_directory()
    except RemoteError:
        return []
    return [] if directory is None else tasks_of(directory, incomplete)


def complete_remotes(incomplete: str) -> Values:
    try:
        _, found = unpushed() or here()
    except RemoteError:
        return []
    return [(found.name, found.place)] if found.name.startswith(incomplete) else []


def complete_settings(ctx: typer.Context, incomplete: str) -> Values:
    values = CHOICES.get(ctx.params.get("name") or "", tuple(CHOICES))
    return [(value, "") for value in values if value.startswith(incomplete)]


MAX_LISTED = 10_000
"""Most entries that ``log`` and ``history`` list."""
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Url = Annotated[str, typer.Argument(metavar="URL", help="The project's server by default.")]
Name = Annotated[
    str,
    typer.Argument(metavar="NAME", help="The remote, of which a project has one.", autocompletion=complete_remotes),
]
CaFile = Annotated[
    str | None,
    typer.Option("--ca-file", metavar="FILE", help="Certificate authorities (PEM) to use instead of the system's."),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Send tokens to this server over plain HTTP, even from another machine.")
]


_REMOVED = "the current directory was removed; go to another one"


def lattice_directory() -> str | None:
    try:
        root = find_root()
    except LatticeRootError as error:
        raise Misuse(str(error)) from error
    except FileNotFoundError:
        raise Misuse(_REMOVED) from None
    return None if root is None else os.path.abspath(os.path.join(root, ".lattice"))


def project_directory() -> str:
    try:
        return os.path.abspath(os.environ.get("LATTICE_ROOT") or os.getcwd())
    except FileNotFoundError:
        raise Misuse(_REMOVED) from None


_ANY_ADDRESS = "URL --project SLUG"
NO_PROJECT = f"there is no lattice project here; add one with: lattice remote add origin {_ANY_ADDRESS}"


def here(name: str = "") -> tuple[str, Remote]:
    address, directory = _address(name), lattice_directory()
    if directory is None:
        raise Misuse(_with(address, NO_PROJECT))
    if is_unpushed(directory):
        raise Misuse("this project waits to be pushed to its remote: lattice remote push")
    try:
        found = read_remote(directory)
    except Misuse as error:
        raise Misuse(_with(address, error.message), code=error.code) from None
    return directory, _called(name, found)


def _address(name: str) -> str:
    """Return the words of ``add`` for a URL that is given instead of a name, as to ``git push``. Raises Misuse."""
    if "://" not in name:
        return _ANY_ADDRESS
    url, slug = parse_url(name)
    return f"{url} --project SLUG" if slug is None else below(url, slug)


def _with(address: str, message: str) -> str:
    return message.replace(_ANY_ADDRESS, address)


def unpushed(name: str = "") -> tuple[str, Remote] | None:
    """Return the surrounding project that waits to be pushed, and its remote."""
    directory = lattice_directory()
    if directory is None or not is_unpushed(directory):
        return None
    return directory, _called(name, read_remote(directory, UNPUSHED_FILE))


def _called(name: str, found: Remote) -> Remote:
    if name and name != found.name and _address(name) != found.place:
        raise Misuse(f"no remote called {name!r} here; there is {found.name!r}")
    return found


def show_unpushed(found: Remote, *, as_json: bool) -> None:
    if as_json:
        print_result({"remote": fields_of(found), "pushed": False})
    else:
        typer.echo(f"{found.name} {found.url} project {found.project}: not pushed yet; next: lattice remote push")


def print_remotes(*, with_url: bool, as_json: bool) -> None:
    directory, waiting = lattice_directory(), unpushed()
    if directory is None:
        raise Misuse(NO_PROJECT)
    found = waiting[1] if waiting else read_remote(directory) if is_cache(directory) else None
    if as_json:
        print_result({"remotes": [fields_of(found) | ({"pushed": False} if waiting else {})] if found else []})
    elif found is not None:
        typer.echo(f"{found.name}\t{found.place}" if with_url else found.name)


def warn_of_tracking(directory: str) -> None:
    from lattice_remote.client.cache.evidence import Repository

    if (problem := tracking_problem(Repository(directory))) is not None:
        notify("; ".join(problem))


def tracking_problem(repository: "Repository") -> tuple[str, str] | None:
    """Return problem and remedy if a git repository tracks more of a cache than its address."""
    tracked = [path for path in repository.tracked() if path not in (REMOTE_FILE, ".gitignore")]
    if not tracked:
        return None
    return (
        f"the git repository tracks {counted(len(tracked), 'file')} of .lattice, such as {tracked[0]}: git checkout, "
        "stash or reset puts earlier contents there, which are not sent but reverted",
        "stop tracking all of .lattice except remote.json and .gitignore, and keep the files on disk (git help rm, "
        "option --cached)",
    )


def request(do: str, directory: str, **fields: Any) -> dict[str, Any]:
    """Return a request for the cache at ``directory``. Raises Misuse for an invalid LATTICE_TOKEN."""
    credentials.from_environment()
    return agent_client.request(do, directory, **fields)


def send_request(do: str, directory: str, on_progress: Progress | None = None, **fields: Any) -> dict[str, Any]:
    return agent_client.send_request(request(do, directory, **fields), on_progress)


def fields_of(found: Remote) -> dict[str, str]:
    return {"name": found.name, "url": found.url, "project": found.project}


def notify(*notices: str) -> None:
    for notice in notices:
        typer.echo(f"lattice-remote: {one_line(notice)}", err=True)


def print_json(value: object) -> None:
    typer.echo(strict_json(value, indent=2))


def print_result(data: dict[str, Any]) -> None:
    print_json({"ok": True, "data": {key: value for key, value in data.items() if key != "ok"}})


@contextlib.contextmanager
def progress(what: str) -> Iterator[Progress | None]:
    """Show a progress bar on stderr; yield None if stderr is no terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(what, total=None)
        yield lambda now: bars.update(
            bar, description=f"{what} {now['what']}", completed=now["done"], total=now["total"]
        )
