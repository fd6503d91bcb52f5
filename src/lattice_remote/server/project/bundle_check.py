"""Check of a project's bundle or directory: a process builds a candidate and has lattice itself verify it.

    python -m lattice_remote.server.project.bundle_check --into PLACE --pack FILE --max-bytes N

Its input is untrusted: memory, processor time and file size are bounded, and lattice runs under the audit hook. It
prints one ``ImportReport`` as JSON.
"""

import argparse
import asyncio
import contextlib
import ctypes
import gc
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated, Any

import msgspec

from lattice_remote.errors import Misuse, ProtocolError, RemoteError, StorageError, printable
from lattice_remote.files import READ, SAFE, Signature, signature_of, write_all
from lattice_remote.protocol.bundle import MAGIC, MAX_PROJECT_FILES, Layout, Unpacker, head_of
from lattice_remote.protocol.messages import Entry
from lattice_remote.protocol.paths import DIRECTORIES, is_replicated
from lattice_remote.server.tree.capture import AccessDenied, Capture
from lattice_remote.server.tree.tree import FileState, ProjectTree, state_of, sync_directory, sync_files
from lattice_remote.server.worker.executor import CommandOutcome, Executor
from lattice_remote.server.worker.main import code_directories, prepare_scratch
from lattice_remote.server.worker.patches import LockTable
from lattice_remote.server.worker.project_import import save_states

__all__ = ["Candidate", "ImportReport", "add_directory", "add_pack", "beside", "main", "quarantine"]

_MAX_REMEMBERED_BYTES = 256 << 20
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | SAFE


class Candidate:
    """Project under construction in ``place``, the real path of an empty directory.

    Every file is created here, with a checked name: no link leads outside.
    """

    def __init__(self, place: Path, layout: Layout) -> None:
        self.place = place
        self.lattice = place / ".lattice"
        self.layout = layout
        self.digests: dict[str, bytes] = {}
        """As received."""
        self.signatures: dict[str, Signature] = {}
        """Right after they were written."""
        self.contents: dict[str, bytes] = {}
        """Of files that lattice reads, as received, while they take at most 256 MiB."""
        self._room = _MAX_REMEMBERED_BYTES
        self._directories = set(DIRECTORIES)
        for directory in DIRECTORIES:
            (self.lattice / directory).mkdir(parents=True, exist_ok=True)

    def add(self, path: str, size: int, pieces: Iterable[bytes]) -> None:
        """Create a file, which ``layout`` has accepted. Raises OSError."""
        target = f"{self.lattice}/{path}"
        if (directory := path.rpartition("/")[0]) not in self._directories:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            self._directories.add(directory)
        hasher, content = hashlib.sha256(), b""
        descriptor = os.open(target, _NEW, 0o644)
        try:
            for piece in pieces:
                hasher.update(piece)
                write_all(descriptor, piece)
                content = piece
            self.signatures[path] = signature_of(os.fstat(descriptor))
        finally:
            os.close(descriptor)
        self.digests[path] = hasher.digest()
        if len(content) == size <= self._room and path.endswith((".json", ".jsonl")):
            self.contents[path] = content
            self._room -= size

    def is_as_received(self, path: str, status: os.stat_result) -> bool:
        return self.signatures.get(path) == signature_of(status)


MAX_NAMED = 20
_MAX_NOTE_CHARS = 2000
"""Fits a line of a frame, which has at most 4096."""


class ImportReport(msgspec.Struct, kw_only=True):
    """Result of the check: the candidate may be put in place if ``refused`` is empty.

    Attributes:
        omitted: entries that do not belong to a project.
        rebuilt: files that differed from the event logs.
    """

    refused: str = ""
    tasks: int = 0
    archived: int = 0
    files: int = 0
    bytes: int = 0
    hooks: bool = False
    hooks_kept: bool = False
    omitted: list[str] = []
    rebuilt: list[str] = []
    warnings: list[str] = []

    def notes(self) -> list[str]:
        lines = []
        if self.hooks and not self.hooks_kept:
            lines.append("its hooks were removed: an administrator must allow them")
        if self.rebuilt:
            lines.append(f"rebuilt from the event logs: {_named(self.rebuilt)}")
        if self.omitted:
            lines.append(f"omitted, not part of a project: {_named(self.omitted)}")
        lines += [f"lattice doctor: {warning}" for warning in self.warnings[:MAX_NAMED]]
        return [line[:_MAX_NOTE_CHARS] for line in lines]


