"""Access between the nodes of a cluster: proof of membership, and WebSockets from node to node.

A node proves with the cluster's secret that it belongs to it. No token's text and no secret crosses the network.
"""

import hashlib
import hmac
import re
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.typing import Subprotocol

from lattice_remote.errors import ConnectionFailed, Misuse, ProtocolError
from lattice_remote.protocol.messages import SUBPROTOCOL
from lattice_remote.server.auth import bearer
from lattice_remote.server.transport.websocket import Handoff, websocket_frame

__all__ = ["PEER_MESSAGE_BYTES", "PeerAccess", "Reached", "send_reached"]

PEER_MESSAGE_BYTES = 40 * 1024 * 1024
"""Of one message between nodes: a client's largest request or reply, and its sender's rights."""
_VALID_S = 60.0
"""Greatest difference between a proof's time and the clock of the node that checks it."""
_OPEN_TIMEOUT_S = 5.0
_KEEPALIVE_S = 5.0
_MAX_QUEUED_MESSAGES = 4
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_PROOF = re.compile(rf"([0-9a-f]{{64}})\.([0-9]{{1,12}})\.({_NODE.pattern})")


class Reached(msgspec.Struct, frozen=True):
    """The last message of a project's order that a node has seen in this epoch."""

    epoch: str = ""
    seq: int = 0


async def send_reached(connection: Handoff, reached: Reached) -> None:
    """Answer another node's question, then close the connection."""
    connection.outbox.push(websocket_frame(msgspec.msgpack.encode(reached)))
    connection.end(1000, "")


class _Dial(connect):
    """The library's connect, without redirects."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        """Follow none."""
        return exc


class PeerAccess:
    """A node's name and the cluster's secret.

    Args:
        node: this node's name: letters, digits, ``.``, ``_`` and ``-``, at most 63.
        secret: at least 32 bytes.
        authorities: PEM file of the authorities that sign the nodes' certificates; None for those of the system.
        now: seconds since the epoch.

    Raises Misuse if the name is invalid, or the file cannot be read.
    """

    def __init__(
        self, node: str, secret: bytes, *, authorities: Path | None = None, now: Callable[[], float] = time.time
    ) -> None:
        if _NODE.fullmatch(node) is None:
            raise Misuse(f"bad node name {node!r}: use letters, digits, '.', '_' and '-', at most 63")
        assert len(secret) >= 32, "a shorter secret could be guessed"
        self.node = node
        self._secret = secret
        self._now = now
        try:
            self._tls = ssl.create_default_context(cafile=authorities)
        except OSError as error:
            raise Misuse(f"cannot read the certificates in {authorities}: {error.strerror or error}") from error

    def proof(self, path: str) -> str:
        """Return the bearer for a request of this path; it is valid for a minute."""
        now = f"{self._now():.0f}"
        return f"{self._mac(path, now, self.node)}.{now}.{self.node}"

    def node_of(self, authorization: Sequence[str], path: str) -> str | None:
        """Return the node that made a request, from its Authorization headers; None without a valid proof."""
        matched = _PROOF.fullmatch(bearer(authorization))
        if matched is None:
            return None
        mac, at, node = matched.groups()
        is_right = hmac.compare_digest(mac, self._mac(path, at, node))
        return node if is_right and abs(self._now() - int(at)) <= _VALID_S else None

    def _mac(self, *parts: str) -> str:
        return hmac.new(self._secret, "\n".join(parts).encode(), hashlib.sha256).hexdigest()

    async def connect(self, url: str, path: str, *, keepalive: bool = True) -> ClientConnection:
        """Open a WebSocket to the node at ``url``, its advertised address.

        Raises ConnectionFailed, with the reason. Proxies and redirects are not used.
        """
        scheme, _, rest = url.rstrip("/").partition("://")
        is_tls = scheme == "https"
        try:
            return await _Dial(
                f"{'wss' if is_tls else 'ws'}://{rest}{path}",
                subprotocols=[Subprotocol(SUBPROTOCOL)],
                additional_headers={"Authorization": f"Bearer {self.proof(path)}"},
                ssl=self._tls if is_tls else None,
                proxy=None,
                compression=None,
                max_size=PEER_MESSAGE_BYTES,
                max_queue=_MAX_QUEUED_MESSAGES,
                open_timeout=_OPEN_TIMEOUT_S,
                ping_interval=_KEEPALIVE_S if keepalive else None,
                ping_timeout=_KEEPALIVE_S,
                close_timeout=1,
            )
        except (OSError, EOFError, ValueError, WebSocketException) as error:
            raise ConnectionFailed(
                f"cannot connect to the node at {url}: {str(error) or type(error).__name__}"
            ) from error

    async def reached(self, url: str, slug: str) -> Reached:
        """Ask the node at ``url`` how far it has seen a project's order. Raises ConnectionFailed, ProtocolError."""
        try:
            async with await self.connect(url, f"/cluster/{slug}/reached") as socket:
                answer = await socket.recv(decode=False)
            return msgspec.msgpack.decode(answer, type=Reached)
        except ConnectionClosed as error:
            raise ConnectionFailed(f"the connection to the node at {url} was lost") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolError(f"invalid message of a node: {error}") from error
