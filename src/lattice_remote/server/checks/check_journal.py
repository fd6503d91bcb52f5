"""Reads a project's journal as a sceptic: every byte of every segment. Changes nothing, needs no lock."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from lattice_remote.errors import ProtocolError
from lattice_remote.protocol.codec import decode_server_frame
from lattice_remote.protocol.messages import Change, Result
from lattice_remote.server.checks.findings import Finding
from lattice_remote.server.data.framing import HEAD_BYTES, frames
from lattice_remote.server.journal.segments import Record, Segment, segment_paths
from lattice_remote.server.tree.manifest import FileState

__all__ = ["JournalCheck", "check_journal"]

SET_ASIDE = "set aside"
CUT = "cut it off; what is cut is kept in set-aside/"
_decoder: msgspec.msgpack.Decoder[Segment | Record] = msgspec.msgpack.Decoder(Segment | Record)


@dataclass
class JournalCheck:
    """What a journal says, and what is wrong with it.

    Attributes:
        epoch, oldest, head, mark: as in ``Journal``; no epoch: there is nothing that can be read.
        states: number and files of each commit of the history, oldest first.
        unreachable: segments that nobody is sent any more because of damage.
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

    def found(self, path: Path, what: str, mend: str = "") -> None:
        """Note something wrong with a segment."""
        self.findings.append(Finding(self.project, f"journal/{path.name}", what, mend))

    def take(self, path: Path, *, is_last: bool) -> None:
        """Read one segment; call in order."""
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
        """A history begins here, as far as it can be read."""
        if header.epoch != self.epoch:
            self.unreachable.clear()  # of a former epoch: nobody asks for those, the log shows what it can
        self.epoch, self.head, self.mark, self._number = header.epoch, header.head, header.mark, header.number
        self.oldest = header.head + 1
        self.states.clear()
        self._run.clear()
        self._ids.clear()

    def _break(self, lost: list[Path]) -> None:
        self.unreachable += lost
        self._run = []

    def _records(self, path: Path, items: Iterator[tuple[int, bytes]], end: int) -> int:
        """Check records one by one; return where the last whole one ends."""
        for offset, payload in items:
            end = offset + HEAD_BYTES + len(payload)
            try:
                record = _decoder.decode(payload)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                self.found(path, f"the record at byte {offset} can't be understood: {error}")
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
            yield "changes nothing, but has another mark"
        if record.id and record.id in self._ids:
            yield f"answers request {record.id} once more"
        if record.id:
            self._ids.add(record.id)
        yield from _wrong_with_change(record)
        yield from _wrong_with_reply(record)


def check_journal(project: str, directory: Path) -> JournalCheck:
    """Read every segment in ``directory``.

    Raises:
        OSError: one can't be read at all.
    """
    check = JournalCheck(project)
    paths = segment_paths(directory)
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # expired meanwhile
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
    if record.change is None:
        return
    try:
        change = decode_server_frame(record.change, max_bytes=len(record.change))
    except ProtocolError as error:
        yield f"has a change that can't be read: {error.message}"
        return
    if not isinstance(change, Change):
        yield "has something else in place of a change"
    elif (change.seq, change.mark) != (record.seq, record.mark):
        yield f"has a change of another number or mark ({change.seq})"


def _wrong_with_reply(record: Record) -> Iterator[str]:
    if record.reply is None:
        return
    try:
        reply = decode_server_frame(record.reply, max_bytes=len(record.reply))
    except ProtocolError as error:
        yield f"has an answer that can't be read: {error.message}"
        return
    if not isinstance(reply, Result):
        yield "has something else in place of an answer"
    elif reply.id != record.id:
        yield "has the answer to another request"
