"""Compares a project's files with what its journal says, and with what lattice itself says. Changes nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lattice_remote.server.checks.check_journal import JournalCheck, check_journal
from lattice_remote.server.checks.findings import Finding
from lattice_remote.server.data.datadir import ProjectPaths
from lattice_remote.server.tree.manifest import FileState, load_manifest
from lattice_remote.server.tree.tree import Tree
from lattice_remote.server.worker.recovery import is_in_doubt

__all__ = ["ProjectCheck", "check_project"]

AS_CHANGE = "it becomes a numbered change, as at the next start"
AFTER_POWER_CUT = "what a power cut took comes back, anything else becomes a numbered change, as at the next start"
NEW_EPOCH = "a new epoch begins, and every client compares its files, as at the next start"
RESTORE = "bring it back from the journal"
_DOCTOR = "import sys; from lattice.cli.main import cli; sys.argv[0] = 'lattice'; cli()"
_DOCTOR_TIMEOUT_S = 600


@dataclass
class ProjectCheck:
    """What is wrong with a project.

    Attributes:
        findings: all of it.
        files: what the files are at the journal's head, as far as that is known.
        damaged: paths of the tree whose content changed though nobody wrote to them.
        difference: what becomes of a file that is not as at the head.
        leftovers: files that a program which ended too early left behind.
        journal: see there.
    """

    findings: list[Finding] = field(default_factory=list)
    files: dict[str, FileState] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    difference: str = AS_CHANGE
    leftovers: list[Path] = field(default_factory=list)
    journal: JournalCheck | None = None


def check_project(slug: str, paths: ProjectPaths, *, at_rest: bool) -> ProjectCheck:
    """Check one project. ``at_rest``: no worker runs, so nothing in its scratch directory or undo log is in use.

    Raises:
        OSError: a file can't be read; the caller says so.
    """
    check = ProjectCheck()
    check.journal = check_journal(slug, paths.journal) if paths.journal.is_dir() else JournalCheck(slug)
    check.findings += check.journal.findings
    if _list_files(slug, paths, check):
        _compare(slug, paths, check)
    if at_rest:
        check.findings += _cut_off(slug, paths)
    check.leftovers = list(_leftovers(paths, at_rest=at_rest))
    for path in check.leftovers:
        where = str(path.relative_to(paths.root))
        check.findings.append(Finding(slug, where, "left behind by a program that ended too early", "set aside"))
    check.findings += _permissions(slug, paths)
    check.findings += _doctor(slug, paths)
    return check


def _list_files(slug: str, paths: ProjectPaths, check: ProjectCheck) -> bool:
    """Find out what the files are at the journal's head; return whether that is known."""
    journal = check.journal
    assert journal is not None, "check_project has read it"
    listed = load_manifest(paths.journal / "manifest")
    if listed is None and not journal.epoch and not journal.findings:
        return False  # no worker has opened it yet
    why = ""
    if listed is None:
        why = "it is missing or can't be read"
    elif listed.epoch != journal.epoch:
        why = "it is of another epoch than the journal"
    elif not journal.oldest - 1 <= listed.seq <= journal.head:
        why = f"it is of change {listed.seq}, and the journal has {journal.oldest} to {journal.head}"
    if why or listed is None:
        check.findings.append(Finding(slug, "journal/manifest", why, NEW_EPOCH))
        return False
    if is_in_doubt(listed, paths.root):
        check.difference = AFTER_POWER_CUT
    check.files = dict(listed.files)
    for seq, states in journal.states:
        for path, state in states.items() if seq > listed.seq else ():
            if state is None:
                check.files.pop(path, None)
            else:
                check.files[path] = state
    return True


def _compare(slug: str, paths: ProjectPaths, check: ProjectCheck) -> None:
    """Digest every file of the tree."""
    journal = check.journal
    assert journal is not None, "check_project has read it"
    tree = Tree(paths.lattice, check.files)
    seen = set()
    for path, status in tree.scan():
        seen.add(path)
        state, content = check.files.get(path), tree.read(path, None)
        if content is None:
            check.findings.append(Finding(slug, f".lattice/{path}", "it can't be read by this user"))
        elif state is None:
            what = f"change {journal.head} knows of no such file"
            check.findings.append(Finding(slug, f".lattice/{path}", what, check.difference))
        elif content.state.digest != state.digest:
            same = (state.size, state.mtime_ns, state.inode) == (status.st_size, status.st_mtime_ns, status.st_ino)
            if same and state.settled:
                check.damaged.append(path)
                what, mend = "its content changed though nobody wrote to it: the disk has damaged it", RESTORE
            else:
                what, mend = f"it is not as change {journal.head} left it", check.difference
            check.findings.append(Finding(slug, f".lattice/{path}", what, mend))
    for path in check.files.keys() - seen:
        check.findings.append(Finding(slug, f".lattice/{path}", "it is gone", check.difference))


def _cut_off(slug: str, paths: ProjectPaths) -> Iterator[Finding]:
    """Yield what was begun and is not done; while a worker runs, the undo log holds the command that it is at."""
    if (paths.root / "adopting").is_dir():
        what = "a project that was brought whole is not in its place yet"
        yield Finding(slug, "adopting", what, "put it there, as at the next start")
    undo = paths.journal / "undo"
    if undo.exists() and undo.stat().st_size:
        yield Finding(slug, "journal/undo", "a command was cut off before it was done", "undo it, as at the next start")


def _leftovers(paths: ProjectPaths, *, at_rest: bool) -> Iterator[Path]:
    undo = paths.journal / "undo"
    if not undo.exists() or not undo.stat().st_size:
        yield from sorted((paths.journal / "undo.d").glob("*"))
    yield from sorted(paths.journal.glob("*.new"))
    for folder, _, names in os.walk(paths.lattice):
        yield from (Path(folder, name) for name in sorted(names) if name.startswith(".tmp."))
    if at_rest:
        yield from sorted((paths.root / "tmp").glob("*"))
        yield from sorted(paths.incoming.glob("*"))


def _permissions(slug: str, paths: ProjectPaths) -> Iterator[Finding]:
    owner = paths.root.stat().st_uid
    for path in (paths.root, paths.lattice, paths.journal, *paths.journal.glob("*")):
        where = str(path.relative_to(paths.root))
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # expired or renamed meanwhile
        if status.st_mode & 0o002:
            yield Finding(slug, where, "everybody on this machine may write to it", "take that permission away")
        if status.st_uid != owner:
            yield Finding(slug, where, f"it belongs to user {status.st_uid}, the project to {owner}")


def _doctor(slug: str, paths: ProjectPaths) -> Iterator[Finding]:
    """Have lattice itself look: it only reads."""
    environment = {**os.environ, "LATTICE_ROOT": str(paths.root.resolve())}
    done = subprocess.run(
        [sys.executable, "-P", "-c", _DOCTOR, "doctor", "--json"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_DOCTOR_TIMEOUT_S,
        check=False,
    )
    try:
        for found in json.loads(done.stdout)["data"]["findings"]:
            yield Finding(slug, ".lattice", f"lattice doctor: {found['level']}: {found['message']}")
    except (ValueError, KeyError, TypeError):
        said = " ".join(done.stderr.decode(errors="replace").split())[-300:]
        yield Finding(slug, ".lattice", f"lattice doctor does not work here: {said or f'exit {done.returncode}'}")
