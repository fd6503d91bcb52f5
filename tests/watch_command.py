"""``lattice remote watch --json`` during faults: it must print every change once."""

import json
import signal
import subprocess
import threading
from collections.abc import Callable
from typing import Any, Self

from lattice_remote.client.cli.watch import GONE_EXIT_CODE
from sandbox import Client, wait_for

__all__ = ["Watcher"]

_PATIENCE_S = 60.0


class Watcher:
    """The command and its output; a context manager."""

    def __init__(
        self,
        client: Client,
        *argv: str,
        position: Callable[[], tuple[str, int]] | None = None,
        oldest: Callable[[], int] = lambda: 1,
    ) -> None:
        self._client, self._argv, self._position, self._oldest = client, argv, position, oldest
        self._lock = threading.Lock()
        self._records: list[dict[str, Any]] = []
        self._process: subprocess.Popen[str]
        self._thread = threading.Thread(target=self._read, daemon=True)
        self.said: list[str] = []
        """Lines of its stderr."""
        self._stderr = threading.Thread(target=self._hear, daemon=True)

    def __enter__(self) -> Self:
        self._process = self._client.popen("remote", "watch", "--json", *(self._argv or ("--since", "0")))
        self._thread.start()
        self._stderr.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> int:
        """End it as Ctrl-C does; return its exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        code = self._process.wait(timeout=20)
        self._thread.join(10)
        self._stderr.join(10)
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()
        return code

    @property
    def records(self) -> list[dict[str, Any]]:
        """Records so far."""
        with self._lock:
            return list(self._records)

    @property
    def numbers(self) -> list[tuple[str, int]]:
        """Epoch and number of each change, in order. The last record may be the error that it ended with."""
        return [(record["epoch"], record["seq"]) for record in self.records if "seq" in record]

    def check(self) -> int:
        """Check that every change up to the others' position came once and in order; return their number.

        Changes that have left the journal may be missing.
        """
        assert self._position is not None, "it was made to be compared"

        def is_there() -> bool:
            code = self._process.poll()
            if code == GONE_EXIT_CODE and self._oldest() > max((seq for _, seq in self.numbers[-1:]), default=0) + 1:
                return True  # it was slower than the journal's retention, as documented
            assert code is None, f"it has ended with exit code {code}: {self.said[-5:]}"
            epoch, seq = self._position()
            return seq == 0 or self.numbers[-1:] == [(epoch, seq)]  # an epoch without changes has no records

        wait_for(is_there, "the watcher to be where the others are", _PATIENCE_S)
        told = self.numbers
        assert len(set(told)) == len(told), "a change was told twice"
        oldest = self._oldest()
        for (epoch, seq), (before, last) in zip(told[1:], told, strict=False):
            expected = last + 1 if epoch == before else 1
            assert seq == expected or expected < seq <= oldest, f"after {before}:{last} came {epoch}:{seq}"
        return len(told)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            record = json.loads(line)
            with self._lock:
                self._records.append(record)

    def _hear(self) -> None:
        assert self._process.stderr is not None
        self.said += map(str.rstrip, self._process.stderr)
