"""Metrics for Prometheus (docs/run/monitor.md), and the outcomes of write requests: one log line each.

Events are counted as they happen, values that can be looked up (queues, clients, heads) at a scrape
(``status.Gauges``). Labels are bounded: projects, codes, routes; never an address, a token, or a client's text. Of the
caller's input a log line contains only the words of the command.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics

from lattice_remote.server.ipc import AbandonRequest, Edit, ImportProject, RequestDone, ResultStats, RunCall, RunCommand
from lattice_remote.server.project.queue import QueuedRequest

__all__ = ["Metrics", "OutcomeListener", "ProjectMetrics", "RequestLog", "RequestOutcome"]


_ALARMING = ("REMOTE_BUSY", "REMOTE_STORAGE")
"""Refusals exported before the first one: Prometheus sees no increase in a series that begins above 0."""
_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Metrics:
    """All metrics of one server, in a registry of its own."""

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
        """Return the metrics of one project, which outlast its closing."""
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


_FAILED = 400
"""Lowest of a failed operation."""
_KINDS = {RunCommand: "command", RunCall: "call", Edit: "edit", ImportProject: "push", AbandonRequest: "command"}

_log = logging.getLogger("lattice_remote.requests")

WorkerRequest = RunCommand | RunCall | Edit | ImportProject | AbandonRequest


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """Outcome of one request.

    Attributes:
        outcome: ``done``, ``failed`` (by lattice), ``again`` (already done) or ``refused``.
        ms: from arrival to reply.
    """

    project: str
    actor: str
    token_id: str
    command: str
    outcome: str
    code: str
    status: int
    seq: int | None
    ms: float

    @property
    def fields(self) -> dict[str, object]:
        code = self.code or None
        return {"actor": self.actor, "command": self.command, "outcome": self.outcome, "code": code, "seq": self.seq}

    @property
    def change(self) -> str:
        return f", change {self.seq}" if self.seq is not None else ""

    def log(self) -> None:
        if not _log.isEnabledFor(logging.INFO):
            return
        fields = {**self.fields, "project": self.project, "token": self.token_id, "status": self.status, "ms": self.ms}
        who = f"{self.actor} ({self.token_id})" if self.token_id else self.actor
        what = self.command or "a request"
        came = self.code or (f"status {self.status}" if self.status else self.outcome)
        text = "%s: %s: %s: %s%s, %g ms"
        _log.info(text, self.project, who, what, came, self.change, self.ms, extra={"fields": fields})


OutcomeListener = Callable[[RequestOutcome], None]
"""Receives an outcome and logs it."""


class RequestLog:
    def __init__(self, project: str, metrics: ProjectMetrics) -> None:
        self._project = project
        self._metrics = metrics

    def settled(self, job: QueuedRequest, message: WorkerRequest, done: RequestDone) -> None:
        report = done.report
        is_first = not (report.again or report.code)
        if is_first:
            self._metrics.executor_seconds.observe(report.seconds)
        if is_first and not job.resource:  # a wait for a resource would distort the figure
            self._metrics.request_seconds.observe(time.monotonic() - job.arrived_at)
        self._add(
            message,
            report,
            done.seq if done.change is not None else report.made,
            job.arrived_at,
            job.on_result if job.requesters else None,
        )

    def refused(self, message: WorkerRequest, code: str, on_result: OutcomeListener | None = None) -> None:
        self._add(message, ResultStats(code=code), None, time.monotonic(), on_result)

    def found(self, seq: int) -> None:
        fields = {"project": self._project, "actor": "server", "command": "", "outcome": "found", "seq": seq}
        _log.info("%s: another program changed files, change %d", self._project, seq, extra={"fields": fields})

    def refused_other(self, code: str) -> None:
        self._metrics.refused(code)

    def _add(
        self,
        message: WorkerRequest,
        report: ResultStats,
        seq: int | None,
        since: float,
        on_result: OutcomeListener | None,
    ) -> None:
        outcome = _outcome_of(message, report)
        self._metrics.settled(_KINDS[type(message)], outcome)
        if report.code:
            self._metrics.refused(report.code)
        actor = "" if isinstance(message, AbandonRequest) else message.actor
        ms = round((time.monotonic() - since) * 1000, 1)
        result = RequestOutcome(
            *(self._project, actor, message.token_id, report.command, outcome, report.code, report.status, seq, ms)
        )
        if on_result is None:
            result.log()
        else:
            on_result(result)


def _outcome_of(message: WorkerRequest, report: ResultStats) -> str:
    if report.code:
        return "refused"
    if report.again:
        return "again"
    failed = report.status >= _FAILED if isinstance(message, RunCall) else report.status != 0
    return "failed" if failed else "done"
