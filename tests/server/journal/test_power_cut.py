"""Power cuts at random moments of random histories, and local changes before the server restarts (I2, I12)."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from random_commands import command_lines
from worker_process import ANA, Copy, WorkerProcess, answer_of, change_of, execute, make_project, tree_of

from lattice_remote.files import frames
from lattice_remote.protocol.messages import Attachment, Change
from lattice_remote.server.datadir import DataDir
from lattice_remote.server.ipc import RequestDone
from lattice_remote.server.journal.journal import Committer
from lattice_remote.server.journal.segment import JournalReader
from lattice_remote.server.maintenance.fsck import fsck
from lattice_remote.server.maintenance.fsck_project import AFTER_POWER_CUT
from lattice_remote.server.tree.tree import INLINE_BYTES, sync_files
from lattice_remote.server.worker.recovery import open_store
from lattice_remote.server.worker.store import server_origin
from power_cut import Disk, make_image, mounted, touch, traced_worker

LATTICE = "import sys; from lattice.cli.main import cli; sys.argv[0] = 'lattice'; cli()"
SEEDS = range(*map(int, os.environ.get("POWER_CUT_SEEDS", "0 4").split()))
SETTINGS = ["{}", '{"segment_bytes": 8192, "max_bytes": 65536}']


def history(rng: random.Random, count: int, lattice: Path) -> Iterator[tuple[list[str], list[Attachment]]]:
    """Yield random command lines for a board with tasks."""
    for line in (*[f"create T{number}" for number in range(6)], "resource create gpu", "resource create db"):
        yield [*line.split(), *ANA], []
    yield ["session", "start", "--name", "Argus", "--model", "m", "--framework", "f"], []
    yield from command_lines(rng, count, lattice)


def plain_lattice(project: Path, *argv: str) -> bool:
    """Run lattice without our plugin in the project's directory; return whether it succeeded."""
    environment = {**os.environ, "LATTICE_ROOT": str(project), "LATTICE_REMOTE_SERVER": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", LATTICE, *argv], env=environment, capture_output=True, check=False
    )
    return done.returncode == 0


def events(tree: dict[str, bytes]) -> Counter[bytes]:
    """Return how often each event is in the logs of tasks and resources."""
    logs = [data for path, data in tree.items() if path.endswith(".jsonl") and "_lifecycle" not in path]
    return Counter(line for data in logs for line in data.splitlines())


def follow_journal(cache: Copy, project: Path, head: int) -> None:
    changes = JournalReader(project / "journal").read(cache.seq, head, 1 << 30)
    assert changes is not None
    for _, data in changes:
        change = msgspec.msgpack.decode(data, type=Change)
        cache.follow(change)


def check_whole(worker: WorkerProcess, project: Path, cache: Copy, epoch: str) -> dict[str, bytes]:
    """Check what must be true after every recovery, of a history that was called ``epoch``; return the tree."""
    lattice = project / ".lattice"
    tree = tree_of(lattice)
    if worker.ready.epoch == epoch:
        follow_journal(cache, project, worker.ready.head)
        assert cache.files == tree, "a cache that follows has the same bytes (I3)"
    else:
        assert "the journal was damaged" in str(worker.ready.notes)
    assert {after.path: after.digest for after in worker.ready.files}.keys() == tree.keys()
    assert "No issues found" in worker.ok("doctor")
    worker.ok("rebuild", "--all")
    rebuilt = tree_of(lattice)
    assert {path: data for path, data in rebuilt.items() if "_lifecycle" not in path} == {
        path: data for path, data in tree.items() if "_lifecycle" not in path
    }, "what is derived agrees with the logs"
    lifecycle = "events/_lifecycle.jsonl"
    assert sorted(rebuilt[lifecycle].splitlines()) == sorted(tree[lifecycle].splitlines())
    return tree


