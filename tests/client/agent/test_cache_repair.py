"""Automatic repair of local changes to the cache; texts that a user wrote are kept (I3, I4)."""

import asyncio
import contextlib
import itertools
import os
import random
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest
from client_kit import PLAN, TASK, ask, make_cache, ready, rescued, run, tree, until
from fake_server import TOKEN, FakeServer

from lattice_remote import file_watcher
from lattice_remote.client.agent import integrity_monitor
from lattice_remote.client.agent.integrity_monitor import IntegrityMonitor
from lattice_remote.client.agent.service import Service
from lattice_remote.client.cache import rescued_files, verify
from lattice_remote.client.cache import rescued_files as store
from lattice_remote.client.cache.cache import Cache
from lattice_remote.client.cache.replicator import ReceiveOutcome, Replicator
from lattice_remote.client.cache.verify import RepairSchedule
from lattice_remote.errors import StorageError
from lattice_remote.file_watcher import FileWatcher, Touched
from lattice_remote.protocol.messages import Fetch, Manifest
from lattice_remote.protocol.operations import AnnounceFile, DeleteFile, MoveFile, PutFile, digest_of

REMOVALS = int(os.environ.get("REMOVALS", "10"))
"""How often a cache is removed while it changes."""


@contextlib.asynccontextmanager
async def looked_after(directory: Path, file_watcher: FileWatcher | None = None) -> AsyncIterator[Service]:
    """Start a service as the agent does and wait for its first comparison."""
    service, file_watcher = Service(str(directory)), file_watcher or FileWatcher()
    service.start(TOKEN)
    service.look_after(file_watcher, asyncio.Semaphore(1))
    try:
        await ready(service)
        yield service
    finally:
        await service.close()
        file_watcher.close()


@pytest.fixture
async def kept(server: FakeServer, directory: Path) -> AsyncIterator[Service]:
    server.files |= {
        "context.md": b"# Ours\n",
        "ids.json": b"{}\n",
        "events/task_1.jsonl": b'{"n":1}\n' * 3,
        "tasks/task_2.json": b'{"id": 2}\n',
        "archive/plans/old.md": b"# Old\n",
        PLAN: b"# Plan\n",
        f"tasks/{TASK}.json": b"{}\n",
    }
    async with looked_after(directory) as service:
        yield service


def fetched(server: FakeServer) -> list[str]:
    return [path for frame in server.frames if isinstance(frame, Fetch) for path in frame.paths]


async def equal(directory: Path, server: FakeServer, timeout_s: float = 60.0) -> None:
    def same() -> bool:
        try:
            return tree(directory) == server.files
        except Exception:  # noqa: BLE001 - it is being mended while we read it
            return False

    await until(same, timeout_s)


async def test_a_large_content_is_restored(server: FakeServer, directory: Path, kept: Service) -> None:
    path, content = "artifacts/payload/big.bin", os.urandom(300_000)
    server.files[path] = content
    server.change(AnnounceFile(path, len(content), digest_of(content)))
    await equal(directory, server, 60)
    (directory / path).write_bytes(b"altered")
    await equal(directory, server, 60)
    await ask(kept, "configure", name="payloads", value="on-demand")
    (directory / path).unlink()
    await until(lambda: path in kept._replicator.replica.deferred)
    assert (await ask(kept, "fetch", paths=[path]))["fetched"] == [path]
    await equal(directory, server, 60)


def alter(directory: Path) -> None:
    (directory / "tasks/task_1.json").write_bytes(b'{"id": 9}\n')


def truncate(directory: Path) -> None:
    os.truncate(directory / "events/task_1.jsonl", 8)


def replace(directory: Path) -> None:
    (directory / "new").write_bytes(b"{}")
    (directory / "new").rename(directory / "ids.json")


def delete(directory: Path) -> None:
    (directory / "tasks/task_2.json").unlink()


def create(directory: Path) -> None:
    (directory / "tasks/task_7.json").write_bytes(b"{}")


def link(directory: Path) -> None:
    (directory / "ids.json").unlink()
    (directory / "ids.json").symlink_to("/etc/hostname")


