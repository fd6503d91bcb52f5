"""Changes by plain lattice and editors in the server's directory: no request's token covers them (I12, I13)."""

import itertools
import json
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from rest_client import rest_server
from test_beside_lattice import Repeated, holding, plain
from test_server import make_token
from worker_process import ANA, WorkerProcess, answer_of, change_of, invoke, make_project, tree_of

from lattice_remote.protocol.messages import Change, Refused, Reply, Stored
from lattice_remote.protocol.operations import AppendBytes, MemoryTree, PutFile, apply
from lattice_remote.server.datadir import ProjectPaths
from lattice_remote.server.ipc import Edit, RequestDone
from lattice_remote.server.journal.contents import change_of as change_in
from lattice_remote.server.journal.segment import JournalReader
from lattice_remote.server.tree.tree import load_manifest
from sandbox import wait_for

BOB = ("--actor", "human:bob")
_PLAN = b"# Plan\n\n## Scope\n\n- one\n- two\n\n## Steps\n\n- first\n- second\n"


class Attribution:
    """Files that follow changes, and the lines that these bring, each with the token of its change; "" for none."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.lines: list[tuple[str, bytes]] = []
        self._known = {line for data in files.values() for line in data.splitlines()}

    def add(self, change: Change) -> None:
        assert change.token_id or (change.actor, change.cause) == ("server", "edit")
        for operation in change.ops:
            assert not apply(operation, MemoryTree(self.files)), f"{operation} does not fit"
            if isinstance(operation, AppendBytes | PutFile):
                new = [line for line in operation.data.splitlines() if line not in self._known]
                self.lines += [(change.token_id, line) for line in new]
                self._known.update(new)

    def tokens_of(self, text: str) -> set[str]:
        """Return the tokens of the lines with this text."""
        return {token for token, line in self.lines if text.encode() in line}

    def check(self) -> None:
        """Insist that events of Ana came under a token, and those of Bob, who types on the server, under none."""
        events = [(token, json.loads(line)) for token, line in self.lines if line.startswith(b'{"actor"')]
        found = {(bool(token), event["actor"]) for token, event in events}
        assert found == {(True, "human:ana"), (False, "human:bob")}


class Board:
    """A worker's project with a copy that follows each change."""

    def __init__(self, worker: WorkerProcess) -> None:
        self.worker = worker
        self.root = worker.project
        self.lattice = worker.project / ".lattice"
        self.attribution = Attribution(tree_of(self.lattice))

    def run(self, *argv: str, actor: Sequence[str] = ANA) -> RequestDone:
        return self.take(self.worker.run(*argv, *actor))

    def edit(self, path: Path, base: bytes | None, text: bytes) -> Stored | Refused:
        name = str(path.relative_to(self.lattice))
        self.worker.send(Edit(secrets.token_hex(16), name, base, text, "tok_1", "human:ana"))
        answer = answer_of(self.take(self.worker.done()))
        assert isinstance(answer, Stored | Refused)
        return answer

    def take(self, done: RequestDone) -> RequestDone:
        """Follow the changes up to this outcome."""
        for each in (*self.worker.found, done):
            change = change_of(each)
            assert change is not None or each is done, "what was found is a change"
            if change is not None:
                self.attribution.add(change)
        self.worker.found.clear()
        return done

    def check(self) -> None:
        assert self.attribution.files == tree_of(self.lattice)
        self.attribution.check()

    @property
    def task(self) -> str:
        return str(json.loads((self.lattice / "ids.json").read_text())["map"]["LAT-1"])

    @property
    def plan(self) -> Path:
        return self.lattice / f"plans/{self.task}.md"


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    with WorkerProcess(make_project(tmp_path / "web")) as worker:
        made = Board(worker)
        made.run("create", "x")
        made.run("create", "y")
        made.edit(made.plan, made.plan.read_bytes(), _PLAN)
        yield made


@pytest.mark.parametrize(
    ("outside", "inside"),
    [
        ("comment LAT-1 by-hand", "comment LAT-1 hello"),
        ("comment LAT-1 by-hand", "update LAT-1 title=z"),
        ("comment LAT-1 by-hand", "archive LAT-1"),
        ("comment LAT-1 by-hand", "link LAT-1 blocks LAT-2"),
        ("comment LAT-1 by-hand", "attach LAT-1 --inline text --title x"),
        ("comment LAT-1 by-hand", "next --claim"),
        ("status LAT-1 in_planning", "status LAT-1 planned"),
        ("create by-hand", "create hello"),
        ("archive LAT-1", "unarchive LAT-1"),
        ("archive LAT-2", "archive LAT-1"),
        ("resource create gpu", "resource acquire gpu"),
    ],
)
def test_a_finished_outside_command_is_numbered_first(board: Board, outside: str, inside: str) -> None:
    plain(board.root, *outside.split(), *BOB)
    done = board.run(*inside.split())
    assert change_of(done) is not None, answer_of(done)
    board.take(board.worker.reconcile())
    board.check()


