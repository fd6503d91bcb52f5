"""Forwarding of writes to the node that orders a project's changes, its owner.

A node that is not the owner queues its clients' requests in turns, like ``project.queue``, and sends them over one
WebSocket to the owner. The owner submits them to its own project. An answer reaches its requester once the local
history holds the change that it names, so no reply overtakes its change (SPEC: Reply).

After a lost connection, or with another owner, unanswered requests are sent again in their order, with their age. They
run once (I6). The content of an upload is sent before a request that names it. Only later requests of the same
fairness key wait for that (I10).
"""

import asyncio
import contextlib
import heapq
import itertools
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import msgspec
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from lattice_remote.errors import ConnectionFailed, ProtocolError, RemoteError
from lattice_remote.files import READ
from lattice_remote.protocol.messages import (
    MAX_PIECE_BYTES,
    Attachment,
    Bye,
    Refused,
    Upload,
    Uploaded,
    decode_server_frame,
    encode,
)
from lattice_remote.server.cluster.peer_access import PeerAccess
from lattice_remote.server.ipc import Edit, ImportProject, RunCall, RunCommand
from lattice_remote.server.project.metrics import OutcomeListener, RequestOutcome
from lattice_remote.server.project.project import Project
from lattice_remote.server.project.queue import (
    QueuedRequest,
    Requester,
    RequestQueue,
    refusal_to_join,
)

__all__ = [
    "Accepted",
    "Answer",
    "Forget",
    "ForwardedRequest",
    "Forwarder",
    "FromOwner",
    "NotOwner",
    "Piece",
    "Submit",
    "ToOwner",
    "Withdraw",
    "decode_from_owner",
    "decode_to_owner",
    "encode_message",
]

ForwardedRequest = RunCommand | RunCall | Edit | ImportProject
"""A push only if its project is no longer here: the owner may have done it."""


class _Message(msgspec.Struct, frozen=True, tag_field="type"):
    pass


class Submit(_Message, frozen=True, tag="submit"):
    """Run a request. ``age_s`` is the time since it was first sent, None if it was never sent before."""

    request: ForwardedRequest
    age_s: float | None = None


class Piece(_Message, frozen=True, tag="piece"):
    """A piece of an upload of this token."""

    upload: Upload
    token_id: str


class Forget(_Message, frozen=True, tag="forget"):
    """No requester waits any longer: end a wait for a resource. No answer follows."""

    id: str


class Withdraw(_Message, frozen=True, tag="withdraw"):
    """Withdraw a request of a revoked token if it has not had an effect."""

    id: str
    code: str


class Accepted(_Message, frozen=True, tag="accepted"):
    """This node is the owner: requests may follow."""


class NotOwner(_Message, frozen=True, tag="not-owner"):
    """This node is not, or no longer, the owner; unanswered requests get no answer."""


class Answer(_Message, frozen=True, tag="answer"):
    """The reply to a request or a piece; a request's is valid from change ``seq`` of ``epoch``."""

    id: str
    reply: bytes
    epoch: str = ""
    seq: int = 0
    outcome: RequestOutcome | None = None


ToOwner = Submit | Piece | Forget | Withdraw
FromOwner = Accepted | NotOwner | Answer

_to_owner: msgspec.msgpack.Decoder[ToOwner] = msgspec.msgpack.Decoder(ToOwner)
_from_owner: msgspec.msgpack.Decoder[FromOwner] = msgspec.msgpack.Decoder(FromOwner)
_encoder = msgspec.msgpack.Encoder()


def encode_message(message: ToOwner | FromOwner) -> bytes:
    return _encoder.encode(message)


def decode_to_owner(data: str | bytes) -> ToOwner:
    """Return a message for the owner. Raises ProtocolError."""
    return _decode(_to_owner, data)


def decode_from_owner(data: str | bytes) -> FromOwner:
    """Return a message of the owner. Raises ProtocolError."""
    return _decode(_from_owner, data)


def _decode[T](decoder: "msgspec.msgpack.Decoder[T]", data: str | bytes) -> T:
    if isinstance(data, str):
        raise ProtocolError("received a text message; frames are binary")
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"invalid message of a node: {error}") from error


