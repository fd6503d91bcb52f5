"""Resolution of conflicts and withheld edits: the chosen text is sent as an edit of the server's."""

import base64
import binascii
from collections.abc import Callable, Mapping
from typing import Any

from lattice_remote.client.agent.edit_sync import EditSender
from lattice_remote.client.cache.edits import TextConflict
from lattice_remote.client.cache.replicator import Replicator
from lattice_remote.client.connection.connection import Connection
from lattice_remote.errors import Misuse, Rejected

__all__ = ["CHOICES", "ConflictResolver"]

CHOICES = ("mine", "theirs", "edited")


class ConflictResolver:
    """The conflicts of one cache, for commands."""

    def __init__(self, replicator: Replicator, edit_sender: EditSender) -> None:
        self._replicator = replicator
        self._edit_sender = edit_sender

    async def resolve(self, request: dict[str, Any], connection: Callable[[], Connection]) -> dict[str, Any]:
        """List the requested conflicts, and resolve them if a choice is given.

        Raises:
            Misuse: no such conflict, or an invalid choice for it.
            RemoteError: the text could not be sent; nothing has changed.
        """
        found = self._named(request["task"], request["what"])
        choice = request["choice"]
        reasons = self._edit_sender.withheld()
        resolved: list[dict[str, str]] = []
        if choice is not None:
            text = _text_of(request)
            if text is not None and len(found) > 1:
                raise Misuse(f"{found[0].short_id} has a conflict in its plan and one in its notes: name one of them")
            for conflict in found:
                outcome = await self._end(conflict, choice, text, connection)
                resolved.append({"path": conflict.path, "outcome": outcome})
        return {"conflicts": [_fields(conflict, reasons) for conflict in found], "resolved": resolved}

    def describe(self) -> list[dict[str, Any]]:
        return [_fields(conflict, {}) for conflict in self._replicator.conflicts.all()]

    def _named(self, task: str, what: str | None) -> list[TextConflict]:
        conflicts = self._replicator.conflicts
        found = [*conflicts.all(), *(conflicts.waiting(path) for path in self._edit_sender.withheld())]
        if task:
            found = [each for each in found if each.is_called(task)]
        found = [each for each in found if what in (None, each.what)]
        if task and not found:
            where = "plan or notes" if what is None else what
            raise Misuse(f"there is no conflict in the {where} of {task}", code="REMOTE_NOT_FOUND")
        return found

    async def _end(
        self, conflict: TextConflict, choice: str, text: bytes | None, connection: Callable[[], Connection]
    ) -> str:
        if choice == "theirs":
            if not conflict.copies:
                await self._restore(conflict, None)
            return await self._drop(conflict, "theirs")
        if not conflict.is_active:
            raise Misuse(
                f"{conflict.short_id} is archived or gone: restore it first with lattice unarchive, or keep theirs"
            )
        if not conflict.copies and text is not None:
            await self._restore(conflict, "replaced by the text that resolve was given")
        await self._send_what_is_in_place(conflict, connection())
        if choice == "mine" and conflict.copies:
            text = self._only_copy(conflict)
        if text is not None:
            await self._put(conflict, text, connection())
        return await self._drop(conflict, choice)

    async def _restore(self, conflict: TextConflict, reason: str | None) -> None:
        if await self._edit_sender.restore(conflict.path, reason=reason) is None:
            raise Rejected(
                f"the server's text of {conflict.path} cannot be fetched now; nothing was changed: repeat when the "
                "server is reachable",
                code="REMOTE_BUSY",
            )

    async def _send_what_is_in_place(self, conflict: TextConflict, connection: Connection) -> None:
        """Send later edits of the file itself first: the chosen text is applied on top."""
        is_withheld = not conflict.copies
        pushed = await self._edit_sender.push(connection, [conflict.path], again=True, confirm=is_withheld)
        for sent in pushed.sent:
            if sent["outcome"] == "conflict":
                raise Misuse(f"{conflict.path} was edited here since and conflicts again; review it")
            if sent["outcome"] == "refused":
                raise Rejected(pushed.notices[0], code="REMOTE_UNSUPPORTED")
        await self._edit_sender.until_in_place(conflict.path)

    async def _put(self, conflict: TextConflict, text: bytes, connection: Connection) -> None:
        outcome = await self._edit_sender.put(connection, conflict.path, text)
        if outcome == "conflict":
            raise Rejected(
                f"others have just changed the same lines of {conflict.path}; nothing was changed: review, then repeat",
                code="REMOTE_BUSY",
            )

    def _only_copy(self, conflict: TextConflict) -> bytes:
        if len(conflict.copies) > 1:
            raise Misuse(
                f"several texts of yours exist; name the one to keep, for example: --edited {conflict.copies[0]}"
            )
        return self._replicator.cache.read(conflict.copies[0])

    async def _drop(self, conflict: TextConflict, outcome: str) -> str:
        async with self._replicator.cache.locked():
            self._replicator.conflicts.end(conflict)
        return outcome


def _fields(conflict: TextConflict, reasons: Mapping[str, str]) -> dict[str, Any]:
    return {
        "task": conflict.task,
        "short_id": conflict.short_id,
        "what": conflict.what,
        "path": conflict.path,
        "copies": list(conflict.copies),
        "is_active": conflict.is_active,
        "reason": None if conflict.copies else reasons.get(conflict.path),
    }


def _text_of(request: dict[str, Any]) -> bytes | None:
    if request["choice"] not in CHOICES:
        raise Misuse(f"unknown choice {request['choice']!r}")
    text = request["text"]
    try:
        return None if text is None else base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise Misuse("the text is not base64") from error
