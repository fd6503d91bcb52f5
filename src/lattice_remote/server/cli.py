"""``lattice-remote``: the administrator's command line.

Errors are one line on stderr that names the remedy, exit 1; a wrong command line is exit 2. Output for scripts (a
token, a listing with --json, the address) is alone on stdout. A command imports only the modules that it needs.
"""

import contextlib
import os
import resource
import socket
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer

import lattice_remote
from lattice_remote.conformance import conformance
from lattice_remote.errors import Misuse, RemoteError, printable
from lattice_remote.output import as_lines, as_records, columns, counted
from lattice_remote.server.datadir import DataDir, administered, default_location, remember
from lattice_remote.server.logging import FORMAT_VARIABLE, LEVEL_VARIABLE, log_to_stderr
from lattice_remote.server.tokens import Token, TokenFile, duration, expiry, read_last_uses, shown

if TYPE_CHECKING:
    from lattice_remote.server.cluster.shared_projects import SharedProjects
    from lattice_remote.server.maintenance.project_commands import Exported
    from lattice_remote.server.project.bundle_check import ImportReport

__all__ = ["NOT_RUNNING", "app", "main"]

NOT_RUNNING = 3
"""Exit code of ``status`` when no server runs, as with ``systemctl status``."""
_OPEN_FILES = 65_536
_FEW_PROJECTS = 3
"""Their processes need not share all memory."""

