"""Transactions: a command line or a call, committed as one change or undone (I2, I6)."""

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lattice_remote.errors import Rejected
from lattice_remote.protocol.messages import Result
from lattice_remote.server.tree.capture import AccessDenied, AccessLog
from lattice_remote.server.tree.tree import TreeDiff, TrustedDigest
from lattice_remote.server.worker.executor import CommandOutcome
from lattice_remote.server.worker.store import ChangeOrigin, ChangeTooLarge, Store

__all__ = ["Transaction", "TransactionRunner", "cannot_store"]


@dataclass(frozen=True)
class Transaction:
    """Checked work, ready to run.

    Attributes:
        name: for messages, for example ``'lattice create'``.
        cause: the origin of the change.
        run: does the work; called once.
        answer: makes the reply from the outcome and the sequence number that it is valid from.
        vouched: verified digests of files uploaded for it.
        note: called with the changes before their commit, for state that must be durable with them.
    """

    name: str
    cause: ChangeOrigin
    run: Callable[[], CommandOutcome]
    answer: Callable[[CommandOutcome, int], Result]
    vouched: Mapping[int, TrustedDigest] = field(default_factory=dict)
    note: Callable[[TreeDiff], None] = lambda _: None


class TransactionRunner:
    """Runner of transactions in one project; ``scratch`` is a private directory, emptied after each."""

    def __init__(self, store: Store, scratch: Path) -> None:
        self._store = store
        self._scratch = scratch

    def carry_out(self, work: Transaction) -> None:
        """Run a transaction and commit it with its reply; undo it on failure or a forbidden access.

        The reply to a crash is sent but not remembered, so a repeated request runs again (I6).

        Raises:
            Rejected: it did what the server does not allow, or changed more than one change can carry.
            OSError: the storage failed.
        """
        outcome = CommandOutcome()
        # The access log records a veto.
        with self._store.transaction() as touched, contextlib.suppress(AccessDenied):
            outcome = work.run()
        if touched.private:
            self.empty_scratch()
        hooks = outcome.hooks
        if outcome.is_undone or touched.veto is not None or touched.unshared:
            self._store.roll_back()
            _refuse_vetoed(touched, work.name)
            if outcome.no_room is not None:
                raise cannot_store(f"what {work.name} writes", outcome.no_room)
            if outcome.timeout:
                holder = "another process in the server's directory holds it"
                raise Rejected(f"{outcome.timeout}: {holder}; nothing was changed, try again", code="REMOTE_BUSY")
            if not outcome.is_final:
                self._store.answer_once(lambda seq: work.answer(outcome, seq))
                return
            difference, hooks = TreeDiff(), []
        else:
            difference = self._store.difference(touched, work.vouched)
        try:
            work.note(difference)
        except OSError as error:
            self._store.roll_back()
            raise cannot_store("the owner of a session", error) from error
        except Rejected:
            self._store.roll_back()
            raise
        if outcome.waiting is not None:
            self._store.commit(difference, work.cause, hooks=hooks, waiting=outcome.waiting)
            return
        try:
            self._store.commit(difference, work.cause, lambda seq: work.answer(outcome, seq), hooks=hooks)
        except ChangeTooLarge:
            self._store.roll_back()
            raise Rejected(
                f"{work.name} changes more files than fit into one change: do it in parts; nothing was changed",
                code="REMOTE_TOO_LARGE",
            ) from None

    def empty_scratch(self) -> None:
        """Remove all files of the private directory."""
        for entry in os.scandir(self._scratch):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)


def cannot_store(what: str, error: BaseException) -> Rejected:
    """Return the refusal of something that cannot be written to the disk."""
    reason = error.strerror if isinstance(error, OSError) else error
    return Rejected(f"the server cannot store {what}: {reason}; nothing was changed", code="REMOTE_STORAGE")


def _refuse_vetoed(touched: AccessLog, name: str) -> None:
    """Raise Rejected if the work touched something forbidden."""
    if touched.veto is not None:
        why = f"tried to {touched.veto}, which the server does not allow"
    elif touched.unshared:
        why = f"would write {touched.unshared[0]!r}, a name that cannot be shared"
    else:
        return
    raise Rejected(f"{name} {why}; nothing was changed", code="REMOTE_UNSUPPORTED")
