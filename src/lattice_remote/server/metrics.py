"""Metrics of a running server, for Prometheus; docs/run/monitor.md explains each.

Events are counted as they happen, values that can be looked up (queues, clients, heads) at a scrape
(``status.Gauges``). Labels are bounded: projects, codes, routes; never an address, a token, or a client's text.
"""

from functools import cache, partial

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics

__all__ = ["Metrics", "ProjectMetrics"]

_ALARMING = ("REMOTE_BUSY", "REMOTE_STORAGE")
"""Refusals exported before the first one: Prometheus sees no increase in a series that begins above 0."""
_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Metrics:
    """All metrics of one server, in a registry of its own: two servers in one process share nothing."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=self.registry)
        self.changes = self._counter("changes", "Durable changes.", "project")
        self.requests = self._counter("requests", "Finished writes, by kind and outcome.", "project", "kind", "outcome")
        self.refusals = self._counter("refusals", "Refused requests.", "project", "code")
        self.request_seconds = self._histogram("request", "Time from a request's arrival to its reply.", "project")
        self.executor_seconds = self._histogram(
            "executor", "Time of a request in its worker, until its fsync.", "project"
        )
        self.journal_fsync_seconds = self._histogram("journal_fsync", "Duration of a journal's fsync.", "project")
        self.delivery_lag_seconds = self._histogram(
            "delivery_lag", "Time from a change's commit until a client's files held it.", "project"
        )
        self.worker_starts = self._counter("worker_starts", "Worker starts that became ready.", "project")
        self.sent_bytes = self._counter("sent_bytes", "Bytes written to WebSocket clients, before TLS.", "project")
        self.connections_refused = self._counter("connections_refused", "Refused WebSocket connections.", "code")
        self.goodbyes = self._counter("goodbyes", "WebSocket connections that the server ended.", "project", "code")
        self.http_requests = self._counter("http_requests", "Answered HTTP requests.", "method", "route", "status")
        self.http_seconds = self._histogram("http_request", "Duration of HTTP requests, without streams.", "route")
        self.http_sent_bytes = self._counter("http_sent_bytes", "Bytes of bodies sent over HTTP.", "route")
        self._projects: dict[str, ProjectMetrics] = {}

    def of(self, slug: str) -> "ProjectMetrics":
        """Return the metrics of one project, which continue when it is closed and opened again."""
        if slug not in self._projects:
            self._projects[slug] = ProjectMetrics(self, slug)
        return self._projects[slug]

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"lattice_remote_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"lattice_remote_{name}_seconds", text, labels, registry=self.registry, buckets=_BUCKETS_S)


class ProjectMetrics:
    def __init__(self, metrics: Metrics, slug: str) -> None:
        # Looked up once for each combination: each write is counted several times.
        self._requests = cache(partial(metrics.requests.labels, slug))
        self._refusals = cache(partial(metrics.refusals.labels, slug))
        for code in _ALARMING:
            self._refusals(code)
        self._goodbyes = cache(partial(metrics.goodbyes.labels, slug))
        self.changes = metrics.changes.labels(slug)
        self.request_seconds = metrics.request_seconds.labels(slug)
        self.executor_seconds = metrics.executor_seconds.labels(slug)
        self.journal_fsync_seconds = metrics.journal_fsync_seconds.labels(slug)
        self.delivery_lag_seconds = metrics.delivery_lag_seconds.labels(slug)
        self.worker_starts = metrics.worker_starts.labels(slug)
        self.sent_bytes = metrics.sent_bytes.labels(slug)

    def settled(self, kind: str, outcome: str) -> None:
        self._requests(kind, outcome).inc()

    def refused(self, code: str) -> None:
        self._refusals(code).inc()

    def said_goodbye(self, code: str) -> None:
        self._goodbyes(code).inc()
