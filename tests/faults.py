"""Faults that strike while a mix of commands runs: the scenario behind the fault tests and ``make soak``."""

import contextlib
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from faultproxy import FaultProxy
from mix import Mix, Outcome
from sandbox import BIN, Client, Sandbox, Server

__all__ = ["Strikes", "break_everything", "three_people"]


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

    def __init__(self, mix: Mix, faults: dict[str, Callable[[], object]], *, seed: int, every: int) -> None:
        self._mix, self._faults, self._every = mix, faults, every
        self._rng = random.Random(seed)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._strike)
        self.struck: list[str] = []
        """What struck, in order."""
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
                    name = self._rng.choice(sorted(self._faults))
                    self.struck.append(name)
                    self._faults[name]()
        except BaseException as error:  # noqa: BLE001 - shown by __exit__, in the test's own thread
            self.error = error


def kill_server(server: Server) -> None:
    server.kill()
    server.start()


def restart_server(server: Server) -> None:
    server.stop()
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


def lattice_on_the_server(server: Server, env: dict[str, str], word: int) -> None:
    """Somebody runs plain ``lattice`` in the server's directory (I12)."""
    plain = {name: value for name, value in env.items() if not name.startswith("LATTICE")}
    subprocess.run(
        [BIN / "lattice", "create", f"By hand {word}", "--actor", "human:root"],
        cwd=server.lattice_dir().parent,
        env=plain,
        capture_output=True,
        timeout=60,
        check=True,
    )


def break_everything(sandbox: Sandbox, *, seed: int, commands: int, every: int = 6) -> tuple[Outcome, list[str]]:
    """Run a mix with every fault striking, insist on what must be true afterwards, return what came of it.

    Raises:
        AssertionError: something acknowledged is lost, done twice, or different.
    """
    with three_people(sandbox) as (server, clients, proxy):
        mix = Mix(server, clients, seed=seed, commands=commands)
        by_hand = iter(range(1000))
        faults: dict[str, Callable[[], object]] = {
            "server killed": lambda: kill_server(server),
            "server restarted": lambda: restart_server(server),
            "worker killed": lambda: kill_worker(server),
            "agent killed": lambda: kill_agent(clients[0]),
            "command killed": lambda: kill_command(clients[2]),
            "plain lattice on the server": lambda: lattice_on_the_server(server, clients[0].env, next(by_hand)),
            "network cut": proxy.cut,
        }
        with Strikes(mix, faults, seed=seed, every=every) as strikes:
            outcome = mix.run()
        mix.check(outcome)
    return outcome, strikes.struck