_DELAYS_S = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Between attempts to reach one owner."""
_PATIENCE_S = 30.0
"""Time without a connection to an owner after which a request is refused."""
_CHECK_S = 1.0
_CLOSE_S = 0.3
"""For the owner's close frame; then the connection is aborted."""
_HELD_BYTES = 64 * 1024 * 1024
"""Answers that wait for their change; then no further ones are read."""
_NO_OWNER = "no node of the cluster leads this project now; try again"

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Link:
    """A connection to the owner."""

    socket: ClientConnection
    work: asyncio.Event = field(default_factory=asyncio.Event)
    control: deque[Forget | Withdraw] = field(default_factory=deque)
    pieces: dict[str, asyncio.Future[bytes]] = field(default_factory=dict)
    """Replies to pieces of uploads, by id."""
    ready: deque[QueuedRequest] = field(default_factory=deque)
    """Their uploads are complete."""
    uploading: dict[Hashable, deque[QueuedRequest]] = field(default_factory=dict)
    """Requests behind one whose upload is under way, by fairness key."""
    one_upload: asyncio.Lock = field(default_factory=asyncio.Lock)


class Forwarder:
    """Requests of this node's clients for the owner of one project. Belongs to the event loop's thread.

    ``close()`` it. ``project`` is the local one: its history, uploads and log are used, not its queue.
    """

    def __init__(
        self,
        project: Project,
        access: PeerAccess,
        *,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self._project = project
        self._access = access
        self._patience_s = patience_s
        self._queue = RequestQueue(project.bounds, ready=self._wake, overdue=lambda _: None)
        self._taken: dict[str, QueuedRequest] = {}  # for the present link, in the order taken; not yet answered
        self._sent_at: dict[str, float] = {}  # first time, monotonic
        self._held = _HeldAnswers(project)
        self._released = asyncio.Event()
        self._url: str | None = None
        self._task: asyncio.Task[None] | None = None
        self._link: _Link | None = None
        self._again = asyncio.Event()  # try to connect now
        self._alone_since = time.monotonic()
        self._patience: asyncio.TimerHandle | None = None
        self.obstacle = ""
        """Why this node cannot become the owner, if it has tried."""
        project.history.join(self)

    # --- requests, as in Project ---

    def submit(self, message: ForwardedRequest, requester: Requester, on_result: OutcomeListener | None = None) -> None:
        """Queue a request. Calls ``requester.answer()`` exactly once, possibly before returning.

        A duplicate id joins the running request (I6). ``on_result`` is called just before the reply, if the owner
        reports an outcome; the owner writes the log line.
        """
        job = self._queue.get(message.id)
        if job is not None:
            if (refusal := refusal_to_join(job, message)) is not None:
                self.refuse(requester, message, on_result, *refusal)
            elif requester not in job.requesters:
                job.requesters.append(requester)
            return
        job = QueuedRequest(message, [requester], on_result=on_result)
        if (objection := self._queue.objection(job)) is not None:
            self.refuse(requester, message, on_result, "REMOTE_BUSY", objection)
            return
        self._queue.add(job)
        self._wake()
        self._watch()

    def forget(self, requester: Requester, request_ids: set[str]) -> None:
        """Remove a closed connection. Its requests continue, except waits for a resource."""
        for request_id in request_ids:
            job = self._queue.get(request_id)
            if job is not None and requester in job.requesters:
                job.requesters.remove(requester)
                if not job.requesters and request_id in self._taken:
                    self._forget(job)

    def withdraw(self, requester: Requester, request_id: str, code: str) -> bool:
        """Withdraw a request of a revoked token; return True if it never has an effect.

        False: an owner has or had it, and gets a request to withdraw it, or another connection also requests it.
        """
        job = self._queue.get(request_id)
        if job is None or job.requesters != [requester]:
            return False
        message = _request_of(job)
        if not self._is_unsent(job):
            if self._link is not None and request_id in self._taken:
                self._link.control.append(Withdraw(request_id, code))
                self._wake()
            return False
        self._queue.withdraw(job)
        self._project.request_log.refused(message, code, job.on_result)
        return True

    @property
    def held(self) -> int:
        """Number of answers that wait for their change."""
        return len(self._held)

    def requesters(self) -> list[Requester]:
        return self._queue.requesters()

    def hand_over(self, submit: Callable[[ForwardedRequest, Requester, OutcomeListener | None], None]) -> None:
        """Pass every unanswered request to ``submit``, for example of the local project once this node is the owner."""
        self.owner_is(None)
        while self._queue.turns:
            job = self._queue.turns.pop()
            self._queue.drop(job)
            age_s = self._age_of(job)
            message = _request_of(job)
            if age_s is not None:
                message = msgspec.structs.replace(message, first_sent_at=time.time() - age_s)
            for requester in job.requesters or [_Nobody()]:
                submit(message, requester, job.on_result)

    def refuse(
        self, requester: Requester, message: ForwardedRequest, on_result: OutcomeListener | None, code: str, why: str
    ) -> None:
        self._project.request_log.refused(message, code, on_result)
        requester.answer(message.id, encode(Refused(message.id, code, why)))

    def _is_unsent(self, job: QueuedRequest) -> bool:
        """Return whether no owner can know a request."""
        return job.state == "queued" and not job.suspect and _request_of(job).first_sent_at is None

    def _forget(self, job: QueuedRequest) -> None:
        """Drop a request with the owner that no requester waits for."""
        if job.id in self._sent_at:
            self._taken.pop(job.id, None)
            self._drop(job)
            if self._link is not None:
                self._link.control.append(Forget(job.id))
                self._wake()

    def _drop(self, job: QueuedRequest) -> None:
        self._queue.drop(job)
        self._sent_at.pop(job.id, None)

    def _age_of(self, job: QueuedRequest) -> float | None:
        """Return the seconds since a request was first sent, by a client that repeats it or by this node."""
        first, sent_at = _request_of(job).first_sent_at, self._sent_at.get(job.id)
        ages = [] if first is None else [time.time() - first]
        ages += [] if sent_at is None else [time.monotonic() - sent_at]
        return max(0.0, *ages) if ages else None

    # --- the owner ---

    def owner_is(self, url: str | None) -> None:
        """Send requests to this node from now on; None: there is no owner, or this node is."""
        self._again.set()
        if url == self._url and (self._task is None) == (url is None):
            return
        self._url = url
        self._stop_link()
        if url is not None:
            self._task = asyncio.get_running_loop().create_task(self._keep_link(url), name="forward")
        self._watch()

    async def close(self) -> None:
        """End the connection. The requests in flight get no reply."""
        self._project.history.leave(self)
        task, link = self._task, self._link
        self._stop_link()
        if self._patience is not None:
            self._patience.cancel()
        self._queue.clear()
        self._queue.close()
        self._held.clear()
        if task is not None:
            _, pending = await asyncio.wait({task}, timeout=_CLOSE_S)
            if pending and link is not None:
                link.socket.transport.abort()
                await asyncio.wait({task})

    def _stop_link(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._link_lost()

    def _link_lost(self) -> None:
        """Queue the unanswered requests again, first and in order."""
        if self._link is not None:
            self._alone_since = time.monotonic()
            for waiting in self._link.pieces.values():
                waiting.cancel()
        self._link = None
        for job in reversed(self._taken.values()):
            job.state, job.suspect = "queued", job.id in self._sent_at
            self._queue.turns.add_first(job)
        self._taken.clear()
        self._watch()

    async def _keep_link(self, url: str) -> None:
        """Keep a connection to one owner until cancelled."""
        task, failures, said = asyncio.current_task(), 0, ""
        while True:
            self._again.clear()
            try:
                began = time.monotonic()
                await self._use_link(await self._access.connect(url, f"/cluster/{self._project.slug}"))
            except* (RemoteError, ConnectionClosed) as group:
                why = str(_first(group))
                if why != said:
                    _log.info("%s: no connection to the node at %s: %s", self._project.slug, url, why)
                said = why
            except* Exception:  # noqa: BLE001 - the requests are sent again
                _log.exception("%s: unexpected failure of the connection to %s", self._project.slug, url)
            assert task is self._task, "a replaced task is cancelled"
            self._link_lost()
            failures = 0 if time.monotonic() - began > max(_DELAYS_S) else failures + 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DELAYS_S[min(failures, len(_DELAYS_S) - 1)]):
                    await self._again.wait()

    async def _use_link(self, socket: ClientConnection) -> None:
        """Send and receive until the connection ends. Raises ConnectionFailed, ConnectionClosed, ProtocolError."""
        async with socket:
            if not isinstance(decode_from_owner(await socket.recv()), Accepted):
                raise ConnectionFailed("it is not the owner of the project")
            link = self._link = _Link(socket)
            async with asyncio.TaskGroup() as group:
                sender = group.create_task(self._send_requests(link, group))
                async for data in socket:
                    self._receive(link, decode_from_owner(data))
                    while self._held.bytes > _HELD_BYTES:
                        self._released.clear()
                        await self._released.wait()
                sender.cancel()
                raise ConnectionFailed("the connection was closed")

    # --- sending ---

    def _wake(self) -> None:
        if self._link is not None:
            self._link.work.set()

    async def _send_requests(self, link: _Link, group: asyncio.TaskGroup) -> None:
        while self._link is link:
            if link.control:
                await link.socket.send(encode_message(link.control.popleft()))
            elif link.ready:
                await self._send_request(link, link.ready.popleft())
            elif self._queue.turns:
                await self._send_next(link, group)
            else:
                link.work.clear()
                await link.work.wait()

    async def _send_next(self, link: _Link, group: asyncio.TaskGroup) -> None:
        job = self._queue.turns.pop()
        job.state = "sent"
        self._taken[job.id] = job
        if job.fairness_key in link.uploading:
            link.uploading[job.fairness_key].append(job)
        elif _uploads_of(job):
            link.uploading[job.fairness_key] = deque([job])
            group.create_task(self._send_uploads(link, job.fairness_key), name="upload to the owner")
        else:
            await self._send_request(link, job)

    async def _send_request(self, link: _Link, job: QueuedRequest) -> None:
        if self._taken.get(job.id) is not job:
            return  # answered or dropped in between
        submit = encode_message(Submit(_request_of(job), self._age_of(job)))
        self._sent_at.setdefault(job.id, time.monotonic())
        await link.socket.send(submit)
        if not job.requesters and self._taken.get(job.id) is job:
            self._forget(job)

    async def _send_uploads(self, link: _Link, key: Hashable) -> None:
        """Send the uploads of the requests with one fairness key, each before its request."""
        waiting = link.uploading[key]
        while waiting:
            job = waiting[0]
            refusal = None
            async with link.one_upload:
                for file in _uploads_of(job):
                    refusal = refusal or await self._send_upload(link, _request_of(job).token_id, file)
            waiting.popleft()
            if refusal is not None and not job.suspect and job.id in self._taken and self._age_of(job) is None:
                self._answered(Answer(job.id, encode(msgspec.structs.replace(refusal, id=job.id))))
            else:
                link.ready.append(job)
            link.work.set()
        del link.uploading[key]

    async def _send_upload(self, link: _Link, token_id: str, file: Attachment) -> Refused | None:
        """Send the missing pieces of a content; return the owner's refusal. A content that is gone is not sent."""
        assert file.digest is not None, "others are not uploads"
        path = self._project.paths.upload(token_id, file.digest)
        try:
            descriptor = os.open(path, READ)
        except OSError:
            return None  # used by now: the owner replies as before, or refuses
        try:
            question = Upload(secrets.token_hex(16), file.digest, file.size)
            answer = await self._send_piece(link, Piece(question, token_id))
            while isinstance(answer, Uploaded) and answer.have < file.size:
                data = await asyncio.to_thread(os.pread, descriptor, MAX_PIECE_BYTES, answer.have)
                if not data:
                    return None
                piece = Upload(secrets.token_hex(16), file.digest, file.size, answer.have, data)
                answer = await self._send_piece(link, Piece(piece, token_id))
        finally:
            os.close(descriptor)
        return answer if isinstance(answer, Refused) else None

    async def _send_piece(self, link: _Link, piece: Piece) -> Uploaded | Refused:
        waiting = link.pieces[piece.upload.id] = asyncio.get_running_loop().create_future()
        await link.socket.send(encode_message(piece))
        frame = decode_server_frame(await waiting)
        if not isinstance(frame, Uploaded | Refused):
            raise ProtocolError(f"unexpected reply to an upload: {type(frame).__name__}")
        return frame

    # --- answers ---

    def _receive(self, link: _Link, message: FromOwner) -> None:
        match message:
            case NotOwner():
                raise ConnectionFailed("it is no longer the owner of the project")
            case Answer() if (waiting := link.pieces.pop(message.id, None)) is not None:
                if not waiting.done():
                    waiting.set_result(message.reply)
            case Answer():
                self._answered(message)

    def _answered(self, answer: Answer) -> None:
        job = self._taken.pop(answer.id, None)
        if job is not None:
            self._held.add(answer, job)
            self._release()

    def _release(self) -> None:
        """Deliver the answers whose change the history holds."""
        for answer, job in self._held.take():
            self._drop(job)
            if answer.outcome is not None and answer.outcome.seq is not None:
                for file in _uploads_of(job):
                    self._project.uploads.used(_request_of(job).token_id, file.digest or b"")
            if answer.outcome is not None and job.on_result is not None and job.requesters:
                job.on_result(answer.outcome)
            for requester in job.requesters:
                requester.answer(answer.id, answer.reply)
        self._released.set()

    def change_committed(self, seq: int, frame: bytes) -> None:
        """Deliver answers after this tick, in which all subscribers get the change."""
        del seq, frame
        if self._held:
            asyncio.get_running_loop().call_soon(self._release)

    def end(self, bye: Bye) -> None:
        """Deliver the answers of an epoch that has ended; the forwarder itself stays."""
        del bye
        asyncio.get_running_loop().call_soon(self._release)

    # --- without an owner ---

    def _watch(self) -> None:
        if self._link is None and self._patience is None and self._queue.turns:
            self._patience = asyncio.get_running_loop().call_later(
                min(_CHECK_S, self._patience_s / 2), self._check_patience
            )

    def _check_patience(self) -> None:
        """Refuse the requests that have waited for an owner for too long."""
        self._patience = None
        if self._link is not None:
            return
        now = time.monotonic()
        overdue = [
            job
            for job in self._queue.requests()
            if job.state == "queued" and now - max(job.arrived_at, self._alone_since) >= self._patience_s
        ]
        why = f"{_NO_OWNER}: {self.obstacle}" if self.obstacle else _NO_OWNER
        for job in overdue:
            is_unsent, message = self._is_unsent(job), _request_of(job)
            self._queue.withdraw(job)
            self._sent_at.pop(job.id, None)
            for requester in job.requesters:
                if is_unsent:
                    self.refuse(requester, message, job.on_result, "REMOTE_BUSY", f"{why}; nothing was changed")
                else:
                    requester.end(Bye("REMOTE_BUSY", why, 1.0))
        self._watch()


class _HeldAnswers:
    """Answers that wait until the local history holds their change, by epoch."""

    def __init__(self, project: Project) -> None:
        self.bytes = 0
        self._history = project.history
        self._number = itertools.count()
        self._waiting: dict[str, list[tuple[int, int, Answer, QueuedRequest]]] = {}  # heaps
        self._epoch = project.history.epoch
        self._former: set[str] = {""}
        """Epochs that the history has left: it holds all that can be known of them."""

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, answer: Answer, job: QueuedRequest) -> None:
        heap = self._waiting.setdefault(answer.epoch, [])
        heapq.heappush(heap, (answer.seq, next(self._number), answer, job))
        self.bytes += len(answer.reply)

    def take(self) -> list[tuple[Answer, QueuedRequest]]:
        """Return and remove the answers that may be delivered, in order."""
        history, found = self._history, []
        if history.epoch != self._epoch:
            self._former.add(self._epoch)
            self._epoch = history.epoch
        for epoch in [epoch for epoch in self._waiting if epoch == history.epoch or epoch in self._former]:
            heap = self._waiting[epoch]
            while heap and (epoch != history.epoch or heap[0][0] <= history.head):
                _, _, answer, job = heapq.heappop(heap)
                self.bytes -= len(answer.reply)
                found.append((answer, job))
            if not heap:
                del self._waiting[epoch]
        return found

    def clear(self) -> None:
        self._waiting.clear()
        self.bytes = 0


class _Nobody:
    """Requester of a request whose connection has closed."""

    @property
    def fairness_key(self) -> Hashable:
        return self

    def answer(self, request_id: str, reply: bytes) -> None: ...

    def end(self, bye: Bye) -> None: ...


def _request_of(job: QueuedRequest) -> ForwardedRequest:
    assert isinstance(job.message, ForwardedRequest), "others are not forwarded"
    return job.message


def _uploads_of(job: QueuedRequest) -> list[Attachment]:
    message = job.message
    files = message.files if isinstance(message, RunCommand | RunCall) else []
    return [file for file in files if file.digest is not None and file.data is None]


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
