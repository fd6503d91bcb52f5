"""When the newest changes were committed: how fast a project is written, and how long ago a change was.

By the clock that is passed in, in seconds; any that only goes forward.
"""

from collections import deque

__all__ = ["Pace"]

_MINUTE_S = 60.0


class Pace:
    """The times of the newest changes, at most ``most`` of them."""

    def __init__(self, most: int = 20_000) -> None:
        self._times: deque[float] = deque(maxlen=most)
        self._last = 0

    def committed(self, seq: int, now: float) -> None:
        """Change ``seq`` is durable and told to everybody. Another than the next begins anew."""
        if seq != self._last + 1:
            self._times.clear()
        self._times.append(now)
        self._last = seq

    def age_of(self, seq: int, now: float) -> float | None:
        """Return how long ago a change was committed; None when that is not known here."""
        back = self._last - seq
        return now - self._times[-1 - back] if 0 <= back < len(self._times) else None

    def per_minute(self, now: float) -> int:
        """Return how many changes were committed within the last minute; from what is known where that is less."""
        times = self._times
        if len(times) == times.maxlen and now - times[0] < _MINUTE_S:
            return round(len(times) * _MINUTE_S / max(now - times[0], 1.0))
        count = 0
        for time in reversed(times):
            if now - time >= _MINUTE_S:
                break
            count += 1
        return count
