"""Each function that the worker replaces in lattice does what the original does."""

import copy
import errno
import io
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import filelock
import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st
from lattice.storage import fs, locks

from lattice_remote.server.worker import patches
from lattice_remote.server.worker.patches import (
    Clock,
    Copier,
    Disk,
    Lock,
    LockBusy,
    LockTable,
    Mover,
    WriteSet,
    parse_faster,
    root_finder,
)


@pytest.fixture
def table() -> Iterator[LockTable]:
    made = LockTable(Path("none"))
    yield made
    made.release_all()


def outcome_of(action: Callable[[], object]) -> object:
    """Return the type and number of the error that ends an action, None for success."""
    try:
        action()
    except (filelock.Timeout, LockBusy):
        return "timeout"
    except OSError as error:
        return type(error), error.errno
    return None


# --- command lines ---


def a_group() -> click.Group:
    @click.group(invoke_without_command=True)
    @click.version_option("1.0")
    def group() -> None:
        click.echo("group")

    @group.command()
    @click.argument("names", nargs=-1, required=True)
    @click.option("--count", "-c", type=int, default=3, show_default=True)
    @click.option("--tag", multiple=True)
    @click.option("--loud/--quiet")
    @click.option("--place", envvar="GREET_PLACE")
    @click.option("--day", default=lambda: "today")
    @click.option("--upper", "case", flag_value="upper")
    @click.option("--lower", "case", flag_value="lower", default=True)
    @click.option("--seen", callback=lambda _context, _option, value: [value])
    @click.option("--hidden", expose_value=False)
    @click.option("--file", type=click.Path(exists=True))
    @click.pass_context
    def greet(context: click.Context, **values: object) -> None:
        sources = {name: context.get_parameter_source(name) for name in values}
        click.echo(repr(sorted(values.items())) + repr(sorted(sources.items())))

    @group.group()
    def inner() -> None:
        click.echo("inner")

    return group


@pytest.mark.parametrize(
    "line",
    [
        "greet a b -c 4 --tag x --tag=y --loud",
        "greet --quiet -- --loud",
        "greet a",
        "greet",
        "greet --help",
        "greet a --cuont 4",
        "greet a -c four",
        "greet a --count",
        "greet a --upper --seen it --day tomorrow --hidden x",
        "greet a --lower --place here --file /",
        "greet a --file /nowhere",
        "--help",
        "--version",
        "other",
        "inner",
        "",
    ],
)
def test_a_command_line_is_parsed_as_by_the_original(line: str) -> None:
    patched = a_group()
    for command in (patched, *patched.commands.values()):
        parse_faster(command)
    runner = CliRunner()
    runner.invoke(patched, ["greet", "first", "--tag", "left over"])
    for settings in ({}, {"env": {"GREET_PLACE": "there"}}, {"default_map": {"greet": {"count": 9, "case": "title"}}}):
        results = [runner.invoke(group, line.split(), **settings) for group in (a_group(), patched, patched)]
        assert len({(result.exit_code, result.output) for result in results}) == 1, results


def test_a_line_that_was_parsed_before_is_run_with_its_own_values() -> None:
    patched = a_group()
    for command in (patched, *patched.commands.values()):
        parse_faster(command)
    runner = CliRunner()
    for line in ("greet a -c 4 --tag x", "greet a -c 4 --tag x", "greet b c --quiet", f"greet {'x' * 100_000}"):
        for command, args in ((patched, line.split()), (patched.commands["greet"], line.split()[1:])):
            values, rest, order = command.make_parser(click.Context(command)).parse_args(args)
            values.clear()
            rest.clear()
            order.clear()
        expected = runner.invoke(a_group(), line.split())
        assert runner.invoke(patched, line.split()).output == expected.output


# --- the project ---


def test_the_project_is_found_as_by_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATTICE_ROOT", str(tmp_path))
    find = root_finder(tmp_path, fs.find_root)
    with pytest.raises(fs.LatticeRootError):
        find()
    (tmp_path / ".lattice").mkdir()
    assert find() == fs.find_root() == tmp_path
    (tmp_path / ".lattice").rmdir()
    with pytest.raises(fs.LatticeRootError):
        find()


