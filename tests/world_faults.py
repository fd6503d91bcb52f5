"""Faults of the world around client and server: git, power cuts, namespaces, late repeats and greedy tokens."""

import concurrent.futures
import contextlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import requests

from account import Account, Effect, owner_of, words_in
from command_mix import Mix
from epoch_account import Epochs
from faultproxy import FaultProxy
from lattice_remote.server.journal.segment import segment_paths
from power_cut import Disk, touch
from rest_program import call
from sandbox import BIN, Client, Sandbox, Server, tree_of, wait_for

__all__ = ["OTHER", "WorldFaults"]

OTHER = "other"
"""A second project on the server, with the first one's task numbers."""
_ROOTLESS = () if os.geteuid() == 0 else ("--map-root-user",)
_MOUNTS, _NETWORK = ("unshare", *_ROOTLESS, "--mount"), ("unshare", *_ROOTLESS, "--net")
_BEFORE_BOOT_S = 3600.0
_STALLED, _READS = 40, 60
_PATIENCE_S = 60.0
_LARGE_CHARS = 200_000
_FILL_S = 20.0
_TEXTS = ("plans", "notes")


class WorldFaults:
    """Faults; each method injects one and leaves a running server behind."""

    def __init__(self, mix: Mix, sandbox: Sandbox, proxy: FaultProxy, epochs: Epochs, *, seed: int) -> None:
        self._mix, self._sandbox, self._proxy, self._epochs = mix, sandbox, proxy, epochs
        self._server, self._clients = mix.server, mix.clients
        self._account: Account = mix.account
        self._rng = random.Random(seed + 2)
        self._count = 0
        self._earlier: dict[Path, list[dict[str, bytes]]] = {client.dir: [] for client in self._clients}
        self._late: list[tuple[Client, str, str]] = []  # client, key, who
        self._greedy: str | None = None
        self._elsewhere: Client | None = None

    def by_name(self) -> dict[str, Callable[[], object]]:
        """Return the faults by name; those that need namespaces only where they are available."""
        faults: dict[str, Callable[[], object]] = {
            "git: commit without remote.json": self.check_out_without_remote,
            "git: texts replaced": self.replace_texts_by_git,
            "client's power cut": self.cut_power_of_client,
            "server's power cut": self.cut_power_of_server,
            "keys repeated late": self.repeat_keys,
            "greedy token": self.be_greedy,
        }
        if _is_available(_NETWORK):
            faults["namespace without a network"] = self.command_without_network
        if _is_available(_MOUNTS):
            faults["namespace with another board"] = self.command_on_another_board
        return faults

    # --- git in a cache ---

    def check_out_without_remote(self) -> None:
        """Remove ``remote.json`` for a while, as a commit from before it does, and restore it (I4)."""
        client = self._rng.choice(self._clients[:-1])  # the last one's watch command would end
        repository = _Git(client)
        with self._mix.gate.shut():
            repository.commit("remote.json")
            before = _texts_of(client)
            repository.run("checkout", "-q", "-f", "empty")  # tracked texts may differ from the commit
            self._lose_edits(before, _texts_of(client))
        try:
            who = self._who("g")
            argv = ("comment", "LAT-1", f"says {who}", "--actor", f"agent:{who}")
            done = client.run(*argv)
            assert done.returncode, f"a write into a cache without remote.json succeeded: {done.stdout}"
            self._account.record(client, argv, Effect(who, "comment_added"), done)
            time.sleep(self._rng.random())
        finally:
            repository.run("checkout", "-q", "-f", "main")

    def replace_texts_by_git(self) -> None:
        """Replace tracked plans and notes by those of a commit (I4)."""
        client = self._rng.choice(self._clients)
        repository = _Git(client)
        if not repository.tracks_texts():
            repository.commit(*_TEXTS)
            return
        with self._mix.gate.shut():
            before = _texts_of(client)
            act = self._rng.choice([("checkout", "--", "."), ("stash",), ("reset", "-q", "--hard")])
            repository.run(*act, check=False)
            self._lose_edits(before, _texts_of(client))
            if act[0] == "stash" and self._rng.random() < 0.5:
                repository.run("stash", "pop", check=False)
            self._wait_for_repair(client)
        if self._rng.random() < 0.5:
            repository.commit(*_TEXTS)

    def _lose_edits(self, before: dict[Path, bytes], after: dict[Path, bytes]) -> None:
        """Record that unsent edits may be lost: the user's own tool overwrote them."""
        overwritten = [data for path, data in before.items() if after.get(path) != data]
        self._account.may_lose_edits(word for data in overwritten for word in words_in(data))

    def _wait_for_repair(self, client: Client) -> None:
        """Wait until the client has checked its files, as a person would before the next edit."""
        wait_for(lambda: client.run("list").returncode == 0, "a first read", _PATIENCE_S)

        def is_done() -> bool:
            status = _status(client)
            return set(status["unsent_edits"]) <= set(status["withheld_edits"])

        with contextlib.suppress(TimeoutError):  # edits wait while a fault has cut the network
            wait_for(is_done, "the texts to be judged", 10)

    # --- power cuts ---

    def cut_power_of_client(self) -> None:
        """Cut a client's power: cached files are older, empty, truncated or NULs (I4)."""
        struck = self._rng.choice(self._clients)
        runtime = Path(struck.env["LATTICE_REMOTE_RUNTIME_DIR"])
        machine = [each for each in self._clients if each.env["LATTICE_REMOTE_RUNTIME_DIR"] == str(runtime)]
        with self._mix.gate.shut():
            for pid_file in runtime.glob("agent*.pid"):
                with contextlib.suppress(ProcessLookupError, ValueError, FileNotFoundError):
                    pid = int(pid_file.read_text().split()[0])
                    os.kill(pid, signal.SIGKILL)
                    wait_for(lambda: not Path(f"/proc/{pid}/fd").exists() or not _is_alive(pid), "the agent's end")  # noqa: B023
            for client in machine:
                before = _texts_of(client)
                self._damage(client)
                self._lose_edits(before, _texts_of(client))
            for client in machine:
                self._wait_for_repair(client)
                self._earlier[client.dir].append(tree_of(client.lattice_dir))

    def _damage(self, client: Client) -> None:
        """Leave a cache as an earlier boot may have left it."""
        root, earlier = client.lattice_dir, self._earlier[client.dir]
        for path, data in sorted(tree_of(root).items()):
            if self._rng.random() < 0.3:
                old = [tree[path] for tree in earlier if path in tree]
                damaged = [data[: self._rng.randint(0, len(data))], b"", bytes(len(data)), *old, *old]
                (root / path).write_bytes(self._rng.choice(damaged))
            elif self._rng.random() < 0.05:
                (root / path).unlink()
        for name in ("cache_state.json", ".remote/known.json"):
            with contextlib.suppress(FileNotFoundError):
                state = json.loads((root / name).read_text())
                (root / name).write_text(json.dumps({**state, "boot_id": "another"}))
        long_ago = time.time() - time.monotonic() - _BEFORE_BOOT_S
        for folder in _TEXTS:
            for text in (root / folder).glob("*.md"):
                os.utime(text, (long_ago, long_ago))

    def cut_power_of_server(self) -> None:
        """Cut the server's power during commands: data without an fsync is lost or damaged (I2)."""
        server, switches = self._server, Path(self._server.env["LATTICE_TEST_FAULTS"])
        trace = self._sandbox.root / f"trace{self._count}{secrets.token_hex(2)}"
        self._epochs.settle()
        server.stop()
        project = server.lattice_dir().parent
        disk = Disk(project, trace)
        (switches / "trace").write_text(str(trace))
        try:
            server.start()
            end = time.monotonic() + 1 + self._rng.random() * 2
            while time.monotonic() < end:
                disk.observe()
                time.sleep(0.05)
        finally:
            (switches / "trace").unlink()
        workers = server.worker_pids()
        server.kill()
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not any(_is_alive(pid) for pid in workers), "the workers' end")
        with self._epochs.history_may_be_lost():
            disk.cut(self._rng)
            touch(self._rng, project / ".lattice")
            (switches / "boot").write_text(secrets.token_hex(8))
        server.start()

    # --- namespaces ---

    def command_without_network(self) -> None:
        """Run a sandboxed command without network; later ones outside reach the server (I13)."""
        client, who = self._rng.choice(self._clients), self._who("n")
        argv = ("comment", "LAT-1", f"says {who}", "--actor", f"agent:{who}")
        done = _inside(client, _NETWORK, argv)
        assert done.returncode, f"a command without a network succeeded: {done.stdout}"
        self._account.record(client, argv, Effect(who, "comment_added"), done)
        outside = client.run("list")
        assert "unreachable" not in outside.stderr, f"a command outside got the sandbox's network: {outside.stderr}"

    def command_on_another_board(self) -> None:
        """Run a command in a container where the client's path is another project (I13)."""
        client = self._clients[0]
        if self._elsewhere is None:
            self._elsewhere = self._set_up_elsewhere(client)
        who = self._who("o")
        argv = ("comment", "LAT-1", f"says {who}", "--actor", f"agent:{who}")
        done = _inside(self._elsewhere, _MOUNTS, argv, over=client.dir)
        self._account.record(client, argv, Effect(who, "comment_added", board=OTHER), done)

    def _set_up_elsewhere(self, client: Client) -> Client:
        other = client.elsewhere(self._sandbox.root / "elsewhere")
        other.env = {**client.env, "LATTICE_TOKEN": self._server.token(owner_of(client), "agent:*", slug=OTHER)}
        argv = ("remote", "add", "origin", self._proxy.url, "--project", OTHER)
        wait_for(lambda: other.run(*argv).returncode == 0, "the other board", _PATIENCE_S)

        def create() -> bool:
            who = self._who("o")
            argv = ("create", f"Task {who}", "--actor", f"agent:{who}")
            done = other.run(*argv)
            self._account.record(client, argv, Effect(who, "task_created", board=OTHER), done)
            return done.returncode == 0

        wait_for(create, "a task on the other board", _PATIENCE_S)
        return other

    # --- programs over HTTP ---

    def repeat_keys(self) -> None:
        """Repeat requests whose answers have left the journal (I6)."""
        fresh = self._rng.choice(self._clients), secrets.token_hex(8), self._who("k")
        was_done = self._comment_with_key(*fresh).returncode == 0
        is_gone = self._fill_journal(but=fresh[0])
        again = self._comment_with_key(*fresh, is_late=True)
        assert not (was_done and is_gone) or "may have taken effect" in again.stderr, again
        for late in self._rng.sample(self._late, min(3, len(self._late))):
            self._comment_with_key(*late, is_late=True)
        self._late.append(fresh)

    def _comment_with_key(
        self, client: Client, key: str, who: str, *, is_late: bool = False
    ) -> subprocess.CompletedProcess[str]:
        body = {"body": f"with a key {who}", "actor": f"agent:{who}"}
        done = call(client, "POST", "/tasks/LAT-1/comments", body, key=key)
        if done.returncode == 0 or not is_late:
            self._account.record(client, tuple(done.args), Effect(who, "comment_added"), done)
        return done

    def _fill_journal(self, *, but: Client) -> bool:
        """Let the others write large comments until the journal's segments are gone; False: not in time."""
        journal = self._server.data / "projects" / "board" / "journal"
        before, end = set(segment_paths(journal)), time.monotonic() + _FILL_S
        others = [client for client in self._clients if client is not but]
        while before & set(segment_paths(journal)) and time.monotonic() < end:
            client, who = self._rng.choice(others), self._who("f")
            body = {"body": f"{who} {'x' * _LARGE_CHARS}", "actor": f"agent:{who}"}
            done = call(client, "POST", "/tasks/LAT-1/comments", body)
            self._account.record(client, (*done.args[:2], who), Effect(who, "comment_added"), done)
        return not before & set(segment_paths(journal))

    def be_greedy(self) -> None:
        """Let one token request much and read nothing; another's read is answered (I10)."""
        if self._greedy is None:
            self._greedy = self._server.token("human:greedy")
        with contextlib.ExitStack() as stack:
            for _ in range(_STALLED):
                with contextlib.suppress(OSError):
                    stack.enter_context(_stalled_read(self._server, self._greedy))
            with concurrent.futures.ThreadPoolExecutor(12) as pool:
                reads = [pool.submit(_read, self._server, self._greedy or "") for _ in range(_READS)]
                token = self._clients[0].env["LATTICE_TOKEN"]
                wait_for(lambda: _read(self._server, token) == 200, "another token's read", _PATIENCE_S)
                for read in reads:
                    read.result()

    def _who(self, kind: str) -> str:
        self._count += 1
        return f"{kind}y{self._mix.seed}x{self._count}x"


