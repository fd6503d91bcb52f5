"""``lattice-remote fsck``: checks a data directory, and mends what can be mended without losing anything.

Mending is what the next start would do, done now and told: a command that was cut off is undone, what somebody changed
becomes a change. Besides, what the disk has damaged is brought back from the journal, and what is in the way is moved
to ``set-aside/``; nothing is deleted.
"""

import asyncio
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from lattice_remote.errors import Misuse, StorageError
from lattice_remote.logtext import printable
from lattice_remote.server.checks.check_project import ProjectCheck, check_project
from lattice_remote.server.checks.check_server import CHMOD_600, TAKE_AWAY, check_server, server_leftovers
from lattice_remote.server.checks.findings import Finding
from lattice_remote.server.checks.recovering import recover
from lattice_remote.server.data.datadir import DataDir, ProjectPaths
from lattice_remote.server.data.locks import LockedElsewhere, lock
from lattice_remote.server.data.settings import Journal
from lattice_remote.server.journal.contents import Contents
from lattice_remote.server.journal.journal_reader import JournalReader
from lattice_remote.server.journal.repair import Repair
from lattice_remote.server.tree.tree import Tree

__all__ = ["Report", "as_json", "as_lines", "chosen", "fsck"]

_LOOKS = 4
_LOOK_AGAIN_S = 0.7


@dataclass
class Report:
    """What was found. ``notes`` are what recovery said while it mended, one line each."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    projects: int = 0
    running: bool = False
    """A server works on the directory: it was only read, and only what stayed wrong for a while is told."""

    @property
    def left(self) -> int:
        """How many findings are not mended."""
        return sum(not found.mended for found in self.findings)


def chosen(data: DataDir, slugs: Sequence[str] | None) -> list[str]:
    """Return the projects to check: the named ones, else all.

    Raises:
        Misuse: this is no data directory, or has no such project.
    """
    if not (data.path / "config.json").exists() and not (data.path / "projects").is_dir():
        raise Misuse(f"{data.path} is not a data directory; name it with --data DIR")
    for slug in slugs or ():
        if not data.has_project(slug):
            raise Misuse(f"there is no project {slug!r}; see: lattice-remote project list")
    return list(slugs) if slugs else data.slugs()


def as_lines(report: Report) -> list[str]:
    """Return a report as lines for a terminal, the last one a summary."""
    lines = [printable(found.line()) for found in report.findings] + [printable(note) for note in report.notes]
    mended = len(report.findings) - report.left
    counts = _counted(len(report.findings), "finding") + (f", {mended} mended, {report.left} left" if mended else "")
    live = " A server is running: what it mends by itself is left out." if report.running else ""
    summary = f"Checked {_counted(report.projects, 'project')}: {counts if report.findings else 'all is well'}.{live}"
    return [*lines, summary]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def as_json(report: Report) -> str:
    """Return a report for ``--json``."""
    return msgspec.json.encode({**asdict(report), "findings": report.findings, "left": report.left}).decode()


def fsck(data: DataDir, slugs: Sequence[str], *, mend: bool) -> Report:
    """Check the server and these projects; mend if asked to.

    Raises:
        Misuse: mending was asked for while a server, or a worker of one, is at work.
        StorageError: something can't be read or written at all.
    """
    report = Report(projects=len(slugs))
    held = _lock(data, report)
    try:
        if mend and report.running:
            raise Misuse("a server runs on this directory; stop it first, or leave out --mend")
        report.findings += _server(data, mend=mend)
        for slug in slugs:
            paths = data.project(slug)
            report.findings += _mended(slug, paths, data, report) if mend else _found(slug, paths, report)
    except OSError as error:
        raise StorageError(f"{error.filename or data.path}: {error.strerror or error}") from error
    finally:
        if held is not None:
            os.close(held)
    return report


def _lock(data: DataDir, report: Report) -> int | None:
    """Keep a server from starting while this looks; where one runs, say so."""
    try:
        return lock(data.path / ".lock")
    except LockedElsewhere:
        report.running = True
    except PermissionError:
        pass  # somebody who may only read may still look
    return None


# --- looking ---


def _found(slug: str, paths: ProjectPaths, report: Report) -> list[Finding]:
    """Return what is wrong; beside a running server, what is still wrong after several looks."""
    findings = check_project(slug, paths, at_rest=not report.running).findings
    for _ in range(_LOOKS - 1 if report.running else 0):
        if not findings:
            break
        time.sleep(_LOOK_AGAIN_S)
        again = set(check_project(slug, paths, at_rest=False).findings)
        findings = [found for found in findings if found in again]
    return findings


# --- mending ---


def _server(data: DataDir, *, mend: bool) -> list[Finding]:
    before = list(check_server(data))
    if not mend or not before:
        return before
    _set_aside(data.path, server_leftovers(data))
    _fix_modes(data.path, before)
    return _compared(before, list(check_server(data)))


def _mended(slug: str, paths: ProjectPaths, data: DataDir, report: Report) -> list[Finding]:
    before = check_project(slug, paths, at_rest=True)
    if not any(found.mend for found in before.findings):
        return before.findings
    try:
        os.close(lock(paths.writer_lock))
    except LockedElsewhere as error:
        raise Misuse(f"a worker (pid {error.holder}) is still at work on {slug}; try again later") from error
    assert before.journal is not None, "check_project has read it"
    report.notes += [f"{slug}: {note}" for note in _restore(paths, before)]  # while all of the journal is there
    _set_aside(paths.root, [*before.leftovers, *before.journal.unreachable])
    _fix_modes(paths.root, before.findings)
    settings = _journal_settings(data)
    report.notes += [f"{slug}: {note}" for note in asyncio.run(recover(slug, paths, settings))]
    return _compared(before.findings, check_project(slug, paths, at_rest=True).findings)


def _compared(before: Iterable[Finding], after: list[Finding]) -> list[Finding]:
    """Return what was wrong, with what is mended marked so, and what is new."""
    left = {(found.where, found.what) for found in after}
    told = [
        found if (found.where, found.what) in left else msgspec.structs.replace(found, mended=True) for found in before
    ]
    known = {(found.where, found.what) for found in told}
    return told + [found for found in after if (found.where, found.what) not in known]


def _set_aside(root: Path, paths: Iterable[Path]) -> None:
    """Move files out of the way, under their own names."""
    place = root / "set-aside" / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
    for path in dict.fromkeys(paths):
        target = place / path.relative_to(root)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.rename(path, target)


def _fix_modes(root: Path, findings: Iterable[Finding]) -> None:
    for found in findings:
        path = root / found.where
        if found.mend == CHMOD_600:
            path.chmod(0o600)
        elif found.mend == TAKE_AWAY:
            path.chmod(path.stat().st_mode & 0o7775)


def _restore(paths: ProjectPaths, check: ProjectCheck) -> list[str]:
    """Bring back what the disk has damaged, as far as the journal has it; keep what is there now aside."""
    if not check.damaged:
        return []
    contents = Contents(check.damaged)
    for record in JournalReader(paths.journal).records():
        contents.learn(record)
    repair = Repair(Tree(paths.lattice, check.files), contents, check.damaged, has_edits=False)
    restorable = [path for path in check.damaged if path not in repair.failed]
    _set_aside(paths.root, [paths.lattice / path for path in restorable])
    return repair.perform(paths.journal / "lost")


def _journal_settings(data: DataDir) -> Journal:
    try:
        return data.config().journal
    except Misuse:
        return Journal()  # a finding of its own