def test_a_finished_outside_change_of_a_session_is_numbered_first(board: Board) -> None:
    start = ("session", "start", "--model", "m", "--framework", "f", "--name")
    board.run(*start, "Argus", actor=())
    plain(board.root, *start, "Bobbin")
    board.run("session", "end", "Argus-1", actor=())
    assert board.attribution.tokens_of('"Bobbin-1"') == {""}


def test_a_finished_outside_change_of_settings_is_numbered_first(board: Board) -> None:
    config = board.lattice / "config.json"
    config.write_text(config.read_text().replace('"medium"', '"urgent"'))
    board.worker.send(invoke("dashboard", "/api/config/dashboard", {"theme": "noir"}))
    board.take(board.worker.done())
    assert board.attribution.tokens_of("urgent") == {""}
    assert board.attribution.tokens_of("noir") == {"tok_1"}


# --- plans and notes ---


def in_place(path: Path, text: bytes) -> None:
    path.write_bytes(text)


def by_rename(path: Path, text: bytes) -> None:
    scratch = path.with_name(f".{path.name}.swp")
    scratch.write_bytes(text)
    scratch.replace(path)


saves = pytest.mark.parametrize("save", [in_place, by_rename])


@saves
def test_an_editors_save_is_numbered_before_a_command_that_writes_the_plan(
    board: Board, save: Callable[[Path, bytes], None]
) -> None:
    board.run("status", "LAT-1", "in_planning")
    save(board.plan, _PLAN + b"- by hand\n")
    board.run("status", "LAT-1", "backlog", "--force", "--reason", "x")
    assert board.attribution.tokens_of("- by hand") == {""}
    assert board.attribution.tokens_of("## Reset") == {"tok_1"}
    board.take(board.worker.reconcile())
    assert board.attribution.files == tree_of(board.lattice)


@saves
def test_an_editors_save_is_numbered_before_a_command_that_moves_the_plan(
    board: Board, save: Callable[[Path, bytes], None]
) -> None:
    save(board.plan, _PLAN + b"- by hand\n")
    board.run("archive", "LAT-1")
    assert board.attribution.tokens_of("- by hand") == {""}
    assert board.attribution.files == tree_of(board.lattice)


@saves
@pytest.mark.parametrize(
    ("here", "there", "outcome"),
    [
        (b"- second\n- by Ana\n", b"- one\n- by hand\n", "merged"),
        (b"- second by Ana\n", b"- one\n- by hand\n", "merged"),
        (b"- second by Ana\n", b"- second by hand\n", "conflict"),
    ],
)
def test_an_editors_save_is_numbered_before_an_edit_of_the_plan(
    board: Board, save: Callable[[Path, bytes], None], here: bytes, there: bytes, outcome: str
) -> None:
    def with_line(new: bytes) -> bytes:
        return _PLAN.replace(b"- one\n" if b"- one" in new else b"- second\n", new)

    save(board.plan, with_line(there))
    stored = board.edit(board.plan, _PLAN, with_line(here))
    assert isinstance(stored, Stored) and stored.outcome == outcome
    assert board.attribution.tokens_of("by hand") == {""}
    assert board.attribution.tokens_of("by Ana") == (set() if outcome == "conflict" else {"tok_1"})
    assert board.attribution.files == tree_of(board.lattice)


def test_a_file_that_changes_again_and_again_holds_up_no_other_request(board: Board) -> None:
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            board.plan.write_bytes(_PLAN + b"%d\n" % number)

    writing = threading.Thread(target=write)
    board.run("status", "LAT-1", "in_planning")
    writing.start()
    try:
        answer = answer_of(board.run("status", "LAT-1", "backlog", "--force", "--reason", "x"))
        board.run("comment", "LAT-2", "beside")
    finally:
        stop.set()
        writing.join()
    if isinstance(answer, Refused):
        assert (answer.code, board.plan.name in answer.message) == ("REMOTE_BUSY", True)
        assert "## Reset" not in board.plan.read_text()
    for status in ("in_planning", "backlog"):
        board.run("status", "LAT-1", status, "--force", "--reason", "x")
    assert "## Reset" in board.plan.read_text()
    assert board.attribution.tokens_of("## Reset") == {"tok_1"}