class _Git:
    """The git repository of a client's directory: branch ``empty`` tracks nothing, ``main`` what was committed."""

    def __init__(self, client: Client) -> None:
        self._directory = client.dir
        if not (client.dir / ".git").exists():
            self.run("init", "-q", "-b", "main")
            self.run("commit", "-q", "--allow-empty", "-m", "empty")
            self.run("branch", "empty")

    def run(self, *argv: str, check: bool = True) -> str:
        identity = ("-c", "user.name=Ana", "-c", "user.email=ana@example.org", "-c", "advice.detachedHead=false")
        env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        done = subprocess.run(
            ["git", *identity, *argv], cwd=self._directory, env=env, capture_output=True, text=True, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"git {' '.join(argv)}: {done.stderr}")
        return done.stdout

    def commit(self, *names: str) -> None:
        """Track these files of the cache, as they are now."""
        present = [f".lattice/{name}" for name in names if (self._directory / ".lattice" / name).exists()]
        for path in present:
            self.run("add", "-f", path, check=False)  # a text that was removed meanwhile is not added
        self.run("commit", "-q", "--allow-empty", "-m", "board")

    def tracks_texts(self) -> bool:
        return bool(self.run("ls-files", *(f".lattice/{folder}" for folder in _TEXTS)))


@cache
def _is_available(wall: tuple[str, ...]) -> bool:
    try:
        return subprocess.run([*wall, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def _inside(
    client: Client, wall: tuple[str, ...], argv: tuple[str, ...], *, over: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``lattice`` in namespaces of its own, its directory mounted ``over`` another one."""
    mount = f'mount --bind "{client.dir}" "{over}"; cd "{over}"; ' if over else ""
    return subprocess.run(
        [*wall, "sh", "-ec", f'{mount}exec "$@"', "sh", BIN / "lattice", *argv],
        cwd=client.dir,
        env=client.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=_PATIENCE_S,
    )


def _texts_of(client: Client) -> dict[Path, bytes]:
    texts = {}
    for folder in _TEXTS:
        for path in (client.lattice_dir / folder).glob("task_*.md"):
            with contextlib.suppress(FileNotFoundError):
                texts[path] = path.read_bytes()
    return texts


def _status(client: Client) -> dict[str, Any]:
    done = client.run("remote", "status", "--json")
    return dict(json.loads(done.stdout)["data"])


@contextlib.contextmanager
def _stalled_read(server: Server, token: str) -> Iterator[None]:
    """Request the board and read nothing of the answer."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        request = f"GET /projects/board/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n"
        connection.sendall(request.encode() * 5)
        yield


def _read(server: Server, token: str) -> int:
    url = f"{server.url}/projects/board/tasks"
    try:
        return requests.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=30).status_code
    except requests.RequestException:
        return 0


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
