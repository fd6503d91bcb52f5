"""``lattice-remote fsck``: check of a data directory, and lossless repair.

Repair does at once, and reports, what the next start would do. In addition, damaged files are restored from the
journal, and obstacles are moved to ``set-aside/``; nothing is deleted.
"""

import asyncio
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from lattice_remote.errors import Misuse, StorageError, printable
from lattice_remote.output import counted
from lattice_remote.server.config import JournalSettings
from lattice_remote.server.datadir import DataDir, LockedElsewhere, ProjectPaths, lock
from lattice_remote.server.ipc import Ready, Stop, ToServer
from lattice_remote.server.journal.contents import Contents
from lattice_remote.server.journal.repair import Repair
from lattice_remote.server.journal.segment import JournalReader
from lattice_remote.server.maintenance.fsck_project import Finding, ProjectCheck, check_project
from lattice_remote.server.project.worker_process import WORKER_COMMAND, WorkerProcess, WriterLock
from lattice_remote.server.tokens import METRICS_ACTOR, Token, TokenFile, check_actor
from lattice_remote.server.tree.tree import ProjectTree

__all__ = [
    "CHMOD_600",
    "TAKE_AWAY",
    "FsckReport",
    "as_json",
    "as_lines",
    "check_server",
    "chosen",
    "fsck",
    "recover",
    "server_leftovers",
]

