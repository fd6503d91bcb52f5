"""Check of one project's files against its journal and lattice's doctor. Changes nothing."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from lattice_remote.errors import ProtocolError
from lattice_remote.files import HEAD_BYTES, frames
from lattice_remote.protocol.messages import Change, Result, ServerFrame, decode_server_frame
from lattice_remote.server.datadir import ProjectPaths
from lattice_remote.server.journal.segment import Record, Segment, segment_paths
from lattice_remote.server.tree.tree import FileState, ProjectTree, has_signature, load_manifest
from lattice_remote.server.worker.recovery import is_in_doubt

__all__ = ["Finding", "JournalCheck", "ProjectCheck", "check_journal", "check_project"]


class Finding(msgspec.Struct, frozen=True):
    """One deviation.

    Attributes:
        project: "" for the server itself.
        where: a path, relative to the project's directory or to the data directory.
        repair: the action of ``--repair``; "" if a person has to decide.
    """

    project: str
    where: str
    what: str
    repair: str = ""
    repaired: bool = False

    def line(self) -> str:
        place = f"{self.project}: {self.where}" if self.project else self.where
        if self.repaired:
            return f"{place}: {self.what}; repaired: {self.repair}"
        return f"{place}: {self.what}" + (f"; --repair: {self.repair}" if self.repair else "")


SET_ASIDE = "set aside"
CUT = "cut it off and keep the cut part in set-aside/"
_decoder: msgspec.msgpack.Decoder[Segment | Record] = msgspec.msgpack.Decoder(Segment | Record)


@dataclass
class JournalCheck:
    """The content of a journal, and its findings.

    Attributes:
        epoch: "": the journal is unreadable.
    """

    project: str
    findings: list[Finding] = field(default_factory=list)
    epoch: str = ""
    oldest: int = 1
    head: int = 0
    mark: bytes = b""
    states: list[tuple[int, dict[str, FileState | None]]] = field(default_factory=list)
    unreachable: list[Path] = field(default_factory=list)
    _number: int = 0
    _run: list[Path] = field(default_factory=list)
    _ids: set[str] = field(default_factory=set)

    def found(self, path: Path, what: str, repair: str = "") -> None:
        self.findings.append(Finding(self.project, f"journal/{path.name}", what, repair))

    def take(self, path: Path, *, is_last: bool) -> None:
        data = path.read_bytes()
        items = frames(data)
        header = _header(items)
        if header is None:
            self.found(path, "it can't be read: its beginning is damaged", SET_ASIDE)
            self._break([*self._run, path])
            return
        self._begin(path, header)
        end = self._records(path, items, HEAD_BYTES + int.from_bytes(data[:4]))
        surplus = len(data) - end
        if surplus and is_last:
            self.found(path, f"{surplus} bytes after change {self.head} are no whole record", CUT)
        elif surplus:
            self.found(path, f"damaged at byte {end}: {surplus} bytes can't be read", SET_ASIDE)
            self._break([*self._run, path])
        else:
            self._run.append(path)

    def _begin(self, path: Path, header: Segment) -> None:
        at = (header.number, header.head, header.mark)
        if header.epoch != self.epoch or not self._run:
            self._start(header)
        elif at != (self._number, self.head, self.mark):
            self.found(path, "it does not continue the segment before it", "what was before it is set aside")
            self._break(self._run)
            self._start(header)

    def _start(self, header: Segment) -> None:
        self.epoch, self.head, self.mark, self._number = header.epoch, header.head, header.mark, header.number
        self.oldest = header.head + 1
        self.states.clear()
        self._run.clear()
        self._ids.clear()

    def _break(self, lost: list[Path]) -> None:
        self.unreachable += lost
        self._run = []

    def _records(self, path: Path, items: Iterator[tuple[int, bytes]], end: int) -> int:
        for offset, payload in items:
            end = offset + HEAD_BYTES + len(payload)
            try:
                record = _decoder.decode(payload)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                self.found(path, f"the record at byte {offset} can't be decoded: {error}")
                continue
            if isinstance(record, Segment):
                self.found(path, f"a second header at byte {offset}")
                continue
            for wrong in self._wrong_with(record):
                self.found(path, f"the record at byte {offset} {wrong}")
            self.head, self.mark = record.seq, record.mark
            self._number += 1
            if record.files:
                self.states.append((record.seq, record.files))
        return end

    def _wrong_with(self, record: Record) -> Iterator[str]:
        expected = self.head + (record.change is not None)
        if record.seq != expected:
            yield f"has number {record.seq} after {self.head}"
        if record.change is None and record.mark != self.mark:
            yield "changes nothing, but has another change id"
        if record.id and record.id in self._ids:
            yield f"answers request {record.id} again"
        if record.id:
            self._ids.add(record.id)
        yield from _wrong_with_change(record)
        yield from _wrong_with_reply(record)


def check_journal(project: str, directory: Path) -> JournalCheck:
    """Read every segment. Raises OSError."""
    check = JournalCheck(project)
    paths = segment_paths(directory)
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # expired since
            check.take(path, is_last=path is paths[-1])
    return check


def _header(items: Iterator[tuple[int, bytes]]) -> Segment | None:
    try:
        _, payload = next(items)
        item = _decoder.decode(payload)
    except (StopIteration, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return item if isinstance(item, Segment) else None


def _wrong_with_change(record: Record) -> Iterator[str]:
    change = _decoded(record.change)
    if isinstance(change, ProtocolError):
        yield f"has a change that can't be read: {change.message}"
    elif change is not None and not isinstance(change, Change):
        yield "has another frame instead of a change"
    elif change is not None and (change.seq, change.mark) != (record.seq, record.mark):
        yield f"has a change with another number or change id ({change.seq})"


def _wrong_with_reply(record: Record) -> Iterator[str]:
    reply = _decoded(record.reply)
    if isinstance(reply, ProtocolError):
        yield f"has an answer that can't be read: {reply.message}"
    elif reply is not None and not isinstance(reply, Result):
        yield "has another frame instead of an answer"
    elif reply is not None and reply.id != record.id:
        yield "has the answer to another request"


def _decoded(frame: bytes | None) -> ServerFrame | ProtocolError | None:
    try:
        return None if frame is None else decode_server_frame(frame, max_bytes=len(frame))
    except ProtocolError as error:
        return error


AS_CHANGE = "it becomes a numbered change, as at the next start"
AFTER_POWER_CUT = "losses of a power cut are restored, other differences become a numbered change, as at the next start"
NEW_EPOCH = "a new epoch starts and every client compares its files, as at the next start"
RESTORE = "restore it from the journal"
_DOCTOR = "import sys; from lattice.cli.main import cli; sys.argv[0] = 'lattice'; cli()"
_DOCTOR_TIMEOUT_S = 600


@dataclass
class ProjectCheck:
    """The check of one project.

    Attributes:
        damaged: paths of the tree whose content changed without a write.
        difference: the repair of a file that differs from the head.
    """

    findings: list[Finding] = field(default_factory=list)
    files: dict[str, FileState] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    difference: str = AS_CHANGE
    leftovers: list[Path] = field(default_factory=list)
    journal: JournalCheck | None = None


def check_project(slug: str, paths: ProjectPaths, *, at_rest: bool) -> ProjectCheck:
    """Check one project; ``at_rest``: no worker runs, so its scratch directory and undo log are not in use. Raises
    OSError.
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
        check.findings.append(Finding(slug, where, "left over from an interrupted program", "set aside"))
    check.findings += _permissions(slug, paths)
    check.findings += _doctor(slug, paths)
    return check


