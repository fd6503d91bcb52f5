"""Worker process of one project: requests in and outcomes out over a socket pair, one at a time (I1).

    python -m lattice_remote.server.worker.main --fd 5 --project-dir DATA/projects/web --slug web

It exits on ``Stop``, at end of file, or when the storage fails: for good (``WorkerFailed``) if a write was lost,
otherwise so that the next worker tries again.
"""

import argparse
import gc
import logging
import os
import shutil
import signal
import socket
import sys
import sysconfig
import tempfile
from pathlib import Path

import msgspec

from lattice_remote.server.config import JournalSettings
from lattice_remote.server.ipc import CopyMissing, ReceivedFrames, ToWorker, WorkerFailed
from lattice_remote.server.journal.journal import CommitJob, Committer, Retention
from lattice_remote.server.logging import FORMAT_VARIABLE, LEVEL_VARIABLE, log_to_stderr
from lattice_remote.server.tree.tree import SyncFailed
from lattice_remote.server.worker.caller import SessionOwners
from lattice_remote.server.worker.dispatcher import Dispatcher
from lattice_remote.server.worker.executor import Executor
from lattice_remote.server.worker.follower import CopyNeeded, Follower
from lattice_remote.server.worker.policy import not_of_plugins
from lattice_remote.server.worker.recovery import Membership, open_member, open_store

__all__ = ["begin", "code_directories", "main", "parser_of", "prepare_scratch"]


def code_directories(project: Path) -> list[str]:
    """Return the directories of Python and its packages.

    Not the start directory, nor those around the project, where the data and the tokens are.
    """
    started_in = os.getcwd()
    standard = sysconfig.get_paths()
    paths = {*(standard[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")), *filter(None, sys.path)}
    return sorted(path for path in paths if path != started_in and not f"{project}/".startswith(f"{path.rstrip('/')}/"))


def prepare_scratch(project: Path) -> Path:
    """Create the private directory, empty, and change into it."""
    scratch = project / "tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(mode=0o700)
    tempfile.tempdir = str(scratch)
    os.chdir(scratch)
    return scratch


_UNKNOWN_PLUGIN_COMMAND = 'config.json allows "{}", which is not a command of an installed plugin'
_log = logging.getLogger(__name__)
_decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)


def parser_of(role: str) -> argparse.ArgumentParser:
    """Return the parser of a process of a project; the template makes it once for all of them."""
    parser = argparse.ArgumentParser(prog=f"lattice-remote-{role}")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--project-dir", type=Path, required=True)
    parser.add_argument("--slug", required=True)
    return parser


def begin(role: str, options: argparse.Namespace) -> socket.socket:
    """Prepare signals, log and environment of a process of a project; return its connection to the server."""
    # The server ends this process; a signal to the whole process group must not interrupt its work.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.dont_write_bytecode = True
    log_to_stderr(f"{role} {options.slug}: %(levelname)s %(message)s", {"process": role, "project": options.slug})
    for name in (FORMAT_VARIABLE, LEVEL_VARIABLE):
        os.environ.pop(name, None)  # hooks inherit this process's environment
    return socket.socket(fileno=options.fd)


_parser = parser_of("worker")
_parser.add_argument("--journal", default="{}", help="settings, as in config.json")
_parser.add_argument("--plugin-commands", default="[]", help="likewise")
_parser.add_argument("--member", default="null", help="of a cluster: a Membership")


def main(arguments: list[str] | None = None) -> int:
    options = _parser.parse_args(arguments)
    connection = begin("worker", options)
    committer = Committer(connection)
    try:
        plugin_commands = msgspec.json.decode(options.plugin_commands, type=list[str])
        retention = _retention(options.journal)
        member = msgspec.json.decode(options.member, type=Membership | None)
        project = options.project_dir.resolve()
        return _serve(project, connection, committer, retention, plugin_commands, member=member)
    except CopyNeeded as error:
        committer.submit(CommitJob(CopyMissing(str(error))))
    except SyncFailed as error:
        _log.exception("the disk could not keep a write")
        committer.submit(CommitJob(WorkerFailed(f"the server's disk could not keep a write: {error}")))
    except OSError:
        # For example a full disk. The next worker undoes the running command and continues when possible.
        _log.exception("the worker cannot continue")
    committer.finish()
    return 1


def _retention(settings: str) -> Retention:
    journal = msgspec.json.decode(settings, type=JournalSettings)
    return Retention(journal.max_bytes, journal.max_age_days * 24 * 3600.0, journal.segment_bytes)


def _serve(
    project: Path,
    connection: socket.socket,
    committer: Committer,
    retention: Retention,
    plugin_commands: list[str],
    *,
    member: Membership | None,
) -> int:
    code = code_directories(project)
    scratch = prepare_scratch(project)
    if member is None:
        opened = open_store(project, scratch, committer, code=code, retention=retention)
    else:
        opened = open_member(project, scratch, committer, member, code=code, retention=retention)
    store = opened.store
    executor = Executor(
        project,
        lazy=opened.can_repair,
        capture=opened.capture,
        make_id=store.make_id,
        locks=store.locks,
    )
    follower = Follower(store, committer, SessionOwners(project)) if member is not None else None
    dispatcher = Dispatcher(
        project, scratch, store, executor, committer, plugin_commands=plugin_commands, follower=follower
    )
    dispatcher.ready(
        opened.notes + [_UNKNOWN_PLUGIN_COMMAND.format(name) for name in not_of_plugins(executor.cli, plugin_commands)]
    )
    gc.collect()
    gc.freeze()  # exempt the loaded modules from collection
    requests = ReceivedFrames(connection)
    for frame in requests:
        goes_on = dispatcher.handle(_decoder.decode(frame))
        # While half of the requests are committed and answered, the other half keeps this thread busy.
        if committer.waiting >= len(requests) and committer.waiting >= requests.arrived():
            committer.flush()
        else:
            committer.flush_soon()
        if not goes_on:
            break
    store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
