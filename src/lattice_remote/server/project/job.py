"""One request to a project's worker, and what is known of its way there and back."""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from lattice_remote.server.data.ipc import ToWorker
from lattice_remote.server.project.history import Follower

__all__ = ["Job"]


@dataclass(slots=True, eq=False)
class Job:
    """One request on its way through the queue, the worker, and perhaps the waiting for a resource."""

    message: ToWorker
    askers: list[Follower] = field(default_factory=list)
    """Who wants the answer; the same request may be asked again on a new connection."""
    submitted_at: float = field(default_factory=time.monotonic)
    """When it was first asked for, by the monotonic clock: perhaps of a server before this one."""
    arrived_at: float = field(default_factory=time.monotonic)
    """When it came here."""
    told: Callable[[Any], None] | None = None
    """Is told what came of it, and writes the line in the log; see ``accounts.py``."""
    weight: int = 0
    """Bytes of its arguments and of the files that it carries."""
    suspect: bool = False
    """Was with a worker that died; is sent alone until it is known which request was to blame."""
    deaths: int = 0
    """Workers that certainly died of it."""
    resource: str | None = None
    """What it waited for last."""
    lock_tries: int = 0
    """How often it has found a lock held by another process."""
    lock_until: float = 0.0
    """When it waits for no lock any more, by the monotonic clock; 0 before its first wait for one."""
    wait_until: float = 0.0
    """When that waiting is over, by the monotonic clock."""

    @property
    def lane(self) -> Hashable:
        """That of the request which was first; None for the server's own."""
        return self.askers[0].lane if self.askers else None
