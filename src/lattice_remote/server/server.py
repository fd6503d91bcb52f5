"""Server process: one port with optional TLS, HTTP by Starlette on uvicorn, WebSockets by hand-off, ordered
shutdown.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import msgspec
import uvicorn
from starlette.types import ASGIApp

from lattice_remote.errors import Misuse
from lattice_remote.memory import return_large_buffers
from lattice_remote.server import status as statussocket
from lattice_remote.server.cluster.settings import ClusterSettings, save_settings
from lattice_remote.server.config import Config
from lattice_remote.server.datadir import DataDir
from lattice_remote.server.http.app import http_app, metrics_app
from lattice_remote.server.project.child_process import Template
from lattice_remote.server.registry import STOP_S, ProjectRegistry
from lattice_remote.server.status import Gauges, status_of
from lattice_remote.server.transport.admission import AdmissionControl, ConnectionQuota, is_loopback
from lattice_remote.server.transport.listener import Acceptor, Certificate, service_manager
from lattice_remote.server.transport.websocket import Handoff, PlainHttp, websocket_server

if TYPE_CHECKING:
    from lattice_remote.server.cluster.node import Node

__all__ = ["bind", "make_server", "run"]

_USER_TIMEOUT_MS = 20_000
"""The kernel keeps sending for this time to a peer that acknowledges nothing."""
_BACKLOG = 2048
_GOODBYE_S = 0.3
_CERTIFICATE_CHECK_S = 5.0
"""Between looks for a renewed certificate; SIGHUP looks at once."""

_log = logging.getLogger(__name__)


def bind(host: str, port: int, *, host_option: str = "--host", port_option: str = "--port") -> socket.socket:
    """Return a listening socket; port 0 picks a free one; a message names the options.

    Raises Misuse if the address is taken, not ours, or cannot be resolved.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:  # UnicodeError: an impossible name
        why = error.strerror if isinstance(error, OSError) else "not a host name"
        raise Misuse(f"cannot listen on {host}:{port}: {why}; choose another {host_option}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise Misuse(f"cannot listen on {host}:{port}: {error.strerror}; choose another {port_option}") from error
    return listener


def run(
    data: DataDir,
    config: Config,
    listener: socket.socket,
    template: Template,
    cluster: ClusterSettings | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; print one line with the address once ready.

    Raises Misuse: a setting, a listening address, the certificate or its key is invalid; StorageError: ``tokens.json``
    cannot be read.
    """
    return_large_buffers()
    notify = service_manager()
    certificate = _certificate(config, data.path)
    _warn_of_plain_text(config, listener)
    figures = _bind_figures(config.metrics_listen) if config.metrics_listen else None
    status = statussocket.listen(data.path)

    async def serve() -> None:
        registry, started = ProjectRegistry(data, config=config, template=template), datetime.now(UTC)
        node = await _join(data, cluster, registry) if cluster is not None else None
        registry.start()
        following = asyncio.create_task(node.run()) if node is not None else None

        async def document() -> bytes:
            return msgspec.json.encode(await status_of(registry, started))

        answering = None if status is None else asyncio.create_task(statussocket.answer(status, document))
        await make_server(registry, certificate, notify, figures).serve(sockets=[listener])
        if node is not None and following is not None:
            following.cancel()
            await node.close()
        if answering is not None:
            answering.cancel()
            statussocket.remove(data.path)

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serve())


async def _join(data: DataDir, settings: ClusterSettings, registry: ProjectRegistry) -> "Node":
    from lattice_remote.server.cluster.node import Node

    node = await Node.join(data, settings)
    registry.cluster = node
    await node.start(registry)
    save_settings(data.path, node.settings)
    return node


def _bind_figures(address: str) -> socket.socket:
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        raise Misuse(f"cannot serve metrics on {address!r}: name a host and a port, such as 127.0.0.1:9464")
    host, option = host.removeprefix("[").removesuffix("]"), "--metrics-listen"
    return bind(host, int(port), host_option=option, port_option=option)


def _certificate(config: Config, root: Path) -> Certificate | None:
    tls = config.tls
    if not tls.cert and not tls.key:
        return None
    if not tls.cert or not tls.key:
        raise Misuse("TLS needs a certificate and its key: name both, with --tls-cert and --tls-key or in config.json")
    return Certificate(root / tls.cert, root / tls.key)


def _warn_of_plain_text(config: Config, listener: socket.socket) -> None:
    host = listener.getsockname()[0]
    if not config.tls.cert and not config.trusted_proxies and not is_loopback(host):
        _log.warning(
            "listening on %s without TLS: tokens and all projects cross the network in the clear. Use --tls-cert "
            "and --tls-key, or put a proxy in front that speaks TLS and name it with --behind-proxy",
            host,
        )


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def make_server(
    registry: ProjectRegistry,
    certificate: Certificate | None = None,
    notify: Callable[[str], None] = lambda _: None,
    figures: socket.socket | None = None,
) -> uvicorn.Server:
    """Return the server of a started registry, which it stops at its end; ``serve(sockets=[...])`` it.

    ``figures`` is a second listening socket, for the metrics alone.
    """
    sockets = websocket_server(registry.serve, registry.check, lambda: not registry.stopping)
    gauges = Gauges(registry)
    config = _http_config(http_app(registry, gauges), cast("type[asyncio.Protocol]", partial(Handoff, server=sockets)))
    metrics = None if figures is None else (figures, _http_config(metrics_app(gauges), "none"))
    return _Server(config, registry, certificate, notify, metrics)


def _http_config(app: ASGIApp, websockets: type[asyncio.Protocol] | Literal["none"]) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http=PlainHttp,
        ws=websockets,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # it would trust any program on this machine; see http/auth.py
        backlog=_BACKLOG,
    )
    config.load()
    return config


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        registry: ProjectRegistry,
        certificate: Certificate | None,
        notify: Callable[[str], None],
        metrics: tuple[socket.socket, uvicorn.Config] | None,
    ) -> None:
        super().__init__(config)
        self._metrics = metrics
        self._registry = registry
        self._certificate = certificate
        self._notify = notify
        self._upkeep: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        assert sockets, "run() passes the one it listens on"
        [listener] = sockets
        context = None if self._certificate is None else self._certificate.context
        acceptors = [Acceptor(listener, self._registry.admission, partial(self._make_protocol, self.config), context)]
        if self._metrics is not None:  # a flood at one listener does not affect the other
            figures, config = self._metrics
            admission = AdmissionControl(self._registry.config.limits)
            acceptors.append(Acceptor(figures, admission, partial(self._make_protocol, config), None))
        self.servers = [cast("asyncio.Server", acceptor) for acceptor in acceptors]
        for acceptor in acceptors:
            acceptor.start()
        self.started = True
        if self._certificate is not None:
            self._upkeep = asyncio.create_task(self._watch_certificate(self._certificate), name="certificate")
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        scheme = "http" if context is None else "https"
        self._registry.address = f"{scheme}://{shown}:{port}"
        if self._metrics is not None:
            _log.info("serving metrics without authentication on %s:%d", *self._metrics[0].getsockname()[:2])
        print(f"Listening on {self._registry.address}", flush=True)  # noqa: T201 - the one line of its output
        self._notify("READY=1")

    def _make_protocol(self, config: uvicorn.Config, quota: ConnectionQuota) -> asyncio.Protocol:
        return PlainHttp(config, self.server_state, self.lifespan.state, quota=quota)

    async def _watch_certificate(self, certificate: Certificate) -> None:
        while True:
            await asyncio.sleep(_CERTIFICATE_CHECK_S)
            certificate.refresh()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        _log.info("stopping")
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + STOP_S
        self._notify("STOPPING=1")
        if self._upkeep is not None:
            self._upkeep.cancel()
        for server in self.servers:
            server.close()
        await self._registry.stop()
        await self._registry.wait_until_alone(min(_GOODBYE_S, max(0.0, ends_at - loop.time())))
        # uvicorn waits for this long, though it declares an int, and 0.1 s before.
        self.config.timeout_graceful_shutdown = max(0.1, ends_at - 0.1 - loop.time())  # type: ignore[assignment]
        await super().shutdown(sockets)
        _log.info("stopped after %.2f s", loop.time() - ends_at + STOP_S)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop in order at the first SIGTERM or SIGINT, at once at the second. uvicorn's own would raise it again."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop_asked)
        loop.add_signal_handler(signal.SIGHUP, self._refresh_asked)
        yield

    def _refresh_asked(self) -> None:
        if self._certificate is not None:
            self._certificate.refresh()

    def _stop_asked(self) -> None:
        if self.should_exit:
            os._exit(1)  # the workers end by themselves when their socket closes; all acknowledged requests are durable
        self.should_exit = True
