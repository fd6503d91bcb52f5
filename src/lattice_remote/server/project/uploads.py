"""Takes what clients upload to one project: in a thread of its own, so that no disk delays the event loop.

Pieces are carried out in the order in which they come. What waits for that thread is bounded; who sends faster than
the disk takes it is told to slow down.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from lattice_remote.errors import Rejected
from lattice_remote.protocol.codec import encode
from lattice_remote.protocol.messages import Refused, Upload, Uploaded
from lattice_remote.server.data.datadir import ProjectPaths
from lattice_remote.server.data.settings import Limits
from lattice_remote.server.project.history import Follower
from lattice_remote.server.project.staging import Staging

__all__ = ["Uploads"]

_WAITING_BYTES_PER_TOKEN = 16 * 1024 * 1024
_WAITING_BYTES = 64 * 1024 * 1024
_FRAME_BYTES = 512
"""What a piece takes beside its data."""

_log = logging.getLogger(__name__)


class Uploads:
    """See the module's text. All methods belong to the event loop's thread; ``close()`` it in the end."""

    def __init__(self, paths: ProjectPaths, limits: Limits, refused: Callable[[str], None] = lambda _: None) -> None:
        """``refused`` is called with the code of each refusal."""
        self._refused = refused
        self._staging = Staging(paths, limits)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="uploads")
        self._waiting: Counter[str] = Counter()  # bytes with the thread, by token
        self._closed = False

    def take(self, frame: Upload, token_id: str, asker: Follower) -> None:
        """Take a piece; ``asker.answer()`` is called when it is on its way to the disk, or refused."""
        weight = len(frame.data) + _FRAME_BYTES
        waits_too_much = self._waiting[token_id] + weight > _WAITING_BYTES_PER_TOKEN
        if self._closed or waits_too_much or self._waiting.total() + weight > _WAITING_BYTES:
            why = "more is uploaded with this token than the server's disk takes now; try again"
            self._refused("REMOTE_BUSY")
            asker.answer(frame.id, encode(Refused(frame.id, "REMOTE_BUSY", why)))
            return
        self._waiting[token_id] += weight
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._taken, frame, token_id)

        def finish(done: "asyncio.Future[Uploaded | Refused]") -> None:
            self._waiting[token_id] -= weight
            if not self._waiting[token_id]:
                del self._waiting[token_id]
            if not done.cancelled():
                if isinstance(answer := done.result(), Refused):
                    self._refused(answer.code)
                asker.answer(frame.id, encode(answer))

        work.add_done_callback(finish)

    def used(self, token_id: str, digest: bytes) -> None:
        """A request has taken this content for good."""
        self._do(self._staging.used, token_id, digest)

    def sweep(self) -> None:
        """Remove what has expired; call it now and then."""
        self._do(self._staging.sweep)

    def close(self) -> None:
        """Take no more. What is with the thread is done; what is not whole goes on after the next start."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _do(self, work: object, *arguments: object) -> None:
        if not self._closed:
            self._thread.submit(_quietly, work, *arguments)

    def _taken(self, frame: Upload, token_id: str) -> Uploaded | Refused:
        try:
            return Uploaded(frame.id, self._staging.take(frame, token_id))
        except Rejected as rejected:
            return Refused(frame.id, rejected.code, rejected.message)
        except OSError as error:
            _log.warning("an upload could not be written: %s", error)
            return Refused(frame.id, "REMOTE_STORAGE", f"the server can't write what was sent: {error.strerror}")


def _quietly(work: object, *arguments: object) -> None:
    """Do what nobody waits for; a disk that fails says so to the next upload."""
    assert callable(work), "one of the staging's methods"
    with contextlib.suppress(OSError):
        work(*arguments)
