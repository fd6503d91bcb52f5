"""The process that owns one project: requests in over a socket pair, outcomes out, one at a time (I1).

    python -m lattice_remote.server.worker.process --fd 5 --project-dir DATA/projects/web --slug web

It leaves when told to (``Stop``), when the server is gone (end of file), or when the storage fails: for good
(``Failed``) where it could not keep what was written, else for the next worker to try again.
"""

import argparse
import contextlib
import gc
import logging
import os
import shutil
import signal
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec

from lattice_remote.errors import Rejected
from lattice_remote.protocol.codec import encode
from lattice_remote.protocol.messages import Refused, Reply, Stored
from lattice_remote.protocol.operations import canonical_json
from lattice_remote.protocol.paths import is_editable
from lattice_remote.server.data.datadir import ProjectPaths
from lattice_remote.server.data.ipc import (
    After,
    Edit,
    Execute,
    Failed,
    NewEpoch,
    Ready,
    Reconcile,
    Settle,
    Stop,
    ToWorker,
)
from lattice_remote.server.data.loglines import log_to_stderr
from lattice_remote.server.data.settings import Journal as JournalSettings
from lattice_remote.server.journal.journal import Retention
from lattice_remote.server.journal.segments import Record
from lattice_remote.server.tree.capture import Touched, Vetoed
from lattice_remote.server.tree.manifest import SyncFailed
from lattice_remote.server.tree.tree import Difference
from lattice_remote.server.worker.actors import Identity
from lattice_remote.server.worker.attachments import Attached
from lattice_remote.server.worker.attribution import describe_command, describe_edit
from lattice_remote.server.worker.committer import Committer, Job
from lattice_remote.server.worker.executor import Executor, Outcome
from lattice_remote.server.worker.policy import MAX_TEXT_BYTES, Command, parse
from lattice_remote.server.worker.recovery import open_store
from lattice_remote.server.worker.store import BY_SERVER, Cause, ChangeTooLarge, Store
from lattice_remote.textmerge import merge_text

__all__ = ["Worker", "main"]

_log = logging.getLogger(__name__)
_decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_MAX_ACTOR_CHARS = 256
_MAX_MESSAGE_CHARS = 4096
_MAX_OUTPUT_BYTES = 8 * 1024 * 1024


