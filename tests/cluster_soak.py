"""Seed after seed of writers on a cluster whose nodes and NATS servers are killed, paused and stopped.

    python tests/cluster_soak.py --seeds 20 --first 1

Each seed runs three nodes and three NATS servers. Writers create tasks, comment, and replace plans of up to 900 kB.
It fails if an acknowledged write is lost or doubled, if nodes or caches end with different files, or if an observer of
the nodes' events has seen another history.
"""

import argparse
import asyncio
import contextlib
import json
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "server"), str(HERE / "server/cluster"), str(HERE.parent / "examples")]

import requests  # noqa: E402
from cluster_nodes import RunningCluster, running_cluster, wait_until  # noqa: E402
from harness import tree_of  # noqa: E402
from nats_servers import NatsCluster, nats_cluster  # noqa: E402

from faultproxy import FaultProxy  # noqa: E402
from memory_client import MemoryClient, close_all  # noqa: E402

_NAMES = "abc"
_WRITE_S = 120.0


@dataclass
class Account:
    """Acknowledged writes by their marks; ``gaps`` are the times without an acknowledged write.

    Attributes:
        tasks: title to id.
        comments: mark to task id.
        plans: the last text of each task.
    """

    tasks: dict[str, str] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    plans: dict[str, str] = field(default_factory=dict)
    attempted: set[str] = field(default_factory=set)
    times: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self, tree: Path) -> None:
        """Raise AssertionError unless a node's files have each acknowledged write once."""
        titles = Counter(json.loads(path.read_bytes())["title"] for path in (tree / "tasks").glob("*.json"))
        bodies = Counter(
            event["data"]["body"].partition(" ")[0]
            for path in (tree / "events").glob("task_*.jsonl")
            for event in map(json.loads, path.read_text().splitlines())
            if event["type"] == "comment_added"
        )
        for found, acknowledged in ((titles, self.tasks), (bodies, self.comments)):
            assert not (lost := [mark for mark in acknowledged if not found[mark]]), f"lost: {lost}"
            assert not (doubled := [mark for mark, count in found.items() if count > 1]), f"doubled: {doubled}"
            assert found.keys() <= self.attempted
        for task, text in self.plans.items():
            assert (tree / f"plans/{task}.md").read_text() == text, f"plan of {task}"


class Writer:
    """Writes, one after the other; a busy or unreachable node is asked again, then another one."""

    def __init__(self, cluster: RunningCluster, account: Account, name: str) -> None:
        self._cluster = cluster
        self._account = account
        self._name = name
        self._rng = random.Random(name)
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {cluster.token}"
        self._tasks: list[str] = []

    def run(self, count: int, stop: threading.Event) -> None:
        for number in range(100_000):
            if (stop.is_set() and number >= count) or not self._write(f"{self._name}-{number}"):
                return

    def _write(self, mark: str) -> bool:
        account, kind = self._account, self._rng.random()
        with account.lock:
            account.attempted.add(mark)
        if kind < 0.5 or not self._tasks:
            answer = self._send("POST", "tasks", mark, json={"title": mark})
            if answer is not None:
                account.tasks[mark] = answer.json()["data"]["id"]
                self._tasks.append(account.tasks[mark])
            return answer is not None
        task = self._rng.choice(self._tasks[-5:])
        padding = "x" * self._rng.choice([0, 0, 1000, 100_000, 300_000])
        if kind < 0.85:
            answer = self._send("POST", f"tasks/{task}/comments", mark, json={"body": f"{mark} {padding}"})
            if answer is not None:
                account.comments[mark] = task
            return answer is not None
        text = f"{mark} {padding * 3}\n"
        answer = self._send("PUT", f"plans/{task}", mark, data=text)
        if answer is not None:
            account.plans[task] = text
        return answer is not None

    def _send(self, method: str, path: str, mark: str, **content: object) -> requests.Response | None:
        """Send a write until it is acknowledged; None: it was not, see ``errors``."""
        headers = {"Idempotency-Key": mark}
        ends = time.monotonic() + _WRITE_S
        while True:
            node = self._cluster.nodes[self._rng.choice(_NAMES)]
            url = f"http://127.0.0.1:{node.port}/projects/web/{path}"
            answer = None
            with contextlib.suppress(requests.RequestException):
                answer = self._session.request(method, url, headers=headers, timeout=20, **content)  # type: ignore[arg-type]
            if answer is not None and answer.ok:
                with self._account.lock:
                    self._account.times.append(time.monotonic())
                return answer
            if answer is not None and answer.status_code not in (429, 502, 503):
                error = f"{mark}: {answer.status_code} {answer.text[:200]}"
            elif time.monotonic() > ends:
                error = f"{mark}: not written in {_WRITE_S:g} s"
            else:
                time.sleep(0.1)
                continue
            with self._account.lock:
                self._account.errors.append(error)
            return None


