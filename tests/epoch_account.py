"""Expected changes of the epoch (I7), from the changes that the observer has seen and the journal has lost.

A change that the observer has seen was acknowledged: a history without it must begin a new epoch. A torn record that
was not sent to any client, a killed process and a full disk lose nothing: the epoch stays.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lattice_remote.server.journal.repair import place_of
from lattice_remote.server.journal.segment import JournalReader
from lattice_remote.server.maintenance.fsck_project import check_journal
from observer import Observer
from sandbox import Server

__all__ = ["Epochs"]


class Epochs:
    """Epoch of a server across its faults; used by one thread."""

    def __init__(self, server: Server, observer: Observer) -> None:
        self._server, self._observer = server, observer
        self._epoch = observer.position[0]
        self._former: set[str] = set()
        self._may_change = False
        self._must_change = False
        self._journal = Path(server.data, "projects", "board", "journal")
        self.begun = 0
        """How many new epochs there were, each for a reason."""

    @contextlib.contextmanager
    def history_may_be_lost(self) -> Iterator[None]:
        """Within the block, change the journal of a stopped server; the expected epoch follows from the result."""
        saw = self._observer.position
        before, place = self._on_disk(), place_of(self._journal)
        yield
        now, is_copy = self._on_disk(), place_of(self._journal) != place
        self._must_change = now[0] != saw[0] or now[1] < saw[1] or is_copy
        self._may_change = now != before or is_copy
        if self._must_change and now[0] and now[0] != before[0]:
            self._observer.forget(*now[:2])

    def settle(self) -> None:
        """Wait until the observer knows the present epoch, and check it."""
        self._observer.current(not_in=self._epoch if self._must_change else None)
        epoch = self._observer.position[0]
        if epoch != self._epoch:
            assert self._must_change or self._may_change, "a new epoch, though nothing of the history was lost"
            self.begun += 1
            self._former.add(self._epoch)
            # Back in a former epoch: a client that slept through all of it may prove that rollback later.
            self._epoch, self._may_change = epoch, epoch in self._former
        self._must_change = False

    def _on_disk(self) -> tuple[str, int, int]:
        """Return the journal's epoch ("": none goes on), its head, and how many records can be read."""
        check = check_journal("board", self._journal)
        return check.epoch, check.head, sum(1 for _ in JournalReader(self._journal).records())
