"""Reading the journal from another process than the worker, which may append meanwhile."""

from collections.abc import Iterator
from pathlib import Path

from lattice_remote.server.journal.segment import Record, Segment, decoder, header_of, readable_records, segment_paths
from lattice_remote.server.record_format import frames

__all__ = ["JournalReader"]


class JournalReader:
    """Reads the journal while the worker writes it. Blocking: call it from a thread. One per follower, or shared.

    It may see records that are not durable yet: ask only up to a number that the worker has reported as done (I2).
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, after: int, upto: int, max_bytes: int) -> list[tuple[int, bytes]] | None:
        """Return (number, encoded ``Change``) for ``after < number <= upto``, in order, without a gap.

        At most ``max_bytes`` of changes, but at least one when there is one: go on with the last number returned.
        None when change ``after + 1`` is not kept any more: the client must resync.

        Raises:
            OSError: a segment can't be read.
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
            OSError: a segment can't be read.
        """
        return (item for item in self._items(0) if isinstance(item, Record))

    def mark_at(self, seq: int) -> bytes | None:
        """Return the mark of change ``seq`` (of the state before the first kept one too), None when not known.

        Raises:
            OSError: a segment can't be read.
        """
        for item in self._items(seq):
            number = item.head if isinstance(item, Segment) else item.seq
            if number == seq:
                return item.mark
            if number > seq:
                return None
        return None

    def was_at(self, epoch: str, seq: int, mark: bytes) -> bool:
        """Tell whether this position is on record, in this history or a former one that is still on disk.

        One that is older than what is kept of its epoch counts as such.

        Raises:
            OSError: a segment can't be read.
        """
        paths = [(path, header) for path in segment_paths(self._directory) if (header := header_of(path)) is not None]
        of_epoch = [(path, header) for path, header in paths if header.epoch == epoch]
        for path, header in reversed(of_epoch):
            if header.head <= seq:
                marks = {record.seq: record.mark for record in readable_records(path)}
                return {header.head: header.mark, **marks}.get(seq) == mark
        return bool(of_epoch)

    def _items(self, seq: int) -> Iterator[Segment | Record]:
        """Yield what is on disk of the history, from the segment on in which change ``seq + 1`` would be."""
        paths: list[Path] = []
        epoch = None
        for path in reversed(segment_paths(self._directory)):
            header = header_of(path)
            if header is None or epoch not in (None, header.epoch):
                break  # expired meanwhile, damaged, or of a former history
            epoch = header.epoch
            paths.append(path)
            if header.head <= seq:
                break
        for path in reversed(paths):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                return  # expired meanwhile
            for _, payload in frames(data):
                yield decoder.decode(payload)
