"""Faults of a cluster, with an account of its nodes: acknowledged writes, reads, and the files and order afterwards.

    python tests/cluster_faults.py --rounds 3 --only "lost lease"

Each round runs three nodes and three NATS servers, all connected through proxies.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "server"), str(HERE / "server/cluster"), str(HERE.parent / "examples")]

import requests  # noqa: E402
from cluster_nodes import RunningCluster, running_cluster, wait_until  # noqa: E402
from nats_servers import NatsCluster, nats_cluster  # noqa: E402
from server_process import children_of  # noqa: E402

from lattice_remote.server.cluster.engine import Engine  # noqa: E402
from lattice_remote.server.cluster.order import JetStreamOrder  # noqa: E402
from lattice_remote.server.journal.segment import JournalReader, Record, decoder  # noqa: E402

__all__ = [
    "Account",
    "Acknowledged",
    "cut_follower",
    "cut_owner",
    "lose_lease",
    "owner_with_minority",
    "stream_records",
]

_WRITE_S = 120.0
_WINDOW = 16
"""Commands that a worker executes before the first is acknowledged."""
_BEHIND_S = 10.0
"""Age of what a node shows, at most."""


@dataclass(frozen=True)
class Acknowledged:
    """A write that a node acknowledged, with the change that its answer names."""

    node: str
    title: str
    number: int
    change: str
    sent: float
    answered: float
    text: str


@dataclass(frozen=True)
class Seen:
    """An answered read of a node's head."""

    node: str
    number: int
    sent: float


