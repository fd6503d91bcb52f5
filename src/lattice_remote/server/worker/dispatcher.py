"""Dispatcher of a worker: runs each request exactly once, in order, as one transaction (I1, I2, I6)."""

import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import msgspec

from lattice_remote.errors import Rejected
from lattice_remote.protocol.messages import Attachment, Pushed, Refused, Reply, Result, Returned, Stored
from lattice_remote.protocol.operations import canonical_json, digest_of
from lattice_remote.protocol.paths import is_editable
from lattice_remote.server.datadir import ProjectPaths
from lattice_remote.server.ipc import (
    AbandonRequest,
    ApplyRecords,
    Edit,
    ImportProject,
    Lead,
    NewEpoch,
    PathState,
    Ready,
    Reconcile,
    RunCall,
    RunCommand,
    Stop,
    ToWorker,
    asked_by,
)
from lattice_remote.server.journal.ids import token_digest
from lattice_remote.server.journal.journal import CommitJob, Committer
from lattice_remote.server.tree.capture import AccessDenied, AccessLog
from lattice_remote.server.tree.tree import TreeDiff, TrustedDigest
from lattice_remote.server.worker.caller import Attached, Identity, SessionOwners
from lattice_remote.server.worker.calls import CallRequest, surface_named
from lattice_remote.server.worker.executor import CommandOutcome, Executor
from lattice_remote.server.worker.follower import Follower
from lattice_remote.server.worker.policy import (
    Command,
    command_words,
    describe_call,
    describe_command,
    describe_edit,
    parse,
)
from lattice_remote.server.worker.project_import import (
    answer_to,
    cause_of,
    decide,
    install,
    is_adopting,
    require_empty,
)
from lattice_remote.server.worker.store import ChangeOrigin, ChangeTooLarge, OutsideChange, Store, server_origin
from lattice_remote.textmerge import merge_text

__all__ = ["Dispatcher", "Editor", "Transaction", "TransactionRunner"]


@dataclass(frozen=True)
class Transaction:
    """Checked work, ready to run.

    Attributes:
        run: called again if an outside change was in the way.
        answer: makes the reply from the outcome and the sequence number that it is valid from.
        vouched: verified digests of uploaded files.
        note: called before the commit, for state that must be durable with the change.
    """

    name: str
    cause: ChangeOrigin
    run: Callable[[], CommandOutcome]
    answer: Callable[[CommandOutcome, int], Result]
    vouched: Mapping[int, TrustedDigest] = field(default_factory=dict)
    note: Callable[[TreeDiff], None] = lambda _: None


class TransactionRunner:
    """Runner of transactions in one project; ``scratch`` is a private directory, emptied after each."""

    def __init__(self, store: Store, scratch: Path) -> None:
        self._store = store
        self._scratch = scratch

    def run_in_transaction(self, work: Transaction) -> None:
        """Run a transaction and commit it with its reply; undo it on failure or a forbidden access.

        The reply to a crash is not remembered, so a repeated request runs again (I6).

        Raises:
            Rejected: a forbidden access, or more than one change can carry.
            OutsideChange: it was undone and must run again.
            OSError: the storage failed.
        """
        outcome = CommandOutcome()
        # The access log records a veto.
        with self._store.transaction() as touched, contextlib.suppress(AccessDenied):
            outcome = work.run()
        if touched.private:
            self.empty_scratch()
        hooks = outcome.hooks
        if outcome.is_undone or touched.veto is not None or touched.unshared:
            self._store.roll_back()
            _refuse_vetoed(touched, work.name)
            if outcome.no_room is not None:
                raise cannot_store(f"what {work.name} writes", outcome.no_room)
            if outcome.timeout:
                holder = "another process in the server's directory holds it"
                raise Rejected(f"{outcome.timeout}: {holder}; nothing was changed, try again", code="REMOTE_BUSY")
            if not outcome.is_final:
                self._store.reply_without_record(lambda seq: work.answer(outcome, seq))
                return
            difference, hooks = TreeDiff(), []
        else:
            difference = self._store.difference(touched, work.vouched)
        try:
            work.note(difference)
        except OSError as error:
            self._store.roll_back()
            raise cannot_store("the owner of a session", error) from error
        except Rejected:
            self._store.roll_back()
            raise
        if outcome.waiting is not None:
            self._store.commit(difference, work.cause, hooks=hooks, waiting=outcome.waiting)
            return
        try:
            self._store.commit(difference, work.cause, lambda seq: work.answer(outcome, seq), hooks=hooks)
        except ChangeTooLarge:
            self._store.roll_back()
            raise Rejected(
                f"{work.name} changes more files than fit into one change: do it in parts; nothing was changed",
                code="REMOTE_TOO_LARGE",
            ) from None

    def empty_scratch(self) -> None:
        for entry in os.scandir(self._scratch):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)