app = typer.Typer(
    help="The server of lattice-remote: Lattice projects shared by many machines.\n\n"
    "lattice-remote init ./board; lattice-remote --data ./board project create web; "
    "lattice-remote --data ./board start",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_projects = typer.Typer(help="Manage the projects on this server.", no_args_is_help=True)
_tokens = typer.Typer(help="Manage access tokens.", no_args_is_help=True)
app.add_typer(_projects, name="project")
app.add_typer(_tokens, name="token")
_cluster = typer.Typer(help="Manage this server's cluster; see docs/run/cluster.md.", no_args_is_help=True)
app.add_typer(_cluster, name="cluster")
app.command()(conformance)

_DATA_HELP = "The data directory. Else LATTICE_REMOTE_DATA, else the user's data directory."
DataOption = Annotated[Path | None, typer.Option("--data", metavar="DIR", help=_DATA_HELP, show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Slug = Annotated[str, typer.Argument(help="The project.")]
TokenName = Annotated[str, typer.Argument(help="Its id, or the token itself.")]


def main() -> None:
    try:
        app(prog_name="lattice-remote")
    except RemoteError as error:
        print(f"Error: {error.message}", file=sys.stderr)  # noqa: T201 - a command line prints
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"Error: {where}{error.strerror or error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lattice-remote {lattice_remote.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    data: DataOption = None,
    version: Annotated[  # noqa: ARG001 - the callback prints it
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    context.obj = data


def _data(context: typer.Context, after: Path | None) -> DataDir:
    """Return the data directory: named after the subcommand, before it, or the default one."""
    named = after or context.find_root().obj
    data = administered(named)
    if named is None and "LATTICE_REMOTE_DATA" not in os.environ:
        typer.echo(f"Data directory: {data.path}", err=True)
    return data


def _created(context: typer.Context, after: Path | None) -> DataDir:
    data = _data(context, after)
    data.config()
    return data


def _tokens_of(data: DataDir) -> TokenFile:
    """Return the tokens; those of its cluster if the directory belongs to one."""
    from lattice_remote.server.cluster.settings import load_settings

    if (settings := load_settings(data.path)) is None:
        return TokenFile(data.tokens)
    from lattice_remote.server.cluster.shared_state import shared_tokens

    return TokenFile(data.tokens, partial(shared_tokens, settings))


def _shared(data: DataDir) -> "SharedProjects | None":
    """Return the commands for the projects of a directory's cluster; None if it belongs to none."""
    from lattice_remote.server.cluster.settings import load_settings

    if (settings := load_settings(data.path)) is None:
        return None
    from lattice_remote.server.cluster.shared_projects import SharedProjects
    from lattice_remote.server.status import ask

    return SharedProjects(data, settings, lambda: ask(data.path) is not None)


def _print_json(content: object) -> None:
    typer.echo(msgspec.json.encode(content).decode())


def _print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    typer.echo("\n".join(columns([head, *rows])))


@app.command()
def init(
    context: typer.Context,
    directory: Annotated[Path | None, typer.Argument(metavar="[DIR]", show_default=False)] = None,
    data: DataOption = None,
) -> None:
    """Create a data directory.

    Example: lattice-remote init ./board
    """
    named = directory or data or context.find_root().obj
    target = administered(named)
    target.create()
    if named is not None:
        remember(target.path)
    target.admin_log.record("init", str(target.path))
    again = "" if _finds(target) else f" --data {target.path}"
    typer.echo(f"Created the data directory {target.path}. Next: lattice-remote{again} project create SLUG")


def _finds(target: DataDir) -> bool:
    try:
        return default_location().absolute() == target.path.absolute()
    except Misuse:
        return False


@app.command()
def start(  # noqa: PLR0917 - Typer calls it
    context: typer.Context,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 picks a free one.")] = 8443,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM file of the TLS certificate.", show_default=False)
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="PEM file of its private key, without a password.", show_default=False),
    ] = None,
    behind_proxy: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDRESS", help="A trusted proxy, or a network of them; may be repeated."),
    ] = None,
    metrics_listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Serve metrics on this address, without authentication.", show_default=False
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="URL,URL",
            help="Join a cluster, whose NATS servers these are; later starts remember it.",
            show_default=False,
        ),
    ] = None,
    node: Annotated[str | None, typer.Option(help="This node's name in the cluster.", show_default="host name")] = None,
    advertise: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The address at which the other nodes reach this one.", show_default=False),
    ] = None,
    cluster_credentials: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="user:password, token or .creds file for NATS.", show_default=False),
    ] = None,
    cluster_ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="PEM file of the authorities of NATS and the nodes.", show_default=False),
    ] = None,
    cluster_monitor: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Monitoring port of a NATS server, for its sync setting.", show_default=False),
    ] = None,
    cluster_replicas: Annotated[
        int | None,
        typer.Option(
            min=1, max=5, help="Copies of each change in NATS; 1 for a trial with one server.", show_default="3"
        ),
    ] = None,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="Log format: text or JSON.", envvar=FORMAT_VARIABLE)
    ] = "text",
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option(help="Log level; warning omits the line per request.", envvar=LEVEL_VARIABLE),
    ] = "info",
    data: DataOption = None,
) -> None:
    """Run the server. Prints one line once it is ready; stops in order on SIGTERM and Ctrl-C.

    Options for TLS, proxies and metrics override tls, trusted_proxies and metrics_listen in config.json.

    Example: lattice-remote --data ./board start --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem
    """
    from lattice_remote.server.cluster.settings import ClusterSettings, load_settings
    from lattice_remote.server.config import Tls
    from lattice_remote.server.project.child_process import Template

    target = _data(context, data)
    config = target.config()
    if tls_cert is not None or tls_key is not None:
        tls = Tls(cert=str(tls_cert.absolute()) if tls_cert else "", key=str(tls_key.absolute()) if tls_key else "")
        config = msgspec.structs.replace(config, tls=tls)
    if behind_proxy:
        config = msgspec.structs.replace(config, trusted_proxies=behind_proxy)
    if metrics_listen is not None:
        config = msgspec.structs.replace(config, metrics_listen=metrics_listen)
    lock = target.lock()
    assert lock >= 0, "held until this process ends"
    os.environ |= {FORMAT_VARIABLE: log_format, LEVEL_VARIABLE: log_level}
    log_to_stderr("%(asctime)s %(levelname)s %(name)s: %(message)s")
    _allow_many_connections()
    template = Template(is_for_many=len(target.slugs()) > _FEW_PROJECTS)
    template.prepare()  # it loads lattice while this process loads the rest
    from lattice_remote.server.server import bind, run

    with contextlib.closing(template):
        listener = bind(host, port)
        settings = load_settings(target.path)
        named: dict[str, Any] = {
            "servers": cluster.split(",") if cluster is not None else None,
            "node": node,
            "advertise": advertise,
            "credentials": str(cluster_credentials.absolute()) if cluster_credentials else None,
            "ca": str(cluster_ca.absolute()) if cluster_ca else None,
            "monitors": cluster_monitor,
            "replicas": cluster_replicas,
        }
        given = {name: value for name, value in named.items() if value is not None}
        if settings is None and given and cluster is None:
            raise Misuse(f"{target.path} belongs to no cluster yet; name its NATS servers with --cluster")
        if cluster is not None and advertise is None:
            given["advertise"] = f"{'https' if config.tls.cert else 'http'}://{host}:{listener.getsockname()[1]}"
        if settings is None and given:
            settings = ClusterSettings([], socket.gethostname().partition(".")[0], "")
        if settings is not None:
            settings = msgspec.structs.replace(settings, **given)
        run(target, config, listener, template, settings)