def test_paths_in_the_project_are_those_of_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATTICE_ROOT", str(tmp_path))
    (tmp_path / ".lattice").mkdir()
    found, expected = root_finder(tmp_path, fs.find_root)(), fs.find_root()
    assert found is not None and expected is not None
    for parts in ([".lattice"], [".lattice", "tasks", "x.json"], ["..", "a"], [".lattice", "a/b/"], ["/tmp"], [""]):
        for _ in range(2):
            found_below, expected_below = found, expected
            for part in parts:
                found_below, expected_below = found_below / part, expected_below / part
            assert (found_below, str(found_below)) == (expected_below, str(expected_below))
            assert hash(found_below) == hash(expected_below) and found_below.parent == expected_below.parent
            assert found_below.relative_to("/") == expected_below.relative_to("/")
    assert found.joinpath("tasks") == expected / "tasks" and found / Path("tasks") == expected / "tasks"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)


class Text(str):
    """No plain JSON: copied by the original."""


@given(JSON)
@example({"a": [{"b": (1, [2])}], "c": Text("x")})
def test_a_copy_is_that_of_the_original(value: object) -> None:
    made = Copier().deepcopy(value)
    assert repr(made) == repr(copy.deepcopy(value))
    assert types_in(made) == types_in(value)
    assert not identities(made) & identities(value)


def types_in(value: object) -> list[type]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [type(value), *(kind for each in inner for kind in types_in(each))]


