"""Connections that have shown no token, by address: which of them goes when they are too many.

It is one of the address that has the most, so who comes again and again pushes out his own connections and nobody
else's. Of addresses that have as many, the one that has had so many for longest gives one up, its oldest.

Every step takes the same time, however many there are.
"""

from collections.abc import Hashable

__all__ = ["Strangers"]


class Strangers[T: Hashable]:
    """All of them; each is at one address."""

    def __init__(self) -> None:
        self._address_of: dict[T, str] = {}
        self._at: dict[str, dict[T, None]] = {}  # by address, the oldest first
        self._with: list[dict[str, None]] = []  # [n]: addresses that have n; the last is not empty

    def __len__(self) -> int:
        return len(self._address_of)

    def at(self, address: str) -> int:
        """Return how many there are at an address."""
        return len(self._at.get(address, ()))

    def oldest_at(self, address: str) -> T:
        """Return the one that has been at an address for longest; there is at least one."""
        return next(iter(self._at[address]))

    def put(self, stranger: T, address: str) -> None:
        """Add one, or note that it belongs to this address."""
        self.remove(stranger)
        self._address_of[stranger] = address
        self._at.setdefault(address, {})[stranger] = None
        self._recount(address, self.at(address) - 1)

    def remove(self, stranger: T) -> None:
        """Forget one, if it is known."""
        address = self._address_of.pop(stranger, None)
        if address is not None:
            del self._at[address][stranger]
            self._recount(address, self.at(address) + 1)
            if not self._at[address]:
                del self._at[address]

    def next_to_go(self) -> T:
        """Return the one that makes room; there is at least one."""
        return next(iter(self._at[next(iter(self._with[-1]))]))

    def _recount(self, address: str, before: int) -> None:
        """Note that an address has one more or one less than ``before``."""
        count = self.at(address)
        if before:
            del self._with[before][address]
        if count:
            self._with += [{} for _ in range(len(self._with), count + 1)]
            self._with[count][address] = None
        while self._with and not self._with[-1]:
            self._with.pop()
