"""Random faults against the order of changes: ``make order SEEDS=200``.

Each seed: three real ``nats-server`` processes, three nodes that compete for the lease of one project and append, and
an observer. Servers are killed, stopped and paused, alone and all at once; the nodes' connections are stalled beyond
their lease, cut, and lose answers. A node that lost its lease goes on appending until it is refused. Afterwards each
acknowledged record is in the stream once, at its number, and the observer has seen this one history.
"""

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "server" / "cluster")]

from nats_servers import NatsCluster, NatsServer, nats_cluster  # noqa: E402

from faultproxy import FaultProxy  # noqa: E402
from lattice_remote.server.cluster.engine import Engine, EngineUnavailable  # noqa: E402
from lattice_remote.server.cluster.lease import Held, Lease  # noqa: E402
from lattice_remote.server.cluster.order import Batch, Fenced, JetStreamOrder  # noqa: E402
from programs import heed_signals  # noqa: E402

__all__ = ["Account", "Node", "finished", "observe", "verdict", "wait_for_acks"]

LEASE_S = 2.0
PATIENCE_S = 120.0
SLUG, EPOCH = "p", "e1"


@dataclass
class Account:
    """Acknowledgements and faults of the nodes of one run."""

    acked: dict[int, tuple[bytes, ...]] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    owner: str = ""
    owners: int = 0
    fenced: int = 0
    in_doubt: int = 0
    wrong: list[str] = field(default_factory=list)

    def acknowledge(self, seq: int, records: tuple[bytes, ...]) -> None:
        if self.acked.setdefault(seq, records) != records:
            self.wrong.append(f"number {seq} was acknowledged for two batches")
        self.times.append(time.monotonic())

    @property
    def longest_gap_s(self) -> float:
        """Longest time without an acknowledgement."""
        return max((b - a for a, b in zip(self.times, self.times[1:], strict=False)), default=0.0)


class Node:
    """A node that takes the lease, reads to the end, takes over, and appends until it is refused."""

    def __init__(self, name: str, engine: Engine, slug: str, account: Account) -> None:
        self.name = name
        self._order = JetStreamOrder(engine, slug, EPOCH)
        self._lease = Lease(engine, LEASE_S, bucket="test-leases")
        self._slug = slug
        self._account = account
        self._written = 0

    async def run(self) -> None:
        """Work for ever."""
        after = term = 0
        while True:
            try:
                held = await self._lease.acquire(self._slug, node=self.name, url="", after=term)
            except EngineUnavailable:
                held = None
            if held is None:
                await asyncio.sleep(0.05)
                continue
            renewing = asyncio.create_task(self._renew(held))
            try:
                while batches := await self._order.read(after):
                    after, term = batches[-1].seq, max(term, *(batch.term for batch in batches))
                after = await self._order.take_over(after, node=self.name, term=max(term + 1, held.term))
                self._account.owners += 1
                self._account.owner = self.name
                await self._append(after)
            except Fenced:
                self._account.fenced += 1
            finally:
                renewing.cancel()
                self._account.in_doubt += self._order.in_doubt
                self._order.in_doubt = 0
                with suppress(EngineUnavailable):
                    await held.release()

    async def _append(self, last: int) -> None:
        while True:
            records = []
            for _ in range(1 + self._written % 3):
                self._written += 1
                records.append(b"%s %d" % (self.name.encode(), self._written))
            last = await self._order.append(last, records)
            self._account.acknowledge(last, tuple(records))
            await asyncio.sleep(0.002)

    async def _renew(self, held: Held) -> None:
        while not held.lost.is_set():
            await asyncio.sleep(LEASE_S / 3)
            await held.renew()


async def observe(order: JetStreamOrder, history: list[Batch]) -> None:
    """Add each batch to the observer's history, for ever."""
    async for batch in order.follow(0):
        history.append(batch)  # noqa: PERF401 - others look at it


async def wait_for_acks(account: Account, count: int) -> None:
    """Wait for a number of further acknowledgements."""
    wanted = len(account.acked) + count
    async with asyncio.timeout(PATIENCE_S):
        while len(account.acked) < wanted:  # noqa: ASYNC110 - of whichever node
            await asyncio.sleep(0.02)


def verdict(account: Account, stream: list[Batch], history: list[Batch]) -> list[str]:
    """Return the lost, doubled and different records."""
    wrong = list(account.wrong)
    at = {batch.seq: batch.records for batch in stream}
    wrong += [f"lost or different: {seq}" for seq, records in account.acked.items() if at.get(seq) != records]
    records = [record for batch in stream for record in batch.records]
    wrong += [f"doubled: {record!r}" for record in sorted({each for each in records if records.count(each) > 1})]
    if [batch.seq for batch in stream] != list(range(1, len(stream) + 1)):
        wrong.append("the stream has a gap")
    if history != stream:
        wrong.append(f"the observer has another history: {len(history)} of {len(stream)} batches")
    terms = [batch.term for batch in stream]
    if terms != sorted(terms):
        wrong.append("a batch of an owner is behind its successor's")
    return wrong


