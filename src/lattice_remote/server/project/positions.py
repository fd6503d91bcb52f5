"""Positions of clients and listeners in a project's history (I7)."""

from typing import Literal, NamedTuple

from lattice_remote.protocol.effects import Position
from lattice_remote.server.project.project import Project

__all__ = ["Start", "can_continue", "find_start"]


async def _is_in_history(project: Project, position: Position) -> bool | None:
    """Return whether a position belongs to the history; None if its change is no longer kept.

    A genuine one outside proves a rollback and starts a new epoch (I7).
    """
    history = project.history
    if position.epoch != history.epoch:
        return False
    known = await history.mark_at(position.seq) if position.seq <= history.head else b""
    if known is None or (known == position.mark and position.seq <= history.head):
        return None if known is None else True
    if await history.is_genuine(position):
        why = f"a client has seen another change {position.seq}; the head is {history.head}"
        await project.rollback_proved(position.epoch, why)
    return False


async def can_continue(project: Project, position: Position) -> bool:
    if not await _is_in_history(project, position):
        return False
    history = project.history
    return position.seq == history.head or position.seq + 1 >= history.oldest


class Start(NamedTuple):
    """Where a listener starts: the changes after ``position`` are those that it lacks."""

    outcome: Literal["kept", "expired", "ahead", "epoch"]
    """``kept``: they can be sent. Otherwise they have expired, the position is ahead of the head, or the position is
    not in the present history."""
    position: Position


async def find_start(project: Project, epoch: str = "", seq: int | None = None, mark: bytes = b"") -> Start:
    """Return where a listener starts that knows change ``seq``; None: the head. Does not yield after its last look.

    Without a change id the position is a user's guess: it gets the changes after that number in the current history.
    """
    history = project.history
    current, is_known = history.epoch, True
    if seq is not None and mark:
        is_known = await _is_in_history(project, Position(epoch, seq, mark)) is not False
    elif seq is not None and seq <= history.head:
        mark = await history.mark_at(seq) or b""
    if seq is None:
        seq, mark = history.head, history.mark
    outcome: Literal["kept", "expired", "ahead", "epoch"]
    if history.epoch != current or epoch not in ("", current) or (not is_known and seq <= history.head):
        outcome = "epoch"
    elif seq > history.head:
        outcome = "ahead"
    else:
        outcome = "kept" if seq == history.head or seq + 1 >= history.oldest else "expired"
    return Start(outcome, Position(history.epoch, seq, mark if outcome == "kept" else b""))