def identities(value: object) -> set[int]:
    """Return the objects that a command could change."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return set() if inner is None else {id(value)}.union(*map(identities, inner))


# --- locks ---


def nothing(path: Path) -> None:
    """Do nothing: a first use."""


def no_directory(path: Path) -> None:
    path.parent.rmdir()


def no_parent_either(path: Path) -> None:
    path.parent.rmdir()
    path.parent.parent.rmdir()


def a_directory(path: Path) -> None:
    path.mkdir()


def a_link(path: Path) -> None:
    path.symlink_to(path.parent / "target")


def a_file_as_directory(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_text("no locks here")


def content(path: Path) -> None:
    path.write_text("4711")


@pytest.mark.parametrize(
    "prepare", [nothing, no_directory, no_parent_either, a_directory, a_link, a_file_as_directory, content]
)
def test_a_lock_is_taken_or_refused_as_by_the_original(
    tmp_path: Path, table: LockTable, prepare: Callable[[Path], None]
) -> None:
    results = []
    umask = os.umask(0o002)
    for name, take in {
        "original": lambda path: filelock.FileLock(path, timeout=0).acquire(),
        "patched": lambda path: Lock(table.acquire, path, 0).acquire(),
    }.items():
        path = tmp_path / name / ".lattice/locks/tasks_x.lock"
        path.parent.mkdir(parents=True)
        prepare(path)
        error = outcome_of(lambda path=path, take=take: take(path))  # type: ignore[misc]
        there = path.is_file() and not path.is_symlink()
        mode = path.stat().st_mode if there else 0
        results.append((error, there, mode, path.read_bytes() if there else b""))
    os.umask(umask)
    assert results[0] == results[1]


def test_each_excludes_the_other(tmp_path: Path, table: LockTable) -> None:
    path = tmp_path / "tasks_x.lock"
    with filelock.FileLock(path):
        with pytest.raises(LockBusy) as busy:
            table.acquire(path, 10)
        assert str(busy.value) == lattices_words(tmp_path)
    table.acquire(path, 10)
    with pytest.raises(filelock.Timeout):
        filelock.FileLock(path, timeout=0).acquire()
    table.release_all()
    with filelock.FileLock(path, timeout=0):
        pass


def lattices_words(directory: Path) -> str:
    """Return what lattice says of a lock that is held, as if it had waited for 10 s."""
    with pytest.raises(locks.LockTimeout) as error, locks.lattice_lock(directory, "tasks_x", timeout=0):
        pass
    return str(error.value).replace("within 0s", "within 10s")


def test_a_lock_on_a_removed_file_is_none(tmp_path: Path, table: LockTable, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tasks_x.lock"
    opened = os.open

    def open_and_remove(*arguments: object, **options: object) -> int:
        descriptor = opened(*arguments, **options)  # type: ignore[arg-type]
        path.unlink()  # as another program may, between the open and the lock
        return descriptor

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", open_and_remove)
        with pytest.raises(LockBusy):
            table.acquire(path, 10)
    table.acquire(path, 10)


def test_a_transaction_takes_a_lock_once_and_keeps_it(tmp_path: Path, table: LockTable) -> None:
    lock = Lock(table.acquire, tmp_path / "tasks_x.lock", 10)
    for _ in range(3):
        lock.acquire()
        lock.release()
    with pytest.raises(filelock.Timeout):
        filelock.FileLock(tmp_path / "tasks_x.lock", timeout=0).acquire()
    table.release_all()
    with filelock.FileLock(tmp_path / "tasks_x.lock", timeout=0):
        pass
    table.begin(["locks/tasks_x"])
    with pytest.raises(LockBusy):
        lock.acquire()
    table.begin()
    lock.acquire()


def remove(path: Path) -> None:
    path.unlink()


def replace_by_another(path: Path) -> None:
    path.rename(path.with_name("old"))
    path.touch()


def replace_the_directory(path: Path) -> None:
    path.parent.rename(path.parent.with_name("old"))


@pytest.mark.parametrize("change", [remove, replace_by_another, replace_the_directory])
def test_a_lock_whose_file_was_replaced_is_taken_on_the_new_file(
    tmp_path: Path, table: LockTable, change: Callable[[Path], None]
) -> None:
    """As by a restore of the directory while its files are open here."""
    path = tmp_path / "locks/tasks_x.lock"
    path.parent.mkdir()
    table.acquire(path, 10)
    table.release_all()
    change(path)
    table.acquire(path, 10)
    with pytest.raises(filelock.Timeout):
        filelock.FileLock(path, timeout=0).acquire()
    table.release_all()
    with filelock.FileLock(path, timeout=0), pytest.raises(LockBusy):
        table.acquire(path, 10)
    table.acquire(path, 10)


def test_the_number_of_open_files_is_bounded(tmp_path: Path, table: LockTable) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(1000):
        table.acquire(tmp_path / f"tasks_{number}.lock", 10)
        table.release_all()
    assert len(os.listdir("/proc/self/fd")) < before + 200


# --- writes ---


class Patched:
    """Lattice's file functions on a directory, with a set of writes that wait."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch, *, lazy: bool = True) -> None:
        self.directory = directory
        directory.mkdir()
        self.writes = WriteSet(None if lazy else fs._fsync_directory)
        patch.setattr(fs, "os", Disk(self.writes, lazy=lazy))
        patch.setattr(fs, "tempfile", self.writes)
        patch.setattr(fs, "open", self.writes.open_log, raising=False)
        patch.setattr(io, "open", self.writes.open)


PLAN = "task_01ARZ3NDEKTSV4RRFFQ69G5FAV.md"
Steps = Callable[[Path, Callable[[], None]], list[object]]


def a_command(place: Path, publish: Callable[[], None]) -> list[object]:
    """Two writes of a task that exists, as of an update and a status, each read again."""
    log, snapshot = place / "log.jsonl", place / "snapshot.json"
    seen: list[object] = []
    for number in range(2):
        fs.jsonl_append(log, f'{{"n":{number}}}\n')
        fs.atomic_write(snapshot, f"state é {number}")
        seen += [log.read_text(), snapshot.read_text(), snapshot.read_bytes()]
        with log.open("rb") as file:
            file.seek(-1, 2)
            seen.append(file.read())
    publish()
    return seen


def new_files(place: Path, publish: Callable[[], None]) -> list[object]:
    fs.jsonl_append(place / "new.jsonl", "1\n")
    fs.jsonl_append(place / "new.jsonl", "2\n")
    fs.atomic_write(place / "new.json", b"\xff")
    publish()
    return [(place / "new.jsonl").read_text(), (place / "new.json").read_bytes()]