def cannot_store(what: str, error: BaseException) -> Rejected:
    reason = error.strerror if isinstance(error, OSError) else error
    return Rejected(f"the server cannot store {what}: {reason}; nothing was changed", code="REMOTE_STORAGE")


def _refuse_vetoed(touched: AccessLog, name: str) -> None:
    if touched.veto is not None:
        why = f"tried to {touched.veto}, which the server does not allow"
    elif touched.unshared:
        why = f"would write {touched.unshared[0]!r}, a name that cannot be shared"
    else:
        return
    raise Rejected(f"{name} {why}; nothing was changed", code="REMOTE_UNSUPPORTED")


class Editor:
    def __init__(self, store: Store, lattice_dir: Path) -> None:
        self._store = store
        self._lattice_dir = lattice_dir

    def edit(self, request: Edit) -> None:
        """Merge an edit into the file and commit it with its reply, which may report a conflict.

        Raises Rejected: the text cannot be stored; OutsideChange; OSError: the storage failed.
        """
        if not is_editable(request.path):
            raise Rejected(f"{request.path!r} is not a plan or notes of a task", code="REMOTE_UNSUPPORTED")
        if not _is_utf8(request.text):  # lattice's status and next would fail for all users
            raise Rejected(f"{request.path} is not UTF-8 text: save it as UTF-8", code="REMOTE_UNSUPPORTED")
        path = self._store.tree.absolute(request.path)
        if self._store.tree.status(request.path) is None and os.path.lexists(path):
            raise Rejected(f"{request.path} is not a regular file on the server", code="REMOTE_UNSUPPORTED")
        current = self._current(path)
        if not self._store.tree.has_content(request.path, current):
            raise OutsideChange([request.path])
        base = current if request.base_digest else request.base
        if request.base_digest and (base is None or digest_of(base) != request.base_digest):
            raise Rejected(f"{request.path} has changed since the named version", code="REMOTE_STALE_BASE")
        outcome, text = merge_text(base, request.text, current)
        if outcome in ("stored", "merged") and not self._is_active(request.path):
            outcome = "conflict"  # archived or missing task: the client keeps the text
        difference = TreeDiff()
        if outcome in ("stored", "merged"):
            assert text is not None, "these outcomes come with a text"
            difference = self._replace(request.path, text)
        command = describe_edit(request.path)
        who = request.actor
        cause = ChangeOrigin(request.id, request.token_id, who, request.id, command, who, request.fingerprint)
        self._store.commit(difference, cause, lambda seq: Stored(request.id, seq, outcome))

    def _current(self, path: str) -> bytes | None:
        try:
            return Path(path).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise cannot_store("the text", error) from error

    def _replace(self, path: str, text: bytes) -> TreeDiff:
        failure: OSError | AccessDenied | None = None
        with self._store.transaction() as touched:
            try:
                self._store.replace_text(path, text)
            except (OSError, AccessDenied) as error:
                failure = error
        if failure is not None:
            self._store.roll_back()
            raise cannot_store(path, failure) from failure
        return self._store.difference(touched)

    def _is_active(self, path: str) -> bool:
        return (self._lattice_dir / "tasks" / f"{Path(path).stem}.json").is_file()


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


_Request = RunCommand | RunCall | Edit | ImportProject | AbandonRequest
_MAX_ACTOR_CHARS = 256
_MAX_MESSAGE_CHARS = 4096
_MAX_OUTPUT_BYTES = 8 * 1024 * 1024
_LOCK_RETRY_S = 0.25
_MAX_RUNS = 20
_MAX_RERUN_S = 10.0
"""From here on a request disturbed by other programs does not run again."""
_LATTICE_VERSION = version("lattice-tracker")  # read once, before the template forks


