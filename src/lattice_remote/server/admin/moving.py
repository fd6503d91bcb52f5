"""Renamed, archived and deleted projects. Nothing here removes a project's files from the disk.

Each is one rename of the project's directory, with the project closed. What goes with it, its tokens above all, is done
before it where a crash in between must not open a door, and finished at the next start where it must not close one.
"""

import os
from datetime import UTC, datetime
from pathlib import Path

from lattice_remote.errors import Misuse, StorageError
from lattice_remote.server.data.closing import closing
from lattice_remote.server.data.datadir import DataDir
from lattice_remote.server.data.tokens import TokenFile
from lattice_remote.server.tree.manifest import sync_directory

__all__ = ["archive_project", "delete_project", "finish_renames", "rename_project", "unarchive_project"]


def rename_project(data: DataDir, old: str, new: str) -> int:
    """Give a project another name; return how many tokens went along. Its clients are told what it is called now.

    A crash leaves the old name, or the new one with ``finish_renames`` still to do; it may be called again.

    Raises:
        Misuse: there is no such project, or the new name is taken, or none.
        StorageError: a file can't be written, or the project's worker does not end.
    """
    data.config()
    renamed = data.renamed()
    if not data.has_project(old) and renamed.get(old) == new and data.has_project(new):
        return finish_renames(data)
    _require(data, old)
    data.require_free(new)
    with closing(data.project(old).root, f"project {old!r} is called {new!r} now"):
        # What leads here still does; what the new name once led to is over.
        data.save_renamed({**{was: new if to == old else to for was, to in renamed.items() if was != new}, old: new})
        _move(data.projects / old, data.projects / new)
        return finish_renames(data)


def finish_renames(data: DataDir) -> int:
    """Give each token that is for a project's former name its new one; return how many there were.

    A name that is a project's again, or an archived one's, is no former name.

    Raises:
        StorageError: ``tokens.json`` can't be read or written.
    """
    former = {
        old: new
        for old, new in data.renamed().items()
        if data.has_project(new) and not data.has_project(old) and not data.is_archived(old)
    }
    return TokenFile(data.tokens).rename_projects(former) if former else 0


def archive_project(data: DataDir, slug: str) -> None:
    """Move a project aside: nobody is served it. Its tokens stay, for when it is back.

    Raises:
        Misuse: there is no such project.
        StorageError: it can't be moved, or its worker does not end.
    """
    data.config()
    _require(data, slug)
    with closing(data.project(slug).root, f"project {slug!r} is archived; ask its administrator"):
        data.archived.mkdir(mode=0o700, exist_ok=True)
        _move(data.projects / slug, data.archived / slug)


def unarchive_project(data: DataDir, slug: str) -> None:
    """Bring an archived project back; a running server has it at once.

    Raises:
        Misuse: there is no such archived project, or another project has its name.
        StorageError: it can't be moved.
    """
    data.config()
    _require_archived(data, slug)
    if (data.projects / slug).exists():
        raise Misuse(f"project {slug!r} exists already; rename that one first")
    _move(data.archived / slug, data.projects / slug)


def delete_project(data: DataDir, slug: str) -> tuple[Path, int]:
    """Move an archived project to the trash, and take it out of all tokens; return its place, and how many these were.

    A token that is for nothing else is revoked: whoever makes a project of this name later must not let in who had the
    old one.

    Raises:
        Misuse: there is no such archived project.
        StorageError: it can't be moved.
    """
    data.config()
    if data.has_project(slug):
        raise Misuse(f"project {slug!r} is in use; first: lattice-remote project archive {slug}")
    _require_archived(data, slug)
    tokens = TokenFile(data.tokens).forget_project(slug)
    place = data.trash / f"{slug}-{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}"
    data.trash.mkdir(mode=0o700, exist_ok=True)
    _move(data.archived / slug, place)
    data.save_renamed({old: new for old, new in data.renamed().items() if new != slug})
    return place, tokens


def _require(data: DataDir, slug: str) -> None:
    if data.is_archived(slug) and not data.has_project(slug):
        raise Misuse(f"project {slug!r} is archived; bring it back with: lattice-remote project unarchive {slug}")
    if not data.has_project(slug):
        raise Misuse(f"there is no project {slug!r}; see: lattice-remote project list")


def _require_archived(data: DataDir, slug: str) -> None:
    if not data.is_archived(slug):
        raise Misuse(f"there is no archived project {slug!r}; see: lattice-remote project list")


def _move(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
        sync_directory(source.parent)
        sync_directory(target.parent)
    except OSError as error:
        raise StorageError(f"cannot move {source} to {target}: {error.strerror}") from error
