"""Commands surface: several of lattice's commands as one write, and claiming a named task.

``together`` with ``{"lines": [[...], ...], "task": ...}`` runs the command lines in order: all or none. ``claim`` with
``{"task": ..., "line": [...]}`` runs a line of ``next --claim`` that picks the named task.

The response is ``{"ok": true, "data": [...]}`` with the data printed by each line. With a ``task``, ``together``
appends its final snapshot. If lattice refuses a line, the response is status 422 with the whole output of that line.
Every line is checked as if sent alone, before the first one runs.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from lattice_remote.server.worker.caller import unsupported
from lattice_remote.server.worker.calls import CallRequest, CallResponse, CommandOutput, Operation, payload_of
from lattice_remote.server.worker.policy import Command, Kind, check, parse, shown

__all__ = ["load", "prepare"]

_REFUSED = 422
_Line = Annotated[list[str], Meta(min_length=1, max_length=1000)]


class _Together(msgspec.Struct, forbid_unknown_fields=True):
    lines: Annotated[list[_Line], Meta(min_length=1, max_length=16)]
    task: str = ""


class _Claim(msgspec.Struct, forbid_unknown_fields=True):
    task: str
    line: _Line


def load() -> None: ...


def prepare(request: CallRequest) -> Operation:
    if request.name == "together":
        return _together(request, payload_of(request, _Together))
    if request.name == "claim":
        return _claim(request, payload_of(request, _Claim))
    raise unsupported(f"the server does not know an operation {shown(request.name)} of commands")


def _together(request: CallRequest, together: _Together) -> Operation:
    task = together.task
    if task:
        check(Kind.ID, "task", task)
    return _operation(request, together.lines, partial(_snapshot, request, task) if task else None)


def _snapshot(request: CallRequest, task: str) -> msgspec.Raw:
    from lattice.cli.helpers import read_snapshot, resolve_task_id

    snapshot = read_snapshot(request.lattice_dir, resolve_task_id(request.lattice_dir, task, True))
    return msgspec.Raw(json.dumps(snapshot).encode())


def _operation(
    request: CallRequest, lines: Sequence[Sequence[str]], last: Callable[[], msgspec.Raw] | None = None
) -> Operation:
    commands = [_parsed(request, line) for line in lines]
    steps = [partial(request.run_line, line, command.path) for line, command in zip(lines, commands, strict=True)]
    label = "commands: " + ", ".join(command.path for command in commands)
    actor = next((command.actor for command in commands if command.actor), request.identity.actor)
    return Operation(label, actor, partial(_run, steps, last))


def _parsed(request: CallRequest, line: Sequence[str]) -> Command:
    from lattice.cli.main import cli

    command = parse(cli, line, request.identity, files=(), lattice_dir=request.lattice_dir)
    if not command.path or not command.is_json:
        raise unsupported("each line must be a whole command, with --json")
    return command


def _run(steps: Sequence[Callable[[], CommandOutput]], last: Callable[[], msgspec.Raw] | None) -> CallResponse:
    data: list[msgspec.Raw] = []
    for step in steps:
        printed = step()
        if printed.exit_code:
            return CallResponse(_REFUSED, printed.stdout or _as_envelope(printed))
        data.append(msgspec.json.decode(printed.stdout, type=dict[str, msgspec.Raw])["data"])
    if last is not None:
        data.append(last())
    return CallResponse(200, msgspec.json.encode({"ok": True, "data": data}))


def _as_envelope(printed: CommandOutput) -> bytes:
    message = printed.stderr.decode(errors="replace").strip().rpartition("\n")[2].removeprefix("Error: ")
    return json.dumps({"ok": False, "error": {"code": "VALIDATION_ERROR", "message": message}}).encode()


# --- claiming a named task ---


def _claim(request: CallRequest, claim: _Claim) -> Operation:
    check(Kind.ID, "task", claim.task)
    command = _parsed(request, claim.line)
    if command.path != "next" or not command.values.get("claim"):
        raise unsupported("a task is claimed by a line of 'lattice next --claim'")
    operation = _operation(request, [claim.line])

    def run() -> CallResponse:
        with _choosing(claim.task):
            return operation.run()

    return Operation(operation.label, operation.actor, run)


@contextmanager
def _choosing(task: str) -> Iterator[None]:
    """Make ``next`` pick this task; lattice's own code still applies every rule of claiming."""
    from lattice.cli import query_cmds
    from lattice.cli.helpers import read_snapshot_or_exit, require_root, resolve_task_id

    def choose(snapshots: object, **_: object) -> dict[str, Any]:
        del snapshots
        lattice_dir = require_root(is_json=True)
        return dict(read_snapshot_or_exit(lattice_dir, resolve_task_id(lattice_dir, task, True), True))

    lattices = vars(query_cmds)["select_next"]
    setattr(query_cmds, "select_next", choose)  # noqa: B010 - an imported name
    try:
        yield
    finally:
        setattr(query_cmds, "select_next", lattices)  # noqa: B010 - likewise
