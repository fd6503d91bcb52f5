"""Faults during a mix of commands, and the clients that they affect."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from account import Account, Effect, events_in, owner_of
from command_mix import Mix
from epoch_account import Epochs
from faultproxy import FaultProxy
from hook_record import Hooked
from launcher_programs import warm_processes
from preloaded_programs import Warm
from rest_program import call
from sandbox import Client, Sandbox, Server, wait_for
from world_faults import OTHER, WorldFaults

__all__ = ["Faults", "Strikes", "inject", "three_people", "write_over"]

_RARE = {"journal damaged", "journal removed", "data rolled back", "network half open", "server's power cut"}
"""Strike less often: they take much away that was acknowledged, or cost a minute."""
DORA = "human:dora"
SMALL_JOURNAL = {"max_bytes": 2_000_000, "segment_bytes": 256_000}
"""Bounds that what people do here does not reach, and a fault that writes much does (``WorldFaults.repeat_keys``)."""
_INJECT = Path(__file__).resolve().parent / "inject"


@contextlib.contextmanager
def three_people(sandbox: Sandbox, *, pushed: bool = False) -> Iterator[tuple[Server, list[Client], FaultProxy]]:
    """A server, and three clients on two machines that reach it through a proxy.

    With ``pushed`` the first of them brings a project of its own, which becomes the server's.
    """
    server = sandbox.server()
    (server.data / "config.json").write_text(json.dumps({"journal": SMALL_JOURNAL}))
    inject(server)
    server.project()
    server.project(OTHER)
    Hooked(server).install()
    server.start()
    with FaultProxy(server.port) as proxy:
        clients: list[Client] = []
        started: set[str] = set()
        for name, machine in (("ana", "one"), ("ben", "one"), ("cem", "two")):
            client = sandbox.client(name, machine)
            if machine not in started:
                started.add(machine)
                start_agent(sandbox, client)
            client.env["LATTICE_TOKEN"] = server.token(f"human:{name}", "agent:*")
            if pushed and not clients:
                _make_local(client)
            argv = ("remote", "add", "origin", proxy.url, "--project", "board")
            wait_for(lambda: client.run(*argv).returncode == 0, f"{name} to be connected", 60)  # noqa: B023
            if pushed and not clients:
                wait_for(lambda: client.run("remote", "push").returncode == 0, "the project to be pushed", 60)  # noqa: B023
            clients.append(client)
        yield server, clients, proxy


def _make_local(client: Client) -> None:
    """Give a client a project of its own, with a little in it."""
    before = ("--actor", "human:before")
    client.ok("init", "--project-code", "LAT", "--no-setup-claude", "--no-setup-agents", "--no-seed", *before)
    for title in ("from before", "archived before"):
        client.ok("create", title, *before)
    client.ok("archive", "LAT-2", *before)


def start_agent(sandbox: Sandbox, client: Client) -> None:
    """Start a machine's agent warm, before its first command would start one."""
    if isinstance(sandbox.programs, Warm):
        nothing = subprocess.DEVNULL
        agent = sandbox.programs.start(
            "agent", [], cwd=sandbox.root, env=client.env, stdout=nothing, stderr=nothing, new_session=True
        )
        agent.leave()
        runtime = Path(client.env["LATTICE_REMOTE_RUNTIME_DIR"])
        wait_for(lambda: list(runtime.glob("agent*.sock")), "the agent's socket")


def write_over(backup: Path, data: Path) -> None:
    """Restore as a snapshot of the file system does: every file and directory keeps its inode."""
    for directory, names, files in os.walk(data, topdown=False):
        there = backup / Path(directory).relative_to(data)
        for name in files:
            if not (there / name).exists():
                Path(directory, name).unlink()
        for name in names:
            if not (there / name).exists():
                Path(directory, name).rmdir()
    for directory, _, files in os.walk(backup):
        here = data / Path(directory).relative_to(backup)
        here.mkdir(exist_ok=True)
        for name in files:
            with (here / name).open("r+b" if (here / name).exists() else "wb") as file:
                file.truncate()
                file.write(Path(directory, name).read_bytes())


