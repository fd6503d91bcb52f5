"""From which change a client may go on (SPEC section 6): one that has a copy, and one that only looks on."""

from lattice_remote.protocol.messages import Follow, Followed
from lattice_remote.server.project.project import Project

__all__ = ["can_continue", "followed"]


async def can_continue(project: Project, epoch: str, seq: int, mark: bytes) -> bool:
    """Tell whether changes can bring a copy up to date; begin a new epoch if it proves a rollback (I7)."""
    history = project.history
    if epoch != history.epoch:
        return False
    if seq > history.head:
        await project.rollback_proved(f"a client holds change {seq}, the head is {history.head}")
        return False
    known = await history.mark_at(seq)
    if known is None:
        return False
    if known != mark:
        await project.rollback_proved(f"a client holds another change {seq}")
        return False
    return seq == history.head or seq + 1 >= history.oldest


async def followed(project: Project, follow: Follow) -> Followed:
    """Answer a ``Follow``; from the last look at the history to the return nothing waits.

    Only one who names a mark can prove a rollback: a number alone may be anybody's guess.
    """
    if follow.mark and follow.seq is not None:
        await can_continue(project, follow.epoch, follow.seq, follow.mark)
    history = project.history
    seq = history.head if follow.seq is None else follow.seq
    if follow.epoch not in ("", history.epoch):
        return Followed(seq, "epoch", history.epoch, history.head, history.oldest)
    if seq > history.head:
        return Followed(seq, "ahead", history.epoch, history.head, history.oldest)
    is_kept = seq == history.head or seq + 1 >= history.oldest
    return Followed(seq, "following" if is_kept else "expired", history.epoch, history.head, history.oldest)
