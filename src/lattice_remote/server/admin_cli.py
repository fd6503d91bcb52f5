"""Commands of ``lattice-remote`` for projects, tokens and the cluster.

In a data directory of a cluster they work for all of its nodes.
"""

import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Concatenate

import msgspec
import typer

from lattice_remote.errors import Misuse, printable
from lattice_remote.output import as_lines, as_records, columns, counted
from lattice_remote.server.datadir import AdminEntry, DataDir, administered
from lattice_remote.server.tokens import Token, TokenFile, duration, expiry, read_last_uses, shown

if TYPE_CHECKING:
    from lattice_remote.server.maintenance.project_commands import Exported
    from lattice_remote.server.project.bundle_check import ImportReport

__all__ = [
    "DataOption",
    "JsonOption",
    "clusters",
    "data_of",
    "export_project",
    "import_project",
    "log",
    "projects",
    "show",
    "tokens",
]

projects = typer.Typer(help="Manage the projects on this server.", no_args_is_help=True, rich_markup_mode=None)
tokens = typer.Typer(help="Manage access tokens.", no_args_is_help=True, rich_markup_mode=None)
clusters = typer.Typer(
    help="Manage this server's cluster; see docs/run/cluster.md.", no_args_is_help=True, rich_markup_mode=None
)

