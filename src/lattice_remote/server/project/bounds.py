"""How much a project takes on, and for how long it works on one thing."""

from dataclasses import dataclass

__all__ = ["Bounds"]


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of a project's queue and its worker."""

    command_s: float = 30.0
    """A command that takes longer is ended and undone."""
    upkeep_s: float = 600.0
    """How long opening the project, or reading all of its tree, may take; a look at some files is a command's."""
    window: int = 16
    """Requests that the worker may hold at once: enough for it to work on while others are fsynced; more would only
    make the next connection's wait longer."""
    queued: int = 1024
    """Requests that may wait; more are refused as busy, of connections that have one waiting already."""
    per_token: int = 512
    """Requests of one token that may be queued, with the worker, or waiting for a resource."""
    held_bytes: int = 256 * 1024 * 1024
    """What all requests may weigh together that are queued, with the worker, or waiting for a resource."""
    held_bytes_per_token: int = 128 * 1024 * 1024
    """The same for those of one token: the rest is for others, who would be told that the server is busy."""
    window_bytes: int = 32 * 1024 * 1024
    """The worker gets no more requests while those that it holds weigh this much."""
