"""``lattice-remote import``, ``export`` and ``project rename``, ``archive``, ``unarchive``, ``delete``."""

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from lattice_remote.errors import Misuse
from lattice_remote.server.datadir import DataDir, administered
from lattice_remote.server.maintenance.transfer import (
    archive_project,
    delete_project,
    export_project,
    import_project,
    rename_project,
    unarchive_project,
)
from lattice_remote.text import printable

__all__ = ["app", "projects"]

app = typer.Typer()
projects = typer.Typer()

_DATA_HELP = "The data directory. Else LATTICE_REMOTE_DATA, else the user's data directory."
DataOption = Annotated[Path | None, typer.Option("--data", metavar="DIR", help=_DATA_HELP, show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Slug = Annotated[str, typer.Argument(help="The project.")]


def _data(context: typer.Context, after: Path | None) -> DataDir:
    return administered(after or context.find_root().obj)


@app.command("import")
def import_(  # noqa: PLR0917 - Typer calls it
    context: typer.Context,
    source: Annotated[Path, typer.Option("--from", metavar="DIR", help="A directory with a lattice project.")],
    project: Annotated[str, typer.Option(metavar="SLUG", help="Its name here: a new one, or an empty project's.")],
    keep_hooks: Annotated[
        bool, typer.Option("--keep-hooks", help="Keep the hooks of its config.json: they will run on this machine.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all of it, and change nothing.")] = False,
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Make a directory's project one of this server, checked first by lattice itself. The server may run or not.

    Example: lattice-remote import --from ~/src/web --project web
    """
    report = import_project(_data(context, data), project, source, keep_hooks=keep_hooks, dry_run=dry_run)
    if as_json:
        typer.echo(msgspec.json.encode(report).decode())
        return
    what = f"{report.tasks} tasks, {report.archived} archived, {report.files} files, {report.bytes} bytes"
    done = "Would import" if dry_run else "Imported"
    typer.echo(f"{done} {project}: {what}.")
    for note in report.notes():
        typer.echo(printable(note), err=True)


@app.command("export")
def export(
    context: typer.Context,
    slug: Slug,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty directory.")],
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Make a plain lattice directory of a project, as it is at one moment. The server may run or not.

    Exits with 1 when lattice's doctor finds errors in it.

    Example: lattice-remote export web ~/src/web
    """
    exported = export_project(_data(context, data), slug, directory)
    if as_json:
        typer.echo(msgspec.json.encode(exported).decode())
    else:
        what = f"{exported.tasks} tasks, {exported.archived} archived, {exported.files} files, {exported.bytes} bytes"
        typer.echo(f"Exported {slug} to {exported.directory}: {what}.")
        for finding in exported.findings:
            typer.echo(printable(finding), err=True)
    if not exported.is_sound:
        raise typer.Exit(1)


@projects.command("rename")
def rename(
    context: typer.Context,
    slug: Slug,
    name: Annotated[str, typer.Argument(help="What it is to be called: lower case letters, digits, dashes.")],
    data: DataOption = None,
) -> None:
    """Rename a project. Its tokens go along; its clients are told what it is called now.

    Example: lattice-remote project rename web site
    """
    tokens = rename_project(_data(context, data), slug, name)
    typer.echo(f"{slug} is called {name} now; {_counted(tokens, 'token')} went along.")
    typer.echo(f"Each client goes on with: lattice remote set-url origin URL --project {name}", err=True)


@projects.command("archive")
def archive(context: typer.Context, slug: Slug, data: DataOption = None) -> None:
    """Move a project aside: nobody is served it until it is back. Its tokens stay.

    Example: lattice-remote project archive web
    """
    archive_project(_data(context, data), slug)
    typer.echo(f"Archived {slug}; bring it back with: lattice-remote project unarchive {slug}")


@projects.command("unarchive")
def unarchive(context: typer.Context, slug: Slug, data: DataOption = None) -> None:
    """Bring an archived project back; a running server has it at once.

    Example: lattice-remote project unarchive web
    """
    unarchive_project(_data(context, data), slug)
    typer.echo(f"{slug} is back.")


@projects.command("delete")
def delete(
    context: typer.Context,
    slug: Slug,
    confirm: Annotated[
        str | None, typer.Option(metavar="SLUG", help="Its name once more; else it is asked for.", show_default=False)
    ] = None,
    data: DataOption = None,
) -> None:
    """Move an archived project to the trash, and take it out of all tokens. Nothing is removed from the disk.

    Example: lattice-remote project delete web
    """
    if confirm is None and sys.stdin.isatty():
        confirm = typer.prompt(f"This deletes {slug} for everybody. Type its name")
    if confirm != slug:
        raise Misuse("nothing was deleted: name the project a second time, with --confirm SLUG")
    place, tokens = delete_project(_data(context, data), slug)
    typer.echo(f"Deleted {slug}; {_counted(tokens, 'token')} lost it. Its files are in {place} until you remove them.")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
