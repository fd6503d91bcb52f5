"""The replicator with real files and a server in memory, frame by frame: writes, stored state, sharing."""

import asyncio
import contextlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
from client_kit import PLAN, TASK, make_cache, rescued

from lattice_remote.client.cache import replicator as replicator_module
from lattice_remote.client.cache.cache import STATE_FILE, Cache
from lattice_remote.client.cache.fingerprints import STORED
from lattice_remote.client.cache.replicator import ReceiveOutcome, Replicator, RequestOnlySession
from lattice_remote.client.config import read_remote
from lattice_remote.conformance.scripted_server import (
    Files,
    InMemoryConnection,
    InMemoryServer,
    delta,
    received,
)
from lattice_remote.errors import ConnectionFailed, StorageError
from lattice_remote.protocol.messages import Fetch, Hello, Put, Reply, encode
from lattice_remote.protocol.operations import Content, digest_of
from lattice_remote.protocol.replica import LARGE_BYTES, State

SNAPSHOT, EVENTS = f"tasks/{TASK}.json", f"events/{TASK}.jsonl"
ARTIFACT = "artifacts/payload/art_01HZZZZZZZZZZZZZZZZZZZZZZZ/large.bin"
FILES: Files = {SNAPSHOT: b"{}\n", EVENTS: b"{}\n", PLAN: b"# Plan\n", "config.json": b"{}"}


class Follower:
    """A process that follows a server in memory."""

    def __init__(self, server: InMemoryServer, directory: Path) -> None:
        self.server, self.directory = server, directory
        self.cache = Cache(str(directory), read_remote(str(directory)))
        self.replicator = Replicator(self.cache)
        self.connection = InMemoryConnection()

    async def greet(self) -> Hello:
        self.connection = self.server.accept()
        hello = await self.replicator.hello()
        self.connection.to_server.append(encode(hello))
        return hello

    def send(self, outcome: ReceiveOutcome) -> ReceiveOutcome:
        self.connection.to_server.extend(encode(frame) for frame in outcome.to_send)
        return outcome

    async def step(self) -> ReceiveOutcome | None:
        """Process one frame; return None if there is none."""
        while self.connection.to_server:
            self.server.take(self.connection)
        if not self.connection.to_client and not self.server.send_next(self.connection, piece_first=True):
            return None
        return self.send(await self.replicator.receive([received(self.connection)]))

    async def settle(self) -> list[ReceiveOutcome]:
        """Process all frames."""
        outcomes = []
        while (outcome := await self.step()) is not None:
            outcomes.append(outcome)
        return outcomes

    async def follow(self) -> "Follower":
        await self.greet()
        await self.settle()
        return self

    def change(self, after: Files, *, cause: str = "edit", announced: frozenset[str] = frozenset()) -> None:
        self.server.write(delta(self.server.files, after, announced=announced), after, cause=cause)

    def tree(self) -> Files:
        return {path: self.cache.read(path) for path in self.cache.paths()}

    def write(self, path: str, data: bytes) -> None:
        """Write a file as another program does."""
        (self.directory / path).parent.mkdir(parents=True, exist_ok=True)
        (self.directory / path).write_bytes(data)


@pytest.fixture
def server() -> InMemoryServer:
    made = InMemoryServer(piece=1 << 20)
    made.write(delta({}, FILES), dict(FILES))
    return made


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return make_cache(tmp_path / "ana", "http://127.0.0.1:1")


@pytest.fixture
async def follower(server: InMemoryServer, directory: Path) -> Follower:
    return await Follower(server, directory).follow()


# --- following ---


async def test_a_new_cache_is_filled_and_its_state_stored(follower: Follower) -> None:
    replicator, server = follower.replicator, follower.server
    assert follower.tree() == FILES
    assert replicator.is_current and replicator.is_following and replicator.resyncs == 1
    stored = follower.cache.load_state()
    assert (stored.position.epoch, stored.position.seq, stored.missing) == (server.epoch, 1, ())
    assert stored.position == replicator.state.position and stored.current_at > 0
    assert replicator.received == len(FILES) and replicator.advanced.is_set()


