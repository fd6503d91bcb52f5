"""The process that puts a candidate together and has lattice itself check it.

    python -m lattice_remote.server.project.bundle_check --into PLACE --pack FILE --max-bytes N

What it reads is hostile until shown otherwise, so it is a process of its own: bounded in memory, processor time and
file size, and lattice runs in it under the same audit hook as in a worker. It prints one JSON ``Report``.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec

from lattice_remote.errors import Misuse, ProtocolError, RemoteError, StorageError
from lattice_remote.files import READ, SAFE
from lattice_remote.protocol.bundle import MAX_PROJECT_FILES, Layout, Unpacker
from lattice_remote.protocol.messages import Entry
from lattice_remote.protocol.paths import DIRECTORIES, is_replicated
from lattice_remote.server.tree.capture import AccessDenied, Capture
from lattice_remote.server.tree.tree import ProjectTree, sync_directory, sync_files
from lattice_remote.server.worker.executor import CommandOutcome, Executor
from lattice_remote.server.worker.main import code_directories, prepare_scratch
from lattice_remote.text import printable

__all__ = ["Candidate", "ImportReport", "add_directory", "add_pack", "main", "quarantine"]

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | SAFE


class Candidate:
    """The project in ``place``, a real path to an empty directory.

    Each file is made anew, under a name that was checked, in directories that were made here: there is no link that
    could lead elsewhere, and no mode or owner of anybody's choice.
    """

    def __init__(self, place: Path, layout: Layout) -> None:
        self.place = place
        self.lattice = place / ".lattice"
        self.layout = layout
        self.digests: dict[str, bytes] = {}
        """Of each file as it came."""
        for directory in DIRECTORIES:
            (self.lattice / directory).mkdir(parents=True, exist_ok=True)

    def add(self, path: str, size: int, pieces: Iterable[bytes]) -> None:
        """Add a file with this content.

        Raises:
            Misuse: a project can't have it.
            OSError: it can't be written.
        """
        self.layout.add(path, size)
        target = self.lattice / path
        target.parent.mkdir(parents=True, exist_ok=True)
        hasher = hashlib.sha256()
        with open(os.open(target, _NEW, 0o644), "wb") as file:
            for piece in pieces:
                hasher.update(piece)
                file.write(piece)
        self.digests[path] = hasher.digest()


MAX_NAMED = 20
_MAX_NOTE_CHARS = 2000
"""A frame's line has room for 4096."""


class ImportReport(msgspec.Struct, kw_only=True):
    """One candidate, checked. ``refused`` is empty when it may be put in place."""

    refused: str = ""
    tasks: int = 0
    archived: int = 0
    files: int = 0
    bytes: int = 0
    hooks: bool = False
    """Whether it came with hooks."""
    hooks_kept: bool = False
    left_out: list[str] = []
    """What lies in the directory and is no part of the project."""
    rebuilt: list[str] = []
    """Files that were not what the event logs say, and now are."""
    warnings: list[str] = []
    """What lattice's own doctor says of it."""

    def notes(self) -> list[str]:
        """Return what a person should know, one line each."""
        lines = []
        if self.hooks and not self.hooks_kept:
            lines.append("its hooks were left out: an administrator must allow them")
        if self.rebuilt:
            lines.append(f"rebuilt from the event logs, which say otherwise: {_named(self.rebuilt)}")
        if self.left_out:
            lines.append(f"left out, no part of a project: {_named(self.left_out)}")
        lines += [f"lattice doctor: {warning}" for warning in self.warnings[:MAX_NAMED]]
        return [line[:_MAX_NOTE_CHARS] for line in lines]