@pytest.mark.parametrize("settings", SETTINGS, ids=["all of the history", "small segments"])
@pytest.mark.parametrize("seed", SEEDS)
def test_after_a_power_cut_every_acknowledged_command_is_applied_once(tmp_path: Path, seed: int, settings: str) -> None:
    rng = random.Random(seed)
    project = make_project(tmp_path / "web")
    lattice, trace = project / ".lattice", tmp_path / "trace"
    disk, cache = Disk(project, trace), Copy(lattice, tree_of(lattice))
    with WorkerProcess(project, command=traced_worker(trace, "one"), settings=settings) as worker:
        epoch = worker.ready.epoch
        for argv, files in history(rng, 60, lattice):
            follow(cache, worker.run(*argv, files=files))
            disk.observe()
        acknowledged = tree_of(lattice)
        words = [word for word in ("late1", "late2", "late3") if rng.random() < 0.7]
        comments = [execute("comment", "LAT-1", word, *ANA) for word in words]
        for word, comment in zip(words, comments, strict=True):
            worker.send(comment)
            for line in (f"create {word}", "resource acquire gpu", "archive LAT-2"):
                worker.send(execute(*line.split(), *ANA))
        if words and worker.has_message(within_s=rng.choice([0.0, 0.01, 0.05])):
            follow(cache, worker.done())
        worker.kill()
    disk.cut(rng)
    how = touch(rng, lattice)
    added = [word for word in ("plain1", "plain2") if rng.random() < 0.5 and plain_comment(project, word)]
    made = [word for word in ("plainly",) if rng.random() < 0.5 and plain_lattice(project, "create", word, *ANA)]
    trace = tmp_path / "second trace"
    disk = Disk(project, trace)
    with WorkerProcess(project, command=traced_worker(trace, "two"), settings=settings) as worker:
        tree = check_whole(worker, project, cache, epoch)
        found = events(tree)
        context = (how, added, made, worker.ready.notes)
        assert not events(acknowledged) - found, context
        assert all(count == 1 for count in found.values()), "nothing is doubled"
        for word in added:
            assert comments_of(tree, word) == 1, context
        for word in made:
            assert sum(f'"title":"{word}"'.encode() in line for line in found) == 1, context
            assert f'"title": "{word}"'.encode() in b"".join(tree.values()), context
        disk.observe()
        for comment in comments:
            worker.send(comment)
            assert answer_of(worker.done()) is not None
        acknowledged = tree_of(lattice)
        for word in words:
            assert comments_of(acknowledged, word) <= 1, "asked again, it runs once (I6)"
        epoch = worker.ready.epoch
        worker.kill()
    disk.cut(rng)
    cache = Copy(lattice, tree, worker.ready.head)
    with WorkerProcess(project, command=traced_worker(trace, "three"), settings=settings) as worker:
        again = events(check_whole(worker, project, cache, epoch))
        assert not events(acknowledged) - again, "a power cut after the recovery takes nothing either"
        assert all(count == 1 for count in again.values())


def plain_comment(project: Path, word: str) -> bool:
    return plain_lattice(project, "comment", "LAT-1", word, *ANA)


def comments_of(tree: dict[str, bytes], word: str) -> int:
    return sum(f'"body":"{word}"'.encode() in line for line in events(tree).elements())


def follow(cache: Copy, done: RequestDone) -> None:
    change = change_of(done)
    if change is not None:
        cache.follow(change)


@pytest.mark.parametrize("options", ["auto_da_alloc", "noauto_da_alloc"])
def test_a_file_system_that_was_cut_off_while_in_use_is_recovered(tmp_path: Path, options: str) -> None:
    """Copying the image of an ext4 in use yields the state of the disk after a power cut."""
    rng = random.Random(options)
    image, cut, place = tmp_path / "image", tmp_path / "cut", tmp_path / "mounted"
    options += ",commit=600"  # nothing is written but by fsync
    trace = tmp_path / "trace"
    trace.mkdir()
    with contextlib.ExitStack() as stack:
        try:
            make_image(image)
            stack.enter_context(mounted(image, place, options))
        except OSError as error:
            pytest.skip(f"needs root's rights and loop devices: {error}")
        project = make_project(place / "web")
        cache = Copy(project / ".lattice", tree_of(project / ".lattice"))
        with WorkerProcess(project, command=traced_worker(trace, "one")) as worker:
            for argv, files in history(rng, 150, project / ".lattice"):
                follow(cache, worker.run(*argv, files=files))
            acknowledged, epoch = tree_of(project / ".lattice"), worker.ready.epoch
            for number in range(6):
                worker.send(execute("create", f"lost {number}", *ANA))
            os.kill(worker.pid, signal.SIGSTOP)
            shutil.copyfile(image, cut)
            worker.kill()
    with mounted(cut, place, options):
        touch(rng, project / ".lattice")
        added = plain_lattice(project, "comment", "LAT-1", "plainly", *ANA)
        with WorkerProcess(project, command=traced_worker(trace, "two")) as worker:
            found = events(check_whole(worker, project, cache, epoch))
            assert not events(acknowledged) - found, worker.ready.notes
            assert all(count == 1 for count in found.values()), "nothing is doubled"
            assert sum(b'"plainly"' in line for line in found) == added, worker.ready.notes


