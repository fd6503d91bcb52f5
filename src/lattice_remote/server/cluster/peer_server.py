"""WebSockets of the other nodes, below ``/cluster/`` on the normal listener: requests, copies, positions."""

import logging
import re
import time
from collections.abc import Awaitable, Callable
from functools import partial
from http import HTTPStatus

import msgspec
from websockets.exceptions import ConnectionClosed

from lattice_remote.errors import ProtocolError
from lattice_remote.protocol.messages import Bye, Refused, encode
from lattice_remote.server.cluster.forward import (
    Accepted,
    Answer,
    Forget,
    ForwardedRequest,
    NotOwner,
    Piece,
    Submit,
    ToOwner,
    Withdraw,
    decode_to_owner,
    encode_message,
)
from lattice_remote.server.cluster.peer_access import PEER_MESSAGE_BYTES, PeerAccess, Reached, send_reached
from lattice_remote.server.cluster.peer_copy import send_copy
from lattice_remote.server.project.metrics import RequestOutcome
from lattice_remote.server.project.project import Project
from lattice_remote.server.transport.api_error import ApiError
from lattice_remote.server.transport.websocket import Handoff, Request, websocket_frame

__all__ = ["PeerServer"]

_PATH = re.compile(r"/cluster/([a-z0-9][a-z0-9-]{0,62})(/copy|/reached)?")
_MESSAGES_PER_S = 1_000_000
"""From another node: its clients are limited there."""

_log = logging.getLogger(__name__)


class PeerServer:
    """The server side of the connections between nodes: the value of ``ProjectRegistry.cluster``.

    Args:
        access: this node's.
        project: returns a project that this node has, started; None for any other.
        is_owner: returns whether this node orders the changes of a project now.
        reached: returns how far this node has seen a project's order, also of one that is not open.
    """

    def __init__(
        self,
        access: PeerAccess,
        project: Callable[[str], Project | None],
        is_owner: Callable[[str], bool],
        reached: Callable[[str], Reached],
    ) -> None:
        self._reached = reached
        self._access = access
        self._project = project
        self._is_owner = is_owner

    def admit(self, connection: Handoff, request: Request) -> Callable[[], Awaitable[None]] | ApiError:
        """Return the function that serves a node's connection, or the refusal of one without a valid proof."""
        headers, quota = request.headers, connection.quota
        node = self._access.node_of(headers.get_all("Authorization"), request.path)
        counted = "" if node is None else f"node {node}"
        if (refusal := quota.enter(headers.get_all("X-Forwarded-For"), counted)) is not None:
            return refusal
        if node is None:
            return quota.failed() or ApiError(
                HTTPStatus.UNAUTHORIZED,
                "REMOTE_UNAUTHORIZED",
                "missing or invalid proof of a node of this cluster; compare the clocks of the machines",
            )
        matched = _PATH.fullmatch(request.path)
        if matched is None:
            return ApiError(HTTPStatus.NOT_FOUND, "REMOTE_NOT_FOUND", "not found")
        if (refusal := quota.admit(counted)) is not None:
            return refusal
        slug = matched[1]
        if matched[2] == "/reached":
            return partial(send_reached, connection, self._reached(slug))
        if matched[2]:
            return partial(send_copy, connection, node, self._project(slug))
        return partial(serve_forwarded, connection, node, self._project(slug), partial(self._is_owner, slug))


class _Numbered(msgspec.Struct):
    seq: int = 0


_seq_of = msgspec.msgpack.Decoder(_Numbered)


async def serve_forwarded(
    connection: Handoff, node: str, project: Project | None, is_owner: Callable[[], bool]
) -> None:
    """Serve another node's requests for a project until either side closes. Raises nothing.

    ``project`` is None if this node does not have it.
    """
    name = f"{'' if project is None else project.slug}: node {node} at {connection.peer_name}"
    connection.allow_message_bytes(PEER_MESSAGE_BYTES)
    connection.allow_messages_per_s(_MESSAGES_PER_S)
    if project is None or not is_owner():
        connection.outbox.push(websocket_frame(encode_message(NotOwner())))
        connection.end(1012, "not the owner")
        return
    peer = _Peer(connection, node, project, is_owner)
    connection.outbox.push(websocket_frame(encode_message(Accepted())))
    _log.info("%s: connected", name)
    try:
        async for message in connection:
            peer.take(decode_to_owner(message))
    except ConnectionClosed:
        pass
    except ProtocolError as error:
        _log.error("%s: %s", name, error.message)
        connection.end(1002, error.message)
    except Exception:  # noqa: BLE001 - one connection's failure must not stop the server
        _log.exception("%s: unexpected failure", name)
        connection.end(1011, "internal error")
    finally:
        peer.close()
        _log.info("%s: disconnected", name)


