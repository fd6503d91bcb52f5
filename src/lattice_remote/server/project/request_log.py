"""Outcomes of write requests: metrics, and one log line each with the number of the change.

Of the caller's input the line contains only the words of the command.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from lattice_remote.server.ipc import AbandonRequest, Edit, ImportProject, RequestDone, ResultStats, RunCall, RunCommand
from lattice_remote.server.metrics import ProjectMetrics
from lattice_remote.server.project.queue import QueuedRequest

__all__ = ["OutcomeListener", "RequestLog", "RequestOutcome"]

_FAILED = 400
"""Lowest status of a failed operation."""
_KINDS = {RunCommand: "command", RunCall: "call", Edit: "edit", ImportProject: "push", AbandonRequest: "command"}

_log = logging.getLogger("lattice_remote.requests")

WorkerRequest = RunCommand | RunCall | Edit | ImportProject | AbandonRequest


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """Outcome of one request.

    Attributes:
        command: its words, for example ``resource acquire``; "" if unknown.
        outcome: ``done``, ``failed`` (by lattice), ``again`` (already done) or ``refused``.
        status: the exit code, or the status of an operation.
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
        """Fields of its own in a line, beside those of the request."""
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
"""Receives an outcome and writes its log line, for example as part of the HTTP access log."""


class RequestLog:
    def __init__(self, project: str, metrics: ProjectMetrics) -> None:
        self._project = project
        self._metrics = metrics

    def settled(self, job: QueuedRequest, message: WorkerRequest, done: RequestDone) -> None:
        report = done.report
        is_first = not (report.again or report.code)
        if is_first:
            self._metrics.executor_seconds.observe(report.seconds)
        if is_first and job.resource is None:  # a wait for a resource would distort the figure
            self._metrics.request_seconds.observe(time.monotonic() - job.arrived_at)
        self._add(
            message,
            report,
            done.seq if done.change is not None else report.made,
            job.arrived_at,
            job.on_result if job.requesters else None,
        )

    def refused(self, message: WorkerRequest, code: str, on_result: OutcomeListener | None = None) -> None:
        """Record a request that never reached the worker."""
        self._add(message, ResultStats(code=code), None, time.monotonic(), on_result)

    def found(self, seq: int) -> None:
        """Record a change that another program made to the files."""
        fields = {"project": self._project, "actor": "server", "command": "", "outcome": "found", "seq": seq}
        _log.info("%s: another program changed files, change %d", self._project, seq, extra={"fields": fields})

    def refused_other(self, code: str) -> None:
        """Count a refusal that is not of a write."""
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
