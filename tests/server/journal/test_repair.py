"""Repair after a power cut: files may be of any moment, the journal is authoritative (I2)."""

import json
import os
import random
import socket
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from lattice.core.events import create_event, create_resource_event, serialize_event
from random_commands import command_lines
from worker_process import ANA, WorkerProcess, make_project, tree_of

from lattice_remote.protocol.messages import Change, encode
from lattice_remote.protocol.operations import AppendBytes, MergeJson, MoveFile, Operation, PutFile, digest_of
from lattice_remote.server.journal.contents import Contents, derive
from lattice_remote.server.journal.ids import make_id
from lattice_remote.server.journal.journal import Committer
from lattice_remote.server.journal.repair import Repair, differing
from lattice_remote.server.journal.segment import Record
from lattice_remote.server.tree.tree import INLINE_BYTES, MERGE_FROM_BYTES, FileState, ProjectTree
from lattice_remote.server.worker import recovery
from lattice_remote.server.worker.recovery import Opened, open_store


def open_after_power_cut(project: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    monkeypatch.setattr(recovery, "_boot_id", lambda _: "another boot")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        opened = open_store(project, project / "tmp", committer := Committer(theirs), code=[])
        committer.finish()
        opened.store.journal.close()
        return opened


def damage(rng: random.Random, path: Path, versions: list[bytes | None]) -> None:
    """Damage the file as a power cut may: an older version, missing, or empty."""
    content = rng.choice(versions)
    if path.suffix == ".jsonl" and content:
        durable = versions[0] or b""
        content = content[: rng.randint(len(durable), len(content))]
    elif content is not None and len(content) < MERGE_FROM_BYTES:
        content = rng.choice([content, content, b""])
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_after_a_power_cut_the_files_are_those_of_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    project = make_project(tmp_path / "web")
    lattice = project / ".lattice"
    states = [tree_of(lattice)]
    with WorkerProcess(project) as worker:
        for argv, files in command_lines(rng, 40, lattice):
            worker.run(*argv, files=files)
            states.append(tree_of(lattice))
        promised, head = states[-1], worker.reconcile().seq
        journal = next((project / "journal").glob("*.log"))
        size = journal.stat().st_size
        for line in ("create lost", "comment LAT-1 lost", "archive LAT-1", "create lost"):
            worker.run(*line.split(), *ANA)
            states.append(tree_of(lattice))
        worker.kill()
    with journal.open("r+b") as file:
        file.truncate(size + 5)
    versions: dict[str, list[bytes | None]] = defaultdict(list)
    for path in {path for state in states for path in state}:
        versions[path] = [state.get(path) for state in states]
    for path, known in versions.items():
        if len(set(known)) > 1 and len(promised.get(path, b"")) < INLINE_BYTES and rng.random() < 0.8:
            damage(rng, lattice / path, known)
    opened = open_after_power_cut(project, monkeypatch)
    assert tree_of(lattice) == promised, opened.notes
    assert opened.store.journal.head == head
    with WorkerProcess(project) as worker:
        assert "No issues found" in worker.ok("doctor")


def test_files_edited_after_the_reboot_are_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = make_project(tmp_path / "web")
    with WorkerProcess(project) as worker:
        worker.ok("create", "x", *ANA)
        worker.kill()
    plan = next((project / ".lattice/plans").iterdir())
    plan.write_text("# By hand\n")
    opened = open_after_power_cut(project, monkeypatch)
    assert plan.read_text() == "# By hand\n"
    assert opened.store.journal.head == 2
    assert "files differed from change 1" in opened.notes[0]


def test_more_differences_than_fit_become_several_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = make_project(tmp_path / "web")
    with WorkerProcess(project) as worker:
        worker.ok("create", "x", *ANA)
        worker.kill()
    monkeypatch.setitem(ProjectTree.reconcile.__kwdefaults__, "limit", 2)
    for number in range(5):
        (project / f".lattice/notes/{number}.md").write_text("by hand\n")
    opened = open_after_power_cut(project, monkeypatch)
    assert opened.store.journal.head == 4
    assert sum("differed from change" in note for note in opened.notes) == 3


def test_unknown_files_are_moved_to_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = make_project(tmp_path / "web")
    with WorkerProcess(project) as worker:
        worker.ok("create", "x", *ANA)
        worker.kill()
    (project / ".lattice/tasks/task_lost.json").write_text("{}\n")
    opened = open_after_power_cut(project, monkeypatch)
    assert opened.store.journal.head == 1
    assert (project / "journal/lost/tasks/task_lost.json").read_text() == "{}\n"


def records(*operations: Operation) -> list[Record]:
    changes = [Change(seq, b"", "", "", "", "", "", [operation]) for seq, operation in enumerate(operations, 1)]
    return [Record(change.seq, b"", 0.0, change=encode(change)) for change in changes]


def check_repair(root: Path, wanted: dict[str, bytes], *operations: Operation, epoch: str = "") -> list[str]:
    files = {path: FileState(len(data), digest_of(data), 0, 0) for path, data in wanted.items()}
    tree, contents = ProjectTree(root, files), Contents()
    for record in records(*operations):
        contents.learn(record)
    return Repair(tree, contents, differing(tree), epoch=epoch).perform(root.parent / "lost")


def test_an_append_is_repeated_on_what_was_durable_even_if_the_rename_was_lost(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old\nnew")
    operations = AppendBytes("a", 4, digest_of(b"old\n"), b"new\n"), MoveFile("a", "b", digest_of(b"old\nnew\n"))
    check_repair(tmp_path, {"b": b"old\nnew\n"}, *operations)
    assert (tmp_path / "b").read_bytes() == b"old\nnew\n"
    assert not (tmp_path / "a").exists()


def test_patches_are_applied_to_whichever_version_is_there(tmp_path: Path) -> None:
    texts = [b'{\n  "n": %d\n}\n' % number for number in range(4)]
    operations = [MergeJson("ids.json", b'{"n": %d}' % n, digest_of(texts[n])) for n in (1, 2, 3)]
    for version in texts:
        (tmp_path / "ids.json").write_bytes(version)
        check_repair(tmp_path, {"ids.json": texts[3]}, *operations)
        assert (tmp_path / "ids.json").read_bytes() == texts[3]


def test_an_irrecoverable_file_is_left_and_reported(tmp_path: Path) -> None:
    (tmp_path / "sessions").mkdir()
    (tmp_path / "sessions/a.json").write_bytes(b"")
    notes = check_repair(tmp_path, {"sessions/a.json": b"gone"}, PutFile("other", b""))
    assert notes == ["sessions/a.json: could not be restored"]
    assert (tmp_path / "sessions/a.json").read_bytes() == b""


# --- files that the journal no longer has whole ---

TASK, RESOURCE = "task_01ARZ3NDEKTSV4RRFFQ69G5FAV", "res_01ARZ3NDEKTSV4RRFFQ69G5FAV"
SNAPSHOT, LOG = f"tasks/{TASK}.json", f"events/{TASK}.jsonl"
GPU, GPU_LOG = "resources/gpu/resource.json", f"events/{RESOURCE}.jsonl"


def line(event: dict[str, Any]) -> bytes:
    return serialize_event(event).encode()


CREATED = line(create_event("task_created", TASK, "human:ana", {"title": "One", "short_id": "LAT-1"}))
ADDED = line(create_event("comment_added", TASK, "human:ben", {"body": "from outside"}))
GPU_CREATED = line(create_resource_event("resource_created", RESOURCE, "human:ana", {"name": "gpu", "max_holders": 1}))
GPU_ADDED = line(create_resource_event("resource_acquired", RESOURCE, "human:ben", {"holder": "human:ben"}))


def derived(path: str, **logs: bytes) -> bytes:
    return derive(path, lambda read: logs.get(os.path.basename(read).partition(".")[0], b""), [GPU_LOG])


def write(root: Path, files: dict[str, bytes]) -> None:
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / ".lattice"
    made.mkdir()
    return made


@pytest.mark.parametrize("left", [b"", None])
def test_a_snapshot_that_the_journal_lacks_follows_from_its_log(root: Path, left: bytes | None) -> None:
    wanted = {LOG: CREATED, GPU_LOG: GPU_CREATED}
    wanted |= {SNAPSHOT: derived(SNAPSHOT, **{TASK: CREATED}), GPU: derived(GPU, **{RESOURCE: GPU_CREATED})}
    assert b"One" in wanted[SNAPSHOT] and b"gpu" in wanted[GPU]
    write(root, wanted if left is None else wanted | {SNAPSHOT: left, GPU: left})
    if left is None:
        (root / SNAPSHOT).unlink()
        (root / GPU).unlink()
    notes = check_repair(root, wanted)
    assert notes == [f"{path}: restored from the journal" for path in (GPU, SNAPSHOT)]
    assert tree_of(root) == wanted


def test_a_snapshot_of_another_moment_is_derived_rather_than_left_without_its_events(root: Path) -> None:
    """The journal's snapshot may differ from its log, for example after a local edit."""
    write(root, {LOG: CREATED, SNAPSHOT: b""})
    assert check_repair(root, {LOG: CREATED, SNAPSHOT: b"by hand"}) == [f"{SNAPSHOT}: restored from the journal"]
    assert (root / SNAPSHOT).read_bytes() == derived(SNAPSHOT, **{TASK: CREATED})


def test_a_snapshot_without_a_log_is_left_and_named(root: Path) -> None:
    write(root, {SNAPSHOT: b"", GPU: b""})
    notes = check_repair(root, {SNAPSHOT: b"lost", GPU: b"lost"})
    assert notes == [f"{path}: could not be restored" for path in (GPU, SNAPSHOT)]


def test_a_lost_rename_is_repeated_and_a_lost_plan_is_not_taken_from_another_task(root: Path) -> None:
    plan, archived = f"plans/{TASK}.md", f"archive/plans/{TASK}.md"
    for content, note in ((b"# Plan\n", "restored from the journal"), (b"# Older\n", "could not be restored")):
        write(root, {plan: content})
        (root / archived).unlink(missing_ok=True)
        assert f"{archived}: {note}" in check_repair(root, {archived: b"# Plan\n"})
        assert (root / archived).exists() == (content == b"# Plan\n")


def test_a_log_that_can_not_be_restored_is_left_with_all_that_follows_from_it(root: Path) -> None:
    write(root, {LOG: b"", GPU_LOG: b""})
    put = PutFile(GPU_LOG, GPU_CREATED)
    notes = check_repair(root, {LOG: CREATED, GPU_LOG: GPU_CREATED}, put)
    assert notes == [f"{LOG}: could not be restored", f"{GPU_LOG}: restored from the journal"]
    assert (root / LOG).read_bytes() == b"" and (root / GPU_LOG).read_bytes() == GPU_CREATED


def test_events_from_outside_are_added_and_their_snapshots_follow(root: Path) -> None:
    wanted = {
        LOG: CREATED,
        GPU_LOG: GPU_CREATED,
        SNAPSHOT: derived(SNAPSHOT, **{TASK: CREATED}),
        GPU: derived(GPU, **{RESOURCE: GPU_CREATED}),
    }
    write(root, wanted | {LOG: CREATED + ADDED, GPU_LOG: GPU_CREATED + GPU_ADDED})
    notes = check_repair(root, wanted, PutFile(LOG, CREATED), PutFile(GPU_LOG, GPU_CREATED))
    assert (root / LOG).read_bytes() == CREATED + ADDED and (root / GPU_LOG).read_bytes() == GPU_CREATED + GPU_ADDED
    assert (root / SNAPSHOT).read_bytes() == derived(SNAPSHOT, **{TASK: CREATED + ADDED}) != wanted[SNAPSHOT]
    assert (root / GPU).read_bytes() == derived(GPU, **{RESOURCE: GPU_CREATED + GPU_ADDED}) != wanted[GPU]
    assert {note.partition(":")[0] for note in notes} == {SNAPSHOT, GPU}, "the logs are as they should be already"


def test_an_event_of_an_unfinished_command_is_not_kept(root: Path) -> None:
    own = json.loads(ADDED) | {"id": f"ev_{make_id('e' * 32)}"}
    write(root, {LOG: CREATED + line(own) + ADDED})
    notes = check_repair(root, {LOG: CREATED}, PutFile(LOG, CREATED), epoch="e" * 32)
    assert (root / LOG).read_bytes() == CREATED + ADDED
    assert notes[0] == f"{LOG}: restored from the journal, and lines added outside the server: 1"


def test_an_index_that_no_change_has_is_set_aside(root: Path) -> None:
    write(root, {"ids.json": b"{}"})
    assert check_repair(root, {}) == ["ids.json: no change has it; now in journal/lost/"]
    assert (root.parent / "lost/ids.json").read_bytes() == b"{}"


@pytest.mark.parametrize("is_known", [False, True])
def test_an_archived_payload_never_changes_and_a_new_one_stays(root: Path, is_known: bool) -> None:
    path, data = "artifacts/payload/art_1.txt", b"payload"
    write(root, {path: b"other"})
    notes = check_repair(root, {path: data} if is_known else {}, PutFile(path, data))
    assert (root / path).read_bytes() == (data if is_known else b"other")
    assert notes == ([f"{path}: restored from the journal"] if is_known else [])