def _allow_many_connections() -> None:
    """Raise the limit on open files, often 1,024, as far as allowed and useful."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # the system has another, lower bound
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@app.command()
def status(context: typer.Context, as_json: JsonOption = False, data: DataOption = None) -> None:
    """Show the server's status: its projects, its clients and their lag.

    Asks the server that runs on the data directory, as the same user, and exits with 0.
    If none runs, reads the projects' files and exits with 3.

    Example: lattice-remote --data ./board status --json
    """
    from lattice_remote.server.status import present_status, status_lines

    target = DataDir(data or context.find_root().obj or default_location())
    target.config()
    found = present_status(target)
    if as_json:
        _print_json(found)
    else:
        typer.echo("\n".join(status_lines(found)))
    raise typer.Exit(0 if found.running else NOT_RUNNING)


@_projects.command("create")
def create_project(  # noqa: PLR0917 - Typer calls it
    context: typer.Context,
    slug: Annotated[str, typer.Argument(help="Name in URLs: lower case letters, digits, dashes.")],
    code: Annotated[
        str | None,
        typer.Option(
            help="Prefix of its tasks, 1 to 5 letters, such as LAT for LAT-1; else derived from the slug.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="A title for people.", show_default=False)] = None,
    actor: Annotated[
        str | None, typer.Option(help="Default actor of commands, such as human:ana.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Create a project; a running server serves it at once.

    Example: lattice-remote project create web --code WEB --name "The web site"
    """
    target = _data(context, data)
    create = target.create_project if (shared := _shared(target)) is None else shared.create
    code = create(slug, code=code, name=name, actor=actor)
    target.admin_log.record("project create", slug, code=code)
    if as_json:
        _print_json(target.summary(slug))
        return
    typer.echo(f"Created project {slug}; its tasks are {code}-1, {code}-2, ...")
    typer.echo(f"Next: lattice-remote token create --project {slug} --actor human:YOU")


@_projects.command("list")
def list_projects(context: typer.Context, as_json: JsonOption = False, data: DataOption = None) -> None:
    """List the projects with their numbers of tasks.

    Example: lattice-remote project list --json
    """
    target = _created(context, data)
    summaries = [target.summary(slug) for slug in [*target.slugs(), *target.archived_slugs()]]
    if as_json:
        _print_json(summaries)
        return
    rows = [(s.slug, s.code or "-", s.state, str(s.tasks), str(s.archived), s.name or "") for s in summaries]
    _print_table(("PROJECT", "CODE", "STATE", "TASKS", "ARCHIVED", "NAME"), rows)