_DATA_HELP = "The data directory. Else LATTICE_REMOTE_DATA, else the user's data directory."
DataOption = Annotated[Path | None, typer.Option("--data", metavar="DIR", help=_DATA_HELP, show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Slug = Annotated[str, typer.Argument(metavar="SLUG", help="The project.")]
TokenName = Annotated[str, typer.Argument(metavar="TOKEN", help="Its id, or the token itself.")]


def data_of(context: typer.Context, after: Path | None) -> DataDir:
    """Return the data directory: named after the subcommand, before it, or the default one."""
    named = after or context.find_root().obj
    data = administered(named)
    if named is None and "LATTICE_REMOTE_DATA" not in os.environ:
        typer.echo(f"Data directory: {data.path}", err=True)
    return data


def _created(context: typer.Context, after: Path | None) -> DataDir:
    data = data_of(context, after)
    data.config()
    return data


def show(content: object, lines: str | Sequence[str], *, as_json: bool) -> None:
    text = lines if isinstance(lines, str) else "\n".join(lines)
    typer.echo(msgspec.json.encode(content).decode() if as_json else text)


def _in_cluster[**P, R](data: DataDir, command: Callable[Concatenate[DataDir, P], R]) -> Callable[P, R]:
    """Return a command for projects; in a directory of a cluster, its method of the same name in ``SharedProjects``."""
    from lattice_remote.server.cluster.settings import load_settings

    if (settings := load_settings(data.path)) is None:
        return partial(command, data)
    from lattice_remote.server.cluster.shared_projects import SharedProjects
    from lattice_remote.server.status import ask

    shared = SharedProjects(data, settings, lambda: ask(data.path) is not None)
    method: Callable[P, R] = getattr(shared, command.__name__)
    return method


@projects.command("create")
def create_project(  # noqa: PLR0917 - Typer calls it
    context: typer.Context,
    slug: Annotated[str, typer.Argument(metavar="SLUG", help="Name in URLs: lower case letters, digits, dashes.")],
    code: Annotated[
        str | None,
        typer.Option(
            metavar="CODE",
            help="Prefix of its tasks, 1 to 5 letters, such as LAT for LAT-1; else derived from the slug.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="TITLE", help="A title for people.", show_default=False)] = None,
    actor: Annotated[
        str | None,
        typer.Option(metavar="ACTOR", help="Default actor of commands, such as human:ana.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Create a project; a running server serves it at once.

    Example: lattice-remote project create web --code WEB --name "The web site"
    """
    target = data_of(context, data)
    code = _in_cluster(target, DataDir.create_project)(slug, code=code, name=name, actor=actor)
    target.admin_log.record("project create", slug, code=code)
    lines = [
        f"Created project {slug}; its tasks are {code}-1, {code}-2, ...",
        f"Next: lattice-remote token create --project {slug} --actor human:YOU",
    ]
    show(target.summary(slug), lines, as_json=as_json)


@projects.command("list")
def list_projects(context: typer.Context, as_json: JsonOption = False, data: DataOption = None) -> None:
    """List the projects with their numbers of tasks.

    Example: lattice-remote project list --json
    """
    target = _created(context, data)
    summaries = [target.summary(slug) for slug in [*target.slugs(), *target.archived_slugs()]]
    rows = [(s.slug, s.code or "-", s.state, str(s.tasks), str(s.archived), s.name or "") for s in summaries]
    lines = columns([("PROJECT", "CODE", "STATE", "TASKS", "ARCHIVED", "NAME"), *rows])
    show(summaries, lines, as_json=as_json)


@projects.command("rename")
def rename_project(
    context: typer.Context,
    slug: Slug,
    name: Annotated[str, typer.Argument(metavar="NAME", help="New name: lower case letters, digits, dashes.")],
    data: DataOption = None,
) -> None:
    """Rename a project. Its tokens are updated; its clients are sent the new name.

    Example: lattice-remote project rename web site
    """
    from lattice_remote.server.maintenance import project_commands

    target = data_of(context, data)
    updated = _in_cluster(target, project_commands.rename_project)(slug, name)
    target.admin_log.record("project rename", slug, name=name)
    typer.echo(f"{slug} is now called {name}; {counted(updated, 'token')} updated.")
    typer.echo(f"On each client, run: lattice remote set-url origin URL --project {name}", err=True)


@projects.command("archive")
def archive_project(context: typer.Context, slug: Slug, data: DataOption = None) -> None:
    """Archive a project: it is not served until it is unarchived. Its tokens stay.

    Example: lattice-remote project archive web
    """
    from lattice_remote.server.maintenance import project_commands

    target = data_of(context, data)
    _in_cluster(target, project_commands.archive_project)(slug)
    target.admin_log.record("project archive", slug)
    typer.echo(f"Archived {slug}; restore it with: lattice-remote project unarchive {slug}")


@projects.command("unarchive")
def unarchive_project(context: typer.Context, slug: Slug, data: DataOption = None) -> None:
    """Restore an archived project; a running server serves it at once.

    Example: lattice-remote project unarchive web
    """
    from lattice_remote.server.maintenance import project_commands

    target = data_of(context, data)
    _in_cluster(target, project_commands.unarchive_project)(slug)
    target.admin_log.record("project unarchive", slug)
    typer.echo(f"{slug} is back.")


@projects.command("delete")
def delete_project(
    context: typer.Context,
    slug: Slug,
    confirm: Annotated[
        str | None, typer.Option(metavar="SLUG", help="The name again, to skip the prompt.", show_default=False)
    ] = None,
    data: DataOption = None,
) -> None:
    """Move an archived project to the trash. It is removed from all tokens. No files are removed from the disk.

    Example: lattice-remote project delete web
    """
    from lattice_remote.server.maintenance import project_commands

    if confirm is None and sys.stdin.isatty():
        confirm = typer.prompt(f"This deletes {slug} for all users. Type its name")
    if confirm != slug:
        raise Misuse("nothing was deleted: name the project a second time, with --confirm SLUG")
    target = data_of(context, data)
    place, losing = _in_cluster(target, project_commands.delete_project)(slug)
    target.admin_log.record("project delete", slug, moved_to=str(place))
    typer.echo(f"Deleted {slug}; {counted(losing, 'token')} lost it. Its files are in {place} until you remove them.")


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

    target = data_of(context, data)
    take = _in_cluster(target, project_commands.import_project)
    report = take(project, source, keep_hooks=keep_hooks, dry_run=dry_run)
    if not dry_run:
        target.admin_log.record("import", project, source=str(source.absolute()))
    done = "Would import" if dry_run else "Imported"
    show(report, f"{done} {project}: {_size_of(report)}.", as_json=as_json)
    _warn([] if as_json else report.notes())


def export_project(
    context: typer.Context,
    slug: Slug,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty directory.")],
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Export a project as a plain lattice directory. It is consistent at one moment. The server may run or not.

    Exits with 1 if lattice's doctor finds errors in it.

    Example: lattice-remote export web ~/src/web
    """
    from lattice_remote.server.maintenance import project_commands

    exported = project_commands.export_project(data_of(context, data), slug, directory)
    show(exported, f"Exported {slug} to {exported.directory}: {_size_of(exported)}.", as_json=as_json)
    _warn([] if as_json else exported.findings)
    if not exported.is_sound:
        raise typer.Exit(1)


def _warn(lines: Sequence[str]) -> None:
    for line in lines:
        typer.echo(printable(line), err=True)


def _size_of(project: "ImportReport | Exported") -> str:
    tasks, files = counted(project.tasks, "task"), counted(project.files, "file")
    return f"{tasks}, {project.archived} archived, {files}, {project.bytes} bytes"


def log(  # noqa: PLR0917 - Typer calls it
    context: typer.Context,
    slug: Annotated[str, typer.Argument(metavar="SLUG", help="The project.", show_default=False)] = "",
    admin: Annotated[bool, typer.Option("--admin", help="Changes of tokens and projects, by system users.")] = False,
    task: Annotated[str, typer.Option(metavar="ID", help="Only changes of this task: LAT-42 or task_...")] = "",
    number: Annotated[int, typer.Option("-n", metavar="N", min=1, help="Number of changes.")] = 20,
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Show the changes of a project, newest first. Each has its time, actor and token. The server may run or not.

    With --admin: the administrative changes of the whole server.

    Example: lattice-remote log web --task WEB-42 -n 5
    """
    from lattice_remote.server.maintenance.project_commands import paths_of
    from lattice_remote.server.project.journal_log import present_epoch, read_log, short_ids

    target = _created(context, data)
    if admin:
        if slug or task:
            raise Misuse("--admin shows the whole server's changes: it takes no project and no task")
        entries = target.admin_log.newest_first(number)
        lines = list(map(_admin_line, entries)) or ["No administrative changes are recorded."]
        show({"entries": entries}, lines, as_json=as_json)
        return
    if not slug:
        raise Misuse("name a project, or --admin; see: lattice-remote project list")
    paths = paths_of(target, slug)
    changes, more = read_log(paths, task, number)
    names, epoch = short_ids(paths.lattice), present_epoch(paths)
    content = {"entries": as_records(changes, names), "epoch": epoch, "more": more}
    show(content, as_lines(changes, names, epoch) or "The journal has no changes.", as_json=as_json)


def _admin_line(entry: AdminEntry) -> str:
    values = ((name, value if isinstance(value, str) else ",".join(value)) for name, value in entry.details.items())
    details = "".join(f"  {name} {value}" for name, value in values)
    return printable(f"{entry.time}  {entry.user}  {entry.action} {entry.subject}{details}")


@tokens.command("create")
def create_token(  # noqa: PLR0917 - Typer calls it
    context: typer.Context,
    project: Annotated[
        list[str] | None,
        typer.Option(metavar="SLUG", help="A project it gives access to; may be repeated.", show_default=False),
    ] = None,
    actor: Annotated[str, typer.Option(metavar="ACTOR", help="Its actor, such as human:ana.", show_default=False)] = "",
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
        _in_cluster(target, DataDir.require_project)(slug)
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


@tokens.command("list")
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
    found = file.read_all() if every else file.read()
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
        for token in found
    ]
    lines = columns([("ID", "ACTOR", "MAY ACT AS", "PROJECTS", "CREATED", "EXPIRES", "LAST USED"), *rows])
    show([_details(token, uses) for token in found], lines, as_json=as_json)


@tokens.command("edit")
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
        _in_cluster(target, DataDir.require_project)(slug)
    if not (add_project or remove_project or expires) and act_as is None and read_only is None:
        raise Misuse(
            "nothing to change: name --add-project, --remove-project, --act-as, --expires, --read-only or --read-write"
        )
    token = _tokens_of(target).edit(
        id_or_token,
        add_projects=add_project or [],
        remove_projects=remove_project or [],
        act_as=None if act_as is None else [pattern for pattern in act_as if pattern],
        read_only=read_only,
        expires=expiry(expires, datetime.now(UTC)) if expires else ...,
    )
    _record(target, "token edit", token)
    kind = "reads only" if token.read_only else "reads and writes"
    where = ", ".join(token.projects) or "metrics"
    also = f" and {', '.join(token.act_as)}" if token.act_as else ""
    until = "without an expiry" if token.expires is None else f"until {shown(token.expires, '')}"
    line = f"{token.id} {kind} in {where} as {token.actor}{also}, {until}."
    show(_details(token, read_last_uses(target.tokens_used)), line, as_json=as_json)


@tokens.command("rotate")
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


@tokens.command("revoke")
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
    details = _details(token, read_last_uses(target.tokens_used))
    show(details, f"Revoked {token.id} ({token.actor})", as_json=as_json)


def _tokens_of(data: DataDir) -> TokenFile:
    """Return the tokens; those of its cluster if the directory belongs to one."""
    from lattice_remote.server.cluster.settings import load_settings

    if (settings := load_settings(data.path)) is None:
        return TokenFile(data.tokens)
    from lattice_remote.server.cluster.shared_state import shared_tokens

    return TokenFile(data.tokens, partial(shared_tokens, settings))


def _print_secret(notice: str, token: Token, text: str, as_json: bool) -> None:
    if not as_json:
        once = "shown only once:" if sys.stdout.isatty() else "written to stdout, only once"
        typer.echo(f"{notice} {once}", err=True)
    show({"token": text, **_details(token, {})}, text, as_json=as_json)


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


@clusters.command("status")
def cluster_status(context: typer.Context, as_json: JsonOption = False, data: DataOption = None) -> None:
    """Show nodes, owners and lag. Exits with 1 if a project has no owner, or a node is silent or has a problem.

    Example: lattice-remote --data ./board cluster status --json
    """
    from lattice_remote.server.cluster import commands

    found = commands.cluster_status(commands.settings_of(_created(context, data)))
    show(found, commands.status_lines(found), as_json=as_json)
    raise typer.Exit(0 if found.is_whole else 1)


@clusters.command("move")
def move_project(
    context: typer.Context,
    slug: Slug,
    node: Annotated[str, typer.Argument(metavar="NODE", help="The node that shall own it.")],
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


@clusters.command("rebuild")
def rebuild_project(
    context: typer.Context,
    slug: Slug,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    data: DataOption = None,
) -> None:
    """Begin a new epoch of a project with this node's files. Its record in the cluster must be lost.

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


@clusters.command("leave")
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
