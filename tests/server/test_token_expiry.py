"""Parsing and display of expiry times."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_remote.errors import Misuse
from lattice_remote.server.tokens import duration, expiry, shown

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("90d", NOW + timedelta(days=90)),
        ("1m", NOW + timedelta(minutes=1)),
        ("12h", NOW + timedelta(hours=12)),
        ("52w", NOW + timedelta(weeks=52)),
        ("2030-12-31", datetime(2030, 12, 31, tzinfo=UTC)),
        ("2030-12-31T10:00:00Z", datetime(2030, 12, 31, 10, tzinfo=UTC)),
        ("2030-12-31t10:00:00.5z", datetime(2030, 12, 31, 10, 0, 0, 500_000, tzinfo=UTC)),
        ("2030-12-31 10:00:00-05:00", datetime(2030, 12, 31, 10, tzinfo=timezone(timedelta(hours=-5)))),
        ("never", None),
    ],
)
def test_accepted_times(text: str, moment: datetime | None) -> None:
    assert expiry(text, NOW) == moment


NO_DURATIONS = ["", "90", "d", "0d", "-1d", "1.5d", "90 d", "90D", "90x", "999999w", "tomorrow", "Never", "٣d", "90d\n"]
NO_DATES = ["2030-13-01", "2030-02-30", "20301231", "2030-W01-1", "2030-12-31T10:00", "2030-12-31T25:00:00Z"]
PASSED = ["2029-12-31", "2030-01-01", "2030-01-01T00:00:00+00:01"]
TOO_FAR = ["9999-12-31T23:59:59-14:00"]


@pytest.mark.parametrize("text", NO_DURATIONS + NO_DATES + PASSED + TOO_FAR)
def test_an_unparsable_or_past_time_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(Misuse) as caught:
        expiry(text, NOW)
    assert "\n" not in caught.value.message.replace(repr(text), "")


_TEXTS = (
    st.text(max_size=40)
    | st.from_regex(r"[0-9]{1,6}[smhdw]", fullmatch=True)
    | st.from_regex(r"20[2-4][0-9]-[01][0-9]-[0-3][0-9]([Tt ][0-2][0-9]:[0-5][0-9]:[0-5][0-9]Z)?", fullmatch=True)
)


@given(_TEXTS)
def test_any_text_is_a_moment_to_come_or_misuse(text: str) -> None:
    try:
        moment = expiry(text, NOW)
    except Misuse:
        return
    assert moment is None or moment > NOW


@given(st.integers(1, 999_999), st.sampled_from("mhdw"))
def test_a_duration_is_its_number_times_its_unit(number: int, unit: str) -> None:
    minutes = {"m": 1, "h": 60, "d": 1440, "w": 10080}[unit]
    assert duration(f"{number}{unit}") == timedelta(minutes=number * minutes)


def test_a_moment_is_shown_in_utc_to_the_second() -> None:
    there = datetime(2030, 1, 1, 1, 2, 3, 999, tzinfo=timezone(timedelta(hours=1)))
    assert shown(there, "never") == "2030-01-01T00:02:03Z"
    assert shown(None, "never") == "never"
