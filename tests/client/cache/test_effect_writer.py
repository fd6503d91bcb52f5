"""Effect writer, one effect at a time and without a server: writes, rescues, blocked and skipped files."""

import os
from pathlib import Path
from typing import cast

import pytest
from client_kit import PLAN, TASK, make_cache, rescued

from lattice_remote.client.cache.cache import Cache
from lattice_remote.client.cache.edits import Edits
from lattice_remote.client.cache.effect_writer import EffectWriter
from lattice_remote.client.cache.rescued_files import LOST, RESTORED, RescuePolicy
from lattice_remote.client.cache.verify import RepairSchedule
from lattice_remote.client.config import read_remote
from lattice_remote.errors import ProtocolError
from lattice_remote.protocol.messages import Part
from lattice_remote.protocol.operations import AnnounceFile, DeleteFile, MoveFile, Operation, PutFile, digest_of
from lattice_remote.protocol.replica import Effect, Replica

EVENTS = f"events/{TASK}.jsonl"
SNAPSHOT = f"tasks/{TASK}.json"


class Drifts:
    """Substitute for the replica. Records the paths to fetch and the blocked paths."""

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.blocked: list[str] = []

    def drifted(self, paths: list[str]) -> list[Effect]:
        self.fetched += paths
        return []

    def block(self, path: str) -> None:
        self.blocked.append(path)


class Place:
    """A cache with its writer. ``reported`` lists the texts that may be edited."""

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
        """Store a file as received from the server."""
        self.cache.replace(path, data)
        self.writer.mark_synced([path])

    def write(self, path: str, data: bytes) -> None:
        """Write a file as another program does."""
        place = self.directory / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)

    async def receive(self, *parts: Part) -> list[Effect]:
        return await self.writer.write_parts(parts, self.replica)

    def know_all(self) -> None:
        """Record the signatures of all files, as after a comparison."""
        found = {path: self.cache.signature(path) for path in self.cache.paths()}
        self.cache.known.settle((path, signature) for path, signature in found.items() if signature is not None)
        self.cache.known.is_complete = True

    def reasons(self) -> list[str]:
        return [entry.reason for entry in self.policy.rescued.entries()]

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
async def test_a_touched_file_is_not_written(place: Place, digest: bytes, is_as_found: bool, stays: bool) -> None:
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


async def test_a_completed_file_resets_the_count_of_wrong_parts(place: Place) -> None:
    wrong = Part(SNAPSHOT, 1, 2, b"0" * 32, 0, b"{}")
    for _ in range(3):
        for _ in range(4):
            await place.receive(wrong)
        await place.receive(part(SNAPSHOT, b"{}", end=1), part(SNAPSHOT, b"{}", offset=1))
    assert place.cache.read(SNAPSHOT) == b"{}" and not place.writer.misfits


async def test_a_text_received_in_parts_is_its_own_base(place: Place) -> None:
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


async def test_a_replaced_link_is_reported_with_its_target(place: Place, tmp_path: Path) -> None:
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


async def test_a_repeatedly_rewritten_file_is_reported_once(place: Place) -> None:
    for number in range(6):
        place.holds(SNAPSHOT, b"{}")
        place.write(SNAPSHOT, b"%d" % number)
        place.repairs.strange[SNAPSHOT] = (place.cache.signature(SNAPSHOT), digest_of(b"%d" % number))
        await place.receive(part(SNAPSHOT, b"{}"))
    assert [SNAPSHOT in notice for notice in place.policy.notices] == [True]
    assert place.repairs.count == 6 and place.repairs.contested() == [SNAPSHOT]


# --- rescues ---


async def test_a_foreign_file_is_rescued_before_it_is_replaced(place: Place) -> None:
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


def test_a_put_of_the_text_of_a_local_edit_settles_the_edit(place: Place) -> None:
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


def test_an_edited_text_stays_when_its_task_is_archived(place: Place) -> None:
    archived = f"archive/{PLAN}"
    place.holds(PLAN, b"old\n")
    place.write(PLAN, b"mine\n")
    place.writer.apply([MoveFile(PLAN, archived, digest_of(b"old\n"))], place.replica)
    assert place.cache.read(PLAN) == b"mine\n" and place.drifts.blocked == [PLAN] == place.reported
    assert place.drifts.fetched == [archived], "its text is the server's"


def test_an_edited_text_stays_when_its_task_is_unarchived(place: Place) -> None:
    archived = f"archive/{PLAN}"
    place.holds(archived, b"old\n")
    place.holds(PLAN, b"older\n")
    place.write(PLAN, b"mine\n")
    place.writer.apply([MoveFile(archived, PLAN, digest_of(b"old\n"))], place.replica)
    assert place.cache.read(PLAN) == b"mine\n" and place.drifts.blocked == [PLAN] == place.reported
    assert place.cache.size(archived) is None and place.drifts.fetched == []


