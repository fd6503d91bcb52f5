"""Rate of changes of a project, and lag of its clients, with implausible reports ignored."""

import pytest

from lattice_remote.protocol.messages import Applied, Hello
from lattice_remote.server.project import connection as standings
from lattice_remote.server.project.connection import ReplicationStatus
from lattice_remote.server.project.history import CommitTimes
from lattice_remote.server.project.metrics import Metrics


def test_the_age_of_a_change_is_known_as_long_as_it_is_kept() -> None:
    pace = CommitTimes(most=3)
    for seq in range(1, 6):
        pace.committed(seq, 10.0 * seq)
    assert [pace.age_of(seq, 60.0) for seq in range(1, 8)] == [None, None, 30.0, 20.0, 10.0, None, None]


def test_another_history_resets_the_times() -> None:
    pace = CommitTimes()
    pace.committed(1, 0.0)
    pace.committed(2, 1.0)
    pace.committed(1, 2.0)
    assert (pace.age_of(1, 5.0), pace.age_of(2, 5.0)) == (3.0, None)


def test_the_changes_of_the_last_minute_are_counted() -> None:
    pace = CommitTimes()
    assert pace.per_minute(0.0) == 0
    for seq in range(1, 121):
        pace.committed(seq, float(seq))
    assert (pace.per_minute(120.0), pace.per_minute(150.0), pace.per_minute(500.0)) == (60, 30, 0)


def test_the_rate_is_computed_from_the_kept_times() -> None:
    pace = CommitTimes(most=100)
    for seq in range(1, 1001):
        pace.committed(seq, seq / 100)  # 100 a second
    assert 5_900 <= pace.per_minute(10.0) <= 6_100


def lags(metrics: Metrics) -> tuple[float, float]:
    name = "lattice_remote_delivery_lag_seconds"
    found = [metrics.registry.get_sample_value(f"{name}_{part}", {"project": "web"}) for part in ("count", "sum")]
    return found[0] or 0.0, found[1] or 0.0


def greeted(pace: CommitTimes, metrics: Metrics, *, follow: bool = True) -> ReplicationStatus:
    standing = ReplicationStatus(pace, metrics.of("web"))
    hello = Hello(versions=[1], client_version="1" * 100, lattice_version="", follow=follow)
    standing.greeted(hello, start=5, head=10)
    return standing


def test_the_delay_of_a_change_is_measured_on_one_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    pace, metrics = CommitTimes(), Metrics()
    for seq in range(1, 13):
        pace.committed(seq, 100.0 + seq)
    standing = greeted(pace, metrics)
    monkeypatch.setattr(standings.time, "monotonic", lambda: 114.0)
    standing.acknowledged(Applied(10, 0.0), sent=12)  # committed before it came: its absence is no lag
    assert (standing.applied, lags(metrics)) == (10, (0.0, 0.0))
    standing.acknowledged(Applied(11, 2.5), sent=12)  # committed 3 s ago, and held for 2.5
    assert lags(metrics) == (1.0, 0.5)
    standing.acknowledged(Applied(12), sent=12)  # an older client does not say for how long
    assert (standing.applied, lags(metrics)) == (12, (1.0, 0.5))


@pytest.mark.parametrize(
    "said",
    [Applied(13, 0.0), Applied(4, 0.0), Applied(5, 0.0), Applied(2**62, 0.0)],
    ids=["not sent yet", "before its greeting", "known", "of another world"],
)
def test_implausible_reports_are_ignored(said: Applied) -> None:
    pace, metrics = CommitTimes(), Metrics()
    pace.committed(1, 0.0)
    standing = greeted(pace, metrics)
    standing.acknowledged(said, sent=12)
    assert (standing.applied, lags(metrics)) == (5, (0.0, 0.0))


@pytest.mark.parametrize("held_s", [-1e300, 1e300, float("inf"), float("-inf"), float("nan")])
def test_a_lag_is_between_zero_and_the_age_for_every_reported_time(
    held_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace, metrics = CommitTimes(), Metrics()
    for seq in (11, 12):
        pace.committed(seq, 100.0)
    monkeypatch.setattr(standings.time, "monotonic", lambda: 101.0)
    standing = greeted(pace, metrics)
    standing.acknowledged(Applied(12, held_s), sent=12)
    count, total = lags(metrics)
    assert count == 1.0
    assert 0.0 <= total <= 1.0


def test_a_client_without_a_cache_has_no_lag() -> None:
    standing = greeted(CommitTimes(), Metrics(), follow=False)
    standing.acknowledged(Applied(12, 0.0), sent=12)
    assert standing.applied is None
    assert len(standing.client_version) == 40
