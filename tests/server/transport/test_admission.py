"""Admission control: limits per address and per token, on a clock set by the test."""

import logging
from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_remote.protocol.messages import FIRST_FRAME_BYTES
from lattice_remote.server.config import LimitSettings
from lattice_remote.server.transport.admission import MAX_ADDRESSES, AdmissionControl, ConnectionQuota


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def arrived(admission: AdmissionControl, host: str = "192.0.2.1") -> ConnectionQuota:
    quota = admission.arrive(host)
    assert quota is not None
    return quota


def refusal(quota: ConnectionQuota, *forwarded: str) -> tuple[int, int | None] | None:
    """Return status and retry delay of a refusal at the head of a request."""
    refused = quota.enter(forwarded)
    return None if refused is None else (refused.status.value, refused.retry_after_s)


def test_unfinished_messages_of_a_token_fill_its_limit_exactly() -> None:
    limit = 2 * FIRST_FRAME_BYTES
    admission = AdmissionControl(LimitSettings(unfinished_bytes_per_token=limit))
    first, second, other = arrived(admission), arrived(admission), arrived(admission)
    assert first.holds(limit + 1), "no token is counted yet"
    for quota, token in ((first, "tok_a"), (second, "tok_a"), (other, "tok_b")):
        assert quota.enter((), token) is None and quota.admit(token) is None
    assert first.holds(limit) and not first.holds(limit + 1) and first.holds(FIRST_FRAME_BYTES)
    assert not second.holds(FIRST_FRAME_BYTES + 1) and second.holds(FIRST_FRAME_BYTES)
    assert other.holds(limit)
    first.leave()
    first.leave()
    assert second.holds(limit) and not second.holds(limit + 1)


def test_new_connections_from_one_address_have_a_rate() -> None:
    clock = Clock()
    admission = AdmissionControl(LimitSettings(new_connections_per_second=2), clock=clock)
    for _ in range(20):
        quota = arrived(admission)
        assert refusal(quota) is None
        quota.leave()
    assert refusal(arrived(admission)) == (429, 1)
    assert refusal(arrived(admission, "192.0.2.2")) is None
    clock.now += 0.5
    assert refusal(arrived(admission)) is None
    assert refusal(arrived(admission)) == (429, 1)
    clock.now += 3600
    assert [refusal(arrived(admission)) for _ in range(21)] == [None] * 20 + [(429, 1)]


def test_after_a_restart_500_clients_of_one_address_and_token_come_back_at_once() -> None:
    admission = AdmissionControl(LimitSettings(), clock=Clock())
    visits = [arrived(admission) for _ in range(500)]  # none has ended its TLS handshake
    assert {refusal(quota) for quota in visits} == {None}
    assert {quota.admit("tok_a") for quota in visits} == {None}


def test_requests_on_one_connection_have_that_rate_too() -> None:
    clock = Clock()
    admission = AdmissionControl(LimitSettings(new_connections_per_second=1), clock=clock)
    quota = arrived(admission)
    assert [refusal(quota) for _ in range(10)] == [None] * 10
    assert refusal(quota) == (429, 1)
    clock.now += 1
    assert refusal(quota) == (429, 1)  # its connection ends with that
    assert refusal(arrived(admission)) is None


def test_requests_with_a_token_are_counted_for_the_token_wherever_they_come_from() -> None:
    clock = Clock()
    admission = AdmissionControl(LimitSettings(new_connections_per_second=1, messages_per_second=5), clock=clock)
    ours, theirs, far = arrived(admission), arrived(admission), arrived(admission, "192.0.2.2")
    assert [ours.enter([], "tok_a") for _ in range(15)] + [far.enter([], "tok_a") for _ in range(5)] == [None] * 20
    for quota in (ours, far):
        refused = quota.enter([], "tok_a")
        assert refused is not None and refused.status is HTTPStatus.TOO_MANY_REQUESTS
        assert "tok_a" in refused.message
    assert theirs.enter([], "tok_b") is None, "whoever shares the address goes on"
    clock.now += 0.2
    assert (ours.enter([], "tok_a"), ours.enter([], "tok_a") is None) == (None, False)
    # On its connection too, what shows no token is a stranger's.
    assert [refusal(theirs) for _ in range(8)] == [None] * 8
    assert refusal(theirs) == (429, 1)


def test_behind_a_proxy_the_limit_counts_each_address_of_one_connection() -> None:
    admission = AdmissionControl(
        LimitSettings(new_connections_per_second=1, messages_per_second=20), ["10.0.0.1"], clock=Clock()
    )
    shared = arrived(admission, "10.0.0.1")
    for number in range(80):  # every one from another place than the last: no address of the team is a new connection
        assert shared.enter([f"192.0.2.{1 + number % 2}"], "tok_a") is None
    assert refusal(shared, "192.0.2.1") is None
    assert shared.admit("tok_a") is None
    assert [refusal(shared, "198.51.100.1") for _ in range(10)] == [None] * 10
    assert refusal(shared, "198.51.100.1") == (429, 1)


