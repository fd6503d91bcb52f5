"""Resolution of conflicts, withheld edits and rescued files, for ``lattice remote resolve`` and ``rescued``."""

import base64
import binascii
import json
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from lattice_remote.client.agent.edit_sync import EditSender
from lattice_remote.client.cache.edits import TextConflict
from lattice_remote.client.cache.replicator import Replicator
from lattice_remote.client.cache.rescued_files import RescuedEntry, is_event_log
from lattice_remote.client.connection.connection import Connection
from lattice_remote.errors import Misuse, Rejected, StorageError, error_from_code, one_line
from lattice_remote.protocol.paths import is_editable

__all__ = ["CHOICES", "ConflictResolver", "Rescuer", "decoded", "described"]

CHOICES = ("mine", "theirs", "edited")


class ConflictResolver:
    def __init__(self, replicator: Replicator, edit_sender: EditSender) -> None:
        self._replicator = replicator
        self._edit_sender = edit_sender

    async def resolve(self, request: dict[str, Any], connection: Callable[[], Connection]) -> dict[str, Any]:
        """List the requested conflicts, and resolve them by a choice.

        Raises:
            Misuse: no such conflict, or an invalid choice for it.
            RemoteError: the text could not be sent; nothing has changed.
        """
        choice = request["choice"]
        found = self._named(request["task"], request["what"], choice)
        reasons = self._edit_sender.withheld() | self._edit_sender.refused()
        resolved: list[dict[str, str]] = []
        if choice is not None:
            text = _text_of(request)
            if text is not None and len(found) > 1:
                raise Misuse(f"{found[0].short_id} has a conflict in its plan and one in its notes: name one of them")
            for conflict in found:
                outcome = await self._end(conflict, choice, text, connection)
                resolved.append({"path": conflict.path, "outcome": outcome})
            if choice == "theirs":  # one process without the agent ends with its answer
                await self._edit_sender.are_in_place(conflict.path for conflict in found)
        return {"conflicts": [_fields(conflict, reasons) for conflict in found], "resolved": resolved}

    def describe(self) -> list[dict[str, Any]]:
        return [_fields(conflict, {}) for conflict in self._replicator.conflicts.all()]

    def _named(self, task: str, what: str | None, choice: str | None) -> list[TextConflict]:
        conflicts = self._replicator.conflicts
        found = conflicts.all()
        waiting = self._edit_sender.withheld() | self._edit_sender.refused()
        if task and choice == "theirs":  # one process without the agent does not know what another was refused
            waiting |= dict.fromkeys(self._replicator.edits.scan(), "")
        in_conflict = {each.path for each in found}
        found += [conflicts.waiting(path) for path in waiting if path not in in_conflict]
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
            if conflict.copies:
                return await self._drop(conflict, "theirs")
            if conflict.path in self._edit_sender.withheld():
                await self._restore(conflict, None)
                return "theirs"
            # The user had no means of sending it, so it is kept.
            is_kept = await self._restore(conflict, "restored to the server's text: it was not sent")
            return "rescued" if is_kept else "theirs"
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

    async def _restore(self, conflict: TextConflict, reason: str | None) -> bool:
        """Put the server's text in place; return whether the local one was rescued."""
        if (is_kept := await self._edit_sender.restore(conflict.path, reason=reason)) is None:
            raise Rejected(
                f"the server's text of {conflict.path} cannot be fetched now; nothing was changed: repeat when the "
                "server is reachable",
                code="REMOTE_BUSY",
            )
        return is_kept

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


# --- rescued files ---

type Call = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]
"""Runs a write of the surface ``storage``, by name and payload; returns the decoded answer."""

_ATTEMPTS = 5
"""Most sends of an event whose task others have changed in between."""
_MAX_SHOWN_EVENTS = 1_000
_MADE_OF_EVENTS = ("tasks/", "archive/tasks/", "resources/")


