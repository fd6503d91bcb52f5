"""Journal access for processes other than the worker, which may append at the same time."""

from collections.abc import Iterator
from pathlib import Path

from lattice_remote.server.journal.segment import Record, Segment, decoder, header_of, readable_records, segment_paths
from lattice_remote.server.record_format import frames

__all__ = ["JournalReader"]


class JournalReader:
    """Reader of the journal. Blocking: call it from a thread. One per subscriber, or shared.

    It may see records that are not durable yet: ask only up to a number that the worker has reported as done (I2).
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, after: int, upto: int, max_bytes: int) -> list[tuple[int, bytes]] | None:
        """Return (number, encoded ``Change``) for ``after < number <= upto``, in order, without a gap.

        At most ``max_bytes`` of changes, but at least one if there is one: continue with the last number returned. None
        if change ``after + 1`` has expired: the client must resync.

        Raises:
            OSError: a segment cannot be read.
        """
        changes: list[tuple[int, bytes]] = []
        total = 0
        for item in self._items(after):
            if isinstance(item, Record) and item.change is not None and after < item.seq <= upto:
                if item.seq != after + 1:
                    return changes or None
                changes.append((item.seq, item.change))
                after, total = item.seq, total + len(item.change)
                if total >= max_bytes:
                    break
            if isinstance(item, Record) and item.seq > upto:
                break
        return changes if changes or after >= upto else None

    def records(self) -> Iterator[Record]:
        """Yield every record of the history, oldest first.

        Raises:
            OSError: a segment cannot be read.
        """
        return (item for item in self._items(0) if isinstance(item, Record))

    def mark_at(self, seq: int) -> bytes | None:
        """Return the change id of change ``seq``, or of the state before the first kept one; None if unknown.

        Raises:
            OSError: a segment cannot be read.
        """
        for item in self._items(seq):
            number = item.head if isinstance(item, Segment) else item.seq
            if number == seq:
                return item.mark
            if number > seq:
                return None
        return None

    def was_at(self, epoch: str, seq: int, mark: bytes) -> bool:
        """Return whether this position is on record, in this history or a former one still on disk.

        A position older than the kept part of its epoch counts as on record.

        Raises:
            OSError: a segment cannot be read.
        """
        paths = [(path, header) for path in segment_paths(self._directory) if (header := header_of(path)) is not None]
        of_epoch = [(path, header) for path, header in paths if header.epoch == epoch]
        for path, header in reversed(of_epoch):
            if header.head <= seq:
                marks = {record.seq: record.mark for record in readable_records(path)}
                return {header.head: header.mark, **marks}.get(seq) == mark
        return bool(of_epoch)

    def _items(self, seq: int) -> Iterator[Segment | Record]:
        """Yield the items on disk of the history, from the segment that would hold change ``seq + 1``."""
        paths: list[Path] = []
        epoch = None
        for path in reversed(segment_paths(self._directory)):
            header = header_of(path)
            if header is None or epoch not in (None, header.epoch):
                break  # expired since, damaged, or of a former history
            epoch = header.epoch
            paths.append(path)
            if header.head <= seq:
                break
        for path in reversed(paths):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                return  # expired since
            for _, payload in frames(data):
                yield decoder.decode(payload)