async def test_a_change_is_applied_and_reported(follower: Follower) -> None:
    seen: list[tuple[str, int]] = []
    follower.replicator.on_change = lambda epoch, change: seen.append((epoch, change.seq))
    follower.replicator.advanced.clear()
    follower.replicator.advanced_at = None
    follower.change(FILES | {EVENTS: b"{}\n{}\n"})
    (outcome,) = await follower.settle()
    assert outcome.applied and follower.tree()[EVENTS] == b"{}\n{}\n"
    assert seen == [(follower.server.epoch, 2)]
    assert follower.replicator.advanced.is_set() and follower.replicator.advanced_at is not None
    assert follower.cache.load_state().position.seq == 2


async def test_progress_is_counted_in_files(server: InMemoryServer, directory: Path) -> None:
    follower = Follower(server, directory)
    assert follower.replicator.progress() is None
    await follower.greet()
    seen = []
    while await follower.step() is not None:
        seen.append(follower.replicator.progress())
    total = len(FILES)
    assert [each for each in seen if each is not None] == [(count, total) for count in range(total)]
    assert seen[-1] is None, "complete"


async def test_the_state_is_stored_once_while_files_arrive(
    server: InMemoryServer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicator_module, "_SAVE_EVERY_S", 1000.0)
    follower = Follower(server, directory)
    await follower.greet()
    while follower.replicator.progress() != (0, len(FILES)):
        await follower.step()
    stored = follower.cache.load_state()
    assert len(stored.missing) == len(FILES)
    await follower.step()
    assert follower.cache.load_state() == stored, "still valid: the file would be fetched again"
    await follower.replicator.disconnected()
    assert len(follower.cache.load_state().missing) == len(FILES) - 1
    again = await Follower(server, directory).follow()
    assert again.replicator.received == len(FILES) - 1 and again.tree() == FILES