def _list_files(slug: str, paths: ProjectPaths, check: ProjectCheck) -> bool:
    journal = check.journal
    assert journal is not None, "check_project has read it"
    listed = load_manifest(paths.journal / "manifest")
    if listed is None and not journal.epoch and not journal.findings:
        return False  # no worker has opened it yet
    why = ""
    if listed is None:
        why = "it is missing or can't be read"
    elif listed.epoch != journal.epoch:
        why = "it has another epoch than the journal"
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
    journal = check.journal
    assert journal is not None, "check_project has read it"
    tree = ProjectTree(paths.lattice, check.files)
    seen = set()
    for path, status in tree.scan():
        seen.add(path)
        state, content = check.files.get(path), tree.read(path, None)
        if content is None:
            check.findings.append(Finding(slug, f".lattice/{path}", "it can't be read by this user"))
        elif state is None:
            what = f"change {journal.head} has no such file"
            check.findings.append(Finding(slug, f".lattice/{path}", what, check.difference))
        elif content.state.digest != state.digest:
            if has_signature(state, status) and state.settled:
                check.damaged.append(path)
                what, repair = "its content changed without a write: damaged by the disk", RESTORE
            else:
                what, repair = f"it differs from change {journal.head}", check.difference
            check.findings.append(Finding(slug, f".lattice/{path}", what, repair))
    for path in check.files.keys() - seen:
        check.findings.append(Finding(slug, f".lattice/{path}", "it is gone", check.difference))


def _cut_off(slug: str, paths: ProjectPaths) -> Iterator[Finding]:
    """Yield unfinished operations; a running worker's undo log holds its current command."""
    if (paths.root / "adopting").is_dir():
        what = "a pushed project is not in place yet"
        yield Finding(slug, "adopting", what, "put it in place, as at the next start")
    undo = paths.journal / "undo"
    if undo.exists() and undo.stat().st_size:
        yield Finding(slug, "journal/undo", "a command was interrupted", "undo it, as at the next start")


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
            continue  # expired or renamed since
        if status.st_mode & 0o002:
            yield Finding(slug, where, "any user on this machine can write to it", "remove that permission")
        if status.st_uid != owner:
            yield Finding(slug, where, f"it belongs to user {status.st_uid}, the project to {owner}")


def _doctor(slug: str, paths: ProjectPaths) -> Iterator[Finding]:
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
        problem = " ".join(done.stderr.decode(errors="replace").split())[-300:]
        yield Finding(slug, ".lattice", f"lattice doctor does not work here: {problem or f'exit {done.returncode}'}")