class Account:
    """Writers and readers of single nodes, and the answers that they got."""

    def __init__(self, cluster: RunningCluster) -> None:
        self._cluster = cluster
        self.acknowledged: list[Acknowledged] = []
        self.seen: list[Seen] = []
        self.attempted: list[str] = []
        self.errors: list[str] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    @contextmanager
    def running(self, *, writers: str, readers: str) -> Iterator[None]:
        """Write and read through these nodes within the block; each write is repeated until it is acknowledged."""
        self._stop.clear()
        began = len(self.attempted)
        for work, names in ((self._write, writers), (self._read, readers)):
            for number, name in enumerate(names):
                thread = threading.Thread(target=work, args=(name, f"{began}-{number}"), daemon=True)
                self._threads.append(thread)
                thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(_WRITE_S + 30)
            self._threads.clear()

    def count_of(self, name: str, *, since: float) -> int:
        """Return the acknowledgements by a node of writes that were sent since then."""
        with self._lock:
            return sum(ack.node == name and ack.sent >= since for ack in self.acknowledged)

    def wait_for(self, name: str, count: int = 3) -> None:
        """Wait until a node has acknowledged some further writes."""
        since = time.monotonic()
        wait_until(lambda: self.count_of(name, since=since) >= count, f"node {name} acknowledges {count} writes")

    def longest_gap_s(self, since: float) -> float:
        """Return the longest time without an acknowledgement since then."""
        with self._lock:
            times = sorted(ack.answered for ack in self.acknowledged if ack.answered >= since)
        return max(b - a for a, b in pairwise([since, *times]))

    def staleness_s(self, names: str) -> float:
        """Return for how long a change had been acknowledged, at most, when a read was sent that did not show it."""
        with self._lock:
            acknowledged = sorted(self.acknowledged, key=lambda ack: ack.number)
            seen = [each for each in self.seen if each.node in names]
        earliest: dict[int, float] = {}
        for ack in reversed(acknowledged):
            later = min(earliest.values(), default=ack.answered) if not earliest else earliest[min(earliest)]
            earliest[ack.number] = min(ack.answered, later)
        numbers = sorted(earliest)
        worst = 0.0
        for read in seen:
            following = next((number for number in numbers if number > read.number), None)
            if following is not None:
                worst = max(worst, read.sent - earliest[following])
        return worst

    def check(self) -> None:
        """Wait until the nodes agree; then each acknowledged write is there once, at its number, on all of them."""
        cluster = self._cluster
        assert not self.errors, self.errors
        for name in cluster.names:
            wait_until(lambda name=name: cluster.is_open(name), f"node {name} is open", 180)
        wait_until(cluster.agree, "the nodes agree", 180)
        tree = cluster.tree(cluster.names[0])
        titles = Counter(json.loads(path.read_bytes())["title"] for path in (tree / "tasks").glob("*.json"))
        assert not [ack for ack in self.acknowledged if not titles[ack.title]], "lost"
        assert not [title for title, count in titles.items() if count > 1], "doubled"
        assert titles.keys() <= set(self.attempted)
        hooked = Counter(cluster.hooked.read_text().split())
        assert not [event for event, count in hooked.items() if count > 1], "a hook ran twice"
        lines = [line for path in (tree / "events").glob("*.jsonl") for line in path.read_text().splitlines()]
        assert hooked.keys() <= {json.loads(line)["id"] for line in lines}, "a hook ran for an event that was undone"
        journals = {name: journal_of(cluster, name) for name in cluster.names}
        order = asyncio.run(stream_records(cluster, cluster.position(cluster.names[0])[0]))
        for name, journal in journals.items():
            assert journal[-len(order) :] == order, f"the journal of {name} differs from the stream"
        changes = {}
        for payload in order:
            record = decoder.decode(payload)
            if isinstance(record, Record) and record.change is not None:
                changes[record.seq] = record.mark.hex()
        wrong = [ack for ack in self.acknowledged if ack.number in changes and changes[ack.number] != ack.change]
        assert not wrong, "another change has the number of an acknowledged one"

    def write(self, name: str, title: str, *, until: float) -> Acknowledged | None:
        """Create a task through a node, repeated with its key until it is acknowledged; None: not before ``until``."""
        with self._lock:
            self.attempted.append(title)
        session = requests.Session()
        session.headers["Authorization"] = f"Bearer {self._cluster.token}"
        sent = time.monotonic()
        while time.monotonic() < until:
            url = f"http://127.0.0.1:{self._cluster.nodes[name].port}/projects/web/tasks"
            answer = None
            with contextlib.suppress(requests.RequestException):
                answer = session.post(url, json={"title": title}, headers={"Idempotency-Key": title}, timeout=30)
            if answer is not None and answer.status_code == 201:
                _, number, change = answer.headers["Lattice-Change"].split("-")
                ack = Acknowledged(name, title, int(number), change, sent, time.monotonic(), answer.text)
                with self._lock:
                    self.acknowledged.append(ack)
                return ack
            if answer is not None and answer.status_code not in (429, 502, 503):
                with self._lock:
                    self.errors.append(f"{title} through {name}: {answer.status_code} {answer.text[:300]}")
                return None
            time.sleep(0.1)
        return None

    def write_once(self, name: str, title: str) -> Acknowledged:
        ack = self.write(name, title, until=time.monotonic() + _WRITE_S)
        assert ack is not None, f"{title} was not acknowledged by node {name}: {self.errors}"
        return ack

    def _write(self, name: str, series: str) -> None:
        number = 0
        while not self._stop.is_set():
            title = f"{name}-{series}-{number}"
            number += 1
            if self.write(name, title, until=time.monotonic() + _WRITE_S) is None:
                with self._lock:
                    self.errors.append(f"{title} was not acknowledged")
                return

    def _read(self, name: str, series: str) -> None:
        del series
        while not self._stop.is_set():
            sent = time.monotonic()
            with contextlib.suppress(requests.RequestException):
                answer = self._cluster.ask(name, "GET", "")
                if answer.status_code == 200:
                    with self._lock:
                        self.seen.append(Seen(name, answer.json()["head"], sent))
            time.sleep(0.05)


def journal_of(cluster: RunningCluster, name: str) -> list[bytes]:
    return [payload for _, payload in JournalReader(cluster.nodes[name].data.project("web").journal).payloads(0)]