def _named(paths: list[str]) -> str:
    more = len(paths) - MAX_NAMED
    return ", ".join(paths[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


_COMMAND = (sys.executable, "-P", "-X", "utf8", "-m", "lattice_remote.server.project.bundle_check")
_TIMEOUT_S = 3600.0
"""5,000 tasks take half a minute."""
_MAX_SAID = 300


async def quarantine(
    place: Path,
    source: Sequence[str | Path],
    *,
    max_bytes: int,
    keep_hooks: bool = False,
    hooks_of: Path | None = None,
) -> ImportReport:
    """Put a candidate together in ``place``, a directory that is made here, and have it checked.

    Once this returns a report with nothing ``refused``, ``place`` holds a whole project, on the disk, and nothing else;
    the caller puts it in place or removes it. In any other case there is no ``place`` any more.

    Args:
        place: it must not exist.
        source: ``--pack FILE`` or ``--from DIRECTORY``.
        max_bytes: how large the project, and any file of it, may be.
        keep_hooks: an administrator allows its hooks.
        hooks_of: a ``config.json`` whose hooks it gets in place of its own.

    Raises:
        StorageError: the check can't be made.
    """
    place.mkdir(parents=True)  # noqa: ASYNC240 - a directory, at once
    try:
        report = await _checked(place, source, max_bytes, keep_hooks=keep_hooks, hooks_of=hooks_of)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    if report.refused:
        await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)
    return report


async def _checked(
    place: Path, source: Sequence[str | Path], max_bytes: int, *, keep_hooks: bool, hooks_of: Path | None
) -> ImportReport:
    options: list[str | Path] = [*source, "--max-bytes", str(max_bytes)]
    if keep_hooks:
        options.append("--keep-hooks")
    if hooks_of is not None:
        options += ["--hooks-of", hooks_of]
    process = await asyncio.create_subprocess_exec(
        *_COMMAND,
        "--into",
        place,
        *options,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in the server's terminal is the server's to handle
    )
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            stdout, stderr = await process.communicate()
    except TimeoutError:
        return ImportReport(refused=f"checking it takes longer than {_TIMEOUT_S / 60:.0f} minutes")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    try:
        return msgspec.json.decode(stdout, type=ImportReport)
    except msgspec.DecodeError:
        pass
    if process.returncode is not None and process.returncode < 0:
        return ImportReport(refused=f"checking it takes more than it may (ended by signal {-process.returncode})")
    said = " ".join(stderr.decode(errors="replace").split())[-_MAX_SAID:]
    raise StorageError(f"the project can't be checked: {said or f'exit {process.returncode}'}")


_PIECE_BYTES = 1 << 20
_MAX_LEFT_OUT = 1000
_BOOKKEEPING = frozenset(
    {"locks", "remote.json", "cache_state.json", ".gitignore", ".base", ".tmp", ".cache.lock", ".written", ".remote"}
    | {".fetch", ".fetch.lock", ".away", ".settings.json"}
)
"""Lattice's locks, and what makes a directory a cache: nobody misses them."""


def add_pack(candidate: Candidate, pack: Path) -> None:
    """Put a pack's files into a candidate. All of it is read once before the first file is made.

    Raises:
        ProtocolError: it is no pack.
        Misuse: a project can't have one of its files.
    """
    layout = Layout(max_bytes=candidate.layout.max_bytes)
    for item in _items(pack):
        if isinstance(item, Entry):
            layout.add(item.path, item.size)
    items = _items(pack)
    pending = next(items, None)
    while isinstance(pending, Entry):
        content = _Content(items)
        candidate.add(pending.path, pending.size, content)
        pending = content.following


def _items(pack: Path) -> Iterator[Entry | bytes]:
    unpacker = Unpacker()
    with pack.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield from unpacker.receive(piece)
    if not unpacker.is_complete:
        raise ProtocolError("the pack is cut short")


class _Content:
    """The pieces of one file; what comes after the last is in ``following``."""

    def __init__(self, items: Iterator[Entry | bytes]) -> None:
        self._items = items
        self.following: Entry | bytes | None = None

    def __iter__(self) -> Iterator[bytes]:
        for item in self._items:
            if isinstance(item, Entry):
                self.following = item
                return
            yield item


def add_directory(candidate: Candidate, directory: Path) -> list[str]:
    """Put the replicated files below ``directory`` (a ``.lattice``) into a candidate; return what was left out.

    Links and whatever is no plain file are left out, never followed.

    Raises:
        Misuse: a project can't have one of its files, or one was cut short meanwhile.
        OSError: one can't be read.
    """
    left_out: list[str] = []
    for path in _walk(directory, left_out):
        with open(os.open(directory / path, READ), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Misuse(f"{path} is no plain file any more; somebody works in {directory}: try again")
            candidate.add(path, status.st_size, _first(status.st_size, file, path))
    return sorted(left_out)


def _first(size: int, file: BinaryIO, path: str) -> Iterator[bytes]:
    """Yield the first ``size`` bytes: a log that is being added to ends with what it had when it was opened."""
    while size:
        piece = file.read(min(size, _PIECE_BYTES))
        if not piece:
            raise Misuse(f"{path} was cut short while it was read; somebody works there: try again")
        size -= len(piece)
        yield piece


def _walk(directory: Path, left_out: list[str]) -> Iterator[str]:
    """Yield the replicated plain files, relative, in order."""
    pending = [""]
    found: list[str] = []
    while pending:
        folder = pending.pop()
        for entry in os.scandir(directory / folder):
            path = folder + entry.name
            if entry.is_dir(follow_symlinks=False) and is_replicated(path + "/x.md"):
                pending.append(path + "/")
            elif entry.is_file(follow_symlinks=False) and is_replicated(path):
                found.append(path)
            elif path not in _BOOKKEEPING and len(left_out) < _MAX_LEFT_OUT:
                left_out.append(path)
        if len(found) > MAX_PROJECT_FILES:
            raise Misuse(f"{directory} has more than {MAX_PROJECT_FILES} files")
    yield from sorted(found)


_MEMORY_BYTES = 4 << 30
_CPU_S = 1800
READS: Sequence[Sequence[str]] = (
    ("list", "--json"),
    ("list",),
    ("next", "--json"),
    ("stats", "--json"),
    ("stats",),
    ("weather",),
    ("resource", "list", "--json"),
    ("session", "list", "--json"),
)
"""What must not break down on the project: everybody's first commands."""
_MAX_WARNINGS = 50


def main(arguments: list[str] | None = None) -> int:
    """Do it; the exit code is 0 whenever a report was printed."""
    parser = argparse.ArgumentParser(prog="lattice-remote-intake")
    parser.add_argument("--into", type=Path, required=True, help="an empty directory")
    parser.add_argument("--pack", type=Path)
    parser.add_argument("--from", dest="directory", type=Path)
    parser.add_argument("--max-bytes", type=int, required=True)
    parser.add_argument("--keep-hooks", action="store_true")
    parser.add_argument("--hooks-of", type=Path, help="a config.json whose hooks it gets in place of its own")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this ends it
    sys.dont_write_bytecode = True
    report = ImportReport()
    try:
        _take_in(options, report)
    except RemoteError as error:
        report.refused = error.message
    except (RecursionError, MemoryError) as error:
        report.refused = f"it takes more than a project may: {type(error).__name__}"
    except OSError as error:
        report.refused = f"the server can't store it: {error.strerror or error}"
    sys.stdout.buffer.write(msgspec.json.encode(report))
    return 0


def _take_in(options: argparse.Namespace, report: ImportReport) -> None:
    place: Path = options.into.resolve()
    _bound_this_process(options.max_bytes)
    candidate = Candidate(place, Layout(max_bytes=options.max_bytes))
    if options.pack is not None:
        add_pack(candidate, options.pack)
    else:
        report.left_out = add_directory(candidate, options.directory.resolve())
    if "config.json" not in candidate.digests:
        raise Misuse("there is no config.json: this is no lattice project")
    _settle_hooks(candidate, report, keep=options.keep_hooks, hooks_of=options.hooks_of)
    _have_lattice_check(candidate, report)
    _require_whole_tasks(candidate.lattice)
    _require_objects(candidate.lattice)
    _count(candidate, report)
    _make_durable(place)


def _bound_this_process(max_bytes: int) -> None:
    for what, limit in (
        (resource.RLIMIT_AS, _MEMORY_BYTES),
        (resource.RLIMIT_CPU, _CPU_S),
        (resource.RLIMIT_FSIZE, max_bytes),
    ):
        with contextlib.suppress(OSError, ValueError):  # the system has another, lower bound
            resource.setrlimit(what, (limit, resource.getrlimit(what)[1]))


# --- hooks ---


def _settle_hooks(candidate: Candidate, report: ImportReport, *, keep: bool, hooks_of: Path | None) -> None:
    """Leave out the project's hooks, which are shell commands, unless an administrator allows them.

    The place's own hooks, which an administrator has put there, stay.
    """
    path = candidate.lattice / "config.json"
    config = _json_object(path)
    report.hooks, report.hooks_kept = bool(config.get("hooks")), keep
    if keep:
        return
    own = _json_object(hooks_of).get("hooks") if hooks_of is not None and hooks_of.exists() else None
    if config.get("hooks") == own:
        return
    config.pop("hooks", None)
    if own:
        config["hooks"] = own
    path.write_bytes(json.dumps(config, sort_keys=True, indent=2).encode() + b"\n")


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise Misuse(f"{path.name} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise Misuse(f"{path.name} is no JSON object")
    return found


# --- lattice itself ---


class _NothingKept:
    """A candidate that is refused is removed: nothing need be taken back."""

    def keep_for_append(self, path: str) -> None: ...
    def keep_for_rewrite(self, path: str) -> None: ...
    def keep_for_replace(self, path: str) -> None: ...

    def keep_for_move(self, path: str) -> None: ...
    def keep_directory(self, path: str) -> None: ...


def _have_lattice_check(candidate: Candidate, report: ImportReport) -> None:
    """Run ``rebuild --all``, ``doctor`` and what everybody runs first.

    Raises:
        Misuse: lattice finds errors, breaks down, or would touch what is not the project's.
    """
    place = candidate.place
    code = code_directories(place)
    scratch = prepare_scratch(place)
    capture = Capture(str(candidate.lattice), str(scratch), _NothingKept(), code)
    executor = Executor(place, lazy=True)
    rebuilt = _run(executor, capture, ("rebuild", "--all"))
    if rebuilt.exit_code or rebuilt.stderr:
        raise Misuse(f"lattice rebuild: {_first_line(rebuilt.stderr or rebuilt.stdout)}")
    doctor = _run(executor, capture, ("doctor", "--json"))
    _read_findings(doctor.stdout, report)
    for argv in READS:
        _run(executor, capture, argv)


def _run(executor: Executor, capture: Capture, argv: Sequence[str]) -> CommandOutcome:
    outcome = CommandOutcome()
    path = " ".join(word for word in argv if not word.startswith("-"))
    with capture.watch() as touched, contextlib.suppress(AccessDenied):
        outcome = executor.run(argv, path)
    if touched.veto is not None:
        raise Misuse(f"lattice {path} would {touched.veto} because of what is in it")
    if touched.unshared:
        raise Misuse(f"lattice {path} would write {touched.unshared[0]!r}, a name that can't be shared")
    if outcome.failure is not None:
        raise Misuse(f"lattice {path} breaks down on it: {outcome.failure}")
    return outcome


def _read_findings(stdout: bytes, report: ImportReport) -> None:
    try:
        findings = json.loads(stdout)["data"]["findings"]
        told = [(str(found["level"]), printable(str(found["message"]))[:500]) for found in findings]
    except (ValueError, KeyError, TypeError) as error:
        raise Misuse(f"lattice doctor does not work on it: {_first_line(stdout)}") from error
    errors = [message for level, message in told if level == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise Misuse(f"lattice doctor: {errors[0]}{more}; mend it where it is, with: lattice doctor")
    report.warnings = [message for _, message in told[:_MAX_WARNINGS]]


def _first_line(output: bytes) -> str:
    lines = printable(output.decode(errors="replace")[:2000].partition("\n")[0])
    return lines or "it says nothing"


def _require_whole_tasks(lattice: Path) -> None:
    """Make sure that each task is one that its own event log has made.

    Raises:
        Misuse: one is not.
    """
    for folder, logs in ((lattice / "tasks", "events"), (lattice / "archive/tasks", "archive/events")):
        for path in sorted(folder.iterdir()):
            log = path.parent.parent / "events" / f"{path.stem}.jsonl"
            where = path.relative_to(lattice)
            if not log.exists():
                raise Misuse(f"{where} has no event log {logs}/{path.stem}.jsonl: its history is missing")
            if _json_object(path).get("id") != path.stem:
                raise Misuse(f"the event log of {where} is another task's")


class _Settings(msgspec.Struct):
    """What every ``create`` breaks down on when it is of another type."""

    project_code: str | None = None
    subproject_code: str | None = None
    task_types: list[str] = []
    default_status: str = ""
    default_priority: str = ""


class _SessionIndex(msgspec.Struct):
    """What lattice counts with when a session starts or ends."""

    active_sessions: dict[str, str] = {}
    serial_counters: dict[str, int] = {}


class _Session(msgspec.Struct):
    """One that goes on. Its own id becomes part of a file's name when it ends: with a path in it, it would end as
    another file than a session's."""

    name: str
    session: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


def _require_objects(lattice: Path) -> None:
    """Make sure that what lattice's doctor does not look at is what lattice expects.

    Raises:
        Misuse: something is not.
    """
    for path in sorted([*lattice.glob("sessions/**/*.json"), *lattice.glob("resources/*/resource.json")]):
        _json_object(path)
    _require_form(lattice / "config.json", _Settings)
    for path in sorted(lattice.glob("sessions/*.json")):
        if path.name == "index.json":
            _require_form(path, _SessionIndex)
        elif (name := _require_form(path, _Session).name) != path.stem:
            raise Misuse(f"sessions/{path.name} says that it is the session {printable(name)[:100]!r}")


def _require_form[Form: msgspec.Struct](path: Path, form: type[Form]) -> Form:
    try:
        return msgspec.json.decode(path.read_bytes(), type=form)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Misuse(f"{path.name} is not what lattice writes: {error}") from error


# --- what came of it ---


def _count(candidate: Candidate, report: ImportReport) -> None:
    tree = ProjectTree(candidate.lattice, {})
    now: dict[str, bytes] = {}
    for path, status in tree.scan():
        content = tree.read(path, None)
        if content is not None:
            now[path] = content.state.digest
            report.bytes += status.st_size
    report.files = len(now)
    report.tasks = sum(path.startswith("tasks/") for path in now)
    report.archived = sum(path.startswith("archive/tasks/") for path in now)
    changed = {path for path in now.keys() | candidate.digests.keys() if now.get(path) != candidate.digests.get(path)}
    report.rebuilt = sorted(changed - {"config.json"})


def _make_durable(place: Path) -> None:
    """Have the disk keep all of it: what is put in place later must survive a power cut."""
    for name in os.listdir(place / "tmp"):
        os.unlink(place / "tmp" / name)
    os.chdir(place)
    os.rmdir(place / "tmp")
    for folder, _, names in os.walk(place):
        sync_files(os.path.join(folder, name) for name in names)
        sync_directory(Path(folder))


if __name__ == "__main__":
    sys.exit(main())
