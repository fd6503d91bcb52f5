"""Listener to ``events/stream`` during faults: it must get each change of the journal once."""

import http.client
import itertools
import threading
from collections.abc import Callable
from typing import Self

from account import oldest_change
from lattice_remote.protocol.change_summary import summarize
from lattice_remote.protocol.messages import Change, decode_server_frame
from lattice_remote.server.journal.segment import JournalReader
from sandbox import Server, wait_for
from sse import Event, Listening, assembled

__all__ = ["EventsWatcher"]

_PATIENCE_S = 60.0
_SILENCE_S = 15.0
"""Longer than a server is silent: on a connection that is half open nothing comes any more."""
_AGAIN_S = 0.1


class EventsWatcher:
    """Listener in a thread, through ``port``; it reconnects as browsers do. A context manager."""

    def __init__(self, server: Server, port: int, token: str, *, position: Callable[[], tuple[str, int]]) -> None:
        self._server, self._port, self._token, self._position = server, port, token, position
        self._runs: list[list[Event]] = [[]]  # each begins with a reset, but for the first
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._last: str | None = None
        self._listening: Listening | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._over.set()
            if self._listening is not None:
                self._listening.hang_up()
        self._thread.join(_SILENCE_S + 10)
        assert not self._thread.is_alive(), "the listener has left"

    def check(self) -> int:
        """Check that all changes up to the others' position came whole, once and in order; count the events."""
        epoch, seq = self._position()
        here = f"{epoch}-{seq}-"
        wait_for(lambda: seq == 0 or f"{self._last}-".startswith(here), f"the listener to be at {here}", _PATIENCE_S)
        with self._lock:
            runs = [list(run) for run in self._runs]
        for run in runs:
            begin = run[0] if run and run[0].kind == "reset" else None
            changes = assembled(run[1:] if begin else run)
            if begin:
                changes.insert(0, (begin.data["epoch"], begin.data["seq"]))
            for (one, before), (other, number) in itertools.pairwise(changes):
                assert (other, number) == (one, before + 1), f"after {one}-{before} came {other}-{number}"
        self._compare_with_journal(runs[-1], epoch)
        return sum(map(len, runs))

    def _compare_with_journal(self, run: list[Event], epoch: str) -> None:
        """Check that the events since the last reset are those of the journal."""
        told: dict[int, list[str]] = {}
        for event in run:
            if event.kind in ("task_event", "resource_event"):
                assert event.id.startswith(f"{epoch}-"), f"{event.id} is not of epoch {epoch}"
                number = int(event.id.split("-")[1])
                told.setdefault(number, []).append(event.data["event"]["id"])
        first = run[0].data["seq"] if run and run[0].kind == "reset" else 0
        expected: dict[int, list[str]] = {}
        for record in JournalReader(self._server.data / "projects" / "board" / "journal").records():
            if record.change is not None and record.seq > first:
                change = decode_server_frame(record.change)
                assert isinstance(change, Change)
                if events := [event["id"] for event in summarize(change).events]:
                    expected[record.seq] = events
        oldest = oldest_change(self._server)
        assert {number: ids for number, ids in told.items() if number >= oldest} == expected

    def _watch(self) -> None:
        while not self._over.wait(_AGAIN_S):
            try:
                with Listening(self._port, self._token, "board", **self._where(), timeout_s=_SILENCE_S) as listening:
                    with self._lock:
                        self._listening = listening
                        if self._over.is_set():
                            return
                    for event in listening if listening.status == 200 else ():
                        self._take(event)
            except (OSError, http.client.HTTPException):
                continue

    def _where(self) -> dict[str, str]:
        return {"since": "0"} if self._last is None else {"last": self._last}

    def _take(self, event: Event) -> None:
        with self._lock:
            if event.kind == "reset":
                self._runs.append([])
            self._runs[-1].append(event)
            self._last = event.id
