"""``lattice remote ...``: a Typer app over the requests of ``service.py``.

Results go to stdout, everything else to stderr; colours and progress only where there is a terminal.
"""

import asyncio
import contextlib
import getpass
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NoReturn

import typer
from lattice.storage.fs import LatticeRootError, find_root

from lattice_remote.client import adding, credentials, history, runtime, servers
from lattice_remote.client.agent_client import Progress, agent_enabled, ask, ask_running_agent
from lattice_remote.client.routing import describe_age
from lattice_remote.client.settings import Remote, parse_url, read_remote, write_remote
from lattice_remote.errors import ConnectionFailed, Misuse, RemoteError, one_line

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    help="Share this board through a server.",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
agent_app = typer.Typer(help="The background agent of this user.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(agent_app, name="agent")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
CaFile = Annotated[
    str | None,
    typer.Option(
        "--ca-file", metavar="FILE", help="Authorities (PEM) that vouch for this server, in place of the system's."
    ),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Let tokens go to this server over plain HTTP, also from another machine.")
]


def main(args: Sequence[str], prog_name: str) -> NoReturn:
    """Run ``lattice remote`` with these arguments and exit; our errors are one line, or an envelope with ``--json``."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a directory's name may be no text: shown as it is
    try:
        app(args=list(args), prog_name=prog_name)
    except RemoteError as error:
        _fail(error, is_json="--json" in args)
    raise SystemExit(0)


def _fail(error: RemoteError, *, is_json: bool) -> NoReturn:
    if is_json:
        _print_json({"ok": False, "error": {"code": error.code, "message": error.message}})
    else:
        typer.echo(f"Error: {error.message}", err=True)
    raise SystemExit(1)


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, sort_keys=True))


def _result(data: dict[str, Any]) -> None:
    _print_json({"ok": True, "data": {key: value for key, value in data.items() if key != "ok"}})


# --- which remote ---


@app.callback(invoke_without_command=True)
def remote(
    context: typer.Context,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the URL and project too.")] = False,
    as_json: Json = False,
) -> None:
    """Share this board through a server. Without a subcommand: list the project's remote."""
    if context.invoked_subcommand is not None:
        return
    directory = _lattice_directory()
    found = read_remote(directory) if directory and os.path.exists(os.path.join(directory, "remote.json")) else None
    if as_json:
        _result({"remotes": [_fields(found)] if found else []})
    elif found is not None:
        typer.echo(f"{found.name}\t{found.url} {found.project}" if verbose else found.name)


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
    root = os.path.abspath(os.environ.get("LATTICE_ROOT") or os.getcwd())
    server_url, slug = parse_url(url, project)
    server = servers.name(server_url, insecure=insecure, ca_file=ca_file)
    servers.admit(server_url, server)  # before anything is asked for
    is_visible = token not in (None, "-")
    if token == "-":  # noqa: S105 - no token
        token = _ask_for_token(server_url)
    with _progress("fetching") as show:
        added = asyncio.run(adding.add_remote(root, name, server, project=slug, token=token, show=show))
    with contextlib.suppress(RemoteError):
        ask(_request("ready", added.directory))  # from here on the agent follows
    if as_json:
        _result({**_fields(added.remote), "tasks": added.tasks, "files": added.files, "seq": added.seq})
    else:
        typer.echo(
            f"Added remote {added.remote.name} ({added.remote.url}, project {added.remote.project}): "
            f"{_count(added.tasks, 'task')}, {_count(added.files, 'file')}, at change {added.seq}."
        )
    if is_visible:
        typer.echo(
            "lattice-remote: others on this machine can see a token in a command line; --token - asks for it", err=True
        )


@app.command()
def show(name: Annotated[str, typer.Argument()] = "", as_json: Json = False) -> None:
    """Show where the remote is and how the copy stands."""
    directory, found = _here(name)
    status = ask(_request("status", directory))
    if as_json:
        _result(status)
        return
    typer.echo(f"* remote {found.name}")
    typer.echo(f"  URL: {found.url}")
    typer.echo(f"  Project: {found.project}")
    typer.echo(f"  Acting as: {one_line(_acting(status))}")
    typer.echo(f"  Connection: {one_line(_connection(status))}")
    typer.echo(f"  Copy: {one_line(_copy(status))}")


@app.command(name="set-url")
def set_url(
    name: str,
    url: str,
    project: Annotated[str | None, typer.Option()] = None,
    ca_file: CaFile = None,
    insecure: Insecure = False,
) -> None:
    """Change where the remote is, after its server has moved.

    Example: lattice remote set-url origin https://new.example.org
    """
    directory, found = _here(name)
    new_url, slug = parse_url(url, project)
    servers.record(servers.name(new_url, insecure=insecure, ca_file=ca_file))
    write_remote(directory, Remote(found.name, new_url, slug or found.project))
    typer.echo(
        f"{found.name} is now {new_url} {slug or found.project}; the copy is compared with it when it is next used."
    )


@app.command()
def remove(name: str) -> None:
    """Take the remote and its copy out of this directory. Refused while something is only here."""
    directory, found = _here(name)
    _require_nothing_else_of_ours(directory)
    adding.remove_remote(directory, found)
    typer.echo(f"Removed remote {found.name} and the copy of {found.project}; nothing changes on the server.")


def _require_nothing_else_of_ours(directory: str) -> None:
    """Raise ``Misuse`` if the server, where it is in reach, has other texts than are here, or none."""
    try:
        answer = ask(_request("verify", directory))
    except RemoteError:
        return  # nobody can tell; edited plans and notes are known without it
    if own := [*answer["differing"], *answer["surplus"]]:
        raise Misuse(
            f"not as on the server: {', '.join(own[:5])}; keep a copy of what is yours, then: lattice remote sync"
        )


# --- tokens ---


@app.command()
def login(
    url: Annotated[str, typer.Argument(help="The project's server by default.")] = "",
    ca_file: CaFile = None,
    insecure: Insecure = False,
) -> None:
    """Keep a token for this user, typed without echo or read from stdin; it replaces the one before.

    Example: lattice remote login https://board.example.org < token.txt
    """
    server_url, slug = _server_and_slug(url)
    server = servers.name(server_url, insecure=insecure, ca_file=ca_file)
    servers.admit(server_url, server)
    token = _ask_for_token(server_url)
    checked = asyncio.run(adding.check_token(server, slug, token)) if slug else "not checked: no project given"
    servers.record(server)
    credentials.store(server_url, slug or credentials.ANY_PROJECT, token)
    place = f"{server_url}/{slug}" if slug else server_url
    typer.echo(f"Token for {place} is kept in {credentials.tokens_path()} ({one_line(checked)}).")
    for other in _going_before(server_url, slug):
        typer.echo(f"lattice-remote: {other}", err=True)


def _going_before(server_url: str, slug: str | None) -> Iterator[str]:
    """Say which other tokens are used in place of the one that was just kept."""
    if credentials.from_environment() is not None:
        yield "LATTICE_TOKEN is set here, and goes before any token that is kept"
    for project in credentials.projects(server_url) if slug is None else ():
        advice = f"replace it: lattice remote login {server_url}/{project}"
        yield f"{project} has a token of its own, which goes before this one; {advice}"


@app.command()
def trust(
    url: Annotated[str, typer.Argument(help="The project's server by default.")] = "",
    ca_file: CaFile = None,
    insecure: Insecure = False,
    max_cache: Annotated[
        int | None,
        typer.Option("--max-cache", metavar="MIB", min=1, help="How large it may make a copy here; 4096 by default."),
    ] = None,
) -> None:
    """Name a server as yours, so that LATTICE_TOKEN is sent there; say how its certificate is verified.

    Example: lattice remote trust https://board.example.org --ca-file company.pem
    """
    server_url, _ = _server_and_slug(url)
    server = servers.name(server_url, insecure=insecure, ca_file=ca_file, max_cache_mib=max_cache)
    known = servers.admit(server_url, server)
    servers.record(server)
    by = f", vouched for by {known.ca_file}" if known.ca_file else ""
    how = (
        "over plain HTTP, readable on the way" if known.insecure else "this machine only" if _is_http(known) else "TLS"
    )
    typer.echo(f"Tokens may go to {server_url} ({how}{by}); kept in {servers.servers_path()}.")


@app.command()
def logout(url: Annotated[str, typer.Argument(help="The project's server by default.")] = "") -> None:
    """Forget this user's token; with the last one, that the server was ever named."""
    server_url, slug = _server_and_slug(url)
    gone = credentials.forget(server_url, slug)
    if not credentials.is_known(server_url):
        servers.forget(server_url)
    typer.echo(f"Forgot {_count(gone, 'token')} for {server_url}." if gone else f"There was no token for {server_url}.")


def _ask_for_token(server_url: str) -> str:
    typed = getpass.getpass(f"Token for {server_url}: ") if sys.stdin.isatty() else sys.stdin.readline()
    return credentials.check_token(typed.strip())


def _is_http(server: servers.Server) -> bool:
    return server.url.startswith("http:")


def _server_and_slug(url: str) -> tuple[str, str | None]:
    if url:
        return parse_url(url)
    _, found = _here()
    return found.url, found.project


# --- the copy ---


@app.command()
def status(as_json: Json = False) -> None:
    """Say whether the copy is connected and current, and how that is known."""
    directory, found = _here()
    answer = ask(_request("status", directory))
    try:
        answer["agent"] = _agent_status()
    except ConnectionFailed as silent:
        answer["agent"] = {"error": silent.message}
    if as_json:
        _result(answer)
        return
    versions = answer["versions"]
    rows = [
        ("remote", f"{found.name} {found.url} project {found.project}"),
        ("connection", _connection(answer)),
        ("copy", _copy(answer)),
        ("acting as", _acting(answer)),
        ("unsent edits", ", ".join(answer["unsent_edits"]) or "none"),
        ("set aside", ", ".join(answer["set_aside"]) or "none"),
        ("healed", _healed(answer["healed"])),
        ("agent", _agent(answer["agent"])),
        ("versions here", _versions(versions["here"])),
        ("versions there", _versions(versions["server"]) if versions["server"] else "unknown: not connected"),
    ]
    rows += [("note", f"{name} {advice}") for name, advice in (versions["differences"] or {}).items()]
    for label, text in rows:
        typer.echo(f"{label + ':':16}{one_line(text)}")


@app.command()
def pull(as_json: Json = False) -> None:
    """Bring the copy up to date now."""
    directory, _ = _here()
    with _progress("fetching") as show:
        answer = ask(_request("pull", directory), show)
    if as_json:
        _result(answer)
    else:
        typer.echo(f"Up to date at change {answer['seq']}.")


@app.command()
def push(as_json: Json = False) -> None:
    """Send edited plans and notes now."""
    directory, _ = _here()
    answer = ask(_request("push", directory))
    if as_json:
        _result(answer)
    else:
        for sent in answer["sent"]:
            typer.echo(f"{one_line(sent['path'])}: {sent['outcome']}")
        for notice in answer["notices"]:
            typer.echo(f"lattice-remote: {one_line(notice)}", err=True)
        if not answer["sent"]:
            typer.echo("Nothing to send.")
    if any(sent["outcome"] in ("conflict", "refused") for sent in answer["sent"]):
        raise typer.Exit(1)


@app.command()
def sync(as_json: Json = False) -> None:
    """Compare every file with the server's and mend what differs."""
    directory, _ = _here()
    with _progress("comparing") as show:
        answer = ask(_request("sync", directory), show)
    if as_json:
        _result(answer)
        return
    for label, key in (
        ("fetched", "differing"),
        ("restored", "missing"),
        ("removed", "surplus"),
        ("kept edit", "edited"),
    ):
        for path in answer[key]:
            typer.echo(f"{label}: {one_line(path)}")
    for notice in answer["notices"]:
        typer.echo(f"lattice-remote: {one_line(notice)}", err=True)
    mended = sum(len(answer[key]) for key in ("differing", "missing", "surplus"))
    what = f"mended {_count(mended, 'file')} of" if mended else "nothing to mend in"
    typer.echo(f"Compared with the server at change {answer['seq']}: {what} {_count(answer['total'], 'file')}.")


@app.command()
def verify(as_json: Json = False) -> None:
    """Compare every file with the server's; change nothing. Exits with 1 when anything differs."""
    directory, _ = _here()
    with _progress("comparing") as show:
        answer = ask(_request("verify", directory), show)
    differences = sum(len(answer[key]) for key in ("differing", "missing", "surplus", "edited"))
    if as_json:
        _result({**answer, "equal": not differences})
    else:
        for label, key in (
            ("differs", "differing"),
            ("missing here", "missing"),
            ("not on the server", "surplus"),
            ("edited, not sent yet", "edited"),
        ):
            for path in answer[key]:
                typer.echo(f"{label}: {one_line(path)}")
        outcome = f"{_count(differences, 'difference')} in" if differences else "equal, all"
        typer.echo(f"Compared with the server at change {answer['seq']}: {outcome} {_count(answer['total'], 'file')}.")
    if differences:
        raise typer.Exit(1)


@app.command()
def log(
    task: Annotated[str, typer.Option(metavar="ID", help="Only what touched this task: LAT-42 or task_...")] = "",
    number: Annotated[int, typer.Option("-n", min=1, max=history.MAX_ENTRIES, help="How many changes.")] = 20,
    as_json: Json = False,
) -> None:
    """Show who changed what, when, and through which token; newest first.

    Example: lattice remote log --task LAT-42 -n 5
    """
    directory, _ = _here()
    answer = ask({**_request("log", directory), "task": task, "limit": number})
    if as_json:
        _result(history.records(answer, directory))
        return
    for line in history.lines(answer, directory) or ["No changes are kept."]:
        typer.echo(line)


# --- the agent ---


@agent_app.command(name="status")
def agent_status(as_json: Json = False) -> None:
    """Say whether the agent runs, and which copies it looks after."""
    answer = _agent_status()
    if as_json:
        _result({"running": answer is not None, **(answer or {})})
    elif answer is None:
        place = runtime.locate()
        why = "switched off" if not agent_enabled() else f"it starts with the next command; log: {place.log}"
        typer.echo(f"The agent is not running ({why}).")
    else:
        typer.echo(f"pid {answer['pid']}, version {answer['version']}, up {describe_age(answer['uptime_s'])}")
        typer.echo(f"socket {answer['socket']}, log {answer['log']}")
        for cache in answer["caches"]:
            how = "connected" if cache["connected"] else "not connected"
            typer.echo(f"{cache['directory']}: {cache['url']} {cache['project']}, {how}, at change {cache['seq']}")


@agent_app.command(name="stop")
def agent_stop() -> None:
    """End the agent; the next command starts a new one."""
    answer = ask_running_agent({"do": "agent-stop"})
    typer.echo(f"Stopped the agent (pid {answer['pid']})." if answer else "The agent is not running.")


def _agent_status() -> dict[str, Any] | None:
    return ask_running_agent({"do": "agent-status"})


# --- shared ---


def _lattice_directory() -> str | None:
    try:
        root = find_root()
    except LatticeRootError as error:
        raise Misuse(str(error)) from error
    return None if root is None else os.path.join(root, ".lattice")


def _here(name: str = "") -> tuple[str, Remote]:
    """Return the cache around us and its remote, which must be called ``name`` if one is given."""
    directory = _lattice_directory()
    if directory is None:
        raise Misuse("there is no lattice project here; add one with: lattice remote add origin URL --project SLUG")
    found = read_remote(directory)
    if name and name != found.name:
        raise Misuse(f"no remote called {name!r} here; there is {found.name!r}")
    return directory, found


def _request(do: str, directory: str) -> dict[str, Any]:
    named = os.environ.get(servers.URL_ENV, "").strip() or None
    return {"do": do, "directory": directory, "token": credentials.from_environment(), "named": named}


def _fields(found: Remote) -> dict[str, str]:
    return {"name": found.name, "url": found.url, "project": found.project}


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def _connection(answer: dict[str, Any]) -> str:
    heard = answer["last_heard_s"]
    if answer["connected"]:
        return f"connected (last frame {heard} s ago)"
    ago = "nothing heard of the server yet" if heard is None else f"last frame {describe_age(heard)} ago"
    return f"not connected: {answer['error'] or 'connecting'} ({ago})"


def _copy(answer: dict[str, Any]) -> str:
    here, there = answer["seq"], answer["server_seq"]
    if answer["trouble"]:
        return f"stuck at change {here}: {answer['trouble']}"
    if answer["current"]:
        return f"current (change {here} here, {there} on the server)"
    if there is None:
        age = "never filled" if answer["age_s"] is None else f"{describe_age(answer['age_s'])} old"
        return f"{age} (change {here} here, unknown on the server)"
    return f"catching up (change {here} here, {there} on the server, {_count(answer['wanted'], 'file')} to fetch)"


def _healed(healed: dict[str, Any]) -> str:
    """Say what other hands than the server's did to the files, and how that is noticed."""
    text = f"{_count(healed['count'], 'file')} since the agent started"
    if healed["last_path"] is not None:
        text += f", last {healed['last_path']} {describe_age(healed['last_age_s'])} ago"
    if healed["fought_over"]:
        text += f"; another process keeps writing {', '.join(healed['fought_over'][:5])}"
    return f"{text} ({healed['watched'] or 'nobody watches: no agent'})"


def _agent(agent: dict[str, Any] | None) -> str:
    if agent is None:
        return "not used"
    return str(agent.get("error") or f"pid {agent['pid']}, {_count(len(agent['caches']), 'copy', 'copies')}")


def _acting(answer: dict[str, Any]) -> str:
    if answer["actor"] is None:
        return (
            "unknown: not connected" if answer["has_token"] else "nobody: no token; log in with: lattice remote login"
        )
    return ", ".join([answer["actor"], *answer["act_as"]])


def _versions(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(found.items()))


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Progress | None]:
    """Show a bar on stderr while something takes its time; None where stderr is no terminal."""
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