# --- while a command runs ---

_PAUSED = """
import os, sys
from lattice.cli import archive_cmds, task_cmds
from lattice.storage import operations
from lattice_remote.server.worker import main, store
reached = os.open(os.environ["REACHED"], os.O_WRONLY | os.O_CREAT)
owner, name = eval(os.environ["AT"])
paused = getattr(owner, name)
def pause(*arguments, **options):
    if os.path.exists(os.environ["ARMED"]) and os.fstat(reached).st_size == 0:
        os.write(reached, b"x")
        while not os.path.exists(os.environ["GO"]):
            pass
    return paused(*arguments, **options)
setattr(owner, name, pause)
sys.exit(main.main())
"""


@contextmanager
def paused(directory: Path, at: str, then: Callable[[Board], None]) -> Iterator[Board]:
    """Yield a board whose worker pauses once, in the first request of the block, until ``then`` has run."""
    project, reached, go, armed = make_project(directory / "web"), *(directory / name for name in "rga")
    environment = {**os.environ, "REACHED": str(reached), "GO": str(go), "ARMED": str(armed), "AT": at}
    with WorkerProcess(project, command=(sys.executable, "-c", _PAUSED), environment=environment) as worker:
        board = Board(worker)
        board.run("create", "x")
        board.edit(board.plan, board.plan.read_bytes(), _PLAN)
        board.run("status", "LAT-1", "in_planning")

        def meddle() -> None:
            wait_for(lambda: reached.exists() and reached.read_text() == "x", "the worker to pause")
            try:
                then(board)
            finally:
                go.touch()

        with ThreadPoolExecutor(1) as pool:
            armed.touch()
            meddling = pool.submit(meddle)
            yield board
            meddling.result()
        board.take(worker.reconcile())
        assert board.attribution.files == tree_of(board.lattice)
        assert "No issues found" in worker.ok("doctor")


_BEFORE_THE_LOCK = '(operations, "multi_lock")'
_BEHIND_THE_LOCK = '(operations, "jsonl_append")'
_BEFORE_THE_PLAN = '(task_cmds, "_append_plan_reset_section")'
_BEFORE_THE_COMMIT = '(store.Store, "difference")'
_BEFORE_THE_EDIT = '(store.Store, "replace_text")'


def test_a_write_of_plain_lattice_before_the_lock_is_taken(tmp_path: Path) -> None:
    def comment(board: Board) -> None:
        plain(board.root, "comment", "LAT-1", "by hand", *BOB)

    with paused(tmp_path, _BEFORE_THE_LOCK, comment) as board:
        board.run("update", "LAT-1", "title=y")
        board.check()
        snapshot = json.loads((board.lattice / f"tasks/{board.task}.json").read_text())
        assert (snapshot["title"], snapshot["comment_count"]) == ("y", 1), "the command saw the comment"


@saves
@pytest.mark.parametrize("at", [_BEFORE_THE_LOCK, _BEHIND_THE_LOCK, _BEFORE_THE_PLAN, _BEFORE_THE_COMMIT])
def test_a_save_at_any_moment_of_a_command(tmp_path: Path, save: Callable[[Path, bytes], None], at: str) -> None:
    with paused(tmp_path, at, lambda board: save(board.plan, _PLAN + b"- by hand\n")) as board:
        board.run("status", "LAT-1", "backlog", "--force", "--reason", "x")
        assert board.attribution.tokens_of("- by hand") == {""}
        assert board.attribution.tokens_of("## Reset") == {"tok_1"}
        text = board.plan.read_text()
        assert ("- by hand" in text, text.count("## Reset")) == (True, 1)


@saves
@pytest.mark.parametrize("at", [_BEFORE_THE_EDIT, _BEFORE_THE_COMMIT])
def test_a_save_at_any_moment_of_an_edit(tmp_path: Path, save: Callable[[Path, bytes], None], at: str) -> None:
    by_hand = _PLAN.replace(b"- one\n", b"- one\n- by hand\n")
    with paused(tmp_path, at, lambda board: save(board.plan, by_hand)) as board:
        stored = board.edit(board.plan, _PLAN, _PLAN + b"- by Ana\n")
        assert isinstance(stored, Stored) and stored.outcome == "merged"
        assert board.attribution.tokens_of("by hand") == {""}
        assert board.attribution.tokens_of("by Ana") == {"tok_1"}
        assert board.plan.read_bytes() == by_hand + b"- by Ana\n"


