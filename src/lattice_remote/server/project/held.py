"""The requests that a project has taken on: queued, with its worker, or waiting for a resource; bounded in all ways."""

from collections import Counter

from lattice_remote.server.data.ipc import Adopt, Edit, Execute, Invoke, NewEpoch, Reconcile, Stop
from lattice_remote.server.project.bounds import Bounds
from lattice_remote.server.project.job import Job

__all__ = ["Held", "weight_of"]


class Held:
    """Jobs by request id, with what they weigh together and for each token."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._jobs: dict[str, Job] = {}
        self._count: Counter[str] = Counter()  # by token
        self._weight: Counter[str] = Counter()  # by token
        self.bytes = 0
        """What all of them weigh."""

    def get(self, request_id: str) -> Job | None:
        """Return the job of a request, None when it is not under way."""
        return self._jobs.get(request_id)

    def objection(self, token_id: str, weight: int) -> str | None:
        """Return why a token may not have one more request of this weight under way, None when it may."""
        bounds = self._bounds
        if self.bytes + weight > bounds.held_bytes:
            return "the server has too much to do for this project; try again"
        if self._count[token_id] >= bounds.per_token:
            return f"{bounds.per_token} requests of this token are under way"
        if self._weight[token_id] + weight > bounds.held_bytes_per_token:
            return f"requests of {bounds.held_bytes_per_token >> 20} MiB of this token are under way; try again"
        return None

    def add(self, request_id: str, token_id: str, job: Job) -> None:
        """Take a job on."""
        self._jobs[request_id] = job
        self._count[token_id] += 1
        self._weight[token_id] += job.weight
        self.bytes += job.weight

    def drop(self, request_id: str) -> None:
        """A request is answered, or nobody asks for it any more. Idempotent."""
        if (job := self._jobs.pop(request_id, None)) is None:
            return
        assert not isinstance(job.message, Reconcile | NewEpoch | Stop), "these have no request id"
        self._count[job.message.token_id] -= 1
        self._weight[job.message.token_id] -= job.weight
        self.bytes -= job.weight

    def clear(self) -> None:
        """Forget all."""
        self._jobs.clear()
        self._count.clear()
        self._weight.clear()
        self.bytes = 0


def weight_of(message: Execute | Invoke | Edit | Adopt) -> int:
    """Return what a request weighs: the bytes of its arguments, and of the files that it carries."""
    if isinstance(message, Adopt):
        return 0
    if isinstance(message, Edit):
        return len(message.text) + len(message.base or b"")
    said = len(message.payload) if isinstance(message, Invoke) else sum(map(len, message.argv))
    return said + sum(len(file.data or b"") for file in message.files)
