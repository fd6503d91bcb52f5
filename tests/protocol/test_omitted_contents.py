"""Deferred contents of a replica: large artifacts that change, move or disappear before they are downloaded."""

import os
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lattice_remote.conformance.scripted_server import append_to
from lattice_remote.protocol.messages import Change, Entries, Entry, Fetch, Limits, Manifest, Position, Welcome
from lattice_remote.protocol.operations import (
    AnnounceFile,
    DeleteFile,
    MemoryTree,
    MoveFile,
    Operation,
    PutFile,
    apply,
    digest_of,
)
from lattice_remote.protocol.replica import LARGE_BYTES, ApplyChange, Compare, Effect, Remove, Replica, Send

BIG, OTHER = "artifacts/payload/a.bin", "artifacts/payload/b.bin"
CONTENT = os.urandom(LARGE_BYTES + 1)
ENTRY = (len(CONTENT), digest_of(CONTENT))
ANNOUNCED = AnnounceFile(BIG, *ENTRY)


def connected(replica: Replica, *, head: int | None = None) -> Replica:
    replica.hello(client_version="t", lattice_version="t")
    seq, epoch = replica.position.seq, replica.position.epoch
    replica.receive(Welcome(1, "", "", "p", "a", epoch, seq if head is None else head, 1, False, Limits(1, 1)))
    return replica


@pytest.fixture
def replica() -> Replica:
    return connected(Replica(Position("e", 1, b"m"), deferred={}))


def change(replica: Replica, *operations: Operation) -> list[Effect]:
    seq = replica.position.seq + 1
    return replica.receive(Change(seq, b"m", "", "a", "t", "edit", "", list(operations)))


def applied(effects: Iterable[Effect]) -> list[Operation]:
    return [operation for effect in effects if isinstance(effect, ApplyChange) for operation in effect.operations]


def fetched(effects: Iterable[Effect]) -> list[str]:
    frames = [effect.frame for effect in effects if isinstance(effect, Send)]
    return [path for frame in frames if isinstance(frame, Fetch) for path in frame.paths]


def test_a_large_content_is_deferred(replica: Replica) -> None:
    effects = change(replica, ANNOUNCED, PutFile("tasks/x.json", b"x"))
    assert replica.deferred == {BIG: ENTRY} and not replica.missing and replica.is_current
    assert applied(effects) == [PutFile("tasks/x.json", b"x")] and not fetched(effects)


def test_another_large_file_is_not_deferred(replica: Replica) -> None:
    announced = AnnounceFile("events/x.jsonl", *ENTRY)
    assert applied(change(replica, announced)) == [announced]
    assert not replica.deferred


def test_a_deferred_content_that_becomes_small_is_fetched(replica: Replica) -> None:
    change(replica, ANNOUNCED)
    assert fetched(change(replica, AnnounceFile(BIG, LARGE_BYTES, ENTRY[1]))) == [BIG]
    assert not replica.deferred


@pytest.mark.parametrize("operation", [PutFile(BIG, b"x"), DeleteFile(BIG), MoveFile("ids.json", BIG, bytes(32))])
def test_an_overwritten_content_is_not_deferred_any_longer(replica: Replica, operation: Operation) -> None:
    change(replica, ANNOUNCED)
    assert applied(change(replica, operation)) == [operation]
    assert not replica.deferred


def test_a_moved_content_stays_deferred_at_its_new_path(replica: Replica) -> None:
    change(replica, ANNOUNCED)
    assert applied(change(replica, MoveFile(BIG, OTHER, ENTRY[1]))) == [DeleteFile(BIG)]
    assert replica.deferred == {OTHER: ENTRY}


def test_an_append_to_a_deferred_content_fetches_the_whole_file(replica: Replica) -> None:
    change(replica, ANNOUNCED)
    effects = change(replica, append_to(BIG, CONTENT, b"more"))
    assert not replica.deferred and fetched(effects) == [BIG] and not applied(effects)


def test_a_second_announcement_replaces_the_deferred_content(replica: Replica) -> None:
    change(replica, ANNOUNCED)
    before = replica.deferred_version
    change(replica, AnnounceFile(BIG, LARGE_BYTES + 2, bytes(32)))
    assert replica.deferred == {BIG: (LARGE_BYTES + 2, bytes(32))} and replica.deferred_version > before


