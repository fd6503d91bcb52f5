"""``lattice-remote import``: a directory becomes a project, checked like one that a client pushes."""

import asyncio
import os
import secrets
import shutil
from pathlib import Path

from lattice_remote.errors import Misuse, Rejected, StorageError
from lattice_remote.server.checks.recovering import recover
from lattice_remote.server.data.closing import closing
from lattice_remote.server.data.datadir import DataDir
from lattice_remote.server.data.ipc import Adopt
from lattice_remote.server.intake.quarantine import quarantine
from lattice_remote.server.intake.report import Report
from lattice_remote.server.tree.manifest import sync_directory
from lattice_remote.server.tree.tree import Tree
from lattice_remote.server.worker.adoption import decide, require_empty

__all__ = ["import_project"]

_MAX_BYTES = 1 << 40


def import_project(data: DataDir, slug: str, source: Path, *, keep_hooks: bool, dry_run: bool) -> Report:
    """Make the lattice project in ``source`` the project ``slug``, which is new or empty.

    A running server has it at once. Nothing in ``source`` is changed. A crash at any moment leaves the project as it
    was, or imported as a whole.

    Args:
        data: the data directory.
        slug: the project's name.
        source: the directory that holds ``.lattice``, or that itself.
        keep_hooks: keep the hooks of its config.json.
        dry_run: check all of it, and put nothing in place.

    Raises:
        Misuse: there is no project in ``source``, or it can't be taken, or ``slug`` is in use; nothing was changed.
        StorageError: a file can't be read or written.
    """
    data.config()
    lattice = _lattice_in(source)
    is_new = not data.has_project(slug)
    if is_new:
        data.require_free(slug)
    else:
        _require_empty(data, slug)
    place = data.projects / f".new-{secrets.token_hex(8)}"
    hooks_of = None if is_new else data.project(slug).lattice / "config.json"
    try:
        report = asyncio.run(
            quarantine(place, ["--from", lattice], max_bytes=_MAX_BYTES, keep_hooks=keep_hooks, hooks_of=hooks_of)
        )
        if report.refused:
            raise Misuse(f"this project can't be taken: {report.refused}")
        if not dry_run:
            _put_in_place(data, slug, place, report, is_new=is_new)
    except OSError as error:
        raise StorageError(f"cannot import into {slug!r}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return report


def _lattice_in(source: Path) -> Path:
    for directory in (source / ".lattice", source):
        if (directory / "config.json").is_file():
            return directory.resolve()
    raise Misuse(f"there is no lattice project in {source}")


def _put_in_place(data: DataDir, slug: str, place: Path, report: Report, *, is_new: bool) -> None:
    if is_new:
        os.rename(place, data.projects / slug)
        sync_directory(data.projects)
        return
    paths = data.project(slug)
    request = Adopt(
        secrets.token_hex(16), "", "server", str(place), report.tasks, report.archived, report.files, report.notes()
    )
    with closing(paths.root, "its administrator brings a project here; come back in a moment") as release_writer:
        _require_empty(data, slug)
        decide(paths.root, request)
        release_writer()
        asyncio.run(recover(slug, paths, data.config().journal))


def _require_empty(data: DataDir, slug: str) -> None:
    lattice = data.project(slug).lattice
    tree = Tree(lattice, {})
    try:
        require_empty(lattice, {path: status.st_size for path, status in tree.scan()})
    except Rejected as error:
        raise Misuse(error.message) from error
