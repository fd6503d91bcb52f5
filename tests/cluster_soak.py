"""Seed after seed of writers on a cluster whose nodes and NATS servers are killed, paused and stopped.

    python tests/cluster_soak.py --seeds 20 --first 1

Each seed runs three nodes and three NATS servers. It fails if an acknowledged write is lost or doubled, if nodes end
with different files, or if an observer of one node's events has seen another history.
"""

import argparse
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "server"), str(HERE / "server/cluster"), str(HERE.parent / "examples")]

import requests  # noqa: E402
from cluster_nodes import RunningCluster, running_cluster, wait_until  # noqa: E402
from harness import tree_of  # noqa: E402
from nats_servers import NatsCluster, nats_cluster  # noqa: E402

_NAMES = "abc"
_WRITE_S = 120.0


@dataclass
class Account:
    """Writes, by key, with their titles; ``gaps`` are the times without an acknowledged write."""

    acknowledged: dict[str, str] = field(default_factory=dict)
    attempted: set[str] = field(default_factory=set)
    times: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def write(cluster: RunningCluster, account: Account, name: str, count: int, stop: threading.Event) -> None:
    """Create tasks one after the other; a busy or unreachable node is asked again, then another one."""
    rng = random.Random(name)
    session = requests.Session()
    session.headers["Authorization"] = f"Bearer {cluster.token}"
    for number in range(100_000):
        if stop.is_set() and number >= count:
            return
        title = f"{name}-{number}"
        with account.lock:
            account.attempted.add(title)
        ends = time.monotonic() + _WRITE_S
        while True:
            node = cluster.nodes[rng.choice(_NAMES)]
            url = f"http://127.0.0.1:{node.port}/projects/web/tasks"
            try:
                answer = session.post(url, json={"title": title}, headers={"Idempotency-Key": title}, timeout=20)
            except requests.RequestException:
                answer = None
            if answer is not None and answer.status_code == 201:
                with account.lock:
                    account.acknowledged[title] = answer.json()["data"]["id"]
                    account.times.append(time.monotonic())
                break
            if answer is not None and answer.status_code not in (429, 502, 503):
                with account.lock:
                    account.errors.append(f"{title}: {answer.status_code} {answer.text[:200]}")
                break
            if time.monotonic() > ends:
                with account.lock:
                    account.errors.append(f"{title}: not written in {_WRITE_S:g} s")
                return
            time.sleep(0.1)


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
            threading.Thread(target=write, args=(cluster, account, f"w{number}", writes, stop), daemon=True)
            for number in range(3)
        ]
        observer = Observer(cluster)
        for writer in writers:
            writer.start()
        try:
            for _ in range(strikes):
                time.sleep(rng.uniform(0.5, 2.0))
                name, strike = rng.choice(sorted(faults(cluster, nats, rng).items()))
                strike()
                struck[name] += 1
        finally:
            stop.set()
        for writer in writers:
            writer.join(_WRITE_S * 2)
        assert not account.errors, account.errors
        for name in _NAMES:
            wait_until(lambda name=name: cluster.is_open(name), f"node {name} is open", 180)
        wait_until(lambda: agree(cluster), "the nodes agree", 180)
        head = cluster.head("a")[1]
        wait_until(lambda: observer.seen[-1:] == [head], f"the observer has seen change {head}")
        observer.stop()
        titles = Counter(_titles(cluster.tree("a")))
        lost = [title for title in account.acknowledged if not titles[title]]
        doubled = [title for title, count in titles.items() if count > 1]
        gaps = [later - earlier for earlier, later in zip(account.times, account.times[1:], strict=False)]
        assert not lost, f"lost: {lost}"
        assert not doubled, f"doubled: {doubled}"
        assert observer.seen == list(range(1, head + 1)), f"the observer has seen another history: {observer.seen}"
        assert titles.keys() <= account.attempted
    done = ", ".join(f"{count} x {name}" for name, count in sorted(struck.items()))
    return (
        f"seed {seed}: {len(account.acknowledged)} acknowledged, 0 lost, 0 doubled, 0 different, head {head}, "
        f"{len(observer.seen)} seen, longest time without a write {max(gaps, default=0):.1f} s; {done}"
    )


def agree(cluster: RunningCluster) -> bool:
    """Return whether all nodes have the same head and the same files."""
    heads = {cluster.head(name) for name in _NAMES}
    trees = {frozenset(tree_of(cluster.tree(name)).items()) for name in _NAMES}
    return len(heads) == len(trees) == 1 and ("", -1) not in heads


def _titles(tree: Path) -> list[str]:
    import json

    return [json.loads(path.read_bytes())["title"] for path in (tree / "tasks").glob("*.json")]


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
