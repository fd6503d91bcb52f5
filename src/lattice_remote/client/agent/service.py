"""Request handling for one cache, in the agent or inside a command that runs without it.

A request is a JSON object: ``do``; ``directory`` and ``cache`` (path and identity of the cache, see
``config.identify``); ``token`` and ``named`` (the command's ``LATTICE_TOKEN`` and ``LATTICE_REMOTE_URL``, or null);
``agent`` (the agent's name, see ``agent_runtime``); and

    ready    is the cache current? waits briefly   -> current, filled, seq, age_s, code, message, notices
    run      id, argv, files, own_connection             -> exit_code, stdout, stderr (base64), notices; or unreadable
    call     id, surface, name, payload, files     -> status, payload, seq, notices (payloads are JSON texts); likewise
    push     send edited plans and notes, confirm: the withheld ones too -> sent, notices
    resolve  task ("": all), what ("plan", "notes", null), choice ("mine", "theirs", "edited", null: only list),
             text (base64, null)                   -> conflicts, resolved
    rescued  action ("list", "show", "apply", "drop"), numbers ([]: all)  -> entries, applied, refused, dropped
    pull     bring the cache up to date            -> seq
    sync     compare all files and repair          -> seq, total, differing, missing, surplus, edited, notices
    verify   compare all files                     -> the same
    fetch    paths of deferred contents, or null   -> fetched, bytes
    configure  name, value                         -> every setting of this cache
    log      task ("": all), limit; text ("plan", "notes")  -> entries, more
    changes  epoch, seq (null: the head), mark, wait  -> see ``ChangeFeed.after``
    version  task, text, version                   -> text (base64), seq, epoch
    restore  task, text, version                   -> outcome, path, notices
    status   the state of the cache, with its evidence -> see ``Service._status``

An answer has ``ok``; a failure has ``code`` and ``message``.
"""

import asyncio
import base64
import contextlib
import json
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from importlib.metadata import version
from typing import Any

import msgspec

from lattice_remote import __version__
from lattice_remote.client import config, trusted_servers
from lattice_remote.client.agent.edit_sync import EditSender, EditWatcher
from lattice_remote.client.agent.history import ChangeFeed, read_log, read_version
from lattice_remote.client.agent.integrity_monitor import IntegrityMonitor
from lattice_remote.client.agent.payloads import (
    PayloadFetcher,
    Unreadable,
    call_frame,
    opened_files,
    run_frame,
    send_files,
)
from lattice_remote.client.agent.resolve import ConflictResolver, Rescuer, decoded, described
from lattice_remote.client.agent_runtime import boot_time, new_request_id
from lattice_remote.client.cache.cache import Cache
from lattice_remote.client.cache.first_fill import FirstFill
from lattice_remote.client.cache.replicator import Replicator
from lattice_remote.client.cache.verify import CacheComparison
from lattice_remote.client.config import Remote, read_remote
from lattice_remote.client.connection.connection import ALIVE_S, Connection, expect
from lattice_remote.client.connection.pool import ConnectionPool
from lattice_remote.client.tasks import task_of
from lattice_remote.client.trusted_servers import Server
from lattice_remote.errors import ConnectionFailed, Misuse, Rejected, RemoteError, StorageError, unknown_if_sent
from lattice_remote.file_watcher import FileWatcher
from lattice_remote.output import describe_difference
from lattice_remote.protocol.messages import (
    Applied,
    Attachment,
    Call,
    Refused,
    Reply,
    Response,
    Returned,
    Run,
    Version,
    Welcome,
)
from lattice_remote.protocol.replica import State

__all__ = ["Acknowledger", "ProgressCallback", "Service", "answered", "serve_once"]

_INTERVAL_S = 1.0


