"""What a program can do with a board, wherever that is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from lattice_remote.storage.values import Conflict, Event, Merged, Snapshot, Written

__all__ = ["StorageBackend"]


@runtime_checkable
class StorageBackend(Protocol):
    """A board. A task is named by its id (``task_...``) or its short id (``LAT-42``), a resource by its name or id.

    Reads are reads of local files. A write is one step: all of it, durable once it returns, or nothing. Calls may come
    from several threads.

    Raises, in every method:
        StorageError: a file can't be read or written, or an earlier write was cut off; the message says what mends it.
        RemoteError: of a remote board, what keeps it from being reached; see ``errors``.
    """

    @property
    def root_path(self) -> Path:
        """The directory that holds ``.lattice``."""

    def list_tasks(self, *, archived: bool = False) -> list[Snapshot]:
        """Return the active tasks, in the order in which they were made; with ``archived`` those instead."""

    def get_task(self, task: str) -> Snapshot | None:
        """Return a task, archived or not; None when there is none."""

    def get_task_events(self, task: str) -> list[Snapshot]:
        """Return a task's events in their order; empty when there is no such task."""

    def write_task(self, task: str, events: Sequence[Event], base: str | None) -> Written[Snapshot] | Conflict:
        """Add events to a task, or with ``task_created`` as the first one make it.

        The events are checked by lattice's own rules, as its commands do. Whoever writes sets ``ts`` of each event, the
        ``id`` of ``task_created``, and the short id of a new task.

        Args:
            base: the id of the task's last event (``last_event_id``) when the events were made; None for a new task.

        Raises:
            Rejected: ``REMOTE_INVALID`` when an event is none that may be added here, ``REMOTE_FORBIDDEN`` when it is
                in a name that this token may not use. Nothing was written.
        """

    def list_resources(self) -> list[Snapshot]:
        """Return the resources, by name."""

    def get_resource(self, resource: str) -> Snapshot | None:
        """Return a resource; None when there is none."""

    def write_resource(self, resource: str, events: Sequence[Event], base: str | None) -> Written[Snapshot] | Conflict:
        """Add events to a resource, or with ``resource_created`` as the first one make it.

        As ``write_task``; whoever writes also sets ``expires_at``, from the resource's own time to live.
        """

    def read_plan(self, task: str) -> str | None:
        """Return the text of a task's plan; None when it has none."""

    def write_plan(self, task: str, text: str, base: str | None) -> Written[str] | Merged | Conflict:
        """Replace a task's plan.

        Args:
            base: the text that it was made from, as it was read; None when there was none.

        Raises:
            Rejected: ``REMOTE_INVALID`` when there is no such active task, ``REMOTE_TOO_LARGE`` over 1 MiB.
        """

    def read_notes(self, task: str) -> str | None:
        """Return the text of a task's notes; None when it has none."""

    def write_notes(self, task: str, text: str, base: str | None) -> Written[str] | Merged | Conflict:
        """Replace a task's notes, as ``write_plan`` does its plan."""
