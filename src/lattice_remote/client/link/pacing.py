"""When a link tries again: growing random delays, and when not even a command's wish cuts one short. No I/O.

Three things make a delay. Failure after failure it grows, with full jitter, up to ``MAX_DELAY_S``; only a connection
that lasted starts it anew. A refusal is looked at again rarely, for only a change elsewhere can mend it. And a server
that asks to be left alone, or that makes its clients begin anew time after time, *bars* the way: until then commands
fail at once and say why, however many come.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["MAX_BAR_S", "MAX_DELAY_S", "MAX_RESETS", "MIN_UPTIME_S", "RESET_WINDOW_S", "Pace"]

FIRST_DELAY_S, MAX_DELAY_S = 0.2, 15.0
REFUSED_DELAY_S, MAX_REFUSED_DELAY_S = 30.0, 300.0
MIN_UPTIME_S = 5.0
"""A connection must have lasted this long, and got the copy up to date, for the delay to start again from the least."""
MAX_BAR_S = 300.0
"""The longest that a server can keep its clients away by asking."""
MAX_RESETS, RESET_WINDOW_S, RESET_BAR_S = 10, 600.0, 30.0
"""So many new beginnings within the window, and the next one is put off; longer with each further one."""


@dataclass(slots=True)
class Pace:
    """One link's patience. All times are seconds on one monotonic clock that the caller reads."""

    uniform: Callable[[float, float], float] = random.uniform
    streak: int = 0
    """How many connections or attempts in a row have not lasted."""
    _resets: deque[float] = field(default_factory=deque)
    _is_reset: bool = False
    _barred_until: float = float("-inf")

    def was_reset(self, now: float) -> None:
        """The server has made this copy begin anew."""
        self._resets.append(now)
        self._is_reset = True

    def resets(self, now: float) -> int:
        """Return how many new beginnings there were within the window."""
        while self._resets and self._resets[0] < now - RESET_WINDOW_S:
            self._resets.popleft()
        return len(self._resets)

    def ended(
        self,
        now: float,
        *,
        lasted: bool,
        is_refused: bool = False,
        retry_after_s: float | None = None,
        binds: bool = True,
    ) -> float:
        """A connection, or the attempt to make one, has ended: return how long to wait before the next.

        Args:
            lasted: whether it was worth having; then the next delays are short again.
            is_refused: whether trying again changes nothing until something else does.
            retry_after_s: when the server asks to come back, None when it does not.
            binds: whether that is a wish to be left alone, and not only a guess when it will be back.
        """
        self.streak = 0 if lasted else self.streak + 1
        excess = self.resets(now) - MAX_RESETS
        if self._is_reset and excess >= 0:
            self._bar(now, RESET_BAR_S * 2 ** min(excess, 10))
        self._is_reset = False
        if retry_after_s is not None and binds:
            self._bar(now, retry_after_s)
        return max(self._delay(is_refused, retry_after_s), self.barred_s(now) + self._jitter())

    def barred_s(self, now: float) -> float:
        """Return for how long no attempt may be made, whoever wants one; 0 when one may."""
        return max(0.0, self._barred_until - now)

    def lift(self) -> None:
        """What was in the way has changed: try again as if for the first time."""
        self.streak = 0

    def _delay(self, is_refused: bool, retry_after_s: float | None) -> float:
        # The exponent is bounded too: after a thousand failures the power alone would be past any float.
        doubled = 2 ** min(self.streak, 10)
        if is_refused:
            return self.uniform(REFUSED_DELAY_S / 2, min(MAX_REFUSED_DELAY_S, REFUSED_DELAY_S / 2 * doubled))
        if retry_after_s is not None:
            return min(retry_after_s, MAX_BAR_S) + self._jitter()
        return self.uniform(0, min(MAX_DELAY_S, FIRST_DELAY_S * doubled))

    def _bar(self, now: float, seconds: float) -> None:
        self._barred_until = max(self._barred_until, now + min(seconds, MAX_BAR_S))

    def _jitter(self) -> float:
        return self.uniform(0, FIRST_DELAY_S)
