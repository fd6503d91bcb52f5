"""Real ``nats-server`` processes on loopback: a cluster of one or three, each with a private directory."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from faultproxy import FaultProxy

__all__ = ["NatsCluster", "NatsServer", "nats_cluster"]

_PROGRAM = Path(sys.executable).with_name("nats-server")
_READY_S = 60.0


class NatsServer:
    """One server. ``start()``, then ``kill()``, ``stop()``, or ``pause()`` and ``resume()``."""

    def __init__(self, name: str, ports: tuple[int, int, int], directory: Path) -> None:
        self.name = name
        self.port, self.route_port, self.monitor_port = ports
        self.directory = directory
        self.store = directory / "js"
        """Where its streams are."""
        self.process: subprocess.Popen[bytes] | None = None
        self._is_paused = False

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def monitor_url(self) -> str:
        return f"http://127.0.0.1:{self.monitor_port}"

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def configure(self, routes: list[int] | None, sync: str | None, max_file: str, extra: str) -> None:
        """Write the configuration.

        Args:
            routes: ports at which it connects to the others; None: it is the only one.
            sync: None: the server's default.
            max_file: of all streams.
            extra: further blocks.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        peers = ", ".join(f'"nats://127.0.0.1:{port}"' for port in routes or ())
        # The advertised address leads nowhere: no server may go round a proxy.
        cluster = (
            f'cluster {{ name: test, listen: "127.0.0.1:{self.route_port}", routes: [{peers}], '
            'no_advertise: true, cluster_advertise: "127.0.0.1:1" }'
        )
        (self.directory / "nats.conf").write_text(f"""
server_name: {self.name}
listen: "127.0.0.1:{self.port}"
http: "127.0.0.1:{self.monitor_port}"
log_file: "{self.directory}/nats.log"
jetstream {{
  store_dir: "{self.store}", max_mem: 64MB, max_file: {max_file}
  {f"sync_interval: {sync}" if sync else ""}
}}
{cluster if routes is not None else ""}
{extra}
""")

    def start(self) -> None:
        """Start the process unless it runs."""
        if not self.is_running:
            self.process = subprocess.Popen(
                [_PROGRAM, "-c", self.directory / "nats.conf"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            self._is_paused = False

    def kill(self) -> None:
        """Kill the process, as in a crash."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Stop the process in order."""
        self.resume()
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Suspend the process until ``resume()``."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        self._is_paused = True

    def resume(self) -> None:
        """Resume the process after a pause."""
        if self._is_paused and self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self._is_paused = False

    def monitor(self, path: str) -> dict[str, Any]:
        """Return the monitoring port's answer. Raises OSError if there is none or the server is not healthy."""
        with closing(HTTPConnection("127.0.0.1", self.monitor_port, timeout=5)) as connection:
            connection.request("GET", f"/{path}")
            answer = connection.getresponse()
            text = answer.read().decode()
        if answer.status != HTTPStatus.OK:
            raise OSError(text)
        found: dict[str, Any] = json.loads(text)
        return found

    def log(self) -> str:
        """Return the last lines of the log."""
        with suppress(FileNotFoundError):
            return "\n".join((self.directory / "nats.log").read_text().splitlines()[-20:])
        return ""

    def _end(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(timeout=30)


class NatsCluster:
    """One or three servers. ``heal()`` starts and resumes all of them."""

    def __init__(
        self,
        count: int,
        directory: Path,
        *,
        sync: str | None = "always",
        max_file: str = "2GB",
        extra: str = "",
        proxied: bool = False,
        stores: Sequence[Path] = (),
    ) -> None:
        ports = _free_ports(3 * count)
        self.servers = [
            NatsServer(f"n{number + 1}", (ports[3 * number], ports[3 * number + 1], ports[3 * number + 2]), place)
            for number, place in enumerate(directory / f"n{number + 1}" for number in range(count))
        ]
        self.routes: dict[frozenset[str], FaultProxy] = {}
        """The proxy between two servers, by their names, if they are ``proxied``."""
        for each, store in zip(self.servers, stores, strict=False):
            each.store = store
        for number, each in enumerate(self.servers):
            others = self.servers[number + 1 :] if proxied else [other for other in self.servers if other is not each]
            ports = [other.route_port for other in others]
            if proxied:
                made = {frozenset((each.name, other.name)): FaultProxy(other.route_port) for other in others}
                self.routes |= made
                ports = [proxy.port for proxy in made.values()] or [1]  # the last one only listens
            each.configure(ports if count > 1 else None, sync, max_file, extra)

    @property
    def urls(self) -> list[str]:
        return [each.url for each in self.servers]

    @property
    def monitor_urls(self) -> list[str]:
        return [each.monitor_url for each in self.servers]

    def named(self, name: str) -> NatsServer:
        return next(each for each in self.servers if each.name == name)

    def heal(self) -> None:
        """Let every server run and reach the others, and wait until all of them are up to date."""
        for proxy in self.routes.values():
            proxy.flow()
        for each in self.servers:
            each.resume()
            each.start()
        for each in self.servers:
            self._wait(each)

    def kill_all(self) -> None:
        for each in self.servers:
            each.kill()

    def end(self) -> None:
        """Kill every server."""
        self.kill_all()
        for proxy in self.routes.values():
            proxy.close()

    def isolate(self, name: str) -> None:
        """Let a ``proxied`` server reach no other."""
        for pair, proxy in self.routes.items():
            if name in pair:
                proxy.stall()

    def _wait(self, server: NatsServer) -> None:
        end = time.monotonic() + _READY_S
        last: object = None
        while time.monotonic() < end:
            if not server.is_running:
                raise RuntimeError(f"{server.name} ended: {server.log()}")
            try:
                server.monitor("healthz")
            except (OSError, HTTPException) as error:
                last = error
            else:
                return
            time.sleep(0.05)
        raise RuntimeError(f"{server.name} is not ready: {last}; {server.log()}")


@contextmanager
def nats_cluster(
    count: int, directory: Path, *, prepare: Callable[[NatsCluster], None] = lambda _: None, **options: Any
) -> Iterator[NatsCluster]:
    """Start servers, with the options of NatsCluster, and end them by their process ids, also after a failure.

    ``prepare`` may write other configurations before they start.
    """
    for attempt in range(5):
        cluster = NatsCluster(count, directory / str(attempt), **options)
        try:
            prepare(cluster)
            try:
                cluster.heal()
            except RuntimeError as error:
                if "address already in use" in str(error) and attempt < 4:
                    continue  # another program was faster to take a port
                raise
            yield cluster
            return
        finally:
            cluster.end()


def _free_ports(count: int) -> list[int]:
    """Return free ports below those that the system gives to outgoing connections."""
    choose = random.Random(os.getpid() ^ time.monotonic_ns())
    ports: list[int] = []
    while len(ports) < count:
        port = choose.randrange(10000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in ports:
                ports.append(port)
    return ports
