"""Uploads of one project: staged contents, written in a thread so that no disk access delays the event loop.

Pieces are written in order of arrival. The bytes waiting for the thread are bounded; more are refused as busy.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from lattice_remote.errors import Rejected, RemoteError
from lattice_remote.files import READ, SAFE, hash_descriptor, write_all
from lattice_remote.protocol.messages import (
    MIN_PIECE_BYTES,
    Bye,
    Push,
    Pushed,
    Refused,
    Upload,
    Uploaded,
    decode_server_frame,
    encode,
)
from lattice_remote.server.config import Config, LimitSettings
from lattice_remote.server.datadir import ProjectPaths
from lattice_remote.server.ipc import ImportProject
from lattice_remote.server.project.bundle_check import ImportReport, quarantine
from lattice_remote.server.project.queue import Requester
from lattice_remote.server.tokens import Token

__all__ = ["EXPIRE_S", "Pushes", "Staging", "Uploads"]

EXPIRE_S = 24 * 3600.0
"""Since the last piece or use."""
_IDLE_S = 600.0
"""Then incomplete content makes room for another upload of its token."""
_SYNC_BYTES = 8 * 1024 * 1024
"""Between fsyncs, so that a command's own fsync never has to flush more."""
_SETTLED_NS = 1_000_000_000
_NAME = re.compile(r"([0-9a-f]{16})-[0-9a-f]{64}(\.part)?")
_NEW_FILE_MODE = 0o644
"""Before the umask; ``attach`` copies it."""


@dataclass(slots=True)
class _Content:
    owner: str
    size: int
    """Final size; after a restart the current one, until the client repeats it."""
    have: int
    is_whole: bool
    used_at: float
    """Since 1970."""
    is_admitted: bool = False
    """Its size was checked since the start."""
    unsynced: int = 0
    hasher: "hashlib._Hash | None" = field(default=None, repr=False)
    """None after a restart."""