@_projects.command("rename")
def rename_project(
    context: typer.Context,
    slug: Slug,
    name: Annotated[str, typer.Argument(help="New name: lower case letters, digits, dashes.")],
    data: DataOption = None,
) -> None:
    """Rename a project. Its tokens are updated; its clients are sent the new name.

    Example: lattice-remote project rename web site
    """
    from lattice_remote.server.maintenance import project_commands

    target = _data(context, data)
    rename = partial(project_commands.rename_project, target) if (shared := _shared(target)) is None else shared.rename
    tokens = rename(slug, name)
    target.admin_log.record("project rename", slug, name=name)
    typer.echo(f"{slug} is now called {name}; {counted(tokens, 'token')} updated.")
    typer.echo(f"On each client, run: lattice remote set-url origin URL --project {name}", err=True)


@_projects.command("archive")
def archive_project(context: typer.Context, slug: Slug, data: DataOption = None) -> None:
    """Archive a project: it is not served until it is unarchived. Its tokens stay.

    Example: lattice-remote project archive web
    """
    from lattice_remote.server.maintenance import project_commands

    target = _data(context, data)
    archive = (
        partial(project_commands.archive_project, target) if (shared := _shared(target)) is None else shared.archive
    )
    archive(slug)
    target.admin_log.record("project archive", slug)
    typer.echo(f"Archived {slug}; restore it with: lattice-remote project unarchive {slug}")


@_projects.command("unarchive")
def unarchive_project(context: typer.Context, slug: Slug, data: DataOption = None) -> None:
    """Restore an archived project; a running server serves it at once.

    Example: lattice-remote project unarchive web
    """
    from lattice_remote.server.maintenance import project_commands

    target = _data(context, data)
    unarchive = (
        partial(project_commands.unarchive_project, target) if (shared := _shared(target)) is None else shared.unarchive
    )
    unarchive(slug)
    target.admin_log.record("project unarchive", slug)
    typer.echo(f"{slug} is back.")


@_projects.command("delete")
def delete_project(
    context: typer.Context,
    slug: Slug,
    confirm: Annotated[
        str | None, typer.Option(metavar="SLUG", help="The name again, to skip the prompt.", show_default=False)
    ] = None,
    data: DataOption = None,
) -> None:
    """Move an archived project to the trash, and remove it from all tokens. No files are removed from the disk.

    Example: lattice-remote project delete web
    """
    from lattice_remote.server.maintenance import project_commands

    if confirm is None and sys.stdin.isatty():
        confirm = typer.prompt(f"This deletes {slug} for all users. Type its name")
    if confirm != slug:
        raise Misuse("nothing was deleted: name the project a second time, with --confirm SLUG")
    target = _data(context, data)
    delete = partial(project_commands.delete_project, target) if (shared := _shared(target)) is None else shared.delete
    place, tokens = delete(slug)
    target.admin_log.record("project delete", slug, moved_to=str(place))
    typer.echo(f"Deleted {slug}; {counted(tokens, 'token')} lost it. Its files are in {place} until you remove them.")