def inject(server: Server) -> Path:
    """Make the server's workers obey the files in the returned directory (``inject/sitecustomize.py``); then start."""
    directory = server.data.parent / "inject"
    directory.mkdir()
    server.env |= {"PYTHONPATH": str(_INJECT), "LATTICE_TEST_FAULTS": str(directory)}
    return directory


class Strikes:
    """Faults during a mix, one after every few commands.

    Args:
        faults: possible faults, by name.
        every: number of commands between two of them.
    """

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
        self._thread.join(timeout=120)
        assert self.error is None, f"{self.error!r} after {self.struck}"

    def _strike(self) -> None:
        last = 0
        try:
            while not self._over.wait(0.01):
                if self._mix.done >= last + self._every:
                    last = self._mix.done
                    # Not at the end of a command, but within the next ones.
                    self._over.wait(self._rng.random() * 0.3)
                    names = sorted(self._faults)
                    weights = [1 if name in _RARE else 3 for name in names]
                    (name,) = self._rng.choices(names, weights)
                    self.struck.append(name)
                    self._faults[name]()
        except BaseException as error:  # noqa: BLE001 - shown by __exit__, in the test's own thread
            self.error = error


class Faults:
    """Faults; each method injects one and leaves a running server behind."""

    def __init__(self, mix: Mix, sandbox: Sandbox, proxy: FaultProxy, epochs: Epochs, *, seed: int) -> None:
        self._mix, self._sandbox, self._proxy, self._epochs = mix, sandbox, proxy, epochs
        self._server, self._clients = mix.server, mix.clients
        self._account: Account = mix.account
        self._rng = random.Random(seed + 1)
        self._count = 0
        self._world = WorldFaults(mix, sandbox, proxy, epochs, seed=seed)

    def by_name(self) -> dict[str, Callable[[], object]]:
        """Return all faults by name."""
        return {
            "server killed": self.kill_server,
            "server restarted": self.restart_server,
            "worker killed": self.kill_worker,
            "agent killed": self.kill_agent,
            "warm process killed": self.kill_warm_process,
            "command killed": self.kill_command,
            "another configuration": self.command_of_another_configuration,
            "network cut": self._proxy.cut,
            "network cut in a frame": lambda: self._proxy.cut_after(self._rng.randrange(1, 3000)),
            "network delayed": self.delay,
            "network half open": self._proxy.swallow,
            "disk full in the worker": self.fill_disk,
            "disk full for a second": self.fill_disk_of_all,
            "fsync failed": self.fail_fsync,
            "journal torn": self.tear_journal,
            "journal damaged": self.damage_journal,
            "journal removed": self.remove_journal,
            "data rolled back": self.roll_back,
            "cached file altered": self.alter_cached_file,
            "cached file deleted": self.delete_cached_file,
            "strange file in a cache": self.add_to_cache,
            "plain lattice on the server": self.lattice_on_the_server,
            "plain lattice beside refused requests": self.lattice_beside_refused_requests,
            "editor on the server": self.editor_on_the_server,
            **self._world.by_name(),
        }

    # --- processes ---

    def kill_server(self) -> None:
        self._server.kill()
        time.sleep(self._rng.choice([0, 0, 0.5]))
        self._server.start()

    def restart_server(self) -> None:
        self._server.stop()
        self._server.start()

    def kill_worker(self) -> None:
        for pid in self._server.worker_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_agent(self) -> None:
        client = self._rng.choice(self._clients)
        pid_file = next(Path(client.env["LATTICE_REMOTE_RUNTIME_DIR"]).glob("agent*.pid"), None)
        if pid_file is not None:
            with contextlib.suppress(ProcessLookupError, ValueError, FileNotFoundError):
                os.kill(int(pid_file.read_text().split()[0]), signal.SIGKILL)

    def kill_warm_process(self) -> None:
        for pid in warm_processes(self._rng.choice(self._clients)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_command(self) -> None:
        client, who = self._rng.choice(self._clients), self._who("k")
        command = self._sandbox.programs.start(
            "lattice",
            ("comment", "LAT-1", "killed half way", "--actor", f"agent:{who}"),
            cwd=client.dir,
            env=client.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.wait(self._rng.random() * 0.1)
        command.kill()
        if command.wait(20) == 0:
            self._account.acknowledge(Effect(who, "comment_added"), owner_of(client))
        else:
            self._account.leave_unknown(Effect(who, "comment_added"), owner_of(client))

    def command_of_another_configuration(self) -> None:
        """Let Dora, with her own home and token, work in a client's directory and its runtime directory (I13)."""
        client, who = self._rng.choice(self._clients), self._who("d")
        home = self._sandbox.root / "home" / "dora"
        env = {name: value for name, value in client.env.items() if name != "LATTICE_TOKEN"}
        env |= {"HOME": str(home), "XDG_CONFIG_HOME": str(home / ".config")}
        programs, cwd = self._sandbox.programs, client.dir
        if not home.exists():
            home.mkdir(mode=0o700)
            token = self._server.token(DORA, "agent:*")
            argv = ("remote", "login", self._proxy.url)
            wait_for(
                lambda: programs.run("lattice", argv, cwd=cwd, env=env, stdin=token).returncode == 0, "dora's login", 60
            )
        self._account.share(client, DORA)
        command = ("comment", "LAT-1", f"says {who}", "--actor", f"agent:{who}")
        done = programs.run("lattice", command, cwd=cwd, env=env)
        self._account.record(client, command, Effect(who, "comment_added"), done, owner=DORA)

    def delay(self) -> None:
        self._proxy.delay(0.1)
        time.sleep(0.8)
        self._proxy.flow()

    # --- the disk ---

    def fill_disk(self) -> None:
        """Limit the worker's files to a few KiB, for a moment."""
        for pid in self._server.worker_pids():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (self._rng.choice([200, 2000, 20_000]), -1))
        time.sleep(0.5)
        for pid in self._server.worker_pids():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (-1, -1))

    def fill_disk_of_all(self) -> None:
        """The same for the server, and every worker that it starts during that time."""
        assert self._server.process is not None, "every fault leaves a running server behind"
        pids = [self._server.process.pid, *self._server.worker_pids()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (self._rng.choice([200, 2000, 20_000]), -1))
        time.sleep(1.0)
        for pid in {*pids, *self._server.worker_pids()}:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (-1, -1))

    def fail_fsync(self) -> None:
        """Let fsync fail for a moment, then restart the server: the project is closed until then."""
        flag = Path(self._server.env["LATTICE_TEST_FAULTS"], "fsync-fails")
        flag.touch()
        time.sleep(0.3)
        flag.unlink()
        self._server.stop()
        self._server.start()

    # --- the journal and the data directory ---

    @property
    def _journal(self) -> Path:
        return self._server.data / "projects" / "board" / "journal"

    def tear_journal(self) -> None:
        """Kill the server, and append half a record, which was never acknowledged."""
        wait_for(lambda: list(self._journal.glob("*.log")), "a journal: the last fault may have removed it")
        self._end_server()
        last = self._last_segment()
        torn = self._rng.choice([b"\0" * 40, self._rng.randbytes(200), b"\0\0\1\0" + self._rng.randbytes(30)])
        with last.open("ab") as file:
            file.write(torn)
        self._server.start()

    def damage_journal(self) -> None:
        """Cut off or change the last, acknowledged bytes of the journal. The files are whole."""
        with self._down():
            last = self._last_segment()
            data = bytearray(last.read_bytes())
            count = self._rng.randrange(1, min(300, len(data)))
            if self._rng.random() < 0.5:
                del data[-count:]
            else:
                data[-count] ^= 0x55
            last.write_bytes(data)

    def remove_journal(self) -> None:
        with self._down():
            shutil.rmtree(self._journal)

    def roll_back(self) -> None:
        """Restore the data directory from a copy that is some commands old."""
        copy = self._sandbox.root / "copy"
        if not copy.exists():
            self._server.stop()
            shutil.copytree(self._server.data, copy, symlinks=True)
            self._server.start()
            return
        with self._down():
            tokens = (self._server.data / "tokens.json").read_bytes()
            events = {event["id"] for event in events_in(self._server.lattice_dir())}
            if self._rng.random() < 0.5:
                shutil.rmtree(self._server.data)
                copy.rename(self._server.data)
            else:  # as a snapshot of the file system is restored: only a client's position reveals it
                write_over(copy, self._server.data)
                shutil.rmtree(copy)
            (self._server.data / "tokens.json").write_bytes(tokens)
            self._account.forget_what_is_not_in(self._server.lattice_dir(), events)

    @contextlib.contextmanager
    def _down(self) -> Iterator[None]:
        """Within the block the server is down and no command runs, so that all acknowledgements are known."""
        with self._mix.gate.shut():
            self._epochs.settle()
            self._end_server()
            with self._epochs.history_may_be_lost():
                yield
            self._server.start()

    def _end_server(self) -> None:
        """Kill or stop it, and wait for its workers, which may run a last command."""
        workers = self._server.worker_pids()
        if self._rng.random() < 0.5:
            self._server.kill()
        else:
            self._server.stop()
        wait_for(lambda: not any(Path(f"/proc/{pid}/fd").exists() and _is_alive(pid) for pid in workers), "the workers")

    def _last_segment(self) -> Path:
        return max(self._journal.glob("*.log"))

    # --- caches ---

    def alter_cached_file(self) -> None:
        """Append to a file of a cache as a foreign process: the agent repairs it (I4)."""
        path = self._cached_file()
        if path is not None:
            with path.open("ab") as file:
                file.write(b"by another process")

    def delete_cached_file(self) -> None:
        path = self._cached_file()
        if path is not None:
            path.unlink(missing_ok=True)

    def add_to_cache(self) -> None:
        cache = self._rng.choice(self._clients).lattice_dir
        (cache / "tasks" / f"{self._who('strange')}.json").write_text("{}")

    def _cached_file(self) -> Path | None:
        """Return a file of a cache that is not editable."""
        cache = self._rng.choice(self._clients).lattice_dir
        files = [
            path for folder in ("tasks", "events", "resources") for path in sorted(cache.glob(f"{folder}/**/*.json*"))
        ]
        return self._rng.choice(files) if files else None

    # --- people on the server's machine ---

    def lattice_on_the_server(self) -> None:
        """Run plain ``lattice`` in the server's directory (I12)."""
        who = self._who("h")
        argv = self._rng.choice([("create", "By hand"), ("comment", "LAT-1", "by hand")])
        done = self._sandbox.programs.run(
            "lattice", (*argv, "--actor", f"agent:{who}"), cwd=self._server.lattice_dir().parent, env=self._plain_env()
        )
        if done.returncode == 0:
            self._account.acknowledge(Effect(who, {"create": "task_created"}.get(argv[0], "comment_added")), "")

    def lattice_beside_refused_requests(self) -> None:
        """Run plain ``lattice`` while the server undoes requests that changed the same task (I12)."""
        over = threading.Event()

        def ask() -> None:
            while not over.is_set():
                changes = {"title": "refused", "status": "no such status"}
                assert call(self._clients[0], "PATCH", "/tasks/LAT-1", changes).returncode

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            self.lattice_on_the_server()
        finally:
            over.set()
            asking.join()

    def editor_on_the_server(self) -> None:
        """Edit a plan in the server's directory: saved by rename, in place, or in two halves."""
        plans = sorted((self._server.lattice_dir() / "plans").glob("*.md"))
        if not plans:
            return
        plan = self._rng.choice(plans)
        with contextlib.suppress(FileNotFoundError):  # archived in just this moment
            text = plan.read_text() + f"\n- by hand {self._who('e')}\n"
            match self._rng.randrange(3):
                case 0:
                    scratch = plan.with_name(f".{plan.name}.swp")
                    scratch.write_text(text)
                    scratch.replace(plan)
                case 1:
                    plan.write_text(text)
                case _:
                    with plan.open("w") as file:
                        file.write(text[: len(text) // 2])
                        file.flush()
                        time.sleep(0.2)
                        file.write(text[len(text) // 2 :])

    def _plain_env(self) -> dict[str, str]:
        return {name: value for name, value in self._clients[0].env.items() if not name.startswith("LATTICE")}

    def _who(self, kind: str) -> str:
        self._count += 1
        return f"{kind}{self._mix.seed}x{self._count}x"


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
