"""Order of a project's changes: when an outcome of the worker counts, and which node of a cluster executes.

A server alone has ``EmbeddedOrder``: the fsync of the project's journal decides. A cluster has ``cluster.Member``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from lattice_remote.server.ipc import Edit, ImportProject, Ready, RecordApplied, RequestDone, RunCall, RunCommand
from lattice_remote.server.project.metrics import OutcomeListener
from lattice_remote.server.project.queue import Requester

if TYPE_CHECKING:
    from lattice_remote.server.project.project import Project

__all__ = ["EmbeddedOrder", "Order", "WriteRequest"]

WriteRequest = RunCommand | RunCall | Edit | ImportProject


class Order(Protocol):
    """The seam between a project and what makes its outcomes final. Belongs to the event loop's thread."""

    is_shared: bool
    """Whether other nodes have this project too."""
    owner: str
    """Name of the last known owner of a shared project."""
    term: int
    """Of that owner."""

    @property
    def is_owner(self) -> bool:
        """Whether this node executes the project's requests."""

    @property
    def is_settled(self) -> bool:
        """Whether the worker has nothing to apply."""

    @property
    def unavailable(self) -> str:
        """Why the project cannot be used here at the moment; "" if it can."""

    def attach(self, project: "Project") -> None: ...

    async def prepare(self) -> Sequence[str]:
        """Bring the project's files to a state from which a worker may start; return its further arguments.

        Raises StorageError, or OSError.
        """

    def opened(self, ready: Ready) -> None: ...

    def pass_on(self, deliver: Callable[[], None], done: RequestDone | None = None) -> None:
        """Call ``deliver`` in order, an outcome's once it is final: on an owner that lost the project, never."""

    def applied(self, message: RecordApplied) -> None: ...

    def copy_missing(self, reason: str) -> None:
        """The worker cannot use this node's files."""

    def committed(self, seq: int) -> None: ...

    async def reach(self, seq: int) -> bool:
        """Wait a moment until change ``seq`` is here; return whether it is."""

    async def catch_up(self) -> bool:
        """Wait a moment for all changes that the cluster has; return whether some may have come."""

    def forward(self, message: WriteRequest, requester: Requester, on_result: OutcomeListener | None) -> None:
        """Have the owner answer a request, on a node that is not the owner."""

    def requesters(self) -> Sequence[Requester]:
        """Return those of the forwarded requests, which wait for a reply."""

    def forget(self, requester: Requester, request_ids: set[str]) -> None: ...

    def withdraw(self, requester: Requester, request_id: str, code: str) -> bool:
        """Withdraw a forwarded request; return True if it never has an effect."""

    @property
    def figures(self) -> Mapping[str, int]:
        """Metrics of the order, by name; none on a server of its own."""

    async def close(self) -> None:
        """Hand the project over."""


class EmbeddedOrder:
    """Order of one server: the journal's fsync makes an outcome final."""

    is_shared = False
    owner = ""
    term = 0
    is_owner = True
    is_settled = True
    unavailable = ""
    figures: Mapping[str, int] = {}

    def attach(self, project: "Project") -> None:
        pass

    async def prepare(self) -> Sequence[str]:
        return ()

    def opened(self, ready: Ready) -> None:
        pass

    def pass_on(self, deliver: Callable[[], None], done: RequestDone | None = None) -> None:  # noqa: ARG002
        deliver()

    def applied(self, message: RecordApplied) -> None:
        pass

    def copy_missing(self, reason: str) -> None:
        raise AssertionError(f"only a cluster's worker says so: {reason}")

    def committed(self, seq: int) -> None:
        pass

    async def reach(self, seq: int) -> bool:  # noqa: ARG002
        return True

    async def catch_up(self) -> bool:
        return False

    def forward(
        self,
        message: WriteRequest,  # noqa: ARG002
        requester: Requester,  # noqa: ARG002
        on_result: OutcomeListener | None,  # noqa: ARG002
    ) -> None:
        raise AssertionError("the only node is the owner")

    def requesters(self) -> Sequence[Requester]:
        return ()

    def forget(self, requester: Requester, request_ids: set[str]) -> None:
        pass

    def withdraw(self, requester: Requester, request_id: str, code: str) -> bool:  # noqa: ARG002
        return False

    async def close(self) -> None:
        pass