async def test_the_state_is_stored_with_each_file_after_its_interval(
    server: InMemoryServer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicator_module, "_SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(replicator_module, "_SAVES_PART", 1e9)
    follower = Follower(server, directory)
    await follower.greet()
    while follower.replicator.progress() != (1, len(FILES)):
        await follower.step()
    assert len(follower.cache.load_state().missing) == len(FILES) - 1


async def test_a_batch_that_cannot_be_written_ends_the_session_and_is_reported(
    follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise StorageError("no space")

    replicator = follower.replicator
    follower.change(FILES | {SNAPSHOT: b"[]\n"})
    with monkeypatch.context() as patch:
        patch.setattr(follower.cache, "replace", full)
        with pytest.raises(StorageError, match="no space") as raised:
            await follower.settle()
    assert replicator.trouble is raised.value and not replicator.is_following
    assert follower.cache.load_state().position.seq == 1, "the stored position stays behind the files"
    await follower.replicator.disconnected()
    await follower.follow()
    assert follower.tree()[SNAPSHOT] == b"[]\n" and replicator.trouble is None


async def test_a_write_error_is_reported_until_a_write_succeeds(follower: Follower) -> None:
    trouble = StorageError("no space")
    follower.replicator.trouble = trouble
    await follower.replicator.receive([Reply("0" * 32, 0, 0, b"", b"")])
    assert follower.replicator.trouble is trouble
    follower.change(FILES | {SNAPSHOT: b"[]\n"})
    await follower.settle()
    assert follower.replicator.trouble is None


async def test_an_answer_is_delivered_after_its_change(follower: Follower) -> None:
    request, after = "7" * 32, FILES | {PLAN: b"# Plan\n\nmine\n"}
    follower.replicator.own_requests.append(request)
    follower.server.write(delta(FILES, after), after, request_id=request, cause=request)
    changed, answered = await follower.settle()
    assert (changed.applied, changed.answers) == (True, [])
    assert answered.answers == [Reply(request, 2, 0, b"", b"")]
    assert not follower.replicator.edits.is_own, "only while the change is applied"


@pytest.mark.parametrize("is_own", [True, False])
async def test_an_own_change_keeps_no_older_text(
    follower: Follower, is_own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered: list[str] = []
    monkeypatch.setattr(follower.replicator.edits.older, "remember", lambda path, _: remembered.append(path))
    if is_own:
        follower.replicator.own_requests.append("7" * 32)
    follower.change(FILES | {PLAN: b"# Plan\n\nmine\n"}, cause="7" * 32)
    await follower.settle()
    assert remembered == ([] if is_own else [PLAN])


# --- state stored between sessions ---


async def test_the_age_is_stored_when_the_connection_ends(follower: Follower) -> None:
    follower.replicator.current_at = 5e9
    await follower.replicator.disconnected()
    assert follower.cache.load_state().current_at == 5e9
    assert Replicator(follower.cache).current_at == 5e9


async def test_the_age_of_a_cache_of_another_process_is_not_stored(follower: Follower, server: InMemoryServer) -> None:
    other = await Follower(server, follower.directory).follow()
    other.change(FILES | {SNAPSHOT: b"[]\n"})
    await other.settle()
    stored = follower.cache.load_state()
    follower.replicator.current_at = 5e9
    await follower.replicator.store_age()
    assert follower.cache.load_state() == stored


async def test_nothing_is_stored_before_the_first_greeting(server: InMemoryServer, directory: Path) -> None:
    follower = Follower(server, directory)
    await follower.replicator.store_age()
    assert not (directory / STATE_FILE).exists()


@pytest.mark.parametrize("is_complete", [True, False])
async def test_fingerprints_are_stored_once_they_are_complete(follower: Follower, is_complete: bool) -> None:
    assert follower.cache.known.is_complete
    follower.cache.known.is_complete = is_complete
    await follower.replicator.store_known()
    assert (follower.directory / STORED).exists() == is_complete
    if is_complete:
        other = Cache(str(follower.directory), follower.cache.remote)
        other.load_known()
        assert other.known.is_complete
        assert all(other.known.agrees(path, other.signature(path)) for path in FILES)


async def test_fingerprints_are_not_stored_in_a_removed_directory(follower: Follower) -> None:
    (follower.directory / "remote.json").unlink()
    await follower.replicator.store_known()
    assert not (follower.directory / STORED).exists()


async def test_the_replicator_is_busy_while_it_writes_files(follower: Follower) -> None:
    assert not follower.replicator.is_busy
    async with Cache(str(follower.directory), follower.cache.remote).locked():
        waiting = asyncio.create_task(follower.replicator.repair([]))
        await asyncio.sleep(0)
        assert follower.replicator.is_busy
    await waiting
    assert not follower.replicator.is_busy


# --- several processes ---


async def test_a_process_continues_at_the_position_of_another(follower: Follower, server: InMemoryServer) -> None:
    other = await Follower(server, follower.directory).follow()
    assert other.replicator.resyncs == 0 and other.replicator.received == 0, "all is there"
    follower.change(FILES | {SNAPSHOT: b"[]\n"})
    await other.settle()
    follower.replicator.advanced.clear()
    follower.replicator.advanced_at = 1.0
    inode = os.stat(follower.directory / SNAPSHOT).st_ino
    await follower.settle()
    assert follower.replicator.is_current and follower.replicator.state.position.seq == 2
    assert os.stat(follower.directory / SNAPSHOT).st_ino == inode, "not written again"
    assert follower.replicator.advanced.is_set() and follower.replicator.advanced_at is None, "another did it"


async def test_an_age_stored_by_another_process_moves_no_position(follower: Follower, server: InMemoryServer) -> None:
    other = await Follower(server, follower.directory).follow()
    other.replicator.current_at = 5e9
    await other.replicator.store_age()
    follower.replicator.advanced.clear()
    await follower.replicator.receive([])
    assert follower.replicator.state.current_at == 5e9 and not follower.replicator.advanced.is_set()


async def test_a_cache_that_another_process_has_reset_ends_the_session(
    follower: Follower, server: InMemoryServer
) -> None:
    server.new_epoch()
    await Follower(server, follower.directory).follow()
    with pytest.raises(ConnectionFailed, match="another process has reset this cache"):
        await follower.replicator.receive([])
    assert not follower.replicator.is_following
    await follower.replicator.disconnected()
    await follower.follow()
    assert follower.replicator.is_current and follower.replicator.resyncs == 1, "the other one did it"


async def test_a_resync_excludes_other_processes_until_it_is_done(
    follower: Follower, server: InMemoryServer, directory: Path
) -> None:
    server.write(delta(FILES, FILES | {SNAPSHOT: b"[]\n"}), FILES | {SNAPSHOT: b"[]\n"})
    server.new_epoch()
    await follower.replicator.disconnected()
    await follower.greet()
    while follower.replicator.replica.state is not State.COMPARING:
        await follower.step()
    other = Cache(str(directory), follower.cache.remote)
    with pytest.raises(StorageError):
        async with other.locked(0.0):
            pass
    await follower.settle()
    async with other.locked(0.0):
        assert follower.tree()[SNAPSHOT] == b"[]\n"
    assert follower.replicator.resyncs == 2


async def test_a_lost_connection_readmits_other_processes(
    follower: Follower, server: InMemoryServer, directory: Path
) -> None:
    server.new_epoch()
    await follower.replicator.disconnected()
    await follower.greet()
    while follower.replicator.replica.state is not State.COMPARING:
        await follower.step()
    await follower.replicator.disconnected()
    async with Cache(str(directory), follower.cache.remote).locked(0.0):
        pass
    await follower.follow()
    assert follower.tree() == FILES and follower.replicator.resyncs == 3


# --- comparison and repair ---


async def test_a_comparison_lists_differences_and_repairs_them_on_request(follower: Follower) -> None:
    follower.write(SNAPSHOT, b"theirs")
    follower.write("tasks/surplus.json", b"theirs")
    (follower.directory / EVENTS).unlink()
    follower.write(PLAN, b"# Plan\n\nmine\n")
    for repair in (False, True):
        outcome, future = await follower.replicator.compare(repair=repair)
        follower.send(outcome)
        await follower.settle()
        found = await future
        assert (found.differing, found.missing, found.surplus) == ((SNAPSHOT,), (EVENTS,), ("tasks/surplus.json",))
        assert found.edited == (PLAN,) and found.total == len(FILES) and not found.is_clean
        assert (follower.cache.read(SNAPSHOT) == b"theirs") is not repair
    assert follower.tree() == FILES | {PLAN: b"# Plan\n\nmine\n"}
    assert rescued(follower.directory) == {SNAPSHOT: [b"theirs"], "tasks/surplus.json": [b"theirs"]}
    assert follower.replicator.repairs.count == 3


async def test_two_comparisons_at_once_are_one(follower: Follower) -> None:
    first, future = await follower.replicator.compare(repair=False)
    second, same = await follower.replicator.compare(repair=False)
    assert future is same and len(first.to_send) == 1 and second.to_send == []
    follower.send(first)
    await follower.settle()
    assert (await future).is_clean
    _, another = await follower.replicator.compare(repair=False)
    assert another is not future


async def test_a_lost_connection_ends_a_comparison(follower: Follower) -> None:
    _, future = await follower.replicator.compare(repair=False)
    await follower.replicator.disconnected()
    with pytest.raises(ConnectionFailed, match="while the files were compared"):
        await future
    with pytest.raises(ConnectionFailed, match="before the files were compared"):
        await follower.replicator.compare(repair=False)


async def test_a_foreign_file_is_fetched_and_compared_again(follower: Follower) -> None:
    follower.write(SNAPSHOT, b"theirs")
    outcome = follower.send(await follower.replicator.repair([SNAPSHOT, EVENTS]))
    assert [frame for frame in outcome.to_send if isinstance(frame, Fetch)] == [Fetch([SNAPSHOT])]
    assert follower.cache.load_state().missing == (SNAPSHOT,), "a crash does not forget it"
    again = await follower.replicator.repair([SNAPSHOT])
    assert again.to_send == [] and follower.replicator.repairs.next_due_s() is not None, "it is on its way"
    await follower.settle()
    assert follower.tree() == FILES and follower.replicator.repairs.count == 1


async def test_without_a_session_a_foreign_file_is_compared_later(follower: Follower) -> None:
    await follower.replicator.disconnected()
    follower.write(SNAPSHOT, b"theirs")
    assert (await follower.replicator.repair([SNAPSHOT])).to_send == []
    assert follower.replicator.repairs.strange == {} and follower.replicator.repairs.next_due_s() is not None


# --- edits ---


async def edit(follower: Follower, text: bytes) -> tuple[Put, bytes]:
    base = follower.cache.read(PLAN)
    follower.write(PLAN, text)
    return Put("5" * 32, PLAN, base, text), base


async def test_a_stored_edit_is_its_own_base(follower: Follower) -> None:
    put, base = await edit(follower, b"# Plan\n\nmine\n")
    _, copy = await follower.replicator.settle(put, "stored", base)
    assert copy is None and follower.replicator.edits.base(PLAN) == put.text
    assert not follower.replicator.edits.is_edited(PLAN) and not follower.replicator.replica.blocked


async def test_an_edit_made_during_a_transfer_remains_an_edit(follower: Follower) -> None:
    put, base = await edit(follower, b"# Plan\n\nmine\n")
    follower.write(PLAN, b"# Plan\n\nmine\nand more\n")
    await follower.replicator.settle(put, "stored", base)
    assert follower.replicator.edits.base(PLAN) == put.text and follower.replicator.edits.is_edited(PLAN)


async def test_a_conflict_keeps_the_local_text_aside_and_fetches_the_servers(follower: Follower) -> None:
    put, base = await edit(follower, b"# Plan\n\nmine\n")
    outcome, copy = await follower.replicator.settle(put, "conflict", base)
    assert copy is not None and (follower.directory / copy).read_bytes() == put.text
    assert follower.cache.load_state().missing == (PLAN,)
    follower.send(outcome)
    await follower.settle()
    assert follower.tree() == FILES


async def test_an_answer_after_its_own_change_does_nothing(follower: Follower) -> None:
    put, base = await edit(follower, b"# Plan\n\nmine\n")
    follower.change(FILES | {PLAN: put.text})
    await follower.settle()
    outcome, copy = await follower.replicator.settle(put, "stored", base)
    assert (outcome.to_send, copy) == ([], None) and not follower.replicator.edits.is_edited(PLAN)


async def test_a_withheld_edit_is_rescued_and_replaced(follower: Follower) -> None:
    _, base = await edit(follower, b"# Plan\n\nmine\n")
    found = follower.cache.signature(PLAN)
    assert found is not None
    for reason, is_kept in (("because", True), (None, False)):
        follower.write(PLAN, b"# Plan\n\nmine\n")
        found = follower.cache.signature(PLAN)
        assert found is not None
        restored = await follower.replicator.restore(PLAN, found, reason)
        assert restored is not None and restored[1] == is_kept
        assert follower.cache.load_state().missing == (PLAN,)
        follower.send(restored[0])
        await follower.settle()
        assert follower.cache.read(PLAN) == base
    assert rescued(follower.directory) == {PLAN: [b"# Plan\n\nmine\n"]}


async def test_a_text_that_was_saved_again_is_not_replaced(follower: Follower) -> None:
    await edit(follower, b"# Plan\n\nmine\n")
    found = follower.cache.signature(PLAN)
    assert found is not None
    follower.write(PLAN, b"# Plan\n\nmine, again\n")
    assert await follower.replicator.restore(PLAN, found, "because") is None
    await follower.replicator.disconnected()
    now = follower.cache.signature(PLAN)
    assert now is not None
    assert await follower.replicator.restore(PLAN, now, "because") is None, "it could not be fetched"
    assert follower.cache.read(PLAN) == b"# Plan\n\nmine, again\n" and rescued(follower.directory) == {}


async def test_a_blocked_text_is_fetched_once_its_edit_is_gone(follower: Follower) -> None:
    await edit(follower, b"# Plan\n\nmine\n")
    follower.change(FILES | {PLAN: b"# Plan\n\ntheirs\n"})
    await follower.settle()
    assert set(follower.replicator.replica.blocked) == {PLAN}
    assert (await follower.replicator.look_at_edits()).to_send == []
    follower.write(PLAN, FILES[PLAN])
    follower.send(await follower.replicator.look_at_edits())
    await follower.settle()
    assert follower.cache.read(PLAN) == b"# Plan\n\ntheirs\n" and not follower.replicator.replica.blocked


# --- large contents ---


async def deferring(server: InMemoryServer, directory: Path) -> tuple[Follower, bytes]:
    """Return a follower with a large artifact that is deferred."""
    data = b"x" * (LARGE_BYTES + 1)
    server.write(delta(server.files, FILES | {ARTIFACT: data}), FILES | {ARTIFACT: data})
    follower = await Follower(server, directory).follow()
    assert set(follower.replicator.replica.deferred) == {ARTIFACT}
    assert follower.cache.size(ARTIFACT) is None
    return follower, data


def content_of(data: bytes) -> Content:
    return len(data), digest_of(data)


async def test_a_deferred_content_is_stored_if_it_is_still_current(server: InMemoryServer, directory: Path) -> None:
    follower, data = await deferring(server, directory)
    for content, is_taken in ((content_of(b"other"), False), (content_of(data), True), (content_of(data), False)):
        (directory / ".remote/tmp/arrived").write_bytes(data)
        assert await follower.replicator.arrived(ARTIFACT, content, ".remote/tmp/arrived") == is_taken
    assert follower.tree() == FILES | {ARTIFACT: data}
    assert ARTIFACT not in follower.cache.load_state().deferred
    assert follower.cache.known.agrees(ARTIFACT, follower.cache.signature(ARTIFACT))


async def test_a_deferred_content_that_is_already_present_is_recorded(server: InMemoryServer, directory: Path) -> None:
    follower, data = await deferring(server, directory)
    follower.write(ARTIFACT, data)
    assert await follower.replicator.arrived(ARTIFACT, content_of(data), None)
    assert follower.cache.known.agrees(ARTIFACT, follower.cache.signature(ARTIFACT))
    await follower.replicator.disconnected()
    assert not await follower.replicator.arrived(ARTIFACT, content_of(data), None), "no session"


async def test_a_deferred_content_is_downloaded_on_demand(server: InMemoryServer, directory: Path) -> None:
    follower, data = await deferring(server, directory)
    assert (await follower.replicator.bring(SNAPSHOT)).to_send == []
    outcome = follower.send(await follower.replicator.bring(ARTIFACT))
    assert outcome.to_send == [Fetch([ARTIFACT])] and follower.cache.load_state().missing == (ARTIFACT,)
    await follower.settle()
    assert follower.tree() == FILES | {ARTIFACT: data}


async def test_the_old_content_of_a_deferred_file_is_removed(server: InMemoryServer, directory: Path) -> None:
    follower, data = await deferring(server, directory)
    await follower.replicator.vacate(ARTIFACT, content_of(data))  # no file
    follower.write(ARTIFACT, b"older")
    await follower.replicator.vacate(ARTIFACT, content_of(b"other"))
    assert follower.cache.read(ARTIFACT) == b"older"
    await follower.replicator.vacate(ARTIFACT, content_of(data))
    assert follower.cache.size(ARTIFACT) is None


async def test_a_damaged_large_content_is_deferred_again(server: InMemoryServer, directory: Path) -> None:
    follower, data = await deferring(server, directory)
    replicator, replica = follower.replicator, follower.replicator.replica
    follower.write(ARTIFACT, data)
    await replicator.arrived(ARTIFACT, content_of(data), None)
    follower.write(ARTIFACT, b"damaged")
    assert (await replicator.repair([ARTIFACT])).to_send == []
    assert set(replica.deferred) == {ARTIFACT} and not replica.missing
    version = replica.deferred_version
    await replicator.repair([ARTIFACT])
    assert replica.deferred_version == version, "its fetching takes care of it"
    follower.write(ARTIFACT, b"damaged again")
    await replicator.repair([ARTIFACT])
    assert replica.deferred_version > version
    version = replica.deferred_version
    (directory / ARTIFACT).unlink()
    await replicator.repair([ARTIFACT])
    assert replica.deferred_version > version and not follower.replicator.writer.is_strange(ARTIFACT)


async def test_a_download_updates_the_stored_size_and_digest(server: InMemoryServer, directory: Path) -> None:
    follower, _ = await deferring(server, directory)
    replicator = follower.replicator
    replicator.replica.defer(ARTIFACT)  # with an unknown content
    await replicator.learned(ARTIFACT, content_of(b"new"), replicator.replica.position.seq + 1)
    assert follower.cache.load_state().deferred.get(ARTIFACT) != content_of(b"new"), "not yet reached"
    await replicator.learned(ARTIFACT, content_of(b"new"), replicator.replica.position.seq)
    assert follower.cache.load_state().deferred[ARTIFACT] == content_of(b"new")


# --- sessions that only send requests ---


async def test_a_session_of_requests_applies_nothing(server: InMemoryServer) -> None:
    session, connection = RequestOnlySession(), server.accept()
    assert not session.is_current
    hello = await session.hello()
    assert not hello.follow
    connection.to_server.append(encode(hello))
    server.take(connection)
    outcome = await session.receive([received(connection)])
    assert session.is_current and (outcome.to_send, outcome.answers, outcome.applied) == ([], [], False)
    reply = Reply("0" * 32, 0, 0, b"", b"")
    assert (await session.receive([reply])).answers == [reply]
    await session.disconnected()
    assert not session.is_current


# --- several processes, step by step ---


async def test_several_parts_at_once_are_one_batch(directory: Path) -> None:
    server = InMemoryServer(piece=3)
    server.write(delta({}, FILES), dict(FILES))
    follower = Follower(server, directory)
    await follower.greet()
    while follower.replicator.progress() is None:
        await follower.step()
    while follower.connection.to_server:
        server.take(follower.connection)
    while server.send_next(follower.connection, piece_first=True):
        pass
    frames = [received(follower.connection) for _ in range(len(follower.connection.to_client))]
    assert len(frames) > len(FILES)
    await follower.replicator.receive(frames)
    assert follower.tree() == FILES and follower.replicator.received == len(frames)


async def test_no_other_process_writes_between_the_steps_of_a_resync(directory: Path) -> None:
    server = InMemoryServer(piece=2)
    server.write(delta({}, FILES), dict(FILES))
    follower = Follower(server, directory)
    await follower.greet()
    assert await follower.step() is not None
    other = Cache(str(directory), follower.cache.remote)
    steps = 0
    while not follower.replicator.is_current or follower.replicator.replica.missing:
        with pytest.raises(StorageError):
            async with other.locked(0.0):
                pass
        steps += 1
        await follower.step()
    assert steps > len(FILES) and follower.tree() == FILES
    async with other.locked(0.0):
        pass


async def test_a_resync_rescues_only_files_that_another_program_wrote(
    follower: Follower, server: InMemoryServer
) -> None:
    other = "tasks/task_01HZZZZZZZZZZZZZZZZZZZZZZX.json"
    follower.change(FILES | {other: b"{}\n"})
    await follower.settle()
    await follower.replicator.disconnected()
    after = FILES | {SNAPSHOT: b"[]\n", other: b"[]\n"}
    server.write(delta(server.files, after), after)
    server.new_epoch()
    follower.write(SNAPSHOT, b"theirs")
    await follower.follow()
    assert follower.tree() == after and rescued(follower.directory) == {SNAPSHOT: [b"theirs"]}


async def test_a_comparison_ends_when_another_process_writes(follower: Follower, server: InMemoryServer) -> None:
    other = await Follower(server, follower.directory).follow()
    outcome, _ = await follower.replicator.compare(repair=False)
    assert outcome.to_send and follower.replicator.replica.state is State.COMPARING
    other.change(FILES | {SNAPSHOT: b"[]\n"})
    await other.settle()
    with pytest.raises(ConnectionFailed, match="during the comparison"):
        await follower.replicator.receive([])


async def test_a_comparison_without_a_waiter_ends_quietly(follower: Follower) -> None:
    outcome, future = await follower.replicator.compare(repair=True)
    future.cancel()
    follower.write(SNAPSHOT, b"theirs")
    follower.send(outcome)
    await follower.settle()
    assert follower.tree() == FILES
    _, lost = await follower.replicator.compare(repair=False)
    lost.cancel()
    await follower.replicator.disconnected()


async def test_a_content_that_another_process_fetched_is_no_longer_deferred(
    server: InMemoryServer, directory: Path
) -> None:
    follower, data = await deferring(server, directory)
    other = await Follower(server, directory).follow()
    (directory / ".remote/tmp/arrived").write_bytes(data)
    assert await other.replicator.arrived(ARTIFACT, content_of(data), ".remote/tmp/arrived")
    await follower.replicator.receive([])
    assert not follower.replicator.replica.deferred
    assert not await follower.replicator.arrived(ARTIFACT, content_of(data), None)


async def test_each_step_continues_at_the_position_of_another_process(server: InMemoryServer, directory: Path) -> None:
    follower, _ = await deferring(server, directory)
    replicator, replica = follower.replicator, follower.replicator.replica
    other = await Follower(server, directory).follow()
    found = follower.cache.signature(PLAN)
    assert found is not None
    steps = (
        lambda: replicator.bring(SNAPSHOT),
        lambda: replicator.learned(SNAPSHOT, content_of(b""), 0),
        lambda: replicator.arrived(SNAPSHOT, content_of(b""), None),
        lambda: replicator.vacate(SNAPSHOT, content_of(b"")),
        lambda: replicator.repair([]),
        lambda: replicator.restore(PLAN, (0, *found[1:]), None),
        lambda: replicator.settle(Put("5" * 32, PLAN, FILES[PLAN], FILES[PLAN]), "stored", FILES[PLAN]),
        lambda: replicator.receive([]),
    )
    for number, step in enumerate(steps):
        other.change(server.files | {"config.json": b"%d" % number})
        await other.settle()
        await step()
        assert replica.position.seq == server.head, number
        replicator.current_at = 5e9 + number
        await replicator.store_age()
        assert follower.cache.load_state().current_at == 5e9 + number, "its state is known again"


async def test_an_age_does_not_overwrite_the_state_of_another_process(
    follower: Follower, server: InMemoryServer
) -> None:
    other = await Follower(server, follower.directory).follow()
    follower.replicator.current_at = 5e9
    async with other.cache.locked():
        storing = asyncio.create_task(follower.replicator.store_age())
        await asyncio.sleep(0)
        other.cache.save_state(replace(other.replicator.state, current_at=7e9))
    with contextlib.suppress(StorageError):  # a slow machine on which the wait for the lock timed out
        await storing
    assert follower.cache.load_state().current_at == 7e9


async def test_without_a_session_nothing_is_downloaded(server: InMemoryServer, directory: Path) -> None:
    follower, _ = await deferring(server, directory)
    await follower.replicator.disconnected()
    assert (await follower.replicator.bring(ARTIFACT)).to_send == []
    await follower.replicator.learned(ARTIFACT, content_of(b"new"), follower.replicator.replica.position.seq)
    assert follower.cache.load_state().deferred[ARTIFACT] != content_of(b"new")


async def test_progress_continues_after_a_restart(server: InMemoryServer, directory: Path) -> None:
    follower = Follower(server, directory)
    await follower.greet()
    while follower.replicator.progress() != (1, len(FILES)):
        await follower.step()
    await follower.replicator.disconnected()
    again = Follower(server, directory)
    await again.greet()
    await again.step()
    assert again.replicator.progress() == (0, len(FILES) - 1)


# --- durability ---


async def test_saves_and_withheld_texts_are_recorded_for_a_later_process(follower: Follower) -> None:
    missing = PLAN.replace("plans/", "notes/")
    follower.write(PLAN, b"mine\n")
    await follower.replicator.withhold([(PLAN, "because"), (missing, "because")])
    evidence = Follower(follower.server, follower.directory).replicator.edits.evidence
    assert evidence.withheld() == {PLAN: "because"}
    await follower.replicator.record([(PLAN, b"mine\n")])
    assert Follower(follower.server, follower.directory).replicator.edits.evidence.withheld() == {}


async def test_work_on_files_completes_before_its_cancellation() -> None:
    entered, may_end, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        entered.set()
        await may_end.wait()
        ended.set()

    task = asyncio.create_task(replicator_module._uninterrupted(work()))
    await entered.wait()
    task.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
