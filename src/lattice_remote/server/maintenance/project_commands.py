"""Commands for whole projects, while the server runs or not: export, import, rename, archive and delete.

Export works as a backup does: the tree is copied, then the journal, which completes every partly copied file; then a
worker opens the copy and brings it to one number (decision 0011).
"""

import asyncio
import os
import secrets
import shutil
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from lattice_remote.errors import Misuse, Rejected, StorageError
from lattice_remote.protocol.paths import is_replicated
from lattice_remote.server.datadir import DataDir, ProjectPaths, closing
from lattice_remote.server.ipc import ImportProject
from lattice_remote.server.maintenance.fsck import recover
from lattice_remote.server.maintenance.fsck_project import check_project
from lattice_remote.server.project.bundle_check import ImportReport, quarantine
from lattice_remote.server.tokens import TokenFile
from lattice_remote.server.tree.tree import ProjectTree, sync_directory, sync_files
from lattice_remote.server.worker.project_import import STATES, decide, require_empty

__all__ = [
    "Exported",
    "archive_project",
    "check_candidate",
    "delete_project",
    "export_project",
    "finish_renames",
    "import_project",
    "rename_project",
    "unarchive_project",
]

_ATTEMPTS = 3


class Exported(msgspec.Struct):
    directory: str
    tasks: int
    archived: int
    files: int
    bytes: int
    findings: list[str]

    @property
    def is_sound(self) -> bool:
        return all("lattice doctor: warning: " in finding for finding in self.findings)