@app.command()
def log(  # noqa: PLR0917 - Typer calls it
    context: typer.Context,
    slug: Annotated[str, typer.Argument(help="The project.", show_default=False)] = "",
    admin: Annotated[bool, typer.Option("--admin", help="Changes of tokens and projects, by system users.")] = False,
    task: Annotated[str, typer.Option(metavar="ID", help="Only changes of this task: LAT-42 or task_...")] = "",
    number: Annotated[int, typer.Option("-n", min=1, help="Number of changes.")] = 20,
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Show the changes of a project with time, actor and token, newest first. The server may run or not.

    With --admin: the administrative changes of the whole server.

    Example: lattice-remote log web --task WEB-42 -n 5
    """
    from lattice_remote.server.project.journal_log import present_epoch, read_log, short_ids

    target = _created(context, data)
    if admin:
        if slug or task:
            raise Misuse("--admin shows the whole server's changes: it takes no project and no task")
        _show_admin_log(target, number, as_json=as_json)
        return
    if not slug:
        raise Misuse("name a project, or --admin; see: lattice-remote project list")
    if not target.has_project(slug):
        raise Misuse(f"there is no project {slug!r}; see: lattice-remote project list")
    paths = target.project(slug)
    entries, more = read_log(paths, task, number)
    names = short_ids(paths.lattice)
    if as_json:
        _print_json({"entries": as_records(entries, names), "epoch": present_epoch(paths), "more": more})
        return
    for line in as_lines(entries, names, present_epoch(paths)) or ["The journal has no changes."]:
        typer.echo(line)


def _show_admin_log(target: DataDir, number: int, *, as_json: bool) -> None:
    entries = target.admin_log.newest_first(number)
    if as_json:
        _print_json({"entries": entries})
        return
    for entry in entries:
        values = ((name, value if isinstance(value, str) else ",".join(value)) for name, value in entry.details.items())
        details = "".join(f"  {name} {value}" for name, value in values)
        typer.echo(printable(f"{entry.time}  {entry.user}  {entry.action} {entry.subject}{details}"))
    if not entries:
        typer.echo("No administrative changes are recorded.")


@app.command("import")
def import_project(  # noqa: PLR0917 - Typer calls it
    context: typer.Context,
    source: Annotated[Path, typer.Option("--from", metavar="DIR", help="A directory with a lattice project.")],
    project: Annotated[str, typer.Option(metavar="SLUG", help="Project name: a new one, or an empty project's.")],
    keep_hooks: Annotated[
        bool, typer.Option("--keep-hooks", help="Keep the hooks of its config.json; they run on this machine.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the project without changing anything.")] = False,
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Import a directory's project into this server. Lattice itself checks it first. The server may run or not.

    Example: lattice-remote import --from ~/src/web --project web
    """
    from lattice_remote.server.maintenance import project_commands

    target = _data(context, data)
    take = (
        partial(project_commands.import_project, target)
        if (shared := _shared(target)) is None
        else shared.import_project
    )
    report = take(project, source, keep_hooks=keep_hooks, dry_run=dry_run)
    if not dry_run:
        target.admin_log.record("import", project, source=str(source.absolute()))
    if as_json:
        _print_json(report)
        return
    done = "Would import" if dry_run else "Imported"
    typer.echo(f"{done} {project}: {_size_of(report)}.")
    for note in report.notes():
        typer.echo(printable(note), err=True)


def _size_of(project: "ImportReport | Exported") -> str:
    tasks, files = counted(project.tasks, "task"), counted(project.files, "file")
    return f"{tasks}, {project.archived} archived, {files}, {project.bytes} bytes"


@app.command("export")
def export_project(
    context: typer.Context,
    slug: Slug,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty directory.")],
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Export a project as a plain lattice directory, consistent at one moment. The server may run or not.

    Exits with 1 if lattice's doctor finds errors in it.

    Example: lattice-remote export web ~/src/web
    """
    from lattice_remote.server.maintenance import project_commands

    exported = project_commands.export_project(_data(context, data), slug, directory)
    if as_json:
        _print_json(exported)
    else:
        typer.echo(f"Exported {slug} to {exported.directory}: {_size_of(exported)}.")
        for finding in exported.findings:
            typer.echo(printable(finding), err=True)
    if not exported.is_sound:
        raise typer.Exit(1)


@app.command()
def fsck(
    context: typer.Context,
    project: Annotated[
        list[str] | None, typer.Option(metavar="SLUG", help="Only this project; may be repeated.", show_default=False)
    ] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Repair the findings; the server must be stopped.")] = False,
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Check journals, files, tokens and settings, every byte. Exit code 0: no findings; 1: findings; 2: check failed.

    Example: lattice-remote fsck --project web --repair
    """
    from lattice_remote.server.maintenance import fsck as checking

    target = _data(context, data)
    try:
        report = checking.fsck(target, checking.chosen(target, project), repair=repair)
    except RemoteError as error:
        typer.echo(f"Error: {error.message}", err=True)
        raise typer.Exit(2) from error
    typer.echo(checking.as_json(report) if as_json else "\n".join(checking.as_lines(report)))
    raise typer.Exit(1 if report.left else 0)


@_tokens.command("create")
def create_token(  # noqa: PLR0917 - Typer calls it
    context: typer.Context,
    project: Annotated[
        list[str] | None,
        typer.Option(metavar="SLUG", help="A project it gives access to; may be repeated.", show_default=False),
    ] = None,
    actor: Annotated[str, typer.Option(help="Its actor, such as human:ana.", show_default=False)] = "",
    act_as: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Further actors it may act as, such as 'agent:*'; may be repeated."),
    ] = None,
    expires: Annotated[
        str, typer.Option(metavar="WHEN", help="90d (s, m, h, d, w), a date such as 2030-12-31, or never.")
    ] = "never",
    metrics: Annotated[bool, typer.Option("--metrics", help="For /metrics alone, instead of projects.")] = False,
    read_only: Annotated[bool, typer.Option("--read-only", help="Refuse every write of this token.")] = False,
    server: Annotated[
        str,
        typer.Option(
            "--for", metavar="URL", help="Clients send it to this address without a login.", show_default=False
        ),
    ] = "",
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Create a token. It is printed alone on stdout, once: only its digest is stored.

    Example: lattice-remote token create --project web --actor human:ana --act-as 'agent:*' --expires 90d
    """
    target = _created(context, data)
    ends = expiry(expires, datetime.now(UTC))
    if metrics and (project or actor or act_as or read_only or server):
        raise Misuse("a token for metrics has no project and no actor; create another for those")
    if not metrics and not (project and actor):
        raise Misuse("a token needs at least one project and an actor; name them with --project and --actor")
    for slug in project or []:
        if not target.has_project(slug):
            raise Misuse(f"there is no project {slug!r}; create it with: lattice-remote project create {slug}")
    file = _tokens_of(target)
    if metrics:
        token, text = file.create_for_metrics(expires=ends)
    else:
        token, text = file.create(
            projects=project or [], actor=actor, act_as=act_as or [], expires=ends, read_only=read_only, server=server
        )
    _record(target, "token create", token)
    until = "" if ends is None else f" until {shown(ends, '')}"
    kind = ", to read only" if read_only else ""
    _print_secret(f"{token.id} for {token.actor}{kind}{until}; its text is", token, text, as_json)


def _print_secret(notice: str, token: Token, text: str, as_json: bool) -> None:
    if as_json:
        _print_json({"token": text, **_details(token, {})})
        return
    typer.echo(f"{notice} {'shown only once:' if sys.stdout.isatty() else 'written to stdout, only once'}", err=True)
    typer.echo(text)


def _record(target: DataDir, action: str, token: Token) -> None:
    target.admin_log.record(
        action,
        token.id,
        actor=token.actor,
        act_as=token.act_as,
        projects=token.projects,
        expires=shown(token.expires, ""),
        read_only="yes" if token.read_only else "",
    )


@_tokens.command("list")
def list_tokens(
    context: typer.Context,
    every: Annotated[bool, typer.Option("--all", help="Also the revoked ones.")] = False,
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """List the tokens, without their texts, which are not stored.

    Example: lattice-remote token list --all
    """
    target = _created(context, data)
    file, uses = TokenFile(target.tokens), read_last_uses(target.tokens_used)
    tokens = file.read_all() if every else file.read()
    if as_json:
        _print_json([_details(token, uses) for token in tokens])
        return
    rows = [
        (
            token.id,
            token.actor,
            ",".join(token.act_as) or "-",
            (",".join(token.projects) or "(metrics)") + (" (read only)" if token.read_only else ""),
            token.created,
            _expiry_of(token),
            shown(uses.get(token.id), "never"),
        )
        for token in tokens
    ]
    _print_table(("ID", "ACTOR", "MAY ACT AS", "PROJECTS", "CREATED", "EXPIRES", "LAST USED"), rows)


@_tokens.command("edit")
def edit_token(  # noqa: PLR0917 - Typer calls it
    context: typer.Context,
    id_or_token: TokenName,
    add_project: Annotated[
        list[str] | None, typer.Option(metavar="SLUG", help="A further project; may be repeated.", show_default=False)
    ] = None,
    remove_project: Annotated[
        list[str] | None, typer.Option(metavar="SLUG", help="A project to take away.", show_default=False)
    ] = None,
    act_as: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="All further actors, instead of the present ones; '' for none."),
    ] = None,
    expires: Annotated[
        str, typer.Option(metavar="WHEN", help="90d (s, m, h, d, w), a date, or never.", show_default=False)
    ] = "",
    read_only: Annotated[
        bool | None, typer.Option("--read-only/--read-write", help="Whether every write is refused.")
    ] = None,
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Change a token's projects, actors, expiry or rights. Its text stays; its live connections connect again.

    Example: lattice-remote token edit tok_0123456789ab --add-project api --expires 30d
    """
    target = _created(context, data)
    for slug in add_project or []:
        if not target.has_project(slug):
            raise Misuse(f"there is no project {slug!r}; see: lattice-remote project list")
    if not (add_project or remove_project or expires) and act_as is None and read_only is None:
        raise Misuse("nothing to change: name --add-project, --remove-project, --act-as, --expires or --read-only")
    token = _tokens_of(target).edit(
        id_or_token,
        add_projects=add_project or [],
        remove_projects=remove_project or [],
        act_as=None if act_as is None else [pattern for pattern in act_as if pattern],
        read_only=read_only,
        expires=expiry(expires, datetime.now(UTC)) if expires else ...,
    )
    _record(target, "token edit", token)
    if as_json:
        _print_json(_details(token, read_last_uses(target.tokens_used)))
        return
    kind = "reads only" if token.read_only else "reads and writes"
    where = ", ".join(token.projects) or "metrics"
    also = f" and {', '.join(token.act_as)}" if token.act_as else ""
    until = "without an expiry" if token.expires is None else f"until {shown(token.expires, '')}"
    typer.echo(f"{token.id} {kind} in {where} as {token.actor}{also}, {until}.")


@_tokens.command("rotate")
def rotate_token(
    context: typer.Context,
    id_or_token: TokenName,
    grace: Annotated[
        str, typer.Option(metavar="TIME", help="Time the old text stays valid: 30m, 1h, 7d; 0 ends it at once.")
    ] = "0",
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Give a token a new text, printed alone on stdout, once. Its id, actor, projects and expiry stay.

    Example: lattice-remote token rotate tok_0123456789ab --grace 1h
    """
    target = _created(context, data)
    left = timedelta() if grace == "0" else duration(grace)
    token, text = _tokens_of(target).rotate(id_or_token, grace=left)
    old = "no longer works" if grace == "0" else f"works until {shown(token.old_until, '')}"
    _record(target, "token rotate", token)
    notice = f"{token.id} for {token.actor}; the old text {old}; the new one is"
    _print_secret(notice, token, text, as_json)


@_tokens.command("revoke")
def revoke_token(
    context: typer.Context,
    id_or_token: TokenName,
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Revoke a token; its live connections end within a second. It stays in 'token list --all'.

    Example: lattice-remote token revoke tok_0123456789ab
    """
    target = _created(context, data)
    token = _tokens_of(target).revoke(id_or_token)
    _record(target, "token revoke", token)
    if as_json:
        _print_json(_details(token, read_last_uses(target.tokens_used)))
    else:
        typer.echo(f"Revoked {token.id} ({token.actor})")


def _details(token: Token, uses: dict[str, datetime]) -> dict[str, object]:
    return {
        "id": token.id,
        "actor": token.actor,
        "act_as": token.act_as,
        "projects": token.projects,
        "metrics": token.metrics,
        "read_only": token.read_only,
        "server": token.server or None,
        "revoked": shown(token.revoked, "") or None,
        "created": token.created,
        "expires": shown(token.expires, "") or None,
        "last_used": shown(uses.get(token.id), "") or None,
    }


def _expiry_of(token: Token) -> str:
    if token.revoked is not None:
        return f"revoked {shown(token.revoked, '')}"
    has_passed = token.expires is not None and token.expires <= datetime.now(UTC)
    return "expired" if has_passed else shown(token.expires, "never")


@_cluster.command("status")
def cluster_status(context: typer.Context, as_json: JsonOption = False, data: DataOption = None) -> None:
    """Show nodes, owners and lag. Exits with 1 if a project has no owner, or a node is silent or has a problem.

    Example: lattice-remote --data ./board cluster status --json
    """
    from lattice_remote.server.cluster import commands

    found = commands.cluster_status(commands.settings_of(_created(context, data)))
    if as_json:
        _print_json(found)
    else:
        typer.echo("\n".join(commands.status_lines(found)))
    raise typer.Exit(0 if found.is_whole else 1)


@_cluster.command("move")
def move_project(
    context: typer.Context,
    slug: Slug,
    node: Annotated[str, typer.Argument(help="The node that shall own it.")],
    data: DataOption = None,
) -> None:
    """Have another node own a project. Its clients wait for a moment and lose nothing.

    Example: lattice-remote --data ./board cluster move web b
    """
    from lattice_remote.server.cluster import commands

    target = _created(context, data)
    commands.move(commands.settings_of(target), slug, node)
    target.admin_log.record("cluster move", slug, node=node)
    typer.echo(f"Node {node} owns {slug}.")


@_cluster.command("rebuild")
def rebuild_project(
    context: typer.Context,
    slug: Slug,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    data: DataOption = None,
) -> None:
    """Begin a new epoch of a project with this node's files, after the cluster has lost its record of it.

    Changes that only other nodes have are lost. Run it where 'cluster status' shows the most changes.

    Example: lattice-remote --data ./board cluster rebuild web
    """
    from lattice_remote.server.cluster import commands

    target = _created(context, data)
    settings = commands.settings_of(target)
    if not yes:
        typer.confirm(f"Begin a new epoch of {slug} with the files of node {settings.node}?", abort=True)
    epoch = commands.rebuild(settings, slug)
    target.admin_log.record("cluster rebuild", slug, node=settings.node)
    typer.echo(f"{slug} goes on in epoch {epoch} with the files of node {settings.node}.")


@_cluster.command("leave")
def leave_cluster(
    context: typer.Context,
    without_projects: Annotated[
        bool, typer.Option("--without-projects", help="Leave the projects with the other nodes.")
    ] = False,
    data: DataOption = None,
) -> None:
    """Take this stopped node out of its cluster. The last node takes the projects along, with epoch and numbers.

    Example: lattice-remote --data ./board cluster leave
    """
    from lattice_remote.server.cluster import commands

    target = _created(context, data)
    settings = commands.settings_of(target)
    lock = target.lock()
    slugs = commands.leave(target, settings, keeps_projects=not without_projects)
    os.close(lock)
    target.admin_log.record("cluster leave", settings.node)
    kept = "Their copies here are in left/" if without_projects else "They are served by this server alone again"
    typer.echo(f"Node {settings.node} has left the cluster: {counted(len(slugs), 'project')}. {kept}.")