class Rescuer:
    def __init__(self, replicator: Replicator) -> None:
        self._replicator = replicator
        self._cache = replicator.cache
        self._store = replicator.rescue_policy.rescued

    async def handle(self, request: dict[str, Any], call: Call) -> dict[str, Any]:
        """List entries, or show, apply or drop the requested ones (default: all).

        Raises:
            Misuse: no such entry.
            RemoteError: the server is unreachable. Applying again continues.
        """
        entries = self._named(request["numbers"])
        answer: dict[str, Any] = {"applied": [], "refused": [], "dropped": []}
        match request["action"]:
            case "list":
                return {**answer, "entries": [described(entry) for entry in entries]}
            case "show":
                return {**answer, "entries": [self._shown(entry) for entry in entries]}
            case "apply":
                for entry in entries:
                    await self._apply(entry, call, answer)
            case "drop":
                async with self._cache.locked():
                    for entry in entries:
                        self._store.drop(entry.number)
                        answer["dropped"].append(entry.number)
        return {**answer, "entries": [described(entry) for entry in self._store.entries()]}

    def _named(self, numbers: list[int]) -> list[RescuedEntry]:
        entries = {entry.number: entry for entry in self._store.entries()}
        for number in numbers:
            if number not in entries:
                raise Misuse(
                    f"no rescued files {number}; list them with: lattice remote rescued", code="REMOTE_NOT_FOUND"
                )
        return [entries[number] for number in dict.fromkeys(numbers or entries)]

    def _shown(self, entry: RescuedEntry) -> dict[str, Any]:
        events = [
            {"path": path, **{key: event.get(key) for key in ("id", "type", "ts", "actor", "data")}}
            for path, event in self._new_events(entry)
        ]
        return {**described(entry), "events": events[:_MAX_SHOWN_EVENTS]}

    def _new_events(self, entry: RescuedEntry) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the events that the server lacks, each with its file, in order."""
        for path in entry.files:
            if not is_event_log(path) or path.endswith("/_lifecycle.jsonl"):
                continue
            known = {event.get("id") for event in self._log(_owner(path))}
            is_there = bool(known)
            for event in _events(self._store.read(entry.number, path)):
                is_creation = event.get("type") in ("task_created", "resource_created")
                if event.get("id") not in known and not (is_creation and is_there):
                    yield path, event

    def _log(self, owner: str) -> list[dict[str, Any]]:
        for folder in ("events", "archive/events"):
            path = f"{folder}/{owner}.jsonl"
            if self._cache.size(path) is not None:
                return list(_events(self._cache.read(path)))
        return []

    async def _apply(self, entry: RescuedEntry, call: Call, answer: dict[str, Any]) -> None:
        """Send what the server lacks of an entry; drop it unless a part was refused."""
        before = len(answer["refused"])

        def refuse(path: str, why: str) -> None:
            place = self._store.place(entry.number, path)
            answer["refused"].append({"entry": entry.number, "path": path, "why": one_line(why), "place": place})

        by_owner: dict[str, list[dict[str, Any]]] = {}
        for path, event in self._new_events(entry):
            by_owner.setdefault(path, []).append(event)
        made: set[str] = set()
        for path, events in by_owner.items():
            made |= await self._send_events(path, events, call, answer["applied"], refuse)
        owners = {_owner(path) for path in entry.files if is_event_log(path)}
        for path in entry.files:
            if is_editable(path):
                await self._send_text(entry, path, call, answer["applied"], refuse, is_new=_owner(path) in made)
            elif not self._is_derived(entry, path, owners):
                refuse(path, "only events of tasks and resources, plans and notes can be applied")
        if len(answer["refused"]) == before:
            async with self._cache.locked():
                self._store.drop(entry.number)
            answer["dropped"].append(entry.number)

    async def _send_events(
        self,
        path: str,
        events: list[dict[str, Any]],
        call: Call,
        applied: list[dict[str, Any]],
        refuse: Callable[[str, str], None],
    ) -> set[str]:
        """Send events one by one; return the id of a task or resource created by that."""
        owner, made = _owner(path), set[str]()
        log = self._log(owner)
        base = log[-1].get("id") if log else None
        of = {"resource": self._resource_of(events, owner)} if owner.startswith("res_") else {"task": owner}
        for event in events:
            is_creation = event.get("type") == "task_created"
            if is_creation:  # the server assigns the short id: the old one may be another task's by now
                event = {**event, "data": {k: v for k, v in dict(event["data"]).items() if k != "short_id"}}  # noqa: PLW2901
            try:
                content = await self._send_event(of, event, base, call)
            except Rejected as rejected:
                refuse(path, f"{event.get('type')} {event.get('id')}: {rejected.message}")
                if is_creation:
                    break  # without its task, all others would be refused too
                continue
            base = content["last_event_id"]
            made |= {owner} if is_creation else set()
            name = content.get("short_id") or content.get("name") or owner
            applied.append({"path": path, "event": event.get("id"), "type": event.get("type"), "to": name})
        return made

    async def _send_event(
        self, of: dict[str, str], event: dict[str, Any], base: str | None, call: Call
    ) -> dict[str, Any]:
        name = "write-resource" if "resource" in of else "write-task"
        for _ in range(_ATTEMPTS):
            answer = await call(name, {**of, "events": [event], "base": base})
            if answer["outcome"] != "conflict":
                content: dict[str, Any] = answer["content"]
                return content
            base = answer["found"]
        raise Rejected("others keep changing it; try again", code="REMOTE_BUSY")

    def _resource_of(self, events: list[dict[str, Any]], owner: str) -> str:
        name = dict(events[0].get("data") or {}).get("name")
        return str(name) if events[0].get("type") == "resource_created" and name else owner

    async def _send_text(
        self,
        entry: RescuedEntry,
        path: str,
        call: Call,
        applied: list[dict[str, Any]],
        refuse: Callable[[str, str], None],
        *,
        is_new: bool,
    ) -> None:
        """Send the text of a task just created; elsewhere it might undo others' work."""
        text = self._store.read(entry.number, path)
        theirs = self._cache.read(path) if self._cache.size(path) is not None else None
        if text == theirs:
            return
        if not is_new and theirs is not None:
            refuse(path, "the server has another text; compare the two and edit the plan or notes")
            return
        kind = "write-plan" if path.startswith("plans/") else "write-notes"
        try:
            base = None if theirs is None else theirs.decode()
            await call(kind, {"task": _owner(path), "text": text.decode(), "base": base})
        except UnicodeDecodeError:
            refuse(path, "it is not valid UTF-8")
        except Rejected as rejected:
            refuse(path, rejected.message)
        else:
            applied.append({"path": path, "event": None, "type": kind.removeprefix("write-"), "to": _owner(path)})

    def _is_derived(self, entry: RescuedEntry, path: str, owners: set[str]) -> bool:
        """Return whether a file follows from events here, or the server has its content."""
        if is_event_log(path):
            return True
        if path == "ids.json" or (path.startswith(_MADE_OF_EVENTS) and self._owner_of_snapshot(entry, path) in owners):
            return True
        with_size = self._cache.size(path) == entry.files[path]
        return with_size and self._cache.read(path) == self._store.read(entry.number, path)

    def _owner_of_snapshot(self, entry: RescuedEntry, path: str) -> str | None:
        try:
            found = json.loads(self._store.read(entry.number, path)).get("id")
        except (ValueError, AttributeError, StorageError):
            return None
        return found if isinstance(found, str) else None


def described(entry: RescuedEntry) -> dict[str, Any]:
    return {"number": entry.number, "reason": entry.reason, "at": entry.at, "files": dict(entry.files)}


def decoded(returned: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(returned["payload"])
    if (error := answer.get("error")) is not None:
        raise error_from_code(str(error["message"]), error["code"])
    return answer


def _owner(path: str) -> str:
    return os.path.basename(path).rpartition(".")[0]


def _events(log: bytes) -> Iterator[dict[str, Any]]:
    for line in log.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("data"), dict):
            yield event
