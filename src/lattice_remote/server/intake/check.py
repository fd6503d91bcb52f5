"""The process that puts a candidate together and has lattice itself check it.

    python -m lattice_remote.server.intake.check --into PLACE --pack FILE --max-bytes N

What it reads is hostile until shown otherwise, so it is a process of its own: bounded in memory, processor time and
file size, and lattice runs in it under the same audit hook as in a worker. It prints one JSON ``Report``.
"""

import argparse
import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from lattice_remote.errors import Misuse, RemoteError
from lattice_remote.logtext import printable
from lattice_remote.protocol.layout import Layout
from lattice_remote.server.intake.candidate import Candidate
from lattice_remote.server.intake.report import Report
from lattice_remote.server.intake.sources import add_directory, add_pack
from lattice_remote.server.tree.capture import Capture, Vetoed
from lattice_remote.server.tree.manifest import sync_directory, sync_files
from lattice_remote.server.tree.tree import Tree
from lattice_remote.server.worker.confinement import code_directories, prepare_scratch
from lattice_remote.server.worker.executor import Executor, Outcome

__all__ = ["main"]

_MEMORY_BYTES = 4 << 30
_CPU_S = 1800
_READS: Sequence[Sequence[str]] = (
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
    report = Report()
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


def _take_in(options: argparse.Namespace, report: Report) -> None:
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


def _settle_hooks(candidate: Candidate, report: Report, *, keep: bool, hooks_of: Path | None) -> None:
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


def _have_lattice_check(candidate: Candidate, report: Report) -> None:
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
    for argv in _READS:
        _run(executor, capture, argv)


def _run(executor: Executor, capture: Capture, argv: Sequence[str]) -> Outcome:
    outcome = Outcome()
    path = " ".join(word for word in argv if not word.startswith("-"))
    with capture.watch() as touched, contextlib.suppress(Vetoed):
        outcome = executor.run(argv, path)
    if touched.veto is not None:
        raise Misuse(f"lattice {path} would {touched.veto} because of what is in it")
    if touched.unshared:
        raise Misuse(f"lattice {path} would write {touched.unshared[0]!r}, a name that can't be shared")
    if outcome.failure is not None:
        raise Misuse(f"lattice {path} breaks down on it: {outcome.failure}")
    return outcome


def _read_findings(stdout: bytes, report: Report) -> None:
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


def _count(candidate: Candidate, report: Report) -> None:
    tree = Tree(candidate.lattice, {})
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