def test_an_operation_on_a_missing_file_fetches_it(place: Place) -> None:
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


def test_a_text_without_a_task_is_rescued_and_removed(place: Place) -> None:
    place.know_all()
    place.write(PLAN, b"mine\n")
    assert place.writer.is_orphan(PLAN)
    place.writer.remove(PLAN, place.replica)
    assert place.cache.size(PLAN) is None and rescued(place.directory) == {PLAN: [b"mine\n"]}
    assert place.drifts.blocked == []


# --- files of other programs ---


def test_a_file_is_foreign_if_another_program_wrote_it(place: Place) -> None:
    place.holds(SNAPSHOT, b"{}")
    place.holds(PLAN, b"old\n")
    place.know_all()
    assert not place.writer.is_strange(SNAPSHOT) and not place.writer.is_strange(PLAN)
    place.write(SNAPSHOT, b"[]")
    place.write(PLAN, b"mine\n")
    assert place.writer.is_strange(SNAPSHOT)
    assert not place.writer.is_strange(PLAN), "an edit"
    (place.directory / PLAN).unlink()
    assert place.writer.is_strange(PLAN), "a removed text is restored"
    place.write("plans/task_01HZZZZZZZZZZZZZZZZZZZZZZX.md", b"of no task")
    assert place.writer.is_strange("plans/task_01HZZZZZZZZZZZZZZZZZZZZZZX.md")


@pytest.mark.parametrize("is_complete", [True, False])
def test_a_text_copied_with_its_base_is_foreign_if_all_files_are_known(place: Place, is_complete: bool) -> None:
    place.holds(SNAPSHOT, b"{}")
    place.holds(PLAN, b"new\n")
    place.know_all()
    place.cache.known.is_complete = is_complete
    for path in (PLAN, f".remote/base/{PLAN}"):
        place.write(path, b"earlier\n")
    assert not place.edits.is_edited(PLAN)
    assert place.writer.is_strange(PLAN) == is_complete


def test_a_text_is_without_a_task_only_if_all_files_are_known(place: Place) -> None:
    place.know_all()
    place.write(PLAN, b"mine\n")
    place.cache.known.is_complete = False
    assert not place.writer.is_orphan(PLAN)
    place.cache.known.is_complete = True
    assert place.writer.is_orphan(PLAN)
    place.holds(SNAPSHOT, b"{}")
    assert not place.writer.is_orphan(PLAN)


@pytest.mark.parametrize(
    ("is_complete", "is_reported", "is_rescued"),
    [(True, False, True), (False, True, True), (False, False, False)],
)
def test_a_snapshot_is_rescued_if_another_program_is_known_to_have_written_it(
    place: Place, is_complete: bool, is_reported: bool, is_rescued: bool
) -> None:
    place.holds(SNAPSHOT, b"{}")
    place.know_all()
    place.cache.known.is_complete = is_complete
    place.writer.keep([SNAPSHOT])
    assert rescued(place.directory) == {}, "it is the server's"
    place.write(SNAPSHOT, b"theirs")
    if is_reported:
        place.repairs.strange[SNAPSHOT] = (place.cache.signature(SNAPSHOT), digest_of(b"theirs"))
    place.writer.keep([SNAPSHOT])
    assert rescued(place.directory) == ({SNAPSHOT: [b"theirs"]} if is_rescued else {})


def test_an_edited_text_is_not_rescued(place: Place) -> None:
    place.holds(PLAN, b"old\n")
    place.know_all()
    place.write(PLAN, b"mine\n")
    place.writer.keep([PLAN])
    assert rescued(place.directory) == {}, "an edit is sent"


@pytest.mark.parametrize(
    ("is_complete", "is_strange", "after", "reason"),
    [
        (True, False, b'{"id":"ev_1"}\n', LOST),
        (False, False, b"", LOST),
        (False, False, b'{"id":"ev_1"}\n', RESTORED),
        (True, True, b'{"id":"ev_1"}\n', RESTORED),
    ],
)
def test_events_that_the_server_had_before_are_lost_others_are_restored(
    place: Place, is_complete: bool, is_strange: bool, after: bytes, reason: str
) -> None:
    place.holds(EVENTS, b'{"id":"ev_1"}\n{"id":"ev_2"}\n')
    place.know_all()
    place.cache.known.is_complete = is_complete
    if is_strange:
        place.write(EVENTS, b'{"id":"ev_1"}\n{"id":"ev_2"}\n{"id":"ev_3"}\n')
    place.writer.keep([EVENTS], after)
    assert place.reasons() == [reason]