def export_project(data: DataDir, slug: str, target: Path) -> Exported:
    """Make ``target`` a plain lattice project with the files of ``slug``, active or archived.

    ``target`` is missing or empty; it appears whole, or not at all.

    Raises Misuse: there is no such project, or ``target`` is not empty; StorageError.
    """
    data.config()
    source = paths_of(data, slug)
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise Misuse(f"{target} already exists and is not empty")
    scratch = target.absolute().with_name(f".{target.absolute().name}.export-{secrets.token_hex(4)}")
    try:
        for attempts_left in reversed(range(_ATTEMPTS)):
            wrong = _copy(slug, source, scratch, data)
            if not wrong or not attempts_left:
                break
            shutil.rmtree(scratch)
        return _finish(scratch, target, wrong)
    except OSError as error:
        raise StorageError(f"cannot export to {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def paths_of(data: DataDir, slug: str) -> ProjectPaths:
    """Return the paths of a project, archived or not. Raises Misuse: there is none."""
    if data.is_archived(slug) and not data.has_project(slug):
        return ProjectPaths(data.archived / slug)
    data.require_project(slug)
    return data.project(slug)


def _copy(slug: str, source: ProjectPaths, scratch: Path, data: DataDir) -> list[str]:
    scratch.mkdir(mode=0o700, parents=True)
    _copy_tree(source.lattice, scratch / ".lattice")
    if source.journal.is_dir():
        _copy_tree(source.journal, scratch / "journal", everything=True)
    copied = ProjectPaths(scratch)
    asyncio.run(recover(slug, copied, data.config().journal))
    return [found.line() for found in check_project(slug, copied, at_rest=True).findings]


def _copy_tree(source: Path, target: Path, *, everything: bool = False) -> None:
    """Copy plain files, in any order; files that vanish are skipped. Times are kept: they distinguish edits."""
    for folder, folders, names in os.walk(source):
        relative = Path(folder).relative_to(source)
        folders[:] = [name for name in folders if everything or not name.startswith(".")]
        (target / relative).mkdir(parents=True, exist_ok=True)
        for name in names:
            path = str(relative / name)
            if not (everything or is_replicated(path)) or not os.path.isfile(os.path.join(folder, name)):
                continue
            try:
                shutil.copy2(os.path.join(folder, name), target / path, follow_symlinks=False)
            except FileNotFoundError:
                continue


def _finish(scratch: Path, target: Path, wrong: list[str]) -> Exported:
    lattice = scratch / ".lattice"
    sizes = {str(path.relative_to(lattice)): path.stat().st_size for path in lattice.rglob("*") if path.is_file()}
    for entry in list(scratch.iterdir()):
        if entry.name != ".lattice":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    scratch.chmod(0o755)
    for folder, _, names in os.walk(scratch):
        sync_files(os.path.join(folder, name) for name in names)
    os.rename(scratch, target)
    tasks = sum(path.startswith("tasks/") for path in sizes)
    archived = sum(path.startswith("archive/tasks/") for path in sizes)
    return Exported(str(target), tasks, archived, len(sizes), sum(sizes.values()), wrong)


_MAX_BYTES = 1 << 40


def import_project(data: DataDir, slug: str, source: Path, *, keep_hooks: bool, dry_run: bool) -> ImportReport:
    """Import the lattice project in ``source`` (or in its ``.lattice``) as ``slug``, which is new or empty.

    A crash at any moment leaves the project unchanged or imported as a whole. ``keep_hooks`` keeps the hooks of its
    ``config.json``; ``dry_run`` changes nothing.

    Raises Misuse: there is no project in ``source``, or it is refused, or ``slug`` is in use; StorageError.
    """
    data.config()
    is_new = not data.has_project(slug)
    if is_new:
        data.require_free(slug)
    else:
        _require_empty(data, slug)
    place = data.projects / f".new-{secrets.token_hex(8)}"
    hooks_of = None if is_new else data.project(slug).lattice / "config.json"
    try:
        report = check_candidate(place, source, keep_hooks=keep_hooks, hooks_of=hooks_of)
        if not dry_run:
            _put_in_place(data, slug, place, report, is_new=is_new)
    except OSError as error:
        raise StorageError(f"cannot import into {slug!r}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return report


def check_candidate(place: Path, source: Path, *, keep_hooks: bool, hooks_of: Path | None = None) -> ImportReport:
    """Copy the lattice project in ``source`` to ``place`` and have lattice check it there.

    Raises Misuse: there is no project, or it is refused; OSError.
    """
    arguments: list[str | Path] = ["--from", _lattice_in(source)]
    report = asyncio.run(quarantine(place, arguments, max_bytes=_MAX_BYTES, keep_hooks=keep_hooks, hooks_of=hooks_of))
    if report.refused:
        raise Misuse(f"project refused: {report.refused}")
    os.unlink(place / STATES)  # a server may be started only much later
    return report


def _lattice_in(source: Path) -> Path:
    for directory in (source / ".lattice", source):
        if (directory / "config.json").is_file():
            return directory.resolve()
    raise Misuse(f"there is no lattice project in {source}")


def _put_in_place(data: DataDir, slug: str, place: Path, report: ImportReport, *, is_new: bool) -> None:
    if is_new:
        os.rename(place, data.projects / slug)
        sync_directory(data.projects)
        return
    paths = data.project(slug)
    request = ImportProject(
        secrets.token_hex(16), "", "server", str(place), report.tasks, report.archived, report.files, report.notes()
    )
    with closing(paths.root, "its administrator is importing a project; try again in a moment") as release_writer:
        _require_empty(data, slug)
        decide(paths.root, request)
        release_writer()
        asyncio.run(recover(slug, paths, data.config().journal))


def _require_empty(data: DataDir, slug: str) -> None:
    lattice = data.project(slug).lattice
    tree = ProjectTree(lattice, {})
    try:
        require_empty(lattice, {path: status.st_size for path, status in tree.scan()})
    except Rejected as error:
        raise Misuse(error.message) from error


def rename_project(data: DataDir, old: str, new: str) -> int:
    """Rename a project; return the number of updated tokens.

    A crash leaves the old name, or the new one with ``finish_renames`` still to do.

    Repeatable. Raises Misuse: there is no such project, or the new name is taken or invalid; StorageError, also if its
    worker does not end.
    """
    data.config()
    renamed = data.renamed()
    if not data.has_project(old) and renamed.get(old) == new and data.has_project(new):
        return finish_renames(data)
    _require(data, old)
    data.require_free(new)
    with closing(data.project(old).root, f"project {old!r} is now called {new!r}"):
        # Former names of this project lead to the new one; a former project of the new name is forgotten.
        data.save_renamed({**{was: new if to == old else to for was, to in renamed.items() if was != new}, old: new})
        _move(data.projects / old, data.projects / new)
        return finish_renames(data)


def finish_renames(data: DataDir) -> int:
    """Replace former project names in all tokens; return the number of updated tokens. Raises StorageError.

    A name used again, by an active or archived project, is no former name.
    """
    former = {
        old: new
        for old, new in data.renamed().items()
        if data.has_project(new) and not data.has_project(old) and not data.is_archived(old)
    }
    return TokenFile(data.tokens).rename_projects(former) if former else 0


def archive_project(data: DataDir, slug: str) -> None:
    """Stop serving a project. Raises Misuse: there is none; StorageError, also if its worker does not end."""
    data.config()
    _require(data, slug)
    with closing(data.project(slug).root, f"project {slug!r} is archived; ask its administrator"):
        data.archived.mkdir(mode=0o700, exist_ok=True)
        _move(data.projects / slug, data.archived / slug)


def unarchive_project(data: DataDir, slug: str) -> None:
    """Restore an archived project; a running server serves it at once.

    Raises Misuse: there is none, or its name is taken; StorageError: it cannot be moved.
    """
    data.config()
    _require_archived(data, slug)
    if (data.projects / slug).exists():
        raise Misuse(f"project {slug!r} already exists; rename that one first")
    _move(data.archived / slug, data.projects / slug)


def delete_project(data: DataDir, slug: str) -> tuple[Path, int]:
    """Move an archived project to the trash, and remove it from all tokens; return its path and their number.

    A token without another project is revoked: it must not give access to a later project of this name. Raises Misuse
    or StorageError.
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
        raise Misuse(f"project {slug!r} is archived; restore it with: lattice-remote project unarchive {slug}")
    data.require_project(slug)


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
