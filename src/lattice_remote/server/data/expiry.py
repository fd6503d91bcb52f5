"""When something ends, as a person writes it: a number and a unit from now, or an RFC 3339 date."""

import re
from datetime import UTC, datetime, timedelta

from lattice_remote.errors import Misuse

__all__ = ["duration", "expiry", "shown"]

_DURATION = re.compile(r"([1-9][0-9]{0,5})([mhdw])")
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DATE = re.compile(r"\d{4}-\d\d-\d\d([Tt ]\d\d:\d\d:\d\d(\.\d{1,6})?([Zz]|[+-]\d\d:\d\d))?", re.ASCII)


def duration(text: str) -> timedelta:
    """Return the time that ``30m``, ``12h``, ``90d`` or ``52w`` means.

    Raises:
        Misuse: it is nothing like that, or 0.
    """
    matched = _DURATION.fullmatch(text)
    if matched is None:
        raise Misuse(f"bad time {text!r}: expected a number and m, h, d or w, for example 90d")
    return timedelta(**{_UNITS[matched[2]]: int(matched[1])})


def expiry(text: str, now: datetime) -> datetime | None:
    """Return the moment that ``text`` names, None for ``never``. A date alone is its beginning in UTC.

    Raises:
        Misuse: it is neither a duration nor a date nor ``never``, or has passed, or is past the year 9999.
    """
    if text == "never":
        return None
    try:
        moment = now + duration(text) if _DATE.fullmatch(text) is None else _date(text)
    except (ValueError, OverflowError) as error:
        raise Misuse(f"bad date {text!r}: {error}") from error
    except Misuse as error:
        raise Misuse(f"bad --expires {text!r}: expected for example 90d, 2030-12-31, or never") from error
    if moment <= now:
        raise Misuse(f"{text} has passed already; name a later time")
    return moment


def shown(moment: datetime | None, otherwise: str) -> str:
    """Return a moment in UTC for people, to the second; ``otherwise`` when there is none."""
    return otherwise if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _date(text: str) -> datetime:
    moment = datetime.fromisoformat(text.upper().replace(" ", "T"))
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