async def stream_records(cluster: RunningCluster, epoch: str) -> list[bytes]:
    """Return the records of the order, as they are in the engine."""
    engine = await Engine.connect(cluster.engine_urls, node="observer", replicas=len(cluster.engine_urls))
    try:
        order = JetStreamOrder(engine, "web", epoch)
        found: list[bytes] = []
        after = (await order.bounds())[0] - 1
        while batches := await order.read(after):
            after = batches[-1].seq
            found += [record for batch in batches for record in batch.records]
        return found
    finally:
        await engine.close()


def owner_of(cluster: RunningCluster) -> str:
    """Return the owner; waits for one."""
    wait_until(cluster.owner, "a node owns the project")
    return cluster.owner()


# --- leases that are lost ---


def lose_lease(
    nats: NatsCluster,
    cluster: RunningCluster,
    account: Account,
    *,
    count: int = 16,
    answers_only: bool = False,
    kill_worker: bool = False,
) -> str:
    """Let the owner lose its lease with ``count`` commands that it has executed, or queued, and not acknowledged.

    Args:
        answers_only: the engine gets the owner's append and lease, and its answers are lost.
        kill_worker: the owner's worker dies in between.
    """
    owner = owner_of(cluster)
    other = next(name for name in cluster.names if name != owner)
    tasks = cluster.tree(owner) / "tasks"
    before, began = len(list(tasks.glob("*.json"))), time.monotonic()
    for server in nats.servers:
        link = cluster.links[owner, server.name]
        link.swallow_answers() if answers_only else link.stall()
    titles = [f"lost-lease-{began:.3f}-{number}" for number in range(count)]
    with ThreadPoolExecutor(count) as pool:
        waiting = [pool.submit(account.write, owner, title, until=began + _WRITE_S) for title in titles]
        executed = before + min(count, _WINDOW)
        wait_until(lambda: len(list(tasks.glob("*.json"))) >= executed, f"{executed - before} commands are executed")
        if kill_worker:
            for pid in children_of(cluster.nodes[owner], b"worker.main"):
                os.kill(pid, signal.SIGKILL)
        if not answers_only:  # else the owner connects again, and may keep its lease
            account.write_once(other, f"{titles[0]}-elsewhere")
        took = time.monotonic() - began
        cluster.heal()
        first = [each.result() for each in waiting]
    assert all(first), "each command is acknowledged in the end"
    for ack in filter(None, first):
        again = cluster.write(other, ack.title, key=ack.title)
        assert (again.text, again.headers["Lattice-Change"].split("-")[2]) == (ack.text, ack.change)
    account.check()
    lost = "answers" if answers_only else "lease"
    worker = ", worker killed" if kill_worker else ""
    return f"{count} unacknowledged commands at a lost {lost}{worker}: each once, {took:.1f} s"


# --- edits beside the nodes ---


def edit_beside(nats: NatsCluster, cluster: RunningCluster, account: Account, *, delay_s: float = 0.0) -> str:
    """Edit a plan in the nodes' directories: only an owner's edit becomes a change, also around a takeover."""
    del nats
    ack = account.write_once("a", f"planned {time.monotonic():.6f}")
    plan = f"plans/{json.loads(ack.text)['data']['id']}.md"
    wait_until(cluster.agree, "the nodes agree")
    owner = owner_of(cluster)
    others = [name for name in cluster.names if name != owner]
    head = cluster.position(owner)[1]
    _save(cluster.tree(owner) / plan, "by the owner\n")
    wait_until(lambda: _has(cluster, cluster.names, plan, "by the owner\n"), "the owner's edit is on all nodes")
    for name in others:
        _save(cluster.tree(name) / plan, f"beside {name}\n")
    wait_until(lambda: _has(cluster, others, plan, "by the owner\n"), "the other nodes' edits are undone")
    cluster.kill(owner)
    time.sleep(delay_s)  # the moment of the next edits within the takeover
    for name in cluster.names:
        _save(cluster.tree(name) / plan, f"at the takeover on {name}\n")
    account.write_once(others[0], f"{ack.title} after the takeover")
    cluster.start(owner)
    account.check()
    assert _has(cluster, cluster.names, plan, "by the owner\n"), "an edit was numbered at the takeover"
    for name in cluster.names:
        kept = cluster.nodes[name].data.project("web").root.glob(f"set-aside/*/{plan}")
        texts = {path.read_text() for path in kept}
        assert f"at the takeover on {name}\n" in texts, f"node {name} has not kept the edit: {texts}"
        assert name == owner or f"beside {name}\n" in texts, f"node {name} has not kept the edit: {texts}"
    changes = cluster.position(owner)[1] - head
    assert changes == 2, f"{changes} changes of an edit and a write"
    return f"edits on three nodes, {delay_s:.1f} s behind a killed owner: 1 numbered, 5 set aside"