async def _strike(choose: random.Random, cluster: NatsCluster, proxies: list[FaultProxy], leader: str) -> str:
    """Inject one fault, wait, and heal it; return its name."""
    kind = choose.choice(("kill", "kill", "stop", "pause", "stall", "stall", "refuse", "swallow_answers"))
    length_s = choose.choice((0.2, 1.5 * LEASE_S, 2.0 * LEASE_S, 3.0 * LEASE_S))
    if kind in ("stall", "refuse", "swallow_answers"):
        for proxy in proxies:
            getattr(proxy, kind)()
        await asyncio.sleep(length_s)
        for proxy in proxies:
            proxy.flow()
        return f"{kind} {len(proxies)} connections {length_s:.1f} s"
    servers = choose.sample(cluster.servers, choose.choice((1, 1, 2, 3)))
    if len(servers) == 1 and leader and choose.random() < 0.6:
        servers = [cluster.named(leader)]
    await asyncio.gather(*(asyncio.to_thread(getattr(each, kind)) for each in servers))
    await asyncio.sleep(length_s)
    await asyncio.to_thread(_restart, servers)
    return f"{kind} {len(servers)} servers {length_s:.1f} s"


def _restart(servers: list[NatsServer]) -> None:
    for each in servers:
        each.resume()
        each.start()


async def run_seed(seed: int, cluster: NatsCluster) -> tuple[Account, list[str], list[str]]:
    """Return the account of a run, its faults and its failures."""
    choose = random.Random(seed)
    slug, account, history, faults = f"{SLUG}-{seed}", Account(), [], []
    async with AsyncExitStack() as stack:

        async def connect(name: str, urls: list[str]) -> Engine:
            engine = await Engine.connect(urls, node=name)
            stack.push_async_callback(engine.close)
            return engine

        proxies = {
            name: stack.enter_context(FaultProxy(each.port)) for name, each in zip("abc", cluster.servers, strict=True)
        }
        control = await connect("control", cluster.urls)
        order = JetStreamOrder(control, slug, EPOCH)
        await _created(order)
        nodes = [
            Node(name, await connect(name, [f"nats://127.0.0.1:{proxy.port}"]), slug, account)
            for name, proxy in proxies.items()
        ]
        observer = JetStreamOrder(await connect("observer", cluster.urls), slug, EPOCH)
        observing = asyncio.create_task(observe(observer, history))
        running = [asyncio.create_task(node.run()) for node in nodes]
        try:
            await wait_for_acks(account, 10)
            for _ in range(choose.choice((1, 2, 2))):
                leader = ""
                with suppress(EngineUnavailable):
                    leader = getattr((await control.stream_info(order.name)).cluster, "leader", "")
                struck = choose.choice(([account.owner], [account.owner], list(proxies)))
                faults.append(await _strike(choose, cluster, [proxies[each] for each in struck], leader))
                await asyncio.sleep(choose.random())
            await asyncio.to_thread(cluster.heal)
            await wait_for_acks(account, 10)
            for task in running:
                if task.done():
                    task.result()
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            stream = await finished(order)
            async with asyncio.timeout(PATIENCE_S):
                while len(history) < len(stream) and not observing.done():  # noqa: ASYNC110 - of another task
                    await asyncio.sleep(0.02)
        finally:
            for task in (*running, observing):
                task.cancel()
            await asyncio.gather(*running, observing, return_exceptions=True)
            await asyncio.to_thread(cluster.heal)
        wrong = verdict(account, stream, history)
        await order.delete()
    return account, faults, wrong


async def _created(order: JetStreamOrder) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await order.create()
            except EngineUnavailable:
                await asyncio.sleep(0.2)


async def finished(order: JetStreamOrder) -> list[Batch]:
    """Return the whole stream, closed by a takeover, which nothing of an earlier owner can follow."""
    stream: list[Batch] = []
    while True:
        while more := await order.read(stream[-1].seq if stream else 0):
            stream += more
        try:
            await order.take_over(stream[-1].seq, node="end", term=stream[-1].term + 1)
        except Fenced:
            continue
        return stream + await order.read(stream[-1].seq)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=1)
    given = parser.parse_args()
    heed_signals()
    directory = Path(tempfile.mkdtemp(prefix="cluster-order-"))
    acked = owners = fenced = in_doubt = failed = 0
    gaps = []
    try:
        with nats_cluster(3, directory) as cluster:
            for seed in range(given.first, given.first + given.seeds):
                began = time.monotonic()
                account, faults, wrong = asyncio.run(run_seed(seed, cluster))
                acked += len(account.acked)
                owners += account.owners
                fenced += account.fenced
                in_doubt += account.in_doubt
                failed += bool(wrong)
                gaps.append(account.longest_gap_s)
                line = (
                    f"seed {seed}: {len(account.acked)} acknowledged, {account.owners} owners, "
                    f"{account.fenced} fenced, {account.in_doubt} in doubt, "
                    f"longest gap {account.longest_gap_s:.1f} s, {time.monotonic() - began:.1f} s"
                )
                print("; ".join((line, *faults, *(f"WRONG: {each}" for each in wrong[:5]))), flush=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(
        f"{len(gaps)} seeds: {acked} acknowledged batches, {owners} owners, {fenced} fenced, {in_doubt} in doubt; "
        f"longest time without writes: median {sorted(gaps)[len(gaps) // 2]:.1f} s, longest {max(gaps):.1f} s; "
        f"{failed} seeds with something lost, doubled or different"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
