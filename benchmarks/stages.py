"""Time of each stage of a command in a real server and its worker: run either program with timers around its functions.

    python benchmarks/stages.py server REPORT ARGUMENTS...    as lattice-remote
    python benchmarks/stages.py worker REPORT ARGUMENTS...    as the worker; the server starts it

A timer counts the time of its own stage without that of the stages inside it. SIGUSR1 resets the timers of both
processes, SIGUSR2 writes them as JSON to ``REPORT.server`` and ``REPORT.worker``.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORKER = {
    "known ids, fingerprint": [
        "server.journal.journal:Journal.find",
        "server.worker.dispatcher:_with_fingerprint",
        "server.worker.dispatcher:Dispatcher._require_new",
    ],
    "policy": ["server.worker.dispatcher:parse", "server.worker.dispatcher:describe_command"],
    "Click": ["server.worker.executor:Executor.run"],
    "lattice's command": ["server.worker.executor:Executor._invoke"],
    "locks": ["server.worker.patches:LockTable.acquire", "server.worker.executor:Executor.release_locks"],
    "capture": [
        "server.tree.capture:Capture._check",
        "server.tree.capture:Capture.note_append",
        "server.tree.capture:Capture.note_replace",
    ],
    "undo log": [
        *(f"server.tree.undo:UndoLog.keep_{name}" for name in ("for_append", "for_rewrite", "for_replace", "for_move")),
        "server.tree.undo:UndoLog.begin",
        "server.tree.undo:UndoLog.clear",
    ],
    "publish the writes": ["server.worker.patches:WriteSet.publish"],
    "difference": ["server.tree.tree:ProjectTree.after_command"],
    "encode change and reply": ["server.worker.store:_encode_change", "server.worker.dispatcher:_reply"],
    "journal": ["server.journal.journal:Journal.append", "server.journal.ids:ChangeIds.make"],
    "commit, the rest": ["server.worker.store:Store.commit"],
    "dispatcher, the rest": ["server.worker.dispatcher:Dispatcher.handle"],
    "(beside) fsync": ["server.journal.journal:sync"],
    "(beside) committer": ["server.journal.journal:Committer._commit"],
}
SERVER = {
    "receive the request": ["server.project.connection:_decode"],
    "take the request": ["server.project.connection:ClientConnection._take"],
    "queue": ["server.project.project:Project.submit"],
    "to the worker": ["server.project.worker_process:WorkerProcess.send"],
    "from the worker": ["server.project.worker_process:WorkerProcess.data_received"],
    "publish": ["server.project.history:History.publish"],
    "log and metrics": ["server.project.metrics:RequestLog.settled"],
    "settle": ["server.project.project:Project._done"],
    "send change and reply": ["server.transport.websocket:SendQueue.flush"],
}

_spent: dict[str, int] = defaultdict(int)
_calls: dict[str, int] = defaultdict(int)
_inner: dict[int, int] = defaultdict(int)  # by thread: nanoseconds in the stages inside the running one


def _timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    clock, thread = time.perf_counter_ns, threading.get_ident

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        me = thread()
        outside, _inner[me] = _inner[me], 0
        began = clock()
        try:
            return function(*args, **kwargs)
        finally:
            took = clock() - began
            _spent[stage] += took - _inner[me]
            _calls[stage] += 1
            _inner[me] = outside + took

    return wrapper


def _install(stages: dict[str, list[str]]) -> None:
    import importlib

    for stage, places in stages.items():
        for place in places:
            module, _, path = place.partition(":")
            owner: Any = importlib.import_module(f"lattice_remote.{module}")
            *outer, name = path.split(".")
            for part in outer:
                owner = getattr(owner, part)
            setattr(owner, name, _timed(stage, getattr(owner, name)))


def _report_on_signals(path: Path, stages: dict[str, list[str]]) -> None:
    began = {"wall": time.perf_counter(), "processor": time.process_time()}

    def reset(*_: object) -> None:
        _spent.clear()
        _calls.clear()
        began.update(wall=time.perf_counter(), processor=time.process_time())

    def write(*_: object) -> None:
        report = {
            "microseconds": {stage: _spent[stage] / 1000 for stage in stages},
            "calls": {stage: _calls[stage] for stage in stages},
            "wall": (time.perf_counter() - began["wall"]) * 1e6,
            "processor": (time.process_time() - began["processor"]) * 1e6,
        }
        scratch = path.with_suffix(path.suffix + ".new")
        scratch.write_text(json.dumps(report))
        os.replace(scratch, path)

    signal.signal(signal.SIGUSR1, reset)
    signal.signal(signal.SIGUSR2, write)


def main() -> int:
    program, report, *arguments = sys.argv[1:]
    if program == "server":
        from lattice_remote.server import cli
        from lattice_remote.server.project import project, worker_process

        command = (*worker_process.WORKER_COMMAND[:-2], __file__, "worker", report)
        worker_process.WORKER_COMMAND = command
        project.Project.__init__.__kwdefaults__["worker_command"] = command
        _install(SERVER)
        _report_on_signals(Path(f"{report}.server"), SERVER)
        sys.argv = ["lattice-remote", *arguments]
        return cli.main() or 0
    from lattice_remote.server.worker import main as worker

    _install(WORKER)
    _report_on_signals(Path(f"{report}.worker"), WORKER)
    return worker.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