def without_a_newline(place: Path, publish: Callable[[], None]) -> list[object]:
    (place / "log.jsonl").write_bytes(b"torn")
    fs.jsonl_append(place / "log.jsonl", "1\n")
    fs.jsonl_append(place / "log.jsonl", "2\n")
    publish()
    return []


def replaced_then_appended(place: Path, publish: Callable[[], None]) -> list[object]:
    fs.atomic_write(place / "log.jsonl", "whole\n")
    fs.jsonl_append(place / "log.jsonl", "1\n")
    seen: list[object] = [(place / "log.jsonl").read_text()]
    publish()
    return seen


def appended_then_replaced(place: Path, publish: Callable[[], None]) -> list[object]:
    fs.jsonl_append(place / "log.jsonl", "1\n")
    fs.atomic_write(place / "log.jsonl", "whole\n")
    publish()
    return []


def half_a_surrogate(place: Path, publish: Callable[[], None]) -> list[object]:
    with pytest.raises(UnicodeEncodeError):
        fs.jsonl_append(place / "log.jsonl", "\ud800\n")
    publish()
    return []


def a_text(place: Path, publish: Callable[[], None]) -> list[object]:
    plan, notes = place / "plans" / PLAN, place / "notes" / PLAN
    plan.parent.mkdir()
    notes.parent.mkdir()
    plan.write_text("before\n")
    plan.chmod(0o640)
    seen: list[object] = []
    for text in ("a\n", "", "é\n"):
        plan.write_text(text, encoding="utf-8")
        notes.write_text(text, encoding="utf-8")
        seen += [plan.read_text(), notes.read_bytes()]
    publish()
    return [*seen, plan.read_text(), plan.stat().st_mode, notes.read_text()]


def no_directory_to_write_to(place: Path, publish: Callable[[], None]) -> list[object]:
    publish()
    return [outcome_of(lambda: fs.atomic_write(place / "none/x", "x")), outcome_of((place / "no").read_text)]


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize(
    "steps",
    [
        a_command,
        new_files,
        without_a_newline,
        replaced_then_appended,
        appended_then_replaced,
        half_a_surrogate,
        a_text,
        no_directory_to_write_to,
    ],
)
def test_writes_and_reads_agree_with_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: Steps, lazy: bool
) -> None:
    original = tmp_path / "original"
    original.mkdir()
    prepare(original)
    expected = steps(original, lambda: None)
    with monkeypatch.context() as patch:
        patched = Patched(tmp_path / "patched", patch, lazy=lazy)
        prepare(patched.directory)
        assert steps(patched.directory, patched.writes.publish) == expected
    assert content_of(patched.directory) == content_of(original)


def prepare(directory: Path) -> None:
    (directory / "log.jsonl").write_text('{"n":-1}\n')
    (directory / "snapshot.json").write_text("before")


def content_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_pending_writes_are_invisible_to_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patched = Patched(tmp_path / "place", patch)
        prepare(patched.directory)
        before = {name: os.stat(patched.directory / name).st_size for name in ("log.jsonl", "snapshot.json")}
        seen: list[dict[str, int]] = []
        a_command(
            patched.directory, lambda: seen.append({name: (patched.directory / name).stat().st_size for name in before})
        )
        assert seen == [before]
        patched.writes.forget()
        assert (patched.directory / "log.jsonl").read_text() == '{"n":-1}\n'
        patched.writes.publish()
    assert (tmp_path / "place/snapshot.json").read_text() == "before"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_published_file_is_replaced_as_a_whole_and_leaves_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(patches, "_renameat2", lambda: None)
    with monkeypatch.context() as patch:
        patched = Patched(tmp_path / "place", patch)
        prepare(patched.directory)
        with (patched.directory / "snapshot.json").open() as reader:
            fs.atomic_write(patched.directory / "snapshot.json", "after")
            replacement = next(patched.directory.glob(".tmp.*")).stat()
            patched.writes.publish()
            assert reader.read() == "before", "an open file stays as it was"
    assert content_of(tmp_path / "place") == {"log.jsonl": b'{"n":-1}\n', "snapshot.json": b"after"}
    status = (tmp_path / "place/snapshot.json").stat()
    assert (status.st_ino, status.st_mode) == (replacement.st_ino, replacement.st_mode)