async def test_events_are_compared_with_a_whole_content_only(place: Place) -> None:
    place.holds(EVENTS, b'{"id":"ev_1"}\n{"id":"ev_2"}\n')
    shorter = b'{"id":"ev_1"}\n'
    await place.receive(part(EVENTS, shorter, end=3))
    assert rescued(place.directory) == {}
    await place.receive(part(EVENTS, shorter, offset=3))
    assert place.cache.read(EVENTS) == shorter and rescued(place.directory) == {}
    place.holds(EVENTS, b'{"id":"ev_1"}\n{"id":"ev_2"}\n')
    await place.receive(part(EVENTS, shorter))
    assert list(rescued(place.directory)) == [EVENTS]


def test_a_changed_snapshot_is_rescued_before_operations_that_replace_or_remove_it(place: Place) -> None:
    other = SNAPSHOT.replace("ZZ.json", "ZX.json")
    for path in (SNAPSHOT, other, "config.json"):
        place.holds(path, b"{}")
    place.know_all()
    for path in (SNAPSHOT, other, "config.json"):
        place.write(path, b"theirs")
    operations: list[Operation] = [PutFile(SNAPSHOT, b"[]"), DeleteFile(other), PutFile("config.json", b"[]")]
    place.writer.apply((operation for operation in operations), place.replica)
    assert rescued(place.directory) == {path: [b"theirs"] for path in (SNAPSHOT, other, "config.json")}
    assert place.cache.read(SNAPSHOT) == place.cache.read("config.json") == b"[]" and place.cache.size(other) is None
    assert not place.writer.is_strange(SNAPSHOT) and not place.writer.is_strange("config.json")


def test_files_written_by_an_operation_are_the_servers(place: Place) -> None:
    place.holds("config.json", b"{}")
    place.writer.apply([PutFile("config.json", b"[]")], place.replica)
    place.writer.keep(["config.json"], b"{}")
    assert rescued(place.directory) == {}


@pytest.mark.parametrize("brings", [MoveFile, PutFile, AnnounceFile, None])
def test_events_of_an_archived_task_are_not_lost(place: Place, brings: type[Operation] | None) -> None:
    events, archived = b'{"id":"ev_1"}\n', f"archive/{EVENTS}"
    place.holds(EVENTS, events)
    operations: dict[type[Operation] | None, list[Operation]] = {
        MoveFile: [MoveFile(EVENTS, archived, digest_of(events))],
        PutFile: [PutFile(archived, events), DeleteFile(EVENTS)],
        AnnounceFile: [DeleteFile(EVENTS), AnnounceFile(archived, len(events), digest_of(events))],
        None: [DeleteFile(EVENTS)],
    }
    place.writer.apply(operations[brings], place.replica)
    assert place.cache.size(EVENTS) is None
    assert place.reasons() == ([LOST] if brings is None else [])


def test_a_link_that_an_operation_replaces_is_reported(place: Place, tmp_path: Path) -> None:
    place.holds(PLAN, b"old\n")
    target = tmp_path / "mine.md"
    target.write_text("mine")
    (place.directory / PLAN).unlink()
    (place.directory / PLAN).symlink_to(target)
    place.writer.apply([PutFile(PLAN, b"new\n")], place.replica)
    assert [str(target) in notice for notice in place.policy.notices] == [True]
    assert target.read_text() == "mine" and place.cache.read(PLAN) == b"new\n"


def test_a_removed_snapshot_is_rescued_if_another_program_wrote_it(place: Place) -> None:
    place.holds(SNAPSHOT, b"{}")
    place.know_all()
    place.write(SNAPSHOT, b"theirs")
    place.writer.remove(SNAPSHOT, place.replica)
    assert place.cache.size(SNAPSHOT) is None and rescued(place.directory) == {SNAPSHOT: [b"theirs"]}
    assert not place.writer.is_strange(SNAPSHOT), "removed as the server has it"


async def test_a_restored_text_is_a_repair(place: Place) -> None:
    place.holds(PLAN, b"old\n")
    (place.directory / PLAN).unlink()
    place.repairs.strange[PLAN] = (None, None)
    await place.receive(part(PLAN, b"old\n"))
    assert place.repairs.strange == {} and (place.repairs.count, place.repairs.last_path) == (1, PLAN)
    place.write(PLAN, b"old\nmine\n")
    assert place.edits.base(PLAN) == b"old\n" and place.edits.is_edited(PLAN)


def test_nothing_is_fetched_after_matching_operations(place: Place) -> None:
    def fail(_: list[str]) -> list[Effect]:
        raise AssertionError("nothing has drifted")

    place.drifts.drifted = fail  # type: ignore[method-assign]
    assert place.writer.apply([PutFile(SNAPSHOT, b"{}")], place.replica) == []