def admitted(quota: ConnectionQuota, *forwarded: str) -> tuple[int, int | None] | None:
    """Return status and retry delay of a refusal of a request with a valid token."""
    refused = quota.enter(forwarded, "tok_a") or quota.admit("tok_a")
    return None if refused is None else (refused.status.value, refused.retry_after_s)


def test_open_connections_with_a_token_from_one_address_are_bounded() -> None:
    admission = AdmissionControl(LimitSettings(connections_per_address=3))
    strangers = [arrived(admission, "2001:db8::9") for _ in range(5)]
    assert [refusal(quota) for quota in strangers] == [None] * 5, "these have a bound of their own"
    visits = [arrived(admission, host) for host in ("2001:db8::1", "2001:db8::2", "2001:db8::3")]
    assert [admitted(quota) for quota in visits] == [None] * 3
    late = arrived(admission, "2001:db8::4")
    assert admitted(late) == (429, 10)
    late.leave()
    visits[0].leave()
    assert admitted(arrived(admission, "2001:db8::5")) is None
    assert admitted(arrived(admission, "2001:db8:0:1::1")) is None


def test_a_flood_from_an_address_refuses_no_token_from_there() -> None:
    clock = Clock()
    admission = AdmissionControl(LimitSettings(new_connections_per_second=2), clock=clock)
    flood = [arrived(admission) for _ in range(200)]
    assert refusal(flood[-1]) == (429, 1)
    quota = arrived(admission)
    assert admitted(quota) is None
    assert admitted(quota) is None, "nor the next on its connection"
    assert refusal(flood[-1]) == (429, 1)


def test_a_stranger_gives_its_place_to_the_next_of_its_address_after_a_second() -> None:
    clock = Clock()
    admission = AdmissionControl(LimitSettings(waiting_connections_per_address=2), clock=clock)
    cut: list[str] = []
    oldest, other = arrived(admission), arrived(admission)
    oldest.cut, other.cut = (lambda: cut.append("oldest")), (lambda: cut.append("other"))
    clock.now += 0.9
    assert admission.arrive("192.0.2.1") is None
    clock.now += 0.2
    assert admitted(arrived(admission)) is None
    assert cut == ["oldest"]
    arrived(admission, "192.0.2.2")
    arrived(admission)
    assert cut == ["oldest"], "there was room"
    arrived(admission)
    assert cut == ["oldest", "other"]


def test_an_address_has_room_for_few_strangers() -> None:
    admission = AdmissionControl(LimitSettings(waiting_connections_per_address=2))
    first, _ = arrived(admission), arrived(admission)
    assert admission.arrive("192.0.2.1") is None
    assert first.admit("tok_a") is None
    arrived(admission)
    assert admission.arrive("192.0.2.1") is None
    assert admission.arrive("192.0.2.2") is not None


def test_of_too_many_strangers_the_one_that_waits_longest_goes() -> None:
    admission = AdmissionControl(LimitSettings(waiting_connections=3))
    cut: list[int] = []
    visits = [arrived(admission, f"192.0.2.{number}") for number in range(3)]
    for number, quota in enumerate(visits):
        quota.cut = lambda number=number: cut.append(number)  # type: ignore[misc]
    assert visits[0].admit("tok_a") is None
    arrived(admission, "192.0.2.9")
    assert cut == []
    arrived(admission, "192.0.2.10")
    assert cut == [1]
    visits[1].leave()
    arrived(admission, "192.0.2.11")
    assert cut == [1, 2]


def test_an_address_that_reconnects_repeatedly_displaces_only_itself() -> None:
    """A few addresses open connections all the time, while others are in their TLS handshakes."""
    admission = AdmissionControl(LimitSettings(waiting_connections=64))
    cut: list[str] = []

    def came(host: str) -> ConnectionQuota:
        quota = arrived(admission, host)
        quota.cut = lambda: cut.append(host)
        return quota

    honest = [came(f"192.0.2.{number}") for number in range(20)]
    team = [came("192.0.2.99") for _ in range(8)]
    for number in range(2_000):
        came(f"198.51.100.{number % 3}")
    assert set(cut) == {f"198.51.100.{number}" for number in range(3)}
    assert len(cut) == 2_000 - (64 - 28)
    assert {quota.admit("tok_a") for quota in honest + team} == {None}


def test_connections_of_a_token_are_bounded() -> None:
    admission = AdmissionControl(LimitSettings(connections_per_token=2))
    visits = [arrived(admission) for _ in range(3)]
    assert [quota.admit("tok_a") is None for quota in visits] == [True, True, False]
    assert visits[2].admit("tok_b") is None
    visits[0].leave()
    visits[0].leave()
    refused = [arrived(admission).admit("tok_a") for _ in range(2)]
    assert refused[0] is None
    assert refused[1] is not None
    assert (refused[1].status, refused[1].code) == (HTTPStatus.TOO_MANY_REQUESTS, "REMOTE_BUSY")