@saves
def test_a_save_while_the_settings_are_changed(tmp_path: Path, save: Callable[[Path, bytes], None]) -> None:
    def edit(board: Board) -> None:
        config = board.lattice / "config.json"
        save(config, config.read_bytes().replace(b'"medium"', b'"urgent"'))

    with paused(tmp_path, _BEFORE_THE_COMMIT, edit) as board:
        board.worker.send(invoke("dashboard", "/api/config/dashboard", {"theme": "noir"}))
        board.take(board.worker.done())
        assert board.attribution.tokens_of("urgent") == {""}
        assert b"noir" in (board.lattice / "config.json").read_bytes()


@saves
@pytest.mark.parametrize("at", [_BEHIND_THE_LOCK, _BEFORE_THE_COMMIT])
def test_a_save_while_the_task_is_archived(tmp_path: Path, save: Callable[[Path, bytes], None], at: str) -> None:
    def edit(board: Board) -> None:
        plans = [board.plan, board.lattice / "archive/plans" / board.plan.name]
        save(next(plan for plan in plans if plan.exists()), _PLAN + b"- by hand\n")

    with paused(tmp_path, at.replace("operations", "archive_cmds"), edit) as board:
        board.run("archive", "LAT-1")
    assert board.attribution.tokens_of("- by hand") == {""}


# --- plain lattice reads before it locks ---

_LATE_PLAIN = """
import os, sys
from lattice.cli import archive_cmds
from lattice.cli.main import cli
from lattice.storage import operations
for module in (operations, archive_cmds):
    def lock_late(*arguments, lock=module.multi_lock):
        open(os.environ["REACHED"], "x").close()
        while not os.path.exists(os.environ["GO"]):
            pass
        return lock(*arguments)
    module.multi_lock = lock_late
cli(prog_name="lattice")
"""


@contextmanager
def late(board: Board, directory: Path, *argv: str) -> Iterator[None]:
    """Run plain lattice, which has read its task before the block and writes it after the block."""
    reached, go = directory / "reached", directory / "go"
    environment = {**os.environ, "LATTICE_ROOT": str(board.root), "REACHED": str(reached), "GO": str(go)}
    with subprocess.Popen([sys.executable, "-c", _LATE_PLAIN, *argv, *BOB], env=environment) as process:
        try:
            wait_for(reached.exists, "plain lattice to have read the task")
            yield
        finally:
            go.touch()
        assert process.wait(30) == 0


def next_command(board: Board) -> None:
    board.run("comment", "LAT-1", "next")


def reconciled(board: Board) -> None:
    board.take(board.worker.reconcile())


@pytest.mark.parametrize(
    ("outside", "noticed"),
    [
        ("comment LAT-1 by-hand", next_command),
        ("comment LAT-1 by-hand", reconciled),
        ("update LAT-1 priority=high", next_command),
        ("update LAT-1 priority=high", reconciled),
        ("archive LAT-1", reconciled),
    ],
)
def test_a_task_overwritten_with_an_older_one_is_derived_from_the_log_again(
    board: Board, tmp_path: Path, outside: str, noticed: Callable[[Board], None]
) -> None:
    with late(board, tmp_path, *outside.split()):
        board.run("update", "LAT-1", "title=ours")
        board.run("comment", "LAT-1", "ours")
    folder = "archive/tasks" if "archive" in outside else "tasks"
    snapshot = board.lattice / folder / f"{board.task}.json"
    assert json.loads(snapshot.read_text())["title"] == "x", "lattice decides before it locks"
    noticed(board)
    board.check()
    found = json.loads(snapshot.read_text())
    assert (found["title"], found["comment_count"] >= 1) == ("ours", True)
    plain(board.root, "rebuild", "--all")
    assert json.loads(snapshot.read_text()) == found


