"""Memory budget of HTTP responses: counted by token, once for each body, with waiting."""

import asyncio

import pytest
from harness import until

from lattice_remote.errors import Rejected
from lattice_remote.server.config import LimitSettings
from lattice_remote.server.transport import admission
from lattice_remote.server.transport.admission import COUNTED_BYTES, ResponseBudget, ResponseShare

BODY = bytes(COUNTED_BYTES + 1)


def made(**limits: int) -> ResponseBudget:
    return ResponseBudget(LimitSettings(**limits))


def share(budget: ResponseBudget, asks: str = "tok_a") -> ResponseShare:
    made = ResponseShare(budget)
    made.token_id = asks
    return made


def body() -> bytes:
    """Return a new body object."""
    return bytes(bytearray(BODY))


def test_one_body_of_many_responses_is_counted_once_until_the_last_is_over() -> None:
    budget = made()
    shares = [share(budget, token) for token in ("tok_a", "tok_a", "tok_b")]
    for each in shares:
        each.hold(BODY)
        each.hold(BODY)
    assert (budget.total_bytes, budget.of("tok_a"), budget.of("tok_b")) == (len(BODY),) * 3
    shares[0].close()
    shares[0].close()
    assert budget.of("tok_a") == len(BODY)
    shares[1].close()
    assert (budget.total_bytes, budget.of("tok_a"), budget.of("tok_b")) == (len(BODY), 0, len(BODY))
    shares[2].close()
    assert budget.total_bytes == 0


def test_a_body_that_is_sent_instead_of_another_is_the_only_one_counted() -> None:
    budget = made()
    holder, whole, shorter = share(budget), body(), body() + b"shorter"
    holder.hold(whole)
    holder.hold(body())
    holder.hold_only(shorter)
    assert budget.total_bytes == budget.of("tok_a") == len(shorter) and budget.has("tok_a", shorter)
    holder.drop(whole)  # again
    holder.drop(shorter)
    holder.drop(shorter)
    assert budget.total_bytes == 0 and not budget.has("tok_a", shorter)
    holder.close()


def test_a_body_in_memory_is_shared_and_another_is_made_only_if_there_is_room() -> None:
    budget = made(answer_bytes_per_token=len(BODY))
    first, second, other = share(budget), share(budget), share(budget, "tok_b")
    held = body()
    assert first.hold_if_room(held) and first.hold_if_room(body()), "later parts of one response always may"
    assert second.may_hold(held) and not second.may_hold(body()) and second.may_hold(bytes(COUNTED_BYTES))
    assert not second.hold_if_room(body()) and second.hold_if_room(bytes(COUNTED_BYTES))
    assert other.may_hold(body()) and other.hold_if_room(body())
    assert budget.total_bytes == 3 * len(BODY)
    first.close()
    assert second.hold_if_room(body())


def test_small_and_unauthenticated_bodies_are_not_counted() -> None:
    budget = made()
    share(budget).hold(bytes(COUNTED_BYTES))
    share(budget, "").hold(BODY)
    assert budget.total_bytes == 0


def test_a_token_has_room_up_to_its_bound_and_always_for_its_first_answer() -> None:
    budget = made(answer_bytes_per_token=2 * len(BODY), answer_bytes=3 * len(BODY))
    first, second, other, late = share(budget), share(budget), share(budget, "tok_b"), share(budget)
    first.hold(body())
    assert second.has_room
    second.hold(body())
    assert not late.has_room
    assert first.has_room, "an answer of several parts goes on"
    assert other.has_room
    other.hold(body())
    assert not share(budget, "tok_b").has_room, "all together have their bound"
    assert share(budget, "tok_c").has_room, "but who has nothing may have one"
    assert late.may_hold(bytes(COUNTED_BYTES))
    assert not late.may_hold(body())
    second.hold(BODY)
    assert late.may_hold(BODY), "it is in memory already, for this token"


async def test_a_waiter_for_room_continues_when_an_answer_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = made(answer_bytes_per_token=1)
    holding, waiting = share(budget), share(budget)
    holding.hold(body())
    room = asyncio.create_task(waiting.room())
    await until(lambda: bool(budget._waiting["tok_a"]))
    await share(budget, "tok_b").room()
    holding.close()
    await room
    holding.hold(body())
    monkeypatch.setattr(admission, "_WAIT_S", 0.01)
    with pytest.raises(Rejected, match="are unread") as caught:
        await waiting.room()
    assert caught.value.code == "REMOTE_BUSY"
    assert not budget._waiting["tok_a"]


async def test_a_token_makes_one_answer_of_unknown_size_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = made(answer_bytes_per_token=1)
    one, two = share(budget), share(budget)
    async with one.making():
        async with share(budget, "tok_b").making():
            pass
        monkeypatch.setattr(admission, "_WAIT_S", 0.01)
        with pytest.raises(Rejected):
            async with two.making():
                pass
        one.hold(body())
    with pytest.raises(Rejected):
        async with two.making():
            pass
    one.close()
    async with two.making():
        pass
