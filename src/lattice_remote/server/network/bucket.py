"""How much at once, and how much in the long run."""

__all__ = ["Bucket"]


class Bucket:
    """``burst`` at once, and ``rate`` a second in the long run."""

    __slots__ = ("_at", "_left")

    def __init__(self, burst: float, now: float) -> None:
        self._left = burst
        self._at = now

    def take(self, now: float, *, rate: float, burst: float) -> float:
        """Take one and return 0.0; or, when there is none, in how many seconds there will be."""
        self._left = min(burst, self._left + (now - self._at) * rate)
        self._at = now
        if self._left < 1.0:
            return (1.0 - self._left) / rate
        self._left -= 1.0
        return 0.0