class Acknowledger:
    def __init__(self, replicator: Replicator, connection: Connection) -> None:
        self._replicator = replicator
        self._connection = connection
        self._acknowledged: tuple[Welcome | None, int] = (None, 0)

    async def run(self) -> None:
        """Report advances, at most one a second."""
        while True:
            await self._replicator.advanced.wait()
            self._replicator.advanced.clear()
            await self._acknowledge()
            await asyncio.sleep(_INTERVAL_S)

    async def _acknowledge(self) -> None:
        reached = (self._connection.welcome, self._replicator.state.position.seq)
        if reached[0] is not None and reached != self._acknowledged:
            self._acknowledged = reached
            since = self._replicator.advanced_at
            await self._connection.send(Applied(reached[1], None if since is None else time.monotonic() - since))


READY_WAIT_S = 2.0
FIRST_READY_WAIT_S = 5.0
"""Longest wait of a read for a server that answers but has not sent every change yet."""
NEVER_FILLED_WAIT_S = 20.0
"""Longest wait of a read while the cache is empty: as long as one connection attempt."""
REACH_WAIT_S = 10.0
STALLED_S = 30.0
"""A connection that is behind is replaced if it does not advance for this long."""
_WATCH_INTERVAL_S = 5.0
_STORE_AGE_INTERVAL_S = 60.0
_PROGRESS_INTERVAL_S = 0.2
_COMPARE_ATTEMPTS = 3
_HELD_LONG_S, _HELD_POLL_S = 1.0, 0.2
"""A write does not wait longer for a cache that another process locks: the server has it, the files follow."""

ProgressCallback = Callable[[dict[str, Any]], None]
"""Called with ``what``, ``done`` and ``total`` while a request takes long."""


async def answered(work: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"ok": True, **await work}
    except RemoteError as error:
        return {"ok": False, "code": error.code, "message": error.message}


