"""Killing the server, a worker, the agent, a command or the network at any moment of a random mix of commands.

Whatever strikes: nothing acknowledged is lost, nothing is done twice, and every cache ends up equal to the
server's directory by itself.
"""

import contextlib
import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faultproxy import FaultProxy
from mix import Mix
from sandbox import Client, Sandbox, Server, wait_for

pytestmark = pytest.mark.e2e


@contextlib.contextmanager
def three_people(sandbox: Sandbox) -> Iterator[tuple[Server, list[Client], FaultProxy]]:
    """A server, and three clients on two machines that reach it through a proxy."""
    server = sandbox.server()
    server.project()
    server.start()
    with FaultProxy(server.port) as proxy:
        clients = []
        for name, machine in (("ana", "one"), ("ben", "one"), ("cem", "two")):
            client = sandbox.client(name, machine)
            client.env["LATTICE_TOKEN"] = server.token(f"human:{name}", "agent:*")
            client.ok("remote", "add", "origin", proxy.url, "--project", "board")
            clients.append(client)
        yield server, clients, proxy


class Strikes:
    """Faults that strike while a mix runs, one after every few commands."""

    def __init__(self, mix: Mix, faults: list[Callable[[], None]], *, seed: int, every: int) -> None:
        self._mix, self._faults, self._every = mix, faults, every
        self._rng = random.Random(seed)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._strike)
        self.error: BaseException | None = None

    def __enter__(self) -> "Strikes":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=60)
        assert self.error is None, self.error

    def _strike(self) -> None:
        last = 0
        try:
            while not self._over.wait(0.01):
                if self._mix.done >= last + self._every:
                    last = self._mix.done
                    # Not always at the end of a command: somewhere within the next ones.
                    self._over.wait(self._rng.random() * 0.4)
                    self._rng.choice(self._faults)()
        except BaseException as error:  # noqa: BLE001 - shown by __exit__, in the test's own thread
            self.error = error


def kill_server(server: Server) -> None:
    server.kill()
    server.start()


def kill_worker(server: Server) -> None:
    for pid in server.worker_pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)


def kill_agent(client: Client) -> None:
    pid_file = next(Path(client.env["LATTICE_REMOTE_RUNTIME_DIR"]).glob("agent*.pid"), None)
    if pid_file is not None:
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(int(pid_file.read_text().split()[0]), 9)


def kill_command(client: Client) -> None:
    command = client.popen("comment", "LAT-1", "killed half way", "--actor", "agent:mix-0")
    with contextlib.suppress(Exception):
        command.wait(timeout=random.random() * 0.3)
    command.kill()
    command.communicate()


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_is_lost_doubled_or_different_when_everything_breaks(sandbox: Sandbox, seed: int) -> None:
    with three_people(sandbox) as (server, clients, proxy):
        mix = Mix(server, clients, seed=seed, commands=25)
        faults: list[Callable[[], None]] = [
            lambda: kill_server(server),
            lambda: kill_worker(server),
            lambda: kill_agent(clients[0]),
            lambda: kill_command(clients[2]),
            proxy.cut,
        ]
        with Strikes(mix, faults, seed=seed, every=6):
            outcome = mix.run()
        mix.check(outcome)
        assert len(outcome.acknowledged) > 10, outcome.errors


def test_a_quiet_random_mix_has_no_errors_but_lattices_own(sandbox: Sandbox) -> None:
    with three_people(sandbox) as (server, clients, _proxy):
        mix = Mix(server, clients, seed=7, commands=25)
        outcome = mix.run()
        ours = ("reach server", "connection", "token may", "undone", "internal")
        assert not [error for error in outcome.errors if any(word in error for word in ours)], outcome.errors
        mix.check(outcome)


def test_a_silent_network_does_not_hang_a_command_and_catches_up(sandbox: Sandbox) -> None:
    with three_people(sandbox) as (_server, clients, proxy):
        ana, _ben, cem = clients
        ana.ok("create", "One", "--actor", "human:ana")
        proxy.stall()
        with contextlib.suppress(RuntimeError):
            cem.ok("list")
        stalled = ana.run("comment", "LAT-1", "into the void", "--actor", "human:ana", "--json")
        proxy.flow()
        written = json.loads(stalled.stdout)["ok"]
        wait_for(lambda: cem.run("remote", "verify").returncode == 0, "cem to be current again", 40)
        found = cem.ok("comments", "LAT-1").count("into the void")
        assert found <= 1
        assert found == 1 or not written


@pytest.mark.parametrize("racers", [10])
def test_of_many_that_claim_one_task_exactly_one_wins(sandbox: Sandbox, racers: int) -> None:
    with three_people(sandbox) as (_server, clients, _proxy):
        ana = clients[0]
        ana.ok("create", "The prize", "--actor", "human:ana")
        task = json.loads(ana.ok("show", "LAT-1", "--json"))["data"]["id"]
        plan = ana.lattice_dir / "plans" / f"{task}.md"
        plan.write_text(plan.read_text() + "\nA plan.\n")
        ana.ok("remote", "push")
        running = [
            clients[n % len(clients)].popen("next", "--claim", "--actor", f"agent:r{n}", "--json")
            for n in range(racers)
        ]
        answers = [json.loads(process.communicate(timeout=60)[0]) for process in running]
        winners = [a["data"]["assigned_to"] for a in answers if a["ok"] and a.get("data")]
        assert len(winners) == 1
        owner = json.loads(clients[2].ok("show", "LAT-1", "--json"))["data"]["assigned_to"]
        assert winners == [owner]
