"""A project whose hook writes down the id of every event, and what must be true of that list."""

import json
from collections import Counter
from collections.abc import Iterable

from account import events_in
from sandbox import Server, wait_for

__all__ = ["Hooked"]


class Hooked:
    """The list that a project's ``post_event`` hook writes, one event's id a line."""

    def __init__(self, server: Server) -> None:
        self._lattice_dir = server.lattice_dir()
        self._list = server.log.parent / "hooked"

    def install(self) -> None:
        """Set up the hook; before the server starts."""
        self._list.touch()
        config = self._lattice_dir / "config.json"
        settings = json.loads(config.read_text())
        # The bound on the size of files with which the soak fills the disk must not tear this list.
        append = f'ulimit -S -f unlimited; echo "$LATTICE_EVENT_ID" >> "{self._list}"'
        settings["hooks"] = {"post_event": append}
        config.write_text(json.dumps(settings, sort_keys=True, indent=2) + "\n")

    def ids(self) -> list[str]:
        """Return the events for which it ran, in order."""
        return self._list.read_text().splitlines()

    def check_at_most_once(self, *, but: Iterable[str] = ()) -> int:
        """No event twice, and none that is not there; ``but`` those that a rollback took. Returns how many."""
        ids = self.ids()
        twice = [event for event, count in Counter(ids).items() if count > 1]
        events = {event["id"] for event in events_in(self._lattice_dir)}
        assert not twice, f"hooks ran twice for {twice}"
        unfounded = set(ids) - events - set(but)
        assert not unfounded, f"hooks ran for events that there are not: {unfounded}"
        return len(ids)

    def check_exactly_once_in_order(self) -> None:
        """Nothing struck: every event once, in the order of their commands."""
        events = {event["id"]: event["ts"] for event in events_in(self._lattice_dir)}
        wait_for(lambda: len(self.ids()) >= len(events), f"the hooks of {len(events)} events to have run")
        ids = self.ids()
        assert sorted(ids) == sorted(events)
        times = [events[event] for event in ids]
        assert times == sorted(times), "hooks ran out of order"