def test_a_task_that_was_archived_in_between_stays_archived_with_the_late_event(board: Board, tmp_path: Path) -> None:
    with late(board, tmp_path, "comment", "LAT-1", "by hand"):
        board.run("archive", "LAT-1")
    log = board.lattice / f"events/{board.task}.jsonl"
    assert log.read_text().count("\n") == 1, "lattice decides before it locks"
    reconciled(board)
    board.check()
    assert "by hand" in (board.lattice / f"archive/events/{board.task}.jsonl").read_text()
    assert not log.exists()
    assert "No issues found" in board.worker.ok("doctor")
    before = tree_of(board.lattice)
    plain(board.root, "rebuild", "--all")
    assert tree_of(board.lattice)[f"archive/tasks/{board.task}.json"] == before[f"archive/tasks/{board.task}.json"]


def test_a_task_overwritten_while_no_worker_runs_is_derived_from_the_log_again(board: Board, tmp_path: Path) -> None:
    with late(board, tmp_path, "comment", "LAT-1", "by hand"):
        board.run("update", "LAT-1", "title=ours")
        board.worker.stop()
    with WorkerProcess(board.root) as worker:
        assert "differed from change" in worker.ready.notes[0]
    before = tree_of(board.lattice)
    assert b'"title": "ours"' in before[f"tasks/{board.task}.json"]
    plain(board.root, "rebuild", "--all")
    assert tree_of(board.lattice) == before


@pytest.mark.parametrize("archived", [False, True])
def test_a_task_that_a_backup_copied_over_the_project_leaves_there_keeps_its_id(board: Board, archived: bool) -> None:
    """I7: the backup's ids.json lacks it, and the next task would get the same id."""
    board.worker.stop()
    backup = board.root.with_name("backup")
    shutil.copytree(board.root, backup, symlinks=True)
    with WorkerProcess(board.root) as worker:
        worker.ok("create", "later", *ANA)
        if archived:
            worker.ok("archive", "LAT-3", *ANA)
    for part in ("journal", ".lattice"):
        shutil.copytree(backup / part, board.root / part, symlinks=True, dirs_exist_ok=True)
    with WorkerProcess(board.root) as worker:
        assert "ids.json lacked tasks that were added here: LAT-3" in worker.ready.notes
        worker.ok("create", "new", *ANA)
    ids = json.loads((board.lattice / "ids.json").read_bytes())
    assert sorted(ids["map"]) == ["LAT-1", "LAT-2", "LAT-3", "LAT-4"] and len(set(ids["map"].values())) == 4
    with WorkerProcess(board.root) as worker:
        assert not worker.ready.notes, "it happens once"


def test_a_task_edited_by_hand_is_unchanged(board: Board) -> None:
    snapshot = board.lattice / f"tasks/{board.task}.json"
    snapshot.write_text(snapshot.read_text().replace('"title": "x"', '"title": "by hand"'))
    board.take(board.worker.reconcile())
    plain(board.root, "comment", "LAT-1", "plain", *BOB)
    board.take(board.worker.reconcile())
    assert json.loads(snapshot.read_text())["title"] == "by hand"


