"""Group commit: a thread that fsyncs the journal, then sends what depends on it (I2)."""

import contextlib
import logging
import os
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from lattice_remote.server.ipc import RequestDone, ToServer, WorkerFailed, encode_frames
from lattice_remote.server.tree.tree import sync

__all__ = ["CommitJob", "Committer"]

_log = logging.getLogger(__name__)
_MAX_DELAY_S = 0.005


@dataclass(frozen=True)
class CommitJob:
    """Fsync ``descriptor``, then call ``then``, then send ``message``."""

    message: ToServer | None = None
    descriptor: int | None = None
    then: Callable[[], None] | None = None


class Committer:
    """Thread that commits jobs in order; a batch costs one fsync per journal file.

    Jobs are committed after ``flush``, or at most ``_MAX_DELAY_S`` after ``flush_soon``. When the storage fails it
    sends ``WorkerFailed`` and ends the process: later jobs are never acknowledged.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._jobs: deque[CommitJob] = deque()
        self._delays: queue.SimpleQueue[float | None] = queue.SimpleQueue()  # until the next batch; None: the last
        self._is_delayed = False
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
        self._thread.start()

    def submit(self, job: CommitJob) -> None:
        self._jobs.append(job)

    @property
    def waiting(self) -> int:
        """Number of jobs that are not being committed."""
        return len(self._jobs)

    def flush(self) -> None:
        """Commit all jobs as soon as the running batch is done."""
        self._delays.put(0.0)

    def flush_soon(self) -> None:
        """Commit all jobs even if ``flush`` is not called soon."""
        if not self._is_delayed:
            self._is_delayed = True
            self._delays.put(_MAX_DELAY_S)

    def finish(self) -> None:
        """Finish all jobs and end the thread."""
        self._delays.put(None)
        self._thread.join()

    def wait(self) -> None:
        """Wait for every job submitted so far."""
        done = threading.Event()
        self.submit(CommitJob(then=done.set))
        self.flush()
        done.wait()

    def _run(self) -> None:
        try:
            while self._run_batch():
                pass
        except Exception as error:  # noqa: BLE001 - after any error nothing may be acknowledged
            _log.exception("cannot write the journal")
            self._send([WorkerFailed(f"cannot write the journal: {error}")])
            os._exit(1)

    def _run_batch(self) -> bool:
        """Run all jobs once they are due; return False after the last."""
        delay = self._delays.get()
        with contextlib.suppress(queue.Empty):
            while delay:
                delay = self._delays.get(timeout=delay)
        self._is_delayed = False  # before the jobs are taken: a later one is either taken too or asks again
        self._commit([self._jobs.popleft() for _ in range(len(self._jobs))])
        return delay is not None

    def _commit(self, jobs: list[CommitJob]) -> None:
        began = time.perf_counter()
        descriptors = dict.fromkeys(job.descriptor for job in jobs if job.descriptor is not None)
        for descriptor in descriptors:
            sync(descriptor)
        synced_s = time.perf_counter() - began if descriptors else None
        for job in jobs:
            if job.then is not None:
                job.then()
        messages = [job.message for job in jobs if job.message is not None]
        if messages:
            self._send(messages if synced_s is None else _with_sync_time(messages, synced_s))

    def _send(self, messages: list[ToServer]) -> None:
        # The server may be gone: the commits are durable, and the main thread is about to notice.
        with contextlib.suppress(OSError):
            self._connection.sendall(encode_frames(*messages))


def _with_sync_time(messages: list[ToServer], synced_s: float) -> list[ToServer]:
    for number, message in enumerate(messages):
        if isinstance(message, RequestDone):
            timed = msgspec.structs.replace(message, synced_s=synced_s)
            return [*messages[:number], timed, *messages[number + 1 :]]
    return messages