class Dispatcher:
    """Runner of the server's requests.

    ``plugin_commands`` are those of installed plugins that the administrator allows.
    ``follower`` applies the records of the project's owner until ``Lead`` arrives.
    """

    def __init__(
        self,
        project: Path,
        scratch: Path,
        store: Store,
        executor: Executor,
        committer: Committer,
        *,
        plugin_commands: Collection[str] = (),
        follower: Follower | None = None,
    ) -> None:
        self._plugin_commands = plugin_commands
        self._follower = follower
        self._paths = ProjectPaths(project)
        self._lattice_dir = self._paths.lattice
        self._scratch = scratch
        self._store = store
        self._executor = executor
        self._committer = committer
        self._owners = SessionOwners(project)
        self._runner = TransactionRunner(store, scratch)
        self._editor = Editor(store, self._lattice_dir)

    def ready(self, notes: list[str]) -> None:
        self._store.show_head()
        journal, files = self._store.journal, self._store.tree.files
        message = Ready(
            epoch=journal.epoch,
            head=journal.head,
            mark=journal.mark,
            oldest=journal.oldest,
            lattice_version=_LATTICE_VERSION,
            files=[PathState(path, state.size, state.digest) for path, state in files.items()],
            notes=notes,
        )
        self._committer.submit(CommitJob(message))
        self._committer.flush()

    def handle(self, message: ToWorker) -> bool:
        """Run one request; return False if it was the last. Raises OSError if the process must end."""
        is_keyed = isinstance(message, RunCommand | RunCall | Edit) and bool(message.fingerprint)
        self._store.begin_request(self._name_of(message), is_keyed=is_keyed)
        match message:
            case RunCommand():
                self._run_once(message, self._run_command)
            case RunCall():
                self._run_once(message, self._run_call)
            case Edit():
                self._run_once(message, self._editor.edit)
            case ImportProject():
                self._run_once(message, self._import_project)
                return not is_adopting(self._paths.root)
            case AbandonRequest():
                self._run_once(message, _refuse_abandoned)
            case Reconcile() if self._follower is not None:
                self._follower.restore_outside_changes(message.paths)
            case Reconcile():
                self._store.keep_retention()
                found, is_busy = self._store.find_outside_changes(message.paths)
                retry_at = time.time() + _LOCK_RETRY_S if is_busy else None
                self._store.commit(found, server_origin("edit"), retry_at=retry_at)
            case ApplyRecords():
                assert self._follower is not None, "only followers are sent records"
                self._follower.apply(message)
            case Lead(keeps_edits):
                self._lead(keeps_edits=keeps_edits)
            case NewEpoch():
                self._committer.wait()
                self._store.new_epoch()
                self.ready([f"started a new epoch: {message.reason}"])
            case Stop():
                return False
        return True

    def _lead(self, *, keeps_edits: bool) -> None:
        if self._follower is not None and not keeps_edits:
            self._follower.restore_outside_changes(None)
        self._follower = None

    def _name_of(self, message: ToWorker) -> str:
        match message:
            case RunCommand():
                return command_words(self._executor.cli, message.argv)
            case Edit():
                return "edit"
            case ImportProject():
                return "push"
        return ""

    def _run_once[R: _Request](self, request: R, run: Callable[[R], None]) -> None:
        """Run a request, or repeat its reply (I6)."""
        known = self._store.journal.find(request.id)
        request = _with_fingerprint(request)
        try:
            if known is None:
                self._require_new(request)
                self._run_apart(request, run)
            else:
                _require_same(request, known.fingerprint, is_own=known.token_id == request.token_id)
                self._store.resend_reply(request.id, known)
        except Rejected as rejected:
            message = rejected.message[:_MAX_MESSAGE_CHARS]
            self._store.refuse(Refused(request.id, rejected.code, message))
        finally:
            if isinstance(request, RunCommand | RunCall) and request.files:
                self._runner.empty_scratch()
            self._executor.release_locks()

    def _run_apart[R: _Request](self, request: R, run: Callable[[R], None]) -> None:
        """Run a request; outside changes of its files are numbered before it (I12, I13).

        Each further run holds the locks of the earlier ones, so only files without a lock can change again: Rejected if
        they keep changing.
        """
        began = time.monotonic()
        for number in itertools.count(1):
            try:
                run(request)
                break
            except OutsideChange as outside:
                self._runner.empty_scratch()
                self._store.commit_outside_changes(outside.paths)
                if number >= _MAX_RUNS or time.monotonic() - began > _MAX_RERUN_S:
                    why = f"another program keeps changing {outside.paths[0]}; nothing was changed, try again"
                    raise Rejected(why, code="REMOTE_BUSY") from None

    def _require_new(self, request: _Request) -> None:
        """Refuse a request unknown to the journal that was or may have been done, or whose id is another's (I6)."""
        answered = self._store.journal.request_ids.find(request.id)
        if answered is not None:
            _require_same(request, answered.fingerprint, is_own=answered.token == token_digest(request.token_id))
        first = request.first_sent_at if not isinstance(request, AbandonRequest) else None
        if answered is not None or (first is not None and first < self._store.journal.since):
            raise Rejected(
                "this request was sent before, and the server no longer has its reply; it may have taken effect: "
                "look before you repeat it",
                code="REMOTE_UNKNOWN_OUTCOME",
            )
        if self._store.is_keyed and (why := self._store.journal.request_ids.objection(request.token_id)) is not None:
            raise Rejected(f"{why}; nothing was changed", code="REMOTE_BUSY")

    def _import_project(self, request: ImportProject) -> None:
        # The files on disk decide, including those that are not numbered yet.
        require_empty(self._lattice_dir, {path: status.st_size for path, status in self._store.tree.scan()})
        if not request.candidate:
            raise Rejected("the pushed project is no longer on the server; push again", code="REMOTE_NOT_FOUND")
        if self._store.is_member:
            self._install_project(request)
            return
        self._committer.wait()
        try:
            decide(self._paths.root, request)
        except OSError as error:
            raise cannot_store("the project", error) from error

    def _install_project(self, request: ImportProject) -> None:
        """Put a pushed project in place with one change. Raises Rejected, OutsideChange, OSError."""
        candidate = self._paths.root / request.candidate / ".lattice"

        def run() -> CommandOutcome:
            try:
                install(candidate, self._store.tree, self._store.unwatched)
            except OSError as error:
                return CommandOutcome(is_final=False, no_room=error)
            return CommandOutcome()

        def answer(outcome: CommandOutcome, seq: int) -> Pushed:
            del outcome
            return answer_to(request, seq)

        try:
            self._runner.run_in_transaction(Transaction("the push", cause_of(request), run, answer))
        except Rejected as rejected:
            if rejected.code != "REMOTE_TOO_LARGE":
                raise
            why = "the project has too many files for a push into a cluster; on a node: lattice-remote import"
            raise Rejected(f"{why}; nothing was changed", code=rejected.code) from rejected

    # --- a command line, or an operation of another surface ---

    def _run_command(self, request: RunCommand) -> None:
        attached = self._attach(request, request.argv)
        command = parse(
            self._executor.cli,
            attached.argv,
            self._identity(request),
            files=attached.paths,
            lattice_dir=self._lattice_dir,
            plugin_commands=self._plugin_commands,
        )

        def note(difference: TreeDiff) -> None:
            if command.path == "session start":
                self._owners.note(difference.operations, request.token_id, request.actor)

        self._runner.run_in_transaction(
            Transaction(
                name=f"'lattice {command.path}'",
                cause=_cause(request, command.actor or request.actor, describe_command(request.argv)),
                run=lambda: self._executor.run(
                    attached.argv,
                    command.path,
                    last_try=request.last_try,
                    may_wait=request.may_wait,
                    ahead=request.ahead,
                    own_copies=attached.paths,
                ),
                answer=lambda outcome, seq: _reply(request.id, seq, outcome, command, attached),
                vouched=attached.vouched,
                note=note,
            )
        )

    def _run_call(self, request: RunCall) -> None:
        identity, attach = self._identity(request), partial(self._attach, request)
        operation = surface_named(request.surface).prepare(
            CallRequest(request.name, request.payload, identity, self._lattice_dir, attach, self._executor.run_step)
        )
        self._store.set_label(operation.label)
        if request.files and operation.attached is None:
            raise Rejected("a file was attached to an operation that takes none", code="REMOTE_UNSUPPORTED")
        called = partial(self._executor.call, may_wait=request.may_wait, ahead=request.ahead)
        self._runner.run_in_transaction(
            Transaction(
                name=f"'{operation.label}'",
                cause=_cause(request, operation.actor, describe_call(operation.label)),
                run=lambda: _bounded(called(operation.run, operation.label)),
                answer=lambda outcome, seq: _returned(request.id, seq, outcome, operation.attached or Attached([])),
            )
        )

    def _identity(self, request: RunCommand | RunCall) -> Identity:
        return Identity(request.actor, request.act_as, request.token_id, self._owners)

    def _attach(self, request: RunCommand | RunCall, values: Sequence[str]) -> Attached:
        is_argv = isinstance(request, RunCommand)
        uploaded = partial(self._paths.upload, request.token_id)
        try:
            return Attached.write(values, request.files, self._scratch, uploaded, is_argv=is_argv)
        except OSError as error:
            raise cannot_store("the attached files", error) from error