def test_many_files_are_durable_after_one_sync_of_their_file_system(tmp_path: Path) -> None:
    image, cut, place = tmp_path / "image", tmp_path / "cut", tmp_path / "mounted"
    with contextlib.ExitStack() as stack:
        try:
            make_image(image)
            stack.enter_context(mounted(image, place, "commit=600"))
        except OSError as error:
            pytest.skip(f"needs root's rights and loop devices: {error}")
        written = {f"{kind}/{number}": f"{kind} {number}".encode() for kind in "ab" for number in range(400)}
        for name, data in written.items():
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_bytes(data)
        shutil.copyfile(image, cut)
        before = cut.read_bytes()
        sync_files(str(place / name) for name in written)
        shutil.copyfile(image, cut)
        assert cut.read_bytes() != before, "nothing was durable before"
    with mounted(cut, place, "commit=600"):
        assert {name: (place / name).read_bytes() for name in written} == written


# --- changes before the next start ---


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "web")


def in_boot(project: Path, name: str, settings: str = "{}") -> WorkerProcess:
    """Start a worker in the boot of this name."""
    trace = project.parent / "trace"
    trace.mkdir(exist_ok=True)
    return WorkerProcess(project, command=traced_worker(trace, name), settings=settings)


def log_of_first_task(project: Path) -> Path:
    return next((project / ".lattice/events").glob("task_*.jsonl"))


def put_back(lattice: Path, tree: dict[str, bytes]) -> None:
    """Restore the files of this tree, and remove all others."""
    for path in tree_of(lattice).keys() - tree.keys():
        (lattice / path).unlink()
    for path, data in tree.items():
        (lattice / path).write_bytes(data)


