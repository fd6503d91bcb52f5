"""A project on the server: its request queue, its worker process and its subscribers.

Requests reach the worker in turns, one per connection (over HTTP: per token), with a bounded window in flight so that
one fsync covers many. Each outcome is numbered and durable (I1, I2). A change goes to every subscriber, then the reply
to its requesters, in the same loop tick, so no reply overtakes its change (SPEC: Reply).

    starting --Ready--> open --the worker ends--> starting ...
    starting --repeated failures (a full disk)--> closed --Ready--> open
    open --idle--> resting --a request--> starting ...
    any --Failed (a write could not be made durable)--> closed until the server is restarted

After a worker's death its requests go to the next worker in the same order. That worker answers finished requests from
the journal and runs the others (I6). Nothing here writes to the tree.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from lattice_remote.errors import Rejected, StorageError
from lattice_remote.protocol.messages import Bye, Position, Refused, encode
from lattice_remote.server.config import Config
from lattice_remote.server.datadir import ProjectPaths
from lattice_remote.server.ipc import (
    AbandonRequest,
    ApplyRecords,
    CopyMissing,
    Edit,
    ImportProject,
    Lead,
    NewEpoch,
    Ready,
    Reconcile,
    RecordApplied,
    RequestDone,
    RunCall,
    RunCommand,
    Stop,
    ToServer,
    WorkerFailed,
)
from lattice_remote.server.project.child_process import StartChild, spawn_child
from lattice_remote.server.project.history import CommitTimes, History, Start
from lattice_remote.server.project.hooks import HookRunner
from lattice_remote.server.project.journal_log import LogReader
from lattice_remote.server.project.metrics import Metrics, OutcomeListener, ProjectMetrics, RequestLog
from lattice_remote.server.project.order import EmbeddedOrder, Order
from lattice_remote.server.project.queue import (
    QueuedRequest,
    QueueLimits,
    Requester,
    RequestQueue,
    refusal_to_join,
)
from lattice_remote.server.project.reader_process import ReaderProcess
from lattice_remote.server.project.uploads import Pushes, Uploads
from lattice_remote.server.project.worker_process import WORKER_COMMAND, WorkerProcess, WriterLock

__all__ = ["Load", "Project", "stopping"]

_MAX_START_FAILURES = 5
"""In a row, until the project is reported as failed; restarts continue."""
_RESTART_DELAYS_S = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0)
"""Reset once a worker has run for ``_STEADY_S``."""
_STEADY_S = 10.0
_IDLE_CHECK_S = 1.0
"""Shortest interval of the checks whether the worker is idle."""
_SETTLED_CHECK_S = 0.005

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Load:
    queued: int
    with_worker: int
    waiting: int
    in_flight_bytes: int
    """Without reads."""
    reads_waiting: int
    worker_pid: int | None


class Project:
    def __init__(
        self,
        slug: str,
        paths: ProjectPaths,
        *,
        hooks: HookRunner | None,
        bounds: QueueLimits | None = None,
        config: Config | None = None,
        worker_command: Sequence[str] = WORKER_COMMAND,
        metrics: ProjectMetrics | None = None,
        start_child: StartChild = spawn_child,
        order: Order | None = None,
    ) -> None:
        self.slug = slug
        self.order = order or EmbeddedOrder()
        self.paths = paths
        self.metrics = metrics or Metrics().of(slug)
        self.request_log = RequestLog(slug, self.metrics)
        self.commit_times = CommitTimes()
        self.history = History(paths.journal, self._committed)
        self.log = LogReader(paths)
        config = config or Config()
        self.uploads = Uploads(paths, config.limits, self.request_log.refused_other)
        self.pushes = Pushes(paths, config, self.uploads, self.submit, self.request_log.refused_other)
        self.reader = ReaderProcess(
            slug,
            paths,
            self._settled_state,
            self._durable,
            count_files=lambda: len(self.history.files),
            idle_s=config.idle_seconds,
            start_child=start_child,
        )
        self.lattice_version = ""
        self._hooks = hooks
        self.bounds = bounds or QueueLimits()
        self._worker_command = worker_command
        self._start_child = start_child
        self._writer_lock = WriterLock(paths)
        self._idle_s = config.idle_seconds
        self._used_at = time.monotonic()
        """When a client's last request arrived."""
        self._queue = RequestQueue(self.bounds, ready=self._pump, overdue=self._overdue)
        self._edited: set[str] = set()
        self._rescan = False
        self._reconciling = False
        self._disproved_epoch = ""  # the last epoch that the worker was asked to end; see rollback_proved()
        self._worker: WorkerProcess | None = None
        self._open = asyncio.Event()
        self._idle = asyncio.Event()
        self._worker_ended = asyncio.Event()
        self._ready: asyncio.Future[Ready] | None = None  # the worker's first message
        self._working = False  # the worker is ready, and every change up to its head is published
        self._resting = False  # an idle worker has been stopped; the next request starts another
        self._needed = asyncio.Event()
        self._pauses = 0  # blocks of settled()
        self._stopping = False
        self._failure: StorageError | None = None
        self._failed_for_good = False
        self._supervisor: asyncio.Task[None] | None = None
        self.order.attach(self)

    def start(self) -> None:
        """Keep a worker running."""
        self._supervisor = asyncio.get_running_loop().create_task(self._keep_worker(), name=f"project {self.slug}")

    async def opened(self) -> None:
        """Wait until the project can be used. Raises StorageError: it failed; Rejected: it is stopping."""
        await self._open.wait()
        if self._failure is not None:
            raise self._failure
        if self._stopping:
            raise stopping()

    @property
    def load(self) -> Load:
        return Load(
            queued=len(self._queue.turns),
            with_worker=len(self._queue.sent),
            waiting=len(self._queue.waiting),
            in_flight_bytes=self._queue.bytes,
            reads_waiting=self.reader.waiting,
            worker_pid=self._worker.pid if self._working and self._worker is not None else None,
        )

    @property
    def stopping(self) -> bool:
        """Whether requests get no reply."""
        return self._stopping

    @property
    def is_ready(self) -> bool:
        """Whether a worker runs requests, or is started by the next one."""
        return self._working or self._resting

    @property
    def failure(self) -> StorageError | None:
        return self._failure

    def dismiss(self, bye: Bye) -> None:
        """End all subscribers, and requesters whose reply will not come."""
        self.history.dismiss(bye)
        for requester in (*self._queue.requesters(), *self.order.requesters()):
            requester.end(bye)

    async def drain(self, timeout_s: float) -> None:
        self._stopping = True
        self._open.set()  # opened() then raises
        self._queue.waiting.clear()
        if self._queue.sent:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout_s)

    async def stop(self, timeout_s: float) -> None:
        self._stopping = True
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})
        self._queue.close()
        if self._worker is not None:
            self._worker.send(Stop())
            if not await self._worker.wait(timeout_s):
                self._worker.kill()
                await self._worker.wait(1.0)
        self._writer_lock.release()
        await self.order.close()
        self.reader.close()
        self.uploads.close()
        await self.pushes.close()
        if self._hooks is not None:
            await self._hooks.close()

    def _committed(self, seq: int) -> None:
        self.commit_times.committed(seq, time.monotonic())
        self.metrics.changes.inc()
        self.order.committed(seq)

    def _settled_state(self) -> object | None:
        """Return a name of the tree's state at the head; None while a request is with the worker.

        The name has the number of attempts: readers may have seen the files of an undone command.
        """
        settled = self.is_ready and not self._queue.sent and self.order.is_settled
        return (self.history.epoch, self.history.head, self._queue.attempts) if settled else None

    @contextlib.asynccontextmanager
    async def settled(self) -> AsyncIterator[None]:
        """Send the worker no request within this block: the files are those of the head. Raises as ``opened``."""
        self._pauses += 1
        try:
            while self._settled_state() is None:
                await self.opened()
                await asyncio.sleep(_SETTLED_CHECK_S)
            yield
        finally:
            self._pauses -= 1
            self._pump()

    def _durable(self) -> tuple[str, int]:
        return self.history.epoch, self.history.head

    # --- requests ---

    def submit(
        self,
        message: RunCommand | RunCall | Edit | ImportProject,
        requester: Requester,
        on_result: OutcomeListener | None = None,
    ) -> None:
        """Queue a request.

        Calls ``requester.answer()`` exactly once, possibly before returning. A duplicate id joins the running request
        (I6). ``on_result`` is called just before the reply and writes the log line; without it the line is written
        here.
        """
        if self._stopping or self._failure is not None:
            return  # the Bye on this connection gives the reason
        if not self.order.is_owner:
            self.order.forward(message, requester, on_result)
            return
        job = self._queue.get(message.id)
        if job is not None:
            self._join(job, message, requester, on_result)
            return
        job = QueuedRequest(message, [requester], on_result=on_result)
        if (objection := self._queue.objection(job)) is not None:
            self.refuse(requester, message, on_result, "REMOTE_BUSY", objection)
            return
        if message.first_sent_at is not None:  # repeated: it has waited since then
            job.submitted_at -= max(0.0, time.time() - message.first_sent_at)
        self._used_at = job.arrived_at
        self._enqueue(job)

    def _join(
        self,
        job: QueuedRequest,
        message: RunCommand | RunCall | Edit | ImportProject,
        requester: Requester,
        on_result: OutcomeListener | None,
    ) -> None:
        if (refusal := refusal_to_join(job, message)) is not None:
            self.refuse(requester, message, on_result, *refusal)
        elif requester not in job.requesters:
            job.requesters.append(requester)

    def refuse(
        self,
        requester: Requester,
        message: RunCommand | RunCall | Edit | ImportProject,
        on_result: OutcomeListener | None,
        code: str,
        why: str,
    ) -> None:
        self.request_log.refused(message, code, on_result)
        requester.answer(message.id, encode(Refused(message.id, code, why)))

    def forget(self, requester: Requester, request_ids: set[str]) -> None:
        """Remove a closed connection; its requests continue, except waits for a resource."""
        self.pushes.forget(requester)
        self.order.forget(requester, request_ids)
        for request_id in request_ids:
            job = self._queue.get(request_id)
            if job is None or requester not in job.requesters:
                continue
            job.requesters.remove(requester)
            if not job.requesters and job.resource:
                self._queue.withdraw(job)

    def withdraw(self, requester: Requester, request_id: str, code: str) -> bool:
        """Withdraw a request of a revoked token; return True if it never has an effect.

        False: the worker has or had it, or another connection also requests it.
        """
        if self.order.withdraw(requester, request_id, code):
            return True
        job = self._queue.get(request_id)
        if job is None or job.requesters != [requester] or job.suspect or not self._queue.withdraw(job):
            return False
        assert isinstance(job.message, RunCommand | RunCall | Edit | ImportProject), "others are not asked for"
        self.request_log.refused(job.message, code, job.on_result)
        return True

    def files_touched(self, paths: set[str] | None) -> None:
        """Have the worker check files that may have changed (I12)."""
        if paths is None:
            self._rescan = True
        else:
            self._edited |= paths
        self._reconcile()

    async def rollback_proved(self, epoch: str, reason: str) -> None:
        """Start a new epoch: a client has a genuine change that ``epoch`` lacks (I7)."""
        if epoch != self.history.epoch:
            return  # another proof came first
        if self.order.is_shared:
            self.fail(
                f"{reason}: this cluster lacks acknowledged changes; on the node that has the most of them, run: "
                f"lattice-remote cluster rebuild {self.slug}"
            )
            return
        if self._disproved_epoch != epoch:
            self._disproved_epoch = epoch
            _log.warning("%s: %s: the server was rolled back; starting a new epoch", self.slug, reason)
            self._open.clear()
            self._enqueue(QueuedRequest(NewEpoch(reason)))
        await self.opened()

    async def _is_in_history(self, position: Position) -> bool | None:
        """Return whether a position belongs to the history; None if its change is no longer kept.

        A genuine one outside proves a rollback and starts a new epoch (I7).
        """
        history = self.history
        if position.epoch != history.epoch:
            return False
        known = await history.mark_at(position.seq) if position.seq <= history.head else b""
        if known is None or (known == position.mark and position.seq <= history.head):
            return None if known is None else True
        if self.order.is_shared and position.seq > history.head and not await self.order.reach(position.seq):
            why = f"this node does not have change {position.seq} yet; try again"
            raise Rejected(why, code="REMOTE_BUSY")
        if self.order.is_shared and await history.mark_at(position.seq) == position.mark:
            return True
        if await history.is_genuine(position):
            why = f"a client has seen another change {position.seq}; the head is {history.head}"
            await self.rollback_proved(position.epoch, why)
        return False

    async def can_continue(self, position: Position) -> bool:
        """Return whether the changes after a client's position are kept."""
        if not await self._is_in_history(position):
            return False
        return position.seq == self.history.head or position.seq + 1 >= self.history.oldest

    async def find_start(self, epoch: str = "", seq: int | None = None, mark: bytes = b"") -> Start:
        """Return where a listener starts that knows change ``seq`` (None: the head), without yielding after the last
        look.

        Without a change id the position is a user's guess: it gets the changes after that number in the current
        history.
        """
        history = self.history
        current, is_known = history.epoch, True
        if seq is not None and mark:
            is_known = await self._is_in_history(Position(epoch, seq, mark)) is not False
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

    # --- the queue ---

    def _enqueue(self, job: QueuedRequest) -> None:
        self._queue.add(job)
        self._pump()

    def _pump(self) -> None:
        if self._queue.turns:
            self._needed.set()
        if not self._working or self._stopping or self._pauses or not self.order.is_owner:
            return
        if batch := self._queue.take():
            assert self._worker is not None, "an open project has a worker"
            self._worker.send(*batch)

    def _reconcile(self) -> None:
        if self._reconciling or not (self._rescan or self._edited) or self._stopping or self._failure is not None:
            return
        if not self._working and self.order.is_shared:
            return
        paths = None if self._rescan else sorted(self._edited)
        self._rescan = False
        self._edited.clear()
        if not self.order.is_owner:
            assert self._worker is not None, "a working project has a worker"
            self._worker.send(Reconcile(paths))
            return
        self._reconciling = True
        self._enqueue(QueuedRequest(Reconcile(paths)))

    def _received(self, message: ToServer) -> None:
        match message:
            case Ready():
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(message)
                else:
                    self._epoch_started(message)
            case RequestDone():
                self.order.pass_on(partial(self._done, message), message)
            case RecordApplied():
                self._applied(message)
                self.order.applied(message)
            case CopyMissing(reason):
                self.order.copy_missing(reason)
            case WorkerFailed():
                self.fail(f"{message.message}; restart the server", for_good=True)

    def _done(self, done: RequestDone) -> None:
        """Publish the change, then reply, then run the hooks."""
        assert self._queue.sent, "the worker answers only what it was sent"
        if not done.is_extra:
            assert done.id == self._queue.sent[0].id, "the worker answers in order"
        job = None if done.is_extra else self._settled()
        if done.synced_s is not None:
            self.metrics.journal_fsync_seconds.observe(done.synced_s)
        if done.change is None:
            self.history.oldest = done.oldest or self.history.oldest
        else:
            self.history.publish(done.seq, done.mark, done.change, done.after, oldest=done.oldest)
        self._queue.waiting.touched(done)
        if job is None:
            self.request_log.found(done.seq)
        else:
            self._finish(job, done)
        if self._hooks is not None and done.hooks:
            self._hooks.submit(done.seq, done.hooks)
        self._pump()

    def _applied(self, message: RecordApplied) -> None:
        if message.change is not None:
            self.history.publish(message.seq, message.mark, message.change, message.after, oldest=message.oldest)

    def apply(self, records: ApplyRecords) -> None:
        """Send records to the worker. One that has just ended gets none: the order gives them to the next one."""
        if self._worker is not None:
            self._worker.send(records)

    def lead(self, *, keeps_edits: bool) -> None:
        """Execute requests from now on; ``order.is_owner`` is True already."""
        assert self._worker is not None, "the order does this with a ready worker"
        self._worker.send(Lead(keeps_edits))
        if keeps_edits:
            self._rescan = True
        self._reconcile()
        self._pump()

    def step_down(self) -> list[QueuedRequest]:
        """Kill the worker and return the unanswered requests; ``order.is_owner`` is False already."""
        self._working = False
        if self._worker is not None:
            self._worker.kill()
        unanswered = self._queue.unanswered()
        self._queue.reset()
        self._reconciling = False
        return unanswered

    def _settled(self) -> QueuedRequest:
        job = self._queue.settle()
        if not self._queue.sent:
            self._idle.set()
        return job

    def _finish(self, job: QueuedRequest, done: RequestDone) -> None:
        match job.message:
            case RunCommand() | RunCall() | Edit() | ImportProject() | AbandonRequest() as message:
                if done.waiting_for is not None and job.requesters and not self._stopping:
                    self._queue.wait(job, done)
                    return
                self._queue.drop(job)
                if done.waiting_for is not None:
                    return  # no requester waits any more
                assert done.reply is not None, "a request that does not wait is answered"
                self.request_log.settled(job, message, done)
                if done.change is not None and isinstance(message, RunCommand | RunCall):
                    self._uploads_used(message)
                for requester in job.requesters:
                    requester.answer(message.id, done.reply)
            case Reconcile(paths):
                self._reconciling = False
                if done.change is not None:
                    self.request_log.found(done.seq)
                looked_at = None if paths is None else set(paths)
                if done.retry_at is not None:
                    delay_s = max(0.0, done.retry_at - time.time())
                    asyncio.get_running_loop().call_later(delay_s, self.files_touched, looked_at)
                if done.more:
                    self.files_touched(looked_at)
                else:
                    self._reconcile()
            case NewEpoch() | Stop() | ApplyRecords() | Lead():
                raise AssertionError("these are not answered with an outcome")

    def _uploads_used(self, message: RunCommand | RunCall) -> None:
        for file in message.files:
            if file.digest is not None:
                self.uploads.used(message.token_id, file.digest)

    # --- starts and ends of the worker ---

    async def _keep_worker(self) -> None:
        failures = restarts = 0
        after_rest = False
        while not self._failed_for_good:
            began = time.monotonic()
            try:
                await self._start_worker()
                self.metrics.worker_starts.inc(not after_rest)
                failures = 0
                await self._until_ended_or_idle()
            except Exception as error:  # noqa: BLE001 - on any error the project ends up running or failed
                failures += 1
                _log.error("%s: the worker did not start: %s", self.slug, str(error) or type(error).__name__)
                if failures == _MAX_START_FAILURES:
                    self.fail(
                        f"the server's worker for project {self.slug} does not start: {error}; see the server's log"
                    )
            restarts = 0 if time.monotonic() - began > _STEADY_S and not failures else restarts + 1
            if self._worker is not None:
                self._worker.kill()
                if not await self._worker.wait(5.0):
                    self._writer_lock.release()  # the next start waits until this process, which holds it, is gone (I1)
                self._worker = None
            after_rest = self._resting and self._failure is None
            if after_rest:
                await self._needed.wait()
                self._resting, restarts = False, 0
            await asyncio.sleep(_RESTART_DELAYS_S[min(restarts, len(_RESTART_DELAYS_S) - 1)])

    async def _until_ended_or_idle(self) -> None:
        """Return once the worker has ended, or was stopped because no client has used it for long."""
        while not self._worker_ended.is_set():
            left_s = self._used_at + self._idle_s - time.monotonic()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._worker_ended.wait(), max(left_s, min(self._idle_s, _IDLE_CHECK_S)))
            if self._working and self._is_idle():
                assert self._worker is not None, "an open project has a worker"
                # From here on requests wait in the queue: the worker gets none after Stop.
                self._working, self._resting = False, True
                self._needed.clear()
                _log.info("%s: unused for %g s: the worker ends until the next request", self.slug, self._idle_s)
                self._worker.send(Stop())
                await self._worker.wait(self.bounds.command_s)

    def _is_idle(self) -> bool:
        is_unused = time.monotonic() - self._used_at >= self._idle_s
        if self.order.is_shared:  # it applies the records of other nodes
            return False
        return is_unused and not (self._queue.turns or self._queue.sent or self._queue.waiting or self._stopping)

    async def _start_worker(self) -> None:
        """Start a worker, with the unanswered requests of its predecessor."""
        self._worker_ended = asyncio.Event()
        self._ready = asyncio.get_running_loop().create_future()
        command = (*self._worker_command, *await self.order.prepare())
        ended = partial(self.order.pass_on, self._ended)
        self._worker = await WorkerProcess.start(
            self.slug,
            self.paths,
            self._writer_lock,
            on_message=self._received,
            on_end=ended,
            command=command,
            start_child=self._start_child,
        )
        ready = await asyncio.wait_for(asyncio.shield(self._ready), self.bounds.upkeep_s)
        for note in ready.notes:
            _log.info("%s: %s", self.slug, note)
        self.lattice_version = ready.lattice_version
        await self.history.resume(ready)
        self._ready = None  # it holds every file
        if self._worker_ended.is_set():
            raise StorageError("it ended as soon as it was ready")
        self._working, self._failure = True, None
        _log.info("%s: open at change %d, worker pid %d", self.slug, self.history.head, self._worker.pid)
        if self._disproved_epoch != self.history.epoch:  # else it is open once the worker has started a new epoch
            self._open.set()
        self.order.opened(ready)
        self._reconcile()
        self._pump()
        self._queue.waiting.wake_each_first()  # the last worker's changes may have freed their resources

    def _epoch_started(self, ready: Ready) -> None:
        asked = self._queue.sent and isinstance(self._queue.sent[0].message, NewEpoch)
        assert asked, "a worker says Ready once at its start, and for a new epoch"
        self._settled()
        self.history.begin(ready, "the server's files were rolled back; reconnect at once")
        self._open.set()
        self._pump()

    def _ended(self) -> None:
        """Queue an ended worker's requests again, first and in order."""
        sent, unanswered = len(self._queue.sent), self._queue.worker_ended()
        if len(unanswered) < sent:
            self._reconciling = False  # the next worker looks at the whole tree when it starts
        self._idle.set()
        self._worker_ended.set()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(StorageError("it ended before it was ready"))
            self._ready.exception()  # marks it as retrieved: at a stop no caller waits
        self._ready, self._working = None, False
        if self._failure is not None:
            self._queue.clear()
        if self._stopping or self._failure is not None or not self.order.is_owner:
            return
        if self._resting:
            return
        if unanswered and isinstance(unanswered[0].message, ImportProject):
            _log.info("%s: the worker restarts to put a pushed project in place", self.slug)
        else:
            _log.error("%s: the worker ended; %d requests are sent again", self.slug, len(unanswered))
        if len(unanswered) == 1:
            unanswered[0].deaths += 1
            if unanswered[0].deaths > 1:
                self._abandon(unanswered[0], "the command crashed the server's worker twice and was undone")

    def _abandon(self, job: QueuedRequest, why: str) -> None:
        """Have the next worker reply from the journal or refuse; only the files decide which (I6)."""
        match job.message:
            case RunCommand() | RunCall() | Edit() | ImportProject() as message:
                job.message = AbandonRequest(message.id, message.token_id, "REMOTE_FAILED", why)
            case AbandonRequest() | Reconcile():
                pass
            case _:
                self.fail(
                    f"the server's worker for project {self.slug} fails in its upkeep; see the server's log",
                    for_good=True,
                )

    def fail(self, message: str, *, for_good: bool = False) -> None:
        """Close the project. Requests in flight get no reply: their outcome is unknown."""
        self._failed_for_good |= for_good
        if self._failure is not None:
            return
        _log.critical("%s: %s", self.slug, message)
        self._failure = StorageError(message)
        self._working = False
        self._reconciling = False
        self._open.set()
        self.dismiss(Bye("REMOTE_STORAGE", message, 5.0))
        self._queue.clear()

    def _overdue(self, job: QueuedRequest) -> None:
        if self._worker is None:
            return
        _log.error("%s: the worker took too long over %s", self.slug, type(job.message).__name__)
        self._abandon(job, f"the command took longer than {self.bounds.command_s:g} s and was undone")
        self._worker.kill()


def stopping() -> Rejected:
    return Rejected("the server is stopping or closing this project; try again", code="REMOTE_SHUTDOWN")
