"""Delays between connection attempts, without clock or socket."""

import pytest

from lattice_remote.client.connection.dial import MAX_BAR_S, MAX_DELAY_S, MAX_RESETS, RESET_WINDOW_S, Backoff


def longest(_low: float, high: float) -> float:
    return high


def test_delays_after_failures_grow_to_a_bound() -> None:
    pace = Backoff(longest)
    delays = [pace.ended(0.0, lasted=False) for _ in range(2000)]
    assert delays[:4] == [0.4, 0.8, 1.6, 3.2]
    assert max(delays) == MAX_DELAY_S == delays[-1]


def test_the_delays_are_spread_over_their_whole_range() -> None:
    pace = Backoff(streak=5)
    delays = [pace.ended(0.0, lasted=False) for _ in range(200)]
    assert min(delays) < MAX_DELAY_S / 4 and max(delays) > MAX_DELAY_S * 3 / 4


def test_only_a_connection_that_lasted_resets_the_delay() -> None:
    pace = Backoff(longest, streak=9)
    assert pace.ended(0.0, lasted=False) == MAX_DELAY_S
    assert pace.ended(0.0, lasted=True) == pytest.approx(0.2)


def test_retries_after_a_refusal_become_rarer() -> None:
    pace = Backoff(longest)
    delays = [pace.ended(0.0, lasted=False, is_refused=True) for _ in range(20)]
    assert delays[0] == 30.0 and delays[-1] == 300.0
    pace.lift()
    assert pace.ended(0.0, lasted=False, is_refused=True) == 30.0


@pytest.mark.parametrize(("asked", "expected"), [(7.0, 7.0), (0.0, 0.0), (1e12, MAX_BAR_S)])
def test_a_requested_delay_is_bounded(asked: float, expected: float) -> None:
    pace = Backoff(longest)
    delay = pace.ended(100.0, lasted=False, retry_after_s=asked)
    assert pace.barred_s(100.0) == expected and delay >= expected
    pace.lift()
    assert pace.barred_s(100.0) == expected and pace.barred_s(100.0 + expected) == 0.0


def test_an_estimated_retry_time_blocks_no_client() -> None:
    pace = Backoff(longest)
    assert pace.ended(0.0, lasted=True, retry_after_s=1.0, binds=False) == pytest.approx(1.2)
    assert pace.barred_s(0.0) == 0.0


def test_repeated_resyncs_are_delayed_and_forgotten_in_time() -> None:
    pace = Backoff(longest)
    now, begun = 0.0, 0
    while now < 3600.0:
        pace.was_reset(now)
        begun += 1
        now += 6.0 + pace.ended(now, lasted=True)
    assert MAX_RESETS <= begun <= 3600 / RESET_WINDOW_S * MAX_RESETS + MAX_RESETS
    now += RESET_WINDOW_S + MAX_BAR_S
    pace.was_reset(now)
    pace.ended(now, lasted=True)
    assert pace.barred_s(now) == 0.0


def test_a_cut_after_resyncs_has_the_usual_delay() -> None:
    pace = Backoff(longest)
    for _ in range(MAX_RESETS - 1):
        pace.was_reset(0.0)
        pace.ended(0.0, lasted=True)
    pace.was_reset(0.0)
    pace.ended(0.0, lasted=True)
    assert pace.barred_s(0.0) > 0
    pace.ended(100.0, lasted=True)
    assert pace.barred_s(100.0) == 0.0
