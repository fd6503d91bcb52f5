"""How far one client is, as it says itself: what ``lattice-remote status`` and the figures tell of it.

What a client says is believed only as far as it can be true: no change that was not sent to it, and none twice.
"""

import time
from datetime import UTC, datetime

from lattice_remote.protocol.messages import Applied, Hello
from lattice_remote.server.data.metrics import ProjectMetrics
from lattice_remote.server.project.pace import Pace

__all__ = ["Standing"]


class Standing:
    """One connection. ``greeted()`` comes first; before it nothing is known."""

    def __init__(self, pace: Pace, metrics: ProjectMetrics) -> None:
        self.since = datetime.now(UTC)
        """When it was connected."""
        self.client_version = ""
        """What it runs, as it says; "" before its greeting."""
        self.lattice_version = ""
        self.applied: int | None = None
        """The last change that its files hold, as far as is known; None: it keeps no copy on this connection."""
        self._pace = pace
        self._metrics = metrics
        self._measured_from = 0  # changes up to here were committed before it was there

    def greeted(self, hello: Hello, *, start: int, head: int) -> None:
        """It was welcomed, and is sent the changes after ``start``."""
        self.client_version, self.lattice_version = hello.client_version[:40], hello.lattice_version[:40]
        self._measured_from = head
        if hello.follow:
            self.applied = start

    def follows_from(self, seq: int) -> None:
        """It follows from now on, and holds this change."""
        self.applied = seq

    def acknowledged(self, frame: Applied, *, sent: int) -> None:
        """Take what it says; ``sent`` is the last change that was sent to it."""
        if self.applied is None or not self.applied < frame.seq <= sent:
            return
        self.applied = frame.seq
        age_s = self._pace.age_of(frame.seq, time.monotonic())
        if frame.held_s is not None and age_s is not None and frame.seq > self._measured_from:
            self._metrics.delivery_lag_seconds.observe(max(0.0, age_s - max(0.0, frame.held_s)))
