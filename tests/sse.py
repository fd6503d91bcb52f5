"""Client of ``events/stream`` on a plain socket; it parses the stream as browsers do."""

import contextlib
import http.client
import json
import socket
import ssl
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

__all__ = ["Event", "Listening", "assembled"]


@dataclass(frozen=True)
class Event:
    """One event; ``id`` is the last id that preceded it."""

    kind: str
    id: str
    data: Any


class Listening:
    """An open stream: a context manager, and an iterator over its events."""

    def __init__(
        self,
        port: int,
        token: str,
        slug: str = "web",
        *,
        last: str | None = None,
        since: str | None = None,
        timeout_s: float = 20.0,
        headers: dict[str, str] | None = None,
        path: str = "events/stream",
        trusting: ssl.SSLContext | None = None,
    ) -> None:
        self._connection = (
            http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
            if trusting is None
            else http.client.HTTPSConnection("localhost", port, timeout=timeout_s, context=trusting)
        )
        self.id = last or ""
        """The last id that was said."""
        self.comments: list[str] = []
        self.positions: list[Event] = []
        """The events that only say where the stream is, at its start and in silence."""
        self.retry_ms: int | None = None
        query = "" if since is None else f"?since={since}"
        sent = {"Authorization": f"Bearer {token}", "Accept": "text/event-stream", **(headers or {})}
        try:
            self._ask(f"/projects/{slug}/{path}{query}", sent if last is None else {**sent, "Last-Event-ID": last})
        except BaseException:
            self._connection.close()
            raise
        self._events = self._read()

    def _ask(self, address: str, headers: dict[str, str]) -> None:
        self._connection.request("GET", address, headers=headers)
        assert self._connection.sock is not None
        self.socket: socket.socket = self._connection.sock
        self.response = self._connection.getresponse()
        self.status = self.response.status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave."""
        self.response.close()
        self._connection.close()

    def hang_up(self) -> None:
        """End the iteration, in any thread. ``close()`` it afterwards."""
        with contextlib.suppress(OSError):  # the other side was faster
            self.socket.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        """Reset the connection, as a machine that was switched off."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def __iter__(self) -> Iterator[Event]:
        return self._events

    def __next__(self) -> Event:
        return next(self._events)

    def take(self, count: int) -> list[Event]:
        """Return the next ``count`` events."""
        return [next(self._events) for _ in range(count)]

    def until(self, *, ends: str) -> list[Event]:
        """Return the events up to the one with this id."""
        taken = []
        while self.id != ends:
            taken.append(next(self._events))
        return taken

    def _read(self) -> Iterator[Event]:
        kind, data = "message", []
        for line in self.response:
            field, _, value = line.decode().rstrip("\n").partition(":")
            value = value.removeprefix(" ")
            if field == "id":
                self.id = value
            elif field == "event":
                kind = value
            elif field == "data":
                data.append(value)
            elif field == "retry":
                self.retry_ms = int(value)
            elif not field and value:
                self.comments.append(value)
            elif not field:
                if kind == "position":
                    self.positions.append(Event(kind, self.id, json.loads("\n".join(data))))
                elif data:
                    yield Event(kind, self.id, json.loads("\n".join(data)))
                kind, data = "message", []


def assembled(events: list[Event]) -> list[tuple[str, int]]:
    """Return epoch and number of the events' changes; each must be whole and in order."""
    changes: list[tuple[str, int]] = []
    had = 0
    for event in events:
        change, _, part = event.id.partition(".")
        if part:
            assert int(part) == had + 1, f"event {event.id} came after {had} of its change"
            had += 1
            continue
        epoch, number, *_ = change.split("-")
        changes.append((epoch, int(number)))
        had = 0
    assert had == 0, "the last change was not told to its end"
    return changes