def test_a_replica_that_defers_nothing_applies_announcements() -> None:
    replica = connected(Replica(Position("e", 1, b"m")))
    assert applied(change(replica, ANNOUNCED)) == [ANNOUNCED]


def test_a_comparison_defers_only_differing_contents(replica: Replica) -> None:
    entries = {BIG: ENTRY, OTHER: ENTRY, "artifacts/payload/small": (9, bytes(32)), "events/x.jsonl": ENTRY}
    [sent] = replica.compare(repair=True)
    assert sent == Send(Manifest())
    [compare] = replica.receive(Entries(1, b"m", [Entry(path, *entry) for path, entry in entries.items()], True))
    assert isinstance(compare, Compare)
    effects = replica.compared({OTHER: ENTRY, "artifacts/payload/surplus": ENTRY})
    assert replica.deferred == {BIG: ENTRY}
    assert sorted(fetched(effects)) == ["artifacts/payload/small", "events/x.jsonl"]
    assert [effect.paths for effect in effects if isinstance(effect, Remove)] == [("artifacts/payload/surplus",)]


def test_size_and_digest_of_a_deferred_content_are_taken_at_their_position(replica: Replica) -> None:
    replica.defer(BIG)
    assert not replica.learned(BIG, ENTRY, 2) and replica.deferred == {BIG: None}
    change(replica, PutFile("ids.json", b"{}"))
    assert replica.learned(BIG, ENTRY, 2) and replica.deferred == {BIG: ENTRY}
    assert not replica.learned(BIG, (1, bytes(32)), 2), "only a change makes it another"
    replica.here(BIG)
    assert not replica.learned(BIG, ENTRY, 2) and not replica.deferred


PATHS = st.sampled_from([BIG, OTHER, "artifacts/payload/c"])
CONTENTS = st.sampled_from([b"small", b"x" * (LARGE_BYTES + 1), b"y" * (LARGE_BYTES + 1)])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), PATHS, CONTENTS),
        st.tuples(st.just("delete"), PATHS, st.just(b"")),
        st.tuples(st.just("move"), PATHS, st.sampled_from([path.encode() for path in (BIG, OTHER)])),
        st.tuples(st.just("fetch"), PATHS, st.just(b"")),
        st.tuples(st.just("restart"), PATHS, st.just(b"")),
    ),
    max_size=30,
)


@settings(max_examples=300)
@given(STEPS)
def test_files_that_are_not_deferred_equal_the_servers_at_every_number(steps: list[tuple[str, str, bytes]]) -> None:
    """I3, I5: the recorded size and digest of deferred contents also equal the server's."""
    truth: dict[str, bytes] = {}
    tree = MemoryTree({})
    replica = connected(Replica(Position("e", 0, b""), deferred={}))
    for what, path, argument in steps:
        operations: list[Operation] = []
        if what == "write":
            truth[path] = argument
            large = len(argument) > LARGE_BYTES
            operations = [AnnounceFile(path, len(argument), digest_of(argument)) if large else PutFile(path, argument)]
        elif what == "delete" and truth.pop(path, None) is not None:
            operations = [DeleteFile(path)]
        elif what == "move" and path in truth and argument.decode() != path:
            truth[argument.decode()] = truth.pop(path)
            operations = [MoveFile(path, argument.decode(), digest_of(truth[argument.decode()]))]
        elif what == "fetch" and path in replica.deferred:
            assert replica.deferred[path] == (len(truth[path]), digest_of(truth[path]))
            tree.files[path] = truth[path]
            replica.here(path)
        elif what == "restart":
            replica = connected(Replica(replica.position, replica.missing, deferred=replica.deferred))
        if operations:
            for operation in applied(change(replica, *operations)):
                assert not apply(operation, tree), "nothing has drifted"
        here = {name: data for name, data in tree.files.items() if name not in replica.deferred}
        assert here == {name: data for name, data in truth.items() if name not in replica.deferred}
        assert not replica.missing and replica.deferred.keys() <= truth.keys()