class Worker:
    """One project's requests, carried out in order.

    Args:
        project: the project's directory, a real path.
        scratch: a private directory, a real path; emptied after each command.
        store, executor, committer: see there.
    """

    def __init__(self, project: Path, scratch: Path, store: Store, executor: Executor, committer: Committer) -> None:
        self._paths = ProjectPaths(project)
        self._lattice_dir = self._paths.lattice
        self._scratch = scratch
        self._store = store
        self._executor = executor
        self._committer = committer

    def ready(self, notes: list[str]) -> None:
        """Report that the project is open, after everything that was committed so far."""
        from importlib.metadata import version

        journal, files = self._store.journal, self._store.tree.files
        message = Ready(
            epoch=journal.epoch,
            head=journal.head,
            mark=journal.mark,
            oldest=journal.oldest,
            lattice_version=version("lattice-tracker"),
            files=[After(path, state.size, state.digest) for path, state in files.items()],
            notes=notes,
        )
        self._committer.submit(Job(message))

    def handle(self, message: ToWorker) -> bool:
        """Carry out one request; return False when it was the last.

        Raises:
            OSError: the storage failed; the process must end.
        """
        match message:
            case Execute():
                self._once(message, self._execute)
            case Edit():
                self._once(message, self._edit)
            case Settle():
                self._once(message, _refuse_settled)
            case Reconcile():
                self._store.keep_retention()
                found = self._store.tree.reconcile(message.paths)
                self._store.commit(found, BY_SERVER("edit"))
            case NewEpoch():
                self._committer.wait()
                self._store.new_epoch()
                self.ready([f"a new epoch begins: {message.reason}"])
            case Stop():
                return False
        return True

    def _once(self, request: Execute | Edit | Settle, carry_out: Callable[..., None]) -> None:
        """Carry out a request unless it was before: then its answer is given again (I6)."""
        known = self._store.journal.find(request.id)
        try:
            if known is None:
                self._require_new(request)
                carry_out(request)
            else:
                self._answer_again(request, known)
        except Rejected as rejected:
            message = rejected.message[:_MAX_MESSAGE_CHARS]
            self._store.refuse(request.id, encode(Refused(request.id, rejected.code, message)))

    def _require_new(self, request: Execute | Edit | Settle) -> None:
        """Do nothing if it is sure that this request, which the journal does not know, was never carried out (I6).

        Raises:
            Rejected: it was sent before, and whether it was carried out may have been forgotten since.
        """
        first = request.first_sent_at if not isinstance(request, Settle) else None
        if first is not None and first < self._store.journal.since:
            raise Rejected(
                "this request was sent before, and the server does not keep its answer any more; it may have taken "
                "effect: look before you repeat it",
                code="REMOTE_UNKNOWN_OUTCOME",
            )

    def _answer_again(self, request: Execute | Edit | Settle, known: Record) -> None:
        if known.token_id != request.token_id:
            raise Rejected("this request was made with another token", code="REMOTE_FORBIDDEN")
        self._store.reply_again(request.id, known)

    # --- a command line ---

    def _execute(self, request: Execute) -> None:
        try:
            attached = self._attach(request)
            identity = Identity(request.actor, request.act_as)
            command = parse(
                self._executor.cli, attached.argv, identity, files=attached.paths, lattice_dir=self._lattice_dir
            )
            self._run(request, command, attached)
        finally:
            if request.files:
                self._empty_scratch()

    def _attach(self, request: Execute) -> Attached:
        try:
            place = partial(self._paths.upload, request.token_id)
            return Attached.write(request.argv, request.files, self._scratch, place)
        except OSError as error:
            raise _cannot_store("the attached files", error) from error

    def _run(self, request: Execute, command: Command, attached: Attached) -> None:
        outcome = Outcome()
        # What was vetoed is noted in what was touched.
        with self._store.transaction() as touched, contextlib.suppress(Vetoed):
            outcome = self._executor.run(
                attached.argv, command.path, last_try=request.last_try, own_copies=attached.paths
            )
        if touched.private:
            self._empty_scratch()
        if outcome.failure is not None or touched.veto is not None or touched.unshared:
            self._store.roll_back()
            _refuse_vetoed(touched, command)
            outcome = _broken(outcome.failure or "", is_json=command.is_json)
            difference = Difference()
        else:
            difference = self._store.difference(touched, attached.vouched)
        actor = (command.actor or request.actor)[:_MAX_ACTOR_CHARS]
        cause = Cause(request.id, request.token_id, actor, request.id, describe_command(request.argv), request.actor)
        if outcome.waiting is not None:
            self._store.commit(difference, cause, hooks=outcome.hooks, waiting=outcome.waiting)
            return
        is_json = command.is_json
        stdout, stderr = _cut(
            attached.restore_names(outcome.stdout, is_json=is_json),
            attached.restore_names(outcome.stderr, is_json=False),
        )
        try:
            self._store.commit(
                difference,
                cause,
                lambda seq: Reply(request.id, seq, outcome.exit_code, stdout, stderr),
                hooks=outcome.hooks,
            )
        except ChangeTooLarge:
            self._store.roll_back()
            raise Rejected(
                f"'lattice {command.path}' changes more files than one change can carry: do it in parts; "
                "nothing was changed",
                code="REMOTE_TOO_LARGE",
            ) from None

    def _empty_scratch(self) -> None:
        for entry in os.scandir(self._scratch):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)

    # --- a plan or notes ---

    def _edit(self, request: Edit) -> None:
        if not is_editable(request.path):
            raise Rejected(f"{request.path!r} is not a plan or notes of a task", code="REMOTE_UNSUPPORTED")
        if max(len(request.text), len(request.base or b"")) > MAX_TEXT_BYTES:
            raise Rejected(f"{request.path} is longer than 1 MiB", code="REMOTE_TOO_LARGE")
        if not _is_utf8(request.text):  # lattice reads it in status and next, which would break down for everybody
            raise Rejected(f"{request.path} is no UTF-8 text: save it as UTF-8 to send it", code="REMOTE_UNSUPPORTED")
        path = self._store.tree.absolute(request.path)
        if self._store.tree.status(request.path) is None and os.path.lexists(path):
            raise Rejected(f"{request.path} is not a plain file on the server", code="REMOTE_UNSUPPORTED")
        outcome, text = merge_text(request.base, request.text, self._current(path))
        if outcome in ("stored", "merged") and not self._is_active(request.path):
            outcome = "conflict"  # archived meanwhile, or no such task: the text stays with the client
        difference = Difference()
        if outcome in ("stored", "merged"):
            assert text is not None, "there is a text whenever something is to be stored"
            difference = self._replace(request.path, text)
        else:
            difference = self._store.tree.reconcile([request.path])
        command = describe_edit(request.path)
        cause = Cause(request.id, request.token_id, request.actor, request.id, command, request.actor)
        self._store.commit(difference, cause, lambda seq: Stored(request.id, seq, outcome))

    def _current(self, path: str) -> bytes | None:
        try:
            return Path(path).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _cannot_store("the text", error) from error

    def _replace(self, path: str, text: bytes) -> Difference:
        """Put ``text`` in place of a plan or notes, or leave everything as it was.

        Raises:
            Rejected: that is not possible: the disk is full, or somebody put something else there.
        """
        failure: OSError | Vetoed | None = None
        with self._store.transaction() as touched:
            try:
                _replace(self._store.tree.absolute(path), text)
            except (OSError, Vetoed) as error:
                failure = error
        if failure is not None:
            self._store.roll_back()
            raise _cannot_store(path, failure) from failure
        return self._store.difference(touched)

    def _is_active(self, path: str) -> bool:
        return (self._lattice_dir / "tasks" / f"{Path(path).stem}.json").is_file()


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _cannot_store(what: str, error: BaseException) -> Rejected:
    reason = error.strerror if isinstance(error, OSError) else error
    return Rejected(f"the server can't store {what}: {reason}; nothing was changed", code="REMOTE_STORAGE")


