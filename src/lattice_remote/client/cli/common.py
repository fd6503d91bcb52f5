"""Shared parts of the commands: finding the cache, requests to the agent, text and JSON output, progress."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from lattice.storage.fs import LatticeRootError, find_root

from lattice_remote.client import agent_client, credentials
from lattice_remote.client.agent_client import Progress, describe_age
from lattice_remote.client.cache.repository import Repository
from lattice_remote.client.config import REMOTE_FILE, UNPUSHED_FILE, Remote, is_unpushed, read_remote
from lattice_remote.errors import Misuse, one_line

__all__ = [
    "CaFile",
    "Insecure",
    "Json",
    "acting",
    "agent",
    "cache",
    "conflicts",
    "connection",
    "count",
    "edits",
    "fields_of",
    "healed",
    "here",
    "lattice_directory",
    "print_json",
    "print_result",
    "progress",
    "project_directory",
    "request",
    "rescued",
    "show_unpushed",
    "unpushed",
    "versions",
    "warn_of_tracking",
]

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
CaFile = Annotated[
    str | None,
    typer.Option(
        "--ca-file", metavar="FILE", help="Certificate authorities (PEM) for this server, instead of the system's."
    ),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Send tokens to this server over plain HTTP, even from another machine.")
]


def warn_of_tracking(directory: str) -> None:
    """Warn on stderr if a git repository tracks more of a cache than its address."""
    tracked = [path for path in Repository(directory).tracked() if path not in (REMOTE_FILE, ".gitignore")]
    if tracked:
        typer.echo(
            f"lattice-remote: a git repository tracks {count(len(tracked), 'file')} of this .lattice, such as "
            f"{one_line(tracked[0])}; git checkout, stash or reset would put earlier contents there, which are not "
            "sent but replaced by the server's. Stop tracking all of .lattice except remote.json and .gitignore, and "
            "keep the files on disk (see git help rm, option --cached)",
            err=True,
        )


def lattice_directory() -> str | None:
    try:
        root = find_root()
    except LatticeRootError as error:
        raise Misuse(str(error)) from error
    except FileNotFoundError:
        raise _nowhere() from None
    return None if root is None else os.path.abspath(os.path.join(root, ".lattice"))


def project_directory() -> str:
    """Return the directory for a new project: the current one, or ``LATTICE_ROOT``.

    Raises:
        Misuse: it does not exist.
    """
    try:
        return os.path.abspath(os.environ.get("LATTICE_ROOT") or os.getcwd())
    except FileNotFoundError:
        raise _nowhere() from None


def _nowhere() -> Misuse:
    return Misuse("the current directory was removed; go to another one")


def here(name: str = "") -> tuple[str, Remote]:
    """Return the surrounding cache and its remote, which must be called ``name`` if one is given."""
    directory = lattice_directory()
    if directory is None:
        raise Misuse("there is no lattice project here; add one with: lattice remote add origin URL --project SLUG")
    if is_unpushed(directory):
        raise Misuse("this project waits to be pushed to its remote: lattice remote push")
    found = read_remote(directory)
    if name and name != found.name:
        raise Misuse(f"no remote called {name!r} here; there is {found.name!r}")
    return directory, found


def unpushed(name: str = "") -> tuple[str, Remote] | None:
    """Return the surrounding project that waits to be pushed, and its remote; None if there is none.

    Raises:
        Misuse: its remote has another name than ``name``.
    """
    directory = lattice_directory()
    if directory is None or not is_unpushed(directory):
        return None
    found = read_remote(directory, UNPUSHED_FILE)
    if name and name != found.name:
        raise Misuse(f"no remote called {name!r} here; there is {found.name!r}")
    return directory, found


def show_unpushed(found: Remote, *, as_json: bool) -> None:
    if as_json:
        print_result({"remote": fields_of(found), "pushed": False})
    else:
        typer.echo(f"{found.name} {found.url} project {found.project}: not pushed yet; next: lattice remote push")


def request(do: str, directory: str) -> dict[str, Any]:
    credentials.from_environment()  # reports an invalid token at once
    return agent_client.request(do, directory)


def fields_of(found: Remote) -> dict[str, str]:
    return {"name": found.name, "url": found.url, "project": found.project}


def count(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, sort_keys=True))


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

    console = Console(stderr=True)
    with Bars(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console, transient=True
    ) as bars:
        bar = bars.add_task(what, total=None)

        def show(progress: dict[str, Any]) -> None:
            bars.update(
                bar, description=f"{what} {progress['what']}", completed=progress["done"], total=progress["total"]
            )

        yield show


_MIB = 1024 * 1024


def connection(answer: dict[str, Any]) -> str:
    heard = answer["last_heard_s"]
    if answer["connected"]:
        return f"connected (last frame {heard} s ago)"
    ago = "no frame from the server yet" if heard is None else f"last frame {describe_age(heard)} ago"
    return f"not connected: {answer['error'] or 'connecting'} ({ago})"


def cache(answer: dict[str, Any]) -> str:
    here, there = answer["seq"], answer["server_seq"]
    if answer["trouble"]:
        return f"stuck at change {here}: {answer['trouble']}"
    if answer["current"]:
        return f"current (change {here} here, {there} on the server)"
    if there is None:
        age = "never filled" if answer["age_s"] is None else f"{describe_age(answer['age_s'])} old"
        return f"{age} (change {here} here, unknown on the server)"
    return f"catching up (change {here} here, {there} on the server, {count(answer['wanted'], 'file')} to fetch)"


def healed(healed: dict[str, Any]) -> str:
    """Describe the repaired local changes, and the way they are detected."""
    text = f"{count(healed['count'], 'file')} since the agent started"
    if healed["last_path"] is not None:
        text += f", last {healed['last_path']} {describe_age(healed['last_age_s'])} ago"
    if healed["fought_over"]:
        text += f"; another process keeps writing {', '.join(healed['fought_over'][:5])}"
    return f"{text} ({healed['watched'] or 'not watched: no agent'})"


def edits(answer: dict[str, Any]) -> str:
    """Describe the unsent edits: number, files and the reason for waiting."""
    refused, waits_for, withheld = answer["refused_edits"], answer["edits_wait_for"], answer["withheld_edits"]
    unsent = answer["unsent_edits"]
    how = "sent as soon as they are saved" if waits_for is None else f"they wait for {waits_for}"
    if not unsent:
        return f"none ({how})"
    shown = [f"{path} (refused: {refused[path]})" if path in refused else path for path in unsent]
    shown = [f"{path} (waits for you: {withheld[path]})" if path in withheld else path for path in shown]
    return f"{len(unsent)}: {', '.join(shown)} ({how})"


def conflicts(conflicts: list[dict[str, Any]]) -> str:
    """Describe the texts with an unresolved conflict."""
    if not conflicts:
        return "none"
    named = ", ".join(f"{each['what']} of {each['short_id']}" for each in conflicts)
    return f"{len(conflicts)}: {named}; see: lattice remote resolve"


def rescued(entries: list[dict[str, Any]]) -> str:
    """Describe the rescued files that wait for the user."""
    if not entries:
        return "none"
    files = sum(len(entry["files"]) for entry in entries)
    return f"{count(files, 'file')} in {count(len(entries), 'entry', 'entries')}; see: lattice remote rescued"


def agent(agent: dict[str, Any] | None) -> str:
    if agent is None:
        return "not used"
    return str(agent.get("error") or f"pid {agent['pid']}, {count(len(agent['caches']), 'copy', 'copies')}")


def acting(answer: dict[str, Any]) -> str:
    if answer["actor"] is None:
        if answer["has_token"]:
            return f"unknown: {answer['actor_error'] or 'not connected'}"
        return "none: no token; log in with: lattice remote login"
    return ", ".join([answer["actor"], *answer["act_as"]])


def versions(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(found.items()))


def payloads(found: dict[str, Any]) -> str:
    """Describe the deferred contents of artifacts and their download."""
    how = "fetched in the background" if found["mode"] == "background" else "fetched on demand"
    if not found["away"]:
        return f"all here ({how})"
    text = f"{count(found['away'], 'file')} of {found['away_bytes'] / _MIB:.1f} MiB not here ({how})"
    if (now := found["fetching"]) is not None:
        text += f"; fetching {now['path']}, {now['done'] / _MIB:.1f} of {now['total'] / _MIB:.1f} MiB"
    return text + (f"; {found['trouble']}" if found["trouble"] else "")