def remove_directory(directory: Path) -> None:
    shutil.rmtree(directory / "tasks")


def move_directory_away(directory: Path) -> None:
    (directory / "events").rename(directory.parent / "events")


def move_directory_in(directory: Path) -> None:
    place = directory.parent / "res"
    place.mkdir()
    (place / "resource.json").write_bytes(b"{}")
    place.rename(directory / "resources" / "res")


def keep_the_time(directory: Path) -> None:
    """Alter a file but restore its size and modification time."""
    place = directory / "tasks/task_2.json"
    before = place.stat()
    place.write_bytes(b'{"id": 3}\n')
    os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))


def create_a_task(directory: Path) -> None:
    """Create a task as a program without lattice-remote does. A plan without a task is not an edit."""
    for place in ("tasks/{}.json", "events/{}.jsonl", "plans/{}.md"):
        (directory / place.format("task_01HYYYYYYYYYYYYYYYYYYYYYYY")).write_bytes(b"{}\n")


def remove_a_plan(directory: Path) -> None:
    (directory / PLAN).unlink()


@pytest.mark.parametrize(
    "harm",
    [
        alter,
        truncate,
        replace,
        delete,
        create,
        link,
        remove_directory,
        move_directory_away,
        move_directory_in,
        keep_the_time,
        remove_a_plan,
        create_a_task,
    ],
)
async def test_every_kind_of_foreign_change_is_repaired(
    server: FakeServer, kept: Service, directory: Path, harm: Callable[[Path], None]
) -> None:
    harm(directory)
    assert tree(directory) != server.files
    await equal(directory, server)
    await until(lambda: kept._repaired()["count"] > 0)
    assert kept._repaired()["last_path"] is not None and kept.cache.is_whole()


async def test_the_agents_own_writes_are_not_fetched_again(server: FakeServer, kept: Service, directory: Path) -> None:
    server.frames.clear()
    for n in range(40):
        server.append("events/task_1.jsonl", f"{n}\n".encode())
        server.put(f"tasks/task_{n}.json", f"{n}".encode())
    server.change(MoveFile("tasks/task_3.json", "archive/tasks/task_3.json", digest_of(b"3")))
    server.change(DeleteFile("tasks/task_4.json"))
    await equal(directory, server)
    (directory / "tasks/task_5.json").write_bytes(b"a stranger's")  # repaired only after earlier writes were compared
    await equal(directory, server)
    assert set(fetched(server)) == {"tasks/task_5.json"}
    assert kept._repaired()["count"] == 1


async def test_writes_of_a_command_without_the_agent_are_not_fetched_again(
    server: FakeServer, kept: Service, directory: Path
) -> None:
    server.frames.clear()
    for n in range(5):
        sibling = Service(str(directory))
        sibling.start(TOKEN)
        await run(sibling, "put", f"tasks/new_{n}.json", "x")
        await run(sibling, "append", "events/task_1.jsonl", f"{n}\n")
        await sibling.close()
    await equal(directory, server)
    (directory / "tasks/new_0.json").write_bytes(b"a stranger's")
    await equal(directory, server)
    assert set(fetched(server)) == {"tasks/new_0.json"}
    assert kept._repaired()["count"] == 1


async def test_a_touched_file_is_not_fetched(server: FakeServer, kept: Service, directory: Path) -> None:
    place = directory / "tasks/task_1.json"
    inode = place.stat().st_ino
    server.frames.clear()
    os.utime(place)
    await until(lambda: fetched(server) == ["tasks/task_1.json"])
    await until(lambda: kept.cache.known.agrees("tasks/task_1.json", kept.cache.signature("tasks/task_1.json")))
    assert place.stat().st_ino == inode and kept._repaired()["count"] == 0