class Caches:
    """A cache at each node, and one that connects to another node each time, in a thread."""

    def __init__(self, cluster: RunningCluster) -> None:
        self._cluster = cluster
        self._doors = {name: FaultProxy(cluster.nodes[name].port) for name in _NAMES}
        self._hop = FaultProxy(cluster.nodes["a"].port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._clients = self._call(self._started([door.url for door in (*self._doors.values(), self._hop)]))

    def _call[T](self, work: Coroutine[None, None, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(300)

    async def _started(self, urls: list[str]) -> list[MemoryClient]:
        clients = [MemoryClient(url, self._cluster.token, slug="web") for url in urls]
        for client in clients:
            client.start()
        return clients

    def follow(self, name: str) -> None:
        """Know the nodes' ports after a restart; the last cache connects to this node."""
        for node, door in self._doors.items():
            door.target = self._cluster.nodes[node].port
        self._hop.target = self._cluster.nodes[name].port
        self._hop.cut()

    def check(self, head: int, tree: Path) -> int:
        """Raise AssertionError unless all caches come to equal ``tree``; return how often one was compared anew."""
        expected = tree_of(tree)
        for client in self._clients:
            self._call(client.current(head, timeout_s=180.0))
            assert client.files.keys() == expected.keys()
            assert not (differing := [path for path in expected if client.files[path] != expected[path]]), differing
        return sum(client.resyncs - 1 for client in self._clients)

    def close(self) -> None:
        self._call(close_all(self._clients))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        for door in (*self._doors.values(), self._hop):
            door.close()


def faults(cluster: RunningCluster, nats: NatsCluster, rng: random.Random) -> dict[str, Callable[[], None]]:
    """Return what may happen, by name. Each fault ends before the next one."""

    def owner() -> str:
        for name in _NAMES:
            log = (cluster.nodes[name].data.path.parent / "log").read_text(errors="replace")
            if log.rfind("this node owns the project") > log.rfind("no longer owns the project"):
                return name
        return rng.choice(_NAMES)

    def kill_node(name: str) -> None:
        cluster.kill(name)
        time.sleep(rng.uniform(0.0, 6.0))
        cluster.start(name)

    def pause_node(name: str) -> None:
        process = cluster.nodes[name].process
        process.send_signal(signal.SIGSTOP)
        time.sleep(rng.uniform(1.0, 9.0))
        process.send_signal(signal.SIGCONT)

    def stop_node(name: str) -> None:
        cluster.nodes[name].end()
        cluster.start(name)

    def kill_nats(names: list[int], how: str) -> None:
        servers = [nats.servers[number] for number in names]
        for server in servers:
            server.pause() if how == "pause" else server.kill() if how == "kill" else server.stop()
        time.sleep(rng.uniform(0.5, 6.0))
        for server in servers:
            server.resume() if how == "pause" else server.start()

    def both() -> None:
        name = owner()
        cluster.kill(name)
        kill_nats([rng.randrange(3)], "kill")
        cluster.start(name)

    def everything() -> None:
        for name in _NAMES:
            cluster.kill(name)
        kill_nats([0, 1, 2], "kill")
        for name in _NAMES:
            cluster.start(name)

    def kill_worker() -> None:
        name = owner()
        from sandbox import descendants

        for pid in descendants(cluster.nodes[name].process.pid):
            words = Path(f"/proc/{pid}/cmdline").read_bytes() if Path(f"/proc/{pid}").exists() else b""
            if b"worker.main" in words:
                import os

                os.kill(pid, signal.SIGKILL)
                return

    return {
        "kill the owner": lambda: kill_node(owner()),
        "kill a node": lambda: kill_node(rng.choice(_NAMES)),
        "pause the owner": lambda: pause_node(owner()),
        "stop the owner": lambda: stop_node(owner()),
        "kill the owner's worker": kill_worker,
        "kill a NATS server": lambda: kill_nats([rng.randrange(3)], "kill"),
        "stop a NATS server": lambda: kill_nats([rng.randrange(3)], "stop"),
        "pause a NATS server": lambda: kill_nats([rng.randrange(3)], "pause"),
        "kill all NATS servers": lambda: kill_nats([0, 1, 2], "kill"),
        "kill the owner and a NATS server": both,
        "kill everything": everything,
    }


class Observer:
    """A listener to one node's events, resumed at its position; it must see one history."""

    def __init__(self, cluster: RunningCluster) -> None:
        self._cluster = cluster
        self.seen: list[int] = []
        self._last = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._stop.is_set():
            node = self._cluster.nodes[_NAMES[number % 3]]
            number += 1
            headers = {"Authorization": f"Bearer {self._cluster.token}", "Accept": "text/event-stream"}
            if self._last:
                headers["Last-Event-ID"] = self._last
            try:
                url = (
                    f"http://127.0.0.1:{node.port}/projects/web/events/stream?since=0"
                    if not self._last
                    else f"http://127.0.0.1:{node.port}/projects/web/events/stream"
                )
                with requests.get(url, headers=headers, stream=True, timeout=(3, 3)) as answer:
                    kind = ""
                    for line in answer.iter_lines(decode_unicode=True):
                        if line.startswith("event:"):
                            kind = line.removeprefix("event:").strip()
                        elif line.startswith("id:"):
                            self._last = line.removeprefix("id:").strip()
                            if kind in ("change", "reset"):
                                self.seen.append(int(self._last.split("-")[1]) if kind == "change" else -1)
            except requests.RequestException:
                time.sleep(0.2)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(20)


def one(seed: int, directory: Path, *, writes: int, strikes: int) -> str:
    """Run one seed; return its account. Raises AssertionError."""
    rng = random.Random(seed)
    struck: Counter[str] = Counter()
    with nats_cluster(3, directory / "nats") as nats, running_cluster(nats, directory, _NAMES) as cluster:
        account, stop = Account(), threading.Event()
        writers = [
            threading.Thread(target=Writer(cluster, account, f"w{number}").run, args=(writes, stop), daemon=True)
            for number in range(3)
        ]
        observer, caches = Observer(cluster), Caches(cluster)
        try:
            for writer in writers:
                writer.start()
            for _ in range(strikes):
                time.sleep(rng.uniform(0.5, 2.0))
                name, strike = rng.choice(sorted(faults(cluster, nats, rng).items()))
                strike()
                caches.follow(rng.choice(_NAMES))
                struck[name] += 1
            stop.set()
            for writer in writers:
                writer.join(_WRITE_S * 2)
            assert not account.errors, account.errors
            for name in _NAMES:
                wait_until(lambda name=name: cluster.is_open(name), f"node {name} is open", 180)
            wait_until(lambda: agree(cluster), "the nodes agree", 180)
            head = cluster.head("a")[1]
            wait_until(lambda: observer.seen[-1:] == [head], f"the observer has seen change {head}")
            resyncs = caches.check(head, cluster.tree("a"))
        finally:
            stop.set()
            observer.stop()
            caches.close()
        account.check(cluster.tree("a"))
        assert observer.seen == list(range(1, head + 1)), f"the observer has seen another history: {observer.seen}"
        gaps = [later - earlier for earlier, later in zip(account.times, account.times[1:], strict=False)]
    done = ", ".join(f"{count} x {name}" for name, count in sorted(struck.items()))
    return (
        f"seed {seed}: {len(account.times)} acknowledged, 0 lost, 0 doubled, 0 different, head {head}, "
        f"{len(observer.seen)} seen, 4 caches equal, {resyncs} resyncs, "
        f"longest time without a write {max(gaps, default=0):.1f} s; {done}"
    )


def agree(cluster: RunningCluster) -> bool:
    """Return whether all nodes have the same head and the same files."""
    heads = {cluster.head(name) for name in _NAMES}
    trees = {frozenset(tree_of(cluster.tree(name)).items()) for name in _NAMES}
    return len(heads) == len(trees) == 1 and ("", -1) not in heads


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--writes", type=int, default=40, help="of each of three writers")
    parser.add_argument("--strikes", type=int, default=5)
    options = parser.parse_args()
    failed = 0
    for seed in range(options.first, options.first + options.seeds):
        with tempfile.TemporaryDirectory(prefix="cluster-", ignore_cleanup_errors=True) as directory:
            try:
                line = one(seed, Path(directory), writes=options.writes, strikes=options.strikes)
                print(line, flush=True)
            except Exception:  # noqa: BLE001 - the next seed runs
                failed += 1
                print(f"seed {seed} FAILED", flush=True)
                traceback.print_exc()
                for name in _NAMES:
                    log = Path(directory) / name / "log"
                    if log.exists():
                        kept = Path(tempfile.gettempdir()) / f"cluster-soak-{seed}-{name}.log"
                        kept.write_bytes(log.read_bytes())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
