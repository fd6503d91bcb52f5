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
    """Export a project as a plain lattice directory, consistent at one moment. The server may run or not.

    Exits with 1 if lattice's doctor finds errors in it.

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
    name: Annotated[str, typer.Argument(help="New name: lower case letters, digits, dashes.")],
    data: DataOption = None,
) -> None:
    """Rename a project. Its tokens are updated; its clients are sent the new name.

    Example: lattice-remote project rename web site
    """
    tokens = rename_project(_data(context, data), slug, name)
    typer.echo(f"{slug} is now called {name}; {_counted(tokens, 'token')} updated.")
    typer.echo(f"On each client, run: lattice remote set-url origin URL --project {name}", err=True)


@projects.command("archive")
def archive(context: typer.Context, slug: Slug, data: DataOption = None) -> None:
    """Archive a project: it is not served until it is unarchived. Its tokens stay.

    Example: lattice-remote project archive web
    """
    archive_project(_data(context, data), slug)
    typer.echo(f"Archived {slug}; restore it with: lattice-remote project unarchive {slug}")


@projects.command("unarchive")
def unarchive(context: typer.Context, slug: Slug, data: DataOption = None) -> None:
    """Restore an archived project; a running server serves it at once.

    Example: lattice-remote project unarchive web
    """
    unarchive_project(_data(context, data), slug)
    typer.echo(f"{slug} is back.")


@projects.command("delete")
def delete(
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
    if confirm is None and sys.stdin.isatty():
        confirm = typer.prompt(f"This deletes {slug} for all users. Type its name")
    if confirm != slug:
        raise Misuse("nothing was deleted: name the project a second time, with --confirm SLUG")
    place, tokens = delete_project(_data(context, data), slug)
    typer.echo(f"Deleted {slug}; {_counted(tokens, 'token')} lost it. Its files are in {place} until you remove them.")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