def _save(path: Path, text: str) -> None:
    """Replace a file at once: no node sees it empty."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.replace(path)


def _has(cluster: RunningCluster, names: Sequence[str], path: str, text: str) -> bool:
    return all((cluster.tree(name) / path).read_text() == text for name in names)


# --- contents, absent nodes, restarts ---


def kill_beside_content(
    nats: NatsCluster, cluster: RunningCluster, account: Account, *, size: int, delay_s: float
) -> str:
    """Kill the owner at some moment after a large file came into its directory: no node has a change without it."""
    del nats
    owner = owner_of(cluster)
    path = f"artifacts/payload/art_{time.monotonic_ns()}.bin"
    data = random.Random(path).randbytes(size)
    source = cluster.tree(owner).parent / "incoming"
    source.write_bytes(data)
    (cluster.tree(owner) / path).parent.mkdir(parents=True, exist_ok=True)
    source.rename(cluster.tree(owner) / path)
    time.sleep(delay_s)  # some moment of its storage
    cluster.kill(owner)
    other = next(name for name in cluster.names if name != owner)
    account.write_once(other, f"beside {path}")
    cluster.start(owner)
    account.check()
    found = {name: (cluster.tree(name) / path).is_file() for name in cluster.names}
    assert len(set(found.values())) == 1, found
    assert not found[owner] or (cluster.tree(other) / path).read_bytes() == data
    outcome = "is on all nodes" if found[owner] else "was never numbered"
    return f"a content of {size / 1e6:.0f} MB, its owner killed after {delay_s:.2f} s, {outcome}"


def purge_beside_absent(nats: NatsCluster, cluster: RunningCluster, account: Account) -> str:
    """Let a node be away for longer than the stream reaches, with altered files, and its owner die in between."""
    del nats
    owner = owner_of(cluster)
    absent, other = (name for name in cluster.names if name != owner)
    for number in range(3):
        account.write_once(other, f"before {absent} is away {number}")
    wait_until(cluster.agree, "the nodes agree")
    cluster.nodes[absent].end()
    with account.running(writers=other, readers=""):
        account.wait_for(other, 20)
        asyncio.run(_purge(cluster))
        cluster.kill(owner)
        account.wait_for(other, 10)
        asyncio.run(_purge(cluster))
        cluster.start(owner)
        files = sorted((cluster.tree(absent) / "tasks").glob("*.json"))
        files[0].write_text("{}")
        files[1].unlink()
        (cluster.tree(absent) / "tasks/strange.json").write_text("{}")
        cluster.start(absent)
        account.wait_for(other, 5)
    wait_until(lambda: cluster.is_open(absent), f"node {absent} is open", 180)
    wait_until(cluster.agree, "the nodes agree", 180)
    log = (cluster.nodes[absent].data.path.parent / "log").read_text()
    assert "copied change" in log.rpartition("open at change")[0], "the node has copied the project"
    return "a node away for longer than the stream reaches, with altered files: equal"


async def _purge(cluster: RunningCluster) -> None:
    engine = await Engine.connect(cluster.engine_urls, node="purge", replicas=len(cluster.engine_urls))
    try:
        epoch = next(head for head, number in map(cluster.head, cluster.names) if number >= 0)
        order = JetStreamOrder(engine, "web", epoch)
        await order.purge((await order.bounds())[1] - 3)
    finally:
        await engine.close()


def rolling_restart(nats: NatsCluster, cluster: RunningCluster, account: Account) -> str:
    """Restart every node and every server of the engine, one after the other, beside writers."""
    gaps: dict[str, float] = {}
    with account.running(writers=cluster.names, readers=""):
        for name in cluster.names:
            account.wait_for(name)
            since = time.monotonic()
            cluster.nodes[name].end()
            cluster.start(name)
            wait_until(lambda name=name: cluster.is_open(name), f"node {name} is open")
            account.wait_for(name)
            gaps[f"node {name}"] = account.longest_gap_s(since)
        for server in nats.servers:
            since = time.monotonic()
            server.stop()
            server.start()
            nats.heal()
            for name in cluster.names:
                account.wait_for(name)
            gaps[server.name] = account.longest_gap_s(since)
    account.check()
    return "longest time without writes: " + ", ".join(f"{name} {gap:.2f} s" for name, gap in gaps.items())


# --- partitions ---


def cut_owner(nats: NatsCluster, cluster: RunningCluster, account: Account) -> str:
    """Cut the owner off from the engine. A client that knows only this node gets no acknowledgement."""
    owner = owner_of(cluster)
    other = next(name for name in cluster.names if name != owner)
    with account.running(writers=owner + other, readers=owner):
        account.wait_for(owner)
        ended = listen(cluster, owner)
        cluster.cut_off(owner, *(server.name for server in nats.servers))
        since = time.monotonic()
        line = _while_cut_off(cluster, account, owner, other, since, ended)
        cluster.heal()
        account.wait_for(owner)
    account.check()
    return f"the owner alone: {line}"


def owner_with_minority(nats: NatsCluster, cluster: RunningCluster, account: Account) -> str:
    """Leave the owner with one of three servers of the engine, which leads it."""
    owner = owner_of(cluster)
    return _minority(nats, cluster, account, owner, next(name for name in cluster.names if name != owner))


def cut_follower(nats: NatsCluster, cluster: RunningCluster, account: Account) -> str:
    """Leave a node that only follows with one of three servers of the engine, which leads it."""
    owner = owner_of(cluster)
    return _minority(nats, cluster, account, next(name for name in cluster.names if name != owner), owner)


def _minority(nats: NatsCluster, cluster: RunningCluster, account: Account, name: str, other: str) -> str:
    leader = leader_of(nats)
    cluster.cut_off(name, *(server.name for server in nats.servers if server.name != leader))
    wait_until(lambda: name in connected_to(nats, leader), f"node {name} is connected to {leader}")
    wait_until(lambda: cluster.is_open(name) and cluster.owner(), "the project is open")
    with account.running(writers=name + other, readers=name):
        account.wait_for(name)
        account.wait_for(other)
        ended = listen(cluster, name)
        nats.isolate(leader)
        for each in cluster.names:
            if each != name:
                cluster.cut_off(each, leader)
        since = time.monotonic()
        line = _while_cut_off(cluster, account, name, other, since, ended)
        cluster.heal()
        nats.heal()
        account.wait_for(name)
    account.check()
    return f"node {name} with the engine's leader, without a majority: {line}"


def listen(cluster: RunningCluster, name: str) -> threading.Event:
    """Listen to a node's events; the returned event is set once the node has ended the connection."""
    url = f"http://127.0.0.1:{cluster.nodes[name].port}/projects/web/events/stream"
    headers = {"Authorization": f"Bearer {cluster.token}", "Accept": "text/event-stream"}
    answer = requests.get(url, headers=headers, stream=True, timeout=60)
    assert answer.status_code == 200, answer.text
    ended = threading.Event()

    def read() -> None:
        with contextlib.suppress(requests.RequestException):
            for _ in answer.iter_content(1024):
                pass
        ended.set()

    threading.Thread(target=read, daemon=True).start()
    return ended


