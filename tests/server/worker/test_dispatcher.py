"""Dispatcher of requests, one at a time, on a stub store without a process."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from lattice_remote.errors import Rejected
from lattice_remote.protocol.messages import Attachment, Refused, Reply, Result, Returned, Stored
from lattice_remote.protocol.operations import PutFile, digest_of
from lattice_remote.server.ipc import (
    AbandonRequest,
    ApplyRecords,
    Edit,
    HookCall,
    ImportProject,
    Lead,
    NewEpoch,
    Ready,
    Reconcile,
    RunCall,
    RunCommand,
    Stop,
)
from lattice_remote.server.journal.ids import token_digest
from lattice_remote.server.tree.capture import AccessDenied, AccessLog
from lattice_remote.server.tree.tree import TreeDiff
from lattice_remote.server.worker import dispatcher as dispatcher_module
from lattice_remote.server.worker.calls import CallResponse
from lattice_remote.server.worker.dispatcher import Dispatcher, Transaction, TransactionRunner
from lattice_remote.server.worker.executor import CommandOutcome, ResourceBusy
from lattice_remote.server.worker.store import ChangeOrigin, ChangeTooLarge, OutsideChange

ID, TOKEN, ACTOR = "7" * 32, "tok", "human:ana"
CAUSE = ChangeOrigin(ID, TOKEN, ACTOR, ID)
PATH = "plans/task_01HZZZZZZZZZZZZZZZZZZZZZZZ.md"
HOOK = HookCall("true", {}, "")
CHANGED = TreeDiff([PutFile("config.json", b"{}")])


class RequestIds:
    """Ids of answered requests whose records are gone."""

    def __init__(self) -> None:
        self.known: dict[str, SimpleNamespace] = {}
        self.refusal: str | None = None

    def find(self, request_id: str) -> SimpleNamespace | None:
        return self.known.get(request_id)

    def objection(self, token_id: str) -> str | None:
        assert token_id == TOKEN
        return self.refusal


class StubStore:
    """Records its calls in order."""

    def __init__(self, lattice: Path) -> None:
        self.done: list[tuple[Any, ...]] = []
        self.touched = AccessLog()
        self.found = CHANGED
        self.is_too_large = self.is_keyed = self.is_member = False
        self.request_ids = RequestIds()
        self.records: dict[str, SimpleNamespace] = {}
        self.journal = SimpleNamespace(
            find=self.records.get, request_ids=self.request_ids, since=1000.0, epoch="e1", head=3, mark=b"m", oldest=2
        )
        self.tree = SimpleNamespace(
            absolute=lambda path: str(lattice / path),
            status=lambda path: (lattice / path).stat() if (lattice / path).is_file() else None,
            has_content=lambda path, data: self.known.get(path, data) == data,
            files={},
        )
        self.known: dict[str, bytes | None] = {}
        self.outside: tuple[TreeDiff, bool] = (TreeDiff(), False)

    def names(self) -> list[str]:
        return [each[0] for each in self.done]

    @contextlib.contextmanager
    def transaction(self) -> Iterator[AccessLog]:
        yield self.touched

    def difference(self, touched: AccessLog, vouched: object = None) -> TreeDiff:
        assert touched is self.touched
        self.done.append(("difference", vouched))
        return self.found

    def commit(
        self, difference: TreeDiff, cause: ChangeOrigin, answer: Callable[[int], Result] | None = None, **options: Any
    ) -> None:
        if self.is_too_large:
            raise ChangeTooLarge
        self.done.append(("commit", difference, cause, None if answer is None else answer(4), options))

    def reply_without_record(self, answer: Callable[[int], Result]) -> None:
        self.done.append(("reply", answer(3)))

    def replace_text(self, path: str, text: bytes) -> None:
        place = Path(self.tree.absolute(path))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(text)

    def begin_request(self, command: str, *, is_keyed: bool) -> None:
        self.done.append(("begin", command, is_keyed))
        self.is_keyed = is_keyed

    def find_outside_changes(self, paths: list[str] | None) -> tuple[TreeDiff, bool]:
        self.done.append(("find", paths))
        return self.outside

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: self.done.append((name, *args))


class StubExecutor:
    cli = None

    def __init__(self) -> None:
        self.released = 0

    def release_locks(self) -> None:
        self.released += 1


class StubCommitter:
    def __init__(self) -> None:
        self.done: list[object] = []

    def submit(self, job: Any) -> None:
        self.done.append(job.message)

    def flush(self) -> None:
        self.done.append("flush")

    def wait(self) -> None:
        self.done.append("wait")


class StubFollower:
    def __init__(self) -> None:
        self.done: list[tuple[Any, ...]] = []

    def restore_outside_changes(self, paths: list[str] | None) -> None:
        self.done.append(("restore", paths))

    def apply(self, message: ApplyRecords) -> None:
        self.done.append(("apply", message))


class Place:
    def __init__(self, root: Path, *, follower: StubFollower | None = None) -> None:
        self.root, self.scratch, self.lattice = root, root / "scratch", root / ".lattice"
        self.scratch.mkdir(exist_ok=True)
        (self.lattice / "tasks").mkdir(parents=True, exist_ok=True)
        self.store, self.executor, self.committer = StubStore(self.lattice), StubExecutor(), StubCommitter()
        stubs: tuple[Any, ...] = (self.store, self.executor, self.committer)
        self.runner = TransactionRunner(stubs[0], self.scratch)
        self.dispatcher = Dispatcher(root, self.scratch, *stubs, follower=follower)  # type: ignore[arg-type]
        self.runs: list[object] = []

    def transact(self, outcome: CommandOutcome | Callable[[], CommandOutcome], **fields: Any) -> None:
        def run() -> CommandOutcome:
            (self.scratch / "left").write_text("x")
            return outcome() if callable(outcome) else outcome

        def answer(found: CommandOutcome, seq: int) -> Result:
            return Reply(ID, seq, found.exit_code, found.stdout, found.stderr)

        self.runner.run_in_transaction(Transaction("'lattice x'", CAUSE, run, answer, **fields))

    def handle_as(self, request: Any, run: Callable[[Any], None] | None = None) -> list[Refused]:
        """Handle a request that runs this; return the refusals."""

        def note(found: Any) -> None:
            self.runs.append(found)
            if run is not None:
                run(found)

        self.dispatcher._run_once(request, note)
        return [each[1] for each in self.store.done if each[0] == "refuse"]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# --- a transaction ---


def test_a_change_is_committed_with_its_reply_and_hooks(place: Place) -> None:
    hooks = [HOOK]
    noted: list[TreeDiff] = []
    vouched: dict[int, Any] = {1: object()}
    place.transact(CommandOutcome(2, b"out", b"err", hooks=hooks), vouched=vouched, note=noted.append)
    assert place.store.done == [
        ("difference", vouched),
        ("commit", CHANGED, CAUSE, Reply(ID, 4, 2, b"out", b"err"), {"hooks": hooks}),
    ]
    assert noted == [CHANGED] and (place.scratch / "left").exists(), "nothing private was touched"


def test_the_private_directory_is_emptied_if_it_was_touched(place: Place, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    (place.scratch / "directory/inner").mkdir(parents=True)
    (place.scratch / "link").symlink_to(kept)
    place.store.touched.private = True
    place.transact(CommandOutcome())
    assert list(place.scratch.iterdir()) == [] and (kept / "file").exists()


@pytest.mark.parametrize(
    ("veto", "unshared", "message"),
    [
        ("run a program", [], "'lattice x' tried to run a program, which the server does not allow"),
        (None, ["tasks/\udcff", "b"], "'lattice x' would write 'tasks/\\udcff', a name that cannot be shared"),
    ],
)
def test_a_forbidden_access_undoes_the_command(
    place: Place, veto: str | None, unshared: list[str], message: str
) -> None:
    def run() -> CommandOutcome:
        if veto:
            raise AccessDenied(veto)
        return CommandOutcome()

    place.store.touched.veto, place.store.touched.unshared = veto, unshared
    with pytest.raises(Rejected) as refused:
        place.transact(run)
    assert (refused.value.message, refused.value.code) == (f"{message}; nothing was changed", "REMOTE_UNSUPPORTED")
    assert place.store.done == [("roll_back",)]


@pytest.mark.parametrize(
    ("outcome", "code", "words"),
    [
        (CommandOutcome(is_final=False, no_room=OSError(28, "No space left")), "REMOTE_STORAGE", "No space left"),
        (CommandOutcome(timeout="Timed out on tasks_x"), "REMOTE_BUSY", "Timed out on tasks_x: another process"),
    ],
)
def test_a_temporary_failure_is_undone_and_refused(
    place: Place, outcome: CommandOutcome, code: str, words: str
) -> None:
    with pytest.raises(Rejected, match=words) as refused:
        place.transact(outcome)
    assert refused.value.code == code and "nothing was changed" in refused.value.message
    assert place.store.done == [("roll_back",)]


def test_a_breakdown_is_undone_and_answered_without_a_record(place: Place) -> None:
    place.transact(CommandOutcome(1, failure="boom", is_final=False))
    assert place.store.done == [("roll_back",), ("reply", Reply(ID, 3, 1, b"", b""))]


def test_a_failed_operation_is_undone_and_its_answer_remembered(place: Place) -> None:
    hooks = [HOOK]
    place.transact(CommandOutcome(answer=CallResponse(500, b"{}"), hooks=hooks))
    assert place.store.done == [("roll_back",), ("commit", TreeDiff(), CAUSE, Reply(ID, 4, 0, b"", b""), {"hooks": []})]


@pytest.mark.parametrize(
    ("error", "code"),
    [(OSError(28, "No space left"), "REMOTE_STORAGE"), (Rejected("no", code="REMOTE_FORBIDDEN"), "REMOTE_FORBIDDEN")],
)
def test_what_cannot_be_noted_undoes_the_command(place: Place, error: Exception, code: str) -> None:
    def note(_: TreeDiff) -> None:
        raise error

    with pytest.raises(Rejected) as refused:
        place.transact(CommandOutcome(), note=note)
    assert refused.value.code == code and place.store.names() == ["difference", "roll_back"]


def test_a_command_that_waits_has_no_reply(place: Place) -> None:
    waiting = ResourceBusy("gpu", 60.0)
    place.transact(CommandOutcome(waiting=waiting))
    assert place.store.done[-1] == ("commit", CHANGED, CAUSE, None, {"hooks": [], "waiting": waiting})
    assert place.store.names() == ["difference", "commit"]


def test_a_change_that_no_frame_carries_is_undone(place: Place) -> None:
    place.store.is_too_large = True
    with pytest.raises(Rejected, match="do it in parts; nothing was changed") as refused:
        place.transact(CommandOutcome())
    assert refused.value.code == "REMOTE_TOO_LARGE" and place.store.names() == ["difference", "roll_back"]


# --- at most once ---


def edit(**fields: Any) -> Edit:
    return Edit(ID, PATH, b"base\n", b"text\n", TOKEN, ACTOR, **fields)


def known(request: Any, *, token: str = TOKEN, fingerprint: bytes | None = None) -> SimpleNamespace:
    found = dispatcher_module._with_fingerprint(request).fingerprint if fingerprint is None else fingerprint
    return SimpleNamespace(fingerprint=found, token_id=token, token=token_digest(token))


def test_a_known_request_gets_its_reply_again(place: Place) -> None:
    place.store.records[ID] = record = known(edit())
    assert place.handle_as(edit()) == [] and place.runs == []
    assert place.store.done == [("resend_reply", ID, record)] and place.executor.released == 1
    place.store.records[ID] = known(edit(), fingerprint=b"\0" * 16)
    assert place.handle_as(edit()) == [], "an earlier version recorded none"


@pytest.mark.parametrize("is_recorded", [True, False])
@pytest.mark.parametrize(
    ("token", "fingerprint", "code"),
    [
        ("other", None, "REMOTE_FORBIDDEN"),
        (TOKEN, b"another request.", "REMOTE_INVALID"),
    ],
)
def test_an_id_belongs_to_one_request_of_one_token(
    place: Place, is_recorded: bool, token: str, fingerprint: bytes | None, code: str
) -> None:
    ids = place.store.records if is_recorded else place.store.request_ids.known
    ids[ID] = known(edit(), token=token, fingerprint=fingerprint)
    (refused,) = place.handle_as(edit())
    assert (refused.code, place.runs, place.store.names()) == (code, [], ["refuse"])


def test_an_answered_request_whose_reply_is_gone_does_not_run(place: Place) -> None:
    place.store.request_ids.known[ID] = known(edit())
    (refused,) = place.handle_as(edit())
    assert (refused.code, place.runs) == ("REMOTE_UNKNOWN_OUTCOME", [])


@pytest.mark.parametrize(("first_sent_at", "runs"), [(None, True), (1000.0, True), (999.9, False)])
def test_a_request_from_before_the_journal_does_not_run(place: Place, first_sent_at: float | None, runs: bool) -> None:
    refused = place.handle_as(edit(first_sent_at=first_sent_at))
    assert bool(place.runs) == runs and [each.code for each in refused] == ([] if runs else ["REMOTE_UNKNOWN_OUTCOME"])


@pytest.mark.parametrize("is_keyed", [True, False])
def test_too_many_keys_are_refused(place: Place, is_keyed: bool) -> None:
    place.store.is_keyed, place.store.request_ids.refusal = is_keyed, "too many keys"
    refused = place.handle_as(edit())
    assert [(each.code, each.message) for each in refused] == (
        [("REMOTE_BUSY", "too many keys; nothing was changed")] if is_keyed else []
    )
    assert bool(place.runs) is not is_keyed


def test_an_abandoned_request_is_answered_from_the_journal_or_refused(place: Place) -> None:
    request = AbandonRequest(ID, TOKEN, "REMOTE_FAILED", "it took too long")
    place.dispatcher.handle(request)
    assert place.store.done[-1] == ("refuse", Refused(ID, "REMOTE_FAILED", "it took too long"))
    place.store.records[ID] = record = known(edit())
    place.dispatcher.handle(request)
    assert place.store.done[-1] == ("resend_reply", ID, record)


def test_a_refusal_of_any_length_fits_into_a_frame(place: Place) -> None:
    def run(_: object) -> None:
        error = Rejected("x", code="REMOTE_INVALID")
        error.message = "é" * 5000
        raise error

    (refused,) = place.handle_as(edit(), run)
    assert refused == Refused(ID, "REMOTE_INVALID", "é" * 4096) and place.executor.released == 1


@pytest.mark.parametrize("count", [0, 1])
def test_attached_files_are_removed_after_their_command(place: Place, count: int) -> None:
    (place.scratch / "attached").write_text("x")
    files = [Attachment(0, "a.txt", b"x")] * count
    place.handle_as(RunCommand(ID, ["create", "x"], files, TOKEN, ACTOR, []))
    assert (place.scratch / "attached").exists() == (not count)
    (place.scratch / "attached").write_text("x")
    place.handle_as(RunCall(ID, "mcp", "x", b"{}", files, TOKEN, ACTOR, []))
    assert (place.scratch / "attached").exists() == (not count)


def test_the_digest_of_a_request_is_of_what_it_asks_for() -> None:
    with_fingerprint = dispatcher_module._with_fingerprint
    command = RunCommand(ID, ["create", "x"], [Attachment(1, "a.txt", b"data")], TOKEN, ACTOR, [])
    first = with_fingerprint(command).fingerprint
    assert len(first) == 16
    uploaded = Attachment(1, "a.txt", digest=digest_of(b"data"), size=4)
    same = (
        msgspec.structs.replace(command, id="8" * 32, first_sent_at=5.0),
        msgspec.structs.replace(command, files=[uploaded]),
    )
    others = (
        msgspec.structs.replace(command, argv=["create", "y"]),
        msgspec.structs.replace(command, files=[]),
        msgspec.structs.replace(command, files=[Attachment(1, "a.txt", b"other")]),
        msgspec.structs.replace(command, files=[Attachment(1, "b.txt", b"data")]),
        msgspec.structs.replace(command, files=[Attachment(2, "a.txt", b"data")]),
    )
    assert {with_fingerprint(each).fingerprint for each in same} == {first}
    assert len({with_fingerprint(each).fingerprint for each in others} | {first}) == 6
    key = msgspec.structs.replace(command, fingerprint=b"f" * 16)
    assert with_fingerprint(key) is key
    abandoned = AbandonRequest(ID, TOKEN, "x", "y")
    assert with_fingerprint(abandoned) is abandoned


# --- beside other programs ---


def test_an_outside_change_is_numbered_before_the_request_runs_again(place: Place) -> None:
    (place.scratch / "half").write_text("x")

    def run(_: object) -> None:
        if len(place.runs) == 1:
            raise OutsideChange([PATH])

    assert place.handle_as(edit(), run) == []
    assert len(place.runs) == 2 and place.store.done == [("commit_outside_changes", [PATH])]
    assert not (place.scratch / "half").exists()


@pytest.mark.parametrize(("seconds_each", "runs"), [(0.0, 20), (3.0, 4)])
def test_a_request_that_is_disturbed_again_and_again_is_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch, seconds_each: float, runs: int
) -> None:
    monkeypatch.setattr(
        dispatcher_module, "time", SimpleNamespace(monotonic=lambda: seconds_each * len(place.runs), time=time.time)
    )

    def run(_: object) -> None:
        raise OutsideChange([PATH])

    (refused,) = place.handle_as(edit(), run)
    assert refused.code == "REMOTE_BUSY" and f"another program keeps changing {PATH}" in refused.message
    assert len(place.runs) == runs == place.store.names().count("commit_outside_changes")


# --- messages of the server ---


@pytest.mark.parametrize(
    ("message", "command", "is_keyed"),
    [
        (edit(), "edit", False),
        (edit(fingerprint=b"f" * 16), "edit", True),
        (RunCall(ID, "nope", "x", b"", [], TOKEN, ACTOR, [], fingerprint=b"f" * 16), "", True),
        (ImportProject(ID, TOKEN, ACTOR), "push", False),
        (Reconcile(None), "", False),
    ],
)
def test_each_request_is_begun_with_its_name(place: Place, message: Any, command: str, is_keyed: bool) -> None:
    place.store.tree.scan = list
    place.dispatcher.handle(message)
    assert place.store.done[0] == ("begin", command, is_keyed)


def test_the_last_message_ends_the_worker(place: Place) -> None:
    assert not place.dispatcher.handle(Stop())
    assert place.dispatcher.handle(Reconcile(None))


@pytest.mark.parametrize("is_busy", [True, False])
def test_outside_changes_are_numbered_and_looked_for_again_if_a_file_is_locked(place: Place, is_busy: bool) -> None:
    place.store.outside = (CHANGED, is_busy)
    before = time.time()
    place.dispatcher.handle(Reconcile([PATH]))
    (_, retention, found, (_, difference, cause, answer, options)) = place.store.done
    assert (retention, found) == (("keep_retention",), ("find", [PATH]))
    assert (difference, answer, cause.cause, cause.id, cause.actor) == (CHANGED, None, "edit", "", "server")
    if is_busy:
        assert before + 0.2 < options["retry_at"] < time.time() + 0.3
    else:
        assert options["retry_at"] is None


def test_a_new_epoch_begins_after_all_commits(place: Place) -> None:
    place.dispatcher.handle(NewEpoch("rolled back"))
    assert place.store.names() == ["begin", "new_epoch", "show_head"]
    wait, ready, flush = place.committer.done
    assert (wait, flush) == ("wait", "flush") and isinstance(ready, Ready)
    assert (ready.epoch, ready.head, ready.mark, ready.oldest) == ("e1", 3, b"m", 2)
    assert ready.notes == ["started a new epoch: rolled back"]


@pytest.mark.parametrize("keeps_edits", [True, False])
def test_a_follower_restores_outside_changes_until_it_leads(tmp_path: Path, keeps_edits: bool) -> None:
    follower = StubFollower()
    place = Place(tmp_path, follower=follower)
    records = ApplyRecords([b"x"])
    place.dispatcher.handle(Reconcile([PATH]))
    place.dispatcher.handle(records)
    assert follower.done == [("restore", [PATH]), ("apply", records)] and "find" not in place.store.names()
    assert place.dispatcher.handle(Lead(keeps_edits))
    assert follower.done[2:] == ([] if keeps_edits else [("restore", None)])
    place.dispatcher.handle(Reconcile([PATH]))
    assert place.store.names().count("find") == 1
    assert place.dispatcher.handle(Lead(False)) and len(follower.done) == (2 if keeps_edits else 3)


def test_a_pushed_project_that_is_gone_is_refused(place: Place) -> None:
    place.store.tree.scan = list
    (refused,) = place.handle_as(ImportProject(ID, TOKEN, ACTOR), place.dispatcher._import_project)
    assert refused.code == "REMOTE_NOT_FOUND" and "push again" in refused.message


# --- edits ---


def edited(place: Place, request: Edit, *, task: bool = True) -> Any:
    """Return the outcome of an edit; the code of its refusal."""
    if task:
        (place.lattice / "tasks" / Path(PATH).with_suffix(".json").name).write_text("{}")
    place.store.done.clear()
    try:
        place.dispatcher._editor.edit(request)
    except Rejected as refused:
        return refused.code
    (done,) = (each for each in place.store.done if each[0] == "commit")
    assert isinstance(done[3], Stored) and done[3].seq == 4
    assert (done[2].id, done[2].actor, done[2].token_actor, done[2].token_id) == (ID, ACTOR, ACTOR, TOKEN)
    assert (done[1] == CHANGED) == (done[3].outcome in ("stored", "merged"))
    return done[3].outcome


def test_an_edit_is_stored_merged_or_a_conflict(place: Place) -> None:
    text = place.lattice / PATH
    text.parent.mkdir()
    for current, expected, after in (
        (b"a\nb\nc\n", "stored", b"mine\nb\nc\n"),
        (b"a\nb\nmore\n", "merged", b"mine\nb\nmore\n"),
        (b"other\nb\nc\n", "conflict", b"other\nb\nc\n"),
        (None, "conflict", None),
    ):
        text.unlink(missing_ok=True)
        if current is not None:
            text.write_bytes(current)
        request = Edit(ID, PATH, b"a\nb\nc\n", b"mine\nb\nc\n", TOKEN, ACTOR)
        assert edited(place, request) == expected, current
        assert (text.read_bytes() if text.exists() else None) == after


def test_an_edit_of_an_archived_task_is_a_conflict(place: Place) -> None:
    (place.lattice / PATH).parent.mkdir()
    (place.lattice / PATH).write_bytes(b"base\n")
    assert edited(place, edit(), task=False) == "conflict"
    assert (place.lattice / PATH).read_bytes() == b"base\n"


@pytest.mark.parametrize(
    ("current", "base", "base_digest", "expected"),
    [
        (b"base\n", None, digest_of(b"base\n"), "stored"),
        (b"new\n", None, digest_of(b"base\n"), "REMOTE_STALE_BASE"),
        (None, None, digest_of(b"base\n"), "REMOTE_STALE_BASE"),
        (None, None, b"", "stored"),
    ],
)
def test_a_digest_stands_for_the_present_text(
    place: Place, current: bytes | None, base: bytes | None, base_digest: bytes, expected: str
) -> None:
    (place.lattice / PATH).parent.mkdir()
    if current is not None:
        (place.lattice / PATH).write_bytes(current)
    request = Edit(ID, PATH, base, b"text\n", TOKEN, ACTOR, base_digest=base_digest)
    assert edited(place, request) == expected


def test_a_file_that_is_no_plan_or_notes_is_refused(place: Place) -> None:
    (place.lattice / PATH).mkdir(parents=True)
    assert edited(place, edit()) == "REMOTE_UNSUPPORTED", "a directory"
    (place.lattice / PATH).rmdir()
    (place.lattice / PATH).symlink_to("nowhere")
    assert edited(place, edit()) == "REMOTE_UNSUPPORTED", "a link"
    for request in (
        Edit(ID, "config.json", None, b"{}", TOKEN, ACTOR),
        Edit(ID, PATH.replace("Z.md", "X.md"), None, b"\xff", TOKEN, ACTOR),
    ):
        assert edited(place, request) == "REMOTE_UNSUPPORTED"


def test_an_edit_waits_for_an_outside_change_of_its_file(place: Place) -> None:
    (place.lattice / PATH).parent.mkdir()
    (place.lattice / PATH).write_bytes(b"theirs\n")
    place.store.known[PATH] = b"base\n"
    with pytest.raises(OutsideChange) as outside:
        edited(place, edit())
    assert outside.value.paths == [PATH]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), AccessDenied("write a file")])
def test_an_edit_that_cannot_be_written_is_undone(
    place: Place, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(place.store, "replace_text", fail, raising=False)
    assert edited(place, Edit(ID, PATH, None, b"text\n", TOKEN, ACTOR)) == "REMOTE_STORAGE"
    assert place.store.names() == ["roll_back"]


# --- replies ---


def test_output_over_8_mib_is_truncated_with_a_notice() -> None:
    most = 8 * 1024 * 1024
    whole, longer = b"o" * most, b"o" * (most + 1)
    assert dispatcher_module._truncated(whole, whole) == (whole, whole)
    for stdout, stderr in ((longer, b"e"), (b"o", longer)):
        out, err = dispatcher_module._truncated(stdout, stderr)
        assert out == stdout[:most] and err.startswith(stderr[:most])
        assert err.removeprefix(stderr[:most]).endswith(b"its output is over 8 MiB and was truncated\n")


def test_a_reply_of_an_operation_over_8_mib_fails() -> None:
    most = 8 * 1024 * 1024
    fits = dispatcher_module._bounded(CommandOutcome(answer=CallResponse(200, b"x" * most)))
    assert fits.answer is not None and fits.is_final and fits.failure is None
    too_long = dispatcher_module._bounded(CommandOutcome(answer=CallResponse(200, b"x" * (most + 1))))
    assert (too_long.answer, too_long.failure, too_long.is_final) == (None, "its reply is over 8 MiB", False)
    assert dispatcher_module._bounded(CommandOutcome()).is_final


@pytest.mark.parametrize("is_json", [True, False])
def test_a_crash_is_reported_in_the_commands_format(is_json: bool) -> None:
    outcome = dispatcher_module._crash_output("boom \udcff", is_json=is_json)
    message = "the command failed on the server and was undone: boom"
    assert outcome.exit_code == 1
    if is_json:
        found = msgspec.json.decode(outcome.stdout)  # strict: it refuses half a surrogate pair
        assert found["ok"] is False and found["error"]["code"] == "REMOTE_FAILED"
        assert found["error"]["message"] == f"{message} \\udcff" and outcome.stdout.endswith(b"}\n\n")
    else:
        assert outcome.stdout == b"" and outcome.stderr == f"Error: {message} \\udcff\n".encode()


def test_an_operation_without_an_answer_failed() -> None:
    attached = dispatcher_module.Attached([])
    failed = dispatcher_module._returned(ID, 3, CommandOutcome(failure="boom"), attached)
    assert (
        isinstance(failed, Returned) and (failed.status, failed.seq) == (500, 3) and b"undone: boom" in failed.payload
    )
    found = dispatcher_module._returned(ID, 3, CommandOutcome(answer=CallResponse(201, b"{}")), attached)
    assert found == Returned(ID, 3, 201, b"{}")
