"""A server's status for a terminal: one table of its projects, one of who is connected."""

from datetime import UTC, datetime, timedelta

from lattice_remote.logtext import columns, printable
from lattice_remote.server.monitoring.status import ClientStatus, ProjectStatus, ServerStatus

__all__ = ["as_lines"]

_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_SPANS = ((86_400, "d"), (3600, "h"), (60, "min"))


def as_lines(status: ServerStatus) -> list[str]:
    """Return the lines; times are told as spans up to now."""
    now = datetime.now(UTC)
    if status.running:
        assert status.started is not None, "a running server knows its beginning"
        head = f"lattice-remote {status.version}, pid {status.pid}, for {_span(now - status.started)}, {status.address}"
    else:
        head = f"No server runs on {status.data}."
    lines = [printable(head)]
    if not status.projects:
        return [*lines, "No projects; create one with: lattice-remote project create SLUG --code CODE"]
    lines += ["", *columns([_PROJECT_HEAD, *map(_project_row, status.projects)])]
    lines += [printable(f"{project.slug}: {project.why}") for project in status.projects if project.why]
    clients = [_client_row(p.slug, client, now) for p in status.projects for client in p.clients]
    if clients:
        lines += ["", *columns([_CLIENT_HEAD, *clients])]
    return lines


_PROJECT_HEAD = ("PROJECT", "STATE", "CHANGE", "A MINUTE", "JOURNAL", "QUEUED", "CLIENTS", "BEHIND")
_CLIENT_HEAD = ("PROJECT", "CLIENT", "TOKEN", "ADDRESS", "FOR", "BEHIND", "RUNS")


def _project_row(project: ProjectStatus) -> tuple[str, ...]:
    behind = [client.behind for client in project.clients if client.behind is not None]
    waiting = f"+{project.waiting}" if project.waiting else ""
    return (
        project.slug,
        project.state,
        "-" if project.head is None else str(project.head),
        str(project.writes_per_minute),
        _size(project.journal_bytes),
        f"{project.queued + project.with_worker}{waiting}",
        str(len(project.clients)),
        str(max(behind)) if behind else "-",
    )


def _client_row(slug: str, client: ClientStatus, now: datetime) -> tuple[str, ...]:
    behind = "-" if client.behind is None else str(client.behind)
    if client.waiting_bytes:
        behind += f" ({_size(client.waiting_bytes)})"
    runs = client.client_version if client.kind != "stream" else "(stream)"
    cells = (slug, client.actor, client.token, client.address, _span(now - client.since), behind, runs or "-")
    return tuple(map(printable, cells))


def _size(number: int) -> str:
    for unit, name in _UNITS:
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number} B"


def _span(time: timedelta) -> str:
    """Return a span in its largest unit."""
    seconds = max(0, int(time.total_seconds()))
    for unit, name in _SPANS:
        if seconds >= unit:
            return f"{seconds // unit} {name}"
    return f"{seconds} s"