def _while_cut_off(
    cluster: RunningCluster, account: Account, name: str, other: str, since: float, ended: threading.Event
) -> str:
    wait_until(lambda: account.count_of(other, since=since) >= 3, f"node {other} acknowledges further writes")
    took = time.monotonic() - since
    wait_until(lambda: not cluster.is_open(name), f"node {name} refuses reads")
    wait_until(lambda: "cannot reach the cluster" in cluster.ask(name, "GET", "").text, f"node {name} says why")
    wait_until(ended.is_set, f"node {name} ends its clients' connections")
    refused = time.monotonic() - since
    account.wait_for(other)
    assert account.count_of(name, since=since) == 0, "a minority has acknowledged a write"
    stale = account.staleness_s(name)
    assert stale <= _BEHIND_S, f"node {name} has shown a state that was {stale:.1f} s old"
    return f"writes elsewhere after {took:.1f} s, refused after {refused:.1f} s, reads at most {stale:.1f} s old"


def leader_of(nats: NatsCluster) -> str:
    """Return the server that leads the engine."""
    found = ""
    while not found:
        found = nats.servers[0].monitor("jsz").get("meta_cluster", {}).get("leader", "")
        time.sleep(0.05)
    return found


def connected_to(nats: NatsCluster, server: str) -> set[str]:
    """Return the names of a server's clients."""
    return {each.get("name", "") for each in nats.named(server).monitor("connz")["connections"]}


