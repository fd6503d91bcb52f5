"""An independent observer: follows the server directly, not through the proxy, and keeps every change."""

import asyncio
import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from lattice_remote.client.cache.replicator import ReceiveOutcome
from lattice_remote.protocol.change_summary import is_log, texts_of
from lattice_remote.protocol.messages import Change, Hello, ServerFrame, Welcome
from lattice_remote.protocol.operations import AppendBytes, PutFile
from lattice_remote.server.journal.contents import counterpart
from memory_client import MemoryClient
from sandbox import Server, tree_of, wait_for

__all__ = ["Observer"]

_PATIENCE_S = 60.0


class _Witness(MemoryClient):
    """A cache in memory that records each received change, also those that its replica ignores."""

    def __init__(self, url: str, token: str) -> None:
        super().__init__(url, token)
        self.marks: dict[tuple[str, int], bytes] = {}
        self.owners: dict[tuple[str, str] | str, set[str]] = {}
        self._known: dict[str, set[bytes]] = {}
        """Lines that a log, and words that a text has held, by the path that it has while its task is active."""
        self.welcomes = 0
        self.defects: list[str] = []
        self._hello: Hello
        self._epoch, self._seq = "", 0

    async def hello(self) -> Hello:
        self._hello = await super().hello()
        return self._hello

    async def receive(self, frames: Iterable[ServerFrame]) -> ReceiveOutcome:
        outcome = ReceiveOutcome()
        for frame in frames:
            if isinstance(frame, Welcome):
                self.welcomes += 1
                self._epoch = frame.epoch
                self._seq = frame.head if frame.resync else self._hello.seq
            elif isinstance(frame, Change):
                self._saw(frame)
            of_one = await super().receive([frame])
            outcome.to_send += of_one.to_send
            outcome.answers += of_one.answers
        return outcome

    def _saw(self, change: Change) -> None:
        if change.seq != self._seq + 1:
            self.defects.append(f"change {change.seq} came after {self._seq}, in one epoch and connection (I1)")
        self._seq = change.seq
        if self.marks.setdefault((self._epoch, change.seq), change.mark) != change.mark:
            self.defects.append(f"two different changes {change.seq} in epoch {self._epoch} (I7)")
        if self.is_current:
            self._attribute(change)

    def _attribute(self, change: Change) -> None:
        """Record the token of each event, and of each word that is new in a text."""
        owner = change.token_actor or (change.actor if change.token_id else "")
        texts = {path for path, _, _ in texts_of(change)}
        for operation in change.ops:
            path = operation.path
            if not isinstance(operation, PutFile | AppendBytes) or not (is_log(path) or path in texts):
                continue
            # A line or word belongs to the change that brought it first. An editor that saves in two halves removes
            # words for a moment; the next edit restores them when it is merged.
            name = path.removeprefix("archive/")
            known = self._known.setdefault(name, set())
            divide = bytes.splitlines if is_log(path) else bytes.split
            known |= {piece for each in (name, counterpart(name)) for piece in divide(self.files.get(each, b""))}
            new = set(divide(operation.data)) - known
            known |= new
            for piece in new:
                what = _event_in(piece) if is_log(path) else piece.decode(errors="replace")
                if what is not None:
                    self.owners.setdefault(what, set()).add(owner)


def _event_in(line: bytes) -> tuple[str, str] | None:
    """Return who caused an event and its kind; None for a session, which has no name of its own."""
    event = json.loads(line)
    return (event["actor"].partition(":")[2], event["type"]) if isinstance(event["actor"], str) else None


class Observer:
    """An observer in a thread; a context manager. Wait for ``current()`` before asking for its position."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._witness = _Witness(server.url, server.token("human:observer"))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._loop.call_soon_threadsafe(self._witness.start)
        self.current()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._witness.close(), self._loop).result(_PATIENCE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE_S)
        self._loop.close()

    @property
    def position(self) -> tuple[str, int]:
        """Epoch and number of its cache."""
        position = self._witness.replica.position
        return position.epoch, position.seq

    @property
    def changes(self) -> int:
        """Number of different changes that it received."""
        return len(self._witness.marks)

    @property
    def owners(self) -> dict[tuple[str, str] | str, set[str]]:
        """Owners of the tokens of each seen effect and word; "" for an edit in the server's directory."""
        return dict(self._witness.owners)

    def current(self, *, not_in: str | None = None) -> None:
        """Wait until it has all that the server has announced, in another epoch than ``not_in`` if given."""
        self._loop.call_soon_threadsafe(self._witness.link.try_again)

        def is_there() -> bool:
            return self._witness.link.is_open and self._witness.is_current and self.position[0] != not_in

        wait_for(is_there, f"the observer to be current, at {self.position}, not in epoch {not_in}", _PATIENCE_S)

    def forget(self, epoch: str, after: int) -> None:
        """Forget an epoch into which the server was restored: its later changes happen again."""

        def forget() -> None:
            for key in [key for key in self._witness.marks if key[0] == epoch and key[1] > after]:
                del self._witness.marks[key]

        self._loop.call_soon_threadsafe(forget)

    def check(self) -> None:
        """Check the received changes (I1, I7), and that its cache equals the server's files (I3)."""
        assert not self._witness.defects, f"the observer was told: {self._witness.defects}"
        self.current()

        def differing() -> list[str]:
            there, here = tree_of(self._lattice_dir), dict(self._witness.files)
            return sorted(path for path in there.keys() | here.keys() if there.get(path) != here.get(path))

        try:
            wait_for(lambda: not differing(), "the observer to equal the server", _PATIENCE_S)
        except TimeoutError:
            raise AssertionError(f"the observer at {self.position} differs from the server in {differing()}") from None

    @property
    def _lattice_dir(self) -> Path:
        return self._server.lattice_dir()