def test_failed_logins_are_answered_more_slowly_after_many() -> None:
    clock = Clock()
    admission = AdmissionControl(LimitSettings(failed_logins_per_minute=6), clock=clock)
    quota = arrived(admission)
    assert [quota.failed() for _ in range(6)] == [None] * 6
    refused = quota.failed()
    assert refused is not None
    assert (refused.status.value, refused.retry_after_s) == (429, 10)
    assert b"Retry-After: 10\r\n" in refused.raw
    assert arrived(admission, "192.0.2.2").failed() is None
    clock.now += 10
    assert quota.failed() is None
    assert quota.failed() is not None


def test_behind_a_trusted_proxy_each_client_has_its_own_account() -> None:
    admission = AdmissionControl(
        LimitSettings(connections_per_address=1, waiting_connections_per_address=1), ["10.0.0.0/8"]
    )
    one, two, three = (arrived(admission, "10.0.0.1") for _ in range(3))
    assert refusal(one, "192.0.2.1") is None
    assert refusal(two, "192.0.2.1") == (429, 1)
    assert refusal(two, "192.0.2.2") is None
    assert refusal(three, "192.0.2.2") == (429, 1)
    assert refusal(arrived(admission, "10.0.0.1"), "192.0.2.2, 10.9.9.9") == (429, 1)
    assert admitted(two, "192.0.2.2") is None
    assert admitted(three, "192.0.2.2") == (429, 10)
    two.leave()
    assert admitted(three, "192.0.2.2") is None
    three.leave()


def test_the_header_is_ignored_from_an_untrusted_address() -> None:
    admission = AdmissionControl(LimitSettings(connections_per_address=1), ["10.0.0.0/8"])
    assert admitted(arrived(admission), "198.51.100.1") is None
    assert admitted(arrived(admission), "198.51.100.2") == (429, 10)


def test_the_memory_for_a_flood_of_addresses_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 500
    assert most < MAX_ADDRESSES
    monkeypatch.setattr("lattice_remote.server.transport.admission.MAX_ADDRESSES", most)
    admission = AdmissionControl(LimitSettings())
    kept = arrived(admission, "192.0.2.1")
    kept.admit("tok_a")
    often = admission.known("198.51.100.7")
    for number in range(most + 500):
        arrived(admission, f"2001:db8:{number >> 8:x}:{number & 255:x}::1").leave()
        if number % 100 == 0:
            arrived(admission, "198.51.100.7").leave()
    assert len(admission._addresses) <= most + 1
    assert "192.0.2.1" in admission._addresses
    assert admission.known("198.51.100.7") is often, "its count of failed logins was never lost"
    assert len(admission.unauthenticated) == 0


def test_only_a_refusal_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    admission = AdmissionControl(LimitSettings(new_connections_per_second=1), clock=Clock())
    with caplog.at_level(logging.WARNING):
        assert {arrived(admission).enter([], "tok_a") for _ in range(100)} == {None}
        assert not caplog.records
        assert refusal(arrived(admission)) == (429, 1)
    (record,) = caplog.records
    assert record.getMessage() == "192.0.2.1: too many new connections or requests"


def test_the_log_of_a_flood_is_bounded_and_counts(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    admission = AdmissionControl(LimitSettings(failed_logins_per_minute=1), clock=clock)
    with caplog.at_level(logging.WARNING):
        quota = arrived(admission)
        for _ in range(1000):
            quota.failed()
        clock.now += 10
        quota.failed()
    assert [record.getMessage() for record in caplog.records] == [
        "192.0.2.1: no valid token",
        "192.0.2.1: no valid token (and 999 more since the last time)",
    ]


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "enter", "admit", "holds", "failed", "leave"]),
        st.integers(0, 9),
        st.sampled_from(["192.0.2.1", "192.0.2.2", "10.0.0.1", "2001:db8::1", "2001:db8::2"]),
    ),
    max_size=60,
)


@given(EVENTS)
def test_the_counts_return_to_zero_in_any_order_of_events(events: list[tuple[str, int, str]]) -> None:
    limits = LimitSettings(connections_per_token=2, connections_per_address=3, waiting_connections=3)
    admission = AdmissionControl(limits, ["10.0.0.0/8"], clock=Clock())
    visits: list[ConnectionQuota] = []
    for kind, number, host in events:
        if kind == "arrive":
            quota = admission.arrive(host)
            visits += [quota] if quota is not None else []
        elif visits:
            quota = visits[number % len(visits)]
            match kind:
                case "enter":
                    quota.enter([host], f"tok_{number % 2}" if number % 3 else "")
                case "admit" if not quota._token_id:
                    quota.admit(f"tok_{number % 2}")
                case "holds":
                    quota.holds(number)
                case "failed":
                    quota.failed()
                case "leave":
                    quota.leave()
        assert len(admission.unauthenticated) <= 3
        assert all(count <= 2 for count in admission._by_token.values())
        homes = {name: known for name, known in admission._addresses.items() if name not in admission.proxies}
        assert all(known.connections >= admission.unauthenticated.at(name) for name, known in homes.items())
    for quota in visits:
        quota.leave()
    assert len(admission.unauthenticated) == 0
    assert not admission.unauthenticated._at and not admission.unauthenticated._with
    assert not admission._by_token
    assert not admission.held_by_token
    assert all(a.connections == 0 for a in admission._addresses.values())