class Service:
    """One followed cache: ``start()`` it in a running loop, and ``close()``.

    With ``is_new`` no other program knows the directory until it is closed.
    """

    def __init__(self, directory: str, *, is_new: bool = False) -> None:
        self.remote: Remote = read_remote(directory)
        self.cache = Cache(directory, self.remote)
        self.used_at = time.monotonic()
        """Monotonic time of the last request."""
        self._replicator = Replicator(self.cache)
        self._pool = ConnectionPool(self.remote, self._replicator)
        self._connection = self._pool.following
        self._edit_sender = EditSender(self._replicator, self._connection, self._reached)
        self._resolver = ConflictResolver(self._replicator, self._edit_sender)
        self._rescuer = Rescuer(self._replicator)
        self._edit_watcher: EditWatcher | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._payload_fetcher = PayloadFetcher(self._replicator, self._pool)
        self._changes = ChangeFeed(self._replicator, self._connection)
        self._is_new = True
        self._integrity_monitor = IntegrityMonitor(
            self._replicator, self._connection, FileWatcher(), asyncio.Semaphore(1), _ignore
        )
        self._looking = asyncio.Lock()
        self._pending_notices: list[str] = []
        self._has_looked = is_new
        if is_new:
            self._replicator.writer.first_fill = FirstFill(self.cache)

    def start(self, token: str | None, *, named: Server | None = None, prefer_given: bool = False) -> None:
        """Follow the project."""
        with contextlib.suppress(StorageError):  # reported once the files are needed
            self.cache.make_private()
        self._pool.start(token, named=named, prefer_given=prefer_given)
        acknowledger = Acknowledger(self._replicator, self._connection)
        self._start(self._watch(), acknowledger.run(), self._payload_fetcher.run())

    def _start(self, *work: Coroutine[Any, Any, None]) -> None:
        self._tasks += [asyncio.get_running_loop().create_task(each) for each in work]

    def look_after(self, watching: FileWatcher, turn: asyncio.Semaphore) -> None:
        """Start to send edits and to repair the files without a request."""
        self._replicator.edits.evidence.begin_watch()
        self._edit_watcher = edit_watcher = EditWatcher(self._replicator, self._pool, self._edit_sender)
        self._replicator.writer.on_edits = edit_watcher.touched
        self._integrity_monitor = IntegrityMonitor(
            self._replicator, self._connection, watching, turn, edit_watcher.touched
        )
        self._start(self._integrity_monitor.run(), edit_watcher.run())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await self._pool.close()
        if (first_fill := self._replicator.writer.first_fill) is not None:
            first_fill.close()
            with contextlib.suppress(StorageError):
                await self._replicator.store_known()
        if self._edit_watcher is not None:
            with contextlib.suppress(StorageError):
                await self._replicator.store_known()
            self._replicator.edits.evidence.end_watch()

    def is_stale(self) -> bool:
        try:
            return not self.cache.is_there() or read_remote(self.cache.directory) != self.remote
        except RemoteError:
            return True

    def is_meant_by(self, request: dict[str, Any]) -> bool:
        return bool([*self.cache.identity, self.remote.url, self.remote.project] == request["cache"])

    async def handle(self, request: dict[str, Any], report: ProgressCallback) -> dict[str, Any]:
        """Return the request's answer. Raises RemoteError."""
        self.used_at = time.monotonic()
        token = request.get("token")
        # ``add`` runs without the agent and passes the server at start.
        named = trusted_servers.from_environment(request["named"]) if "named" in request else self._connection.named
        if (refusal := self._pool.refusal(named, token)) is not None:
            return self._without_server(request, refusal)
        self._pool.note_use(token)
        self._pool.choose(token, named)
        if not self.cache.is_held_by_others:
            await self._connection.carry_out(await self._replicator.look_at_edits())
        if (work := self._long_work(request, token, report)) is not None:
            return await self._with_progress(work, report)
        return await self._short_work(request, token)

    async def _short_work(self, request: dict[str, Any], token: str | None) -> dict[str, Any]:
        failed_before = self._connection.failed_attempts
        match request["do"]:
            case "push":
                return await self._push_now(token, confirm=bool(request.get("confirm")))
            case "resolve":
                await self._until(
                    lambda: self._replicator.is_following or self._has_failed(failed_before), READY_WAIT_S
                )
                return await self._resolver.resolve(request, lambda: self._pool.writing(token))
            case "configure":
                config.change_setting(self.cache.directory, request["name"], request["value"])
                self._payload_fetcher.wake()
                return config.read_settings(self.cache.directory)
            case "log":
                return await read_log(self._pool.writing(token), request["task"], request["limit"], request.get("text"))
            case "changes":
                epoch, seq, mark = request["epoch"], request["seq"], bytes.fromhex(request["mark"])
                connection = self._pool.writing(token)
                return await self._changes.after(connection, epoch, seq, mark, wait=request["wait"])
            case "version":
                found = await self._version(request, token)
                text = base64.b64encode(found.data).decode("ascii")
                return {"text": text, "seq": found.seq, "epoch": found.epoch}
            case "restore":
                return await self._restore(request, token)
            case "status":
                return await self._status(token)
        raise Misuse(f"unknown request {request['do']!r}: the agent is of another version")

    def _without_server(self, request: dict[str, Any], refusal: RemoteError) -> dict[str, Any]:
        """Answer ``ready`` from local files; raise the refusal of other requests."""
        if request["do"] != "ready":
            raise refusal
        readiness = self._readiness()
        return {**readiness, "current": False, "code": refusal.code, "message": refusal.message}

    def _long_work(
        self, request: dict[str, Any], token: str | None, report: ProgressCallback
    ) -> Coroutine[Any, Any, dict[str, Any]] | None:
        match request["do"]:
            case "ready":
                return self._ready()
            case "run":
                return self._unless_held(self._run(request, token, report))
            case "call":
                return self._unless_held(self._call(request, token, report))
            case "pull":
                return self._pull()
            case "sync" | "verify" as do:
                return self._compare(repair=do == "sync")
            case "fetch":
                return self._fetch(request["paths"], report)
            case "rescued":
                return self._rescuer.handle(request, partial(self._write_as_a_program, token))
        return None

    def ready_now(self, request: dict[str, Any]) -> dict[str, Any] | None:
        if not self._has_looked or not self._is_current() or self._replicator.replica.blocked:
            return None
        if self._pool.refusal(trusted_servers.from_environment(request["named"]), request["token"]) is not None:
            return None
        self.used_at = time.monotonic()
        self._pool.note_use(request["token"])
        return self._readiness()

    # --- reading ---

    async def _ready(self, *, look: bool = True) -> dict[str, Any]:
        """Wait until the files are current, or the server is unreachable, or time is up.

        With ``look``, files that changed while unwatched are restored first.
        """
        failed_before = self._connection.failed_attempts
        wait_s, self._is_new = (FIRST_READY_WAIT_S if self._is_new else READY_WAIT_S), False
        if not self._replicator.state.is_filled:
            wait_s = NEVER_FILLED_WAIT_S
        if not self._is_current():
            self._connection.kick()
            await self._until(lambda: self._is_current() or self._has_failed(failed_before), wait_s)
        if not self._replicator.state.is_filled and self._connection.welcome is not None:
            await self._fill(failed_before)
        if look and not self._has_looked and self._is_current():
            await self._look(wait_s)
        return self._readiness()

    async def _look(self, wait_s: float) -> None:
        deadline = time.monotonic() + wait_s
        self._integrity_monitor.is_awaited = True
        try:
            async with asyncio.timeout(wait_s), self._looking:
                if self._edit_watcher is None and not self._integrity_monitor.has_looked:
                    await self._integrity_monitor.look()
                if not await self._until(lambda: self._integrity_monitor.has_looked and self._is_current(), wait_s):
                    return
                if not self._has_looked:
                    self._pending_notices += (await self._edit_sender.restore_damage()).notices
                    self._has_looked = True
            await self._until(self._is_current, max(0.0, deadline - time.monotonic()))
        except (TimeoutError, RemoteError):
            return  # the answer says that the files may not be current
        finally:
            self._integrity_monitor.is_awaited = False

    def _readiness(self) -> dict[str, Any]:
        trouble = self._trouble()
        return {
            "current": self._is_current() and self._has_looked,
            "filled": self._replicator.state.is_filled,
            "seq": self._replicator.state.position.seq,
            "age_s": self._age_s(),
            "code": trouble.code,
            "message": trouble.message,
            "notices": self._notices(),
        }

    def _notices(self) -> list[str]:
        rescue_policy = self._replicator.rescue_policy
        notices = [*rescue_policy.notices, *self._pending_notices]
        rescue_policy.notices, self._pending_notices = [], []
        if self._edit_watcher is not None:
            notices += self._edit_watcher.notices
            self._edit_watcher.notices = []
        lasting = (self._edit_sender.notice(), self._replicator.conflicts.notice(), rescue_policy.rescued.notice())
        return [*notices, *(notice for notice in lasting if notice is not None)]

    async def _fill(self, failed_before: int) -> None:
        while not self._is_current() and not self._has_failed(failed_before):
            before = self._advance()
            if not await self._until(lambda: self._is_current() or self._advance() != before, STALLED_S):  # noqa: B023
                return

    def _is_current(self) -> bool:
        return self._replicator.is_current and self._connection.is_open

    def _has_failed(self, failed_before: int) -> bool:
        return self._connection.welcome is None and (
            self._connection.failed_attempts > failed_before or self._connection.is_barred
        )

    def _advance(self) -> tuple[object, ...]:
        replica = self._replicator.replica
        return replica.state, replica.position, self._replicator.received, self._connection.failed_attempts

    async def _until(self, predicate: Callable[[], bool], timeout_s: float) -> bool:
        return await self._connection.changed.until(predicate, timeout_s)

    def _trouble(self) -> RemoteError:
        error = self._replicator.trouble or self._connection.error
        if error is not None and (self._connection.is_refused or isinstance(error, StorageError)):
            return error
        if self.cache.is_held_by_others:
            return StorageError(f"{self.cache.directory} is locked by another process")
        if self._connection.welcome is None or not self._connection.is_open:
            return self._connection.unreachable(is_write=False)
        if self._is_current():
            return ConnectionFailed("still comparing the files here with the server's")
        here, there = self._replicator.replica.position.seq, self._replicator.replica.head
        return ConnectionFailed(f"still catching up with server {self.remote.url} (change {here} of {there})")

    def _age_s(self) -> float | None:
        current_at = self._replicator.current_at
        return None if current_at is None else max(0.0, time.time() - current_at)

    async def _pull(self) -> dict[str, Any]:
        await self._must_be_current()
        return {"seq": self._replicator.state.position.seq}

    async def _fetch(self, paths: list[str] | None, report: ProgressCallback) -> dict[str, Any]:
        await self._must_be_current()
        return await self._payload_fetcher.fetch(paths, report)

    async def _must_be_current(self, *, look: bool = True) -> None:
        answer = await self._ready(look=look)
        if not answer["current"] and self._connection.is_open:
            failed_before = self._connection.failed_attempts
            await self._fill(failed_before)
        if not self._is_current():
            knows_why = (
                self._connection.is_open or self._connection.is_refused or isinstance(self._trouble(), StorageError)
            )
            raise self._trouble() if knows_why else self._connection.unreachable(is_write=False)

    # --- writing ---

    async def _unless_held(self, work: Awaitable[dict[str, Any]]) -> dict[str, Any]:
        try:
            return await work
        except Unreadable:
            return {"unreadable": True}
        except ConnectionFailed as error:
            if error.sent or not self.cache.is_held_by_others:
                raise
            raise StorageError(f"{self.cache.directory} is locked by another process; nothing was written") from error

    async def _run(self, request: dict[str, Any], token: str | None, report: ProgressCallback) -> dict[str, Any]:
        """Run a command line; its change is then in the files."""
        answer, notices = await self._carry_out(run_frame(request), request, token, report)
        answer = expect(answer, Reply, sent=True)
        return {
            "exit_code": answer.exit_code if 0 <= answer.exit_code <= 255 else 1,
            "stdout": base64.b64encode(answer.stdout).decode("ascii"),
            "stderr": base64.b64encode(answer.stderr).decode("ascii"),
            "notices": notices,
        }

    async def _call(self, request: dict[str, Any], token: str | None, report: ProgressCallback) -> dict[str, Any]:
        """Run a surface's operation; its change is then in the files."""
        answer, notices = await self._carry_out(call_frame(request), request, token, report)
        answer = expect(answer, Returned, sent=True)
        payload = answer.payload.decode(errors="replace")
        return {"status": answer.status, "payload": payload, "seq": answer.seq, "notices": notices}

    async def _write_as_a_program(self, token: str | None, name: str, values: dict[str, Any]) -> dict[str, Any]:
        payload = json.dumps(values, ensure_ascii=False)
        asked = {"id": new_request_id(), "surface": "storage", "name": name, "payload": payload, "files": []}
        return decoded(await self._call(asked, token, lambda _: None))

    async def _carry_out(
        self, frame: Run | Call, request: dict[str, Any], token: str | None, report: ProgressCallback
    ) -> tuple[Response, list[str]]:
        """Send large files, edits, then the frame; return its answer and notices.

        Raises:
            Unreadable: the agent cannot open a caller's file; nothing was sent.
        """
        connection = self._pool.writing(token)
        notices: list[str] = []

        async def send(files: list[Attachment]) -> Response:
            if not self._is_held_long():  # else edits wait for the next command: their answers could not be settled
                notices.extend((await self._edit_sender.push(connection)).notices)
            attaching.enter_context(self._payload_fetcher.attaching(file.digest for file in files if file.digest))
            return await self._ask_once(msgspec.structs.replace(frame, files=files), connection, request)

        with opened_files(request["files"]) as opened, contextlib.ExitStack() as attaching:
            answer, sources = await send_files(opened, partial(self._pool.bulk, str(connection.token)), send, report)
            if isinstance(answer, Reply | Returned) and sources and await self._reached(answer.seq):
                await self._payload_fetcher.take_own(sources)
        if isinstance(answer, Refused):
            raise Rejected(answer.message, code=answer.code)
        is_behind = connection is not self._connection or self.cache.is_held_by_others
        if isinstance(answer, Reply | Returned) and is_behind and not await self._reached(answer.seq):
            notices.append(f"done, but the cache is behind: {self._trouble().message}")
        return answer, [*notices, *self._notices()]

    async def _ask_once(self, frame: Run | Call, connection: Connection, request: dict[str, Any]) -> Response:
        first_sent_at = request.get("first_sent_at")
        self._replicator.own_requests.append(frame.id)
        if not request.get("own_connection"):
            answer = await self._ask_unless_held(frame, connection, first_sent_at)
            if answer is not None:
                return answer
            # The following connection waits for the files, and its answers wait with it. The id runs once (I6).
            first_sent_at = first_sent_at or boot_time()
        # The wait must end with the command: the server drops a waiter whose connection is gone.
        async with self._pool.bulk(str(connection.token)) as own:
            return await own.send_request(frame, first_sent_at=first_sent_at)

    async def _ask_unless_held(
        self, frame: Run | Call, connection: Connection, first_sent_at: float | None
    ) -> Response | None:
        """Return the answer; None if another process locks the cache."""
        asking = asyncio.ensure_future(connection.send_request(frame, first_sent_at=first_sent_at))
        try:
            while not (await asyncio.wait([asking], timeout=_HELD_POLL_S))[0]:
                if connection is self._connection and self._is_held_long():
                    return None
            return asking.result()
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    def _is_held_long(self) -> bool:
        return self.cache.held_since is not None and time.monotonic() - self.cache.held_since > _HELD_LONG_S

    async def _reached(self, seq: int) -> bool:
        if self._is_held_long():
            return False
        self._connection.kick()
        replica = self._replicator
        return await self._until(
            lambda: replica.replica.position.seq >= seq and replica.replica.state is State.FOLLOWING, REACH_WAIT_S
        )

    async def _push_now(self, token: str | None, *, confirm: bool) -> dict[str, Any]:
        pushed = await self._edit_sender.push(self._pool.writing(token), again=True, confirm=confirm)
        return {"sent": pushed.sent, "notices": [*pushed.notices, *self._notices()]}

    async def _version(self, request: dict[str, Any], token: str | None) -> Version:
        return await read_version(self._pool.writing(token), request["task"], request["text"], str(request["version"]))

    async def _restore(self, request: dict[str, Any], token: str | None) -> dict[str, Any]:
        """Make an earlier version of a text the newest one."""
        version = await self._version(request, token)
        await self._must_be_current()
        path = self._text_path(request["task"], request["text"])
        connection = self._pool.writing(token)
        pushed = await self._edit_sender.push(connection, [path], again=True)
        if any(sent["outcome"] in ("conflict", "refused") for sent in pushed.sent):
            why = f"the server refuses the edit of {path}; see: lattice remote resolve {request['task']}"
            raise Misuse(why, code="REMOTE_BUSY")
        outcome = await self._edit_sender.put(connection, path, version.data)
        if outcome == "conflict":
            raise Rejected(f"others have just changed {path}; nothing was restored: repeat", code="REMOTE_BUSY")
        return {"outcome": outcome, "path": path, "notices": [*pushed.notices, *self._notices()]}

    def _text_path(self, task: str, text: str) -> str:
        task_id = task_of(self.cache.directory, task)
        if self.cache.size(f"tasks/{task_id}.json") is None:
            raise Misuse(f"{task} is archived or gone: restore it first with lattice unarchive")
        return f"{'plans' if text == 'plan' else 'notes'}/{task_id}.md"

    # --- comparing ---

    async def _compare(self, *, repair: bool) -> dict[str, Any]:
        comparison = await self._compared(repair=repair)
        if repair and not comparison.is_clean:
            await self._fill(self._connection.failed_attempts)
            if not self._is_current():
                raise self._trouble()
        return {**_comparison_fields(comparison), "notices": self._notices()}

    async def _compared(self, *, repair: bool) -> CacheComparison:
        for attempts_left in reversed(range(_COMPARE_ATTEMPTS)):
            await self._must_be_current(look=False)
            try:
                effects, future = await self._replicator.compare(repair=repair)
                await self._connection.carry_out(effects)
                return await asyncio.shield(future)
            except ConnectionFailed:
                if not attempts_left:
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def _with_progress(
        self, work: Coroutine[Any, Any, dict[str, Any]], report: ProgressCallback
    ) -> dict[str, Any]:
        """Report the number of files that have arrived until ``work`` ends."""
        task = asyncio.ensure_future(work)
        shown = False
        try:
            while not (await asyncio.wait([task], timeout=_PROGRESS_INTERVAL_S))[0]:
                if (progress := self._replicator.progress()) is not None:
                    report({"what": "files", "done": progress[0], "total": progress[1]})
                    shown = True
            if shown:
                report({"what": "files", "done": 1, "total": 1})
            return task.result()
        finally:
            task.cancel()

    # --- supervision ---

    async def _watch(self) -> None:
        """Replace a connection that is behind and stalled; store the cache's age."""
        advance, advanced_at, stored_at = self._advance(), time.monotonic(), time.monotonic()
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            now = time.monotonic()
            if (
                self._advance() != advance
                or not self._connection.is_open
                or self._replicator.is_current
                or self._replicator.is_busy
            ):
                advance, advanced_at = self._advance(), now
            elif now - advanced_at > STALLED_S:
                here, there = self._replicator.replica.position.seq, self._replicator.replica.head
                self._connection.abort(
                    ConnectionFailed(
                        f"it announced {there} changes, sent {here}, then nothing useful for {STALLED_S:.0f} s"
                    )
                )
                advanced_at = now
            if self._is_current() and now - stored_at > _STORE_AGE_INTERVAL_S:
                stored_at = now
                with contextlib.suppress(StorageError):
                    await self._replicator.store_age()
            await self._pool.drop_idle()

    def summary(self) -> dict[str, Any]:
        return {
            "url": self.remote.url,
            "project": self.remote.project,
            "connected": self._connection.is_open,
            "current": self._is_current(),
            "seq": self._replicator.state.position.seq,
        }

    def _repaired(self) -> dict[str, Any]:
        repairs = self._replicator.repairs
        return {
            "count": repairs.count,
            "last_path": repairs.last_path,
            "last_age_s": None if repairs.last_at is None else round(max(0.0, time.time() - repairs.last_at), 1),
            "contested": repairs.contested(),
            "watched": None if self._edit_watcher is None else self._integrity_monitor.how(),
        }

    def _edits_wait_for(self) -> str | None:
        if self._edit_watcher is None:
            return "the next command that writes, as no agent runs"
        if self._pool.has_several_tokens():
            return "the next command that writes, as recent commands used several tokens or another configuration"
        connection = self._pool.for_edits()
        if connection is None:
            return "a token"
        return None if connection.is_open and self._replicator.is_following else "the server"

    async def _status(self, token: str | None) -> dict[str, Any]:
        failed_before = self._connection.failed_attempts
        if not self._connection.is_open:
            self._connection.kick()
            await self._until(lambda: self._connection.is_open or self._has_failed(failed_before), FIRST_READY_WAIT_S)
        welcome, silence_s, is_open = self._connection.welcome, self._connection.silence_s(), self._connection.is_open
        own, own_error = await self._welcomed(token)
        return {
            "remote": {"name": self.remote.name, "url": self.remote.url, "project": self.remote.project},
            "connected": is_open,
            "last_heard_s": None if silence_s == float("inf") else round(silence_s, 1),
            "silence_limit_s": ALIVE_S,
            "error": None if is_open or self._connection.error is None else self._connection.error.message,
            "code": None if is_open or self._connection.error is None else self._connection.error.code,
            "current": self._is_current(),
            "trouble": None if self._replicator.trouble is None else self._replicator.trouble.message,
            "epoch": self._replicator.state.position.epoch,
            "seq": self._replicator.state.position.seq,
            "server_seq": self._replicator.replica.head if is_open else None,
            "missing": len(self._replicator.replica.missing),
            "payloads": self._payload_fetcher.status(),
            "age_s": self._age_s(),
            "resyncs": self._replicator.resyncs,
            "unsent_edits": self._replicator.edits.scan(),
            "refused_edits": self._edit_sender.refused(),
            "withheld_edits": self._edit_sender.withheld(),
            "edits_wait_for": self._edits_wait_for(),
            "conflicts": self._resolver.describe(),
            "rescued": [described(entry) for entry in self._replicator.rescue_policy.rescued.entries()],
            "repaired": self._repaired(),
            "actor": own.actor if own else None,
            "act_as": own.act_as if own else None,
            "actor_error": None if own_error is None else own_error.message,
            "has_token": (token or self._pool.stored_token()) is not None,
            "pid": os.getpid(),
            "versions": _versions(welcome),
        }

    async def _welcomed(self, token: str | None) -> tuple[Welcome | None, RemoteError | None]:
        try:
            connection = self._pool.writing(token)
        except RemoteError as error:
            return None, error
        failed_before = connection.failed_attempts
        await connection.changed.until(
            lambda: (
                connection.welcome is not None or connection.failed_attempts > failed_before or connection.is_refused
            ),
            FIRST_READY_WAIT_S if self._connection.is_open else 0.0,
        )
        return connection.welcome, connection.error


