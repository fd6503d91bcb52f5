"""``lattice-remote export``: a project becomes a plain directory, as it was at one moment, while its server works.

It is what a backup does: the tree is copied, then the journal, which holds all that any file of the copy has a part of;
then a worker opens the copy and brings it to one number (decision 0041).
"""

import asyncio
import os
import secrets
import shutil
from pathlib import Path

import msgspec

from lattice_remote.errors import Misuse, StorageError
from lattice_remote.protocol.paths import is_replicated
from lattice_remote.server.checks.check_project import check_project
from lattice_remote.server.checks.recovering import recover
from lattice_remote.server.data.datadir import DataDir, ProjectPaths
from lattice_remote.server.tree.manifest import sync_files

__all__ = ["Exported", "export_project"]

_ATTEMPTS = 3


class Exported(msgspec.Struct):
    """What was exported. ``findings`` are what lattice's doctor says of it, and what else is wrong."""

    directory: str
    tasks: int
    archived: int
    files: int
    bytes: int
    findings: list[str]

    @property
    def is_sound(self) -> bool:
        """Whether there are no findings but the doctor's warnings."""
        return all("lattice doctor: warning: " in finding for finding in self.findings)


def export_project(data: DataDir, slug: str, target: Path) -> Exported:
    """Make ``target`` a plain lattice project with the files of ``slug``.

    Args:
        data: the data directory.
        slug: an active or archived project.
        target: a directory that does not exist, or is empty. It appears whole, or not at all.

    Raises:
        Misuse: there is no such project, or ``target`` has something in it.
        StorageError: a file can't be read or written, or the copy is not whole.
    """
    data.config()
    source = _project(data, slug)
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise Misuse(f"{target} exists, and is not an empty directory")
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


def _project(data: DataDir, slug: str) -> ProjectPaths:
    if data.has_project(slug):
        return data.project(slug)
    if data.is_archived(slug):
        return ProjectPaths(data.archived / slug)
    raise Misuse(f"there is no project {slug!r}; see: lattice-remote project list")


def _copy(slug: str, source: ProjectPaths, scratch: Path, data: DataDir) -> list[str]:
    """Copy a project that may be at work, make the copy whole, and return what is wrong with it."""
    scratch.mkdir(mode=0o700, parents=True)
    _copy_tree(source.lattice, scratch / ".lattice")
    if source.journal.is_dir():
        _copy_tree(source.journal, scratch / "journal", everything=True)
    copied = ProjectPaths(scratch)
    asyncio.run(recover(slug, copied, data.config().journal))
    return [found.line() for found in check_project(slug, copied, at_rest=True).findings]


def _copy_tree(source: Path, target: Path, *, everything: bool = False) -> None:
    """Copy plain files, in any order; what vanishes meanwhile is not missed. Times are kept: they tell edits apart."""
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
