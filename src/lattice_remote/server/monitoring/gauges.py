"""What is looked up whenever the figures are asked for: queues, clients, heads, journals."""

import asyncio
from collections import Counter
from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

import lattice_remote
from lattice_remote.server.hub import Hub
from lattice_remote.server.monitoring.status import journal_bytes

__all__ = ["Gauges"]


class Gauges(Collector):
    """The figures of a hub, counted and looked up. Make one for each hub; ``scraped()`` is what Prometheus gets."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._journals: dict[str, int] = {}
        hub.metrics.registry.register(self)

    async def scraped(self, accept: str) -> tuple[bytes, str]:
        """Return all figures, and their content type, which is one that the caller accepts."""
        journals = {slug: project.paths.journal for slug, project in self._hub.projects.items()}
        self._journals = await asyncio.to_thread(lambda: {slug: journal_bytes(at) for slug, at in journals.items()})
        for peer in self._hub.peers:
            peer.count_sent()
        encode, content_type = choose_encoder(accept)
        return encode(self._hub.metrics.registry), content_type

    def describe(self) -> list[Metric]:
        """Nothing is looked up before somebody asks."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield what is so at this moment. Belongs to the event loop's thread."""
        info = GaugeMetricFamily("lattice_remote_info", "The version of this server; always 1.", labels=["version"])
        info.add_metric([lattice_remote.__version__], 1)
        yield info
        yield from self._of_projects()
        yield from self._of_clients()
        ongoing = Counter(request.route for request in self._hub.ongoing)
        yield _gauge("http_in_progress", "HTTP requests being answered, streams included.", ongoing, "route")

    def _of_projects(self) -> Iterator[Metric]:
        projects = self._hub.projects
        up = {slug: int(self._hub.state_of(slug) == "ready") for slug in projects}
        yield _gauge("project_up", "Whether a project that was asked for can be used.", up)
        yield _gauge("head", "The number of the last change.", {s: p.history.head for s, p in projects.items()})
        yield _gauge("journal_bytes", "What the journal takes on the disk.", self._journals)
        queue = GaugeMetricFamily(
            "lattice_remote_queue_requests", "Writes that wait for their answer, by where.", labels=["project", "where"]
        )
        for slug, project in projects.items():
            load = project.load
            queue.add_metric([slug, "queued"], load.queued)
            queue.add_metric([slug, "worker"], load.with_worker)
            queue.add_metric([slug, "resource"], load.waiting)
            queue.add_metric([slug, "read"], load.reads_waiting)
        yield queue
        held = {slug: project.load.held_bytes for slug, project in projects.items()}
        yield _gauge("queue_bytes", "What these writes weigh.", held)

    def _of_clients(self) -> Iterator[Metric]:
        slugs = self._hub.projects
        clients = GaugeMetricFamily(
            "lattice_remote_clients", "Connected clients, by what they are.", labels=["project", "kind"]
        )
        counted: Counter[tuple[str, str]] = Counter()
        behind, outboxes, fullest = Counter[str](), Counter[str](), dict.fromkeys(slugs, 0)
        for peer in self._hub.peers:
            slug, pending = peer.project.slug, peer.waiting_bytes
            counted[slug, "copy" if peer.standing.applied is not None else "writer"] += 1
            behind[slug] = max(behind[slug], peer.behind or 0)
            outboxes[slug] += pending
            fullest[slug] = max(fullest.get(slug, 0), pending)
        for request in self._hub.ongoing:
            counted[request.project, "stream"] += request.is_stream and request.login is not None
        for slug in slugs:
            for kind in ("copy", "writer", "stream"):
                clients.add_metric([slug, kind], counted[slug, kind])
        yield clients
        yield _gauge("most_behind", "How many changes the client furthest behind lacks.", {s: behind[s] for s in slugs})
        yield _gauge("outbox_bytes", "Sent to clients, and not taken yet.", {s: outboxes[s] for s in slugs})
        yield _gauge("outbox_max_bytes", "The same of the client with the most.", fullest)


def _gauge(name: str, text: str, values: dict[str, int] | Counter[str], label: str = "project") -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"lattice_remote_{name}", text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family