@pytest.mark.parametrize("damage", ["earlier", "empty", "zeros", "missing", "cut short"])
def test_files_lost_in_a_power_cut_return_although_touched_since(project: Path, damage: str) -> None:
    lattice = project / ".lattice"
    with in_boot(project, "one") as worker:
        worker.ok("create", "x", *ANA)
        worker.ok("session", "start", "--name", "Argus", "--model", "m", "--framework", "f")
        earlier = tree_of(lattice)
        worker.ok("comment", "LAT-1", "acknowledged", *ANA)
        worker.ok("create", "y", *ANA)
        promised = tree_of(lattice)
        worker.kill()
    for path, data in promised.items():
        if path == "config.json":
            continue  # it was durable before
        if path in earlier and damage == "earlier":
            (lattice / path).write_bytes(earlier[path])
        elif damage == "missing" or damage == "earlier":
            (lattice / path).unlink()
        else:
            (lattice / path).write_bytes({"empty": b"", "zeros": bytes(len(data))}.get(damage, data[: len(data) // 2]))
    for path in lattice.rglob("*"):
        path.chmod(0o750)
    with in_boot(project, "two") as worker:
        assert tree_of(lattice) == promised, worker.ready.notes
        assert worker.ready.head == 4, "nothing of it is a change"


def test_a_plain_comment_on_a_log_that_lost_its_end_is_added_to_what_was_acknowledged(project: Path) -> None:
    lattice = project / ".lattice"
    with in_boot(project, "one") as worker:
        worker.ok("create", "x", *ANA)
        earlier = tree_of(lattice)
        worker.ok("comment", "LAT-1", "acknowledged", *ANA)
        worker.kill()
    put_back(lattice, earlier)
    assert plain_lattice(project, "comment", "LAT-1", "by hand", *ANA)
    with in_boot(project, "two") as worker:
        log = log_of_first_task(project).read_text()
        assert log.count('"acknowledged"') == log.count('"by hand"') == 1
        assert "and lines added outside the server: 1" in str(worker.ready.notes)
        assert worker.ready.head == 3
        assert "No issues found" in worker.ok("doctor")


def test_a_plain_task_under_an_id_that_was_given_to_another_gets_a_new_one(project: Path) -> None:
    lattice = project / ".lattice"
    with in_boot(project, "one") as worker:
        worker.ok("create", "x", *ANA)
        earlier = tree_of(lattice)
        worker.ok("create", "acknowledged", *ANA)
        worker.kill()
    put_back(lattice, earlier)
    assert plain_lattice(project, "create", "by hand", *ANA)
    with in_boot(project, "two") as worker:
        ids = json.loads((lattice / "ids.json").read_bytes())["map"]
        assert json.loads((lattice / f"tasks/{ids['LAT-2']}.json").read_bytes())["title"] == "acknowledged"
        assert json.loads((lattice / f"tasks/{ids['LAT-3']}.json").read_bytes())["title"] == "by hand"
        assert "No issues found" in worker.ok("doctor")
        before = tree_of(lattice)
        worker.ok("rebuild", "--all")
        assert tree_of(lattice) == before


def test_a_plain_task_is_in_the_log_of_all_tasks_though_that_lost_its_end(project: Path) -> None:
    with in_boot(project, "one") as worker:
        worker.ok("create", "x", *ANA)
        worker.kill()
    lifecycle = project / ".lattice/events/_lifecycle.jsonl"
    before = lifecycle.read_bytes()
    assert plain_lattice(project, "create", "by hand", *ANA)
    lifecycle.write_bytes(before)
    with in_boot(project, "two") as worker:
        assert len(lifecycle.read_bytes().splitlines()) == 2
        assert "No issues found" in worker.ok("doctor")


def test_a_plain_session_and_one_that_was_acknowledged_are_both_in_the_index(project: Path) -> None:
    lattice = project / ".lattice"
    start = ["session", "start", "--model", "m", "--framework", "f", "--name"]
    with in_boot(project, "one") as worker:
        worker.ok(*start, "Echo")
        earlier = tree_of(lattice)
        worker.ok(*start, "Argus")
        worker.kill()
    put_back(lattice, earlier)
    assert plain_lattice(project, *start, "Beacon")
    with in_boot(project, "two"):
        index = json.loads((lattice / "sessions/index.json").read_bytes())
        assert index["active_sessions"].keys() == {"Argus-1", "Beacon-1", "Echo-1"}
        assert index["serial_counters"] == {"Argus": 1, "Beacon": 1, "Echo": 1}
        assert {path.stem for path in (lattice / "sessions").glob("*-1.json")} == index["active_sessions"].keys()


def test_a_damaged_project_that_was_copied_to_another_disk_loses_nothing(project: Path) -> None:
    with in_boot(project, "one") as worker:
        worker.ok("create", "x", *ANA)
        earlier = tree_of(project / ".lattice")
        worker.ok("comment", "LAT-1", "acknowledged", *ANA)
        worker.kill()
    put_back(project / ".lattice", earlier)
    copied = project.parent / "copied"
    shutil.copytree(project, copied)
    assert plain_lattice(copied, "comment", "LAT-1", "by hand", *ANA)
    with in_boot(copied, "two") as worker:
        log = log_of_first_task(copied).read_text()
        assert log.count('"acknowledged"') == log.count('"by hand"') == 1
        assert "No issues found" in worker.ok("doctor")


def test_files_that_plain_lattice_wrote_before_the_power_cut_are_kept(project: Path) -> None:
    with in_boot(project, "one") as worker:
        worker.ok("create", "x", *ANA)
        worker.kill()
    assert plain_lattice(project, "comment", "LAT-1", "while the server was down", *ANA)
    with in_boot(project, "two") as worker:
        assert "while the server was down" in log_of_first_task(project).read_text()
        assert "No issues found" in worker.ok("doctor")


def test_an_edit_that_no_change_knows_is_kept(project: Path) -> None:
    with in_boot(project, "one") as worker:
        worker.ok("create", "x", *ANA)
        worker.kill()
    plan = next((project / ".lattice/plans").iterdir())
    plan.write_text("# By hand\n")
    with in_boot(project, "two") as worker:
        assert plan.read_text() == "# By hand\n"
        assert worker.ready.head == 2


def test_fsck_reports_files_lost_in_a_power_cut_as_recoverable(tmp_path: Path) -> None:
    data = DataDir(tmp_path / "data")
    data.create()
    project = make_project(data.project("web").root)
    with in_boot(project, "one") as worker:
        worker.ok("create", "x", *ANA)
        worker.kill()
    promised = tree_of(project / ".lattice")
    log_of_first_task(project).write_bytes(b"")
    found = [finding for finding in fsck(data, ["web"], repair=False).findings if "events/task" in finding.where]
    assert [finding.repair for finding in found] == [AFTER_POWER_CUT]
    fsck(data, ["web"], repair=True)
    assert tree_of(project / ".lattice") == promised


@pytest.mark.parametrize("stop", ["in order", "killed, and the machine runs on"])
def test_without_doubt_an_earlier_state_is_an_edit(project: Path, stop: str) -> None:
    lattice = project / ".lattice"
    with in_boot(project, "one") as worker:
        worker.ok("create", "x", *ANA)
        earlier = tree_of(lattice)
        worker.ok("comment", "LAT-1", "to be taken back by git", *ANA)
        worker.stop() if stop == "in order" else worker.kill()
    put_back(lattice, earlier)
    with in_boot(project, "two" if stop == "in order" else "one") as worker:
        assert tree_of(lattice) == earlier
        assert worker.ready.head == 3


def test_a_refused_command_does_not_come_back(project: Path) -> None:
    """The event was written and rolled back, but the rollback did not reach the disk."""
    log_size = 0
    with in_boot(project, "one") as worker:
        worker.ok("create", "x", *ANA)
        promised = tree_of(project / ".lattice")
        worker.ok("comment", "LAT-1", "never acknowledged", *ANA)
        worker.kill()
    log = log_of_first_task(project)
    log_size = log.stat().st_size
    cut_last_record(project)
    with in_boot(project, "two") as worker:
        assert tree_of(project / ".lattice") == promised, worker.ready.notes
        assert worker.ready.head == 1
    assert log.stat().st_size < log_size


@pytest.mark.parametrize("damaged", ["sessions/Argus-1.json", "sessions/index.json", "ids.json"])
def test_files_replaced_by_an_unacknowledged_command_return_after_the_journal_was_trimmed(
    project: Path, damaged: str
) -> None:
    lattice = project / ".lattice"
    with in_boot(project, "one", SETTINGS[1]) as worker:
        worker.ok("create", "x", *ANA)
        for _ in range(2):
            worker.ok("session", "start", "--name", "Argus", "--model", "m", "--framework", "f")
        for number in range(100):
            worker.ok("comment", "LAT-1", f"{number} " + "x" * 900, *ANA)
        while max((project / "journal").glob("*.log")).stat().st_size > 2000:  # room for what comes
            worker.ok("comment", "LAT-1", "x" * 900, *ANA)
        assert min(int(path.stem) for path in (project / "journal").glob("*.log")) > 3, "the journal was trimmed"
        promised = tree_of(lattice)
        if damaged == "ids.json":
            worker.ok("create", "never acknowledged", *ANA)
        else:
            worker.ok("session", "end", "Argus-1")
        worker.kill()
    cut_last_record(project)
    (lattice / damaged).write_bytes(b"")
    with in_boot(project, "two", SETTINGS[1]) as worker:
        assert tree_of(lattice) == promised, worker.ready.notes


def test_the_index_of_ids_is_derived_from_the_logs_once_the_journal_was_trimmed(project: Path) -> None:
    lattice = project / ".lattice"
    with in_boot(project, "one", SETTINGS[1]) as worker:
        for title in ("x", "y"):
            worker.ok("create", title, *ANA)
        worker.ok("archive", "LAT-2", *ANA)
        for number in range(100):
            worker.ok("comment", "LAT-1", f"{number} " + "x" * 900, *ANA)
        assert min(int(path.stem) for path in (project / "journal").glob("*.log")) > 4, "the journal was trimmed"
        promised = tree_of(lattice)
        worker.kill()
    (lattice / "ids.json").write_bytes(b"")
    with in_boot(project, "two", SETTINGS[1]) as worker:
        assert tree_of(lattice) == promised, worker.ready.notes


def cut_last_record(project: Path) -> None:
    segment = max((project / "journal").glob("*.log"))
    data = segment.read_bytes()
    last = [offset for offset, _ in frames(data)][-1]
    with segment.open("r+b") as file:
        file.truncate(last + 5)


def test_contents_that_a_record_only_names_are_durable_before_it_is_written(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    sync, write = os.fsync, os.write
    ours, theirs = socket.socketpair()

    def traced_sync(descriptor: int) -> None:
        sync(descriptor)
        steps.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")

    def traced_write(descriptor: int, data: bytes) -> int:
        steps.append(f"write {Path(os.readlink(f'/proc/self/fd/{descriptor}')).suffix}")
        return write(descriptor, data)

    with ours, theirs:
        opened = open_store(project, project / "tmp", committer := Committer(theirs), code=[])
        plan = project / ".lattice/plans/large.md"
        plan.write_bytes(b"x" * (INLINE_BYTES + 1))
        monkeypatch.setattr(os, "fsync", traced_sync)
        monkeypatch.setattr(os, "write", traced_write)
        opened.store.commit(opened.store.tree.reconcile(), server_origin("edit"))
        monkeypatch.undo()
        committer.finish()
        opened.store.journal.close()
    assert steps.index("sync large.md") < steps.index("sync plans") < steps.index("write .log")
