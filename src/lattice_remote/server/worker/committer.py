"""The thread that makes commits durable, many with one fsync, and only then lets them be known (I2).

The worker's main thread goes on with the next command meanwhile: that is what makes one writer fast.
"""

import contextlib
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from lattice_remote.server.data.ipc import Done, Failed, ToServer
from lattice_remote.server.tree.manifest import sync

__all__ = ["Committer", "Job"]

_log = logging.getLogger(__name__)
_encoder = msgspec.msgpack.Encoder()


@dataclass(frozen=True)
class Job:
    """What is to happen: fsync ``descriptor``, then run ``then``, then send ``message``."""

    message: ToServer | None = None
    descriptor: int | None = None
    then: Callable[[], None] | None = None


class Committer:
    """Takes jobs in order; a batch of them costs one fsync per journal file.

    When the storage fails it says ``Failed`` and ends the process at once: whatever is not acknowledged by then
    never will be, and the next start goes by what is really on disk.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Add a job; returns at once."""
        self._jobs.put(job)

    def finish(self) -> None:
        """Return when every job is done. The committer can't be used afterwards."""
        self._jobs.put(None)
        self._thread.join()

    def wait(self) -> None:
        """Return when every job submitted so far is done."""
        done = threading.Event()
        self.submit(Job(then=done.set))
        done.wait()

    def _run(self) -> None:
        try:
            while self._run_batch():
                pass
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing may be acknowledged any more
            _log.exception("the journal can't be written")
            self._send([Failed(f"the journal can't be written: {error}")])
            os._exit(1)

    def _run_batch(self) -> bool:
        """Do all that is waiting; return False when there will be no more."""
        batch = [self._jobs.get()]
        while not self._jobs.empty():
            batch.append(self._jobs.get())
        jobs = [job for job in batch if job is not None]
        began = time.perf_counter()
        descriptors = dict.fromkeys(job.descriptor for job in jobs if job.descriptor is not None)
        for descriptor in descriptors:
            sync(descriptor)
        synced_s = time.perf_counter() - began if descriptors else None
        for job in jobs:
            if job.then is not None:
                job.then()
        messages = [job.message for job in jobs if job.message is not None]
        self._send(messages if synced_s is None else _telling(messages, synced_s))
        return len(jobs) == len(batch)

    def _send(self, messages: list[ToServer]) -> None:
        buffer = bytearray()
        for message in messages:
            data = _encoder.encode(message)
            buffer += len(data).to_bytes(4) + data
        # The server may be gone; what was committed is on disk, and the main thread is about to notice.
        with contextlib.suppress(OSError):
            self._connection.sendall(buffer)


def _telling(messages: list[ToServer], synced_s: float) -> list[ToServer]:
    """Have the first outcome say how long the fsync took."""
    for number, message in enumerate(messages):
        if isinstance(message, Done):
            told = msgspec.structs.replace(message, synced_s=synced_s)
            return [*messages[:number], told, *messages[number + 1 :]]
    return messages
