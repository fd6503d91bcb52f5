"""Application of changes to the files of a cache, without losing text that a person writes there (I4)."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from lattice_remote.client.cache.cache import Cache
from lattice_remote.client.cache.edits import Edits
from lattice_remote.client.cache.first_fill import FirstFill
from lattice_remote.client.cache.rescued_files import RescuePolicy, is_event_log, may_be_by_hand
from lattice_remote.client.cache.verify import RepairSchedule
from lattice_remote.errors import ProtocolError
from lattice_remote.protocol.messages import Part
from lattice_remote.protocol.operations import (
    AnnounceFile,
    AppendBytes,
    DeleteFile,
    MergeJson,
    MoveFile,
    Operation,
    PutFile,
    apply,
    paths_of,
)
from lattice_remote.protocol.paths import is_editable
from lattice_remote.protocol.replica import Effect, Replica

__all__ = ["EffectWriter"]

_LONGEST_STEP_S = 0.01
"""Then other caches of the agent get their turn."""
_MAX_MISFITS = 5
"""The connection is given up when the parts of one file do not add up this often."""


class EffectWriter:
    def __init__(self, cache: Cache, edits: Edits, rescue_policy: RescuePolicy, repairs: RepairSchedule) -> None:
        self._cache = cache
        self._edits = edits
        self._rescue_policy = rescue_policy
        self._repairs = repairs
        self.on_edits: Callable[[Iterable[str]], None] = lambda _: None
        """Called with plans and notes that may be edited."""
        self.first_fill: FirstFill | None = None
        """Writer of a new cache's files, set while it is filled."""
        self.misfits: Counter[str] = Counter()
        """path -> failed assemblies of its parts on this connection."""

    def is_strange(self, path: str) -> bool:
        """Return whether another program changed the file, except plans and notes."""
        found = self._cache.signature(path)
        if self._cache.known.agrees(path, found):
            return False
        if found is None or not is_editable(path) or self.is_orphan(path):
            return True
        # Where git or a copy tool has brought an earlier text together with its base, it does not look edited.
        is_rewritten = self._cache.known.is_complete and self._cache.known.was_written(path, found)
        return is_rewritten and not self._edits.is_in_use(path)

    def is_orphan(self, path: str) -> bool:
        return self._cache.known.is_complete and self._edits.is_orphan(path, self._cache.known)

    def apply(self, operations: Iterable[Operation], replica: Replica) -> list[Effect]:
        drifted: set[str] = set()
        operations = list(operations)
        moved = {os.path.basename(op.to if isinstance(op, MoveFile) else op.path) for op in operations if _brings(op)}
        for operation in operations:
            text = self._edits.text_after(operation)
            if text is not None:
                self._warn_of_link(operation.path)
            if text is not None and self._edits.take(operation.path, text):
                self.on_edits([operation.path])  # a save at this moment is not reported: it looks like our own write
                continue
            edited = self._edits.edited_by(operation)
            if not edited:
                paths = paths_of(operation)
                if not isinstance(
                    operation, AppendBytes | MergeJson
                ):  # which fit the existing content, or change nothing
                    after = operation.data if isinstance(operation, PutFile) else None
                    if isinstance(operation, DeleteFile) and os.path.basename(operation.path) not in moved:
                        after = b""  # else an archived task
                    self.keep(paths, after)
                drifted |= (unfit := apply(operation, self._cache))
                self.mark_synced([path for path in paths if path not in unfit])
                self.on_edits([path for path in paths if is_editable(path)])
            elif self._edits.absorb(operation):
                self.on_edits([operation.path])
            else:
                drifted |= self._hold(operation, edited, replica)
        return replica.drifted(drifted) if drifted else []

    def _hold(self, operation: Operation, edited: list[str], replica: Replica) -> set[str]:
        """Block edited files; return the other file of a move, which must be fetched."""
        for path in edited:
            replica.block(path)
        self.on_edits(edited)
        if isinstance(operation, MoveFile):
            if operation.path not in edited:
                self.remove(operation.path, replica)
            elif operation.to not in edited:
                return {operation.to}
        return set()

    async def write_parts(self, parts: Sequence[Part], replica: Replica) -> list[Effect]:
        """Write parts in order; the last one of a file replaces it.

        Raises:
            ProtocolError: the parts repeatedly did not add up.
        """
        if self.first_fill is not None:
            parts = await self.first_fill.write(parts)
        effects: list[Effect] = []
        pause_at = time.monotonic() + _LONGEST_STEP_S
        for part in parts:
            effects += self._write_part(part, replica)
            if time.monotonic() > pause_at:
                await asyncio.sleep(0)
                pause_at = time.monotonic() + _LONGEST_STEP_S
        return effects

    def _write_part(self, part: Part, replica: Replica) -> list[Effect]:
        if self._is_only_touched(part):
            self._cache.note(part.path)
            self.mark_synced([part.path])
            return []
        if is_editable(part.path):
            return self._write_text(part, replica)
        self.keep([part.path], part.data if len(part.data) == part.size else None)
        return self._written(part, replica, self._cache.write_part(part))

    def _write_text(self, part: Part, replica: Replica) -> list[Effect]:
        placed: bool | None = False
        self._warn_of_link(part.path)
        if not self._edits.is_in_use(part.path):
            placed = self._cache.write_part(part, self._edits.take)
        if placed is False and self._edits.is_in_use(part.path):
            replica.block(part.path)
            placed = None
        self.on_edits([part.path])
        return self._written(part, replica, placed, is_text=True)

    def _warn_of_link(self, path: str) -> None:
        """Add a notice that a link will be replaced: it may lead to any file."""
        place = self._cache.absolute(path)
        if os.path.islink(place):
            notice = f"{path} was a link, and only plain files are sent: the server's text was restored, "
            self._rescue_policy.notices.append(f"{notice}and the link's target ({os.readlink(place)}) is unchanged")

    def _written(self, part: Part, replica: Replica, placed: bool | None, *, is_text: bool = False) -> list[Effect]:
        if placed is False:
            self.misfits[part.path] += 1
            if self.misfits[part.path] >= _MAX_MISFITS:
                raise ProtocolError(f"the server keeps sending {part.path!r} in parts that do not form the file")
            return replica.drifted([part.path])
        if placed:
            self.misfits.pop(part.path, None)
            if is_text:  # its base was recorded with it: the current content may be the next edit
                self._note_repair(part.path)
            else:
                self.mark_synced([part.path])
        return []

    def remove(self, path: str, replica: Replica) -> None:
        if is_editable(path) and self._edits.is_in_use(path):
            if not self.is_orphan(path):
                replica.block(path)
                self.on_edits([path])
                return
            self._rescue_policy.keep(path, is_strange=True)
        self.keep([path])
        self._cache.delete(path)
        self.mark_synced([path])

    def _is_only_touched(self, part: Part) -> bool:
        found = self._repairs.strange.get(part.path)
        return found is not None and found[1] == part.digest and found[0] == self._cache.signature(part.path)

    def keep(self, paths: Iterable[str], after: bytes | None = None) -> None:
        """Rescue foreign content from files about to be replaced, by ``after`` if known."""
        known = self._cache.known
        for path in paths:
            strange = known.is_complete or path in self._repairs.strange
            strange = strange and known.was_written(path, self._cache.signature(path))
            if strange and is_editable(path):
                continue  # an edit, or the rest of one: see ``edits``
            if strange or may_be_by_hand(path) or (after is not None and is_event_log(path)):
                is_ours = not strange and (known.is_complete or after == b"")
                self._rescue_policy.keep(path, is_strange=strange, after=after, is_ours=is_ours)

    def mark_synced(self, paths: Iterable[str]) -> None:
        for path in paths:
            if is_editable(path):
                self._edits.rebase(path)
            else:
                self._rescue_policy.remember(path)
            self._note_repair(path)

    def _note_repair(self, path: str) -> None:
        if (before := self._repairs.strange.pop(path, None)) is not None:
            self._was_fetched(path, was_changed=before[1] != self._cache.digest(path))

    def _was_fetched(self, path: str, *, was_changed: bool) -> None:
        if self._repairs.repaired(path) if was_changed else self._repairs.fetched(path):
            self._rescue_policy.notices.append(
                f"another process keeps writing {path}, which only the server may change"
            )


def _brings(operation: Operation) -> bool:
    return isinstance(operation, PutFile | AnnounceFile | MoveFile)