async def test_a_repeatedly_touched_file_is_fetched_at_growing_intervals(
    server: FakeServer, kept: Service, directory: Path
) -> None:
    cache = kept.cache
    server.frames.clear()
    for touches in range(1, 4):
        os.utime(directory / "ids.json")
        await until(lambda: fetched(server).count("ids.json") == touches)  # noqa: B023
        await until(lambda: cache.known.agrees("ids.json", cache.signature("ids.json")))
    os.utime(directory / "ids.json")
    await until(lambda: (due := kept._replicator.repairs.next_due_s()) is not None and due > 0.3)
    assert fetched(server).count("ids.json") == 3 and kept._repaired()["count"] == 0
    alter(directory)  # other files are still repaired at once
    await equal(directory, server)


async def test_when_all_files_are_touched_only_differing_ones_are_fetched(
    server: FakeServer, kept: Service, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(100):
        server.put(f"tasks/t{number}.json", b"{}\n")
    await equal(directory, server)
    monkeypatch.setattr(integrity_monitor, "_MANY", 50)
    (directory.parent / "backup").mkdir()
    care, is_away, waits = kept._integrity_monitor, True, asyncio.Event()
    assert care is not None

    def can_work() -> bool:
        waits.set()
        return not is_away and IntegrityMonitor._can_work(care)

    monkeypatch.setattr(care, "_can_work", can_work)
    care.touched(set())
    await waits.wait()
    for number in range(100):
        os.link(directory / f"tasks/t{number}.json", directory.parent / f"backup/{number}")
    alter(directory)
    server.frames.clear()
    is_away = False
    care.touched(None)  # the file watcher lost events
    kept._connection.changed.notify()
    await equal(directory, server)
    await until(lambda: not kept._replicator.repairs.count_due())
    assert fetched(server) == ["tasks/task_1.json"] and kept._repaired()["count"] == 1


async def test_a_file_altered_after_it_was_scanned_is_found_by_the_next_scan(
    server: FakeServer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I4: the watch starts during the first scan and reports no earlier changes."""
    server.files |= {"tasks/task_1.json": b'{"id": 1}\n'}
    loop, scans = asyncio.get_running_loop(), 0

    class Deaf(FileWatcher):
        def add(self, directory: str, touched: Touched) -> None: ...
        def remove(self, directory: str, touched: Touched) -> None: ...

    async with looked_after(directory, Deaf()) as kept:
        care = kept._integrity_monitor
        assert care is not None

        def foreign(cache: Cache) -> list[str]:
            nonlocal scans
            scans += 1
            found = verify.foreign(cache)
            if scans == 1:
                (directory / "tasks/task_1.json").write_bytes(b"altered behind it\n")
                loop.call_soon_threadsafe(care.touched, None)
            return found

        monkeypatch.setattr(integrity_monitor, "foreign", foreign)
        care.touched(None)
        await until(lambda: scans > 0)
        await equal(directory, server)


async def test_an_unreadable_file_holds_up_no_other_repair(
    server: FakeServer, kept: Service, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreadable = "tasks/task_2.json"

    def digest(cache: Cache, path: str) -> bytes | None:
        if path == unreadable:
            raise StorageError("permission denied")
        return Cache.digest(cache, path)

    monkeypatch.setattr(integrity_monitor, "_RETRY_S", 0.1)
    monkeypatch.setattr(kept._replicator.cache, "digest", partial(digest, kept._replicator.cache))
    for path in (unreadable, "ids.json", "context.md"):
        with (directory / path).open("ab") as file:
            file.write(b"foreign")
    await until(lambda: {path for path, data in tree(directory).items() if data != server.files[path]} == {unreadable})
    monkeypatch.undo()
    await equal(directory, server)


@pytest.mark.parametrize("error", [ZeroDivisionError(), StorageError("remote.json is missing")])
async def test_a_repair_that_failed_is_repeated(
    server: FakeServer, kept: Service, directory: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    failed: list[object] = []

    async def repair(replicator: Replicator, paths: list[str]) -> ReceiveOutcome:
        if not failed:
            failed.append(paths)
            raise error
        return await Replicator.repair(replicator, paths)

    monkeypatch.setattr(integrity_monitor, "_RETRY_S", 0.1)
    monkeypatch.setattr(kept._replicator, "repair", partial(repair, kept._replicator))
    alter(directory)
    await until(lambda: bool(failed))
    await equal(directory, server)


async def test_edits_of_plans_and_notes_are_not_reverted(server: FakeServer, kept: Service, directory: Path) -> None:
    (directory / PLAN).write_bytes(b"# Plan\nmine\n")
    (directory / f"notes/{TASK}.md").write_bytes(b"note\n")
    (directory / f"plans/{TASK}.md.swp").write_bytes(b"an editor's")
    alter(directory)
    await until(lambda: kept._repaired()["count"] == 1)
    assert (directory / PLAN).read_bytes() == b"# Plan\nmine\n"
    assert (directory / f"notes/{TASK}.md").read_bytes() == b"note\n"
    await ask(kept, "push")
    await equal(directory, server)
    (directory / f"notes/{TASK}.md").unlink()
    await equal(directory, server)


async def test_a_plan_that_an_editor_recreates_is_an_edit(server: FakeServer, kept: Service, directory: Path) -> None:
    server.frames.clear()
    place = directory / PLAN
    place.unlink()
    place.write_bytes(b"# Plan\nmine\n")
    alter(directory)
    await equal_but(directory, server, PLAN)
    assert place.read_bytes() == b"# Plan\nmine\n" and PLAN not in fetched(server)


async def equal_but(directory: Path, server: FakeServer, path: str) -> None:
    await until(lambda: {**tree(directory), path: b""} == {**server.files, path: b""})


async def test_the_agent_finds_earlier_changes_at_its_start(server: FakeServer, directory: Path) -> None:
    server.files["context.md"] = b"# Ours\n"
    async with looked_after(directory):
        pass
    alter(directory)
    keep_what = directory / "context.md"
    keep_what.write_bytes(b"# Mine\n")
    create_a_task(directory)
    (directory / "config.json").unlink()
    async with looked_after(directory) as service:
        await equal(directory, server)
        await until(lambda: service._repaired()["count"] == 6)
        assert rescued(directory)["context.md"] == [b"# Mine\n"]
        assert rescued(directory)["tasks/task_1.json"] == [b'{"id": 9}\n']


async def test_a_text_written_by_hand_is_rescued_once_and_reported_until_dropped(
    server: FakeServer, kept: Service, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity_monitor, "STRAY_S", 0.0)
    for _ in range(2):
        (directory / "context.md").write_bytes(b"# Ours\nand mine\n")
        (directory / "plans/draft.md").write_bytes(b"a draft\n")
        (directory / "archive/plans/old.md").write_bytes(b"# Old, corrected\n")
        await equal(directory, server)
    assert rescued(directory) == {
        "context.md": [b"# Ours\nand mine\n"],
        "plans/draft.md": [b"a draft\n"],
        "archive/plans/old.md": [b"# Old, corrected\n"],
    }
    for _ in range(2):
        (said,) = (await ask(kept, "ready"))["notices"]  # type: ignore[misc]
        assert "lattice remote rescued" in said
    entries = (await ask(kept, "status"))["rescued"]
    await ask(kept, "rescued", action="drop", numbers=[entry["number"] for entry in entries])  # type: ignore[attr-defined]
    assert (await ask(kept, "ready"))["notices"] == [] and not rescued(directory)
    await run(kept, "nothing")
    assert tree(directory) == server.files


async def test_a_server_change_does_not_discard_a_text_written_by_hand(
    server: FakeServer, service: Service, directory: Path
) -> None:
    """Also for a command without the agent, which has no file watcher."""
    server.files["context.md"] = b"# Ours\n"
    await ready(service)
    (directory / "context.md").write_bytes(b"# Mine\n")
    server.put("context.md", b"# Ours, later\n")
    await until(lambda: (directory / "context.md").read_bytes() == b"# Ours, later\n")
    assert rescued(directory) == {"context.md": [b"# Mine\n"]}
    server.put("context.md", b"# Ours, later still\n")
    await until(lambda: (directory / "context.md").read_bytes() == b"# Ours, later still\n")
    assert rescued(directory) == {"context.md": [b"# Mine\n"]}


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("todo.txt", b"x" * 2 * 1024 * 1024),
        ("diagram.png", b"\x89PNG\0\1\2"),
        ("letter.txt", "Grüße".encode("latin-1")),
        ("plans/sketch.md", b"y" * 2 * 1024 * 1024),
        ("context.md", b"# Ours, and a picture \0\n"),
    ],
)
async def test_every_kind_of_foreign_content_is_rescued(
    server: FakeServer,
    kept: Service,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    content: bytes,
) -> None:
    monkeypatch.setattr(integrity_monitor, "STRAY_S", 0.0)
    (directory / path).write_bytes(content)
    await equal(directory, server)
    assert rescued(directory) == {path: [content]}


async def test_a_file_too_large_to_copy_is_moved(
    server: FakeServer, kept: Service, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rescued_files, "_MAX_READ_BYTES", 10)
    (directory / "context.md").write_bytes(b"more than ten bytes")
    (directory / "recording.wav").write_bytes(b"more than that again")
    await equal(directory, server)
    assert rescued(directory) == {"context.md": [b"more than ten bytes"], "recording.wav": [b"more than that again"]}


async def test_a_full_rescue_store_is_reported_and_nothing_is_overwritten(
    server: FakeServer, kept: Service, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MAX_FILES", 2)
    for number in range(5):
        (directory / f"{number}.txt").write_bytes(b"mine")
    await equal(directory, server)
    (notice,) = (await ask(kept, "ready"))["notices"]  # type: ignore[misc]
    assert len(rescued(directory)) == 2 and "3 later files were not kept" in notice


async def test_a_rescued_text_does_not_overwrite_another(server: FakeServer, service: Service, directory: Path) -> None:
    server.files["context.md"] = b"# Ours\n"
    await ready(service)
    for n in range(10):
        (directory / "context.md").write_bytes(f"mine {n}".encode())
        server.change(PutFile("context.md", f"theirs {n}".encode()))
        await until(lambda: tree(directory) == server.files)
    assert rescued(directory) == {"context.md": [f"mine {n}".encode() for n in range(10)]}


async def test_repairs_of_a_constantly_rewritten_file_back_off_and_name_its_writer(
    server: FakeServer, kept: Service, directory: Path
) -> None:
    server.frames.clear()
    place, stop = directory / "ids.json", asyncio.Event()

    async def rewrite() -> None:
        while not stop.is_set():
            if place.read_bytes() == server.files["ids.json"]:
                place.write_bytes(b"a stranger's\n")
            await asyncio.sleep(0.005)

    stranger = asyncio.ensure_future(rewrite())
    await until(lambda: bool(kept._repaired()["contested"]))
    began = len(fetched(server))
    alter(directory)  # other files are still repaired at once
    await until(lambda: (directory / "tasks/task_1.json").read_bytes() == server.files["tasks/task_1.json"])
    assert len(fetched(server)) - began <= 3
    assert kept._repaired()["contested"] == ["ids.json"]
    stop.set()
    await stranger
    await equal(directory, server, 30)
    notices = (await ask(kept, "ready"))["notices"]
    assert [n for n in notices if "another process keeps writing ids.json" in n]  # type: ignore[attr-defined]


async def test_changes_during_a_server_outage_are_repaired_afterwards(
    server: FakeServer, kept: Service, directory: Path
) -> None:
    await server.stop()
    await until(lambda: not kept._connection.is_open)
    alter(directory)
    delete(directory)
    await server.start()
    kept._connection.kick()
    await equal(directory, server)


async def test_without_a_file_watcher_files_are_compared_periodically(
    server: FakeServer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_more(*_: object, **__: object) -> None:
        raise OSError('OS file watch limit reached. about ["/x"]')

    monkeypatch.setattr("watchfiles.watch", no_more)
    monkeypatch.setattr(integrity_monitor, "_MIN_RESCAN_S", 0.2)
    async with looked_after(directory) as service:
        await until(lambda: "watch limit" in service._repaired()["watched"])
        alter(directory)
        await equal(directory, server)
        assert "compared every" in service._repaired()["watched"]


async def test_a_file_name_that_is_not_utf8_does_not_stop_the_watcher(
    server: FakeServer, kept: Service, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library stops at such a name. Changes of other files must still be noticed."""
    monkeypatch.setattr(file_watcher, "_AGAIN_S", 0.2)
    monkeypatch.setattr(integrity_monitor, "_MIN_RESCAN_S", 0.2)
    (directory / os.fsdecode(b"caf\xe9.md")).write_bytes(b"x")
    alter(directory)
    await equal(directory, server)
    await until(lambda: kept._repaired()["watched"] == "the system reports changes")
    alter(directory)
    await equal(directory, server)


async def test_a_resync_counts_as_a_comparison(server: FakeServer, directory: Path) -> None:
    async with looked_after(directory) as service:
        assert sum(isinstance(frame, Manifest) for frame in server.frames) == 1
        await ask(service, "verify")


def test_the_repair_delay_grows_with_each_change(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(verify.time, "monotonic", lambda: now[0])
    found = RepairSchedule()
    waits = []
    for _ in range(12):
        found.suspect(["x"])
        waits.append(found.next_due_s())
        now[0] += waits[-1] or 0.0
        assert found.take_due(1) == ["x"] and found.next_due_s() is None
        found.repaired("x")
    assert waits == [0, 0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60]
    now[0] += 601
    assert found.contested() == []
    found.suspect(["x"])
    assert found.next_due_s() == 0


PATHS = [f"{top}/task_{n}{end}" for n in range(6) for top, end in (("tasks", ".json"), ("events", ".jsonl"))]
PATHS += ["ids.json", "context.md", f"notes/{TASK}.md", PLAN]


def harm_at_random(rng: random.Random, directory: Path) -> None:
    """Damage one file of the cache at random. Plans and notes are only removed."""
    place = directory / rng.choice(PATHS)
    data = rng.randbytes(rng.randrange(1, 60)).hex().encode()
    with contextlib.suppress(OSError):
        match "remove" if place.suffix == ".md" and place.parent.name else rng.choice(HARMS):
            case "alter":
                place.write_bytes(data)
            case "append":
                with place.open("ab") as file:
                    file.write(data)
            case "truncate":
                os.truncate(place, rng.randrange(max(1, place.stat().st_size)))
            case "remove":
                place.unlink()
            case "replace":
                place.with_suffix(".tmp").write_bytes(data)
                place.with_suffix(".tmp").rename(place)
            case "swap":
                place.rename(directory / rng.choice(PATHS[:12]))
            case "link":
                place.unlink()
                place.symlink_to(directory.parent / "elsewhere")
            case "empty directory":
                place.unlink()
                place.mkdir()
            case "directory":
                shutil.rmtree(place.parent) if place.parent != directory else place.unlink()


HARMS = ["alter", "append", "truncate", "remove", "replace", "swap", "link", "directory", "empty directory"]


def change_at_random(rng: random.Random, server: FakeServer) -> None:
    path = rng.choice(PATHS)
    data = rng.randbytes(rng.randrange(1, 60)).hex().encode() + b"\n"
    match rng.randrange(5):
        case 0 if path in server.files:
            server.change(DeleteFile(path))
        case 1 if path in server.files and "/" in path:
            server.change(MoveFile(path, f"archive/{path}", digest_of(server.files[path])))
        case 2 | 3:
            server.append(path, data)
        case _:
            server.put(path, data)


@pytest.mark.parametrize("seed", range(4))
async def test_the_cache_converges_after_random_damage_during_changes(
    server: FakeServer, kept: Service, directory: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(verify, "_MAX_DELAY_S", 0.2)
    monkeypatch.setattr(verify, "_CONFIRM_S", 0.1)
    rng = random.Random(seed)
    for _ in range(150):
        match rng.randrange(12):
            case 0 | 1 | 2 | 3:
                harm_at_random(rng, directory)
            case 4:
                server.cut()
            case 5:
                kept._connection.kick()
                sibling = Service(str(directory))
                sibling.start(TOKEN)
                await sibling.handle({"do": "ready", "token": TOKEN}, lambda _: None)
                await sibling.close()
            case 6:
                await asyncio.sleep(rng.random() * 0.2)  # a random moment, not a wait for a condition
            case _:
                change_at_random(rng, server)
        await asyncio.sleep(0)
    kept._connection.kick()
    await equal(directory, server, 20)
    assert kept.cache.is_whole() and kept._replicator.edits.scan() == []


# --- removal of the directory ---


PYTHON_REMOVER = """
import shutil, sys

def fail(function, path, error):
    if not isinstance(error, FileNotFoundError):
        raise error

shutil.rmtree(sys.argv[1], onexc=fail)
"""
"""A name that disappears is no failure: ``rm``, git and Python 3.13 ignore it, Python 3.12 doesn't by itself."""
REMOVERS = {
    "rm": ["rm", "-rf"],
    "git": ["git", "-C", "repository", "worktree", "remove", "--force"],
    "python": [sys.executable, "-c", PYTHON_REMOVER],
}


@pytest.mark.parametrize("remover", REMOVERS)
async def test_nothing_is_created_in_a_directory_that_is_being_removed(
    server: FakeServer, tmp_path: Path, remover: str
) -> None:
    """``rm -rf`` lists each directory once and fails if a name is added later."""
    git = partial(subprocess.run, check=True, capture_output=True, cwd=tmp_path)
    git(["git", "init", "-q", "repository"])
    commit = ["-c", "user.name=ana", "-c", "user.email=ana@example.org", "commit", "-q", "--allow-empty", "-m", "one"]
    git(["git", "-C", "repository", *commit])
    outcomes = []
    for n in range(REMOVALS):
        server.files = {f"{folder}/old_{k}.md": b"{}\n" for folder in ("tasks", "events", "plans") for k in range(50)}
        git(["git", "-C", "repository", "worktree", "add", "-q", "--detach", tmp_path / f"work{n}"])
        directory = make_cache(tmp_path / f"work{n}", server.url)
        async with looked_after(directory):
            changing = asyncio.ensure_future(_change_without_end(server, n))
            await until((directory / f"tasks/new_{n}_3.json").exists)
            process = await asyncio.create_subprocess_exec(
                *REMOVERS[remover], directory.parent, stderr=subprocess.PIPE, cwd=tmp_path
            )
            outcomes.append((await process.communicate())[1].decode())
            changing.cancel()
        assert not directory.parent.exists() or outcomes[-1], "it came back"
    assert outcomes == [""] * REMOVALS


async def _change_without_end(server: FakeServer, n: int) -> None:
    for number in itertools.count():
        for path in (f"tasks/new_{n}_{number}.json", f"events/new_{n}_{number}.jsonl", f"plans/x_{n}_{number}.md"):
            server.put(path, b"{}\n")
        server.put("ids.json", b"%d\n" % number)
        await asyncio.sleep(0.001)


async def test_a_removed_directory_is_restored_once_no_program_changes_it(
    server: FakeServer, kept: Service, directory: Path
) -> None:
    for path in ("tasks", "events", ".remote/base/plans", ".remote/tmp"):
        shutil.rmtree(directory / path)
    (directory / "cache_state.json").unlink()
    server.put("tasks/task_9.json", b"{}\n")
    await equal(directory, server, 10.0)
    await until((directory / "cache_state.json").exists)


async def test_a_repair_that_cannot_be_written_is_reported_and_repeated(
    server: FakeServer, kept: Service, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example on a full disk: reads report it, and the repair continues once there is space."""

    def full(path: str, data: bytes) -> None:
        raise StorageError("cannot write the cache: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(kept.cache, "store", full)
        (directory / "context.md").write_bytes(b"# Mine\n")
        await until(lambda: kept._replicator.trouble is not None)
        assert "No space left" in str((await ask(kept, "ready"))["message"])
        assert (directory / "context.md").read_bytes() == b"# Mine\n"
    await equal(directory, server, 15.0)
    assert rescued(directory) == {"context.md": [b"# Mine\n"]}