def save_in_place(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    os.utime(path, (1e9, 1e9))  # within a moment of the last command, the time could be the same


def save_in_place_with_its_time(path: Path, data: bytes) -> None:
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # older kernels' clock for it has ticks of some ms
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def save_by_replacement(path: Path, data: bytes) -> None:
    scratch = path.with_name(".saved")
    scratch.write_bytes(data)
    scratch.replace(path)


@pytest.mark.parametrize("save", [save_in_place, save_in_place_with_its_time, save_by_replacement])
def test_a_task_that_was_edited_after_a_command_is_not_taken_from_memory(
    board: Board, save: Callable[[Path, bytes], None]
) -> None:
    board.run("update", "LAT-1", "title=one")
    snapshot = board.lattice / f"tasks/{board.task}.json"
    save(snapshot, snapshot.read_bytes().replace(b'"title": "one"', b'"title": "two"'))
    board.run("comment", "LAT-1", "hello")
    assert json.loads(snapshot.read_bytes())["title"] == "two"
    assert board.attribution.files == tree_of(board.lattice)


def test_a_task_that_was_removed_after_a_command_is_not_found(board: Board) -> None:
    board.run("update", "LAT-1", "title=one")
    (board.lattice / f"tasks/{board.task}.json").unlink()
    refused = answer_of(board.run("comment", "LAT-1", "hello"))
    assert isinstance(refused, Reply) and refused.exit_code == 1 and b"not found" in refused.stderr


def test_a_task_whose_lock_is_held_waits_for_its_holder(board: Board, tmp_path: Path) -> None:
    with late(board, tmp_path, "comment", "LAT-1", "by hand"):
        board.run("update", "LAT-1", "title=ours")
    with holding(board.lattice / "locks", f"events_{board.task}"):
        plain(board.root, "create", "another", *BOB)
        board.take(board.worker.reconcile())
        assert board.attribution.tokens_of("another") == {""}, "other files do not wait"
        assert board.attribution.tokens_of("by hand") == set()
    board.take(board.worker.reconcile())
    board.check()
    assert b'"title": "ours"' in board.attribution.files[f"tasks/{board.task}.json"]


# --- everything together ---


def replayed(project: ProjectPaths, empty: dict[str, bytes]) -> Attribution:
    """Return what the journal's changes have brought to the empty project."""
    journal = Attribution(dict(empty))
    for record in JournalReader(project.journal).records():
        if record.change is not None:
            journal.add(change_in(record))
    return journal


def test_each_event_and_word_of_a_board_that_many_write_to_comes_under_its_own_token(tmp_path: Path) -> None:
    with rest_server(tmp_path) as (server, rest):
        project = server.data.project("web")
        empty, task = tree_of(project.lattice), rest.task()
        plan = project.lattice / f"plans/{rest.ok('GET', f'/tasks/{task}')['id']}.md"
        headers = {"Authorization": f"Bearer {make_token(server.data)}"}
        number = itertools.count()

        def ask(method: str, path: str, *, expected: Sequence[int] = (200, 201), **options: Any) -> requests.Response:
            more = options.pop("headers", {})
            answer = requests.request(method, rest.url + path, headers=headers | more, timeout=60, **options)
            assert answer.status_code in expected, answer.text
            return answer

        def edit_here() -> None:
            save = in_place if next(number) % 2 else by_rename
            save(plan, plan.read_bytes() + b"\nserver%d\n" % next(number))
            time.sleep(0.2)  # a fast typist

        def edit_there() -> None:
            known = ask("GET", f"/plans/{plan.stem}")
            text, match = known.content + b"\nclient%d\n" % next(number), {"If-Match": known.headers["ETag"]}
            ask("PUT", f"/plans/{plan.stem}", expected=(200, 409, 412), headers=match, data=text)

        def turn_back() -> None:
            for status in ("in_planning", "backlog"):
                ask("PATCH", f"/tasks/{task}", json={"status": status, "force": True, "reason": "x"})

        writers = (
            lambda: ask("POST", f"/tasks/{task}/comments", json={"body": "x"}),
            lambda: ask("PATCH", f"/tasks/{task}", json={"title": f"title {next(number)}"}),
            lambda: ask("POST", "/tasks", json={"title": "x"}),
            *(turn_back, edit_here, edit_there),
        )
        with Repeated(*writers) as repeated:
            for each in repeated.rounds(8, calls=6):
                plain(project.root, "comment", task, f"plain {each}", *BOB)
                plain(project.root, "create", f"plain {each}", *BOB)
        comments = each + 1 + repeated.counts[0]
        wait_for(lambda: rest.ok("GET", f"/tasks/{task}")["comment_count"] == comments, "all comments")
        wait_for(lambda: replayed(project, empty).files == tree_of(project.lattice), "all changes to be numbered")
        journal = replayed(project, empty)
    journal.check()
    assert journal.tokens_of("server") == {""}
    assert journal.tokens_of("## Reset")
    assert journal.tokens_of("client")


def test_a_worker_that_ends_lists_its_files_so_that_the_next_reads_none_again(tmp_path: Path) -> None:
    with WorkerProcess(make_project(tmp_path / "web")) as worker:
        worker.ok("create", "x", *ANA)
        for path in (worker.project / ".lattice").rglob("*"):
            os.utime(path, (1_000_000_000, 1_000_000_000))  # none is so young that it may change unnoticed
        worker.stop()
    listed = load_manifest(worker.project / "journal/manifest")
    assert listed is not None and listed.clean and len(listed.files) > 4
    assert all(state.settled for state in listed.files.values())
    with WorkerProcess(worker.project) as again:
        assert again.ready.head == worker.ready.head + 1 and not again.ready.notes


def test_an_edit_beside_a_workers_end_is_left_to_the_next(tmp_path: Path) -> None:
    with WorkerProcess(make_project(tmp_path / "web")) as worker:
        worker.ok("create", "x", *ANA)
        [plan] = (worker.project / ".lattice/plans").glob("*.md")
        plan.write_text("another text\n")
        worker.stop()
    with WorkerProcess(worker.project) as again:
        assert again.ready.head == worker.ready.head + 2
        assert plan.read_text() == "another text\n"