class _Peer:
    """Requests of another node's clients."""

    def __init__(self, connection: Handoff, node: str, project: Project, is_owner: Callable[[], bool]) -> None:
        self._connection = connection
        self._node = node
        self._project = project
        self._is_owner = is_owner
        self._requesters: dict[str, _TokenRequester] = {}  # by token, with requests in flight
        self._of: dict[str, _TokenRequester] = {}  # by request
        self._outcomes: dict[str, RequestOutcome] = {}
        self._ended = False

    def take(self, message: ToOwner) -> None:
        if self._ended:
            return
        match message:
            case Submit(request, age_s):
                self._submit(request, age_s)
            case Piece(upload, token_id):
                self._project.uploads.take(upload, token_id, self._requester(upload.id, token_id))
            case Forget(id):
                if (requester := self._settled(id)) is not None:
                    self._project.forget(requester, {id})
            case Withdraw(id, code):
                requester = self._of.get(id)
                if requester is not None and self._project.withdraw(requester, id, code):
                    why = "the token is no longer valid; nothing was changed"
                    self.answer(id, encode(Refused(id, code, why)))

    def _submit(self, request: ForwardedRequest, age_s: float | None) -> None:
        project = self._project
        if not self._is_owner() or project.stopping or project.failure is not None:
            self.end()
            return
        if age_s is not None:
            request = msgspec.structs.replace(request, first_sent_at=time.time() - age_s)
        project.submit(request, self._requester(request.id, request.token_id), partial(self._note, request.id))

    def _note(self, request_id: str, outcome: RequestOutcome) -> None:
        """Log an outcome and keep it for the answer, which follows at once."""
        outcome.log()
        if request_id in self._of:
            self._outcomes[request_id] = outcome

    def _requester(self, request_id: str, token_id: str) -> "_TokenRequester":
        requester = self._requesters.get(token_id)
        if requester is None:
            requester = self._requesters[token_id] = _TokenRequester(self, (self._node, token_id))
        requester.in_flight.add(request_id)
        self._of[request_id] = requester
        return requester

    def _settled(self, request_id: str) -> "_TokenRequester | None":
        requester = self._of.pop(request_id, None)
        if requester is not None:
            requester.in_flight.discard(request_id)
            if not requester.in_flight:
                self._requesters.pop(requester.fairness_key[1], None)
        return requester

    def answer(self, request_id: str, reply: bytes) -> None:
        self._settled(request_id)
        history = self._project.history
        seq = min(_seq_of.decode(reply).seq, history.head)  # that of an older epoch may be greater
        self._push(Answer(request_id, reply, history.epoch, seq, self._outcomes.pop(request_id, None)))

    def _push(self, message: Answer | NotOwner) -> None:
        self._connection.outbox.push(websocket_frame(encode_message(message)))

    def end(self) -> None:
        """End the connection; the other node sends its unanswered requests again. Idempotent."""
        if not self._ended:
            self._ended = True
            self._push(NotOwner())
            self._connection.end(1012, "not the owner")

    def close(self) -> None:
        for requester in self._requesters.values():
            self._project.forget(requester, requester.in_flight)


class _TokenRequester:
    """Requester for one token of another node: its requests there take one turn here."""

    def __init__(self, peer: _Peer, fairness_key: tuple[str, str]) -> None:
        self._peer = peer
        self.fairness_key = fairness_key
        self.in_flight: set[str] = set()

    def answer(self, request_id: str, reply: bytes) -> None:
        self._peer.answer(request_id, reply)

    def end(self, bye: Bye) -> None:
        del bye
        self._peer.end()