def _ignore(_ignored: object) -> None:
    pass


def _versions(welcome: Welcome | None) -> dict[str, Any]:
    here = {"lattice-remote": __version__, "lattice-tracker": version("lattice-tracker")}
    if welcome is None:
        return {"here": here, "server": None, "differences": None}
    there = {"lattice-remote": welcome.server_version, "lattice-tracker": welcome.lattice_version}
    differences = {
        program: advice
        for program in here
        if (advice := describe_difference(here[program], there[program], here_is="this machine", there_is="the server"))
    }
    return {"here": here, "server": there, "differences": differences}


def _comparison_fields(comparison: CacheComparison) -> dict[str, Any]:
    return {
        "seq": comparison.seq,
        "total": comparison.total,
        "differing": comparison.differing,
        "missing": comparison.missing,
        "surplus": comparison.surplus,
        "edited": comparison.edited,
        "deferred": comparison.deferred,
    }


def serve_once(request: dict[str, Any], on_progress: ProgressCallback | None) -> dict[str, Any]:
    return asyncio.run(answered(_serve_once(request, on_progress or _ignore)))


async def _serve_once(request: dict[str, Any], report: ProgressCallback) -> dict[str, Any]:
    with unknown_if_sent("first_sent_at" in request):
        service = Service(request["directory"])
        if not service.is_meant_by(request):
            raise StorageError(f"{request['directory']} was replaced while this command ran")
    service.start(request.get("token"), named=trusted_servers.from_environment(request.get("named")))
    try:
        return await service.handle(request, report)
    finally:
        await service.close()