CHMOD_600 = "make it readable for its owner alone"
TAKE_AWAY = "remove that permission"
_SCRATCH = re.compile(r"\.[a-z-]+\.json\.[0-9a-f]{16}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_server(data: DataDir) -> Iterator[Finding]:
    try:
        data.config()
    except Misuse as error:
        yield Finding("", "config.json", error.message)
    yield from _tokens(data)
    for path in server_leftovers(data):
        where = str(path.relative_to(data.path))
        yield Finding("", where, "left over from an interrupted command", "set aside")
    for path in data.writable_by_everybody():
        if path != data.tokens:
            where = "." if path == data.path else path.name
            yield Finding("", where, "any user on this machine can write to it", TAKE_AWAY)


def server_leftovers(data: DataDir) -> list[Path]:
    scratch = [path for path in data.path.glob(".*") if _SCRATCH.fullmatch(path.name)]
    unplaced = [path for kind in ("new", "moving") for path in data.projects.glob(f".{kind}-*")]
    return sorted([*scratch, *unplaced])


def _tokens(data: DataDir) -> Iterator[Finding]:
    if not data.tokens.exists():
        yield Finding("", "tokens.json", "it is missing, so no client can log in; see: lattice-remote token create")
        return
    if data.tokens.stat().st_mode & 0o077:
        yield Finding("", "tokens.json", "others may read or write it", CHMOD_600)
    try:
        tokens = TokenFile(data.tokens).read()
    except StorageError as error:
        yield Finding("", "tokens.json", f"it can't be read: {error.message}")
        return
    for kind, values in (("id", [t.id for t in tokens]), ("digest", [t.sha256 for t in tokens])):
        for value, count in Counter(values).items():
            if count > 1:
                shown = value if kind == "id" else value[:8] + "..."
                yield Finding("", "tokens.json", f"{count} tokens have the {kind} {shown}")
    for token in tokens:
        for wrong in _wrong_with(token, data):
            yield Finding("", "tokens.json", f"token {token.id} {wrong}")


def _wrong_with(token: Token, data: DataDir) -> Iterator[str]:
    if not _SHA256.fullmatch(token.sha256):
        yield "has no digest: nobody can use it; revoke it"
    if token.metrics:  # METRICS_ACTOR is no actor of lattice, so that the token can't write
        if (token.actor, token.act_as, token.projects) != (METRICS_ACTOR, [], []):
            yield "is malformed: a token for metrics has no actor and no projects; revoke it and make another"
        return
    try:
        check_actor(token.actor, token.act_as)
    except Misuse as error:
        yield f"is malformed: {error.message}"
    for slug in token.projects:
        if not data.has_project(slug) and not data.is_archived(slug):
            yield f"is for project {slug!r}, which does not exist"


_TIMEOUT_S = 600.0


async def recover(slug: str, paths: ProjectPaths, settings: JournalSettings) -> list[str]:
    """Have a worker recover the project; return its notes. Raises StorageError."""
    first: asyncio.Future[ToServer] = asyncio.get_running_loop().create_future()

    def heard(message: ToServer) -> None:
        if not first.done():
            first.set_result(message)

    def ended() -> None:
        if not first.done():
            first.set_exception(StorageError(f"the worker of project {slug} does not start"))

    command = (*WORKER_COMMAND, "--journal", msgspec.json.encode(settings).decode())
    writer_lock = WriterLock(paths)
    try:
        writer = await WorkerProcess.start(slug, paths, writer_lock, on_message=heard, on_end=ended, command=command)
    finally:
        writer_lock.release()  # the worker holds it
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            message = await first
        if not isinstance(message, Ready):
            raise StorageError(f"project {slug}: {getattr(message, 'message', message)}")
        writer.send(Stop())
        await writer.wait(_TIMEOUT_S)
    except TimeoutError:
        raise StorageError(f"the worker of project {slug} timed out") from None
    finally:
        writer.kill()
        await writer.wait(5.0)
    return message.notes


_LOOKS = 4
_LOOK_AGAIN_S = 0.7


@dataclass
class FsckReport:
    """``notes`` are the recovery's log lines."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    projects: int = 0
    running: bool = False
    """A server works on the directory: only findings that persisted are listed."""

    @property
    def left(self) -> int:
        return sum(not found.repaired for found in self.findings)


def chosen(data: DataDir, slugs: Sequence[str] | None) -> list[str]:
    """Return the named projects, else all. Raises Misuse: no data directory, or no such project."""
    if not (data.path / "config.json").exists() and not (data.path / "projects").is_dir():
        raise Misuse(f"{data.path} is not a data directory; name it with --data DIR")
    for slug in slugs or ():
        data.require_project(slug)
    return list(slugs) if slugs else data.slugs()


def as_lines(report: FsckReport) -> list[str]:
    lines = [printable(found.line()) for found in report.findings] + [printable(note) for note in report.notes]
    repaired = len(report.findings) - report.left
    counts = counted(len(report.findings), "finding") + (
        f", {repaired} repaired, {report.left} left" if repaired else ""
    )
    live = " A server is running: findings it repairs by itself are omitted." if report.running else ""
    summary = f"Checked {counted(report.projects, 'project')}: {counts if report.findings else 'all is well'}.{live}"
    return [*lines, summary]


def as_json(report: FsckReport) -> str:
    return msgspec.json.encode({**asdict(report), "findings": report.findings, "left": report.left}).decode()


def fsck(data: DataDir, slugs: Sequence[str], *, repair: bool) -> FsckReport:
    """Check the server and these projects; repair if asked to.

    Raises Misuse: a server, or a worker, is running during a repair; StorageError.
    """
    report = FsckReport(projects=len(slugs))
    held = _lock(data, report)
    try:
        if repair and report.running:
            raise Misuse("a server runs on this directory; stop it first, or omit --repair")
        report.findings += _server(data, repair=repair)
        for slug in slugs:
            paths = data.project(slug)
            report.findings += _repaired(slug, paths, data, report) if repair else _found(slug, paths, report)
    except OSError as error:
        raise StorageError(f"{error.filename or data.path}: {error.strerror or error}") from error
    finally:
        if held is not None:
            os.close(held)
    return report


def _lock(data: DataDir, report: FsckReport) -> int | None:
    try:
        return lock(data.path / ".lock")
    except LockedElsewhere:
        report.running = True
    except PermissionError:
        pass  # a user with read permission only may still check
    return None


def _found(slug: str, paths: ProjectPaths, report: FsckReport) -> list[Finding]:
    """Return the findings; beside a running server, those that persist over several checks."""
    findings = check_project(slug, paths, at_rest=not report.running).findings
    for _ in range(_LOOKS - 1 if report.running else 0):
        if not findings:
            break
        time.sleep(_LOOK_AGAIN_S)
        again = set(check_project(slug, paths, at_rest=False).findings)
        findings = [found for found in findings if found in again]
    return findings


def _server(data: DataDir, *, repair: bool) -> list[Finding]:
    before = list(check_server(data))
    if not repair or not before:
        return before
    _set_aside(data.path, server_leftovers(data))
    _fix_modes(data.path, before)
    return _compared(before, list(check_server(data)))


def _repaired(slug: str, paths: ProjectPaths, data: DataDir, report: FsckReport) -> list[Finding]:
    before = check_project(slug, paths, at_rest=True)
    if not any(found.repair for found in before.findings):
        return before.findings
    try:
        os.close(lock(paths.writer_lock))
    except LockedElsewhere as error:
        raise Misuse(f"a worker (pid {error.holder}) is still at work on {slug}; try again later") from error
    assert before.journal is not None, "check_project has read it"
    report.notes += [f"{slug}: {note}" for note in _restore(paths, before)]  # before any of the journal is set aside
    _set_aside(paths.root, [*before.leftovers, *before.journal.unreachable])
    _fix_modes(paths.root, before.findings)
    try:
        settings = data.config().journal
    except Misuse:
        settings = JournalSettings()  # a finding of its own
    report.notes += [f"{slug}: {note}" for note in asyncio.run(recover(slug, paths, settings))]
    return _compared(before.findings, check_project(slug, paths, at_rest=True).findings)


def _compared(before: Iterable[Finding], after: list[Finding]) -> list[Finding]:
    left = {(found.where, found.what) for found in after}
    marked = [
        found if (found.where, found.what) in left else msgspec.structs.replace(found, repaired=True)
        for found in before
    ]
    known = {(found.where, found.what) for found in marked}
    return marked + [found for found in after if (found.where, found.what) not in known]


def _set_aside(root: Path, paths: Iterable[Path]) -> None:
    place = root / "set-aside" / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
    for path in dict.fromkeys(paths):
        target = place / path.relative_to(root)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.rename(path, target)


def _fix_modes(root: Path, findings: Iterable[Finding]) -> None:
    for found in findings:
        path = root / found.where
        if found.repair == CHMOD_600:
            path.chmod(0o600)
        elif found.repair == TAKE_AWAY:
            path.chmod(path.stat().st_mode & 0o7775)


def _restore(paths: ProjectPaths, check: ProjectCheck) -> list[str]:
    if not check.damaged:
        return []
    contents = Contents(check.damaged)
    for record in JournalReader(paths.journal).records():
        contents.learn(record)
    repair = Repair(ProjectTree(paths.lattice, check.files), contents, check.damaged, has_edits=False)
    restorable = [path for path in check.damaged if path not in repair.failed]
    _set_aside(paths.root, [paths.lattice / path for path in restorable])
    return repair.perform(paths.journal / "lost")
