"""Nodes of a cluster as processes of their own."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
from harness import tree_of
from nats_servers import NatsCluster
from server_process import COMMAND, Process
from test_server import make_data, make_token
from typer.testing import CliRunner

from faultproxy import FaultProxy
from lattice_remote.errors import RemoteError
from lattice_remote.server.cli import app
from lattice_remote.server.datadir import DataDir

__all__ = ["RunningCluster", "running_cluster", "wait_until"]


def wait_until(condition: Callable[[], object], what: str, seconds: float = 90.0) -> None:
    """Wait for a condition, within a bound."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, what
        time.sleep(0.05)


class RunningCluster:
    """Cluster of nodes ``a``, ``b``, ... with a project ``web`` and a token, both made on the first."""

    def __init__(
        self, nats: NatsCluster, directory: Path, names: str, *, proxied: bool = False, monitored: bool = True
    ) -> None:
        self._nats = nats
        self._monitored = monitored  # the nodes can read the servers' settings
        self.links = {
            (name, server.name): FaultProxy(server.port) for server in nats.servers for name in names if proxied
        }
        """The proxy between a node and a server of the engine, by their names, if the nodes are ``proxied``."""
        self._directory = directory
        self.names = names
        self.nodes: dict[str, Process] = {}
        self.sessions: dict[str, requests.Session] = {}
        self.token = ""

    @property
    def nats_urls(self) -> list[str]:
        return self._nats.urls

    def start(self, name: str) -> None:
        """Start a node. The first time it makes its data directory, unless that of the first node is there."""
        data = DataDir(self._directory / name / "data")
        if name == self.names[0] and not self.token:
            data = data if data.path.exists() else make_data(data.path)
            self.token = make_token(data)
            self._install_hook(data)
        elif not data.path.exists():
            data.create()
        urls = self._nats.monitor_urls if self._monitored else []
        monitors = [option for url in urls for option in ("--cluster-monitor", url)]
        links = [link.url.replace("http", "nats") for (node, _), link in self.links.items() if node == name]
        engine = ("--cluster", ",".join(links or self._nats.urls), "--cluster-replicas", str(len(self._nats.urls)))
        self.nodes[name] = Process(data, *engine, "--node", name, *monitors)
        session = requests.Session()
        session.headers["Authorization"] = f"Bearer {self.token}"
        self.sessions[name] = session

    def _install_hook(self, data: DataDir) -> None:
        """Have each node note the events for which its hooks run, if the nodes are ``proxied``."""
        if self.links:
            config = data.project("web").lattice / "config.json"
            settings = json.loads(config.read_text())
            settings["hooks"] = {"post_event": f'echo "$LATTICE_EVENT_ID" >> "{self.hooked}"'}
            config.write_text(json.dumps(settings, sort_keys=True, indent=2) + "\n")
            self.hooked.touch()

    @property
    def hooked(self) -> Path:
        return self._directory / "hooked"

    def ask(self, name: str, method: str, path: str, **options: object) -> requests.Response:
        url = f"http://127.0.0.1:{self.nodes[name].port}/projects/web{path}"
        return self.sessions[name].request(method, url, timeout=30, **options)  # type: ignore[arg-type]

    def write(self, name: str, title: str, key: str = "", seconds: float = 60.0) -> requests.Response:
        """Create a task through a node; repeat the request with the same key while the node is busy or unreachable."""
        key = key or f"k-{title}"
        ends = time.monotonic() + seconds
        while True:
            try:
                answer = self.ask(name, "POST", "/tasks", json={"title": title}, headers={"Idempotency-Key": key})
                if answer.status_code not in (502, 503):
                    return answer
            except requests.ConnectionError:
                pass
            assert time.monotonic() < ends, f"{title} was not written through {name}"
            time.sleep(0.2)

    def head(self, name: str) -> tuple[str, int]:
        """Return epoch and number of a node's head; ("", -1) if it does not answer."""
        try:
            answer = self.ask(name, "GET", "")
        except requests.ConnectionError:
            return "", -1
        return (answer.json()["epoch"], answer.json()["head"]) if answer.ok else ("", -1)

    def position(self, name: str) -> tuple[str, int]:
        """Return epoch and number of a node's head, once it answers: for a moment it may refuse reads."""
        found: list[tuple[str, int]] = []

        def is_known() -> bool:
            found.append(self.head(name))
            return bool(found[-1][0])

        wait_until(is_known, f"node {name} answers")
        return found[-1]

    def tree(self, name: str) -> Path:
        return self.nodes[name].data.project("web").lattice

    @property
    def engine_urls(self) -> list[str]:
        return self._nats.urls

    def owner(self) -> str:
        """Return the node that holds the project's lease; "" if none does."""
        data = self._directory / self.names[0] / "data"
        done = CliRunner().invoke(app, ["--data", str(data), "cluster", "status", "--json"])
        return json.loads(done.stdout)["projects"][0]["owner"] or "" if done.stdout else ""

    def cut_off(self, name: str, *servers: str) -> None:
        """Cut a node off from these servers of the engine; connections stay open but silent."""
        for server in servers:
            self.links[name, server].stall()

    def heal(self) -> None:
        for link in self.links.values():
            link.flow()

    def agree(self) -> bool:
        """Return whether all nodes have the same head and the same files."""
        heads = {self.head(name) for name in self.names}
        trees = {frozenset(tree_of(self.tree(name)).items()) for name in self.names}
        return len(heads) == len(trees) == 1 and ("", -1) not in heads

    def is_open(self, name: str) -> bool:
        try:
            return self.ask(name, "GET", "").status_code == 200
        except requests.ConnectionError:
            return False

    def command(self, name: str, *argv: str | Path, code: int | None = 0) -> str:
        """Run an administrator's command on a node's data directory, in this process; return its output.

        It must end with ``code``, None: any.
        """
        data = self._directory / name / "data"
        done = CliRunner().invoke(app, ["--data", str(data), *map(str, argv)])
        error = done.exception
        output = f"{done.output}Error: {error.message}" if isinstance(error, RemoteError) else done.output
        assert code in (None, done.exit_code), (output, error)
        return output

    def refused_start(self, name: str) -> str:
        """Start a node that must refuse to start; return its last line."""
        argv = [*COMMAND, "--data", self._directory / name / "data", "start", "--port", "0"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 1, done.stderr
        return done.stderr.splitlines()[-1]

    def kill(self, name: str) -> None:
        self.nodes[name].end(9)

    def close(self) -> None:
        for node in self.nodes.values():
            if node.process.poll() is None:
                node.end()
        for link in self.links.values():
            link.close()


@contextmanager
def running_cluster(
    nats: NatsCluster, directory: Path, names: str = "abc", *, proxied: bool = False, monitored: bool = True
) -> Iterator[RunningCluster]:
    cluster = RunningCluster(nats, directory, names, proxied=proxied, monitored=monitored)
    try:
        for name in names:
            cluster.start(name)
        for name in names:
            wait_until(lambda name=name: cluster.is_open(name), f"node {name} opens the project")
        yield cluster
    finally:
        cluster.close()