def test_a_plan_that_a_command_rewrites_stays_whole_for_its_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tmp_path / "plans" / "task_01ARZ3NDEKTSV4RRFFQ69G5FAV.md"
    with monkeypatch.context() as patch:
        patched = Patched(plan.parent, patch)
        plan.write_text("before")
        plan.chmod(0o640)
        with plan.open() as reader:
            plan.write_text("after")
            assert reader.read() == "before"
        assert plan.read_text() == "after"
        patched.writes.publish()
    assert plan.read_text() == "after" and stat.S_IMODE(plan.stat().st_mode) == 0o640
    assert list(plan.parent.iterdir()) == [plan]


def test_a_removed_file_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a task is updated and then archived in one transaction."""
    with monkeypatch.context() as patch:
        patched = Patched(tmp_path / "place", patch)
        prepare(patched.directory)
        fs.atomic_write(patched.directory / "snapshot.json", "after")
        (patched.directory / "snapshot.json").unlink()
        with pytest.raises(FileNotFoundError):
            (patched.directory / "snapshot.json").read_text()


def in_place(path: Path) -> None:
    status = path.stat()
    path.write_text("22")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def by_another(path: Path) -> None:
    other = path.with_name("other")
    other.write_text("22")
    other.rename(path)


def removed(path: Path) -> None:
    path.unlink()


def to_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("change", [in_place, by_another, removed, to_a_directory])
def test_a_file_that_is_kept_is_read_again_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    settings = tmp_path / ".lattice" / "config.json"
    with monkeypatch.context() as patch:
        patched = Patched(settings.parent, patch)
        settings.write_text("11")
        end = time.monotonic() + 20
        while not patched.writes._often_read:  # kept once it is old enough
            assert settings.read_text() == "11"
            assert time.monotonic() < end, "it is not kept"
        assert (settings.read_text(), settings.read_bytes()) == ("11", b"11")
        change(settings)
        ours = outcome_and_text(settings)
    assert ours == outcome_and_text(settings)
    assert ours != "11"


def outcome_and_text(path: Path) -> object:
    try:
        return path.read_text()
    except OSError as error:
        return type(error), error.errno


def test_the_fsyncs_that_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    for lazy, expected in ((True, []), (False, [10, 1, 5000, 3])):
        synced.clear()
        disk = Disk(None, lazy=lazy)
        for size, flags in ((10, 0), (1, os.O_APPEND), (5000, 0), (3, os.O_APPEND)):
            (tmp_path / "file").write_bytes(b"x" * size)
            descriptor = os.open(tmp_path / "file", os.O_WRONLY | flags)
            disk.fsync(descriptor)
            os.close(descriptor)
        assert synced == expected
        assert disk.path is os.path


# --- the others ---


def test_a_clock_is_that_of_the_original_but_for_sleeping() -> None:
    class Paused(Exception):
        pass

    def pause() -> object:
        raise Paused

    clock = Clock(pause)  # type: ignore[arg-type]
    clock.restart(is_over=False)
    assert [clock.monotonic() for _ in range(3)] == [0.0, 0.0, 0.0]
    with pytest.raises(Paused):
        clock.sleep(1)
    clock.restart(is_over=True)
    assert [clock.monotonic() for _ in range(3)] == [0.0, float("inf"), float("inf")]
    assert clock.time is time.time


def test_a_file_that_came_with_the_command_is_moved_and_others_are_copied(tmp_path: Path) -> None:
    mover = Mover()
    given, other = tmp_path / "given", tmp_path / "other"
    for path in (given, other):
        path.write_text(path.name)
        path.chmod(0o640)
    mover.own_copies = [str(given)]
    for path in (given, other):
        target = tmp_path / f"{path.name}.copy"
        assert mover.copy2(str(path), str(target)) == str(target)
        assert (target.read_text(), target.stat().st_mode & 0o777) == (path.name, 0o640)
    assert (given.exists(), other.exists()) == (False, True)
    with pytest.raises(FileNotFoundError) as error:
        mover.copy2(str(given), str(tmp_path / "x"))
    assert error.value.errno == errno.ENOENT
