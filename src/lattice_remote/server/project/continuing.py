"""Positions of clients: from which change one may go on, and which one proves a rollback (SPEC section 6).

A number alone proves nothing (I7): every position that a client comes back with names its change by the mark.
"""

from typing import Literal

from lattice_remote.protocol.effects import Position
from lattice_remote.protocol.messages import Follow, Followed
from lattice_remote.server.project.project import Project

__all__ = ["can_continue", "followed", "is_on_record"]


async def is_on_record(project: Project, position: Position) -> bool | None:
    """Tell whether a position is of the present history; None where its change is not kept any more.

    A genuine one that is not begins a new epoch: the server was rolled back since the client has seen it.
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
    """Tell whether changes can bring a cache up to date that is at this position."""
    if not await is_on_record(project, position):
        return False
    history = project.history
    return position.seq == history.head or position.seq + 1 >= history.oldest


async def followed(project: Project, follow: Follow) -> Followed:
    """Answer a ``Follow``; from the last look at the history to the return nothing waits.

    One without a mark is a person's guess: it gets the changes after that number, of whichever history is present.
    """
    history = project.history
    epoch, mark, is_known = history.epoch, follow.mark, True
    if follow.seq is not None and mark:
        is_known = await is_on_record(project, Position(follow.epoch, follow.seq, mark)) is not False
    elif follow.seq is not None and follow.seq <= history.head:
        mark = await history.mark_at(follow.seq) or b""
    if follow.seq is None:
        seq, mark = history.head, history.mark
    else:
        seq = follow.seq
    outcome: Literal["following", "expired", "ahead", "epoch"]
    if history.epoch != epoch or follow.epoch not in ("", epoch) or (not is_known and seq <= history.head):
        outcome = "epoch"
    elif seq > history.head:
        outcome = "ahead"
    else:
        outcome = "following" if seq == history.head or seq + 1 >= history.oldest else "expired"
    return Followed(seq, outcome, history.epoch, history.head, history.oldest, mark)