def _cut(stdout: bytes, stderr: bytes) -> tuple[bytes, bytes]:
    """Return what was printed, shortened to what a frame can carry, and saying so."""
    if max(len(stdout), len(stderr)) <= _MAX_OUTPUT_BYTES:
        return stdout, stderr
    note = b"lattice-remote: the command was carried out; its output is over 8 MiB and was cut\n"
    return stdout[:_MAX_OUTPUT_BYTES], stderr[:_MAX_OUTPUT_BYTES] + note


def _refuse_settled(request: Settle) -> None:
    """The journal does not know it: what its predecessor did of it was undone, and nothing more is tried."""
    raise Rejected(request.message, code=request.code)


def _refuse_vetoed(touched: Touched, command: Command) -> None:
    """Refuse a command that was undone because of what it touched."""
    if touched.veto is not None:
        why = f"tried to {touched.veto}, which the server does not allow"
    elif touched.unshared:
        why = f"would write {touched.unshared[0]!r}, a name that can't be shared"
    else:
        return
    raise Rejected(f"'lattice {command.path}' {why}; nothing was changed", code="REMOTE_UNSUPPORTED")


def _broken(failure: str, *, is_json: bool) -> Outcome:
    """Return what a command that broke down prints, in lattice's own forms."""
    message = f"the command broke down on the server and was undone: {failure}"
    if is_json:
        envelope = {"error": {"code": "REMOTE_FAILED", "message": message}, "ok": False}
        return Outcome(1, canonical_json(envelope) + b"\n")
    return Outcome(1, stderr=f"Error: {message}\n".encode("utf-8", "backslashreplace"))


def _replace(path: str, text: bytes) -> None:
    """Replace a plan or notes atomically; the journal makes it durable."""
    scratch = os.path.join(os.path.dirname(path), f".tmp.edit.{os.path.basename(path)}")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(scratch).write_bytes(text)
    os.replace(scratch, path)


def _messages(connection: socket.socket) -> Iterator[ToWorker]:
    """Yield what the server asks, until it is gone."""
    buffer = bytearray()
    while True:
        try:
            received = connection.recv(1 << 20)
        except ConnectionError:
            return
        if not received:
            return
        buffer += received
        while len(buffer) >= 4 and len(buffer) - 4 >= (length := int.from_bytes(buffer[:4])):
            message = _decoder.decode(bytes(buffer[4 : 4 + length]))
            del buffer[: 4 + length]
            yield message


def _code_directories(project: Path) -> list[str]:
    """Return where Python and its packages lie; the directory it was started in is none of them.

    Nor is one around the project: an environment may have been made where the data lies, and the tokens with it.
    """
    started_in = os.getcwd()
    standard = sysconfig.get_paths()
    paths = {*(standard[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")), *filter(None, sys.path)}
    return sorted(path for path in paths if path != started_in and not project.is_relative_to(path))


def _prepare_scratch(project: Path) -> Path:
    """Make the private directory, empty, and live in it."""
    scratch = project / "tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(mode=0o700)
    tempfile.tempdir = str(scratch)
    os.chdir(scratch)
    return scratch


def main(arguments: list[str] | None = None) -> int:
    """Run the worker until it is told to stop; return the exit code."""
    parser = argparse.ArgumentParser(prog="lattice-remote-worker")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--project-dir", type=Path, required=True)
    parser.add_argument("--slug", required=True)
    parser.add_argument("--journal", default="{}", help="settings, as in config.json")
    options = parser.parse_args(arguments)
    # The server tells when to leave; a signal to the whole process group must not cut a command off.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.dont_write_bytecode = True
    log_to_stderr(f"worker {options.slug}: %(levelname)s %(message)s")
    connection = socket.socket(fileno=options.fd)
    committer = Committer(connection)
    try:
        return _serve(options.project_dir.resolve(), connection, committer, _retention(options.journal))
    except SyncFailed as error:
        _log.exception("the disk could not keep what was written")
        committer.submit(Job(Failed(f"the server's disk could not keep what was written: {error}")))
    except OSError:
        # A full disk, say. The next worker undoes what was under way, and goes on as soon as that is possible.
        _log.exception("the worker can't go on")
    committer.finish()
    return 1


def _retention(settings: str) -> Retention:
    journal = msgspec.json.decode(settings, type=JournalSettings)
    return Retention(journal.max_bytes, journal.max_age_days * 24 * 3600.0, journal.segment_bytes)


def _serve(project: Path, connection: socket.socket, committer: Committer, retention: Retention) -> int:
    code = _code_directories(project)
    scratch = _prepare_scratch(project)
    opened = open_store(project, scratch, committer, code=code, retention=retention)
    worker = Worker(project, scratch, opened.store, Executor(project, lazy=opened.can_repair), committer)
    worker.ready(opened.notes)
    gc.collect()
    gc.freeze()  # what was loaded so far stays: no collection need look at it again
    for message in _messages(connection):
        if not worker.handle(message):
            break
    opened.store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