def _with_fingerprint[R: _Request](request: R) -> R:
    if isinstance(request, AbandonRequest | ImportProject) or request.fingerprint:
        return request
    contents = [_plain(value) for value in asked_by(request)]
    return msgspec.structs.replace(request, fingerprint=digest_of(msgspec.msgpack.encode(contents))[:16])


def _plain(value: object) -> object:
    """Return a request's field for its digest; a file counts by its content's digest."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, Attachment):
        digest = digest_of(value.data) if value.data is not None else value.digest
        return [value.index, value.name, digest]
    return value


def _require_same(request: _Request, fingerprint: bytes, *, is_own: bool) -> None:
    if not is_own:
        raise Rejected("this request id belongs to another token", code="REMOTE_FORBIDDEN")
    known = fingerprint.strip(b"\0")  # none in records of an earlier version
    if known and not isinstance(request, AbandonRequest) and request.fingerprint != fingerprint:
        raise Rejected("a different request was made with this id or key: use a new one", code="REMOTE_INVALID")


def _cause(request: RunCommand | RunCall, actor: str, description: str) -> ChangeOrigin:
    actor = actor[:_MAX_ACTOR_CHARS]
    id_, fingerprint = request.id, request.fingerprint
    return ChangeOrigin(id_, request.token_id, actor, id_, description, request.actor, fingerprint)


def _refuse_abandoned(request: AbandonRequest) -> None:
    """Refuse a request that the journal does not know: its effects were undone."""
    raise Rejected(request.message, code=request.code)


# --- replies ---


def _reply(id_: str, seq: int, outcome: CommandOutcome, command: Command, attached: Attached) -> Result:
    if outcome.failure is not None:
        outcome = _crash_output(outcome.failure, is_json=command.is_json)
    stdout, stderr = _truncated(
        attached.restore_names(outcome.stdout, is_json=command.is_json),
        attached.restore_names(outcome.stderr, is_json=False),
    )
    return Reply(id_, seq, outcome.exit_code, stdout, stderr)


def _bounded(outcome: CommandOutcome) -> CommandOutcome:
    """Fail an operation whose reply exceeds a frame: JSON cannot be cut."""
    if outcome.answer is not None and len(outcome.answer.payload) > _MAX_OUTPUT_BYTES:
        outcome.answer, outcome.failure, outcome.is_final = None, "its reply is over 8 MiB", False
    return outcome


def _returned(id_: str, seq: int, outcome: CommandOutcome, attached: Attached) -> Result:
    answer = outcome.answer
    if answer is None:
        return Returned(id_, seq, 500, _envelope(f"{_CRASHED}: {outcome.failure}"))
    return Returned(id_, seq, answer.status, attached.restore_names(answer.payload, is_json=True))


_CRASHED = "the command failed on the server and was undone"


def _crash_output(failure: str, *, is_json: bool) -> CommandOutcome:
    message = f"{_CRASHED}: {failure}"
    if is_json:
        return CommandOutcome(1, _envelope(message))
    return CommandOutcome(1, stderr=f"Error: {message}\n".encode("utf-8", "backslashreplace"))


def _envelope(message: str) -> bytes:
    whole = message.encode("utf-8", "backslashreplace").decode()  # strict parsers refuse half a surrogate pair
    return canonical_json({"error": {"code": "REMOTE_FAILED", "message": whole}, "ok": False}) + b"\n"  # as lattice


def _truncated(stdout: bytes, stderr: bytes) -> tuple[bytes, bytes]:
    if max(len(stdout), len(stderr)) <= _MAX_OUTPUT_BYTES:
        return stdout, stderr
    note = b"lattice-remote: the command was run; its output is over 8 MiB and was truncated\n"
    return stdout[:_MAX_OUTPUT_BYTES], stderr[:_MAX_OUTPUT_BYTES] + note
