"""WebSockets of the other nodes of a cluster, below ``/cluster/`` on the normal listener."""

import re
from collections.abc import Awaitable, Callable
from functools import partial
from http import HTTPStatus

from lattice_remote.server.cluster.forwarded_requests import serve_forwarded
from lattice_remote.server.cluster.peer_access import PeerAccess, Reached, send_reached
from lattice_remote.server.cluster.peer_copy import send_copy
from lattice_remote.server.project.project import Project
from lattice_remote.server.transport.api_error import ApiError
from lattice_remote.server.transport.websocket import Handoff, Request

__all__ = ["PeerServer"]

_PATH = re.compile(r"/cluster/([a-z0-9][a-z0-9-]{0,62})(/copy|/reached)?")


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