SCENARIOS: dict[str, Callable[[NatsCluster, RunningCluster, Account], str]] = {
    "the owner alone": cut_owner,
    "the owner with a minority": owner_with_minority,
    "another node with a minority": cut_follower,
    "a rolling restart": rolling_restart,
    **{
        f"a content of {size} MB, {delay_s} s": partial(kill_beside_content, size=size * 1_000_000, delay_s=delay_s)
        for size, delays in ((20, (0.1, 0.4, 0.7, 1.0, 1.5)), (100, (0.5, 1.5, 3.0, 5.0)))
        for delay_s in delays
    },
    **{
        f"edits beside the nodes, {delay_s} s behind a kill": partial(edit_beside, delay_s=delay_s)
        for delay_s in (0.0, 1.0, 2.0, 3.0, 4.0)
    },
    **{
        f"lost {how} with {count}{' and the worker' if killed else ''}": partial(
            lose_lease, count=count, answers_only=how == "answers", kill_worker=killed
        )
        for how in ("lease", "answers")
        for count in (1, 16, 64)
        for killed in (False, True)
    },
    "a node away for long": purge_beside_absent,  # the stream no longer has everything: the last one
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default="", help="part of a scenario's name")
    options = parser.parse_args()
    failed = 0
    for number in range(options.rounds):
        with (
            tempfile.TemporaryDirectory(prefix="cluster-faults-", ignore_cleanup_errors=True) as place,
            nats_cluster(3, Path(place) / "nats", proxied=True) as nats,
            running_cluster(nats, Path(place), proxied=True) as cluster,
        ):
            account = Account(cluster)
            for name, scenario in SCENARIOS.items():
                if options.only not in name:
                    continue
                try:
                    print(f"round {number + 1}: {scenario(nats, cluster, account)}", flush=True)
                except Exception:  # noqa: BLE001 - the next round runs
                    failed += 1
                    print(f"round {number + 1}: {name} FAILED", flush=True)
                    traceback.print_exc()
                    for node in cluster.names:
                        kept = Path(tempfile.gettempdir()) / f"cluster-faults-{number + 1}-{node}.log"
                        kept.write_bytes((Path(place) / node / "log").read_bytes())
                    break
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