def _named(paths: list[str]) -> str:
    more = len(paths) - MAX_NAMED
    return ", ".join(paths[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


_COMMAND = (sys.executable, "-P", "-X", "utf8", "-m", "lattice_remote.server.project.bundle_check")
_TIMEOUT_S = 3600.0
"""10,000 tasks take about ten seconds."""
_MAX_ERROR_CHARS = 300


async def quarantine(
    place: Path,
    source: Sequence[str | Path],
    *,
    max_bytes: int,
    keep_hooks: bool = False,
    hooks_of: Path | None = None,
) -> ImportReport:
    """Build a candidate in ``place``, which must not exist, and check it.

    Afterwards ``place`` is a complete, durable project, or is gone if the report has ``refused``. Raises StorageError
    if the check cannot run.

    Args:
        source: ``--pack FILE`` or ``--from DIRECTORY``.
        keep_hooks: an administrator allows its hooks.
        hooks_of: a ``config.json`` whose hooks replace its own.
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
        return ImportReport(refused=f"the check timed out after {_TIMEOUT_S / 60:.0f} minutes")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    try:
        return msgspec.json.decode(stdout, type=ImportReport)
    except msgspec.DecodeError:
        pass
    if process.returncode is not None and process.returncode < 0:
        return ImportReport(refused=_exceeded(-process.returncode))
    problem = " ".join(stderr.decode(errors="replace").split())[-_MAX_ERROR_CHARS:]
    raise StorageError(f"cannot check the project: {problem or f'exit {process.returncode}'}")


def _exceeded(signal_number: int) -> str:
    return f"the check exceeded its limits of memory or processor time (signal {signal_number})"


_PIECE_BYTES = 1 << 20
_MAX_OMITTED = 1000
_BOOKKEEPING = frozenset({"locks", "remote.json", "cache_state.json", ".gitignore", ".remote"})
"""Omitted without a note."""


def add_pack(candidate: Candidate, pack: Path) -> None:
    """Add a bundle's files, after validating it as a whole. Raises ProtocolError, or Misuse."""
    place, places = len(MAGIC), list[tuple[str, int, int]]()
    for entry in _entries(pack):
        candidate.layout.add(entry.path, entry.size)
        place += len(head_of(entry))
        places.append((entry.path, place, entry.size))
        place += entry.size
    with pack.open("rb") as file:
        for path, place, size in places:
            file.seek(place)
            candidate.add(path, size, _first(size, file, path))


def _entries(pack: Path) -> Iterator[Entry]:
    unpacker = Unpacker()
    with pack.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            for item in unpacker.receive(piece):
                if isinstance(item, Entry):
                    yield item
    if not unpacker.is_complete:
        raise ProtocolError("the bundle is truncated")


def add_directory(candidate: Candidate, directory: Path) -> list[str]:
    """Add the replicated files below a ``.lattice``; return the omitted paths.

    Raises OSError, or Misuse if a project cannot contain a file, or it was truncated while being read.
    """
    omitted: list[str] = []
    for path in _walk(directory, omitted):
        with open(os.open(f"{directory}/{path}", READ), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Misuse(f"{path} was replaced while it was read; {directory} is in use: try again")
            candidate.layout.add(path, status.st_size)
            candidate.add(path, status.st_size, _first(status.st_size, file, path))
    return sorted(omitted)


def _first(size: int, file: IO[bytes], path: str) -> Iterator[bytes]:
    """Yield the next ``size`` bytes: a log may grow."""
    while size:
        piece = file.read(min(size, _PIECE_BYTES))
        if not piece:
            raise Misuse(f"{path} was truncated while it was read; it is in use: try again")
        size -= len(piece)
        yield piece


def _walk(directory: Path, omitted: list[str]) -> Iterator[str]:
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
            elif path not in _BOOKKEEPING and len(omitted) < _MAX_OMITTED:
                omitted.append(path)
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
"""The first commands of every user: they must not fail."""
_READS_BESIDE = 5
"""Run in a second process; with ``doctor``, the rest takes as long."""
_MAX_WARNINGS = 50


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lattice-remote-intake")
    parser.add_argument("--into", type=Path, required=True, help="an empty directory")
    parser.add_argument("--pack", type=Path)
    parser.add_argument("--from", dest="directory", type=Path)
    parser.add_argument("--max-bytes", type=int, required=True)
    parser.add_argument("--keep-hooks", action="store_true")
    parser.add_argument("--hooks-of", type=Path, help="a config.json whose hooks replace its own")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends this one
    sys.dont_write_bytecode = True
    gc.disable()  # a tenth of the time; the memory is bounded
    report = ImportReport()
    report.refused = _refusal_of(lambda: _build_candidate(options, report))
    sys.stdout.buffer.write(msgspec.json.encode(report))
    return 0


def _refusal_of(work: Callable[[], None]) -> str:
    """Return the reason why ``work`` failed on the project; empty if it did not."""
    try:
        work()
    except RemoteError as error:
        return error.message
    except (RecursionError, MemoryError) as error:
        return f"checking it exceeds the limits: {type(error).__name__}"
    except OSError as error:
        return f"the server cannot store it: {error.strerror or error}"
    return ""


def _build_candidate(options: argparse.Namespace, report: ImportReport) -> None:
    place: Path = options.into.resolve()
    _limit_resources(options.max_bytes)
    candidate = Candidate(place, Layout(max_bytes=options.max_bytes))
    if options.pack is not None:
        add_pack(candidate, options.pack)
    else:
        report.omitted = add_directory(candidate, options.directory.resolve())
    if "config.json" not in candidate.digests:
        raise Misuse("config.json not found: this is not a lattice project")
    _settle_hooks(candidate, report, keep=options.keep_hooks, hooks_of=options.hooks_of)
    _check_with_lattice(candidate, report)
    _make_durable(place)


def _limit_resources(max_bytes: int) -> None:
    for what, limit in (
        (resource.RLIMIT_AS, _MEMORY_BYTES),
        (resource.RLIMIT_CPU, _CPU_S),
        (resource.RLIMIT_FSIZE, max_bytes),
    ):
        with contextlib.suppress(OSError, ValueError):  # the system has another, lower bound
            resource.setrlimit(what, (limit, resource.getrlimit(what)[1]))


# --- hooks ---


def _settle_hooks(candidate: Candidate, report: ImportReport, *, keep: bool, hooks_of: Path | None) -> None:
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
    candidate.signatures.pop("config.json")  # the new file may have the same one
    candidate.contents.pop("config.json", None)
    path.write_bytes(json.dumps(config, sort_keys=True, indent=2).encode() + b"\n")


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise Misuse(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise Misuse(f"{path.name} is not a JSON object")
    return found


# --- lattice itself ---


class _NoPreImages:
    """None: a refused candidate is removed as a whole."""

    def keep_for_append(self, path: str, status: os.stat_result | None) -> None: ...
    def keep_for_rewrite(self, path: str, status: os.stat_result | None) -> None: ...
    def keep_for_replace(self, path: str, status: os.stat_result | None) -> None: ...
    def keep_for_move(self, path: str, status: os.stat_result | None) -> None: ...
    def keep_directory(self, path: str) -> None: ...


def _check_with_lattice(candidate: Candidate, report: ImportReport) -> None:
    """Run ``rebuild --all``, ``doctor`` and the most common reading commands."""
    place = candidate.place
    code = code_directories(place)
    scratch = prepare_scratch(place)
    capture = Capture(str(candidate.lattice), str(scratch), _NoPreImages(), code)
    executor = Executor(place, lazy=True, locks=_NoLocks(candidate.lattice))
    with _received_files_neither_read_nor_written(candidate):
        rebuilt = _run(executor, capture, ("rebuild", "--all"))
        if rebuilt.exit_code or rebuilt.stderr:
            raise Misuse(f"lattice rebuild: {_first_line(rebuilt.stderr or rebuilt.stdout)}")

        def run(reads: Sequence[Sequence[str]]) -> None:
            for argv in reads:
                _run(executor, capture, argv)

        with beside(lambda: run(READS[:_READS_BESIDE])):
            doctor = _run(executor, capture, ("doctor", "--json"))
            _read_findings(doctor.stdout, report)
            run(READS[_READS_BESIDE:])
            _require_whole_tasks(candidate.lattice)
            _require_objects(candidate.lattice)
            _count(candidate, report)


_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def beside(work: Callable[[], None]) -> Iterator[None]:
    """Run ``work`` in a forked process while the block runs. Raises Misuse with its reason, after that of the block."""
    parent, (receiving, sending) = os.getpid(), os.pipe()
    if not (child := os.fork()):
        # Nothing of the parent's may run in the child: neither its handlers nor its buffered output.
        try:
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:
                write_all(sending, _refusal_of(work).encode(errors="replace"))
                os._exit(0)
        except BaseException:  # noqa: BLE001 - a fault of this program, which the server logs
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(1)
    os.close(sending)
    try:
        with open(receiving, "rb") as pipe:
            yield
            refused = pipe.read().decode()
        child, status = 0, os.waitpid(child, 0)[1]
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise Misuse(_exceeded(os.WTERMSIG(status)))
    if status:
        raise RuntimeError("the check of the first commands failed")
    if refused:
        raise Misuse(refused)


class _NoLocks(LockTable):
    """No locks: no other process knows the candidate, and ``rebuild --all`` would hold one for each task."""

    def acquire(self, path: Path, timeout_s: float) -> None: ...


@contextlib.contextmanager
def _received_files_neither_read_nor_written(candidate: Candidate) -> Iterator[None]:
    """Give lattice's commands the texts of unchanged files from memory, and do not write a file with equal content.

    Each command reads every task, and most of them every log.
    """
    integrity_cmds: Any = importlib.import_module("lattice.cli.integrity_cmds")
    prefix = f"{candidate.lattice}/"
    received = {
        prefix + path: (candidate.signatures[path], content.decode())
        for path, content in candidate.contents.items()
        if _is_plain_text(content)
    }
    candidate.contents.clear()
    read_text, atomic_write = Path.read_text, integrity_cmds.atomic_write

    def read_received_text(path: Path, *arguments: Any, **options: Any) -> str:
        if not arguments and not options and (known := received.get(name := str(path))) is not None:
            if known[0] == signature_of(os.stat(name)):
                return known[1]
            del received[name]
        return read_text(path, *arguments, **options)

    def write_changed(path: Path, content: str | bytes) -> None:
        known = received.get(name := str(path))
        if known is None or known[1] != content or known[0] != signature_of(os.stat(name)):
            atomic_write(path, content)

    try:
        setattr(Path, "read_text", read_received_text)  # noqa: B010 - a method
        integrity_cmds.atomic_write = write_changed
        yield
    finally:
        setattr(Path, "read_text", read_text)  # noqa: B010
        integrity_cmds.atomic_write = atomic_write


def _is_plain_text(content: bytes) -> bool:
    """Return whether a text file with this content reads as its bytes: Python translates line ends."""
    return content.isascii() and b"\r" not in content


def _run(executor: Executor, capture: Capture, argv: Sequence[str]) -> CommandOutcome:
    outcome = CommandOutcome()
    path = " ".join(word for word in argv if not word.startswith("-"))
    with capture.watch() as touched, contextlib.suppress(AccessDenied):
        outcome = executor.run(argv, path)
    if touched.veto is not None:
        raise Misuse(f"lattice {path} would {touched.veto} because of its content")
    if touched.unshared:
        raise Misuse(f"lattice {path} would write {touched.unshared[0]!r}, a name that cannot be shared")
    if outcome.failure is not None:
        raise Misuse(f"lattice {path} fails on it: {outcome.failure}")
    return outcome


def _read_findings(stdout: bytes, report: ImportReport) -> None:
    try:
        findings = json.loads(stdout)["data"]["findings"]
        messages = [(str(found["level"]), printable(str(found["message"]))[:500]) for found in findings]
    except (ValueError, KeyError, TypeError) as error:
        raise Misuse(f"lattice doctor fails on it: {_first_line(stdout)}") from error
    errors = [message for level, message in messages if level == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise Misuse(f"lattice doctor: {errors[0]}{more}; repair it at its source with: lattice doctor")
    report.warnings = [message for _, message in messages[:_MAX_WARNINGS]]


def _first_line(output: bytes) -> str:
    lines = printable(output.decode(errors="replace")[:2000].partition("\n")[0])
    return lines or "no output"


def _require_whole_tasks(lattice: Path) -> None:
    for folder, logs in ((lattice / "tasks", "events"), (lattice / "archive/tasks", "archive/events")):
        known = set(os.listdir(lattice / logs))
        for name in sorted(os.listdir(folder)):
            task = name.removesuffix(".json")
            if f"{task}.jsonl" not in known:
                raise Misuse(f"{folder.relative_to(lattice)}/{name} has no event log {logs}/{task}.jsonl")
            if _id_of(f"{folder}/{name}") != task:
                raise Misuse(f"the event log of {folder.relative_to(lattice)}/{name} belongs to another task")


class _Identity(msgspec.Struct):
    id: str | None = None


def _id_of(path: str) -> object:
    try:
        with open(path, "rb", buffering=0) as file:
            return _identities.decode(file.read()).id
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _json_object(Path(path)).get("id")


_identities = msgspec.json.Decoder(_Identity)


class _Settings(msgspec.Struct):
    """Settings whose types every ``create`` relies on."""

    project_code: str | None = None
    subproject_code: str | None = None
    task_types: list[str] = []
    default_status: str = ""
    default_priority: str = ""


class _SessionIndex(msgspec.Struct):
    active_sessions: dict[str, str] = {}
    serial_counters: dict[str, int] = {}


class _Session(msgspec.Struct):
    """Active session. Its own id becomes part of a file name when it ends."""

    name: str
    session: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


def _require_objects(lattice: Path) -> None:
    for path in sorted([*lattice.glob("sessions/**/*.json"), *lattice.glob("resources/*/resource.json")]):
        _json_object(path)
    _require_form(lattice / "config.json", _Settings)
    for path in sorted(lattice.glob("sessions/*.json")):
        if path.name == "index.json":
            _require_form(path, _SessionIndex)
        elif (name := _require_form(path, _Session).name) != path.stem:
            raise Misuse(f"sessions/{path.name} names another session, {printable(name)[:100]!r}")


def _require_form[Form: msgspec.Struct](path: Path, form: type[Form]) -> Form:
    try:
        return msgspec.json.decode(path.read_bytes(), type=form)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Misuse(f"{path.name} is not what lattice writes: {error}") from error


def _count(candidate: Candidate, report: ImportReport) -> None:
    """Count the files, and leave their states to the worker that opens the project."""
    tree = ProjectTree(candidate.lattice, {})
    states: dict[str, FileState] = {}
    for path, status in tree.scan():
        if candidate.is_as_received(path, status):
            states[path] = state_of(status, status.st_size, candidate.digests[path])
        elif (content := tree.read(path, None)) is not None:
            states[path] = content.state
    save_states(candidate.place, states)
    now = {path: state.digest for path, state in states.items()}
    report.bytes += sum(state.size for state in states.values())
    report.files = len(now)
    report.tasks = sum(path.startswith("tasks/") for path in now)
    report.archived = sum(path.startswith("archive/tasks/") for path in now)
    changed = {path for path in now.keys() | candidate.digests.keys() if now.get(path) != candidate.digests.get(path)}
    report.rebuilt = sorted(changed - {"config.json"})


def _make_durable(place: Path) -> None:
    for name in os.listdir(place / "tmp"):
        os.unlink(place / "tmp" / name)
    os.chdir(place)
    os.rmdir(place / "tmp")
    for folder, _, names in os.walk(place):
        sync_files(os.path.join(folder, name) for name in names)
        sync_directory(Path(folder))


if __name__ == "__main__":
    sys.exit(main())