class Staging:
    """Staged contents on disk. Blocking, for one thread; raises OSError."""

    def __init__(self, paths: ProjectPaths, limits: LimitSettings) -> None:
        self._paths = paths
        self._limits = limits
        self._most = {"attachment": limits.attachment_bytes, "project": limits.project_bytes}
        self._contents: dict[str, _Content] | None = None  # by file name, without .part; None before the first scan

    def take(self, frame: Upload, token_id: str) -> int:
        """Append a piece if it is the next; return the number of bytes present. Complete content survives a power cut.

        Raises Rejected, and removes the content, if it is over a limit, or its digest differs; OSError.
        """
        name = self._paths.upload(token_id, frame.digest).name
        content = self._admitted(frame, name)
        is_question = not frame.data and content.have < content.size
        if content.is_whole or is_question or frame.offset != content.have:
            return content.have  # a query, a repeated piece, or one out of order
        try:
            self._add(frame, name, content)
        except BaseException:
            self._remove(name)
            raise
        return content.have

    def used(self, token_id: str, digest: bytes) -> None:
        name = self._paths.upload(token_id, digest).name
        if name in self._known():
            self._remove(name)

    def sweep(self) -> None:
        now = time.time()
        for name, content in list(self._known().items()):
            if now - content.used_at > EXPIRE_S:
                self._remove(name)

    def _admitted(self, frame: Upload, name: str) -> _Content:
        """Return the content of a piece, registering it if new. Raises Rejected: too large, no room, another size than
        before.
        """
        contents = self._known()
        content = contents.get(name)
        if content is None:
            owner = name.partition("-")[0]
            content = _Content(owner, 0, 0, is_whole=False, used_at=time.time(), hasher=hashlib.sha256())
        if (content.is_admitted or content.is_whole) and content.size != frame.size:
            raise Rejected(f"this content was announced with {content.size} bytes", code="REMOTE_PROTOCOL")
        if not content.is_admitted and not content.is_whole:
            self._require_fit(frame)
            self._make_room(content, name, frame.size)
            content.size, content.is_admitted = frame.size, True
            contents[name] = content
        return content

    def _require_fit(self, frame: Upload) -> None:
        most = self._most.get(frame.purpose)
        if most is None:
            raise Rejected(f"unknown purpose of an upload: {frame.purpose[:40]!r}", code="REMOTE_UNSUPPORTED")
        if frame.size > most:
            raise Rejected(
                f"{frame.size} bytes are more than this server takes, which is {most} ({frame.purpose}_bytes in its "
                "config.json)",
                code="REMOTE_TOO_LARGE",
            )

    def _make_room(self, content: _Content, name: str, size: int) -> None:
        self.sweep()
        limits, others = self._limits, {other: one for other, one in self._known().items() if other != name}
        own = {other: one for other, one in others.items() if one.owner == content.owner}
        idle_at = time.time() - _IDLE_S
        idle = sorted((one.used_at, other) for other, one in own.items() if not one.is_whole and one.used_at < idle_at)
        while len(own) >= limits.uploads_per_token or _bytes_of(own) + size > limits.upload_bytes_per_token:
            if not idle:
                raise Rejected(
                    f"{len(own)} uploads of {_bytes_of(own)} bytes with this token are not used yet: end those, or "
                    "wait a day until they expire",
                    code="REMOTE_BUSY",
                )
            _, oldest = idle.pop(0)
            self._remove(oldest)
            del own[oldest], others[oldest]
        if _bytes_of(others) + size > limits.upload_bytes:
            raise Rejected("the server holds too many uploads of this project; try again later", code="REMOTE_BUSY")

    def _known(self) -> dict[str, _Content]:
        """Return the staged contents, at first by scanning the directory."""
        if self._contents is None:
            self._paths.uploads.mkdir(mode=0o700, exist_ok=True)
            with self._directory() as directory:
                self._contents = dict(_found(directory))
            self.sweep()
        return self._contents

    @contextlib.contextmanager
    def _directory(self) -> Iterator[int]:
        descriptor = os.open(self._paths.uploads, READ | os.O_DIRECTORY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[tuple[int, int]]:
        flags = os.O_RDWR | os.O_CREAT | SAFE
        with self._directory() as directory:
            descriptor = os.open(f"{name}.part", flags, _NEW_FILE_MODE, dir_fd=directory)
            try:
                yield directory, descriptor
            finally:
                os.close(descriptor)

    def _add(self, frame: Upload, name: str, content: _Content) -> None:
        end = frame.offset + len(frame.data)
        if end > frame.size or (end < frame.size and len(frame.data) < MIN_PIECE_BYTES):
            raise Rejected(
                f"a piece of {len(frame.data)} bytes does not fit at offset {frame.offset}", code="REMOTE_PROTOCOL"
            )
        with self._opened(name) as (directory, descriptor):
            if content.hasher is None:
                _, content.hasher = hash_descriptor(
                    descriptor, content.have
                )  # missing bytes fail the final digest check
            write_all(descriptor, frame.data, frame.offset)
            content.hasher.update(frame.data)
            content.have, content.used_at = end, time.time()
            content.unsynced += len(frame.data)
            if end == frame.size:
                self._finish(frame, name, content, (directory, descriptor))
            elif content.unsynced >= _SYNC_BYTES:
                os.fsync(descriptor)
                content.unsynced = 0

    def _finish(self, frame: Upload, name: str, content: _Content, opened: tuple[int, int]) -> None:
        directory, descriptor = opened
        assert content.hasher is not None, "it has seen every piece"
        if content.hasher.digest() != frame.digest:
            raise Rejected("the uploaded content does not match its digest", code="REMOTE_PROTOCOL")
        # A recently written file may change again within the same mtime, and the worker would read it again. This one
        # is complete: it gets an older mtime.
        before = time.time_ns() - _SETTLED_NS
        os.utime(descriptor, ns=(before, before))
        os.fsync(descriptor)
        os.rename(f"{name}.part", name, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)
        content.is_whole, content.hasher = True, None

    def _remove(self, name: str) -> None:
        self._known().pop(name, None)
        with self._directory() as directory:
            for one in (name, f"{name}.part"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(one, dir_fd=directory)


def _bytes_of(contents: Mapping[str, _Content]) -> int:
    return sum(content.size for content in contents.values())


def _found(directory: int) -> Iterator[tuple[str, _Content]]:
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        matched = _NAME.fullmatch(entry.name)
        if matched is None or not entry.is_file(follow_symlinks=False):
            with contextlib.suppress(OSError):  # a foreign directory
                os.unlink(entry.name, dir_fd=directory)
            continue
        status = entry.stat(follow_symlinks=False)
        is_whole = matched[2] is None
        name = entry.name.removesuffix(".part")
        yield name, _Content(matched[1], status.st_size, status.st_size, is_whole, status.st_mtime)


_WAITING_BYTES_PER_TOKEN = 16 * 1024 * 1024
_WAITING_BYTES = 64 * 1024 * 1024
_FRAME_BYTES = 512

_log = logging.getLogger(__name__)


class Uploads:
    """Uploads of one project, in the event loop's thread; ``refused`` gets the code of each refusal."""

    def __init__(
        self, paths: ProjectPaths, limits: LimitSettings, refused: Callable[[str], None] = lambda _: None
    ) -> None:
        self._refused = refused
        self._staging = Staging(paths, limits)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="uploads")
        self._waiting: Counter[str] = Counter()  # bytes with the thread, by token
        self._closed = False

    def take(self, frame: Upload, token_id: str, requester: Requester) -> None:
        """Queue a piece; ``requester.answer()`` follows."""
        weight = len(frame.data) + _FRAME_BYTES
        waits_too_much = self._waiting[token_id] + weight > _WAITING_BYTES_PER_TOKEN
        if self._closed or waits_too_much or self._waiting.total() + weight > _WAITING_BYTES:
            why = "the server's disk cannot keep up with the uploads of this token; try again"
            self._refused("REMOTE_BUSY")
            requester.answer(frame.id, encode(Refused(frame.id, "REMOTE_BUSY", why)))
            return
        self._waiting[token_id] += weight
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._store_piece, frame, token_id)

        def finish(done: "asyncio.Future[Uploaded | Refused]") -> None:
            self._waiting[token_id] -= weight
            if not self._waiting[token_id]:
                del self._waiting[token_id]
            if not done.cancelled():
                if isinstance(answer := done.result(), Refused):
                    self._refused(answer.code)
                requester.answer(frame.id, encode(answer))

        work.add_done_callback(finish)

    def used(self, token_id: str, digest: bytes) -> None:
        self._do(lambda: self._staging.used(token_id, digest))

    def sweep(self) -> None:
        self._do(self._staging.sweep)

    def close(self) -> None:
        """Accept no more; queued pieces are finished."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _do(self, work: Callable[[], None]) -> None:
        """Run work; a failing disk is reported to the next upload."""

        def ignoring_os_errors() -> None:
            with contextlib.suppress(OSError):
                work()

        if not self._closed:
            self._thread.submit(ignoring_os_errors)

    def _store_piece(self, frame: Upload, token_id: str) -> Uploaded | Refused:
        try:
            return Uploaded(frame.id, self._staging.take(frame, token_id))
        except Rejected as rejected:
            return Refused(frame.id, rejected.code, rejected.message)
        except OSError as error:
            _log.warning("cannot write an upload: %s", error)
            return Refused(frame.id, "REMOTE_STORAGE", f"the server cannot write the upload: {error.strerror}")


_MAX_UNDER_WAY = 8
Submit = Callable[[ImportProject, Requester], None]


@dataclass(slots=True)
class _Push:
    frame: Push
    token: Token
    requesters: list[Requester] = field(default_factory=list)
    """Of a refusal by the check."""
    task: "asyncio.Task[None] | None" = None
    request: ImportProject | None = None
    """Once the check has passed; repeated pushes join it."""


class Pushes:
    """Pushes in progress: whole projects in uploaded bundles. ``close()`` it.

        requested --> checked in isolation --refused--> answered
                                           --passed---> replaces the project in the worker --> answered

    The worker decides whether the project is empty and whether the request was already done (I1, I6).

    ``refused`` gets the code of each refusal.
    """

    def __init__(
        self,
        paths: ProjectPaths,
        config: Config,
        uploads: Uploads,
        submit: Submit,
        refused: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._refused = refused
        self._paths = paths
        self._config = config
        self._uploads = uploads
        self._submit = submit
        self._under_way: dict[str, _Push] = {}
        self._one_at_a_time = asyncio.Lock()
        self._is_clean = False  # leftovers of an earlier server were removed

    def take(
        self, frame: Push, token: Token, first_sent_at: float | None, used: str | None, requester: Requester
    ) -> None:
        """Start or join a push; ``requester.answer()`` follows.

        ``used`` is the project's first sign of use.
        """
        push = self._under_way.get(frame.id)
        if push is not None and push.token.id != token.id:
            self._refuse(requester, frame.id, "REMOTE_FORBIDDEN", "this request id belongs to another token")
        elif push is not None and push.frame.digest != frame.digest:
            why = "another project is being pushed with this request id: use a new one"
            self._refuse(requester, frame.id, "REMOTE_INVALID", why)
        elif push is not None and push.request is not None:
            self._submit(push.request, requester)
        elif push is not None:
            push.requesters.append(requester)
        elif used is not None or not self._has_bundle(frame, token):
            # It may have been done before: the worker decides.
            request = ImportProject(
                frame.id, token.id, token.actor, first_sent_at=first_sent_at, fingerprint=_fingerprint(frame)
            )
            self._submit(request, requester)
        elif sum(push.request is None for push in self._under_way.values()) >= _MAX_UNDER_WAY:
            self._refuse(requester, frame.id, "REMOTE_BUSY", "the server is checking other projects; try again later")
        else:
            push = self._under_way[frame.id] = _Push(frame, token, [requester])
            push.task = asyncio.get_running_loop().create_task(self._check(push, first_sent_at), name="push")

    def forget(self, requester: Requester) -> None:
        """Remove a closed connection; its pushes continue."""
        for push in self._under_way.values():
            if requester in push.requesters:
                push.requesters.remove(requester)

    async def close(self) -> None:
        tasks = [push.task for push in self._under_way.values() if push.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _has_bundle(self, frame: Push, token: Token) -> bool:
        try:
            return os.stat(self._paths.upload(token.id, frame.digest), follow_symlinks=False).st_size == frame.size
        except OSError:
            return False

    async def _check(self, push: _Push, first_sent_at: float | None) -> None:
        frame, token, place = push.frame, push.token, self._paths.incoming / push.frame.id
        code, why = "REMOTE_UNSUPPORTED", ""
        try:
            report = await self._checked(frame, token, place)
            if report.refused:  # the same bundle would be refused again
                self._uploads.used(token.id, frame.digest)
                why = f"the server refused this project: {report.refused}"
        except RemoteError as error:
            code, why = error.code, error.message
        except OSError as error:
            code, why = "REMOTE_STORAGE", f"the server cannot store the project: {error.strerror}"
        except Exception:  # noqa: BLE001 - the client must get a reply
            _log.exception("%s: cannot check a push", self._paths.root.name)
            code, why = "REMOTE_FAILED", "the server failed to check the project; see the server's log"
        if why:
            del self._under_way[frame.id]
            _log.info("%s: a push of %s was refused: %s", self._paths.root.name, token.actor, why)
            for requester in push.requesters:
                self._refuse(requester, frame.id, code, why)
            return
        push.request = ImportProject(
            frame.id,
            token.id,
            token.actor,
            f"{self._paths.incoming.name}/{frame.id}",
            report.tasks,
            report.archived,
            report.files,
            report.notes(),
            first_sent_at,
            _fingerprint(frame),
        )
        for requester in (_Cleaner(lambda reply: self._settled(push, place, reply)), *push.requesters):
            self._submit(push.request, requester)

    def _refuse(self, requester: Requester, request_id: str, code: str, message: str) -> None:
        self._refused(code)
        requester.answer(request_id, encode(Refused(request_id, code, message[:4096])))

    def _settled(self, push: _Push, place: Path, reply: bytes) -> None:
        """Remove the candidate, if it is still there, and the bundle of an accepted one."""
        self._under_way.pop(push.frame.id, None)
        if place.exists():
            asyncio.get_running_loop().run_in_executor(None, lambda: shutil.rmtree(place, ignore_errors=True))
        if isinstance(decode_server_frame(reply), Pushed):
            self._uploads.used(push.token.id, push.frame.digest)

    async def _checked(self, frame: Push, token: Token, place: Path) -> ImportReport:
        async with self._one_at_a_time:
            if not self._is_clean:
                await asyncio.to_thread(shutil.rmtree, self._paths.incoming, ignore_errors=True)
                self._is_clean = True
            return await quarantine(
                place,
                ["--pack", self._paths.upload(token.id, frame.digest)],
                max_bytes=self._config.limits.project_bytes,
                keep_hooks=self._config.pushed_hooks,
                hooks_of=self._paths.lattice / "config.json",
            )


def _fingerprint(frame: Push) -> bytes:
    return frame.digest[:16]


class _Cleaner:
    """Requester that runs a cleanup after the reply, since clients may be gone by then."""

    def __init__(self, settled: Callable[[bytes], None]) -> None:
        self._settled = settled

    @property
    def fairness_key(self) -> Hashable:
        return self

    def answer(self, request_id: str, reply: bytes) -> None:
        del request_id
        self._settled(reply)

    def end(self, bye: Bye) -> None: ...
