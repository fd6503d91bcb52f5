"""One effect at a time: what is written, rescued, blocked or left alone. No server."""

import os
from pathlib import Path
from typing import cast

import pytest
from client_kit import PLAN, TASK, make_cache, rescued

from lattice_remote.client.cache.cache import Cache
from lattice_remote.client.cache.edits import Edits
from lattice_remote.client.cache.effect_writer import EffectWriter
from lattice_remote.client.cache.rescued_files import RescuePolicy
from lattice_remote.client.cache.verify import RepairSchedule
from lattice_remote.client.config import read_remote
from lattice_remote.errors import ProtocolError
from lattice_remote.protocol.effects import Effect
from lattice_remote.protocol.messages import Part
from lattice_remote.protocol.operations import DeleteFile, MoveFile, PutFile, digest_of
from lattice_remote.protocol.replica import Replica

EVENTS = f"events/{TASK}.jsonl"
SNAPSHOT = f"tasks/{TASK}.json"


class Drifts:
    """Stands for the replica: records which paths are to be fetched, and which are blocked."""

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.blocked: list[str] = []

    def drifted(self, paths: list[str]) -> list[Effect]:
        self.fetched += paths
        return []

    def block(self, path: str) -> None:
        self.blocked.append(path)


class Place:
    """A cache with its writer, and which texts were reported as perhaps edited."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cache = Cache(str(directory), read_remote(str(directory)))
        self.cache.prepare()
        self.policy, self.repairs = RescuePolicy(self.cache), RepairSchedule()
        self.edits = Edits(self.cache)
        self.writer = EffectWriter(self.cache, self.edits, self.policy, self.repairs)
        self.reported: list[str] = []
        self.writer.on_edits = self.reported.extend
        self.drifts = Drifts()
        self.replica = cast(Replica, self.drifts)

    def holds(self, path: str, data: bytes) -> None:
        """Have a file, as the server sent it."""
        self.cache.replace(path, data)
        self.writer.mark_synced([path])

    def write(self, path: str, data: bytes) -> None:
        """Write as another program does."""
        place = self.directory / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)

    async def receive(self, *parts: Part) -> list[Effect]:
        return await self.writer.write_parts(parts, self.replica)

    def inode(self, path: str) -> int:
        return os.stat(self.directory / path).st_ino


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(make_cache(tmp_path / "ana", "http://127.0.0.1:1"))


def part(path: str, data: bytes, *, offset: int = 0, end: int | None = None) -> Part:
    return Part(path, 1, len(data), digest_of(data), offset, data[offset:end])


# --- parts of files ---


@pytest.mark.parametrize(
    ("digest", "is_as_found", "stays"), [(b"{}", True, True), (b"[]", True, False), (b"{}", False, False)]
)
async def test_a_file_that_was_only_touched_is_not_written(
    place: Place, digest: bytes, is_as_found: bool, stays: bool
) -> None:
    place.holds(SNAPSHOT, b"{}")
    os.utime(place.directory / SNAPSHOT)
    found = place.cache.signature(SNAPSHOT)
    assert found is not None and not place.cache.known.agrees(SNAPSHOT, found)
    place.repairs.strange[SNAPSHOT] = (found if is_as_found else (0, *found[1:]), digest_of(digest))
    inode = place.inode(SNAPSHOT)
    assert await place.receive(part(SNAPSHOT, b"{}")) == []
    assert (place.inode(SNAPSHOT) == inode) == stays
    assert place.cache.known.agrees(SNAPSHOT, place.cache.signature(SNAPSHOT))
    assert place.repairs.strange == {} and place.repairs.count == (digest != b"{}"), "only a changed file is a repair"


async def test_a_missing_file_is_written(place: Place) -> None:
    place.repairs.strange[SNAPSHOT] = (None, None)
    await place.receive(part(SNAPSHOT, b"{}"))
    assert place.cache.read(SNAPSHOT) == b"{}" and place.repairs.last_path == SNAPSHOT


async def test_parts_that_never_form_the_file_end_the_connection(place: Place) -> None:
    wrong = Part(SNAPSHOT, 1, 2, b"0" * 32, 0, b"{}")
    for count in range(1, 5):
        await place.receive(wrong)
        assert place.drifts.fetched == [SNAPSHOT] * count
    await place.receive(part(EVENTS, b"{}\n"))
    with pytest.raises(ProtocolError, match=SNAPSHOT):
        await place.receive(wrong)


async def test_parts_that_form_the_file_after_all_are_forgiven(place: Place) -> None:
    wrong = Part(SNAPSHOT, 1, 2, b"0" * 32, 0, b"{}")
    for _ in range(3):
        for _ in range(4):
            await place.receive(wrong)
        await place.receive(part(SNAPSHOT, b"{}", end=1), part(SNAPSHOT, b"{}", offset=1))
    assert place.cache.read(SNAPSHOT) == b"{}" and not place.writer.misfits


async def test_a_text_comes_in_parts_and_is_its_own_base(place: Place) -> None:
    data = b"# Plan\n"
    await place.receive(part(PLAN, data, end=3))
    assert place.cache.size(PLAN) is None and place.edits.base(PLAN) is None
    await place.receive(part(PLAN, data, offset=3))
    assert place.cache.read(PLAN) == place.edits.base(PLAN) == data
    assert set(place.reported) == {PLAN} and not place.drifts.blocked


async def test_an_edited_text_is_not_replaced_by_parts(place: Place) -> None:
    place.holds(PLAN, b"old\n")
    place.write(PLAN, b"old\nmine\n")
    await place.receive(part(PLAN, b"new\n"))
    assert place.cache.read(PLAN) == b"old\nmine\n" and place.edits.base(PLAN) == b"old\n"
    assert place.drifts.blocked == [PLAN] == place.reported and place.drifts.fetched == []


async def test_parts_of_a_text_that_do_not_form_it_are_fetched_again(place: Place) -> None:
    place.holds(PLAN, b"old\n")
    await place.receive(Part(PLAN, 1, 4, b"0" * 32, 0, b"new\n"))
    assert place.drifts.fetched == [PLAN] and place.drifts.blocked == []
    assert place.cache.read(PLAN) == b"old\n"


async def test_a_link_that_is_replaced_is_named_with_its_target(place: Place, tmp_path: Path) -> None:
    target = tmp_path / "mine.md"
    target.write_text("mine")
    (place.directory / "plans").mkdir(exist_ok=True)
    (place.directory / PLAN).symlink_to(target)
    await place.receive(part(PLAN, b"new\n"))
    (notice,) = place.policy.notices
    assert PLAN in notice and str(target) in notice
    assert target.read_text() == "mine" and not (place.directory / PLAN).is_symlink()
    await place.receive(part(PLAN, b"newer\n"))
    assert place.policy.notices == [notice], "a plain file is no link"


async def test_a_file_that_is_rewritten_again_and_again_is_named_once(place: Place) -> None:
    for number in range(6):
        place.holds(SNAPSHOT, b"{}")
        place.write(SNAPSHOT, b"%d" % number)
        place.repairs.strange[SNAPSHOT] = (place.cache.signature(SNAPSHOT), digest_of(b"%d" % number))
        await place.receive(part(SNAPSHOT, b"{}"))
    assert [SNAPSHOT in notice for notice in place.policy.notices] == [True]
    assert place.repairs.count == 6 and place.repairs.contested() == [SNAPSHOT]


# --- what is rescued ---


async def test_a_strange_file_is_rescued_before_it_is_replaced(place: Place) -> None:
    place.holds(SNAPSHOT, b"{}")
    place.holds("config.json", b"{}")
    for path in (SNAPSHOT, "config.json"):
        place.write(path, b"theirs")
    place.repairs.strange[SNAPSHOT] = (place.cache.signature(SNAPSHOT), digest_of(b"theirs"))
    await place.receive(part(SNAPSHOT, b"{}"), part("config.json", b"[]"))
    assert rescued(place.directory) == {SNAPSHOT: [b"theirs"], "config.json": [b"theirs"]}


def test_a_file_of_the_server_is_replaced_without_a_rescue(place: Place) -> None:
    place.holds(SNAPSHOT, b"{}")
    place.repairs.strange[SNAPSHOT] = (place.cache.signature(SNAPSHOT), digest_of(b"{}"))
    place.writer.keep([SNAPSHOT, "tasks/missing.json"])
    assert rescued(place.directory) == {}


def test_events_that_the_server_lacks_are_rescued(place: Place) -> None:
    place.holds(EVENTS, b'{"id":"ev_1"}\n{"id":"ev_2"}\n')
    place.writer.keep([EVENTS])
    place.writer.keep([EVENTS], b'{"id":"ev_1"}\n{"id":"ev_2"}\n{"id":"ev_3"}\n')
    assert rescued(place.directory) == {}, "not known, or nothing missing"
    place.writer.keep([EVENTS], b'{"id":"ev_1"}\n')
    assert rescued(place.directory) == {EVENTS: [b'{"id":"ev_1"}\n{"id":"ev_2"}\n']}


# --- operations ---


def test_a_put_of_the_same_text_as_a_local_edit_settles_it(place: Place) -> None:
    place.holds(PLAN, b"old\n")
    place.write(PLAN, b"mine\n")
    place.writer.apply([PutFile(PLAN, b"mine\n")], place.replica)
    assert place.edits.base(PLAN) == b"mine\n" and not place.edits.is_edited(PLAN)
    assert place.drifts.blocked == [] and place.reported == [PLAN]


def test_an_edited_text_is_blocked_and_an_unedited_one_replaced(place: Place) -> None:
    other = PLAN.replace("plans/", "notes/")
    for path in (PLAN, other):
        place.holds(path, b"old\n")
    place.write(PLAN, b"mine\n")
    place.writer.apply([PutFile(PLAN, b"new\n"), PutFile(other, b"new\n")], place.replica)
    assert place.cache.read(PLAN) == b"mine\n" and place.cache.read(other) == b"new\n"
    assert place.drifts.blocked == [PLAN] and place.reported == [PLAN, other]


def test_an_edited_text_stays_where_its_task_is_archived(place: Place) -> None:
    archived = f"archive/{PLAN}"
    place.holds(PLAN, b"old\n")
    place.write(PLAN, b"mine\n")
    place.writer.apply([MoveFile(PLAN, archived, digest_of(b"old\n"))], place.replica)
    assert place.cache.read(PLAN) == b"mine\n" and place.drifts.blocked == [PLAN] == place.reported
    assert place.drifts.fetched == [archived], "its text is the server's"


def test_an_edited_text_stays_where_its_task_comes_back(place: Place) -> None:
    archived = f"archive/{PLAN}"
    place.holds(archived, b"old\n")
    place.holds(PLAN, b"older\n")
    place.write(PLAN, b"mine\n")
    place.writer.apply([MoveFile(archived, PLAN, digest_of(b"old\n"))], place.replica)
    assert place.cache.read(PLAN) == b"mine\n" and place.drifts.blocked == [PLAN] == place.reported
    assert place.cache.size(archived) is None and place.drifts.fetched == []


def test_an_operation_on_a_missing_file_has_it_fetched(place: Place) -> None:
    place.writer.apply([MoveFile("tasks/missing.json", "archive/tasks/missing.json", digest_of(b"{}"))], place.replica)
    assert place.drifts.fetched == ["archive/tasks/missing.json"]
    place.writer.apply([DeleteFile("tasks/missing.json")], place.replica)
    assert place.drifts.fetched == ["archive/tasks/missing.json"]


# --- removal ---


def test_an_edited_text_is_not_removed(place: Place) -> None:
    place.holds(PLAN, b"old\n")
    place.write(PLAN, b"mine\n")
    place.writer.remove(PLAN, place.replica)
    assert place.cache.read(PLAN) == b"mine\n"
    assert (place.drifts.blocked, place.reported) == ([PLAN], [PLAN])


def test_an_unedited_text_is_removed_with_its_base(place: Place) -> None:
    place.holds(PLAN, b"old\n")
    place.writer.remove(PLAN, place.replica)
    assert place.cache.size(PLAN) is None and place.edits.base(PLAN) is None
    assert rescued(place.directory) == {} and place.drifts.blocked == []


def test_a_text_of_no_task_is_rescued_and_removed(place: Place) -> None:
    place.cache.known.settle([])
    place.write(PLAN, b"mine\n")
    assert place.writer.is_orphan(PLAN)
    place.writer.remove(PLAN, place.replica)
    assert place.cache.size(PLAN) is None and rescued(place.directory) == {PLAN: [b"mine\n"]}
    assert place.drifts.blocked == []


# --- files of other programs ---


def test_a_file_is_strange_when_another_program_wrote_it(place: Place) -> None:
    place.holds(SNAPSHOT, b"{}")
    place.holds(PLAN, b"old\n")
    place.cache.known.settle(
        (path, signature) for path in (SNAPSHOT, PLAN) if (signature := place.cache.signature(path)) is not None
    )
    assert not place.writer.is_strange(SNAPSHOT) and not place.writer.is_strange(PLAN)
    place.write(SNAPSHOT, b"[]")
    place.write(PLAN, b"mine\n")
    assert place.writer.is_strange(SNAPSHOT)
    assert not place.writer.is_strange(PLAN), "an edit"
    (place.directory / PLAN).unlink()
    assert place.writer.is_strange(PLAN), "a removed text is restored"
    place.write("plans/task_01HZZZZZZZZZZZZZZZZZZZZZZX.md", b"of no task")
    assert place.writer.is_strange("plans/task_01HZZZZZZZZZZZZZZZZZZZZZZX.md")
