"""Whose request is next: connections in turn, each in its own order."""

from typing import NamedTuple, cast

from lattice_remote.server.data.ipc import Reconcile, Settle
from lattice_remote.server.project.history import Follower
from lattice_remote.server.project.job import Job
from lattice_remote.server.project.turns import Turns


class Asker(NamedTuple):
    """A follower, as far as turns go: two of one lane are as one."""

    name: str
    lane: str


ANA, BEN, CEM = (cast("Follower", Asker(name, name)) for name in ("ana", "ben", "cem"))
BENS_OTHER = cast("Follower", Asker("ben at another connection", "ben"))


def job(asker: Follower | None, name: str) -> Job:
    return Job(Settle(name, "", "", "") if asker else Reconcile(None), [asker] if asker else [])


def names(turns: Turns) -> str:
    return " ".join(getattr(turns.pop().message, "id", "server") for _ in range(len(turns)))


def test_connections_take_turns_and_each_keeps_its_order() -> None:
    turns = Turns()
    for name in ("a1", "a2", "a3", "b1", "b2", "c1"):
        turns.add(job({"a": ANA, "b": BEN, "c": CEM}[name[0]], name))
    turns.add(job(None, ""))
    assert names(turns) == "a1 b1 c1 server a2 b2 a3"


def test_whoever_comes_late_waits_for_one_of_each_only() -> None:
    turns = Turns()
    for number in range(100):
        turns.add(job(ANA, f"a{number}"))
    assert turns.pop().message.id == "a0"  # type: ignore[union-attr]
    turns.add(job(BEN, "b"))
    assert [turns.pop().message.id for _ in range(2)] == ["a1", "b"]  # type: ignore[union-attr]
    assert turns.has(ANA.lane)
    assert not turns.has(BEN.lane)


def test_all_askers_of_a_lane_share_its_turn() -> None:
    turns = Turns()
    for asker, name in ((BEN, "b1"), (BENS_OTHER, "b2"), (ANA, "a1"), (BENS_OTHER, "b3")):
        turns.add(job(asker, name))
    assert names(turns) == "b1 a1 b2 b3"


def test_what_was_with_a_worker_goes_before_all() -> None:
    turns = Turns()
    turns.add(job(ANA, "a"))
    for name in ("c", "b"):
        turns.add_first(job(BEN, name))
    assert turns.next().message.id == "b"  # type: ignore[union-attr]
    assert names(turns) == "b c a"
    turns.add(job(ANA, "a"))
    turns.clear()
    assert not turns
